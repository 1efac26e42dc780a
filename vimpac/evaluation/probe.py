"""Probes of a frozen backbone, each beside the same on a random backbone, and on token histograms without any model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from vimpac.config.probe import ProbeName
from vimpac.data.labelled import StoreLabels
from vimpac.distributed import World, on_first_rank
from vimpac.errors import InputError
from vimpac.evaluation.attentive import AttentiveTraining, States, attentive_probe
from vimpac.evaluation.features import Clips, Look, all_vectors
from vimpac.evaluation.linear import held_out_part, linear_probe
from vimpac.evaluation.neighbors import knn_predict
from vimpac.model import ClassificationModel, PretrainModel
from vimpac.model.models import model_class

Backbone = Literal["model", "random", "none"]


@dataclass(frozen=True)
class Task:
    """Which videos train a probe and which test it."""

    videos: np.ndarray
    """int64 [n + m at most], ascending: indices into the store. What follows are places in this list, a row each."""
    names: tuple[str, ...]
    """Of the videos."""
    classes: tuple[str, ...]
    train: np.ndarray
    """int64 [n]"""
    train_labels: np.ndarray
    test: np.ndarray
    """int64 [m]"""
    test_labels: np.ndarray

    def __post_init__(self):
        found = np.unique(self.train_labels)
        if len(found) < 2:
            raise InputError(
                f"all {len(self.train)} training videos are of the class {self.classes[int(found[0])]!r}, expected at least "
                "two classes: give labels with several"
            )

    @property
    def chance(self) -> float:
        """Share of right answers that guessing a class of the training videos gives."""
        return 1 / len(np.unique(self.train_labels))

    @property
    def most_frequent(self) -> float:
        """Share of test videos of the class that most training videos have."""
        return float((self.test_labels == np.bincount(self.train_labels).argmax()).mean())


def divide(labels: StoreLabels, split: str) -> Task:
    """The task to predict the labels of `split` from those of train.

    Raises InputError if a split is missing or empty, if both are the same, or if the training videos are of one class.
    """
    if split == "train":
        raise InputError("the split is train, on which probes are fitted: expected another one")
    train, test = labels.split("train"), labels.split(split)
    videos = np.union1d(train.videos, test.videos)
    rows = (np.searchsorted(videos, found.videos) for found in (train, test))
    names = tuple(labels.store.names[i] for i in videos)
    return Task(videos, names, labels.classes, next(rows), train.labels, next(rows), test.labels)


class Row(NamedTuple):
    """A result: one probe on one kind of features."""

    probe: ProbeName
    features: str
    """cls, mean or contrastive; tokens of the attentive probe; histogram."""
    backbone: Backbone
    top1: float
    """Share of right answers on the test videos."""
    mean_class: float
    """Mean over classes of the share of right answers."""
    strength: float | None = None
    """C of the linear probe."""


def random_backbone(model: PretrainModel | ClassificationModel, seed: int) -> PretrainModel | ClassificationModel:
    """A freshly initialised model of the same configuration, in evaluation mode on the same device."""
    classes = model.classifier.out_features if isinstance(model, ClassificationModel) else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = model_class(classes)(model.config)
    return fresh.to(next(model.parameters()).device).eval()


@contextmanager
def silent(title: str, videos: int) -> Iterator[Callable[[int], None]]:
    """Reports no progress."""
    yield lambda finished: None


def run_probes(
    model: PretrainModel | ClassificationModel,
    clips: Clips,
    task: Task,
    probes: Sequence[ProbeName],
    neighbors: int,
    look: Look,
    attentive: AttentiveTraining,
    world: World,
    report: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] = silent,
) -> list[Row]:
    """The results of all probes on the first rank, no rows on the others.

    All ranks call it and share the forward passes for the vectors; the first alone fits the probes. A function of weights,
    clips and settings: every draw has the seed attentive.seed. report(title, videos) yields what is called with the number of
    videos that are finished.
    """
    rows: list[Row] = []
    networks: dict[Backbone, PretrainModel | ClassificationModel]
    networks = {"model": model, "random": random_backbone(model, attentive.seed)}
    on_vectors: list[ProbeName] = [probe for probe in probes if probe != "attentive"]
    everything: dict[Backbone, PretrainModel | ClassificationModel | None] = {**networks, "none": None}
    for backbone, network in everything.items() if on_vectors else ():
        with report(_TITLES[backbone], math.ceil(len(clips) / world.size)) as tick:
            vectors = all_vectors(network, clips, list(task.names), look, world, model.config.vocab_size, tick)
        if world.is_first:
            rows += [
                _on_vectors(probe, name, backbone, x, task, neighbors) for probe in on_vectors for name, x in vectors.items()
            ]
    if "attentive" in probes:

        def train() -> None:
            for backbone, network in networks.items():
                with report(f"attentive probe, {backbone}", attentive.epochs * len(task.train)) as tick:
                    rows.append(_attentive(backbone, network, clips, task, look, attentive, tick))

        on_first_rank(train, world)
    return rows


_TITLES: dict[Backbone, str] = {"model": "vectors", "random": "vectors of a random backbone", "none": "token histograms"}


def _on_vectors(probe: ProbeName, name: str, backbone: Backbone, x: np.ndarray, task: Task, neighbors: int) -> Row:
    train, test, strength = x[task.train], x[task.test], None
    if probe == "knn":
        guesses = knn_predict(train, task.train_labels, test, neighbors)
    else:
        held_out = held_out_part([task.names[i] for i in task.train], task.train_labels)
        guesses, strength = linear_probe(train, task.train_labels, test, held_out)
    return Row(probe, name, backbone, *accuracies(guesses, task.test_labels), strength)


def _attentive(
    backbone: Backbone,
    model: PretrainModel | ClassificationModel,
    clips: Clips,
    task: Task,
    look: Look,
    config: AttentiveTraining,
    tick: Callable[[int], None],
) -> Row:
    train, test = States(model, clips, task.train, look), States(model, clips, task.test, look, most_bytes=0)
    guesses = attentive_probe(train, task.train_labels, test, len(task.classes), config, tick)
    return Row("attentive", "tokens", backbone, *accuracies(guesses, task.test_labels))


def accuracies(guesses: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Share of right answers, and its mean over the classes that occur."""
    right = guesses == labels
    return float(right.mean()), float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))
