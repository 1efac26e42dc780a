"""The metrics of a run: RUN/metrics.jsonl, TensorBoard events, the progress line."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from vimpac import distributed
from vimpac.checkpoint import list_checkpoints
from vimpac.distributed import World
from vimpac.errors import InputError
from vimpac.files.atomic import naming, write_text
from vimpac.files.checked import check_regular
from vimpac.training.events import EventLog
from vimpac.training.progress import Progress


class MetricsLog:
    """Keeps metrics on the device until `flush` writes them: RUN/metrics.jsonl, TensorBoard, the progress line."""

    def __init__(self, run: Path, world: World, step: int, names: Sequence[str]):
        """step: the updates made before this process started. names: the task's metrics; null in a line for one that is off."""
        self.path, self.world, self.names = run / "metrics.jsonl", world, tuple(names)
        self.waiting: list[dict] = []
        self.since, self.waited = time.perf_counter(), 0.0
        self.events = None
        self.start, self.kept = step, set()  # kept: steps up to `start` that have a line
        self.dropped = 0  # lines of updates after `start`, which are recomputed
        if world.is_first:
            self._drop_lines_after(step)
            if importlib.util.find_spec("tensorboard"):
                self.events = EventLog(run / "tensorboard", step + 1)

    def add(self, metrics: dict) -> None:
        self.waiting.append(metrics)

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """What happens inside does not count as training in videos_per_second."""
        started = time.perf_counter()
        yield
        self.since += time.perf_counter() - started

    def flush(self, progress: Progress, batch_size: int, may_overflow: bool, waited: float = 0.0) -> None:
        """Write the metrics since the last call. Raises InputError if a loss or the gradient is not finite.

        may_overflow: the scaler has skipped a gradient that is not finite; its line has null.
        waited: seconds that this process has waited for batches since the run started.
        """
        names = [name for name in self.waiting[0] if isinstance(self.waiting[0][name], Tensor)]
        values = torch.stack([torch.stack([m[name].float() for name in names]) for m in self.waiting])  # [updates, names]
        values = distributed.mean_over_ranks(values, self.world).tolist()
        now = time.perf_counter()
        speed = len(self.waiting) * batch_size / (now - self.since)
        speeds = {"videos_per_second": speed, "data_wait_share": (waited - self.waited) / (now - self.since)}
        self.since, self.waited = now, waited
        lines, line, bad = [], {}, []
        for metrics, row in zip(self.waiting, values, strict=True):
            line = {"step": metrics["step"], **{name: None for name in self.names}, **metrics}
            line |= dict(zip(names, row, strict=True)) | speeds
            if may_overflow and not math.isfinite(line["grad_norm"]):
                line["grad_norm"] = None
            bad = not_finite(line)
            if bad:
                break
            lines.append(line)
        self.waiting = []
        if self.world.is_first and lines:
            self.write(lines)
            progress.update(lines[-1])
            self.note_failure(progress)
        if bad:
            kept = list_checkpoints(self.path.parent)
            raise InputError(
                f"step {line['step']}: {', '.join(bad)} is not finite, so the run stops; "
                + (f"the last checkpoint before it is {kept[-1]}" if kept else "no checkpoint was written before it")
                + ". Try a lower --learning-rate (the paper went 1e-3, 5e-4, 3e-4, … until training converged) or --precision "
                "fp32, in another --output"
            )

    def write(self, lines: list[dict]) -> None:
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        if self.events is not None:
            self.events.write(lines)

    def note_failure(self, progress: Progress) -> None:
        """Print, once, why events are no longer written."""
        if self.events is not None and self.events.failure:
            progress.note(self.events.failure)
            self.events = None

    def _drop_lines_after(self, step: int) -> None:
        """Remove the lines of updates after `step`, which a resumed run recomputes, and of the evaluation."""
        if self.path.exists():
            lines = [line for line in read_lines(self.path) if not line.get("final")]
            kept = [line for line in lines if line["step"] <= step]
            self.dropped, self.kept = len(lines) - len(kept), {line["step"] for line in kept}
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def recomputed(self) -> str | None:
        """A sentence on the updates that are recomputed because the run has no checkpoint yet; None if there are none."""
        if not self.dropped:
            return None
        return f"{self.path.parent} has no checkpoint yet: its {self.dropped} updates are recomputed"

    def gap(self, first: int | None) -> str | None:
        """A sentence on the lines missing from the log up to the step that this run resumed from; None if none is missing.

        first: the run's first update; None = the first in the log.
        """
        first = min(self.kept, default=self.start) if first is None else first
        missing = [step for step in range(first, self.start + 1) if step not in self.kept]
        if not missing or not self.world.is_first:
            return None
        return (
            f"{self.path} lacks {len(missing)} of the updates up to step {self.start}, the first of them {missing[0]}: lines "
            "were lost or damaged; the weights are intact, and the run continues"
        )

    def sync(self) -> None:
        """Flush the lines to disk, so that a checkpoint is never newer than the lines after a crash."""
        if self.world.is_first and self.path.exists():
            for path in (self.path, self.path.parent):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)


def read_lines(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; none if it does not exist.

    Damaged lines are left out: a line must be UTF-8 and a JSON object with a step.
    """
    if not path.exists():
        return []
    try:
        check_regular(path)
    except InputError as error:
        raise InputError(f"cannot read {path}: {error}; expected the metrics of a run") from None
    return [line for text in path.read_bytes().split(b"\n") if (line := _parsed(text))]


def _parsed(text: bytes) -> dict | None:
    try:
        line = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    whole = isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < 2**63
    return line if whole else None


def not_finite(line: dict) -> list[str]:
    """`name=value` for each loss and gradient norm of a line that is not finite."""
    parts = [name for name in line if name.endswith("_loss") and name != "cl_loss"]  # cl_loss is contrastive_loss, scaled
    terms = [*parts, "loss", "grad_norm"]
    return [f"{name}={line[name]}" for name in terms if line.get(name) is not None and not math.isfinite(line[name])]
