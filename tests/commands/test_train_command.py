"""train.py as a command: help, profile, torchrun."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from extension import CPU_ERROR
from runs import ROOT, arguments, metrics
from vimpac.checkpoint import list_checkpoints
from vimpac.config import ModelConfig, PretrainConfig
from vimpac.processes.ranks import LAUNCHER
from vimpac.training import launch

pytestmark = pytest.mark.usefixtures("one_thread")


def python(*words, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, env=environment, **options)


def test_help_lists_every_field():
    result = python(str(ROOT / "train.py"), "large-half", "--help")
    assert result.returncode == 0 and "(default: 1024)" in result.stdout
    for field in dataclasses.fields(PretrainConfig):
        assert f"--{field.name.replace('_', '-')}" in result.stdout or field.name == "model"
    for field in dataclasses.fields(ModelConfig):
        assert f"--model.{field.name.replace('_', '-')}" in result.stdout


def test_help_says_how_alpha_is_multiplied():
    """Eq. 6: the temperature is also a factor."""
    shown = " ".join(python(str(ROOT / "train.py"), "small", "--help").stdout.replace("│", " ").split())
    assert "the loss is mask + alpha · temperature · contrastive" in shown


def test_help_needs_no_torch():
    code = "import sys, train\ntry: train.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    assert python("-c", code, cwd=ROOT).stdout.endswith("False\n")


def test_the_command(store_folder, output, tmp_path):
    words = arguments(store_folder, output, steps=1)
    result = python(str(ROOT / "train.py"), *words, cwd=tmp_path)
    assert result.returncode == 0 and (output / "model.safetensors").exists(), result.stderr
    result = python(str(ROOT / "train.py"), *words, cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert (
        result.stderr == f"train.py: error: run folder {output} exists: add --resume to continue it, or give another --output\n"
    )


def test_profile(store_folder, output, tmp_path):
    """A trace, and a table of where the time of an update goes."""
    result = python(str(ROOT / "train.py"), *arguments(store_folder, output, profile=True), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    trace = json.loads((output / "profile.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "optimizer" for event in trace) == 3  # updates 4 to 6
    lines = result.stderr.splitlines()
    parts = next(i for i, line in enumerate(lines) if line.startswith("part "))
    assert [line.split()[0] for line in lines[parts + 1 : parts + 5]] == ["data", "forward", "backward", "optimizer"]
    assert all(float(line.split()[1]) > 0 for line in lines[parts + 1 : parts + 5])
    assert "the host waited for the device 0 times per update" in lines
    operation = "aten::bmm" if CPU_ERROR else "axial_attention"  # without the library the definition runs
    assert any(operation in line for line in lines)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_profile_of_a_short_run(main, store_folder, output, steps):
    """Fewer updates than it would leave out and take: what there is."""
    assert main(arguments(store_folder, output, profile=True, steps=steps))[0] == 0
    assert (output / "profile.json").exists()


def test_torchrun(store_folder, output, tmp_path):
    """Both processes join; a mistake is said once, and the launcher adds nothing to it."""
    command = ["-m", "vimpac.training.launch", "--standalone", "--nproc-per-node=2", str(ROOT / "train.py")]
    result = python(*command, *arguments(store_folder, output, steps=1), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert torch.load(list_checkpoints(output)[-1])["world_size"] == 2
    result = python(*command, *arguments(store_folder, output, steps=1), cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.count(f"train.py: error: run folder {output} exists") == 1
    assert "Traceback" not in result.stderr


def test_torchrun_says_who_was_killed(tmp_path):
    """And gives each process its share of the cores, here 7."""
    script = tmp_path / "script.py"
    script.write_text("""
import os, signal, time
os.write(1, os.environ["OMP_NUM_THREADS"].encode() + b"\\n")  # at once: two processes write to one pipe
if os.environ["LOCAL_RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
""")
    code = """
import os, sys
from vimpac.processes import limits as cores
from vimpac.training import launch
os.sched_getaffinity = lambda _: range(7)
cores.cores_allowed = lambda: None
sys.exit(launch.main())
"""
    environment = {name: x for name, x in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", code, "--standalone", "--nproc-per-node=2", str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert ended.returncode == 128 + signal.SIGKILL and set(ended.stdout.split()) == {"3"}
    assert ended.stderr.startswith("rank 1 was killed by SIGKILL: most likely this machine ran out of memory")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "codes, status, said",
    [
        ([1, -signal.SIGTERM], 1, ""),  # torchrun ended the second, because the first had failed
        ([-signal.SIGTERM, 1], 1, ""),
        ([1, -signal.SIGSEGV], 128 + signal.SIGSEGV, "rank 1 was killed by SIGSEGV\n"),
        ([-signal.SIGTERM, -signal.SIGTERM], 128 + signal.SIGTERM, ""),
    ],
)
def test_torchrun_is_no_cause_itself(monkeypatch, capsys, tmp_path, codes, status, said):
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from vimpac.training import launch

    def fail(_):
        failures = {rank: ProcessFailure(rank, 100 + rank, code, str(tmp_path / "none")) for rank, code in enumerate(codes)}
        for failure in failures.values():  # a process that explained its error did so first
            failure.timestamp = 1 if failure.exitcode > 0 else 2
        raise ChildFailedError("script.py", failures)

    monkeypatch.setattr(run, "run", fail)
    monkeypatch.setenv(LAUNCHER, "")  # given back after the test
    assert launch.main(["--nproc-per-node=1", "script.py"]) == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "processes, given, threads", [("1", None, None), ("8", "5", "5"), ("8", None, "2"), ("99", None, "1"), ("cpu", None, "1")]
)
def test_torchrun_threads(monkeypatch, processes, given, threads):
    """What the user chose stays; one process takes all cores, as without torchrun."""
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # given back after the test
    monkeypatch.delenv("OMP_NUM_THREADS") if given is None else monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setenv(LAUNCHER, "")  # so that monkeypatch restores it
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.setattr("vimpac.processes.limits.cores_allowed", lambda: None)
    monkeypatch.setattr("torch._utils.cpu_count", lambda: 16, raising=False)  # what torchrun asks; before torch 2.13 the next
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr("torch.distributed.run.run", lambda options: None)
    assert launch.main([f"--nproc-per-node={processes}", "train.py"]) == 0
    assert os.environ.get("OMP_NUM_THREADS") == threads


def test_torchrun_restarts(store_folder, output, tmp_path):
    """A process that is lost is started again, with all others, and the run goes on where its last checkpoint is."""
    command = [sys.executable, "-m", "vimpac.training.launch", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    words = arguments(store_folder, output, steps=60, save_every=2, resume=True, n_blocks=40)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([*command, str(ROOT / "train.py"), *words], stderr=said, stdout=said, env=environment)
        try:
            deadline = time.monotonic() + 60
            while not list_checkpoints(output) and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(children(process.pid)[1], signal.SIGKILL)
            assert process.wait(90) == 0, (tmp_path / "said").read_text()
        finally:
            process.kill()
            process.wait()
    assert [line["step"] for line in metrics(output)] == [*range(1, 61), 60]
    words = arguments(store_folder, tmp_path / "whole", steps=60, save_every=2, n_blocks=40)
    result = python(*command[1:], str(ROOT / "train.py"), *words)
    assert result.returncode == 0, result.stderr
    assert metrics(output) == metrics(tmp_path / "whole")


def children(pid):
    """Processes that a process has started."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    if not found.exists():
        pytest.skip("this system does not list a process's children")
    return [int(child) for child in found.read_text().split()]
