"""What an evaluation is given: splits, names of classes, where the result goes."""

from pathlib import Path

import numpy as np
import pytest

from labelled_stores import write_labelled_store
from vimpac.data.labelled import ALL, LabelledVideos, LabelSource, StoreLabels, label_store
from vimpac.data.store import TokenStore
from vimpac.errors import InputError
from vimpac.evaluation.inputs import choose_split, class_names, model_labels, output_beside


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return TokenStore(write_labelled_store(tmp_path_factory.mktemp("labelled") / "store"))


def labels_of(store, **splits):
    found = {
        name: LabelledVideos(np.array(videos, np.int64), 0 * np.array(videos, np.int64)) for name, videos in splits.items()
    }
    return StoreLabels(store, "l.csv", ("a",), found)


@pytest.mark.parametrize(
    "splits, name, chosen",
    [
        ({"train": [0], "test": [1], "validation": [2]}, None, "test"),
        ({"train": [0], "test": [], "validation": [2]}, None, "validation"),
        ({"train": [0], "test": [1]}, "train", "train"),
        ({"all": [0, 1]}, None, "all"),
        ({"train": [0]}, None, "train"),
    ],
)
def test_which_split(store, splits, name, chosen):
    found_name, found = choose_split(labels_of(store, **splits), name, None)
    assert found_name == chosen and found.videos.tolist() == splits[chosen]


@pytest.mark.parametrize(
    "splits, name, said",
    [
        ({"train": [0], "test": []}, "test", "the split 'test' of l.csv has no video in the store, expected one of train"),
        ({"train": [0], "unused": [1]}, None, "the split 'test' of l.csv does not exist, expected one of train, unused"),
        ({"all": [0]}, "test", "the split 'test' of l.csv does not exist, expected one of all"),
    ],
)
def test_no_such_split(store, splits, name, said):
    with pytest.raises(InputError, match=said):
        choose_split(labels_of(store, **splits), name, None)


def test_a_run_that_divided_its_labels(store):
    labels = label_store(store, LabelSource(str(store.folder.with_suffix(".csv"))))
    both = np.concatenate([found.videos for found in labels.splits.values()])
    whole = labels_of(store, **{ALL: np.sort(both)})
    parts = whole.divided(0.25)
    for name, expected in (("train", "train"), ("validation", "validation"), (None, "validation")):
        found_name, found = choose_split(whole, name, 0.25)
        assert found_name == expected and found.videos.tolist() == parts.split(expected).videos.tolist()
    assert len(choose_split(whole, "all", 0.25)[1].videos) == 14
    assert choose_split(labels, None, 0.25)[0] == "test"  # labels that tell splits are not divided


def test_names_of_classes():
    assert class_names(("a", "b"), ["b"], 2, "l.csv") == ("a", "b")
    assert class_names(None, ["b", "a"], 2, "l.csv") == ("b", "a")
    with pytest.raises(InputError, match=r"l\.csv has 3 classes, the model 2: expected the labels that"):
        class_names(None, ["a", "b", "c"], 2, "l.csv")


def test_labels_are_matched_by_name():
    found = LabelledVideos(np.arange(4), np.array([0, 2, 2, 1]))
    assert model_labels(found, ["c", "a", "b"], ["a", "b", "c", "d"], "l.csv").tolist() == [2, 1, 1, 0]
    unused = ["c", "a", "b", "nowhere"]  # a class without a video in the split may be unknown
    assert model_labels(found, unused, ["a", "b", "c"], "l.csv").tolist() == [2, 1, 1, 0]
    with pytest.raises(InputError, match=r"the class 'c' and 1 more of l\.csv is none of the model's 1, expected 'a': use"):
        model_labels(found, ["c", "a", "b"], ["a"], "l.csv")


@pytest.mark.parametrize(
    "file, run, folder",
    [
        ("runs/x/model.safetensors", "runs/x", "runs/x/evaluation-test"),
        ("runs/x/checkpoints/step-00000500.pt", "runs/x", "runs/x/evaluation-test-step-00000500"),
        ("runs/x/best.safetensors", "runs/x", "runs/x/evaluation-test-best"),
        ("imported/model.safetensors", None, "imported/evaluation-test"),
    ],
)
def test_where_the_result_goes(file, run, folder):
    assert output_beside(Path(file), None if run is None else Path(run), "test") == Path(folder)
