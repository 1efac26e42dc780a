"""The scores of an evaluation's videos → its numbers and the files of its folder."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vimpac.data.test_clips import TestClips
from vimpac.data.tokenizers import load_tokenizer
from vimpac.data.views import center_view
from vimpac.errors import InputError
from vimpac.evaluation.folder import FORMAT, INDEX, VERSION, write_confusion, write_scores
from vimpac.evaluation.scores import (
    accuracies,
    accuracies_by_clips,
    average,
    confident_mistakes,
    confusion_matrix,
    confusion_order,
    worst_confusions,
)
from vimpac.figures.confusion import plot_confusion
from vimpac.figures.mistakes import Mistake, plot_mistakes
from vimpac.files.checked import write_json

MISTAKES = 12
"""Mistakes on the contact sheet."""
FRAMES = 4
"""Frames of each."""
CONFUSIONS = 20
"""Pairs of classes that evaluation.json lists."""


@dataclass(frozen=True, eq=False)
class Classified:
    """Videos of a split with their classes and what a model made of them."""

    split: str
    clips: TestClips
    labels: np.ndarray  # int64 [n]
    scores: np.ndarray  # float32 [n, k, K], of each clip, averaged over views
    classes: tuple[str, ...]  # K names

    @cached_property
    def averaged(self) -> np.ndarray:
        """float32 [n, K]"""
        return average(self.scores)

    @cached_property
    def confusion(self) -> np.ndarray:
        """int64 [K, K], in the classes' own order."""
        return confusion_matrix(self.labels, self.averaged.argmax(1), len(self.classes))

    @cached_property
    def mistakes(self) -> np.ndarray:
        """Places of the most confident mistakes, int [≤ MISTAKES]."""
        return confident_mistakes(self.averaged, self.labels, MISTAKES)

    @property
    def names(self) -> list[str]:
        return [self.clips.store.names[i] for i in self.clips.videos]

    def numbers(self) -> dict[str, Any]:
        """Everything that evaluation.json says about the accuracy."""
        videos, right = self.confusion.sum(1).tolist(), self.confusion.diagonal().tolist()
        names, classes, scores = self.names, self.classes, self.averaged
        mistakes = [
            {
                "video": names[i],
                "label": classes[self.labels[i]],
                "prediction": classes[scores[i].argmax()],
                "label_score": _number(scores[i, self.labels[i]]),
                "score": _number(scores[i].max()),
            }
            for i in self.mistakes
        ]
        return {
            "videos": len(self.labels),
            "classes": len(classes),
            **accuracies(scores, self.labels),
            "most_frequent_accuracy": max(videos) / len(self.labels),
            "by_clips": {str(clips): found for clips, found in accuracies_by_clips(self.scores, self.labels).items()},
            "by_class": [
                {"class": name, "videos": n, "accuracy": hits / n if n else None}
                for name, n, hits in zip(classes, videos, right, strict=True)
            ],
            "confusions": [
                {"label": classes[x.label], "prediction": classes[x.prediction], "videos": x.videos, "of": x.of}
                for x in worst_confusions(self.confusion, CONFUSIONS)
            ],
            "mistakes": mistakes,
        }

    def write(self, folder: Path, settings: Mapping[str, Any]) -> list[str]:
        """Writes the files of an evaluation into a folder, evaluation.json last. Returns what could not be written, and why.

        settings: what else evaluation.json says.
        """
        order = confusion_order(self.confusion)
        ordered, names = self.confusion[np.ix_(order, order)], [self.classes[i] for i in order]
        write_confusion(folder / "confusion.csv", ordered, names)
        _, why_csv = write_scores(folder, self.names, self.labels, self.averaged, self.classes)
        notes = [f"scores are in scores.csv: {why_csv}"] if why_csv else []
        if importlib.util.find_spec("matplotlib"):
            found = accuracies(self.averaged, self.labels)
            title = f"{self.split}: {len(self.labels)} videos, top-1 {found['top1']:.3f}, mean of classes "
            plot_confusion(ordered, names, title + f"{found['mean_class_accuracy']:.3f}", folder / "confusion.png")
            notes += self._draw_mistakes(folder / "mistakes.png")
        else:
            notes.append("confusion.png and mistakes.png are not drawn: matplotlib is missing (pip install matplotlib)")
        kept = {"format": FORMAT, "version": VERSION, "kind": "classification", **settings, "split": self.split}
        write_json(folder / INDEX, {**kept, **self.numbers()}, indent=1)
        return notes

    def _draw_mistakes(self, path: Path) -> list[str]:
        """mistakes.png, if there is a mistake. Returns why it is not drawn, if it cannot be."""
        if not len(self.mistakes):
            return []
        store = self.clips.store
        try:
            tokenizer = load_tokenizer(store.folder)
            if tokenizer.digest != store.tokenizer.digest:
                raise InputError(f"{store.folder} holds another tokenizer than that of its ids")
            view, shown = center_view(store), []
            for i in self.mistakes:
                video = int(self.clips.videos[i])
                ids = store.read(video, view=view)
                frames = tokenizer.decode(ids[evenly(len(ids), FRAMES)].astype(np.int64))
                label, scores = self.labels[i], self.averaged[i]
                classes = self.classes[label], self.classes[scores.argmax()]
                shown.append(Mistake(frames, store.names[video], *classes, float(scores[label]), float(scores.max())))
        except (InputError, ImportError) as error:
            return [f"mistakes.png is not drawn, since the tokens cannot be decoded: {error}"]
        wrong = len(self.labels) - int(self.confusion.trace())
        plot_mistakes(shown, f"{self.split}: the most confident of {wrong} mistakes, decoded from tokens", path)
        return []


def evenly(frames: int, count: int) -> np.ndarray:
    """`count` of so many frames, spread from the first to the last: int [count]. Repeats some of fewer frames."""
    return np.round(np.linspace(0, frames - 1, count)).astype(int)


def _number(x: Any) -> float:
    """The float32 in as many digits as it has."""
    value = float(f"{x:.9g}")
    assert math.isfinite(value)
    return value
