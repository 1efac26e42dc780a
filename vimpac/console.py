"""What commands print and how they end: file names that cannot steer the terminal, errors in one line, exit statuses."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vimpac.errors import FIXABLE, InputError, Stopped, discard_output, reader_left
from vimpac.files.atomic import naming
from vimpac.processes.ranks import reports_errors

STANDARD_OUTPUT = Path("standard output")
_STEERING = (
    *(range(0x20), range(0x7F, 0xA0)),  # C0, DEL and C1: newlines and escape sequences
    *((0x2028, 0x2029), (0x061C, 0x200E, 0x200F), range(0x202A, 0x202F), range(0x2066, 0x206A)),  # lines, writing direction
)
_ESCAPES = {number: ascii(chr(number))[1:-1] for numbers in _STEERING for number in numbers}


def printable(text: object) -> str:
    r"""The text in one line that cannot steer the terminal: a newline or ESC in a file's name becomes \n or \x1b."""
    return str(text).translate(_ESCAPES)


def say(text: object) -> None:
    """Prints one line to standard output, whatever file names it holds."""
    with naming(STANDARD_OUTPUT):
        print(printable(text))


def count(number: int, noun: str, nouns: str | None = None) -> str:
    """1 video, 2 videos. nouns: the plural, if it is not noun + s."""
    return f"{number} {noun if number == 1 else nouns or noun + 's'}"


def error_line(error: InputError | OSError) -> str:
    """The error in one line. Only the explanation of an InputError, such as a grammar, keeps its own lines."""
    if isinstance(error, OSError):
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return f"{error.strerror}: allow this process more (`ulimit -n`)"
        return printable(f"{error.filename or 'writing'}: {error.strerror}")
    if error.explanation:
        return printable(str(error).removesuffix(f"\n{error.explanation}")) + f"\n{error.explanation}"
    return printable(error)


@dataclass
class ExitStatus:
    """The exit status of a command, once its body has ended."""

    code: int = 0


@contextmanager
def command_errors(prog: str) -> Iterator[ExitStatus]:
    """Turns the expected exceptions of the body into a message of `prog` on standard error and an exit status.

    0; 1 after a mistake that the user can fix; 128 + n after signal n; 141 if whatever reads the output has ended. Of several
    processes, only the first on each machine prints the message. Other exceptions keep their traceback.
    """
    status, said = ExitStatus(), None
    try:
        try:
            yield status
        finally:
            with naming(STANDARD_OUTPUT):
                sys.stdout.flush()
    except BrokenPipeError:
        status.code = reader_left()
    except InputError as error:
        status.code, said = 1, f"error: {error_line(error)}"
    except OSError as error:
        if error.errno not in FIXABLE:
            raise
        if error.filename == str(STANDARD_OUTPUT):
            discard_output()
        status.code, said = 1, f"error: {error_line(error)}"
    except Stopped as stopped:
        status.code, said = 128 + stopped.signal, printable(stopped)
    except KeyboardInterrupt:
        status.code, said = 130, "interrupted"
    if said is not None and reports_errors():
        print(f"{prog}: {said}", file=sys.stderr)
