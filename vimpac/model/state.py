"""Checks that a state dict fits a model, before anything is allocated by the sizes that a file claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vimpac.config import ModelConfig
from vimpac.errors import InputError
from vimpac.layouts import parse_layout
from vimpac.meta import without_memory

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32)  # batch norm's num_batches_tracked
M = TypeVar("M", bound=nn.Module)


def empty_model(make: Callable[[ModelConfig], M], config: ModelConfig, tensors: int) -> M:
    """`make(config)` without memory for its parameters. Raises InputError if the model has more than `tensors` tensors.

    So a file whose header claims a huge model costs no more than the file's own size.
    """
    blocks = config.layers * len(parse_layout(config.layout, config.heads)) + config.head_layers
    if blocks > tensors:
        shape = f"layers={config.layers}, layout={config.layout[:60]!r} and head_layers={config.head_layers}"
        raise InputError(f"a model with {shape} has at least {blocks} tensors, got {tensors}")
    try:
        with without_memory():
            return make(config)
    except RuntimeError as error:  # the product of two sizes overflows 64 bits
        raise InputError(f"no model has the sizes of {config}: {str(error).splitlines()[0]}") from None


def check_state(state: Mapping[Any, Any], own: Mapping[str, Tensor]) -> None:
    """Raises InputError unless `state` fits `own`, a model's state dict: the same names, and no tensor is a `misfit`."""
    missing, unknown = sorted(own.keys() - state.keys()), sorted(map(str, state.keys() - own.keys()))
    if missing or unknown:
        names = f"missing {missing[:5]}, unexpected {[name[:80] for name in unknown[:5]]}"
        raise InputError(f"{names} ({len(missing)} and {len(unknown)} in all)")
    wrong = [f"{name} {reason}" for name, x in state.items() if (reason := misfit(x, own[name].dtype, own[name].shape))]
    if wrong:
        raise InputError("; ".join(wrong[:5]) + f" ({len(wrong)} in all)")


def misfit(x: Any, dtype: torch.dtype, shape: tuple[int, ...] | None) -> str | None:
    """The reason why x cannot be loaded into a tensor of this dtype and shape (None = any); None if it can.

    x must be a plain tensor in memory. Floating-point values must be finite: one NaN makes every output NaN.
    """
    if type(x) not in (Tensor, nn.Parameter):
        return f"is a {type(x).__name__}, expected a tensor"
    if x.is_nested or x.layout != torch.strided or x.is_quantized or x.device.type == "meta":
        return "is a tensor without plain values, expected one in memory"
    if x.dtype not in (kinds := FLOATS if dtype.is_floating_point else INTEGERS):
        return f"is of {x.dtype}, expected {kinds[0]}"
    if shape is not None and x.shape != shape:
        return f"has a size mismatch: {tuple(x.shape)} instead of {tuple(shape)}"
    if x.untyped_storage().nbytes() < x.numel() * x.element_size():
        return f"of {tuple(x.shape)} has fewer values than its shape says"
    if dtype.is_floating_point and x.numel() and not torch.isfinite(torch.stack(x.detach().aminmax())).all():
        return "holds values that are not finite"
    return None
