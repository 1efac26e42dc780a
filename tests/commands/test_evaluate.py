"""`vimpac evaluate`: its numbers and files, one and three processes, mistakes in one line."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from labelled import tuning, write_labelled
from labelled_stores import CLASSES, CODES, classifier, run_command, save_run
from labelled_stores import labelled as labelled  # a fixture
from refusals import tree
from runs import tiny_config, write_store
from vimpac import weights
from vimpac.commands import main as cli
from vimpac.data.store import TokenStore
from vimpac.model import PretrainModel

WORDS = ["evaluate", "run", "store", "--labels", "store.csv"]
NAMES = [f"v{i:02d}.mp4" for i in range(0, 14, 2)]  # of the split test
FILES = {"evaluation.json", "confusion.csv", "confusion.png", "scores.parquet", "mistakes.png"}


def evaluate(capsys, *words):
    status = cli.main([*WORDS, *words])
    captured = capsys.readouterr()
    assert status == 0 and not captured.err, captured.err
    return captured.out


def found(folder="run/evaluation-test"):
    return json.loads((Path(folder) / "evaluation.json").read_text())


def table(path="run/evaluation-test/scores.parquet"):
    rows = parquet.read_table(path).to_pylist()
    scores = np.array([[row[f"score_{name}"] for name in CLASSES] for row in rows], np.float32)
    truth, predicted = ([CLASSES.index(row[name]) for row in rows] for name in ("label", "prediction"))
    return rows, scores, np.array(truth), np.array(predicted)


def test_numbers_are_those_of_the_scores(labelled, capsys):
    out = evaluate(capsys, "--split", "test")
    assert {path.name for path in Path("run/evaluation-test").iterdir()} == FILES
    numbers, (rows, scores, truth, predicted) = found(), table()
    assert list(rows[0]) == ["video", "label", "prediction", *(f"score_{name}" for name in CLASSES)]
    assert [row["video"] for row in rows] == NAMES and truth.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert predicted.tolist() == scores.argmax(1).tolist() and len(set(predicted)) > 1
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-6)
    assert numbers["videos"] == 7 and numbers["classes"] == 4 and numbers["split"] == "test"
    assert numbers["top1"] == pytest.approx((truth == predicted).mean()) and numbers["top5"] == 1
    assert numbers["mean_class_accuracy"] == pytest.approx(balanced_accuracy_score(truth, predicted))
    assert numbers["most_frequent_accuracy"] == 2 / 7
    assert list(numbers["by_clips"]) == ["1", "2", "5", "10"]
    assert numbers["by_clips"]["10"] == {name: numbers[name] for name in ("top1", "top5", "mean_class_accuracy")}
    assert [x["videos"] for x in numbers["by_class"]] == [2, 2, 2, 1]
    mistakes = numbers["mistakes"]
    assert len(mistakes) == (truth != predicted).sum() and mistakes == sorted(mistakes, key=lambda x: -x["score"])
    for x in mistakes:
        row = rows[NAMES.index(x["video"])]
        assert (x["label"], x["prediction"]) == (row["label"], row["prediction"]) and x["label"] != x["prediction"]
        assert (x["score"], x["label_score"]) == pytest.approx((row[f"score_{x['prediction']}"], row[f"score_{x['label']}"]))
    assert f"  top-1              {numbers['top1']:.4f}\n" in out and out.count("wrote run/evaluation-test: ") == 1
    with open("run/evaluation-test/confusion.csv") as file:
        _, *columns = (lines := list(csv.reader(file)))[0]
    order = [CLASSES.index(name) for name in columns]
    expected = confusion_matrix(truth, predicted, labels=range(4))[np.ix_(order, order)]
    assert [[int(x) for x in line[1:]] for line in lines[1:]] == expected.tolist()
    assert [line[0] for line in lines[1:]] == columns


def test_top5_of_more_classes(labelled, capsys):
    """Labels in another order than the model's classes: they are matched by name."""
    names = [f"class {i}" for i in range(9)]
    shutil.rmtree("run")
    save_run(Path("run"), Path("store"), classifier(9), names)
    videos = TokenStore("store").names
    Path("l.csv").write_text("video,label\n" + "".join(f"{name},{names[-1 - i % 7]}\n" for i, name in enumerate(videos)))
    assert cli.main(["evaluate", "run", "store", "--labels", "l.csv", "--clips", "2"]) == 0
    rows = parquet.read_table("run/evaluation-all/scores.parquet").to_pylist()
    scores = np.array([[row[f"score_{name}"] for name in names] for row in rows])
    truth = [names.index(row["label"]) for row in rows]
    assert truth == [8 - i % 7 for i in range(14)]
    numbers = found("run/evaluation-all")
    assert (
        numbers["top5"] == pytest.approx(top_k_accuracy_score(truth, scores, k=5, labels=range(9)))
        and 0.2 < numbers["top5"] < 1
    )
    assert numbers["by_class"][0] == {"class": "class 0", "videos": 0, "accuracy": None}
    assert list(numbers["by_clips"]) == ["1", "2"]


def test_one_and_three_processes_write_the_same_files(labelled):
    """Three chunks of two videos and one of one, so that ranks have 2, 1 and 1."""
    words = [*WORDS, "--batch", "12", "--clips", "2", "--output"]
    for ranks in (1, 3):
        out = run_command([*words, f"ranks-{ranks}"], labelled / f"log-{ranks}", ranks)
        assert out.count("  top-1    ") == 1
    one, three = (tree(labelled / f"ranks-{ranks}") for ranks in (1, 3))
    assert one.keys() == FILES and one == three
    assert [row["video"] for row in table("ranks-3/scores.parquet")[0]] == NAMES  # every video once


def test_more_processes_than_videos(labelled):
    Path("few.csv").write_text("video,label,split\nv00.mp4,run,test\nv05.mp4,walk,test\n")
    words = ["evaluate", "run", "store", "--labels", "few.csv", "--allow-empty-classes"]
    run_command(words, labelled / "log", 3)
    assert found()["videos"] == 2


def nan_of_short_videos():
    """A hook: clips with PAD, of v06 alone among the tests, have scores that are NaN."""
    from vimpac.evaluation import classify

    scores = classify.clip_scores

    def spoiled(model, tokens, *options):
        return scores(model, tokens, *options).masked_fill((tokens == CODES + 1).flatten(1).any(1)[:, None, None], torch.nan)

    classify.clip_scores = spoiled


def test_nan_ends_all_processes(labelled, capsys):
    """In a chunk of the second of three. Nothing is written, and an earlier evaluation stays."""
    evaluate(capsys)
    before = tree(labelled)
    out = run_command([*WORDS, "--clips", "1", "--batch", "6"], labelled / "log", 3, nan_of_short_videos, code=1)
    assert "vimpac evaluate: error: the model's scores of v06.mp4 are not finite numbers (NaN), in float32" in out
    assert out.count("error") == 1
    assert {name: data for name, data in tree(labelled).items() if not name.startswith("log")} == before
    assert not list(labelled.glob("run/*.tmp"))


def test_the_default_split_and_folder(labelled, capsys):
    evaluate(capsys, "--clips", "1")
    evaluate(capsys, "--clips", "1", "--split", "train")
    assert [found(f"run/evaluation-{split}")["videos"] for split in ("test", "train")] == [7, 7]
    Path("store.csv").write_text(Path("store.csv").read_text().replace("test", "val"))
    evaluate(capsys, "--clips", "1")
    assert found("run/evaluation-validation")["videos"] == 7


def test_labels_without_splits_are_divided_as_the_run_did(labelled, capsys):
    """Videos that it was trained on are not evaluated unless asked for."""
    from vimpac.data.labelled import LabelSource, label_store
    from vimpac.files.checked import write_json

    store = TokenStore("store")
    Path("all.csv").write_text("".join(line.rpartition(",")[0] + "\n" for line in Path("store.csv").read_text().splitlines()))
    config = {"config": {"held_out": 0.25}, "tokenizer": weights.load_trained("run").training.to_header()["tokenizer"]}
    write_json(Path("run/config.json"), {**config, "store": {}})
    Path("alone.safetensors").write_bytes(Path("run/model.safetensors").read_bytes())
    os.renames("alone.safetensors", "alone/model.safetensors")
    words = ["evaluate", "run", "store", "--labels", "all.csv", "--clips", "1"]
    assert cli.main(words) == cli.main([*words, "--split", "all"]) == 0
    held_out = label_store(store, LabelSource("all.csv")).divided(0.25).split("validation")
    rows = parquet.read_table("run/evaluation-validation/scores.parquet").to_pylist()
    assert [row["video"] for row in rows] == [store.names[i] for i in held_out.videos] and 0 < len(rows) < 14
    assert found("run/evaluation-all")["videos"] == 14
    out = capsys.readouterr().out
    said = "  note               the videos of the split all are those that the model was trained on\n"
    assert out.count(said) == out.count("note ") == 1
    for crc, doubts in ((held_out.crc32(store), 0), (7, 1)):  # the videos that the run held out, and others
        write_json(Path("run/config.json"), {**config, "store": {}, "labels": {"validation_crc32": crc}})
        assert cli.main(words) == 0
        assert capsys.readouterr().out.count("these are not the videos that the run held out") == doubts
    assert cli.main(["evaluate", "alone", *words[2:]]) == 0
    assert "which videos it was trained on is not known" in capsys.readouterr().out


def test_options_of_clips(labelled, capsys):
    """Every second frame; one view; more frames, with interpolated positions."""
    words = ["--clips", "1", "--views", "center", "--fps", "1", "--frames", "4"]
    out = evaluate(capsys, *words)
    assert "  note               positions are interpolated from 3 frames to 4\n" in out
    assert "clips of 4 frames at 1 a second" in out and "1 clip × 1 view of each" in out
    numbers = found()
    assert {name: numbers[name] for name in ("clips", "views", "frames", "fps")} == dict(clips=1, views=1, frames=4, fps=1.0)
    model = weights.load("run/model.safetensors", grid=(4, 4, 4))
    store, (_, scores, *_) = TokenStore("store"), table()
    ids = store.read(4).astype(np.int64)[1:8:2][None]  # the middle clip of v04: 9 frames, 7 of them in a clip
    expected = model(torch.from_numpy(ids))[0].softmax(-1).detach()
    np.testing.assert_allclose(scores[2], expected, atol=2e-6)  # float32


def test_an_evaluation_is_replaced_and_nothing_else(labelled, capsys):
    evaluate(capsys, "--clips", "1")
    first = tree(labelled / "run" / "evaluation-test")
    evaluate(capsys, "--clips", "2")
    second = tree(labelled / "run" / "evaluation-test")
    assert first.keys() == second.keys() and first["evaluation.json"] != second["evaluation.json"]
    (labelled / "run" / "evaluation-test" / "notes.txt").write_text("mine")
    assert cli.main(WORDS) == 1
    assert "run/evaluation-test holds notes.txt, which no evaluation wrote" in capsys.readouterr().err
    assert tree(labelled / "run" / "evaluation-test") == second | {"notes.txt": b"mine"}
    assert not list(labelled.glob("run/*.tmp")) + list(labelled.glob("run/*.old"))


def test_without_pyarrow_matplotlib_or_tokenizer(labelled, capsys, monkeypatch):
    evaluate(capsys)
    exact = table()
    (labelled / "store" / "tokenizer.safetensors").write_bytes(b"damaged")
    out = evaluate(capsys)
    assert "note               mistakes.png is not drawn, since the tokens cannot be decoded: " in out
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    out = evaluate(capsys)
    assert {path.name for path in Path("run/evaluation-test").iterdir()} == {"evaluation.json", "confusion.csv", "scores.csv"}
    assert "scores are in scores.csv: pyarrow is missing" in out and "matplotlib is missing" in out
    with open("run/evaluation-test/scores.csv") as file:
        rows = list(csv.DictReader(file))
    assert [list(row) for row in rows] == [list(row) for row in exact[0]]
    scores = np.array([[row[f"score_{name}"] for name in CLASSES] for row in rows], np.float32)
    assert np.array_equal(scores, exact[1]) and [row["video"] for row in rows] == NAMES


@pytest.mark.parametrize(
    "words, said",
    [
        ("missing store --labels store.csv", "cannot read model missing: "),
        ("run missing --labels store.csv", "missing is not a folder, expected a token store"),
        ("run store", "run/model.safetensors is a fine-tuned model, which is evaluated on labelled videos: give --labels FILE"),
        ("run store --labels missing.csv", "the labels missing.csv do not exist"),
        (
            "run store --labels store.csv --split dev",
            "the split 'dev' of store.csv does not exist, expected one of test, train",
        ),
        ("run store --labels gone.csv", "2 of 2 labelled videos are not in the store, such as 'x.mp4', 'y.mp4'"),
        (
            "run store --labels other.csv",
            "the class 'fly' and 1 more of other.csv is none of the model's 4, expected 'jump', 'run'",
        ),
        ("run store --labels store.csv --fps 1.5", "fps=1.5 does not divide the 2 frames a second of store store"),
        ("run store --labels store.csv --fps -1", "fps must be a positive number, got -1.0"),
        ("run store --labels store.csv --clips 0", "clips must be at least 1, got 0"),
        ("run store --labels store.csv --clips 13", "clips is 13, but the longest of the videos has 12 frames"),
        ("run store --labels store.csv --batch 0", "batch must be at least 1, got 0"),
        ("run store --labels store.csv --frames 99", "a clip of 99 frames is longer than every video in store"),
        ("run store --labels store.csv --output store", "store holds shard-00000-00000.bin, which no evaluation wrote"),
        ("run store --labels store.csv --output store.csv", "store.csv exists and is no folder"),
        ("run foreign --labels store.csv", "was trained on tokenizer"),
        ("run large --labels store.csv", "takes frames of 4×4 tokens, store large has 8×8 (64 px): tokenize"),
        (
            "unnamed store --labels three.csv",
            "three.csv has 3 classes, the model 4: expected the labels that it was fine-tuned on",
        ),
        ("store.csv store --labels store.csv", "cannot read model store.csv"),
    ],
)
def test_mistakes_are_one_line_before_any_work(labelled, capsys, monkeypatch, words, said):
    monkeypatch.setattr("vimpac.evaluation.classify.score_videos", None)  # nothing is scored
    Path("gone.csv").write_text("video,label\nx.mp4,a\ny.mp4,b\n")
    Path("other.csv").write_text(
        "video,label,split\n" + "".join(f"{name},{'swim' if i else 'fly'},test\n" for i, name in enumerate(NAMES))
    )
    Path("three.csv").write_text("video,label,split\n" + "".join(f"{name},c{i % 3},test\n" for i, name in enumerate(NAMES)))
    write_store(Path("foreign"))
    write_store(Path("large"), side=8, digest=TokenStore("store").tokenizer.digest)
    Path("unnamed").mkdir()
    weights.save(classifier(), "unnamed/model.safetensors")
    before = tree(labelled)
    assert cli.main(["evaluate", *words.split()]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("vimpac evaluate: error: ") and captured.err.count("\n") == 1 and not captured.out
    assert said in captured.err and tree(labelled) == before


def test_another_vocabulary(labelled, capsys):
    Path("other").mkdir()
    weights.save(classifier(), "other/model.safetensors")
    weights.save(PretrainModel(tiny_config(model={"vocab_size": CODES + 1}).model), "other/pretrained.safetensors")
    assert cli.main(["evaluate", "other/pretrained.safetensors", "store"]) == 1
    assert f"has a vocabulary of {CODES + 1} codes, store store was made with {CODES}" in capsys.readouterr().err


def test_a_pretrained_run_is_evaluated_as_at_its_end(finished_run, store_folder, tmp_path, capsys, monkeypatch):
    """The same held-out videos, masks and clips: the same numbers."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (checkpoint,) = list((run / "checkpoints").iterdir())[-1:]
    expected = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert cli.main(["evaluate", str(run), str(store_folder), "--batch", "2"]) == 0
    numbers = found(run / "evaluation-held-out")
    assert numbers["kind"] == "pretraining"
    for name, value in expected.items():
        if name not in ("final", "step"):
            assert numbers[name] == pytest.approx(value, rel=1e-5), name  # other shapes of products
    out = capsys.readouterr().out
    assert f"  mask_accuracy                   {numbers['mask_accuracy']:.4f}\n" in out
    assert cli.main(["evaluate", str(checkpoint), str(store_folder)]) == 0
    assert found(run / f"evaluation-held-out-{checkpoint.stem}")["held_out_videos"] == expected["held_out_videos"]


@pytest.mark.parametrize("splits", [True, False])
def test_a_fine_tuned_run_is_evaluated_as_at_its_end(tmp_path, capsys, undrawn, splits):
    """The same videos, held out by the run where the labels tell no split, the same clips: the same numbers."""
    folder, run = write_labelled(tmp_path), tmp_path / "run"
    labels = folder / "labels.csv"
    if not splits:
        labels.write_text("".join(line.rpartition(",")[0] + "\n" for line in labels.read_text().splitlines()))
    words = tuning(folder, run, steps=3, eval_clips=3, keep_best=True)
    assert cli.main(["train", *words]) == 0
    expected = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    words = [str(folder / "tokens"), "--labels", str(labels), "--clips", "3"]
    assert cli.main(["evaluate", str(run), *words]) == 0
    numbers = found(run / "evaluation-validation")
    for name in ("top1", "top5", "mean_class_accuracy", "most_frequent_accuracy", "videos", "clips", "views"):
        assert numbers[name] == expected[name], name
    before = tree(run / "evaluation-validation")
    assert cli.main(["evaluate", str(run), str(folder / "tokens"), "--clips", "3"]) == 0  # the labels of the run
    assert tree(run / "evaluation-validation") == before
    (checkpoint,) = list((run / "checkpoints").iterdir())[-1:]
    assert cli.main(["evaluate", str(checkpoint), *words]) == 0
    assert found(run / f"evaluation-validation-{checkpoint.stem}")["videos"] == expected["videos"]


def test_a_run_of_an_earlier_version(tmp_path, capsys):
    shutil.copytree(Path(__file__).parents[1] / "old" / "run", tmp_path / "run")
    assert cli.main(["evaluate", str(tmp_path / "run"), str(Path(__file__).parents[1] / "old" / "store")]) == 0
    expected = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert found(tmp_path / "run" / "evaluation-held-out")["mask_accuracy"] == expected["mask_accuracy"]


def test_a_damaged_run(labelled, capsys):
    Path("run/config.json").write_text('{"config": {"held_out": "all"}, "tokenizer": null, "store": {}}')
    assert cli.main(WORDS) == 1
    assert "error: the run of run/model.safetensors cannot be read: run/config.json is damaged" in capsys.readouterr().err
    tokenizer = json.dumps(weights.load_trained("run").training.to_header()["tokenizer"])
    Path("run/config.json").write_text(f'{{"config": {{"held_out": "all"}}, "tokenizer": {tokenizer}, "store": {{}}}}')
    assert cli.main(WORDS) == 1
    assert "cannot be read: held_out is 'all', expected a number; evaluate a copy" in capsys.readouterr().err


def test_out_of_memory(labelled, capsys, monkeypatch):
    def forward(*call):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("vimpac.evaluation.classify.clip_scores", forward)
    assert cli.main([*WORDS, "--batch", "64"]) == 1
    assert (
        "error: out of memory with --batch 64 clips a forward pass: give fewer, such as --batch 16. torch"
        in capsys.readouterr().err
    )


def test_a_pretrained_model_that_lies_alone(store_folder, tmp_path, capsys):
    torch.manual_seed(0)
    weights.save(PretrainModel(tiny_config().model), tmp_path / "model.safetensors")
    assert cli.main(["evaluate", str(tmp_path / "model.safetensors"), str(store_folder)]) == 0
    assert "no config.json beside the model" in capsys.readouterr().out
    assert found(tmp_path / "evaluation-held-out")["mask_accuracy"] is not None


def test_pretrained_in_several_processes(finished_run, store_folder, tmp_path):
    words = ["evaluate", str(finished_run), str(store_folder), "--output", str(tmp_path / "out")]
    out = run_command(words, tmp_path / "log", 2)
    assert out.count("mask_accuracy") == 1 and (tmp_path / "out" / "evaluation.json").exists()


def test_names_that_steer_the_terminal(labelled, capsys):
    from test_store_commands import STEERING, is_harmless

    text = Path("store.csv").read_text().replace("run", f'"{STEERING}"').replace("\n", "\r\n")
    Path("s.csv").write_bytes(text.encode())
    shutil.rmtree("run")
    names = [STEERING if name == "run" else name for name in CLASSES]
    save_run(Path("run"), Path("store"), None, names)
    assert cli.main(["evaluate", "run", "store", "--labels", "s.csv", "--clips", "1"]) == 0
    assert is_harmless(capsys.readouterr().out)
