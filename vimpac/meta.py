"""Modules without memory for their weights, to compare with a file before memory is allocated for sizes that it states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_FILLS = {"normal_", "uniform_", "zero_", "fill_"}


@contextmanager
def without_memory() -> Iterator[None]:
    """Parameters created in the body are on the meta device, and initialising them does nothing.

    Otherwise torch would import its Python implementations of the initialisers for the meta device, which takes two seconds.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Unfilled(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            if getattr(function, "__name__", None) in _FILLS:  # a tensor's methods, and torch.nn.init's functions
                return arguments[0] if arguments else (options or {})["tensor"]
            return function(*arguments, **(options or {}))

    with torch.device("meta"), Unfilled():
        yield
