"""Memory traffic of a compiled training step beside its matrix products, counted by the compiler's schedule. Needs no GPU.

A unit is one tensor [R, C] in bfloat16, written or read once: R rows (tokens and [CLS]), C the model's width. For each kernel
that TorchInductor schedules, forward and backward, other than a matrix product, the sizes of the buffers that it reads and
writes are added up. Weights' casts and vectors, less than 0.3 units each, are left out. Tiling aside, a GPU gets the same
schedule (bfloat16 autocast, dropout 0.1). kept: what a layer's forward pass stores for backward.

ours is vimpac.model.backbone.Layer, naive that of naive.py. around: our embedding with its norm and dropout, and the selection
of the rows that the heads read, in units.

The last columns: the time a video needs at least, two clips, forward and backward, if memory and matrix products reach the
ceilings below and do not overlap. No GPU has been measured: these are bounds, not speeds.

    python benchmarks/step_traffic.py [--presets 'small 5x128'] [--quick]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}  # a cached graph is not scheduled

import torch
import torch._functorch.config as functorch
import torch._inductor.config as inductor
import torch._inductor.graph as graph
import torch._inductor.ir as ir
from torch import Tensor, nn

import harness
import naive
import report
from vimpac.config import ModelConfig
from vimpac.layouts import parse_layout
from vimpac.model import PretrainModel
from vimpac.model.backbone import Layer
from vimpac.model.masking import blocks_for_ratio
from vimpac.model.recompute import recomputing
from vimpac.ops.block_mask import expected_block_ratio

CLIPS = 32  # of the counted step: units depend on it by less than 1 %
LEAST = 0.3  # units: smaller buffers are weights' casts and vectors
PRODUCTS = ("mm", "addmm", "linear")  # attention's own count as traffic: they are what a fused kernel saves
PRESETS = {
    "small 5x128": ModelConfig.small(),
    "small 10x128": ModelConfig.small(grid=(10, 16, 16)),
    "base 5x128": ModelConfig.base(),
    "large-half 5x128": ModelConfig.large_half(),
}
NORMS = ("post", "pre")
MODES = ("none", "selective", "full")
CEILINGS = {  # device → bytes/s of a copy, operations/s of products of these shapes: what well-tuned kernels reach
    "H100": (3.0e12, 550e12),
    "H200": (4.3e12, 550e12),
}


@dataclass
class Count:
    """Units of a layer."""

    forward: float
    backward: float
    kept: float

    @property
    def all(self) -> float:
        return self.forward + self.backward


class _Counted(Exception):
    """Both graphs are scheduled: they need not be compiled."""


@contextmanager
def schedules(found: list[tuple[bool, list[tuple[str, int]], list[tuple[str, int]]]], runs: bool):
    """Inside, a graph that is compiled appends (backward, its kernels and their bytes, its outputs and their bytes).

    runs: whether what is compiled shall run, as code with graph breaks must; else _Counted ends it.
    """
    original = graph.GraphLowering.codegen

    def codegen(self, *arguments, **options):
        made = original(self, *arguments, **options)
        kernels = []
        for node in self.scheduler.nodes:
            inner = getattr(node, "node", None)
            name = getattr(inner, "python_kernel_name", None) or getattr(inner, "op_overload", None) or ""
            kernels.append((str(name), int(node.get_read_write_buffers_sizes())))
        tensors = [x for x in self.graph_outputs if not isinstance(x, ir.NoneAsConstantBuffer | ir.ShapeAsConstantBuffer)]
        outputs = [(x.get_name(), int(x.get_numel()) * x.get_dtype().itemsize) for x in tensors]
        found.append((bool(self.is_backward), kernels, outputs))
        if self.is_backward and not runs:
            raise _Counted
        return made

    graph.GraphLowering.codegen = codegen
    try:
        with inductor.patch(compile_threads=1), functorch.patch(force_non_lazy_backward_lowering=not runs):
            yield
    finally:
        graph.GraphLowering.codegen = original


def is_product(name: str) -> bool:
    last = name.rsplit(".", 1)[-1].rstrip("_")
    return last in PRODUCTS or "mkl" in name or "onednn" in name


def count(call: Callable[[], Tensor], unit: int, runs: bool = False) -> Count:
    """Units of what `call` compiles, its backward pass included. unit: its bytes."""
    found: list = []
    torch._dynamo.reset()
    with schedules(found, runs):
        try:
            out = call()
            out.sum().backward()
        except Exception as error:
            if "_Counted" not in repr(error):
                raise
    sums = {False: 0.0, True: 0.0}
    for backward, kernels, _ in found:
        sums[backward] += sum(size for name, size in kernels if not is_product(name) and size >= LEAST * unit) / unit
    if runs:  # of several graphs, what is kept is not known
        return Count(sums[False], sums[True], math.nan)
    (outputs,) = [outputs for backward, _, outputs in found if not backward]
    kept: dict[str, int] = {}
    for name, size in outputs:
        if name != outputs[0][0]:  # the result, which the next layer counts
            kept[name] = max(size, kept.get(name, 0))  # of several views of a buffer the largest
    return Count(sums[False], sums[True], sum(size for size in kept.values() if size >= LEAST * unit) / unit)


def count_layer(config: ModelConfig, which: str = "ours", mode: str = "selective") -> Count:
    """Units of one layer of a model, "ours" or "naive", with an activation checkpointing mode of ours."""
    rows, C = math.prod(config.grid) + 1, config.width
    if which == "naive":
        layer: nn.Module = naive.Layer(config).train()
        arguments: tuple = (torch.randn(CLIPS, rows, C, requires_grad=True), None)
    else:
        layer = Layer(config).train()
        layer.mlp.recompute = mode == "selective"
        narrow = config.norm == "post"
        layer.residual = "auto" if narrow else "fp32"
        stream = torch.bfloat16 if narrow else torch.float32
        x = torch.empty(CLIPS * rows, C, dtype=stream, requires_grad=True)
        exact = torch.empty(CLIPS, C, requires_grad=True) if narrow else None
        arguments = (x, None, torch.zeros(len(layer.attention) + 1, dtype=torch.int64), exact)
    layer.compile(dynamic=False)

    def call() -> Tensor:
        context = recomputing() if mode == "selective" and which == "ours" else nullcontext()
        with torch.autocast("cpu", torch.bfloat16), context:
            out = layer(*arguments)
        return out[0] if isinstance(out, tuple) else out

    found = count(call, CLIPS * rows * C * 2, runs=which == "naive")
    if mode == "full" and which == "ours":  # forward again, of which only the layer's input is kept
        return Count(found.forward, found.forward + found.backward, 1.0)
    return found


def count_around(config: ModelConfig) -> float:
    """Units of our embedding, forward and backward, and of the gather of the masked rows, whose gradient is a tensor of zeros
    with these rows written into it."""
    model = PretrainModel(config).train()
    tokens = torch.zeros(CLIPS, *config.grid, dtype=torch.int64)
    embed = torch.compile(model.backbone.embed, dynamic=False)

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), recomputing():
            return embed(tokens, model.backbone.cls + model.backbone.positions.cls, torch.tensor(1))[0]

    found = count(call, CLIPS * (math.prod(config.grid) + 1) * config.width * 2)
    return found.all + 2 * masked_share(config) + 1 + 2 * masked_share(config)


def masked_share(config: ModelConfig) -> float:
    return expected_block_ratio(config.grid, blocks_for_ratio(config.grid))


def operations(config: ModelConfig) -> float:
    """Of the matrix products of a video, two clips, forward and backward: layers and token head."""
    rows = 2 * (math.prod(config.grid) + 1)
    attention = 4 * config.width * config.key_width * len(parse_layout(config.layout, config.heads))
    layer = attention + 2 * config.width * config.hidden_width
    head = masked_share(config) * config.width * (config.width + config.vocab_size)
    return 2 * 3 * rows * (config.layers * layer + head)


def least_ms(config: ModelConfig, units: float, around: float, device: str) -> float:
    """Milliseconds of a video at the ceilings, memory and products one after the other."""
    copy, products = CEILINGS[device]
    size = 2 * (math.prod(config.grid) + 1) * config.width * 2
    return 1e3 * ((config.layers * units + around) * size / copy + operations(config) / products)


def row(preset: str, config: ModelConfig, which: str, mode: str, around: float | None) -> dict:
    found = count_layer(config, which, mode)
    known = {name: None if math.isnan(x) else round(x, 1) for name, x in asdict(found).items()}
    least = {
        f"{device.lower()}_ms": None if around is None else least_ms(config, found.all, around, device) for device in CEILINGS
    }
    names = {"preset": preset, "norm": config.norm, "impl": which, "checkpointing": mode}
    return {**names, **known, "all": round(found.all, 1), "around": around, **least}


COLUMNS = ("forward", "backward", "all", "kept", "around", "h100_ms", "h200_ms")


def shown(found: dict) -> str:
    cells = ("-" if found[name] is None else f"{found[name]:.4g}" for name in COLUMNS)
    title = f"{found['preset']} {found['norm']} {found['impl']} {found['checkpointing']}"
    return f"{title:44}" + "".join(f"{cell:>10}" for cell in cells)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="the first preset, post-norm, selective checkpointing, ours")
    parser.add_argument("--results", type=Path, help="folder for the JSON; default: benchmarks/results/cpu, --quick: none")
    options = parser.parse_args(argv)
    print(f"{'units of a layer':44}" + "".join(f"{x:>10}" for x in COLUMNS))
    rows = []
    first = 1 if options.quick else None
    for preset, norm in itertools.product(options.presets[:first], NORMS[:first]):
        config = replace(PRESETS[preset], norm=norm)
        around = None if options.quick else round(count_around(config), 1)
        for mode in ("selective",) if options.quick else MODES:
            rows.append(row(preset, config, "ours", mode, around))
            print(shown(rows[-1]), flush=True)
        if not options.quick:
            rows.append(row(preset, config, "naive", "none", None))
            print(shown(rows[-1]), flush=True)
    result = {"benchmark": "step_traffic", "device": "cpu", "torch": torch.__version__, "triton": report.triton_version()}
    result |= {"quick": options.quick, "rows": rows}
    if options.results or not options.quick:
        report.write_json(options.results or harness.ROOT / "benchmarks" / "results" / "cpu", result)
    print(json.dumps(result, allow_nan=False), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
