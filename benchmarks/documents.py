"""Tables in markdown, and the places of a document that hold them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

END = "<!-- end -->"


def number(x: float) -> str:
    return f"{x:,.{0 if x >= 100 or x == 0 else 1 if x >= 1 else 2}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [[text.replace("|", "\\|") for text in line] for line in (head, ["---"] * len(head), *rows)]
    return ["|" + "|".join(f" {text} " if text else " " for text in line) + "|" for line in lines]


def fill(text: str, kind: str, tables: Mapping[str, Callable[[], list[str]]], where: str) -> tuple[str, list[str]]:
    """The text with what tables[NAME] makes between `<!-- KIND: NAME -->` and END; the names of the tables that change."""
    pattern = re.compile(rf"^<!-- {kind}: (\S+) -->\n((?:(?!<!-- ).*\n)*?){END}$", re.MULTILINE)
    found = {match[1]: match[2] for match in pattern.finditer(text)}
    for name in re.findall(rf"^<!-- {kind}: (\S+) -->$", text, re.MULTILINE):
        if name not in tables:
            raise ValueError(f"{where}: no table is called {name!r}, expected one of {', '.join(tables)}")
        if name not in found:
            raise ValueError(f"{where}: table {name} has no {END}")
    made = {name: "".join(f"{line}\n" for line in tables[name]()) for name in found}
    text = pattern.sub(lambda match: f"<!-- {kind}: {match[1]} -->\n{made[match[1]]}{END}", text)
    return text, [name for name in found if made[name] != found[name]]
