"""Checks of the values of a configuration."""

from __future__ import annotations

import math

from vimpac.errors import InputError

MOST_VIDEOS = 1_000_000
# The range of float32 with a margin: a smaller eps would become 0, a larger learning rate infinite.
SMALLEST, LARGEST = 1e-30, 1e30


def counts(name: str, value: int, most: int) -> None:
    require(value >= 1, name, value, "at least 1")
    require(value <= most, name, value, f"at most {most}")


def positive(name: str, value: float, least: float, most: float) -> None:
    require(0 < value < math.inf, name, value, "a positive number")
    require(least <= value <= most, name, value, f"from {least:g} to {most:g}")


def not_negative(name: str, value: float, kind: str, most: float) -> None:
    require(0 <= value < math.inf, name, value, kind)
    require(value <= most, name, value, f"at most {most:g}")


def require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise InputError(f"{name} must be {expected}, got {value}")
