"""Reading the command line with tyro: tables of subcommands, and one-line errors for bad values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial, wraps
from io import StringIO
from typing import Annotated, Any, NamedTuple, TypeAlias, TypeVar, Union

import tyro

from vimpac.errors import InputError

T = TypeVar("T")


class Group(NamedTuple):
    """A subcommand that has subcommands of its own."""

    description: str
    commands: Commands


class OwnParser(NamedTuple):
    """A subcommand that reads its words itself: main(words, prog) → exit status."""

    description: str
    main: Callable[[Sequence[str], str], int]


Commands: TypeAlias = "Mapping[str, Callable[..., None] | Group | OwnParser]"


def read_command(commands: Commands, words: Sequence[str], prog: str, description: str) -> Callable[[], None]:
    """The command that the words choose, with its arguments: call it to run it. Raises InputError as `read_options` does."""
    read = partial(tyro.cli, _type_of(commands), prog=prog, description=description, args=words)
    return read_options(read, words, command_name(commands, words, prog))


def command_name(commands: Commands, words: Sequence[str], prog: str) -> str:
    """`vimpac figures curves`: prog and the words that choose a command."""
    command = commands.get(words[0]) if words else None
    if command is None:
        return prog
    name = f"{prog} {words[0]}"
    return command_name(command.commands, words[1:], name) if isinstance(command, Group) else name


def _type_of(commands: Commands) -> Any:
    """What tyro reads as a choice of subcommands."""
    choices = []
    for name, command in commands.items():
        if isinstance(command, Group):
            choice = Annotated[_type_of(command.commands), tyro.conf.subcommand(name, description=command.description)]
        elif isinstance(command, OwnParser):  # only listed here
            choice = Annotated[Any, tyro.conf.subcommand(name, description=command.description, constructor=command.main)]
        else:
            choice = Annotated[Any, tyro.conf.subcommand(name, constructor=_bound(command))]
        choices.append(choice)
    return Union[(*choices, Annotated[None, tyro.conf.Suppress])]


def _bound(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """tyro calls this with the parsed arguments. It returns the call, to be made once parsing has succeeded."""

    @wraps(command)
    def bind(*arguments, **options) -> Callable[[], None]:
        return partial(command, *arguments, **options)

    return bind


def read_options(read: Callable[[], T], words: Sequence[str], command: str) -> T:
    """The result of read(), which parses the words. Raises InputError for a value out of range or of the wrong type.

    command: the one whose --help lists the options. For --help or an unknown option, tyro prints its text and exits.
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
    """`--option is VALUE, expected TYPE` if tyro raised the error for a word of the wrong type, else None."""
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
