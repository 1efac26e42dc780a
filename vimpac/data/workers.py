"""Worker processes for jobs that may crash, hang or never end: such a job fails alone, and the others go on.

A worker is a Python process of its own. It imports what this process imports from, except the current folder: a downloaded data
set may hold a `json.py`. It gets one name at a time and answers with an array or the reason for a failure. Answers are JSON
and raw bytes, never pickles. A worker ends when its parent does.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np

from vimpac.data.video import CorruptVideo
from vimpac.errors import InputError

STALL_SECONDS = 600.0
"""A worker that reports no progress for this long is killed, and its job has failed."""
TICK_SECONDS = 0.5
"""How often `tick` is called while the workers are silent."""

Alive = Callable[[], None]
Job = Callable[[str, Alive], np.ndarray]
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


def run_jobs(
    job: Job, names: Iterable[str], workers: int, seconds: float, tick: Callable[[], None] = lambda: None
) -> Iterator[tuple[str, np.ndarray | str]]:
    """Yields (name, array) or (name, reason for its failure) in the order in which the jobs end.

    job(name, alive): runs in a worker, must be picklable, and calls alive() whenever it has made progress. Any exception that
    it raises is this name's failure, except InputError, which ends the run and is raised here.
    seconds: the longest that one job may take. tick: called at least every TICK_SECONDS while this waits; may raise.
    """
    waiting = iter(names)
    staff: list[_Worker] = []
    try:
        while True:
            while len(staff) < workers and (name := next(waiting, None)) is not None:
                staff.append(_Worker(job))
                staff[-1].give(name)
            if not staff:
                return
            wait([worker.connection for worker in staff], TICK_SECONDS)
            for worker in list(staff):
                ended = worker.ended(seconds)
                if ended is None:
                    continue
                if worker.lives and (name := next(waiting, None)) is not None:
                    worker.give(name)  # before the caller is given the result: the worker does not wait for it
                else:
                    worker.dismiss()
                    staff.remove(worker)
                yield ended
            tick()
    finally:
        for worker in staff:
            worker.dismiss()


class _Worker:
    """A process and the job that it has. Reading from it never raises for what the process does."""

    def __init__(self, job: Job):
        self.connection, theirs = Pipe()
        with theirs, _sigint_blocked():  # Ctrl-C is the parent's to handle, even while a worker imports
            command = [sys.executable, "-c", _start(theirs.fileno())]
            threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
            # The worker's standard input is a pipe that nothing is written to: it ends when this process does.
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()], env={**os.environ, **threads}
            )
        self.name: str | None = None
        self.lives, self.is_ready = True, False
        self.started = self.heard = time.monotonic()
        self._send(pickle.dumps(job))

    def give(self, name: str) -> None:
        self.name = name
        self.started = self.heard = time.monotonic()
        self._send(name.encode("utf-8", "surrogateescape"))

    def ended(self, seconds: float) -> tuple[str, np.ndarray | str] | None:
        """The job's name and its result, None while it goes on. Raises InputError where the worker asks for the run's end."""
        result = None
        try:
            while result is None and self.connection.poll():
                result = self._receive()
        except (EOFError, OSError):
            result = self._death()
        now = time.monotonic()
        if result is None and now - self.heard > STALL_SECONDS:
            result = self._killed(f"the decoder got no further for {STALL_SECONDS:g} s")
        if result is None and now - self.started > seconds:
            result = self._killed(f"took longer than {seconds:g} s; --video-timeout allows more")
        return None if result is None else (self.name, result)

    def _receive(self) -> np.ndarray | str | None:
        message = json.loads(self.connection.recv_bytes())
        self.heard = time.monotonic()
        match message["state"]:
            case "ready":
                self.is_ready, self.started = True, self.heard  # how long imports take is not the job's fault
            case "failed":
                return message["reason"]
            case "stop":
                raise InputError(message["reason"])
            case "done":
                array = np.empty(message["shape"], message["dtype"])
                if array.size:
                    self.connection.recv_bytes_into(array.reshape(-1).view(np.uint8).data)
                return array
        return None

    def _death(self) -> str:
        """Raises InputError for a worker that never began: the next one would not either."""
        self.lives = False
        code = self.process.wait()
        if not self.is_ready:
            raise InputError(
                f"a worker process ended with status {code} before it could work; what it printed above says why, "
                "`vimpac doctor` shows what is installed"
            )
        if code == -signal.SIGKILL:
            return "its worker process was killed, most likely because memory ran out"
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        return f"its worker process died ({how}): the decoder crashed"

    def _killed(self, reason: str) -> str:
        self.lives = False
        self.process.kill()
        return reason

    def _send(self, data: bytes) -> None:
        with suppress(OSError):  # it has died: `ended` reads the end of its connection
            self.connection.send_bytes(data)

    def dismiss(self) -> None:
        self.process.kill()  # it has nothing to finish: what it had done, it has sent
        self.process.wait()
        self.process.stdin.close()
        self.connection.close()


def _start(descriptor: int) -> str:
    """What a worker runs. `python -c` looks for modules in the current folder first, so the path is set before any import."""
    here = os.getcwd()
    path = [entry for entry in sys.path if entry and os.path.abspath(entry) != here]
    if _PACKAGE_ROOT not in path:  # a checkout that is the current folder
        path.append(_PACKAGE_ROOT)
    return f"import sys; sys.path[:] = {path!a}; from vimpac.data.workers import _work; _work({descriptor})"


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Processes that are started in here never see Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# What a worker runs.


def _work(descriptor: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection = Connection(descriptor)
    job = pickle.loads(connection.recv_bytes())  # of the parent
    _say(connection, state="ready")
    while True:
        try:
            name = connection.recv_bytes().decode("utf-8", "surrogateescape")
        except EOFError:
            return
        _answer(connection, job, name)


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


def _answer(connection: Connection, job: Job, name: str) -> None:
    try:
        array = np.ascontiguousarray(job(name, lambda: _say(connection, state="alive")))
    except CorruptVideo as error:
        return _say(connection, state="failed", reason=str(error))
    except MemoryError:
        return _say(connection, state="failed", reason="does not fit into memory")
    except (InputError, ImportError) as error:  # would meet every other name as well
        return _say(connection, state="stop", reason=str(error))
    except Exception as error:  # whatever a library raises for one file must not end the work on the others
        said = " ".join(str(error).split())[:200]
        return _say(
            connection, state="failed", reason=f"an error that this program does not know ({type(error).__name__}: {said})"
        )
    _say(connection, state="done", shape=array.shape, dtype=str(array.dtype))
    if array.size:
        connection.send_bytes(array.reshape(-1).view(np.uint8).data)


def _say(connection: Connection, **message) -> None:
    connection.send_bytes(json.dumps(message).encode())
