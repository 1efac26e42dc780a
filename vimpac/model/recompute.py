"""Selective activation checkpointing: what is cheap to recompute is not stored for the backward pass.

A transformer layer stores, for each row of width C: the inputs of its norms (1 C each), q, k and v (3 C per block) and the
input of GELU (4 C). The outputs of norms, GELU and attention are inputs of a linear layer, which would also store them (1, 4
and 1 C). Here autograd stores how to recompute them instead: one pointwise or attention kernel each, no matrix product.

    with recomputing():
        x = recomputed(norm, s)     # norm(s); an op that saves x for its backward pass stores `s` and `norm` instead
        y = linear(x)

Under autocast a linear layer stores a half-precision copy of its input, which is not recomputed. That costs half of the
memory saved.

torch.utils.checkpoint runs a whole region a second time. Here each tensor is recomputed separately, when backward needs it.

In compiled code `recomputed` is a plain call. There torch's partitioner decides what to store, by a minimum cut of the graph.
Its default heuristics store what they consider expensive, including the outputs of norms and GELU. `recomputing` turns those
heuristics off for code that is compiled inside it: elementwise results are recomputed inside the kernels that use them;
products, attention and random numbers are stored.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch._functorch.config as partitioner
from torch import Tensor

_recipes: ContextVar[dict[int, tuple[weakref.ref, Callable[[], Tensor]]] | None] = ContextVar("recipes", default=None)
# The heuristics by which the partitioner stores elementwise results: if they are used far from where they were computed, or by
# a matrix product of the backward pass. Not every version of torch has both.
HEURISTICS = ("ban_recompute_used_far_apart", "ban_recompute_materialized_backward")
WITHOUT_HEURISTICS = {name: False for name in HEURISTICS if hasattr(partitioner, name)}


@contextmanager
def recomputing(enabled: bool = True) -> Iterator[None]:
    """Inside, backward stores neither tensors from `recomputed` nor elementwise results of code that is first compiled there.

    Does nothing without gradients, or while compiling.
    """
    if not enabled or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield
        return
    token = _recipes.set({})
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack), partitioner.patch(WITHOUT_HEURISTICS):
            yield
    finally:
        _recipes.reset(token)


def recomputed(function: Callable[..., Tensor], *arguments) -> Tensor:
    """function(*arguments), recomputed in backward instead of stored. It must give the same bits on every call."""
    out = function(*arguments)
    recipes = None if torch.compiler.is_compiling() else _recipes.get()
    if recipes is not None and out.requires_grad:
        kept = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        recipes[out.data_ptr()] = weakref.ref(out), lambda: function(*kept)
    return out


class _Recipe:
    """How to recompute a tensor of this shape."""

    def __init__(self, make: Callable[[], Tensor], shape: torch.Size):
        self.make, self.shape = make, shape


def _pack(x: Tensor) -> Tensor | _Recipe:
    recipe = (_recipes.get() or {}).get(x.data_ptr())
    original = None if recipe is None else recipe[0]()  # None if freed: another tensor may be at its address now
    same = original is not None and original.numel() == x.numel() and original.dtype == x.dtype and x.is_contiguous()
    if recipe is None or not same:
        return x.detach()  # x may be the output of the op that saves it: a reference cycle until a backward pass
    return _Recipe(recipe[1], x.shape)


def _unpack(kept: Tensor | _Recipe) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    with torch.no_grad():
        return kept.make().view(kept.shape)
