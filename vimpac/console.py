"""What the commands print, and how they end: names that cannot steer a terminal, one line for a mistake, the exit status."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path

from vimpac.errors import FIXABLE, InputError, Stopped, forget_output, reader_left
from vimpac.files.atomic import naming
from vimpac.processes.ranks import speaks

STANDARD_OUTPUT = Path("standard output")
_STEERING = (
    *(range(0x20), range(0x7F, 0xA0)),  # C0, DEL and C1: newlines and escape sequences
    *((0x2028, 0x2029), (0x061C, 0x200E, 0x200F), range(0x202A, 0x202F), range(0x2066, 0x206A)),  # lines, direction of writing
)
_ESCAPES = {number: ascii(chr(number))[1:-1] for numbers in _STEERING for number in numbers}


def printable(text: object) -> str:
    r"""One line in which nothing steers the terminal: a file's name may hold a newline or ESC, shown as \n and \x1b."""
    return str(text).translate(_ESCAPES)


def say(text: object) -> None:
    """Print one line to standard output, whatever names it holds."""
    with naming(STANDARD_OUTPUT):
        print(printable(text))


def count(number: int, noun: str, nouns: str | None = None) -> str:
    """1 video, 2 videos. nouns: where the plural takes more than an s."""
    return f"{number} {noun if number == 1 else nouns or noun + 's'}"


def explained(error: InputError | OSError) -> str:
    """The error's line; an explanation that follows, such as a grammar, keeps its own lines."""
    if isinstance(error, OSError):
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return f"{error.strerror}: allow this process more (`ulimit -n`)"
        return printable(f"{error.filename or 'writing'}: {error.strerror}")
    if error.explanation:
        return printable(str(error).removesuffix(f"\n{error.explanation}")) + f"\n{error.explanation}"
    return printable(error)


def run_command(command: Callable[[], int | None], prog: str) -> int:
    """Run it; its exit status is 0 or what it returns, 1 after a mistake that the user can fix, 128 + n after signal n.

    141 where what reads the output has ended. Of several processes one on each machine says what stopped them.
    """
    try:
        try:
            return command() or 0
        finally:
            with naming(STANDARD_OUTPUT):
                sys.stdout.flush()
    except BrokenPipeError:
        return reader_left()
    except InputError as error:
        said, status = f"error: {explained(error)}", 1
    except OSError as error:
        if error.errno not in FIXABLE:
            raise
        if error.filename == str(STANDARD_OUTPUT):
            forget_output()
        said, status = f"error: {explained(error)}", 1
    except Stopped as stopped:
        said, status = printable(stopped), 128 + stopped.signal
    except KeyboardInterrupt:
        said, status = "interrupted", 130
    if speaks():
        print(f"{prog}: {said}", file=sys.stderr)
    return status
