"""How pre-training should scale from 1 to 1024 GPUs: the tables of docs/scaling.md, computed from

the speed of one GPU     measured (benchmarks/results/GPU/train_step.json) or else this project's goals
bytes and collectives    counted: DistributedDataParallel's buckets, batch norm, InfoNCE
the hardware             assumed: `Hardware`, each field an option

GPU  = micro-steps × (videos × seconds a video + small collectives) + all-reduce that backward does not hide + optimizer
host = micro-steps × kernels × seconds a launch + the stop flag
update = max(GPU, host)        efficiency = time of the same videos at the speed of one GPU / update

python tools/scaling.py [--small 800] [--launch-us 10] [--write]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from checkout import ROOT
from documents import fill, number, table
from render import H100, Results
from vimpac.config import PRESETS, ModelConfig, PretrainConfig
from vimpac.errors import InputError
from vimpac.model import PretrainModel
from vimpac.training.plan import BatchPlan, plan_batches

DOCUMENT = ROOT / "docs" / "scaling.md"
GPUS, BATCH = tuple(2**k for k in range(11)), 1024  # videos an update
BUCKETS = (1 << 20, 25 << 20)  # DistributedDataParallel's sizes: the first bucket, all others
OPTIMIZER_BYTES = 12 + 28 + 6  # a parameter: clipping (two reads, one write), AdamW, a bfloat16 copy
BACKWARD = 2 / 3  # of the time of a forward and backward pass
SLOW = 12.5  # GB/s out of a machine: one 100 Gb/s adapter for all its GPUs
ENOUGH = 0.8  # of the efficiency: below, the table says what costs most
SECOND_PASS = 4 / 3  # with gradient caching a video goes forward twice: 1 + 1 + 2 instead of 1 + 2


def assumed(value: float, what: str) -> Any:
    return field(default=value, metadata={"what": what})


@dataclass(frozen=True)
class Hardware:
    """Assumed, not measured. Link speeds are nominal peaks."""

    machine_gpus: int = assumed(8, "GPUs in a machine")
    nvlink_gb_per_s: float = assumed(450.0, "GB/s of a GPU's NVLink, each direction")
    machine_gb_per_s: float = assumed(400.0, "GB/s of a machine's network: one 400 Gb/s adapter for each GPU")
    nvlink_us: float = assumed(10.0, "µs latency of a collective in a machine, × log₂ of its GPUs")
    network_us: float = assumed(30.0, "µs latency of a collective between machines, × log₂ of the machines")
    tcp_hop_us: float = assumed(50.0, "µs of a message between two processes through gloo (the stop flag)")
    memory_tb_per_s: float = assumed(3.0, "TB/s of GPU memory, read plus written")
    launch_us: float = assumed(6.0, "µs of the host to launch a kernel")
    layer_kernels: int = assumed(50, "kernels a layer, forward and backward; 18 are matrix products, the rest is a guess")
    other_kernels: int = assumed(150, "other kernels a micro-step, plus one for each parameter tensor; a guess")


@dataclass(frozen=True)
class Job:
    """A preset of vimpac.config, and what is assumed of it on one H100."""

    preset: str
    title: str
    row: str  # its name in train_step.json
    videos_per_s: float  # on one GPU: the goal
    fits: int  # videos that fit into a forward pass in 80 GB
    source: str = "this project's goal for one H100"

    @property
    def config(self) -> PretrainConfig:
        return PRESETS[self.preset][1]


SMALL = Job("small", "Small, 5×128", "small 5x128", 1000.0, 128)
LARGE_HALF = Job("large-half", "Large-Half, 5×128", "large-half 5x128", 120.0, 32)
LARGE_HALF_256 = Job("large-half-256", "Large-Half, 5×256", "large-half 5x256", 30.0, 8)


def jobs(results: Results, gpu: str, small: float | None = None, large_half: float | None = None) -> list[Job]:
    """All three, with the speed that is given, or else measured on a GPU. At 5×256 it is a quarter: four times the tokens."""
    result, found = results.load(gpu, "train_step"), []
    for job, given in ((SMALL, small), (LARGE_HALF, large_half)):
        for row in result["rows"] if result else []:
            if (row.get("preset"), row["impl"]) == (job.row, "ours compiled") and row.get("videos_per_s"):
                job = replace(job, videos_per_s=row["videos_per_s"], fits=row["videos"], source=f"measured on one {gpu}")
        found.append(job if given is None else replace(job, videos_per_s=given, source="given on the command line"))
    quarter = replace(LARGE_HALF_256, videos_per_s=found[1].videos_per_s / 4, source="a quarter of the speed at 5×128")
    return [*found, quarter]


@cache
def weights(model: ModelConfig) -> tuple[tuple[int, ...], int]:
    """Elements of each parameter in the model's order, heads included; the embedding's place among them."""
    with torch.device("meta"):
        named = {name: p.numel() for name, p in PretrainModel(model).named_parameters()}
    return tuple(named.values()), list(named).index("backbone.embedding.weight")


def buckets(elements: Sequence[int], embedding: int) -> tuple[list[int], list[int]]:
    """Bytes of the gradients' buckets in the order in which backward fills them, each sent when it has its size: those before
    the one with the embedding, whose gradient is complete when backward ends, and the rest."""
    sizes, opened, before = [], 0, 0
    for place, count in reversed(list(enumerate(elements))):
        if place == embedding:
            before = len(sizes)
        opened += 4 * count
        if opened >= BUCKETS[bool(sizes)]:
            sizes.append(opened)
            opened = 0
    sizes += [opened] * (opened > 0)
    return sizes[:before], sizes[before:]


def seconds(kind: str, size: float, ranks: int, hardware: Hardware) -> float:
    """Of an all_gather whose result has `size` bytes, or of an all_reduce, which moves them twice: rings in the machines and
    between them, where each GPU has its part, and the latency of a tree."""
    inside = min(ranks, hardware.machine_gpus)
    machines = math.ceil(ranks / inside)
    within = (inside - 1) / inside * size / hardware.nvlink_gb_per_s
    between = (machines - 1) / machines * size / hardware.machine_gb_per_s
    levels = hardware.nvlink_us * (inside - 1).bit_length() + hardware.network_us * (machines - 1).bit_length()
    return 1e-9 * (within + between) * (1 + (kind == "all_reduce")) + 1e-6 * levels


def small_collectives(model: ModelConfig, contrastive: int, group_ranks: int) -> list[tuple[str, int, str]]:
    """What a contrastive batch sends in forward and backward beside gradients: kind, bytes, "all" ranks or a "group"."""
    moments, rows = 2 * 8 * model.head_width, 2 * contrastive
    return [
        *[("all_reduce", moments, "all")] * (2 * model.head_layers - 2),  # batch norm: moments, and their gradients
        ("all_gather", rows * 4 * (model.head_out + 1), "group"),  # InfoNCE: features and their lengths
        ("all_gather", 4 * (rows + group_ranks), "group"),  # InfoNCE: logsumexps and upstream gradients
        ("all_reduce", 4, "all"),  # the number of masked tokens
    ]


def best_plan(contrastive: int, ranks: int, fits: int) -> BatchPlan:
    """Of all plans that fit into memory the one with the fewest micro-steps, and so without gradient caching where possible."""
    plans = []
    for micro_batch in range(1, min(fits, contrastive, BATCH // ranks) + 1):
        with suppress(InputError):  # what would not make up the contrastive batch
            plans.append(plan_batches(BATCH, contrastive, micro_batch, ranks))
    return min(plans, key=lambda plan: plan.micro_steps)


@dataclass(frozen=True)
class Step:
    """Seconds of an update."""

    plan: BatchPlan
    ideal: float
    compute: float
    losses: dict[str, float]  # on the GPU, beside compute
    host: dict[str, float]

    @property
    def seconds(self) -> float:
        return max(self.compute + sum(self.losses.values()), sum(self.host.values()))

    @property
    def efficiency(self) -> float:
        return self.ideal / self.seconds

    @property
    def largest_loss(self) -> str:
        costs = self.losses if self.seconds > sum(self.host.values()) else self.host
        return max(costs, key=costs.__getitem__)


def step(job: Job, ranks: int, hardware: Hardware) -> Step:
    plan, parameters = best_plan(job.config.contrastive_videos, ranks, job.fits), weights(job.config.model)
    passes = SECOND_PASS if plan.parts > 1 else 1.0
    optimizer = 1e-12 * sum(parameters[0]) * OPTIMIZER_BYTES / hardware.memory_tb_per_s
    a_video = 1 / job.videos_per_s - optimizer / job.fits  # the measured step ends with the optimizer
    compute = BATCH / ranks * a_video
    small = sum(
        seconds(kind, size, ranks if who == "all" else plan.group_ranks, hardware)
        for kind, size, who in small_collectives(job.config.model, job.config.contrastive_videos, plan.group_ranks)
    )
    losses = {
        "gradient caching": (passes - 1) * compute,
        "small collectives": plan.micro_steps // plan.parts * small,
        "the gradients' all-reduce": exposed(parameters, ranks, BACKWARD * plan.micro_batch * a_video, hardware),
        "the optimizer": optimizer,
    }
    kernels = hardware.layer_kernels * job.config.model.layers + hardware.other_kernels + len(parameters[0])
    host = {
        "launches": 1e-6 * plan.micro_steps * passes * kernels * hardware.launch_us,
        "the stop flag": 2e-6 * (ranks - 1) * hardware.tcp_hop_us / PretrainConfig().log_every,  # a ring of messages
    }
    return Step(plan, BATCH / ranks / job.videos_per_s, compute, losses, host)


def exposed(parameters: tuple[Sequence[int], int], ranks: int, backward: float, hardware: Hardware) -> float:
    """Seconds of the gradients' all-reduce that backward, which takes `backward` seconds, does not hide."""
    first, last = (sum(seconds("all_reduce", size, ranks, hardware) for size in sizes) for sizes in buckets(*parameters))
    return last + max(0.0, first - backward)


def assumptions(_: list[Job], hardware: Hardware) -> list[str]:
    rows = [[f"{getattr(hardware, x.name):g}", x.metadata["what"], f"`--{x.name.replace('_', '-')}`"] for x in fields(Hardware)]
    return table(["value", "assumed, none of it measured", "option"], rows)


def steps(found: list[Job], hardware: Hardware) -> list[str]:
    def cell(job: Job, ranks: int) -> str:
        fast, slow = (step(job, ranks, network) for network in (hardware, replace(hardware, machine_gb_per_s=SLOW)))
        why = f": {fast.largest_loss}" if fast.efficiency < ENOUGH else ""
        speed = number(BATCH / fast.seconds)
        return f"`{fast.plan.micro_batch}`, {speed}/s, {fast.efficiency:.0%} ({slow.efficiency:.0%}){why}"

    head = [f"{job.title}, {number(job.videos_per_s)} videos/s on one GPU ({job.source})" for job in found]
    return table(["GPUs", *head], [[f"{ranks:,}", *(cell(job, ranks) for job in found)] for ranks in GPUS])


TABLES = {"assumptions": assumptions, "steps": steps}


def main(argv: Sequence[str] | None = None, document: Path = DOCUMENT, results: Path = ROOT / "benchmarks" / "results") -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite the tables of docs/scaling.md")
    parser.add_argument("--gpu", default=H100, help="folder of benchmarks/results whose measured speeds to take")
    parser.add_argument("--small", type=float, help="videos/s on one GPU, Small at 5×128")
    parser.add_argument("--large-half", type=float, help="videos/s on one GPU, Large-Half at 5×128")
    for x in fields(Hardware):
        parser.add_argument(f"--{x.name.replace('_', '-')}", type=type(x.default), default=x.default, help=x.metadata["what"])
    options = parser.parse_args(argv)
    given = {key: value for key, value in vars(options).items() if key != "write" and value != parser.get_default(key)}
    if options.write and given:
        parser.error(f"--write takes the default assumptions, got {given}")
    hardware = Hardware(**{x.name: getattr(options, x.name) for x in fields(Hardware)})
    found = jobs(Results(results), options.gpu, options.small, options.large_half)
    tables = {name: partial(make, found, hardware) for name, make in TABLES.items()}
    if options.write:
        document.write_text(fill(document.read_text(), "scaling", tables, document.name)[0])
    else:
        print("\n\n".join("\n".join(make()) for make in tables.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
