"""Gradient caching: a contrastive batch in parts is the same batch, in one process or two."""

import pytest
import torch

from runs import arguments, metrics, run, undrawn, wide_start
from updates import MODEL, assert_same, loop_of, update
from vimpac.training.device import seed_dropout

pytestmark = pytest.mark.usefixtures("one_thread", "wide")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.5, "temperature": 0.3},
        {"contrastive_masked": False},
        {"mask_task": False},
        {"mask_task": False, "contrastive_masked": False},
        {"alpha": 0.0},
        {"noisy_mask": True, "model": {"norm": "pre", "layout": "T,HxW"}},
        {"batch_size": 16},
        {"activation_checkpointing": "full"},
    ],
    ids=str,
)
@pytest.mark.parametrize("micro_batch", [4, 1])
def test_in_parts(store_folder, options, micro_batch):
    """Two passes over parts of a contrastive batch are one pass over all of it, batch norm and mean over tokens included."""
    assert_same(update(store_folder, micro_batch=micro_batch, **options), update(store_folder, **options))


def test_parts_have_the_same_dropout_in_both_passes(store_folder):
    """Compared with one graph over all parts, each with the dropout that its place seeds."""
    for options in ({}, {"contrastive_masked": False}):
        actual = update(store_folder, micro_batch=2, model={"dropout": 0.2}, **options)
        loop = loop_of(store_folder, micro_batch=2, model={"dropout": 0.2}, **options)
        step, batches = loop.module, [loop.make_batch(first) for first in (0, 2, 4, 6)]
        states, mask_losses = [], []
        for i, batch in enumerate(batches):
            seed_dropout(CPU, loop.config.seed, 0, i, 0)
            out = step(batch, True)
            states.append(out["cls"])
            mask_losses.append(out["loss"] * batch.masked_count / sum(b.masked_count for b in batches))
        cls = torch.stack(states).unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)
        loss = sum(mask_losses) + 0.2 * step.contrast(cls)
        loss.backward()
        gradients = {name: p.grad for name, p in step.named_parameters() if p.grad is not None}
        assert actual[0][0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_same((actual[0], actual[1]), (actual[0], gradients))
        without = update(store_folder, micro_batch=2, **options)
        assert without[0][0]["loss"] != actual[0][0]["loss"]


def test_first_pass_keeps_no_graph(store_folder):
    """The memory of a part, not of the batch: what autograd keeps after the first pass is one [CLS] row a clip."""
    loop = loop_of(store_folder, micro_batch=2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.shape), x)[1], lambda x: x):
        loop.task.cache_gradients(loop, 0, [loop.make_batch(first) for first in (0, 2, 4, 6)])
    clips, rows = 2 * 8, 2 * 2 * (3 * 4 * 4 + 1)  # of the batch, and rows of the backbone's states in a part
    assert any(shape[:1] == (clips,) for shape in kept) and not any(shape[:1] == (rows,) for shape in kept)


@pytest.mark.parametrize(
    "options",
    [{"micro_batch": 2}, {"micro_batch": 1, "batch_size": 16}, {"micro_batch": 2, "contrastive_masked": False}],
    ids=str,
)
def test_in_parts_in_two_processes(store_folder, tmp_path, options):
    """A group of two ranks, each with two parts or more, follows one process that holds the whole batch."""
    common = {"steps": 5, "save_every": 100, "eps": 1e-2, "contrastive_videos": 8, "batch_size": 8, "learning_rate": 1e-3}
    for name, ranks, changed in (("one", 1, {**options, "micro_batch": 8}), ("two", 2, options)):
        words = arguments(store_folder, tmp_path / name, MODEL, **{**common, **changed})
        run(words, tmp_path / f"log-{name}", ranks, hook=start_wide_and_undrawn)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for line, other in zip(two[:-1], one[:-1], strict=True):
        for key, x in line.items():
            rtol = 1e-4 if key == "grad_norm" else 1e-5  # a norm has a term for every weight, a loss averages its rounding
            torch.testing.assert_close(x, other[key], rtol=rtol, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def start_wide_and_undrawn():
    undrawn()
    wide_start()
