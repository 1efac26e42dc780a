"""Table 13: the training step of every attention layout, ours beside naive.py eager and compiled, and the paper's numbers.

Small at 5×16×16 on random ids, dropout 0.1. forward: block masks, backbone, heads and both losses; forward + backward; step:
those and AdamW. samples/s are videos, two clips each, in whole steps; peak memory is beyond weights and optimizer state. On a
GPU 32 videos, bfloat16 autocast, post- and pre-norm. On a CPU float32, 2 videos, post-norm only, one layer of half the width
and 512 ids, so that the token head has about the share of the work that it has in Small. What does not fit in the budget is
skipped. "compiled" is torch.compile of the embedding, the layers and (naive) the token head, one by one, since equal layers
then compile once.

Before a cell is timed, [CLS], hidden states and both losses of two clips, without dropout, are compared with naive.py in
float64 on the same weights. The paper's speed is samples per second of pre-training on one V100 and its accuracy UCF101's;
"params" is the backbone of the six-layer Small in both. How it is timed: harness.py.

    python benchmarks/attn_layouts.py [--layouts 'T,H|W' TxHxW] [--norms post pre] [--videos 32] [--budget 600] [--quick]
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import harness
import naive
from harness import Benchmark, Case, Impl
from vimpac.config import ModelConfig, TrainConfig
from vimpac.losses import contrastive_loss, mask_loss
from vimpac.model import PretrainModel
from vimpac.ops import BlockMask, block_mask
from vimpac.training.optim import adamw
from vimpac.training.step import PretrainStep

PAPER = {  # Table 13: parameters, samples per GPU and second, UCF101 accuracy pre-norm and post-norm
    "T,H|W": {"parameters": 29.4e6, "speed": 32.0, "pre": 67.6, "post": 69.4},
    "T,H,W": {"parameters": 35.8e6, "speed": 26.4, "pre": 69.0, "post": 69.6},
    "T,HxW": {"parameters": 27.1e6, "speed": 20.0, "pre": None, "post": 69.0},
    "TxHxW": {"parameters": 23.1e6, "speed": 12.6, "pre": None, "post": 65.9},
}
PASSES = ("forward", "forward+backward", "step")
CHECKED = 2  # clips
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}  # of states after all layers
CPU = {"layers": 1, "width": 256, "heads": 4, "vocab_size": 512}
TINY = {"layers": 1, "width": 16, "heads": 2, "grid": (3, 4, 4), "head_width": 8, "head_out": 8, "vocab_size": 50}


class Trained:
    """A model in training on fixed clip pairs: what a cell builds and times."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor], states: Callable[..., list[Tensor]]):
        defaults = TrainConfig()
        self.model, self.loss, self.states = model, loss, states
        self.optimizer = adamw(model, defaults.weight_decay, defaults.betas, defaults.eps)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4

    def __call__(self, tokens: Tensor, masked: BlockMask) -> list[Tensor]:
        """[CLS], hidden states, losses, without dropout."""
        self.model.eval()
        with torch.no_grad():
            states = self.states(tokens, masked)
        self.model.train()
        return states

    def calls(self) -> dict[str, tuple]:
        self.step(update=True)  # AdamW's state is there from now on
        runs = {
            "forward": lambda _: self.loss(),
            "forward+backward": lambda _: self.step(update=False),
            "step": lambda _: self.step(update=True),
        }
        return {which: (lambda: None, run) for which, run in runs.items()}

    def step(self, update: bool) -> None:
        self.loss().backward()
        if update:
            self.optimizer.step()
        self.optimizer.zero_grad()


class Cell:
    """One layout and norm: data, weights and both ways to train them."""

    def __init__(self, bench: Benchmark, config: ModelConfig, videos: int):
        self.config, self.device, self.train = config, bench.device, TrainConfig(model=config)
        self.autocast = None if bench.dtype == torch.float32 else bench.dtype
        torch.manual_seed(0)
        self.tokens = torch.randint(config.vocab_size, (2 * videos, *config.grid), device=self.device)
        self.ids = torch.arange(2 * videos, device=self.device)
        self.weights = PretrainModel(config)

    def mixed(self):
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def ours(self, compiled: bool) -> Trained:
        model = copy.deepcopy(self.weights).to(self.device)
        step = PretrainStep(model, self.train, padded=False, autocast=self.autocast)
        if compiled:
            compile_parts(model.backbone, ["embed"])

        def states(tokens, masked):
            with self.mixed():
                cls, hidden = model.backbone(masked.tokens, False)
                losses = mask_loss(model, hidden, tokens, masked)[0], contrastive_loss(model, cls, self.train.temperature)
            return [cls, hidden, *losses]

        return Trained(step, lambda: step(self.tokens, self.ids)["loss"], states)

    def naive(self, compiled: bool) -> Trained:
        model = self.naive_model().to(self.device)
        if compiled:
            compile_parts(model, ["embed", "token_logits"])
        train, n_blocks = self.train, PretrainStep(self.weights, self.train, padded=False).n_blocks

        def loss():
            mask = naive.block_masks(len(self.tokens), self.config.grid, n_blocks).to(self.device)
            with self.mixed():
                return naive.loss(model, self.tokens, mask, train.alpha, train.temperature, padded=False)

        def states(tokens, masked):
            with self.mixed():
                return naive_states(model, tokens, masked, train.temperature)

        return Trained(model, loss, states)

    def naive_model(self) -> naive.NaiveModel:
        model = naive.NaiveModel(self.config)
        naive.copy_weights(model, self.weights.state_dict())
        return model

    def check(self, trained: Trained) -> float:
        tokens, ids = self.tokens[:CHECKED], self.ids[:CHECKED]
        masked = block_mask(tokens, ids, seed=1, vocab_size=self.config.vocab_size)
        exact = self.naive_model().to(self.device, torch.float64).eval()
        with torch.no_grad():
            expected = naive_states(exact, tokens, masked, self.train.temperature)
        return harness.distance(trained(tokens, masked), expected)


def naive_states(model: naive.NaiveModel, tokens: Tensor, masked: BlockMask, temperature: float) -> list[Tensor]:
    cls, hidden = model.backbone(masked.tokens, False)
    loss = naive.mask_loss(model.token_logits(hidden), tokens, masked.mask)
    return [cls, hidden, loss, naive.contrastive_loss(model.cls_head(cls), temperature)]


def compile_parts(model: nn.Module, methods: list[str]) -> None:
    for layer in model.layers:
        layer.compile(dynamic=False)
    for method in methods:
        setattr(model, method, torch.compile(getattr(model, method), dynamic=False))


def run(bench: Benchmark, config: ModelConfig, videos: int, which: list[str]) -> None:
    """The cells of one layout and norm named in `which`."""
    cell = Cell(bench, config, videos)
    shape = f"{config.layout} {config.norm}-norm layers={config.layers} width={config.width} videos={videos}"
    case = Case("training step", shape, bench.dtype, (), cell.check, PASSES, calls=Trained.calls)
    options = {"bound": BOUNDS[bench.dtype], "graph": False}
    impls = {
        "ours": Impl("ours", partial(cell.ours, False), ours=True, required=True, **options),
        "naive eager": Impl("naive eager", partial(cell.naive, False), **options),
        "ours compiled": Impl("ours compiled", partial(cell.ours, True), ours=True, compiled=True, **options),
        "naive compiled": Impl("naive compiled", partial(cell.naive, True), compiled=True, **options),
    }
    before = len(bench.rows)
    bench.add(case, [impls[name] for name in which])
    paper, size = PAPER.get(config.layout, {}), parameters(config.layout, config.norm)
    for row in bench.rows[before:]:
        speed = 1e3 * videos / row["ms"] if row["pass"] == "step" and row["ms"] else None
        row |= {"layout": config.layout, "norm": config.norm, "layers": config.layers, "videos": videos}
        row |= {"parameters": size, "samples_per_s": speed, "paper_parameters": paper.get("parameters")}
        row |= {"paper_samples_per_s": paper.get("speed"), "paper_accuracy": paper.get(config.norm)}


def parameters(layout: str, norm: str) -> int:
    """Of Small's backbone with this layout, whatever was timed."""
    with torch.device("meta"):
        return sum(p.numel() for p in PretrainModel(ModelConfig.small(layout=layout, norm=norm)).backbone.parameters())


def summary(rows: list[dict]) -> None:
    """One line a layout and implementation: median milliseconds of the passes; the paper's columns last."""
    titles = " ".join(f"{title:>9}" for title in ("forward", "+backward", "step", "samples/s", "peak MiB"))
    print(f"\n{'layout':8} {'norm':5} {'':15} {'params':>7} {titles}   paper: params, samples/s, accuracy")
    for first in (row for row in rows if row["pass"] == "forward"):
        same = {row["pass"]: row for row in rows if all(row[key] == first[key] for key in ("layout", "norm", "impl"))}
        step = same["step"]
        cells = [show(same[name]["ms"], ".1f") for name in PASSES]
        cells += [show(step["samples_per_s"], ".2f"), show(step["peak_bytes"] and step["peak_bytes"] / 2**20, ".0f")]
        paper = f"{show(first['paper_parameters'] and first['paper_parameters'] / 1e6, '.1f')}M"
        paper += f", {show(first['paper_samples_per_s'], '.1f')}, {show(first['paper_accuracy'], '.1f')}"
        note = "" if first["status"] == "ok" else f"   {first['status']}: {first['note']}"
        title = f"{first['layout']:8} {first['norm']:5} {first['impl']:15} {first['parameters'] / 1e6:6.1f}M"
        print(f"{title} {' '.join(f'{cell:>9}' for cell in cells)}   {paper}{note}")


def show(x: float | None, form: str) -> str:
    return "-" if x is None else f"{x:{form}}"


def main(argv: list[str] | None = None) -> int:
    options = harness.arguments(
        __doc__,
        argv,
        layouts={"nargs": "+", "default": list(PAPER)},
        norms={"nargs": "+", "choices": ("post", "pre"), "help": "default: post and pre on a GPU, post on a CPU"},
        videos={"type": int, "help": "videos a step; default: 32 on a GPU, 2 on a CPU"},
    )
    bench = Benchmark("attn_layouts", options, budget=150.0 if options.device == "cuda" else 120.0, skip_ours=True)
    shape = TINY if bench.quick else {} if bench.on_gpu else CPU
    norms = options.norms or (["post", "pre"] if bench.on_gpu else ["post"])
    videos = options.videos or (32 if bench.on_gpu else 2)
    for norm in norms:
        configs = [ModelConfig.small(layout=layout, norm=norm, **shape) for layout in options.layouts]
        for config in configs:
            run(bench, config, videos, ["ours", "naive eager"])
        for config in configs:
            run(bench, config, videos, ["ours compiled", "naive compiled"] if bench.on_gpu else ["naive compiled"])
    summary(bench.rows)
    return bench.finish(small=not bench.on_gpu)


if __name__ == "__main__":
    sys.exit(main())
