"""A few of the kills at random moments that `make soak` runs many of."""

import importlib.util
from pathlib import Path


def load(name):
    path = Path(__file__).resolve().parent / "soak" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"soak_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tokenizing(tmp_path):
    assert load("kills").tokenizing(2, 0, tmp_path) == []


def test_training(tmp_path):
    assert load("kills").training(2, 0, tmp_path) == []
