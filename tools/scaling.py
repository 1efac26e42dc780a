"""How pre-training should scale from 1 to 1024 GPUs, computed: tables of docs/scaling.md.

Nothing is timed here. A step on n GPUs is put together from

    the speed of one GPU     benchmarks/results/GPU/train_step.json ("ours compiled"), or else an assumed one: the goals
    bytes and collectives    what the code sends, counted: DistributedDataParallel's buckets, batch norm, InfoNCE, ZeRO-1
    the hardware             assumed: link speeds, latencies, launches (`Hardware`, each field an option)

    device = micro-steps × (videos × seconds a video + small collectives) + all-reduce that backward does not hide + optimizer
    host   = micro-steps × launches × seconds a launch + the flag that all processes agree on
    step   = max(device, host)          efficiency = 1024 videos at one GPU's speed / (n × step)

    python tools/scaling.py                   # print the tables, then one line of JSON
    python tools/scaling.py --small 800       # with another assumed speed, in videos a second
    python tools/scaling.py --write           # rewrite docs/scaling.md between `<!-- scaling: NAME -->` and `<!-- end -->`
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from render import H100, ROOT, Results, fill, number, table
from vimpac.config import PRESETS, ModelConfig, TrainConfig
from vimpac.errors import InputError
from vimpac.model import PretrainModel
from vimpac.training.optim import is_norm
from vimpac.training.plan import BatchPlan, plan_batches

DOCUMENT = ROOT / "docs" / "scaling.md"
START = re.compile(r"<!-- scaling: (\S+) -->")
GPUS = tuple(2**k for k in range(11))
BATCH = 1024  # videos an update
BUCKETS = (1 << 20, 25 << 20)  # DistributedDataParallel's: the first, all others
DOUBLE, FLOAT, MOMENTS = 8, 4, 8  # bytes: a float64, a float32, AdamW's two moments
ADAMW_BYTES = 28  # a parameter: reads weight, gradient and two moments, writes weight and moments
CLIP_BYTES = 12  # a parameter: reads the gradient for its norm, reads and writes it to scale it
CAST_BYTES = 6  # a parameter: reads the weight, writes its bfloat16 copy
BACKWARD = 2 / 3  # of a forward and backward pass: twice the operations of forward
SECOND_PASS = 4 / 3  # a contrastive batch in parts goes forward twice: 1 + 1 + 2 instead of 1 + 2
FLAG_EVERY = TrainConfig().log_every  # updates between two looks
CLIPS = 2  # of a video


@dataclass(frozen=True)
class Hardware:
    """Assumed, not measured. Link speeds are nominal peaks."""

    machine_gpus: int = 8
    nvlink_gb_per_s: float = 450.0  # a GPU, each direction: NVLink 4
    machine_gb_per_s: float = 400.0  # out of a machine: a 400 Gb/s adapter for each of its GPUs
    nvlink_us: float = 10.0  # a level of the tree that a collective takes within a machine
    network_us: float = 30.0  # a level of the tree between machines
    tcp_hop_us: float = 50.0  # from process to process through gloo
    memory_tb_per_s: float = 3.0  # an H100's memory, read plus written: the ceiling that docs/kernels.md uses too
    launch_us: float = 6.0  # of the host, a kernel
    layer_kernels: int = 50  # a layer, forward and backward; 18 are matrix products, the rest is guessed
    other_kernels: int = 150  # embedding, heads, losses; one more a parameter adds up its gradient


SLOW = 12.5  # GB/s out of a machine: one 100 Gb/s adapter for all its GPUs


@dataclass(frozen=True)
class Job:
    """A preset, and what is assumed of it on one H100."""

    title: str
    preset: str  # vimpac.config
    row: str  # train_step's preset
    videos_per_s: float  # on one GPU: the goal
    fits: int  # videos a forward pass that its 80 GB hold
    epochs: float

    @property
    def model(self) -> ModelConfig:
        return PRESETS[self.preset][1].model

    @property
    def contrastive(self) -> int:
        return PRESETS[self.preset][1].contrastive_videos


JOBS = {
    "small": Job("Small, 5×128", "small", "small 5x128", 1000.0, 128, 10.0),
    "large-half": Job("Large-Half, 5×128", "large-half", "large-half 5x128", 120.0, 32, 90.0),
    "large-half-256": Job("Large-Half, 5×256", "large-half-256", "large-half 5x256", 30.0, 8, 10.0),
}


@dataclass(frozen=True)
class Speed:
    """Of one GPU."""

    videos_per_s: float
    videos: int  # a forward pass; the optimizer's time is in that of so many
    source: str  # one sentence's end


# --- one GPU ----------------------------------------------------------------------------------------------------------


def speeds(results: Results, gpu: str, small: float | None = None, large_half: float | None = None) -> dict[str, Speed]:
    """Of each job: given, or measured, or the goal. At 5×256 there are four times the tokens, so a quarter of the speed."""
    found = {}
    for name, given in (("small", small), ("large-half", large_half)):
        job, row = JOBS[name], measured(results, gpu, JOBS[name].row)
        if given is not None:
            found[name] = Speed(given, job.fits, "**assumed**, given on the command line")
        elif row is not None:
            found[name] = Speed(row["videos_per_s"], row["videos"], f"measured on one {gpu}")
        else:
            found[name] = Speed(job.videos_per_s, job.fits, "**assumed**: this project's goal for one H100, not a measurement")
    whole, job = found["large-half"], JOBS["large-half-256"]
    ratio = math.prod(job.model.grid) / math.prod(JOBS["large-half"].model.grid)
    source = f"**assumed**: Large-Half at 5×128 with {ratio:g} times the tokens, not a measurement"
    return found | {"large-half-256": Speed(whole.videos_per_s / ratio, job.fits, source)}


def measured(results: Results, gpu: str, preset: str) -> dict | None:
    result = results.load(gpu, "train_step")
    rows = result["rows"] if result else []
    wanted = (preset, "ours compiled")
    return next((row for row in rows if (row.get("preset"), row["impl"]) == wanted and row.get("videos_per_s")), None)


@dataclass(frozen=True)
class Weights:
    """Numbers of elements of a pre-training model's parameters, heads included, in the model's order."""

    decayed: tuple[int, ...]
    undecayed: tuple[int, ...]
    in_order: tuple[int, ...]
    embedding: int  # its place in the order: its gradient is complete when backward ends

    @property
    def count(self) -> int:
        return sum(self.in_order)

    @property
    def buckets(self) -> tuple[list[int], list[int]]:
        """Bytes of the gradients' buckets in the order in which backward fills them (a bucket is sent when it has its size):
        those before the one that the embedding is in, and the rest."""
        sizes, opened, before = [], 0, 0
        for place, elements in reversed(list(enumerate(self.in_order))):
            if place == self.embedding:
                before = len(sizes)
            opened += FLOAT * elements
            if opened >= BUCKETS[bool(sizes)]:
                sizes.append(opened)
                opened = 0
        sizes += [opened] * (opened > 0)
        return sizes[:before], sizes[before:]

    def shares(self, ranks: int) -> list[int]:
        """Parameters that each rank updates in ZeRO-1, which never splits a tensor: each goes to the rank that has least so
        far, the largest first."""
        shares = [0] * ranks
        for group in (self.decayed, self.undecayed):
            for elements in sorted(group, reverse=True):
                least = shares.index(min(shares))
                shares[least] += elements
        return shares


@cache
def weights(model: ModelConfig) -> Weights:
    with torch.device("meta"):
        module = PretrainModel(model)
    norms = {id(p) for m in module.modules() if is_norm(m) for p in m.parameters(recurse=False)}
    decayed, undecayed = [], []
    for name, p in module.named_parameters():
        (undecayed if id(p) in norms or name.endswith(".bias") else decayed).append(p.numel())
    names, in_order = zip(*((name, p.numel()) for name, p in module.named_parameters()), strict=True)
    return Weights(tuple(decayed), tuple(undecayed), in_order, names.index("backbone.embedding.weight"))


# --- collectives: seconds ---------------------------------------------------------------------------------------------


def shape(ranks: int, hardware: Hardware) -> tuple[int, int]:
    """GPUs of a machine that take part, machines."""
    inside = min(ranks, hardware.machine_gpus)
    return inside, math.ceil(ranks / inside)


def latency(ranks: int, hardware: Hardware) -> float:
    """Of a tree: within machines, then between them."""
    inside, machines = shape(ranks, hardware)
    return 1e-6 * (hardware.nvlink_us * levels(inside) + hardware.network_us * levels(machines))


def levels(n: int) -> int:
    return (n - 1).bit_length()


def moved(size: float, ranks: int, hardware: Hardware) -> float:
    """One direction of a ring within the machine, and of one between machines, where each GPU has its part of `size` bytes."""
    inside, machines = shape(ranks, hardware)
    within = (inside - 1) / inside * size / hardware.nvlink_gb_per_s
    return 1e-9 * (within + (machines - 1) / machines * size / hardware.machine_gb_per_s)


def all_reduce(size: float, ranks: int, hardware: Hardware) -> float:
    """Reduce-scatter in the machine, all-reduce of a part by each GPU between machines, all-gather in the machine."""
    return 2 * moved(size, ranks, hardware) + latency(ranks, hardware) if ranks > 1 else 0.0


def all_gather(size: float, ranks: int, hardware: Hardware) -> float:
    """size: bytes of the result."""
    return moved(size, ranks, hardware) + latency(ranks, hardware) if ranks > 1 else 0.0


def broadcast(size: float, ranks: int, hardware: Hardware) -> float:
    """Out of its machine and through all machines at once, then within each."""
    if ranks == 1:
        return 0.0
    between = size / hardware.machine_gb_per_s if shape(ranks, hardware)[1] > 1 else 0.0
    return 1e-9 * (size / hardware.nvlink_gb_per_s + between) + latency(ranks, hardware)


def flat_ring(size: float, ranks: int, hardware: Hardware) -> float:
    """All-reduce along rings through all GPUs, as fast as the slowest link, with a latency each step."""
    machines = shape(ranks, hardware)[1]
    link = hardware.nvlink_gb_per_s if machines == 1 else min(hardware.nvlink_gb_per_s, hardware.machine_gb_per_s)
    step = hardware.nvlink_us if machines == 1 else hardware.network_us
    return 2 * (ranks - 1) * (size / ranks / link * 1e-9 + step * 1e-6)


@dataclass(frozen=True)
class Collective:
    """Small ones of a contrastive batch."""

    what: str
    kind: str  # all_reduce, all_gather
    count: int
    size: int  # bytes of the result, each
    group: str  # "all" ranks, or those that "contrast"

    def seconds(self, plan: BatchPlan, ranks: int, hardware: Hardware) -> float:
        function = {"all_reduce": all_reduce, "all_gather": all_gather}[self.kind]
        return self.count * function(self.size, ranks if self.group == "all" else plan.group_ranks, hardware)


def small_collectives(model: ModelConfig, contrastive: int, group_ranks: int = 2) -> list[Collective]:
    """What a contrastive batch sends in forward and backward (heads.py, info_nce.py, trainer.py)."""
    norms, rows = model.head_layers - 1, CLIPS * contrastive
    moments = 2 * DOUBLE * model.head_width
    features, sums = rows * FLOAT * (model.head_out + 1), FLOAT * (rows + group_ranks)
    return [
        Collective("batch norm: both moments, forward", "all_reduce", norms, moments, "all"),
        Collective("batch norm: their gradients, backward", "all_reduce", norms, moments, "all"),
        Collective("InfoNCE: features (float32) and lengths, forward", "all_gather", 1, features, "contrast"),
        Collective("InfoNCE: logsumexps and upstream gradients, backward", "all_gather", 1, sums, "contrast"),
        Collective("number of masked tokens", "all_reduce", 1, FLOAT, "all"),
    ]


def flag(ranks: int, hardware: Hardware) -> float:
    """An update's share of the all-reduce of one number on the CPU that comes with each look at the metrics
    (distributed.any_rank): gloo's is a ring, so it takes a hop for each process, twice."""
    return 2e-6 * (ranks - 1) * hardware.tcp_hop_us / FLAG_EVERY


# --- a step -----------------------------------------------------------------------------------------------------------


def best_plan(contrastive: int, ranks: int, fits: int) -> BatchPlan:
    """Of all plans that fit into memory the one with the fewest micro-steps, and so one pass where any has."""
    plans = []
    for micro_batch in range(1, min(fits, contrastive, BATCH // ranks) + 1):
        try:
            plans.append(plan_batches(BATCH, contrastive, micro_batch, ranks))
        except InputError:
            continue
    return min(plans, key=lambda plan: plan.micro_steps)


def default_plan(contrastive: int, ranks: int) -> BatchPlan | None:
    """Without --micro-batch; None where the trainer refuses it."""
    try:
        return plan_batches(BATCH, contrastive, None, ranks)
    except InputError:
        return None


@dataclass(frozen=True)
class Step:
    """Seconds of an update."""

    ranks: int
    plan: BatchPlan
    ideal: float
    compute: float
    second_pass: float
    small: float
    gradients: float  # their all-reduce
    exposed: float  # the part of it that backward does not hide
    optimizer: float
    launches: float  # the host's
    flag: float  # the host's

    @property
    def device(self) -> float:
        return self.compute + self.second_pass + self.small + self.exposed + self.optimizer

    @property
    def host(self) -> float:
        return self.launches + self.flag

    @property
    def seconds(self) -> float:
        return max(self.device, self.host)

    @property
    def efficiency(self) -> float:
        return self.ideal / self.seconds

    @property
    def norm_videos(self) -> int:
        """Videos that batch norm's statistics span."""
        return self.plan.micro_batch * self.plan.parts * self.ranks

    @property
    def largest_loss(self) -> str:
        if self.host > self.device:
            return "the flag" if self.flag > self.launches else "launches"
        losses = {
            "the second pass": self.second_pass,
            "small collectives": self.small,
            "the gradients' all-reduce": self.exposed,
            "the optimizer": self.optimizer,
        }
        return max(losses, key=losses.get)


def optimizer_seconds(parameters: int, hardware: Hardware) -> float:
    return 1e-12 * parameters * (ADAMW_BYTES + CLIP_BYTES + CAST_BYTES) / hardware.memory_tb_per_s


def kernels(model: ModelConfig, hardware: Hardware) -> int:
    return hardware.layer_kernels * model.layers + hardware.other_kernels + len(weights(model).in_order)


def step(job: Job, speed: Speed, ranks: int, hardware: Hardware, plan: BatchPlan | None = None) -> Step:
    """plan: None = the best."""
    plan = plan or best_plan(job.contrastive, ranks, speed.videos)
    counted, passes = weights(job.model), SECOND_PASS if plan.parts > 1 else 1.0
    optimizer = optimizer_seconds(counted.count, hardware)
    a_video = 1 / speed.videos_per_s - optimizer / speed.videos  # the measured step ends with the optimizer
    compute = BATCH / ranks * a_video
    batches = plan.micro_steps // plan.parts
    sent = small_collectives(job.model, job.contrastive, plan.group_ranks)
    gradients, exposed = reduce_gradients(counted, ranks, BACKWARD * plan.micro_batch * a_video, hardware)
    return Step(
        ranks,
        plan,
        ideal=BATCH / ranks / speed.videos_per_s,
        compute=compute,
        second_pass=(passes - 1) * compute,
        small=batches * sum(each.seconds(plan, ranks, hardware) for each in sent),
        gradients=gradients,
        exposed=exposed,
        optimizer=optimizer,
        launches=1e-6 * plan.micro_steps * passes * kernels(job.model, hardware) * hardware.launch_us,
        flag=flag(ranks, hardware),
    )


def reduce_gradients(counted: Weights, ranks: int, backward: float, hardware: Hardware) -> tuple[float, float]:
    """All of it, and what backward, of so many seconds, does not hide: at least the buckets that are full when it ends."""
    first, last = (sum(all_reduce(size, ranks, hardware) for size in sizes) for sizes in counted.buckets)
    return first + last, last + max(0.0, first - backward)


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    speeds: dict[str, Speed]
    hardware: Hardware = dataclasses.field(default_factory=Hardware)

    @property
    def slow(self) -> Hardware:
        return dataclasses.replace(self.hardware, machine_gb_per_s=SLOW)

    @property
    def no_flag(self) -> Hardware:
        return dataclasses.replace(self.hardware, tcp_hop_us=0.0)

    def step(self, name: str, ranks: int, hardware: Hardware | None = None, plan: BatchPlan | None = None) -> Step:
        return step(JOBS[name], self.speeds[name], ranks, hardware or self.hardware, plan)

    def said(self, *names: str) -> list[str]:
        """Where the numbers of a table come from."""
        each = [
            f"{JOBS[name].title}, {number(self.speeds[name].videos_per_s)} videos/s on one GPU: {self.speeds[name].source}."
            for name in names
        ]
        return ["", *each, "Everything about links, latencies and launches is assumed, too: computed, not measured."]


def ms(seconds: float) -> str:
    return "0" if seconds == 0 else number(1e3 * seconds)


def percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def assumptions(inputs: Inputs) -> list[str]:
    units = {"gb_per_s": "GB/s", "tb_per_s": "TB/s", "_us": "µs", "kernels": "", "gpus": ""}
    titles = {
        "machine_gpus": "GPUs of a machine",
        "nvlink_gb_per_s": "NVLink 4, a GPU, each direction",
        "machine_gb_per_s": f"network out of a machine: an adapter of 400 Gb/s a GPU (the poor man's cluster: {SLOW:g} GB/s)",
        "nvlink_us": "latency of a collective within a machine, × log₂ of its GPUs",
        "network_us": "latency between machines, × log₂ of the machines",
        "tcp_hop_us": "a message from process to process through gloo",
        "memory_tb_per_s": "memory of an H100, read plus written",
        "launch_us": "the host, a kernel",
        "layer_kernels": "kernels a layer, forward and backward",
        "other_kernels": "other kernels a micro-step; one more for each parameter tensor",
    }
    rows = []
    for field in dataclasses.fields(Hardware):
        unit = next(word for end, word in units.items() if field.name.endswith(end))
        option = f"`--{field.name.replace('_', '-')}`"
        rows.append([titles[field.name], f"{getattr(inputs.hardware, field.name):g} {unit}".strip(), option])
    return table(["assumed, none of it measured", "value", "option"], rows)


def models(inputs: Inputs) -> list[str]:
    rows = []
    for name, job in JOBS.items():
        counted, speed = weights(job.model), inputs.speeds[name]
        first, last = counted.buckets
        size, count = number(FLOAT * counted.count / 1e6), len(first + last)
        rows.append(
            [
                job.title,
                f"{number(speed.videos_per_s)}, {speed.source}",
                f"{counted.count:,} in {len(counted.in_order)} tensors",
                f"{size} MB in {count} buckets, of which {sum(last) / 1e6:.1f} MB are complete only when backward ends",
                f"{number(MOMENTS * counted.count / 1e6)} MB",
                f"{kernels(job.model, inputs.hardware):,}",
                f"{ms(optimizer_seconds(counted.count, inputs.hardware))} ms",
            ]
        )
    head = ["", "videos/s on one GPU", "parameters, heads included", "float32 gradients"]
    head += ["AdamW's moments", "kernels a micro-step (assumed)", "clipping, AdamW, casts (computed, not measured)"]
    return table(head, rows)


def collectives(inputs: Inputs) -> list[str]:
    rows = []
    plan = best_plan(128, 64, 16)
    for each in small_collectives(JOBS["small"].model, 128, plan.group_ranks):
        count = f"{each.count} × {each.kind.replace('_', '-')}"
        ranks = {"all": "all", "contrast": f"those that contrast, here {plan.group_ranks}"}[each.group]
        rows.append([each.what, count, f"{each.size:,}", ranks, ms(each.seconds(plan, 64, inputs.hardware))])
    return [
        *table(["a contrastive batch of Small, n = 128, 64 GPUs", "what", "bytes each", "ranks", "ms (computed)"], rows),
        "",
        "Latencies and link speeds are assumed: computed, not measured.",
    ]


def reductions(inputs: Inputs) -> list[str]:
    rows = []
    for ranks in (2, 8, 16, 64, 256, 1024):
        cells = [f"{ranks:,}"]
        for name in ("small", "large-half"):
            counted = weights(JOBS[name].model)
            for hardware in (inputs.hardware, inputs.slow):
                sizes = [*counted.buckets[0], *counted.buckets[1]]
                tree, ring = (sum(f(size, ranks, hardware) for size in sizes) for f in (all_reduce, flat_ring))
                cells.append(f"{ms(tree)} ({ms(ring)})")
        rows.append(cells)
    head = [f"{title}, {net}" for title in ("Small", "Large-Half") for net in ("400 Gb/s a GPU", "100 Gb/s a machine")]
    return [
        *table(["GPUs", *head], rows),
        "",
        "ms of all buckets' all-reduce, by levels (along a flat ring). Computed from assumed links, not measured.",
    ]


def steps(inputs: Inputs, name: str) -> list[str]:
    rows = []
    for ranks in GPUS:
        s, slow, free = (inputs.step(name, ranks, hardware) for hardware in (None, inputs.slow, inputs.no_flag))
        two = f" ({s.plan.parts} parts, two passes)" if s.plan.parts > 1 else ""
        rows.append(
            [
                f"{ranks:,}",
                f"{s.plan.micro_batch} × {s.plan.micro_steps}{two}",
                ms(s.compute + s.second_pass),
                ms(s.small),
                f"{ms(s.gradients)} ({ms(s.exposed)})",
                ms(s.optimizer),
                f"{ms(s.launches)} + {ms(s.flag)}",
                ms(s.seconds),
                number(BATCH / s.seconds),
                percent(s.efficiency),
                percent(free.efficiency),
                percent(slow.efficiency),
            ]
        )
    head = ["GPUs", "micro-batch × micro-steps", "compute", "small collectives", "gradients (not hidden)", "optimizer"]
    head += ["host: launches + flag", "step", "videos/s", "efficiency", "without the flag", "100 Gb/s a machine"]
    return [*table(head, rows), *inputs.said(name), "Times are ms an update of 1024 videos."]


def limits(inputs: Inputs) -> list[str]:
    rows = []
    for name, job in JOBS.items():
        for title, hardware in (
            ("400 Gb/s a GPU", inputs.hardware),
            ("the same without the flag", inputs.no_flag),
            ("100 Gb/s a machine", inputs.slow),
        ):
            cells = [job.title, title]
            for share in (0.8, 0.5):
                last, below = limit(inputs, name, hardware, share)
                most = f"{last:,}" if last else "none"
                cells.append(most if below is None else f"{most}; at {below.ranks:,}: {below.largest_loss}")
            fastest = min((inputs.step(name, ranks, hardware) for ranks in GPUS), key=lambda s: s.seconds).ranks
            rows.append([*cells, f"{fastest:,}"])
    head = ["", "network", "most GPUs at ≥ 80 %; what costs most at the next number", "the same at ≥ 50 %", "shortest step at"]
    return [*table(head, rows), *inputs.said(*JOBS)]


def limit(inputs: Inputs, name: str, hardware: Hardware, share: float) -> tuple[int | None, Step | None]:
    """The largest number of GPUs of at least this efficiency, and the step on the next larger number."""
    made = {ranks: inputs.step(name, ranks, hardware) for ranks in GPUS}
    last = max((ranks for ranks, s in made.items() if s.efficiency >= share), default=None)
    return last, made.get(2 * last if last else GPUS[0])


def plans(inputs: Inputs) -> list[str]:
    rows = []
    for ranks in GPUS:
        cells = [f"{ranks:,}"]
        for name in JOBS:
            best = inputs.step(name, ranks)
            default = default_plan(JOBS[name].contrastive, ranks)
            cells.append(f"`--micro-batch {best.plan.micro_batch}`: {planned(best)}")
            if default is None:
                cells.append("refused")
            elif default == best.plan:
                cells.append("the same")
            elif default.micro_batch > inputs.speeds[name].videos:
                cells.append(f"{default.micro_batch} videos: do not fit")
            else:
                cells.append(f"{default.micro_steps} steps, {percent(inputs.step(name, ranks, plan=default).efficiency)}")
        rows.append(cells)
    head = [cell for job in JOBS.values() for cell in (f"{job.title}, n = {job.contrastive}", "without `--micro-batch`")]
    held = ", ".join(f"{inputs.speeds[name].videos} ({job.title})" for name, job in JOBS.items())
    return [
        *table(["GPUs", *head], rows),
        *inputs.said(*JOBS),
        f"That a GPU holds so many videos a forward pass is assumed unless the speed is measured: {held}.",
    ]


def planned(s: Step) -> str:
    count = f"{s.plan.micro_steps} step{'s' * (s.plan.micro_steps > 1)}"
    if s.plan.parts > 1:
        return f"{count}, two passes, norm over {s.norm_videos}"
    ranks = f"{s.plan.group_ranks} rank{'s' * (s.plan.group_ranks > 1)} contrast"
    return f"{count}, {ranks}, norm over {s.norm_videos:,}"


def shards(inputs: Inputs) -> list[str]:
    rows = []
    for ranks in (2, 8, 64, 256, 1024):
        cells = [f"{ranks:,}"]
        for name in ("small", "large-half"):
            counted = weights(JOBS[name].model)
            shares = counted.shares(ranks)
            share = max(shares)
            sent = sum(broadcast(FLOAT * elements, ranks, inputs.hardware) for elements in shares if elements)
            saved = 1e-12 * ADAMW_BYTES * (counted.count - share) / inputs.hardware.memory_tb_per_s
            even = MOMENTS * counted.count / ranks / 1e6
            cells += [f"{number(MOMENTS * share / 1e6)} ({number(even)})", f"{ms(sent)} − {ms(saved)}"]
        rows.append(cells)
    head = ["moments of the fullest rank, MB (if even)", "ms an update: broadcasts − AdamW"]
    whole = (f"{title} ({number(MOMENTS * weights(JOBS[n].model).count / 1e6)} MB)" for n, title in TITLES)
    return [
        *table(["GPUs", *(f"{title}: {cell}" for title in whole for cell in head)], rows),
        "",
        "Bytes are counted, times computed from assumed links and latencies, not measured.",
    ]


TITLES = (("small", "Small"), ("large-half", "Large-Half"))


def overlap(inputs: Inputs) -> list[str]:
    rows = []
    for name in JOBS:
        for ranks in (8, 64, 256):
            s, job = inputs.step(name, ranks), JOBS[name]
            batches = s.plan.micro_steps // s.plan.parts
            sent = small_collectives(job.model, job.contrastive, s.plan.group_ranks)
            gathered = batches * sum(each.seconds(s.plan, ranks, inputs.hardware) for each in sent if each.group == "contrast")
            rows.append(
                [
                    job.title,
                    f"{ranks}",
                    *(f"{ms(x)} ({100 * x / s.seconds:.1f} %)" for x in (gathered, s.small)),
                    ms(s.seconds),
                ]
            )
    head = ["", "GPUs", "InfoNCE's gathers, ms an update (of the step)", "all small collectives", "step"]
    return [*table(head, rows), *inputs.said(*JOBS)]


# --- HowTo100M --------------------------------------------------------------------------------------------------------

VIDEOS = 1_238_791  # Table 5
MINUTES, FPS = 6.5, 2.0  # of an average video (Table 5), the paper's rate
PAPER_HOURS, PAPER_ANALYSIS_HOURS = 8900.0, 160.0  # V100 hours, appendix E
PAPER_SPEED, PAPER_SMALL_SPEED, PAPER_SMALL_256_SPEED = 5.0, 32.0, 8.4  # videos/s on a V100, Tables 6 and 14


def updates(epochs: float) -> int:
    return round(epochs * VIDEOS / BATCH)


def run_hours(inputs: Inputs, name: str, ranks: int) -> float:
    return updates(JOBS[name].epochs) * inputs.step(name, ranks).seconds / 3600


def cost(inputs: Inputs) -> list[str]:
    rows = []
    for ranks in GPUS:
        small, first, second = (run_hours(inputs, name, ranks) for name in JOBS)
        rows.append(
            [
                f"{ranks:,}",
                *(number(x) for x in (small, small * ranks, first, second, first + second, (first + second) * ranks)),
                f"{PAPER_HOURS / ((first + second) * ranks):.0f}×",
            ]
        )
    return [
        *table(
            [
                "GPUs",
                "Small, 10 epochs: hours",
                "GPU hours",
                "Large-Half, 90 epochs at 5×128: hours",
                "10 at 5×256: hours",
                "both: hours",
                "GPU hours",
                "the paper's 8,900 V100 hours are",
            ],
            rows,
        ),
        *inputs.said(*JOBS),
    ]


def paper(_: Inputs) -> list[str]:
    def v100_hours(epochs: float, videos_per_s: float) -> float:
        return epochs * VIDEOS / videos_per_s / 3600

    by_tokens = PAPER_SPEED / 4
    by_table = PAPER_SPEED * PAPER_SMALL_256_SPEED / PAPER_SMALL_SPEED
    first = v100_hours(90, PAPER_SPEED)
    sums = [first + v100_hours(10, speed) for speed in (by_tokens, by_table)]
    small = v100_hours(10, PAPER_SMALL_SPEED)
    rows = [
        ["Large-Half, 90 epochs at 5×128", f"{PAPER_SPEED} (Table 6)", number(first), ""],
        ["10 epochs at 5×256, a quarter of that speed", f"{by_tokens:.2f}", number(v100_hours(10, by_tokens)), ""],
        ["the same, slower as Small is (Table 14)", f"{by_table:.2f}", number(v100_hours(10, by_table)), ""],
        ["sum", "", " or ".join(number(x) for x in sums), compared(sums, PAPER_HOURS)],
        ["Small, 10 epochs at 5×128", f"{PAPER_SMALL_SPEED} (Table 6)", number(small), compared([small], PAPER_ANALYSIS_HOURS)],
    ]
    return table(["from the paper's figures", "videos/s on a V100", "hours", "the paper says"], rows)


def compared(hours: list[float], said: float) -> str:
    off = [x / said - 1 for x in hours]
    word = "agrees" if max(map(abs, off)) <= 0.05 else "does not agree"
    return f"{number(said)}: {word} ({', '.join(f'{x:+.1%}' for x in off)})".replace("%", " %").replace("-", "−")


def store(inputs: Inputs) -> list[str]:
    rows = []
    for name, job in JOBS.items():
        T, H, W = job.model.grid
        frames, token = MINUTES * 60 * FPS, 2
        a_video, a_pair = frames * H * W * token, CLIPS * T * H * W * token
        speed = inputs.speeds[name].videos_per_s
        rows.append(
            [
                job.title,
                f"{number(a_video / 1e6)} MB",
                f"{number(VIDEOS * a_video / 1e9)} GB",
                f"{a_pair / 1e3:.1f} kB",
                f"{number(speed * a_pair / 1e6)} MB/s, {number(CLIPS * speed)} reads/s",
                f"{number(inputs.hardware.machine_gpus * speed * a_pair / 1e6)} MB/s",
            ]
        )
    head = ["", "a video of 6.5 min at 2 frames/s", f"{VIDEOS:,} of them", "read a pair of clips", "a GPU", "a machine of 8"]
    return [*table(head, rows), *inputs.said(*JOBS)]


TABLES: dict[str, Callable[[Inputs], list[str]]] = {
    "assumptions": assumptions,
    "models": models,
    "collectives": collectives,
    "reductions": reductions,
    **{name: (lambda inputs, name=name: steps(inputs, name)) for name in JOBS},
    "limits": limits,
    "plans": plans,
    "shards": shards,
    "overlap": overlap,
    "cost": cost,
    "paper": paper,
    "store": store,
}


# --- the document -----------------------------------------------------------------------------------------------------


def render(text: str, inputs: Inputs) -> str:
    """The text with its tables as computed."""
    return fill(text, START, {name: partial(make, inputs) for name, make in TABLES.items()}, DOCUMENT.name)[0]


def json_rows(inputs: Inputs) -> list[dict]:
    rows = []
    for name in JOBS:
        for network, hardware in (("400 Gb/s a GPU", inputs.hardware), ("100 Gb/s a machine", inputs.slow)):
            for ranks in GPUS:
                s = inputs.step(name, ranks, hardware)
                times = {key: getattr(s, key) for key in ("compute", "second_pass", "small", "gradients", "exposed")}
                times |= {key: getattr(s, key) for key in ("optimizer", "launches", "flag", "seconds", "efficiency")}
                rows.append({"preset": name, "network": network, "gpus": ranks, **dataclasses.asdict(s.plan), **times})
    return rows


def main(argv: Sequence[str] | None = None, document: Path = DOCUMENT, results: Path | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite the tables of docs/scaling.md")
    parser.add_argument("--gpu", default=H100, help="folder of benchmarks/results whose measured speeds to take")
    parser.add_argument("--small", type=float, help="assume so many videos/s on one GPU for Small at 5×128")
    parser.add_argument("--large-half", type=float, help="the same for Large-Half at 5×128")
    for field in dataclasses.fields(Hardware):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    options = parser.parse_args(argv)
    given = {key: value for key, value in vars(options).items() if key != "write" and value != parser.get_default(key)}
    if options.write and given:
        parser.error(f"--write takes the default assumptions, got {given}")
    hardware = Hardware(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Hardware)})
    found = speeds(Results(results or ROOT / "benchmarks" / "results"), options.gpu, options.small, options.large_half)
    inputs = Inputs(found, hardware)
    if options.write:
        document.write_text(render(document.read_text(), inputs))
    else:
        print("\n\n".join("\n".join([f"## {name}", "", *make(inputs)]) for name, make in TABLES.items()) + "\n")
    said = {name: dataclasses.asdict(speed) for name, speed in found.items()}
    result = {"benchmark": "scaling", "computed": True, "speeds": said, "hardware": dataclasses.asdict(hardware)}
    print(json.dumps(result | {"rows": json_rows(inputs)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
