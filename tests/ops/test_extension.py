"""The extension as a build: which symbols it needs and exports, what is left out, and what is said about it."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from extension import CPU_ERROR, needs_compiler, needs_cpu, python
from vimpac.ops import libraries

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "vimpac"
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="no nm (binutils)")
needs_elf = pytest.mark.skipif(sys.platform != "linux", reason="a Mac's libraries have no table of dynamic symbols")


def load_setup(monkeypatch):
    """setup.py as a module that sets nothing up."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("vimpac_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup(monkeypatch):
    return load_setup(monkeypatch)


def test_what_can_be_built_here_is_built(setup):
    """If there is a compiler, the C++ kernels must not be skipped: that would hide that they do not compile."""
    missing = setup.missing_tools()
    files = {"_ops_cpu": "_ops_cpu.so", "_ops_cuda": "_ops_cuda.so"}
    for name, file in files.items():
        assert name in missing or (PACKAGE / file).exists(), f"{file} is not built: run make test, or pip install -e ."
    if "_ops_cpu" not in missing:
        assert CPU_ERROR == ""


# --- symbols ----------------------------------------------------------------------------------------------------------

STABLE = re.compile(r"(aoti_torch_|torch_)\w+")  # torch's C functions, which keep their meaning from version to version
SYSTEM = re.compile(r".*@.*|_ITM_\w+|__gmon_start__|__cxa_\w+|_Unwind_\w+|_Z\w*St\w+|_Z(nw|dl|na|da)\w+|__\w+|_ZT\w+")


def symbols(path, *flags):
    listed = subprocess.run(["nm", *flags, str(path)], capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in listed.splitlines() if line.strip()]


@needs_nm
@needs_elf
@pytest.mark.parametrize("file", libraries.LIBRARIES.values())
def test_only_the_stable_abi_is_needed(file):
    """No C++ symbol of torch, c10 or at: one library serves every torch from 2.11 on."""
    path = libraries.library_path(next(name for name, of in libraries.LIBRARIES.items() if of == file))
    if not path.exists():
        pytest.skip(f"{file} is not built")
    needed = symbols(path, "-D", "--undefined-only")
    of_torch = [name for name in needed if STABLE.fullmatch(name)]
    assert of_torch and not [
        name for name in needed if re.search(r"\d(c10|at|torch|caffe2)\w*", name) and name.startswith("_Z")
    ]
    unknown = [name for name in needed if not STABLE.fullmatch(name) and not SYSTEM.fullmatch(name)]
    assert not unknown, unknown


@needs_nm
@needs_elf
@needs_cpu
def test_little_is_exported():
    """Nothing but the C functions that Python asks for, so that no other library's symbols are taken or replaced."""
    exported = set(symbols(libraries.library_path("cpu"), "-D", "--defined-only"))
    ours = {
        name
        for name in exported
        if not re.match(r"_Z\w*(St|__gnu_cxx)", name) and name not in ("__bss_start", "_edata", "_end")
    }
    assert ours == {"vimpac_cpu_isa"}


@needs_nm
@needs_cpu
def test_no_instruction_set_leaks_into_another(setup, tmp_path):
    """What is compiled for AVX-512 defines nothing that the linker could take for the same function compiled for less."""
    compiler = setup.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    for source in sorted((ROOT / "csrc").glob("*_simd.cpp")):
        built = tmp_path / f"{source.stem}.o"
        widest, flags = list(setup.ISA_FLAGS.items())[-1]
        flags = [*setup.CXX_FLAGS, *flags, "-O1", f"-DVIMPAC_ISA={widest}", "-DVIMPAC_X86", f"-I{ROOT / 'csrc'}"]
        subprocess.run([compiler, *flags, "-c", source, "-o", built], check=True)
        listed = subprocess.run(["nm", str(built)], capture_output=True, text=True, check=True).stdout
        assert not re.findall(r"^\w* [WVu] .*", listed, re.MULTILINE)


# --- what is left out -------------------------------------------------------------------------------------------------


def run_setup(*command, **environment):
    names = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment}
    return subprocess.run([sys.executable, "setup.py", *command], cwd=ROOT, env=names, capture_output=True, text=True)


def test_without_a_compiler_it_is_pure_python(tmp_path):
    """One sentence a library, and a wheel for any machine, without the libraries of an earlier build."""
    source = tmp_path / "source"
    skip = shutil.ignore_patterns(".git", ".venv", "runs", "*.egg-info", "build", "tests", "__pycache__", "*.so")
    shutil.copytree(ROOT, source, ignore=skip)
    earlier = source / "build" / "lib" / "vimpac" / "_ops_cpu.so"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    tools = tmp_path / "bin"
    tools.mkdir()  # nothing in it
    command = [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", str(tmp_path)]
    environment = {"PATH": str(tools), "HOME": str(tmp_path)}
    ended = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for name in ("_ops_cpu", "_ops_cuda", "_C"):
        assert f"vimpac: without {name}: it needs a C++ compiler (Debian: apt-get install g++, macOS" in ended.stderr
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


NVCC = """#!/bin/sh
case "$*" in
    --list-gpu-code) echo sm_80; echo sm_90;;
    --version) echo 'Cuda compilation tools, release 99.0'; echo Build;;
    *) {compile};;
esac
"""
# A compiler that makes empty files, those of -o and -MF.
CXX = """#!/bin/sh
while [ $# -gt 0 ]; do
    case $1 in -o|-MF) : > "$2";; --version) echo 'c++ 1.0';; esac
    shift
done
"""
ERROR = "crt/host_config.h:147: error: -- unsupported GNU version! gcc versions later than 15 are not supported!"


SUCCEEDS = 'exec "$CXX" "$@"'
FAILS = f"echo 'nvcc warning : deprecated'; echo '{ERROR}'; exit 1"


@dataclass
class Checkout:
    """A copy of the project, and a folder for a C++ compiler and an nvcc that take no time."""

    folder: Path
    tools: Path

    @property
    def package(self) -> Path:
        return self.folder / "vimpac"

    def build(self, nvcc, *command, **environment) -> subprocess.CompletedProcess:
        """Run setup.py. nvcc: what it does to compile or link, SUCCEEDS or FAILS."""
        for name, text in (("nvcc", NVCC.format(compile=nvcc)), ("c++", CXX)):
            (self.tools / name).write_text(text)
            (self.tools / name).chmod(0o755)
        path = f"{self.tools}{os.pathsep}{os.environ['PATH']}"
        named = {"PATH": path, "HOME": str(self.folder), "CXX": str(self.tools / "c++"), **environment}
        command = [sys.executable, "setup.py", *(command or ("build_ext", "--inplace"))]
        return subprocess.run(command, cwd=self.folder, env=named, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path):
    skip = shutil.ignore_patterns(".*", "runs", "*.egg-info", "build", "tests", "docs", "__pycache__", "*.so", "_ops_*.txt")
    shutil.copytree(ROOT, tmp_path / "source", ignore=skip)
    (tmp_path / "bin").mkdir()
    return Checkout(tmp_path / "source", tmp_path / "bin")


@needs_cpu
def test_an_nvcc_that_fails_costs_only_the_cuda_library(checkout):
    """The rest is installed. A note beside it says why: the doctor reads it. A build that succeeds removes the note."""
    library, note = checkout.package / "_ops_cuda.so", checkout.package / "_ops_cuda.txt"
    ended = checkout.build(SUCCEEDS)
    assert ended.returncode == 0 and library.exists() and not note.exists(), ended.stdout + ended.stderr
    os.utime(checkout.folder / "csrc" / "archs.cu")
    ended = checkout.build(FAILS)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"vimpac: without _ops_cuda: it does not compile here: {ERROR}" in ended.stderr
    assert (checkout.package / "_ops_cpu.so").exists() and list(checkout.package.glob("_C*.so"))
    assert not library.exists() and note.read_text() == f"{ERROR}\n"
    shown = python("from vimpac.commands.doctor import report; print(report())", VIMPAC_LIBRARIES=str(checkout.package))
    assert f"_ops_cuda.so  vimpac was installed without _ops_cuda.so, which did not compile ({ERROR}): " in shown.stdout
    ended = checkout.build(SUCCEEDS)
    assert ended.returncode == 0 and library.exists() and not note.exists(), ended.stdout + ended.stderr


@needs_cpu
def test_a_wheel_says_why_it_has_no_cuda_library(checkout):
    """The library of an earlier build does not get into it."""
    assert checkout.build(SUCCEEDS, "build_ext").returncode == 0
    os.utime(checkout.folder / "csrc" / "archs.cu")
    ended = checkout.build(FAILS, "bdist_wheel", "--dist-dir", str(checkout.folder))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    wheel = zipfile.ZipFile(next(checkout.folder.glob("*.whl")))
    assert wheel.read("vimpac/_ops_cuda.txt").decode() == f"{ERROR}\n"
    assert "vimpac/_ops_cpu.so" in wheel.namelist() and "vimpac/_ops_cuda.so" not in wheel.namelist()


@needs_cpu
@pytest.mark.parametrize("named", ["cpu,cuda", "cuda"])
def test_a_library_that_was_named_must_compile(checkout, named):
    ended = checkout.build(FAILS, VIMPAC_EXTENSION=named)
    assert ended.returncode == 1 and "vimpac: the extension does not compile here (see above)" in ended.stderr


TAG = """
import setuptools
from distutils.core import run_setup  # setuptools' own
wheel = run_setup("setup.py", stop_after="init").get_command_obj("bdist_wheel")
wheel.ensure_finalized()
print(*wheel.get_tag())
"""


@needs_cpu
@needs_compiler
@pytest.mark.parametrize(
    "libraries, python_tags", [("cpu", ["py3", "none"]), ("cpu,python", [f"cp3{sys.version_info.minor}"] * 2)]
)
def test_a_wheel_without_c_is_for_every_python(libraries, python_tags):
    environment = {**os.environ, "VIMPAC_EXTENSION": libraries}
    ended = subprocess.run([sys.executable, "-c", TAG], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    *tags, machine = ended.stdout.split()[-3:]
    assert tags == python_tags and machine != "any"


@pytest.mark.parametrize(
    "environment, shown",
    [
        ({"VIMPAC_EXTENSION": "gpu"}, "VIMPAC_EXTENSION='gpu': gpu is none of 0, cpu, cuda, python"),
        (
            {"VIMPAC_EXTENSION": "cpu", "CXX": "/no/such/compiler"},
            "without _ops_cpu: it needs a C++ compiler, and CXX='/no/such/compiler' is none that runs",
        ),
        (
            {"VIMPAC_EXTENSION": "cpu,python", "CXX": "false"},
            "without _C: it needs a C++ compiler, and CXX='false' is none that runs",
        ),
        ({"VIMPAC_EXTENSION": "0"}, "without _ops_cpu: VIMPAC_EXTENSION=0"),
        ({"VIMPAC_EXTENSION": "cpu"}, "without _ops_cuda: VIMPAC_EXTENSION=cpu"),
    ],
)
def test_says_what_is_missing(environment, shown):
    assert shown in run_setup("--version", **environment).stderr


def test_ptx_is_for_any_newer_gpu(setup, monkeypatch, tmp_path):
    """PTX of an architecture with an "a" runs on that one alone."""
    monkeypatch.setattr(setup, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(setup, "cuda_archs", lambda _: ["80", "90a"])
    text = setup.ninja_file(tmp_path, {"_ops_cuda": tmp_path / "_ops_cuda.so"})
    assert "code=sm_90a" in text and "arch=compute_90,code=compute_90" in text and "code=compute_90a" not in text


def test_architectures(setup, monkeypatch):
    """The default leaves out what this nvcc does not know; a name that it does not know is an error."""
    monkeypatch.setattr(setup, "output", lambda *_: "sm_75\nsm_80\nsm_90")
    monkeypatch.delenv("VIMPAC_CUDA_ARCHS", raising=False)
    assert setup.cuda_archs("nvcc") == ["80", "90a"]
    for named in ("8.0 9.0a", "80;90a", "80,90a"):
        monkeypatch.setenv("VIMPAC_CUDA_ARCHS", named)
        assert setup.cuda_archs("nvcc") == ["80", "90a"]
    monkeypatch.setenv("VIMPAC_CUDA_ARCHS", "80 100")
    with pytest.raises(SystemExit, match="VIMPAC_CUDA_ARCHS: nvcc does not know 100, it knows 75 80 90 90a"):
        setup.cuda_archs("nvcc")
