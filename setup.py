"""Builds what pyproject.toml cannot say: the package vimpac.kernels (the folder kernels/), and the extension (csrc/).

Three libraries. Each is built if its tools are found. If they are not, it is left out, and one sentence says why:

    vimpac/_ops_cpu.so    a C++ compiler (CXX, c++, g++, clang++), ninja, an installed torch
    vimpac/_ops_cuda.so   and nvcc (CUDA_HOME, PATH, /usr/local/cuda); torch need not have CUDA
    vimpac/_C….so         and pybind11

The first two hold torch ops over torch's stable ABI: one build serves every Python, and every torch from 2.11 on. If nvcc is
found but fails, _ops_cuda is left out as well, and vimpac/_ops_cuda.txt holds the error. Environment variables:

    VIMPAC_EXTENSION      0: none of them; cpu or cpu,cuda,python: these (python is _C; a wheel without it is for every Python).
                          If one of these does not compile, the installation fails
    VIMPAC_CUDA_ARCHS     GPU architectures, "80 90a 100" by default; the last also as PTX
    VIMPAC_SANITIZE       1: _ops_cpu with the address and undefined-behaviour sanitizers
    MAX_JOBS              how many files are compiled at once
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020b000000000000"  # 2.11: what is newer is not used
CUDA_ARCHS = ("80", "90a", "100")
LIBRARIES = {"_ops_cpu": "cpu", "_ops_cuda": "cuda", "_C": "python"}
X86 = platform.machine().lower() in ("x86_64", "amd64")
COMPILER_NEED = "a C++ compiler (Debian: apt-get install g++, macOS: xcode-select --install)"
SEARCH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # pip's ninja is beside Python
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]  # psabi: vectors wider than the machine's, in inlined functions only
CXX_FLAGS = ["-std=c++17", "-O3", "-g1", "-fPIC", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *WARNINGS]
SANITIZER_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
ISA_FLAGS = {"portable": []} | (
    {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    }
    if X86
    else {}
)


def find_compiler() -> str | None:
    named = os.environ.get("CXX")
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    # a Mac's c++ may be one that only asks to install Apple's tools, and fails
    return found if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0 else None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=Path(home) / "bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_torch() -> Path | None:
    """The folder of the installed torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def there(tool: T | None) -> T:
    """A tool that `missing_tools` found."""
    assert tool is not None
    return tool


def output(*command) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout.strip()


def cuda_archs(nvcc: str) -> list[str]:
    """Architectures to compile for: those of VIMPAC_CUDA_ARCHS, else those of ours that this nvcc knows."""
    try:
        known = {word.removeprefix("sm_") for word in output(nvcc, "--list-gpu-code").split()}
    except (OSError, subprocess.CalledProcessError):  # it does not run, or has no such option
        return []
    known |= {arch + "a" for arch in known if arch.isdigit() and int(arch) >= 90}
    named = os.environ.get("VIMPAC_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").replace(".", "").split()
    if unknown := [arch for arch in named if arch not in known]:
        raise SystemExit(f"VIMPAC_CUDA_ARCHS: {nvcc} does not know {' '.join(unknown)}, it knows {' '.join(sorted(known))}")
    return named or [arch for arch in CUDA_ARCHS if arch in known]


def missing_tools() -> dict[str, str]:
    """Library → what keeps it from being built here."""
    named = os.environ.get("VIMPAC_EXTENSION") or "cpu,cuda,python"
    wanted = [] if named == "0" else [word.strip() for word in named.split(",")]
    if unknown := set(wanted) - set(LIBRARIES.values()):
        raise SystemExit(f"VIMPAC_EXTENSION={named!r}: {' '.join(sorted(unknown))} is none of 0, cpu, cuda, python")
    needs = {
        COMPILER_NEED: find_compiler(),
        "ninja (pip install ninja)": shutil.which("ninja", path=SEARCH),
        "an installed torch (and pip's --no-build-isolation)": find_torch(),
        "Linux or macOS": os.name == "posix",
    }
    if compiler := os.environ.get("CXX"):
        needs[f"a C++ compiler, and CXX={compiler!r} is none that runs"] = needs.pop(COMPILER_NEED)
    common = [need for need, found in needs.items() if not found]
    more = {
        "_ops_cpu": [],
        "_ops_cuda": [] if (nvcc := find_nvcc()) and cuda_archs(nvcc) else ["nvcc (the CUDA toolkit, 11.8 or newer)"],
        "_C": [] if importlib.util.find_spec("pybind11") else ["pybind11 (pip install pybind11)"],
    }
    unwanted = {name: f"VIMPAC_EXTENSION={named}" for name, word in LIBRARIES.items() if word not in wanted}
    return {name: "it needs " + ", ".join(common + own) for name, own in more.items() if common + own} | unwanted


class Wheel(bdist_wheel):
    """Without _C nothing in a wheel depends on the version of Python: it is for all of them."""

    def run(self) -> None:
        folder = Path(self.get_finalized_command("build").build_lib, "vimpac")
        for name in missing:
            for stale in (*folder.glob(f"{name}.*so"), *folder.glob(f"{name}.txt")):  # of an earlier build with its tools
                stale.unlink()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, machine = super().get_tag()
        return (python, abi, machine) if "_C" not in missing else ("py3", "none", machine)


class BuildExtension(build_ext):
    """Compiles with ninja, all libraries side by side. If CUDA does not compile, the other libraries are built without it."""

    def get_ext_filename(self, fullname: str) -> str:
        if "_ops_" in fullname:  # no Python in it, so no Python version in its name
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        targets = {ext.name.rpartition(".")[2]: Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions}
        for path in targets.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        cuda = targets.get("_ops_cuda")
        if compiles(folder, targets):
            if cuda:
                note_of(cuda).unlink(missing_ok=True)
        else:
            others = {name: path for name, path in targets.items() if path != cuda}
            if cuda is None or os.environ.get("VIMPAC_EXTENSION") or not compiles(folder, others):
                raise SystemExit(
                    "vimpac: the extension does not compile here (see above). VIMPAC_EXTENSION=cpu,python installs without the "
                    "CUDA library, VIMPAC_EXTENSION=0 without any"
                )
            self.leave_out(cuda, first_error(folder))
        reports = ROOT / "build" / "ptxas"  # registers and spills of every kernel: tests read them
        for report in folder.glob("cuda/*.o.txt"):
            reports.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(report, reports / report.name.replace(".o.txt", ".txt"))

    def leave_out(self, library: Path, error: str) -> None:
        """Go on without a library that does not compile. A note in its place holds the error: `vimpac doctor` shows it."""
        print(f"vimpac: without {library.stem}: it does not compile here: {error}", file=sys.stderr)
        library.unlink(missing_ok=True)  # of an earlier build
        note_of(library).write_text(error + "\n")
        self.extensions = [ext for ext in self.extensions if ext.name != f"vimpac.{library.stem}"]

    def copy_extensions_to_source(self) -> None:
        """For an editable installation: the libraries, and the note or its absence."""
        super().copy_extensions_to_source()
        if "_ops_cuda" in missing:
            return
        built, library = (Path(folder, "vimpac", "_ops_cuda.so") for folder in (self.build_lib, ROOT))
        if note_of(built).exists():
            library.unlink(missing_ok=True)
            shutil.copyfile(note_of(built), note_of(library))
        else:
            note_of(library).unlink(missing_ok=True)


def note_of(library: Path) -> Path:
    """Where it is said why a library was not built."""
    return library.with_suffix(".txt")


def compiles(folder: Path, targets: dict[str, Path]) -> bool:
    """Build the libraries; whether that worked."""
    (folder / "build.ninja").write_text(ninja_file(folder, targets))
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    return subprocess.run([there(shutil.which("ninja", path=SEARCH)), "-C", str(folder), *jobs]).returncode == 0


def first_error(folder: Path) -> str:
    """The first error in what nvcc wrote last."""
    for report in sorted(folder.glob("cuda/*.o.txt"), key=lambda path: path.stat().st_mtime, reverse=True):
        for line in report.read_text(errors="replace").splitlines():
            if re.search(r"\b(error|fatal)\b", line):
                return " ".join(line.split())[:300]
    return "its output is in the log of the installation"


RULES = """\
ninja_required_version = 1.3
rule cxx
  command = $cxx -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = $cxx -MMD -MF $out.d $flags -c $in -o $out > $out.txt 2>&1 || { cat $out.txt; exit 1; }
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared $in $flags -o $out
"""


def statement(rule: str, target: Path, sources: list[Path], compiler: str, flags: list) -> str:
    """A target of build.ninja."""
    return (
        f"build {_path(target)}: {rule} {' '.join(map(_path, sources))}\n"
        f"  cxx = {shlex.quote(compiler).replace('$', '$$')}\n"
        f"  flags = {shlex.join(map(str, flags)).replace('$', '$$')}\n"
    )


def ninja_file(folder: Path, targets: dict[str, Path]) -> str:
    """build.ninja: library → where it goes."""
    makers = {"_ops_cpu": cpu_library, "_ops_cuda": cuda_library, "_C": python_module}
    statements = [line for name, target in targets.items() for line in makers[name](folder, target, targets)]
    return RULES + "".join(statements) + f"default {' '.join(map(_path, targets.values()))}\n"


def torch_flags() -> tuple[list, list]:
    """To compile with torch's headers, and to link with torch."""
    torch = there(find_torch())
    includes = [f"-I{ROOT / 'csrc'}", "-isystem", torch / "include"]
    if sys.platform == "linux":
        return includes, [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch"]
    return includes, ["-undefined", "dynamic_lookup"]


def cpu_library(folder: Path, target: Path, _targets: dict[str, Path]) -> list[str]:
    compiler, (includes, links) = there(find_compiler()), torch_flags()
    sanitizers = SANITIZER_FLAGS if os.environ.get("VIMPAC_SANITIZE") == "1" else []
    flags = [*CXX_FLAGS, *includes, *sanitizers, *(["-DVIMPAC_X86"] if X86 else [])]
    statements, objects = [], []
    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        if source.stem == "python":
            continue
        isas = ISA_FLAGS if source.stem.endswith("_simd") else {"": []}
        for isa, more in isas.items():
            own = [*flags, f"-DVIMPAC_ISA={isa}", *more] if isa else flags
            objects.append(folder / "cpu" / (f"{source.stem}.{isa}.o" if isa else f"{source.stem}.o"))
            statements.append(statement("cxx", objects[-1], [source], compiler, own))
    return [*statements, statement("link", target, objects, compiler, [*links, *sanitizers])]


def cuda_library(folder: Path, target: Path, _targets: dict[str, Path]) -> list[str]:
    compiler, nvcc, (includes, links) = there(find_compiler()), there(find_nvcc()), torch_flags()
    archs = cuda_archs(nvcc)
    flags = ["-std=c++17", "-O3", "--threads=0", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DUSE_CUDA", *includes]
    flags += [f"-ccbin={compiler}", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", "-lineinfo"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    ptx = archs[-1].rstrip("af")  # for newer GPUs: PTX for "90a" would run on 9.0 alone
    flags += [f"-gencode=arch=compute_{ptx},code=compute_{ptx}", f'-DVIMPAC_CUDA_ARCHS="{" ".join(archs)}"']
    sources = sorted((ROOT / "csrc").glob("*.cu"))
    objects = [folder / "cuda" / f"{source.stem}.o" for source in sources]
    statements = [statement("nvcc", built, [source], nvcc, flags) for built, source in zip(objects, sources, strict=True)]
    links = [f"-ccbin={compiler}", "-Xcompiler=-fPIC", "--cudart=static", *_for_nvcc(links)]
    return [*statements, statement("link", target, objects, nvcc, links)]


def python_module(folder: Path, target: Path, targets: dict[str, Path]) -> list[str]:
    import pybind11

    compiler = there(find_compiler())
    facts = write_facts(folder / "build_facts.h", targets)
    includes = [f"-I{ROOT / 'csrc'}", f"-I{facts.parent}", "-isystem", pybind11.get_include()]
    flags = [*CXX_FLAGS, *includes, "-isystem", _python_include()]
    built = folder / "python.o"
    links = [] if sys.platform == "linux" else ["-undefined", "dynamic_lookup"]
    return [
        statement("cxx", built, [ROOT / "csrc" / "python.cpp"], compiler, flags),
        statement("link", target, [built], compiler, links),
    ]


def write_facts(header: Path, targets: dict[str, Path]) -> Path:
    """What vimpac._C.build() returns."""
    nvcc = find_nvcc() if "_ops_cuda" in targets else None
    version = re.search(r"__version__ = '(.+)'", (there(find_torch()) / "version.py").read_text())
    try:
        revision = output("git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"  # a release without its history
    facts = {
        "COMPILER": output(there(find_compiler()), "--version").splitlines()[0],
        "FLAGS": " ".join(CXX_FLAGS),
        "TORCH": there(version)[1],
        "NVCC": output(nvcc, "--version").splitlines()[-2] if nvcc else "",
        "CUDA_ARCHS": " ".join(cuda_archs(nvcc)) if nvcc else "",
        "CPU_ISAS": " ".join(ISA_FLAGS),
        "REVISION": revision,
    }
    text = "".join(f'#define VIMPAC_BUILD_{name} "{value}"\n' for name, value in facts.items())
    if not header.exists() or header.read_text() != text:
        header.write_text(text)
    return header


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _for_nvcc(links: list[str]) -> list[str]:
    return [flag.replace("-Wl,", "-Xlinker=") for flag in links]


def _python_include() -> str:
    import sysconfig

    return sysconfig.get_paths()["include"]


missing = missing_tools()
for library, reason in missing.items():
    print(f"vimpac: without {library}: {reason}", file=sys.stderr)

setup(
    packages=[*find_packages(include=["vimpac", "vimpac.*"], exclude=["vimpac.kernels"]), "vimpac.kernels"],
    package_dir={"vimpac.kernels": "kernels"},
    ext_modules=[Extension(f"vimpac.{name}", []) for name in LIBRARIES if name not in missing],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
)
