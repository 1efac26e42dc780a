"""Numbers of the released program: tests/golden/README.md says what they are."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

TOLERANCE = 1e-5  # of a tensor's norm: float32 rounding (6e-8) over a few hundred additions and eight layers


def load(name):
    return load_file(Path(__file__).parent / "golden" / f"{name}.safetensors")


def released_weights(golden):
    return {name[2:]: x for name, x in golden.items() if name.startswith("w/")}


def distance(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b.reshape(a.shape)).norm() / b.norm())
