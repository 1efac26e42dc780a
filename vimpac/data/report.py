"""Progress over videos on standard error: a bar in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time

REPORT_SECONDS = 10.0


class Report:
    """Counts finished videos. Call it once for each, with the number of `unit` (such as frames) that it had.

    total: videos in all; shown: False prints nothing.
    """

    def __init__(self, total: int, title: str, unit: str, shown: bool = True):
        self._title, self._total, self._unit, self._shown = title, total, unit, shown
        self._done, self._count = 0, 0
        self._started = self._reported = time.monotonic()
        self._bar = self._open_bar() if shown and total else None

    def _open_bar(self):
        """rich's progress bar; None if standard error is not a terminal."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        if not console.is_terminal:
            return None
        rate = TextColumn("{task.fields[rate]:.1f} " + f"{self._unit}/s")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
        bar = Progress(*columns, console=console)
        self._task = bar.add_task(self._title, total=self._total, rate=0.0)
        bar.start()
        return bar

    def __call__(self, count: int) -> None:
        self._done += 1
        self._count += count
        now = time.monotonic()
        rate = self._count / max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=rate)
        elif self._shown and now - self._reported >= REPORT_SECONDS:
            self._reported = now
            line = f"{self._title}: {self._done} of {self._total} videos, {rate:.1f} {self._unit}/s"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
