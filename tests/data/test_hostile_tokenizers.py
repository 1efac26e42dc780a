"""Hostile tokenizers: whatever a file claims, loading gives one InputError, before memory is allocated for it."""

import importlib.util
import json
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays

from vimpac.data.dalle import DalleVAE, openai_module
from vimpac.data.patch_vq import PatchVQ
from vimpac.data.tokenizers import load_tokenizer
from vimpac.errors import InputError
from vimpac.files.tensorfile import UNSEALED, seal

HUGE = 2**30


def short(value):
    return str(value)[:40]


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
        module = getattr(openai_module(part), part.capitalize())(**arguments)
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
    with pytest.raises(InputError, match=r"d\.safetensors is damaged or was not written by this program"):
        load_tokenizer(path)


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
    encoder = openai_module("encoder").Encoder(**ENCODER)
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
