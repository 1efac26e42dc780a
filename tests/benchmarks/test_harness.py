"""The harness of the benchmarks: what is wrong is not timed, what was measured is written."""

import json
import sys

import pytest
import torch

import harness
import timing


@pytest.fixture
def bench(tmp_path, capsys):
    return harness.Benchmark("test", harness.arguments("", ["--device", "cpu", "--quick", "--results", str(tmp_path)]))


def square_case(**options):
    x = torch.randn(50, requires_grad=True)
    expected = harness.evaluate(lambda x: x.square().sum(), harness.exact([x]))

    def check(function):
        return harness.distance(harness.evaluate(function, [x]), expected)

    return harness.Case("square", "50", torch.float32, [x], check, ("forward", "backward", "forward+backward"), **options)


def statuses(bench):
    return [row["status"] for row in bench.rows]


def test_right_is_timed(bench):
    case = square_case(bytes={"forward": 200}, flops={"forward": 100})
    bench.add(case, [harness.Impl("ours", lambda: lambda x: (x * x).sum(), ours=True, required=True)])
    assert statuses(bench) == ["ok"] * 3
    assert bench.rows[0]["gb_per_s"] == pytest.approx(200 / bench.rows[0]["ms"] / 1e6)
    assert bench.rows[0]["copy_share"] == pytest.approx(bench.rows[0]["gb_per_s"] / bench.copy_gb_per_s)
    assert bench.rows[1]["gb_per_s"] is None
    assert bench.finish() == 0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: 1.001 * x.square().sum(),
        lambda x: x.square().sum() * float("nan"),
        lambda x: x.square().sum() + (x - x.detach()).sum(),  # the value is right, the gradient is not
    ],
)
@pytest.mark.parametrize("impl, status", [("ours", 1), ("peer", 0)])
def test_wrong_is_not_timed(bench, wrong, impl, status):
    timed = []

    def function(x):
        timed.append(1)
        return wrong(x)

    bench.add(square_case(), [harness.Impl(impl, lambda: function, ours=impl == "ours", required=impl == "ours")])
    assert statuses(bench) == ["failed"] * 3
    assert all(row["ms"] is None and "not timed" in row["note"] for row in bench.rows)
    assert len(timed) == 1  # by the check
    assert bench.finish() == status


def test_garbage_from_an_op_is_caught(bench, monkeypatch):
    """The whole path of a script, with a reference that has lost its temperature."""
    import info_nce

    monkeypatch.setenv("VIMPAC_BACKEND", "reference")
    right = info_nce.info_nce_reference
    monkeypatch.setattr(sys.modules["vimpac.ops.info_nce"], "info_nce_reference", lambda *call: right(*call[:5], 1.0))
    bench.add(*info_nce.case(bench, 16, torch.float32))
    ours = [row for row in bench.rows if row["impl"] == "ours"]
    assert [row["status"] for row in ours] == ["failed"] * 2 and all(row["ms"] is None for row in ours)
    assert bench.finish() == 1


def raising(problem):
    def build():
        raise problem

    return build


def test_what_cannot_run(bench):
    bench.add(
        square_case(),
        [
            harness.Impl("missing", raising(ImportError("no such library\nsecond line"))),
            harness.Impl("too large", raising(torch.OutOfMemoryError("tried to allocate 64 GiB"))),
            harness.Impl("ours:refused", raising(ValueError("no CUDA device")), ours=True),
        ],
    )
    assert statuses(bench) == ["unavailable"] * 9
    assert bench.rows[0]["note"] == "ImportError: no such library"
    assert bench.finish() == 0


@pytest.mark.parametrize("problem, required", [(RuntimeError("illegal access"), False), (ValueError("shape"), True)])
def test_ours_that_breaks_is_a_failure(bench, problem, required):
    bench.add(square_case(), [harness.Impl("ours", raising(problem), ours=True, required=required)])
    assert statuses(bench) == ["failed"] * 3
    assert bench.finish() == 1


def test_budget(bench):
    bench.quick, bench.budget = False, 0.0
    right = [lambda: lambda x: x.square().sum()]
    bench.add(square_case(), [harness.Impl("peer", *right), harness.Impl("compiled", *right, compiled=True)])
    bench.add(square_case(), [harness.Impl("ours", *right, ours=True)])
    assert statuses(bench) == ["skipped"] * 6 + ["ok"] * 3


def test_rows_are_written_as_they_come(bench, tmp_path):
    """A limit that ends the process leaves what was measured."""

    def written():
        result = json.loads((tmp_path / "test.json").read_text())
        return len(result["rows"]), result["complete"]

    right = lambda: lambda x: x.square().sum()  # noqa: E731
    bench.add(square_case(), [harness.Impl("peer", right)])
    assert written() == (3, False)
    bench.add(square_case(), [harness.Impl("ours", right, ours=True)])
    assert written() == (6, False) and not (tmp_path / "test.csv").exists()
    assert bench.finish() == 0 and written() == (6, True) and (tmp_path / "test.csv").exists()
    bench.options.no_write = True
    bench.rows *= 2
    bench.save()
    assert written() == (6, True)


def test_spread():
    assert timing.spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)
    assert timing.spread([7.0]) == (7.0, 7.0, 7.0)


def test_peak_memory_on_a_cpu():
    size = 4 << 20

    def run(x):
        first = x + 1  # alive together with the second
        return (first + 1).sum()

    peak = timing.peak_bytes(torch.device("cpu"), lambda: torch.zeros(size // 4), run)
    assert size * 3 <= peak < size * 3.1  # what prepare made is counted, as the states that a forward saves are


def test_quick_numbers_stay_out_of_the_results(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    bench = harness.Benchmark("test", harness.arguments("", ["--device", "cpu", "--quick"]))
    assert bench.finish() == 0 and not list(tmp_path.iterdir())
    bench.options.quick = bench.quick = False
    assert bench.finish() == 0 and (tmp_path / "benchmarks" / "results" / "cpu" / "test.json").exists()
