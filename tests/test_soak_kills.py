"""One of the kills at random moments that tests/soak/kills.py runs many of."""

from soak.kills import tokenizing, training


def test_tokenizing(tmp_path):
    assert tokenizing(1, 0, tmp_path) == []


def test_training(tmp_path):
    assert training(1, 0, tmp_path) == []
