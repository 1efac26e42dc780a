"""docs/scaling.md says what tools/scaling.py computes, and that computes what is written beside its formulas."""

import dataclasses
import json
import math
import sys
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import render
import scaling
from scaling import GPUS, JOBS, Collective, Hardware, Inputs, Weights
from vimpac.config import ModelConfig
from vimpac.model import PretrainModel
from vimpac.ops import info_nce
from vimpac.training.distributed import World
from vimpac.training.optim import adamw
from vimpac.training.plan import BatchPlan
from vimpac.training.pretrain_task import PretrainTask

HARDWARE = Hardware()
SLOW = dataclasses.replace(HARDWARE, machine_gb_per_s=12.5)
GB = 1e9


@pytest.fixture
def inputs(tmp_path):
    """Nothing is measured."""
    return Inputs(scaling.speeds(render.Results(tmp_path), render.H100))


def write_speed(root, preset, speed, videos=128, impl="ours compiled"):
    path = root / render.H100 / "train_step.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows.append({"preset": preset, "impl": impl, "videos_per_s": speed, "videos": videos})
    path.write_text(json.dumps({"quick": False, "rows": rows}))


# --- the document -----------------------------------------------------------------------------------------------------


def test_the_document_says_what_is_computed():
    inputs = Inputs(scaling.speeds(render.Results(render.ROOT / "benchmarks" / "results"), render.H100))
    text = scaling.DOCUMENT.read_text()
    assert scaling.render(text, inputs) == text, "python tools/scaling.py --write"
    found = [match[1] for line in text.split("\n") if (match := scaling.START.fullmatch(line))]
    assert sorted(found) == sorted(scaling.TABLES)


def test_every_table_says_that_it_is_not_measured(inputs):
    for name, make in scaling.TABLES.items():
        text = "\n".join(make(inputs))
        assert name == "paper" or "not measured" in text or "none of it measured" in text, name
    for name in (*JOBS, "models", "limits", "plans", "overlap", "cost", "store"):
        said = "**assumed**: Large-Half" if name == "large-half-256" else "**assumed**: this project's goal"
        assert said in "\n".join(scaling.TABLES[name](inputs)), name


def test_write(tmp_path, capsys):
    document = tmp_path / "scaling.md"
    document.write_text("before\n<!-- scaling: paper -->\nstale\n<!-- end -->\nbetween\n<!-- end -->\nafter\n")
    results = tmp_path / "results"
    assert scaling.main(["--write"], document, results) == 0
    text, table = document.read_text(), "\n".join(scaling.paper(None))
    assert text == f"before\n<!-- scaling: paper -->\n{table}\n<!-- end -->\nbetween\n<!-- end -->\nafter\n"
    assert scaling.main(["--write"], document, results) == 0 and document.read_text() == text
    capsys.readouterr()
    with pytest.raises(SystemExit):
        scaling.main(["--write", "--small", "7"], document, results)
    assert "--write takes the default assumptions, got {'small': 7.0}" in capsys.readouterr().err
    assert document.read_text() == text


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- scaling: nothing -->\n<!-- end -->", "no table is called 'nothing', expected one of"),
        ("<!-- scaling: paper -->\n", "table paper has no <!-- end -->"),
        ("<!-- scaling: paper -->\n<!-- scaling: cost -->\n<!-- end -->", "table paper has no <!-- end --> before"),
    ],
)
def test_markers_that_do_not_pair(text, message, inputs):
    with pytest.raises(ValueError, match=message):
        scaling.render(text, inputs)


def test_last_line_is_json(tmp_path, capsys):
    assert scaling.main(["--large-half", "60", "--tcp-hop-us", "0"], results=tmp_path) == 0
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    assert result["benchmark"] == "scaling" and result["computed"]
    assert result["speeds"]["large-half"]["videos_per_s"] == 60 and "assumed" in result["speeds"]["large-half"]["source"]
    assert result["hardware"]["tcp_hop_us"] == 0 and all(row["flag"] == 0 for row in result["rows"])
    assert len(result["rows"]) == len(JOBS) * 2 * len(GPUS)
    assert sum(line.startswith("## ") for line in printed) == len(scaling.TABLES)


# --- the speed of one GPU ---------------------------------------------------------------------------------------------


def test_a_measured_speed_is_taken(tmp_path):
    write_speed(tmp_path, "small 5x128", 9.0, impl="naive compiled")
    write_speed(tmp_path, "small 5x128", 800.0)
    write_speed(tmp_path, "large-half 5x128", None)  # did not fit in the time
    found = scaling.speeds(render.Results(tmp_path), render.H100)
    assert (found["small"].videos_per_s, found["small"].videos) == (800.0, 128)
    assert found["small"].source == f"measured on one {render.H100}"
    assert found["large-half"].videos_per_s == 120.0 and "not a measurement" in found["large-half"].source
    assert found["large-half-256"].videos_per_s == 30.0 and "not a measurement" in found["large-half-256"].source
    write_speed(tmp_path, "large-half 5x128", 100.0, videos=64)
    found = scaling.speeds(render.Results(tmp_path), render.H100)
    assert (found["large-half"].videos_per_s, found["large-half"].videos) == (100.0, 64)
    assert found["large-half-256"].videos_per_s == 25.0 and "assumed" in found["large-half-256"].source
    given = scaling.speeds(render.Results(tmp_path), render.H100, small=5.0)["small"]
    assert given.videos_per_s == 5.0 and "assumed" in given.source
    assert "assumed**" not in "\n".join(scaling.steps(Inputs(found), "small"))


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_parameters():
    """29,442,048 of Table 3; the token head's 512² + 512, norm and bias; the contrastive head's three layers, two with norm."""
    heads = 512**2 + 512 + 2 * 512 + 8197 + (512 * 4096 + 3 * 4096) + (4096**2 + 3 * 4096) + 4096 * 256
    counted = scaling.weights(ModelConfig.small())
    assert counted.count == 29_442_048 + heads == 49_661_445
    assert sum(counted.decayed) + sum(counted.undecayed) == counted.count


@pytest.mark.parametrize("name", JOBS)
def test_buckets_are_those_of_torch(name):
    counted = scaling.weights(JOBS[name].model)
    tensors = [torch.empty(n, device="meta") for n in reversed(counted.in_order)]
    assigned, _ = dist._compute_bucket_assignment_by_size(tensors, list(scaling.BUCKETS))
    assert scaling.BUCKETS[0] == dist._DEFAULT_FIRST_BUCKET_BYTES
    first, last = counted.buckets
    assert first + last == [sum(4 * tensors[i].numel() for i in bucket) for bucket in assigned]
    embedding = len(tensors) - 1 - counted.embedding
    assert tensors[embedding].numel() == (8192 + 5) * JOBS[name].model.width
    assert len(first) == next(k for k, bucket in enumerate(assigned) if embedding in bucket)


def test_buckets_by_hand():
    million = 1 << 20  # elements: 4 MiB
    counted = Weights((), (), (1, 7 * million, 3, 6 * million, 2 * million, 5), embedding=1)
    first, last = counted.buckets  # backwards: 5 and 8 MiB fill the small one; 24 MiB and three do not fill a large one
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
    PretrainTask.weighted(task, [SimpleNamespace(count=3, _replace=lambda **_: None)])
    expected = Counter()
    for each in scaling.small_collectives(config, contrastive=24, group_ranks=4):
        expected[each.kind, each.size] += each.count
    assert Counter(four_ranks) == expected


def test_shares_are_those_of_torch(four_ranks):
    config = ModelConfig(layers=2, width=16, heads=2, grid=(2, 2, 2), head_width=24, head_out=8, vocab_size=50)
    optimizer = adamw(PretrainModel(config), 0.05, (0.9, 0.98), 1e-8, shard=True)
    shares = [sum(p.numel() for group in part for p in group["params"]) for part in optimizer._partition_parameters()]
    counted = scaling.weights(config)
    assert sum(shares) == counted.count and sorted(counted.shares(4)) == sorted(shares)
    assert counted.shares(1) == [counted.count]


def test_shares_by_hand():
    counted = Weights(decayed=(3, 5, 4, 3), undecayed=(2,), in_order=(), embedding=0)
    assert counted.shares(2) == [8, 9]  # 5 + 3 and 4 + 3, then 2
    assert max(counted.shares(5)) == 5 == max(counted.shares(100))  # a tensor is not split


# --- collectives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function, size, ranks, hardware, seconds",
    [
        (scaling.all_reduce, 9 * GB, 1, HARDWARE, 0.0),
        (scaling.all_reduce, 9 * GB, 2, HARDWARE, 0.020 + 10e-6),  # half of it twice at 450 GB/s
        (scaling.all_reduce, 9 * GB, 8, HARDWARE, 0.035 + 30e-6),
        (scaling.all_reduce, 8 * GB, 32, HARDWARE, 2 * 7 / 450 + 2 * 6 / 400 + 30e-6 + 60e-6),  # four machines
        (scaling.all_reduce, 8 * GB, 32, SLOW, 2 * 7 / 450 + 2 * 6 / 12.5 + 30e-6 + 60e-6),
        (scaling.all_gather, 9 * GB, 8, HARDWARE, 0.0175 + 30e-6),
        (scaling.all_gather, 9 * GB, 1, HARDWARE, 0.0),
        (scaling.broadcast, 9 * GB, 1, HARDWARE, 0.0),
        (scaling.broadcast, 9 * GB, 8, HARDWARE, 0.020 + 30e-6),
        (scaling.broadcast, 9 * GB, 16, HARDWARE, 0.020 + 0.0225 + 60e-6),
        (scaling.flat_ring, 9 * GB, 8, HARDWARE, 0.035 + 14 * 10e-6),
        (scaling.flat_ring, 8 * GB, 16, HARDWARE, 2 * 7.5 / 400 + 30 * 30e-6),
        (scaling.flat_ring, 8 * GB, 16, SLOW, 2 * 7.5 / 12.5 + 30 * 30e-6),
    ],
)
def test_collectives_by_hand(function, size, ranks, hardware, seconds):
    assert function(size, ranks, hardware) == pytest.approx(seconds, rel=1e-12)


def test_a_small_collective_is_within_its_ranks():
    plan = BatchPlan(micro_batch=32, micro_steps=1, group_ranks=4)
    gather, reduce = (Collective("", kind, 3, 0, group) for kind, group in (("all_gather", "contrast"), ("all_reduce", "all")))
    assert gather.seconds(plan, 32, HARDWARE) == pytest.approx(3 * 20e-6)
    assert reduce.seconds(plan, 32, HARDWARE) == pytest.approx(3 * 90e-6)


def test_flag_by_hand():
    """Asked with every tenth update, as metrics are looked at."""
    assert scaling.flag(1, HARDWARE) == 0 and scaling.flag(8, HARDWARE) == pytest.approx(14 * 50e-6 / 10)


def test_what_backward_hides():
    counted = Weights((), (), (9 * 10**6, 9 * 10**6), embedding=0)  # two buckets of 36 MB: 0.08 + 0.01 ms each on two GPUs
    for backward, exposed in ((1.0, 90e-6), (0.0, 180e-6), (60e-6, 120e-6)):
        assert scaling.reduce_gradients(counted, 2, backward, HARDWARE) == pytest.approx((180e-6, exposed))


@pytest.mark.parametrize("function", [scaling.all_reduce, scaling.all_gather, scaling.broadcast, scaling.flat_ring])
def test_collectives_grow(function):
    for hardware in (HARDWARE, SLOW):
        for size in (4, 10**6, 10**9):
            times = [function(size, ranks, hardware) for ranks in GPUS]
            assert times == sorted(times) and times[0] == 0
            assert function(2 * size, 16, hardware) > function(size, 16, hardware)
    assert function(10**9, 16, SLOW) > function(10**9, 16, HARDWARE)
    assert function(10**9, 8, SLOW) == function(10**9, 8, HARDWARE)  # one machine


# --- steps ------------------------------------------------------------------------------------------------------------


def test_a_step_by_hand(inputs):
    """Small at 1000 videos/s on 16 GPUs."""
    s, P = inputs.step("small", 16), 49_661_445
    assert s.plan == BatchPlan(micro_batch=64, micro_steps=1, group_ranks=2)
    optimizer = 46 * P / 3.0e12
    assert s.optimizer == pytest.approx(optimizer) and s.ideal == pytest.approx(64e-3)
    assert s.compute == pytest.approx(64 * (1e-3 - optimizer / 128)) and s.second_pass == 0
    assert s.launches == pytest.approx((6 * 50 + 150 + 130) * 6e-6) and s.flag == pytest.approx(30 * 50e-6 / 10)
    reduce, gather = 60e-6, 10e-6
    moved = 4 * 65536 * 2 * (7 / 8 / 450e9 + 1 / 2 / 400e9) + (2 * 128 * 256 * 4 + 2 * 2 * 128 * 4 + 8) / 2 / 450e9
    assert s.small == pytest.approx(5 * reduce + 2 * gather + moved, rel=1e-4)
    assert s.seconds == pytest.approx(s.compute + s.small + s.exposed + s.optimizer) and s.efficiency == s.ideal / s.seconds
    assert s.norm_videos == 1024 and s.exposed < s.gradients


def test_the_slower_of_host_and_device(inputs):
    s = inputs.step("small", 1024)  # a video each: launching takes longer than computing
    assert s.seconds == s.host == s.launches + s.flag > s.device > 0 and s.flag == pytest.approx(2046 * 50e-6 / 10)
    without = inputs.step("small", 1024, inputs.no_flag)
    assert without.flag == 0 and without.seconds == max(without.device, without.launches)


def test_two_passes_by_hand(inputs):
    """Large-Half on one GPU that holds 32 videos: forward once more, so does launching; nothing is sent."""
    s = inputs.step("large-half", 1)
    assert s.plan == BatchPlan(micro_batch=32, micro_steps=32, group_ranks=1, parts=8)
    assert s.second_pass == pytest.approx(s.compute / 3) and s.small == s.exposed == s.flag == 0
    assert s.launches == pytest.approx(32 * 4 / 3 * (24 * 50 + 150 + 454) * 6e-6) and s.norm_videos == 256
    two = inputs.step("large-half", 2)  # the head and its collectives run once a contrastive batch, of four micro-steps here
    sent = scaling.small_collectives(JOBS["large-half"].model, 256, 2)
    assert two.plan.parts == 4 and two.small == pytest.approx(4 * sum(x.seconds(two.plan, 2, HARDWARE) for x in sent))


@pytest.mark.parametrize("name", JOBS)
def test_steps_are_monotonous(inputs, name):
    made = {r: [inputs.step(name, r, h) for h in (inputs.no_flag, None, inputs.slow)] for r in GPUS}
    for without, fast, slow in made.values():
        assert without.seconds <= fast.seconds <= slow.seconds
        assert fast.device >= fast.compute and fast.exposed <= fast.gradients and fast.efficiency < 1.02
    for part in ("compute", "launches"):
        times = [getattr(fast, part) for _, fast, _ in made.values()]
        assert times == sorted(times, reverse=True)
    if name != "small":  # each GPU more saves time where the flag takes none
        alone = [without.seconds for without, _, _ in made.values()]
        assert alone == sorted(alone, reverse=True)
    one_pass = [fast.efficiency for _, fast, _ in made.values() if fast.plan.parts == 1]
    assert all(b <= a + 0.002 for a, b in pairwise(one_pass))
    slower = dataclasses.replace(inputs.speeds[name], videos_per_s=inputs.speeds[name].videos_per_s / 2)
    halved = scaling.step(JOBS[name], slower, 16, HARDWARE)
    assert halved.seconds > made[16][1].seconds and halved.efficiency >= made[16][1].efficiency - 0.01


@pytest.mark.parametrize("name", JOBS)
def test_plans_make_up_the_contrastive_batch(inputs, name):
    n, fits = JOBS[name].contrastive, inputs.speeds[name].videos
    for ranks in GPUS:
        plan = scaling.best_plan(n, ranks, fits)
        assert plan.micro_batch <= fits and plan.micro_batch * plan.group_ranks * plan.parts == n
        assert plan.micro_batch * plan.micro_steps * ranks == 1024
        assert (plan.parts > 1) == (fits * ranks < n)  # two passes only where one does not fit
    assert scaling.default_plan(n, n) is not None and scaling.default_plan(n, 2 * n) is None


def test_limits(inputs):
    last, below = scaling.limit(inputs, "small", inputs.hardware, 0.8)
    assert inputs.step("small", last).efficiency >= 0.8 > below.efficiency and below.ranks == 2 * last
    assert scaling.limit(inputs, "small", inputs.hardware, 0.0) == (1024, None)
    last, below = scaling.limit(inputs, "small", inputs.hardware, 2.0)
    assert last is None and below.ranks == 1


def test_the_largest_loss():
    times = {"ideal": 1.0, "compute": 1.0, "second_pass": 0.1, "small": 0.2, "gradients": 9.0, "exposed": 0.3}
    s = scaling.Step(8, BatchPlan(1, 1, 1), **times, optimizer=0.25, launches=1.0, flag=0.5)
    assert s.largest_loss == "the gradients' all-reduce"
    assert dataclasses.replace(s, exposed=0.0).largest_loss == "the optimizer"
    assert dataclasses.replace(s, launches=2.0).largest_loss == "launches"
    assert dataclasses.replace(s, launches=2.0, flag=2.5).largest_loss == "the flag"


# --- HowTo100M --------------------------------------------------------------------------------------------------------


def cells(lines, start):
    (found,) = [line for line in lines if line.startswith(f"| {start}")]
    return [cell.strip() for cell in found.split("|")[1:-1]]


def test_hours(inputs):
    assert scaling.updates(100) == 120_976  # Table 4: 120K
    assert scaling.run_hours(inputs, "small", 8) == pytest.approx(12_098 * inputs.step("small", 8).seconds / 3600)
    row = cells(scaling.cost(inputs), "16 ")
    assert float(row[6]) == pytest.approx(1_238_791 * (90 / 120 + 10 / 30) / 3600, rel=0.01)
    assert row[7] == "24×"  # 120 / 5.0 in speed


def test_the_paper_s_hours():
    lines = scaling.paper(None)
    assert cells(lines, "Large-Half")[2] == "6,194" and math.isclose(1_238_791 * 90 / 5 / 3600, 6194, abs_tol=0.5)
    assert cells(lines, "sum")[2] == "8,947 or 8,816" and "8,900: agrees" in cells(lines, "sum")[3]
    assert cells(lines, "Small")[2] == "108" and "does not agree" in cells(lines, "Small")[3]


def test_store(inputs):
    row = cells(scaling.store(inputs), "Small")  # 6.5 × 60 × 2 frames of 16 × 16 ids of two bytes
    assert row[1:] == ["0.40 MB", "495 GB", "5.1 kB", "5.1 MB/s, 2,000 reads/s", "41.0 MB/s"]
    assert round(780 * 256 * 2 * 1_238_791 / 1e9) == 495
