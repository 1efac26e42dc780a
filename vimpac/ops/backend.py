"""Which implementation of an op runs: the only dispatch in the project.

An op module registers its implementations once, each with a function that says why it cannot run a given call, or None:

    backend.register("info_nce", "triton", why_not=...)

`choose` then takes the first one that can run, in the order the op prefers, or the one that was asked for by name. A named
backend runs or raises with every reason; it never falls back. `VIMPAC_BACKEND=reference` names one for every op,
`VIMPAC_BACKEND=axial_attention=reference,info_nce=triton` op by op.

Compiled implementations sit behind torch ops, one overload a backend: `vimpac::axial_attention.triton`. Schema and fake
come from Python (`define`), so a backend only has to bring `implement` (or its C++ twin) for that overload.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence

import torch

WhyNot = Callable[..., "list[str]"]

COMPILED = ("cuda", "triton", "cpu")  # the overloads that every op defines
HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
HAS_TRITON = importlib.util.find_spec("triton") is not None
_LIBRARY = torch.library.Library("vimpac", "FRAGMENT")
_REGISTRY: dict[str, dict[str, WhyNot]] = {}


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
    if x.dtype not in dtypes:
        reasons.append(f"{x.dtype}, it takes {', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}")
    return reasons


@torch.compiler.assume_constant_result
def _unfit_for_triton(device: torch.device) -> str:
    """Why the Triton kernels cannot run on a device, "" if they can."""
    if device.type != "cuda":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return "" if interpreted else f"tensors are on {device}, it needs a CUDA device"
    if torch.version.hip:
        return "an AMD GPU, it is written for NVIDIA's"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"compute capability {major}.{minor}, it needs 8.0"


def overload(name: str, backend: str) -> torch._ops.OpOverload:
    """The torch op that holds a backend's kernel, e.g. torch.ops.vimpac.axial_attention.triton."""
    return getattr(getattr(torch.ops.vimpac, name), backend)


def register(op: str, name: str, why_not: WhyNot) -> None:
    """Add an implementation. `why_not(*args)` gets the op's arguments and lists the reasons why it cannot run them."""
    _REGISTRY.setdefault(op, {})[name] = why_not


def names(op: str) -> list[str]:
    """The implementations of an op, those that cannot run here too."""
    return list(_REGISTRY[op])


def choose(op: str, requested: str | None, preference: Sequence[str], *args) -> str:
    """Name of the backend that runs `op(*args)`.

    Raises ValueError if `requested` (or VIMPAC_BACKEND) is unknown or cannot run this call, with every reason why.
    """
    registered = _REGISTRY[op]
    requested = requested or _from_environment(op)
    if requested is None:
        return next(name for name in preference if name in registered and not registered[name](*args))
    if requested not in registered:
        raise ValueError(f"{op}: no backend {requested!r}; it has {', '.join(sorted(registered))}")
    if reasons := registered[requested](*args):
        raise ValueError(f"{op}: backend {requested!r} cannot run this call: {'; '.join(reasons)}")
    return requested


def full_precision(function: Callable) -> Callable:
    """Run a function of tensors in their own precision, inside autocast too, which would round float32 products to half."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        device = next(x.device.type for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


def always(*_args) -> list[str]:
    """A `why_not` for what runs everywhere."""
    return []


def _from_environment(op: str) -> str | None:
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
