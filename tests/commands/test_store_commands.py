"""`vimpac tokenize` and `vimpac verify`: what they report, and damage that they find."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from films import close_folder, noise
from vimpac.commands import main as cli
from vimpac.data import shards as shards_module
from vimpac.data.patch_vq import PatchVQ
from vimpac.data.store import TokenStore


def test_tokenize_reports(folders, capsys):
    videos, store = folders
    assert len(TokenStore(store)) == 1
    arguments = ["tokenize", str(videos), str(store), "--frame-size", "32", "--codes", "8"]
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    assert "\n1 video was in the store already\n" in output
    assert "\n1 video failed:\n  empty.mp4: is an empty file\n" in output
    (videos.parent / "whole").mkdir()
    shutil.copyfile(videos / "good.mp4", videos.parent / "whole" / "good.mp4")
    assert cli.main(["tokenize", str(videos.parent / "whole"), *arguments[2:]]) == 0
    assert "\n1 video was in the store already, nothing was missing\n" in capsys.readouterr().out


def test_tokenize_names_deleted_videos(copy, tmp_path, capsys):
    """And control characters of a name are escaped."""
    videos, _, arguments = copy
    shutil.copyfile(videos / "good.mp4", videos / "odd\x1b[31m\n.mp4")
    try:
        assert cli.main(arguments) == 0
        assert "not in" not in capsys.readouterr().out
    finally:
        (videos / "odd\x1b[31m\n.mp4").unlink()
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    assert f"\n1 video of the store, not in {videos} any more; the store keeps what it has of them:\n" in output
    assert "\n  odd\\x1b[31m\\n.mp4\n" in output and "\x1b" not in output


@pytest.fixture
def copy(folders, tmp_path):
    """(videos, a copy of the store that may be damaged, the command line that adds to it)"""
    videos, store = folders
    copied = shutil.copytree(store, tmp_path / "copy")
    return videos, copied, ["tokenize", str(videos), str(copied), "--frame-size", "32", "--codes", "8"]


def test_tokenize_points_to_verify(copy, capsys):
    _, store, arguments = copy
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"`vimpac verify {store}` checks every checksum")


def test_tokenize_counts_what_it_passes_over(copy, tmp_path, capsys):
    _, _, (command, videos, *arguments) = copy
    more = shutil.copytree(videos, tmp_path / "videos")
    for name in ("a.gif", "b.GIF", "labels.csv"):
        (more / name).touch()
    assert cli.main([command, str(more), *arguments]) == 0
    assert "\n3 files passed over for the extension: 2 .gif, 1 .csv\n" in capsys.readouterr().out
    assert cli.main([command, videos, *arguments]) == 0
    assert "extension" not in capsys.readouterr().out


def test_tokenize_names_folders_that_it_cannot_look_into(copy, tmp_path, monkeypatch, capsys):
    _, _, (command, videos, *arguments) = copy
    more = shutil.copytree(videos, tmp_path / "videos")
    (more / "private").mkdir()
    close_folder(monkeypatch, more / "private")
    assert cli.main([command, str(more), *arguments]) == 0
    said = "\n1 folder could not be looked into; the store lacks what is in there:\n  private: Permission denied\n"
    assert said in capsys.readouterr().out


def test_names_that_are_no_text(folders, tmp_path):
    """On Linux a name is bytes. Such a video is tokenized, listed and reported like any other, whatever the terminal prints."""
    videos = os.fsencode(tmp_path / "videos")
    os.mkdir(videos)
    try:
        shutil.copyfile(os.fsencode(folders[0] / "good.mp4"), os.path.join(videos, b"caf\xe9.mp4"))
    except OSError:
        pytest.skip("this file system takes text only")
    open(os.path.join(videos, b"\xff.mp4"), "wb").close()
    store, vimpac = str(tmp_path / "store"), [sys.executable, "-m", "vimpac"]
    options = ["--frame-size", "32", "--codes", "8"]
    for encoding in ("utf-8", "ascii"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        for command in (["tokenize", videos, store, *options], ["verify", store]):
            ended = subprocess.run([*vimpac, *command], env=environment, capture_output=True, text=True)
            assert ended.returncode == 0, ended.stderr
            assert "  \\udcff.mp4: is an empty file\n" in ended.stdout
    assert TokenStore(store).names == ["caf\udce9.mp4"]


def test_names_do_not_depend_on_the_locale(folders, tmp_path):
    """The same names in the store, and each video once, where Python reads file names as ASCII."""
    videos = tmp_path / "videos"
    (videos / "ü").mkdir(parents=True)
    try:
        shutil.copyfile(folders[0] / "good.mp4", videos / "ü" / "日本.mp4")
    except (OSError, UnicodeError):
        pytest.skip("this file system or locale does not take such names")
    command = [sys.executable, "-m", "vimpac", "tokenize", videos, tmp_path / "store", "--frame-size", "32", "--codes", "8"]
    ascii_names = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for locale in (ascii_names, {"PYTHONUTF8": "1"}, ascii_names):
        ended = subprocess.run(command, env=os.environ | locale, capture_output=True, text=True, encoding="utf-8")
        assert ended.returncode == 0 and "failed" not in ended.stdout, ended
        assert TokenStore(tmp_path / "store").names == ["ü/日本.mp4"]


def test_tokenize_names_changed_files(copy, tmp_path, capsys):
    _, _, (command, videos, *arguments) = copy
    changed = shutil.copytree(videos, tmp_path / "videos")
    with open(changed / "good.mp4", "ab") as file:
        file.write(b"more")
    assert cli.main([command, str(changed), *arguments]) == 0
    assert "\n1 file has another size than when tokenized; the store keeps the old contents" in (out := capsys.readouterr().out)
    assert "\n  good.mp4\n" in out


@pytest.mark.parametrize(
    "damage, said", [("flip", "is damaged"), ("cut", "is truncated"), ("remove", "is missing"), ("list", "does not fit")]
)
def test_tokenize_finds_damage(copy, capsys, damage, said):
    """Before anything is written."""
    _, store, arguments = copy
    (shard,) = store.glob("*.bin")
    data = bytearray(shard.read_bytes())
    match damage:
        case "flip":
            data[3] ^= 1
            shard.write_bytes(data)
        case "cut":
            shard.write_bytes(data[:-2])
        case "remove":
            shard.unlink()
        case "list":
            sidecar = shard.with_suffix(".json")
            text = re.sub(r', "checksum": "\w+"', "", sidecar.read_text())  # which would notice it first
            sidecar.write_text(text.replace('"frames": 4', '"frames": 3'))
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"vimpac tokenize: error: {shard}") and said in captured.err and not captured.out
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before


def test_tokenize_leaves_large_stores_to_verify(copy, monkeypatch):
    """Nobody waits while terabytes are read again."""
    _, store, arguments = copy
    monkeypatch.setattr(shards_module, "VERIFY_ON_OPEN_BYTES", 10)
    (shard,) = store.glob("*.bin")
    shard.write_bytes(bytes(shard.stat().st_size))
    assert cli.main(arguments) == 0 and cli.main(["verify", str(store)]) == 1


def test_verify(folders, capsys):
    _, store = folders
    assert cli.main(["verify", str(store)]) == 0
    output = capsys.readouterr().out
    for part in ("every checksum and the tokenizer", "1, 4 frames at 2 a second", " 8 codes", "4 × 4 tokens", "empty.mp4"):
        assert part in output


def test_verify_mentions_unfinished_shards(copy, capsys):
    """They are no damage: nothing reads them, and the next run removes them."""
    _, store, arguments = copy
    assert cli.main(["verify", str(store)]) == 0 and "note" not in capsys.readouterr().out
    (store / "shard-00000-00007.bin").write_bytes(b"killed before its .json was written")
    assert cli.main(["verify", str(store)]) == 0
    output = capsys.readouterr().out
    assert "\n  note       1 shard without a .json, from a run that was killed; " in output
    assert output.endswith("\n    shard-00000-00007.bin\n")
    assert cli.main(arguments) == cli.main(["verify", str(store)]) == 0 and "note" not in capsys.readouterr().out


def test_verify_finds_damage(folders, tmp_path, capsys):
    _, store = folders
    for path in store.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (shard,) = tmp_path.glob("*.bin")
    shard.write_bytes(bytes(np.frombuffer(shard.read_bytes(), np.uint8) ^ 1))
    assert cli.main(["verify", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"vimpac verify: error: {shard} is damaged") and not captured.out


@pytest.mark.parametrize(
    "damage, said",
    [
        ("remove", "is missing"),
        ("flip", "it is damaged, its checksum is"),
        ("cut", "is not a tokenizer"),
        ("other", "or another store's"),
    ],
)
@pytest.mark.parametrize("command", ["verify", "tokenize"])
def test_damaged_tokenizer_of_a_store(copy, capsys, command, damage, said):
    _, store, arguments = copy
    path = store / "tokenizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.unlink()
    match damage:
        case "flip":
            path.write_bytes(data)
        case "cut":
            path.write_bytes(data[:-1])
        case "other":
            PatchVQ.fit(noise(4, 64, 64).transpose(0, 3, 1, 2), 16).save(path)
    assert cli.main(arguments if command == "tokenize" else ["verify", str(store)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"vimpac {command}: error: {path} ") and said in captured.err and not captured.out


STEERING = "a\x1b]0;owned\x07\n\x9bb\u202ec"
SHOWN = r"a\x1b]0;owned\x07\n\x9bb\u202ec"


def is_harmless(text):
    return all(line.isprintable() for line in text.splitlines()) and not set(text) & set("\x0b\x0c\x1c\x85\u2028")


@pytest.fixture
def steering_store(folders, tmp_path):
    """A store that names a failed video with escape codes."""
    from vimpac.data.store import finish_store

    store = shutil.copytree(folders[1], tmp_path / "store")
    finish_store(store, {f"{STEERING}.mp4": f"is {STEERING}"})
    return store


def test_verify_shows_names_that_steer_the_terminal(steering_store, capsys):
    assert cli.main(["verify", str(steering_store)]) == 0
    output = capsys.readouterr().out
    assert f"\n    {SHOWN}.mp4: is {SHOWN}\n" in output and is_harmless(output)
