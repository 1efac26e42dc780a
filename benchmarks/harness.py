"""What the benchmarks share. A script lists its cases and implementations; `Benchmark` checks, times and reports them.

Check: outputs and gradients against float64 before anything is timed: ‖out − expected‖ / ‖expected‖, the worst of them. A row
above the dtype's bound in BOUNDS is "failed" and has no time. A failed row of ours makes the exit status 1.

Time and memory: timing.py; a row's "timing" says how it was timed. GB/s counts the bytes that must move. copy_share compares it
with a copy between two large tensors in the same run (bytes read plus bytes written), timed in the same way.

The last line of standard output is one JSON object. JSON, CSV and PNG go to benchmarks/results/DEVICE, of which git keeps the
JSON; render.py writes the tables of README.md and docs/ from it. --quick writes only with --results.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import report
import timing

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # from a bare checkout, where vimpac is not installed, only benchmarks/ is on the path

BOUNDS = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
KEYS = (
    *("op", "impl", "shape", "dtype", "pass", "status", "ms", "ms_p20", "ms_p80", "gb_per_s", "copy_share", "tflop_per_s"),
    *("peak_bytes", "error", "timing", "note"),
)
# What a library that is missing, too old, too new or too small for a call raises; all else is a bug here.
UNAVAILABLE = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError, OSError)


@dataclass
class Case:
    """One shape of one op."""

    op: str
    shape: str
    dtype: torch.dtype
    inputs: Sequence[Tensor]
    check: Callable[[Any], float]  # a built implementation → its error
    passes: Sequence[str] = ("forward",)
    upstream: Sequence[Tensor] = ()  # gradient of each output that has one
    bytes: dict[str, float] = field(default_factory=dict)  # pass → bytes that must move
    flops: dict[str, float] = field(default_factory=dict)  # pass → operations of the matrix products
    calls: Callable[[Any], dict] | None = None  # built implementation → pass → (prepare, run); None = `passes`


@dataclass
class Impl:
    """One implementation: `build` imports and compiles what it needs and returns a function of the case's inputs."""

    name: str
    build: Callable[[], Callable]
    ours: bool = False
    required: bool = False  # ours, and nothing excuses it from running
    compiled: bool = False  # by torch.compile: slow to build, first to go when time runs out
    graph: bool = True  # may be captured in a CUDA graph
    check: Callable[[Any], float] | None = None  # instead of the case's
    bound: float | None = None  # instead of the dtype's
    note: str = ""


def arguments(description: str | None, argv: Sequence[str] | None = None, **extra: dict) -> argparse.Namespace:
    """The options of every benchmark, and a script's own: name → keywords of add_argument."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    dtypes = [report.name(dtype) for dtype in BOUNDS]
    parser.add_argument("--dtype", choices=dtypes, help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing compiled: shows that the script runs")
    parser.add_argument("--results", type=Path, help="folder to write to instead of benchmarks/results/DEVICE")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--budget", type=float, help="seconds after which peers, and what must be compiled, are skipped")
    for key, keywords in extra.items():
        parser.add_argument(f"--{key.replace('_', '-')}", **keywords)
    options = parser.parse_args(argv)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return options


class Benchmark:
    """Collects rows; `finish` prints and writes them."""

    def __init__(
        self,
        title: str,
        options: argparse.Namespace,
        budget: float = 120.0,
        dtype: torch.dtype | None = None,
        skip_ours: bool = False,  # too, when time runs out
    ):
        self.title, self.options, self.rows, self.printed = title, options, [], ""
        self.device = torch.device(options.device)
        self.on_gpu = self.device.type == "cuda"
        default = dtype or (torch.bfloat16 if self.on_gpu else torch.float32)
        self.dtype = getattr(torch, options.dtype) if options.dtype else default
        self.quick, self.skip_ours = options.quick, skip_ours
        self.started, self.budget = time.monotonic(), budget if options.budget is None else options.budget
        self.compile_seconds, self.eager_seconds = 8.0 if self.on_gpu else 40.0, 0.0  # a row's, until one was seen
        self.copy_gb_per_s = timing.copy_bandwidth(self.device, self.quick)
        self.copy_graph_gb_per_s = timing.copy_bandwidth(self.device, self.quick, graph=True) if self.on_gpu else None
        print(f"{title} on {report.device_name(self.device)}, torch {torch.__version__}, copy {self.copy_gb_per_s:.1f} GB/s")

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.started)

    def add(self, case: Case, impls: Sequence[Impl]) -> None:
        """Check and time each implementation on a case."""
        title = f"\n{case.op} {case.shape} {report.name(case.dtype)}"
        if title != self.printed:
            print(f"{title}\n{report.header()}", flush=True)
        self.printed = title
        for impl in impls:
            started = time.monotonic()
            rows = self.skipped(case, impl) or self.measure(case, impl)
            self.learn(impl, rows, time.monotonic() - started)
            self.rows += rows
            print("\n".join(report.lines(rows)), flush=True)
            self.save()
            gc.collect()  # what a failed call's traceback held
            if self.on_gpu:
                torch.cuda.empty_cache()

    def learn(self, impl: Impl, rows: Sequence[dict], seconds: float) -> None:
        """How long the next implementation may take, from the last one."""
        if impl.compiled and rows[0]["status"] == "ok":
            self.compile_seconds = max(5.0, 1.2 * seconds)
        elif not impl.compiled:
            self.eager_seconds = seconds

    def skipped(self, case: Case, impl: Impl) -> list[dict]:
        if impl.compiled and self.quick:
            return self.blank(case, impl, "skipped", "--quick compiles nothing")
        needed = self.compile_seconds if impl.compiled else self.eager_seconds
        if (impl.compiled or self.skip_ours or not impl.ours) and self.left() < needed:
            return self.blank(case, impl, "skipped", f"budget of {self.budget:.0f} s")
        return []

    def measure(self, case: Case, impl: Impl) -> list[dict]:
        try:
            if impl.compiled:
                torch._dynamo.reset()  # or shapes seen before count towards its recompilation limit
            function = impl.build()
            error = (impl.check or case.check)(function)
        except UNAVAILABLE as problem:
            return self.blank(case, impl, outcome(impl, problem), report.first_line(problem))
        bound = impl.bound if impl.bound is not None else BOUNDS[case.dtype]
        if not error <= bound:
            return self.blank(case, impl, "failed", f"error {error:.2e} is above {bound:.0e}: not timed", report.finite(error))
        calls = case.calls(function) if case.calls else passes(function, case.inputs, case.upstream)
        return [self.time(case, impl, which, calls[which], error) for which in case.passes]

    def time(self, case: Case, impl: Impl, which: str, call: tuple[Callable, Callable], error: float) -> dict:
        """A row. call: prepare and run, as timing.timed takes them."""
        prepare, run = call
        row = self.blank(case, impl, "ok", impl.note, error, [which])[0]
        try:
            row["peak_bytes"] = timing.peak_bytes(self.device, prepare, run)
            graph = impl.graph and which != "backward"
            times, row["timing"] = timing.timed(self.device, prepare, run, self.quick, graph)
        except UNAVAILABLE as problem:
            return {**row, "status": outcome(impl, problem), "note": report.first_line(problem)}
        row["ms"], row["ms_p20"], row["ms_p80"] = times
        if which in case.bytes:
            row["gb_per_s"] = case.bytes[which] / times[0] / 1e6
            by_graph = self.on_gpu and row["timing"].startswith("graph")
            row["copy_share"] = row["gb_per_s"] / (self.copy_graph_gb_per_s if by_graph else self.copy_gb_per_s)
        if which in case.flops:
            row["tflop_per_s"] = case.flops[which] / times[0] / 1e9
        return row

    def blank(self, case, impl, status, note, error=None, which=None) -> list[dict]:
        """Rows without times, one a pass."""
        values = {"op": case.op, "impl": impl.name, "shape": case.shape, "dtype": report.name(case.dtype)}
        values |= {"status": status, "note": note, "error": error}
        return [{**dict.fromkeys(KEYS), **values, "pass": each} for each in which or case.passes]

    def result(self, small: bool, complete: bool) -> dict:
        """The JSON's content. complete: False while more rows follow."""
        return {
            "benchmark": self.title,
            "device": report.device_name(self.device),
            "processor": report.processor(),
            "torch": torch.__version__,
            "triton": report.triton_version(),
            "threads": None if self.on_gpu else torch.get_num_threads(),
            "copy_gb_per_s": self.copy_gb_per_s,
            "copy_graph_gb_per_s": self.copy_graph_gb_per_s,
            "quick": self.quick,
            "seconds": round(time.monotonic() - self.started, 1),
            "small": small,
            "complete": complete,
            "rows": self.rows,
        }

    @property
    def folder(self) -> Path | None:
        """Where the files go, None where none are written."""
        if self.options.no_write or (self.quick and not self.options.results):
            return None
        return self.options.results or ROOT / "benchmarks" / "results" / report.slug(report.device_name(self.device))

    def save(self) -> None:
        """Write the rows so far: what was measured stays where a limit ends the process."""
        if self.folder is not None:
            report.write_json(self.folder, self.result(not self.on_gpu, complete=False))

    def finish(self, small: bool = False) -> int:
        """Write the files, print the JSON line; returns the exit status. small: the shapes are not those of a GPU."""
        result = self.result(small, complete=True)
        if small:
            print("\nsmall shapes: no measure of a GPU")
        if self.folder is not None:
            report.write(self.folder, result)
        failed = [row for row in self.rows if row["status"] == "failed" and row["impl"].startswith("ours")]
        print(json.dumps(result, allow_nan=False), flush=True)
        return 1 if failed else 0


def ours(op: str, call: Callable, inputs: Sequence[Tensor], **options) -> list[Impl]:
    """What backend=None chooses, then every other backend by name but the reference. call(*inputs, backend=…) runs the op."""
    from vimpac.ops import dispatch  # not above: the path was not set yet

    default = chosen_backend(lambda: call(*inputs, backend=None))
    first = Impl("ours", lambda: partial(call, backend=None), ours=True, required=True, note=f"backend {default}", **options)
    others = [other for other in dispatch.names(op) if other not in ("reference", default)]
    return [first, *(Impl(f"ours:{other}", lambda b=other: partial(call, backend=b), ours=True, **options) for other in others)]


def chosen_backend(call: Callable[[], object]) -> str | None:
    """The backend that a call with backend=None runs; None if the call fails, which its row will tell."""
    from vimpac.ops import dispatch

    names, choose = [], dispatch.choose
    try:
        with mock.patch.object(dispatch, "choose", lambda *a: names.append(choose(*a)) or names[-1]), torch.no_grad():
            call()
    except UNAVAILABLE:
        return None
    return names[-1]


def reference(call: Callable, **options) -> list[Impl]:
    """The reference, eager and compiled."""
    eager = Impl("reference eager", lambda: call, **options)
    return [eager, Impl("reference compiled", lambda: torch.compile(call, dynamic=False), compiled=True, **options)]


def outputs(value) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def gradients(outs: Sequence[Tensor], inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> tuple[Tensor, ...]:
    outs = [x for x in outs if x.requires_grad]
    return torch.autograd.grad(outs, [x for x in inputs if x.requires_grad], upstream or None)


def evaluate(function: Callable, inputs: Sequence[Tensor], upstream: Sequence[Tensor] = ()) -> list[Tensor]:
    """Outputs, then the gradients of the inputs that have one."""
    outs = outputs(function(*inputs))
    grads = gradients(outs, inputs, upstream) if any(x.requires_grad for x in outs) else ()
    return [x.detach() for x in (*outs, *grads)]


def exact(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The inputs in float64, with gradients where they had them."""
    return [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]


def distance(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """‖got − expected‖ / ‖expected‖, the worst of several tensors; infinite if anything is not finite."""
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
        b = b.double()
        error = float((a.double() - b).norm() / b.norm().clamp(min=1e-300))
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def outcome(impl: Impl, problem: Exception) -> str:
    """What an implementation that raised is: a peer may be missing, and a backend of ours refuse a call (ValueError)."""
    refused = isinstance(problem, ValueError) and not impl.required
    return "unavailable" if refused or not impl.ours else "failed"


def passes(function: Callable, inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> dict[str, tuple]:
    """pass → (prepare, run): run(prepare()) is the call, only run is timed."""

    def forward(_=None):
        return outputs(function(*inputs))

    def backward(outs):
        return gradients(outs, inputs, upstream)

    def both(_):
        return backward(forward())

    return {"forward": (timing.nothing, forward), "backward": (forward, backward), "forward+backward": (timing.nothing, both)}
