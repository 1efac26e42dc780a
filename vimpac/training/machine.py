"""What this machine can do of what a configuration asks for; a clear refusal of the rest, before anything is written."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vimpac.config import TrainConfig
from vimpac.errors import InputError
from vimpac.training.distributed import BatchPlan, World

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h's
NO_CPU_MEMORY = ("can't allocate memory", "not enough memory")  # torch raises a RuntimeError with either


def resolve_precision(precision: str, device: torch.device) -> str:
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def check_options(config: TrainConfig, plan: BatchPlan, world: World) -> None:
    """Raises InputError for options that do not go together here."""
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
    ways = []
    if config.activation_checkpointing != "full":
        ways.append("--activation-checkpointing full keeps one activation a layer and takes a third more time")
    half = next((m for m in range(plan.micro_batch // 2, 0, -1) if plan.micro_batch % m == 0), None)
    if half is not None:
        two = f", the {config.contrastive_videos} contrasted videos then go through the model twice" if config.alpha > 0 else ""
        ways.append(f"--micro-batch {half} takes about {half / plan.micro_batch:.0%} of the activations' memory{two}")
    if device.type == "cuda" and config.precision == "fp32":
        ways.append("--precision bf16 halves most activations")
    if not ways:
        ways.append("a smaller model or grid, there is nothing left to split")
    what = f"out of memory on {device} with {plan.micro_batch} videos a forward pass{numbers}"
    return f"{what}: {'; '.join(ways)}. torch said: {said}"
