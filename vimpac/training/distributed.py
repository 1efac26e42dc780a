"""One or many processes, as torchrun's environment variables say: NCCL on GPUs, gloo on CPUs."""

from __future__ import annotations

import gc
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vimpac.checkpoint import list_checkpoints
from vimpac.errors import InputError
from vimpac.processes.meeting import CONNECT_SECONDS, GONE, Meeting, PeerLost, is_loss, meet
from vimpac.processes.ranks import Place, read_place

COLLECTIVE_MINUTES = {"cuda": 10, "cpu": 30}
"""How long a collective waits for a peer that is there, as for the first one to write a checkpoint: torch's own limits."""
AGAIN = "start again with --resume (torchrun --max-restarts does it by itself)"


@dataclass(frozen=True)
class World:
    """This process's place among all: rank of size, its device, and where it waits for the others without a time-out."""

    rank: int
    size: int
    device: torch.device
    meeting: Meeting | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@contextmanager
def join_world() -> Iterator[World]:
    """Start the process group when there is more than one process, end it afterwards."""
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
    with meet(place, f"{GONE}: {AGAIN}") as meeting, lost_peers_explained(lambda: f"{GONE}: {AGAIN}"):
        try:
            start_group(place, device, meeting)
            yield World(place.rank, place.size, device, meeting)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            leave_world()


def start_group(place: Place, device: torch.device, meeting: Meeting) -> None:
    """The process group of all ranks. Who has met is there: to connect takes seconds, or fails."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # tensors on the CPU, such as signals, wait for no GPU
    store = dist.PrefixStore("group", meeting.store)
    connecting = timedelta(seconds=CONNECT_SECONDS)
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=connecting)
    dist.distributed_c10d._set_pg_timeout(timedelta(minutes=COLLECTIVE_MINUTES[device.type]))


def leave_world() -> None:
    """End the process group, if there is one. Nothing may still refer to a DistributedDataParallel.

    Its reducer refers to the group. Were it the last to do so, it would wait for gloo's threads while it holds the
    interpreter's lock, which such a thread may need to end: one in ten runs of two processes hung there.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def averaging(module: nn.Module, world: World) -> DistributedDataParallel:
    """The module with its gradients averaged over ranks, bucket by bucket while backward still runs.

    Buffers are not sent around: every rank computes the same batch norm statistics. Inside, torch.compile would split graphs
    where buckets end, for gradients to leave earlier; each layer is a graph of its own here, and one that is whole in one
    place and split in another may draw its dropout in another order: it does not.
    """
    torch._dynamo.config.optimize_ddp = False
    devices = [world.device] if world.device.type == "cuda" else None
    named = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"  # before torch 2.13
    return DistributedDataParallel(module, devices, gradient_as_bucket_view=True, **{buffers: False})


@contextmanager
def explained_loss(run: Path, world: World) -> Iterator[None]:
    """The failure of a collective because another process is gone becomes an InputError that says how to go on."""

    def said() -> str:
        kept = list_checkpoints(run)
        return f"{GONE}; the last checkpoint is {kept[-1] if kept else 'not written yet'}: {AGAIN}"

    if world.size == 1:
        yield
        return
    with lost_peers_explained(said):
        yield


@contextmanager
def lost_peers_explained(said: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_loss(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they refer to the reducer: see leave_world
        raise PeerLost(said()) from None


@dataclass(frozen=True)
class BatchPlan:
    """How an update's videos are laid out over processes and micro-steps."""

    micro_batch: int  # videos a forward pass in each process
    micro_steps: int  # forward passes an update
    group_ranks: int  # neighbouring ranks that make up one contrastive batch
    parts: int = 1  # micro-steps, one after another, that make up one contrastive batch: more than one means two passes


def plan_batches(batch_size: int, contrastive_videos: int, micro_batch: int | None, ranks: int) -> BatchPlan:
    """Split an update of `batch_size` videos. Raises InputError where the contrastive batch would not come out whole."""
    if micro_batch is None and contrastive_videos % ranks:
        raise InputError(
            f"contrastive_videos={contrastive_videos} cannot be split evenly over {ranks} processes: use a multiple of "
            f"{ranks}, or --micro-batch {contrastive_videos} so that each process has contrastive batches of its own"
        )
    asked, micro_batch = micro_batch, micro_batch or contrastive_videos // ranks
    group, remainder = divmod(contrastive_videos, micro_batch)
    parts, uneven = divmod(group, ranks) if group > ranks else (1, 0)
    group = min(group, ranks)
    if remainder or uneven or group == 0 or ranks % group:
        raise InputError(
            f"contrastive_videos={contrastive_videos} cannot be made up of micro_batch={micro_batch} videos in each of "
            f"{ranks} processes: it must be micro_batch × a divisor of {ranks}, or a multiple of micro_batch × {ranks} "
            f"(which takes two passes), for example --micro-batch "
            f"{_or(_micro_batches(contrastive_videos, ranks))}"
        )
    videos = micro_batch * ranks * parts
    if batch_size % videos or batch_size < videos:
        raise InputError(_uneven_batch(batch_size, contrastive_videos, asked, ranks, videos))
    return BatchPlan(micro_batch, batch_size // (micro_batch * ranks), group, parts)


def _uneven_batch(batch_size: int, contrastive_videos: int, micro_batch: int | None, ranks: int, videos: int) -> str:
    """Why an update is not made up of `videos`, in the options that were given, and the nearest values that are."""
    below = batch_size // videos * videos
    ways = [f"--batch-size {_or(x for x in (below, below + videos) if x)}"]
    of = f"contrastive_videos={contrastive_videos}"
    if videos != contrastive_videos:
        of = f"micro_batch × processes = {micro_batch} × {ranks} = {videos}"
    if micro_batch is None:
        fits = [n for n in range(max(ranks, 2), batch_size + 1) if batch_size % n == 0 and n % ranks == 0]
        nearest = [max((n for n in fits if n < videos), default=None), min((n for n in fits if n > videos), default=None)]
        ways += [f"--contrastive-videos {_or(n for n in nearest if n)}"] if fits else []
    return f"batch_size={batch_size} must be a multiple of {of}: use {', or '.join(ways)}"


def _or(values: Iterable[int]) -> str:
    return " or ".join(str(x) for x in values)


def _micro_batches(contrastive_videos: int, ranks: int) -> list[int]:
    return [contrastive_videos // g for g in range(1, ranks + 1) if ranks % g == 0 and contrastive_videos % g == 0]


def contrastive_group(world: World, ranks: int) -> dist.ProcessGroup | None:
    """The process group of `ranks` neighbouring ranks that this rank belongs to; None when it is alone."""
    if ranks == 1:
        return None
    if ranks == world.size:
        return dist.group.WORLD
    groups = [dist.new_group(list(range(start, start + ranks))) for start in range(0, world.size, ranks)]
    return groups[world.rank // ranks]


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
    """Do `work` on the first rank while the others wait, however long. Raises its InputError or OSError, on others one that
    points there."""
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
    """A tensor of one shape on all ranks, from every rank."""
    if world.size == 1:
        return [x]
    rows = [torch.empty_like(x) for _ in range(world.size)]
    dist.all_gather(rows, x)
    return rows


def barrier(world: World) -> None:
    """Every rank waits for the others, by an answer that all of them need (NCCL's barrier would make the GPU wait)."""
    any_rank(False, world)
