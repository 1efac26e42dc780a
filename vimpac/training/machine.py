"""What this machine can do of what a configuration asks for; a clear refusal of the rest, before anything is written."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vimpac.config import TrainConfig
from vimpac.errors import InputError
from vimpac.layouts import parse_layout
from vimpac.ops.dispatch import MISSING, Call, check_environment, choose, named_by_environment, pick, why_not
from vimpac.ops.libraries import LIBRARIES
from vimpac.ops.samples import sample_calls
from vimpac.processes.limits import memory_left
from vimpac.processes.ranks import read_place
from vimpac.training.distributed import BatchPlan, World

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h's
# torch raises a RuntimeError with one of these; the last for more bytes than there are numbers for.
NO_CPU_MEMORY = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")


def resolve_precision(precision: str, device: torch.device) -> str:
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def check_options(config: TrainConfig, plan: BatchPlan, world: World) -> None:
    """Raises InputError for options that do not go together here."""
    check_backends(config, world.device)
    check_memory(config, plan, world)
    if not config.graphs:
        return
    if world.device.type != "cuda":
        raise InputError(f"--graphs needs a CUDA device, training runs on {world.device}: leave it out")
    if world.size > 1:
        raise InputError(f"--graphs replays the step of one process, {world.size} take part: leave it out")
    if plan.parts > 1:
        whole = plan.micro_batch * plan.parts
        raise InputError(
            f"--graphs needs contrastive_videos={config.contrastive_videos} in one pass, micro_batch={plan.micro_batch} makes "
            f"{plan.parts} parts: leave it out, or --micro-batch {whole}"
        )
    if config.activation_checkpointing == "full" and config.model.dropout > 0:
        raise InputError(
            f"--graphs cannot draw dropout={config.model.dropout} twice, as --activation-checkpointing full does: use "
            "--activation-checkpointing selective, or leave out --graphs"
        )


def check_backends(config: TrainConfig, device: torch.device) -> None:
    """Raises InputError where VIMPAC_BACKEND or VIMPAC_CPU_ISA names what there is not, or what cannot run the model here."""
    try:
        check_environment()
        if not os.environ.get("VIMPAC_BACKEND"):  # without a name each op takes one that can
            return
        for op, preference, call in device_calls(config, device):
            choose(op, None, preference, *call)
    except ValueError as error:
        raise InputError(str(error)) from None


def device_calls(config: TrainConfig, device: torch.device) -> list[Call]:
    """What training asks of the ops there; its masks are drawn where the batch is, whatever is named."""
    dtype = PRECISIONS[resolve_precision(config.precision, device)] or torch.float32
    return [call for call in sample_calls(config.model, device, dtype).values() if call[0] != "block_mask"]


def plain_ops(config: TrainConfig, device: torch.device) -> str | None:
    """A sentence on the ops that run as their definitions here for want of a kernel, and why; None where there are none."""
    found: dict[str, list[str]] = {}  # reasons → ops
    for op, preference, call in device_calls(config, device):
        if named_by_environment(op) is None and pick(op, None, preference, *call)[0] == "reference":
            reasons = "; ".join(why_not(op, "triton" if device.type == "cuda" else "cpu", *call))
            found.setdefault(reasons, []).append(op)
    if found:
        MISSING.update(LIBRARIES)  # said here: no warning of the ops, too
    slow = "run as plain PyTorch, several times slower than their kernels"
    return "; ".join(f"{', '.join(dict.fromkeys(ops))} {slow}: {reasons}" for reasons, ops in found.items()) or None


def check_memory(config: TrainConfig, plan: BatchPlan, world: World) -> None:
    """Raises InputError where a forward pass keeps more than this machine has available: on a CPU nothing would say so, the
    system ends the process."""
    if world.device.type != "cpu" or (available := available_memory()) is None:
        return
    processes = read_place().local_size
    a_video = activation_bytes(config) * processes
    needed = a_video * plan.micro_batch
    if needed <= available:
        return
    fits = next((m for m in range(int(available / a_video), 0, -1) if plan.micro_batch % m == 0), None)
    sizes = f"keep some {needed / 2**30:.0f} GiB of activations for backward, {available / 2**30:.0f} GiB are available here"
    ways = "; ".join(ways_to_save(config, plan, world.device, fits))
    raise InputError(f"{plan.micro_batch} videos a forward pass {sizes}: {ways}")


def activation_bytes(config: TrainConfig) -> int:
    """What the layers keep of a video (two clips) for the backward pass, by the table of docs/performance.md."""
    model = config.model
    blocks = len(parse_layout(model.layout, model.heads))
    selective = 5 * blocks + 6 if config.compile == "on" else 4 * blocks + 5
    units = {"none": 6 * blocks + 10, "selective": selective, "full": 1}[config.activation_checkpointing]
    row = model.width * (4 if config.precision in ("auto", "fp32") else 2)
    return 2 * (math.prod(model.grid) + 1) * row * units * model.layers


def available_memory() -> int | None:
    """Bytes that this process may still take, where Linux says so: of the machine, and of its control groups."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        return None
    return min([*free, *([] if (left := memory_left()) is None else [left])], default=None)


def resolve_compile(choice: str, device: torch.device) -> tuple[bool, str | None]:
    """Whether to compile, and why not where "auto" would have. Raises InputError where "on" cannot be had."""
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return False, None
    reason = why_not_compile(device)
    if reason is not None and choice == "on":
        raise InputError(f"--compile on: torch.compile does not work here ({reason}): mend that, or --compile off")
    return reason is None, reason


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed for the next update, instead of giving it back and asking for zeroed pages again.

    For training on a CPU: an update allocates gigabytes of states, each page of which the kernel would clear anew. The process
    then stays as large as its largest update. Returns whether the C library could be asked (glibc).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, 2**31 - 1) == 1 for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))


def why_not_compile(device: torch.device) -> str | None:
    """Compiles a small function; the reason where that fails, None where it works."""
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # a missing compiler, header, driver or triton: nearly anything
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return None


@contextmanager
def explained_model_size(device: torch.device) -> Iterator[None]:
    """Memory that runs out while the model is made becomes an InputError: nothing but a smaller model helps."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(words in str(error) for words in NO_CPU_MEMORY):
            raise
        said = str(error).strip().splitlines()[0]
        what = f"the model does not fit into the memory of {device}"
        raise InputError(f"{what}: make its --model.… smaller. torch said: {said}") from None


@contextmanager
def explained_memory(config: TrainConfig, plan: BatchPlan, device: torch.device) -> Iterator[None]:
    """Out of memory becomes an InputError that says what to change, with the numbers."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(_advice(config, plan, device, error)) from None
    except RuntimeError as error:
        if not any(words in str(error) for words in NO_CPU_MEMORY):
            raise
        raise InputError(_advice(config, plan, device, error)) from None


def _advice(config: TrainConfig, plan: BatchPlan, device: torch.device, error: Exception) -> str:
    said = str(error).strip().splitlines()[0].split(". GPU")[0]
    numbers = ""
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        numbers = f" ({peak / 2**30:.1f} GiB of {total / 2**30:.1f} GiB were in use)"
    half = next((m for m in range(plan.micro_batch // 2, 0, -1) if plan.micro_batch % m == 0), None)
    what = f"out of memory on {device} with {plan.micro_batch} videos a forward pass{numbers}"
    return f"{what}: {'; '.join(ways_to_save(config, plan, device, half))}. torch said: {said}"


def ways_to_save(config: TrainConfig, plan: BatchPlan, device: torch.device, smaller: int | None) -> list[str]:
    """What to change for a forward pass to take less memory. smaller: a micro-batch to suggest."""
    ways = []
    if config.activation_checkpointing != "full":
        ways.append("--activation-checkpointing full keeps one activation a layer and takes a third more time")
    if smaller is not None:
        two = f", the {config.contrastive_videos} contrasted videos then go through the model twice" if config.alpha > 0 else ""
        ways.append(f"--micro-batch {smaller} takes about {smaller / plan.micro_batch:.0%} of the activations' memory{two}")
    if device.type == "cuda" and config.precision == "fp32":
        ways.append("--precision bf16 halves most activations")
    return ways or ["a smaller model or grid, there is nothing left to split"]
