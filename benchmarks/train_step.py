"""The whole training step: videos a second, share of the matrix peak, memory and waits, ours against naive.py and the paper.

A step is an update as pre-training makes it, in one micro-step: clip pairs from a store, block masks, dropout 0.1, both losses,
backward, clipping, AdamW (training.py builds both sides). Presets are Small at Table 14's resolutions, Table 6's sizes at 5×128
px, and Small with joint attention, `TxHxW`. The paper's speeds are videos a second on one V100.

TFLOP/s count what the mathematics needs (`operations`); the peak is that of a large square matrix product in the same dtype and
run. Memory is beyond weights and optimizer state. Syncs are how often the host waited for the device in a micro-step (on a CPU:
the ops that would make it wait), from the profiler. Data wait is the share of the time spent on getting batches: ours waits for
its loader, naive makes them in the step.

On a GPU: bfloat16 autocast; 128 videos a step, or 64 or 32 if more do not fit into an eager step; rows in order of importance
until --budget is spent; a step's time is from the end of the step before to its own end. On a CPU: 4 videos, Small, ours and
naive eager, in float32, and in bfloat16 if the processor multiplies it faster. Implementations take turns step by step.

    python benchmarks/train_step.py [--presets 'small 5x128'] [--impls 'ours compiled'] [--graphs] [--videos 128] [--quick]
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

import harness
import report
import timing
from harness import Benchmark, Case, Impl
from training import BOUNDS, TINY, Cell, Stores, Trained
from vimpac.config import SPECIAL_IDS, ModelConfig
from vimpac.layouts import axis_dimensions, parse_layout
from vimpac.model.masking import blocks_for_ratio
from vimpac.ops.block_mask import expected_block_ratio
from vimpac.training import profile
from vimpac.training.memory import keep_freed_memory


@dataclass(frozen=True)
class Preset:
    model: ModelConfig
    paper: float | None  # videos a second on one V100


SMALL = ModelConfig.small
PRESETS = {
    "small 5x128": Preset(SMALL(), 32.0),  # Tables 6, 13 and 14
    "small 10x128": Preset(SMALL(grid=(10, 16, 16)), 16.5),
    "small 5x256": Preset(SMALL(grid=(5, 32, 32)), 8.4),
    "small 10x256": Preset(SMALL(grid=(10, 32, 32)), 4.4),
    "6x768 5x128": Preset(ModelConfig(layers=6, width=768, heads=12), 21.0),
    "12x512 5x128": Preset(ModelConfig(layers=12, width=512, heads=8), 18.1),
    "base 5x128": Preset(ModelConfig.base(), 11.2),
    "large-half 5x128": Preset(ModelConfig.large_half(), 5.0),
    "small TxHxW 5x128": Preset(SMALL(layout="TxHxW"), 12.6),
    "small TxHxW 5x256": Preset(SMALL(layout="TxHxW", grid=(5, 32, 32)), None),
}
IMPLS = ("ours compiled", "ours", "ours graphs", "naive eager", "naive compiled")
RESOLUTIONS = ("small 10x128", "small 5x256", "small 10x256")
LAYOUTS = ("small TxHxW 5x128", "small TxHxW 5x256")
SIZES = ("6x768 5x128", "12x512 5x128", "base 5x128")
GPU_ORDER = [  # what to measure, the most important first
    ("small 5x128", IMPLS),
    *((preset, ("ours compiled",)) for preset in ("large-half 5x128", *RESOLUTIONS, *LAYOUTS, *SIZES)),
    *((preset, ("naive eager",)) for preset in ("large-half 5x128", *RESOLUTIONS, *SIZES, *LAYOUTS)),
    *((preset, ("naive compiled",)) for preset in ("large-half 5x128", *RESOLUTIONS, *SIZES, *LAYOUTS)),
    *((preset, ("ours",)) for preset in ("large-half 5x128", *RESOLUTIONS, *SIZES, *LAYOUTS)),
]
GPU_VIDEOS, CPU_VIDEOS, QUICK_VIDEOS = (128, 64, 32), (4,), (2,)
CPU_DEFAULT = ("small 5x128",), ("ours", "naive eager")
CPU_STEPS, GPU_STEPS, GPU_SECONDS, GPU_WARM_UP = 5, (5, 50), 3.0, 3
SPEED_GOAL, MEMORY_GOAL = 1.3, 0.5  # on a CPU, in float32
FASTER_PEAK = 1.5  # times float32's; an Intel Xeon with AMX comes to 6.6
OUT_OF_MEMORY = "OutOfMemoryError"
OWN_KEYS = (
    *("preset", "videos", "videos_per_s", "matrix_peak_share", "peak_bytes_per_video", "syncs", "data_wait_share"),
    "paper_videos_per_s",
)


def operations(config: ModelConfig, videos: int, mask_share: float) -> float:
    """Floating-point operations, two for each multiply-add, that an update needs on two clips of each video.

    Forward: linear layers on all tokens and [CLS]; both products of attention, where each token sees its line and [CLS], which
    is a query and (cls_in_context) a key on every line; token head and decoder on the masked share of the positions; the
    contrastive head. Backward: twice as many. Not counted: what is not a matrix product, InfoNCE's scores (4 n² of head_out),
    and whatever an implementation computes beyond this: logits of unmasked positions, filler rows, recomputed activations.
    """
    clips, tokens, C, K = 2 * videos, math.prod(config.grid), config.width, config.key_width
    rows, blocks = clips * (tokens + 1), parse_layout(config.layout, config.heads)
    linear = rows * (len(blocks) * 4 * C * K + 2 * C * config.hidden_width)
    pairs = sum(len(axes) ** -1 * line_pairs(config, axis) for axes in blocks for axis in axes)  # of an average head
    attention = clips * pairs * 2 * K
    token_head = mask_share * clips * tokens * (C * C + C * (config.vocab_size + SPECIAL_IDS))
    sizes = [C, *[config.head_width] * (config.head_layers - 1), config.head_out]
    contrastive_head = clips * sum(a * b for a, b in pairwise(sizes))
    return 3 * 2 * (config.layers * (linear + attention) + token_head + contrastive_head)


def line_pairs(config: ModelConfig, axis: str) -> int:
    """Pairs of query and key along an axis of one clip, over all its lines."""
    length = math.prod(config.grid[d - 1] for d in axis_dimensions(axis))
    return math.prod(config.grid) // length * (length + 1) * (length + config.cls_in_context)


@dataclass
class Entry:
    """An implementation in training on its way to a row."""

    impl: Impl
    row: dict
    trained: Trained | None = None  # None = its row is already what it will be
    ms: list[float] = field(default_factory=list)
    waited: float = 0.0  # seconds, within those of ms


class StepBenchmark(Benchmark):
    """Rows with OWN_KEYS beside the harness's."""

    def __init__(self, options: argparse.Namespace, name: str = "train_step"):
        super().__init__(name, options, budget=150.0, skip_ours=True)
        self.peaks: dict[torch.dtype, float] = {}
        self.peak(self.dtype)  # while nothing else is in memory
        self.fits: dict[tuple[str, str], int] = {}  # (preset, side) → videos that fit in an eager step

    def peak(self, dtype: torch.dtype) -> float:
        """TFLOP/s of a large product, measured once."""
        if dtype not in self.peaks:
            self.peaks[dtype] = timing.matrix_peak(self.device, dtype, self.quick)
            print(f"matrix peak {self.peaks[dtype]:.3g} TFLOP/s in {report.name(dtype)}")
        return self.peaks[dtype]

    def dtypes(self, asked: str | None) -> list[torch.dtype]:
        """The requested dtype, or the default and on a CPU also bfloat16 where its products are clearly faster."""
        if asked or self.on_gpu or self.quick or "AVX512" not in torch.backends.cpu.get_cpu_capability():
            return [self.dtype]
        faster = self.peak(torch.bfloat16) > FASTER_PEAK * self.peak(self.dtype)
        return [self.dtype, torch.bfloat16] if faster else [self.dtype]

    def blank(self, case, impl, status, note, error=None, which=None) -> list[dict]:
        return [dict.fromkeys(OWN_KEYS) | row for row in super().blank(case, impl, status, note, error, which)]

    def enter(self, case: Case, impl: Impl) -> Entry:
        """Build it, check it, warm it up, look at its memory and syncs."""
        skipped = self.skipped(case, impl)
        if skipped:
            return Entry(impl, skipped[0])
        started, entry = time.monotonic(), Entry(impl, self.blank(case, impl, "ok", impl.note)[0])
        try:
            if impl.compiled:
                torch._dynamo.reset()
            trained = impl.build()
            entry.row["error"] = report.finite(error := case.check(trained))
            if not error <= impl.bound:
                note = f"error {error:.2e} is above {impl.bound:.0e}: not timed"
                return Entry(impl, entry.row | {"status": "failed", "note": note})
            self.observe(trained, entry.row, impl)
            entry.trained = trained
        except harness.UNAVAILABLE as problem:
            entry.row = self.refused(case, impl, problem)
        self.learn(impl, [entry.row], time.monotonic() - started)
        return entry

    def observe(self, trained: Trained, row: dict, impl: Impl) -> None:
        """Memory and syncs of a step; the first one, which makes AdamW's state, is part of the warming up."""
        if not self.on_gpu:
            row["syncs"] = float(syncs(trained, self.device, 1))
        else:
            for _ in range(GPU_WARM_UP):
                trained.step()
            # What starting and stopping the profiler does is in both.
            row["syncs"] = (syncs(trained, self.device, 3) - syncs(trained, self.device, 1)) / 2
        if not impl.graph:
            row["peak_bytes"] = timing.peak_bytes(self.device, lambda: None, lambda _: trained.step())

    def refused(self, case: Case, impl: Impl, problem: Exception) -> dict:
        status = "unavailable" if isinstance(problem, torch.OutOfMemoryError) else harness.outcome(impl, problem)
        return self.blank(case, impl, status, report.first_line(problem))[0]

    def race(self, case: Case, impls: list[Impl]) -> list[dict]:
        """One row for each of these, whose steps take turns on a CPU. On a GPU it is one at a time, with all the memory."""
        entries = [self.enter(case, impl) for impl in impls]
        for _ in range(1 if self.on_gpu else CPU_STEPS):
            for entry in entries:
                if entry.trained is None:
                    continue
                try:
                    ms, waited = device_ms(entry.trained) if self.on_gpu else host_ms(entry.trained)
                    entry.ms += ms
                    entry.waited += waited
                except harness.UNAVAILABLE as problem:
                    entry.row, entry.trained = self.refused(case, entry.impl, problem), None
        for entry in entries:
            if entry.trained is not None:
                entry.trained.close()
                entry.row |= dict(zip(("ms", "ms_p20", "ms_p80"), timing.spread(entry.ms), strict=True))
                entry.row["timing"] = "events between steps" if self.on_gpu else "wall clock, taking turns"
                entry.row["data_wait_share"] = 1e3 * entry.waited / sum(entry.ms)
        return [entry.row for entry in entries]

    def fitting(self, preset: str, impl: str, make_cell, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """`sizes` from the largest whose eager step fits: found before compiling, which would take its time for each."""
        side = impl.split()[0]
        for videos in sizes[:-1] if (preset, side) not in self.fits else ():
            try:
                trained = getattr(make_cell(videos), side)(compiled=False)
                trained.step()
                torch.cuda.synchronize()
                self.fits[preset, side] = videos
                break
            except torch.OutOfMemoryError:
                pass
            finally:
                trained = None
                release()
        fits = self.fits.setdefault((preset, side), sizes[-1])
        return tuple(size for size in sizes if size <= fits)


def host_ms(trained: Trained) -> tuple[list[float], float]:
    """Of one step; seconds of it that getting its batch took."""
    started, before = time.perf_counter(), trained.waited
    trained.step()
    return [1e3 * (time.perf_counter() - started)], trained.waited - before


def device_ms(trained: Trained) -> tuple[list[float], float]:
    """Of several steps in a row, from the end of one to the end of the next; seconds in them that the host waited for batches.

    (At most that long the device had nothing to do: the host launches ahead of it.)
    """

    def run(steps: int) -> tuple[list[float], float]:
        torch.cuda.synchronize()
        before = trained.waited
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        marks[0].record()
        for mark in marks[1:]:
            trained.step()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(marks)], trained.waited - before

    estimate = sum(run(2)[0]) / 2e3
    return run(int(min(max(GPU_SECONDS / estimate, GPU_STEPS[0]), GPU_STEPS[1])))


def syncs(trained: Trained, device: torch.device, steps: int) -> int:
    """How often the host waited for the device in these steps of one micro-step each."""
    profiler = profile.start()
    for _ in range(steps):
        trained.step()
    profiler.stop()
    return len(profile.waits(profiler, device))


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(
    bench: StepBenchmark, stores: Stores, name: str, impls: tuple[str, ...], sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Rows of a preset, with as many of `sizes` videos a step as fit."""
    preset = PRESETS[name]
    if bench.quick:
        preset = dataclasses.replace(preset, model=dataclasses.replace(preset.model, **TINY))
    make_cell = partial(Cell, bench, stores, preset.model, dtype=dtype)
    for group in [(impl,) for impl in impls] if bench.on_gpu else [impls]:
        tried = sizes
        if bench.on_gpu and len(sizes) > 1 and bench.left() > bench.eager_seconds:
            tried = bench.fitting(name, group[0], make_cell, sizes)
        for videos in tried:
            cell = make_cell(videos)
            case = Case("training step", f"{name} videos={videos}", dtype, (), cell.check, ("step",))
            rows = bench.race(case, [implementation(cell, impl, dtype) for impl in group])
            release()
            if not any((row["note"] or "").startswith(OUT_OF_MEMORY) for row in rows):
                break
        for row in rows:
            complete(row, bench.peak(dtype), name, preset, videos)
            if videos < sizes[0] and row["status"] == "ok":
                row["note"] = "; ".join(filter(None, [row["note"], f"{videos} videos a step, more do not fit"]))
        bench.rows += rows
        bench.save()
        print("\n".join(report.line(row) + f"  [{name}, {report.name(dtype)}]" for row in rows), flush=True)


def implementation(cell: Cell, name: str, dtype: torch.dtype) -> Impl:
    side, *how = name.split()
    compiled, graphs = how in (["compiled"], ["graphs"]), how == ["graphs"]
    build = partial(cell.ours, compiled, graphs) if side == "ours" else partial(cell.naive, compiled)
    note = "no peak: what a graph keeps is not in the allocator's record" if graphs else ""
    options = {"bound": BOUNDS[dtype], "compiled": compiled, "graph": graphs, "note": note}
    return Impl(name, build, ours=side == "ours", required=side == "ours" and not graphs, **options)


def complete(row: dict, peak_tflop_per_s: float, name: str, preset: Preset, videos: int) -> None:
    """What follows from the time and the preset."""
    config = preset.model
    row |= {"preset": name, "videos": videos, "paper_videos_per_s": preset.paper}
    if row["peak_bytes"] is not None:
        row["peak_bytes_per_video"] = row["peak_bytes"] / videos
    if row["ms"] is not None:
        needed = operations(config, videos, expected_block_ratio(config.grid, blocks_for_ratio(config.grid)))
        row["videos_per_s"] = 1e3 * videos / row["ms"]
        row["tflop_per_s"] = needed / row["ms"] / 1e9
        row["matrix_peak_share"] = row["tflop_per_s"] / peak_tflop_per_s


TITLES = {  # key → (title, how to write it)
    "videos": ("videos", "{:d}".format),
    "ms": ("ms", "{:.1f}".format),
    "videos_per_s": ("videos/s", "{:.2f}".format),
    "paper_videos_per_s": ("paper", "{:.1f}".format),
    "matrix_peak_share": ("of peak", "{:.1%}".format),
    "peak_bytes": ("peak MiB", lambda x: f"{x / 2**20:.0f}"),
    "peak_bytes_per_video": ("a video", lambda x: f"{x / 2**20:.0f}"),
    "syncs": ("syncs", "{:g}".format),
    "data_wait_share": ("data", "{:.2%}".format),
}


def summary(rows: list[dict]) -> None:
    print(f"\n{'':18} {'':9} {'':15}" + " ".join(f"{title:>9}" for title, _ in TITLES.values()))
    for row in rows:
        cells = ["-" if row[key] is None else write(row[key]) for key, (_, write) in TITLES.items()]
        note = (f"   {row['status']}: " if row["status"] != "ok" else "   ") + (row["note"] or "")
        names = f"{row['preset']:18} {row['dtype']:9} {row['impl']:15}"
        print(f"{names}{' '.join(f'{cell:>9}' for cell in cells)}{note}".rstrip())


def comparison(rows: list[dict]) -> list[str]:
    """Ours against naive eager, a line a preset and dtype."""
    timed = {(row["preset"], row["dtype"], row["impl"]): row for row in rows if row["ms"] is not None}
    lines = []
    for preset, dtype in dict.fromkeys((row["preset"], row["dtype"]) for row in rows):
        ours, eager = timed.get((preset, dtype, "ours")), timed.get((preset, dtype, "naive eager"))
        if ours and eager:
            speed = ours["videos_per_s"] / eager["videos_per_s"]
            memory = ours["peak_bytes_per_video"] / eager["peak_bytes_per_video"]
            goals = (f" (goal ≥ {SPEED_GOAL})", f" (goal ≤ {MEMORY_GOAL})") if dtype == "float32" else ("", "")
            faster = f"{preset}, {dtype}: ours is {speed:.2f} times as fast as naive eager{goals[0]}"
            lines.append(f"{faster} with {memory:.2f} of its peak memory{goals[1]}")
    return lines


def plan(options: argparse.Namespace) -> list[tuple[str, tuple[str, ...]]]:
    """(preset, implementations) in the order in which they are measured."""
    if options.device == "cpu":
        presets, impls = options.presets or CPU_DEFAULT[0], tuple(options.impls or CPU_DEFAULT[1])
        return [(preset, impls) for preset in presets]
    wanted = set(options.impls or IMPLS) - (set() if options.graphs else {"ours graphs"})
    order = [(preset, tuple(i for i in impls if i in wanted)) for preset, impls in GPU_ORDER]
    if options.graphs and options.presets:
        order += [(preset, ("ours graphs",)) for preset in options.presets if preset != "small 5x128"]
    return [(preset, impls) for preset, impls in order if impls and preset in (options.presets or PRESETS)]


def main(argv: list[str] | None = None) -> int:
    options = harness.arguments(
        __doc__,
        argv,
        presets={"nargs": "+", "choices": list(PRESETS), "help": "default: all on a GPU, small 5x128 on a CPU"},
        impls={"nargs": "+", "choices": IMPLS, "help": "default: all but graphs on a GPU, ours and naive eager on a CPU"},
        graphs={"action": "store_true", "help": "also the step as a CUDA graph: of small 5x128, or of --presets"},
        videos={"type": int, "help": f"videos a step; default: {GPU_VIDEOS} on a GPU, what fits, {CPU_VIDEOS[0]} on a CPU"},
    )
    if options.device == "cpu":
        keep_freed_memory()  # as train.py does; for all sides, since it is the process's
    bench = StepBenchmark(options)
    sizes = GPU_VIDEOS if bench.on_gpu else CPU_VIDEOS
    sizes = (options.videos,) if options.videos else QUICK_VIDEOS if bench.quick else sizes
    print(report.header(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        stores = Stores(Path(folder))
        for dtype in bench.dtypes(options.dtype):
            for preset, impls in plan(options):
                run(bench, stores, preset, impls, sizes, dtype)
    summary(bench.rows)
    if not bench.on_gpu:
        print("\n".join(["", *comparison(bench.rows)]))
    return bench.finish(small=not bench.on_gpu)


if __name__ == "__main__":
    sys.exit(main())
