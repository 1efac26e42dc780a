"""`vimpac import-checkpoint`: what it prints, writes and refuses."""

import dataclasses
import pickle

import pytest
import torch

from snapshots import RunsCode, drawn, outputs, released
from vimpac import weights
from vimpac.commands import main as cli
from vimpac.config import ModelConfig
from vimpac.model import ClassificationModel, PretrainModel

CONFIG = ModelConfig(
    layers=1, width=64, attention_width=32, heads=2, mlp_width=128, layout="T,H,W", grid=(2, 3, 4), norm="pre", vocab_size=20,
    head_layers=1, head_out=4,
)  # fmt: skip


@pytest.fixture
def snapshot(tmp_path):
    """(the model of a snapshot, its folder)"""
    (tmp_path / "snapshot").mkdir()
    model = drawn(ClassificationModel(CONFIG, 5))
    torch.save(released(model), tmp_path / "snapshot" / "classifier.pt")
    (tmp_path / "snapshot" / "args.pickle").write_bytes(pickle.dumps(RunsCode(tmp_path / "proof")))
    return model, tmp_path / "snapshot"


@pytest.mark.parametrize("out, written", [("out", "out/model.safetensors"), ("m.safetensors", "m.safetensors")])
def test_writes_a_model_that_loads(snapshot, tmp_path, capsys, out, written):
    model, folder = snapshot
    assert cli.main(["import-checkpoint", str(folder), str(tmp_path / out), "--heads", "2"]) == 0
    loaded = weights.load(tmp_path / written)
    tokens = torch.randint(20, (2, 2, 3, 4))
    assert all(map(torch.equal, outputs(loaded, tokens), outputs(model, tokens)))
    assert not (tmp_path / "proof").exists()
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}/classifier.pt: a fine-tuned snapshot, 5 classes",
        "  size        1 layer, width 64, attention 32, MLP 128",
        "  heads       2, each 16 wide",
        "  layout      T,H,W, assumed from the number of axes in each block (--layout)",
        "  norm        pre",
        "  grid        2 × 3 × 4: 2 frames of 24 × 32 pixels",
        "  vocabulary  20 codes, and 5 special ids, the table's last rows",
        f"wrote {tmp_path / written}",
    ]


def test_says_what_it_assumed_and_cut(tmp_path, capsys):
    model = PretrainModel(dataclasses.replace(ModelConfig.small(), layers=6, vocab_size=20, head_width=8, grid=(1, 1, 1)))
    torch.save(released(model), tmp_path / "x.pt")
    words = ["import-checkpoint", str(tmp_path / "x.pt"), str(tmp_path / "out"), "--vocab-size", "9", "--layout", "T,H|W"]
    assert cli.main(words) == 0
    output = capsys.readouterr().out
    for line in (
        f"{tmp_path}/x.pt: a pre-trained snapshot",
        "  size        6 layers, width 512, attention 512, MLP 2048, Small",
        "  heads       8, each 64 wide, assumed as in the presets (--heads)",
        "  layout      T,H|W",
        "  vocabulary  9 codes, the first of 20, and 5 special ids, the table's last rows",
    ):
        assert f"{line}\n" in output
    assert weights.load(tmp_path / "out" / "model.safetensors").config.vocab_size == 9


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_an_existing_out(snapshot, tmp_path, capsys, kind):
    out = tmp_path / "out"
    match kind:
        case "folder":
            out.mkdir()
        case "file":
            out.write_text("mine")
        case "link":
            out.symlink_to("nowhere")
    assert cli.main(["import-checkpoint", str(snapshot[1]), str(out)]) == 1
    said = f"vimpac import-checkpoint: error: {out} exists, expected a new folder or file: choose another, or remove it\n"
    assert capsys.readouterr().err == said
    assert kind != "file" or out.read_text() == "mine"


def test_a_refused_snapshot_leaves_no_out(snapshot, tmp_path, capsys):
    words = ["import-checkpoint", str(snapshot[1]), str(tmp_path / "out")]
    for more in (["--heads", "3"], ["--layout", "T"], ["--vocab-size", "21"]):
        assert cli.main([*words, *more]) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("vimpac import-checkpoint: error: ") and captured.err.count("\n") == 1
        assert "classifier.pt" in captured.err and not captured.out
        assert not (tmp_path / "out").exists()
