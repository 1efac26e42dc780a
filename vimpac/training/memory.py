"""How much memory a forward pass takes, and what to change if it is too much."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from vimpac.config import ModelConfig, RunConfig
from vimpac.errors import InputError
from vimpac.layouts import parse_layout
from vimpac.processes.limits import memory_left
from vimpac.processes.ranks import read_place

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h's
# torch raises a RuntimeError with one of these; the last if the number of bytes overflows.
NO_CPU_MEMORY = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")


@dataclass(frozen=True)
class MemoryUse:
    """What determines how much memory a forward pass takes. videos: per forward pass in each process."""

    model: ModelConfig
    videos: int
    clips: int
    """Of a video in a forward pass."""
    contrasted: int
    """Videos of a contrastive batch, 0 without the contrastive task."""
    activation_checkpointing: str
    precision: str
    compiled: bool
    device: torch.device

    @classmethod
    def of_run(cls, config: RunConfig, videos: int, clips: int, contrasted: int, device: torch.device) -> MemoryUse:
        options = config.activation_checkpointing, config.precision, config.compile == "on"
        return cls(config.model, videos, clips, contrasted, *options, device)

    def activation_bytes(self) -> int:
        """Bytes that the layers store per video for backward, by the table of docs/performance.md."""
        model = self.model
        blocks = len(parse_layout(model.layout, model.heads))
        selective = 5 * blocks + 5 if self.compiled else 4 * blocks + 5
        sums = 0 if model.norm == "post" else blocks + 1
        units = {"none": 5 * blocks + 9 + sums, "selective": selective + sums, "full": 1}[self.activation_checkpointing]
        row = model.width * (4 if self.precision in ("auto", "fp32") else 2)
        return self.clips * (math.prod(model.grid) + 1) * row * units * model.layers

    def check_fits(self) -> None:
        """Raises InputError if a forward pass on a CPU stores more than this machine has available.

        Otherwise the system would kill the process without a message.
        """
        if self.device.type != "cpu" or (available := available_memory()) is None:
            return
        a_video = self.activation_bytes() * read_place().local_size
        needed = a_video * self.videos
        if needed <= available:
            return
        fits = next((m for m in range(int(available / a_video), 0, -1) if self.videos % m == 0), None)
        sizes = (
            f"need about {needed / 2**30:.0f} GiB of activations for backward, {available / 2**30:.0f} GiB are available here"
        )
        raise InputError(f"{self.videos} videos per forward pass {sizes}: {'; '.join(self.ways_to_save(fits))}")

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """If memory runs out, raise an InputError that says what to change, with the numbers."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(self._advice(error)) from None

    def _advice(self, error: Exception) -> str:
        said = str(error).strip().splitlines()[0].split(". GPU")[0]
        numbers = ""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            total = torch.cuda.get_device_properties(self.device).total_memory
            numbers = f" ({peak / 2**30:.1f} GiB of {total / 2**30:.1f} GiB were in use)"
        half = next((m for m in range(self.videos // 2, 0, -1) if self.videos % m == 0), None)
        what = f"out of memory on {self.device} with {self.videos} videos per forward pass{numbers}"
        return f"{what}: {'; '.join(self.ways_to_save(half))}. torch said: {said}"

    def ways_to_save(self, smaller: int | None) -> list[str]:
        """What to change so that a forward pass takes less memory. smaller: a micro-batch to suggest."""
        ways = []
        if self.activation_checkpointing != "full":
            ways.append("--activation-checkpointing full stores one activation per layer and takes a third more time")
        if smaller is not None:
            twice = f"; gradient caching then runs the {self.contrasted} contrasted videos twice" if self.contrasted else ""
            ways.append(f"--micro-batch {smaller} takes about {smaller / self.videos:.0%} of the activations' memory{twice}")
        if self.device.type == "cuda" and self.precision == "fp32":
            ways.append("--precision bf16 halves most activations")
        return ways or ["use a smaller model or grid: there is nothing left to split"]


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_CPU_MEMORY)


@contextmanager
def explaining_batch(clips: int) -> Iterator[None]:
    """If memory runs out in forward passes of so many clips, raise an InputError that says what to change."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).strip().splitlines()[0]
        raise InputError(
            f"out of memory with --batch {clips} clips a forward pass: give fewer, such as --batch {max(1, clips // 4)}. torch "
            f"said: {said}"
        ) from None


@contextmanager
def explaining_model_size(device: torch.device) -> Iterator[None]:
    """If memory runs out while the model is built, raise an InputError: only a smaller model helps."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).strip().splitlines()[0]
        what = f"the model does not fit into the memory of {device}"
        raise InputError(f"{what}: make its --model.… smaller. torch said: {said}") from None


def available_memory() -> int | None:
    """Bytes that this process may still allocate on Linux, by the machine and by its control groups; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        return None
    return min([*free, *([] if (left := memory_left()) is None else [left])], default=None)


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for the next update instead of returning it to the system.

    For training on a CPU: an update allocates gigabytes, and the system would have to clear every page each time. The process
    then stays as large as its largest update. Returns whether the C library supports this (glibc does).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, 2**31 - 1) == 1 for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))
