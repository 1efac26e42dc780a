"""Worker processes for jobs that may crash, hang or never end: such a job fails alone, and the others go on.

A worker is a separate Python process with the import path of this one, except for the current folder: a downloaded data set may
hold a `json.py`. It receives one name at a time and answers with an array or the reason for a failure. Answers are JSON and raw
bytes, never pickles. A worker ends when its parent ends.
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

from vimpac.errors import CorruptVideo, InputError

STALL_SECONDS = 600.0
"""A worker that reports no progress for this long is killed, and its job fails."""
TICK_SECONDS = 0.5
"""How often `tick` is called while the workers are silent."""

Heartbeat = Callable[[], None]
Job = Callable[[str, Heartbeat], np.ndarray]
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


def run_jobs(
    job: Job, names: Iterable[str], workers: int, seconds: float, tick: Callable[[], None] = lambda: None
) -> Iterator[tuple[str, np.ndarray | str]]:
    """Yields (name, array) or (name, reason for its failure) in the order in which the jobs end.

    job(name, heartbeat): runs in a worker, must be picklable, and calls heartbeat() whenever it has made progress. If it raises
    an exception, this name has failed; but InputError and ImportError end the run and are raised here as InputError.
    seconds: the longest that one job may take. tick: called at least every TICK_SECONDS while this waits; may raise.
    """
    waiting = iter(names)
    pool: list[_Worker] = []
    try:
        while True:
            while len(pool) < workers and (name := next(waiting, None)) is not None:
                pool.append(_Worker(job))
                pool[-1].give(name)
            if not pool:
                return
            wait([worker.connection for worker in pool], TICK_SECONDS)
            for worker in list(pool):
                ended = worker.ended(seconds)
                if ended is None:
                    continue
                if worker.lives and (name := next(waiting, None)) is not None:
                    worker.give(name)  # before this yields, so that the worker need not wait for the caller
                else:
                    worker.dismiss()
                    pool.remove(worker)
                yield ended
            tick()
    finally:
        for worker in pool:
            worker.dismiss()


class _Worker:
    """A worker process and its current job. Nothing that the process does makes reading from it raise."""

    def __init__(self, job: Job):
        self.connection, theirs = Pipe()
        with theirs, _sigint_blocked():  # the parent handles Ctrl-C, even while a worker imports
            command = [sys.executable, "-c", _start(theirs.fileno())]
            threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
            # Nothing is written to the worker's standard input. It closes when this process ends.
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()], env={**os.environ, **threads}
            )
        self.name = ""
        self.lives, self.is_ready = True, False
        self.started = self.heard = time.monotonic()
        self._send(pickle.dumps(job))

    def give(self, name: str) -> None:
        self.name = name
        self.started = self.heard = time.monotonic()
        self._send(name.encode("utf-8", "surrogateescape"))

    def ended(self, seconds: float) -> tuple[str, np.ndarray | str] | None:
        """The job's name and its result, None while it is running. Raises InputError if the worker asks to end the run."""
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
                self.is_ready, self.started = True, self.heard  # the time that imports take does not count
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
        """Why the worker died. Raises InputError if it died before its first job, as the next worker would do the same."""
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
        with suppress(OSError):  # it has died, which `ended` notices
            self.connection.send_bytes(data)

    def dismiss(self) -> None:
        self.process.kill()  # nothing is lost: it has sent every result
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.connection.close()


def _start(descriptor: int) -> str:
    """The program of a worker. It sets sys.path before any import, since `python -c` looks in the current folder first."""
    here = os.getcwd()
    path = [entry for entry in sys.path if entry and os.path.abspath(entry) != here]
    if _PACKAGE_ROOT not in path:  # a checkout that is the current folder
        path.append(_PACKAGE_ROOT)
    return f"import sys; sys.path[:] = {path!a}; from vimpac.data.workers import _work; _work({descriptor})"


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Processes started in the body never receive Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# In the worker process.


def _work(descriptor: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection = Connection(descriptor)
    job = pickle.loads(connection.recv_bytes())  # from the parent
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
    except (InputError, ImportError) as error:  # would happen to every other name as well
        return _say(connection, state="stop", reason=str(error))
    except Exception as error:  # an exception of a library for one file must not end the run
        said = " ".join(str(error).split())[:200]
        return _say(
            connection, state="failed", reason=f"an error that this program does not know ({type(error).__name__}: {said})"
        )
    _say(connection, state="done", shape=array.shape, dtype=str(array.dtype))
    if array.size:
        connection.send_bytes(array.reshape(-1).view(np.uint8).data)


def _say(connection: Connection, **message) -> None:
    connection.send_bytes(json.dumps(message).encode())
