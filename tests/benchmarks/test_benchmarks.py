"""The benchmarks run on a CPU, end with one JSON line, and never time what is wrong."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import conftest
import harness
from vimpac.ops import dispatch

ROOT = harness.ROOT
ROW_KEYS = {"op", "impl", "shape", "dtype", "pass", "ms", "ms_p20", "ms_p80", "gb_per_s", "copy_share", "peak_bytes", "error"}
SCRIPTS = {  # script → implementations that need not be there
    "axial_attention": {"xformers": "xformers"},
    "block_mask": {},
    "dropout_add": {},
    "info_nce": {"inf-cl": "inf_cl"},
    "masked_cross_entropy": {"liger-kernel": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"},
    "attn_layouts": {},
    "train_step": {},
    "data": {},
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_script(script, tmp_path):
    command = [sys.executable, f"benchmarks/{script}.py", "--quick", "--device", "cpu", "--results", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert (result["benchmark"], result["device"], result["torch"]) == (script, "cpu", torch.__version__)
    assert "triton" in result
    rows = result["rows"]
    assert rows and all(row.keys() >= ROW_KEYS for row in rows)
    ours = [row for row in rows if row["impl"] == "ours"]
    assert ours and all(row["ms_p20"] <= row["ms"] <= row["ms_p80"] and row["peak_bytes"] > 0 for row in ours)
    bounds = {"bfloat16": 2**-8}  # a result's rounding
    assert all(row["error"] <= bounds.get(row["dtype"], 1e-4) and row["status"] == "ok" for row in ours)
    assert all(row["note"] for row in rows if row["ms"] is None)
    for impl, module in SCRIPTS[script].items():
        found = [row for row in rows if row["impl"] == impl]
        assert found
        if importlib.util.find_spec(module) is None:
            assert all(row["status"] == "unavailable" and module in row["note"] for row in found)
    with (tmp_path / f"{script}.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert json.loads((tmp_path / f"{script}.json").read_text()) == result


def test_shards_of_a_file_are_all_of_it():
    items = [SimpleNamespace(path=Path("test_one.py"), name=f"test_{i}") for i in range(7)]

    def shard(which):
        kept, left = list(items), []
        hook = SimpleNamespace(pytest_deselected=lambda items: left.extend(items))
        conftest.pytest_collection_modifyitems(SimpleNamespace(getoption=lambda _: which, hook=hook), kept)
        return [item.name for item in kept], [item.name for item in left]

    names = [item.name for item in items]
    parts = [shard(f"{i}/3") for i in (1, 2, 3)]
    assert sorted(name for kept, _ in parts for name in kept) == names and all(kept for kept, _ in parts)
    assert all(sorted(kept + left) == names for kept, left in parts) and shard("1/1") == (names, [])
    with pytest.raises(pytest.UsageError, match=r"--shard 4/3: expected I/N with I from 1 to N"):
        shard("4/3")


def test_slow_files_begin_first():
    stems = ["test_atomic", "test_update", "test_dropout_add_triton", "test_benchmarks", "test_block_mask_cuda", "test_video"]
    items = [SimpleNamespace(path=Path(f"{stem}.py"), name=f"{stem}{i}") for stem in stems for i in range(2)]
    conftest.pytest_collection_modifyitems(SimpleNamespace(getoption=lambda _: "1/1"), items)
    order = ["test_dropout_add_triton", "test_block_mask_cuda", "test_benchmarks", "test_atomic", "test_update", "test_video"]
    assert [item.name for item in items] == [f"{stem}{i}" for stem in order for i in range(2)]


def test_everything_for_a_gpu_fits_into_eight_minutes():
    import gpu

    limits = gpu.BUILD_SECONDS, gpu.TEST_SECONDS, gpu.SANITIZER_SECONDS, *gpu.BENCHMARKS.values()
    assert sum(limits) <= gpu.SECONDS == 8 * 60
    assert gpu.BENCHMARKS.keys() == SCRIPTS.keys()
    assert all((ROOT / "tests" / file).exists() for file in gpu.TESTS)
    kernels = [path for pattern in ("*_triton.py", "*_cuda.py") for path in (ROOT / "tests").rglob(pattern)]
    assert {path.relative_to(ROOT / "tests").as_posix() for path in kernels} <= set(gpu.TESTS)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """gpu.py's main on a machine without one: the list of its steps' names, limits and commands; each takes its limit."""
    import gpu

    ran, clock = [], [1000.0]

    def run_together(commands, seconds, folder):
        ran.extend((name, seconds, command) for name, command in commands.items())
        clock[0] += seconds if commands else 0.0
        return [{"name": name, "outcome": "green"} for name in commands]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A GPU")
    monkeypatch.setattr(gpu, "build", lambda: {"build": ["make"]})
    monkeypatch.setattr(gpu, "run_together", run_together)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    return ran


def test_a_gpu_s_steps_end_with_eight_minutes(pretended_gpu, tmp_path, capsys):
    """Also where every one of them takes all that it may."""
    import gpu

    assert gpu.main(["--results", str(tmp_path / "new")]) == 0
    assert {name for name, _, _ in pretended_gpu} >= {"build", "test_philox.py", "compile-1", *gpu.BENCHMARKS}
    assert gpu.time.monotonic() - 1000 <= gpu.SECONDS
    for name, limit, command in pretended_gpu:
        if name in gpu.BENCHMARKS:
            assert 0 <= limit <= 2 * gpu.BENCHMARKS[name] and float(command[command.index("--budget") + 1]) <= limit / 2 + 0.5
            assert command[-2:] == ["--results", str(tmp_path / "new")]
    names = [step["name"] for step in json.loads((tmp_path / "new" / "gpu.json").read_text())["steps"]]
    assert names == [name for name, _, _ in pretended_gpu]


def test_a_folder_that_cannot_be_written_is_named(pretended_gpu, tmp_path, capsys, monkeypatch):
    import gpu

    (tmp_path / "file").touch()
    assert gpu.main(["--results", str(tmp_path / "file" / "new")]) == 2 and not pretended_gpu
    assert "file/new cannot be written (Not a directory): give another folder, make gpu RESULTS=DIR" in capsys.readouterr().err

    def denied(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(gpu.tempfile, "TemporaryFile", denied)  # root may write everywhere
    assert gpu.main(["--results", str(tmp_path)]) == 2 and not pretended_gpu
    assert f"{tmp_path} cannot be written (Permission denied)" in capsys.readouterr().err


def test_commands_side_by_side_take_a_core_each_and_find_what_the_user_has(monkeypatch, tmp_path, capsys):
    import gpu

    monkeypatch.setenv("PYTHONPATH", "/of/the/user")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "logs").mkdir()
    show = [sys.executable, "-S", "-c", "import os; print(os.environ['PYTHONPATH'], os.environ.get('OMP_NUM_THREADS'))"]
    steps = gpu.run_together({"a": show, "b": show}, 60, tmp_path) + gpu.run_together({"alone": show}, 60, tmp_path)
    assert [step["said"] for step in steps] == [f"{ROOT}:/of/the/user {threads}" for threads in ("1", "1", "None")]
    assert {step["outcome"] for step in steps} == {"green"}
    slow = [sys.executable, "-S", "-c", "import time; print('so far', flush=True); time.sleep(60)"]
    (step,) = gpu.run_together({"slow": slow}, 2, tmp_path)
    assert step["outcome"] == "more than 2 s" and step["said"] == "so far"


def test_what_the_attention_benchmark_times_is_compiled_before(monkeypatch):
    """In parts beside the tests: one after the other they would take longer than its limit."""
    import axial_attention as script
    import gpu

    made = []
    monkeypatch.setattr(script, "compile_triton", lambda problem, device, dtype: made.append((problem, device.type, dtype)))
    parts = [command for name, command in gpu.tests().items() if name.startswith("compile-")]
    for command in parts:
        assert command[1] == "benchmarks/axial_attention.py"
        assert script.main([*command[2:], "--device", "cuda"]) == 0
    every = list(script.problems(harness.arguments("", ["--device", "cuda"], axes={}, dropout={})))
    assert len(parts) == gpu.COMPILED_PARTS and len(made) == len(every) == 8
    assert set(made) == {(problem, "cuda", torch.bfloat16) for problem in every}


def test_compiling_is_forward_and_backward_with_and_without_dropout(monkeypatch):
    import axial_attention as script

    calls = []

    def packed(rows, problem, backend, dropout):
        calls.append((problem.clips, backend, dropout))
        return rows[:, 0] * 2

    monkeypatch.setattr(script, "packed", packed)
    problem = script.Problem((3, 4, 5), 4, 16, ("T",), 1, 0.1)
    script.compile_triton(problem, torch.device("cpu"), torch.float32)
    assert sorted(calls) == [(2, "triton", 0.0), (2, "triton", 0.1)]


@pytest.mark.parametrize(
    "setuptools, nvcc, built, shown", [(77, True, True, ""), (65, True, False, "setuptools 77"), (65, False, False, "")]
)
def test_the_extension_is_built_where_it_can_be(monkeypatch, capsys, setuptools, nvcc, built, shown):
    import gpu

    monkeypatch.setattr("shutil.which", lambda name, **_: f"/bin/{name}" if nvcc else None)
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: f"{setuptools}.5.0" if name == "setuptools" else "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, "sm_80\nsm_90"))
    for name in ("VIMPAC_CUDA_ARCHS", "VIMPAC_EXTENSION"):
        monkeypatch.setenv(name, "")
    assert bool(gpu.build()) == built
    said = capsys.readouterr().out
    assert (f"is not built, which needs {shown}" in said) if shown else not said


def test_what_a_sanitizer_watches_is_compiled_before(monkeypatch):
    """All of it, in parts beside the tests; the sanitizer's own limit leaves no time for that."""
    import gpu
    import sanitize

    monkeypatch.setattr("shutil.which", lambda name, **_: f"/bin/{name}")
    parts = [command[-1] for name, command in gpu.tests().items() if name.startswith("sanitize-")]
    run, every = [], list(sanitize.PARTS)
    monkeypatch.setattr(sanitize, "PARTS", [lambda _, i=i: run.append(i) for i in range(len(every))])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for part in parts:
        monkeypatch.setattr(sys, "argv", ["sanitize.py", part])
        sanitize.main()
    assert len(parts) == gpu.SANITIZED_PARTS and sorted(run) == list(range(len(every)))
    watched = gpu.sanitizers().values()
    assert len(watched) == 2 and all(command[-1] == "tests/sanitize.py" for command in watched)


def test_tf32_is_allowed_in_both_passes(monkeypatch):
    import info_nce as script

    seen, switch = [], torch.backends.cuda.matmul

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z1, z2):
            seen.append(switch.fp32_precision)
            ctx.save_for_backward(z1, z2)
            return (z1 * z2).sum()

        @staticmethod
        def backward(ctx, grad):
            seen.append(switch.fp32_precision)
            z1, z2 = ctx.saved_tensors
            return grad * z2, grad * z1

    monkeypatch.setattr(script, "info_nce", lambda z1, z2, temperature: Loss.apply(z1, z2))
    before = switch.fp32_precision
    z1, z2 = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    grads = torch.autograd.grad(3 * script.WithTF32.apply(z1, z2), (z1, z2))
    assert torch.equal(grads[0], 3 * z2) and torch.equal(grads[1], 3 * z1)
    assert seen == ["tf32", "tf32"] and switch.fp32_precision == before != "tf32"


def test_every_op_has_a_benchmark():
    ops = set(dispatch._REGISTRY)
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} >= ops


# --- the harness ------------------------------------------------------------------------------------------------------


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
    assert harness.spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)
    assert harness.spread([7.0]) == (7.0, 7.0, 7.0)


def test_peak_memory_on_a_cpu():
    size = 4 << 20

    def run(x):
        first = x + 1  # alive together with the second
        return (first + 1).sum()

    peak = harness.peak_bytes(torch.device("cpu"), lambda: torch.zeros(size // 4), run)
    assert size * 3 <= peak < size * 3.1  # what prepare made is counted, as the states that a forward saves are


# --- the data path ----------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path):
    import data

    return data.Plan(data.Files(tmp_path, side=4, videos=300), clip_frames=5)


@pytest.fixture
def data_bench(bench):
    import data

    return data.DataBenchmark("data", bench.options)


def drawn(plan):
    import data

    return [harness.Impl("ours", lambda: data.draw(plan), ours=True, required=True, bound=0.0)]


def test_one_wrong_id_of_a_clip_is_caught(data_bench, plan, monkeypatch):
    import data

    right = data.TokenStore.read_clips

    def wrong(*call, **options):
        clips = right(*call, **options)
        clips[-1, -1, -1, -1] ^= 1
        return clips

    monkeypatch.setattr(data.TokenStore, "read_clips", wrong)
    data.add(data_bench, plan, "batch", drawn(plan))
    assert statuses(data_bench) == ["failed"] and data_bench.rows[0]["pairs_per_s"] is None
    assert data_bench.finish() == 1


@pytest.mark.parametrize("gone, cache, note", [(True, "cold", ""), (False, "warm", "the file system keeps its pages")])
def test_a_cache_that_stays_warm_is_said_so(data_bench, plan, monkeypatch, gone, cache, note):
    import data

    dropped = []
    monkeypatch.setattr(data, "drop_pages", lambda path: dropped.append(path) or gone)
    data.add(data_bench, plan, "batch", drawn(plan), dropped=plan.files.shards)
    (row,) = data_bench.rows
    assert (row["cache"], row["status"]) == (cache, "ok") and note in row["note"] and set(dropped) == set(plan.files.shards)
    assert row["pairs_per_s"] == pytest.approx(128e3 / row["ms"])
    assert row["mb_per_s"] == pytest.approx(row["pairs_per_s"] * 2 * 5 * 4 * 4 * 2 / 1e6)


def test_one_core_and_back():
    import data

    before = torch.get_num_threads(), getattr(os, "sched_getaffinity", lambda _: None)(0)
    with data.one_core():
        assert torch.get_num_threads() == 1
        assert not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) == 1
    assert before == (torch.get_num_threads(), getattr(os, "sched_getaffinity", lambda _: None)(0))


def test_quick_numbers_stay_out_of_the_results(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    bench = harness.Benchmark("test", harness.arguments("", ["--device", "cpu", "--quick"]))
    assert bench.finish() == 0 and not list(tmp_path.iterdir())
    bench.options.quick = bench.quick = False
    assert bench.finish() == 0 and (tmp_path / "benchmarks" / "results" / "cpu" / "test.json").exists()
