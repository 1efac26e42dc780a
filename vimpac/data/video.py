"""Video file → square frames: PyAV decoding, frames chosen by timestamp, resize and crop views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CROPS = ("center", "top-left", "bottom-right")


@dataclass(frozen=True)
class View:
    """One way to see a video: shorter side resized to `resize` × frame size, a square crop, maybe mirrored."""

    resize: float = 1.0
    crop: Literal["center", "top-left", "bottom-right"] = "center"
    flip: bool = False


def view_set(name: Literal["center", "train", "test"], flip: bool = True) -> tuple[View, ...]:
    """The views of Table 4. train: 2 sizes × 3 crops × 2 flips (6 views without `flip`), test: 3 crops, center: one."""
    if name == "center":
        return (View(),)
    if name == "test":
        return tuple(View(crop=crop) for crop in CROPS)
    flips = (False, True) if flip else (False,)
    return tuple(View(resize, crop, mirrored) for resize in (1.0, 1.25) for crop in CROPS for mirrored in flips)
