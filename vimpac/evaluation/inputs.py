"""What an evaluation is given, checked before any work: do model, store and labels fit each other, and which split is meant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vimpac.data.labelled import ALL, LabelledVideos, StoreLabels
from vimpac.data.store import TokenStore
from vimpac.errors import InputError
from vimpac.model import ClassificationModel, PretrainModel

PREFERRED = ("test", "validation")
"""Which split is evaluated if none is named."""


def check_store(model: PretrainModel | ClassificationModel, file: Path, store: TokenStore) -> None:
    """Raises InputError unless the store's frames and ids are such as the model takes."""
    _, *size = model.config.grid
    if tuple(size) != store.grid:
        pixels = store.tokenizer.stride * size[0]
        raise InputError(
            f"{file} takes frames of {size[0]}×{size[1]} tokens, store {store.folder} has {store.grid[0]}×{store.grid[1]} "
            f"({store.frame_size} px): tokenize the videos with --frame-size {pixels}"
        )
    if model.config.vocab_size != store.tokenizer.vocab_size:
        raise InputError(
            f"{file} has a vocabulary of {model.config.vocab_size} codes, store {store.folder} was made with "
            f"{store.tokenizer.vocab_size}: tokenize the videos with the model's tokenizer (--tokenizer-path)"
        )


def choose_split(labels: StoreLabels, name: str | None, held_out: float | None) -> tuple[str, LabelledVideos]:
    """The split called `name`; None = test, else validation, else all. Raises InputError if there is none or it is empty.

    held_out: how the model's run divided labels that tell no split; then "validation" is the part that it was not trained on.
    """
    if held_out is not None and name != ALL:
        labels = labels.divided(held_out)
    known = [split for split, found in labels.splits.items() if len(found.videos)]
    chosen = name or next((split for split in PREFERRED if split in known), known[0] if len(known) == 1 else PREFERRED[0])
    return chosen, labels.split(chosen)


def class_names(names: Sequence[str] | None, labels: Sequence[str], classes: int, source: str) -> tuple[str, ...]:
    """The names of the model's classes: its own, else those of the labels. Raises InputError if these are not as many."""
    if names is None and len(labels) != classes:
        raise InputError(
            f"{source} has {len(labels)} classes, the model {classes}: expected the labels that it was fine-tuned on (for "
            "a CSV of some of the classes, name all of them with --classes)"
        )
    return tuple(labels if names is None else names)


def model_labels(found: LabelledVideos, labels: Sequence[str], names: Sequence[str], source: str) -> np.ndarray:
    """The labels as numbers of the model's classes, by name: int64 [n]. Raises InputError for a class that it does not have."""
    index = {name: i for i, name in enumerate(names)}
    occurring = np.unique(found.labels).tolist()
    if unknown := [labels[i] for i in occurring if labels[i] not in index]:
        more = f" and {len(unknown) - 1} more" * (len(unknown) > 1)
        known = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise InputError(
            f"the class {unknown[0]!r}{more} of {source} is none of the model's {len(names)}, expected {known}: use the labels "
            "that it was fine-tuned on"
        )
    return np.array([index.get(name, -1) for name in labels], np.int64)[found.labels]


def output_beside(file: Path, run: Path | None, what: str) -> Path:
    """The folder of an evaluation if none is named: evaluation-WHAT in the run's folder, or beside the file.

    A checkpoint's has its step in its name, and that of a file under another name than model.safetensors that name.
    """
    name = "" if file.name == "model.safetensors" else f"-{file.stem}"
    return (run or file.parent) / f"evaluation-{what}{name}"
