"""Pairs of clips a second, from the store on disk to the training step, on one core: ours against what one would first write.

A store of random ids in a temporary folder, as `vimpac tokenize` would leave it: videos of 20 to 120 frames, 2 a second, of
16×16 or (256 px) 32×32 tokens. A batch is two clips of each of 128 videos, int64 ids, as the step takes them:

    read                TokenStore.read_clips alone: uint16, nothing drawn
    batch               ClipPairs.batch: videos and starts drawn, both clips read
    batch+masks         and block masks on the host
    batch+copy          and through pinned memory to the GPU, where the step draws its masks

The goal is 5,000 pairs a second at 5×16×16 with masks; one H100 is to train Small on 1,000 videos, which are pairs, a second.

Peers make the same batch, and are handed the draws: np.memmap of the same shards with a copy of each clip, a file of .npy for
each video and np.load, and a DataLoader around that with one worker. Everything, the worker too, runs on one core: torch on
one thread, and where the system can (Linux) the process is bound to a core. Every array is compared with the ids the store was
made of before it is timed ("error" is the share that differs; masks: from the reference).

warm: every file was just written and read, so that the page cache has it. cold: the files' pages are dropped from it before
each batch, by posix_fadvise; what lies below the file system (a disk's own cache, a host's) may still have them. Where the
file system keeps its pages in spite of that, the row says so. MB/s counts the ids as they lie on disk, 2 bytes each. Memory
is numpy's (tracemalloc) plus torch's. How it is timed: harness.py, by the wall clock.

    python benchmarks/data.py [--quick] [--device cpu]
"""

from __future__ import annotations

import itertools
import mmap
import os
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import harness
import timing
from harness import Benchmark, Case, Impl
from vimpac.config import PAD_OFFSET
from vimpac.data.clips import ClipPairs
from vimpac.data.format import StoreSettings, TokenizerInfo
from vimpac.data.store import StoreWriter, TokenStore, finish_store
from vimpac.model.masking import blocks_for_ratio
from vimpac.ops import block_mask, block_mask_reference

SEED, VOCABULARY = 3, 8192
VIDEOS_A_BATCH = 128
FRAMES = (20, 120)
STORES = {16: 3000, 32: 900}  # tokens along a side → videos, some 110 and 130 MB of ids
CLIP_FRAMES = (5, 10)
GOAL = 5000  # pairs a second
MOST = 0.9  # of the files must have left the cache: a page that is just in use may stay


class DataBenchmark(Benchmark):
    """Times on the host, whatever the device: rows have pairs_per_s, mb_per_s and cache beside the harness's keys."""

    def time(self, case: Case, impl: Impl, which: str, call: tuple[Callable, Callable], error: float) -> dict:
        prepare, run = call
        row = self.blank(case, impl, "ok", impl.note, error, [which])[0]
        row["peak_bytes"] = peak_bytes(prepare, run)
        (row["ms"], row["ms_p20"], row["ms_p80"]), row["timing"] = timing.time_cpu(prepare, run, self.quick)
        row["gb_per_s"] = case.bytes[which] / row["ms"] / 1e6
        return row

    def blank(self, case, impl, status, note, error=None, which=None) -> list[dict]:
        return [
            row | {"pairs_per_s": None, "mb_per_s": None, "cache": None}
            for row in super().blank(case, impl, status, note, error, which)
        ]


def peak_bytes(prepare: Callable, run: Callable) -> int:
    """numpy's peak, which tracemalloc sees, plus torch's, which it does not."""
    state = prepare()
    tracemalloc.start()
    try:
        run(state)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return peak + timing.cpu_peak_bytes(prepare, run)


@contextmanager
def one_core() -> Iterator[None]:
    """This process, and those it starts, on one thread and one core."""
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    torch.set_num_threads(1)
    try:
        if cores:
            os.sched_setaffinity(0, {max(cores)})
        yield
    finally:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


# --- the videos on disk -----------------------------------------------------------------------------------------------


class Files:
    """Random ids in memory, in a store, and in a .npy file for each video."""

    def __init__(self, folder: Path, side: int, videos: int):
        rng = np.random.default_rng(side)
        frames = rng.integers(FRAMES[0], FRAMES[1] + 1, videos)
        self.arrays = [rng.integers(VOCABULARY, size=(n, side, side), dtype=np.uint16) for n in frames]
        settings = StoreSettings(TokenizerInfo("patch-vq", VOCABULARY, 8, "0" * 64), fps=2.0, frame_size=8 * side)
        writer = StoreWriter(folder / "store", settings)
        (folder / "npy").mkdir()
        self.npy = [str(folder / "npy" / f"{i:05d}.npy") for i in range(videos)]
        for i, array in enumerate(self.arrays):  # numbers with zeros in front: the store orders videos by name
            writer.add(f"{i:05d}.mp4", array[None])
            np.save(self.npy[i], array)
        writer.close()
        finish_store(folder / "store")
        os.sync()  # a page that is not on disk yet cannot be dropped
        self.store = TokenStore(folder / "store")
        self.shards = sorted(str(path) for path in (folder / "store").glob("*.bin"))


def drop_pages(path: str) -> bool:
    """Asks for a file to leave the page cache; returns whether its first page did."""
    number = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        return not is_cached(number)
    finally:
        os.close(number)


def is_cached(number: int) -> bool:
    """Whether the first byte can be read without waiting for the disk; yes if the system cannot say."""
    try:
        return os.preadv(number, [bytearray(1)], 0, getattr(os, "RWF_NOWAIT", 0)) > 0
    except BlockingIOError:
        return False
    except OSError:
        return True


# --- what makes a batch -----------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """Which clips the batches hold: the draws of a ClipPairs over all videos."""

    files: Files
    clip_frames: int
    seed: int = SEED

    @cached_property
    def pairs(self) -> ClipPairs:
        videos = np.arange(len(self.files.store))
        return ClipPairs(self.files.store, videos, self.clip_frames, VOCABULARY + PAD_OFFSET, self.seed)

    @cached_property
    def batches(self) -> int:
        return self.pairs.epoch_samples // VIDEOS_A_BATCH

    @cached_property
    def clips(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Videos and starts [2n] of each batch of an epoch."""
        draws = [self.pairs._draw(np.arange(VIDEOS_A_BATCH) + i * VIDEOS_A_BATCH)[:2] for i in range(self.batches)]
        return [(np.tile(videos, 2), starts.T.reshape(-1)) for videos, starts in draws]

    @property
    def grid(self) -> tuple[int, int, int]:
        return (self.clip_frames, *self.files.store.grid)

    def expected(self, batch: int) -> np.ndarray:
        videos, starts = self.clips[batch]
        arrays, T = self.files.arrays, self.clip_frames
        return np.stack([arrays[video][start : start + T] for video, start in zip(videos, starts, strict=True)])


Batch = Callable[[int], object]  # a number below plan.batches → that batch


def read(plan: Plan) -> Batch:
    return lambda i: plan.files.store.read_clips(*plan.clips[i], plan.clip_frames)


def draw(plan: Plan) -> Batch:
    return lambda i: plan.pairs.batch(i * VIDEOS_A_BATCH, VIDEOS_A_BATCH).tokens


def draw_and_mask(plan: Plan) -> Batch:
    n_blocks, seed = blocks_for_ratio(plan.grid), torch.full((), SEED)

    def batch(i: int):
        clips = plan.pairs.batch(i * VIDEOS_A_BATCH, VIDEOS_A_BATCH)
        tokens, ids = torch.from_numpy(clips.tokens), torch.from_numpy(clips.sample_ids)
        return clips.tokens, ids, block_mask(tokens, ids, seed, n_blocks)

    return batch


def draw_and_copy(plan: Plan, device: torch.device) -> Batch:
    if device.type != "cuda":
        raise ValueError("no CUDA device to copy to")
    pinned = torch.empty((2 * VIDEOS_A_BATCH, *plan.grid), dtype=torch.int64, pin_memory=True)
    target = torch.empty_like(pinned, device=device)

    def batch(i: int):
        pinned.copy_(torch.from_numpy(plan.pairs.batch(i * VIDEOS_A_BATCH, VIDEOS_A_BATCH).tokens))
        target.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()
        return target

    return batch


class Mapped:
    """The store's shards as np.memmap, one copy a clip."""

    def __init__(self, plan: Plan):
        store, self.plan = plan.files.store, plan
        self.maps = [np.memmap(path, "<u2", "r") for path in plan.files.shards]
        self.shard, self.offset = store._shard.tolist(), store._offset.tolist()

    def __call__(self, i: int) -> np.ndarray:
        (videos, starts), (T, h, w) = self.plan.clips[i], self.plan.grid
        out = np.empty((len(videos), T, h, w), np.int64)
        for row, video, start in zip(out, videos.tolist(), starts.tolist(), strict=True):
            first = self.offset[video] + start * h * w
            row[...] = self.maps[self.shard[video]][first : first + T * h * w].reshape(T, h, w)
        return out

    def unmap(self) -> None:
        """Pages that a process has mapped do not leave the cache."""
        for each in self.maps:
            each._mmap.madvise(mmap.MADV_DONTNEED)


class Videos(torch.utils.data.Dataset):
    """Two clips of a video from its own .npy file."""

    def __init__(self, plan: Plan):
        self.plan = plan
        videos, starts = (np.concatenate(x) for x in zip(*((v[:VIDEOS_A_BATCH], s) for v, s in plan.clips), strict=True))
        self.videos, self.starts = videos, starts.reshape(-1, 2, VIDEOS_A_BATCH).transpose(0, 2, 1).reshape(-1, 2)

    def __getitem__(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = np.load(self.plan.files.npy[self.videos[k]])
        first, second = (torch.from_numpy(ids[s : s + self.plan.clip_frames].astype(np.int64)) for s in self.starts[k])
        return first, second

    def batch(self, i: int) -> torch.Tensor:
        pairs = [self[k] for k in range(i * VIDEOS_A_BATCH, (i + 1) * VIDEOS_A_BATCH)]
        return torch.stack([clip for half in zip(*pairs, strict=True) for clip in half])


class Loaded:
    """The same through a DataLoader with one worker, which runs ahead."""

    def __init__(self, plan: Plan):
        samples = ([*range(i * VIDEOS_A_BATCH, (i + 1) * VIDEOS_A_BATCH)] for i in itertools.cycle(range(plan.batches)))
        self.batches = iter(torch.utils.data.DataLoader(Videos(plan), batch_sampler=samples, num_workers=1))

    def __call__(self, _i: int) -> torch.Tensor:
        return torch.cat(next(self.batches))


# --- rows -------------------------------------------------------------------------------------------------------------


def unequal(got: object, expected: np.ndarray, n_blocks: int) -> float:
    """Share of elements that differ: of the clips, and of the masked batch where there is one."""
    if not isinstance(got, tuple):
        return float((np.asarray(torch.as_tensor(got).cpu()) != expected).mean())
    tokens, ids, masked = got
    right = block_mask_reference(torch.from_numpy(expected.astype(np.int64)), ids, torch.full((), SEED), n_blocks)
    differing = [float((a != b).double().mean()) for a, b in zip(masked, right, strict=True)]
    return max(unequal(tokens, expected, n_blocks), *differing)


def add(bench: DataBenchmark, plan: Plan, which: str, impls: list[Impl], dropped: list[str] | None = None) -> None:
    """Rows of one pass; the files in `dropped` leave the page cache before each batch."""
    numbers, gone = itertools.cycle(range(plan.batches)), []

    def check(function):
        return max(unequal(function(i), plan.expected(i), blocks_for_ratio(plan.grid)) for i in range(2))

    def calls(function):
        def prepare():
            if dropped:
                getattr(function, "unmap", lambda: None)()
                gone.extend(drop_pages(path) for path in dropped)
            return next(numbers)

        return {which: (prepare, function)}

    cache = "cold" if dropped else "warm"
    shape = f"{'x'.join(map(str, plan.grid))} n={VIDEOS_A_BATCH} {cache}"
    ids = 2 * VIDEOS_A_BATCH * np.prod(plan.grid).item()
    case = Case("data", shape, torch.int64, (), check, (which,), bytes={which: 2.0 * ids}, calls=calls)
    before = len(bench.rows)
    bench.add(case, impls)
    for row in bench.rows[before:]:
        kept = bool(dropped) and sum(gone) < MOST * len(gone)
        row["cache"], row["note"] = "warm" if kept else cache, "warm: the file system keeps its pages" if kept else row["note"]
        if row["ms"] is not None:
            row |= {"pairs_per_s": 1e3 * VIDEOS_A_BATCH / row["ms"], "mb_per_s": 1e3 * row["gb_per_s"]}


def run(bench: DataBenchmark, files: Files, clip_frames: int) -> None:
    plan = Plan(files, clip_frames)

    def ours(build, *options):
        return Impl("ours", lambda: build(plan, *options), ours=True, required=True, bound=0.0)

    memmap = Impl("np.memmap", lambda: Mapped(plan), bound=0.0)
    npy = Impl("np.load of a file a video", lambda: Videos(plan).batch, bound=0.0)
    loader = Impl("DataLoader of np.load", lambda: Loaded(plan), bound=0.0)
    add(bench, plan, "read", [ours(read)])
    add(bench, plan, "batch", [ours(draw), memmap, npy, loader])
    add(bench, plan, "batch+masks", [ours(draw_and_mask)])
    copied = Impl("ours:cuda", lambda: draw_and_copy(plan, bench.device), ours=True, bound=0.0)
    add(bench, plan, "batch+copy", [copied])
    add(bench, plan, "batch", [ours(draw), memmap], dropped=files.shards)
    add(bench, plan, "batch", [npy], dropped=files.npy)


def summary(rows: list[dict]) -> None:
    print(f"\n{'pairs a second':28} {'':12} {'':26} {'pairs/s':>10} {'MB/s':>8}")
    for row in (row for row in rows if row["ms"] is not None):
        numbers = f"{row['pairs_per_s']:10,.0f} {row['mb_per_s']:8,.0f}"
        print(f"{row['shape']:28} {row['pass']:12} {row['impl']:26} {numbers} {row['note']}".rstrip())
    goal = [row for row in rows if row["shape"].startswith("5x16x16") and row["pass"] == "batch+masks" and row["ms"]]
    for row in goal:
        print(f"goal: {GOAL:,} pairs a second at 5x16x16 with masks, measured {row['pairs_per_s']:,.0f}")


def main(argv: list[str] | None = None) -> int:
    options = harness.arguments(__doc__, argv)
    with one_core(), tempfile.TemporaryDirectory() as folder:
        bench = DataBenchmark("data", options)
        for side, videos in {8: 300}.items() if bench.quick else STORES.items():
            (Path(folder) / str(side)).mkdir()
            files = Files(Path(folder) / str(side), side, videos)
            for clip_frames in CLIP_FRAMES[:1] if bench.quick else CLIP_FRAMES:
                run(bench, files, clip_frames)
        summary(bench.rows)
        return bench.finish(small=bench.quick)


if __name__ == "__main__":
    sys.exit(main())
