"""Labels and splits of videos: from the files of a user or of a published data set, matched to the names of a store.

labels = read_labels("ucfTrainTestlist")
match = match_labels(labels, TokenStore("STORE").names)
match.store_index[i]  # the video of the store that labels.videos[i] is, or -1
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from vimpac.data import annotations
from vimpac.data.annotations import HMDB51_LIST, UCF101_LIST, Annotations, Options, is_list, stem_of
from vimpac.data.label_files import Example, columns_of, head_of, natural, shown, split_of_file, text_of
from vimpac.errors import InputError

Kind = Literal["csv", "folder", "list", "ucf101", "hmdb51", "kinetics400", "ssv2", "diving48", "howto100m"]

READERS: dict[str, Callable[[Path, Options], Annotations]] = {
    "csv": annotations.read_csv,
    "folder": annotations.read_folder,
    "list": annotations.read_list,
    "ucf101": annotations.read_ucf101,
    "hmdb51": annotations.read_hmdb51,
    "kinetics400": annotations.read_kinetics400,
    "ssv2": annotations.read_ssv2,
    "diving48": annotations.read_diving48,
    "howto100m": annotations.read_howto100m,
}
TAKES = {"column": ("csv",), "split_number": ("ucf101", "hmdb51", "list"), "classes": ("csv", "list")}

TABLE_5 = {  # training videos, validation videos, classes; UCF101 and HMDB51: split 1
    "howto100m": (1_238_791, None, None),
    "ssv2": (168_913, 24_777, 174),
    "diving48": (15_027, 1_970, 48),
    "ucf101": (9_537, 3_783, 101),
    "hmdb51": (3_570, 1_530, 51),
    "kinetics400": (205_418, 17_686, 400),
}
EXPECTED = (
    "expected a CSV with the columns video,label[,split], a folder whose subfolders are classes, lists of `path number`, or "
    "the files of UCF101, HMDB51, Kinetics-400, SSV2, Diving48 or HowTo100M"
)


@dataclass(frozen=True)
class Labels:
    """Labelled videos. `videos`, `labels` and `splits` have one entry a video; a video in two splits has two.

    classes: sorted names, or the published order. labels: indices into them; None for a data set without labels.
    splits: train, validation, test or unused (HMDB51); None where the files tell no split.
    """

    kind: Kind
    classes: tuple[str, ...]
    videos: tuple[str, ...]
    labels: tuple[int, ...] | None
    splits: tuple[str, ...] | None
    split_number: int | None = None
    duplicates: tuple[str, ...] = ()
    """Videos that were listed more than once, with the same label and split. Each is kept once."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Match:
    """Which video of a store each labelled video is. All names are sorted."""

    store_index: tuple[int, ...]
    """For each entry of `Labels.videos` the index of its name in the store, -1 if the store lacks it."""
    found_by: dict[str, int]
    """How many videos were found by their path, by their stem (file name without extension) and by their id."""
    missing: tuple[str, ...]
    ambiguous: tuple[str, ...]
    """Those of the missing videos that could be several videos of the store, or share one with other labels."""
    unlabelled: tuple[str, ...]
    """Videos of the store without a label."""


def read_labels(
    path: str | Path,
    kind: Kind | None = None,
    *,
    column: str | None = None,
    split_number: int | None = None,
    classes: str | Path | None = None,
    allow_two_splits: bool = False,
    allow_empty_classes: bool = False,
) -> Labels:
    """Reads a label file, or the folder of a data set's files. kind: its format; None recognises it from the content.

    column: the label column of a CSV. split_number: 1 to 3, of UCF101 and HMDB51. classes: file with the name of a class on
    each line, for a CSV or a list. Raises InputError that names file, line, value, what was expected and the way out.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"the labels {path} do not exist; {EXPECTED}")
    if kind is not None and kind not in get_args(Kind):
        raise InputError(f"the kind of labels is {shown(kind)}, expected one of {', '.join(get_args(Kind))}")
    if split_number not in (None, 1, 2, 3):
        raise InputError(f"the split number is {split_number}, expected 1, 2 or 3")
    kind = kind or recognise(path)
    options = Options(column, split_number, None if classes is None else Path(classes))
    for name, value in options._asdict().items():
        if value is not None and kind not in TAKES[name]:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{path} was read as {kind}, which takes no {option}; it is for {', '.join(TAKES[name])}")
    found = READERS[kind](path, options)
    if not found.examples:
        raise InputError(f"{path} lists no video, expected at least one; was it cut off?")
    return _labels(path, kind, found, allow_two_splits, allow_empty_classes)


def recognise(path: Path) -> Kind:
    """The format of a label file, or of the files of a folder."""
    if not path.is_dir():
        found, head = _recognise_file(path), head_of(path)
        if found is None or "\ufffd" in head:
            text_of(path)  # raises if it is no text
        if not head.strip():
            raise InputError(f"{path} is empty; {EXPECTED}")
        if found is None:
            raise InputError(f"{path} begins with {shown(head.lstrip().partition(chr(10))[0])}; {EXPECTED}")
        return found
    entries = sorted(path.iterdir())
    files = [entry for entry in entries if entry.is_file() and entry.suffix in (".txt", ".csv", ".json")]
    if (path / "classInd.txt").is_file():
        return "ucf101"
    if (path / "labels.csv").is_file() and "video" in columns_of(path / "labels.csv"):
        return "csv"
    kinds: set[Kind] = {kind for file in files if (kind := _recognise_file(file)) and (kind != "list" or split_of_file(file))}
    kinds.discard("csv")
    if len(kinds) > 1:
        raise InputError(f"{path} holds the files of {', '.join(sorted(kinds))}; choose one with --labels-kind, or give a file")
    if kinds:
        return next(iter(kinds))
    if any(entry.is_dir() for entry in entries):
        return "folder"
    raise InputError(f"{path} holds no labels; {EXPECTED}")


def _recognise_file(file: Path) -> Kind | None:
    if UCF101_LIST.fullmatch(file.name):
        return "ucf101"
    if HMDB51_LIST.fullmatch(file.name):
        return "hmdb51"
    head = head_of(file).lstrip()
    if head.startswith(("[", "{")):
        return "ssv2" if '"template"' in head else "diving48" if '"vid_name"' in head else None
    columns = {name.strip().strip('"') for name in head.partition("\n")[0].split(",")}
    if "youtube_id" in columns:
        return "kinetics400"
    if {"video_id", "task_id"} <= columns:
        return "howto100m"
    if "video" not in columns and is_list(file):
        return "list"
    return "csv" if "video" in columns or re.search("[,;\t]", head.partition("\n")[0]) else None  # or an error of its reader


def _labels(path: Path, kind: Kind, found: Annotations, allow_two_splits: bool, allow_empty_classes: bool) -> Labels:
    """Checks the examples against each other and against the classes."""
    kept, duplicates = _without_duplicates(found.examples, allow_two_splits)
    with_split = [example for example in kept if example.split is not None]
    if with_split and len(with_split) < len(kept):
        other = next(example for example in kept if example.split is None)
        raise InputError(
            f"{other.place}: the split of {shown(other.video)} is not known, that of others is; expected train, validation or "
            "test in the file's name"
        )
    labels = None
    classes = found.classes or ()
    if all(example.label is not None for example in kept):
        names = {str(example.label) for example in kept}
        if kind == "list" and not classes:
            classes = tuple(str(i) for i in range(1 + max(map(int, names))))
        classes = classes or tuple(sorted(names, key=natural))
        empty = [name for name in classes if name not in names]
        if empty and not allow_empty_classes:
            more = f" and {len(empty) - 1} more" * (len(empty) > 1)
            raise InputError(
                f"{path}: the class {shown(empty[0])}{more} of {found.class_file or 'the numbers in it'} has no video, "
                "expected at least one; add what is missing, or accept it with --allow-empty-classes"
            )
        index = {name: i for i, name in enumerate(classes)}
        labels = tuple(index[str(example.label)] for example in kept)
    splits = tuple(str(example.split) for example in kept) if with_split else None
    videos = tuple(example.video for example in kept)
    return Labels(kind, classes, videos, labels, splits, found.split_number, duplicates, tuple(found.notes))


def _without_duplicates(examples: Sequence[Example], allow_two_splits: bool) -> tuple[list[Example], tuple[str, ...]]:
    """Each video once per split, and the videos that were listed more often."""
    first: dict[str, Example] = {}
    kept: dict[tuple[str, str | None], Example] = {}
    duplicates = set()
    for example in examples:
        before = first.setdefault(example.video, example)
        if before.label != example.label:
            raise InputError(
                f"{example.place}: the label of {shown(example.video)} is {shown(example.label)}, expected "
                f"{shown(before.label)} as in {before.place}; remove one"
            )
        if before.split != example.split and not allow_two_splits:
            raise InputError(
                f"{example.place}: the split of {shown(example.video)} is {example.split}, expected {before.split} as in "
                f"{before.place}; remove one, or accept both with --allow-two-splits"
            )
        if kept.setdefault((example.video, example.split), example) is not example:
            duplicates.add(example.video)
    return list(kept.values()), tuple(sorted(duplicates))


def match_labels(labels: Labels, store_names: Sequence[str]) -> Match:
    """Finds the labelled videos among the names of a store: by path, then by stem, then by id.

    By path: the same name, or the file name and at least one folder above it agree, with any extension. By stem: the file name
    without its extension. By id: the stem without the times of Kinetics (`ID_000012_000022`). What fits several videos fits
    none. Raises InputError if none is found, or if most labelled videos are not in the store and most videos of the store have
    no label.
    """
    index = {name: i for i, name in enumerate(store_names)}
    wanted = dict.fromkeys(labels.videos)
    chosen = {name: name for name in wanted if name in index}
    taken, found_by = set(chosen), {"path": len(chosen), "stem": 0, "id": 0}
    for how, key in _keys(min(_depth(wanted), _depth(index))):
        if len(chosen) in (len(wanted), len(index)):
            break
        for name, other in _pairs(wanted, index, key):
            if name not in chosen:  # nor is the other taken: it would share the key with its own label
                chosen[name] = other
                taken.add(other)
                found_by[how] += 1
    missing = tuple(sorted(wanted.keys() - chosen))
    unlabelled = tuple(sorted(index.keys() - taken))
    ids = {_id(name) for name in unlabelled}
    ambiguous = tuple(name for name in missing if _id(name) in ids)
    most = 2 * len(missing) > len(wanted) and 2 * len(unlabelled) > len(index)
    if most or not chosen:
        ours, theirs = (", ".join(map(shown, names[:3])) or "none" for names in (missing, unlabelled))
        raise InputError(
            f"{len(missing)} of {len(wanted)} labelled videos are not in the store, such as {ours}; {len(unlabelled)} of its "
            f"{len(index)} videos have no label, such as {theirs}; expected names that agree in path, file name or id: use the "
            "labels of these videos"
        )
    return Match(
        tuple(index[chosen[x]] if x in chosen else -1 for x in labels.videos), found_by, missing, ambiguous, unlabelled
    )


def _keys(depth: int) -> Iterator[tuple[str, Callable[[str], str | None]]]:
    """What two names must share to be one video, from the strictest to the loosest, and the name of the rule."""
    for n in range(depth, 1, -1):
        yield "path", partial(_end, count=n)
        yield "path", lambda name, n=n: _end(_without_extension(name), n)
    yield "stem", partial(_end, count=1)
    yield "stem", stem_of
    yield "id", _id


def _pairs(ours: Iterable[str], theirs: Iterable[str], key: Callable[[str], str | None]) -> list[tuple[str, str]]:
    """(label's name, store's name) for each key that exactly one name on either side has."""
    there = _by_key(theirs, key)
    return [(name, other) for value, name in _by_key(ours, key).items() if name and (other := there.get(value))]


def _by_key(names: Iterable[str], key: Callable[[str], str | None]) -> dict[str, str | None]:
    """The name that has each key, None where several have it."""
    found: dict[str, str | None] = {}
    for name in names:
        if (value := key(name)) is not None:
            found[value] = None if value in found else name
    return found


def _depth(names: Iterable[str]) -> int:
    return max((name.count("/") + 1 for name in names), default=0)


def _end(name: str, count: int) -> str | None:
    """The last parts of a path; None if it has fewer."""
    parts = name.rsplit("/", count)
    return "/".join(parts[-count:]) if len(parts) >= count else None


def _without_extension(name: str) -> str:
    folders, slash, _ = name.rpartition("/")
    return folders + slash + stem_of(name)


def _id(name: str) -> str:
    return re.sub(r"_\d{6}_\d{6}$", "", stem_of(name))


def split_counts(labels: Labels, match: Match | None = None) -> dict[str, int]:
    """Videos by split ("all" where none is known); only those found in the store if a match is given."""
    found = [True] * len(labels.videos) if match is None else [i >= 0 for i in match.store_index]
    splits = labels.splits or ("all",) * len(labels.videos)
    counts = Counter(split for split, here in zip(splits, found, strict=True) if here)
    return {split: counts[split] for split in dict.fromkeys(splits)}


def compare_with_paper(labels: Labels, match: Match | None = None) -> list[str]:
    """Where labels, or the videos found in a store, differ from the paper's Table 5, a line each; none for other data."""
    if labels.kind not in TABLE_5 or labels.split_number not in (None, 1):
        return []
    train, validation, classes = TABLE_5[labels.kind]
    listed = split_counts(labels)
    here = listed if match is None else split_counts(labels, match)
    lines = []
    for split, count in listed.items():
        paper = {"train": train, "all": train, "validation": validation}.get(split)
        if split == "test" and "validation" not in listed:  # what the paper validates on
            paper = validation
        if paper and {count, here[split]} != {paper}:
            found = "" if match is None else f", {here[split]} in the store"
            lines.append(f"{split}: {count} listed{found}; the paper has {paper}")
    if classes and len(labels.classes) != classes:
        lines.append(f"{len(labels.classes)} classes; the paper has {classes}")
    return lines
