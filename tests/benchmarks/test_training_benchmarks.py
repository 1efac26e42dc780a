"""benchmarks/training.py, train_step.py: what is counted, what is timed, and that both sides train, on the same clips."""

import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import harness
import naive
import train_step
import training
from vimpac.config import ModelConfig
from vimpac.distributed import World
from vimpac.model.masking import Masking
from vimpac.training.batch import ROWS

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = training.TINY
VIDEOS = 4


@pytest.fixture
def bench(capsys):
    extra = {"presets": {"nargs": "+"}, "impls": {"nargs": "+"}, "graphs": {"action": "store_true"}}
    return train_step.StepBenchmark(harness.arguments("", ["--device", "cpu", "--quick", "--no-write"], **extra))


@pytest.fixture
def stores(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "STORED", 16)
    return training.Stores(tmp_path)


@pytest.fixture
def cell(bench, stores):
    return training.Cell(bench, stores, ModelConfig(**TINY), VIDEOS)


def both(cell):
    return {"ours": cell.ours(compiled=False), "naive": cell.naive(compiled=False)}


def test_ours_computes_no_more_products_than_needed(cell, monkeypatch):
    """With the reference's ops: beyond `operations`, only the filler rows of the token head, here most of them, and InfoNCE."""
    monkeypatch.setenv("VIMPAC_BACKEND", "reference")
    trained = cell.ours(compiled=False)
    batch = trained.next_batch()
    config, clips = cell.config, 2 * VIDEOS
    with FlopCounterMode(display=False) as counter:
        trained.loop.module(batch)
    rows = len(batch.rows)
    assert rows == ROWS and batch.masked_count < ROWS
    needed = train_step.operations(config, VIDEOS, rows / (clips * 48)) / 3
    scores = 2 * clips**2 * config.head_out  # at most
    assert 0 <= counter.get_total_flops() - needed <= scores


@pytest.mark.parametrize("side", ["ours", "naive"])
def test_a_step_updates_the_weights(cell, side):
    trained = both(cell)[side]
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    assert trained.waited == 0
    trained.step()
    assert trained.waited > 0
    changed = {name for name, p in trained.model.named_parameters() if not torch.equal(p, before[name])}
    # Batch norm takes the mean away again: a linear layer's bias before it has no gradient but rounding.
    assert changed >= {name for name in before if not name.endswith("bias")}
    assert all(p.grad is None for p in trained.model.parameters())


@pytest.mark.parametrize("which", ["forward", "forward+backward"])
@pytest.mark.parametrize("side", ["ours", "naive"])
def test_other_passes_leave_the_weights(cell, side, which):
    trained = both(cell)[side]
    _, run = trained.calls()[which]
    before = [p.detach().clone() for p in trained.model.parameters()]
    run(None)
    assert all(map(torch.equal, trained.model.parameters(), before))
    assert all(p.grad is None for p in trained.model.parameters())


def test_both_train_alike(bench, stores, monkeypatch):
    """Same weights, clips, rates: without dropout and with the same masks, the same weights after two steps."""
    cell = training.Cell(bench, stores, ModelConfig(**TINY, dropout=0.0), VIDEOS)
    ours, opponent = both(cell).values()
    masks, draw = [], Masking.draw
    monkeypatch.setattr(Masking, "draw", lambda *call: masks.append(draw(*call)) or masks[-1])
    monkeypatch.setattr(naive, "block_masks", lambda *_: masks.pop(0).mask)
    start = {name: p.clone() for name, p in opponent.model.state_dict().items()}
    for _ in range(2):
        ours.step()
        opponent.step()
    got = opponent.model.state_dict()
    checked = 0
    for name, p in ours.loop.module.model.state_dict().items():
        name = naive.naive_name(name, opponent.model)
        if name.endswith("weight") and p.ndim == 2:
            step = (got[name] - start[name]).norm()
            # Adam divides small gradients by their own size. naive's keys' bias moves by rounding errors, ours does not.
            assert step > 0 and (got[name] - p).norm() < 0.05 * step, name
            checked += 1
    assert checked > 8


def test_both_get_the_steps_of_training(cell):
    ours, opponent = both(cell).values()
    assert ours.loop.config.activation_checkpointing == "selective" and ours.loop.config.model.dropout == 0.1
    assert ours.loop.module.training and opponent.model.training
    for trained in (ours, opponent):
        trained.step()
        trained.step()
    assert ours.loop.step == opponent.updates == 2
    rates = [trained.optimizer.param_groups[0]["lr"] for trained in (ours.loop, opponent)]
    assert rates[0] == rates[1] == pytest.approx(2e-3 / (0.1 * training.STEPS))


@pytest.mark.parametrize("side", ["ours", "naive"])
def test_gradients_are_clipped(cell, side, monkeypatch):
    clip, limits = torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, limit: limits.append(limit) or clip(p, limit))
    both(cell)[side].step()
    assert limits == [1.0]


@pytest.mark.parametrize("side", ["ours", "naive"])
def test_wrong_weights_are_noticed(cell, side):
    trained = both(cell)[side]
    assert cell.check(trained) < 1e-6
    with torch.no_grad():
        (trained.model.model.backbone if side == "ours" else trained.model).layers[0].mlp.expand.weight[0] *= 2
    assert cell.check(trained) > 1e-4


def measured(bench, stores, impls=("ours", "naive eager"), name="small 5x128", dtype=torch.float32):
    train_step.run(bench, stores, name, impls, (VIDEOS,), dtype)
    return {row["impl"]: row for row in bench.rows}


def test_rows(bench, stores, capsys):
    rows = measured(bench, stores)
    assert set(rows) == {"ours", "naive eager"}
    for row in rows.values():
        assert row.keys() >= {*harness.KEYS, *train_step.OWN_KEYS}
        assert (row["op"], row["pass"], row["preset"], row["status"]) == ("training step", "step", "small 5x128", "ok")
        assert row["videos"] == VIDEOS and row["paper_videos_per_s"] == 32.0
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert row["videos_per_s"] == pytest.approx(1e3 * VIDEOS / row["ms"])
        assert row["matrix_peak_share"] == pytest.approx(row["tflop_per_s"] / bench.peaks[torch.float32])
        assert row["peak_bytes_per_video"] * VIDEOS == row["peak_bytes"] > 0
        assert 0 < row["data_wait_share"] < 1 and row["error"] < 1e-5
    needed = {impl: row["tflop_per_s"] * row["ms"] for impl, row in rows.items()}
    assert needed["ours"] == pytest.approx(needed["naive eager"])
    assert (rows["ours"]["syncs"], rows["naive eager"]["syncs"]) == (0, 3)  # the naive one's are its selections by a mask
    train_step.summary(bench.rows)
    printed = capsys.readouterr().out
    assert "naive eager" in printed and "32.0" in printed
    (line,) = train_step.comparison(bench.rows)
    assert f"{rows['naive eager']['ms'] / rows['ours']['ms']:.2f} times as fast" in line and "goal" in line


def test_rows_in_bfloat16(bench, stores):
    """Beside those in float32: of their own dtype, precision, bound and peak."""
    before, after = measured(bench, stores), measured(bench, stores, dtype=torch.bfloat16)
    assert [row["dtype"] for row in bench.rows] == ["float32"] * 2 + ["bfloat16"] * 2
    for impl, row in after.items():
        assert row["status"] == "ok" and 10 * before[impl]["error"] < row["error"] < training.BOUNDS[torch.bfloat16]
        assert row["matrix_peak_share"] == pytest.approx(row["tflop_per_s"] / bench.peaks[torch.bfloat16])
    single, half = train_step.comparison(bench.rows)
    assert "float32: ours is" in single and "bfloat16: ours is" in half and "goal" not in half


def test_bfloat16_where_its_products_are_faster(bench, monkeypatch):
    """Not where they are not, nor where another dtype was asked for, nor in a quick run."""
    peaks, bench.quick = {torch.float32: 1.0, torch.bfloat16: 2.0}, False
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(bench, "peaks", peaks)
    assert bench.dtypes(None) == [torch.float32, torch.bfloat16] and bench.dtypes("float32") == [torch.float32]
    peaks[torch.bfloat16] = 1.2
    assert bench.dtypes(None) == [torch.float32]
    peaks[torch.bfloat16], bench.quick = 2.0, True
    assert bench.dtypes(None) == [torch.float32]
    bench.quick = False
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert bench.dtypes(None) == [torch.float32]


def test_steps_take_turns(bench, stores, monkeypatch):
    order = []
    for side in (training.Ours, training.Naive):
        step = side.step
        monkeypatch.setattr(side, "step", lambda self, step=step: order.append(type(self).__name__) or step(self))
    measured(bench, stores)
    assert order[-2 * train_step.CPU_STEPS :] == ["Ours", "Naive"] * train_step.CPU_STEPS


def test_time_that_data_takes_is_counted(bench, stores, monkeypatch):
    """By a clock that a batch moves on by 10 s, which no machine needs for the rest of these steps."""
    batch, clock, seconds = training.ClipPairs.batch, train_step.time.perf_counter, 0.0

    def slow(*call):
        nonlocal seconds
        seconds += 10
        return batch(*call)

    monkeypatch.setattr(training.ClipPairs, "batch", slow)
    monkeypatch.setattr(train_step.time, "perf_counter", lambda: clock() + seconds)
    for row in measured(bench, stores).values():
        assert row["ms"] >= 10_000 and row["data_wait_share"] > 0.5


@pytest.mark.parametrize("impl, status", [("ours", 1), ("naive eager", 0)])
def test_what_is_wrong_is_not_timed(bench, stores, monkeypatch, impl, status):
    side = training.Ours if impl == "ours" else training.Naive
    states = side.states
    monkeypatch.setattr(side, "states", lambda *call: [1.001 * x for x in states(*call)])
    rows = measured(bench, stores)
    row = rows.pop(impl)
    assert row["status"] == "failed" and row["ms"] is None and "not timed" in row["note"] and row["error"] > 5e-4
    assert [other["status"] for other in rows.values()] == ["ok"]
    assert bench.finish() == status


def test_a_step_that_breaks(bench, stores, monkeypatch):
    monkeypatch.setattr(training.Ours, "step", lambda self: [][0:1].index(1))  # ValueError
    rows = measured(bench, stores)
    assert rows["ours"]["status"] == "failed" and rows["ours"]["note"].startswith("ValueError")
    assert rows["naive eager"]["status"] == "ok"
    assert bench.finish() == 1


def test_budget_and_what_needs_a_gpu(bench, stores):
    rows = measured(bench, stores, ("ours compiled", "naive compiled"))
    assert all(row["status"] == "skipped" and row["note"] for row in rows.values())
    bench.quick, bench.budget, bench.rows = False, 1e9, []
    cell = training.Cell(bench, stores, ModelConfig(**TINY), VIDEOS)
    case = harness.Case("training step", "", bench.dtype, (), cell.check, ("step",))
    (row,) = bench.race(case, [train_step.implementation(cell, "ours graphs", bench.dtype)])
    assert row["status"] == "unavailable" and "CUDA" in row["note"]


def test_the_largest_number_of_videos_that_fits(bench, monkeypatch):
    """A step of more than 64 videos is too much for ours, one of any for the naive model."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    tried = []

    class Fake:
        def __init__(self, videos):
            self.videos = videos

        def trained(self, side, most):
            def step():
                tried.append((side, self.videos))
                if self.videos > most:
                    raise torch.OutOfMemoryError("CUDA out of memory")

            return type("Trained", (), {"step": staticmethod(step)})

        def ours(self, compiled):
            assert not compiled
            return self.trained("ours", 64)

        def naive(self, compiled):
            return self.trained("naive", 0)

    sizes = (128, 64, 32)
    assert bench.fitting("small 5x128", "ours compiled", Fake, sizes) == (64, 32)
    assert bench.fitting("small 5x128", "naive eager", Fake, sizes) == (32,)
    assert tried == [("ours", 128), ("ours", 64), ("naive", 128), ("naive", 64)]
    assert bench.fitting("small 5x128", "ours", Fake, sizes) == (64, 32) and len(tried) == 4  # known by now


def test_a_size_that_does_not_fit_after_all(bench, stores, monkeypatch):
    """On a GPU a compiled step may need more than the eager one that the size was found with."""
    bench.on_gpu, bench.device = True, torch.device("cpu")
    monkeypatch.setattr(
        train_step, "Cell", lambda bench, stores, config, videos, dtype: type("Cell", (), {"ours": print, "check": print})
    )
    monkeypatch.setattr(bench, "fitting", lambda preset, impl, make_cell, sizes: sizes[1:])
    tried = []

    def race(case, impls):
        tried.append((case.shape, [impl.name for impl in impls]))
        if "=64" in case.shape:
            return [bench.refused(case, impls[0], torch.OutOfMemoryError("CUDA out of memory"))]
        return [bench.blank(case, impls[0], "ok", "")[0] | {"ms": 10.0}]

    monkeypatch.setattr(bench, "race", race)
    train_step.run(bench, stores, "small 5x128", ("ours compiled", "ours"), (128, 64, 32), torch.float32)
    assert tried == [(f"small 5x128 videos={n}", [impl]) for impl in ("ours compiled", "ours") for n in (64, 32)]
    assert [(row["videos"], row["videos_per_s"], row["note"]) for row in bench.rows] == [
        (32, pytest.approx(3200), "32 videos a step, more do not fit")
    ] * 2


def test_stores_hold_what_clips_need(stores, cell):
    assert stores.of(4, 50) is cell.store and len(cell.store) == 16
    batch = cell.pairs.batch(0, VIDEOS)
    assert batch.tokens.shape == (2 * VIDEOS, 3, 4, 4) and batch.tokens.min() >= 0 and batch.tokens.max() < 50
    assert not cell.pairs.padded and len(set(batch.videos)) == VIDEOS
    assert cell.ours(compiled=False).loop.world == World(0, 1, torch.device("cpu"))
    random.seed(5)
    first = cell.naive(compiled=False)
    assert first.pairs.batch(0, VIDEOS).tokens.tolist() == batch.tokens.tolist()
