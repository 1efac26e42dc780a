"""Options of `vimpac evaluate` and `vimpac predict`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vimpac.config.checks import MOST_VIDEOS, counts, positive
from vimpac.config.labels import LabelOptions

CLIPS = 10
"""Of each video in an evaluation, if none are asked for (section 4.1)."""


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How a fine-tuned model scores a video."""

    clips: int | None = None
    """Clips of each video, spread evenly in time; None = 10, or the frames of the longest video if it has fewer."""
    views: Literal["test", "center"] = "test"
    """test = three upright crops, or as many as a store has; center = one."""
    frames: int | None = None
    """T, frames of a clip; None = the model's. Its positions are interpolated."""
    fps: float | None = None
    """Frames a second of a clip; None = the model's. A store's rate must be a multiple of it."""
    batch: int = 32
    """Clips of a forward pass."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast dtype; auto = bf16 on a GPU that has it, else fp32."""

    def __post_init__(self):
        for name in ("clips", "batch"):
            if getattr(self, name) is not None:
                counts(name, getattr(self, name), MOST_VIDEOS)
        if self.frames is not None:
            counts("frames", self.frames, 4096)
        if self.fps is not None:
            positive("fps", self.fps, 1e-3, 1e3)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(LabelOptions, ScoringConfig):
    """What `vimpac evaluate` measures."""

    labels: Path | None = None
    """A label file, or the folder of a data set's files; None = those of the model's run. A pre-trained model needs none."""
    split: str | None = None
    """The split that is measured; None = test, or validation where there is none, or all if the labels tell none."""
    output: Path | None = None
    """Folder to write; None = evaluation-SPLIT in the run folder, or beside the model. It replaces an earlier evaluation."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig(ScoringConfig):
    """What `vimpac predict` prints."""

    top: int = 5
    """Classes of each video to list."""
    tokenizer_path: Path | None = None
    """The model's tokenizer, or a store that has it; None = tokenizer.safetensors in the run folder, or beside the model."""
    workers: int | None = None
    """Processes that decode; None = one for each core."""
    video_timeout: float = 3600.0
    """Seconds that reading one video may take."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print a JSON object a line: {"video", "classes": [{"class", "probability"}]}, or {"video", "error"}."""

    def __post_init__(self):
        super().__post_init__()
        counts("top", self.top, MOST_VIDEOS)
        if self.workers is not None:
            counts("workers", self.workers, 4096)
        positive("video_timeout", self.video_timeout, 1, 1e9)
