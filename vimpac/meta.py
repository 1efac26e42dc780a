"""Modules without memory, to compare with what a file holds before anything is allocated by what it says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_FILLS = {"normal_", "uniform_", "zero_", "fill_"}


@contextmanager
def without_memory() -> Iterator[None]:
    """Parameters made in it are on the meta device, and what would initialise them does nothing.

    On the meta device that is done in Python by modules whose import takes two seconds.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Unfilled(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            if getattr(function, "__name__", None) in _FILLS:  # a tensor's methods, and torch.nn.init's functions
                return arguments[0] if arguments else options["tensor"]
            return function(*arguments, **(options or {}))

    with torch.device("meta"), Unfilled():
        yield
