"""The layout grammar (Table 13): which attention blocks a layer has, over which axes. Plain strings, no torch."""

from __future__ import annotations

from vimpac.errors import InputError

DIMENSIONS = {"T": 1, "H": 2, "W": 3}  # the dimension of each axis in [B, T, H, W, ...]
GRAMMAR = """\
a layout is blocks separated by ',' (run one after another); a block is axes separated by '|' (its heads are split evenly
over them); an axis is T, H or W, or several joined by 'x'. Examples: T,H|W   T,H,W   T|H|W   H|W,T   T,HxW   TxHxW"""


def axis_dimensions(axis: str) -> tuple[int, ...]:
    """Dimensions of [B, T, H, W, ...] that an axis joins: "H" → (2,), "HxW" → (2, 3). Raises InputError."""
    names = axis.split("x") if isinstance(axis, str) else []
    if not names or len(set(names)) != len(names) or not set(names) <= set(DIMENSIONS):
        raise InputError(f"bad axis {axis!r}: expected T, H, W or a product of different ones such as HxW or TxHxW")
    return tuple(sorted(DIMENSIONS[name] for name in names))


def parse_layout(layout: str, heads: int) -> tuple[tuple[str, ...], ...]:
    """Axes of each attention block: "T,H|W" → (("T",), ("H", "W")).

    Raises InputError that shows the grammar for a bad string, or when the heads cannot be split over a block's axes.
    """
    blocks = tuple(tuple(axis.strip() for axis in block.split("|")) for block in layout.split(","))
    for block in blocks:
        for axis in block:
            try:
                axis_dimensions(axis)
            except InputError as error:
                raise InputError(f"bad layout {layout!r}: {error}", GRAMMAR) from None
        if heads % len(block):
            raise InputError(
                f"layout {layout!r} cannot split {heads} heads evenly over the {len(block)} axes of {'|'.join(block)!r}: "
                f"use a multiple of {len(block)} heads"
            )
    return blocks
