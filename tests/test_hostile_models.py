"""Hostile models and checkpoints: whatever a file claims, loading gives one InputError, before memory is allocated for it."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from runs import continue_stage, make_loop, restore, write_store
from vimpac import weights
from vimpac.checkpoint import load_checkpoint, save_checkpoint
from vimpac.config import ModelConfig
from vimpac.errors import InputError
from vimpac.files.tensorfile import UNSEALED, seal
from vimpac.model import PretrainModel

CONFIG = ModelConfig(layers=1, width=8, heads=2, grid=(2, 2, 2), head_layers=2, head_width=4, head_out=4, vocab_size=9)
TOKENIZER = {"name": "patch-vq", "vocab_size": 9, "stride": 8, "digest": "a" * 64}
HUGE = 2**30


def short(value):
    return str(value)[:40]


def write_model(path, change=None, state=None, **header):
    """A model file with a right checksum, whatever it holds."""
    state = PretrainModel(CONFIG).state_dict() if state is None else state
    header = {"config": dataclasses.asdict(CONFIG) | (change or {}), "tokenizer": TOKENIZER} | header
    save_file(state, path, {"format": "vimpac-model", "version": "1", "header": json.dumps(header), **UNSEALED})
    seal(path)
    return path


def test_the_model_that_is_damaged_below(tmp_path):
    assert weights.load(write_model(tmp_path / "m.safetensors")).config == CONFIG


@pytest.mark.parametrize(
    "config",
    [
        {"width": HUGE},
        {"width": HUGE, "heads": 1, "layers": 1},
        {"layers": HUGE},
        {"layers": 2},
        {"head_layers": HUGE},
        {"layout": "T," * 100_000 + "T"},
        {"vocab_size": 2**31 - 1},
        {"grid": [HUGE, HUGE, HUGE]},
        {"grid": [2, 2]},
        {"grid": "222"},
        {"width": "8"},
        {"width": 8.0},
        {"width": True},
        {"width": None},
        {"width": -8},
        {"norm": "none"},
        {"norm": []},
        {"layout": 7},
        {"layout": "Q"},
        {"dropout": float("nan")},
        {"dropout": "0"},
        {"cls_in_context": 1},
        {"unknown": 1},
        {"mlp_width": {}},
    ],
    ids=short,
)
def test_model_headers(tmp_path, config):
    path = write_model(tmp_path / "m.safetensors", config)
    with pytest.raises(InputError, match=r"m\.safetensors") as error:
        weights.load(path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "header",
    [
        {"config": 7},
        {"config": None},
        {"tokenizer": []},
        {"tokenizer": {"digest": 7}},
        {"tokenizer": TOKENIZER | {"vocab_size": 70_000}},
        {"classes": HUGE},
        {"classes": -1},
        {"classes": "3"},
        {"more": 1},
    ],
    ids=short,
)
def test_other_parts_of_a_models_header(tmp_path, header):
    path = write_model(tmp_path / "m.safetensors", **header)
    with pytest.raises(InputError, match=r"m\.safetensors"):
        weights.load(path, tokenizer_digest="a" * 64)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "7", "null"])
def test_a_models_header_that_is_no_object(tmp_path, text):
    path = tmp_path / "m.safetensors"
    save_file({}, path, {"format": "vimpac-model", "version": "1", "header": text, **UNSEALED})
    seal(path)
    with pytest.raises(InputError, match=r"m\.safetensors"):
        weights.load(path)


@pytest.mark.parametrize(
    "kind", ["missing", "extra", "shape", "scalar", "integers", "complex", "float8", "nan", "infinite", "bool"]
)
def test_model_weights(tmp_path, kind):
    state = PretrainModel(CONFIG).state_dict()
    name = "backbone.layers.0.mlp.expand.weight"
    x = state.pop(name).clone()
    match kind:
        case "extra":
            state |= {name: x, "extra": x + 1}
        case "shape":
            state[name] = x.T.contiguous()
        case "scalar":
            state[name] = torch.tensor(1.0)
        case "integers":
            state[name] = x.long()
        case "complex":
            state[name] = x.to(torch.complex64)
        case "float8":
            state[name] = x.to(torch.float8_e4m3fn)
        case "bool":
            state[name] = x > 0
        case "nan" | "infinite":
            x[3, 1] = float("nan" if kind == "nan" else "-inf")
            state[name] = x
    path = write_model(tmp_path / "m.safetensors", state=state)
    with pytest.raises(InputError, match=rf"m\.safetensors.*({name}|extra)"):
        weights.load(path)


def test_half_precision_weights_are_taken(tmp_path):
    state = {name: x.bfloat16() if x.is_floating_point() else x for name, x in PretrainModel(CONFIG).state_dict().items()}
    model = weights.load(write_model(tmp_path / "m.safetensors", state=state))
    assert all(torch.equal(x, state[name].to(x.dtype)) for name, x in model.state_dict().items())
    assert model.backbone.cls.dtype == torch.float32


@pytest.mark.parametrize("name", ["m.safetensors", "step-00000001.pt"])
def test_paths_that_are_no_regular_file(tmp_path, name):
    """A pipe would be waited for without end."""
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(InputError, match=rf"{name}: it is a pipe"):
        weights.load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=rf"{name}: it is a folder"):
        weights.load(path)
    path.rmdir()
    path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=rf"{name}: it is a pipe, a socket or a device"):
        weights.load(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(a loop, the checkpoint that it wrote)"""
    folder = tmp_path_factory.mktemp("hostile")
    loop = make_loop(write_store(folder / "store"), folder / "run")
    loop.update()
    loop.step = 1
    return loop, load_checkpoint(loop.save())


def edited(state, path, value):
    """A copy in which the value at a path of keys is another; None: is missing."""
    copy = dict(state) if isinstance(state, dict) else list(state)
    if len(path) == 1 and value is None:
        del copy[path[0]]
    else:
        copy[path[0]] = value if len(path) == 1 else edited(state[path[0]], path[1:], value)
    return copy


WEIGHT = ("model", "backbone.cls")
MOMENT = ("optimizer", "state", 0, "exp_avg")


@pytest.mark.parametrize(
    "path, value",
    [
        (WEIGHT, None),
        (WEIGHT, torch.zeros(3)),
        (WEIGHT, [1.0]),
        (WEIGHT, torch.zeros(1).expand(2**40)),
        (WEIGHT, torch.full((16,), float("nan"))),
        (("model", "more"), torch.zeros(2)),
        (("model",), {}),
        (MOMENT, None),
        (MOMENT, torch.zeros(3)),
        (MOMENT, "x"),
        (("optimizer", "state", 0), 7),
        (("optimizer", "state"), [1, 2]),
        (("optimizer", "state", 999), {}),
        (("optimizer", "param_groups"), None),
        (("optimizer", "param_groups"), [1]),
        (("optimizer", "param_groups", 0, "params"), [0]),
        (("optimizer", "param_groups", 0, "params"), None),
        (("optimizer", "param_groups", 0, "param_names"), ["a"]),
        (("optimizer",), {}),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else type(x).__name__,
)
def test_checkpoints_that_do_not_fit(trained, path, value):
    loop, state = trained
    restore(loop, state)
    with pytest.raises(InputError, match=r"checkpoint of step 1 in .* does not fit this model"):
        restore(loop, edited(state, path, value))


def test_options_of_the_optimizer_are_the_runs(trained):
    loop, state = trained
    hostile = edited(edited(state, ("optimizer", "param_groups", 0, "betas"), "x"), ("optimizer", "param_groups", 0, "lr"), [])
    before = [{name: x for name, x in group.items() if name != "params"} for group in loop.optimizer.param_groups]
    restore(loop, hostile)
    assert [{name: x for name, x in group.items() if name != "params"} for group in loop.optimizer.param_groups] == before


@pytest.mark.parametrize(
    "path, value",
    [
        (("step",), "1"),
        (("step",), -1),
        (("step",), 2**64),
        (("config",), [1]),
        (("tokenizer",), 7),
        (("model",), [torch.zeros(1)]),
        (("optimizer",), None),
        (("scaler",), torch.zeros(1)),
    ],
    ids=short,
)
def test_parts_of_a_checkpoint(trained, tmp_path, path, value):
    file = save_checkpoint(tmp_path, {**trained[1], "step": 1}, keep=1)
    torch.save(edited(trained[1], path, value), file)
    with pytest.raises(InputError, match=f"step-00000001.pt (holds .* as its|lacks) {path[0]}"):
        load_checkpoint(file)


@pytest.mark.parametrize(
    "path, value",
    [
        (("config", "model"), None),
        (("config", "model", "width"), HUGE),
        (("config", "model", "layers"), HUGE),
        (("tokenizer", "digest"), 7),
        (WEIGHT, torch.zeros(1).expand(2**40)),
        (("model", 7), torch.zeros(1)),
    ],
    ids=short,
)
def test_checkpoints_as_models(trained, tmp_path, path, value):
    file = save_checkpoint(tmp_path, edited(trained[1], path, value), keep=1)
    with pytest.raises(InputError, match=r"step-00000001\.pt"):
        weights.load(file, tokenizer_digest="d" * 64)


def test_continue_from_what_does_not_fit(trained, tmp_path):
    loop, state = trained
    store = loop.task.pairs.store
    for path, value in ((("config", "model", "layers"), HUGE), (MOMENT, torch.zeros(3)), (("tokenizer", "digest"), None)):
        save_checkpoint(tmp_path, edited(state, path, value), keep=1)
        with pytest.raises(InputError, match=r"step-00000001\.pt"):
            continue_stage(loop, tmp_path, store)
