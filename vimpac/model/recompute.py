"""Selective activation checkpointing: what is cheap to compute again is not kept for the backward pass.

A transformer layer keeps, for each row of width C: the inputs of its norms (1 C each), q, k and v (3 C a block) and what goes
into GELU (4 C). What comes out of norms, GELU and attention goes into a linear layer, which would keep it too (1, 4 and 1 C);
here autograd keeps how to make it again instead: one pointwise or attention kernel each, no matrix product.

    with recomputing():
        x = remade(norm, s)         # norm(s); whoever wants to keep x for its backward pass keeps `s` and `norm` instead
        y = linear(x)

Under autocast a linear layer keeps its input's copy in half precision instead, which is not made again: that takes the place
of half the memory saved.

Unlike torch.utils.checkpoint there is no region to run again: each tensor is made again on its own, when it is asked for.
Not in compiled code, where the compiler's partitioner decides what to keep (`remade` is a plain call there).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_recipes: ContextVar[dict[int, tuple[weakref.ref, Callable[[], Tensor]]] | None] = ContextVar("recipes", default=None)


@contextmanager
def recomputing(enabled: bool = True) -> Iterator[None]:
    """Inside, tensors from `remade` are not kept for backward. Does nothing without gradients, or when compiling."""
    if not enabled or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield
        return
    token = _recipes.set({})
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _recipes.reset(token)


def remade(function: Callable[..., Tensor], *arguments) -> Tensor:
    """function(*arguments), which must give the same bits when it is called again."""
    out = function(*arguments)
    recipes = None if torch.compiler.is_compiling() else _recipes.get()
    if recipes is not None and out.requires_grad:
        kept = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        recipes[out.data_ptr()] = weakref.ref(out), lambda: function(*kept)
    return out


class _Recipe:
    """How to make a tensor of this shape again."""

    def __init__(self, make: Callable[[], Tensor], shape: torch.Size):
        self.make, self.shape = make, shape


def _pack(x: Tensor) -> Tensor | _Recipe:
    alive, make = _recipes.get().get(x.data_ptr(), (None, None))
    original = alive() if alive is not None else None  # dead: its memory may have become another tensor's
    if original is None or original.numel() != x.numel() or original.dtype != x.dtype or not x.is_contiguous():
        return x.detach()  # x itself may be the output of the op that keeps it: a cycle that only a backward pass would end
    return _Recipe(make, x.shape)


def _unpack(kept: Tensor | _Recipe) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    with torch.no_grad():
        return kept.make().view(kept.shape)
