"""Hostile files: whatever a file claims to hold, one InputError, before memory is taken by its numbers."""

import dataclasses
import importlib.util
import json
import os
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from runs import continue_stage, make_loop, restore, write_store
from vimpac import weights
from vimpac.checkpoint import load_checkpoint, save_checkpoint
from vimpac.config import ModelConfig
from vimpac.data import tokenizers as tokenizer_module
from vimpac.data.format import StoreSettings, TokenizerInfo
from vimpac.data.store import StoreWriter, TokenStore, check_listed, finish_store
from vimpac.data.tokenizers import DalleVAE, PatchVQ, load_tokenizer
from vimpac.errors import InputError
from vimpac.files.checked import write_json
from vimpac.files.tensorfile import UNSEALED, seal
from vimpac.model import PretrainModel

CONFIG = ModelConfig(layers=1, width=8, heads=2, grid=(2, 2, 2), head_layers=2, head_width=4, head_out=4, vocab_size=9)
TOKENIZER = {"name": "patch-vq", "vocab_size": 9, "stride": 8, "digest": "a" * 64}
HUGE = 2**30


def short(value):
    return str(value)[:40]


# --- models ---------------------------------------------------------------------------------------------------------------


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


# --- checkpoints ----------------------------------------------------------------------------------------------------------


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


# --- tokenizers -----------------------------------------------------------------------------------------------------------


def write_tokenizer(path, tensors, config="{}", name="patch-vq"):
    save_arrays(tensors, path, {"format": "vimpac-tokenizer", "version": "1", "name": name, "config": config, **UNSEALED})
    seal(path)
    return path


@pytest.mark.parametrize(
    "codebook",
    [
        np.zeros((65_531, 192), np.uint8),
        np.zeros((70_000, 192), np.uint8),
        np.zeros((0, 192), np.uint8),
        np.zeros((4, 191), np.uint8),
        np.zeros(192, np.uint8),
        np.zeros((4, 192), np.int16),
        np.full((4, 192), np.nan, np.float32),
    ],
    ids=lambda x: f"{x.dtype}{x.shape}",
)
def test_codebooks(tmp_path, codebook):
    path = write_tokenizer(tmp_path / "t.safetensors", {"codebook": codebook})
    for make in (lambda: load_tokenizer(path), lambda: PatchVQ(codebook)):
        with pytest.raises(InputError, match=r"the codebook .* expected uint8 \[codes, 192\], 1 to 65530 codes"):
            make()


@pytest.mark.parametrize("codes", [1, 65_530])
def test_the_smallest_and_the_largest_codebook(tmp_path, codes):
    path = write_tokenizer(tmp_path / "t.safetensors", {"codebook": np.zeros((codes, 192), np.uint8)})
    assert load_tokenizer(path).vocab_size == codes


@pytest.mark.parametrize("config", ["", "[]", "7", "[" * 100_000, '{"requested": "x"}', '{"seed": 1.5}', '{"more": 1}'])
def test_configurations_of_a_tokenizer(tmp_path, config):
    path = write_tokenizer(tmp_path / "t.safetensors", {"codebook": np.zeros((4, 192), np.uint8)}, config)
    with pytest.raises(InputError, match=r"t\.safetensors is damaged or was not written by this program"):
        load_tokenizer(path)


def test_tensors_of_a_tokenizer(tmp_path):
    book = np.zeros((4, 192), np.uint8)
    for tensors in ({}, {"codes": book}, {"codebook": book, "more": book}):
        with pytest.raises(InputError, match=r"t\.safetensors is damaged .* (lacks codebook|holds more)"):
            load_tokenizer(write_tokenizer(tmp_path / "t.safetensors", tensors))


needs_dalle = pytest.mark.skipif(
    importlib.util.find_spec("dall_e") is None or importlib.util.find_spec("attr") is None,
    reason="needs `pip install --no-deps dall-e attrs`",
)
ENCODER = {"n_hid": 8, "n_blk_per_group": 1, "input_channels": 3, "vocab_size": 16}
DECODER = {"n_init": 8, "n_hid": 8, "n_blk_per_group": 1, "output_channels": 3, "vocab_size": 16}


@pytest.fixture(scope="module")
def dalle():
    """(tensors, config) of a small DALL-E tokenizer."""
    config, tensors = {"encoder": ENCODER, "decoder": DECODER}, {}
    for part, arguments in config.items():
        module = getattr(tokenizer_module._dalle_module(part), part.capitalize())(**arguments)
        tensors |= {f"{part}.{name}": x.detach().numpy() for name, x in module.state_dict().items()}
    return tensors, config


@needs_dalle
def test_a_small_dalle(tmp_path, dalle):
    tensors, config = dalle
    vae = load_tokenizer(write_tokenizer(tmp_path / "d.safetensors", tensors, json.dumps(config), "dalle"))
    ids = vae.encode(np.zeros((1, 3, 16, 16), np.uint8))
    assert ids.shape == (1, 2, 2) and vae.decode(ids).shape == (1, 3, 16, 16)


@needs_dalle
@pytest.mark.parametrize(
    "part, change",
    [
        ("encoder", {"n_hid": HUGE}),
        ("encoder", {"n_hid": 16}),
        ("encoder", {"n_hid": 0}),
        ("encoder", {"n_hid": "8"}),
        ("encoder", {"n_blk_per_group": HUGE}),
        ("encoder", {"n_blk_per_group": 4000}),
        ("encoder", {"input_channels": 1}),
        ("encoder", {"vocab_size": 70_000}),
        ("encoder", {"vocab_size": 17}),
        ("encoder", {"device": "cuda"}),
        ("decoder", {"n_init": HUGE}),
        ("decoder", {"n_init": -8}),
        ("decoder", {"output_channels": 2**40}),
        ("decoder", {"output_channels": None}),
    ],
    ids=short,
)
def test_configurations_of_dalle(tmp_path, dalle, part, change):
    tensors, config = dalle
    config = {**config, part: {**config[part], **change}}
    path = write_tokenizer(tmp_path / "d.safetensors", tensors, json.dumps(config), "dalle")
    for load in (load_tokenizer, DalleVAE.load):
        with pytest.raises(InputError, match=r"d\.safetensors is damaged or was not written by this program"):
            load(path)


@needs_dalle
@pytest.mark.parametrize("kind", ["missing", "nan", "double", "shape", "foreign"])
def test_weights_of_dalle(tmp_path, dalle, kind):
    tensors, config = dict(dalle[0]), dalle[1]
    name = "encoder.blocks.input.w"
    x = tensors.pop(name)
    damaged = {"nan": np.where(x == x.max(), np.nan, x), "double": x.astype(np.float64), "shape": x[:, :, 1:]}
    if kind in damaged:
        tensors[name] = damaged[kind]
    if kind == "foreign":
        tensors |= {name: x, "else.w": x}
    path = write_tokenizer(tmp_path / "d.safetensors", tensors, json.dumps(config), "dalle")
    with pytest.raises(InputError, match=r"d\.safetensors is damaged or was not written by this program"):
        load_tokenizer(path)


@needs_dalle
@pytest.mark.parametrize("kind", ["no modules", "a list", "claims", "stride", "integers"])
def test_hostile_pickles_of_dalle(tmp_path, kind, monkeypatch):
    """Of the right class, as torch.load gives it, with anything inside."""
    package = types.ModuleType("dall_e")  # pickling looks the classes up by name
    package.__path__ = importlib.util.find_spec("dall_e").submodule_search_locations
    encoder = tokenizer_module._dalle_module("encoder").Encoder(**ENCODER)
    match kind:
        case "no modules":
            del encoder.__dict__["_modules"]
        case "a list":
            encoder._modules = [1]
        case "claims":
            encoder.n_hid = HUGE
        case "stride":
            encoder.blocks.input.w = torch.nn.Parameter(torch.zeros(1).expand(2**40))
        case "integers":
            encoder.blocks.input.w = torch.nn.Parameter(torch.zeros(8, 3, 7, 7, dtype=torch.int64), requires_grad=False)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "dall_e", package)
        torch.save(encoder, tmp_path / "encoder.pkl")
    with pytest.raises(InputError, match=r"encoder\.pkl is not OpenAI's encoder\.pkl"):
        DalleVAE.convert(tmp_path / "encoder.pkl", tmp_path / "encoder.pkl", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


# --- stores ---------------------------------------------------------------------------------------------------------------


def edit(path, **changes):
    """Other values with a right checksum."""
    fields = json.loads(path.read_text()) | changes
    del fields["checksum"]
    write_json(path, fields)


@pytest.fixture
def store(tmp_path):
    """A store of three shards, each a video."""
    settings = StoreSettings(TokenizerInfo("patch-vq", 9, 8, "ab" * 32), fps=2.0, frame_size=16)
    writer = StoreWriter(tmp_path / "store", settings, shard_bytes=1)
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        writer.add(name, np.ones((1, 2, 2, 2), np.uint16))
    writer.close()
    finish_store(tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize(
    "shards",
    [
        ["../outside/shard-00000-00000"],
        ["/dev/zero"],
        ["shard-00000-00000/../shard-00000-00000"],
        ["shard-00000-00000\n"],
        ["shard-00000-٠٠٠٠٠"],
        ["shard-00000-00000.bin"],
        ["shard-00000-00000", 7],
        "shard-00000-00000",
        {"shard-00000-00000": 1},
    ],
    ids=short,
)
def test_shards_outside_the_folder(store, shards):
    edit(store / "store.json", shards=shards)
    with pytest.raises(InputError, match=r"store\.json is damaged.*expected names such as shard-00000-00000, without a folder"):
        TokenStore(store)


def test_a_shard_may_be_a_link_to_a_file_but_to_nothing_else(store, tmp_path):
    """Large stores are spread over disks with links."""
    shard = store / "shard-00000-00000.bin"
    shard.rename(tmp_path / "elsewhere.bin")
    shard.symlink_to(tmp_path / "elsewhere.bin")
    assert len(TokenStore(store)) == 3
    shard.unlink()
    shard.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"shard-00000-00000\.bin is missing from the store, or no regular file"):
        TokenStore(store)


def test_parts_of_a_store_that_do_not_fit_each_other(store):
    """Each with a right checksum: one of them is another store's."""
    index, first = store / "store.json", store / "shard-00000-00000.json"
    before = index.read_bytes(), first.read_bytes()
    edit(index, fps=6.0)
    with pytest.raises(InputError, match=r"shard-00000-00000\.bin does not fit store\.json, which says fps 6\.0, not 2\.0"):
        TokenStore(store, verify=False)
    edit(index, fps=2.0, shards=["shard-00000-00000", "shard-00000-00000", "shard-00000-00001"])
    with pytest.raises(InputError, match="shards name one shard twice"):
        TokenStore(store, verify=False)
    edit(index, shards=["shard-00000-00000", "shard-00000-00002"], videos=2)
    TokenStore(store)
    with pytest.raises(InputError, match=r"has shard-00000-00001 \(1 in all\), which store\.json does not list"):
        check_listed(store)
    index.write_bytes(before[0])
    check_listed(store)
    edit(first, videos=[{"name": "b.mp4", "offset": 0, "frames": 2}])
    with pytest.raises(InputError, match=r"holds the video 'b\.mp4' twice"):
        TokenStore(store, verify=False)
    first.write_bytes(before[1])
    TokenStore(store, verify=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"videos": True},
        {"videos": -3},
        {"videos": 2**70},
        {"failed": None},
        {"failed": [{"name": "x"}]},
        {"failed": [{"name": "x", "reason": 7}]},
        {"views": []},
        {"views": [{"resize": "1"}]},
        {"views": [{"resize": float("inf"), "crop": "center", "flip": False}]},
        {"fps": 0},
        {"fps": float("nan")},
        {"fps": "2"},
        {"frame_size": 2**40},
        {"frame_size": 4},
        {"frame_size": 16.0},
        {"tokenizer": {"name": "patch-vq", "vocab_size": 9, "stride": 0, "digest": "x"}},
        {"tokenizer": {"name": "patch-vq", "vocab_size": 70_000, "stride": 8, "digest": "x"}},
        {"version": True},
    ],
    ids=short,
)
def test_values_of_an_index(store, changes):
    edit(store / "store.json", **changes)
    with pytest.raises(InputError, match=r"store\.json is damaged|is a store of version True"):
        TokenStore(store)


VIDEO = {"name": "a.mp4", "offset": 0, "frames": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"videos": [VIDEO | {"frames": 2**62}]},
        {"videos": [VIDEO | {"frames": 0}, VIDEO | {"name": "z"}]},
        {"videos": [VIDEO | {"frames": 2.0}]},
        {"videos": [VIDEO | {"offset": -8}]},
        {"videos": [VIDEO | {"offset": 2**64}]},
        {"videos": [VIDEO | {"name": 7}]},
        {"videos": [VIDEO | {"file_bytes": -1}]},
        {"videos": {"name": 1}},
        {"bytes": "16"},
        {"crc32": None},
        {"crc32": -1},
        {"settings": []},
    ],
    ids=short,
)
def test_values_of_a_shards_list(store, changes):
    edit(store / "shard-00000-00000.json", **changes)
    with pytest.raises(InputError, match=r"shard-00000-00000\.json is damaged"):
        TokenStore(store)


def test_frames_whose_product_leaves_64_bits(store):
    """2⁶³ ids a frame of all views."""
    views = [{"resize": 1.0, "crop": "center", "flip": False}] * 512
    for path in (store / "store.json", *store.glob("shard-*.json")):
        settings, size = json.loads(path.read_text()).get("settings"), {"frame_size": 2**30, "views": views}
        edit(path, **({"settings": settings | size} if settings else size))
    with pytest.raises(InputError, match="the video list beside it does not fit it"):
        TokenStore(store)


def test_a_vocabulary_that_16_bits_do_not_hold():
    with pytest.raises(InputError, match="a tokenizer has 65531 codes, expected 1 to 65530"):
        TokenizerInfo("mine", 65_531, 8, "x")
    TokenizerInfo("mine", 65_530, 8, "x")
