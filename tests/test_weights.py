"""Weights in and out."""

import dataclasses
import errno
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from runs import files_of_at_most
from snapshots import released
from vimpac import weights
from vimpac.checkpoint import list_checkpoints
from vimpac.config import ModelConfig
from vimpac.errors import InputError
from vimpac.model import ClassificationModel, PretrainModel
from vimpac.released import ResampledPositionsWarning, from_authors, released_statistics

CONFIG = ModelConfig(layers=1, width=16, heads=2, grid=(2, 4, 4), head_layers=3, head_width=8, head_out=4, vocab_size=20)
TOKENIZER = {"name": "patch-vq", "vocab_size": 20, "stride": 8, "digest": "a" * 64}


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
    with pytest.warns(
        ResampledPositionsWarning,
        match=r"for a grid of 2×4×4, they were interpolated to 2×8×4; ModelConfig\(grid=\(2, 4, 4\)\) loads",
    ):
        larger = from_authors(released(model), dataclasses.replace(CONFIG, grid=(2, 8, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_authors(released(model), CONFIG)
    assert larger.backbone.positions.height.shape == (8, 16)
    assert_close(larger.backbone.positions.width, model.backbone.positions.width)


def test_an_empty_checkpoint():
    with pytest.raises(InputError, match=r"layers=1, layout='T,H.W' and head_layers=3 has at least 5 tensors, got 0"):
        from_authors({}, CONFIG)


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
    weights.save(model, tmp_path / "model.safetensors", TOKENIZER)
    again = weights.load(tmp_path / "model.safetensors", tokenizer_digest=TOKENIZER["digest"])
    assert type(again) is type(model) and again.config == model.config and not again.training
    for name, x in model.state_dict().items():
        assert_close(again.state_dict()[name], x, rtol=0, atol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_load_a_checkpoint(finished_run):
    """Of a run that may not have ended: the same as the model of the one that has."""
    path = list_checkpoints(finished_run)[-1]
    model, same = weights.load(path, tokenizer_digest="d" * 64), weights.load(finished_run / "model.safetensors")
    assert type(model) is PretrainModel and model.config == same.config and not model.training
    for name, x in same.state_dict().items():
        assert_close(model.state_dict()[name], x, rtol=0, atol=0)
    assert weights.load(path, grid=(4, 8, 8)).config.grid == (4, 8, 8)
    with pytest.raises(InputError, match="tokenizer dddddddddddd"):
        weights.load(path, tokenizer_digest="b" * 64)


def test_load_at_another_grid(tmp_path):
    model = PretrainModel(CONFIG)
    weights.save(model, tmp_path / "m.safetensors")
    larger = weights.load(tmp_path / "m.safetensors", grid=(4, 4, 8))
    assert larger.config.grid == (4, 4, 8)
    assert larger.backbone(torch.zeros(1, 4, 4, 8, dtype=torch.int64))[1].shape == (1, 4, 4, 8, 16)


def test_bad_files(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(InputError, match=r"cannot read model .*m.safetensors"):
        weights.load(path)
    with pytest.raises(InputError, match=r"cannot read checkpoint .*m.pt"):
        weights.load(path.with_suffix(".pt"))
    weights.save(PretrainModel(CONFIG), path, TOKENIZER)
    with pytest.raises(InputError, match="tokenizer aaaaaaaaaaaa"):
        weights.load(path, tokenizer_digest="b" * 64)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot read model"):
        weights.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="not a model of this program"):
        weights.load(path)
    save_file({"x": torch.zeros(1)}, path, {"format": "vimpac-model", "version": "9"})
    with pytest.raises(InputError, match="version '9', expected 'vimpac-model' version 1"):
        weights.load(path)


@pytest.mark.parametrize("size", [0, 1000, 9000])
def test_a_full_disk_is_an_os_error(tmp_path, size):
    path = tmp_path / "m.safetensors"
    weights.save(PretrainModel(CONFIG), path, TOKENIZER)
    before = path.read_bytes()
    with files_of_at_most(size), pytest.raises(OSError) as error:
        weights.save(PretrainModel(CONFIG), path, TOKENIZER)
    assert error.value.errno == errno.EFBIG and error.value.filename == str(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_decoder_is_not_stored_twice(tmp_path):
    weights.save(PretrainModel(CONFIG), tmp_path / "m.safetensors")
    names = load_file(tmp_path / "m.safetensors")
    assert not any("decoder" in name for name in names)


# --- damaged state dicts --------------------------------------------------------------------------------------------------


def tensor_like(x, kind, rng):
    """Something else in the place of x."""
    match kind:
        case "shape":
            return torch.zeros([int(n) for n in rng.integers(0, 5, rng.integers(0, 4))])
        case "transposed":
            return x.movedim(0, -1)
        case "larger":
            return torch.cat([x[None], x[None]]) if x.ndim == 0 else torch.cat([x, x])
        case "empty":
            return x.flatten()[:0]
        case "scalar":
            return torch.tensor(1.0)
        case "integers":
            return (100 * x).long()
        case "floats":
            return x.float() + 0.5
        case "complex":
            return x.to(torch.complex64)
        case "boolean":
            return x > 0
        case "float8":
            return x.to(torch.float8_e5m2)
        case "quantised":
            return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)
        case "sparse":
            return torch.eye(4).to_sparse()
        case "nested":
            return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
        case "meta":
            return x.to("meta")
        case "huge":
            return torch.zeros(1).expand(2**40)
        case "huge of the right rank":
            return torch.zeros(1).expand(2**20, *x.shape[1:]) if x.ndim else torch.zeros(()).expand(2**30)
        case "nan" | "infinite":
            damaged = x.float().flatten().clone()
            damaged[rng.integers(len(damaged))] = float("nan" if kind == "nan" else "inf")
            return damaged.reshape(x.shape)
        case "subclass":
            return x.as_subclass(Subclass)
        case "array":
            return x.numpy()
        case "list":
            return x.tolist()
        case "text":
            return "weights"
        case "none":
            return None
        case "dictionary":
            return {"weight": x}


class Subclass(torch.Tensor):
    pass


KINDS = (
    *("shape", "transposed", "larger", "empty", "scalar", "integers", "floats", "complex", "boolean", "float8", "quantised"),
    *("sparse", "nested", "meta", "huge", "huge of the right rank", "nan", "infinite", "subclass", "array", "list", "text"),
    *("none", "dictionary"),
)


@pytest.mark.filterwarnings("ignore:.*(prototype|deprecated|quantiz)")
@pytest.mark.parametrize("make", [PretrainModel, lambda config: ClassificationModel(config, 5)])
def test_damaged_state_dicts(make):
    """One tensor after the other in the place of which something else stands: an InputError, or the values that it has."""
    model = make(CONFIG)
    whole, rng = released(model), np.random.default_rng(0)
    if isinstance(model, PretrainModel):
        whole |= {theirs: model.state_dict()[ours] for ours, (theirs,) in released_statistics(model).items()}
        whole |= {"mlm_head.decoder.weight": model.token_head.decoder.detach()}
    refused = 0
    for name in whole:
        for kind in rng.choice(KINDS, 6, replace=False):
            damaged = {**whole, name: tensor_like(whole[name], kind, rng)}
            try:
                again = from_authors(damaged, CONFIG)
            except InputError:
                refused += 1
            else:
                harmless = (whole[name].shape == damaged[name].shape, "position" in name, "num_batches" in name)
                assert any(harmless), f"{name} {kind}"
                assert all(x.isfinite().all() for x in again.state_dict().values()), f"{name} {kind}"
    assert refused > 4 * len(whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: list(state),
        lambda state: None,
        lambda state: {"state_dict": state},
        lambda state: {},
        lambda state: {**state, 7: torch.zeros(1)},
        lambda state: {**state, "module.backbone.embedding.weight": torch.zeros(25, 16)},
        lambda state: {**state, "cls_fc.bias": torch.zeros(3)},
        lambda state: {**state, "cls_fc.bias": torch.zeros(1).expand(2**40)},
        lambda state: {**state, "cls_fc.bias": torch.zeros(0), "cls_fc.weight": torch.zeros(0, 16)},
        lambda state: {**state, "cls_fc.bias": torch.tensor(1.0), "cls_fc.weight": torch.zeros(1, 16)},
        lambda state: dict.fromkeys(state, 7),
        lambda state: dict.fromkeys(state, torch.zeros(16)),
        lambda state: dict(zip(state, reversed(state.values()), strict=True)),
    ],
)
def test_what_is_no_state_dict(change):
    with pytest.raises(InputError):
        from_authors(change(released(PretrainModel(CONFIG))), CONFIG)


def test_parts_of_a_projection_are_not_exchanged_for_their_sum():
    """Query and key together have the right number of rows; each by itself has not."""
    state = released(PretrainModel(CONFIG))
    prefix = "backbone.transformer.resblocks.0.attention_blocks.0.attentions.0.attention"
    state[f"{prefix}.query.weight"], state[f"{prefix}.key.weight"] = torch.ones(12, 16), torch.ones(20, 16)
    with pytest.raises(InputError, match=r"query\.weight has a size mismatch: \(12, 16\) instead of \(16, 16\)"):
        from_authors(state, CONFIG)


def test_a_loaded_model_trains_and_stands_apart_from_its_file(tmp_path):
    weights.save(PretrainModel(CONFIG), tmp_path / "m.safetensors")
    model = weights.load(tmp_path / "m.safetensors")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with open(tmp_path / "m.safetensors", "r+b") as file:
        file.seek(-400, 2)
        file.write(bytes(400))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(type(p) is torch.nn.Parameter and p.requires_grad and p.is_contiguous() for p in model.parameters())
    model.backbone(torch.zeros(1, 2, 4, 4, dtype=torch.int64))[0].sum().backward()
    assert model.backbone.cls.grad is not None
