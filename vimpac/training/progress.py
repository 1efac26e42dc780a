"""The progress display of a training run: one live line on a terminal, plain lines at a bounded rate elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from vimpac.console import printable

SHOWN = {  # key of the metrics: its label, its format
    "loss": ("loss", "6.3f"),
    "mask_loss": ("mask", "6.3f"),
    "contrastive_loss": ("contrastive", "6.3f"),
    "mask_accuracy": ("mask accuracy", "5.3f"),
    "knn_accuracy": ("k-NN accuracy", "5.3f"),
    "accuracy": ("accuracy", "5.3f"),
    "validation_top1": ("validation", "5.3f"),
    "videos_per_second": ("videos/s", "7.1f"),
}
NARROW = {
    **SHOWN,
    "contrastive_loss": ("contr.", "6.3f"),
    "mask_accuracy": ("accuracy", "5.3f"),
    "videos_per_second": ("videos/s", ".1f"),
}
DROPPED = ("contrastive_loss", "mask_loss", "videos_per_second", "mask_accuracy", "knn_accuracy", "accuracy", "validation_top1")
LINE_SECONDS = 30.0  # without a terminal: a line this often, and one for each 1 / LINE_SHARE of the run
LINE_SHARE = 20
REFRESH_SECONDS = 0.1  # on a terminal: redraw at most this often, so that the display never slows training
BAR_WIDTH = 20
BAR_FROM = 120  # columns; a narrower terminal has no bar, only the numbers


class Progress:
    """Shows the metrics of a run of `total_steps` steps that starts or resumes after `start_step`.

    Use it as a context manager, and enable it on the first rank only. stream: None = standard error. clock: returns seconds.
    There is no thread: `update` redraws the line.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        from rich.console import Console

        self.total_steps, self.start_step, self.enabled, self.clock = total_steps, start_step, enabled, clock
        self.console = Console(file=stream or sys.stderr, highlight=False)
        self.is_live = enabled and self.console.is_terminal and not self.console.is_dumb_terminal
        self.live = None
        self.started = self.shown_at = clock()
        self.shown_step: int | None = None
        self.latest: dict | None = None

    def __enter__(self) -> Progress:
        self.started = self.clock()
        if self.is_live:
            from rich.live import Live

            self.live = Live(console=self.console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self.live.start()
        return self

    def __exit__(self, *exception) -> None:
        self._finish()

    def update(self, metrics: dict) -> None:
        """Show a line of metrics.jsonl: `step` and any of the values. Missing values and None are left out."""
        if not self.enabled:
            return
        self.latest = metrics
        if self._is_due(metrics["step"]):
            self._show(metrics)

    def within(self, step: int, done: int, micro_steps: int) -> None:
        """Print how many micro-steps of update `step` are done, if nothing was printed for LINE_SECONDS."""
        if self.enabled and done < micro_steps and self.clock() - self.shown_at >= LINE_SECONDS:
            self.shown_at = self.clock()
            self._print(f"step {step}/{self.total_steps}: {done} of {micro_steps} micro-steps")

    def note(self, text: str) -> None:
        """Print a message, above the live line if there is one."""
        if self.enabled:
            self._print(text)

    def summary(self, values: dict) -> None:
        """End the display and print the values with their names. None, True and False are left out."""
        if not self.enabled:
            return
        self._finish()
        rows = [(name.replace("_", " "), _format(value)) for name, value in values.items() if _is_value(value)]
        if self.is_live:
            self.console.print(_table(rows))
            return
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            self._print(f"{name:<{width}}  {value}")

    def _is_due(self, step: int) -> bool:
        if self.shown_step is None:
            return True
        waited = self.clock() - self.shown_at
        if self.is_live:
            return waited >= REFRESH_SECONDS
        share = step * LINE_SHARE // self.total_steps > self.shown_step * LINE_SHARE // self.total_steps
        return share or waited >= LINE_SECONDS

    def _show(self, metrics: dict) -> None:
        self.shown_at, self.shown_step = self.clock(), metrics["step"]
        if self.live:
            self.live.update(self._bar(metrics), refresh=True)
        elif not self.is_live:
            self._print(self._line(metrics))

    def _finish(self) -> None:
        """Show the last metrics unless they were shown, so that an interrupted run shows its last step."""
        if self.latest and self.latest["step"] != self.shown_step:
            self._show(self.latest)
        if self.live:
            self.live.stop()
            self.live = None

    def _print(self, text: str) -> None:
        # soft_wrap: a long line stays one line for grep. markup off: text in brackets is text.
        self.console.print(printable(text), markup=False, soft_wrap=True)
        self.console.file.flush()

    def _line(self, metrics: dict) -> str:
        step, total = metrics["step"], self.total_steps
        times = [f"{name} {_duration(seconds)}" for name, seconds in self._times(step).items()]
        return "  ".join([f"step {step:>{len(str(total))}}/{total}", *self._fields(metrics), *times])

    def _bar(self, metrics: dict):
        """The live line. On a narrow terminal it has shorter labels, then fewer values."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        step, total = metrics["step"], self.total_steps
        times = " < ".join(_duration(seconds) for seconds in self._times(step).values())
        start = [f"{step:>{len(str(total))}}/{total}", times]
        line = "  ".join([*start, *self._fields(metrics)])
        narrow = self.console.width < BAR_FROM
        if narrow and len(line) > self.console.width:
            line = self._narrow(start, metrics)
        text = Text(line, no_wrap=True, overflow="ellipsis")
        if narrow:
            return text
        grid = Table.grid(padding=(0, 1))
        grid.add_row(ProgressBar(total=total, completed=step, width=BAR_WIDTH), text)
        return grid

    def _narrow(self, start: list[str], metrics: dict) -> str:
        line = ""
        for dropped in range(len(DROPPED) + 1):
            shown = {key: form for key, form in NARROW.items() if key not in DROPPED[:dropped]}
            line = "  ".join([*start, *self._fields(metrics, shown)])
            if len(line) <= self.console.width:
                break
        return line

    def _fields(self, metrics: dict, shown: dict[str, tuple[str, str]] = SHOWN) -> list[str]:
        return [f"{label} {metrics[key]:{form}}" for key, (label, form) in shown.items() if metrics.get(key) is not None]

    def _times(self, step: int) -> dict[str, float]:
        """Seconds since the start, and seconds left at the speed of this process's steps, without those before a resume."""
        elapsed = self.clock() - self.started
        done = step - self.start_step
        left = {"left": elapsed / done * (self.total_steps - step)} if done > 0 else {}
        return {"elapsed": elapsed, **left}


def _is_value(value) -> bool:
    return value is not None and not isinstance(value, bool)


def _format(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"  # no days: the metrics need the space


def _table(rows: list[tuple[str, str]]):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    return table
