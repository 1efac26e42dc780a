"""Masks that the device draws in the step: the host's masks, losses and gradients, without a wait."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runs import arguments, hooks, metrics, model_bytes, on_call, run, tiny_config, undrawn, wide_start
from updates import MODEL, assert_same, graphed_loop, loop_of, update
from vimpac.model.masking import Masking
from vimpac.ops import masked_cross_entropy_reference
from vimpac.ops.block_mask import block_count_variance, longest_block
from vimpac.training.batch import ROWS, map_tensors, row_capacity, tensors_of
from vimpac.training.device import device_masks
from vimpac.training.pretrain import pretrain
from vimpac.training.profile import WAITS_CPU

pytestmark = pytest.mark.usefixtures("one_thread", "wide")
CPU = torch.device("cpu")
PADDED = {"grid": (5, 4, 4)}  # 5 frames: short videos are padded
VARIANTS = [
    {},
    {"n_blocks": 5},
    {"mask": "iid", "mask_ratio": 0.3},
    {"noisy_mask": True},
    {"noisy_mask": True, "mask": "iid"},
    {"model": PADDED},
    {"model": {"dropout": 0.1}},
    {"alpha": 0.0},
    {"mask_task": False},
    {"contrastive_masked": False},
    {"mask_task": False, "contrastive_masked": False},
]
UNITS = [{}, {"micro_batch": 4}, {"micro_batch": 1}, {"batch_size": 24}, {"batch_size": 16, "micro_batch": 2}]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_batches_are_the_hosts(store_folder, options):
    """Same masked clips and same rows in front of the filler, of which there may be more."""
    host = loop_of(store_folder, masks="host", **options).make_batch(4)
    loop = loop_of(store_folder, masks="device", **options)
    sent = loop.make_batch(4)
    assert (sent.masked, sent.rows, sent.targets) == (None, None, None)
    batch = loop.module.drawn(sent)
    assert torch.equal(batch.tokens, host.tokens) and batch.sample_ids is None
    if host.masked is None:
        assert batch.masked is None
        return
    assert torch.equal(batch.masked, host.masked)
    if not loop.config.mask_task:
        assert batch.rows is None
        return
    count = host.masked_count
    assert 0 < count == int(batch.masked_count) < len(batch.rows) == loop.module.capacity
    assert torch.equal(batch.rows[:count], host.rows[:count]) and torch.equal(batch.targets[:count], host.targets[:count])
    filler = batch.rows[count:]
    assert len(filler.unique()) == len(filler) and int(filler.max()) < batch.tokens.numel()
    assert bool((batch.targets[count:] == -1).all())
    assert batch.share.item() == 1.0


@pytest.mark.parametrize("unit", UNITS, ids=str)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_updates_are_the_hosts(store_folder, options, unit):
    """Metrics and gradients, in one pass, in parts and accumulated. More filler only changes the order of float32 sums."""
    host, device = (update(store_folder, updates=2, masks=masks, **options, **unit) for masks in ("host", "device"))
    assert_same(device, host)


@pytest.mark.parametrize("options", [{}, {"model": {"dropout": 0.1}}, {"mask": "iid"}, {"contrastive_masked": False}], ids=str)
def test_graphed(store_folder, options):
    """One graph serves all updates, and draws each batch's own masks: its inputs are tokens and sample ids."""
    plain = loop_of(store_folder, masks="host", batch_size=24, **options)
    graphed = graphed_loop(store_folder, masks="device", batch_size=24, **options)
    for _ in range(3):
        expected, line = ({name: float(x) for name, x in loop.update().items()} for loop in (plain, graphed))
        assert line == pytest.approx(expected, rel=1e-5)  # float32 sums in another order, through three updates
        plain.step += 1
        graphed.step += 1
    assert len(graphed.graphed.graphs) == 1


def test_captures_count_nothing(store_folder):
    loop = graphed_loop(store_folder, masks="device", batch_size=16)
    loop.module.capacity = 8
    loop.update()
    assert loop.module.beyond.tolist()[0] == 2  # micro-steps


@pytest.mark.parametrize(
    "options",
    [{}, {"micro_batch": 2}, {"micro_batch": 2, "batch_size": 16, "mask": "iid"}, {"mask_task": False}],
    ids=str,
)
def test_two_processes(store_folder, tmp_path, options):
    common = {"steps": 4, "save_every": 100, "eps": 1e-2, "contrastive_videos": 8, "batch_size": 8, "learning_rate": 1e-3}
    lines = []
    for masks in ("host", "device"):
        words = arguments(store_folder, tmp_path / masks, {**MODEL, **PADDED}, masks=masks, **{**common, **options})
        run(words, tmp_path / f"log-{masks}", 2, hook=hooks(undrawn, wide_start))
        lines.append([{name: x for name, x in line.items() if x is not None} for line in metrics(tmp_path / masks)[:-1]])
    for host, device in zip(*lines, strict=True):
        assert device == pytest.approx(host, rel=1e-5, abs=1e-6)  # float32 sums in another order


def test_resumed(store_folder, tmp_path):
    """Bit for bit; and a run may go on with the host's masks."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(arguments(store_folder, whole, masks="device"), tmp_path / "log", hook=undrawn)
    killed = hooks(undrawn, on_call("vimpac.training.loop:Loop.update", 4, "kill"))
    run(arguments(store_folder, cut, masks="device"), tmp_path / "log", hook=killed, code=-9)
    run(arguments(store_folder, cut, masks="device", resume=True), tmp_path / "log", hook=undrawn)
    assert metrics(cut) == metrics(whole) and model_bytes(cut) == model_bytes(whole)
    run(arguments(store_folder, cut, masks="host", resume=True), tmp_path / "log", hook=undrawn)


@pytest.mark.parametrize(
    "masks, device, drawn_there",
    [("auto", "cpu", False), ("auto", "cuda", True), ("host", "cuda", False), ("device", "cpu", True)],
)
def test_where_masks_are_drawn(masks, device, drawn_there):
    assert device_masks(tiny_config(masks=masks), torch.device(device)) == drawn_there


# --- nothing waits --------------------------------------------------------------------------------------------------------


class NothingWaits(TorchDispatchMode):
    """Fails where the host would ask a device for a value. An index of booleans asks how many are true."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        counted = name.startswith("aten::index") and any(x is not None and x.dtype == torch.bool for x in indices)
        assert name not in {*WAITS_CPU, "aten::item"} and not counted, f"{name} waits"
        return func(*args, **(kwargs or {}))


def test_what_waits_is_found():
    for ask in (lambda x: x.item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.masked_select(x > 0)):
        with pytest.raises(AssertionError, match="waits"), NothingWaits():
            ask(torch.ones(1))


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("options", [{}, {"mask": "iid", "noisy_mask": True}, {"micro_batch": 2}, {"model": PADDED}], ids=str)
def test_drawing_waits_for_nothing(store_folder, monkeypatch, options, backend):
    loop = loop_of(store_folder, masks="device", **options)
    unit = [loop.make_batch(first) for first in range(0, 8, loop.plan.micro_batch)]
    if backend:
        monkeypatch.setenv("VIMPAC_BACKEND", f"block_mask={backend}")
    with NothingWaits():
        loop.task.weighted([loop.module.drawn(batch) for batch in unit])
        loop.task.accumulate(loop, 0, unit)


@pytest.mark.parametrize("options", [{}, {"mask": "iid", "noisy_mask": True}], ids=str)
def test_drawing_asks_for_no_value(store_folder, monkeypatch, options):
    """On tensors without values."""
    loop = loop_of(store_folder, masks="device", **options)
    sent = map_tensors(loop.make_batch(0), lambda x: x.to("meta"))
    monkeypatch.setenv("VIMPAC_BACKEND", "reference")
    batch = loop.module.to("meta").drawn(sent)
    assert {x.device.type for x in tensors_of(batch)} == {"meta"} and len(batch.rows) == loop.module.capacity


# --- the capacity ---------------------------------------------------------------------------------------------------------


def blocks_of(grid):
    """Every block of the definition as a set of positions, with its probability."""
    axes = []
    for size, longest in zip(grid, longest_block(grid), strict=True):
        lengths = range(1, longest + 1)
        axes.append([(range(s, s + n), 1 / (longest * (size - n + 1))) for n in lengths for s in range(size - n + 1)])
    for t, h, w in itertools.product(*axes):
        yield frozenset(itertools.product(t[0], h[0], w[0])), t[1] * h[1] * w[1]


@pytest.mark.parametrize(
    "grid, n_blocks", [((1, 1, 1), 1), ((3, 2, 2), 1), ((2, 4, 5), 1), ((5, 3, 4), 2), ((2, 4, 4), 2), ((3, 2, 3), 3)]
)
def test_variance_over_all_blocks(grid, n_blocks):
    """Over every choice of blocks."""
    first = second = 0.0
    for chosen in itertools.product(list(blocks_of(grid)), repeat=n_blocks):
        size, probability = len(frozenset().union(*(x for x, _ in chosen))), math.prod(p for _, p in chosen)
        first, second = first + probability * size, second + probability * size**2
    assert block_count_variance(grid, n_blocks) == pytest.approx(second - first**2, rel=1e-9, abs=1e-9)  # float64 sums


@pytest.mark.parametrize("options", [{}, {"n_blocks": 9}, {"mask": "iid", "mask_ratio": 0.2}], ids=str)
def test_capacity_of_drawn_masks(options):
    """Batches of 64 clips: their counts have the mean and deviation that the capacity is made of, and none exceeds it."""
    masking, clips, batches = Masking.from_config(tiny_config({"grid": (5, 8, 8)}, **options)), 64, 400
    tokens = torch.zeros(clips * batches, 5, 8, 8, dtype=torch.int64)
    counts = masking.draw(tokens, torch.arange(len(tokens))).counts.double()
    error = 5 * counts.std() / len(counts) ** 0.5  # 5 standard errors
    assert abs(counts.mean() - 320 * masking.expected_share) < error
    assert counts.var() == pytest.approx(masking.count_variance, rel=0.05)  # 25,600 clips: 5 standard errors of a normal one
    sums = counts.view(batches, clips).sum(1)
    most = 64 * 320 * masking.expected_share + 6 * (64 * masking.count_variance) ** 0.5
    capacity = row_capacity(masking, clips)
    assert sums.max() < most <= capacity < most + ROWS and capacity % ROWS == 0


def test_capacity_is_at_most_all_tokens():
    masking = Masking.from_config(tiny_config(n_blocks=40))
    assert row_capacity(masking, 2) == 96 and row_capacity(masking, 20) == 960


@pytest.mark.parametrize("capacity", [8, 50])
def test_rows_beyond_the_capacity_do_not_enter_the_loss(store_folder, capacity):
    loop = loop_of(store_folder, masks="device", alpha=0.0)
    step, batch = loop.module, loop.make_batch(0)
    masked = step.masking.draw(batch.tokens, batch.sample_ids)
    states = step.model.token_head.transform(step.model.backbone(masked.tokens)[1][masked.mask])[:capacity]
    head, targets = step.model.token_head, batch.tokens[masked.mask]
    expected, _ = masked_cross_entropy_reference(states, head.decoder, head.bias, targets[:capacity])
    step.capacity = capacity
    assert step(batch)["mask_loss"].item() == pytest.approx(expected.item(), rel=1e-5)  # float32 sums in another order
    assert step.beyond.tolist() == [1, len(targets) - capacity]


def test_parts_weigh_the_rows_that_enter_the_loss(store_folder):
    """Of parts with a capacity below their counts, each has as many rows."""
    loop = loop_of(store_folder, masks="device", micro_batch=2)
    loop.module.capacity = 8
    unit = loop.task.weighted([loop.module.drawn(loop.make_batch(first)) for first in (0, 2, 4, 6)])
    assert [batch.share.item() for batch in unit] == [1.0] * 4


def few_rows():
    """A hook: room for 8 masked tokens."""
    from vimpac.training import pretrain_task

    pretrain_task.row_capacity = lambda masking, clips: 8


def test_overflow_is_said_and_stops_nothing(store_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vimpac.figures.curves.plot_curves", lambda *paths: None)
    config = {"data": str(store_folder), "steps": 3, "batch_size": 8}
    pretrain(tiny_config(**config, masks="device", output=str(tmp_path / "room")))
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr("vimpac.training.pretrain_task.row_capacity", lambda masking, clips: 8)
    pretrain(tiny_config(**config, masks="device", output=str(tmp_path / "none")))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    beyond = []  # of each update's two micro-steps
    loop = loop_of(store_folder, masks="host", batch_size=8, contrastive_videos=4)
    for first in range(0, 24, 4):
        beyond.append(loop.make_batch(first).masked_count - 8)
    text = "warning: 2 batches had more masked tokens than the 8 rows of the token head; the loss left out {} tokens"
    pairs = zip(beyond[::2], beyond[1::2], strict=True)
    assert [line.partition(" (")[0] for line in said] == [text.format(sum(pair)) for pair in pairs]
    room, none = (metrics(tmp_path / name) for name in ("room", "none"))
    assert len(none) == 4 and none[0].keys() == room[0].keys()


def test_overflow_of_all_processes_is_said_once(store_folder, tmp_path):
    words = arguments(store_folder, tmp_path / "run", masks="device", steps=2)
    said = run(words, tmp_path / "log", 2, hooks(undrawn, few_rows))
    assert said.count("warning: 2 batches had more masked tokens than the 8 rows") == 2  # updates
