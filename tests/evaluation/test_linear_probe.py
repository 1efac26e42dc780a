"""The linear probe against loops over scikit-learn, and its held-out part."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from vimpac.evaluation.linear import STRENGTHS, held_out_part, linear_probe


def examples(n, seed):
    """Three classes in the last three of 12 features, which vary a thousand times less than the others."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    x = rng.normal(size=(n, 12))
    x[:, 9:] += 2 * np.eye(3)[labels]
    return (x * np.array([1000.0] * 9 + [1.0] * 3)).astype(np.float32), labels


def scaled(train, *others):
    mean, deviation = train.astype(float).mean(0), train.astype(float).std(0)
    return [(x - mean) / deviation for x in (train, *others)]


def test_chooses_what_a_loop_chooses():
    """Some labels are wrong: fitted on the held-out videos as well, the largest C would seem best."""
    (train, labels), (test, truth) = examples(90, 0), examples(90, 1)
    labels[::4] = (labels[::4] + 1) % 3
    held = held_out_part([f"{i}.mp4" for i in range(90)], labels)
    best, strength = -1.0, None
    fit, chosen = scaled(train[~held], train[held])
    for c in STRENGTHS:
        found = LogisticRegression(C=c, max_iter=1000).fit(fit, labels[~held]).score(chosen, labels[held])
        if found > best:
            best, strength = found, c
    fit, asked = scaled(train, test)
    expected = LogisticRegression(C=strength, max_iter=1000).fit(fit, labels).predict(asked)
    guesses, c = linear_probe(train, labels, test, held)
    assert c == strength and np.array_equal(guesses, expected)
    assert (guesses == truth).mean() > 0.5
    leaking = [LogisticRegression(C=c, max_iter=1000).fit(fit, labels).score(fit[held], labels[held]) for c in STRENGTHS]
    assert STRENGTHS[int(np.argmax(leaking))] != strength


def test_without_a_held_out_part():
    (train, labels), (test, _) = examples(30, 0), examples(30, 1)
    guesses, strength = linear_probe(train, labels, test, np.zeros(30, bool))
    fit, asked = scaled(train, test)
    assert strength == 1.0 and np.array_equal(guesses, LogisticRegression(max_iter=1000).fit(fit, labels).predict(asked))


def test_constant_features():
    (train, labels), (test, _) = examples(30, 0), examples(30, 1)
    train[:, 0] = test[:, 0] = 7
    assert np.isfinite(linear_probe(train, labels, test, held_out_part([str(i) for i in range(30)], labels)).guesses).all()


def test_held_out_is_the_same_share_of_each_class():
    labels = np.array([0] * 50 + [1] * 10 + [2] * 2 + [3])
    names = [f"video {i}" for i in range(63)]
    held = held_out_part(names, labels)
    assert np.bincount(labels[held], minlength=4).tolist() == [10, 2, 1, 0]
    order = np.random.default_rng(0).permutation(63)
    again = held_out_part([names[i] for i in order], labels[order])
    assert np.array_equal(again, held[order])  # by name, not by place
    assert not np.array_equal(held_out_part([f"{x}!" for x in names], labels), held)


@pytest.mark.parametrize("name", ["\udcff.mp4", "日本.mp4", ""])
def test_any_name(name):
    assert held_out_part([name, "b"], np.array([0, 0])).sum() == 1
