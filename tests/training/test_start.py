"""What a run starts from: an earlier stage's weights and moments, or another run's model."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from runs import (
    continue_stage,
    make_loop,
    metrics,
    tiny_config,
    write_store,
)
from vimpac import weights
from vimpac.checkpoint import list_checkpoints, load_checkpoint
from vimpac.training.pretrain import pretrain
from vimpac.training.start import interpolate_moments

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def large_store(tmp_path_factory):
    """The same tokenizer at twice the frame size."""
    return write_store(tmp_path_factory.mktemp("large") / "tokens", side=8)


def test_two_stages(finished_run, large_store, tmp_path, undrawn):
    folder = tmp_path / "stage-2"
    config = tiny_config(
        {"grid": (4, 8, 8)},
        data=str(large_store),
        output=str(folder),
        continue_from=str(finished_run),
        steps=9,
        weight_decay=0.3,
    )
    pretrain(config)
    *lines, final = metrics(folder)
    assert [line["step"] for line in lines] == [7, 8, 9] and final["step"] == 9
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-2 * (9 - k) / 8 for k in (6, 7, 8)])
    state = load_checkpoint(list_checkpoints(folder)[-1])
    groups = state["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]  # this stage's, not the first one's
    assert all(float(s["step"]) == 9 for s in state["optimizer"]["state"].values())  # Adam counts on
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    for path in [*list_checkpoints(again), again / "metrics.jsonl"]:
        path.unlink()  # resumed before its first checkpoint: continues from the first stage again
    pretrain(dataclasses.replace(config, output=str(again), resume=True))
    assert metrics(again) == metrics(folder)


def test_continue_from_takes_weights_and_moments(finished_run, large_store, tmp_path):
    loop = make_stage(finished_run, large_store, tmp_path, grid=(4, 8, 8))
    first = load_checkpoint(list_checkpoints(finished_run)[-1])
    model = loop.module.model.state_dict()
    resized = {"backbone.positions.time": 4, "backbone.positions.height": 8, "backbone.positions.width": 8}
    for name, x in first["model"].items():
        if name not in resized:
            assert torch.equal(model[name], x)
        else:
            assert torch.allclose(model[name], interpolated(x, resized[name]), atol=1e-6)  # float32 sums of two
    names = [name for group in first["optimizer"]["param_groups"] for name in group["param_names"]]
    ids = [i for group in first["optimizer"]["param_groups"] for i in group["params"]]
    parameters = dict(loop.module.named_parameters())
    for i, name in zip(ids, names, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            before, now = first["optimizer"]["state"][i][key], loop.optimizer.state[parameters[name]][key]
            size = resized.get(name.removeprefix("model."))
            assert torch.allclose(now, before if size is None else interpolated(before, size), atol=1e-6)
            assert now.shape == parameters[name].shape
    assert loop.step == 6


def make_stage(first, store_folder, tmp_path, grid, **options):
    from vimpac.data.store import TokenStore

    loop = make_loop(store_folder, tmp_path / "stage", model={"grid": grid}, steps=20, **options)
    continue_stage(loop, first, TokenStore(store_folder))
    return loop


def interpolated(table, size):
    """Linear, with half-pixel centres, written with numpy."""
    n = len(table)
    at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
    columns = [np.interp(at, np.arange(n), column) for column in table.T.numpy()]
    return torch.tensor(np.stack(columns, 1), dtype=torch.float32)


def test_second_moments_stay_positive():
    moments = {"state": {0: {"step": 1, "exp_avg": torch.randn(3, 2), "exp_avg_sq": torch.rand(3, 2)}}}
    moments["param_groups"] = [{"params": [0], "param_names": ["model.backbone.positions.time"]}]
    assert interpolate_moments(moments, (7, 4, 4))["state"][0]["exp_avg_sq"].min() >= 0


def test_init_from_takes_weights_only(finished_run, large_store, tmp_path):
    path = finished_run / "model.safetensors"
    loop = make_loop(large_store, tmp_path / "run", model={"grid": (3, 8, 8), "dropout": 0.3}, init_from=str(path))
    state = loop.module.model.state_dict()
    saved = weights.load(path, grid=(3, 8, 8)).state_dict()
    assert all(torch.equal(x, saved[name]) for name, x in state.items())
    assert loop.step == 0 and not loop.optimizer.state
    assert loop.module.model.config.dropout == 0.3  # this run's
