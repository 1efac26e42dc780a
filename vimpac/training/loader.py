"""Batches in order, prepared ahead of time: on a GPU by a thread that also copies them to the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic

import torch

from vimpac.training.batch import AnyBatch, map_tensors, tensors_of


class BatchLoader(Generic[AnyBatch]):
    """Iterates over make(first) for each sample number of `firsts`, on `device`.

    ahead: how many batches a thread prepares ahead of the one in use; 0 = each batch is prepared when next() needs it.
    None = 2 on a CUDA device, 0 on a CPU, where a thread would only compete with the step for cores.

    On a CUDA device the thread copies from pinned memory on a separate stream. The consumer's stream waits for the copy, the
    host does not. next() raises what `make` raises. `waited`: seconds that the consumer has waited so far.
    """

    def __init__(self, make: Callable[[int], AnyBatch], firsts: Iterable[int], device: torch.device, ahead: int | None = None):
        self.make, self.firsts, self.device = make, iter(firsts), device
        self.ahead = (2 if device.type == "cuda" else 0) if ahead is None else ahead
        self.waited = 0.0
        self._waiting: deque[Future] = deque()
        # A new thread starts on device 0, and would create a context there.
        here = {"initializer": torch.cuda.set_device, "initargs": (device,)} if device.type == "cuda" else {}
        self._thread = ThreadPoolExecutor(1, "batches", **here) if self.ahead else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[AnyBatch]:
        return self

    def __next__(self) -> AnyBatch:
        started = time.perf_counter()
        if self._thread is None:
            batch, ready = self._load(next(self.firsts))
        else:
            self._fill()
            if not self._waiting:
                raise StopIteration
            batch, ready = self._waiting.popleft().result()
            self._fill()
        self.waited += time.perf_counter() - started
        if ready is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(ready)
            for x in tensors_of(batch):  # allocated on the other stream, which must not reuse them while this one reads
                x.record_stream(stream)
        return batch

    def _fill(self) -> None:
        assert self._thread is not None
        while len(self._waiting) < self.ahead and (first := next(self.firsts, None)) is not None:
            self._waiting.append(self._thread.submit(self._load, first))

    def _load(self, first: int) -> tuple[AnyBatch, torch.Event | None]:
        batch = self.make(first)
        if self._stream is None:
            return batch, None
        with torch.cuda.stream(self._stream):
            batch = map_tensors(batch, lambda x: x.pin_memory().to(self.device, non_blocking=True))
            return batch, self._stream.record_event()

    def close(self) -> None:
        """Ends the thread and drops unused batches."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._waiting.clear()
