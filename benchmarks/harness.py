"""What the benchmarks share: check, time, memory, table, files. A script lists its cases and implementations.

Check: outputs and gradients against float64 before anything is timed, ‖out − expected‖ / ‖expected‖, the worst of them; above
BOUNDS of the dtype a row is "failed" and has no time. A failed row of ours makes the exit status 1.

Time, on a GPU: CUDA events around one call, 256 MiB read before each to flush the L2 cache (written ones would be written back
during the call); a call under a millisecond is captured in a CUDA graph 20 times over and its replays are timed, so that launch
gaps do not count (its inputs then stay in L2). On a CPU: the wall clock. Median, 20th and 80th percentile; rows say which in
"timing". GB/s counts the bytes that must move, copy_share relates it to a copy between two large tensors in the same run (bytes
read plus bytes written), timed in the same way.

Memory: the peak above what was allocated before the call, from torch's allocator (on a CPU: the profiler's record of it).

The last line of standard output is one JSON object; JSON, CSV and PNG go to benchmarks/results/DEVICE, of which git keeps the
JSON: render.py writes the tables of README.md and docs/ from it. --quick writes only where --results says.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # from a bare checkout, where vimpac is not installed, only benchmarks/ is on the path

BOUNDS = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
KEYS = (
    *("op", "impl", "shape", "dtype", "pass", "status", "ms", "ms_p20", "ms_p80", "gb_per_s", "copy_share", "tflop_per_s"),
    *("peak_bytes", "error", "timing", "note"),
)
L2_BYTES = 256 << 20
GRAPH_CALLS = 20
# What a library that is missing, too old, too new or too small for a call raises; all else is a bug here.
UNAVAILABLE = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError, OSError)


@dataclass
class Case:
    """One shape of one op."""

    op: str
    shape: str
    dtype: torch.dtype
    inputs: Sequence[Tensor]
    check: Callable[[Callable], float]  # a built implementation → its error
    passes: Sequence[str] = ("forward",)
    upstream: Sequence[Tensor] = ()  # gradient of each output that has one
    bytes: dict[str, float] = field(default_factory=dict)  # pass → bytes that must move
    flops: dict[str, float] = field(default_factory=dict)  # pass → operations of the matrix products
    calls: Callable[[Callable], dict] | None = None  # built implementation → pass → (prepare, run); None = `passes`


@dataclass
class Impl:
    """One implementation: `build` imports and compiles what it needs and returns a function of the case's inputs."""

    name: str
    build: Callable[[], Callable]
    ours: bool = False
    required: bool = False  # ours, and nothing excuses it from running
    compiled: bool = False  # by torch.compile: slow to build, first to go when time runs out
    graph: bool = True  # may be captured in a CUDA graph
    check: Callable[[Callable], float] | None = None  # instead of the case's
    bound: float | None = None  # instead of the dtype's
    note: str = ""


def arguments(description: str, argv: Sequence[str] | None = None, **extra: dict) -> argparse.Namespace:
    """The options of every benchmark, and a script's own: name → keywords of add_argument."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=[name(dtype) for dtype in BOUNDS], help="default: bfloat16 on cuda, float32 on cpu")
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
        self.copy_gb_per_s = copy_bandwidth(self.device, self.quick)
        self.copy_graph_gb_per_s = copy_bandwidth(self.device, self.quick, graph=True) if self.on_gpu else None
        print(f"{title} on {device_name(self.device)}, torch {torch.__version__}, copy {self.copy_gb_per_s:.1f} GB/s")

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.started)

    def add(self, case: Case, impls: Sequence[Impl]) -> None:
        """Check and time each implementation on a case."""
        title = f"\n{case.op} {case.shape} {name(case.dtype)}"
        if title != self.printed:
            print(f"{title}\n{header()}", flush=True)
        self.printed = title
        for impl in impls:
            started = time.monotonic()
            rows = self.skipped(case, impl) or self.measure(case, impl)
            self.learn(impl, rows, time.monotonic() - started)
            self.rows += rows
            print("\n".join(lines(rows)), flush=True)
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
            return self.blank(case, impl, outcome(impl, problem), first_line(problem))
        bound = impl.bound if impl.bound is not None else BOUNDS[case.dtype]
        if not error <= bound:
            return self.blank(case, impl, "failed", f"error {error:.2e} is above {bound:.0e}: not timed", finite(error))
        calls = case.calls(function) if case.calls else passes(function, case.inputs, case.upstream)
        return [self.time(case, impl, which, *calls[which], error) for which in case.passes]

    def time(self, case: Case, impl: Impl, which: str, prepare: Callable, run: Callable, error: float) -> dict:
        row = self.blank(case, impl, "ok", impl.note, error, [which])[0]
        try:
            row["peak_bytes"] = peak_bytes(self.device, prepare, run)
            graph = impl.graph and which != "backward"
            times, row["timing"] = time_gpu(prepare, run, graph) if self.on_gpu else time_cpu(prepare, run, self.quick)
        except UNAVAILABLE as problem:
            return {**row, "status": outcome(impl, problem), "note": first_line(problem)}
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
        values = {"op": case.op, "impl": impl.name, "shape": case.shape, "dtype": name(case.dtype)}
        values |= {"status": status, "note": note, "error": error}
        return [{**dict.fromkeys(KEYS), **values, "pass": each} for each in which or case.passes]

    def result(self, small: bool, complete: bool) -> dict:
        """The JSON's content. complete: False while more rows follow."""
        return {
            "benchmark": self.title,
            "device": device_name(self.device),
            "processor": processor(),
            "torch": torch.__version__,
            "triton": triton_version(),
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
        return self.options.results or ROOT / "benchmarks" / "results" / slug(device_name(self.device))

    def save(self) -> None:
        """Write the rows so far: what was measured stays where a limit ends the process."""
        if self.folder is not None:
            write_json(self.folder, self.result(not self.on_gpu, complete=False))

    def finish(self, small: bool = False) -> int:
        """Write the files, print the JSON line; returns the exit status. small: the shapes are not those of a GPU."""
        result = self.result(small, complete=True)
        if small:
            print("\nsmall shapes: no measure of a GPU")
        if self.folder is not None:
            write(self.folder, result)
        failed = [row for row in self.rows if row["status"] == "failed" and row["impl"].startswith("ours")]
        print(json.dumps(result, allow_nan=False), flush=True)
        return 1 if failed else 0


# --- ours -------------------------------------------------------------------------------------------------------------


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


# --- checking ---------------------------------------------------------------------------------------------------------


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


# --- timing -----------------------------------------------------------------------------------------------------------


def passes(function: Callable, inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> dict[str, tuple]:
    """pass → (prepare, run): run(prepare()) is the call, only run is timed."""

    def forward(_=None):
        return outputs(function(*inputs))

    def backward(outs):
        return gradients(outs, inputs, upstream)

    def both(_):
        return backward(forward())

    def nothing():
        return None

    return {"forward": (nothing, forward), "backward": (forward, backward), "forward+backward": (nothing, both)}


def time_cpu(prepare: Callable, run: Callable, quick: bool) -> tuple[tuple, str]:
    """The caller has warmed it up."""
    seconds, times, started = 0.02 if quick else 0.6, [], time.perf_counter()
    while len(times) < 2 or (time.perf_counter() - started < seconds and len(times) < 1000):
        state = prepare()
        begin = time.perf_counter()
        run(state)
        times.append(1e3 * (time.perf_counter() - begin))
    return spread(times), "wall clock"


def time_gpu(prepare: Callable, run: Callable, graph: bool, milliseconds: float = 200.0) -> tuple[tuple, str]:
    for _ in range(3):
        run(prepare())
    estimate = statistics.median(events(prepare, run, 5))
    how = "events"
    if graph and estimate < 1.0:
        try:
            times = events(lambda: None, captured(run), 50)
            return spread([x / GRAPH_CALLS for x in times]), f"graph of {GRAPH_CALLS} calls"
        except RuntimeError as problem:
            how = f"events, since no graph: {first_line(problem)}"
    repeats = int(min(200, max(10, milliseconds / estimate)))
    return spread(events(prepare, run, repeats)), how


def events(prepare: Callable, run: Callable, repeats: int) -> list[float]:
    """Milliseconds on the device of each of several calls, with a cold L2 cache."""
    cache = torch.zeros(L2_BYTES // 4, dtype=torch.int32, device="cuda")
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in marks:
        state = prepare()
        cache.amax()
        start.record()
        run(state)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks]


def captured(run: Callable) -> Callable:
    """A graph of GRAPH_CALLS calls, to replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # autograd runs backward on the stream of the forward, so both are warmed up on it
        for _ in range(3):
            run(None)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(GRAPH_CALLS):
            run(None)
    return lambda _: graph.replay()


def spread(times: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    times = sorted(times)
    return statistics.median(times), times[int(0.2 * (len(times) - 1))], times[math.ceil(0.8 * (len(times) - 1))]


def copy_bandwidth(device: torch.device, quick: bool = False, graph: bool = False) -> float:
    """GB/s of a copy between two tensors, bytes read plus bytes written. graph: copies that follow one another, on a GPU."""
    size = (512 << 20) if device.type == "cuda" else (4 << 20) if quick else (64 << 20)
    source = torch.randint(100, (size,), dtype=torch.int8, device=device)
    target = source.clone()

    def copy(_):
        target.copy_(source)

    times, _ = time_gpu(lambda: None, copy, graph) if device.type == "cuda" else time_cpu(lambda: None, copy, quick)
    return 2 * size / times[0] / 1e6


def matrix_peak(device: torch.device, dtype: torch.dtype, quick: bool = False) -> float:
    """TFLOP/s of the product of two large square matrices: what a step of matrix products could reach at most.

    On a CPU the better of torch's product and the convolution that vimpac.model.linear makes of it.
    """
    size = 8192 if device.type == "cuda" else 128 if quick else 2048
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    out = a @ b
    ways = [lambda _: torch.mm(a, b, out=out)]
    if device.type == "cpu":
        from vimpac.model import linear  # not before sys.path knows a bare checkout's vimpac

        ways.append(lambda _: linear.product(a, b))
    timed = [
        time_gpu(lambda: None, way, False) if device.type == "cuda" else time_cpu(lambda: None, way, quick) for way in ways
    ]
    return 2 * size**3 / min(times[0] for times, _ in timed) / 1e9


def peak_bytes(device: torch.device, prepare: Callable, run: Callable) -> int:
    """Most bytes allocated during run, beyond what was before prepare."""
    if device.type == "cpu":
        return cpu_peak_bytes(prepare, run)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    state = prepare()
    torch.cuda.reset_peak_memory_stats()
    run(state)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cpu_peak_bytes(prepare: Callable, run: Callable) -> int:
    """The same from the profiler's record of torch's CPU allocator; what libraries allocate themselves is not in it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or each profile prints two lines
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        state = prepare()
        split = time.time_ns()
        run(state)
    now = peak = 0
    memory = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now) if event.start_ns() >= split else max(0, now)
    return peak


# --- words and files --------------------------------------------------------------------------------------------------


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def first_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {(str(problem).strip().splitlines() or [''])[0]}"[:200]


def finite(x: float) -> float | None:
    """x, or None where JSON has no word for it."""
    return x if math.isfinite(x) else None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def processor() -> str:
    """The host's, by the name that it gives itself."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


COLUMNS = {  # key → (title, width, how to write it)
    "impl": ("", 26, str),
    "pass": ("pass", 17, str),
    "ms": ("ms", 10, "{:.4g}".format),
    "ms_p20": ("p20", 10, "{:.4g}".format),
    "ms_p80": ("p80", 10, "{:.4g}".format),
    "gb_per_s": ("GB/s", 8, "{:.4g}".format),
    "copy_share": ("of copy", 8, "{:.1%}".format),
    "tflop_per_s": ("TFLOP/s", 8, "{:.3g}".format),
    "peak_bytes": ("peak MiB", 9, lambda x: f"{x / 2**20:.1f}"),
    "error": ("error", 9, "{:.1e}".format),
}


def header() -> str:
    return " ".join(f"{title:{'<' if key in ('impl', 'pass') else '>'}{width}}" for key, (title, width, _) in COLUMNS.items())


def lines(rows: Sequence[dict]) -> list[str]:
    """A row's line of the table; rows that only say why they have no numbers share one."""
    return [line(row) for row in rows] if any(row["error"] is not None for row in rows) else [line({**rows[0], "pass": "all"})]


def line(row: dict) -> str:
    cells = []
    for key, (_, width, write_cell) in COLUMNS.items():
        text = "-" if row[key] is None else write_cell(row[key])
        cells.append(f"{text:{'<' if key in ('impl', 'pass') else '>'}{width}}")
    status = "" if row["status"] == "ok" else f"{row['status']}: "
    return " ".join([*cells, status + (row["note"] or "")]).rstrip()


def write(folder: Path, result: dict) -> None:
    """TITLE.json, TITLE.csv and, where matplotlib is installed, TITLE.png."""
    path = write_json(folder, result)
    with path.with_suffix(".csv").open("w", newline="") as file:
        keys = list(dict.fromkeys(key for row in result["rows"] for key in row))
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(result["rows"])
    try:
        draw(path.with_suffix(".png"), result)
    except ImportError:
        print("no figure: matplotlib is not installed")
    print(f"\nwrote {path}.csv, .json")


def write_json(folder: Path, result: dict) -> Path:
    """FOLDER/TITLE.json, whole or not at all; returns it without the suffix."""
    from vimpac.files.atomic import write_text  # not above: the path was not set yet

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / result["benchmark"]
    write_text(path.with_suffix(".json"), json.dumps(result, indent=1, allow_nan=False) + "\n")
    return path


def draw(path: Path, result: dict) -> None:
    """Bars of the median, one panel a shape, whiskers from the 20th to the 80th percentile."""
    from matplotlib.figure import Figure

    shapes: dict[str, list[dict]] = {}
    for row in result["rows"]:
        if row["ms"] is not None:
            shapes.setdefault(f"{row['op']} {row['shape']} {row['dtype']}", []).append(row)
    if not shapes:
        return
    heights = [len(rows) + 2 for rows in shapes.values()]
    figure = Figure(figsize=(9, 0.2 * sum(heights) + 1), layout="constrained")
    panels = figure.subplots(len(shapes), squeeze=False, height_ratios=heights)[:, 0]
    for panel, (title, rows) in zip(panels, shapes.items(), strict=True):
        ms = [row["ms"] for row in rows]
        whiskers = [[row["ms"] - row["ms_p20"] for row in rows], [row["ms_p80"] - row["ms"] for row in rows]]
        colors = ["tab:blue" if row["impl"].startswith("ours") else "tab:gray" for row in rows]
        panel.barh(range(len(rows)), ms, xerr=whiskers, color=colors)
        panel.set_yticks(range(len(rows)), [f"{row['impl']}, {row['pass']}" for row in rows], fontsize=7)
        panel.invert_yaxis()
        if max(ms) > 50 * min(ms):  # the shortest bar would not be seen
            panel.set_xscale("log")
        panel.set_title(title, fontsize=8, loc="left")
    panels[-1].set_xlabel("milliseconds")
    figure.suptitle(f"{result['benchmark']}, {result['device']}, torch {result['torch']}", fontsize=9)
    figure.savefig(path, dpi=100)
