"""The state of a pre-training run and its loop: updates of the weights, checkpoints, what stops it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import record_function

from vimpac.checkpoint import (
    check_moments,
    check_scaler,
    check_tokenizer,
    check_weights,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from vimpac.config import ModelConfig, TrainConfig
from vimpac.data.clips import ClipPairs
from vimpac.data.store import TokenStore
from vimpac.errors import InputError, Stopped
from vimpac.model import PretrainModel
from vimpac.model.positions import IN_BACKBONE, interpolate_state
from vimpac.model.state import check_state
from vimpac.training import distributed
from vimpac.training.batch import ROWS, Batch
from vimpac.training.distributed import BatchPlan, World
from vimpac.training.graphs import GraphedStep, row_multiple
from vimpac.training.loader import BatchLoader
from vimpac.training.machine import PRECISIONS, resolve_precision
from vimpac.training.metrics import MetricsLog
from vimpac.training.optim import adamw, group_names, learning_rate, load_whole_state, whole_state
from vimpac.training.profile import UpdateProfile
from vimpac.training.progress import Progress
from vimpac.training.schedule import Schedule
from vimpac.training.seeds import seed_dropout
from vimpac.training.step import PretrainStep


def _stopped(number: int, checkpoint: Path) -> Stopped:
    return Stopped(number, f"{checkpoint} is written, go on with --resume")


class Trainer:
    """The state of a run and its loop."""

    def __init__(
        self,
        config: TrainConfig,
        pairs: ClipPairs,
        plan: BatchPlan,
        schedule: Schedule,
        world: World,
        run: Path,
        store: TokenStore,
        checkpoint: dict | None,
        compiled: bool = False,
    ):
        self.config, self.pairs, self.plan, self.schedule = config, pairs, plan, schedule
        self.world, self.run, self.tokenizer = world, run, dataclasses.asdict(store.tokenizer)
        autocast = PRECISIONS[resolve_precision(config.precision, world.device)]
        torch.manual_seed(config.seed)
        model = initial_model(config, store).to(world.device)
        model.backbone.activation_checkpointing = config.activation_checkpointing
        group = distributed.contrastive_group(world, plan.group_ranks)
        self.module = PretrainStep(model, config, pairs.padded, group, autocast)
        shard = config.shard_optimizer and world.size > 1
        self.optimizer = adamw(self.module, config.weight_decay, config.betas, config.eps, shard)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=autocast == torch.float16)
        self.step = 0
        self.progress: Progress | None = None  # of the run, told of micro-steps
        self.signal: tuple[int, float] | None = None  # number and time of the signal that asks the run to end
        self.look_every = config.log_every if world.device.type == "cuda" else 1  # looking makes a GPU, and all hosts, wait
        self.loader: BatchLoader | None = None
        if checkpoint is not None:
            self.restore(checkpoint)
        elif config.continue_from is not None:
            self.continue_from(Path(config.continue_from), store)
        if compiled:
            model.compile_parts()
        self.distributed = self.module
        if world.size > 1:
            self.distributed = distributed.averaging(self.module, world)
        tokens = 2 * plan.micro_batch * math.prod(config.model.grid)
        self.row_multiple = row_multiple(tokens, self.module.mask_share) if config.graphs else ROWS
        self.graphed = GraphedStep(self.forward_backward, self.module) if config.graphs else None

    # --- the loop -----------------------------------------------------------------------------------------------------

    def train(self, log: MetricsLog, progress: Progress) -> None:
        config = self.config
        profile = UpdateProfile(self.run, self.world) if config.profile else None
        self.module.train()
        self.progress = progress
        try:
            while self.step < self.schedule.steps:
                with profile.update(self.schedule.steps - self.step) if profile else nullcontext():
                    log.add(self.update())
                self.step += 1
                last = self.step == self.schedule.steps
                look = last or self.step % self.look_every == 0 or self.step % config.save_every == 0
                look = look or (self.world.size == 1 and self.signal is not None)  # several must agree, which makes all wait
                stop = look and not last and distributed.any_rank(self.signal is not None, self.world)
                save = last or stop or self.step % config.save_every == 0
                if look:
                    log.flush(progress, config.batch_size, self.may_overflow, self.loader.waited if self.loader else 0.0)
                if save:
                    log.sync()
                    path = self.save()
                if stop:
                    raise _stopped(self.signal[0] if self.signal else signal.SIGTERM, path)
        finally:
            self.close()
        if profile:
            profile.report(progress)

    def close(self) -> None:
        """End the loader's thread; the next update starts another."""
        if self.loader is not None:
            self.loader.close()
            self.loader = None

    def update(self) -> dict[str, Tensor]:
        """One update of the weights; metrics as scalars on the device."""
        config, plan = self.config, self.plan
        rate = learning_rate(self.step, self.schedule.decay_steps, config.warmup, config.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=self.graphed is None)
        if self.loader is None:
            self.loader = BatchLoader(self.make_batch, self.first_samples(), self.world.device)
        sums: dict[str, Tensor] = {}
        # The outermost context owns the weights' copies in low precision: one cast serves all micro-steps. A graph has its own.
        # (Whole layers computed again by eager full checkpointing drop them: backward has a thread with contexts of its own.)
        with torch.autocast(self.world.device.type, enabled=False) if self.graphed is None else nullcontext():
            for first in range(0, plan.micro_steps, plan.parts):
                with record_function("data"):
                    unit = [next(self.loader) for _ in range(plan.parts)]
                for name, x in self.contrastive_batch(first, unit).items():
                    sums[name] = sums.get(name, 0) + x
                if self.progress is not None:
                    self.progress.within(self.step + 1, first + plan.parts, plan.micro_steps)
        with record_function("optimizer"):
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), config.grad_clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return {"step": self.step + 1, "learning_rate": rate, "grad_norm": norm, **sums}

    def contrastive_batch(self, first: int, unit: list[Batch]) -> dict[str, Tensor]:
        """Gradients of one contrastive batch, micro-steps `first`, first + 1, …; its part of the update's metrics."""
        config, weight = self.config, 1 / self.plan.micro_steps
        unit = self.weighted(unit)
        gradients, sums = [None] * len(unit), {}
        if len(unit) > 1 and config.alpha > 0:
            gradients, loss = self.contrast_ahead(first, unit)
            sums["contrastive_loss"] = loss * (weight * len(unit))
            sums["loss"] = config.alpha * config.temperature * sums["contrastive_loss"]
        for i, (batch, gradient) in enumerate(zip(unit, gradients, strict=True), first):
            seed_dropout(self.world.device, config.seed, self.step, i, self.world.rank)
            with self.synchronised(i == self.plan.micro_steps - 1):
                out = self.graphed(batch) if self.graphed else self.forward_backward(batch, gradient)
            for name, x in out.items():
                sums[name] = sums.get(name, 0) + x * weight
        return sums

    def forward_backward(self, batch: Batch, gradient: Tensor | None = None) -> dict[str, Tensor]:
        """Adds a micro-step's gradients to the parameters'; its metrics.

        gradient: of the update's loss by this batch's [CLS] states, where the contrastive loss was computed ahead.
        """
        with record_function("forward"):
            out = self.distributed(batch) if gradient is None else self.distributed(batch, False)
        roots, upstream = [], []
        if isinstance(out["loss"], Tensor):  # there is a loss beside the one computed ahead
            roots.append(self.scaler.scale(out["loss"] / self.plan.micro_steps))
            upstream.append(None)
        if gradient is not None:
            roots.append(out.pop("cls"))
            upstream.append(gradient)
        with record_function("backward"):
            torch.autograd.backward(roots, upstream)
        return {name: x.detach() for name, x in out.items() if isinstance(x, Tensor)}

    def contrast_ahead(self, first: int, unit: list[Batch]) -> tuple[list[Tensor], Tensor]:
        """The first of two passes over a contrastive batch that does not fit into one: every part's [CLS] states without a
        graph, then the contrastive head and loss on all of them, with gradients of the head.

        Returns the update's gradient by each part's states, which its second pass sends through the backbone, and Eq. 5.
        """
        config, parts, states = self.config, len(unit), []
        with record_function("first pass"):
            with torch.no_grad():
                for i, batch in enumerate(unit, first):
                    seed_dropout(self.world.device, config.seed, self.step, i, self.world.rank)
                    states.append(self.module.contrasted(batch))
            cls = torch.stack(states).unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2).requires_grad_()  # [2n, C]
            loss = self.module.contrast(cls)
            scale = config.alpha * config.temperature * parts / self.plan.micro_steps
            self.scaler.scale(loss * scale).backward()
            gradients = cls.grad.unflatten(0, (2, parts, -1)).transpose(0, 1).flatten(1, 2)  # [parts, 2m, C]
        return list(gradients), loss.detach()

    def weighted(self, unit: list[Batch]) -> list[Batch]:
        """The parts of a contrastive batch, each with its share of the mean over the masked tokens of all parts and ranks."""
        ranks, parts = self.world.size, len(unit)
        if not self.config.mask_task or ranks * parts == 1:
            return unit
        device = self.world.device  # a fill, not a copy from the host, which would wait
        total = torch.full((), float(sum(batch.count for batch in unit)), device=device)
        total = distributed.sum_over_ranks(total, self.world).clamp_(min=1)
        return [
            batch._replace(share=torch.full((), float(ranks * parts * batch.count), device=device) / total) for batch in unit
        ]

    def first_samples(self) -> Iterator[int]:
        """Number of the first sample of each of this rank's micro-steps, from the current update on."""
        micro_batch, ranks = self.plan.micro_batch, self.world.size
        for step in itertools.count(self.step):
            for i in range(self.plan.micro_steps):
                yield step * self.config.batch_size + (i * ranks + self.world.rank) * micro_batch

    def make_batch(self, first: int) -> Batch:
        """Samples first, first + 1, …, on the CPU."""
        clips = self.pairs.batch(first, self.plan.micro_batch)
        return self.module.batch(torch.from_numpy(clips.tokens), torch.from_numpy(clips.sample_ids), self.row_multiple)

    def synchronised(self, last: bool):
        """Gradients are averaged over ranks in the last micro-step of an update only."""
        return nullcontext() if last or self.world.size == 1 else self.distributed.no_sync()

    @property
    def may_overflow(self) -> bool:
        """Whether float16 gradients that are not finite are only scaled too much: the scaler skips the update."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    # --- signals ------------------------------------------------------------------------------------------------------

    def note_signal(self, number: int, _frame) -> None:
        """The run ends after this update; several processes, on GPUs, at their next look. A second Ctrl-C ends it at once;
        torchrun passes each on, so it comes twice."""
        now = time.monotonic()
        if self.signal is None:
            self.signal = number, now
            if self.world.is_first:  # not by way of `progress`, which may be in the middle of a line
                apart = self.look_every if self.world.size > 1 else 1
                when = "after this update" if apart == 1 else f"within {apart} updates, when all processes look for it"
                again = ", Ctrl-C again ends at once" if number == signal.SIGINT else ""
                with suppress(OSError):  # who read it may be gone: the checkpoint is written all the same
                    os.write(2, f"{signal.Signals(number).name}: a checkpoint is written {when}{again}\n".encode())
        elif number == signal.SIGINT and now - self.signal[1] > 2:
            raise KeyboardInterrupt

    def stop_now(self, number: int, _frame) -> None:
        """After the last update its checkpoint is there."""
        raise _stopped(number, list_checkpoints(self.run)[-1])

    # --- state --------------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint (first rank). Samples, masks and dropout are functions of the step: it is their state."""
        path, optimizer = self.run, whole_state(self.optimizer, self.module, self.world.is_first)
        if self.world.is_first:
            state = {
                "step": self.step,
                "config": dataclasses.asdict(self.config),
                "tokenizer": self.tokenizer,
                "world_size": self.world.size,
                "model": self.module.model.state_dict(),
                "optimizer": optimizer,
                "scaler": self.scaler.state_dict(),
            }
            path = save_checkpoint(self.run, state, self.config.keep_checkpoints)
        distributed.barrier(self.world)
        return path

    def restore(self, state: dict) -> None:
        """Go on where a checkpoint of this run was written, with any number of ranks: exactly there with the same number, with
        the same samples and masks but other dropout with another."""
        shapes = {name: p.shape for name, p in self.module.named_parameters()}
        try:
            check_state(state["model"], self.module.model.state_dict())
            check_moments(state["optimizer"], group_names(self.optimizer, self.module), shapes)
            check_scaler(state["scaler"], self.scaler.state_dict())
        except InputError as error:
            raise InputError(
                f"the checkpoint of step {state['step']} in {self.run} does not fit this model: {error}; it was damaged or is "
                "another run's, delete it to resume from the one before"
            ) from None
        self.load(state["model"], state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]

    def load(self, weights: dict[str, Tensor], optimizer: dict) -> None:
        """Weights and moments; what else an optimizer's state holds, such as the weight decay, stays this run's."""
        own = [{name: x for name, x in group.items() if name != "params"} for group in self.optimizer.param_groups]
        self.module.model.load_state_dict(weights)
        load_whole_state(self.optimizer, optimizer)
        for group, options in zip(self.optimizer.param_groups, own, strict=True):
            group.update(options)

    def continue_from(self, run: Path, store: TokenStore) -> None:
        """Go on from an earlier stage: weights, moments and step; positions (and moments) at this grid."""
        checkpoints = list_checkpoints(run)
        if not checkpoints:
            raise InputError(f"continue_from={run} has no checkpoint: expected the run folder of the earlier stage")
        state = load_checkpoint(checkpoints[-1])
        check_tokenizer(state["tokenizer"], store, checkpoints[-1])
        grid = self.config.model.grid
        try:
            shapes = {f"model.{name}": p.shape for name, p in check_weights(state).named_parameters()}
            check_moments(state["optimizer"], group_names(self.optimizer, self.module), shapes)
            self.load(interpolate_state(state["model"], grid, IN_BACKBONE), interpolate_moments(state["optimizer"], grid))
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{checkpoints[-1]} does not fit this model: {reason[:300]}") from None
        self.step = state["step"]
        if self.step >= self.schedule.steps:
            raise InputError(
                f"{checkpoints[-1]} is at step {self.step}, this run would end at {self.schedule.steps}: raise --epochs or "
                "--steps, which count from the first stage's start"
            )


def initial_model(config: TrainConfig, store: TokenStore) -> PretrainModel:
    """A fresh model, or `init_from`'s weights at this grid."""
    if config.init_from is None:
        return PretrainModel(config.model)
    from vimpac import weights  # safetensors, which a fresh start does without

    model = weights.load(model_file(Path(config.init_from)), config.model.grid, store.tokenizer.digest)
    if not isinstance(model, PretrainModel) or shape_of(model.config) != shape_of(config.model):
        raise InputError(
            f"init_from={config.init_from} holds a {type(model).__name__} of shape {shape_of(model.config)}, expected a "
            f"PretrainModel of {shape_of(config.model)}"
        )
    fresh = PretrainModel(config.model)  # the configuration's dropout, not the file's
    fresh.load_state_dict(model.state_dict())
    return fresh


def model_file(path: Path) -> Path:
    """The file itself; of a run folder its model, or its newest checkpoint where it has not ended."""
    if not path.is_dir():
        return path
    found = [x for x in (*list_checkpoints(path), path / "model.safetensors") if x.exists()]
    if not found:
        raise InputError(
            f"init_from={path} is a folder without a model.safetensors or checkpoints: expected a run folder, or one of these"
        )
    return found[-1]


def shape_of(config: ModelConfig) -> dict:
    """What decides the names and shapes of a model's parameters."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name != "dropout"}


def interpolate_moments(state: dict, grid: tuple[int, int, int]) -> dict:
    """An AdamW state dict with the moments of the position tables resampled to another grid, like the positions."""
    names = {i: name for group in state["param_groups"] for i, name in zip(group["params"], group["param_names"], strict=True)}
    moments = dict(state["state"])
    for key in ("exp_avg", "exp_avg_sq"):
        tables = {names[i]: s[key] for i, s in moments.items() if f"model.{IN_BACKBONE}" in names[i]}
        tables = interpolate_state(tables, grid, f"model.{IN_BACKBONE}")
        moments = {i: {**s, key: tables.get(names[i], s[key])} for i, s in moments.items()}
    return {**state, "state": moments}
