"""Selective activation checkpointing: what is cheap to recompute is not stored for the backward pass.

A transformer layer stores, for each row of width C: the inputs of its norms (1 C each), q, k and v (3 C a block) and the
input of GELU (4 C). The outputs of norms, GELU and attention are inputs of a linear layer, which would store them as well (1,
4 and 1 C). Here autograd stores how to recompute them instead: one pointwise or attention kernel each, no matrix product.

    with recomputing():
        x = recomputed(norm, s)     # norm(s); an op that saves x for its backward pass stores `s` and `norm` instead
        y = linear(x)

Under autocast a linear layer stores its input's copy in half precision, which is not recomputed. That costs half of the
memory saved.

Unlike torch.utils.checkpoint there is no region to run again: each tensor is recomputed on its own, when backward needs it.

In compiled code `recomputed` is a plain call. What to store is the choice of torch's partitioner, a minimum cut of the graph.
Its default heuristics store what they consider expensive, outputs of norms and GELU among them. What is compiled inside
`recomputing` is cut without those heuristics: elementwise results are recomputed inside the kernels that use them; products,
attention and random numbers are stored.
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
# a matrix product of the backward pass. Heuristics that a version of torch does not have are left out.
RULES = ("ban_recompute_used_far_apart", "ban_recompute_materialized_backward")
NO_RULES = {name: False for name in RULES if hasattr(partitioner, name)}


@contextmanager
def recomputing(enabled: bool = True) -> Iterator[None]:
    """Inside, tensors from `recomputed` are not stored for backward, nor elementwise results of what is compiled there first.

    Does nothing without gradients, or while compiling.
    """
    if not enabled or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield
        return
    token = _recipes.set({})
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack), partitioner.patch(NO_RULES):
            yield
    finally:
        _recipes.reset(token)


def recomputed(function: Callable[..., Tensor], *arguments) -> Tensor:
    """function(*arguments), which must give the same bits on every call."""
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
    original = None if recipe is None else recipe[0]()  # None: freed, its memory may have become another tensor's
    same = original is not None and original.numel() == x.numel() and original.dtype == x.dtype and x.is_contiguous()
    if recipe is None or not same:
        return x.detach()  # x itself may be the output of the op that keeps it: a cycle that only a backward pass would end
    return _Recipe(recipe[1], x.shape)


def _unpack(kept: Tensor | _Recipe) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    with torch.no_grad():
        return kept.make().view(kept.shape)
