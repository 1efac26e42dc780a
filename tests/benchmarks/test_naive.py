"""benchmarks/naive.py, the opponent of the benchmarks, computes what vimpac's model and losses compute."""

import random

import pytest
import torch

import naive
from vimpac.config import ModelConfig
from vimpac.model import PretrainModel
from vimpac.model.losses import contrastive_loss, mask_loss
from vimpac.ops import block_mask
from vimpac.ops.block_mask import expected_block_ratio
from vimpac.training.batch import pack

pytestmark = pytest.mark.usefixtures("one_thread")
# Of the norm: rounding (6e-8, 1e-16) over sums of a few hundred terms and two layers. In float32 the contrastive head is given
# our [CLS] states, since the batch norm of 8 rows magnifies their rounding.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
SHAPE = {"layers": 2, "width": 24, "heads": 6, "grid": (3, 4, 5), "vocab_size": 30, "dropout": 0.0}
HEAD = {"head_layers": 3, "head_width": 16, "head_out": 8}


def pair(dtype=torch.float64, **options):
    """Our model and the naive one with the same weights, far enough from their start that every term matters."""
    torch.manual_seed(0)
    config = ModelConfig(**{**SHAPE, **HEAD, **options})
    ours, opponent = PretrainModel(config), naive.NaiveModel(config)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.2 * torch.randn_like(p))
    naive.copy_weights(opponent, ours.state_dict())
    return ours.to(dtype).train(), opponent.to(dtype).train()


def batch(config, pad=False):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (8, *config.grid), generator=generator)
    if pad:
        tokens[:3, 1:] = config.pad_id
    return tokens, block_mask(tokens, torch.arange(8), seed=0, n_blocks=3, vocab_size=config.vocab_size)


def distance(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def masked_loss(model, hidden, batch):
    return mask_loss(model, hidden.flatten(0, 3)[batch.rows], batch.targets)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["post", "pre", "pre-vit"])
@pytest.mark.parametrize("layout", ["T,H|W", "T,H,W", "T|H|W", "T,HxW", "TxHxW"])
def test_same_states_and_losses(layout, norm, dtype):
    ours, opponent = pair(dtype, layout=layout, norm=norm)
    tokens, masked = batch(ours.config)
    cls, hidden = ours.backbone(masked.tokens)
    naive_cls, naive_hidden = opponent.backbone(masked.tokens)
    head_input = naive_cls if dtype == torch.float64 else cls
    pairs = {
        "hidden": (naive_hidden, hidden),
        "cls": (naive_cls, cls),
        "mask loss": (
            naive.mask_loss(opponent.token_logits(naive_hidden), tokens, masked.mask),
            masked_loss(ours, hidden, pack(tokens, masked)),
        ),
        "contrastive loss": (naive.contrastive_loss(opponent.cls_head(head_input), 0.2), contrastive_loss(ours, cls, 0.2)),
    }
    for name, (got, expected) in pairs.items():
        assert distance(got, expected) < TOLERANCE[dtype], name


@pytest.mark.parametrize("norm", ["post", "pre", "pre-vit"])
def test_same_loss_and_gradients(norm):
    ours, opponent = pair(norm=norm)
    tokens, masked = batch(ours.config)
    cls, hidden = ours.backbone(masked.tokens)
    expected = masked_loss(ours, hidden, pack(tokens, masked)) + 0.7 * 0.2 * contrastive_loss(ours, cls, 0.2)
    got = naive.loss(opponent, tokens, masked.mask, alpha=0.7, temperature=0.2, padded=False)
    assert distance(got, expected) < TOLERANCE[torch.float64]
    expected.backward()
    got.backward()
    grads = {name: p.grad for name, p in opponent.named_parameters()}
    for name, p in ours.named_parameters():
        if name.startswith("cls_head") and name.endswith("linear.bias"):
            continue  # batch norm subtracts the mean: these have no gradient but rounding
        assert distance(grads[naive.naive_name(name, opponent)], p.grad) < 1e-9, name  # magnified by batch norm


@pytest.mark.parametrize("cls_in_context", [True, False])
def test_same_with_padding(cls_in_context):
    ours, opponent = pair(cls_in_context=cls_in_context, attention_width=12, mlp_width=40)
    _, masked = batch(ours.config, pad=True)
    for expected, got in zip(ours.backbone(masked.tokens), opponent.backbone(masked.tokens), strict=True):
        assert distance(got, expected) < TOLERANCE[torch.float64]


def test_dropout_is_on():
    _, opponent = pair(dropout=0.3)
    tokens, _ = batch(opponent.config)
    first, second = (opponent.backbone(tokens)[1] for _ in range(2))
    assert distance(first, second) > 0.1


def test_masks_have_the_papers_share():
    random.seed(0)
    mask = naive.block_masks(2000, (5, 16, 16), 5)
    assert mask.float().mean() == pytest.approx(expected_block_ratio((5, 16, 16), 5), abs=0.005)  # σ of the mean is 0.002
