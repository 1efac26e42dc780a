"""The folder of an evaluation: whole or not there, and nothing of the user's is lost."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pytest

from refusals import tree
from vimpac.errors import InputError
from vimpac.evaluation import folder as module
from vimpac.evaluation.folder import INDEX, check_replaceable, replacing_folder, write_confusion, write_scores
from vimpac.files.checked import load_json, unsealed


def write(folder, text="one"):
    (folder / INDEX).write_text(json.dumps({"format": module.FORMAT, "text": text}))
    (folder / "confusion.csv").write_text(text)


@pytest.fixture
def out(tmp_path):
    """The folder of an earlier evaluation."""
    with replacing_folder(tmp_path / "out") as temporary:
        write(temporary)
    return tmp_path / "out"


def test_appears_at_the_end(tmp_path):
    with replacing_folder(tmp_path / "new" / "out") as temporary:
        write(temporary)
        assert not (tmp_path / "new" / "out").exists()
    assert set(tree(tmp_path)) == {f"new/out/{INDEX}", "new/out/confusion.csv"}


def test_replaces_all_files_of_an_earlier_one(out):
    with replacing_folder(out) as temporary:
        (temporary / INDEX).write_text(json.dumps({"format": module.FORMAT}))
        assert (out / "confusion.csv").read_text() == "one"
    assert set(tree(out.parent)) == {f"out/{INDEX}"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_earlier_one(out, error):
    before = tree(out.parent)
    with pytest.raises(error), replacing_folder(out) as temporary:
        write(temporary, "two")
        raise error
    assert tree(out.parent) == before and [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_error_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError), replacing_folder(tmp_path / "new" / "out") as temporary:
        write(temporary)
        raise ValueError
    assert not list(tmp_path.iterdir())


def _killed(out, place):
    original = os.rename

    def rename(source, target):
        rename.calls += 1
        if rename.calls == place:
            os.kill(os.getpid(), signal.SIGKILL)
        original(source, target)

    rename.calls = 0
    module.os.rename = rename
    with replacing_folder(out) as temporary:
        write(temporary, "two")


@pytest.mark.parametrize("place", [1, 2])
def test_a_killed_run_loses_nothing(out, place):
    """Before the earlier folder is moved away, and before the new one takes its place; the next run cleans up."""
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(out, place))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = out if place == 1 else out.with_name("out.old")
    assert (kept / "confusion.csv").read_text() == "one"
    with pytest.raises(ValueError), replacing_folder(out):
        raise ValueError
    assert (out / "confusion.csv").read_text() == "one"
    with replacing_folder(out) as temporary:
        write(temporary, "three")
    assert set(tree(out.parent)) == {f"out/{INDEX}", "out/confusion.csv"} and (out / "confusion.csv").read_text() == "three"
    assert len(list(out.parent.iterdir())) == 1


def test_two_at_a_time(out):
    with replacing_folder(out) as temporary:
        with pytest.raises(InputError, match="out is being written by another evaluation"), replacing_folder(out):
            pass
        write(temporary, "two")
    assert (out / "confusion.csv").read_text() == "two"


def test_behind_a_link(out):
    link = out.with_name("link")
    link.symlink_to("out")
    with replacing_folder(link) as temporary:
        write(temporary, "two")
    assert link.is_symlink() and (out / "confusion.csv").read_text() == "two"


@pytest.mark.parametrize(
    "name, said", [("notes.txt", "holds notes.txt"), ("sub", "holds sub"), ("confusion.csv", f"holds no {INDEX}")]
)
def test_what_no_evaluation_wrote(tmp_path, name, said):
    (tmp_path / "out").mkdir()
    check_replaceable(tmp_path / "out")  # empty
    (tmp_path / "out" / name).mkdir() if name == "sub" else (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(InputError, match=said), replacing_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "vimpac-tokens"}'])
def test_json_of_something_else(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(InputError, match="choose another --output"):
        check_replaceable(tmp_path)


def test_a_file_or_a_dangling_link_in_its_place(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(InputError, match="exists and is no folder"):
            check_replaceable(tmp_path / name)


def test_what_appears_meanwhile_is_not_lost(out):
    with pytest.raises(InputError, match=r"holds notes\.txt"), replacing_folder(out) as temporary:
        write(temporary, "two")
        (out / "notes.txt").write_text("mine")
    assert (out / "notes.txt").read_text() == "mine" and (out / "confusion.csv").read_text() == "one"


def test_names_that_are_no_text(tmp_path):
    """Bytes of a file name that are not UTF-8, line ends and quotes."""
    names = ["a\udcffb.mp4", 'x,"y"\n.mp4']
    scores = np.array([[0.75, 0.25], [0.1, 0.9]], np.float32)
    assert write_scores(tmp_path, names, np.array([0, 0]), scores, ["é", "b\udcff"])[0] == "scores.parquet"
    from pyarrow import parquet

    found = parquet.read_table(tmp_path / "scores.parquet").to_pylist()
    assert found == [
        {"video": r"a\udcffb.mp4", "label": "é", "prediction": "é", "score_é": 0.75, r"score_b\udcff": 0.25},
        {"video": names[1], "label": "é", "prediction": r"b\udcff", "score_é": scores[1, 0], r"score_b\udcff": scores[1, 1]},
    ]
    write_confusion(tmp_path / "c.csv", np.array([[1, 0], [2, 3]]), ["é", "b\udcff"])
    assert (tmp_path / "c.csv").read_text() == "class \\ predicted,é,b\\udcff\né,1,0\nb\\udcff,2,3\n"


def test_pretraining_has_a_checksum(tmp_path):
    module.write_pretraining(tmp_path, {"model": "m"}, {"mask_accuracy": 0.5, "cl_loss": None})
    names = {"format", "version", "kind", "model", "mask_accuracy", "cl_loss"}
    assert unsealed(*load_json(tmp_path / INDEX), names)["mask_accuracy"] == 0.5
    check_replaceable(tmp_path)
