"""SIGTERM and Ctrl-C end a run with a checkpoint, at any time, and it goes on as if nothing had happened."""

import fcntl
import os
import signal
import termios
from functools import partial
from unittest.mock import MagicMock

import pytest
import torch

from runs import (
    arguments,
    make_loop,
    metrics,
    model_bytes,
    on_call,
    run,
    tiny_config,
)
from vimpac.checkpoint import list_checkpoints
from vimpac.distributed import World
from vimpac.errors import Stopped
from vimpac.processes.ranks import LauncherWatch
from vimpac.training import loop as loop_module
from vimpac.training.pretrain import pretrain
from vimpac.training.progress import Progress
from vimpac.training.signals import StopRequest, handling_signals

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("update", [1, 3, 5])
def test_sigterm_writes_a_checkpoint(finished_run, store_folder, tmp_path, update):
    folder = tmp_path / "run"
    hook = on_call("vimpac.training.loop:Loop.update", update, "terminate")
    output = run(arguments(store_folder, folder, save_every=100), tmp_path / "log", hook=hook, code=143)
    path = folder / "checkpoints" / f"step-{update:08d}.pt"
    assert f"train.py: stopped by SIGTERM; {path} is written, continue with --resume\n" in output
    assert "Traceback" not in output and list_checkpoints(folder) == [path]
    assert not (folder / "model.safetensors").exists()
    run(arguments(store_folder, folder, save_every=2, resume=True), tmp_path / "log")
    assert metrics(folder) == metrics(finished_run)
    assert model_bytes(folder) == model_bytes(finished_run)


def test_a_terminal_that_hangs_up():
    """SIGHUP ends a run as SIGTERM does, unless it is ignored, as under nohup."""
    seen, missed = [], []

    def before(number, _frame):
        missed.append(number)

    kept = signal.signal(signal.SIGHUP, before)
    try:
        with handling_signals(lambda number, _: seen.append(number)):
            signal.raise_signal(signal.SIGHUP)
        assert seen == [signal.SIGHUP] and not missed and signal.getsignal(signal.SIGHUP) == before
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with handling_signals(lambda number, _: seen.append(number)):
            signal.raise_signal(signal.SIGHUP)
        assert len(seen) == 1
    finally:
        signal.signal(signal.SIGHUP, kept)


def hang_up(kind: str) -> None:
    """A hook: standard error is a terminal of this kind, which hangs up in the second update."""
    from vimpac.training.loop import Loop

    os.environ["TERM"] = kind
    os.setsid()
    ours, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    os.dup2(terminal, 2)
    update = Loop.update

    def hanging_up(loop):
        if loop.step == 1:
            os.close(ours)
        return update(loop)

    Loop.update = hanging_up


@pytest.mark.parametrize("kind", ["xterm", "dumb"])
def test_a_run_whose_terminal_hangs_up(store_folder, tmp_path, kind):
    """Nothing can be printed any more. The checkpoint is written all the same, and the exit status is that of SIGHUP."""
    folder = tmp_path / "run"
    run(arguments(store_folder, folder, save_every=100), tmp_path / "log", hook=partial(hang_up, kind), code=129)
    assert list_checkpoints(folder) == [folder / "checkpoints" / "step-00000002.pt"]


@pytest.mark.parametrize("ranks, ends", [(1, 2), (2, 3)])
def test_one_process_on_a_gpu_ends_after_the_update(store_folder, tmp_path, monkeypatch, ranks, ends):
    """It looks at its metrics every third update, and several agree on nothing in between."""
    loop = make_loop(store_folder, tmp_path, steps=9, save_every=9)
    loop.look_every, loop.world = 3, World(0, ranks, torch.device("cpu"))
    monkeypatch.setattr(loop, "update", lambda: loop.step != 1 or signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(loop_module.distributed, "any_rank", lambda flag, world: flag)
    monkeypatch.setattr(loop, "save", lambda: tmp_path / f"step-{loop.step}")
    log = MagicMock()
    with handling_signals(loop.stop.handle), pytest.raises(Stopped, match=rf"step-{ends} is written"):
        loop.train(log, Progress(9, enabled=False))
    assert log.add.call_count == ends and log.flush.call_count == 1


@pytest.mark.parametrize(
    "hook",
    [
        on_call("vimpac.training.loop:Loop.update", 6, "terminate"),  # the last one
        on_call("vimpac.evaluation.pretraining:partners_found", 1, "terminate"),
    ],
    ids=["last update", "evaluation"],
)
def test_sigterm_after_training(finished_run, store_folder, tmp_path, hook):
    folder = tmp_path / "run"
    output = run(arguments(store_folder, folder), tmp_path / "log", hook=hook, code=143)
    assert "stopped by SIGTERM" in output and "Traceback" not in output
    assert not (folder / "curves.png").exists()
    run(arguments(store_folder, folder, resume=True), tmp_path / "log")
    assert metrics(folder) == metrics(finished_run)


def test_ctrl_c_twice(store_folder, tmp_path, capfd):
    """torchrun passes Ctrl-C on, so each process gets it twice; only one that comes later is impatience."""
    loop = make_loop(store_folder, tmp_path / "run")
    loop.stop.handle(signal.SIGINT, None)
    loop.stop.handle(signal.SIGINT, None)
    loop.stop.handle(signal.SIGTERM, None)
    assert loop.stop.number == signal.SIGINT
    assert capfd.readouterr().err == "SIGINT: a checkpoint is written after this update, Ctrl-C again ends at once\n"
    loop.stop.time -= 10
    with pytest.raises(KeyboardInterrupt):
        loop.stop.handle(signal.SIGINT, None)


@pytest.mark.parametrize("ranks, when", [(1, "after this update"), (2, "within 10 updates, when all processes check for it")])
def test_a_signal_says_when_it_is_heeded(store_folder, tmp_path, capfd, ranks, when):
    loop = make_loop(store_folder, tmp_path)
    loop.stop = StopRequest(World(0, ranks, CPU.device), 10)  # as on GPUs
    loop.stop.handle(signal.SIGTERM, None)
    assert capfd.readouterr().err == f"SIGTERM: a checkpoint is written {when}\n"


@pytest.mark.parametrize("left", [True, False])
def test_a_launcher_that_another_rank_missed_first(monkeypatch, capfd, tmp_path, left):
    """The first rank says why the run ends, also if it was told to stop before it looked itself."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(LauncherWatch, "current", LauncherWatch(-1 if left else os.getppid(), ""))
    stop = StopRequest(World(0, 2, CPU.device), 1)
    for _ in range(2):  # said once
        assert stop.as_exception(tmp_path).signal == signal.SIGTERM
    said = "torchrun, which started this process, has ended: the process ends\n"
    assert capfd.readouterr().err == (said if left else "")


def stopped_update(loop):
    signal.raise_signal(signal.SIGINT)
    return {"step": loop.step + 1, "loss": torch.ones(()), "grad_norm": torch.ones(())}


def test_handlers_are_given_back(store_folder, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(loop_module.Loop, "update", stopped_update)
    with pytest.raises(Stopped) as stopped:
        pretrain(tiny_config(data=str(store_folder), output=str(tmp_path / "run")))
    assert stopped.value.signal == signal.SIGINT
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
