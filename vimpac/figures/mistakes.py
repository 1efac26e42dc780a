"""A contact sheet of videos that a model classified wrongly: frames of each, its class, and what the model took it for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vimpac.figures.canvas import new_figure, write_png
from vimpac.figures.confusion import shortened

COLUMNS = 2
LONGEST = 56  # characters of a line of text
GREEN, RED = "#00694C", "#B23A00"
GAP = 2  # pixels between frames


class Mistake(NamedTuple):
    """A wrong answer."""

    frames: np.ndarray  # uint8 [frames, 3, S, S], some of the video, in order
    video: str
    label: str
    prediction: str
    label_score: float
    score: float  # of the prediction


def plot_mistakes(mistakes: Sequence[Mistake], title: str, out_png: Path) -> None:
    """Draws the mistakes, at least one, in the order given, from left to right. All have the same number of frames.

    The picture replaces `out_png` once it is complete. Raises InputError if matplotlib is missing, or the folder.
    """
    columns = min(COLUMNS, len(mistakes))
    rows = math.ceil(len(mistakes) / columns)
    frames = len(mistakes[0].frames)
    width = 5.2
    strip = width / frames
    figure = new_figure(columns * width + 0.3, rows * (strip + 0.7) + 0.4, "a contact sheet")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, mistake in zip(panels, mistakes, strict=False):
        panel.imshow(film_strip(mistake.frames), interpolation="nearest")
        lines = [
            (shortened(mistake.video, LONGEST), "#333333", 0.40),
            (f"is {shortened(mistake.label)} ({mistake.label_score:.0%})", GREEN, 0.23),
            (f"taken for {shortened(mistake.prediction)} ({mistake.score:.0%})", RED, 0.06),
        ]
        panel.set_title(" \n \n ", fontsize=9)  # room for the lines
        for text, colour, height in lines:
            place = (0, 72 * height)
            panel.annotate(text, (0, 1), place, "axes fraction", "offset points", color=colour, fontsize=9, parse_math=False)
    for panel in panels:
        panel.set_axis_off()
    write_png(figure, Path(out_png), dpi=110)


def film_strip(frames: np.ndarray) -> np.ndarray:
    """uint8 [n, 3, S, S] → uint8 [S, n·S + gaps, 3], the frames side by side on white."""
    n, _, height, side = frames.shape
    strip = np.full((height, n * (side + GAP) - GAP, 3), 255, np.uint8)
    for i, frame in enumerate(frames):
        strip[:, i * (side + GAP) : i * (side + GAP) + side] = frame.transpose(1, 2, 0)
    return strip
