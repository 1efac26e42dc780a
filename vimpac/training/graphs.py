"""CUDA graphs of the micro-step: its hundreds of launches become one.

A graph has fixed shapes. The only shape of a batch that may vary is the number of rows of the token head. If the device draws
the masks, it is fixed and there is one graph. If the host draws them, it is rounded up to one of a few numbers, each of which
gets a graph when it first occurs. All graphs and the warm-up runs of later ones share one memory pool, since no two of them run
at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic

import torch
from torch import Tensor, nn

from vimpac.training.batch import ROWS, AnyBatch, map_tensors, tensors_of
from vimpac.training.device import generator_of

WARM_UP = 3  # runs before a capture: autotuning, compilation, cuBLAS workspaces


def row_multiple(tokens: int, share: float) -> int:
    """The multiple to round the number of rows up to: an eighth of the expected number, so that a run needs about 3 graphs."""
    return max(ROWS, math.ceil(tokens * share / 8 / ROWS) * ROWS)


class GraphedStep(Generic[AnyBatch]):
    """Replays run(batch) → metrics, which adds to the gradients of a module's parameters, from a graph.

    Gradients must keep their memory: zero them, do not set them to None. Dropout is drawn from torch's generator as seeded
    before each call. A capture leaves gradients, buffers (batch norm's) and the generator unchanged.
    """

    def __init__(self, run: Callable[[AnyBatch], dict[str, Tensor]], module: nn.Module, capture: Callable | None = None):
        self.run, self.module = run, module
        self.capture = capture or _Capture()
        self.graphs: dict[tuple, tuple[AnyBatch, Callable[[], dict[str, Tensor]]]] = {}

    def __call__(self, batch: AnyBatch) -> dict[str, Tensor]:
        shapes = tuple((x.shape, x.dtype) for x in tensors_of(batch))
        if shapes not in self.graphs:
            inputs = map_tensors(batch, torch.clone)
            self.graphs[shapes] = inputs, self.prepare(inputs)
        inputs, replay = self.graphs[shapes]
        for static, x in zip(tensors_of(inputs), tensors_of(batch), strict=True):
            static.copy_(x)
        return {name: x.clone() for name, x in replay().items()}  # the next graph may overwrite this one's results

    def prepare(self, inputs: AnyBatch) -> Callable[[], dict[str, Tensor]]:
        """Captures run(inputs), then restores the module's state."""
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        state = [*(p.grad for p in parameters), *self.module.buffers()]
        kept, generator = [x.clone() for x in state], generator_of(inputs.tokens.device)
        drawn = generator.get_state()
        torch.clear_autocast_cache()  # or the graph would keep using a copy of a weight made before it
        replay = self.capture(lambda: self.run(inputs))
        torch.clear_autocast_cache()
        for x, before in zip(state, kept, strict=True):
            x.copy_(before)
        generator.set_state(drawn)
        return replay


class _Capture:
    """Captures functions into graphs with one memory pool, on one side stream: a pool reuses memory on one stream only."""

    def __init__(self):
        self.stream, self.filled = torch.cuda.Stream(), False
        native = torch.cuda.get_allocator_backend() == "native"  # cudaMallocAsync has no pools outside of captures
        self.memory = torch.cuda.MemPool() if native else None
        self.pool: Any = self.memory.id if self.memory else torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), self.pooled():
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            out = function()
        self.filled = True

        def replay() -> dict[str, Tensor]:
            graph.replay()
            return out

        return replay

    @contextmanager
    def pooled(self) -> Iterator[None]:
        """Inside, once there is a graph, memory comes from the pool. Graphs never return memory, so warm-up runs outside of the
        pool would need the same amount a second time.

        Replays of earlier graphs overwrite whatever such a run leaves in the pool. The first warm-up therefore runs outside:
        what it allocates for good, such as the scaler's scale, must not be in the pool. cuBLAS's workspaces may be, since they
        hold nothing between calls.
        """
        if self.memory is None or not self.filled:
            yield
            return
        torch.cuda.empty_cache()  # or cached blocks would not be released when the pool grows
        # A pool serves one thread, so backward must run in this one.
        with torch.cuda.use_mem_pool(self.memory), torch.autograd.set_multithreading_enabled(False):
            yield
