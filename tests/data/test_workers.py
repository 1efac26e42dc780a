"""Worker processes: a job that crashes, hangs, never ends or raises fails alone; the current folder is not imported from."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from vimpac.data import workers as workers_module
from vimpac.data.workers import run_jobs
from vimpac.errors import CorruptVideo, InputError

ROOT = Path(__file__).resolve().parents[2]


def job(name, alive):
    match name.rstrip("0123456789"):
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            os._exit(3)
        case "bad":
            raise CorruptVideo("is bad")
        case "big":
            raise MemoryError
        case "odd":
            raise IndexError("list index\nout of range")
        case "stop":
            raise InputError("the tokenizer is gone")
        case "silent":
            time.sleep(60)
        case "endless":
            while True:
                alive()
                time.sleep(0.01)
        case "empty":
            return np.empty((2, 0, 3), np.uint8)
        case "path":
            return np.frombuffer("\n".join(sys.path).encode(), np.uint8)
    return np.frombuffer(name.encode("utf-8", "surrogateescape"), np.uint8).reshape(1, -1)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_job_fails_alone(workers):
    names = ["a0", "a1", "crash0", "a2", "bad", "a3", "crash1", "exit", "big", "odd", "a4", "a\udcff5", "empty"]
    results = list(run_jobs(job, names, workers, 60))
    assert sorted(name for name, _ in results) == sorted(names)
    results = dict(results)
    assert results["bad"] == "is bad" and results["big"] == "does not fit into memory"
    assert "(SIGSEGV)" in results["crash0"] and "(SIGSEGV)" in results["crash1"] and "(status 3)" in results["exit"]
    assert results["odd"].endswith("(IndexError: list index out of range)")
    assert results["empty"].shape == (2, 0, 3) and results["empty"].dtype == np.uint8
    for name in ("a0", "a1", "a2", "a3", "a4", "a\udcff5"):
        assert results[name].tobytes() == name.encode("utf-8", "surrogateescape") and results[name].shape[0] == 1


def test_a_worker_that_is_silent_or_does_not_end_is_killed(monkeypatch):
    results = dict(run_jobs(job, ["endless", "a"], 1, 1))
    assert "took longer than 1 s" in results["endless"] and results["a"].tobytes() == b"a"
    monkeypatch.setattr(workers_module, "STALL_SECONDS", 5)  # a worker's start counts: it takes a second on a busy machine
    results = dict(run_jobs(job, ["silent", "a"], 2, 60))
    assert "got no further for 5 s" in results["silent"] and results["a"].tobytes() == b"a"


def test_a_finished_job_counts_however_late_it_is_looked_at():
    """The caller may take long over a result; what the workers did meanwhile is read before their time is judged."""
    results = {}
    for name, result in run_jobs(job, ["a", "b", "c"], 1, 1.0):
        results[name] = result
        time.sleep(1.5)
    assert [x.tobytes() for x in results.values()] == [b"a", b"b", b"c"]


def test_an_input_error_ends_the_run():
    with pytest.raises(InputError, match=r"^the tokenizer is gone$"):
        list(run_jobs(job, ["a", "stop", "b"], 1, 60))


def test_a_worker_that_cannot_begin_ends_the_run(monkeypatch, capfd):
    monkeypatch.setattr(workers_module, "_start", lambda descriptor: "raise SystemExit('no module')")
    with pytest.raises(InputError, match="ended with status 1 before it could work"):
        list(run_jobs(job, ["a", "b"], 2, 60))
    assert "no module" in capfd.readouterr().err


def test_ticks_go_on_while_workers_are_silent():
    class Enough(Exception):
        pass

    ticks = []

    def tick():
        ticks.append(time.monotonic())
        if len(ticks) == 4:
            raise Enough

    started = time.monotonic()
    with pytest.raises(Enough):
        list(run_jobs(job, ["silent"], 1, 60, tick))
    assert time.monotonic() - started < 20  # not the 60 s of the job
    assert not living_children()


def living_children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [child for child in file.read().split() if "_work(" in Path(f"/proc/{child}/cmdline").read_text()]


def test_workers_end_with_their_parent(tmp_path):
    code = f"""
        import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
        from test_workers import job
        from vimpac.data.workers import run_jobs
        results = run_jobs(job, ["a", "silent", "endless"], 3, 60)
        print(next(results)[0], flush=True)
        import time; time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "a\n"
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while (left := [x for x in children if Path(f"/proc/{x}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(children) >= 2 and not left


def test_nothing_is_imported_from_the_current_folder(tmp_path, monkeypatch):
    """A data set may hold a file for every module that a worker imports."""
    names = {name.partition(".")[0] for name in [*sys.modules, *sys.stdlib_module_names]} - set(sys.builtin_module_names)
    for name in names - {"__main__", "__mp_main__", "vimpac"}:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'a').write({name!r} + ' ')\n")
    monkeypatch.chdir(tmp_path)
    for entries in ([""], [str(tmp_path)]):  # as an interactive Python and `python -m` have it
        monkeypatch.setattr(sys, "path", [*entries, *sys.path])
        results = dict(run_jobs(job, ["a", "path"], 1, 60))
        assert results["a"].tobytes() == b"a"
        assert str(tmp_path) not in results["path"].tobytes().decode().split("\n")
    assert not (tmp_path / "executed").exists(), (tmp_path / "executed").read_text()


def test_a_job_may_have_arguments():
    results = dict(run_jobs(partial(with_prefix, "x"), ["a"], 1, 60))
    assert results["a"].tobytes() == b"xa"


def with_prefix(prefix, name, alive):
    return np.frombuffer((prefix + name).encode(), np.uint8)
