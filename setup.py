"""Builds what pyproject.toml cannot say: the package vimpac.kernels (the folder kernels/), and the extension (csrc/).

Three libraries, each built where its tools are found and left out with one sentence where they are not:

    vimpac/_ops_cpu.so    a C++ compiler (CXX, c++, g++, clang++), ninja, an installed torch
    vimpac/_ops_cuda.so   and nvcc (CUDA_HOME, PATH, /usr/local/cuda); torch need not have CUDA
    vimpac/_C….so         and pybind11

The first two hold torch ops over torch's stable ABI: one build serves every Python, and every torch from 2.11 on. Read from
the environment:

    VIMPAC_EXTENSION      0: none of them; cpu or cpu,cuda,python: these (python is _C; a wheel without it is for every Python)
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

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

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


def output(*command) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout.strip()


def cuda_archs(nvcc: str) -> list[str]:
    """Architectures to compile for: those of VIMPAC_CUDA_ARCHS, else those of ours that this nvcc knows."""
    try:
        known = {word.removeprefix("sm_") for word in output(nvcc, "--list-gpu-code").split()}
    except subprocess.CalledProcessError:  # it has no such option
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
        "_ops_cuda": [] if find_nvcc() and cuda_archs(find_nvcc()) else ["nvcc (the CUDA toolkit, 11.8 or newer)"],
        "_C": [] if importlib.util.find_spec("pybind11") else ["pybind11 (pip install pybind11)"],
    }
    unwanted = {name: f"VIMPAC_EXTENSION={named}" for name, word in LIBRARIES.items() if word not in wanted}
    return {name: "it needs " + ", ".join(common + own) for name, own in more.items() if common + own} | unwanted


class Wheel(bdist_wheel):
    """Without _C nothing in a wheel depends on the version of Python: it is for all of them."""

    def run(self) -> None:
        folder = Path(self.get_finalized_command("build").build_lib, "vimpac")
        for stale in [path for name in missing for path in folder.glob(f"{name}.*so")]:  # of a build that had them
            stale.unlink()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, machine = super().get_tag()
        return (python, abi, machine) if "_C" not in missing else ("py3", "none", machine)


class BuildExtension(build_ext):
    """Compiles with ninja, all libraries side by side."""

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
        (folder / "build.ninja").write_text(ninja_file(folder, targets))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        ended = subprocess.run([shutil.which("ninja", path=SEARCH), "-C", folder, *jobs])
        if ended.returncode:
            raise SystemExit(
                "vimpac: the extension does not compile here (see above). VIMPAC_EXTENSION=cpu,python installs without the "
                "CUDA library, VIMPAC_EXTENSION=0 without any"
            )
        reports = ROOT / "build" / "ptxas"  # registers and spills of every kernel: tests read them
        for report in folder.glob("cuda/*.o.txt"):
            reports.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(report, reports / report.name.replace(".o.txt", ".txt"))


def ninja_file(folder: Path, targets: dict[str, Path]) -> str:
    """build.ninja: library → where it goes."""
    torch = find_torch()
    includes = [f"-I{ROOT / 'csrc'}", "-isystem", torch / "include"]
    links = (
        [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch"] if sys.platform == "linux" else ["-undefined", "dynamic_lookup"]
    )
    lines = [
        "ninja_required_version = 1.3",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out > $out.txt 2>&1 || { cat $out.txt; exit 1; }",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared $in $flags -o $out",
    ]

    def build(rule: str, target: Path, sources: list[Path], compiler: str, flags: list) -> Path:
        lines.extend([f"build {_path(target)}: {rule} {' '.join(map(_path, sources))}"])
        lines.append(f"  cxx = {shlex.quote(compiler).replace('$', '$$')}")
        lines.append(f"  flags = {shlex.join(map(str, flags)).replace('$', '$$')}")
        return target

    compiler = find_compiler()
    if target := targets.get("_ops_cpu"):
        sanitizers = SANITIZER_FLAGS if os.environ.get("VIMPAC_SANITIZE") == "1" else []
        flags = [*CXX_FLAGS, *includes, *sanitizers, *(["-DVIMPAC_X86"] if X86 else [])]
        objects = []
        for source in sorted((ROOT / "csrc").glob("*.cpp")):
            if source.stem == "python":
                continue
            isas = ISA_FLAGS if source.stem.endswith("_simd") else {"": []}
            for isa, more in isas.items():
                own = [*flags, f"-DVIMPAC_ISA={isa}", *more] if isa else flags
                name = f"{source.stem}.{isa}.o" if isa else f"{source.stem}.o"
                objects.append(build("cxx", folder / "cpu" / name, [source], compiler, own))
        build("link", target, objects, compiler, [*links, *sanitizers])
    if target := targets.get("_ops_cuda"):
        nvcc = find_nvcc()
        archs = cuda_archs(nvcc)
        flags = ["-std=c++17", "-O3", "--threads=0", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DUSE_CUDA", *includes]
        flags += [f"-ccbin={compiler}", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", "-lineinfo"]
        flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        ptx = archs[-1].rstrip("af")  # for newer GPUs: PTX for "90a" would run on 9.0 alone
        flags += [f"-gencode=arch=compute_{ptx},code=compute_{ptx}", f'-DVIMPAC_CUDA_ARCHS="{" ".join(archs)}"']
        objects = [
            build("nvcc", folder / "cuda" / f"{source.stem}.o", [source], nvcc, flags)
            for source in sorted((ROOT / "csrc").glob("*.cu"))
        ]
        build("link", target, objects, nvcc, [f"-ccbin={compiler}", "-Xcompiler=-fPIC", "--cudart=static", *_for_nvcc(links)])
    if target := targets.get("_C"):
        import pybind11

        facts = write_facts(folder / "build_facts.h", targets)
        includes = [f"-I{ROOT / 'csrc'}", f"-I{facts.parent}", "-isystem", pybind11.get_include()]
        flags = [*CXX_FLAGS, *includes, "-isystem", _python_include()]
        objects = [build("cxx", folder / "python.o", [ROOT / "csrc" / "python.cpp"], compiler, flags)]
        build("link", target, objects, compiler, [] if sys.platform == "linux" else ["-undefined", "dynamic_lookup"])
    lines.append(f"default {' '.join(map(_path, targets.values()))}")
    return "\n".join(lines) + "\n"


def write_facts(header: Path, targets: dict[str, Path]) -> Path:
    """What vimpac._C tells about the build."""
    nvcc = find_nvcc() if "_ops_cuda" in targets else None
    version = (find_torch() / "version.py").read_text()
    try:
        revision = output("git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"  # a release without its history
    facts = {
        "COMPILER": output(find_compiler(), "--version").splitlines()[0],
        "FLAGS": " ".join(CXX_FLAGS),
        "TORCH": re.search(r"__version__ = '(.+)'", version)[1],
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
