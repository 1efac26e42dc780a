"""Every option of the project with its default, written once, and the paper's presets (Tables 3 and 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TokenizeConfig:
    """How `vimpac tokenize` turns videos into token ids."""

    tokenizer: Literal["patch-vq", "dalle"] = "patch-vq"
    """patch-vq: k-means over 8×8 patches, fitted on these videos. dalle: OpenAI's discrete VAE, as in the paper."""
    tokenizer_path: str | None = None
    """An already fitted tokenizer: a .safetensors file, or a store whose tokenizer to reuse. Required for dalle."""
    codes: int = 512
    """Vocabulary size of a newly fitted patch-vq, at most 8192."""
    frame_size: int = 128
    """Side of the square frames in pixels, a multiple of 8."""
    fps: float = 2.0
    """Frames kept per second of video."""
    views: Literal["center", "train", "test"] = "center"
    """center: one centre crop (pre-training). train: Table 4's 12 views (2 sizes × 3 crops × 2 flips). test: 3 crops."""
    flip: bool = True
    """Whether the train views include horizontal flips; --no-flip where left and right matter (SSV2)."""
    seed: int = 0
    """Seed of the k-means fit."""


@dataclass(frozen=True)
class SynthesizeConfig:
    """What `vimpac synthesize` draws: textured shapes moving on textured, moving backgrounds."""

    videos: int = 256
    """How many videos to write."""
    seconds: float = 8.0
    """Length of each video."""
    fps: float = 8.0
    """Frames per second of the files."""
    size: int = 96
    """Side of the square frames in pixels, even."""
    seed: int = 0
    """Seed of everything drawn: the same seed writes the same frames."""
