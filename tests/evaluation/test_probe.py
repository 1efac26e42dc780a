"""All probes together: what they are given, baselines, splits, and bad labels."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from runs import VOCABULARY, tiny_model
from vimpac.data.labelled import LabelledVideos, StoreLabels
from vimpac.data.store import StoreWriter, TokenStore, finish_store
from vimpac.data.test_clips import TestClips
from vimpac.distributed import World
from vimpac.errors import InputError
from vimpac.evaluation.attentive import AttentiveTraining
from vimpac.evaluation.features import Look, all_vectors
from vimpac.evaluation.linear import held_out_part, linear_probe
from vimpac.evaluation.neighbors import knn_predict
from vimpac.evaluation.probe import Row, Task, accuracies, divide, random_backbone, run_probes
from vimpac.model import ClassificationModel, PretrainModel

ONE = World(0, 1, torch.device("cpu"))
TRAINING = AttentiveTraining(epochs=2, learning_rate=1e-3, weight_decay=0.01, batch_videos=8, seed=0)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """40 videos of 3 frames. The label is which of two halves of the vocabulary most tokens are from."""
    from vimpac.data.format import StoreSettings, TokenizerInfo

    folder, rng = tmp_path_factory.mktemp("probe") / "store", np.random.default_rng(0)
    writer = StoreWriter(folder, StoreSettings(TokenizerInfo("patch-vq", VOCABULARY, 8, "d" * 64), 2.0, 32))
    for i in range(40):
        low = rng.integers(0, 6, (1, 3, 4, 4))
        swapped = rng.random(low.shape) < 0.3
        writer.add(f"{i:02d}.mp4", np.where(swapped, rng.integers(0, VOCABULARY, low.shape), low + 5 * (i % 2)))
    writer.close()
    finish_store(folder)
    return TokenStore(folder)


@pytest.fixture
def model(wide):
    torch.manual_seed(1)
    return PretrainModel(tiny_model()).eval()


def labels_of(store, train, test, classes=("low", "high")):
    videos = {name: np.array(x, np.int64) for name, x in (("train", train), ("test", test))}
    return StoreLabels(store, "l.csv", classes, {name: LabelledVideos(x, x % 2) for name, x in videos.items()})


def test_accuracies_are_scikit_learns():
    rng = np.random.default_rng(0)
    labels, guesses = rng.choice(5, 200, p=[0.6, 0.2, 0.1, 0.05, 0.05]), rng.integers(5, size=200)
    expected = accuracy_score(labels, guesses), balanced_accuracy_score(labels, guesses)
    assert accuracies(guesses, labels) == pytest.approx(expected, rel=1e-12)
    assert accuracies(np.array([0, 7]), np.array([0, 0])) == (0.5, 0.5)


def test_divide(store):
    task = divide(labels_of(store, [9, 12, 30, 31], [0, 13]), "test")
    assert task.videos.tolist() == [0, 9, 12, 13, 30, 31] and task.names == tuple(store.names[i] for i in task.videos)
    assert task.train.tolist() == [1, 2, 4, 5] and task.train_labels.tolist() == [1, 0, 0, 1]
    assert task.test.tolist() == [0, 3] and task.test_labels.tolist() == [0, 1]
    assert task.chance == 0.5 and task.most_frequent == 0.5


def test_a_video_in_both_splits(store):
    task = divide(labels_of(store, [1, 2, 3], [2]), "test")
    assert task.videos.tolist() == [1, 2, 3] and task.test.tolist() == [1]


def test_bad_splits(store):
    with pytest.raises(InputError, match="all 2 training videos are of the class 'low', expected at least two classes"):
        divide(labels_of(store, [0, 2], [1]), "test")
    with pytest.raises(InputError, match=r"the split 'validation' of l\.csv does not exist, expected one of train, test"):
        divide(labels_of(store, [0, 1], [1]), "validation")
    with pytest.raises(InputError, match=r"the split 'test' .* has no video in the store"):
        divide(labels_of(store, [0, 1], []), "test")
    with pytest.raises(InputError, match="the split is train, on which probes are fitted"):
        divide(labels_of(store, [0, 1], [1]), "train")


def test_baselines_of_a_task():
    task = Task(
        np.arange(8), ("",) * 8, ("a", "b", "c"), np.arange(4), np.array([0, 0, 0, 2]), np.arange(4, 8), np.array([0, 1, 2, 2])
    )
    assert task.chance == 0.5 and task.most_frequent == 0.25  # class b has no training video


def test_random_backbone(model):
    state = torch.get_rng_state()
    fresh = random_backbone(model, 0)
    assert torch.equal(torch.get_rng_state(), state) and not fresh.training and fresh.config == model.config
    assert torch.equal(fresh.backbone.cls, random_backbone(model, 0).backbone.cls)
    assert not torch.equal(fresh.backbone.cls, random_backbone(model, 1).backbone.cls)
    assert not torch.equal(fresh.backbone.cls, model.backbone.cls)
    classifier = random_backbone(ClassificationModel(model.config, 7).eval(), 0)
    assert isinstance(classifier, ClassificationModel) and classifier.classifier.out_features == 7


def test_every_probe(store, model):
    task = divide(labels_of(store, range(28), range(28, 40)), "test")
    clips, noted = TestClips(store, task.videos, 1, [0], 3, VOCABULARY + 1), []

    @contextmanager
    def report(title, videos):
        finished = []
        yield finished.append
        noted.append((title, videos, sum(finished)))

    rows = run_probes(model, clips, task, ("knn", "linear", "attentive"), 5, Look(), TRAINING, ONE, report)
    names = ("cls", "mean", "contrastive")
    expected = [(probe, name, b) for b in ("model", "random") for probe in ("knn", "linear") for name in names]
    expected += [("knn", "histogram", "none"), ("linear", "histogram", "none")]
    expected += [("attentive", "tokens", "model"), ("attentive", "tokens", "random")]
    assert [row[:3] for row in rows] == expected
    assert noted == [
        ("vectors", 40, 40),
        ("vectors of a random backbone", 40, 40),
        ("token histograms", 40, 40),
        ("attentive probe, model", 56, 56),
        ("attentive probe, random", 56, 56),
    ]
    held = held_out_part([task.names[i] for i in task.train], task.train_labels)
    for row in rows[:-2]:
        network = {"model": model, "random": random_backbone(model, 0), "none": None}[row.backbone]
        x = all_vectors(network, clips, store.names, Look(), ONE, VOCABULARY)[row.features]
        if row.probe == "knn":
            guesses, strength = knn_predict(x[:28], task.train_labels, x[28:], 5), None
        else:
            guesses, strength = linear_probe(x[:28], task.train_labels, x[28:], held)
        assert row[3:] == (*accuracies(guesses, task.test_labels), strength), row
    by_name = {row[:3]: row for row in rows}
    assert by_name["linear", "histogram", "none"].top1 == 1.0  # the labels are in the histograms
    assert rows == run_probes(model, clips, task, ("knn", "linear", "attentive"), 5, Look(), TRAINING, ONE)


def test_only_what_is_asked_for(store, model):
    task = divide(labels_of(store, range(28), range(28, 40)), "test")
    clips = TestClips(store, task.videos, 1, [0], 3, VOCABULARY + 1)
    rows = run_probes(model, clips, task, ("attentive",), 5, Look(), TRAINING, ONE)
    assert [row[:3] for row in rows] == [("attentive", "tokens", "model"), ("attentive", "tokens", "random")]
    assert all(isinstance(row, Row) and row.strength is None for row in rows)
