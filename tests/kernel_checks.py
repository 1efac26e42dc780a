"""Triton kernels under test: natively on a GPU, in Triton's interpreter on a CPU, and compiled for GPUs that are not there.

The interpreter must be chosen before triton is imported, so a test file that uses it runs itself once more in a process of its
own: it has one `test_in_the_interpreter` that calls `run_in_interpreter(__file__)`, and marks its kernel tests `runs_kernels`.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
NATIVE = DEVICE.type == "cuda"
ARCHITECTURES = [80, 90, 100]
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # that one program may have (CUDA programming guide)


def runs_kernels(test):
    """Marks a test that calls Triton kernels: it runs on a GPU (marker gpu), and in the interpreter's process."""
    skip = pytest.mark.skipif(not (INTERPRETED or NATIVE), reason="no CUDA device; the interpreter's process runs it")
    return skip(pytest.mark.gpu(test))


def runs_in_interpreter(test):
    """Marks a test of what only the interpreter can show."""
    return pytest.mark.skipif(not INTERPRETED, reason="the interpreter's process runs it")(pytest.mark.gpu(test))


not_interpreted = pytest.mark.skipif(INTERPRETED, reason="the interpreter's process only runs kernels")


def run_in_interpreter(file: str, timeout: int = 600) -> None:
    """Run a test file's kernel tests on this CPU, in a process where TRITON_INTERPRET is 1; its failures are this test's."""
    if INTERPRETED:
        pytest.skip("this is the interpreter's process")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "gpu", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert ended.returncode == 0 and " passed" in ended.stdout, ended.stdout[-3000:] + ended.stderr[-2000:]


def poison_new_tensors(monkeypatch) -> None:
    """Uninitialised memory holds NaN, or the smallest integer: an element that no kernel writes is seen."""
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(function):
    def make(*args, **kwargs):
        new = function(*args, **kwargs)
        with torch.no_grad():  # the compiler makes leaves that require a gradient
            if new.dtype == torch.bool:
                return new.fill_(True)
            return new.fill_(float("nan") if new.is_floating_point() else torch.iinfo(new.dtype).min)

    return make


@dataclass
class Binary:
    """What a kernel was compiled to."""

    ptx: str
    cubin: bytes
    shared: int  # bytes of shared memory a program

    @functools.cached_property
    def usage(self) -> str:
        """cuobjdump's line of registers, stack and local memory."""
        return self._disassembled("cuobjdump", "-res-usage")

    @functools.cached_property
    def listing(self) -> str:
        """cuobjdump's text: machine code, with the instructions' bits."""
        return self._disassembled("cuobjdump", "-sass")

    def _disassembled(self, tool: str, *options: str) -> str:
        """What a program that Triton brings along says of the machine code."""
        import triton

        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}  # cuobjdump runs nvdisasm
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "kernel.cubin"
            path.write_bytes(self.cubin)
            command = [tools / tool, *options, path]
            return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def compile_kernel(function, architecture: int, signature: dict, constants: dict, launch: dict) -> Binary:
    """Compile a Triton kernel for an architecture that need not be there.

    signature: argument → Triton type ("*bf16", "i32", a tuple of types for a tuple argument); every argument in `constants`
    is a constexpr. Pointers and tuples of strides are taken as divisible by 16, as Triton finds them for aligned tensors.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else signature[name] for name in function.arg_names}
    aligned = [["tt.divisibility", 16]]
    attributes = {}
    for i, kind in enumerate(signature.values()):
        if isinstance(kind, tuple):
            attributes |= {(i, j): aligned for j in range(len(kind))}
        elif kind.startswith("*"):
            attributes[(i,)] = aligned
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"enable_fp_fusion": True, **launch})
    return Binary(binary.asm["ptx"], binary.asm["cubin"], binary.metadata.shared)


def compile_attention(
    architecture, kernel, grid, heads, width, axes, dtype, dropout_p=0.1, padded=False
) -> tuple[Binary, dict]:
    """A kernel of axial_attention for contiguous tensors of a shape, and what it is launched with."""
    from vimpac.kernels import axial_attention as kernels

    strides = torch.empty(*grid, 3, heads, width, device="meta").stride()[:3]
    const = kernels.constants((*grid, 3, heads, width), strides, axes, padded, dropout_p, True)
    function = getattr(kernels, kernel)
    types = {name: "*bf16" if dtype == torch.bfloat16 else "*fp32" for name in function.arg_names} | ATTENTION_TYPES
    launch = kernels.launch_shape(kernel == "_forward", const, dtype.itemsize)
    return compile_kernel(function, architecture, types, {"CONST": const}, launch), launch


ATTENTION_TYPES = {
    "pad": "*i1",
    "padded": "*i1",
    "seed": "*i64",
    "part": "*fp32",
    "B": "i32",
    "strides": ("i32",) * 6,
    "cls_strides": ("i32",) * 3,
}


def check_binary(binary: Binary, architecture: int, matrix: bool, wide_loads: bool = True) -> None:
    """No spill and no local memory, shared memory within the chip, 16-byte global loads, and matrix instructions."""
    assert " STACK:0 " in binary.usage and " LOCAL:0 " in binary.usage, binary.usage
    assert "LDL" not in binary.listing and "STL" not in binary.listing
    assert not uneven_sums(binary.listing)
    assert binary.shared <= SHARED_BYTES[architecture]
    if wide_loads:
        assert any(("LDG" in line or "LDGSTS" in line) and ".128" in line for line in binary.listing.splitlines())
    if matrix:
        assert any(name in binary.ptx for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma"))


def uneven_sums(sass: str) -> list[str]:
    """Machine code that adds a product to the same product of another lane in one instruction.

    That rounds the other lane's product and not its own, so lanes that should end up with the same sum differ in its last bit,
    and what a program stores, or hands on through shared memory, depends on which lane comes last.
    """
    product, sent, found = {}, {}, []  # register → factors of the product that it holds, or that it got from another lane
    pattern = r"/\*[0-9a-f]{4,}\*/ +(?:@\S+ +)?([A-Z0-9]+)\S* +([^;]*);"
    for name, text in re.findall(pattern, sass):
        words = [re.sub(r"\.reuse|[-|]", "", word.strip()) for word in text.split(",")]
        factors = frozenset(words[1:3])
        if name == "FFMA" and sent.get(words[3]) == factors:
            found.append(f"{name} {text}")
        target, exchanged = (words[1], product.get(words[2])) if name == "SHFL" else (words[0], None)
        for table in (product, sent):
            for register in [r for r, held in table.items() if r == target or target in held]:
                del table[register]
        if name == "FMUL" and target not in factors:
            product[target] = factors
        if exchanged:
            sent[target] = exchanged
    return found


def resident_programs(binary: Binary, architecture: int, warps: int) -> int:
    """Programs that a multiprocessor holds at a time, by 65,536 registers, which a warp takes in eights a lane, and by shared
    memory, of which each program costs another KiB (CUDA programming guide)."""
    registers = 8 * math.ceil(int(re.findall(r"REG:(\d+)", binary.usage)[0]) / 8)
    by_shared = (SHARED_BYTES[architecture] + 1024) // (binary.shared + 1024)
    return min(65536 // (32 * warps * registers), by_shared)


def check_all(check: Callable[..., None], jobs: Sequence[tuple]) -> None:
    """Run check(*job) for every job: a compilation takes seconds, so in as many processes as there are cores, or in this one
    where pytest-xdist has filled the cores with processes of its own.

    `check` is a function of a test module; the jobs that fail are this test's failures.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        errors = [_error(check, job) for job in jobs]
    else:
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            errors = list(pool.map(_error, [check] * len(jobs), jobs))
    failed = [f"{job}: {error!r}" for job, error in zip(jobs, errors, strict=True) if error]
    assert not failed, "\n".join(failed)


def _error(check: Callable[..., None], job: tuple) -> AssertionError | None:
    try:
        check(*job)
    except AssertionError as error:
        return error
    return None


class _AbsentGPU:
    """What Triton asks of a driver before it compiles for a launch."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return f"absent sm_{self.architecture}"  # a key of its own in each kernel's cache

    def get_current_stream(self, _device):
        return 0


@contextmanager
def launches_compile_only(architecture: int = 90):
    """Kernels launched on CPU tensors go through all that a launch does, Triton's specialisation of real arguments and the
    compilation included, and are not run. Yields the names of the kernels, launch by launch."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    names, run = [], JITFunction.run

    def compile_only(function, *args, grid, warmup, **options):
        names.append(function.__name__)
        assert options["enable_fp_fusion"], f"{function.__name__} is compiled as this Triton's default says"
        return run(function, *args, grid=grid, warmup=True, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", _AbsentGPU(architecture))
        patch.setattr(JITFunction, "run", compile_only)
        yield names


# --- bytes moved ------------------------------------------------------------------------------------------------------


class EagerBytes(TorchDispatchMode):
    """Adds up what torch's ops read and write: each op's inputs and outputs, views free."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs, outputs = ([x for x in tree_leaves(y) if isinstance(x, torch.Tensor)] for y in ((args, kwargs), out))
        if not func.is_view and "empty" not in str(func) and "detach" not in str(func):
            self.bytes += sum(_distinct_bytes(x) for x in (*inputs, *outputs))
        return out


def _distinct_bytes(x: torch.Tensor) -> int:
    """Of what an expanded tensor really holds."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else 1
    return elements * x.element_size()


@contextmanager
def count_kernel_bytes():
    """In the interpreter: a list that collects the bytes that every load and store of a kernel asks for, masked lanes free."""
    from triton.runtime.interpreter import InterpreterBuilder

    counted = []

    def counting(method):
        def run(builder, pointers, *arguments):
            mask = arguments[1] if method.__name__ == "create_masked_store" else arguments[0]
            counted.append(int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8)
            return method(builder, pointers, *arguments)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in ("create_masked_load", "create_masked_store"):
            patch.setattr(InterpreterBuilder, name, counting(getattr(InterpreterBuilder, name)))
        yield counted
