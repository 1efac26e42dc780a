"""Options of fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from vimpac.config.checks import LARGEST, MOST_VIDEOS, SMALLEST, counts, positive, require
from vimpac.config.labels import LabelledRunConfig

FROM_SCRATCH = "none"
WIDE = 1024  # Large-Half


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LabelledRunConfig):
    """A fine-tuning run: classification of labelled videos (Table 4)."""

    start: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """What to fine-tune: a run folder, a model.safetensors or a checkpoint; `none` = a new model, as --model.… describes."""
    frames: int | None = None
    """T, frames of a clip; None = the model's. Its positions are interpolated to T and to the store's frame size."""
    scratch_epochs: float = 4.0
    """With --from none: train for this many times the epochs (section C.2: 4 for small data sets, 1.5 for large ones)."""
    validation_data: str | None = None
    """Token store of the validation videos, for example one with test views; None = they are in data."""

    train_videos: int | None = None
    """Train on this many of the training videos, the first in a fixed order; None = all."""
    held_out: float = 0.2
    """Where the labels tell no split: videos kept for validation, a share of them (below 1) or their number (1 or more)."""

    batch_size: int = 128
    """Videos per update, one clip each, over all processes and accumulated micro-steps."""
    micro_batch: int | None = None
    """Clips per forward pass in each process; None = batch_size / processes, at most 128."""
    epochs: float = 50.0
    """Passes over the training videos until the run ends, if steps is None."""
    learning_rate: float | None = None
    """Peak learning rate; None = 1e-4, or 5e-5 for models at least 1024 wide, such as Large-Half (Table 4)."""
    weight_decay: float = 0.01
    """AdamW's, on everything but biases and norm weights."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    last_dropout: float = 0.0
    """Dropout of [CLS] before the classifier."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes."""
    layer_decay: float = 1.0
    """Learning rate of a layer relative to that of the layer above it; 1 = the same for all."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: a class's loss is weighted by the inverse of its share of the training videos."""
    freeze_backbone: bool = False
    """Train the classifier only."""

    validate_every: float = 1.0
    """Passes over the training videos between validations (one clip, centre view); 0 = none but the last."""
    keep_best: bool = False
    """Also keep the model with the best validation accuracy: RUN/best.safetensors."""
    eval_clips: int = 10
    """Temporal clips of a video in the evaluation at the end."""
    eval_views: Literal["test", "center"] = "test"
    """Views of a video in the evaluation at the end: the store's test views, or the centre view alone (SSV2)."""
    compare_scratch: bool = False
    """Also train a new model with the same options, and report its accuracy beside this one's: RUN-from-scratch."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("start", "validation_data"):
            self.require_path(name)
        for name in ("micro_batch", "train_videos", "eval_clips"):
            if getattr(self, name) is not None:
                counts(name, getattr(self, name), MOST_VIDEOS)
        if self.frames is not None:
            counts("frames", self.frames, 4096)
        if self.learning_rate is not None:
            positive("learning_rate", self.learning_rate, SMALLEST, LARGEST)
        positive("scratch_epochs", self.scratch_epochs, 1e-3, 1e3)
        positive("layer_decay", self.layer_decay, 1e-3, 1.0)
        for name in ("last_dropout", "label_smoothing"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        require(0 <= self.validate_every <= 1e6, "validate_every", self.validate_every, "0 to 1e+06 epochs")
        self.require_held_out(self.held_out, "accuracy is measured on other videos than those trained on")
        both = self.from_scratch and self.compare_scratch
        require(not both, "compare_scratch", self.compare_scratch, f"left out with --from {FROM_SCRATCH}, which is that run")
        stuck = self.from_scratch and self.freeze_backbone
        require(
            not stuck, "freeze_backbone", self.freeze_backbone, f"left out with --from {FROM_SCRATCH}: nothing has trained it"
        )

    @property
    def from_scratch(self) -> bool:
        return self.start == FROM_SCRATCH

    @property
    def peak_learning_rate(self) -> float:
        """Table 4's, which depends on the model's size."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 5e-5 if self.model.width >= WIDE else 1e-4
