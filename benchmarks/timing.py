"""Times, memory and bandwidth of a call: how the benchmarks measure.

Time on a GPU: CUDA events around one call, 256 MiB read before each to flush the L2 cache (written ones would be written back
during the call). A call under a millisecond is captured 20 times over in a CUDA graph, and the graph is timed, so that launch
gaps do not count (its inputs then stay in L2). On a CPU: the wall clock. Always median, 20th and 80th percentile.

Memory: the peak above what was allocated before the call, from torch's allocator (on a CPU: the profiler's record of it).
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from report import first_line

L2_BYTES = 256 << 20
GRAPH_CALLS = 20
Timed = tuple[tuple[float, float, float], str]  # median, 20th and 80th percentile; how they were timed


def timed(
    device: torch.device, prepare: Callable, run: Callable, quick: bool = False, graph: bool = False
) -> tuple[tuple, str]:
    """Milliseconds of run(prepare()), of which only run is timed."""
    return time_gpu(prepare, run, graph) if device.type == "cuda" else time_cpu(prepare, run, quick)


def nothing() -> None:
    """Of a call that needs no preparation."""


def time_cpu(prepare: Callable, run: Callable, quick: bool) -> Timed:
    """The caller has warmed it up."""
    seconds, times, started = 0.02 if quick else 0.6, [], time.perf_counter()
    while len(times) < 2 or (time.perf_counter() - started < seconds and len(times) < 1000):
        state = prepare()
        begin = time.perf_counter()
        run(state)
        times.append(1e3 * (time.perf_counter() - begin))
    return spread(times), "wall clock"


def time_gpu(prepare: Callable, run: Callable, graph: bool, milliseconds: float = 200.0) -> Timed:
    for _ in range(3):
        run(prepare())
    estimate = statistics.median(events(prepare, run, 5))
    how = "events"
    if graph and estimate < 1.0:
        try:
            times = events(nothing, captured(run), 50)
            return spread([x / GRAPH_CALLS for x in times]), f"graph of {GRAPH_CALLS} calls"
        except RuntimeError as problem:
            how = f"events, since no graph: {first_line(problem)}"
    repeats = int(min(200, max(10, milliseconds / estimate)))
    return spread(events(prepare, run, repeats)), how


def events(prepare: Callable, run: Callable, repeats: int) -> list[float]:
    """Milliseconds on the device of each of several calls, with a cold L2 cache."""
    cache = torch.zeros(L2_BYTES // 4, dtype=torch.int32, device="cuda")
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in marks:
        state = prepare()
        cache.amax()
        start.record()
        run(state)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks]


def captured(run: Callable) -> Callable:
    """A graph of GRAPH_CALLS calls, to replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # autograd runs backward on the stream of the forward, so both are warmed up on it
        for _ in range(3):
            run(None)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(GRAPH_CALLS):
            run(None)
    return lambda _: graph.replay()


def spread(times: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    times = sorted(times)
    return statistics.median(times), times[int(0.2 * (len(times) - 1))], times[math.ceil(0.8 * (len(times) - 1))]


def copy_bandwidth(device: torch.device, quick: bool = False, graph: bool = False) -> float:
    """GB/s of a copy between two tensors, bytes read plus bytes written. graph: copies that follow one another, on a GPU."""
    size = (512 << 20) if device.type == "cuda" else (4 << 20) if quick else (64 << 20)
    source = torch.randint(100, (size,), dtype=torch.int8, device=device)
    target = source.clone()

    def copy(_):
        target.copy_(source)

    times, _ = timed(device, nothing, copy, quick, graph)
    return 2 * size / times[0] / 1e6


def matrix_peak(device: torch.device, dtype: torch.dtype, quick: bool = False) -> float:
    """TFLOP/s of the product of two large square matrices: what a step of matrix products could reach at most.

    On a CPU the better of torch's product and the convolution that vimpac.model.linear makes of it.
    """
    size = 8192 if device.type == "cuda" else 128 if quick else 2048
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    out = a @ b
    ways = [lambda _: torch.mm(a, b, out=out)]
    if device.type == "cpu":
        from vimpac.model import linear  # not before sys.path knows a bare checkout's vimpac

        ways.append(lambda _: linear.product(a, b))
    return 2 * size**3 / min(timed(device, nothing, way, quick)[0][0] for way in ways) / 1e9


def peak_bytes(device: torch.device, prepare: Callable, run: Callable) -> int:
    """Most bytes allocated during run, beyond what was before prepare."""
    if device.type == "cpu":
        return cpu_peak_bytes(prepare, run)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    state = prepare()
    torch.cuda.reset_peak_memory_stats()
    run(state)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cpu_peak_bytes(prepare: Callable, run: Callable) -> int:
    """The same from the profiler's record of torch's CPU allocator; what libraries allocate themselves is not in it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or each profile prints two lines
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        state = prepare()
        split = time.time_ns()
        run(state)
    recorded = profiler.profiler
    assert recorded is not None and recorded.kineto_results is not None
    now = peak = 0
    memory: list[Any] = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now) if event.start_ns() >= split else max(0, now)
    return peak
