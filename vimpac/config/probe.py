"""Options of `vimpac features`, `vimpac probe` and `vimpac similar`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vimpac.config.checks import LARGEST, MOST_VIDEOS, SMALLEST, counts, positive, require
from vimpac.config.labels import LabelOptions

Normalisation = Literal["none", "l2", "center", "whiten"]
VectorName = Literal["cls", "mean", "contrastive"]
ProbeName = Literal["knn", "linear", "attentive"]


@dataclass(frozen=True, kw_only=True)
class LookConfig:
    """How a trained model looks at the videos of a store."""

    layer: int | None = None
    """The layer whose output is taken, from 1; 0 = the embedding, None = the last."""
    clips: int = 3
    """Clips of each video, spread evenly over it, centre view. Vectors are averaged over them."""
    frames: int | None = None
    """T, frames of a clip; None = the model's. Its positions are interpolated to T and to the store's frame size."""
    fps: float | None = None
    """Frames per second, which must divide the store's; None = what the model was trained at."""
    batch: int = 64
    """Clips per forward pass."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast dtype; auto = bf16 on a GPU that has it, else fp32."""

    def __post_init__(self):
        for name in ("clips", "batch"):
            counts(name, getattr(self, name), MOST_VIDEOS)
        if self.frames is not None:
            counts("frames", self.frames, 4096)
        if self.fps is not None:
            positive("fps", self.fps, 1e-3, 1e3)


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(LookConfig):
    """What `vimpac features` writes."""

    normalize: Normalisation = "none"
    """l2: unit length. center: minus the mean over the store. whiten: decorrelated, with equal variances, as well."""


@dataclass(frozen=True, kw_only=True)
class SimilarConfig(LookConfig):
    """What `vimpac similar` compares."""

    count: int = 10
    """How many videos to list."""
    vector: VectorName = "mean"
    """mean: of the token states. cls: the [CLS] state. contrastive: the contrastive head's features of it."""
    normalize: Literal["none", "center", "whiten"] = "center"
    """What is done to the vectors before their cosines are taken: see `vimpac features --help`."""
    features: Path | None = None
    """Folder that keeps the store's features, which are computed if it has none; None = compute them each time."""

    def __post_init__(self):
        super().__post_init__()
        counts("count", self.count, MOST_VIDEOS)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(LabelOptions, LookConfig):
    """What `vimpac probe` measures."""

    labels: Path
    """A label file, or the folder of a data set's files."""
    probes: tuple[ProbeName, ...] = ("knn", "linear", "attentive")
    """Which probes to run."""
    split: str | None = None
    """The split that is measured; None = test, or validation where there is none."""
    output: Path | None = None
    """File for all numbers; None = probe.json in the run folder, or beside the model."""
    held_out: float = 0.2
    """Where the labels tell no split: videos that are measured, a share of them (below 1) or their number (1 or more)."""
    neighbors: int | None = None
    """k of k-NN; None = 20, or as many training videos as there are."""
    epochs: int = 20
    """Passes of the attentive probe over the training videos."""
    learning_rate: float = 1e-3
    """The attentive probe's, at its peak."""
    weight_decay: float = 0.01
    """The attentive probe's, on matrices."""
    batch_videos: int = 16
    """Videos per update of the attentive probe."""
    seed: int = 0
    """Of the random backbone, and of the attentive probe's weights and order of videos."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("epochs", "batch_videos"):
            counts(name, getattr(self, name), MOST_VIDEOS)
        require(self.held_out > 0, "held_out", self.held_out, "above 0, or no video is left to measure on")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 or more, and below 2⁶³")
        require(bool(self.probes), "probes", "empty", "one or more of knn, linear, attentive")
        positive("learning_rate", self.learning_rate, SMALLEST, LARGEST)
