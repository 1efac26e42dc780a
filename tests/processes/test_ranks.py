"""What torchrun's variables say, and that a process ends when what started it does."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs import ROOT, arguments, free_port, metrics, train_main
from vimpac.checkpoint import list_checkpoints
from vimpac.commands import main as cli
from vimpac.errors import InputError
from vimpac.processes import ranks
from vimpac.processes.ranks import Place, read_place
from vimpac.training import launch

MEET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
BOTH = {"RANK": "1", "WORLD_SIZE": "2", **MEET}


@pytest.mark.parametrize(
    "given, place",
    [
        ({}, Place()),
        (MEET, Place()),
        ({"LOCAL_WORLD_SIZE": "2"}, Place(local_size=2)),  # two runs share a machine
        (BOTH, Place(1, 2)),
        ({**BOTH, "LOCAL_RANK": "1"}, Place(1, 2, 1)),
        ({**BOTH, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Place(1, 2, 1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place()),
    ],
)
def test_places(given, place):
    assert read_place(given) == place


@pytest.mark.parametrize(
    "given, said",
    [
        ({"RANK": "5"}, "RANK='5' is set without WORLD_SIZE"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE='4' is set without RANK"),
        ({**BOTH, "RANK": "x"}, "RANK is 'x', expected a whole number from 0 to 1"),
        ({**BOTH, "RANK": "2"}, "RANK is '2', expected a whole number from 0 to 1"),
        ({**BOTH, "RANK": "-1"}, "RANK is '-1'"),
        ({**BOTH, "RANK": ""}, "RANK is ''"),
        ({**BOTH, "WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0', expected a whole number from 1 to 100000"),
        ({**BOTH, "WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({**BOTH, "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
        ({**BOTH, "WORLD_SIZE": "٢"}, "WORLD_SIZE is '٢'"),
        ({**BOTH, "LOCAL_RANK": "junk"}, "LOCAL_RANK is 'junk'"),
        ({**BOTH, "LOCAL_RANK": "2"}, "LOCAL_RANK is '2', expected a whole number from 0 to 1"),
        ({**BOTH, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK is '1', expected 0"),
        ({**BOTH, "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is '3', expected a whole number from 1 to 2"),
        ({"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE is 'two'"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "rank 1 of 2 has no MASTER_ADDR"),
        ({**BOTH, "MASTER_PORT": "http"}, "MASTER_PORT is 'http', expected a whole number from 1 to 65535"),
        ({**BOTH, "MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "MASTER_PORT is ''"),
    ],
)
def test_junk(given, said, monkeypatch, capsys, tmp_path):
    """One line from either command, before anything is read or written."""
    with pytest.raises(InputError) as raised:
        read_place(given)
    assert said in str(raised.value)
    for name in (*BOTH, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")  # given back after the test
    for main, words in ((cli.main, ["tokenize", "videos", str(tmp_path / "out")]), (train_main(), ["demo"])):
        assert main(words) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "same_parent, launcher, left", [(True, "", False), (False, "", True), (True, "dead", True), (True, "x", False)]
)
def test_who_has_left(same_parent, launcher, left):
    """A launcher that is known is looked for itself: a shell between the two lives on."""
    if launcher == "dead":
        ended = subprocess.Popen(["true"])
        ended.wait()
        launcher = str(ended.pid)
    assert ranks.launcher_left(os.getppid() if same_parent else -1, launcher) == left
    assert not ranks.launcher_left(os.getppid(), str(os.getpid()))


LAUNCH = [sys.executable, "-m", "vimpac.training.launch", "--nproc-per-node=2"]


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    if not found.exists():
        pytest.skip("this system does not list a process's children")
    return [int(child) for child in found.read_text().split()]


def wait_until(done, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.02)
    return done()


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_ranks_end_with_their_launcher(store_folder, tmp_path):
    """With a checkpoint, as after SIGTERM. The same command goes on from it, on the same port."""
    port, output = free_port(), tmp_path / "run"
    words = arguments(store_folder, output, steps=3000, save_every=3000, resume=True, n_blocks=40)
    command = [*LAUNCH, f"--master-port={port}", str(ROOT / "train.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    with (tmp_path / "said").open("w") as said:
        first = subprocess.Popen([*command, *words], stdout=said, stderr=said, env=environment)
        try:
            assert wait_until((output / "metrics.jsonl").exists)
            started = children(first.pid)
            assert len(started) == 2
        finally:
            first.kill()
            first.wait()
    assert wait_until(lambda: all(map(is_gone, started)), 30)
    output_text = (tmp_path / "said").read_text()
    assert "torchrun, which started this process, has ended" in output_text and "Traceback" not in output_text
    (checkpoint,) = list_checkpoints(output)
    step = int(checkpoint.stem.removeprefix("step-"))
    assert 0 < step < 3000 and [line["step"] for line in metrics(output)] == list(range(1, step + 1))


def test_ranks_that_ignore_sigterm_end_too(tmp_path):
    """As those that wait in C++, where no handler of Python runs."""
    script = tmp_path / "script.py"
    script.write_text("""
import signal, sys, time
from vimpac.processes import ranks
signal.signal(signal.SIGTERM, lambda *_: None)
ranks.GRACE_SECONDS = 1
ranks.begin_rank()
open(sys.argv[1] + sys.argv[2], "w").close()
while True:
    time.sleep(60)
""")
    shell = f"{sys.executable} {script} {tmp_path}/rank 0 & echo $! > {tmp_path}/pid; wait"
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "test", "LOCAL_RANK": "0"}
    launcher = subprocess.Popen(["sh", "-c", shell], env=environment, stderr=subprocess.PIPE)
    assert wait_until((tmp_path / "rank0").exists, 20)
    pid = int((tmp_path / "pid").read_text())
    launcher.kill()
    launcher.wait()
    assert wait_until(lambda: is_gone(pid), 10)
    assert launcher.stderr.read() == b"torchrun, which started this process, has ended: the process ends\n"
    launcher.stderr.close()


def test_a_port_in_use_is_said(monkeypatch, capsys):
    """By the launcher, in one line."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # given back after the test, as is the next
    monkeypatch.setenv(ranks.LAUNCHER, "")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert launch.main([f"--master-port={port}", "--nproc-per-node=2", "script.py"]) == 1
    error = capsys.readouterr().err
    said = f"error: the port of 127.0.0.1:{port} is in use, most likely by another run: wait for its end, or choose another"
    assert error.startswith(said) and error.count("\n") == 1
