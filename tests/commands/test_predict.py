"""`vimpac predict`: from video files to the scores that `vimpac evaluate` gives to their tokens; what cannot be read."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from test_store_commands import SHOWN, STEERING, is_harmless

from films import greys, noise, write_video
from labelled_stores import CLASSES, CODES, classifier
from refusals import tree
from runs import tiny_config
from vimpac import weights
from vimpac.commands import main as cli
from vimpac.data.format import TOKENIZER
from vimpac.data.store import TokenStore
from vimpac.data.tokenizers import load_tokenizer
from vimpac.model import PretrainModel


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with videos, their store with test views, and a run with a model of its tokenizer."""
    folder = tmp_path_factory.mktemp("predict")
    (folder / "videos").mkdir()
    write_video(folder / "videos" / "a.mp4", noise(60), codec="mpeg4")
    write_video(folder / "videos" / "b.avi", greys(40), codec="mpeg4")
    write_video(folder / "videos" / "short.mkv", noise(8), codec="mpeg4")  # 2 frames: shorter than a clip
    words = ["tokenize", str(folder / "videos"), str(folder / "store"), "--frame-size", "32", "--codes", str(CODES)]
    assert cli.main([*words, "--views", "test", "--fps", "5"]) == 0
    (folder / "run").mkdir()
    shutil.copy(folder / "store" / TOKENIZER, folder / "run" / TOKENIZER)
    tokenizer = dataclasses.asdict(TokenStore(folder / "store").tokenizer)
    assert tokenizer["vocab_size"] == CODES
    weights.save(classifier(), folder / "run" / "model.safetensors", tokenizer, 5.0, CLASSES)
    (folder / "l.csv").write_text("video,label\na.mp4,run\nb.avi,sit\nshort.mkv,walk\n")
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def predict(capsys, *words, status=0):
    capsys.readouterr()
    assert cli.main(["predict", *map(str, words)]) == status
    return capsys.readouterr()


def objects(captured):
    return [json.loads(line) for line in captured.out.splitlines()]


@pytest.mark.parametrize("words", ["", "--clips 1", "--clips 2 --views center --frames 4 --batch 1"])
def test_scores_are_those_of_the_videos_tokens(folder, capsys, words):
    options = words.split()
    evaluation = ["evaluate", "run", "store", "--labels", "l.csv", "--allow-empty-classes", "--output", "out"]
    assert cli.main([*evaluation, *options]) == 0
    rows = {row["video"]: row for row in parquet.read_table("out/scores.parquet").to_pylist()}
    found = objects(predict(capsys, "run", "videos/short.mkv", "videos/a.mp4", "videos/b.avi", "--json", *options))
    assert [x["video"] for x in found] == ["videos/short.mkv", "videos/a.mp4", "videos/b.avi"]  # in the order given
    for x in found:
        row = rows[x["video"].removeprefix("videos/")]
        listed = {y["class"]: y["probability"] for y in x["classes"]}
        assert listed == pytest.approx({name: row[f"score_{name}"] for name in CLASSES}, abs=2e-6)  # float32 of other batches
        assert list(listed.values()) == sorted(listed.values(), reverse=True)
    assert len({x["classes"][0]["probability"] for x in found}) == 3


def test_what_is_printed(folder, capsys):
    captured = predict(capsys, "run", "videos/a.mp4", "--top", "2")
    name, *lines = captured.out.splitlines()
    found = objects(predict(capsys, "run", "videos/a.mp4", "--json"))[0]["classes"]
    assert name == "videos/a.mp4" and lines == [f"  {x['probability']:.4f}  {x['class']}" for x in found[:2]]
    assert not captured.err and len(found) == 4


def test_a_broken_video_does_not_stop_the_others(folder, capsys):
    Path("empty.mp4").touch()
    Path("text.mp4").write_text("no video" * 100)
    words = ["run", "missing.mp4", "videos/a.mp4", "empty.mp4", "text.mp4", "videos/b.avi"]
    captured = predict(capsys, *words, status=1)
    names = [line for line in captured.out.splitlines() if not line.startswith(" ")]
    assert [name.partition(":")[0] for name in names] == words[1:]
    assert names[0] == "missing.mp4: cannot be decoded: No such file or directory" and names[2] == "empty.mp4: is an empty file"
    assert captured.err == "vimpac predict: error: 3 of 5 videos could not be classified, such as missing.mp4\n"
    found = objects(predict(capsys, *words, "--json", status=1))
    assert [set(x) for x in found] == [{"video", "error" if i in (0, 2, 3) else "classes"} for i in range(5)]


def test_a_folder_and_the_same_video_twice(folder, capsys):
    found = objects(predict(capsys, "run", "videos", "videos/b.avi", "--json", "--clips", "1"))
    assert [x["video"] for x in found] == ["videos/a.mp4", "videos/b.avi", "videos/short.mkv"]


def test_a_folder_without_videos_does_not_stop_the_others(folder, capsys):
    Path("empty").mkdir()
    captured = predict(capsys, "run", "empty", "videos/a.mp4", "--clips", "1", status=1)
    lines = captured.out.splitlines()
    assert lines[0].startswith("empty: holds no video file; expected files that end in") and lines[1] == "videos/a.mp4"
    assert captured.err == "vimpac predict: error: 1 of 2 videos could not be classified, such as empty\n"


def test_names_that_are_no_text_or_steer_the_terminal(folder, capsysbinary):
    shutil.copy("videos/a.mp4", f"{STEERING}.mp4")
    shutil.copy("videos/a.mp4", b"\xff.mp4")
    for words in ([], ["--json"]):
        assert cli.main(["predict", "run", f"{STEERING}.mp4", "\udcff.mp4", "--clips", "1", *words]) == 0
        out = capsysbinary.readouterr().out.decode()
        assert is_harmless(out) and (r"\udcff.mp4" in out)
        assert f"{SHOWN}.mp4" in out or words


def test_names_of_classes_are_optional(folder, capsys):
    trained = weights.load_trained("run")
    weights.save(trained.model, "run/model.safetensors")
    found = objects(predict(capsys, "run", "videos/a.mp4", "--json", "--fps", "5"))[0]["classes"]
    assert {x["class"] for x in found} == {f"class {i}" for i in range(4)}
    error = predict(capsys, "run", "videos/a.mp4", status=1).err
    assert error == (
        "vimpac predict: error: run/model.safetensors does not say its frame rate: give --fps, a positive number of frames a "
        "second, such as 2\n"
    )


def test_the_tokenizer_of_a_store(folder, capsys):
    expected = predict(capsys, "run", "videos/a.mp4").out
    Path("run", TOKENIZER).unlink()
    error = predict(capsys, "run", "videos/a.mp4", status=1).err
    assert f"run/{TOKENIZER} does not exist: give --tokenizer-path" in error and error.count("\n") == 1
    for path in ("store", f"store/{TOKENIZER}"):
        assert predict(capsys, "run", "videos/a.mp4", "--tokenizer-path", path).out == expected


def test_scores_that_are_nan(folder, capsys, monkeypatch):
    from vimpac.evaluation import predict as module

    monkeypatch.setattr(module, "clip_scores", lambda *call: torch.full((1, 10, 4), torch.nan))
    captured = predict(capsys, "run", "videos/a.mp4", status=1)
    assert captured.out.startswith("videos/a.mp4: has scores that are not finite numbers (NaN)")


def test_a_tokenizer_that_runs_on_a_gpu(folder, monkeypatch):
    """Then this process encodes, and the workers only decode: the same scores."""
    from vimpac.evaluation import predict as module

    trained, tokenizer = weights.load_trained("run"), load_tokenizer("store")
    views = TokenStore("store").views

    class OnGPU:
        device = torch.device("cuda")
        stride, encode = tokenizer.stride, staticmethod(tokenizer.encode)

    monkeypatch.setattr(module, "DalleVAE", OnGPU)
    given = (Path("store"), 5.0, views, 2, 8)
    results = [dict(module.Predictor(trained.model, x, *given).predict(["videos/a.mp4"], 1, 60)) for x in (tokenizer, OnGPU())]
    assert np.array_equal(*(x["videos/a.mp4"] for x in results))


@pytest.mark.parametrize(
    "words, said",
    [
        ("missing videos/a.mp4", "cannot read model missing"),
        ("run", "no video is given, expected video files or folders"),
        (
            "pretrained videos/a.mp4",
            "pretrained/model.safetensors is a pre-trained model, which knows no classes: fine-tune it",
        ),
        ("run videos/a.mp4 --top 0", "top must be at least 1, got 0"),
        ("run videos/a.mp4 --clips 0", "clips must be at least 1, got 0"),
        ("run videos/a.mp4 --frames 0", "frames must be at least 1, got 0"),
        ("run videos/a.mp4 --workers 0", "workers must be at least 1, got 0"),
        ("run videos/a.mp4 --fps -2", "fps must be a positive number, got -2.0"),
        ("run videos/a.mp4 --tokenizer-path videos", f"videos/{TOKENIZER} does not exist; expected a tokenizer's"),
        ("run videos/a.mp4 --tokenizer-path other", "run/model.safetensors was trained on tokenizer patch-vq"),
        ("unnamed videos/a.mp4 --fps 2 --tokenizer-path other", "has a vocabulary of 11 codes, other holds a tokenizer of 7"),
        ("wide videos/a.mp4 --fps 2", "wide/model.safetensors takes frames of 4×2 tokens, expected a square"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, words, said):
    for name in ("pretrained", "unnamed", "wide", "other"):
        Path(name).mkdir()
    weights.save(PretrainModel(tiny_config().model), "pretrained/model.safetensors")
    weights.save(classifier(), "unnamed/model.safetensors")
    weights.save(classifier(grid=(3, 4, 2)), "wide/model.safetensors")
    other = load_tokenizer("store")
    type(other)(other.codebook[:7]).save(Path("other", TOKENIZER))
    before = tree(folder)
    captured = predict(capsys, *words.split(), status=1)
    assert captured.err.startswith("vimpac predict: error: ") and captured.err.count("\n") == 1 and not captured.out
    assert said in captured.err and tree(folder) == before
