"""train.py: every mistake in a store or an option is one clear line with exit status 1, and leaves nothing behind."""

import json
import os
import shutil

import pytest
import torch

from refusals import refused
from runs import arguments, files_of_at_most, train_main, write_store
from vimpac.checkpoint import list_checkpoints
from vimpac.config import PRESETS

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.endswith("demo")])
def test_no_data(main, output, preset):
    refused(main, [preset, "--output", str(output)], output, "--data is missing", "vimpac tokenize VIDEOS STORE")


def test_fine_tuning_before_the_demo(main, output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["finetune-demo", "--output", str(output)]
    refused(main, words, output, "--from runs/demo does not exist", "`make train` trains the demo's")


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
