"""`vimpac doctor`: versions, devices, and for each op the backend that runs on them and why not another one."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform

import torch

from vimpac.config import ModelConfig
from vimpac.ops import dispatch, libraries
from vimpac.ops.samples import sample_calls

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
            for label, call in sample_calls(ModelConfig(), device, dtype).items():
                lines += choice(label, call)
    return "\n".join(lines)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"  # vimpac itself can be used from a checkout
    return found | {"torch": torch.__version__}  # with its CUDA version, which the package's version leaves out


def extension() -> dict[str, str]:
    """Each library of csrc/: how it was built, or why it was not."""
    states = {}
    for backend, file in libraries.LIBRARIES.items():
        states[file] = libraries.library_error(backend) or f"{libraries.library_path(backend)}, {held(backend)}"
    states["_C"] = "vimpac was installed without it, which takes a C++ compiler, ninja and pybind11"
    if importlib.util.find_spec("vimpac._C"):
        try:
            _C = importlib.import_module("vimpac._C")
        except ImportError as error:
            return states | {"_C": f"it cannot be imported: {error}"}
        facts = _C.build()
        cuda = f", {facts['nvcc']} for {facts['cuda_archs']}" if facts["nvcc"] else ""
        states["_C"] = f"revision {facts['revision']}, {facts['compiler']}, headers of torch {facts['torch']}{cuda}"
    return states


def held(backend: str) -> str:
    """What a library holds, or why what it holds cannot be used."""
    return (libraries.cpu_isa_error() if backend == "cpu" else "") or libraries.library_facts(backend)


def describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}, {properties.total_memory >> 30} GiB"


def choice(label: str, call: dispatch.Call) -> list[str]:
    """The backend that runs, or the error of VIMPAC_BACKEND, and for each other one why it cannot run or is not chosen."""
    op, preference, arguments = call
    try:
        chosen, _ = dispatch.pick(op, None, preference, *arguments)
        named = dispatch.named_by_environment(op) == chosen
    except ValueError as error:
        chosen, named = str(error), True
    lines = [f"  {label:<22}{chosen}"]
    for name in dispatch.names(op):
        if name != chosen:
            reasons = dispatch.why_not(op, name, *arguments)
            decides = "VIMPAC_CPU_ISA" if libraries.cpu_isa_error() else "VIMPAC_BACKEND"
            passed_over = f"{decides} decides" if named else why_passed_over(name, chosen, preference)
            lines.append(f"    not {name:<16}{'; '.join(reasons) or f'can run here, but {passed_over}'}")
    return lines


def why_passed_over(name: str, chosen: str, preference: tuple[str, ...]) -> str:
    """Why a backend that can run is not chosen, if none is named."""
    return f"comes after {chosen}" if name in preference else "is not in the order of backends for this call"
