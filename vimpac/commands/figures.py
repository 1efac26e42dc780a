"""`vimpac figures`: pictures of what a run wrote, one subcommand per figure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from vimpac.console import say

DESCRIPTION = """Draw a figure: `vimpac figures --help` lists them.

Example: vimpac figures curves runs/mine"""


def curves(run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]) -> None:
    """Draw RUN/curves.png from RUN/metrics.jsonl: losses, accuracies, learning rate, gradient norm and speed.

    Training draws it as well, at the end. Needs matplotlib.

    Example: vimpac figures curves runs/mine

    Args:
        run: Folder of a training run.
    """
    from vimpac.figures.curves import plot_curves

    plot_curves(run / "metrics.jsonl", run / "curves.png")
    say(run / "curves.png")


FIGURES: dict[str, Callable[..., None]] = {"curves": curves}
