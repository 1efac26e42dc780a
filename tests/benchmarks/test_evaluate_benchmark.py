"""benchmarks/evaluate.py: both sides run the same passes, take turns, and what is wrong is not timed."""

from dataclasses import replace

import pytest
import torch

import evaluate
import harness


@pytest.fixture
def bench(capsys):
    return evaluate.EvaluateBenchmark(harness.arguments("", ["--device", "cpu", "--quick", "--no-write"]))


@pytest.fixture
def cell(tmp_path):
    config = replace(evaluate.PRESETS["small 5x128"], **evaluate.TINY)
    return evaluate.Cell(tmp_path / "store", config, 3, 10, 32, torch.device("cpu"), None)


def raced(bench, cell):
    case = harness.Case("evaluate", "tiny", torch.float32, (), cell.check, ("forward",))
    return {row["impl"]: row for row in bench.race(case, cell, "small 5x128")}


@pytest.mark.parametrize("batch, shapes", [(32, [30] * 3), (64, [60, 30]), (20, [15] * 6)])
def test_bare_passes_have_the_shapes_of_ours(cell, batch, shapes):
    cell = replace(cell, batch=batch)
    assert cell.shapes == shapes
    seen = []
    cell.model.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    cell.bare()
    assert seen == [(clips, 3, 4, 4) for clips in shapes]
    seen.clear()
    cell.score()
    assert [shape[0] for shape in seen] == shapes


def test_rows(bench, cell):
    rows = raced(bench, cell)
    assert list(rows) == ["ours", evaluate.BARE]
    for row in rows.values():
        assert row["status"] == "ok" and row["error"] < 1e-5 and row["videos"] == 3
        assert row["clips_per_s"] == pytest.approx(90e3 / row["ms"])
    assert rows["ours"]["bare_share"] > 0 and rows[evaluate.BARE]["bare_share"] is None
    (line,) = evaluate.summary(list(rows.values()))
    assert f"{rows['ours']['bare_share']:.3f} of the speed of bare forward passes (goal ≥ 0.9)" in line


def test_the_share_is_that_of_each_round(monkeypatch):
    """By a clock of which ours takes 10, 20 and 40 s, the bare passes nine tenths."""
    seconds, clock = iter([10, 9, 20, 18, 40, 36]), [0.0]
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: clock[0])
    calls = []

    def taking(name):
        def call():
            calls.append(name)
            clock[0] += next(seconds)

        return call

    ms = evaluate.taking_turns({name: taking(name) for name in ("ours", "bare")}, 3)
    assert calls == ["ours", "bare"] * 3 and ms == {"ours": [10e3, 20e3, 40e3], "bare": [9e3, 18e3, 36e3]}
    assert evaluate.share_of(*ms.values()) == pytest.approx(0.9)


@pytest.mark.parametrize("side, status", [("score", 1), ("bare", 0)])
def test_what_is_wrong_is_not_timed(bench, cell, monkeypatch, side, status):
    if side == "score":
        score = evaluate.score_videos
        monkeypatch.setattr(evaluate, "score_videos", lambda *call: 1.001 * score(*call))
    else:
        check = evaluate.Cell.check
        monkeypatch.setattr(evaluate.Cell, "check", lambda self, run: 1.0 if run == self.bare else check(self, run))
    rows = raced(bench, cell)
    wrong = rows["ours" if side == "score" else evaluate.BARE]
    assert wrong["status"] == "failed" and wrong["ms"] is None and "not timed" in wrong["note"] and wrong["error"] > 5e-4
    bench.rows += rows.values()
    assert bench.finish() == status
