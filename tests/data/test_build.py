"""Folder → store: what is stored, which options are refused, and bad files named."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stores import CONFIG, build, content

from films import greys, noise, write_video
from vimpac.data import build as build_module
from vimpac.data import report as report_module
from vimpac.data.build import tokenize_videos
from vimpac.data.format import view_set
from vimpac.data.patch_vq import PatchVQ
from vimpac.data.store import TokenStore
from vimpac.data.tokenizers import load_tokenizer
from vimpac.data.video import decode
from vimpac.errors import InputError


def test_store_holds_the_encoded_frames(videos, whole):
    store = TokenStore(whole)
    assert store.names == ["a.mp4", "b.avi", "c.mkv", "sub/d.mp4", "sub/e.mp4"]
    assert store.frames.tolist() == [6, 5, 6, 7, 6]
    assert (store.fps, store.frame_size, store.grid, store.failed) == (5.0, 32, (4, 4), {})
    tokenizer = load_tokenizer(whole)
    assert store.tokenizer.digest == tokenizer.digest
    for number, name in enumerate(store.names):
        (frames,) = decode(videos / name, 5.0, 32)
        np.testing.assert_array_equal(store.read(number), tokenizer.encode(frames[0]))


def test_summary(videos, tmp_path):
    summary = build(videos, tmp_path / "store")
    assert (summary.videos, summary.frames, summary.tokens, summary.present) == (5, 30, 30 * 16, 0)
    assert summary.seconds > 0 and summary.failed == {}


def test_views_and_given_tokenizer(videos, whole, tmp_path):
    config = replace(CONFIG, views="train", flip=False, tokenizer_path=str(whole))
    build(videos, tmp_path / "store", config)
    store, tokenizer = TokenStore(tmp_path / "store"), load_tokenizer(whole)
    assert store.tokenizer.digest == tokenizer.digest and store.views == view_set("train", flip=False)
    (frames,) = decode(videos / "b.avi", 5.0, 32, store.views)
    for view in range(6):
        np.testing.assert_array_equal(store.read(1, view=view), tokenizer.encode(frames[view]))


def test_corrupt_among_good(videos, whole, tmp_path):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for path in videos.rglob("*.*"):
        (mixed / path.relative_to(videos)).parent.mkdir(exist_ok=True)
        (mixed / path.relative_to(videos)).symlink_to(path)
    (mixed / "empty.mp4").touch()
    (mixed / "text.mp4").write_text("text")
    (mixed / "cut.avi").write_bytes((videos / "b.avi").read_bytes()[:-20_000])
    summary = build(mixed, tmp_path / "store", replace(CONFIG, tokenizer_path=str(whole)))
    assert content(tmp_path / "store") == content(whole)
    assert TokenStore(tmp_path / "store").failed == summary.failed
    assert set(summary.failed) == {"empty.mp4", "text.mp4", "cut.avi"}
    assert summary.failed["empty.mp4"] == "is an empty file" and "truncated" in summary.failed["cut.avi"]

    (mixed / "empty.mp4").unlink()
    (mixed / "empty.mp4").symlink_to(videos / "a.mp4")
    again = build(mixed, tmp_path / "store", replace(CONFIG, tokenizer_path=str(whole)))
    assert (again.videos, again.present, set(again.failed)) == (1, 5, {"text.mp4", "cut.avi"})
    assert "empty.mp4" in TokenStore(tmp_path / "store").names


def test_replaced_files_are_named(videos, whole, tmp_path):
    """A copy with other times is the same; a store that does not know its files' sizes says nothing."""
    copied, store = shutil.copytree(videos, tmp_path / "videos"), shutil.copytree(whole, tmp_path / "store")
    for path in copied.rglob("*.*"):
        os.utime(path, (0, 0))
    assert build(copied, store).changed == []
    for name in ("c.mkv", "sub/d.mp4"):
        (copied / name).write_bytes((copied / "a.mp4").read_bytes() + bytes(8))
    (copied / "a.mp4").unlink()
    (copied / "a.mp4").symlink_to("nowhere")
    summary = build(copied, store)
    assert (summary.changed, summary.present, summary.failed) == (["c.mkv", "sub/d.mp4"], 5, {})
    assert content(store) == content(whole)
    (sidecar,) = store.glob("shard*.json")
    sidecar.write_text(re.sub(r', "file_bytes": \d+|, "checksum": "\w+"', "", sidecar.read_text()))
    assert build(copied, store).changed == []


def test_fit_passes_over_corrupt_videos(videos, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").symlink_to(videos / "a.mp4")
    (tmp_path / "videos" / "b.mp4").touch()
    assert build(tmp_path / "videos", tmp_path / "store").failed == {"b.mp4": "is an empty file"}


@pytest.mark.parametrize("given_tokenizer", [False, True])
def test_all_corrupt(tmp_path, whole, given_tokenizer):
    (tmp_path / "videos").mkdir()
    for number in range(5):
        (tmp_path / "videos" / f"{number}.mp4").touch()
    config = replace(CONFIG, tokenizer_path=str(whole)) if given_tokenizer else CONFIG
    with pytest.raises(InputError, match=r"none of the 5 videos.*0\.mp4 is an empty file.*and 2 more"):
        build(tmp_path / "videos", tmp_path / "store", config)
    assert not (tmp_path / "store").exists()


def test_complete_store_is_left_alone(videos, whole, tmp_path):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    summary = build(videos, whole)
    assert (summary.videos, summary.present) == (0, 5)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fps": 4.0}, "fps 5.0, not 4.0"),
        ({"frame_size": 40}, "frame size 32, not 40"),
        ({"views": "test"}, "not ×1 center; ×1 top-left; ×1 bottom-right"),
        ({"codes": 33}, "codes 32 and seed 0, not codes 33 and seed 0"),
        ({"seed": 1}, "not codes 32 and seed 1"),
    ],
)
def test_other_settings_than_the_store(videos, whole, changes, message):
    with pytest.raises(InputError, match=message):
        build(videos, whole, replace(CONFIG, **changes))


def test_other_tokenizer_than_the_store(videos, whole, tmp_path):
    PatchVQ.fit(noise(4, 64, 64).transpose(0, 3, 1, 2), 32).save(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="tokenizer digest"):
        build(videos, whole, replace(CONFIG, tokenizer_path=str(tmp_path / "other.safetensors")))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"frame_size": 100}, "frame size is 100, expected a positive multiple of 8"),
        ({"frame_size": 0}, "frame size is 0"),
        ({"fps": 0.0}, r"fps is 0\.0, expected a positive number"),
        ({"fps": -1.0}, "fps is -1"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"codes": 1}, "codes is 1, expected 2 to 8192"),
        ({"codes": 8193}, "codes is 8193"),
        ({"seed": -1}, "seed is -1, expected 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"tokenizer": "dalle"}, "dalle needs tokenizer-path"),
        ({"tokenizer_path": "missing.safetensors"}, "does not exist"),
    ],
)
def test_bad_options(videos, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        build(videos, tmp_path / "store", replace(CONFIG, **changes))
    assert not (tmp_path / "store").exists()


def test_tokenizer_of_another_kind(videos, whole, tmp_path):
    with pytest.raises(InputError, match="holds a patch-vq tokenizer, but dalle was asked for"):
        build(videos, tmp_path / "store", replace(CONFIG, tokenizer="dalle", tokenizer_path=str(whole)))


def test_bad_folders(videos, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        build(tmp_path / "missing", tmp_path / "store")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no video file"):
        build(tmp_path / "empty", tmp_path / "store")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, expected a folder for the store"):
        build(videos, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(InputError, match="not empty and not a token store"):
        build(videos, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_store_of_another_version(videos, whole, tmp_path):
    (tmp_path / "store.json").write_text('{"format": "vimpac-tokens", "version": 7}')
    with pytest.raises(InputError, match="version 7"):
        build(videos, tmp_path)


def test_a_data_set_cannot_bring_code(videos, whole, tmp_path):
    """`vimpac tokenize . OUT` in a folder with a file for each module that is loaded here, or that Python has."""
    data = shutil.copytree(videos, tmp_path / "data")
    modules = {name.partition(".")[0] for name in [*sys.modules, *sys.stdlib_module_names]} - {"__main__", "__mp_main__"}
    for name in modules:
        (data / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'a').write({name!r} + ' ')\n")
    (tmp_path / "bin").mkdir()
    root = Path(build_module.__file__).parents[2]
    command = tmp_path / "bin" / "vimpac"  # as an installation writes it
    command.write_text(f"import sys; sys.path.append({str(root)!r}); from vimpac.commands.main import main; sys.exit(main())\n")
    words = ["tokenize", ".", tmp_path / "store", "--codes=32", "--frame-size=32", "--fps=5"]
    ended = subprocess.run([sys.executable, command, *words], cwd=data, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert content(tmp_path / "store") == content(whole)
    assert not (tmp_path / "executed").exists(), (tmp_path / "executed").read_text()


def test_deleted_videos_are_named(videos, whole, tmp_path):
    copied, store = shutil.copytree(videos, tmp_path / "videos"), shutil.copytree(whole, tmp_path / "store")
    assert build(copied, store).deleted == []
    for name in ("b.avi", "sub/d.mp4"):
        (copied / name).unlink()
    assert build(copied, store).deleted == ["b.avi", "sub/d.mp4"]
    assert content(store) == content(whole)


def test_plain_progress_lines(videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report_module, "REPORT_SECONDS", 0.0)
    tokenize_videos(videos, tmp_path / "store", CONFIG, workers=1)
    lines = capsys.readouterr().err.splitlines()
    for title, unit in (("fitting the tokenizer", "videos"), ("tokenizing", "frames")):
        (line,) = (line for line in lines if line.startswith(f"{title}: 5 of 5 videos"))
        rate = re.fullmatch(rf".* videos, (\d+\.\d) {unit}/s", line)
        assert rate and float(rate[1]) > 0, line


def test_rate_is_of_what_is_counted(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(report_module.time, "monotonic", lambda: now[0])
    report = report_module.Report(2, "fitting the tokenizer", "videos")
    now[0] += 20.0
    report(1)
    assert capsys.readouterr().err == "fitting the tokenizer: 1 of 2 videos, 0.1 videos/s\n"


def test_fewer_codes_are_explained(tmp_path, capsys):
    """Once, when the tokenizer is fitted, and with the true number."""
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", greys(30), codec="mpeg4")
    for _ in range(2):
        tokenize_videos(tmp_path / "videos", tmp_path / "store", CONFIG, workers=1)
    codes = load_tokenizer(tmp_path / "store").vocab_size
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "codes" in line)
    assert codes < 32 and line.startswith(f"the tokenizer has {codes} codes, not codes=32: only {codes} of the ")


def test_codes_that_coincide_are_explained():
    patches = np.arange(192 * 4, dtype=np.uint8).reshape(4, 192)
    for requested, reason in ((4, "only 4 of the 4 patches"), (3, "patches are so similar that codes coincide")):
        said = build_module._why_fewer_codes(2, requested, patches)
        assert said.startswith(f"the tokenizer has 2 codes, not codes={requested}: {reason}")
