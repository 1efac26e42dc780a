"""Training in one or many processes, according to torchrun's environment variables: NCCL on GPUs, gloo on CPUs."""

from __future__ import annotations

import gc
import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore  # torch.distributed has it, but not in __all__
from torch.nn.parallel import DistributedDataParallel

from vimpac.errors import InputError
from vimpac.processes.meeting import CONNECT_SECONDS, GONE, Meeting, PeerLost, is_loss, meet
from vimpac.processes.ranks import Place, read_place

COLLECTIVE_MINUTES = {"cuda": 10, "cpu": 30}
"""How long a collective waits for a connected peer, for example while the first rank writes a checkpoint: torch's defaults."""
AGAIN = "start again with --resume (torchrun --max-restarts does so automatically)"


@dataclass(frozen=True)
class World:
    """This process's rank, the number of processes, its device, and where processes wait for each other without a time-out."""

    rank: int
    size: int
    device: torch.device
    meeting: Meeting | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@contextmanager
def join_world(again: str = AGAIN) -> Iterator[World]:
    """Start the process group if there is more than one process, and end it afterwards.

    again: how to go on after another process has ended, for the error.
    """
    place = read_place()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", place.local_rank)
        if device.index >= torch.cuda.device_count():
            raise InputError(
                f"process {device.index} of this machine has no GPU, it has {torch.cuda.device_count()}: start "
                f"--nproc-per-node={torch.cuda.device_count()}"
            )
        torch.cuda.set_device(device)
    if place.size == 1:
        yield World(0, 1, device)
        return
    with meet(place, f"{GONE}: {again}") as meeting, explaining_lost_peers(lambda: f"{GONE}: {again}"):
        try:
            start_group(place, device, meeting)
            yield World(place.rank, place.size, device, meeting)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            leave_world()


def start_group(place: Place, device: torch.device, meeting: Meeting) -> None:
    """Start the process group of all ranks. All of them are running by now, so connecting takes seconds or fails."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # CPU tensors, such as flags for signals, need no GPU
    store = PrefixStore("group", meeting.store)
    connecting = timedelta(seconds=CONNECT_SECONDS)
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=connecting)
    dist.distributed_c10d._set_pg_timeout(timedelta(minutes=COLLECTIVE_MINUTES[device.type]))


def leave_world() -> None:
    """End the process group, if there is one. No reference to a DistributedDataParallel may be left.

    Its reducer refers to the group. If that is the last reference, its destructor waits for gloo's threads while it holds the
    interpreter's lock, which such a thread may need in order to end. One in ten runs of two processes hung there.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def averaging(module: nn.Module, world: World) -> DistributedDataParallel:
    """The module with its gradients averaged over ranks, bucket by bucket while backward still runs.

    Buffers are not synchronised: every rank computes the same batch norm statistics. torch.compile must not split its graphs at
    the ends of buckets: each layer is a separate graph already, and a split one may draw its dropout in another order.
    """
    torch._dynamo.config.optimize_ddp = False
    devices = [world.device] if world.device.type == "cuda" else None
    named = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"  # before torch 2.13
    options: dict[str, Any] = {buffers: False}
    return DistributedDataParallel(module, devices, gradient_as_bucket_view=True, **options)


@contextmanager
def explaining_lost_peers(message: Callable[[], str]) -> Iterator[None]:
    """If a collective fails because another process has ended, raise an InputError with this message instead."""
    try:
        yield
    except RuntimeError as error:
        if not is_loss(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they refer to the reducer: see leave_world
        raise PeerLost(message()) from None


def contrastive_group(world: World, ranks: int) -> dist.ProcessGroup | None:
    """The process group of `ranks` neighbouring ranks that this rank belongs to; None when it is alone."""
    if ranks == 1:
        return None
    if ranks == world.size:
        return dist.group.WORLD
    groups = [dist.new_group(list(range(start, start + ranks))) for start in range(0, world.size, ranks)]
    own = groups[world.rank // ranks]
    assert isinstance(own, dist.ProcessGroup)
    return own


def mean_over_ranks(x: Tensor, world: World) -> Tensor:
    """Mean of a tensor over all ranks, in place."""
    return sum_over_ranks(x, world).div_(world.size) if world.size > 1 else x


def sum_over_ranks(x: Tensor, world: World) -> Tensor:
    """Sum of a tensor over all ranks, in place."""
    if world.size > 1:
        dist.all_reduce(x)
    return x


def any_rank(flag: bool, world: World) -> bool:
    """Whether the flag is set on some rank; all ranks get the same answer."""
    if world.size == 1:
        return flag
    x = torch.tensor(int(flag))
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return bool(x)


def on_first_rank(work: Callable[[], None], world: World) -> None:
    """Do `work` on the first rank while the others wait without a time-out.

    If it raises InputError or OSError, so does the first rank; the others raise an InputError with the same message.
    """
    failure = None
    if world.is_first:
        try:
            work()
        except (InputError, OSError) as error:
            failure = error
    said = world.meeting.gather(str(failure) if failure else None)[0] if world.meeting else None
    if failure or said is not None:
        raise failure or InputError(f"the first process failed: {said}")


def gather_rows(x: Tensor, world: World) -> list[Tensor]:
    """Every rank's tensor, in order. They must have one shape."""
    if world.size == 1:
        return [x]
    rows = [torch.empty_like(x) for _ in range(world.size)]
    dist.all_gather(rows, x)
    return rows


def gather_on_first(x: Tensor, world: World) -> list[Tensor] | None:
    """Every rank's tensor, in order, on the first rank; None on the others. They must have one shape."""
    if world.size == 1:
        return [x]
    rows = [torch.empty_like(x) for _ in range(world.size)] if world.is_first else None
    dist.gather(x, rows, dst=0)
    return rows


def barrier(world: World) -> None:
    """Every rank waits for the others. (A reduction on the host, since NCCL's barrier would make the GPU wait.)"""
    any_rank(False, world)
