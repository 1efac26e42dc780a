"""A confusion matrix as a picture: shares of each class's videos, in the order of the rows that it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vimpac.console import printable
from vimpac.figures.canvas import new_figure, write_png

MOST_NAMES = 60
"""Names along an axis; of more classes every second, third … has its name."""
MOST_COUNTED = 20
"""Classes up to which each cell holds its number of videos."""
LONGEST = 28  # characters of a name that are shown
DARK = 0.3  # share from which the text in a cell is white
MARKS = (0, 0.02, 0.1, 0.25, 0.5, 0.75, 1)  # shares at the colour bar


def plot_confusion(confusion: np.ndarray, names: Sequence[str], title: str, out_png: Path) -> None:
    """Draws how many videos of the class of each row were taken for the class of each column.

    confusion: int [K, K], at least 1 class. names: of the K classes. The picture replaces `out_png` once it is complete.
    Raises InputError if matplotlib is missing, or the folder.
    """
    size = len(names)
    side = min(14.0, max(3.5, 0.24 * size + 1))
    room = 0.075 * min(LONGEST, max(map(len, names)))  # inches for the names
    figure = new_figure(side + room + 1.2, side + room + 0.5, "a confusion matrix")
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    # The colour follows the square root, or the few confusions of many classes could not be seen.
    image = axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1, aspect="equal", interpolation="nearest")
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("class")
    _name_axes(axes, names)
    if size <= MOST_COUNTED:
        _count_cells(axes, confusion, shares)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.set_ticks(np.sqrt(MARKS), labels=[f"{mark:g}" for mark in MARKS])
    bar.set_label("share of the class's videos", fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, color="#AAAAAA")
    write_png(figure, Path(out_png), dpi=120)


def _name_axes(axes, names: Sequence[str]) -> None:
    every = math.ceil(len(names) / MOST_NAMES)
    places = range(0, len(names), every)
    shown = [shortened(names[i]) for i in places]
    axes.set_xticks(places, shown, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(places, shown, fontsize=8, parse_math=False)
    axes.tick_params(length=2, color="#AAAAAA")
    axes.spines[:].set_color("#AAAAAA")
    if every > 1:
        axes.set_xlabel(f"predicted class (of {len(names)} classes, one in {every} is named)")


def _count_cells(axes, confusion: np.ndarray, shares: np.ndarray) -> None:
    for (row, column), videos in np.ndenumerate(confusion):
        if videos:
            colour = "white" if shares[row, column] >= DARK else "#333333"
            axes.text(column, row, str(videos), color=colour, fontsize=8, ha="center", va="center")


def shortened(name: str, longest: int = LONGEST) -> str:
    """The name in one line; of a longer one the beginning and the end, since names may differ in either."""
    shown = printable(name)
    end = longest // 3
    return shown if len(shown) <= longest else f"{shown[: longest - end - 1]}…{shown[-end:]}"
