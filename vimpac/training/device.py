"""What a run needs of its device: precision, compilation, kernels, CUDA graphs, generators. Refuses what it cannot do."""

from __future__ import annotations

import os

import numpy as np
import torch

from vimpac.config import ModelConfig, PretrainConfig, RunConfig
from vimpac.distributed import World
from vimpac.errors import InputError
from vimpac.ops.dispatch import MISSING, Call, check_environment, choose, named_by_environment, pick, why_not
from vimpac.ops.libraries import LIBRARIES
from vimpac.ops.samples import sample_calls
from vimpac.training.plan import BatchPlan

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device: torch.device) -> str:
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision; None = float32 throughout."""
    return PRECISIONS[resolve_precision(precision, device)]


def device_masks(config: RunConfig, device: torch.device) -> bool:
    """Whether training draws masks on its device, in the step; otherwise the host draws them, or there are none."""
    choice = config.masks if isinstance(config, PretrainConfig) else "host"
    return choice == "device" or (choice == "auto" and device.type == "cuda")


def op_calls_of(model: ModelConfig, precision: str, device: torch.device, masks: bool = False) -> list[Call]:
    """The op calls of training on this device. masks: whether they are drawn there."""
    dtype = autocast_dtype(precision, device) or torch.float32
    return [call for call in sample_calls(model, device, dtype).values() if masks or call[0] != "block_mask"]


def check_backends(calls: list[Call]) -> None:
    """Raises InputError if VIMPAC_BACKEND or VIMPAC_CPU_ISA names something unknown, or something that cannot run here."""
    try:
        check_environment()
        if not os.environ.get("VIMPAC_BACKEND"):  # each op then takes a backend that can run
            return
        for op, preference, call in calls:
            choose(op, None, preference, *call)
    except ValueError as error:
        raise InputError(str(error)) from None


def plain_ops(calls: list[Call], device: torch.device) -> str | None:
    """A sentence on the ops that have no kernel here and run as plain PyTorch, and why; None if there are none."""
    found: dict[str, list[str]] = {}  # reasons → ops
    for op, preference, call in calls:
        if named_by_environment(op) is None and pick(op, None, preference, *call)[0] == "reference":
            reasons = "; ".join(why_not(op, "triton" if device.type == "cuda" else "cpu", *call))
            found.setdefault(reasons, []).append(op)
    if found:
        MISSING.update(LIBRARIES)  # reported here, so that the ops do not also warn
    slow = "run as plain PyTorch, several times slower than their kernels"
    return "; ".join(f"{', '.join(dict.fromkeys(ops))} {slow}: {reasons}" for reasons, ops in found.items()) or None


def check_graphs(config: RunConfig, plan: BatchPlan, world: World) -> None:
    """Raises InputError if --graphs cannot be used with the other options, the device or the number of processes."""
    if not config.graphs:
        return
    if world.device.type != "cuda":
        raise InputError(f"--graphs needs a CUDA device, training runs on {world.device}: leave it out")
    if world.size > 1:
        raise InputError(f"--graphs replays the step of one process, {world.size} take part: leave it out")
    if plan.parts > 1:
        whole = plan.micro_batch * plan.parts
        raise InputError(
            f"--graphs needs contrastive_videos={whole} in one pass, micro_batch={plan.micro_batch} makes "
            f"{plan.parts} parts: leave it out, or --micro-batch {whole}"
        )
    if config.activation_checkpointing == "full" and config.model.dropout > 0:
        raise InputError(
            f"--graphs cannot draw dropout={config.model.dropout} twice, as --activation-checkpointing full does: use "
            "--activation-checkpointing selective, or leave out --graphs"
        )


def resolve_compile(choice: str, device: torch.device) -> tuple[bool, str | None]:
    """Whether to compile, and why not if "auto" would have. Raises InputError if "on" does not work here."""
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return False, None
    reason = why_not_compile(device)
    if reason is not None and choice == "on":
        raise InputError(f"--compile on: torch.compile does not work here ({reason}): fix that, or --compile off")
    return reason is None, reason


def why_not_compile(device: torch.device) -> str | None:
    """Compiles a small function. Returns the reason if that fails, None if it works."""
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # a missing compiler, header, driver or triton: nearly anything
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return None


def seed_dropout(device: torch.device, seed: int, step: int, micro_step: int, rank: int) -> None:
    """Seed torch's generator of `device` as a function of the run's seed, the update, the micro-step and the rank.

    So a resumed run needs no generator states, and with gradient caching both forward passes of a batch have the same dropout.
    On a CUDA device this sets two numbers on the host: nothing waits.
    """
    words = np.random.SeedSequence([seed % 2**64, step, micro_step, rank]).generate_state(2, np.uint32)
    generator_of(device).manual_seed(int(words[0]) | int(words[1]) << 32)


def generator_of(device: torch.device) -> torch.Generator:
    """The generator that F.dropout on `device` draws from."""
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
