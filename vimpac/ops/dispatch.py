"""Which implementation of an op runs: the only dispatch in the project.

An op module registers its implementations once, each with a function that lists the reasons why it cannot run a given call:

    dispatch.register("info_nce", "triton", why_not)

`choose` then takes the first one that can run, in the op's order of backends, or the one that is named. A named backend runs
or raises with every reason; it never falls back. `VIMPAC_BACKEND=reference` names one for every op,
`VIMPAC_BACKEND=axial_attention=reference,info_nce=triton` op by op. If no backend is named and a faster one is in a library
that cannot be loaded, `choose` warns, once.

Compiled implementations sit behind torch ops, one overload a backend: `vimpac::axial_attention.triton`. Schema and fake
come from Python (`define`), so a backend only has to bring `implement` for that overload, or a C++ library
(`implement_library`), which is loaded at the first use.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import numbers
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from vimpac.errors import InputError
from vimpac.ops.libraries import LIBRARIES, REINSTALL, cpu_isa_error, device_error, library_error, library_path

WhyNot = Callable[..., "list[str]"]

COMPILED = ("cuda", "triton", "cpu")  # the overloads that every op defines
ANY = "any"
HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
NUMBERS = (int, float, numbers.Real, torch.SymInt, torch.SymFloat)  # Real: numpy's scalars as well
HAS_TRITON = importlib.util.find_spec("triton") is not None
MISSING: set[str] = set()  # libraries whose absence a warning has named: once is enough
_LIBRARY = torch.library.Library("vimpac", "FRAGMENT")
_REGISTRY: dict[str, dict[str, WhyNot]] = {}


class MissingKernelsWarning(RuntimeWarning):
    """An op runs on a slower backend, since the library that holds its kernels cannot be loaded."""


class Call(NamedTuple):
    """A call of an op, for checks and reports before anything runs."""

    op: str
    order: tuple[str, ...]  # backends to try, fastest first
    arguments: tuple  # as `why_not` functions get them


def order(row: Mapping[str, tuple[str, ...]], device: torch.device) -> tuple[str, ...]:
    """The backends of a row for a device, fastest first; devices other than CUDA are as a CPU.

    An op's row {"cuda": …, "cpu": …} is what benchmarks/ measured (docs/kernels.md has the numbers). No GPU has been measured
    yet. There a CUDA kernel comes before Triton's, because of what attention's machine code promises (tools/predicted.py), and
    because Triton's launches go through Python. On a CPU Triton runs in its interpreter, and only if TRITON_INTERPRET is set.
    """
    return row["cuda" if device.type == "cuda" else "cpu"]


def constant_when_compiled(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, without importing the compiler, which takes longer than importing torch."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


def define(name: str, schema: str, fake: Callable) -> None:
    """Declare `vimpac::NAME.BACKEND SCHEMA` and its fake for every compiled backend."""
    for overload in COMPILED:
        define_overload(name, overload, schema, fake)


def define_overload(name: str, overload: str, schema: str, fake: Callable) -> None:
    _LIBRARY.define(f"{name}.{overload}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"vimpac::{name}.{overload}", fake, lib=_LIBRARY)


def implement(name: str, overload: str, key: str, function: Callable) -> None:
    """Give an overload its implementation for a dispatch key such as "CUDA" or "CompositeExplicitAutograd"."""
    _LIBRARY.impl(f"{name}.{overload}", function, key)


def implement_triton(name: str, function: str) -> None:
    """Give `vimpac::NAME.triton` a function of kernels/, "module.function"; the module is imported at the first call."""
    module, function = function.split(".")

    def launch(*arguments):
        kernel = getattr(importlib.import_module(f"vimpac.kernels.{module}"), function)
        device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
        if device.type == "cuda" and device.index != torch.cuda.current_device():  # Triton launches on the current device
            with torch.cuda.device(device):
                return kernel(*arguments)
        return kernel(*arguments)

    for key in ("CUDA", "CPU"):  # on the CPU in Triton's interpreter
        implement(name, "triton", key, launch)


def why_not_triton(x: torch.Tensor, dtypes: Sequence[torch.dtype]) -> list[str]:
    """The reasons that all Triton kernels share for not running on a tensor."""
    reasons = []
    if not HAS_TRITON:
        reasons.append("triton is not installed")
    if unfit := _unfit_for_triton(x.device):
        reasons.append(unfit)
    return reasons + unfit_dtype(x, dtypes)


def unfit_dtype(x: torch.Tensor, dtypes: Sequence[torch.dtype]) -> list[str]:
    """The reason why a tensor's dtype is none of these; empty if it is one of them."""
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return [] if x.dtype in dtypes else [f"{x.dtype}, it takes {names}"]


@constant_when_compiled
def _unfit_for_triton(device: torch.device) -> str:
    """Why the Triton kernels cannot run on a device, "" if they can."""
    if device.type != "cuda":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return "" if interpreted else f"tensors are on {device}, it needs a CUDA device"
    if torch.version.hip:
        return "an AMD GPU, it is written for NVIDIA's"
    major, minor = torch.cuda.get_device_capability(device)
    return triton_error() if major >= 8 else f"compute capability {major}.{minor}, it needs 8.0"


@functools.cache
def triton_error() -> str:
    """Why Triton cannot launch kernels on this machine's GPU, "" if it can.

    Triton calls the driver through a C module. It compiles the module at its first launch, which takes a C compiler and
    Python's headers, and caches it. Before 3.8 every kernel has a module of its own.
    """
    import triton
    from triton import knobs
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except (RuntimeError, ImportError, AssertionError, OSError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())
        return f"triton cannot launch a kernel ({reason}): it takes a C compiler (gcc, clang or $CC) and Python's headers"
    a_module_each = [int(number) for number in triton.__version__.split(".")[:2]] < [3, 8]
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if a_module_each and knobs.build.impl is None and not any(map(shutil.which, compilers)):
        return f"triton {triton.__version__} compiles a C module for every kernel and finds no {' or '.join(compilers)}"
    return ""


@constant_when_compiled
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on a CUDA device."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def implement_library(name: str, backend: str) -> None:
    """Leave `vimpac::NAME.BACKEND` to a library of csrc/, "cpu" or "cuda", which the first call loads.

    That call reaches a fallback for every device. Once the library is loaded, its own kernel takes precedence.
    """

    def load_and_call(*arguments):
        if reason := library_error(backend):
            raise RuntimeError(f"vimpac::{name}.{backend} cannot run: {reason}")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"vimpac::{name}.{backend}", backend.upper()):
            raise RuntimeError(f"{library_path(backend)} is older than this vimpac, it has no {name}: {REINSTALL}")
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        if any(x.device.type != backend or x.layout != torch.strided for x in tensors):
            raise RuntimeError(f"vimpac::{name}.{backend} needs its tensors dense and on a {backend} device")
        return overload(name, backend)(*arguments)

    implement(name, backend, "CompositeExplicitAutograd", load_and_call)


def why_not_library(x: torch.Tensor, backend: str, dtypes: Sequence[torch.dtype]) -> list[str]:
    """The reasons that all kernels of a library share for not running on a tensor."""
    reasons = []
    if unfit := _unfit_for_library(x.device, backend):
        reasons.append(unfit)
    return reasons + unfit_dtype(x, dtypes)


@constant_when_compiled
def _unfit_for_library(device: torch.device, backend: str) -> str:
    """Why a library's kernels cannot run on a device, "" if they can."""
    return device_error(backend, device)


def overload(name: str, backend: str) -> torch._ops.OpOverload:
    """The torch op that holds a backend's kernel, e.g. torch.ops.vimpac.axial_attention.triton."""
    return getattr(getattr(torch.ops.vimpac, name), backend)


def register(op: str, name: str, why_not: WhyNot) -> None:
    """Add an implementation. `why_not(*args)` gets the op's arguments and lists the reasons why it cannot run them."""
    _REGISTRY.setdefault(op, {})[name] = why_not


def names(op: str) -> list[str]:
    """The implementations of an op, including those that cannot run here."""
    return list(_REGISTRY[op])


def why_not(op: str, name: str, *args) -> list[str]:
    """The reasons why a backend cannot run `op(*args)`; none if it can."""
    return _REGISTRY[op][name](*args)


def choose(op: str, requested: str | None, preference: Sequence[str], *args) -> str:
    """Name of the backend that runs `op(*args)`.

    requested: None = the backend that VIMPAC_BACKEND names, else the first of `preference` that can run the call. ANY = the
    first of `preference`, whatever VIMPAC_BACKEND names: for tensors on another device than the one it was set for.

    Raises ValueError, with every reason, if `requested` or VIMPAC_BACKEND is unknown or cannot run this call, or if nothing in
    `preference` can. Warns if a faster backend is in a library that cannot be loaded.
    """
    chosen, refused = pick(op, requested, preference, *args)
    absent = [name for name in refused if name in LIBRARIES]
    if absent and not (requested == ANY and os.environ.get("VIMPAC_BACKEND")):  # its user chose what the other ops run on
        _warn_of_absence(op, chosen, tuple([(name, *refused[name]) for name in absent]))
    return chosen


def pick(op: str, requested: str | None, preference: Sequence[str], *args) -> tuple[str, dict[str, list[str]]]:
    """What `choose` chooses, without its warning, and the reasons why the backends before it cannot run."""
    registered = _REGISTRY[op]
    named = None if requested else named_by_environment(op)
    requested = requested or named or ANY
    if requested == ANY:
        refused = {}
        for name in preference:
            if name in registered:
                if not (reasons := registered[name](*args)):
                    if "cpu" in refused:
                        _check_isa(tuple(refused["cpu"]))
                    return name, refused
                refused[name] = reasons
        found = ". ".join([f"{name}: {'; '.join(reasons)}" for name, reasons in refused.items()])
        raise ValueError(f"{op}: no backend can run this call. {found}")
    source = "" if named is None else f"VIMPAC_BACKEND={os.environ['VIMPAC_BACKEND']}: "
    if requested not in registered:
        raise ValueError(source + _unknown(op, requested))
    if reasons := registered[requested](*args):
        raise ValueError(f"{source}{op}: backend {requested!r} cannot run this call: {'; '.join(reasons)}")
    return requested, {}


@constant_when_compiled
def _check_isa(reasons: tuple[str, ...]) -> None:
    """Raises InputError if the kernels do not run because of VIMPAC_CPU_ISA: a named instruction set runs or raises."""
    if (error := cpu_isa_error()) and error in reasons:
        raise InputError(error)


@constant_when_compiled
def _warn_of_absence(op: str, chosen: str, refused: tuple[tuple[str, ...], ...]) -> None:
    """Warns, once a library, if its kernels do not run only because it cannot be loaded. refused: (backend, *reasons)."""
    for name, *reasons in refused:
        error = library_error(name)
        if error and reasons == [error] and name not in MISSING:
            MISSING.add(name)
            slower = f"{op} runs on backend {chosen!r}, slower than by its kernels, and so may other ops"
            warnings.warn(f"{slower}: {error}", MissingKernelsWarning, stacklevel=4)


def check_tensors(**tensors) -> None:
    """Raises TypeError, with the argument's name, for what is not a tensor."""
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__module__}.{type(x).__qualname__}")


def check_numbers(**values) -> None:
    """Raises TypeError, with the argument's name, for what is not a number; ValueError for a tensor.

    A tensor would get no gradient here, and reading its value waits for the device.
    """
    for name, x in values.items():
        if isinstance(x, torch.Tensor):
            raise ValueError(f"{name} must be a number, got a tensor, which has no gradient here: give {name}.item()")
        if not isinstance(x, NUMBERS):
            raise TypeError(f"{name} must be a number, got {x!r}")


def always(*_args) -> list[str]:
    """A `why_not` for an implementation that runs everywhere."""
    return []


def check_environment() -> None:
    """Raises ValueError if VIMPAC_BACKEND names a backend that an op does not have.

    Raises InputError if VIMPAC_CPU_ISA names an instruction set that is unknown, or that this processor does not have.
    """
    if error := cpu_isa_error():
        raise InputError(error)
    for op, registered in _REGISTRY.items():
        requested = named_by_environment(op)
        if requested not in (None, *registered):
            raise ValueError(f"VIMPAC_BACKEND={os.environ['VIMPAC_BACKEND']}: {_unknown(op, requested)}")


def _unknown(op: str, name: str) -> str:
    others = [f"{other}={name}" for other in sorted(_REGISTRY) if name in _REGISTRY[other]]
    some = f" (VIMPAC_BACKEND={','.join(others)} names it for the ops that have it)" if others else ""
    return f"{op}: no backend {name!r}; it has {', '.join(sorted(_REGISTRY[op]))}{some}"


def named_by_environment(op: str) -> str | None:
    named = os.environ.get("VIMPAC_BACKEND", "").strip()
    if "=" not in named:
        return named or None
    pairs = [[word.strip() for word in part.split("=")] for part in named.split(",")]
    for pair in pairs:
        if len(pair) != 2 or pair[0] not in _REGISTRY or not pair[1]:
            raise ValueError(
                f"VIMPAC_BACKEND={named!r}: {'='.join(pair)!r} is not OP=BACKEND with OP one of {', '.join(sorted(_REGISTRY))}"
            )
    return dict(pairs).get(op)
