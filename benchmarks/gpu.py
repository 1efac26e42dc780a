"""Everything that needs a GPU: kernel tests natively, compute-sanitizer on small shapes, every benchmark. `make gpu` runs it.

It installs nothing, needs no network and nothing beyond torch, triton, numpy and pytest, and ends within 8 minutes: each step
has a limit, and a step that meets it has failed, but what a benchmark measured until then stays. Where a C++ compiler, ninja
and nvcc are found it first builds the extension in place, for this GPU alone; libraries that are there already, from another
machine, are taken as they are. The exit status is 0 when every step was green.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import harness
import report

ROOT = harness.ROOT
TESTS = [  # the slowest first: they run side by side
    "ops/test_axial_attention_triton.py",
    "ops/test_axial_attention_cuda.py",
    "model/test_whole_model_triton.py",
    "ops/test_info_nce_triton.py",
    "ops/test_block_mask_triton.py",
    "ops/test_block_mask_cuda.py",
    "ops/test_masked_cross_entropy_triton.py",
    "ops/test_residual_norm_triton.py",
    "ops/test_bias_gelu_triton.py",
    "ops/test_axial_attention_bias_triton.py",
    "ops/test_dropout_add_triton.py",
    "training/test_update.py",
    "ops/test_axial_attention.py",
    "ops/test_axial_attention_dropout.py",
    "ops/test_info_nce.py",
    "ops/test_info_nce_ranks.py",
    "ops/test_block_mask.py",
    "ops/test_masked_cross_entropy.py",
    "ops/test_dropout_add.py",
    "ops/test_residual_norm.py",
    "ops/test_philox.py",
]
SHARDS = {  # by what they compile on one core: some four minutes, and one or more
    "ops/test_axial_attention_triton.py": 8,
    "ops/test_block_mask_triton.py": 3,
    "ops/test_info_nce_triton.py": 2,
}
SANITIZED_PARTS = 8  # what compute-sanitizer watches compiles for some 80 s on one core, a fifth of it in the slowest part
COMPILED_PARTS = 4  # of what benchmarks/axial_attention.py times: some 80 s on one core
SECONDS = 480
BUILD_SECONDS, TEST_SECONDS, SANITIZER_SECONDS = 60, 120, 60
BENCHMARKS = {  # name → seconds; what a compiled peer needs at least is in harness.py. The last two leave out what is too much
    "block_mask": 15,
    "dropout_add": 10,
    "residual_norm": 10,
    "bias_gelu": 10,
    "axial_attention": 40,
    "info_nce": 20,
    "masked_cross_entropy": 25,
    "data": 10,
    "finetune": 10,
    "evaluate": 10,
    "attn_layouts": 25,
    "train_step": 55,
}


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="folder for logs and results instead of benchmarks/results/DEVICE")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            "make gpu needs a CUDA device, and torch finds none here; make test checks the kernels without one", file=sys.stderr
        )
        return 2
    device = report.device_name(torch.device("cuda"))
    folder = (options.results or ROOT / "benchmarks" / "results" / report.slug(device)).resolve()
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder / "logs").close()
    except OSError as error:
        print(f"{folder} cannot be written ({error.strerror}): give another folder, make gpu RESULTS=DIR", file=sys.stderr)
        return 2
    print(f"{device}, torch {torch.__version__}, triton {report.triton_version()}, results in {folder}", flush=True)

    def left() -> float:
        return started + SECONDS - time.monotonic()

    steps = run_together(build(), BUILD_SECONDS, folder)
    steps += run_together(tests(), TEST_SECONDS, folder)
    steps += run_together(sanitizers(), SANITIZER_SECONDS, folder)
    for name, seconds in BENCHMARKS.items():  # a budget lets begun rows end, ours begin: the limit is above it
        limit = min(2 * seconds, max(0.0, left()))
        command = [sys.executable, f"benchmarks/{name}.py", "--budget", f"{limit / 2:.0f}", "--results", str(folder)]
        steps += run_together({name: command}, limit, folder)
    result = {"device": device, "torch": torch.__version__, "triton": report.triton_version(), "steps": steps}
    (folder / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    failed = [step["name"] for step in steps if step["outcome"] != "green"]
    print(f"failed: {', '.join(failed)}" if failed else "all green")
    return 1 if failed else 0


def build() -> dict[str, list[str]]:
    """Compiles csrc/ for this GPU where nvcc is found; ninja leaves alone what is up to date."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return {}
    if setuptools_version() < 77:  # reads no pyproject.toml of ours; setup.py itself says what else is missing
        print("the extension is not built, which needs setuptools 77 or newer: what is there already is tested", flush=True)
        return {}
    if not os.access(ROOT / "vimpac", os.W_OK):
        print(f"the extension is not built, {ROOT / 'vimpac'} cannot be written: what is there already is tested", flush=True)
        return {}
    major, minor = torch.cuda.get_device_capability()
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    if f"sm_{major}{minor}" in known:
        os.environ.setdefault("VIMPAC_CUDA_ARCHS", f"{major}{minor}")
    os.environ.setdefault("VIMPAC_EXTENSION", "cpu,cuda")
    return {"build": [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]}


def setuptools_version() -> int:
    """Its first number, 0 where it is not installed."""
    try:
        return int(importlib.metadata.version("setuptools").partition(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


def tests() -> dict[str, list[str]]:
    """The kernels' tests on this GPU, a process a file or part of one, and beside them what is compiled for later steps."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    commands = {}
    for file in TESTS:
        count = SHARDS.get(file, 1)
        for i in range(1, count + 1):
            stem = Path(file).stem
            name = f"{stem}.py" if count == 1 else f"{stem}-{i}.py"
            commands[name] = [*command, f"tests/{file}", f"--shard={i}/{count}"]
    for i in range(1, COMPILED_PARTS + 1):
        part = ["--compile", f"{i}/{COMPILED_PARTS}"]
        commands[f"compile-{i}"] = [sys.executable, "benchmarks/axial_attention.py", *part]
    if shutil.which("compute-sanitizer"):  # under which nothing is left to compile then
        parts = [f"{i}/{SANITIZED_PARTS}" for i in range(1, SANITIZED_PARTS + 1)]
        commands |= {f"sanitize-{part[0]}.py": [sys.executable, "tests/sanitize.py", f"--part={part}"] for part in parts}
    return commands


def sanitizers() -> dict[str, list[str]]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not installed: skipped", flush=True)
        return {}
    # Libraries ask CUDA for what need not be there: such refusals are no errors of a kernel, whose own torch raises.
    command = [tool, "--error-exitcode", "99", "--report-api-errors", "no", "--tool"]
    return {name: [*command, name, sys.executable, "tests/sanitize.py"] for name in ("memcheck", "racecheck")}


def run_together(commands: dict[str, list[str]], seconds: float, folder: Path) -> list[dict]:
    """Run commands side by side, each with its log; print and return name, outcome, seconds, last line."""
    started, running = time.monotonic(), {}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for name, command in commands.items():
        environment = {**os.environ, "PYTHONPATH": paths}
        if len(commands) > 1:  # a core each
            environment.setdefault("OMP_NUM_THREADS", "1")
        if "sanitizer" in command[0]:  # torch's allocator hands out parts of large blocks, past whose ends nothing is noticed
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        log = (folder / "logs" / f"{Path(name).stem}.log").open("w")
        running[name] = (
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True),
            log,
        )
    return [wait(name, process, log, started, seconds) for name, (process, log) in running.items()]


def wait(name: str, process: subprocess.Popen, log, started: float, seconds: float) -> dict:
    try:
        code = process.wait(max(0.0, seconds - (time.monotonic() - started)))
        outcome = "green" if code == 0 else f"exit status {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what it started
        process.wait()
        outcome = f"more than {seconds:.0f} s"
    log.close()
    took = round(time.monotonic() - started, 1)
    text = Path(log.name).read_text(errors="replace")
    lines = text.strip().splitlines() or [""]
    said = next((line for line in reversed(lines) if not line.startswith("{")), "")[:160]
    print(f"{name:36} {outcome:16} {took:6.1f} s  {said}", flush=True)
    if outcome != "green":
        print("\n".join(line[:300] for line in lines[-40:] if not line.startswith("{")), flush=True)
    return {"name": name, "outcome": outcome, "seconds": took, "said": said}


if __name__ == "__main__":
    sys.exit(main())
