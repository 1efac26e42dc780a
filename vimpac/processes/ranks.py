"""The place of this process among the ranks, from torchrun's environment variables, and its end when torchrun has ended."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from vimpac.errors import InputError

LAUNCHER = "VIMPAC_LAUNCHER"
"""Environment variable with the process id of vimpac.training.launch. Its ranks watch it, even if a shell is their parent."""
MOST_RANKS = 100_000
LOOK_SECONDS = 0.5
GRACE_SECONDS = 30
"""How long this process may live on after SIGTERM once the launcher has ended, as with torchrun."""


@dataclass(frozen=True)
class Place:
    """This process is `rank` of `size` in all, and `local_rank` of `local_size` on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def read_place(environment: Mapping[str, str] | None = None) -> Place:
    """Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE; a single process if none is set. Raises InputError for bad values.

    With several processes, MASTER_ADDR and MASTER_PORT, where they meet, must be set as well.
    """
    given = os.environ if environment is None else environment
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name in given and other not in given:
            raise InputError(
                f"{name}={given[name]!r} is set without {other}: start the processes with torchrun, or unset {name} to run one"
            )
    size = _number(given, "WORLD_SIZE", 1, 1, MOST_RANKS)
    rank = _number(given, "RANK", 0, 0, size - 1)
    local_size = _number(given, "LOCAL_WORLD_SIZE", 1, 1, size if "WORLD_SIZE" in given else MOST_RANKS)
    local_rank = _number(given, "LOCAL_RANK", 0, 0, (local_size if "LOCAL_WORLD_SIZE" in given else size) - 1)
    if size > 1:
        if not given.get("MASTER_ADDR"):
            raise InputError(f"rank {rank} of {size} has no MASTER_ADDR, the machine to meet at: start the ranks with torchrun")
        _number(given, "MASTER_PORT", None, 1, 65535)
    return Place(rank, size, local_rank, local_size)


def reports_errors() -> bool:
    """Whether this process prints errors: only the first of those on a machine does."""
    try:
        return read_place().local_rank == 0
    except InputError:  # then it is not known which one is the first
        return True


def _number(given: Mapping[str, str], name: str, default: int | None, low: int, high: int) -> int:
    text = given.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
        expected = str(low) if low == high else f"a whole number from {low} to {high}"
        raise InputError(
            f"the environment variable {name} is {text!r}, expected {expected}: torchrun sets it; without torchrun, unset it"
        )
    return int(text)


def begin_rank() -> None:
    """Call this first in a command that may run as several processes, before torch is imported.

    Under torchrun: once the launcher has ended, this process gets SIGTERM, and GRACE_SECONDS later it is killed. Otherwise
    ranks would outlive their run and meet those of the next run on the same port.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        watch = LauncherWatch(os.getppid(), os.environ.get(LAUNCHER, ""))
        LauncherWatch.current = watch
        threading.Thread(target=watch.end_after_launcher, daemon=True).start()
    if "WORLD_SIZE" in os.environ:  # we explain a lost peer in a sentence; torch would print a C++ stack
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def launcher_left(parent: int, launcher: str) -> bool:
    """Whether the parent has changed, or the launcher has ended while a shell between it and this process lives on."""
    if os.getppid() != parent:
        return True
    if not launcher.isdigit():
        return False
    try:
        os.kill(int(launcher), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it belongs to another user, so it exists
        pass
    return False


class LauncherWatch:
    """Ends this process once its launcher has ended."""

    current: LauncherWatch | None = None
    """That of this process, None without torchrun."""

    def __init__(self, parent: int, launcher: str):
        self.parent, self.launcher = parent, launcher
        self._said = threading.Lock()

    def end_after_launcher(self) -> None:
        while not launcher_left(self.parent, self.launcher):
            time.sleep(LOOK_SECONDS)
        self.say_if_left()
        signal.alarm(GRACE_SECONDS)  # works even if no thread of this process can run
        os.kill(os.getpid(), signal.SIGTERM)

    def say_if_left(self) -> None:
        """Say, once and on a machine's first rank, that the launcher has ended, if it has."""
        first = os.environ.get("LOCAL_RANK") == "0"
        if first and launcher_left(self.parent, self.launcher) and self._said.acquire(blocking=False):
            with suppress(OSError):  # standard error may be closed
                os.write(2, b"torchrun, which started this process, has ended: the process ends\n")
