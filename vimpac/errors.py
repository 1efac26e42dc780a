"""The errors that the program expects, and what happens to standard output when nobody reads it any more."""

import errno
import os
import signal
import sys


class InputError(ValueError):
    """A mistake that the user can fix: a bad file, option or shape. Commands print it as one line and exit with status 1.

    message: one line that names the value, what was expected and the way out.
    explanation: further lines written by us, such as a grammar, shown below the message.
    """

    def __init__(self, message: str = "", explanation: str = ""):
        super().__init__(f"{message}\n{explanation}" if explanation else message)
        self.explanation = explanation


class CorruptVideo(Exception):
    """A video file that cannot be used. Its only argument is the reason, without the file's name."""


class Stopped(Exception):
    """A signal asked the program to end; finished work is kept. `signal` is the signal's number."""

    def __init__(self, number: int, how_to_go_on: str):
        super().__init__(f"stopped by {signal.Signals(number).name}; {how_to_go_on}")
        self.signal = number


FIXABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EMFILE, errno.ENFILE),
)
"""Error numbers of an OSError that the user can fix: a full disk, missing permissions, a wrong path, too few open files."""


def reader_left() -> int:
    """The exit status after a BrokenPipeError of standard output (`--help | head`). Discards the rest of the output."""
    discard_output()
    return 128 + signal.SIGPIPE


def discard_output() -> None:
    """Send the rest of standard output to /dev/null, since Python would report an error when it flushes it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
