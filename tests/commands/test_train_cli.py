"""train.py: every mistake is one clear line with exit status 1, and leaves nothing behind."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from extension import CPU_ERROR
from runs import ROOT, arguments, files_of_at_most, metrics, train_main, write_store
from vimpac.checkpoint import list_checkpoints
from vimpac.config import PRESETS, ModelConfig, TrainConfig
from vimpac.errors import InputError
from vimpac.files.atomic import LOCK, locked
from vimpac.processes.ranks import LAUNCHER
from vimpac.training import launch
from vimpac.training.events import EventLog

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def main(capsys):
    """main(words) → (exit status, standard error); nothing goes to standard output."""

    def call(words):
        status = train_main()(words)
        captured = capsys.readouterr()
        assert captured.out == ""
        return status, captured.err

    return call


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(main, words, output, *parts, lines=1):
    """Expect one error (of one line, but for the layout grammar) with these parts, and no change under `output`."""
    before = tree(output) if output.exists() else None
    status, error = main(words)
    assert status == 1, error
    assert error.startswith("train.py: error: ") and error.count("\n") == lines
    for part in parts:
        assert part in error
    assert (tree(output) if output.exists() else None) == before


# --- the store ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run"


def test_missing_store(main, output, tmp_path):
    store = tmp_path / "none"
    way_out = f"make one with `vimpac tokenize VIDEOS {store}`"
    refused(main, arguments(store, output), output, f"{store} is not a folder, expected a token store", way_out)


def test_not_a_store(main, output, tmp_path):
    (tmp_path / "videos").mkdir()
    refused(main, arguments(tmp_path / "videos", output), output, "videos is not a token store", "vimpac tokenize VIDEOS OUT")


@pytest.fixture
def broken_store(store_folder, tmp_path):
    return shutil.copytree(store_folder, tmp_path / "broken")


def test_unfinished_store(main, output, broken_store):
    (broken_store / "store.json").unlink()
    refused(main, arguments(broken_store, output), output, "unfinished store", "run the same `vimpac tokenize` again")


def test_store_of_another_version(main, output, broken_store):
    index = json.loads((broken_store / "store.json").read_text())
    (broken_store / "store.json").write_text(json.dumps({**index, "version": 99}))
    refused(main, arguments(broken_store, output), output, "version 99, this program reads version 1", "tokenize the videos")


def test_truncated_shard(main, output, broken_store):
    (shard,) = broken_store.glob("*.bin")
    size = shard.stat().st_size
    os.truncate(shard, size - 2)
    refused(
        main, arguments(broken_store, output), output, f"{shard} is truncated", f"has {size - 2} bytes, {size} were written"
    )


def test_damaged_shard(main, output, broken_store):
    (shard,) = broken_store.glob("*.bin")
    data = bytearray(shard.read_bytes())
    data[17] ^= 1
    shard.write_bytes(data)
    refused(main, arguments(broken_store, output), output, f"{shard} is damaged", "crc32", "tokenize again")


def test_frame_size(main, output, store_folder):
    words = arguments(store_folder, output, {"grid": (3, 8, 8)})
    refused(main, words, output, "frames of 32 px, which is 4×4 tokens", "(3, 8, 8)", "--frame-size 64", "--model.grid 3 4 4")


def test_grid_that_was_given_is_not_fitted(main, output, store_folder, monkeypatch):
    """The demo fits the grid to the store; a grid on the command line is kept, or refused like any preset's."""
    words = ["demo", "--data", str(store_folder), "--output", str(output)]
    refused(main, [*words, "--model.grid", "3", "8", "8"], output, "frames of 32 px", "(3, 8, 8)", "--model.grid 3 4 4")
    seen = []
    monkeypatch.setattr("vimpac.training.pretrain.pretrain", seen.append)
    fitted = ["--model.grid", "3", "8", "8", "--fit-frame-size"]
    for options in ([], ["--model.grid=3", "4", "4"], fitted):
        assert main([*words, *options])[0] == 0
    assert [config.fit_frame_size for config in seen] == [True, False, True]


@pytest.mark.parametrize("option", ["--model.vocab-size", "--model.vocab_size"])
def test_vocabulary_is_the_stores(main, output, store_folder, option):
    words = [*arguments(store_folder, output), option, "100"]
    refused(main, words, output, "--model.vocab-size 100 cannot be chosen here", "vimpac tokenize VIDEOS STORE --codes 100")


def test_generated_videos_are_square(main, output):
    words = ["demo", "--output", str(output), "--model.grid", "5", "16", "8"]
    refused(main, words, output, "model.grid must be square to generate videos", "such as 5 16 16", "got (5, 16, 8)")


def test_clip_longer_than_every_video(main, output, store_folder):
    words = arguments(store_folder, output, {"grid": (10, 4, 4)})
    refused(main, words, output, "a clip of 10 frames is longer than every video", "the longest has 9 frames", "shorter clip")


def test_one_video(main, output, tmp_path):
    store = write_store(tmp_path / "one", frames=(5,))
    refused(main, arguments(store, output), output, "holds 1 video, expected at least 2")


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "demo"])
def test_no_data(main, output, preset):
    refused(main, [preset, "--output", str(output)], output, "--data is missing", "vimpac tokenize VIDEOS STORE")


# --- options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["T,Q", "T,,H", "", "T,HxH", "t"])
def test_bad_layout(main, output, store_folder, layout):
    words = arguments(store_folder, output, {"layout": layout})
    refused(main, words, output, f"bad layout {layout!r}", "Examples: T,H|W", lines=3)


def test_heads_that_a_layout_cannot_split(main, output, store_folder):
    words = arguments(store_folder, output, {"layout": "T|H|W"})
    refused(main, words, output, "layout 'T|H|W' cannot split 2 heads evenly over the 3 axes", "use a multiple of 3 heads")


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"micro_batch": 3}, ("contrastive_videos=4 cannot be made up of micro_batch=3", "for example --micro-batch 4")),
        ({"batch_size": 6}, ("batch_size=6 must be a multiple of contrastive_videos=4: use --batch-size 4 or 8",)),
        ({"batch_size": 0}, ("batch_size must be at least 1, got 0",)),
        ({"alpha": -1.0}, ("alpha must be 0 or a positive number, got -1.0",)),
        ({"alpha": 0.0, "mask_task": False}, ("alpha must be above 0 without the mask task, or nothing is learned, got 0.0",)),
        ({"held_out": 0.0}, ("held_out must be above 0",)),
        ({"d_max": -0.5}, ("d_max must be 0 or more seconds, got -0.5",)),
        ({"learning_rate": 0.0}, ("learning_rate must be a positive number, got 0.0",)),
        ({"contrastive_videos": 1}, ("contrastive_videos must be at least 2 with alpha=1.0", "--alpha 0", "got 1")),
        ({"init_from": "a", "continue_from": "b"}, ("init_from must be left out with continue_from=b", "got a")),
    ],
)
def test_bad_values(main, output, store_folder, options, parts):
    refused(main, arguments(store_folder, output, **options), output, *parts)


@pytest.mark.parametrize("said", ["DefaultCPUAllocator: can't allocate memory", "Storage size calculation overflowed with"])
def test_a_model_that_fits_nowhere(main, output, store_folder, monkeypatch, said):
    def too_large(*_):
        raise RuntimeError(said)

    monkeypatch.setattr("vimpac.training.pretrain_task.initial_model", too_large)
    refused(
        main, arguments(store_folder, output), output, "the model does not fit into the memory of cpu: make its --model.…", said
    )
    monkeypatch.setattr("vimpac.training.pretrain_task.initial_model", lambda *_: torch.zeros(1) @ torch.zeros(2))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):  # a mistake of ours keeps its traceback
        main(arguments(store_folder, output))


def test_a_misspelt_option(output, store_folder, capfd):
    with pytest.raises(SystemExit) as end:
        train_main()([*arguments(store_folder, output), "--lerning-rate", "1"])
    assert end.value.code == 2 and "--lerning-rate" in capfd.readouterr().err and not output.exists()


def test_other_mistakes_keep_their_traceback(output, store_folder, monkeypatch):
    def bug(config):
        raise ZeroDivisionError

    monkeypatch.setattr("vimpac.training.pretrain.pretrain", bug)
    with pytest.raises(ZeroDivisionError):
        train_main()(arguments(store_folder, output))


@pytest.mark.parametrize(
    "raised, status, said", [(OSError(28, "No space left"), 1, "No space left"), (KeyboardInterrupt(), 130, "")]
)
def test_full_disk_and_ctrl_c(main, output, store_folder, monkeypatch, raised, status, said):
    def stop(config):
        raise raised

    monkeypatch.setattr("vimpac.training.pretrain.pretrain", stop)
    code, error = main(arguments(store_folder, output))
    assert code == status and said in error and error.count("\n") <= 1


def test_a_disk_that_is_full_at_a_checkpoint(main, output, store_folder):
    """The metrics still fit. What was written before stays."""
    assert main(arguments(store_folder, output, steps=2))[0] == 0
    words = arguments(store_folder, output.parent / "next", continue_from=str(output), steps=4)
    with files_of_at_most(20_000):
        status, error = main(words)
    path = output.parent / "next" / "checkpoints" / "step-00000004.pt"
    assert status == 1 and f"train.py: error: {path}: File too large\n" in error and "Traceback" not in error
    assert not list(path.parent.iterdir()) and list_checkpoints(output)


def test_loss_that_is_not_finite(main, output, store_folder):
    status, error = main(arguments(store_folder, output, learning_rate=1e30, steps=50, warmup=0.0))
    assert status == 1 and "Traceback" not in error
    said = error[error.index("train.py: error: ") :]
    assert said.count("\n") == 1 and "is not finite, so the run stops" in said and "lower --learning-rate" in said
    assert not (output / "model.safetensors").exists()


# --- run folders ----------------------------------------------------------------------------------------------------------


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
    refused(
        main, words, output, "is a folder without a model.safetensors or checkpoints: expected a run folder, or one of these"
    )


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
    refused(main, words, damaged_run, f"cannot read checkpoint {path}", "cut short or damaged", "delete it to resume from")
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
    assert status == 0 and f"{damaged_run} has no checkpoint yet: its 2 updates are computed again\n" in said
    assert [line["step"] for line in metrics(damaged_run)] == [1, 2, 3, 4, 5, 6, 6]


def test_resume_with_what_auto_stands_for(main, damaged_run, store_folder):
    assert main(arguments(store_folder, damaged_run, resume=True, precision="auto"))[0] == 0
    assert json.loads((damaged_run / "config.json").read_text())["config"]["precision"] == "fp32"


def test_resume_without_a_run_starts_one(main, output, store_folder):
    assert main(arguments(store_folder, output, resume=True, steps=1))[0] == 0
    assert [line["step"] for line in metrics(output)] == [1, 1]


# --- the command itself ---------------------------------------------------------------------------------------------------


def python(*words, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, env=environment, **options)


def test_help_lists_every_field():
    result = python(str(ROOT / "train.py"), "large-half", "--help")
    assert result.returncode == 0 and "(default: 1024)" in result.stdout
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in result.stdout or field.name == "model"
    for field in dataclasses.fields(ModelConfig):
        assert f"--model.{field.name.replace('_', '-')}" in result.stdout


def test_help_says_how_alpha_is_multiplied():
    """Eq. 6: the temperature is a factor, too."""
    shown = " ".join(python(str(ROOT / "train.py"), "small", "--help").stdout.replace("│", " ").split())
    assert "the loss is mask + alpha · temperature · contrastive" in shown


def test_help_needs_no_torch():
    code = "import sys, train\ntry: train.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    assert python("-c", code, cwd=ROOT).stdout.endswith("False\n")


def test_the_command(store_folder, output, tmp_path):
    words = arguments(store_folder, output, steps=1)
    result = python(str(ROOT / "train.py"), *words, cwd=tmp_path)
    assert result.returncode == 0 and (output / "model.safetensors").exists(), result.stderr
    result = python(str(ROOT / "train.py"), *words, cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert (
        result.stderr
        == f"train.py: error: run folder {output} exists: add --resume to go on with it, or give another --output\n"
    )


def test_profile(store_folder, output, tmp_path):
    """A trace, and a table of where the time of an update goes."""
    result = python(str(ROOT / "train.py"), *arguments(store_folder, output, profile=True), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    trace = json.loads((output / "profile.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "optimizer" for event in trace) == 3  # updates 4 to 6
    lines = result.stderr.splitlines()
    parts = next(i for i, line in enumerate(lines) if line.startswith("part "))
    assert [line.split()[0] for line in lines[parts + 1 : parts + 5]] == ["data", "forward", "backward", "optimizer"]
    assert all(float(line.split()[1]) > 0 for line in lines[parts + 1 : parts + 5])
    assert "the host waited for the device 0 times an update" in lines
    operation = "aten::bmm" if CPU_ERROR else "axial_attention"  # without the library the definition runs
    assert any(operation in line for line in lines)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_profile_of_a_short_run(main, store_folder, output, steps):
    """Fewer updates than it would leave out and take: what there is."""
    assert main(arguments(store_folder, output, profile=True, steps=steps))[0] == 0
    assert (output / "profile.json").exists()


def test_torchrun(store_folder, output, tmp_path):
    """Both processes join; a mistake is said once, and the launcher adds nothing to it."""
    command = ["-m", "vimpac.training.launch", "--standalone", "--nproc-per-node=2", str(ROOT / "train.py")]
    result = python(*command, *arguments(store_folder, output, steps=1), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert torch.load(list_checkpoints(output)[-1])["world_size"] == 2
    result = python(*command, *arguments(store_folder, output, steps=1), cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.count(f"train.py: error: run folder {output} exists") == 1
    assert "Traceback" not in result.stderr


def test_torchrun_says_who_was_killed(tmp_path):
    """And gives each process its share of the cores, here 7."""
    script = tmp_path / "script.py"
    script.write_text("""
import os, signal, time
os.write(1, os.environ["OMP_NUM_THREADS"].encode() + b"\\n")  # at once: two processes write to one pipe
if os.environ["LOCAL_RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
""")
    code = """
import os, sys
from vimpac.processes import limits as cores
from vimpac.training import launch
os.sched_getaffinity = lambda _: range(7)
cores.cores_allowed = lambda: None
sys.exit(launch.main())
"""
    environment = {name: x for name, x in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", code, "--standalone", "--nproc-per-node=2", str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert ended.returncode == 128 + signal.SIGKILL and set(ended.stdout.split()) == {"3"}
    assert ended.stderr.startswith("rank 1 was killed by SIGKILL: most likely this machine ran out of memory")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "codes, status, said",
    [
        ([1, -signal.SIGTERM], 1, ""),  # torchrun ended the second, because the first had failed
        ([-signal.SIGTERM, 1], 1, ""),
        ([1, -signal.SIGSEGV], 128 + signal.SIGSEGV, "rank 1 was killed by SIGSEGV\n"),
        ([-signal.SIGTERM, -signal.SIGTERM], 128 + signal.SIGTERM, ""),
    ],
)
def test_torchrun_is_no_cause_itself(monkeypatch, capsys, tmp_path, codes, status, said):
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from vimpac.training import launch

    def fail(_):
        failures = {rank: ProcessFailure(rank, 100 + rank, code, str(tmp_path / "none")) for rank, code in enumerate(codes)}
        for failure in failures.values():  # who explained an error did so first
            failure.timestamp = 1 if failure.exitcode > 0 else 2
        raise ChildFailedError("script.py", failures)

    monkeypatch.setattr(run, "run", fail)
    monkeypatch.setenv(LAUNCHER, "")  # given back after the test
    assert launch.main(["--nproc-per-node=1", "script.py"]) == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "processes, given, threads", [("1", None, None), ("8", "5", "5"), ("8", None, "2"), ("99", None, "1"), ("cpu", None, "1")]
)
def test_torchrun_threads(monkeypatch, processes, given, threads):
    """What the user chose stays; one process takes all cores, as without torchrun."""
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # given back after the test
    monkeypatch.delenv("OMP_NUM_THREADS") if given is None else monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setenv(LAUNCHER, "")  # given back, too
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.setattr("vimpac.processes.limits.cores_allowed", lambda: None)
    monkeypatch.setattr("torch._utils.cpu_count", lambda: 16, raising=False)  # what torchrun asks; before torch 2.13 the next
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr("torch.distributed.run.run", lambda options: None)
    assert launch.main([f"--nproc-per-node={processes}", "train.py"]) == 0
    assert os.environ.get("OMP_NUM_THREADS") == threads


def test_torchrun_restarts(store_folder, output, tmp_path):
    """A process that is lost is started again, with all others, and the run goes on where its last checkpoint is."""
    command = [sys.executable, "-m", "vimpac.training.launch", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    words = arguments(store_folder, output, steps=60, save_every=2, resume=True, n_blocks=40)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([*command, str(ROOT / "train.py"), *words], stderr=said, stdout=said, env=environment)
        try:
            deadline = time.monotonic() + 60
            while not list_checkpoints(output) and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(children(process.pid)[1], signal.SIGKILL)
            assert process.wait(90) == 0, (tmp_path / "said").read_text()
        finally:
            process.kill()
            process.wait()
    assert [line["step"] for line in metrics(output)] == [*range(1, 61), 60]
    words = arguments(store_folder, tmp_path / "whole", steps=60, save_every=2, n_blocks=40)
    result = python(*command[1:], str(ROOT / "train.py"), *words)
    assert result.returncode == 0, result.stderr
    assert metrics(output) == metrics(tmp_path / "whole")


def children(pid):
    """Processes that a process has started."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    if not found.exists():
        pytest.skip("this system does not list a process's children")
    return [int(child) for child in found.read_text().split()]
