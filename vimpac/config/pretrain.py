"""Options of pre-training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vimpac.config.checks import LARGEST, MOST_VIDEOS, SMALLEST, counts, not_negative, positive, require
from vimpac.config.labels import LabelledRunConfig


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(LabelledRunConfig):
    """A pre-training run. A video counts as its two clips throughout."""

    continue_from: str | None = None
    """Run folder of an earlier stage: take its weights, Adam moments and step; positions are interpolated."""
    init_from: str | None = None
    """A run folder, model or checkpoint to start from: its weights only, positions interpolated. Not with continue_from."""
    fit_frame_size: bool = False
    """Take the grid's height and width from the store instead of refusing another frame size. demo: off with --model.grid."""
    all_views: bool = False
    """Draw the clips of a video from all views of the store (one view for both clips), instead of its centre view."""

    schedule_epochs: float | None = None
    """Passes until the learning rate is 0; None = epochs. With --steps: steps · schedule_epochs / epochs updates."""
    contrastive_videos: int = 128
    """n of Eq. 5: videos contrasted with each other, 2 or more; n - 1 of them are negatives (Table 11)."""
    micro_batch: int | None = None
    """Videos per forward pass in each process; None = contrastive_videos / processes. Fewer needs gradient caching."""
    learning_rate: float = 1e-3
    """Peak learning rate."""

    mask_task: bool = True
    """Whether to predict masked tokens. Tables 7 and 16, contrastive only: --no-mask-task --no-contrastive-masked."""
    alpha: float = 1.0
    """α of Eq. 6 (Table 16): the loss is mask + alpha · temperature · contrastive; 0 = mask-then-predict only."""
    temperature: float = 0.2
    """γ: what Eq. 4 divides similarities by, and Eq. 6 multiplies the contrastive loss by."""
    mask: Literal["block", "iid"] = "block"
    """Blocks (Eq. 3) or independent tokens (Eq. 2)."""
    n_blocks: int | None = None
    """Blocks per clip; None = the number whose expected ratio is closest to 15 % (Table 2)."""
    mask_ratio: float = 0.145
    """Share of masked tokens of an iid mask (Tables 8, 15)."""
    noisy_mask: bool = False
    """BERT's 80/10/10 replacement instead of MASK everywhere (section G.3)."""
    masks: Literal["auto", "host", "device"] = "auto"
    """Where masks are drawn, the same bits: by the host ahead of the step, or in the step; auto = in the step on CUDA."""
    contrastive_masked: bool = True
    """Contrast the masked clips of mask-then-predict; --no-contrastive-masked contrasts intact clips instead (Table 12)."""
    d_max: float | None = None
    """Largest distance of a video's two clips in seconds (Table 10); None = anywhere."""

    held_out: float = 0.0625
    """Videos kept for the evaluation at the end: a share of them (below 1; at most 2048 videos) or their number (1 or more)."""
    eval_batches: int = 16
    """Batches of contrastive_videos held-out videos in the evaluation."""

    probe_every: int = 0
    """With labels: updates between looks at the features of held-out videos (k-NN accuracy, effective rank); 0 = none."""

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.probe_every < 2**31, "probe_every", self.probe_every, "0 or more updates, below 2³¹")
        given = self.labels if self.probe_every else "something"
        require(given is not None, "probe_every", self.probe_every, "left out without labels, or given with --labels FILE")
        unused = self.labels is not None and not self.probe_every
        require(
            not unused, "probe_every", 0, f"1 or more updates with labels={self.labels}, which pre-training only probes with"
        )
        for name in ("continue_from", "init_from"):
            self.require_path(name)
        for name in ("contrastive_videos", "micro_batch", "eval_batches"):
            if getattr(self, name) is not None:
                counts(name, getattr(self, name), MOST_VIDEOS)
        positive("learning_rate", self.learning_rate, SMALLEST, LARGEST)
        positive("temperature", self.temperature, 1e-6, 1e6)
        not_negative("alpha", self.alpha, "0 or a positive number", 1e6)
        require(0 <= self.mask_ratio < 1, "mask_ratio", self.mask_ratio, "in [0, 1)")
        self.require_held_out(self.held_out, "the run ends with an evaluation")
        require(self.mask != "iid" or self.mask_ratio > 0, "mask_ratio", self.mask_ratio, "above 0 for an iid mask")
        if self.d_max is not None:
            not_negative("d_max", self.d_max, "0 or more seconds", 1e9)
        tokens = math.prod(self.model.grid)
        require(self.n_blocks is None or self.n_blocks >= 1, "n_blocks", self.n_blocks, "at least 1")
        require((self.n_blocks or 1) <= tokens, "n_blocks", self.n_blocks, f"at most the {tokens} tokens of a clip")
        schedule = self.schedule_epochs
        fits = schedule is None or self.epochs <= schedule < math.inf
        ratio = "" if self.steps is None else " (with --steps only the ratio of the two counts: give both)"
        require(fits, "schedule_epochs", schedule, f"at least epochs={self.epochs}, and finite{ratio}")
        require((schedule or 1) <= 1e6, "schedule_epochs", schedule, "at most 1e+06")
        require(
            self.alpha == 0 or self.contrastive_videos >= 2,
            "contrastive_videos",
            self.contrastive_videos,
            f"at least 2 with alpha={self.alpha}, since each video is contrasted with the others (or --alpha 0)",
        )
        require(
            self.init_from is None or self.continue_from is None,
            "init_from",
            self.init_from,
            f"left out with continue_from={self.continue_from}, which brings its own weights (or add --continue-from None)",
        )
        require(
            self.mask_task or self.alpha > 0,
            "alpha",
            self.alpha,
            "above 0 without the mask task, or nothing is learned",
        )

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate
