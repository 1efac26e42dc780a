"""The videos of a fine-tuning run: which are trained on, which are validated on, and as which clips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vimpac.config import FinetuneConfig
from vimpac.data.labelled import LabelledVideos, LabelSource, StoreLabels, label_store
from vimpac.data.labelled_clips import LabelledClips
from vimpac.data.rates import frame_step
from vimpac.data.store import TokenStore
from vimpac.data.test_clips import TestClips
from vimpac.data.views import center_view, test_views, training_views
from vimpac.errors import InputError

VALIDATION_SPLITS = ("validation", "test")


class FinetuneData(NamedTuple):
    """Labelled videos to train on and to validate on. `classes` are the names of both."""

    classes: tuple[str, ...]
    training: LabelledVideos
    validation: LabelledVideos
    validation_store: TokenStore
    validation_split: str
    notes: tuple[str, ...]

    def describe(self, store: TokenStore) -> dict:
        """What config.json says of the labels. A run that resumes must find the same."""
        parts = {"training": (store, self.training), "validation": (self.validation_store, self.validation)}
        return {
            "classes": list(self.classes),
            **{name: len(found.videos) for name, (_, found) in parts.items()},
            **{f"{name}_crc32": found.crc32(own) for name, (own, found) in parts.items()},
        }


def read_data(config: FinetuneConfig, labels: str, store: TokenStore) -> FinetuneData:
    """Reads the labels and divides the videos.

    Raises InputError for bad labels, a split without videos, and a class without a training video (unless allowed).
    """
    source = LabelSource.of(labels, config)
    found = label_store(store, source).divided(config.held_out)
    held, held_store = found, store
    if config.validation_data is not None:
        held_store = TokenStore(config.validation_data)
        check_same_frames(store, held_store)
        held = label_store(held_store, source)
    splits = [name for name in VALIDATION_SPLITS if name in held.splits and len(held.splits[name].videos)]
    validation_split = splits[0] if splits else VALIDATION_SPLITS[0] if config.validation_data is None else _only_split(held)
    if not splits and held is found:
        raise InputError(
            f"{source.path} has no split to validate on, expected validation or test beside {', '.join(found.splits)}: add it, "
            "give --validation-data STORE, or labels without splits, of which --held-out are kept"
        )
    training, validation = found.split("train"), held.split(validation_split)
    check_classes(found, training, source.path, config.allow_empty_classes)
    if config.train_videos is not None:
        training = found.first(training, config.train_videos)
    notes = [f"labels: {note}" for note in found.notes]
    if held_store is not store:
        notes += [f"labels of {held_store.folder}: {note}" for note in held.notes]
    return FinetuneData(found.classes, training, validation, held_store, validation_split, tuple(notes))


def _only_split(held: StoreLabels) -> str:
    """The split of a store that holds one, whatever its name."""
    names = [name for name, found in held.splits.items() if len(found.videos)]
    return names[0] if len(names) == 1 and names[0] != "train" else VALIDATION_SPLITS[0]


def check_same_frames(store: TokenStore, other: TokenStore) -> None:
    """Raises InputError unless clips of both stores fit one model."""
    for name, mine, theirs in (
        ("tokenizer", store.tokenizer.digest[:12], other.tokenizer.digest[:12]),
        ("frame size", store.frame_size, other.frame_size),
    ):
        if mine != theirs:
            raise InputError(
                f"validation_data={other.folder} has {name} {theirs}, {store.folder} has {mine}: tokenize both alike "
                f"(`vimpac tokenize VIDEOS OUT --tokenizer-path {store.folder} --frame-size {store.frame_size}`)"
            )


def check_classes(labels: StoreLabels, training: LabelledVideos, source: str, allow_empty: bool) -> None:
    """Raises InputError for a single class, and for classes without a training video unless they are allowed."""
    if len(labels.classes) == 1:
        raise InputError(f"{source} has one class, {labels.classes[0]!r}, expected at least two to tell apart")
    missing = sorted(set(range(len(labels.classes))) - set(training.labels.tolist()))
    if missing and not allow_empty:
        more = f" and {len(missing) - 1} more" * (len(missing) > 1)
        raise InputError(
            f"the class {labels.classes[missing[0]]!r}{more} of {source} has no training video in {labels.store.folder}, "
            "expected at least one; add what is missing, or accept it with --allow-empty-classes"
        )


class FinetuneClips(NamedTuple):
    training: LabelledClips
    validation: TestClips
    """One clip a video, centre view: between updates."""
    evaluation: TestClips
    """At the end of the run."""


def make_clips(config: FinetuneConfig, store: TokenStore, data: FinetuneData) -> FinetuneClips:
    """Raises InputError if a store has no view or rate that the run needs, or no video as long as a clip."""
    shape, held = (config.model.grid[0], config.model.pad_id), data.validation_store
    views: Sequence[int] = training_views(store)
    training = LabelledClips(store, data.training, views, *shape, config.seed, frame_step(store, config.fps))
    every, center = frame_step(held, config.fps or store.fps), [center_view(held)]
    views = center if config.eval_views == "center" else test_views(held)
    clips = min(config.eval_clips, int(held.frames[data.validation.videos].max()))  # more would repeat
    validation = TestClips(held, data.validation.videos, 1, center, *shape, every)
    return FinetuneClips(training, validation, TestClips(held, data.validation.videos, clips, views, *shape, every))
