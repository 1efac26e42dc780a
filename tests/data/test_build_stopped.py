"""Building a store that is killed, stopped or shared among ranks: the result is the same store."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from stores import CONFIG, build, content

from vimpac.data import build as build_module
from vimpac.data.store import StoreWriter, TokenStore
from vimpac.errors import InputError, Stopped
from vimpac.files.atomic import LOCK, locked

KILLED = """
import sys
from pathlib import Path
from vimpac.config import TokenizeConfig
from vimpac.data import build

class Slow(build.StoreWriter):
    def __init__(self, *arguments):
        super().__init__(*arguments, shard_seconds=0.0)  # every video a shard

    def add(self, *arguments):
        super().add(*arguments)
        if len(self.done) == 3:
            print("three", flush=True)
            import time
            time.sleep(60)

if __name__ == "__main__":
    build.StoreWriter = Slow
    config = TokenizeConfig(codes=32, frame_size=32, fps=5.0)
    build.tokenize_videos(sys.argv[1], sys.argv[2], config, workers=1, progress=False)
"""


def test_killed_and_resumed(videos, whole, tmp_path):
    (tmp_path / "run.py").write_text(KILLED)
    command = [sys.executable, tmp_path / "run.py", videos, tmp_path / "store"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "three\n"
    children = child_processes(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with pytest.raises(InputError, match="unfinished store"):
        TokenStore(tmp_path / "store")
    summary = build(videos, tmp_path / "store")
    assert (summary.videos, summary.present) == (2, 3)
    assert content(tmp_path / "store") == content(whole)
    assert children and wait_until(lambda: not any(os.path.exists(f"/proc/{child}") for child in children))


def test_two_at_once(videos, whole, tmp_path):
    """The second is refused before it touches anything; what the first wrote so far stays and is finished."""
    (tmp_path / "run.py").write_text(KILLED)
    command = [sys.executable, tmp_path / "run.py", videos, tmp_path / "store"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "three\n"
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    for config in (CONFIG, replace(CONFIG, codes=16)):
        with pytest.raises(InputError, match=f"^{tmp_path}/store is being written by another"):
            build(videos, tmp_path / "store", config)
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before
    process.kill()
    process.wait()
    process.stdout.close()
    build(videos, tmp_path / "store")
    assert content(tmp_path / "store") == content(whole)


def test_two_at_once_while_the_tokenizer_is_fitted(videos, tmp_path):
    with locked(tmp_path / "store", "taken"), pytest.raises(InputError, match="is being written by another"):
        build(videos, tmp_path / "store")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / LOCK).touch()  # of a killed run
    assert build(videos, tmp_path / "store").videos == 5
    assert {path.suffix for path in (tmp_path / "store").iterdir()} == {".json", ".bin", ".safetensors"}


def child_processes(parent):
    with open(f"/proc/{parent}/task/{parent}/children") as file:
        return file.read().split()


@pytest.fixture
def hears_ctrl_c():
    """What is started hears Ctrl-C even where the tests do not: a shell has its background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_the_workers_start(videos, tmp_path, hears_ctrl_c):
    command = [sys.executable, "-m", "vimpac", "tokenize", videos, tmp_path / "store", "--codes=32", "--frame-size=32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def workers():
        return [child for child in child_processes(process.pid) if "_work(" in process_file(child, "cmdline")]

    assert wait_until(workers, 60)
    for worker in workers():
        (blocked,) = re.findall(r"SigBlk:\s(\w+)", process_file(worker, "status"))
        assert int(blocked, 16) & 1 << signal.SIGINT - 1, "it hears Ctrl-C from its start"
    time.sleep(0.1)  # they import
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, error = process.communicate(timeout=60)
    assert (process.returncode, output, error) == (130, "", "vimpac tokenize: interrupted\n")
    assert not (tmp_path / "store").exists()


def process_file(process, name):
    with open(f"/proc/{process}/{name}") as file:
        return file.read()


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_two_ranks_make_the_same_store(videos, whole, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run"]  # the command of that name may not be on PATH
    command = [*torchrun, "--standalone", "--nproc-per-node=2", "--no-python", sys.executable, "-m", "vimpac.commands.main"]
    command += ["tokenize", videos, tmp_path / "store", "--codes=32", "--frame-size=32", "--fps=5"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "5 videos, 30 frames, 480 tokens" in result.stdout
    assert content(tmp_path / "store") == content(whole)
    assert {path.name[:11] for path in (tmp_path / "store").glob("*.bin")} == {"shard-00000", "shard-00001"}


def test_ranks_without_torchrun(videos, tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="start the ranks with torchrun"):
        build(videos, tmp_path / "store", rank=0, world=2)


def waiting_after(count, event):
    """A `run_jobs` whose next result never comes after `count` of them: it calls event(n) at its n-th tick, from 0."""

    def run_jobs(job, names, workers, seconds, tick):
        for done, result in enumerate(RUN_JOBS(job, names, workers, seconds)):
            if done == count:
                break
            yield result
        for number in range(100):
            event(number)
            tick()
        raise AssertionError("it went on")

    return run_jobs


RUN_JOBS = build_module.run_jobs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_run_between_writes_and_keeps_what_is_finished(videos, whole, tmp_path, monkeypatch, number):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = {each: signal.signal(each, signal.default_int_handler) for each in numbers}
    config = replace(CONFIG, tokenizer_path=str(whole))
    monkeypatch.setattr(build_module, "run_jobs", waiting_after(2, lambda n: os.kill(os.getpid(), number)))
    with pytest.raises(Stopped, match="the same command goes on from there") as stopped:
        build(videos, tmp_path / "store", config)
    for each, handler in handlers.items():
        assert signal.signal(each, handler) is signal.default_int_handler, "a handler was not put back"
    assert stopped.value.signal == number
    monkeypatch.undo()
    summary = build(videos, tmp_path / "store", config)
    assert (summary.present, summary.videos) == (2, 3)
    assert content(tmp_path / "store") == content(whole)


def test_shards_close_by_time_while_a_long_video_is_decoded(videos, whole, tmp_path, monkeypatch):
    class Enough(Exception):
        pass

    def event(number):
        published = len(list((tmp_path / "store").glob("shard-*.json")))
        if number == 0:
            assert not published
            time.sleep(0.3)
        else:
            assert published == 1
            raise Enough

    init = StoreWriter.__init__
    monkeypatch.setattr(StoreWriter, "__init__", lambda self, *a: init(self, *a, shard_seconds=0.3))
    monkeypatch.setattr(build_module, "run_jobs", waiting_after(1, event))
    with pytest.raises(Enough):
        build(videos, tmp_path / "store", replace(CONFIG, tokenizer_path=str(whole)))


def test_full_disk_leaves_no_store(videos, tmp_path, monkeypatch):
    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StoreWriter, "add", full)
    with pytest.raises(OSError, match="No space left"):
        build(videos, tmp_path / "store")
    assert not (tmp_path / "store" / "store.json").exists()
