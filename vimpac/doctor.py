"""What this machine offers vimpac: versions, devices, and for each op the backend it takes here and why not another one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import torch

import vimpac.ops  # noqa: F401  registers the ops
from vimpac.ops import backend as backends
from vimpac.ops.choice import order

PACKAGES = ("vimpac", "torch", "triton", "numpy", "av", "safetensors", "scikit-learn")


def report() -> str:
    """The text of `vimpac doctor`."""
    lines = ["versions", *(f"  {name:<14}{version}" for name, version in versions().items())]
    lines += ["", "extension", *(f"  {name:<14}{state}" for name, state in extension().items())]
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    lines += ["", "devices", *(f"  {device!s:<14}{describe(device)}" for device in devices)]
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            lines += ["", f"ops on {device} with {str(dtype).removeprefix('torch.')}"]
            lines += [line for op, call in calls(device, dtype).items() for line in choice(op, call)]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"  # vimpac, too, can be used from a checkout alone
    return found | {"torch": torch.__version__}  # with its CUDA, which the package's version leaves out


def extension() -> dict[str, str]:
    """Each library of csrc/: how it was built, or why it is not there."""
    states = {}
    for backend, file in backends.LIBRARIES.items():
        states[file] = backends.library_error(backend) or f"{backends.library_path(backend)}, {backends.library_facts(backend)}"
    states["_C"] = "vimpac was installed without it, which takes a C++ compiler, ninja and pybind11"
    if importlib.util.find_spec("vimpac._C"):
        try:
            from vimpac import _C
        except ImportError as error:
            return states | {"_C": f"it cannot be imported: {error}"}
        facts = _C.build()
        cuda = f", {facts['nvcc']} for {facts['cuda_archs']}" if facts["nvcc"] else ""
        states["_C"] = f"revision {facts['revision']}, {facts['compiler']}, headers of torch {facts['torch']}{cuda}"
    return states


def describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}, {properties.total_memory >> 30} GiB"


def calls(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[tuple[str, ...], tuple]]:
    """op → backends to try and a call of the pre-training's shape, as its why_not functions get it."""
    qkv = torch.zeros(1, 5, 16, 16, 3, 8, 64, dtype=dtype, device=device)
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    attention = (qkv, qkv[:, 0, 0, 0], ("H", "W"), None, 0.1, ids[0], True)
    tokens = torch.zeros(1, 5, 16, 16, dtype=torch.int64, device=device)
    mask = (tokens, ids, ids[0], 5, None, False, 8192)
    z, weight = (torch.zeros(8, 64, dtype=dtype, device=device) for _ in range(2))
    entropy = (z, weight, weight[:, 0], torch.zeros(8, dtype=torch.int64, device=device))
    every = {
        "axial_attention": attention,
        "block_mask": mask,
        "dropout_add": (z, z, 0.1, ids[0]),
        "info_nce": (z, z),
        "masked_cross_entropy": entropy,
    }
    return {op: (order(op, device.type), call) for op, call in every.items()}


def choice(op: str, call: tuple[tuple[str, ...], tuple]) -> list[str]:
    """The backend that runs, or the error of VIMPAC_BACKEND, and for each other one why it cannot, or is not chosen."""
    preference, arguments = call
    try:
        chosen = backends.choose(op, None, preference, *arguments)
        named = backends.named_by_environment(op) == chosen
    except ValueError as error:
        chosen, named = str(error), True
    lines = [f"  {op:<22}{chosen}"]
    for name in backends.names(op):
        if name != chosen:
            reasons = backends.why_not(op, name, *arguments)
            passed_over = "VIMPAC_BACKEND decides" if named else why_passed_over(name, chosen, preference)
            lines.append(f"    not {name:<16}{'; '.join(reasons) or f'can run here, but {passed_over}'}")
    return lines


def why_passed_over(name: str, chosen: str, preference: tuple[str, ...]) -> str:
    """Why a backend that could run is not the one that does, where nobody named one."""
    return f"comes after {chosen}" if name in preference else "is not in the order of backends for this call"
