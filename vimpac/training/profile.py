"""Profiles updates: a trace, a table of where the time goes, and how often the host waited for the device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]  # as torch's own examples do
from torch.profiler import ProfilerActivity, profile, record_function

from vimpac.distributed import World
from vimpac.training.progress import Progress

WARM_UP, UPDATES = 3, 3  # updates before the profile, and in it
UPDATE = "update"
PARTS = ("data", "first pass", "forward", "backward", "optimizer")
# Events for which the host waits for the device: calls of the CUDA runtime or, on a CPU, the ops that would make them.
WAITS_CUDA = frozenset({"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"})
NOT_WAITING = ("data", "aten::_fused_adamw_")
WAITS_CPU = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique_dim"})


class UpdateProfile:
    """Profiles a few updates of a run. Writes RUN/profile.json, a trace for Perfetto or chrome://tracing."""

    def __init__(self, run: Path, world: World):
        self.path, self.world = run / "profile.json", world
        self.seen, self.profiler, self.updates = 0, None, 0

    @contextmanager
    def update(self, left: int) -> Iterator[None]:
        """Context of each update. left: updates left, including this one."""
        self.seen += 1
        warm = min(WARM_UP, max(0, left - 1)) if self.seen == 1 else WARM_UP
        if self.world.is_first and self.profiler is None and (self.seen > warm or left == 1):
            self.profiler = start()
        with record_function(UPDATE):
            yield
        if self.profiler is not None and self.updates < UPDATES:
            self.updates += 1
            if self.updates == UPDATES or left == 1:
                synchronize(self.world.device)
                self.profiler.stop()

    def report(self, progress: Progress) -> None:
        """Write the trace and print the table."""
        if self.profiler is None:
            return
        self.path.unlink(missing_ok=True)
        self.profiler.export_chrome_trace(str(self.path))
        progress.note(f"profile of {self.updates} updates; {self.path} has the trace")
        for line in table(self.profiler, self.updates, self.world.device):
            progress.note(line)


def start() -> profile:
    """A running profiler of the host and of the CUDA device, if there is one."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or the profiler prints two lines
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    profiler = profile(activities=activities)
    profiler.start()
    return profiler


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(profiler: profile, updates: int, device: torch.device, operations: int = 12) -> list[str]:
    """Lines with the parts of an update, the slowest ops, and how often the host waited. Times are milliseconds per update."""
    averages, on_gpu = profiler.key_averages(), device.type == "cuda"
    host = {event.key: event for event in averages if event.device_type == DeviceType.CPU}  # spans have a device event as well
    lines = [f"{'part':28} {'host ms':>9}" + (f" {'device ms':>9}" if on_gpu else "")]
    for name in PARTS:
        if name in host:
            event = host[name]
            cells = [event.cpu_time_total, *([event.device_time_total] if on_gpu else [])]
            lines.append(f"{name:28} " + " ".join(f"{x / 1e3 / updates:9.2f}" for x in cells))

    def own(event) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    spans = (UPDATE, *PARTS)
    where = DeviceType.CUDA if on_gpu else DeviceType.CPU  # or an op would count on the host and as its kernels
    ranked = sorted((x for x in averages if x.device_type == where and x.key not in spans), key=own, reverse=True)
    total = sum(own(event) for event in ranked) or 1.0
    lines.append(f"{'operation':60} {'ms':>9} {'share':>6} {'calls':>6}")
    for event in ranked[:operations]:
        cells = f"{own(event) / 1e3 / updates:9.2f} {own(event) / total:6.1%} {event.count / updates:6.0f}"
        lines.append(f"{event.key[:60]:60} {cells}")
    if on_gpu:
        peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        lines.append(f"peak memory {peak / 2**30:.2f} GiB of {total / 2**30:.1f}")
    names = waits(profiler, device)
    lines.append(
        f"the host waited for the device {len(names) / updates:g} times per update"
        + (f": {sorted(set(names))}" if names else "")
    )
    return lines


def waits(profiler: profile, device: torch.device) -> list[str]:
    """Names of the events for which the host waited for the device, except while it prepared batches, which is host work.

    On a CPU: the ops that would wait if their tensors were on a device. (Except inside AdamW's fused op, which
    reads its step count on the host only if it runs there.)
    """
    waiting = WAITS_CUDA if device.type == "cuda" else WAITS_CPU
    events = [event for event in profiler.events() or () if event.device_type == DeviceType.CPU]
    # Only inside updates: the profiler itself waits at its end.
    updates = [event.time_range for event in events if event.name == UPDATE]
    return [
        event.name
        for event in events
        if event.name in waiting
        and not _inside(event, NOT_WAITING)
        and (not updates or any(span.start <= event.time_range.start <= span.end for span in updates))
    ]


def _inside(event, parts: Sequence[str]) -> bool:
    while event is not None:
        if event.name in parts:
            return True
        event = event.cpu_parent
    return False
