"""Weights in and out."""

import dataclasses
import errno

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from runs import files_of_at_most
from vimpac import convert
from vimpac.config import ModelConfig
from vimpac.convert import from_authors, released_names, released_statistics
from vimpac.errors import InputError
from vimpac.model import ClassificationModel, PretrainModel
from vimpac.training.checkpoint import list_checkpoints

CONFIG = ModelConfig(layers=1, width=16, heads=2, grid=(2, 4, 4), head_layers=3, head_width=8, head_out=4, vocab_size=20)
TOKENIZER = {"name": "patch-vq", "vocab_size": 20, "stride": 8, "digest": "a" * 64}


def released(model):
    """A state dict under the released names that `from_authors` should turn into this model."""
    state = {}
    for ours, parts in released_names(model).items():
        for part, x in zip(parts, model.state_dict()[ours].chunk(len(parts)), strict=True):
            state[part] = x.clone()
    state["backbone.positional_embedding.cls_pos_embedding"].unsqueeze_(0)
    return state


@pytest.mark.parametrize("layout", ["T,H|W", "T,H,W", "TxHxW", "T|HxW"])
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_names_round_trip(layout, norm, prefix):
    model = PretrainModel(dataclasses.replace(CONFIG, layout=layout, norm=norm))
    again = from_authors({prefix + name: x for name, x in released(model).items()}, model.config)
    assert not again.training  # or dropout would make its features random
    for name, x in model.state_dict().items():
        assert_close(again.state_dict()[name], x, rtol=0, atol=0)


def test_fine_tuned_checkpoint_becomes_a_classifier():
    model = ClassificationModel(CONFIG, classes=7)
    torch.nn.init.normal_(model.classifier.weight)
    again = from_authors(released(model), CONFIG)
    assert isinstance(again, ClassificationModel)
    tokens = torch.randint(20, (2, 2, 4, 4))
    assert_close(again(tokens), model.eval()(tokens), rtol=0, atol=0)


def test_tied_decoder_in_the_checkpoint_is_accepted():
    model = PretrainModel(CONFIG)
    state = released(model) | {
        "mlm_head.decoder.weight": model.token_head.decoder,
        "mlm_head.decoder.bias": model.token_head.bias,
    }
    from_authors(state, CONFIG)


@pytest.mark.parametrize("lacks", [(), ("num_batches_tracked",), ("running_mean", "running_var", "num_batches_tracked")])
def test_statistics_of_batch_norm_are_taken_where_they_are(lacks):
    """A module's state dict holds them (the count since PyTorch 0.4.1), a list of its parameters does not."""
    model, fresh = PretrainModel(CONFIG), PretrainModel(CONFIG).state_dict()
    state = released(model)
    for ours, (theirs,) in released_statistics(model).items():
        kept = model.state_dict()[ours]
        kept.fill_(3) if kept.ndim == 0 else kept.uniform_(1, 2)
        if not theirs.endswith(lacks):
            state[theirs] = kept.clone()
    again = from_authors(state, CONFIG).state_dict()
    for name, x in model.state_dict().items():
        assert_close(again[name], fresh[name] if lacks and name.endswith(lacks) else x, rtol=0, atol=0)


def test_released_positions_of_another_grid_are_interpolated():
    model = PretrainModel(CONFIG)
    larger = from_authors(released(model), dataclasses.replace(CONFIG, grid=(2, 8, 4)))
    assert larger.backbone.positions.height.shape == (8, 16)
    assert_close(larger.backbone.positions.width, model.backbone.positions.width)


def test_checkpoint_that_does_not_fit():
    state = released(PretrainModel(CONFIG))
    with pytest.raises(InputError, match=r"missing \['backbone.transformer.resblocks.1"):
        from_authors(state, dataclasses.replace(CONFIG, layers=2))
    with pytest.raises(InputError, match="unexpected"):
        from_authors(state | {"surprise": torch.zeros(1)}, CONFIG)
    with pytest.raises(InputError, match=r"\(16, 16\) instead of \(8, 16\)|does not fit the config"):
        from_authors(state, dataclasses.replace(CONFIG, attention_width=8))


@pytest.mark.parametrize("make", [PretrainModel, lambda config: ClassificationModel(config, 5)])
def test_save_and_load(tmp_path, make):
    model = make(CONFIG)
    convert.save(model, tmp_path / "model.safetensors", TOKENIZER)
    again = convert.load(tmp_path / "model.safetensors", tokenizer_digest=TOKENIZER["digest"])
    assert type(again) is type(model) and again.config == model.config and not again.training
    for name, x in model.state_dict().items():
        assert_close(again.state_dict()[name], x, rtol=0, atol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_load_a_checkpoint(finished_run):
    """Of a run that may not have ended: the same as the model of the one that has."""
    path = list_checkpoints(finished_run)[-1]
    model, same = convert.load(path, tokenizer_digest="d" * 64), convert.load(finished_run / "model.safetensors")
    assert type(model) is PretrainModel and model.config == same.config and not model.training
    for name, x in same.state_dict().items():
        assert_close(model.state_dict()[name], x, rtol=0, atol=0)
    assert convert.load(path, grid=(4, 8, 8)).config.grid == (4, 8, 8)
    with pytest.raises(InputError, match="tokenizer dddddddddddd"):
        convert.load(path, tokenizer_digest="b" * 64)


def test_load_at_another_grid(tmp_path):
    model = PretrainModel(CONFIG)
    convert.save(model, tmp_path / "m.safetensors")
    larger = convert.load(tmp_path / "m.safetensors", grid=(4, 4, 8))
    assert larger.config.grid == (4, 4, 8)
    assert larger.backbone(torch.zeros(1, 4, 4, 8, dtype=torch.int64))[1].shape == (1, 4, 4, 8, 16)


def test_bad_files(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(InputError, match=r"cannot read model .*m.safetensors"):
        convert.load(path)
    with pytest.raises(InputError, match=r"cannot read checkpoint .*m.pt"):
        convert.load(path.with_suffix(".pt"))
    convert.save(PretrainModel(CONFIG), path, TOKENIZER)
    with pytest.raises(InputError, match="tokenizer aaaaaaaaaaaa"):
        convert.load(path, tokenizer_digest="b" * 64)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot read model"):
        convert.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="not a model of this program"):
        convert.load(path)
    save_file({"x": torch.zeros(1)}, path, {"format": "vimpac-model", "version": "9"})
    with pytest.raises(InputError, match="version '9', expected 'vimpac-model' version 1"):
        convert.load(path)


@pytest.mark.parametrize("size", [0, 1000, 9000])
def test_a_full_disk_is_an_os_error(tmp_path, size):
    path = tmp_path / "m.safetensors"
    convert.save(PretrainModel(CONFIG), path, TOKENIZER)
    before = path.read_bytes()
    with files_of_at_most(size), pytest.raises(OSError) as error:
        convert.save(PretrainModel(CONFIG), path, TOKENIZER)
    assert error.value.errno == errno.EFBIG and error.value.filename == str(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_decoder_is_not_stored_twice(tmp_path):
    convert.save(PretrainModel(CONFIG), tmp_path / "m.safetensors")
    names = load_file(tmp_path / "m.safetensors")
    assert not any("decoder" in name for name in names)
