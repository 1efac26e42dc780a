"""The command line, read by tyro: a value that is none becomes one line, as any other mistake does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import TypeVar

from vimpac.errors import InputError

T = TypeVar("T")


def read_options(read: Callable[[], T], words: Sequence[str], command: str) -> T:
    """What `read` makes of the words. Raises InputError for a bad value: a configuration's own, or one of another type.

    command: whose --help lists the options. Where it is --help, or a misspelt option, tyro explains and exits.
    """
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            return read()
    except SystemExit as end:
        cause = end.__context__
        while cause is not None:
            if isinstance(cause, InputError):  # the configuration's own message, without tyro's frame around it
                raise cause from None
            if said := _bad_value(cause, words):
                raise InputError(f"{said}: `{command} --help` lists every option with its values") from None
            cause = cause.__context__
    return read()


def _bad_value(error: BaseException, words: Sequence[str]) -> str | None:
    """`--option is VALUE, expected TYPE`, of what tyro raises where a word is not of its option's type; its box otherwise."""
    if not isinstance(error.__context__, ValueError | TypeError) or isinstance(error.__context__, InputError):
        return None
    lowered = getattr(getattr(error, "arg", None), "lowered", None)
    flags, expected = (getattr(lowered, name, None) for name in ("name_or_flags", "metavar"))
    if not flags or not expected:
        return None
    plain = [word.partition("=")[0].replace("_", "-") for word in words]
    place = max((i for i, word in enumerate(plain) if word in flags), default=None)  # the last one counts
    if place is None:
        return f"{flags[0]} has a value that does not fit, expected {expected}"
    values = [words[place].partition("=")[2]] if "=" in words[place] else []
    for word in words[place + 1 :]:
        if word.startswith("--"):
            break
        values.append(word)
    return f"{flags[0]} is {' '.join(values[: len(str(expected).split())])!r}, expected {expected}"
