"""Pre-training as a task of the training loop: clip pairs, both losses, gradient caching."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import record_function

from vimpac import distributed
from vimpac.config import PretrainConfig
from vimpac.console import count
from vimpac.data.clips import ClipPairs
from vimpac.data.store import TokenStore
from vimpac.distributed import World
from vimpac.model.losses import Objective
from vimpac.model.masking import Masking
from vimpac.training.batch import ROWS, Batch, row_capacity
from vimpac.training.device import autocast_dtype, device_masks
from vimpac.training.graphs import row_multiple
from vimpac.training.loop import Loop
from vimpac.training.monitor import FeatureMonitor
from vimpac.training.optim import adamw
from vimpac.training.plan import BatchPlan, Schedule
from vimpac.training.start import continue_stage, initial_model, restore
from vimpac.training.step import PretrainStep
from vimpac.weights import Training


class PretrainTask:
    """Batches of clip pairs and the gradients of both losses (Eq. 6) on them.

    A contrastive batch that does not fit into one forward pass is split into parts with gradient caching (Gao et al., 2021).
    The first forward pass builds no graph; from its [CLS] states follows the loss's gradient with respect to them. The second
    forward pass backpropagates that gradient through the backbone, part by part.
    """

    def __init__(
        self,
        module: PretrainStep,
        pairs: ClipPairs,
        plan: BatchPlan,
        world: World,
        graphs: bool,
        monitor: FeatureMonitor | None = None,
    ):
        self.monitor = monitor
        self.module, self.pairs, self.plan, self.world = module, pairs, plan, world
        tokens = 2 * plan.micro_batch * math.prod(module.masking.grid)
        self.rows = row_multiple(tokens, module.masking.expected_share) if graphs else ROWS

    def make_batch(self, first: int, videos: int) -> Batch:
        """Samples first, first + 1, …, on the CPU."""
        clips = self.pairs.batch(first, videos)
        return self.module.batch(torch.from_numpy(clips.tokens), torch.from_numpy(clips.sample_ids), self.rows)

    def accumulate(self, loop: Loop, first: int, unit: list[Batch]) -> dict[str, Tensor]:
        """Add the gradients of one contrastive batch, micro-steps `first`, first + 1, …

        Returns its part of the update's metrics. `cl_loss` is γ · L_cl, called CL-Loss in the paper's tables.
        """
        objective, weight = self.module.objective, 1 / self.plan.micro_steps
        if len(unit) * self.world.size > 1:  # masks that the device draws are counted, and read by both passes
            unit = self.weighted([self.module.drawn(batch) for batch in unit])
        gradients, sums = [None] * len(unit), {}
        if len(unit) > 1 and objective.contrasts:
            gradients, loss = self.cache_gradients(loop, first, unit)
            sums["contrastive_loss"] = loss * (weight * len(unit))
            sums["loss"] = objective.contrastive_weight * sums["contrastive_loss"]
        for i, (batch, gradient) in enumerate(zip(unit, gradients, strict=True), first):
            for name, x in loop.micro_step(i, batch, gradient).items():
                sums[name] = sums.get(name, 0) + x * weight
        if "contrastive_loss" in sums:
            sums["cl_loss"] = objective.temperature * sums["contrastive_loss"]
        return sums

    def measure(self, loop: Loop) -> dict[str, float]:
        """The features' quality, on the first rank, when it is due."""
        if self.monitor is None or not self.world.is_first or not self.monitor.is_due(loop.step):
            return {}
        with torch.compiler.set_stance("force_eager"):  # other shapes than those of training
            return self.monitor.measure(self.module.model, self.module.autocast)

    def cache_gradients(self, loop: Loop, first: int, unit: list[Batch]) -> tuple[list[Tensor], Tensor]:
        """The first pass of gradient caching over the parts of a contrastive batch. Adds the gradients of the contrastive head.

        It computes every part's [CLS] states without a graph, then the contrastive head and loss on all of them.
        Returns the gradient of the update's loss with respect to each part's states [2m, C], and the loss of Eq. 5.
        """
        parts, states = len(unit), []
        with record_function("first pass"):
            with torch.no_grad():
                for i, batch in enumerate(unit, first):
                    loop.seed(i)
                    states.append(self.module.contrasted_states(batch))
            cls = torch.stack(states).unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2).requires_grad_()  # [2n, C]
            loss = self.module.contrast(cls)
            scale = self.module.objective.contrastive_weight * parts / self.plan.micro_steps
            loop.scaler.scale(loss * scale).backward()
            assert cls.grad is not None
            gradients = cls.grad.unflatten(0, (2, parts, -1)).transpose(0, 1).flatten(1, 2)  # [parts, 2m, C]
        return list(gradients), loss.detach()

    def weighted(self, unit: list[Batch]) -> list[Batch]:
        """The parts of a contrastive batch, each with its share of the mean over the masked tokens of all parts and ranks."""
        ranks, parts, device = self.world.size, len(unit), self.world.device
        if not self.module.objective.mask_task:
            return unit
        # torch.full: copying a number from the host would wait.
        numbers = [x if isinstance(x := batch.masked_count, Tensor) else torch.full((), x, device=device) for batch in unit]
        counts = [x.float() for x in numbers]
        total = distributed.sum_over_ranks(torch.stack(counts).sum(), self.world).clamp_(min=1)
        shares = [ranks * parts * x / total for x in counts]
        return [batch._replace(share=share) for batch, share in zip(unit, shares, strict=True)]

    def warning(self) -> str | None:
        """A sentence on masked tokens beyond the capacity since the last call; None if there were none. All ranks call it."""
        capacity, beyond = self.module.capacity, self.module.beyond
        if capacity is None:
            return None
        batches, tokens = distributed.sum_over_ranks(beyond.clone(), self.world).tolist()
        beyond.zero_()
        if not tokens:
            return None
        return (
            f"warning: {count(batches, 'batch', 'batches')} had more masked tokens than the {capacity} rows of the token head; "
            f"the loss left out {count(tokens, 'token')} (--masks host leaves out none)"
        )


def pretraining_loop(
    config: PretrainConfig,
    store: TokenStore,
    pairs: ClipPairs,
    plan: BatchPlan,
    schedule: Schedule,
    world: World,
    checkpoint: dict | None = None,
    compiled: bool = False,
    monitor: FeatureMonitor | None = None,
) -> Loop:
    """The loop of a pre-training run on `pairs`, with the model, optimizer and step from which the run starts."""
    torch.manual_seed(config.seed)
    model = initial_model(config.model, config.init_from, store.tokenizer.digest).to(world.device)
    model.backbone.activation_checkpointing = config.activation_checkpointing
    model.backbone.residual = config.residual
    autocast = autocast_dtype(config.precision, world.device)
    objective, masking = Objective.from_config(config), Masking.from_config(config)
    group = distributed.contrastive_group(world, plan.group_ranks)
    capacity = row_capacity(masking, 2 * plan.micro_batch) if device_masks(config, world.device) else None
    module = PretrainStep(model, objective, masking, pairs.padded, group, autocast, capacity)
    shard = config.shard_optimizer and world.size > 1
    optimizer = adamw(module, config.weight_decay, config.betas, config.eps, shard)
    scaler = torch.amp.GradScaler(world.device.type, enabled=autocast == torch.float16)
    step = 0
    if checkpoint is not None:
        step = restore(checkpoint, Path(config.output), module, optimizer, scaler)
    elif config.continue_from is not None:
        step = continue_stage(Path(config.continue_from), store, schedule.steps, module, optimizer)
    if compiled:
        model.compile_parts()
    task = PretrainTask(module, pairs, plan, world, config.graphs, monitor)
    return Loop(
        task, optimizer, scaler, config, plan, schedule, world, Training(store.tokenizer, config.fps or store.fps), step
    )
