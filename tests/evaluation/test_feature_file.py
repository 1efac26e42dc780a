"""A folder of features: the same bytes however often it was stopped, and nothing of other settings mixed in."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from refusals import tree
from runs import VOCABULARY, tiny_model, write_store
from vimpac.data.store import TokenStore
from vimpac.data.test_clips import TestClips
from vimpac.distributed import World
from vimpac.errors import InputError
from vimpac.evaluation import feature_file, features
from vimpac.evaluation.feature_file import (
    FEATURES,
    FeatureSettings,
    check_folder,
    model_digest,
    read_features,
    store_digest,
    write_features,
)
from vimpac.evaluation.features import Look, all_vectors
from vimpac.evaluation.normalise import fit_normaliser
from vimpac.files.atomic import locked
from vimpac.model import PretrainModel

ONE = World(0, 1, torch.device("cpu"))
SETTINGS = FeatureSettings("m" * 64, "s" * 64, 1, 2, 3, 2.0, 0, "fp32", "none")


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Seven chunks of the 25 videos, each a part."""
    monkeypatch.setattr(features, "CHUNK_VIDEOS", 4)
    monkeypatch.setattr(feature_file, "PART_SECONDS", 0.0)


@pytest.fixture
def model(wide):
    torch.manual_seed(0)
    return PretrainModel(tiny_model()).eval()


@pytest.fixture
def clips(store_folder):
    store = TokenStore(store_folder)
    return TestClips(store, np.arange(len(store)), 2, [0], 3, VOCABULARY + 1)


def write(out, model, clips, settings=SETTINGS, world=ONE, tick=lambda videos: None):
    return write_features(out, settings, model, clips, clips.store.names, Look(), world, tick)


def test_contents(tmp_path, model, clips):
    finished = []
    assert write(tmp_path / "out", model, clips, tick=finished.append) and sum(finished) == 25
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"features.json", "names.json", "features.safetensors"}
    found, settings = read_features(tmp_path / "out", SETTINGS)
    expected = all_vectors(model, clips, clips.store.names, Look(), ONE)
    assert settings == SETTINGS and found.keys() == expected.keys() == {"cls", "mean", "contrastive"}
    assert all(np.array_equal(found[name], x) for name, x in expected.items())
    assert json.loads((tmp_path / "out" / "names.json").read_text())["names"] == clips.store.names


@pytest.mark.parametrize("kind", ["l2", "center", "whiten"])
def test_normalised(tmp_path, model, clips, kind):
    """With what normalises further vectors."""
    write(tmp_path, model, clips, replace(SETTINGS, normalize=kind))
    found, _ = read_features(tmp_path)
    plain = all_vectors(model, clips, clips.store.names, Look(), ONE)
    for name, x in plain.items():
        fitted = fit_normaliser(x, kind)
        assert np.array_equal(found[name], fitted(x))
        if fitted.offset is not None:
            assert np.array_equal(found[f"{name}.offset"], fitted.offset)
        if fitted.matrix is not None:
            assert np.array_equal(found[f"{name}.matrix"], fitted.matrix)


def stopping(after):
    """A tick that ends the process after some chunks."""
    seen = []

    def tick(videos):
        seen.append(videos)
        if len(seen) == after:
            raise Killed

    return tick


def test_stopped_and_resumed(tmp_path, model, clips, monkeypatch):
    write(tmp_path / "whole", model, clips)
    out = tmp_path / "out"
    for after in (1, 2, 1):
        with pytest.raises(Killed):
            write(out, model, clips, tick=stopping(after))
        assert not (out / FEATURES).exists()
    assert len(list(out.glob("part-*"))) == 4
    (out / "part-0000099.safetensors.tmp").write_bytes(b"half")  # of a killed process
    finished = []
    assert write(out, model, clips, tick=finished.append) and sum(finished) == 25 - 16
    assert tree(out) == tree(tmp_path / "whole")
    model.backbone.register_forward_pre_hook(lambda *_: pytest.fail("computed again"))
    assert not write(out, model, clips) and tree(out) == tree(tmp_path / "whole")


def test_chunks_that_no_part_holds_yet_survive_an_error(tmp_path, model, clips, monkeypatch):
    """What is complete is published, even before PART_SECONDS."""
    monkeypatch.setattr(feature_file, "PART_SECONDS", 1e9)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        write(out, model, clips, tick=stopping(3))
    assert [path.name for path in out.glob("part-*")] == ["part-0000000.safetensors"]
    finished = []
    write(out, model, clips, tick=finished.append)
    assert sum(finished) == 25 - 12
    expected = all_vectors(model, clips, clips.store.names, Look(), ONE)
    assert all(np.array_equal(read_features(out)[0][name], x) for name, x in expected.items())


def test_a_video_that_overflows_is_named(tmp_path, model, clips):
    with torch.no_grad():
        model.backbone.embedding.weight[3] = torch.inf
    with pytest.raises(InputError, match=r"the cls vector of video-000\.mp4 is not finite"):
        write(tmp_path / "out", model, clips)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_any_number_of_processes(tmp_path, model, clips, monkeypatch):
    """Three ranks in turn; the first puts everything together."""
    write(tmp_path / "whole", model, clips)
    with monkeypatch.context() as patched:
        patched.setattr(feature_file, "_finish", lambda *_: None)
        for rank in range(3):
            write(tmp_path / "out", model, clips, world=World(rank, 3, ONE.device))
        assert len(list((tmp_path / "out").glob("part-*"))) == 5  # 3 of 7, 1 of the other 4, 1 of the last 3
    write(tmp_path / "out", model, clips)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model": "n" * 64}, "another model (mmmmmmmmmmmm…, now nnnnnnnnnnnn…)"),
        ({"store": "t" * 64}, "another store (ssssssssssss…, now tttttttttttt…)"),
        ({"layer": 0, "clips": 5}, "layer was 1, now 0; clips was 2, now 5"),
        ({"normalize": "center"}, "normalize was none, now center"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings(tmp_path, model, clips, change, said, finished):
    if finished:
        write(tmp_path, model, clips)
    else:
        with pytest.raises(Killed):
            write(tmp_path, model, clips, tick=stopping(2))
    before = tree(tmp_path)
    for call in (write, lambda out, *_: check_folder(out, replace(SETTINGS, **change))):
        with pytest.raises(
            InputError, match=re.escape(f"holds other features: {said}; use the same settings, or another folder")
        ):
            call(tmp_path, model, clips, replace(SETTINGS, **change))
    if finished:
        with pytest.raises(InputError, match="holds other features"):
            read_features(tmp_path, replace(SETTINGS, **change))
    assert tree(tmp_path) == before


def test_folders_of_something_else(tmp_path, model, clips):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = tree(tmp_path)
    for name, said in (("file", "is a file"), ("full", "is not empty and holds no features"), ("link", "leads nowhere")):
        with pytest.raises(InputError, match=said):
            write(tmp_path / name, model, clips)
    assert tree(tmp_path) == before


def test_in_use(tmp_path, model, clips):
    with locked(tmp_path / "out", ""), pytest.raises(InputError, match="is being written by another `vimpac features`"):
        write(tmp_path / "out", model, clips)


@pytest.mark.parametrize("name", ["part-0000001.safetensors", "features.json"])
def test_damage_before_the_end(tmp_path, model, clips, name):
    with pytest.raises(Killed):
        write(tmp_path, model, clips, tick=stopping(3))
    data = bytearray((tmp_path / name).read_bytes())
    data[-40] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=f"cannot read .*{name}: it(s| is)"):
        write(tmp_path, model, clips)


def test_damage_after_the_end(tmp_path, model, clips):
    write(tmp_path, model, clips)
    data = bytearray((tmp_path / FEATURES).read_bytes())
    data[-40] ^= 1
    (tmp_path / FEATURES).write_bytes(data)
    with pytest.raises(InputError, match=r"it is damaged, its checksum is .*; remove it and write the features again"):
        read_features(tmp_path)


def test_digests(tmp_path, model, store_folder):
    digest = model_digest(model)
    again = PretrainModel(model.config)
    again.load_state_dict(model.state_dict())
    assert model_digest(again) == digest
    with torch.no_grad():
        again.backbone.cls[0] += 1e-6
    assert model_digest(again) != digest
    first = store_digest(TokenStore(store_folder))
    assert store_digest(TokenStore(write_store(tmp_path / "same"))) == first
    assert store_digest(TokenStore(write_store(tmp_path / "shorter", frames=(3, 4, 5, 6, 8) * 5))) != first
    assert store_digest(TokenStore(write_store(tmp_path / "other", digest="e" * 64))) != first
