"""k-NN and nearest videos against loops."""

import math
from collections import Counter

import numpy as np
import pytest

from vimpac.errors import InputError
from vimpac.evaluation.neighbors import knn_leave_one_out, knn_predict, most_similar, resolve_neighbors


def examples(n, seed, shift=30.0):
    """Three classes around different directions, all far from the origin."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=n)
    return (rng.normal(size=(n, 5)) + np.eye(5)[labels] + shift).astype(np.float32), labels


def cosine(a, b):
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def by_hand(train, labels, test, k):
    """Votes exp(cosine / 0.07) of the k nearest, after the mean of train is taken away."""
    mean = train.astype(float).mean(0)
    answers = []
    for row in test.astype(float) - mean:
        near = sorted(((cosine(row, x - mean), label) for x, label in zip(train.astype(float), labels, strict=True)))[-k:]
        votes = Counter()
        for similarity, label in near:
            votes[label] += math.exp(similarity / 0.07)
        answers.append(max(votes, key=votes.get))
    return answers


@pytest.mark.parametrize("k", [1, 3, 20])
def test_votes_by_hand(k):
    (train, labels), (test, truth) = examples(60, 0), examples(40, 1)
    found = knn_predict(train, labels, test, k)
    assert found.tolist() == by_hand(train, labels, test, k)
    assert 0.4 < (found == truth).mean() < 1


def test_near_neighbours_outvote_many():
    train = np.array([[1, 0], [-1, 0.2], [-1, 0.3], [-1, -0.5]], np.float32)
    labels = np.array([0, 1, 1, 1])
    test = np.array([[0.9, 0.01]], np.float32)
    assert knn_predict(train, labels, test, 4).tolist() == [0] and Counter(labels.tolist()).most_common(1)[0][0] == 1


@pytest.mark.parametrize("k", [1, 7])
def test_leave_one_out_by_hand(k):
    """The mean is that of all videos: a constant that no label is in."""
    x, labels = examples(30, 0, shift=0.0)
    x -= x.mean(0)
    expected = []
    for i in range(30):
        others = np.arange(30) != i
        near = sorted((cosine(x[i], x[j]), labels[j]) for j in np.flatnonzero(others))[-k:]
        votes = Counter()
        for similarity, label in near:
            votes[label] += math.exp(similarity / 0.07)
        expected.append(max(votes, key=votes.get))
    assert knn_leave_one_out(x, labels, k).tolist() == expected


def test_as_many_neighbours_as_there_are():
    assert resolve_neighbors(None, 1000) == 20 and resolve_neighbors(None, 7) == 7 and resolve_neighbors(7, 7) == 7
    with pytest.raises(InputError, match="neighbors is 8, expected 1 to 7, the number of training videos"):
        resolve_neighbors(8, 7)
    with pytest.raises(InputError, match="neighbors is 0"):
        resolve_neighbors(0, 7)


def test_most_similar_by_hand():
    x, _ = examples(50, 0, shift=0.0)
    scores = [cosine(x[3].astype(float), row.astype(float)) for row in x]
    order = sorted((i for i in range(50) if i != 3), key=lambda i: -scores[i])
    found = most_similar(x, x[3], 10, left_out=3)
    assert [i for i, _ in found] == order[:10]
    assert [score for _, score in found] == pytest.approx([scores[i] for i in order[:10]], abs=1e-6)  # float32 unit vectors


def test_the_same_again_and_ties():
    x = np.array([[1, 0], [2, 0], [0, 1], [3, 0], [-1, 0]], np.float32)
    assert most_similar(x, x[0], 9) == [(0, 1.0), (1, 1.0), (3, 1.0), (2, 0.0), (4, -1.0)]
    assert most_similar(x, x[0], 9, left_out=0) == [(1, 1.0), (3, 1.0), (2, 0.0), (4, -1.0)]
    assert most_similar(x, x[0], 1, left_out=0) == [(1, 1.0)]
