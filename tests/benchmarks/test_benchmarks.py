"""The benchmarks run on a CPU, end with one JSON line, and never time what is wrong."""

import csv
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

import harness
from vimpac.ops import dispatch

ROOT = harness.ROOT
ROW_KEYS = {"op", "impl", "shape", "dtype", "pass", "ms", "ms_p20", "ms_p80", "gb_per_s", "copy_share", "peak_bytes", "error"}
SCRIPTS = {  # script → implementations that need not be there
    "axial_attention": {"xformers": "xformers"},
    "block_mask": {},
    "dropout_add": {},
    "residual_norm": {},
    "bias_gelu": {},
    "info_nce": {"inf-cl": "inf_cl"},
    "masked_cross_entropy": {"liger-kernel": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"},
    "attn_layouts": {},
    "train_step": {},
    "data": {},
    "evaluate": {},
    "finetune": {},
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_script(script, tmp_path):
    command = [sys.executable, f"benchmarks/{script}.py", "--quick", "--device", "cpu", "--results", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert (result["benchmark"], result["device"], result["torch"]) == (script, "cpu", torch.__version__)
    assert "triton" in result
    rows = result["rows"]
    assert rows and all(row.keys() >= ROW_KEYS for row in rows)
    ours = [row for row in rows if row["impl"] == "ours"]
    assert ours and all(row["ms_p20"] <= row["ms"] <= row["ms_p80"] and row["peak_bytes"] > 0 for row in ours)
    bounds = {"bfloat16": 2**-8}  # a result's rounding
    assert all(row["error"] <= bounds.get(row["dtype"], 1e-4) and row["status"] == "ok" for row in ours)
    assert all(row["note"] for row in rows if row["ms"] is None)
    for impl, module in SCRIPTS[script].items():
        found = [row for row in rows if row["impl"] == impl]
        assert found
        if importlib.util.find_spec(module) is None:
            assert all(row["status"] == "unavailable" and module in row["note"] for row in found)
    with (tmp_path / f"{script}.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert json.loads((tmp_path / f"{script}.json").read_text()) == result


def test_tf32_is_allowed_in_both_passes(monkeypatch):
    import info_nce as script

    seen, switch = [], torch.backends.cuda.matmul

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z1, z2):
            seen.append(switch.fp32_precision)
            ctx.save_for_backward(z1, z2)
            return (z1 * z2).sum()

        @staticmethod
        def backward(ctx, grad):
            seen.append(switch.fp32_precision)
            z1, z2 = ctx.saved_tensors
            return grad * z2, grad * z1

    monkeypatch.setattr(script, "info_nce", lambda z1, z2, temperature: Loss.apply(z1, z2))
    before = switch.fp32_precision
    z1, z2 = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    grads = torch.autograd.grad(3 * script.WithTF32.apply(z1, z2), (z1, z2))
    assert torch.equal(grads[0], 3 * z2) and torch.equal(grads[1], 3 * z1)
    assert seen == ["tf32", "tf32"] and switch.fp32_precision == before != "tf32"


def test_every_op_has_a_benchmark():
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} >= set(
        dispatch._REGISTRY
    ) and "info_nce" in dispatch._REGISTRY


@pytest.fixture
def plan(tmp_path):
    import data

    return data.Plan(data.Files(tmp_path, side=4, videos=300), clip_frames=5)


@pytest.fixture
def data_bench(tmp_path, capsys):
    import data

    return data.DataBenchmark("data", harness.arguments("", ["--device", "cpu", "--quick", "--results", str(tmp_path)]))


def drawn(plan):
    import data

    return [harness.Impl("ours", lambda: data.draw(plan), ours=True, required=True, bound=0.0)]


def test_one_wrong_id_of_a_clip_is_caught(data_bench, plan, monkeypatch):
    import data

    right = data.TokenStore.read_clips

    def wrong(*call, **options):
        clips = right(*call, **options)
        clips[-1, -1, -1, -1] ^= 1
        return clips

    monkeypatch.setattr(data.TokenStore, "read_clips", wrong)
    data.add(data_bench, plan, "batch", drawn(plan))
    assert [row["status"] for row in data_bench.rows] == ["failed"] and data_bench.rows[0]["pairs_per_s"] is None
    assert data_bench.finish() == 1


@pytest.mark.parametrize("gone, cache, note", [(True, "cold", ""), (False, "warm", "the file system keeps its pages")])
def test_a_cache_that_stays_warm_is_said_so(data_bench, plan, monkeypatch, gone, cache, note):
    import data

    dropped = []
    monkeypatch.setattr(data, "drop_pages", lambda path: dropped.append(path) or gone)
    data.add(data_bench, plan, "batch", drawn(plan), dropped=plan.files.shards)
    (row,) = data_bench.rows
    assert (row["cache"], row["status"]) == (cache, "ok") and note in row["note"] and set(dropped) == set(plan.files.shards)
    assert row["pairs_per_s"] == pytest.approx(128e3 / row["ms"])
    assert row["mb_per_s"] == pytest.approx(row["pairs_per_s"] * 2 * 5 * 4 * 4 * 2 / 1e6)


def test_one_core_and_back():
    import data

    before = torch.get_num_threads(), getattr(os, "sched_getaffinity", lambda _: None)(0)
    with data.one_core():
        assert torch.get_num_threads() == 1
        assert not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) == 1
    assert before == (torch.get_num_threads(), getattr(os, "sched_getaffinity", lambda _: None)(0))
