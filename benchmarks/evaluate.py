"""Evaluation of a fine-tuned model: its share of the speed of bare forward passes on ready batches of the same size.

ours is what `vimpac evaluate` does with each video: read it once from a store on disk, cut 10 clips × 3 views, a forward pass
of all of them, softmax, mean over views, scores to the host. Opposite stand the forward passes alone: the same model,
the same number of passes on as many clips, of which one batch is ready on the device; on a GPU the host waits at the end. Both
take turns in one run. The goal is 0.9 of the bare passes' speed.

Check: scores of a video against the model in float64, a clip at a time, on ids that are read one by one.

On a GPU: bfloat16 autocast, Small at 5×128 px and Large-Half at 10×256 px. On a CPU: Small, float32,
one video of 2 clips × 3 views (30 take a minute). Memory is beyond the
weights. How it is timed: the wall clock.

    python benchmarks/evaluate.py [--presets 'small 5x128'] [--videos 64] [--batch 32] [--quick]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import harness
import report
import timing
from harness import Benchmark, Case, Impl
from vimpac.config import ModelConfig
from vimpac.data.format import StoreSettings, TokenizerInfo, view_set
from vimpac.data.store import StoreWriter, TokenStore, finish_store
from vimpac.data.test_clips import TestClips
from vimpac.data.views import test_views
from vimpac.distributed import World
from vimpac.evaluation.classify import score_videos
from vimpac.evaluation.scores import average
from vimpac.model import ClassificationModel
from vimpac.training.memory import keep_freed_memory

PRESETS = {
    "small 5x128": ModelConfig.small(),
    "large-half 10x256": ModelConfig.large_half(grid=(10, 32, 32)),
}
TINY = {"layers": 1, "width": 16, "heads": 2, "attention_width": None, "mlp_width": None, "grid": (3, 4, 4), "vocab_size": 50}
CLASSES, VIEWS, FRAMES = 400, 3, (40, 120)
CLIPS = {"cpu": 2, "cuda": 10, "quick": 10}
VIDEOS = {"cpu": 1, "cuda": 64, "quick": 2}
ROUNDS = {"cpu": 3, "cuda": 5, "quick": 2}
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}  # of scores, after all layers
GOAL = 0.9
BARE = "bare forward passes"
OWN_KEYS = ("preset", "videos", "clips_per_s", "bare_share")


@dataclass(frozen=True)
class Cell:
    """A model and the clips that it scores."""

    folder: Path
    config: ModelConfig
    videos: int
    clips_each: int
    batch: int
    device: torch.device
    autocast: torch.dtype | None

    @cached_property
    def store(self) -> TokenStore:
        """Random ids in three views."""
        settings = StoreSettings(
            TokenizerInfo("patch-vq", self.config.vocab_size, 8, "0" * 64), 4.0, 8 * self.config.grid[1], view_set("test")
        )
        writer, rng = StoreWriter(self.folder, settings), np.random.default_rng(0)
        for i in range(self.videos):
            shape = VIEWS, int(rng.integers(*FRAMES)), *self.config.grid[1:]
            writer.add(f"{i:05d}.mp4", rng.integers(self.config.vocab_size, size=shape, dtype=np.uint16))
        writer.close()
        finish_store(self.folder)
        return TokenStore(self.folder)

    @cached_property
    def clips(self) -> TestClips:
        grid, pad = self.config.grid, self.config.pad_id
        return TestClips(self.store, np.arange(self.videos), self.clips_each, test_views(self.store), grid[0], pad)

    @cached_property
    def model(self) -> ClassificationModel:
        torch.manual_seed(0)
        model = ClassificationModel(self.config, CLASSES)
        torch.nn.init.normal_(model.classifier.weight, std=0.1)
        return model.to(self.device).eval()

    def score(self) -> np.ndarray:
        found = score_videos(self.model, self.clips, World(0, 1, self.device), self.batch, self.autocast, self.clips.padded)
        assert found is not None
        return found

    @cached_property
    def shapes(self) -> list[int]:
        """Clips of each forward pass that scoring all videos takes."""
        seen: list[int] = []
        handle = self.model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
        self.score()
        handle.remove()
        return seen

    @cached_property
    def ready(self) -> dict[int, Tensor]:
        """A batch of clips on the device for each of these sizes."""
        flat = torch.from_numpy(self.clips.read(0, math.ceil(max(self.shapes) / (VIEWS * self.clips_each)))).flatten(0, 2)
        return {size: flat[:size].to(self.device) for size in set(self.shapes)}

    @torch.inference_mode()
    def bare(self) -> list[Tensor]:
        """The forward passes alone."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            logits = [self.model(self.ready[size], False) for size in self.shapes]
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return logits

    @cached_property
    @torch.inference_mode()
    def expected(self) -> Tensor:
        """Scores [K] of the first video's first and last clip, in float64, a clip at a time."""
        exact = ClassificationModel(self.config, CLASSES).double().eval()
        exact.load_state_dict(self.model.state_dict())
        T, scores = self.config.grid[0], []
        for start in (0, int(self.store.frames[0]) - T):
            for view in range(VIEWS):
                ids = self.store.read(0, start, T, view).astype(np.int64)
                scores.append(exact(torch.from_numpy(ids)[None])[0].softmax(-1))
        return torch.stack(scores).mean(0)

    def check(self, run: Callable) -> float:
        """ours: error of the first video's scores. bare: of as many clips, the difference from ours is the order of sums."""
        if run == self.score:
            found = average(self.score()[:1, [0, -1]])[0]
        else:
            tokens = torch.from_numpy(self.clips.read(0, 1)[0, [0, -1]]).flatten(0, 1).to(self.device)
            with torch.inference_mode(), torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                found = self.model(tokens, False).float().softmax(-1).mean(0).cpu().numpy()
        return harness.distance([torch.from_numpy(found)], [self.expected])


class EvaluateBenchmark(Benchmark):
    """Rows with OWN_KEYS beside the harness's."""

    def __init__(self, options: argparse.Namespace):
        super().__init__("evaluate", options)

    def blank(self, case, impl, status, note, error=None, which=None) -> list[dict]:
        return [dict.fromkeys(OWN_KEYS) | row for row in super().blank(case, impl, status, note, error, which)]

    def race(self, case: Case, cell: Cell, name: str) -> list[dict]:
        """A row for ours and one for the bare passes, which take turns."""
        size = "quick" if self.quick else self.device.type
        impls = {"ours": cell.score, BARE: cell.bare}
        rows = {}
        for impl, run in impls.items():
            row = self.blank(case, Impl(impl, lambda run=run: run), "ok", "", report.finite(error := cell.check(run)))[0]
            if not error <= BOUNDS[case.dtype]:
                row |= {"status": "failed", "note": f"error {error:.2e} is above {BOUNDS[case.dtype]:.0e}: not timed"}
            rows[impl] = row
        if any(row["status"] != "ok" for row in rows.values()):
            return list(rows.values())
        for impl, run in impls.items():  # also warms up
            rows[impl]["peak_bytes"] = timing.peak_bytes(self.device, timing.nothing, lambda _, run=run: run())
        ms, clips = taking_turns(impls, ROUNDS[size]), sum(cell.shapes)
        for impl, row in rows.items():
            row |= dict(zip(("ms", "ms_p20", "ms_p80"), timing.spread(ms[impl]), strict=True))
            row |= {"timing": "wall clock, taking turns", "preset": name, "videos": cell.videos}
            row["clips_per_s"] = 1e3 * clips / row["ms"]
        rows["ours"]["bare_share"] = share_of(ms["ours"], ms[BARE])
        return list(rows.values())


def taking_turns(runs: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each of these, `rounds` times in turn."""
    ms: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, call in runs.items():
            started = time.perf_counter()
            call()
            ms[name].append(1e3 * (time.perf_counter() - started))
    return ms


def share_of(ours: list[float], bare: list[float]) -> float:
    """The median of each round's share: what slows the machine down slows both."""
    return statistics.median(b / a for a, b in zip(ours, bare, strict=True))


def run(bench: EvaluateBenchmark, name: str, options: argparse.Namespace) -> None:
    config = replace(PRESETS[name], **TINY) if bench.quick else PRESETS[name]
    size = "quick" if bench.quick else bench.device.type
    videos, clips = options.videos or VIDEOS[size], CLIPS[size]
    autocast = None if bench.dtype == torch.float32 else bench.dtype
    with tempfile.TemporaryDirectory() as folder:
        cell = Cell(Path(folder) / "store", config, videos, clips, options.batch, bench.device, autocast)
        shape = f"{name} videos={videos} clips={clips}x{VIEWS} batch={options.batch}"
        case = Case("evaluate", shape, bench.dtype, (), cell.check, ("forward",))
        rows = bench.race(case, cell, name)
    bench.rows += rows
    bench.save()
    print("\n".join(f"{report.line(row)}  [{name}]" for row in rows), flush=True)


def summary(rows: list[dict]) -> list[str]:
    """A line for each preset that was timed."""
    return [
        f"{row['preset']}, {row['dtype']}: {row['clips_per_s']:.4g} clips/s, {row['bare_share']:.3f} of the speed of bare "
        f"forward passes (goal ≥ {GOAL})"
        for row in rows
        if row["bare_share"] is not None
    ]


def main(argv: list[str] | None = None) -> int:
    options = harness.arguments(
        __doc__,
        argv,
        presets={"nargs": "+", "choices": list(PRESETS), "help": "default: all on a GPU, small 5x128 on a CPU"},
        videos={"type": int, "help": f"videos to evaluate; default: {VIDEOS['cuda']} on a GPU, {VIDEOS['cpu']} on a CPU"},
        batch={"type": int, "default": 32, "help": "clips of a forward pass, at most; default: 32"},
    )
    if options.device == "cpu":
        keep_freed_memory()  # as `vimpac evaluate` does; for both, since it is the process's
    bench = EvaluateBenchmark(options)
    print(report.header(), flush=True)
    for name in options.presets or (list(PRESETS) if bench.on_gpu else list(PRESETS)[:1]):
        run(bench, name, options)
    print("\n".join(["", *summary(bench.rows)]))
    return bench.finish(small=not bench.on_gpu)


if __name__ == "__main__":
    sys.exit(main())
