"""Ours and naive.py in training on the same clips: what attn_layouts.py and train_step.py build, check and time.

Ours is the run itself: vimpac.training.loop.Loop on a token store of random ids in a temporary folder, with its
ClipPairs, BatchLoader, masks drawn on the host, AdamW and default options. On a GPU the loader's thread makes batches ahead; on
a CPU the making of a batch is part of the step. The opponent is the loop that one would first write around naive.py: the same
clips, read when they are needed and moved to the device, block masks in a Python loop, both losses, backward, clipping, fused
AdamW.

"compiled" is torch.compile of the embedding, the layers and the token head, one by one, since equal layers then compile once.

Check: [CLS], hidden states and both losses of two clips, without dropout, against naive.py in float64 on the same weights.
"""

from __future__ import annotations

import dataclasses
import random
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import harness
import naive
from harness import Benchmark
from vimpac.config import ModelConfig, PretrainConfig
from vimpac.data.clips import ClipPairs
from vimpac.data.format import StoreSettings, TokenizerInfo
from vimpac.data.store import StoreWriter, TokenStore, finish_store
from vimpac.distributed import World
from vimpac.model import PretrainModel
from vimpac.model.losses import contrastive_loss, mask_loss
from vimpac.model.masking import blocks_for_ratio
from vimpac.ops import BlockMask, block_mask
from vimpac.training.batch import pack
from vimpac.training.loader import BatchLoader
from vimpac.training.loop import Loop
from vimpac.training.optim import adamw, learning_rate
from vimpac.training.plan import Schedule, plan_batches
from vimpac.training.pretrain_task import pretraining_loop

CHECKED = 2  # clips
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}  # of states after all layers
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
STEPS = 10_000  # of the learning rate's schedule, in whose beginning the timed ones are
STORED = 256  # videos
FRAMES = (20, 40)  # of a video: longer than any clip here
TINY = {"layers": 1, "width": 16, "heads": 2, "grid": (3, 4, 4), "head_width": 8, "head_out": 8, "vocab_size": 50}


class Stores:
    """Token stores of random ids below a folder, one for each frame size and vocabulary."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.of = cache(self._write)

    def _write(self, side: int, vocab_size: int) -> TokenStore:
        folder = self.folder / f"{side}-{vocab_size}"
        settings = StoreSettings(TokenizerInfo("patch-vq", vocab_size, 8, "0" * 64), fps=2.0, frame_size=8 * side)
        writer, rng = StoreWriter(folder, settings), np.random.default_rng(side)
        for i, frames in enumerate(rng.integers(FRAMES[0], FRAMES[1] + 1, STORED)):
            writer.add(f"{i:05d}.mp4", rng.integers(vocab_size, size=(1, frames, side, side), dtype=np.uint16))
        writer.close()
        finish_store(folder)
        return TokenStore(folder)


class Trained:
    """A model in training. Called, it gives [CLS], hidden states and both losses without dropout.

    model: nn.Module with a train mode. optimizer. waited: seconds that getting batches has taken so far. A step leaves no
    gradients behind, so that memory beyond weights and optimizer state is what a step allocates.
    """

    model: nn.Module
    waited: float

    def __call__(self, tokens: Tensor, masked: BlockMask) -> list[Tensor]:
        self.model.eval()
        with torch.no_grad():
            states = self.states(tokens, masked)
        self.model.train()
        return states

    def states(self, tokens: Tensor, masked: BlockMask) -> list[Tensor]:
        raise NotImplementedError

    def forward(self) -> Tensor:
        """Masks, backbone, heads: the loss of the next batch, with its graph."""
        raise NotImplementedError

    def backward(self) -> None:
        """The same and its gradients, which are dropped."""
        raise NotImplementedError

    def step(self) -> None:
        """An update of the weights."""
        raise NotImplementedError

    def close(self) -> None:
        """End what runs beside it."""

    def calls(self) -> dict[str, tuple]:
        """Of a harness.Case with these passes."""
        self.step()  # AdamW's state is there from now on
        runs = {"forward": self.forward, "forward+backward": self.backward, "step": self.step}
        return {which: (lambda: None, partial(_ignoring, run)) for which, run in runs.items()}


def _ignoring(run, _state):
    return run()


class Ours(Trained):
    def __init__(self, loop: Loop):
        self.loop, self.model, self.keep = loop, loop.module, loop.config.graphs
        loop.loader = BatchLoader(loop.make_batch, loop.first_samples(), loop.world.device)
        loop.module.train()

    @property
    def waited(self) -> float:
        return self.loop.loader.waited

    def states(self, tokens, masked):
        step = self.loop.module
        model, batch = step.model, pack(tokens, masked)
        with step.mixed():
            cls, hidden = model.backbone(batch.masked, False)
            losses = (
                mask_loss(model, hidden.flatten(0, 3)[batch.rows], batch.targets)[0],
                contrastive_loss(model, cls, step.objective.temperature),
            )
        return [cls, hidden, *losses]

    def forward(self):
        return self.loop.module(self.next_batch())["loss"]

    def backward(self):
        self.loop.forward_backward(self.next_batch())
        self.loop.optimizer.zero_grad()

    def step(self):
        self.loop.update()
        self.loop.step += 1
        if not self.keep:  # a graph's gradients stay where they are
            self.loop.optimizer.zero_grad()

    def next_batch(self):
        self.loop.seed(0)
        return next(self.loop.loader)

    def close(self):
        self.loop.close()


class Naive(Trained):
    def __init__(self, model: naive.NaiveModel, train: PretrainConfig, pairs: ClipPairs, autocast: torch.dtype | None):
        self.model, self.train, self.pairs, self.autocast = model, train, pairs, autocast
        self.device = model.bias.device
        self.n_blocks = blocks_for_ratio(train.model.grid)
        self.optimizer = adamw(model, train.weight_decay, train.betas, train.eps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=autocast == torch.float16)
        self.first, self.updates, self.waited = 0, 0, 0.0
        model.train()

    def mixed(self):
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def states(self, tokens, masked):
        with self.mixed():
            return naive_states(self.model, tokens, masked, self.train.temperature)

    def forward(self):
        started = time.perf_counter()
        tokens = torch.from_numpy(self.pairs.batch(self.first, self.train.batch_size).tokens)
        mask = naive.block_masks(len(tokens), self.train.model.grid, self.n_blocks)
        self.first += self.train.batch_size
        self.waited += time.perf_counter() - started
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        with self.mixed():
            return naive.loss(self.model, tokens, mask, self.train.alpha, self.train.temperature, padded=False)

    def backward(self):
        self.scaler.scale(self.forward()).backward()
        self.optimizer.zero_grad()

    def step(self):
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.updates, STEPS, self.train.warmup, self.train.learning_rate)
        self.scaler.scale(self.forward()).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.train.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.updates += 1


class Cell:
    """One model configuration on some videos a step: data, weights and both ways to train them."""

    def __init__(self, bench: Benchmark, stores: Stores, config: ModelConfig, videos: int, dtype: torch.dtype | None = None):
        dtype = dtype or bench.dtype
        self.config, self.device = config, bench.device
        if bench.on_gpu:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.autocast = None if dtype == torch.float32 else dtype
        self.store = stores.of(config.grid[1], config.vocab_size)
        self.train = PretrainConfig(
            data=str(self.store.folder),
            output=str(stores.folder / "run"),
            model=config,
            steps=STEPS,
            batch_size=videos,
            contrastive_videos=videos,
            precision=PRECISIONS[dtype],
        )
        torch.manual_seed(0)
        self.weights = PretrainModel(config).state_dict()

    @property
    def pairs(self) -> ClipPairs:
        """Clips that are the same each time it is asked for."""
        videos = np.arange(len(self.store))
        train, config = self.train, self.config
        return ClipPairs(self.store, videos, config.grid[0], config.pad_id, train.seed, train.contrastive_videos)

    def ours(self, compiled: bool, graphs: bool = False) -> Ours:
        if graphs and self.device.type != "cuda":
            raise ValueError("a CUDA graph needs a CUDA device")
        train = dataclasses.replace(self.train, graphs=graphs)
        plan = plan_batches(train.batch_size, train.contrastive_videos, train.micro_batch, 1)
        schedule, world = Schedule(STEPS, STEPS), World(0, 1, self.device)
        loop = pretraining_loop(train, self.store, self.pairs, plan, schedule, world, None, compiled)
        loop.module.model.load_state_dict(self.weights)
        return Ours(loop)

    def naive(self, compiled: bool) -> Naive:
        model = self.naive_model().to(self.device)
        if compiled:
            for layer in model.layers:
                layer.compile(dynamic=False)
            for method in ("embed", "token_logits"):
                setattr(model, method, torch.compile(getattr(model, method), dynamic=False))
        random.seed(0)  # of its masks
        return Naive(model, self.train, self.pairs, self.autocast)

    def naive_model(self) -> naive.NaiveModel:
        model = naive.NaiveModel(self.config)
        naive.copy_weights(model, self.weights)
        return model

    def check(self, trained: Trained) -> float:
        tokens = torch.from_numpy(self.pairs.batch(0, CHECKED // 2).tokens).to(self.device)
        masked = block_mask(tokens, torch.arange(CHECKED, device=self.device), seed=1, vocab_size=self.config.vocab_size)
        exact = self.naive_model().to(self.device, torch.float64).eval()
        with torch.no_grad():
            expected = naive_states(exact, tokens, masked, self.train.temperature)
        return harness.distance(trained(tokens, masked), expected)


def naive_states(model: naive.NaiveModel, tokens: Tensor, masked: BlockMask, temperature: float) -> list[Tensor]:
    cls, hidden = model.backbone(masked.tokens, False)
    loss = naive.mask_loss(model.token_logits(hidden), tokens, masked.mask)
    return [cls, hidden, loss, naive.contrastive_loss(model.cls_head(cls), temperature)]
