"""`vimpac labels`: labels and splits of a store's videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vimpac.config.labels import LabelOptions
from vimpac.console import count, say

if TYPE_CHECKING:
    from vimpac.data.datasets import Labels, Match

DESCRIPTION = """Labels of videos: `vimpac labels --help` lists what can be done with them.

Example: vimpac labels check store/ labels.csv"""
MOST_NAMES = 10  # of a list in the report


def check(
    store: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")],
    labels: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LABELS")],
    options: Annotated[LabelOptions, tyro.conf.arg(name="")],
) -> None:
    """Compare labels with the videos of a store: how many are there, what is missing, what has no label.

    Example: vimpac labels check store/ ucfTrainTestlist/ --split-number 1

    Args:
        store: Folder that `vimpac tokenize` wrote.
        labels: A label file, or the folder of a data set's files.
    """
    from vimpac.data.datasets import compare_with_paper, match_labels, split_counts
    from vimpac.data.labelled import LabelSource
    from vimpac.data.store import TokenStore

    tokens = TokenStore(store)
    found = LabelSource.of(labels, options).read()
    match = match_labels(found, tokens.names)
    number = f", split {found.split_number}" if found.split_number else ""
    classed = f", {count(len(found.classes), 'class', 'classes')}" if found.labels else ", without labels"
    say(f"{labels}: {found.kind}{number}, {count(len(set(found.videos)), 'video')}{classed}")
    here = split_counts(found, match)
    for split, listed in split_counts(found).items():
        say(f"  {split:<10}  {listed} listed, {here[split]} in the store")
    ways = ", ".join(f"{number} by {how}" for how, number in match.found_by.items())
    say(f"  {'found':<10}  {ways}")
    _report_gaps(found, match, tokens.failed)
    for difference in compare_with_paper(found, match):
        say(f"  {'Table 5':<10}  {difference}")
    for note in found.notes:
        say(f"  {'note':<10}  {note}")


def _report_gaps(labels: Labels, match: Match, failed: dict[str, str]) -> None:
    """Videos that are missing, fit several, have no label, or are listed twice; and classes without a video in the store."""
    from vimpac.data.annotations import stem_of

    stems = {stem_of(name) for name in failed}
    undecoded = sum(stem_of(name) in stems for name in match.missing)
    because = f" ({undecoded} could not be decoded, as `vimpac verify` lists)" if undecoded else ""
    _list("missing", match.missing, f"not in the store{because}")
    _list("ambiguous", match.ambiguous, "of these would fit several videos, or share one")
    _list("unlabelled", match.unlabelled, "of the store without a label")
    _list("duplicates", labels.duplicates, "listed more than once, kept once")
    if labels.labels:
        here = {label for label, i in zip(labels.labels, match.store_index, strict=True) if i >= 0}
        _list(
            "empty", [name for i, name in enumerate(labels.classes) if i not in here], "without a video in the store", "class"
        )


def _list(title: str, names: Sequence[str], what: str, noun: str = "video") -> None:
    """A line with the number of names, then the first of them. Prints nothing without names."""
    if names:
        say(f"  {title:<10}  {count(len(names), noun, 'classes' if noun == 'class' else None)} {what}:")
    for name in names[:MOST_NAMES]:
        say(f"    {name}")
    if len(names) > MOST_NAMES:
        say(f"    … and {len(names) - MOST_NAMES} more")


LABELS: dict[str, Callable[..., None]] = {"check": check}
