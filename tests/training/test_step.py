"""One step: what each ablation changes, and only that; precisions, checkpointing, accumulation, compilation."""

import pytest
import torch
import torch.nn.functional as F

import runs
from extension import needs_compiler
from runs import MODEL, VOCABULARY, tiny_config
from vimpac.model.masking import Masking, blocks_for_ratio
from vimpac.ops import info_nce_reference, masked_cross_entropy_reference

pytestmark = pytest.mark.usefixtures("one_thread")
MASK = VOCABULARY + 4


def make_step(autocast=None, **options):
    torch.manual_seed(0)
    return runs.make_step(tiny_config(**options), autocast=autocast)


def batch(videos=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (2 * videos, *MODEL["grid"]), generator=generator), torch.arange(2 * videos)


def backward(step, tokens, ids, seed=1):
    torch.manual_seed(seed)
    step.zero_grad()
    out = step(step.batch(tokens, ids))
    out["loss"].backward()
    return {name: x.item() for name, x in out.items()}, {n: p.grad for n, p in step.named_parameters() if p.grad is not None}


# --- the loss and its options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("contrastive_masked", [True, False])
def test_loss_by_hand(alpha, contrastive_masked):
    """Eq. 1, 5 and 6 on the model's plain outputs."""
    options = {"alpha": alpha, "contrastive_masked": contrastive_masked, "temperature": 0.3, "model": {"dropout": 0.0}}
    step, (tokens, ids) = make_step(**options), batch()
    out, _ = backward(step, tokens, ids)
    masked = step.masking.draw(tokens, ids)
    cls, hidden = step.model.backbone(masked.tokens)
    head = step.model.token_head
    states = head.transform(hidden[masked.mask])
    mask_loss, accuracy = masked_cross_entropy_reference(states, head.decoder, head.bias, tokens[masked.mask])
    if not contrastive_masked:
        cls, _ = step.model.backbone(tokens)
    z1, z2 = F.normalize(step.model.cls_head(cls), dim=-1).chunk(2)
    contrastive = info_nce_reference(z1, z2, z1, z2, 0, 0.3)
    expected = {"mask_loss": mask_loss, "mask_accuracy": accuracy, "contrastive_loss": contrastive}
    expected["loss"] = mask_loss + alpha * 0.3 * contrastive
    for name, x in expected.items():
        assert out[name] == pytest.approx(x.item(), rel=1e-5), name  # float32 sums in another order


def test_contrastive_on_intact_clips_changes_only_that_loss():
    a, b = (backward(make_step(contrastive_masked=m, model={"dropout": 0.0}), *batch())[0] for m in (True, False))
    assert a["mask_loss"] == b["mask_loss"] and a["mask_accuracy"] == b["mask_accuracy"]
    assert a["contrastive_loss"] != b["contrastive_loss"]


def test_without_the_contrastive_task():
    with_it, without = (backward(make_step(alpha=alpha), *batch()) for alpha in (1.0, 0.0))
    assert without[0].keys() == {"loss", "mask_loss", "mask_accuracy"}
    assert without[0]["loss"] == without[0]["mask_loss"] == with_it[0]["mask_loss"]
    assert not any("cls_head" in name for name in without[1]) and any("token_head" in name for name in without[1])


@pytest.mark.parametrize("contrastive_masked", [True, False])
def test_without_the_mask_task(contrastive_masked):
    """No token head, and with intact clips no mask either (Table 12)."""
    step = make_step(mask_task=False, contrastive_masked=contrastive_masked)
    seen = []
    step.model.backbone.embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    out, gradients = backward(step, *batch())
    assert out.keys() == {"loss", "contrastive_loss"}
    assert out["loss"] == pytest.approx(0.2 * out["contrastive_loss"], rel=1e-6)  # float32
    assert not any("token_head" in name for name in gradients) and any("cls_head" in name for name in gradients)
    assert [bool((tokens == MASK).any()) for tokens in seen] == [contrastive_masked]


def test_every_trained_parameter_gets_a_gradient():
    """Of each task's model, on every process: what DistributedDataParallel waits for."""
    for options in ({}, {"alpha": 0.0}, {"mask_task": False}, {"contrastive_masked": False}):
        for in_context in (True, False):
            step = make_step(**options, model={"cls_in_context": in_context})
            _, gradients = backward(step, *batch())
            assert {name for name, p in step.named_parameters() if p.requires_grad} == gradients.keys()


def test_no_masked_token_at_all():
    """An i.i.d. mask of a small clip may be empty: the loss is 0 and finite gradients flow."""
    step = make_step(mask="iid", mask_ratio=1e-9)
    out, gradients = backward(step, *batch(2))
    assert out["mask_loss"] == 0.0 and all(g.isfinite().all() for g in gradients.values())


# --- masks ----------------------------------------------------------------------------------------------------------------


def test_mask_depends_on_the_run_and_the_sample():
    tokens, ids = batch()
    masks = [make_step(seed=seed).masking.draw(tokens, ids).mask for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert torch.equal(make_step().masking.draw(tokens[3:5], ids[3:5]).mask, masks[0][3:5])


@pytest.mark.parametrize("mask_ratio", [0.1, 0.145, 0.5])
def test_iid_mask(mask_ratio):
    tokens, ids = batch(500)
    share = make_step(mask="iid", mask_ratio=mask_ratio).masking.draw(tokens, ids).mask.float().mean()
    assert abs(share - mask_ratio) < 5 * (mask_ratio * (1 - mask_ratio) / tokens.numel()) ** 0.5  # 5 standard errors


def test_mask_ratio_is_for_iid_masks_only():
    tokens, ids = batch()
    assert torch.equal(*(make_step(mask_ratio=ratio).masking.draw(tokens, ids).mask for ratio in (0.1, 0.5)))


def test_n_blocks_grows_the_mask():
    tokens, ids = batch()
    one, five = (make_step(n_blocks=n).masking.draw(tokens, ids).mask for n in (1, 5))
    assert (five | one).equal(five) and five.sum() > one.sum()


def test_noisy_mask():
    """80 % MASK, 10 % a random code, 10 % the token itself, at the same positions (section G.3)."""
    tokens, ids = batch(2000)
    plain, noisy = (make_step(noisy_mask=noisy).masking.draw(tokens, ids) for noisy in (False, True))
    assert torch.equal(plain.mask, noisy.mask) and (plain.tokens[plain.mask] == MASK).all()
    assert torch.equal(noisy.tokens[~noisy.mask], tokens[~noisy.mask])
    inside, truth = noisy.tokens[noisy.mask], tokens[noisy.mask]
    error = 5 * (0.8 * 0.2 / len(inside)) ** 0.5  # 5 standard errors
    assert abs((inside == MASK).float().mean() - 0.8) < error
    assert abs((inside == truth).float().mean() - (0.1 + 0.1 / VOCABULARY)) < error
    assert inside[inside != MASK].max() < VOCABULARY


@pytest.mark.parametrize("grid, blocks", [((5, 16, 16), 5), ((5, 32, 32), 6), ((10, 16, 16), 6), ((10, 32, 32), 7)])
def test_number_of_blocks_is_bold_in_table_2(grid, blocks):
    assert blocks_for_ratio(grid) == blocks
    config = tiny_config({"grid": grid})
    assert Masking.from_config(config).n_blocks == blocks


# --- precision, memory, speed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0.02), (torch.float16, 0.005)])
def test_autocast(dtype, error):
    """Losses within a few roundings (2^-8 and 2^-11) of float32's; parameters and their gradients stay float32."""
    exact, _ = backward(make_step(model={"dropout": 0.0}), *batch())
    seen = []
    step = make_step(dtype, model={"dropout": 0.0})
    step.model.backbone.layers[0].mlp.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    out, gradients = backward(step, *batch())
    assert seen == [dtype]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())
    assert out["mask_loss"] == pytest.approx(exact["mask_loss"], rel=error)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("layout", ["T,H|W", "T,HxW"])
@pytest.mark.parametrize("norm", ["post", "pre", "pre-vit"])
def test_activation_checkpointing_changes_nothing(dtype, layout, norm):
    """Dropout included: the second forward pass draws what the first one drew. Same operations, so the same bits."""
    results = []
    for checkpointing in ("none", "selective", "full"):
        step = make_step(dtype, model={"layers": 2, "layout": layout, "norm": norm})
        step.model.backbone.activation_checkpointing = checkpointing
        results.append(backward(step, *batch()))
    for out, gradients in results[1:]:
        assert out == results[0][0] and gradients.keys() == results[0][1].keys()
        assert all(torch.equal(g, gradients[name]) for name, g in results[0][1].items())
    other = backward(make_step(dtype, model={"layers": 2, "layout": layout, "norm": norm}), *batch(), seed=2)
    assert other[0] != results[0][0]  # there is dropout in it


def test_activation_checkpointing_recomputes():
    step, calls = make_step(model={"layers": 2}), []
    step.model.backbone.activation_checkpointing = "full"
    step.model.backbone.layers[0].register_forward_pre_hook(lambda *call: calls.append(1))
    backward(step, *batch())
    assert len(calls) == 2


def test_accumulation_is_the_mean_of_micro_steps():
    """Equal to the big batch where micro-steps have as many masked tokens; for the contrastive loss, a mean over groups."""
    step = make_step(alpha=0.0, n_blocks=1, model={"dropout": 0.0, "grid": (1, 2, 2)})  # every mask has one token
    tokens, ids = torch.randint(VOCABULARY, (12, 1, 2, 2)), torch.arange(12)
    assert step.masking.draw(tokens, ids).counts.unique().tolist() == [1]
    whole, gradients = backward(step, tokens, ids)
    halves = [backward(step, tokens[part], ids[part]) for part in (slice(0, 6), slice(6, 12))]
    assert whole["loss"] == pytest.approx(sum(out["loss"] for out, _ in halves) / 2, rel=1e-6)  # float32
    for name, g in gradients.items():
        mean = (halves[0][1][name] + halves[1][1][name]) / 2
        torch.testing.assert_close(g, mean, rtol=1e-5, atol=1e-7)  # float32 sums in another order


@needs_compiler
def test_compiled_backbone():
    """Fused float32 kernels round differently: 1e-5 of the loss, 1e-4 of the gradients' norm. (Without the contrastive loss,
    whose batch norm makes much more of a rounding in so small a model, see runs.wide_start.)"""
    eager, compiled = (make_step(alpha=0.0, model={"dropout": 0.0, "layout": "T"}) for _ in range(2))
    compiled.model.compile_parts()
    names = set(compiled.state_dict())
    (out, gradients), (expected, reference) = (backward(step, *batch()) for step in (compiled, eager))
    assert names == set(eager.state_dict())  # checkpoints of either fit the other
    for name, x in expected.items():
        assert out[name] == pytest.approx(x, rel=1e-5)
    for name, g in reference.items():
        assert (gradients[name] - g).norm() <= 1e-4 * g.norm() + 1e-6, name
