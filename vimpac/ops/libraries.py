"""The compiled libraries of csrc/: where they are, how they are loaded, what they hold, and why one cannot be used."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

LIBRARIES = {"cpu": "_ops_cpu.so", "cuda": "_ops_cuda.so"}  # backend → file, built by setup.py
CPU_ISAS = ("portable", "avx2", "avx512")  # the values of VIMPAC_CPU_ISA
REINSTALL = "reinstall vimpac beside this torch, with pip's --no-build-isolation, and restart Python"


def library_path(backend: str) -> Path:
    """Where a library is: in the package, or in the folder that VIMPAC_LIBRARIES names (a sanitized build)."""
    return _library_path(os.environ.get("VIMPAC_LIBRARIES"), backend)


@functools.cache  # every call of an op needs it, and the file system takes 40 µs to answer
def _library_path(folder: str | None, backend: str) -> Path:
    return (Path(folder).resolve() if folder else Path(__file__).resolve().parents[1]) / LIBRARIES[backend]


@functools.cache
def _load(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """A library of torch ops, or why it cannot be loaded."""
    if not path.exists():
        return None, f"vimpac was installed without {path.name}, {_why_not_built(path)}: {REINSTALL}"
    if "cuda" in path.name and torch.version.cuda is None:
        return None, f"torch {torch.__version__} has no CUDA"
    try:
        torch.ops.load_library(path)
        return ctypes.CDLL(str(path)), ""
    except OSError as error:
        built = "which was built for another machine or torch"
        return None, f"torch {torch.__version__} cannot load {path}, {built} ({error}): {REINSTALL}"


def _why_not_built(path: Path) -> str:
    """What setup.py wrote beside a library that did not compile, else what building it takes."""
    try:
        return f"which did not compile ({path.with_suffix('.txt').read_text().strip()})"
    except FileNotFoundError:
        return "which takes a C++ compiler, ninja" + (" and nvcc" if "cuda" in path.name else "")


def library(backend: str) -> ctypes.CDLL | None:
    """A library, for its C functions, or None if it cannot be loaded."""
    return _load(library_path(backend))[0]


def library_error(backend: str) -> str:
    """Load a library; "" or the sentence that says why it cannot be loaded."""
    return _load(library_path(backend))[1]


def library_facts(backend: str) -> str:
    """What a loaded library holds: the instruction set in use, or the GPU architectures."""
    function = getattr(library(backend), {"cpu": "vimpac_cpu_isa", "cuda": "vimpac_cuda_archs"}[backend])
    function.restype = ctypes.c_char_p
    return function().decode()


def cpu_isa_error() -> str:
    """Why the CPU library cannot run with the instruction set that VIMPAC_CPU_ISA names; "" if it can."""
    named = os.environ.get("VIMPAC_CPU_ISA", "")
    if named and named not in CPU_ISAS:
        shown = named if named.isprintable() else repr(named)
        return f"VIMPAC_CPU_ISA={shown} is not one of {', '.join(CPU_ISAS)}: name one of these, or unset it"
    if not named or library("cpu") is None or (facts := library_facts("cpu")) in CPU_ISAS:
        return ""
    return f"{facts[facts.index('VIMPAC_CPU_ISA') :]}: name that or less, or unset it"  # the library's own sentence


def device_error(backend: str, device: torch.device) -> str:
    """Why a library's kernels cannot run on a device; "" if they can."""
    if device.type != backend:
        return f"tensors are on {device}, it needs {'the CPU' if backend == 'cpu' else 'a CUDA device'}"
    if error := library_error(backend) or (cpu_isa_error() if backend == "cpu" else ""):
        return error
    return _gpu_error(device) if backend == "cuda" else ""


# --- GPUs and drivers -------------------------------------------------------------------------------------------------


def _gpu_error(device: torch.device) -> str:
    """Why the CUDA library cannot run on a GPU: no code for it, or a driver that is too old for its CUDA runtime.

    The library holds machine code for some architectures, and PTX for newer ones.
    """
    archs = library_facts("cuda").split()
    major, minor = torch.cuda.get_device_capability(device)
    has_code = any(runs_on(arch, major, minor) for arch in archs)
    if not has_code and (major, minor) < capability(archs[-1]):
        built_for = f"_ops_cuda.so was built for {', '.join(archs)} (VIMPAC_CUDA_ARCHS)"
        return f"compute capability {major}.{minor}, {built_for}: {REINSTALL}"
    return driver_error(has_code)


def driver_error(has_code: bool) -> str:
    """Why this machine's NVIDIA driver is too old for the CUDA library, "" if it is not. It does not initialise CUDA.

    has_code: whether the library has machine code for the GPU. Machine code runs with any driver for the same major version of
    CUDA or a newer one. PTX, which the driver compiles, needs one that is at least as new as the nvcc that made it.
    """
    runtime, driver = runtime_version(), driver_version()
    if runtime is None:
        return f"{library_path('cuda')} is older than this vimpac: {REINSTALL}"
    if driver is None or driver >= runtime or (has_code and driver[0] >= runtime[0]):
        return ""
    versions = f"the NVIDIA driver is for CUDA {driver[0]}.{driver[1]}, _ops_cuda.so was built with {runtime[0]}.{runtime[1]}"
    return f"{versions}: update the driver, or reinstall vimpac with the nvcc of CUDA {driver[0]}.{driver[1]} or older"


def runtime_version() -> tuple[int, int] | None:
    """Version of the CUDA runtime in the loaded CUDA library; None for a library that does not say it."""
    function = getattr(library("cuda"), "vimpac_cuda_runtime", None)
    return None if function is None else _version(function())


@functools.cache
def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that this machine's driver is for; None if there is no driver."""
    number = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return None if failed else _version(number.value)


def _version(number: int) -> tuple[int, int]:
    """CUDA's version number: 12080 → (12, 8)."""
    return number // 1000, number % 1000 // 10


def capability(arch: str) -> tuple[int, int]:
    """Compute capability of an architecture's name: "90a" → (9, 0)."""
    number = int(arch.rstrip("af"))
    return number // 10, number % 10


def runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether machine code for an architecture runs on a GPU.

    It does on the same major version with the same minor version or a newer one; with "a" on exactly that architecture.
    """
    of = capability(arch)
    return (major, minor) == of if arch.endswith("a") else major == of[0] and minor >= of[1]
