"""The command: exit status, one-line errors, true help."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from runs import ROOT, train_main
from vimpac import __version__
from vimpac.commands import main as cli
from vimpac.console import count
from vimpac.errors import InputError


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
    """Also from a checkout that is not installed."""
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


def test_help_lists_every_command_with_what_it_does(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, first_words in {
        "tokenize": "Turn a folder of videos into",
        "synthesize": "Write labelled videos",
        "verify": "Check every checksum",
        "convert-dalle": "Convert OpenAI's pickled",
        "train": "Pre-train a model: `vimpac train --help` lists the presets",
        "figures": "Draw a figure",
        "doctor": "Print versions, devices",
    }.items():
        assert f"• {name} {first_words}" in shown
    assert shown.count("• ") == len(cli.COMMANDS)


def test_help_of_a_figure(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["figures", "curves", "--help"])
    assert stopped.value.code == 0 and "Example: vimpac figures curves" in capsys.readouterr().out


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
    for words in (["--help"], ["train", "small", "--help"], ["figures", "curves", "--help"]):
        assert subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True).stdout.endswith("[]\n")


STEERING = "a\x1b]0;owned\x07\n\x9bb\u202ec"
SHOWN = r"a\x1b]0;owned\x07\n\x9bb\u202ec"


def is_harmless(text):
    return all(line.isprintable() for line in text.splitlines()) and not set(text) & set("\x0b\x0c\x1c\x85\u2028")


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
    assert cli.main(["figures", "curves", STEERING]) == 1
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
