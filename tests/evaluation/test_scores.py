"""Accuracies and confusions: against torchmetrics, scikit-learn and by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from sklearn.metrics import confusion_matrix as sklearn_confusion
from torchmetrics.functional.classification import multiclass_accuracy

from vimpac.evaluation.scores import (
    CLIP_COUNTS,
    accuracies,
    accuracies_by_clips,
    average,
    confident_mistakes,
    confusion_matrix,
    confusion_order,
    ranks,
    spread_of,
    worst_confusions,
)


def drawn(videos, classes, clips=None, seed=0):
    """Scores that favour the right class a little, and labels among which every class occurs."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(classes, size=videos - classes) ** 2 // classes])
    shape = (videos, classes) if clips is None else (videos, clips, classes)
    logits = 2 * rng.standard_normal(shape)
    logits[np.arange(videos), ..., labels] += 2
    return torch.from_numpy(logits).softmax(-1).float().numpy(), labels


@pytest.mark.parametrize("videos, classes", [(1, 1), (40, 3), (500, 12), (900, 101)])
def test_torchmetrics_agrees(videos, classes):
    scores, labels = drawn(videos, classes)
    found, predicted, truth = accuracies(scores, labels), torch.from_numpy(scores), torch.from_numpy(labels)
    top5 = min(5, classes)
    expected = {
        "top1": multiclass_accuracy(predicted, truth, classes, "micro", 1) if classes > 1 else 1.0,
        "top5": multiclass_accuracy(predicted, truth, classes, "micro", top5) if classes > 1 else 1.0,
        "mean_class_accuracy": multiclass_accuracy(predicted, truth, classes, "macro", 1) if classes > 1 else 1.0,
    }
    # torchmetrics divides in float32
    assert found == {name: pytest.approx(float(x), abs=1e-6) for name, x in expected.items()}
    if classes > 5:
        assert 0.05 < found["top1"] < found["top5"] < 1 and found["top1"] != found["mean_class_accuracy"]


def test_classes_without_videos_do_not_count():
    """As in scikit-learn. torchmetrics counts such a class as wrong if it was predicted."""
    scores, labels = drawn(200, 10)
    scores, labels = scores[labels < 6], labels[labels < 6]
    predicted = scores.argmax(1)
    assert (predicted >= 6).any()
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        expected = balanced_accuracy_score(labels, predicted)
    assert accuracies(scores, labels)["mean_class_accuracy"] == pytest.approx(expected, abs=1e-12)  # sums in another order


def test_of_equal_scores_the_lower_class_comes_first():
    scores, labels = np.full((10, 10), 0.1, np.float32), np.arange(10)
    assert ranks(scores, labels).tolist() == list(range(10))
    assert accuracies(scores, labels) == {"top1": 0.1, "top5": 0.5, "mean_class_accuracy": 0.1}
    assert (ranks(scores, labels) == 0).tolist() == (scores.argmax(1) == labels).tolist()


def test_what_is_no_score_is_refused():
    scores, labels = drawn(5, 3)
    scores[3, 1] = np.nan
    with pytest.raises(ValueError, match="row 3 are NaN"):
        accuracies(scores, labels)
    with pytest.raises(ValueError, match="0 videos"):
        accuracies(scores[:0], labels[:0])


@pytest.mark.parametrize(
    "k, clips, expected",
    [
        (1, 1, [0]),
        (2, 1, [0]),
        (3, 1, [1]),
        (10, 1, [4]),
        (10, 2, [0, 9]),
        (10, 5, [0, 2, 5, 7, 9]),
        (10, 10, [*range(10)]),
        (6, 5, [0, 1, 3, 4, 5]),
        (9, 5, [0, 2, 4, 6, 8]),
    ],
)
def test_an_even_spread(k, clips, expected):
    assert spread_of(k, clips) == expected
    if clips > 1:
        wanted = np.linspace(0, k - 1, clips)
        assert (np.abs(np.array(expected) - wanted) <= 0.5 + 1e-9).all() and len(set(expected)) == clips


def test_more_clips_than_there_are():
    with pytest.raises(ValueError, match="3 of 2 clips"):
        spread_of(2, 3)


@pytest.mark.parametrize(
    "clips, counts", [(1, [1]), (2, [1, 2]), (7, [1, 2, 5, 7]), (10, [1, 2, 5, 10]), (12, [1, 2, 5, 10, 12])]
)
def test_accuracy_by_clips_is_that_of_the_chosen_clips(clips, counts):
    scores, labels = drawn(60, 8, clips)
    found = accuracies_by_clips(scores, labels)
    assert list(found) == counts and set(counts) <= {*CLIP_COUNTS, clips}
    for n, numbers in found.items():
        chosen = [scores[:, i].astype(np.float64) for i in spread_of(clips, n)]
        assert numbers == accuracies((sum(chosen) / n).astype(np.float32), labels)
    assert found[clips] == accuracies(average(scores), labels)


def test_scikit_learn_agrees_on_the_confusion_matrix():
    scores, labels = drawn(300, 9)
    predictions = scores.argmax(1)
    found = confusion_matrix(labels, predictions, 11)  # two classes that do not occur
    assert found.tolist() == sklearn_confusion(labels, predictions, labels=range(11)).tolist()


def test_classes_that_are_confused_stand_together():
    """Groups of three classes that are confused with each other, shuffled: the order has them side by side again."""
    rng = np.random.default_rng(3)
    group = rng.permutation(np.arange(12) // 3)
    matrix = np.where(group[:, None] == group, rng.integers(3, 9, (12, 12)), 0) + 20 * np.eye(12, dtype=int)
    order = confusion_order(matrix)
    assert sorted(order) == list(range(12))
    assert (np.diff(group[order]) != 0).sum() == 3


def test_classes_that_are_never_confused_come_last_in_their_order():
    matrix = np.diag([5, 0, 3, 4, 2, 1])
    assert confusion_order(matrix).tolist() == [0, 1, 2, 3, 4, 5]
    matrix[4, 2] = 1
    assert confusion_order(matrix).tolist() == [2, 4, 0, 1, 3, 5]
    matrix[2, 3] = 2
    assert confusion_order(matrix).tolist() in ([3, 2, 4, 0, 1, 5], [4, 2, 3, 0, 1, 5])  # 2 is confused with both
    assert confusion_order(np.array([[3]])).tolist() == [0]


def test_worst_confusions():
    matrix = np.array([[7, 2, 0], [5, 1, 0], [2, 1, 0]])
    assert [tuple(x) for x in worst_confusions(matrix, 3)] == [(1, 0, 5, 6), (0, 1, 2, 9), (2, 0, 2, 3)]
    assert len(worst_confusions(matrix, 10)) == 4 and worst_confusions(np.diag([1, 2]), 3) == []


def test_confident_mistakes():
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.3, 0.7], [0.3, 0.7]], np.float32)
    assert confident_mistakes(scores, np.array([1, 1, 0, 0, 0]), 3).tolist() == [0, 3, 4]
    assert confident_mistakes(scores, scores.argmax(1), 3).tolist() == []
