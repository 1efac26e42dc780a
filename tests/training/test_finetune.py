"""Fine-tuning runs: what they learn, write, resume and refuse."""

import csv
import json
import re
from types import SimpleNamespace
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch

from labelled import CLASSES, TUNE, tuning, write_labelled
from runs import arguments, metrics, model_bytes, on_call, run, undrawn, write_store
from vimpac import weights
from vimpac.data.format import View
from vimpac.data.store import TokenStore
from vimpac.files.checked import load_json
from vimpac.training.finetune_task import FinetuneTask

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def tuned(labelled, tmp_path_factory):
    """The run folder of the small fine-tuning run: 12 updates in one process, dropout 0.1, never interrupted."""
    folder = tmp_path_factory.mktemp("tuned") / "whole"
    run(tuning(labelled, folder, keep_best=True), folder.with_name("log"))
    return folder


@pytest.fixture(scope="module")
def pretrained(labelled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    run(arguments(labelled / "tokens", folder, steps=2), folder.with_name("log"), hook=undrawn)
    return folder


def test_a_run_learns_and_says_what_it_is(tuned, labelled):
    assert "no longer written" not in tuned.with_name("log-0.log").read_text()  # TensorBoard's events
    lines = metrics(tuned)
    assert [line["step"] for line in lines] == [*range(1, 13), 12]
    assert {"loss", "accuracy", "learning_rate", "grad_norm"} <= lines[0].keys() and "mask_loss" not in lines[0]
    # Each class prefers an id of its own, in half of its tokens: easy.
    assert lines[-1]["final"] and lines[-1]["top1"] >= 5 / 6 and lines[-1]["top5"] == 1.0
    assert lines[-1]["chance"] == 1 / 3 and lines[-1]["most_frequent_accuracy"] == 1 / 3
    assert (lines[-1]["split"], lines[-1]["videos"], lines[-1]["clips"], lines[-1]["views"]) == ("validation", 6, 2, 1)
    assert lines[-2]["loss"] < 0.8 * lines[0]["loss"] == pytest.approx(0.8 * np.log(3))  # the classifier starts at zero
    validated = {line["step"]: line["validation_top1"] for line in lines if "validation_top1" in line}
    assert list(validated) == [3, 6, 9, 12]  # 18 videos, 6 at a time
    model = weights.load_trained(tuned)
    assert model.training.class_names == CLASSES and model.training.fps == 2.0 and model.run == tuned
    assert model.model.config.grid == (3, 4, 4) and model.training.tokenizer.digest == "d" * 64
    best = weights.load_trained(tuned / "best.safetensors").model.state_dict()
    first = max(validated, key=lambda step: (validated[step], -step))
    assert (first == 12) == all(torch.equal(x, best[name]) for name, x in model.model.state_dict().items())
    numbers = load_json(tuned / "evaluation-validation" / "evaluation.json")[0]
    assert numbers["top1"] == lines[-1]["top1"] and numbers["split"] == "validation"
    described = json.loads((tuned / "config.json").read_text())
    assert described["labels"]["classes"] == list(CLASSES) and described["labels"]["training"] == 18


def test_the_best_model_is_not_the_last_better_than_what_is_written(tmp_path):
    """On a GPU the metrics of an update are written up to `log_every` updates later."""
    accuracies, saved = iter([0.5, 0.9, 0.7]), []
    task = FinetuneTask(Mock(), Mock(), Mock(), lambda: next(accuracies), 1, True)
    loop = SimpleNamespace(run=tmp_path, step=1, schedule=SimpleNamespace(steps=9), training=weights.Training())
    with patch.object(weights, "save", lambda *_: saved.append(loop.step)):
        for loop.step in (1, 2, 3):
            task.measure(loop)
    assert saved == [1, 2]


@pytest.mark.parametrize("killed_at", [3, 8])
def test_a_killed_run_goes_on(tuned, labelled, tmp_path, killed_at):
    """Step by step, as if nothing had happened; the best model is the same one."""
    folder = tmp_path / "run"
    words = tuning(labelled, folder, keep_best=True)
    run(words, tmp_path / "log", hook=on_call("vimpac.training.loop:Loop.update", killed_at, "kill"), code=-9)
    run([*words, "--resume"], tmp_path / "log")
    assert metrics(folder) == metrics(tuned) and model_bytes(folder) == model_bytes(tuned)
    assert (folder / "best.safetensors").read_bytes() == (tuned / "best.safetensors").read_bytes()


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_processes_follow_one(labelled, tmp_path, ranks):
    one, several = tmp_path / "one", tmp_path / "several"
    options = {
        "steps": 4,
        "model.dropout": 0.0,
        "learning_rate": 1e-3,
        "class_weights": "balanced",
        "label_smoothing": 0.1,
        "layer_decay": 0.7,
    }
    run(tuning(labelled, one, micro_batch=2, **options), tmp_path / "log", hook=undrawn)
    run(tuning(labelled, several, micro_batch=2 if ranks == 3 else 1, **options), tmp_path / "log", ranks, undrawn)
    expected, found = metrics(one), metrics(several)
    assert len(found) == 5
    for line, same in zip(found, expected, strict=True):
        assert line.keys() == same.keys()
        for name, x in line.items():  # float32 sums in another order
            # the gradients of the clips, each of norm 0.3, nearly cancel
            allowed = {"rel": 1e-4, "abs": 1e-4 if name == "grad_norm" else 1e-6}
            assert x == (same[name] if not isinstance(x, float) else pytest.approx(same[name], **allowed)), name
    a, b = (load_json(path / "evaluation-validation" / "evaluation.json")[0] for path in (one, several))
    assert a["top1"] == b["top1"] and a["by_clips"] == b["by_clips"]


def test_from_a_run_with_longer_clips_and_larger_frames(pretrained, tmp_path):
    larger = write_labelled(tmp_path / "larger", side=8)
    output = run(tuning(larger, tmp_path / "run", start=pretrained, frames=4, steps=1), tmp_path / "log", hook=undrawn)
    assert "are interpolated from 3×4×4 to 4×8×8 tokens (T×H×W)" in output
    assert weights.load_trained(tmp_path / "run").model.config.grid == (4, 8, 8)


def test_the_backbone_is_that_of_the_run(pretrained, labelled, tmp_path):
    """Frozen, it stays so; the classifier moves."""
    folder = tmp_path / "run"
    run(tuning(labelled, folder, start=pretrained, freeze_backbone=True, steps=2), tmp_path / "log", hook=undrawn)
    before, after = (weights.load_trained(path).model for path in (pretrained, folder))
    own = after.backbone.state_dict()
    assert all(torch.equal(x, own[name]) for name, x in before.backbone.state_dict().items())
    assert after.classifier.weight.abs().max() > 0
    # Again from there: the classes are the same ones, so the classifier stays.
    output = run(
        tuning(labelled, tmp_path / "again", start=folder, steps=1, learning_rate=1e-12), tmp_path / "log", hook=undrawn
    )
    assert "was fine-tuned on the same classes: its classifier is kept" in output
    again = weights.load_trained(tmp_path / "again").model
    torch.testing.assert_close(again.classifier.weight, after.classifier.weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("ranks", [1, 2])
def test_beside_a_run_from_scratch(pretrained, labelled, tmp_path, ranks):
    folder = tmp_path / "run"
    words = tuning(labelled, folder, start=pretrained, compare_scratch=True, epochs=1)
    output = run(words, tmp_path / "log", ranks, undrawn)
    (final,) = (line for line in metrics(folder) if line.get("final"))
    (other,) = (line for line in metrics(tmp_path / "run-from-scratch") if line.get("final"))
    assert final["from_scratch_top1"] == other["top1"] and "from scratch top1" in output
    refused = run(words, tmp_path / "log", ranks, undrawn, code=1)
    assert f"run folder {folder} exists: add --resume to continue it" in refused


def test_views_of_training_and_evaluation(tmp_path):
    """Every training view is drawn; an evaluation looks at the crops that are neither flipped nor enlarged."""
    views = (View(), View(flip=True), View(1.25), View(crop="top-left"))
    folder = write_labelled(tmp_path / "views", views=views)
    run(tuning(folder, tmp_path / "run", steps=2), tmp_path / "log", hook=undrawn)
    (final,) = (line for line in metrics(tmp_path / "run") if line.get("final"))
    assert final["views"] == 2
    run(tuning(folder, tmp_path / "center", steps=2, eval_views="center"), tmp_path / "log", hook=undrawn)
    assert metrics(tmp_path / "center")[-1]["views"] == 1


def test_a_part_of_the_training_videos(labelled, tmp_path):
    run(tuning(labelled, tmp_path / "run", train_videos=7, steps=1), tmp_path / "log", hook=undrawn)
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (described["labels"]["training"], described["labels"]["validation"]) == (7, 6)


def test_labels_without_splits(labelled, tmp_path):
    """A folder whose subfolders are classes: some videos of every class are held out, the same ones each time."""
    rows = list(csv.DictReader((labelled / "labels.csv").open()))
    plain = tmp_path / "plain.csv"
    plain.write_text("video,label\n" + "".join(f"{row['video']},{row['label']}\n" for row in rows))
    run(tuning(labelled, tmp_path / "run", labels=plain, held_out=6, steps=1), tmp_path / "log", hook=undrawn)
    with (tmp_path / "run" / "evaluation-validation" / "confusion.csv").open() as file:
        table = list(csv.reader(file))
    assert [sum(map(int, row[1:])) for row in table[1:]] == [2, 2, 2]


BAD = [
    ({"labels": None}, "--labels is missing: expected a label file"),
    ({"start": "nowhere"}, "--from nowhere does not exist: expected a run folder"),
    (
        {"micro_batch": 4},
        r"micro_batch=4 does not divide the 6 videos of an update in each of 1 processes: use --micro-batch 2 or 3",
    ),
    ({"fps": 1.5}, r"fps=1.5 does not divide the 2 frames a second of store .*: give --fps 1 or 2, or tokenize"),
    ({"frames": 99}, r"a clip of 99 frames is longer than every video in .*: the longest has 6 frames"),
    ({"train_videos": 99}, "99 training videos were asked for, 18 of them have labels: ask for fewer"),
    ({"label_column": "colour"}, "colour"),
]


@pytest.mark.parametrize("options, message", BAD, ids=[next(iter(options)) for options, _ in BAD])
def test_bad_options(labelled, main, output, options, message):
    start = options.pop("start", "none") if "start" in options else "none"
    words = tuning(labelled, output, start=start, **{name: x for name, x in options.items() if name != "labels"})
    if "labels" in options:
        at = words.index("--labels")
        del words[at : at + 2]
    status, said = main(words)
    assert status == 1 and re.search(message, said) and "Traceback" not in said and not output.exists(), said


def edited(labelled, tmp_path, change):
    """The label file with changed lines."""
    lines = (labelled / "labels.csv").read_text().splitlines()
    path = tmp_path / "edited.csv"
    path.write_text("\n".join(change(lines)) + "\n")
    return path


CHANGES = {
    "one class": (lambda lines: [re.sub(r",(fall|jump|run),", ",fall,", x) for x in lines], "has one class, 'fall'"),
    "class without training": (
        lambda lines: [x for x in lines if ",run,train" not in x],
        r"the class 'run' of .* has no training video in .*--allow-empty-classes",
    ),
    "no validation": (
        lambda lines: [x for x in lines if "validation" not in x],
        "has no split to validate on, expected validation or test beside train",
    ),
    "no training": (lambda lines: [x.replace(",train", ",test") for x in lines], r"split 'train' of .* does not exist"),
    "other videos": (
        lambda lines: [lines[0], *(x.replace("video-", "film-") for x in lines[1:])],
        r"24 of 24 labelled videos are not in the store, such as 'fall/film-000.mp4', .*; 24 of its 24 videos have no label",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_bad_labels(labelled, main, output, tmp_path, name):
    change, message = CHANGES[name]
    status, said = main(tuning(labelled, output, labels=edited(labelled, tmp_path, change)))
    assert status == 1 and re.search(message, said) and not output.exists(), said


def test_labels_must_not_change_between_resumes(tuned, labelled, main, tmp_path):
    def swapped(lines):
        return [lines[0], lines[1].replace("fall,", "jump,", 1), *lines[2:]]

    words = tuning(labelled, tuned, resume=True, keep_best=True)
    words[words.index("--labels") + 1] = str(edited(labelled, tmp_path, swapped))
    before = (tuned / "metrics.jsonl").read_bytes()
    status, said = main(words)
    assert status == 1 and "with other labels: training_crc32 was" in said and (tuned / "metrics.jsonl").read_bytes() == before


def test_a_model_of_another_tokenizer(pretrained, main, output, tmp_path):
    other = write_labelled(tmp_path / "other", digest="e" * 64)
    status, said = main(tuning(other, output, start=pretrained))
    assert status == 1 and "was trained on tokenizer dddddddddddd…, the store was made with eeeeeeeeeeee…" in said


def test_the_shape_is_the_models(pretrained, labelled, main, output):
    status, said = main([*tuning(labelled, output, start=pretrained), "--model.width", "32"])
    assert status == 1 and "--model.width cannot be chosen here, the model's shape is that of --from" in said


def test_a_store_without_upright_views(main, output, tmp_path):
    folder = write_labelled(tmp_path / "flipped", views=(View(flip=True),))
    status, said = main(tuning(folder, output))
    assert status == 1 and "has no centre view, it has center flipped: tokenize the videos with --views" in said


def test_validation_videos_in_another_store(labelled, main, output, tmp_path):
    """By name, where its labels have one split; other frames are refused."""
    other = write_store(tmp_path / "other", side=8)
    status, said = main([*tuning(labelled, output), "--validation-data", str(other)])
    assert status == 1 and "has frame size 64" in said
    status, said = main([*tuning(labelled, output, steps=1), "--validation-data", str(labelled / "tokens")])
    assert status == 0, said
    assert TokenStore(labelled / "tokens") and TUNE["frames"] == 3
