"""The training loop of every task: updates of the weights, metrics, checkpoints, and a clean end after a signal.

A task defines what a batch is and how a unit of batches adds to the gradients; the loop does the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from vimpac import distributed
from vimpac.checkpoint import list_checkpoints, save_checkpoint
from vimpac.config import RunConfig
from vimpac.distributed import World
from vimpac.errors import Stopped
from vimpac.training.device import seed_dropout
from vimpac.training.graphs import GraphedStep
from vimpac.training.loader import BatchLoader
from vimpac.training.metrics import MetricsLog
from vimpac.training.optim import learning_rate, whole_state
from vimpac.training.plan import BatchPlan, Schedule
from vimpac.training.profile import UpdateProfile
from vimpac.training.progress import Progress
from vimpac.training.signals import StopRequest
from vimpac.weights import Training


class Task(Protocol):
    """The module that a run trains, its batches and their gradients."""

    module: Any
    """nn.Module with forward(batch) → {"loss": with gradient, other metrics}. Checkpoints hold its `model`."""

    def make_batch(self, first: int, videos: int) -> Any:
        """Samples first, first + 1, …, on the CPU: a batch of `vimpac.training.batch`."""
        ...

    def accumulate(self, loop: Loop, first: int, unit: list[Any]) -> dict[str, Tensor]:
        """Adds the gradients of micro-steps first, first + 1, …, one for each batch of `unit`, by calls of `loop.micro_step`.

        Returns their part of the update's metrics.
        """
        ...

    def measure(self, loop: Loop) -> dict[str, float]:
        """What is measured after update `loop.step`, on all ranks; empty when nothing is due."""
        ...

    def warning(self) -> str | None:
        """What to say beside the metrics when they are read; all ranks call it."""
        ...


class Loop:
    """The state of a run and its loop. step: updates so far."""

    def __init__(
        self,
        task: Task,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        config: RunConfig,
        plan: BatchPlan,
        schedule: Schedule,
        world: World,
        training: Training,
        step: int = 0,
    ):
        self.task, self.module, self.optimizer, self.scaler = task, task.module, optimizer, scaler
        self.config, self.plan, self.schedule, self.world = config, plan, schedule, world
        self.run, self.training, self.step = Path(config.output), training, step
        # Reading the metrics makes the host wait for the GPU, and all hosts for each other.
        self.look_every = config.log_every if world.device.type == "cuda" else 1
        self.stop = StopRequest(world, self.look_every)
        self.progress: Progress | None = None  # shows the micro-steps of long updates
        self.loader: BatchLoader | None = None
        self.parallel: Any = self.module if world.size == 1 else distributed.averaging(self.module, world)
        self.graphed = GraphedStep(self.forward_backward, self.module) if config.graphs else None

    def train(self, log: MetricsLog, progress: Progress) -> None:
        """Train to the end of the schedule. Raises Stopped after a signal, InputError if a metric is not finite."""
        config = self.config
        profile = UpdateProfile(self.run, self.world) if config.profile else None
        self.module.train()
        self.progress = progress
        try:
            while self.step < self.schedule.steps:
                with profile.update(self.schedule.steps - self.step) if profile else nullcontext():
                    metrics = self.update()
                self.step += 1
                with log.untimed():
                    measured = self.task.measure(self)
                log.add({**metrics, **measured} if measured else metrics)
                last = self.step == self.schedule.steps
                due = self.step % config.save_every == 0
                # Several processes must agree to stop, which makes all of them wait.
                look = last or due or self.step % self.look_every == 0 or (self.world.size == 1 and self.stop.requested)
                stop = look and not last and distributed.any_rank(self.stop.requested, self.world)
                if look:
                    log.flush(progress, config.batch_size, self.may_overflow, self.loader.waited if self.loader else 0.0)
                    if (warning := self.task.warning()) is not None:
                        progress.note(warning)
                if last or stop or due:
                    log.sync()
                    path = self.save()
                    if stop:
                        raise self.stop.as_exception(path)
        finally:
            self.close()
        if profile:
            profile.report(progress)

    def update(self) -> dict[str, Any]:
        """One update of the weights. Returns the metrics as scalars on the device."""
        config, plan = self.config, self.plan
        rate = learning_rate(self.step, self.schedule.decay_steps, config.warmup, config.peak_learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate_scale", 1.0)
        self.optimizer.zero_grad(set_to_none=self.graphed is None)
        if self.loader is None:
            self.loader = BatchLoader(self.make_batch, self.first_samples(), self.world.device)
        sums: dict[str, Tensor] = {}
        # The outermost context owns the weights' low-precision copies, so one cast serves all micro-steps. A graph has its own.
        # (Eager full checkpointing loses them: it recomputes layers in backward's thread, which has separate contexts.)
        with torch.autocast(self.world.device.type, enabled=False) if self.graphed is None else nullcontext():
            for first in range(0, plan.micro_steps, plan.parts):
                with record_function("data"):
                    unit = [next(self.loader) for _ in range(plan.parts)]
                for name, x in self.task.accumulate(self, first, unit).items():
                    sums[name] = sums[name] + x if name in sums else x
                if self.progress is not None:
                    self.progress.within(self.step + 1, first + plan.parts, plan.micro_steps)
        with record_function("optimizer"):
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), config.grad_clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return {"step": self.step + 1, "learning_rate": rate, "grad_norm": norm, **sums}

    def micro_step(self, i: int, batch: Any, gradient: Tensor | None = None) -> dict[str, Tensor]:
        """Add the gradients of micro-step i of this update, and return its metrics. gradient: as for `forward_backward`."""
        self.seed(i)
        last = i == self.plan.micro_steps - 1
        # Gradients are averaged over ranks only in the last micro-step of an update.
        with nullcontext() if last or self.world.size == 1 else self.parallel.no_sync():
            return self.graphed(batch) if self.graphed else self.forward_backward(batch, gradient)

    def forward_backward(self, batch: Any, gradient: Tensor | None = None) -> dict[str, Tensor]:
        """Add a micro-step's gradients to those of the parameters, and return its metrics.

        gradient: with gradient caching, the gradient of the update's loss with respect to this batch's [CLS] states.
        """
        with record_function("forward"):
            out = self.parallel(batch) if gradient is None else self.parallel(batch, True)
        roots, upstream = [], []
        if isinstance(out["loss"], Tensor):  # a loss in addition to the cached one
            roots.append(self.scaler.scale(out["loss"] / self.plan.micro_steps))
            upstream.append(None)
        if gradient is not None:
            roots.append(out.pop("cls"))
            upstream.append(gradient)
        with record_function("backward"):
            torch.autograd.backward(roots, upstream)
        return {name: x.detach() for name, x in out.items() if isinstance(x, Tensor)}

    def seed(self, i: int) -> None:
        """Seed the dropout of micro-step i: with gradient caching, both forward passes of a batch have the same dropout."""
        seed_dropout(self.world.device, self.config.seed, self.step, i, self.world.rank)

    def first_samples(self) -> Iterator[int]:
        """The number of the first sample of each of this rank's micro-steps, from the current update on."""
        micro_batch, ranks = self.plan.micro_batch, self.world.size
        for step in itertools.count(self.step):
            for i in range(self.plan.micro_steps):
                yield step * self.config.batch_size + (i * ranks + self.world.rank) * micro_batch

    def make_batch(self, first: int) -> Any:
        return self.task.make_batch(first, self.plan.micro_batch)

    @property
    def may_overflow(self) -> bool:
        """Whether gradients that are not finite may just be scaled too much for float16; the scaler skips such an update."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    def save(self) -> Path:
        """Write a checkpoint (first rank). It needs no sampler or generator state: these are functions of the step."""
        path, optimizer = self.run, whole_state(self.optimizer, self.module, self.world.is_first)
        if self.world.is_first:
            state = {
                "step": self.step,
                "config": asdict(self.config),
                **self.training.to_header(),
                "world_size": self.world.size,
                "model": self.module.model.state_dict(),
                "optimizer": optimizer,
                "scaler": self.scaler.state_dict(),
            }
            path = save_checkpoint(self.run, state, self.config.keep_checkpoints)
        distributed.barrier(self.world)
        return path

    def stop_now(self, number: int, _frame) -> None:
        """Handle a signal after the last update, whose checkpoint is already written."""
        raise Stopped(number, f"{list_checkpoints(self.run)[-1]} is written, continue with --resume")

    def close(self) -> None:
        """End the loader's thread. The next update would start a new one."""
        if self.loader is not None:
            self.loader.close()
            self.loader = None

    def drop_wrapper(self) -> None:
        """Drop the gradient-averaging wrapper, which refers to the process group, so that the group can end."""
        self.parallel = None

    def leave_processes(self) -> None:
        """End the process group."""
        self.drop_wrapper()
        distributed.leave_world()
