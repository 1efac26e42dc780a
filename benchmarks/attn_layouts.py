"""Table 13: the training step of every attention layout, ours against naive.py, eager and compiled, and the paper's numbers.

Small at 5×16×16 on random ids, dropout 0.1, post- and pre-norm. forward: batch, backbone, heads and both losses;
forward+backward; step: those, clipping and AdamW. samples/s are videos, two clips each, in whole steps; peak memory is beyond
weights and optimizer state; "params" is the backbone of the six-layer Small, in the paper too, whose speed is samples per
second of pre-training on one V100 and whose accuracy is UCF101's. On a GPU 32 videos and bfloat16 autocast. On a CPU float32, 2
videos, one layer of a quarter of the width, 256 ids, so that the token head has about the share of the work that it has in
Small, and a contrastive head of a quarter of the width. What does not fit into the budget is skipped, compiled
pre-norm first (--budget 600 has it all on two cores).

What is built, and checked before it is timed: training.py. How it is timed: harness.py.

    python benchmarks/attn_layouts.py [--layouts 'T,H|W' TxHxW] [--norms post pre] [--videos 32] [--budget 600] [--quick]
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

import harness
from harness import Benchmark, Case, Impl
from training import BOUNDS, TINY, Cell, Stores, Trained
from vimpac.config import ModelConfig
from vimpac.layouts import parse_layout
from vimpac.model import PretrainModel

PAPER = {  # Table 13: parameters, samples per GPU and second, UCF101 accuracy pre-norm and post-norm
    "T,H|W": {"parameters": 29.4e6, "speed": 32.0, "pre": 67.6, "post": 69.4},
    "T,H,W": {"parameters": 35.8e6, "speed": 26.4, "pre": 69.0, "post": 69.6},
    "T,HxW": {"parameters": 27.1e6, "speed": 20.0, "pre": None, "post": 69.0},
    "TxHxW": {"parameters": 23.1e6, "speed": 12.6, "pre": None, "post": 65.9},
}
PASSES = ("forward", "forward+backward", "step")
CPU = {"layers": 1, "width": 128, "heads": 2, "vocab_size": 256, "head_width": 1024}
EAGER, COMPILED = ("ours", "naive eager"), ("ours compiled", "naive compiled")


def run(bench: Benchmark, stores: Stores, config: ModelConfig, videos: int, which: tuple[str, ...]) -> None:
    """The cells of one layout and norm named in `which`."""
    cell = Cell(bench, stores, config, videos)
    shape = f"{config.layout} {config.norm}-norm layers={config.layers} width={config.width} videos={videos}"
    case = Case("training step", shape, bench.dtype, (), cell.check, PASSES, calls=Trained.calls)
    options = {"bound": BOUNDS[bench.dtype], "graph": False}
    ours = {"ours": True, "required": True, "note": sdpa_note(config), **options}
    impls = {
        "ours": Impl("ours", partial(cell.ours, False), **ours),
        "naive eager": Impl("naive eager", partial(cell.naive, False), **options),
        "ours compiled": Impl("ours compiled", partial(cell.ours, True), compiled=True, **ours),
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


def sdpa_note(config: ModelConfig) -> str:
    """Along the product of axes ours is torch's scaled_dot_product_attention too."""
    joined = [axis for block in parse_layout(config.layout, config.heads) for axis in block if "x" in axis]
    return f"{', '.join(joined)}: scaled_dot_product_attention" if joined else ""


def parameters(layout: str, norm: str) -> int:
    """Of Small's backbone with this layout, whatever was timed."""
    with torch.device("meta"):
        return sum(p.numel() for p in PretrainModel(ModelConfig.small(layout=layout, norm=norm)).backbone.parameters())


def summary(rows: list[dict]) -> None:
    """One line a layout and implementation: median milliseconds of the passes; the paper's columns last."""
    titles = " ".join(f"{title:>9}" for title in ("forward", "+backward", "step", "samples/s", "peak MiB"))
    print(f"\n{'layout':8} {'norm':5} {'':15} {'params':>7} {titles}   paper: params, samples/s, accuracy")
    firsts = [row for row in rows if row["pass"] == "forward"]
    for first in sorted(firsts, key=lambda row: (row["norm"] != "post", list(PAPER).index(row["layout"]))):
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
        layouts={"nargs": "+", "choices": list(PAPER), "default": list(PAPER)},
        norms={"nargs": "+", "choices": ("post", "pre"), "default": ["post", "pre"]},
        videos={"type": int, "help": "videos a step; default: 32 on a GPU, 2 on a CPU"},
    )
    bench = Benchmark("attn_layouts", options, budget=145.0, skip_ours=True)
    shape = TINY if bench.quick else {} if bench.on_gpu else CPU
    videos = options.videos or (32 if bench.on_gpu else 2)
    with tempfile.TemporaryDirectory() as folder:
        stores = Stores(Path(folder))
        order = [(norm, EAGER) for norm in options.norms]
        for norm in options.norms:  # on a CPU, where compiling takes longest, first of what ours is compared with
            order += [(norm, COMPILED)] if bench.on_gpu else [(norm, COMPILED[1:]), (norm, COMPILED[:1])]
        for norm, which in order:
            for layout in options.layouts:
                run(bench, stores, ModelConfig.small(layout=layout, norm=norm, **shape), videos, which)
    summary(bench.rows)
    return bench.finish(small=not bench.on_gpu)


if __name__ == "__main__":
    sys.exit(main())
