"""The C++ kernels' tests under the address and undefined-behaviour sanitizers. `make sanitize` runs it.

Builds vimpac/_ops_cpu.so with VIMPAC_SANITIZE=1 into build/sanitize, then runs the tests with it, for every instruction set
that this processor has. The runtime of the address sanitizer has to be the first library of the process, hence LD_PRELOAD.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("CXX", "g++")
TESTS = [f"tests/ops/test_{op}_cpu.py" for op in ("axial_attention", "block_mask", "dropout_add", "info_nce")]


def build(folder: Path) -> Path:
    """A sanitized _ops_cpu.so; returns the folder that it is in."""
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-temp",
        str(folder / "objects"),
        "--build-lib",
        str(folder),
    ]
    environment = {**os.environ, "CXX": COMPILER, "VIMPAC_SANITIZE": "1", "VIMPAC_EXTENSION": "cpu"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return folder / "vimpac"


def output(option: str) -> str:
    return subprocess.run([COMPILER, option], capture_output=True, text=True, check=True).stdout.strip()


def environment(libraries: Path) -> dict[str, str]:
    """What a process needs to run with a sanitized library. Leaks are not looked for: Python and torch hold on to theirs."""
    clang = "clang" in output("--version")  # it would name GCC's, with which its libraries cannot be loaded
    names = [f"libclang_rt.asan-{platform.machine()}.so"] if clang else ["libasan.so", "libubsan.so"]
    runtimes = [output(f"-print-file-name={name}") for name in (*names, "libstdc++.so")]
    if missing := [path for path in runtimes if not Path(path).is_absolute()]:  # the name alone is what it says of one it lacks
        raise SystemExit(f"{COMPILER} has no {' and no '.join(missing)}: install its sanitizers")
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(str(Path(path).resolve()) for path in runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "VIMPAC_LIBRARIES": str(libraries),
    }


def main() -> int:
    named = environment(build(ROOT / "build" / "sanitize"))
    # of a library that cannot be loaded the tests would be skipped
    load = "import sys; from vimpac.ops import libraries; sys.exit(libraries.library_error('cpu') or None)"
    for command in (["-c", load], ["-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]):
        ended = subprocess.run([sys.executable, *command], cwd=ROOT, env=named)
        if ended.returncode:
            return ended.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
