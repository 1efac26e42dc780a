"""The libraries of csrc/ under test: skipped with the reason where they are not built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from vimpac.ops import libraries

CPU_ERROR = libraries.library_error("cpu")
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler, which torch.compile needs on a CPU")
needs_cpu = pytest.mark.skipif(bool(CPU_ERROR), reason=CPU_ERROR)


def needs_gpu(test):
    """Marks a test of the CUDA library on a GPU. Only a library that is not there is a reason to skip: one that cannot be
    loaded has to be seen."""
    there = torch.cuda.is_available() and libraries.library_path("cuda").exists()
    return pytest.mark.gpu(pytest.mark.skipif(not there, reason="no CUDA device, or no _ops_cuda.so")(test))


NESTED = bool(os.environ.get("VIMPAC_TESTS_NESTED"))
# Marks a test in which no instruction is another on another processor: `run_with` leaves it out.
on_any_processor = pytest.mark.skipif(NESTED, reason="is the same with any instruction set")


def run_with(file: str, timeout: int = 600, **environment: str) -> None:
    """Run a test file's tests of the CPU library in a process with another environment; its failures are this test's."""
    if NESTED:
        pytest.skip("this is such a process")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "VIMPAC_TESTS_NESTED": "1", **environment}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert ended.returncode == 0 and " passed" in ended.stdout, ended.stdout[-3000:] + ended.stderr[-2000:]


def narrower_isas() -> list[str]:
    """Instruction sets that the CPU library holds beside the one in use."""
    order = ["portable", "avx2", "avx512"]
    return [] if CPU_ERROR else order[: order.index(libraries.library_facts("cpu"))]


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a program in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True)
