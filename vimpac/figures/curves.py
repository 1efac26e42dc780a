"""The training curves of a run: metrics.jsonl → curves.png. `vimpac figures curves RUN` draws them again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TypeAlias

import numpy as np

from vimpac.errors import InputError
from vimpac.figures.canvas import new_figure, write_png
from vimpac.files.checked import check_regular

# Okabe and Ito's palette: distinguishable with any colour vision, and by lightness in print.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
LOSSES = {"loss": ("total", BLUE), "mask_loss": ("mask", ORANGE), "contrastive_loss": ("contrastive", GREEN)}
MASK_ACCURACY = {"mask_accuracy": ("training", GREEN)}
BASELINES = {
    "mask_accuracy": ("held out", BLUE),
    "nearest_copy_accuracy": ("nearest copy", ORANGE),
    "most_frequent_accuracy": ("most frequent", GREY),
}
ACCURACY = {"accuracy": ("training", GREEN), "validation_top1": ("validation", BLUE)}
REFERENCES = {
    "top1": ("all clips", BLUE),
    "from_scratch_top1": ("from scratch", ORANGE),
    "chance": ("chance", GREY),
}
RETRIEVAL = {
    "retrieval_accuracy": ("model", BLUE),
    "histogram_retrieval_accuracy": ("histogram", ORANGE),
    "retrieval_chance": ("chance", GREY),
}
SINGLES = {
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "videos_per_second": "Videos per second",
}
REACH_SHARE = 50  # the running mean takes in 1/50 of the run on either side
LABEL_GAP = 0.085  # of a panel's height, between labels beside it


def plot_curves(metrics_jsonl: Path, out_png: Path) -> None:
    """Draws losses, accuracy with its baselines, retrieval, learning rate, gradient norm and speed of a run.

    Each line of the file is an object with `step` and values. Missing and null values are left out, and so are panels without
    any. The line with "final": true gives the dashed reference lines. The picture replaces `out_png` once it is complete.
    Raises InputError if there is nothing to draw, a line is not JSON, or matplotlib is missing.
    """
    series, final = read_metrics(Path(metrics_jsonl))
    write_png(_draw(series, final), Path(out_png), dpi=130)


def read_metrics(path: Path) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """For each name its finite values, float64 [N, 2] of (step, value), and the values of the final line.

    If a resumed run wrote a step again, the later line counts. An incomplete last line is ignored.
    """
    steps: dict[int, dict] = {}
    final: dict = {}
    for line in _lines(path):
        if line.get("final"):
            final = line
        elif _is_finite(line.get("step")):
            steps[line["step"]] = line
    if not steps:
        raise InputError(f"{path} has no line with a step, expected the metrics of a training run; train first")
    names = dict.fromkeys(name for line in steps.values() for name in line if name != "step")
    series = {
        name: np.array([(step, line[name]) for step, line in sorted(steps.items()) if _is_finite(line.get(name))])
        for name in names
    }
    series = {name: points for name, points in series.items() if len(points)}
    if not series:
        raise InputError(f"{path} has no values, expected numbers beside the steps, such as loss; train again")
    return series, {name: value for name, value in final.items() if _is_finite(value)}


def _lines(path: Path) -> list[dict]:
    try:
        check_regular(path)
        texts = path.read_bytes().rstrip(b"\n").split(b"\n")
    except InputError as error:
        raise InputError(f"cannot read {path}: {error}; expected the metrics.jsonl of a run") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; expected the metrics.jsonl of a run") from error
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text.decode()))
        except (ValueError, RecursionError) as error:
            if number == len(texts):  # a killed run was writing it
                break
            shown = text[:40].decode(errors="replace")
            raise InputError(f"{path} line {number} is {shown!r}, expected JSON; remove that line") from error
    return [line for line in lines if isinstance(line, dict)]


def _is_finite(value) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -sys.float_info.max <= value <= sys.float_info.max


def _draw(series: dict[str, np.ndarray], final: dict[str, float]):
    """A matplotlib Figure."""
    figure = new_figure(12, 6.2, "curves")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    panels = iter(figure.subplots(2, 3).flat)
    if any(name in series for name in LOSSES):
        _losses(next(panels), series)
    if "accuracy" in series:
        _accuracy(next(panels), "Accuracy", ACCURACY, REFERENCES, series, final)
    elif "mask_accuracy" in series or any(name in final for name in BASELINES):
        _accuracy(next(panels), "Mask accuracy", MASK_ACCURACY, BASELINES, series, final)
    if all(name in final for name in RETRIEVAL):
        _retrieval(next(panels), final)
    for name, title in SINGLES.items():
        if name in series:
            _single(next(panels), series[name], title, smooth=name != "learning_rate")  # a schedule has no noise
    for unused in panels:
        unused.set_axis_off()
    return figure


def _losses(axes, series: dict[str, np.ndarray]) -> None:
    _style(axes, "Loss")
    labels = []
    for name, (label, colour) in LOSSES.items():
        if name in series:
            end = _curve(axes, series[name], colour)
            labels.append((end, "" if "accuracy" in series else label, colour))  # fine-tuning has one loss
    axes.set_ylim(bottom=0)
    _label_beside(axes, labels)


Lines: TypeAlias = dict[str, tuple[str, str]]  # by the name of a metric its label and colour


def _accuracy(
    axes, title: str, curves: Lines, references: Lines, series: dict[str, np.ndarray], final: dict[str, float]
) -> None:
    """Curves of a run's metrics, and dashed lines at those of its evaluation."""
    _style(axes, title)
    labels = []
    for name, (label, colour) in curves.items():
        if name in series:
            labels.append((_curve(axes, series[name], colour), label, colour))
    for name, (label, colour) in references.items():
        if name in final:
            axes.axhline(final[name], color=colour, linestyle=(0, (5, 3)), linewidth=1.3)
            labels.append((final[name], f"{label} {final[name]:.3f}", colour))
    axes.set_ylim(bottom=0)
    _label_beside(axes, labels)


def _retrieval(axes, final: dict[str, float]) -> None:
    _style(axes, "Partner retrieval, held out")
    for place, (name, (label, colour)) in enumerate(RETRIEVAL.items()):
        axes.barh(place, final[name], height=0.5, color=colour)
        axes.text(final[name] + 0.02, place, f"{final[name]:.3f}", color=colour, va="center")
        axes.text(-0.03, place, label, color=colour, va="center", ha="right")
    axes.set(xlim=(0, 1.12), ylim=(2.8, -0.8), yticks=[], xticks=[0, 0.5, 1], xlabel="share of clips")
    axes.grid(False)


def _single(axes, points: np.ndarray, title: str, smooth: bool) -> None:
    _style(axes, title)
    _curve(axes, points, BLUE, smooth)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}")


def _style(axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#AAAAAA")
    axes.tick_params(color="#AAAAAA", labelcolor="#333333", labelsize=9)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)


def _curve(axes, points: np.ndarray, colour: str, smooth: bool = True) -> float:
    """Draws the values, or their running mean with the values faintly behind it. Returns the last value drawn."""
    steps, values = points.T
    reach = len(values) // REACH_SHARE if smooth else 0
    if reach:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        values = running_mean(values, reach)
    axes.plot(steps, values, color=colour, linewidth=1.8, marker="o" if len(values) == 1 else None)
    return float(values[-1])


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean over the values at most `reach` places away [N] → [N]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _label_beside(axes, labels: list[tuple[float, str, str]]) -> None:
    """Writes (height in data units, text, colour) at the right of a panel, moved apart if they would overlap."""
    bottom, top = axes.get_ylim()
    labels = sorted(labels)
    heights = spread([(height - bottom) / (top - bottom) for height, _, _ in labels], LABEL_GAP)
    for height, (_, text, colour) in zip(heights, labels, strict=True):
        axes.text(1.02, height, text, color=colour, fontsize=9, va="center", transform=axes.transAxes)


def spread(heights: list[float], gap: float) -> list[float]:
    """Moves ascending heights up just enough to be `gap` apart, then down again if they exceed 1."""
    heights = list(heights)
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    limit = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], limit)
        limit = heights[i] - gap
    return heights
