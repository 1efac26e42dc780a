"""What ends a command without a traceback: mistakes that the user can fix, one line and exit status 1; a reader that left."""

import errno
import os
import signal
import sys


class InputError(ValueError):
    """A bad file, option or shape. Its message names the value, what was expected and the way out, in one line.

    explanation: lines of our own, such as a grammar, that follow the message.
    """

    def __init__(self, message: str = "", explanation: str = ""):
        super().__init__(f"{message}\n{explanation}" if explanation else message)
        self.explanation = explanation


class Stopped(Exception):
    """A signal asked the program to end; what it had finished is kept. `signal` is its number."""

    def __init__(self, number: int, how_to_go_on: str):
        super().__init__(f"stopped by {signal.Signals(number).name}; {how_to_go_on}")
        self.signal = number


FIXABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EMFILE, errno.ENFILE),
)
"""Numbers of an OSError that the user can fix as well: no room, a folder that is not theirs, a path that leads nowhere,
too few open files."""


def reader_left() -> int:
    """The exit status after a BrokenPipeError of standard output (`--help | head`); what is left of it goes nowhere."""
    forget_output()
    return 128 + signal.SIGPIPE


def forget_output() -> None:
    """What is left of standard output goes nowhere, or Python complains when it ends and writes the rest."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
