"""What every training run is configured with, whatever its task."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from vimpac.config.checks import LARGEST, MOST_VIDEOS, SMALLEST, counts, not_negative, positive, require
from vimpac.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options that all tasks share."""

    data: str | None = None
    """Token store made by `vimpac tokenize`."""
    synthetic_videos: int = 0
    """Without data: generate this many labelled videos, tokenize them and train on them; 0 = data is required."""
    output: str = "runs/pretrain"
    """Run folder: config.json, metrics.jsonl, checkpoints, model.safetensors, tokenizer.safetensors, curves.png."""
    resume: bool = False
    """Continue from the last checkpoint in the run folder."""
    seed: int = 0
    """Seed of initialisation, data order, masks and dropout, 0 or more."""
    fps: float | None = None
    """Frames a second of a clip: every k-th frame of the store, whose rate it must divide. None = the store's rate."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model (Tables 3, 13, 14). The vocabulary size is taken from the store."""

    steps: int | None = None
    """Updates until the run ends; None = as many as epochs takes."""
    epochs: float = 10.0
    """Passes over the training videos until the run ends, if steps is None."""
    batch_size: int = 1024
    """Videos per update, over all processes and accumulated micro-steps."""

    warmup: float = 0.1
    """Share of the schedule in which the learning rate rises linearly; after it, it falls linearly to 0."""
    weight_decay: float = 0.05
    """AdamW's, on everything but biases and norm weights."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's."""
    eps: float = 1e-8
    """AdamW's."""
    grad_clip: float = 1.0
    """Largest gradient norm."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast dtype; auto = bf16 on a GPU that has it, else fp32. (A CPU with AMX is also faster in bf16.)"""
    residual: Literal["auto", "fp32"] = "auto"
    """Dtype of the states between layers; auto = the autocast dtype with post-norm ([CLS] stays fp32), fp32 with pre-norm."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of embedding, layers and token head; auto = on a CUDA device that can."""
    graphs: bool = False
    """Replay the micro-step as a CUDA graph: for steps so short that launching kernels takes most of their time."""
    activation_checkpointing: Literal["none", "selective", "full"] = "selective"
    """What backward recomputes: nothing; whatever is cheap compared with matrix products; every layer (a third slower)."""
    shard_optimizer: bool = False
    """ZeRO-1: each process keeps and updates its part of AdamW's state, instead of all of it."""

    log_every: int = 10
    """Updates between reading the metrics (with several GPUs also checking for signals). Each update gets a line anyway."""
    save_every: int = 500
    """Updates between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    profile: bool = False
    """Profile a few updates near the start: RUN/profile.json (a trace for Perfetto) and a table of where the time goes."""

    def __post_init__(self):
        for name in ("data", "output"):
            self.require_path(name)
        counts("batch_size", self.batch_size, MOST_VIDEOS)
        for name in ("steps", "log_every", "save_every", "keep_checkpoints"):
            if getattr(self, name) is not None:
                counts(name, getattr(self, name), 2**31 - 1)
        for name in ("eps", "grad_clip"):
            positive(name, getattr(self, name), SMALLEST, LARGEST)
        positive("epochs", self.epochs, 1e-6, 1e6)
        if self.fps is not None:
            positive("fps", self.fps, 1e-3, 1e3)
        not_negative("weight_decay", self.weight_decay, "0 or a positive number", 1e6)
        require(0 <= self.warmup < 1, "warmup", self.warmup, "in [0, 1)")
        require(0 <= self.seed < 2**63 - 1, "seed", self.seed, "0 to 2⁶³ - 2")
        require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two numbers in [0, 1)")
        not_negative("synthetic_videos", self.synthetic_videos, "0 or more", MOST_VIDEOS)
        frames, height, width = self.model.grid
        square = bool(self.data or not self.synthetic_videos) or height == width
        require(square, "model.grid", self.model.grid, f"square to generate videos for it, such as {frames} {height} {height}")

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at the end of the warm-up, which each task chooses."""
        raise NotImplementedError

    def require_path(self, name: str) -> None:
        require(getattr(self, name) != "", name, "''", "a path (is a shell variable unset?)")

    def require_held_out(self, held_out: float, why: str) -> None:
        """held_out: a share of the videos, or their number."""
        require(held_out > 0, "held_out", held_out, f"above 0, since {why}")
        whole = held_out < 1 or (held_out < 2**31 and math.isfinite(held_out) and float(held_out).is_integer())
        require(whole, "held_out", held_out, "a share below 1, or a number of videos")
