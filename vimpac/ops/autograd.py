"""Helpers for the ops' gradients: precision under autocast, and a refusal of second derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function of tensors in their own precision, inside autocast as well, which would round float32 products to half."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next((x.device.type for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), "meta")
        if device == "meta" or not torch.is_autocast_enabled(device):  # asking about meta raises: it has no autocast
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


def once_differentiable(op: str) -> Callable[[Callable], Callable[..., tuple]]:
    """Decorates backward(ctx, saved tensors, *upstream gradients) of an op's kernels: differentiating it raises RuntimeError.

    The graph of a gradient depends on the upstream gradients and on every tensor saved in ctx. So whatever the gradient is a
    function of must be among these, itself or as a part without elements (`anchors`). torch's decorator of that name looks at
    the upstream gradients alone. Where they are constant, as a sum's are, a second derivative would silently lack this op.
    """

    def decorate(backward: Callable) -> Callable[..., tuple]:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: torch.Tensor | None) -> tuple:
            saved = ctx.saved_tensors
            with torch.no_grad():
                outputs = backward(ctx, saved, *grads)
            if not torch.is_grad_enabled():  # no graph of the gradients is needed
                return outputs
            needs = [x for x in (*grads, *saved) if x is not None and x.requires_grad]
            found = [x for x in outputs if x is not None]
            tied = iter(_NoDerivative.apply(op, len(found), *found, *needs))
            return tuple(None if x is None else next(tied) for x in outputs)

        return run

    return decorate


class _NoDerivative(torch.autograd.Function):
    """The first `count` of some tensors; backward raises."""

    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.op = op
        return tuple(x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> None:
        raise RuntimeError(f"{ctx.op}: its kernels have no second derivative, the definition has: use backend='reference'")


def anchors(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Parts without elements, to save in ctx in place of tensors that need not outlive the forward pass.

    In a compiled function there are none: torch refuses to differentiate its backward anyway.
    """
    return [] if torch.compiler.is_compiling() else [torch.slice_copy(x, 0, 0, 0) for x in tensors]
