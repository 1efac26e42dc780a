"""SIGTERM, SIGHUP and Ctrl-C: a run ends after an update, with a checkpoint."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vimpac.distributed import World
from vimpac.errors import Stopped
from vimpac.processes.ranks import LauncherWatch


class StopRequest:
    """Whether a signal has requested that this run stop.

    look_every: updates between reading the metrics, when several processes also agree to stop.
    """

    def __init__(self, world: World, look_every: int):
        self.world, self.look_every = world, look_every
        self.number: int | None = None
        self.time = 0.0

    @property
    def requested(self) -> bool:
        return self.number is not None

    def handle(self, number: int, _frame) -> None:
        """Handle a signal: the run ends after this update, or within `look_every` updates with several processes.

        A second Ctrl-C, more than two seconds later, ends it at once. (Under torchrun each Ctrl-C arrives twice.)
        """
        now = time.monotonic()
        if self.number is None:
            self.number, self.time = number, now
            if self.world.is_first:  # written directly: the progress display may be in the middle of a line
                apart = self.look_every if self.world.size > 1 else 1
                when = "after this update" if apart == 1 else f"within {apart} updates, when all processes check for it"
                again = ", Ctrl-C again ends at once" if number == signal.SIGINT else ""
                with suppress(OSError):  # stderr may be closed; the checkpoint is written anyway
                    os.write(2, f"{signal.Signals(number).name}: a checkpoint is written {when}{again}\n".encode())
        elif number == signal.SIGINT and now - self.time > 2:
            raise KeyboardInterrupt

    def as_exception(self, checkpoint: Path) -> Stopped:
        """The exception that ends the run. Its signal is SIGTERM if another process received the signal."""
        if self.number is None and LauncherWatch.current:  # another rank may notice first that the launcher has ended
            LauncherWatch.current.say_if_left()
        number = signal.SIGTERM if self.number is None else self.number
        return Stopped(number, f"{checkpoint} is written, continue with --resume")


@contextmanager
def handling_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Inside, SIGTERM, SIGHUP and SIGINT call `handler` instead of ending the process.

    SIGHUP stays ignored if it is already, as under nohup.
    """

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGHUP:
            discard_lost_terminal()
        handler(number, frame)

    hangup = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT, *hangup)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def discard_lost_terminal() -> None:
    """Send standard error to /dev/null if it is a terminal that has hung up.

    Otherwise the next line of the progress display would raise an OSError, before the checkpoint is written.
    """
    with suppress(OSError):  # standard error may be closed
        if stat.S_ISCHR(os.fstat(2).st_mode) and not os.isatty(2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
