"""Memory traffic of a compiled training step beside its matrix products, counted by the compiler's schedule. Needs no GPU.

A unit is one tensor [R, C] in bfloat16, written or read once: R rows (tokens and [CLS]), C the model's width. For each kernel
that TorchInductor schedules, forward and backward, other than a matrix product, the sizes of the buffers that it reads and
writes are added up. Weights' casts and vectors, less than 0.3 units each, are left out. Tiling aside, a GPU gets the same
schedule (bfloat16 autocast, dropout 0.1). kept: what a layer's forward pass stores for backward.

ours is vimpac.model.backbone.Layer, naive that of naive.py. around: our embedding with its norm and dropout, and the selection
of the rows that the heads read, in units.

The last columns: the time a video needs at least, two clips, forward and backward, if memory and matrix products reach the
ceilings below and do not overlap. No GPU has been measured: these are bounds, not speeds.

Check: the products that are scheduled have the operations that the layer's shapes say.

    python benchmarks/step_traffic.py [--presets 'small 5x128'] [--quick]
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}  # a cached graph is not scheduled

import torch
import torch._functorch.config as functorch
import torch._inductor.config as inductor
import torch._inductor.graph as graph
import torch._inductor.ir as ir
from torch import nn

import naive
from vimpac.config import ModelConfig
from vimpac.model.backbone import Layer
from vimpac.model.recompute import recomputing

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
def schedules(found: list[tuple[bool, list[tuple[str, int]], list[tuple[str, int]]]]):
    """Inside, a graph that is compiled appends (backward, its kernels and their bytes, its outputs and their bytes)."""
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
        if self.is_backward:
            raise _Counted
        return made

    graph.GraphLowering.codegen = codegen
    try:
        with inductor.patch(compile_threads=1), functorch.patch(force_non_lazy_backward_lowering=True):
            yield
    finally:
        graph.GraphLowering.codegen = original


def is_product(name: str) -> bool:
    last = name.rsplit(".", 1)[-1].rstrip("_")
    return last in PRODUCTS or "mkl" in name or "onednn" in name


def count(call: Callable[[], object], unit: int) -> Count:
    """Units of what `call` compiles. unit: its bytes."""
    found: list = []
    torch._dynamo.reset()
    with schedules(found):
        try:
            call()
        except Exception as error:
            if "_Counted" not in repr(error):
                raise
    sums = {False: 0.0, True: 0.0}
    for backward, kernels, _ in found:
        sums[backward] += sum(size for name, size in kernels if not is_product(name) and size >= LEAST * unit) / unit
    (outputs,) = [outputs for backward, _, outputs in found if not backward]
    kept = {
        name: size for name, size in outputs if name != outputs[0][0]
    }  # the first is the result, of the next layer's account
    return Count(sums[False], sums[True], sum(size for size in kept.values() if size >= LEAST * unit) / unit)


def count_layer(config: ModelConfig, which: str = "ours", mode: str = "selective") -> Count:
    """Units of one layer of a model, "ours" or "naive", with an activation checkpointing mode of ours."""
    rows = math.prod(config.grid) + 1
    unit = CLIPS * rows * config.width * 2
    if which == "naive":
        layer: nn.Module = naive.Layer(config).train()
        x = torch.empty(CLIPS, rows, config.width, requires_grad=True)
        arguments: tuple = (x, None)
    else:
        layer = Layer(config).train()
        layer.mlp.recompute = mode == "selective"
        x = torch.empty(CLIPS * rows, config.width, dtype=torch.bfloat16, requires_grad=True)
        arguments = (x, None, torch.zeros(len(layer.attention) + 1, dtype=torch.int64))
    layer.compile(dynamic=False)
    context = recomputing() if mode == "selective" and which == "ours" else nullcontext()

    def call():
        with torch.autocast("cpu", torch.bfloat16), context:
            layer(*arguments)

    found = count(call, unit)
    if mode == "full" and which == "ours":  # forward again, of which only the layer's input is kept
        return Count(found.forward, found.forward + found.backward, 1.0)
    return found
