"""Pre-training from a token store to a run folder (sections 3, B, C), from top to bottom."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from vimpac import distributed, weights
from vimpac.config import PretrainConfig
from vimpac.data.clips import ClipPairs, split_videos
from vimpac.data.labelled import LabelSource
from vimpac.data.rates import frame_step
from vimpac.data.store import TokenStore
from vimpac.data.test_clips import TestClips
from vimpac.data.views import center_view
from vimpac.distributed import World
from vimpac.errors import InputError
from vimpac.evaluation.pretraining import evaluate, most_frequent_token
from vimpac.model import PretrainModel
from vimpac.model.losses import Objective
from vimpac.model.masking import Masking
from vimpac.training.device import plain_ops, resolve_compile
from vimpac.training.facts import start_facts
from vimpac.training.loop import Loop
from vimpac.training.memory import MemoryUse, explaining_model_size, keep_freed_memory
from vimpac.training.metrics import MetricsLog
from vimpac.training.monitor import FeatureMonitor, monitored
from vimpac.training.plan import BatchPlan, plan_batches, plan_steps
from vimpac.training.pretrain_task import pretraining_loop
from vimpac.training.progress import Progress
from vimpac.training.run import describe, open_run, start_run
from vimpac.training.session import check_data, check_machine, end_run, synthetic_store, train_to_end
from vimpac.training.signals import handling_signals

METRICS = ("loss", "mask_loss", "contrastive_loss", "cl_loss", "mask_accuracy")


def pretrain(config: PretrainConfig) -> dict | None:
    """Run `config` to its end and return the evaluation (None on ranks other than the first).

    Raises InputError for anything the user can fix, Stopped after SIGTERM, SIGHUP or SIGINT.
    """
    with distributed.join_world() as world, ExitStack() as held:
        return _pretrain(config, world, held)


def _pretrain(config: PretrainConfig, world: World, held: ExitStack) -> dict | None:
    # Open the store.
    check_data(config)
    store = TokenStore(config.data or synthetic_store(config.output, config.synthetic_videos, config.model.grid, world)[0])
    config = fit_to_store(replace(config, data=str(store.folder)), store)
    clips = split_clips(config, store)
    watch = feature_monitor(config, store, clips, world)
    # Plan the run. Nothing is written before all options are checked.
    plan = plan_batches(config.batch_size, config.contrastive_videos, config.micro_batch, world.size)
    videos = len(clips.training.videos)
    schedule = plan_steps(config.steps, config.epochs, config.schedule_epochs, config.batch_size, videos)
    contrasted = config.contrastive_videos if config.alpha > 0 else 0
    memory = MemoryUse.of_run(config, plan.micro_batch, 2, contrasted, world.device)
    calls = check_machine(config, memory, plan, world)
    run, description = Path(config.output), describe(config, store)
    resumes = (run / "config.json").exists()
    checkpoint = open_run(run, description, config.resume, store, world.device)
    compiled, why_not = resolve_compile(config.compile, world.device)
    # Build the model and its loop.
    if world.device.type == "cpu":
        keep_freed_memory()
    with explaining_model_size(world.device):
        loop = pretraining_loop(config, store, clips.training, plan, schedule, world, checkpoint, compiled, watch)
    start_run(run, description, store, world, loop.step, held)
    log = MetricsLog(run, world, loop.step, METRICS)
    with Progress(schedule.steps, loop.step, enabled=world.is_first) as progress:
        notes = (
            f"{run} holds no run to resume: a new run starts" if config.resume and not resumes else None,
            *start_facts(loop, store, videos, len(clips.held_out.videos)),
            few_videos(videos, config.contrastive_videos),
            plain_ops(calls, world.device),
            None if checkpoint else log.recomputed(),
            log.gap(None if config.continue_from else 1) if checkpoint else None,
            why_not and f"training without torch.compile, which does not work here: {why_not}",
            gradient_caching(plan, world.size, config.contrastive_videos) if config.alpha > 0 else None,
        )
        # Train.
        train_to_end(loop, log, progress, memory, notes)
        loop.leave_processes()  # only the first rank evaluates
        if not world.is_first:
            return None
        # Write the model, evaluate it, draw the curves.
        with handling_signals(loop.stop_now):
            return finish(loop, config, clips, store, log, progress)


def finish(loop: Loop, config: PretrainConfig, clips: Clips, store: TokenStore, log: MetricsLog, progress: Progress) -> dict:
    """Write the model, evaluate it on held-out videos, draw the curves."""
    if loop.stop.number is not None:  # during the last update
        loop.stop_now(loop.stop.number, None)
    step = loop.module
    weights.save(step.model, loop.run / "model.safetensors", asdict(store.tokenizer), loop.training.fps)
    with torch.compiler.set_stance("force_eager"):  # not worth another compilation
        found = evaluate_held_out(step.model, config, clips, loop.plan.micro_batch, step.autocast)
    result = {"final": True, "step": loop.step, **found}
    end_run(loop.run, log, progress, result)
    return result


def evaluate_held_out(
    model: PretrainModel, config: PretrainConfig, clips: Clips, micro_batch: int, autocast: torch.dtype | None
) -> dict:
    """The evaluation at the end of a run with this configuration: `evaluate` on the held-out clips."""
    most_frequent = most_frequent_token(clips.training, config.model.vocab_size)
    found = evaluate(
        model,
        Objective.from_config(config),
        Masking.from_config(config),
        clips.held_out,
        config.eval_batches,
        clips.contrasted,
        micro_batch,
        most_frequent,
        clips.training.padded or clips.held_out.padded,
        autocast,
    )
    return {**found, "held_out_videos": len(clips.held_out.videos)}


class Clips(NamedTuple):
    """Clip pairs of the training and of the held-out videos, and how many held-out videos are contrasted at a time."""

    training: ClipPairs
    held_out: ClipPairs
    contrasted: int


def split_clips(config: PretrainConfig, store: TokenStore) -> Clips:
    training, held_out = split_videos(store, config.held_out)
    every = frame_step(store, config.fps)
    views = range(len(store.views)) if config.all_views else [center_view(store)]
    contrasted = min(config.contrastive_videos, len(held_out))

    def pairs(videos: np.ndarray, seed: int, distinct: int) -> ClipPairs:
        shape = config.model.grid[0], config.model.pad_id
        return ClipPairs(store, videos, *shape, seed, distinct, config.d_max, views, every)

    return Clips(
        pairs(training, config.seed, config.contrastive_videos), pairs(held_out, config.seed + 1, contrasted), contrasted
    )


def fit_to_store(config: PretrainConfig, store: TokenStore) -> PretrainConfig:
    """The configuration with the store's vocabulary size and, with fit_frame_size, its grid.

    Raises InputError if the store's frame size is not the configured one.
    """
    grid = config.model.grid
    if config.fit_frame_size:
        grid = (grid[0], *store.grid)
    if store.grid != grid[1:]:
        raise InputError(
            f"store {store.folder} has frames of {store.frame_size} px, which is {store.grid[0]}×{store.grid[1]} tokens, but "
            f"model.grid is {grid}: tokenize with --frame-size {8 * grid[1]}, or train with "
            f"--model.grid {grid[0]} {store.grid[0]} {store.grid[1]}"
        )
    model = replace(config.model, grid=grid, vocab_size=store.tokenizer.vocab_size)
    return replace(config, model=model)


def feature_monitor(config: PretrainConfig, store: TokenStore, clips: Clips, world: World) -> FeatureMonitor | None:
    """What looks at the features every `probe_every` updates. Raises InputError if no held-out video has a label."""
    if not config.probe_every or config.labels is None:
        return None
    source = LabelSource.of(config.labels, config)
    model, held_out = config.model, clips.held_out
    every = frame_step(store, config.fps)
    middle = TestClips(store, held_out.videos, 1, [center_view(store)], model.grid[0], model.pad_id, every)
    chosen, labels = monitored(middle, source)
    return FeatureMonitor(chosen, labels, config.probe_every, 64)


def few_videos(videos: int, contrasted: int) -> str | None:
    if videos >= contrasted:
        return None
    return (
        f"{videos} training videos are fewer than contrastive_videos={contrasted}: "
        "batches repeat videos, and clips of one video count as each other's negatives"
    )


def gradient_caching(plan: BatchPlan, ranks: int, contrasted: int) -> str | None:
    if plan.parts == 1:
        return None
    return (
        f"contrastive_videos={contrasted} needs gradient caching in {plan.parts} parts of {plan.micro_batch * ranks}: each "
        "clip has two forward passes; use a larger --micro-batch if memory allows"
    )
