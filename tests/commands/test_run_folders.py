"""train.py: a run folder is one run's; nobody else writes there, and what does not fit is refused."""

import json
import os
import shutil

import pytest
import torch

from refusals import refused
from runs import arguments, metrics, write_store
from vimpac.checkpoint import list_checkpoints
from vimpac.errors import InputError
from vimpac.files.atomic import LOCK, locked
from vimpac.training.events import EventLog

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["/proc/x/y", "dangling", "loop/x", "n" * 300, "file/x"])
def test_unusable_output(main, tmp_path, store_folder, name):
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    status, error = main(arguments(store_folder, tmp_path / name))
    assert status == 1 and error.startswith("train.py: error: ") and name[:7] in error and "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} == {"dangling", "loop", "file"}


def test_empty_output(main, store_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, error = main(arguments(store_folder, ""))
    assert status == 1 and error.count("\n") == 1 and not list(tmp_path.iterdir())
    assert error.startswith("train.py: error: output must be a path")


def test_run_folder_that_exists(main, finished_run, store_folder):
    refused(main, arguments(store_folder, finished_run), finished_run, f"run folder {finished_run} exists: add --resume")


def test_folder_with_other_things(main, output, store_folder):
    output.mkdir()
    (output / "thesis.tex").touch()
    for resume in (False, True):
        refused(main, arguments(store_folder, output, resume=resume), output, "is not a run folder", "another --output")


def test_file_in_the_way(main, tmp_path, store_folder):
    (tmp_path / "file").write_text("text")
    status, error = main(arguments(store_folder, tmp_path / "file"))
    assert status == 1 and "is not a run folder" in error and (tmp_path / "file").read_text() == "text"
    status, error = main(arguments(store_folder, tmp_path / "file" / "run"))
    assert status == 1 and "Not a directory" in error and error.count("\n") == 1


@pytest.mark.parametrize("begun", [True, False])
def test_two_runs_in_one_folder(main, output, damaged_run, store_folder, begun):
    folder = damaged_run if begun else output
    with locked(folder, "as another process"):
        words = arguments(store_folder, folder, resume=begun)
        refused(main, words, folder, f"another run is writing to {folder}: wait for its end, or give another --output")
    assert main(words)[0] == 0 and not list(folder.glob(LOCK))


def test_a_run_holds_its_folder_to_its_end(main, output, store_folder, monkeypatch):
    def refused_now(*arguments):
        with pytest.raises(InputError, match="taken"), locked(output, "taken"):
            pass
        return {}

    monkeypatch.setattr("vimpac.training.pretrain.evaluate", refused_now)
    assert main(arguments(store_folder, output, steps=1))[0] == 0 and metrics(output)[-1]["final"]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"learning_rate": 0.5}, "learning_rate was 0.01, now 0.5"),
        ({"steps": 100}, "steps was 6, now 100"),
        ({"batch_size": 8}, "batch_size was 4, now 8"),
        ({"seed": 3}, "seed was 0, now 3"),
        ({"model": {"dropout": 0.0}}, "settings: model.dropout was 0.1, now 0.0. Resume"),
        ({"model": {"width": 32, "grid": (4, 4, 4)}}, "model.width was 16, now 32; model.grid was [3, 4, 4], now [4, 4, 4]"),
        ({"precision": "bf16"}, "precision was fp32, now bf16"),
    ],
)
def test_resume_with_other_settings(main, finished_run, store_folder, options, said):
    words = arguments(store_folder, finished_run, resume=True, **options)
    refused(main, words, finished_run, "cannot resume", "with other settings", said, "Resume with those of", "--continue-from")


def test_resume_on_other_videos(main, finished_run, tmp_path):
    store = write_store(tmp_path / "more", frames=(4,) * 30)
    words = arguments(store, finished_run, resume=True)
    refused(main, words, finished_run, "on other videos: videos was 25, now 30", "Give --data the first one")


@pytest.fixture(scope="module")
def foreign_store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("foreign") / "tokens", digest="e" * 64)


def test_resume_on_another_tokenizer(main, finished_run, foreign_store):
    words = arguments(foreign_store, finished_run, resume=True)
    refused(main, words, finished_run, "patch-vq dddddddddddd", "patch-vq eeeeeeeeeeee", "--tokenizer-path STORE")


def test_continue_from_another_tokenizer(main, output, finished_run, foreign_store):
    words = arguments(foreign_store, output, continue_from=str(finished_run), steps=20)
    refused(main, words, output, "patch-vq dddddddddddd", "patch-vq eeeeeeeeeeee", "--tokenizer-path STORE")


def test_init_from_another_tokenizer(main, output, finished_run, foreign_store):
    words = arguments(foreign_store, output, init_from=str(finished_run / "model.safetensors"))
    refused(main, words, output, "dddddddddddd", "eeeeeeeeeeee", "--tokenizer-path")


def test_continue_from_another_model(main, output, finished_run, store_folder):
    words = arguments(store_folder, output, {"width": 32}, continue_from=str(finished_run), steps=20)
    refused(main, words, output, "does not fit this model", "size mismatch")


def test_continue_from_the_wrong_place(main, output, tmp_path, store_folder):
    words = arguments(store_folder, output, continue_from=str(tmp_path / "none"))
    refused(main, words, output, "has no checkpoint: expected the run folder of the earlier stage")


def test_continue_from_a_run_as_long(main, output, finished_run, store_folder):
    words = arguments(store_folder, output, continue_from=str(finished_run))
    refused(main, words, output, "is at step 6, this run would end at 6", "raise --epochs or --steps")


@pytest.mark.parametrize("path", ["none.safetensors", "config.json"])
def test_init_from_what_is_no_model(main, output, finished_run, store_folder, path):
    words = arguments(store_folder, output, init_from=str(finished_run / path))
    refused(main, words, output, f"cannot read model {finished_run / path}", "a model.safetensors or a checkpoint of a run")


def test_init_from_a_checkpoint(main, output, finished_run, store_folder, foreign_store):
    checkpoint = str(list_checkpoints(finished_run)[-1])
    words = arguments(foreign_store, output, init_from=checkpoint)
    refused(main, words, output, "dddddddddddd", "eeeeeeeeeeee", "--tokenizer-path")
    folders = [output, output.with_name("same")]
    for folder, path in zip(folders, (checkpoint, str(finished_run / "model.safetensors")), strict=True):
        assert main(arguments(store_folder, folder, init_from=path, steps=1))[0] == 0
    assert metrics(folders[0]) == metrics(folders[1])


def test_init_from_a_run_folder(main, output, finished_run, store_folder, tmp_path):
    """Its model; of a run that has not ended the newest checkpoint."""
    begun = shutil.copytree(finished_run, tmp_path / "begun")
    (begun / "model.safetensors").unlink()
    folders = [tmp_path / name for name in ("file", "folder", "unfinished")]
    for folder, path in zip(folders, (finished_run / "model.safetensors", finished_run, begun), strict=True):
        assert main(arguments(store_folder, folder, init_from=str(path), steps=1))[0] == 0
    assert metrics(folders[0]) == metrics(folders[1]) == metrics(folders[2])
    (tmp_path / "empty").mkdir()
    words = arguments(store_folder, output, init_from=str(tmp_path / "empty"))
    refused(main, words, output, "it is a folder without a model.safetensors or checkpoints; expected a run folder")


def test_events_that_cannot_be_written(main, output, store_folder, monkeypatch):
    """Said once, with the file's name; the run and its metrics go on."""
    pytest.importorskip("tensorboard")
    append, calls = EventLog._append, []

    def full(log, events):
        calls.append(len(events))
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        append(log, events)

    monkeypatch.setattr(EventLog, "_append", full)
    status, error = main(arguments(store_folder, output))
    (events,) = (output / "tensorboard").iterdir()
    said = f"TensorBoard's events are no longer written, metrics.jsonl is: {events}: No space left on device\n"
    assert status == 0 and error.count(said) == 1 and "Traceback" not in error
    assert len(metrics(output)) == 7 and len(calls) == 3


def test_no_room_for_events_at_all(main, damaged_run, store_folder):
    """A file is where their folder should be."""
    pytest.importorskip("tensorboard")
    shutil.rmtree(damaged_run / "tensorboard")
    (damaged_run / "tensorboard").touch()
    shutil.rmtree(damaged_run / "checkpoints")
    (damaged_run / "metrics.jsonl").unlink()
    status, error = main(arguments(store_folder, damaged_run, resume=True))
    assert status == 0 and error.count("TensorBoard's events are no longer written") == 1 and metrics(damaged_run)[-1]["final"]
    assert f"{damaged_run / 'tensorboard'}: File exists" in error


def test_init_from_another_shape(main, output, finished_run, store_folder):
    words = arguments(store_folder, output, {"width": 32}, init_from=str(finished_run / "model.safetensors"))
    refused(main, words, output, "'width': 16", "'width': 32")


@pytest.fixture
def damaged_run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "damaged")


def test_checkpoint_cut_short(main, damaged_run, store_folder):
    path = list_checkpoints(damaged_run)[-1]
    os.truncate(path, path.stat().st_size // 2)
    words = arguments(store_folder, damaged_run, resume=True)
    refused(main, words, damaged_run, f"cannot read checkpoint {path}", "truncated, damaged", "delete it to resume from")
    path.unlink()  # the way out
    assert main(words)[0] == 0 and metrics(damaged_run)[-1]["final"]


def test_flipped_bit(main, damaged_run, store_folder):
    path = list_checkpoints(damaged_run)[-1]
    data = bytearray(path.read_bytes())
    weight = torch.load(path)["model"]["token_head.dense.weight"].numpy().tobytes()
    data[data.index(weight)] ^= 1
    path.write_bytes(data)
    refused(main, arguments(store_folder, damaged_run, resume=True), damaged_run, str(path), "checksum of", "is wrong")


@pytest.mark.parametrize("text", ["", "[]", '{"config": {}}', "{"])
def test_damaged_config(main, damaged_run, store_folder, text):
    (damaged_run / "config.json").write_text(text)
    words = arguments(store_folder, damaged_run, resume=True)
    refused(main, words, damaged_run, "config.json is damaged", "give another --output")


def test_resume_may_change_how_it_looks(main, damaged_run, store_folder):
    """Where files lie, how often to look and to save, how much to evaluate; the store may have moved."""
    moved = shutil.copytree(store_folder, damaged_run.parent / "moved")
    words = arguments(moved, damaged_run, resume=True, save_every=5, log_every=3, keep_checkpoints=1, eval_batches=2)
    assert main(words)[0] == 0
    assert metrics(damaged_run)[-1]["retrieval_clips"] == 16


@pytest.mark.parametrize("last, save_every", [(7, 100), (3, 2)])
def test_checkpoints_that_are_gone(main, damaged_run, store_folder, last, save_every):
    """The run is not begun again as if nothing had been: the evaluation, or a line after step 2, says there was one."""
    shutil.rmtree(damaged_run / "checkpoints")
    path = damaged_run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:last]))
    words = arguments(store_folder, damaged_run, resume=True, save_every=save_every)
    reached = f"{damaged_run} has no checkpoint, although its metrics reach step {min(last, 6)}"
    refused(main, words, damaged_run, reached, f"put {damaged_run / 'checkpoints'} back, or delete {path}")
    path.unlink()  # the way out
    assert main(words)[0] == 0 and metrics(damaged_run)[-1]["final"]


def test_before_its_first_checkpoint_a_run_begins_again(main, damaged_run, store_folder):
    """A line for step 2 may come before its checkpoint."""
    shutil.rmtree(damaged_run / "checkpoints")
    path = damaged_run / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    status, said = main(arguments(store_folder, damaged_run, resume=True))
    assert status == 0 and f"{damaged_run} has no checkpoint yet: its 2 updates are recomputed\n" in said
    assert [line["step"] for line in metrics(damaged_run)] == [1, 2, 3, 4, 5, 6, 6]


def test_resume_with_what_auto_stands_for(main, damaged_run, store_folder):
    assert main(arguments(store_folder, damaged_run, resume=True, precision="auto"))[0] == 0
    assert json.loads((damaged_run / "config.json").read_text())["config"]["precision"] == "fp32"


def test_resume_without_a_run_starts_one(main, output, store_folder):
    status, said = main(arguments(store_folder, output, resume=True, steps=1))
    assert status == 0 and f"{output} holds no run to resume: a new run starts\n" in said
    assert [line["step"] for line in metrics(output)] == [1, 1]
    status, said = main(arguments(store_folder, output, resume=True, steps=1))
    assert status == 0 and "no run to resume" not in said


@pytest.mark.parametrize("name", ["model.safetensors", "curves.png", "profile.json"])
def test_a_folder_where_the_run_writes_a_file(main, damaged_run, store_folder, name):
    """Refused at the start, not after the last update."""
    (damaged_run / name).unlink(missing_ok=True)
    (damaged_run / name).mkdir()
    words = arguments(store_folder, damaged_run, resume=True)
    refused(main, words, damaged_run, f"{damaged_run / name} is a folder, where the run writes a file: move it")
