"""How a run's videos are divided over updates, and an update's over processes and micro-steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vimpac.errors import InputError


@dataclass(frozen=True)
class Schedule:
    steps: int  # updates at which the run ends
    decay_steps: int  # updates at which the learning rate reaches 0


def plan_steps(steps: int | None, epochs: float, schedule_epochs: float | None, batch_size: int, videos: int) -> Schedule:
    """Updates of a run over `videos` training videos, and of its learning-rate schedule, which several stages may share."""
    schedule_epochs = schedule_epochs or epochs
    if steps is not None:
        return Schedule(steps, round(schedule_epochs / epochs * steps))
    steps, decay_steps = (max(1, round(n * videos / batch_size)) for n in (epochs, schedule_epochs))
    return Schedule(steps, decay_steps)


@dataclass(frozen=True)
class BatchPlan:
    """How an update's videos are divided over processes and micro-steps."""

    micro_batch: int  # videos per forward pass in each process
    micro_steps: int  # forward passes per update
    group_ranks: int  # neighbouring ranks that make up one contrastive batch
    parts: int = 1  # consecutive micro-steps that make up one contrastive batch: more than one needs gradient caching


def plan_batches(batch_size: int, contrastive_videos: int, micro_batch: int | None, ranks: int) -> BatchPlan:
    """Split an update of `batch_size` videos. Raises InputError if the contrastive batches cannot be formed."""
    if micro_batch is None and contrastive_videos % ranks:
        raise InputError(
            f"contrastive_videos={contrastive_videos} cannot be split evenly over {ranks} processes: use a multiple of "
            f"{ranks}, or --micro-batch {contrastive_videos} so that each process has its own contrastive batches"
        )
    given, micro_batch = micro_batch, micro_batch or contrastive_videos // ranks
    group, remainder = divmod(contrastive_videos, micro_batch)
    parts, uneven = divmod(group, ranks) if group > ranks else (1, 0)
    group = min(group, ranks)
    if remainder or uneven or group == 0 or ranks % group:
        raise InputError(
            f"contrastive_videos={contrastive_videos} cannot be made up of micro_batch={micro_batch} videos in each of "
            f"{ranks} processes: it must be micro_batch × a divisor of {ranks}, or a multiple of micro_batch × {ranks} "
            f"(with gradient caching), for example --micro-batch "
            f"{_or(_micro_batches(contrastive_videos, ranks))}"
        )
    videos = micro_batch * ranks * parts
    if batch_size % videos or batch_size < videos:
        raise InputError(_uneven_batch(batch_size, contrastive_videos, given, ranks, videos))
    return BatchPlan(micro_batch, batch_size // (micro_batch * ranks), group, parts)


MOST_CLIPS = 128
"""Clips of a forward pass of fine-tuning, if none are asked for."""


def plan_classification(batch_size: int, micro_batch: int | None, ranks: int) -> BatchPlan:
    """Split an update of `batch_size` videos, one clip each. Raises InputError if it cannot be split evenly."""
    if batch_size % ranks:
        below = batch_size // ranks * ranks
        near = _or(x for x in (below, below + ranks) if x)
        raise InputError(f"batch_size={batch_size} cannot be split evenly over {ranks} processes: use --batch-size {near}")
    own = batch_size // ranks
    fits = [n for n in range(1, own + 1) if own % n == 0]
    if micro_batch is None:
        micro_batch = max(n for n in fits if n <= MOST_CLIPS)
    if own % micro_batch:
        near = sorted(sorted(fits, key=lambda n: abs(n - micro_batch))[:2])
        raise InputError(
            f"micro_batch={micro_batch} does not divide the {own} videos of an update in each of {ranks} processes: use "
            f"--micro-batch {_or(near)}"
        )
    return BatchPlan(micro_batch, own // micro_batch, 1)


def _uneven_batch(batch_size: int, contrastive_videos: int, micro_batch: int | None, ranks: int, videos: int) -> str:
    """Why an update is not a multiple of `videos`, in terms of the given options, and the nearest values that fit."""
    below = batch_size // videos * videos
    ways = [f"--batch-size {_or(x for x in (below, below + videos) if x)}"]
    of = f"contrastive_videos={contrastive_videos}"
    if videos != contrastive_videos:
        of = f"micro_batch × processes = {micro_batch} × {ranks} = {videos}"
    if micro_batch is None:
        fits = [n for n in range(max(ranks, 2), batch_size + 1) if batch_size % n == 0 and n % ranks == 0]
        nearest = [max((n for n in fits if n < videos), default=None), min((n for n in fits if n > videos), default=None)]
        ways += [f"--contrastive-videos {_or(n for n in nearest if n)}"] if fits else []
    return f"batch_size={batch_size} must be a multiple of {of}: use {', or '.join(ways)}"


def _or(values: Iterable[int]) -> str:
    return " or ".join(str(x) for x in values)


def _micro_batches(contrastive_videos: int, ranks: int) -> list[int]:
    return [contrastive_videos // g for g in range(1, ranks + 1) if ranks % g == 0 and contrastive_videos % g == 0]
