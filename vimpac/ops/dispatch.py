"""Which implementation of an op runs: the only dispatch in the project.

An op module registers its implementations once, each with a function that says why it cannot run a given call, or None:

    backend.register("info_nce", "triton", why_not=...)

`choose` then takes the first one that can run, in the order the op prefers, or the one that was asked for by name. A named
backend runs or raises with every reason; it never falls back. `VIMPAC_BACKEND=reference` names one for every op,
`VIMPAC_BACKEND=axial_attention=reference,info_nce=triton` op by op. Where nobody named one and the first to come would be in a
library that is not there, `choose` warns, once.

Compiled implementations sit behind torch ops, one overload a backend: `vimpac::axial_attention.triton`. Schema and fake
come from Python (`define`), so a backend only has to bring `implement` for that overload, or a C++ library
(`implement_library`), which is loaded at the first use.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vimpac.errors import InputError

WhyNot = Callable[..., "list[str]"]

COMPILED = ("cuda", "triton", "cpu")  # the overloads that every op defines
ANY = "any"
HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
HAS_TRITON = importlib.util.find_spec("triton") is not None
LIBRARIES = {"cpu": "_ops_cpu.so", "cuda": "_ops_cuda.so"}  # of csrc/, built by setup.py
CPU_ISAS = ("portable", "avx2", "avx512")  # that VIMPAC_CPU_ISA may name
MISSING: set[str] = set()  # libraries whose absence was said: once is enough
_LIBRARY = torch.library.Library("vimpac", "FRAGMENT")
_REGISTRY: dict[str, dict[str, WhyNot]] = {}


class MissingKernelsWarning(RuntimeWarning):
    """An op runs on a slower backend, since the library that holds its kernels is not there."""


def constant_when_compiled(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, without importing the compiler: that takes longer than torch itself does."""
    function._dynamo_marked_constant = True
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
    """Give `vimpac::NAME.triton` a function of kernels/, "module.function"; its module is imported at the first call."""
    module, function = function.split(".")

    def launch(*arguments):
        kernel = getattr(importlib.import_module(f"vimpac.kernels.{module}"), function)
        device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
        if device.type == "cuda" and device.index != torch.cuda.current_device():  # triton launches on the current one
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
    """The reason why a tensor is not of these dtypes, none if it is."""
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

    It speaks to the driver through a module that it compiles at its first launch, with a C compiler and Python's headers, and
    keeps in its cache. Before 3.8 every kernel has one of its own.
    """
    import triton
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except (RuntimeError, ImportError, AssertionError, OSError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())
        return f"triton cannot launch a kernel ({reason}): it takes a C compiler (gcc, clang or $CC) and Python's headers"
    a_module_each = [int(number) for number in triton.__version__.split(".")[:2]] < [3, 8]
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if a_module_each and triton.knobs.build.impl is None and not any(map(shutil.which, compilers)):
        return f"triton {triton.__version__} compiles a C module for every kernel and finds no {' or '.join(compilers)}"
    return ""


@constant_when_compiled
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on a CUDA device."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def implement_library(name: str, backend: str) -> None:
    """Leave `vimpac::NAME.BACKEND` to a library of csrc/, "cpu" or "cuda", which the first call loads.

    That call lands on a kernel that every device has and the library's own takes precedence over.
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


REINSTALL = "reinstall vimpac beside this torch, with pip's --no-build-isolation, and restart Python"


def library_path(backend: str) -> Path:
    """Where a library of csrc/ is: in the package, or in the folder that VIMPAC_LIBRARIES names (a sanitized build)."""
    return _library_path(os.environ.get("VIMPAC_LIBRARIES"), backend)


@functools.cache  # asked for at every call of an op, and the file system takes 40 µs to answer
def _library_path(folder: str | None, backend: str) -> Path:
    return (Path(folder).resolve() if folder else Path(__file__).resolve().parents[1]) / LIBRARIES[backend]


@functools.cache
def _load(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """A library of torch ops, or why there is none."""
    if not path.exists():
        tools = "a C++ compiler, ninja" + (" and nvcc" if "cuda" in path.name else "")
        return None, f"vimpac was installed without {path.name}, which takes {tools}: {REINSTALL}"
    if "cuda" in path.name and torch.version.cuda is None:
        return None, f"torch {torch.__version__} has no CUDA"
    try:
        torch.ops.load_library(path)
        return ctypes.CDLL(str(path)), ""
    except OSError as error:
        built = "which was built for another machine or torch"
        return None, f"torch {torch.__version__} cannot load {path}, {built} ({error}): {REINSTALL}"


def library(backend: str) -> ctypes.CDLL | None:
    """A library of csrc/ for its C functions, or None where it cannot be loaded."""
    return _load(library_path(backend))[0]


def library_error(backend: str) -> str:
    """Load a library of csrc/; "" or the sentence that says why not."""
    return _load(library_path(backend))[1]


def cpu_isa_error() -> str:
    """Why the kernels of the CPU library cannot run with the instruction set that VIMPAC_CPU_ISA names; "" if they can."""
    named = os.environ.get("VIMPAC_CPU_ISA", "")
    if named and named not in CPU_ISAS:
        shown = named if named.isprintable() else repr(named)
        return f"VIMPAC_CPU_ISA={shown} is not one of {', '.join(CPU_ISAS)}: name one of these, or unset it"
    if not named or library("cpu") is None or (facts := library_facts("cpu")) in CPU_ISAS:
        return ""
    return f"{facts[facts.index('VIMPAC_CPU_ISA') :]}: name that or less, or unset it"  # the library's own sentence


def library_facts(backend: str) -> str:
    """What a loaded library holds: the instruction set in use, or the GPU architectures."""
    function = getattr(library(backend), {"cpu": "vimpac_cpu_isa", "cuda": "vimpac_cuda_archs"}[backend])
    function.restype = ctypes.c_char_p
    return function().decode()


def why_not_library(x: torch.Tensor, backend: str, dtypes: Sequence[torch.dtype]) -> list[str]:
    """The reasons that all kernels of a library share for not running on a tensor."""
    reasons = []
    if unfit := _unfit_for_library(x.device, backend):
        reasons.append(unfit)
    return reasons + unfit_dtype(x, dtypes)


@constant_when_compiled
def _unfit_for_library(device: torch.device, backend: str) -> str:
    """Why a library's kernels cannot run on a device, "" if they can."""
    if device.type != backend:
        return f"tensors are on {device}, it needs {'the CPU' if backend == 'cpu' else 'a CUDA device'}"
    if error := library_error(backend) or (cpu_isa_error() if backend == "cpu" else ""):
        return error
    return _unfit_gpu(device) if backend == "cuda" else ""


def _unfit_gpu(device: torch.device) -> str:
    """Why the CUDA library has no code for a GPU: it holds some architectures' code and PTX for what is newer."""
    archs = library_facts("cuda").split()
    major, minor = torch.cuda.get_device_capability(device)
    if any(runs_on(arch, major, minor) for arch in archs) or (major, minor) >= capability(archs[-1]):
        return ""
    return f"compute capability {major}.{minor}, _ops_cuda.so was built for {', '.join(archs)} (VIMPAC_CUDA_ARCHS): {REINSTALL}"


def capability(arch: str) -> tuple[int, int]:
    """Compute capability of an architecture's name: "90a" → (9, 0)."""
    number = int(arch.rstrip("af"))
    return number // 10, number % 10


def runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether machine code for an architecture runs on a GPU: same major version, no newer minor; "a" on that one only."""
    of = capability(arch)
    return (major, minor) == of if arch.endswith("a") else major == of[0] and minor >= of[1]


def overload(name: str, backend: str) -> torch._ops.OpOverload:
    """The torch op that holds a backend's kernel, e.g. torch.ops.vimpac.axial_attention.triton."""
    return getattr(getattr(torch.ops.vimpac, name), backend)


def register(op: str, name: str, why_not: WhyNot) -> None:
    """Add an implementation. `why_not(*args)` gets the op's arguments and lists the reasons why it cannot run them."""
    _REGISTRY.setdefault(op, {})[name] = why_not


def names(op: str) -> list[str]:
    """The implementations of an op, those that cannot run here too."""
    return list(_REGISTRY[op])


def why_not(op: str, name: str, *args) -> list[str]:
    """The reasons why a backend cannot run `op(*args)`; none if it can."""
    return _REGISTRY[op][name](*args)


def choose(op: str, requested: str | None, preference: Sequence[str], *args) -> str:
    """Name of the backend that runs `op(*args)`.

    requested: None = what VIMPAC_BACKEND names, else the first of `preference` that can; ANY = that one whatever is named,
    for tensors that a name was not meant for.

    Raises ValueError if `requested` (or VIMPAC_BACKEND) is unknown or cannot run this call, with every reason why; or if none
    of `preference` can. Warns where a library is not there that holds a faster one.
    """
    chosen, refused = pick(op, requested, preference, *args)
    absent = [name for name in refused if name in LIBRARIES]
    if absent and not (requested == ANY and os.environ.get("VIMPAC_BACKEND")):  # somebody knows what the others run on
        _warn_of_absence(op, chosen, tuple([(name, *refused[name]) for name in absent]))
    return chosen


def pick(op: str, requested: str | None, preference: Sequence[str], *args) -> tuple[str, dict[str, list[str]]]:
    """What `choose` chooses, without its warning, and of those that come before it the reasons why they cannot run."""
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
    """Raises InputError where VIMPAC_CPU_ISA is why the kernels do not run: who names one is not given something else."""
    if (error := cpu_isa_error()) and error in reasons:
        raise InputError(error)


@constant_when_compiled
def _warn_of_absence(op: str, chosen: str, refused: tuple[tuple[str, ...], ...]) -> None:
    """Warns, once a library, where its absence is the one reason why its kernels do not run. refused: (backend, *reasons)."""
    for name, *reasons in refused:
        error = library_error(name)
        if error and reasons == [error] and name not in MISSING:
            MISSING.add(name)
            slower = f"{op} runs on backend {chosen!r}, slower than by its kernels, and so may other ops"
            warnings.warn(f"{slower}: {error}", MissingKernelsWarning, stacklevel=4)


def check_tensors(**tensors) -> None:
    """Raises TypeError for what is not a tensor, by its argument's name."""
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__module__}.{type(x).__qualname__}")


def check_numbers(**numbers) -> None:
    """Raises ValueError for tensors in place of numbers: they would get no gradient, and someone waits for their value."""
    for name, x in numbers.items():
        if isinstance(x, torch.Tensor):
            raise ValueError(f"{name} must be a number, got a tensor, which has no gradient here: give {name}.item()")


def full_precision(function: Callable) -> Callable:
    """Run a function of tensors in their own precision, inside autocast too, which would round float32 products to half."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        device = next((x.device.type for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), "meta")
        if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast, and asking raises
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


def once_differentiable(op: str) -> Callable:
    """Decorates backward(ctx, saved tensors, *upstream gradients) of an op's kernels: a derivative of it raises RuntimeError.

    The graph of a gradient is tied to the upstream gradients and to every tensor saved in ctx, so what such a gradient depends
    on must be among these, or a part without elements (`anchors`). torch's decorator of that name ties it to the upstream
    gradients alone: with a constant one, as a sum's, a second derivative would lack this op without a word.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def run(ctx, *grads):
            saved = ctx.saved_tensors
            with torch.no_grad():
                outputs = backward(ctx, saved, *grads)
            if not torch.is_grad_enabled():  # nobody asked for a graph of the gradients
                return outputs
            needs = [x for x in (*grads, *saved) if x is not None and x.requires_grad]
            found = [x for x in outputs if x is not None]
            tied = iter(_NoDerivative.apply(op, len(found), *found, *needs))
            return tuple(None if x is None else next(tied) for x in outputs)

        return run

    return decorate


class _NoDerivative(torch.autograd.Function):
    """The first `count` of some tensors; backward raises."""

    @staticmethod
    def forward(ctx, op, count, *tensors):
        ctx.op = op
        return tuple(x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx, *_grads):
        raise RuntimeError(f"{ctx.op}: its kernels have no second derivative, the definition has: use backend='reference'")


def anchors(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Parts without elements, to save in ctx where the tensors themselves need not outlive the forward pass. None of a compiled
    function's, whose backward torch refuses to differentiate anyway."""
    return [] if torch.compiler.is_compiling() else [torch.slice_copy(x, 0, 0, 0) for x in tensors]


def always(*_args) -> list[str]:
    """A `why_not` for what runs everywhere."""
    return []


def check_environment() -> None:
    """Raises ValueError where VIMPAC_BACKEND names a backend that an op does not have, or VIMPAC_CPU_ISA an instruction set
    that there is not, or not here."""
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
