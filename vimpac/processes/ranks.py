"""This process's place among all, as torchrun's environment variables say, and its end when what started it is gone."""

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
"""The process that vimpac.training.launch runs in: ranks that it starts look for it, even where their parent is another."""
MOST_RANKS = 100_000
LOOK_SECONDS = 0.5
GRACE_SECONDS = 30
"""From the launcher's end to this process's, if SIGTERM does not end it sooner; torchrun gives as long."""


@dataclass(frozen=True)
class Place:
    """rank of size in all; local_rank of local_size on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def read_place(environment: Mapping[str, str] | None = None) -> Place:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and where to meet; one process where none is set. Raises InputError."""
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


def speaks() -> bool:
    """Whether this process says what stopped it: of those on a machine the first does, for all."""
    try:
        return read_place().local_rank == 0
    except InputError:  # nobody knows which one is the first
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
    """What a command does first that may be one of several processes, before torch is imported.

    Under torchrun: once the launcher is gone, this process is asked to end as by SIGTERM; GRACE_SECONDS later it ends anyway.
    Otherwise ranks go on without one, and meet those of the next run on the same port.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_after, args=(os.getppid(), os.environ.get(LAUNCHER, "")), daemon=True).start()
    if "WORLD_SIZE" in os.environ:  # a peer that is lost is explained in a sentence, not by torch's frames of C++
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def launcher_left(parent: int, launcher: str) -> bool:
    """Whether this process has another parent by now, or the launcher has ended (a shell between the two may live on)."""
    if os.getppid() != parent:
        return True
    if not launcher.isdigit():
        return False
    try:
        os.kill(int(launcher), 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's: it is there
        pass
    return False


def _end_after(parent: int, launcher: str) -> None:
    while not launcher_left(parent, launcher):
        time.sleep(LOOK_SECONDS)
    if os.environ.get("LOCAL_RANK") == "0":
        with suppress(OSError):  # nobody may be there to read it
            os.write(2, b"torchrun, which started this process, is gone: the process ends\n")
    signal.alarm(GRACE_SECONDS)  # the system's: it needs no thread of this process to run
    os.kill(os.getpid(), signal.SIGTERM)
