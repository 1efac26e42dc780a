"""`make gpu` without a GPU: its steps, their limits, and what is compiled before it is timed."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import conftest
import gpu
import harness

ROOT = harness.ROOT


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
    limits = gpu.BUILD_SECONDS, gpu.TEST_SECONDS, gpu.SANITIZER_SECONDS, *gpu.BENCHMARKS.values()
    assert sum(limits) <= gpu.SECONDS == 8 * 60
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "return bench.finish(" in path.read_text()}
    assert gpu.BENCHMARKS.keys() == scripts
    assert all((ROOT / "tests" / file).exists() for file in gpu.TESTS)
    kernels = [path for pattern in ("*_triton.py", "*_cuda.py") for path in (ROOT / "tests").rglob(pattern)]
    assert {path.relative_to(ROOT / "tests").as_posix() for path in kernels} <= set(gpu.TESTS)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """gpu.py's main on a machine without one: the list of its steps' names, limits and commands; each takes its limit."""
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
    (tmp_path / "file").touch()
    assert gpu.main(["--results", str(tmp_path / "file" / "new")]) == 2 and not pretended_gpu
    assert "file/new cannot be written (Not a directory): give another folder, make gpu RESULTS=DIR" in capsys.readouterr().err

    def denied(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(gpu.tempfile, "TemporaryFile", denied)  # root may write everywhere
    assert gpu.main(["--results", str(tmp_path)]) == 2 and not pretended_gpu
    assert f"{tmp_path} cannot be written (Permission denied)" in capsys.readouterr().err


def test_commands_side_by_side_take_a_core_each_and_find_what_the_user_has(monkeypatch, tmp_path, capsys):
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
