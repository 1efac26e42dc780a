"""Kernels of csrc/*.cu on a CPU: tests/emulator/NAME.cpp, which runs their threads as fibers, compiled as a library."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EMULATOR = Path(__file__).parent / "emulator"


def build(name: str, folder: Path) -> ctypes.CDLL:
    """tests/emulator/`name`.cpp as a library, whose file goes into `folder`. Skips where it cannot be compiled."""
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no g++, or none whose C library has the emulator's ucontext.h")
    library = folder / f"{name}.so"
    # no _FORTIFY_SOURCE: it takes a fiber's longjmp for an attack
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, f"-I{EMULATOR}", str(EMULATOR / f"{name}.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def extent(x: torch.Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    return x.element_size() * (1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)))
