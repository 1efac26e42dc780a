"""docs/scaling.md says what tools/scaling.py computes, and that computes what is written beside its formulas."""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import render
import scaling
from scaling import GPUS, LARGE_HALF, LARGE_HALF_256, SMALL, Hardware
from vimpac.config import ModelConfig
from vimpac.distributed import World
from vimpac.model import PretrainModel
from vimpac.ops import info_nce
from vimpac.training.plan import BatchPlan
from vimpac.training.pretrain_task import PretrainTask

HARDWARE = Hardware()
SLOW = replace(HARDWARE, machine_gb_per_s=scaling.SLOW)
JOBS = (SMALL, LARGE_HALF, LARGE_HALF_256)
GB = 1e9
each_job = pytest.mark.parametrize("job", JOBS, ids=lambda job: job.preset)


# --- the document -----------------------------------------------------------------------------------------------------


def test_the_document_says_what_is_computed(tmp_path):
    document = tmp_path / "scaling.md"
    document.write_text(text := scaling.DOCUMENT.read_text())
    assert scaling.main(["--write"], document) == 0
    assert document.read_text() == text, "python tools/scaling.py --write"
    assert (
        sorted(re.findall(r"<!-- scaling: (\S+) -->", text)) == sorted(scaling.TABLES)
        and "every time in this section is computed" in text
    )


def test_write(tmp_path, capsys):
    document, results = tmp_path / "scaling.md", tmp_path / "results"
    document.write_text("before\n<!-- scaling: assumptions -->\nstale\n<!-- end -->\nbetween\n<!-- end -->\nafter\n")
    assert scaling.main(["--write"], document, results) == 0
    text, table = document.read_text(), "\n".join(scaling.assumptions([], HARDWARE))
    assert text == f"before\n<!-- scaling: assumptions -->\n{table}\n<!-- end -->\nbetween\n<!-- end -->\nafter\n"
    assert scaling.main(["--write"], document, results) == 0 and document.read_text() == text
    with pytest.raises(SystemExit):
        scaling.main(["--write", "--small", "7"], document, results)
    assert "--write takes the default assumptions, got {'small': 7.0}" in capsys.readouterr().err
    assert document.read_text() == text


def test_options(tmp_path, capsys):
    assert scaling.main(["--large-half", "60", "--tcp-hop-us", "0"], results=tmp_path) == 0
    printed = capsys.readouterr().out
    assert "Large-Half, 5×128, 60.0 videos/s on one GPU (given on the command line)" in printed
    assert "| 0 | µs of a message" in printed and "the stop flag\n" not in printed.replace("(the stop flag)", "")


@pytest.mark.parametrize("script", ["scaling", "predicted"])
def test_runs_as_a_script(script, tmp_path):
    """From a bare checkout, whatever the current folder and without PYTHONPATH."""
    path = scaling.ROOT / "tools" / f"{script}.py"
    ended = subprocess.run([sys.executable, str(path), "--help"], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert ended.returncode == 0 and "usage" in ended.stdout, ended.stderr


# --- the speed of one GPU ---------------------------------------------------------------------------------------------


def test_a_measured_speed_is_taken(tmp_path):
    def rows(*found):
        path = tmp_path / render.H100 / "train_step.json"
        path.parent.mkdir(exist_ok=True)
        keys = ("preset", "impl", "videos_per_s", "videos")
        path.write_text(json.dumps({"quick": False, "rows": [dict(zip(keys, row, strict=True)) for row in found]}))
        return scaling.jobs(render.Results(tmp_path), render.H100)

    few = [("small 5x128", "naive compiled", 9.0, 128), ("small 5x128", "ours compiled", 800.0, 64)]
    small, large, larger = rows(*few, ("large-half 5x128", "ours compiled", None, 32))  # the last did not fit in the time
    assert (small.videos_per_s, small.fits, small.source) == (800.0, 64, f"measured on one {render.H100}")
    assert (large.videos_per_s, larger.videos_per_s) == (120.0, 30.0) and "goal" in large.source
    small, large, larger = rows(("large-half 5x128", "ours compiled", 100.0, 64))
    assert small == SMALL and (large.videos_per_s, large.fits) == (100.0, 64)
    assert (larger.videos_per_s, larger.fits) == (25.0, 8) and "a quarter" in larger.source
    assert scaling.jobs(render.Results(tmp_path), render.H100, large_half=5.0)[1].videos_per_s == 5.0


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_parameters():
    """29,442,048 of Table 3; the token head's 512² + 512, norm and bias; the contrastive head's three layers, two with norm."""
    heads = 512**2 + 512 + 2 * 512 + 8197 + (512 * 4096 + 3 * 4096) + (4096**2 + 3 * 4096) + 4096 * 256
    assert sum(scaling.weights(ModelConfig.small())[0]) == 29_442_048 + heads


@each_job
def test_buckets_are_those_of_torch(job):
    elements, place = scaling.weights(job.config.model)
    tensors = [torch.empty(n, device="meta") for n in reversed(elements)]
    assigned, _ = dist._compute_bucket_assignment_by_size(tensors, list(scaling.BUCKETS))
    assert scaling.BUCKETS[0] == dist._DEFAULT_FIRST_BUCKET_BYTES
    first, last = scaling.buckets(elements, place)
    assert first + last == [sum(4 * tensors[i].numel() for i in bucket) for bucket in assigned]
    embedding = len(tensors) - 1 - place
    assert tensors[embedding].numel() == (8192 + 5) * job.config.model.width
    assert len(first) == next(k for k, bucket in enumerate(assigned) if embedding in bucket)


def test_buckets_by_hand():
    million = 1 << 20  # elements: 4 MiB
    first, last = scaling.buckets((1, 7 * million, 3, 6 * million, 2 * million, 5), embedding=1)
    # Backwards: 5 and 8 MiB fill the small bucket; 24 MiB and three elements do not fill a large one.
    assert first == [4 * 5 + 8 * million] and last == [24 * million + 12 + 28 * million, 4]


@pytest.fixture
def four_ranks(first_of, monkeypatch):
    """A process group of four of which this is the first, and what it is asked to send: kind, bytes of the result."""
    first_of(4)
    sent = []

    def all_reduce(x, *_, **__):
        sent.append(("all_reduce", x.numel() * x.element_size()))

    def gather(out, x, group=None):
        sent.append(("all_gather", out.numel() * out.element_size()))
        out.copy_(torch.cat([x] * 4))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor", gather)
    return sent


def test_small_collectives_are_those_of_the_code(four_ranks):
    shape = {"layers": 1, "width": 16, "heads": 2, "grid": (2, 2, 2), "head_width": 24, "head_out": 8, "vocab_size": 50}
    config = ModelConfig(**shape, head_layers=4)
    head, cls = PretrainModel(config).cls_head, torch.randn(2 * 6, 16)  # six videos a rank
    with torch.autocast("cpu", torch.bfloat16):
        z1, z2 = head(cls).chunk(2)
        if reasons := sys.modules["vimpac.ops.info_nce"]._why_not_cpu(z1, z2):
            pytest.skip(", ".join(reasons))
        loss = info_nce(z1, z2, 0.2, dist.group.WORLD, "cpu")  # sends what Triton's does
    loss.backward()
    module = SimpleNamespace(objective=SimpleNamespace(mask_task=True))
    task = SimpleNamespace(world=World(0, 4, torch.device("cpu")), module=module)
    PretrainTask.weighted(task, [SimpleNamespace(masked_count=3, _replace=lambda **_: None)])
    expected = scaling.small_collectives(config, contrastive=24, group_ranks=4)
    assert Counter(four_ranks) == Counter((kind, size) for kind, size, _ in expected)
    assert {who for kind, _, who in expected if kind == "all_gather"} == {"group"}


@pytest.mark.parametrize(
    "kind, size, ranks, hardware, expected",
    [
        ("all_reduce", 9 * GB, 1, HARDWARE, 0.0),
        ("all_reduce", 9 * GB, 2, HARDWARE, 0.020 + 10e-6),  # half of it twice at 450 GB/s
        ("all_reduce", 9 * GB, 8, HARDWARE, 0.035 + 30e-6),
        ("all_reduce", 8 * GB, 32, HARDWARE, 2 * 7 / 450 + 2 * 6 / 400 + 30e-6 + 60e-6),  # four machines
        ("all_reduce", 8 * GB, 32, SLOW, 2 * 7 / 450 + 2 * 6 / 12.5 + 30e-6 + 60e-6),
        ("all_gather", 9 * GB, 8, HARDWARE, 0.0175 + 30e-6),
        ("all_gather", 9 * GB, 1, HARDWARE, 0.0),
    ],
)
def test_collectives_by_hand(kind, size, ranks, hardware, expected):
    assert scaling.seconds(kind, size, ranks, hardware) == pytest.approx(expected, rel=1e-12)


def test_what_backward_hides():
    parameters = (9 * 10**6, 9 * 10**6), 0  # two buckets of 36 MB: 0.08 + 0.01 ms each on two GPUs
    for backward, exposed in ((1.0, 90e-6), (0.0, 180e-6), (60e-6, 120e-6)):
        assert scaling.exposed(parameters, 2, backward, HARDWARE) == pytest.approx(exposed)


# --- updates ----------------------------------------------------------------------------------------------------------


def test_an_update_by_hand():
    """Small at 1000 videos/s on 16 GPUs."""
    s, P = scaling.step(SMALL, 16, HARDWARE), 49_661_445
    assert s.plan == BatchPlan(micro_batch=64, micro_steps=1, group_ranks=2)
    optimizer = 46 * P / 3.0e12
    assert s.losses["the optimizer"] == pytest.approx(optimizer) and s.ideal == pytest.approx(64e-3)
    assert s.compute == pytest.approx(64 * (1e-3 - optimizer / 128)) and s.losses["gradient caching"] == 0
    launches, flag = (6 * 50 + 150 + 130) * 6e-6, 30 * 50e-6 / 10  # asked with every tenth update, as metrics are looked at
    assert s.host == pytest.approx({"launches": launches, "the stop flag": flag})
    reduce, gather = 60e-6, 10e-6  # across two machines; by two ranks of one
    moved = 4 * 65536 * 2 * (7 / 8 / 450e9 + 1 / 2 / 400e9) + (2 * 128 * 256 * 4 + 2 * 2 * 128 * 4 + 8) / 2 / 450e9
    assert s.losses["small collectives"] == pytest.approx(5 * reduce + 2 * gather + moved, rel=1e-4)
    assert s.seconds == pytest.approx(s.compute + sum(s.losses.values())) and s.efficiency == s.ideal / s.seconds


def test_the_slower_of_host_and_gpu():
    s = scaling.step(SMALL, 1024, HARDWARE)  # a video each: launching takes longer than computing
    assert s.seconds == sum(s.host.values()) > s.compute + sum(s.losses.values())
    assert s.host["the stop flag"] == pytest.approx(2046 * 50e-6 / 10) and s.largest_loss == "the stop flag"
    assert replace(s, host={"launches": 1.0, "the stop flag": 0.5}).largest_loss == "launches"
    assert replace(s, host={"launches": 0.0}).largest_loss == "the gradients' all-reduce"


def test_gradient_caching_by_hand():
    """Large-Half on one GPU that holds 32 videos: forward once more, so does launching; nothing is sent."""
    s = scaling.step(LARGE_HALF, 1, HARDWARE)
    assert s.plan == BatchPlan(micro_batch=32, micro_steps=32, group_ranks=1, parts=8)
    assert s.losses["gradient caching"] == pytest.approx(s.compute / 3)
    assert s.losses["small collectives"] == s.losses["the gradients' all-reduce"] == s.host["the stop flag"] == 0
    assert s.host["launches"] == pytest.approx(32 * 4 / 3 * (24 * 50 + 150 + 454) * 6e-6)
    two = scaling.step(LARGE_HALF, 2, HARDWARE)  # the head and its collectives run once a contrastive batch: 4 micro-steps
    sent = scaling.small_collectives(LARGE_HALF.config.model, 256, 2)
    once = sum(scaling.seconds(kind, size, 2, HARDWARE) for kind, size, _ in sent)
    assert two.plan.parts == 4 and two.losses["small collectives"] == pytest.approx(4 * once)


@each_job
def test_more_gpus_and_slower_networks(job):
    made = {ranks: [scaling.step(job, ranks, hardware) for hardware in (HARDWARE, SLOW)] for ranks in GPUS}
    for fast, slow in made.values():
        assert fast.seconds <= slow.seconds and fast.efficiency < 1.02
    times = [fast.compute for fast, _ in made.values()]
    assert times == sorted(times, reverse=True)
    one_pass = [fast.efficiency for fast, _ in made.values() if fast.plan.parts == 1]
    assert all(b <= a + 0.002 for a, b in pairwise(one_pass))  # the optimizer's share of a large step


@each_job
def test_plans_make_up_the_contrastive_batch(job):
    n = job.config.contrastive_videos
    for ranks in GPUS:
        plan = scaling.best_plan(n, ranks, job.fits)
        assert plan.micro_batch <= job.fits and plan.micro_batch * plan.group_ranks * plan.parts == n
        assert plan.micro_batch * plan.micro_steps * ranks == 1024
        assert (plan.parts > 1) == (job.fits * ranks < n)  # gradient caching only where the batch does not fit
