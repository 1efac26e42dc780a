"""The command: exit status, one-line errors, true help."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from films import close_folder, noise, write_video
from runs import ROOT, train_main
from vimpac import __version__
from vimpac.commands import main as cli
from vimpac.console import count
from vimpac.data import store as store_module
from vimpac.data.store import TokenStore
from vimpac.data.tokenizers import PatchVQ
from vimpac.errors import InputError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(videos, store)"""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "videos").mkdir()
    write_video(folder / "videos" / "good.mp4", noise(50), codec="mpeg4")
    (folder / "videos" / "empty.mp4").touch()
    arguments = ["tokenize", str(folder / "videos"), str(folder / "store"), "--frame-size", "32", "--codes", "8"]
    assert cli.main(arguments) == 0
    return folder / "videos", folder / "store"


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
    monkeypatch.setattr(store_module, "VERIFY_ON_OPEN_BYTES", 10)
    (shard,) = store.glob("*.bin")
    shard.write_bytes(bytes(shard.stat().st_size))
    assert cli.main(arguments) == 0 and cli.main(["verify", str(store)]) == 1


def test_verify(folders, capsys):
    _, store = folders
    assert cli.main(["verify", str(store)]) == 0
    output = capsys.readouterr().out
    for part in ("every checksum and the tokenizer", "1, 4 frames at 2 a second", " 8 codes", "4 × 4 tokens", "empty.mp4"):
        assert part in output


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


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tokenize", "missing", "store"], "vimpac tokenize: error: video folder missing does not exist"),
        (["tokenize", "missing", "store", "--frame-size", "12"], "vimpac tokenize: error: frame size is 12"),
        (["verify", "missing"], "vimpac verify: error: missing is not a folder"),
        (["convert-dalle", "missing.pkl", "missing.pkl", "out"], "vimpac convert-dalle: error: "),
        (["verify", ""], "vimpac verify: error: an argument is empty"),
        (["tokenize", "", "store"], "vimpac tokenize: error: an argument is empty"),
        (["tokenize", "missing", "store", "--tokenizer-path="], "vimpac tokenize: error: an argument is empty"),
        (["synthesize", "out", "--videos", "0"], "vimpac synthesize: error: videos is 0"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path):
    command = [sys.executable, "-m", "vimpac", *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1
    assert result.stdout == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["tokenize", "synthesize"])
@pytest.mark.parametrize(
    "out, said",
    [
        ("/proc/x/y", "cannot make the folder /proc/x/y: No such file or directory"),
        ("dangling", "cannot make the folder dangling: a file or a link that leads nowhere is in its place"),
        ("dangling/x", "cannot make the folder dangling/x: a file or a link that leads nowhere is in its place"),
        ("loop", "cannot make the folder loop: a file or a link that leads nowhere is in its place"),
        ("loop/x", "loop/x: Too many levels of symbolic links"),
        ("n" * 300, "n: File name too long"),
        ("file/x", "file/x: Not a directory"),
    ],
)
def test_unusable_out(command, out, said, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    videos = [str(folders[0])] * (command == "tokenize")
    assert cli.main([command, *videos, out]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"vimpac {command}: error: ") and captured.err.count("\n") == 1 and not captured.out
    assert said in captured.err
    assert {path.name for path in tmp_path.iterdir()} == {"dangling", "loop", "file"}


@pytest.mark.parametrize(
    "raised, status, message",
    [
        (InputError("too small"), 1, "vimpac verify: error: too small\n"),
        (KeyboardInterrupt(), 130, "vimpac verify: interrupted\n"),
        (OSError(28, "No space left on device"), 1, "vimpac verify: error: writing: No space left on device\n"),
    ],
)
def test_exit_status(monkeypatch, capsys, raised, status, message):
    def command():
        """Fails."""
        raise raised

    monkeypatch.setitem(cli.COMMANDS, "verify", command)
    assert cli.main(["verify"]) == status
    assert capsys.readouterr().err == message


def test_other_errors_keep_their_traceback(monkeypatch):
    def command():
        """Fails."""
        raise OSError(5, "Input/output error")

    monkeypatch.setitem(cli.COMMANDS, "verify", command)
    with pytest.raises(OSError, match="Input/output"):
        cli.main(["verify"])


def test_synthesize(tmp_path, capsys):
    options = ["--videos", "2", "--seconds", "1", "--size", "32"]
    assert cli.main(["synthesize", str(tmp_path / "out"), *options]) == 0
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 2
    assert "2 videos" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"Example: vimpac {name}" in capsys.readouterr().out


def test_train(monkeypatch, capsys, tmp_path):
    """train.py under another name."""
    seen = []
    monkeypatch.setattr("vimpac.training.pretrain.pretrain", seen.append)
    words = ["small", "--data", "store", "--output", str(tmp_path / "run"), "--alpha", "0.5"]
    assert cli.main(["train", *words]) == train_main()(words) == 0
    assert seen[0] == seen[1] and seen[0].alpha == 0.5
    assert cli.main(["train", "small", "--alpha", "-1"]) == 1
    assert capsys.readouterr().err == "vimpac train: error: alpha must be 0 or a positive number, got -1.0\n"


def test_version(capsys, monkeypatch):
    """From a checkout alone, too."""
    of_torch = importlib.metadata.version("torch")
    monkeypatch.setattr(importlib.metadata, "version", {"torch": of_torch}.__getitem__)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"vimpac {__version__}, torch {of_torch}\n"


@pytest.mark.parametrize(
    "words", ["-m vimpac --version", "-m vimpac --help", "-m vimpac verify --help", "train.py demo --help"]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nobody_reads_the_output(words, unbuffered):
    """As with `| head -1`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": {**os.environ, "PYTHONUNBUFFERED": unbuffered}}
    process = subprocess.Popen([sys.executable, *words.split()], cwd=ROOT, **pipes)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    process.stderr.close()


def test_help_names_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "vimpac --version" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_import_is_light():
    code = """
import atexit, sys, vimpac.commands.main
atexit.register(lambda: print([m for m in ("torch", "av", "sklearn", "numpy") if m in sys.modules]))
sys.exit(vimpac.commands.main.main(sys.argv[1:]))
"""
    for words in (["--help"], ["train", "small", "--help"]):
        assert subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True).stdout.endswith("[]\n")


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


@pytest.mark.parametrize(
    "words",
    [
        ["tokenize", STEERING, "store"],
        ["verify", STEERING],
        ["convert-dalle", STEERING, STEERING, "out.safetensors"],
        ["train", "small", "--data", STEERING],
        ["train", "small", "--data", "store", "--model.layout", STEERING],
        ["synthesize", f"file/{STEERING}"],
    ],
)
def test_mistakes_show_names_that_steer_the_terminal(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    shown = SHOWN if "--model.layout" not in words else "bad layout"  # which shows it with repr, and the grammar below
    assert shown in error and is_harmless(error) and error.count("\n") == (1 if shown == SHOWN else 3)


def test_figures_shows_names_that_steer_the_terminal(capsys):
    from vimpac.figures import curves as figures

    assert figures.main([STEERING]) == 1
    assert SHOWN in (error := capsys.readouterr().err) and is_harmless(error)


@pytest.mark.parametrize(
    "words, said",
    [
        ("train small --batch-size x", "--batch-size is 'x', expected INT: `vimpac train small --help` lists every option"),
        ("train base --batch_size=1.5", "--batch-size is '1.5', expected INT: `vimpac train base --help` lists"),
        ("train small --model.grid 5 y 16", "--model.grid is '5 y 16', expected INT INT INT: `vimpac train small --help`"),
        ("train small --steps x", "--steps is 'x', expected {None}|INT: `vimpac train small --help`"),
        ("tokenize videos store --fps fast", "--fps is 'fast', expected FLOAT: `vimpac tokenize --help` lists"),
        ("tokenize videos store --frame-size 2147483648", "frame size is 2147483648, expected a positive multiple of 8"),
        (
            "tokenize videos store --fps 1e-6",
            "fps is 1e-06, expected a positive number of frames a second, such as 2: 0.001 to",
        ),
        ("tokenize videos store --fps 2147483648", "fps is 2147483648.0, expected a positive number"),
        ("synthesize out --size 2147483648", "size is 2147483648, expected an even number of pixels, at least 32 and at most"),
        ("synthesize out --seconds 1e300", "1e+300 seconds at 8.0 fps and size 96 are more than 100000000 pixels"),
        ("train small --d-max 18446744073709551616", "d_max must be at most 1e+09, got 1.8446744073709552e+19"),
    ],
)
def test_bad_values_name_the_field_and_its_page(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"vimpac {words.split()[0]}: error: {said}") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words", ["train small --no-such 1", "train small --model.grid 1", "tokenize", "tokenize a b --views x"]
)
def test_misspelt_options_are_explained_by_the_parser(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words.split())
    assert stopped.value.code == 2 and "--help" in capsys.readouterr().err


def test_output_that_cannot_be_written_is_named(folders):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "vimpac", "--version"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.stderr == "vimpac: error: standard output: No space left on device\n" and ended.returncode == 1


def test_counts():
    assert [count(n, "video") for n in (0, 1, 2)] == ["0 videos", "1 video", "2 videos"]
    assert [count(n, "entry", "entries") for n in (1, 2)] == ["1 entry", "2 entries"]
