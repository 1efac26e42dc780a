"""Files of an earlier version, which have no checksum of themselves, in tests/old: they open, and a run goes on."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import torch

from vimpac import weights
from vimpac.checkpoint import list_checkpoints, load_checkpoint
from vimpac.commands import main as cli
from vimpac.config import PretrainConfig
from vimpac.data.format import StoreSettings, TokenizerInfo
from vimpac.data.store import StoreWriter, TokenStore, finish_store
from vimpac.data.tokenizers import check_tokenizer_file, load_tokenizer
from vimpac.files.checked import typed
from vimpac.training.pretrain import pretrain

OLD = Path(__file__).parent / "old"


def test_a_store(capsys):
    store = TokenStore(OLD / "store")
    assert store.names == [f"video-{i}.mp4" for i in range(5)] and store.frames.tolist() == [3, 4, 5, 6, 9]
    assert store.failed == {"bad.avi": "is an empty file"} and store.tokenizer.vocab_size == 11
    rng = np.random.default_rng(0)
    rng.integers(0, 256, (11, 192), dtype=np.uint8)  # the codebook, drawn before the ids
    for video, frames in enumerate(store.frames):
        np.testing.assert_array_equal(store.read(video), rng.integers(0, 11, (1, frames, 2, 2))[0])
    check_tokenizer_file(OLD / "store", store.tokenizer)
    np.testing.assert_array_equal(
        load_tokenizer(OLD / "store").codebook, np.random.default_rng(0).integers(0, 256, (11, 192), dtype=np.uint8)
    )
    assert cli.main(["verify", str(OLD / "store")]) == 0 and "5 videos" not in capsys.readouterr().err


def test_a_store_grows(tmp_path):
    """Its own lists stay, those that are added have a checksum; then store.json has one."""
    folder = shutil.copytree(OLD / "store", tmp_path / "store")
    fields = json.loads((folder / "store.json").read_text())
    writer = StoreWriter(folder, StoreSettings(TokenizerInfo(**fields["tokenizer"]), 2.0, 16))
    writer.add("new.mp4", np.zeros((1, 3, 2, 2), np.uint16))
    writer.close()
    finish_store(folder)
    assert TokenStore(folder).names == ["new.mp4", *fields_names()]
    assert ["checksum" in json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))] == [False, False, True, True]


def fields_names():
    return [f"video-{i}.mp4" for i in range(5)]


def test_a_model_and_a_checkpoint():
    model = weights.load(OLD / "run" / "model.safetensors")
    state = load_checkpoint(OLD / "run" / "checkpoints" / "step-00000002.pt")
    assert state["step"] == 2 and model.state_dict().keys() == state["model"].keys()
    assert dataclasses.asdict(model.config) == state["config"]["model"]
    moved = [(x - state["model"][name]).abs().max() for name, x in model.named_parameters()]
    assert 0 < max(moved) < 0.02  # by one update at a learning rate of 0.01


def test_a_run_goes_on(tmp_path, monkeypatch, one_thread):
    """As it went then, to the rounding of another machine."""
    monkeypatch.setattr("vimpac.figures.curves.plot_curves", lambda *paths: None)
    run = shutil.copytree(OLD / "run", tmp_path / "run")
    config = typed(PretrainConfig, json.loads((run / "config.json").read_text())["config"])
    pretrain(dataclasses.replace(config, data=str(OLD / "store"), output=str(run), resume=True))
    assert [path.stem for path in list_checkpoints(run)] == ["step-00000002", "step-00000003"]
    now, then = (weights.load(path / "run" / "model.safetensors").state_dict() for path in (tmp_path, OLD))
    for name, x in now.items():  # float32 sums of a few terms in another order
        torch.testing.assert_close(x, then[name], rtol=1e-4, atol=1e-5)
