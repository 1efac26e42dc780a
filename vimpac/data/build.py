"""A folder of videos → a token store: decoded and encoded in worker processes, resumable, shared among ranks."""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from vimpac.config import TokenizeConfig
from vimpac.data.dalle import DalleVAE
from vimpac.data.format import INDEX, TOKENIZER, StoreSettings, View, read_settings, view_set
from vimpac.data.jobs import decode_video, encode_video, encode_views, sample_patches
from vimpac.data.patch_vq import PatchVQ
from vimpac.data.report import Report
from vimpac.data.shards import check_shards, finished_settings
from vimpac.data.store import StoreWriter, finish_store
from vimpac.data.tokenizer_file import Tokenizer, describe
from vimpac.data.tokenizers import check_tokenizer_file, load_tokenizer
from vimpac.data.video import FolderContents, find_videos, path_of
from vimpac.data.workers import run_jobs
from vimpac.errors import InputError, Stopped
from vimpac.files.atomic import LOCK, TEMPORARY, locked
from vimpac.processes.limits import share_of_cores
from vimpac.processes.meeting import GONE, agree, gathering
from vimpac.processes.ranks import read_place

FIT_VIDEOS = 256
FIT_PATCHES = 200_000


@dataclass
class TokenizeSummary:
    """The result of a run of all ranks. seconds: wall clock of this rank."""

    videos: int = 0
    frames: int = 0
    tokens: int = 0
    present: int = 0
    """Videos that finished shards already held when the run started."""
    changed: list[str] = field(default_factory=list)
    """Those of them, sorted, whose file has another size than when it was tokenized."""
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    """Reason by video name."""
    deleted: list[str] = field(default_factory=list)
    """Videos of the store, sorted, that are no longer below the folder."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Number of files that are not videos, by extension."""
    unlisted: dict[str, str] = field(default_factory=dict)
    """Reason by name of the folders that could not be listed. Their files are neither in the store nor among the failed."""


@dataclass(frozen=True)
class _Run:
    """What every step of a run needs. workers: processes of this rank; progress: whether this rank reports it."""

    videos: Path
    out: Path
    config: TokenizeConfig
    workers: int
    progress: bool

    @property
    def views(self) -> tuple[View, ...]:
        return view_set(self.config.views, self.config.flip)

    def settings(self, tokenizer: Tokenizer) -> StoreSettings:
        return StoreSettings(describe(tokenizer), self.config.fps, self.config.frame_size, self.views)


def tokenize_videos(
    videos: str | Path,
    out: str | Path,
    config: TokenizeConfig,
    rank: int = 0,
    world: int = 1,
    workers: int | None = None,
    progress: bool = True,
) -> TokenizeSummary:
    """Writes the token store `out` of all videos below the folder `videos`. Run again, it adds what is missing.

    With world > 1, every rank calls this under torchrun and takes every world-th video; rank 0 fits the tokenizer and
    finishes the store. workers: processes of this rank (default: its share of the cores).
    Raises InputError for bad options, an output folder of other settings or in use by another run, or if no video could be
    decoded.
    """
    started = time.monotonic()
    workers = workers or share_of_cores(read_place().local_size)
    run = _Run(Path(videos), Path(out), config, workers, progress and not rank)
    lost = f"{GONE}: run the same command again, which goes on with what is missing"
    with gathering(rank, world, lost) as gather, ExitStack() as held:
        agree(gather, partial(_check_options, run))
        found = agree(gather, partial(find_videos, run.videos))
        # Held until the store is finished. The lock of the first rank counts for all.
        agree(gather, lambda: held.enter_context(locked(run.out, _in_use(run.out))) if not rank else None)
        agree(gather, lambda: _prepare_tokenizer(run, found.names) if not rank else None)
        tokenizer = agree(gather, partial(load_tokenizer, run.out))
        writer = agree(gather, partial(StoreWriter, run.out, run.settings(tokenizer), rank))
        # Videos are shared out before those of finished shards are left out, so that shares do not overlap.
        share = found.names[rank::world]
        sizes = _file_sizes(run.videos, share)
        todo = [name for name in share if name not in writer.done]
        mine = TokenizeSummary(present=len(share) - len(todo), changed=_changed(sizes, writer.file_bytes))
        deleted = sorted(writer.done.difference(found.names)) if not rank else []
        _write_videos(run, writer, todo, sizes, tokenizer, mine)
        summary = _merge([TokenizeSummary(**part) for part in gather(asdict(mine))], found, deleted)
        agree(gather, lambda: _finish(run.out, summary) if not rank else None)
    summary.seconds = time.monotonic() - started
    return summary


def _check_options(run: _Run) -> None:
    config, out = run.config, run.out
    if config.tokenizer == "dalle" and config.tokenizer_path is None:
        raise InputError(
            "tokenizer dalle needs tokenizer-path, the file that `vimpac convert-dalle ENCODER DECODER OUT` writes"
        )
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, expected a folder for the store; choose another output")
    present = {path.name for path in out.iterdir()} if out.is_dir() else set()
    is_store = INDEX in present or any(name.startswith("shard-") for name in present)
    if present - {LOCK, TOKENIZER, TOKENIZER + TEMPORARY} and not is_store:
        raise InputError(f"{out} is not empty and not a token store; choose a new folder, so that nothing is lost")
    if INDEX in present:
        read_settings(out)  # raises for a store of another version, which must not be added to


def _in_use(out: Path) -> str:
    return f"{out} is being written by another `vimpac tokenize`; wait for its end, or choose another output folder"


def _file_sizes(videos: Path, names: Iterable[str]) -> dict[str, int]:
    """Bytes of each file. Leaves out files without a readable size: decoding them gives the reason."""
    sizes = {}
    for name in names:
        with suppress(OSError):
            sizes[name] = os.stat(path_of(name, videos)).st_size
    return sizes


def _changed(now: dict[str, int], tokenized: dict[str, int]) -> list[str]:
    """Compares sizes only: a copy of the same videos may have other times, and reading the contents takes too long."""
    return [name for name, size in now.items() if tokenized.get(name, size) != size]


def _prepare_tokenizer(run: _Run, names: list[str]) -> None:
    """Makes sure that `out` holds the tokenizer: that of its shards, the given one, or a newly fitted one."""
    settings = finished_settings(run.out)
    if settings is not None:
        check_tokenizer_file(run.out, settings.tokenizer)
        _check_same_request(run, load_tokenizer(run.out), settings)
        return check_shards(run.out)
    path = run.config.tokenizer_path
    tokenizer = _fit(run, names) if path is None else _given_tokenizer(path, run.config)
    tokenizer.save(run.out / TOKENIZER)


def _check_same_request(run: _Run, tokenizer: Tokenizer, settings: StoreSettings) -> None:
    """Raises InputError if the options differ from those that the store was written with."""
    config = run.config
    wanted = tokenizer if config.tokenizer_path is None else _given_tokenizer(config.tokenizer_path, config)
    difference = settings.difference(run.settings(wanted))
    if config.tokenizer_path is None and isinstance(tokenizer, PatchVQ):
        fitted, now = (tokenizer.requested, tokenizer.seed), (config.codes, config.seed)
        if None not in fitted and fitted != now:
            difference = "codes {} and seed {}".format(*fitted) + ", not codes {} and seed {}".format(*now)
    if difference:
        raise InputError(f"{run.out} was written with {difference}; use the same settings, or another output folder")


def _given_tokenizer(path: str, config: TokenizeConfig) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    if tokenizer.name != config.tokenizer:
        raise InputError(
            f"{path} holds a {tokenizer.name} tokenizer, but {config.tokenizer} was asked for; pass tokenizer {tokenizer.name}"
        )
    return tokenizer


def _fit(run: _Run, names: list[str]) -> PatchVQ:
    """A PatchVQ fitted on patches of a sample of the videos, equally many of each. Skips corrupt videos."""
    config = run.config
    chosen = random.Random(config.seed).sample(names, min(FIT_VIDEOS, len(names)))
    report = Report(len(chosen), "fitting the tokenizer", "videos", run.progress)
    job = partial(sample_patches, run.videos, config.fps, config.frame_size, math.ceil(FIT_PATCHES / len(chosen)))
    samples: dict[str, np.ndarray] = {}
    failed: dict[str, str] = {}
    for name, result in run_jobs(job, chosen, run.workers, config.video_timeout):
        if isinstance(result, str):
            failed[name] = result
        else:
            samples[name] = result
        report(1)
    report.close()
    if not samples:
        raise InputError(f"none of the {len(chosen)} videos tried in {run.videos} can be decoded: {_shorten(failed)}")
    # Sorted by name, not by completion, so that the fit does not depend on timing.
    patches = np.concatenate([samples[name] for name in sorted(samples)])
    tokenizer = PatchVQ.fit(patches, config.codes, config.seed)
    if run.progress and tokenizer.vocab_size < config.codes:
        print(_why_fewer_codes(tokenizer.vocab_size, config.codes, patches), file=sys.stderr, flush=True)
    return tokenizer


def _why_fewer_codes(codes: int, requested: int, patches: np.ndarray) -> str:
    distinct = len(np.unique(patches, axis=0))
    few = f"only {distinct} of the {len(patches)} patches drawn from the videos are distinct"
    similar = "patches are so similar that codes coincide when rounded to whole pixel values"
    return f"the tokenizer has {codes} codes, not codes={requested}: {few if distinct <= requested else similar}"


def _write_videos(
    run: _Run,
    writer: StoreWriter,
    names: list[str],
    sizes: dict[str, int],
    tokenizer: Tokenizer,
    summary: TokenizeSummary,
) -> None:
    """Decodes and encodes the named videos, writes them, and counts them in `summary`."""
    report = Report(len(names), "tokenizing", "frames", run.progress)
    decoding = (run.videos, run.config.fps, run.config.frame_size, run.views)
    on_gpu = isinstance(tokenizer, DalleVAE) and tokenizer.device.type != "cpu"
    # Only one process should use the GPU, so then the workers only decode.
    job = partial(decode_video, *decoding) if on_gpu else partial(encode_video, run.out, *decoding)
    with _stop_between_writes(run.out) as stop_if_signalled, closing(report), closing(writer):

        def tick() -> None:
            stop_if_signalled()
            writer.close_if_due()  # also while a long video keeps all workers busy

        for name, result in run_jobs(job, names, run.workers, run.config.video_timeout, tick):
            if isinstance(result, str):
                summary.failed[name] = result
                report(0)
                continue
            ids = encode_views(tokenizer, result) if on_gpu else result
            writer.add(name, ids, sizes.get(name))
            summary.videos += 1
            summary.frames += ids.shape[1]
            summary.tokens += ids.size
            report(ids.shape[1])


@contextmanager
def _stop_between_writes(out: Path) -> Iterator[Callable[[], None]]:
    """Yields check(), which raises Stopped after Ctrl-C, SIGTERM or SIGHUP, so that no signal interrupts a write.

    A second Ctrl-C, at least two seconds later, raises at once. (torchrun passes signals on, so each arrives twice.)
    """
    seen: list[tuple[int, float]] = []

    def note(number: int, _frame) -> None:
        seen.append((number, time.monotonic()))
        if number == signal.SIGINT and seen[-1][1] - seen[0][1] > 2:
            raise KeyboardInterrupt

    def check() -> None:
        if seen:
            raise Stopped(seen[0][0], f"what was finished is in {out}, the same command goes on from there")

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, note) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finish(out: Path, summary: TokenizeSummary) -> None:
    if summary.videos + summary.present:
        finish_store(out, summary.failed)
        return
    if finished_settings(out) is None:
        (out / TOKENIZER).unlink(missing_ok=True)
    raise InputError(f"none of the {len(summary.failed)} videos can be decoded: {_shorten(summary.failed)}")


def _shorten(failed: dict[str, str], limit: int = 3) -> str:
    shown = [f"{name} {reason}" for name, reason in sorted(failed.items())[:limit]]
    return "; ".join(shown) + (f"; and {len(failed) - limit} more" if len(failed) > limit else "")


def _merge(parts: list[TokenizeSummary], found: FolderContents, deleted: list[str]) -> TokenizeSummary:
    return TokenizeSummary(
        deleted=deleted,
        passed_over=found.others,
        unlisted=found.unlisted,
        videos=sum(part.videos for part in parts),
        frames=sum(part.frames for part in parts),
        tokens=sum(part.tokens for part in parts),
        present=sum(part.present for part in parts),
        changed=sorted(name for part in parts for name in part.changed),
        failed={name: reason for part in parts for name, reason in part.failed.items()},
    )
