"""Kernels of csrc/ compiled by nvcc, for what the compiler says of them: registers, spills, instructions. No GPU needed.

What setup.py has built is used if it is newer than every source and for all architectures. Otherwise a source is compiled here.
"""

import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ("80", "90a", "100")
FLAGS = ("-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA", "-Xcompiler", "-fPIC")


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: of $CUDA_HOME, on PATH, or of those that Triton brings along."""
    home = os.environ.get("CUDA_HOME")
    found = home and shutil.which(name, path=str(Path(home) / "bin"))
    found = found or shutil.which(name)
    if not found and (triton := _triton_tools()):
        found = shutil.which(name, path=str(triton))
    return found


def _triton_tools() -> Path | None:
    try:
        import triton
    except ImportError:
        return None
    return Path(triton.__file__).parent / "backends/nvidia/bin"


def built(source: str) -> tuple[Path, str] | None:
    """The library that setup.py has built, and what it kept of ptxas's report on csrc/`source`."""
    library, report = ROOT / "vimpac" / "_ops_cuda.so", (ROOT / "build" / "ptxas" / source).with_suffix(".txt")
    if not library.exists() or not report.exists():
        return None
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").iterdir())
    if min(library.stat().st_mtime, report.stat().st_mtime) < newest:
        return None
    text = report.read_text()
    return (library, text) if all(f"for 'sm_{a}'" in text for a in ARCHITECTURES) else None


@functools.lru_cache
def compiled(source: str) -> tuple[Path, str]:
    """Machine code of csrc/`source` for every architecture, and ptxas's report; once a session. Skips without nvcc."""
    return built(source) or compile_file(ROOT / "csrc" / source)


def compile_file(source: Path) -> tuple[Path, str]:
    nvcc = tool("nvcc")
    if not nvcc:
        pytest.skip("no nvcc on PATH or in $CUDA_HOME/bin")
    target = Path(tempfile.mkdtemp(prefix="nvcc")) / "kernels.o"
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    includes = [f"-I{Path(torch.__file__).parent / 'include'}", f"-I{ROOT / 'csrc'}"]
    command = [nvcc, *FLAGS, *includes, *codes, "-Xptxas", "-v", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target, done.stdout + done.stderr


def ptxas_report(source: str) -> str:
    """What `ptxas -v` says of csrc/`source`, for all architectures one after another."""
    return compiled(source)[1]


def kernels(report: str) -> list[dict]:
    """A report's kernels: name (mangled), architecture, registers, stack, spilled (bytes)."""
    found = []
    for part in report.split("Compiling entry function")[1:]:
        ((name, architecture),) = re.findall(r"'(\S+)' for 'sm_(\w+)'", part)
        frame = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", part)[0]
        stack, stores, loads = map(int, frame)
        registers = int(re.findall(r"Used (\d+) registers", part)[0])
        found.append(dict(name=name, architecture=architecture, registers=registers, stack=stack, spilled=stores + loads))
    return found


def output(*command: str) -> str:
    """What a program of the toolkit prints. cuobjdump runs nvdisasm, which it looks for on PATH."""
    path = f"{Path(tool('nvdisasm') or command[0]).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.lru_cache
def sass(source: str, architecture: str) -> dict[str, str]:
    """Machine code of csrc/`source`, by mangled kernel name. Skips without cuobjdump and nvdisasm."""
    names = {kernel["name"] for kernel in kernels(ptxas_report(source))}  # the library holds kernels of other sources as well
    return {name: code for name, code in listings(compiled(source)[0], architecture).items() if name in names}


def listings(binary: Path, architecture: str) -> dict[str, str]:
    """Machine code of a library or an object file, by mangled kernel name."""
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    if not cuobjdump or not nvdisasm:
        pytest.skip("no cuobjdump or nvdisasm, of the CUDA toolkit or of Triton")
    listing = output(cuobjdump, "-sass", "-arch", f"sm_{architecture}", str(binary))
    parts = re.split(r"\n\s*Function : (\S+)\n", listing)
    return dict(zip(parts[1::2], parts[2::2], strict=True))
