"""Options of `vimpac tokenize` and `vimpac synthesize`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vimpac.config.checks import MOST_VIDEOS
from vimpac.errors import InputError

MOST_PIXELS = 100_000_000  # of a generated video


@dataclass(frozen=True)
class TokenizeConfig:
    """How `vimpac tokenize` turns videos into token ids."""

    tokenizer: Literal["patch-vq", "dalle"] = "patch-vq"
    """patch-vq: k-means over 8×8 patches, fitted on these videos. dalle: OpenAI's discrete VAE, as in the paper."""
    tokenizer_path: str | None = None
    """An already fitted tokenizer: a .safetensors file, or a store whose tokenizer to reuse. Required for dalle."""
    codes: int = 512
    """Vocabulary size of a newly fitted patch-vq, 2 to 8192; fewer if the patches are too much alike."""
    frame_size: int = 128
    """Side of the square frames in pixels, a multiple of 8, at most 4096."""
    fps: float = 2.0
    """Frames kept per second of video, 0.001 to 1000."""
    views: Literal["center", "train", "test"] = "center"
    """center: one centre crop (pre-training). train: Table 4's 12 views (2 sizes × 3 crops × 2 flips). test: 3 crops."""
    flip: bool = True
    """Whether the train views include horizontal flips; --no-flip where left and right matter (SSV2)."""
    seed: int = 0
    """Seed of the k-means fit, 0 to 2³² - 1."""
    video_timeout: float = 3600.0
    """Seconds that decoding and encoding one video may take; one that takes longer is listed as failed."""

    def __post_init__(self):
        size, fps, codes = self.frame_size, self.fps, self.codes
        if not 8 <= size <= 4096 or size % 8:
            raise InputError(f"frame size is {size}, expected a positive multiple of 8, such as 128, and at most 4096")
        if not 0.001 <= fps <= 1000:
            raise InputError(f"fps is {fps}, expected a positive number of frames a second, such as 2: 0.001 to 1000")
        if not 2 <= codes <= 8192:
            raise InputError(f"codes is {codes}, expected 2 to 8192")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}, expected 0 to {2**32 - 1}")
        if not 1 <= self.video_timeout <= 1e9:
            raise InputError(f"video_timeout is {self.video_timeout}, expected 1 to 10⁹ seconds")


@dataclass(frozen=True)
class SynthesizeConfig:
    """What `vimpac synthesize` draws: textured shapes moving on textured, moving backgrounds."""

    videos: int = 256
    """How many videos to write, at most 1,000,000."""
    seconds: float = 8.0
    """Length of each video."""
    fps: float = 8.0
    """Frames per second of the files, 0.1 to 240."""
    size: int = 96
    """Side of the square frames in pixels, even, 32 to 4096. A video is drawn whole: at most 100 million pixels in all."""
    seed: int = 0
    """Seed of everything drawn, below 2⁶³: the same seed draws the same frames (H.264 encoders may round them otherwise)."""

    def __post_init__(self):
        if not 1 <= self.videos <= MOST_VIDEOS:
            raise InputError(f"videos is {self.videos}, expected at least 1, and at most {MOST_VIDEOS}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}, expected 0 or more, and below 2⁶³")
        if not 0 < self.seconds < math.inf:
            raise InputError(f"seconds is {self.seconds}, expected a number above 0")
        if not 0.1 <= self.fps <= 240:
            raise InputError(f"fps is {self.fps}, expected 0.1 to 240")
        if not 32 <= self.size <= 4096 or self.size % 2:
            raise InputError(f"size is {self.size}, expected an even number of pixels, at least 32 and at most 4096")
        frames = round(self.seconds * self.fps) if self.seconds <= MOST_PIXELS else MOST_PIXELS
        if frames < 1:
            raise InputError(f"{self.seconds} seconds at {self.fps} fps hold no frame; give more seconds or a higher fps")
        if frames * self.size**2 > MOST_PIXELS:
            raise InputError(
                f"{self.seconds} seconds at {self.fps} fps and size {self.size} are more than {MOST_PIXELS} pixels, and a "
                "video is drawn whole; give fewer seconds, or a lower fps or size"
            )
