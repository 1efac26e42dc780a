"""Reading label files without trusting them: text lines, CSV and JSON, with errors that name file, line and value."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from vimpac.errors import InputError
from vimpac.files.checked import check_regular

FILE_BYTES = 1 << 30
"""Limit for label files. The longest published one, HowTo100M's CSV, takes less than a tenth of it."""
LINE_CHARACTERS = 1 << 16

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "validate", "valid", "val"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    "unused": "unused",
}


class Example(NamedTuple):
    """One video of a label file. label: the class's name, None without labels. line: in `file`, or an entry of a JSON list."""

    video: str
    label: str | None
    split: str | None
    file: Path
    line: int

    @property
    def place(self) -> str:
        return place(self.file, self.line)


def place(file: Path, line: int) -> str:
    return f"{file}, {'entry' if file.suffix == '.json' else 'line'} {line}"


def shown(value: object, most: int = 60) -> str:
    """The value as an error message shows it: quoted and not too long."""
    try:
        text = repr(value)
    except RecursionError:  # deeply nested JSON
        text = type(value).__name__
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def head_of(file: Path, size: int = 1 << 16) -> str:
    """The first characters of a file, to recognise its format by."""
    _check(file)
    with file.open("rb") as opened:
        return opened.read(size).decode("utf-8-sig", "replace")


def text_of(file: Path) -> str:
    """A UTF-8 file, with or without a byte order mark. Line ends become \\n."""
    _check(file)
    data = file.read_bytes()
    if len(data) > FILE_BYTES:
        raise InputError(f"{file} has {len(data)} bytes, expected a label file of at most {FILE_BYTES}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{file}, line {line}: the byte {data[error.start]:#04x} is not UTF-8; give a text file, or convert it with "
            "`iconv -f ISO-8859-1 -t UTF-8`"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(f"{file}, line {line}: holds a null byte; give a text file")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines_of(file: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without surrounding white space) of the lines that are not blank."""
    for number, line in enumerate(text_of(file).split("\n"), 1):
        if len(line) > LINE_CHARACTERS:
            raise InputError(
                f"{file}, line {number}: has {len(line)} characters, expected at most {LINE_CHARACTERS}; "
                "is this a label file with a video on each line?"
            )
        if line := line.strip():
            yield number, line


def columns_of(file: Path) -> list[str]:
    """The column names of a CSV file: its first line that is not blank."""
    head = head_of(file)
    if "\ufffd" in head or "\0" in head:
        text_of(file)  # raises, unless a character was cut
    line = head.strip().partition("\n")[0].strip()
    if not line:
        raise InputError(f"{file} is empty, expected a line of column names and a line for each video")
    try:
        return [name.strip() for name in next(csv.reader([line], strict=True))]
    except csv.Error as error:
        raise InputError(f"{file}: its first line is not CSV ({error}): {shown(line)}") from None


def rows_of(file: Path, expected: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, cell by column) of a CSV file that has at least the expected columns."""
    columns = columns_of(file)
    if lacking := [name for name in expected if name not in columns]:
        other = next((f"; it seems separated by {sign!r}, use commas" for sign in ";\t" if sign in columns[0]), "")
        raise InputError(
            f"{file}, line 1: has the columns {shown(','.join(columns), 120)}, expected {','.join(expected)}; "
            f"{lacking[0]} is missing{other}"
        )
    if len(set(columns)) < len(columns):
        raise InputError(f"{file}, line 1: has two columns of one name: {shown(','.join(columns), 120)}; rename one")
    reader = csv.reader(StringIO(text_of(file), newline=""), strict=True)
    try:
        rows = (cells for cells in reader if any(cell.strip() for cell in cells))
        next(rows)  # the columns' names
        for cells in rows:
            if len(cells) != len(columns):
                raise InputError(
                    f"{file}, line {reader.line_num}: has {len(cells)} cells, expected {len(columns)} ({','.join(columns)}): "
                    f"{shown(','.join(cells))}; put a value that holds a comma in double quotes"
                )
            yield reader.line_num, dict(zip(columns, (cell.strip() for cell in cells), strict=True))
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num}: is not CSV ({error}); check its double quotes") from None


def json_of(file: Path, kind: type[list] | type[dict], what: str) -> Any:
    """The list or object in a JSON file. what: what it should hold, for the message."""
    text = text_of(file)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({type(error).__name__}: {shown(str(error), 120)}); expected {what}") from None
    if not isinstance(value, kind):
        raise InputError(f"{file} holds {shown(value)}, expected {what}")
    return value


def entries_of(file: Path, fields: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, entry) of a JSON list of objects that have the fields."""
    for number, entry in enumerate(json_of(file, list, f"a list of objects with the fields {', '.join(fields)}"), 1):
        lacking = next((name for name in fields if not isinstance(entry, dict) or name not in entry), None)
        if lacking:
            raise InputError(f"{place(file, number)}: is {shown(entry)}, expected an object with the field {lacking!r}")
        yield number, entry


def read_class_list(file: Path) -> tuple[str, ...]:
    """Names, one a line, in order. Numbers in front, as in UCF101's classInd.txt, must count up from 0 or 1."""
    lines = list(lines_of(file))
    numbered = [match for _, text in lines if (match := re.fullmatch(r"(\d{1,9})[ \t,]+(\S.*)", text))]
    if numbered and len(numbered) == len(lines):
        first = min(int(numbered[0][1]), 1)
        for wanted, ((line, _), match) in enumerate(zip(lines, numbered, strict=True), first):
            if int(match[1]) != wanted:
                raise InputError(
                    f"{file}, line {line}: the class has the number {match[1]}, expected {wanted}; put them in order"
                )
        lines = [(line, match[2]) for (line, _), match in zip(lines, numbered, strict=True)]
    names: dict[str, None] = {}
    for line, text in lines:
        if text in names:
            raise InputError(f"{file}, line {line}: names the class {shown(text)} a second time; remove one")
        names[text] = None
    if not names:
        raise InputError(f"{file} is empty, expected the name of a class on each line")
    return tuple(names)


def natural(name: str) -> tuple:
    """Sort key of class names: numbers in order of value, before other names."""
    return (0, int(name), name) if re.fullmatch(r"[0-9]{1,18}", name) else (1, 0, name)


def split_named(text: str) -> str | None:
    """train, validation, test or unused for what people write for them; None for anything else."""
    return SPLITS.get(text.lower())


def split_of_file(file: Path) -> str | None:
    """The split that a file's name tells, as in `something-something-v2-validation.json`; None if it tells none."""
    found = {SPLITS[word] for word in re.split(r"[^a-z]+", file.stem.lower()) if word in SPLITS}
    return found.pop() if len(found) == 1 else None


def _check(file: Path) -> None:
    try:
        check_regular(file)
    except InputError as error:
        raise InputError(f"cannot read the label file {file}: {error}") from None
    if file.stat().st_size > FILE_BYTES:
        raise InputError(f"{file} has {file.stat().st_size} bytes, expected a label file of at most {FILE_BYTES}")
