"""Labels of a store's videos by split: what fine-tuning, evaluation and probes read."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vimpac.config.labels import LabelOptions
from vimpac.console import count
from vimpac.data.datasets import Kind, Labels, Match, compare_with_paper, match_labels, read_labels
from vimpac.data.store import TokenStore
from vimpac.errors import InputError

ALL = "all"
"""The split of videos whose labels tell none."""


@dataclass(frozen=True)
class LabelSource:
    """A label file, or the folder of a data set's files, and how to read it: the options of `read_labels`."""

    path: str
    kind: Kind | None = None
    column: str | None = None
    split_number: int | None = None
    classes: str | None = None
    allow_two_splits: bool = False
    allow_empty_classes: bool = False

    @classmethod
    def of(cls, path: str | Path, options: LabelOptions) -> LabelSource:
        """The labels `path`, read as the options of a run or a command say."""
        how = options.labels_kind, options.label_column, options.split_number, options.classes
        return cls(str(path), *how, options.allow_two_splits, options.allow_empty_classes)

    def read(self) -> Labels:
        """Raises InputError as `read_labels`."""
        return read_labels(
            self.path,
            self.kind,
            column=self.column,
            split_number=self.split_number,
            classes=self.classes,
            allow_two_splits=self.allow_two_splits,
            allow_empty_classes=self.allow_empty_classes,
        )


class LabelledVideos(NamedTuple):
    """Some of a store's videos and their labels."""

    videos: np.ndarray
    """int64 [n], ascending indices into the store."""
    labels: np.ndarray
    """int64 [n], indices into the classes."""

    def crc32(self, store: TokenStore) -> int:
        """A checksum of the videos' names in `store` and of their labels."""
        lines = [f"{store.names[video]}\t{label}\n" for video, label in zip(self.videos, self.labels.tolist(), strict=True)]
        return zlib.crc32("".join(lines).encode("utf-8", "surrogateescape"))

    def take(self, chosen: np.ndarray) -> LabelledVideos:
        """Those of the videos that `chosen` [m] indexes."""
        return LabelledVideos(self.videos[chosen], self.labels[chosen])


@dataclass(frozen=True)
class StoreLabels:
    """The labelled videos of a store."""

    store: TokenStore
    source: str
    classes: tuple[str, ...]
    splits: dict[str, LabelledVideos]
    """By name: train, validation, test, or `all` where the labels tell no split."""
    notes: tuple[str, ...] = ()
    """What is missing, and what differs from the paper's Table 5."""

    def split(self, name: str) -> LabelledVideos:
        """The videos of a split. Raises InputError if the labels have no such split, or none of its videos is in the store."""
        known = [split for split, found in self.splits.items() if len(found.videos)]
        if name not in known:
            what = "has no video in the store" if name in self.splits else "does not exist"
            raise InputError(f"the split {name!r} of {self.source} {what}, expected one of {', '.join(known) or 'none'}")
        return self.splits[name]

    def divided(self, held_out: float) -> StoreLabels:
        """These labels, with the split `all` divided into train and validation. Labels that tell splits stay as they are.

        held_out: share of the videos to validate on, or their number; the same share of every class.
        Raises InputError if a part would be empty.
        """
        if self.splits.keys() != {ALL}:
            return self
        found = self.splits[ALL]
        n = len(found.videos)
        count = round(held_out) if held_out >= 1 else max(1, round(held_out * n))
        if count >= n:
            raise InputError(
                f"held_out={held_out:g} leaves nothing to train on: {n} videos of {self.store.folder} have labels; hold out "
                "fewer, or give more labelled videos"
            )
        order = self.order(found)
        parts = {"train": order[count:], "validation": order[:count]}
        return replace(self, splits={name: found.take(np.sort(chosen)) for name, chosen in parts.items()})

    def first(self, found: LabelledVideos, count: int) -> LabelledVideos:
        """`count` of the videos, about the same share of every class. Raises InputError if there are fewer."""
        if count > len(found.videos):
            raise InputError(f"{count} training videos were asked for, {len(found.videos)} of them have labels: ask for fewer")
        return found.take(np.sort(self.order(found)[-count:]))

    def order(self, found: LabelledVideos) -> np.ndarray:
        """An order of the videos, int64 [n], whose every beginning has about the same share of each class.

        It depends on names and labels alone.
        """
        names = [self.store.names[i] for i in found.videos]
        hashes = [zlib.crc32(name.encode("utf-8", "surrogateescape")) for name in names]
        place = np.empty(len(names))
        for label in np.unique(found.labels):
            (own,) = np.nonzero(found.labels == label)
            own = np.array(sorted(own, key=lambda i: (hashes[i], names[i])))
            place[own] = (np.arange(len(own)) + 0.5) / len(own)
        return np.array(sorted(range(len(names)), key=lambda i: (place[i], hashes[i], names[i])), np.int64)


def label_store(store: TokenStore, source: LabelSource) -> StoreLabels:
    """Reads labels and finds their videos in a store.

    Raises InputError as `read_labels` and `match_labels`, and for label files without labels.
    """
    found = source.read()
    if found.labels is None:
        raise InputError(f"{source.path} was read as {found.kind}, which has no labels: expected videos and their classes")
    match = match_labels(found, store.names)
    splits: dict[str, list[tuple[int, int]]] = {}
    for video, label, split in zip(match.store_index, found.labels, found.splits or (ALL,) * len(found.labels), strict=True):
        here = splits.setdefault(split, [])
        if video >= 0:
            here.append((video, label))
    pairs = {name: np.array(sorted(here), np.int64).reshape(-1, 2) for name, here in splits.items()}
    labelled = {name: LabelledVideos(x[:, 0].copy(), x[:, 1].copy()) for name, x in pairs.items()}
    return StoreLabels(store, source.path, found.classes, labelled, tuple(_notes(found, match)))


def _notes(found: Labels, match: Match) -> Iterator[str]:
    """What `vimpac labels check` reports in full, a line each."""
    if match.missing:
        missing, listed = count(len(match.missing), "labelled video"), len(set(found.videos))
        yield f"{missing} of {listed} not in the store, such as {match.missing[0]}"
    if match.unlabelled:
        yield f"{count(len(match.unlabelled), 'video')} of the store without a label, such as {match.unlabelled[0]}"
    if found.duplicates:
        yield f"{count(len(found.duplicates), 'video')} listed more than once, kept once"
    yield from compare_with_paper(found, match)
    yield from found.notes
