"""The evaluation on held-out clips: trivial predictors against brute force, shares, and that it leaves no trace."""

import itertools

import numpy as np
import pytest
import torch

import runs
from runs import VOCABULARY, tiny_config
from vimpac.data.clips import ClipPairs
from vimpac.data.store import TokenStore
from vimpac.evaluation import pretraining as evaluation
from vimpac.evaluation.pretraining import (
    HELD_OUT_IDS,
    histograms,
    most_frequent_token,
    nearest_visible,
    partners_found,
)
from vimpac.model import backbone
from vimpac.ops import info_nce_reference

PAD = VOCABULARY + 1


@pytest.fixture(autouse=True)
def told_apart(monkeypatch):
    """Weights start ten times wider: from the usual ones cosines of clips lie closer than float32 tells apart, and which clip
    is the nearest is up to the order of sums."""
    monkeypatch.setattr(backbone, "INIT_STD", 0.2)


def make_step(**options):
    torch.manual_seed(0)
    return runs.make_step(tiny_config(**options))


def evaluate(step, pairs, batches, videos, micro_batch, most_frequent):
    options = batches, videos, micro_batch, most_frequent, step.padded, step.autocast
    return evaluation.evaluate(step.model, step.objective, step.masking, pairs, *options)


@pytest.fixture(scope="module")
def pairs(store_folder):
    store = TokenStore(store_folder)
    return ClipPairs(store, np.arange(len(store)), 3, PAD, seed=1, distinct=4)


def nearest_by_hand(clip, mask):
    """For each masked position, the set of tokens at the smallest Euclidean distance among visible positions."""
    visible = [p for p in itertools.product(*map(range, clip.shape)) if not mask[p] and clip[p] != PAD]
    answers = []
    for p in zip(*np.nonzero(mask), strict=True):
        distances = [sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in visible]
        answers.append({clip[q] for q, d in zip(visible, distances, strict=True) if d == min(distances)} or {PAD})
    return answers


@pytest.mark.parametrize("grid", [(1, 1, 2), (3, 4, 5), (5, 2, 7)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_nearest_visible_is_nearest(grid, share):
    rng = np.random.default_rng(0)
    tokens = np.arange(4 * np.prod(grid)).reshape(4, *grid) + 100  # every token another id: a wrong place shows
    tokens[1, -1] = PAD
    mask = (rng.random(tokens.shape) < share) & (tokens != PAD)
    mask[2], mask[3] = tokens[2] != PAD, False  # all hidden; nothing hidden
    copies = nearest_visible(torch.from_numpy(tokens), torch.from_numpy(mask), PAD)
    expected = [answer for clip, gone in zip(tokens, mask, strict=True) for answer in nearest_by_hand(clip, gone)]
    assert len(copies) == mask.sum() == len(expected)
    assert all(copy in answer for copy, answer in zip(copies.tolist(), expected, strict=True))


def test_time_and_space_count_alike():
    """One frame away is as near as one token away, two tokens diagonally are nearer than two frames."""
    tokens = torch.tensor([[[[0, 0, 0]], [[0, 1, 9]], [[0, 0, 0]], [[0, 2, 0]]]])  # [1, 4, 1, 3]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 1, 0, 2], mask[0, 3, 0, 1] = False, False
    copies = torch.zeros_like(tokens)
    copies[mask] = nearest_visible(tokens, mask, PAD)
    assert copies[0, 0, 0].tolist() == [9, 9, 9] and copies[0, 3, 0].tolist() == [2, 0, 2]
    assert copies[0, 2, 0, 1] == 2 and copies[0, 1, 0, 1] == 9


def test_partners_found_by_hand():
    torch.manual_seed(0)
    z = torch.randn(10, 3)
    z = torch.cat([z, z + 0.8 * torch.randn(10, 3)]) * torch.rand(20, 1)  # lengths do not matter
    unit = z / z.norm(dim=1, keepdim=True)
    found = 0
    for i in range(20):
        best = max((j for j in range(20) if j != i), key=lambda j: float(unit[i] @ unit[j]))
        found += best == (i + 10) % 20
    assert 0 < found < 20 and partners_found(z) == found
    assert partners_found(torch.eye(4).repeat(2, 1)) == 8
    assert partners_found(torch.eye(4).repeat_interleave(2, 0)) == 0


def test_histograms_by_hand():
    clips = torch.tensor([[0, 0, 2, 5], [4, 3, 3, 9]], dtype=torch.uint8).view(2, 1, 2, 2)
    assert histograms(clips, 4).tolist() == [[2, 0, 1, 0], [0, 0, 0, 2]]


@pytest.mark.parametrize("masked", [True, False])
def test_histograms_are_of_what_the_model_sees(pairs, masked, monkeypatch):
    given = []
    monkeypatch.setattr("vimpac.evaluation.pretraining.histograms", lambda *call: given.append(call) or histograms(*call))
    step = make_step(contrastive_masked=masked)
    batch = pairs.batch(0, 4)
    tokens = torch.from_numpy(batch.tokens)
    seen = step.masking.draw(tokens, torch.from_numpy(batch.sample_ids) + HELD_OUT_IDS).tokens if masked else tokens
    found = evaluate(step, pairs, 1, 4, 2, 0)["histogram_retrieval_accuracy"]
    assert torch.equal(torch.cat([tokens for tokens, _ in given]), seen) and {size for _, size in given} == {VOCABULARY}
    assert found == partners_found(histograms(seen, VOCABULARY)) / 8


def test_most_frequent_token(pairs):
    tokens = pairs.batch(0, pairs.epoch_samples).tokens
    counts = np.bincount(tokens.ravel(), minlength=VOCABULARY)[:VOCABULARY]
    assert most_frequent_token(pairs, VOCABULARY) == counts.argmax()


def test_most_frequent_token_is_never_pad(store_folder):
    store = TokenStore(store_folder)
    padded = ClipPairs(store, np.flatnonzero(store.frames == 3), 9, PAD, seed=0)
    assert most_frequent_token(padded, VOCABULARY) < VOCABULARY


def test_evaluate_counts(pairs):
    """Shares and retrieval of one evaluation, recomputed from the step's masks and the model's plain outputs."""
    step = make_step(temperature=0.3).eval()
    result = evaluate(step, pairs, batches=3, videos=4, micro_batch=1, most_frequent=2)
    hits = np.zeros(3, int)
    masked = found = 0
    losses = []
    for i in range(3):
        batch = pairs.batch(4 * i, 4)
        tokens, ids = torch.from_numpy(batch.tokens), torch.from_numpy(batch.sample_ids) + HELD_OUT_IDS
        masks = step.masking.draw(tokens, ids)
        with torch.no_grad():
            cls, hidden = step.model.backbone(masks.tokens)
            guess = step.model.token_head(hidden).argmax(-1)[masks.mask]
            z = step.model.cls_head(cls)
            found += partners_found(z)
            z1, z2 = torch.nn.functional.normalize(z, dim=-1).chunk(2)
            losses.append(0.3 * info_nce_reference(z1, z2, z1, z2, 0, 0.3))
        truth = tokens[masks.mask]
        copies = nearest_visible(tokens, masks.mask, PAD)
        hits += np.array([int((x == truth).sum()) for x in (guess, torch.full_like(truth, 2), copies)])
        masked += len(truth)
    names = ("mask_accuracy", "most_frequent_accuracy", "nearest_copy_accuracy")
    assert [result[name] for name in names] == (hits / masked).tolist() and hits.min() > 0
    assert result["masked_tokens"] == masked and result["retrieval_clips"] == 24
    assert result["cl_loss"] == pytest.approx(float(sum(losses) / 3), rel=1e-5)  # float32 sums in another order
    assert result["retrieval_accuracy"] == found / 24 and result["retrieval_chance"] == 1 / 7 and 0 < found < 24


def test_one_video_has_no_retrieval(pairs):
    """A clip's only candidate would be its partner."""
    result = evaluate(make_step(), pairs, 2, 1, 1, 0)
    assert result["mask_accuracy"] is not None and result["retrieval_clips"] == 4
    assert all(
        result[name] is None for name in ("cl_loss", "retrieval_accuracy", "histogram_retrieval_accuracy", "retrieval_chance")
    )


def test_no_answer_is_shown(pairs, monkeypatch):
    """Under noisy masks a model that copies its input would have every tenth masked token right."""
    given = []
    step = make_step(noisy_mask=True)
    step.model.backbone.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    masked = evaluate(step, pairs, 3, 4, 4, 0)["masked_tokens"]
    assert sum(int((tokens == VOCABULARY + 4).sum()) for tokens in given) == masked > 100


def test_masks_are_not_those_of_training(pairs):
    step, batch = make_step(), pairs.batch(0, 4)
    tokens, ids = torch.from_numpy(batch.tokens), torch.from_numpy(batch.sample_ids)
    assert not torch.equal(step.masking.draw(tokens, ids).mask, step.masking.draw(tokens, ids + HELD_OUT_IDS).mask)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_no_trace(pairs, training):
    step = make_step().train(training)
    before = {name: x.clone() for name, x in step.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = evaluate(step, pairs, 1, 4, 2, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training == training for module in step.modules())
    assert all(torch.equal(x, before[name]) for name, x in step.state_dict().items())
    assert all(p.grad is None and not p.is_inference() for p in step.parameters())
    assert evaluate(step, pairs, 1, 4, 2, 0) == first  # no dropout, no other masks


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 100])
def test_any_micro_batch(pairs, micro_batch):
    step = make_step()
    assert evaluate(step, pairs, 2, 4, micro_batch, 0) == evaluate(step, pairs, 2, 4, 2, 0)


@pytest.mark.parametrize(
    "options", [{"alpha": 0.0}, {"mask_task": False}, {"contrastive_masked": False, "mask_task": False}, {"noisy_mask": True}]
)
def test_every_task_has_an_evaluation(pairs, options):
    result = evaluate(make_step(**options), pairs, 1, 4, 4, 0)
    assert (result["mask_accuracy"] is None) == (not options.get("mask_task", True))
    assert 0 <= result["retrieval_accuracy"] <= 1


@pytest.mark.parametrize("mask_task", [True, False])
@pytest.mark.parametrize("contrastive_masked", [True, False])
def test_retrieval_sees_what_training_contrasts(pairs, mask_task, contrastive_masked):
    """Intact clips where the contrastive task has intact clips (Table 12), masked ones otherwise."""
    step = make_step(mask_task=mask_task, contrastive_masked=contrastive_masked)
    seen = []
    step.model.cls_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    evaluate(step, pairs, 1, 4, 4, 0)
    batch = pairs.batch(0, 4)
    tokens, ids = torch.from_numpy(batch.tokens), torch.from_numpy(batch.sample_ids) + HELD_OUT_IDS
    inputs = step.masking.draw(tokens, ids).tokens if contrastive_masked else tokens
    with torch.no_grad():
        assert torch.equal(seen[0], step.eval().model.backbone(inputs)[0])
