"""Backbone, layouts, positions, heads."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing import assert_close

from vimpac.config import ModelConfig
from vimpac.model import Backbone, ClassificationModel, PretrainModel
from vimpac.model.heads import BatchNorm
from vimpac.model.positions import interpolate
from vimpac.ops import axial_attention_reference

TINY = ModelConfig(
    layers=2, width=16, heads=4, grid=(2, 3, 4), dropout=0.0, head_layers=2, head_width=8, head_out=4, vocab_size=20
)
LAYOUTS = ["T,H|W", "T,H,W", "T|H|W", "H|W,T", "T,HxW", "TxHxW", "T", "W|T,HxT"]


def tiny(**options):
    return dataclasses.replace(TINY, **options)


def tokens(config=TINY, clips=3):
    return torch.randint(config.vocab_size, (clips, *config.grid), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "config, parameters",
    [
        (ModelConfig.small(), 29_442_048),
        (ModelConfig.base(), 119_748_096),
        (ModelConfig.large_half(), 210_106_368),
        (ModelConfig.small(layout="T,H,W"), 35_751_936),  # Table 13: 35.8M
        (ModelConfig.small(layout="TxHxW"), 23_132_160),  # Table 13: 23.1M
        (ModelConfig.small(layout="T,HxW"), 29_442_048),  # Table 13 says 27.1M, which the equations do not give
    ],
)
def test_parameters_of_tables_3_and_13(config, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in Backbone(config).parameters()) == parameters


def plain_backbone(model, ids):
    """Eq. 7-15 written out block by block on separate token and [CLS] states, with attention's reference."""
    b, c = model, model.config
    x = b.embedding(ids) + b.positions.time[:, None, None] + b.positions.height[None, :, None] + b.positions.width[None, None]
    x, cls = b.embedding_norm(x), b.embedding_norm(b.cls + b.positions.cls).expand(len(ids), -1)
    pad = ids == c.pad_id
    for layer in b.layers:
        for block in layer.attention:
            split = lambda y, block=block: block.qkv(y).unflatten(-1, (3, c.heads, -1))  # noqa: E731
            read, read_cls = (x, cls) if c.norm == "post" else (block.norm(x), block.norm(cls))
            a, a_cls = axial_attention_reference(split(read), split(read_cls), block.axes, pad, cls_in_context=c.cls_in_context)
            if c.norm == "pre":
                x, cls = read, read_cls
            x, cls = x + block.project(a.flatten(-2)), cls + block.project(a_cls.flatten(-2))
            if c.norm == "post":
                x, cls = block.norm(x), block.norm(cls)
        mlp = layer.mlp
        for_mlp = mlp.norm if c.norm != "post" else (lambda y: y)
        x, cls = (y + mlp.project(F.gelu(mlp.expand(for_mlp(y)))) for y in (x, cls))
        if c.norm == "post":
            x, cls = mlp.norm(x), mlp.norm(cls)
    return b.final_norm(cls), b.final_norm(x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["post", "pre", "pre-vit"])
@pytest.mark.parametrize("cls_in_context", [True, False])
def test_every_layout_matches_the_equations(layout, norm, cls_in_context):
    config = tiny(layout=layout, norm=norm, cls_in_context=cls_in_context, heads=6, width=24, attention_width=12, mlp_width=20)
    model = Backbone(config).double()
    for p in model.parameters():  # away from the initial zeros and ones
        torch.nn.init.normal_(p, std=0.3)
    ids = tokens(config)
    ids[0, 1] = config.pad_id  # a clip of one frame
    got, expected = model(ids), plain_backbone(model, ids)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-9)  # float64, the same sums in another order
    grads = [torch.autograd.grad((y[0] * 3).sum() + y[1].square().sum(), list(model.parameters())) for y in (got, expected)]
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_padding_is_never_seen():
    """What lies behind PAD positions (their position embeddings) does not reach visible tokens or [CLS]'s keys."""
    model = Backbone(tiny(layout="T")).eval()
    ids = tokens()
    ids[:, 1] = TINY.pad_id
    before = model(ids)[1][:, 0]
    with torch.no_grad():
        model.positions.time[1] += torch.randn(16)
    assert_close(model(ids)[1][:, 0], before, rtol=0, atol=0)
    with torch.no_grad():
        model.positions.time[0] += torch.randn(16)
    assert (model(ids)[1][:, 0] - before).abs().max() > 0.1


def test_padded_false_is_a_promise_only():
    model, ids = Backbone(TINY).eval(), tokens()
    for a, b in zip(model(ids), model(ids, padded=False), strict=True):
        assert_close(a, b)


def test_wrong_grid_names_both():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\), got shape \(1, 2, 3, 5\)"):
        Backbone(TINY)(torch.zeros(1, 2, 3, 5, dtype=torch.int64))


def test_dropout_is_reproducible_and_only_in_training():
    model, ids = Backbone(tiny(dropout=0.3)), tokens()

    def run(seed):
        torch.manual_seed(seed)
        return model(ids)[1]

    assert_close(run(0), run(0), rtol=0, atol=0)
    assert (run(0) - run(1)).abs().max() > 0.1
    model.eval()
    assert_close(run(0), run(1), rtol=0, atol=0)


def test_dropout_reaches_the_attention_probabilities(monkeypatch):
    import vimpac.model.backbone as backbone

    monkeypatch.setattr(backbone.F, "dropout", lambda x, *_: x)  # leaves only the probabilities' dropout
    model, ids = Backbone(tiny(dropout=0.3)), tokens()
    assert (model(ids)[1] - model(ids)[1]).abs().max() > 1e-3


def test_activation_checkpointing_gives_the_same_gradients():
    grads = []
    for on in (False, True):
        torch.manual_seed(0)
        model = Backbone(tiny(dropout=0.2))
        model.activation_checkpointing = on
        torch.manual_seed(1)
        model(tokens())[1].square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["post", "pre", "pre-vit"])
def test_initialisation(norm):
    torch.manual_seed(0)
    config = ModelConfig(layers=4, width=256, heads=4, grid=(64, 64, 64), norm=norm, head_width=64)
    model = PretrainModel(config)
    b = model.backbone
    block = b.layers[0].attention[0]
    residual = 0.02 / 12**0.5 if norm != "post" else 0.02  # 4 layers × (2 attention blocks + MLP)
    for weight, std in [
        (b.embedding.weight, 0.02),
        (b.positions.time, 0.02 / 3**0.5),
        (block.qkv.weight, 0.02),
        (block.project.weight, residual),
        (b.layers[3].mlp.project.weight, residual),
        (b.layers[3].mlp.expand.weight, 0.02),
        (model.token_head.dense.weight, 0.02),
        (model.cls_head.out.weight, 0.02),
    ]:
        assert_close(weight.std().item(), std, rtol=0.03, atol=0)  # ≥ 16,384 draws: three standard errors are 1.7 %
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name


def test_token_head_is_tied_to_the_embedding():
    model = PretrainModel(TINY)
    hidden = torch.randn(5, 16)
    before = model.token_head(hidden)
    assert before.shape == (5, 25)
    with torch.no_grad():
        model.backbone.embedding.weight[3] += torch.arange(16) % 3  # a constant would add the sum of a norm's output: 0
    changed = (model.token_head(hidden) - before).abs().amax(0) > 0.1
    assert changed.tolist() == [i == 3 for i in range(25)]
    assert sum(p.numel() == 25 * 16 for p in model.parameters()) == 1


def test_contrastive_head_shape():
    model = PretrainModel(tiny(head_layers=3))
    assert [type(m).__name__ for m in model.cls_head.hidden[0].values()] == ["Linear", "BatchNorm"]
    assert len(model.cls_head.hidden) == 2 and model.cls_head.out.bias is None
    features = model.cls_head(torch.randn(6, 16))
    assert features.shape == (6, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_contrastive_head_is_exact_under_autocast(dtype):
    """States that differ little, which half precision would round alike and batch norm magnifies."""
    head = PretrainModel(tiny(head_layers=3)).cls_head
    cls = (torch.randn(16) + 1e-3 * torch.randn(6, 16)).requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            features = head(cls)
        results.append([features, *torch.autograd.grad(features.square().sum(), [cls, *head.parameters()])])
    for plain, mixed in zip(*results, strict=True):
        assert plain.dtype == mixed.dtype == torch.float32 and torch.equal(plain, mixed)
    with torch.autocast("cpu", dtype):
        assert head(cls.to(dtype)).dtype == torch.float32


def test_classification_starts_at_zero():
    model = ClassificationModel(TINY, classes=3)
    assert not model(tokens()).any()


def test_interpolation():
    table = torch.arange(4.0)[:, None].expand(4, 2)
    assert interpolate(table, 4) is table
    # Linear between the centres of the old cells, constant beyond the outer ones.
    assert_close(interpolate(table, 8)[:, 0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))
    assert interpolate(table.bfloat16(), 2).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32])
def test_ids_of_any_integer_dtype(dtype):
    """A store keeps uint16, which torch's embedding does not take."""
    backbone, ids = Backbone(TINY).eval(), tokens()
    for got, expected in zip(backbone(ids.to(dtype)), backbone(ids), strict=True):
        assert torch.equal(got, expected)
    for wrong in (ids.float(), ids > 3):
        with pytest.raises(ValueError, match=r"tokens must be integer ids, got torch\.(float32|bool)"):
            backbone(wrong)


# --- batch norm over ranks ---------------------------------------------------------------------------------------------


@pytest.fixture
def four_equal_ranks(first_of, monkeypatch):
    """A process group of four, each of which holds the same rows."""
    first_of(4)
    monkeypatch.setattr(dist, "all_reduce", lambda x: x.mul_(4))


@pytest.mark.parametrize("offset", (0.0, 300.0, 1e4))
def test_batch_norm_over_ranks_is_exact_far_from_zero(four_equal_ranks, offset):
    """Its moments are sent as sums whose difference is the variance: float32 would lose 1e8 · eps of it at 1e4."""
    torch.manual_seed(0)
    rows = (torch.randn(24, 6) + offset).requires_grad_()
    upstream = torch.randn(24, 6)
    ours, exact = BatchNorm(6), torch.nn.BatchNorm1d(6, dtype=torch.float64)
    rows64 = rows.detach().double().requires_grad_()
    got, expected = ours(rows), exact(rows64)
    # A float32 sum of 24 rows is eps · offset from exact, which batch norm, whose rows are 1 apart, hands on as it is.
    assert_close(got.double(), expected, rtol=0, atol=1e-6 * max(offset, 2.0))
    (gradient,) = torch.autograd.grad(got, rows, upstream)
    (exact_gradient,) = torch.autograd.grad(expected, rows64, upstream.double())
    assert_close(gradient.double(), exact_gradient, rtol=0, atol=1e-6 * max(offset, 2.0))
    assert_close(ours.running_mean.double(), exact.running_mean, rtol=1e-6, atol=1e-7)
    ratio = (96 / 95) / (24 / 23)  # unbiased over four times the rows
    assert_close(ours.running_var.double() - 0.9, (exact.running_var - 0.9) * ratio, rtol=1e-4, atol=0)
