"""A folder of videos → a token store: decoded and encoded in worker processes, resumable, shared out over ranks."""

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
from vimpac.data.store import (
    INDEX,
    TOKENIZER,
    StoreSettings,
    StoreWriter,
    check_shards,
    finish_store,
    finished_settings,
    read_settings,
)
from vimpac.data.tokenizers import (
    DalleVAE,
    PatchVQ,
    Tokenizer,
    check_tokenizer_file,
    describe,
    load_tokenizer,
    to_patches,
)
from vimpac.data.video import Found, View, decode, find_videos, view_set
from vimpac.data.workers import Alive, run_jobs
from vimpac.errors import InputError, Stopped
from vimpac.files.atomic import LOCK, TEMPORARY, locked
from vimpac.processes.limits import share_of_cores
from vimpac.processes.ranks import read_place

FIT_VIDEOS = 256
FIT_PATCHES = 200_000
REPORT_SECONDS = 10.0


@dataclass
class TokenizeSummary:
    """What a run of all ranks did. seconds: wall clock of this rank."""

    videos: int = 0
    frames: int = 0
    tokens: int = 0
    present: int = 0
    """Videos that finished shards held already when the run started."""
    changed: list[str] = field(default_factory=list)
    """Of those, sorted, the ones whose file has another size than the one that was tokenized."""
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    """Reason by video name."""
    deleted: list[str] = field(default_factory=list)
    """Videos in the store, sorted, that are not below the folder any more."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """How many files have no video's extension, by theirs."""
    unlisted: dict[str, str] = field(default_factory=dict)
    """Why a folder could not be looked into, by its name: what it holds is neither in the store nor among the failed."""


def tokenize_videos(
    videos: str | Path,
    out: str | Path,
    config: TokenizeConfig,
    rank: int = 0,
    world: int = 1,
    workers: int | None = None,
    progress: bool = True,
) -> TokenizeSummary:
    """Writes the token store `out` of every video below the folder `videos`; run again, it adds what is missing.

    With world > 1, every rank calls this under torchrun and takes every world-th video; rank 0 fits the tokenizer and
    finishes the store. workers: processes of this rank (default: its share of the cores).
    Raises InputError on bad options, an output folder of other settings or that another run writes to, or if no video could
    be decoded.
    """
    started = time.monotonic()
    videos, out = Path(videos), Path(out)
    workers = workers or share_of_cores(read_place().local_size)
    with _ranks(rank, world) as gather, ExitStack() as held:
        _agree(gather, partial(_check, config, out))
        found = _agree(gather, partial(find_videos, videos))
        # From before the tokenizer is written until the store is finished; the first rank's lock stands for all.
        _agree(gather, lambda: held.enter_context(locked(out, _taken(out))) if not rank else None)
        _agree(gather, lambda: _prepare_tokenizer(found.names, videos, out, config, workers, progress) if not rank else None)
        tokenizer = _agree(gather, partial(load_tokenizer, out))
        settings = StoreSettings(describe(tokenizer), config.fps, config.frame_size, _views(config))
        writer = _agree(gather, partial(StoreWriter, out, settings, rank))
        # Shares are cut before the finished videos are taken out, so that they do not overlap.
        share = found.names[rank::world]
        sizes = _file_sizes(videos, share)
        todo = [name for name in share if name not in writer.done]
        mine = TokenizeSummary(present=len(share) - len(todo), changed=_changed(sizes, writer.file_bytes))
        deleted = sorted(writer.done.difference(found.names)) if not rank else []
        report = _reporter(len(todo), progress and not rank)
        _write_videos(writer, todo, sizes, videos, tokenizer, workers, config.video_timeout, mine, report)
        summary = _merge([TokenizeSummary(**part) for part in gather(asdict(mine))], found, deleted)
        _agree(gather, lambda: _finish(out, summary) if not rank else None)
    summary.seconds = time.monotonic() - started
    return summary


def _check(config: TokenizeConfig, out: Path) -> None:
    if config.tokenizer == "dalle" and config.tokenizer_path is None:
        raise InputError(
            "tokenizer dalle needs tokenizer-path, the file that `vimpac convert-dalle ENCODER DECODER OUT` writes"
        )
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, expected a folder for the store; choose another output")
    present = {path.name for path in out.iterdir()} if out.is_dir() else set()
    ours = INDEX in present or any(name.startswith("shard-") for name in present)
    if present - {LOCK, TOKENIZER, TOKENIZER + TEMPORARY} and not ours:
        raise InputError(f"{out} is not empty and not a token store; choose a new folder, so that nothing is lost")
    if INDEX in present:
        read_settings(out)  # a store of another version must not be added to


def _file_sizes(videos: Path, names: Iterable[str]) -> dict[str, int]:
    """Bytes of each file, without those that cannot be asked: decoding them says why."""
    sizes = {}
    for name in names:
        with suppress(OSError):
            sizes[name] = os.stat(videos / name).st_size
    return sizes


def _changed(now: dict[str, int], tokenized: dict[str, int]) -> list[str]:
    """By size alone: a copy of the same videos on another disk may have other times, and contents take too long to read."""
    return [name for name, size in now.items() if tokenized.get(name, size) != size]


def _taken(out: Path) -> str:
    return f"{out} is being written by another `vimpac tokenize`; wait for its end, or choose another output folder"


def _views(config: TokenizeConfig) -> tuple[View, ...]:
    return view_set(config.views, config.flip)


def _prepare_tokenizer(names: list[str], videos: Path, out: Path, config: TokenizeConfig, workers: int, progress: bool) -> None:
    """Leaves the tokenizer in `out`: the one its shards were written with, the one asked for, or a new one."""
    settings = finished_settings(out)
    if settings is not None:
        check_tokenizer_file(out, settings.tokenizer)
        _check_same_request(load_tokenizer(out), settings, out, config)
        return check_shards(out)
    given = config.tokenizer_path is not None
    tokenizer = _asked_for(config) if given else _fit(names, videos, config, workers, progress)
    tokenizer.save(out / TOKENIZER)


def _check_same_request(tokenizer: Tokenizer, settings: StoreSettings, out: Path, config: TokenizeConfig) -> None:
    wanted = _asked_for(config) if config.tokenizer_path is not None else tokenizer
    asked = StoreSettings(describe(wanted), config.fps, config.frame_size, _views(config))
    difference = settings.difference(asked)
    if config.tokenizer_path is None and isinstance(tokenizer, PatchVQ):
        fitted, now = (tokenizer.requested, tokenizer.seed), (config.codes, config.seed)
        if None not in fitted and fitted != now:
            difference = "codes {} and seed {}".format(*fitted) + ", not codes {} and seed {}".format(*now)
    if difference:
        raise InputError(f"{out} was written with {difference}; use the same settings, or another output folder")


def _asked_for(config: TokenizeConfig) -> Tokenizer:
    tokenizer = load_tokenizer(config.tokenizer_path)
    if tokenizer.name != config.tokenizer:
        raise InputError(
            f"{config.tokenizer_path} holds a {tokenizer.name} tokenizer, but {config.tokenizer} was asked for; "
            f"pass tokenizer {tokenizer.name}"
        )
    return tokenizer


def _fit(names: list[str], videos: Path, config: TokenizeConfig, workers: int, progress: bool) -> PatchVQ:
    """A PatchVQ on patches drawn evenly from a sample of the videos; corrupt ones are passed over here."""
    chosen = random.Random(config.seed).sample(names, min(FIT_VIDEOS, len(names)))
    report = _reporter(len(chosen), progress, "fitting the tokenizer", "videos")
    job = partial(_sample_patches, videos, config.fps, config.frame_size, math.ceil(FIT_PATCHES / len(chosen)))
    samples, failed = {}, {}
    for name, result in run_jobs(job, chosen, workers, config.video_timeout):
        (failed if isinstance(result, str) else samples)[name] = result
        report(1)
    report.close()
    if not samples:
        raise InputError(f"none of the {len(chosen)} videos tried in {videos} can be decoded: {_shorten(failed)}")
    # In the order of names, not of completion: the fit must not depend on timing.
    patches = np.concatenate([samples[name] for name in sorted(samples)])
    tokenizer = PatchVQ.fit(patches, config.codes, config.seed)
    if progress and tokenizer.vocab_size < config.codes:
        print(_why_fewer_codes(tokenizer.vocab_size, config.codes, patches), file=sys.stderr, flush=True)
    return tokenizer


def _why_fewer_codes(codes: int, requested: int, patches: np.ndarray) -> str:
    distinct = len(np.unique(patches, axis=0))
    some = f"only {distinct} of the {len(patches)} patches drawn from the videos are distinct"
    alike = "patches are so alike that codes coincide when rounded to whole pixel values"
    return f"the tokenizer has {codes} codes, not codes={requested}: {some if distinct <= requested else alike}"


def _write_videos(
    writer: StoreWriter,
    names: list[str],
    sizes: dict[str, int],
    videos: Path,
    tokenizer: Tokenizer,
    workers: int,
    seconds: float,
    summary: TokenizeSummary,
    report: _Report | _Silent,
) -> None:
    settings = writer.settings
    decoding = (videos, settings.fps, settings.frame_size, settings.views)
    on_gpu = isinstance(tokenizer, DalleVAE) and tokenizer.device.type != "cpu"
    # A GPU belongs to one process: then the workers decode only.
    job = partial(_decode_whole, *decoding) if on_gpu else partial(_encode_whole, writer.folder, *decoding)
    with _signals_at_ticks(writer.folder) as stop_if_asked, closing(report), closing(writer):

        def tick() -> None:
            stop_if_asked()
            writer.close_if_due()  # also while a long video keeps all workers busy

        for name, result in run_jobs(job, names, workers, seconds, tick):
            if isinstance(result, str):
                summary.failed[name] = result
                report(0)
                continue
            ids = _encode_views(tokenizer, result) if on_gpu else result
            writer.add(name, ids, sizes.get(name))
            summary.videos += 1
            summary.frames += ids.shape[1]
            summary.tokens += ids.size
            report(ids.shape[1])


@contextmanager
def _signals_at_ticks(out: Path) -> Iterator[Callable[[], None]]:
    """Yields check(), which raises Stopped after Ctrl-C, SIGTERM or SIGHUP: so none ends a run in the middle of a write.

    A second Ctrl-C raises at once. (torchrun passes each on, so it comes twice.)
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


def _merge(parts: list[TokenizeSummary], found: Found, deleted: list[str]) -> TokenizeSummary:
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


# What a worker process runs, a video a call. alive: to be called for each chunk of it.


def _sample_patches(videos: Path, fps: float, size: int, count: int, name: str, alive: Alive) -> np.ndarray:
    """uint8 [≤ count, 192] from the first frames of a video, drawn by its name alone."""
    frames = next(decode(videos / name, fps, size))[0]
    patches = to_patches(frames)
    generator = np.random.default_rng(list(name.encode("utf-8", "surrogateescape")))  # a name may hold bytes that are no text
    return patches[generator.permutation(len(patches))[:count]]


def _decode_whole(videos: Path, fps: float, size: int, views: tuple[View, ...], name: str, alive: Alive) -> np.ndarray:
    """uint8 [views, frames, 3, size, size]."""
    return np.concatenate(list(_reporting(decode(videos / name, fps, size, views), alive)), axis=1)


def _encode_whole(
    store: Path, videos: Path, fps: float, size: int, views: tuple[View, ...], name: str, alive: Alive
) -> np.ndarray:
    """uint16 [views, frames, h, w], encoded chunk by chunk, so that a long video's pixels need not fit into memory."""
    tokenizer = _cached_tokenizer(str(store))
    chunks = _reporting(decode(videos / name, fps, size, views), alive)
    return np.concatenate([_encode_views(tokenizer, chunk) for chunk in chunks], axis=1)


def _reporting(chunks: Iterator[np.ndarray], alive: Alive) -> Iterator[np.ndarray]:
    for chunk in chunks:
        alive()
        yield chunk


def _encode_views(tokenizer: Tokenizer, frames: np.ndarray) -> np.ndarray:
    return np.stack([tokenizer.encode(view) for view in frames])


_tokenizers: dict[str, Tokenizer] = {}


def _cached_tokenizer(store: str) -> Tokenizer:
    if store not in _tokenizers:
        _tokenizers[store] = load_tokenizer(store)
    return _tokenizers[store]


@contextmanager
def _ranks(rank: int, world: int) -> Iterator[Callable[[object], list]]:
    """Yields gather(value) → the values of all ranks, which is also a barrier, however long one works through its share."""
    if world == 1:
        yield lambda value: [value]
        return
    from vimpac.processes.meeting import GONE, meet  # torch

    place = read_place()
    if (place.rank, place.size) != (rank, world):
        raise InputError(f"rank {rank} of {world} has no MASTER_ADDR, the machine to meet at: start the ranks with torchrun")
    with meet(place, f"{GONE}: run the same command again, which goes on with what is missing") as meeting:
        yield meeting.gather


def _agree(gather: Callable[[object], list], step: Callable):
    """step(), after which every rank raises if one did: none is left waiting for a rank that gave up."""
    result, error = None, None
    try:
        result = step()
    except InputError as raised:
        error = raised
    messages = [message for message in gather(str(error) if error else None) if message]
    if messages:
        raise error or InputError(messages[0])
    return result


class _Report:
    """Counts videos: a bar in a terminal, a line every REPORT_SECONDS elsewhere. Call it once a video.

    unit: what the calls count, and the rate is of.
    """

    def __init__(self, total: int, title: str, unit: str):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._title, self._total, self._unit, self._done, self._count = title, total, unit, 0, 0
        self._started = self._reported = time.monotonic()
        self._bar = None
        if console.is_terminal and total:
            rate = TextColumn("{task.fields[rate]:.1f} " + f"{unit}/s")
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(title, total=total, rate=0.0)
            self._bar.start()

    def __call__(self, count: int) -> None:
        self._done += 1
        self._count += count
        now = time.monotonic()
        rate = self._count / max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=rate)
        elif now - self._reported >= REPORT_SECONDS:
            self._reported = now
            line = f"{self._title}: {self._done} of {self._total} videos, {rate:.1f} {self._unit}/s"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class _Silent:
    def __call__(self, count: int) -> None:
        pass

    def close(self) -> None:
        pass


def _reporter(total: int, progress: bool, title: str = "tokenizing", unit: str = "frames") -> _Report | _Silent:
    return _Report(total, title, unit) if progress else _Silent()
