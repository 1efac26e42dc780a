"""The command: exit status, one-line errors, true help."""

import subprocess
import sys

import numpy as np
import pytest

from test_video import noise, write_video
from vimpac import cli
from vimpac.data.store import TokenStore
from vimpac.errors import InputError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(videos, store)"""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "videos").mkdir()
    write_video(folder / "videos" / "good.mp4", noise(50), codec="mpeg4")
    (folder / "videos" / "empty.mp4").touch()
    arguments = ["tokenize", str(folder / "videos"), str(folder / "store"), "--frame-size", "32", "--codes", "16"]
    assert cli.main(arguments) == 0
    return folder / "videos", folder / "store"


def test_tokenize_reports(folders, capsys):
    videos, store = folders
    assert len(TokenStore(store)) == 1
    arguments = ["tokenize", str(videos), str(store), "--frame-size", "32", "--codes", "16"]
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    assert "1 videos were in the store already, it is complete" in output
    assert "1 videos failed:\n  empty.mp4: is an empty file" in output


def test_verify(folders, capsys):
    _, store = folders
    assert cli.main(["verify", str(store)]) == 0
    output = capsys.readouterr().out
    for part in ("every checksum is right", "1, 4 frames at 2 a second", "16 codes", "4 × 4 tokens", "empty.mp4"):
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
    "arguments, message",
    [
        (["tokenize", "missing", "store"], "vimpac tokenize: error: video folder missing does not exist"),
        (["tokenize", "missing", "store", "--frame-size", "12"], "vimpac tokenize: error: frame size is 12"),
        (["verify", "missing"], "vimpac verify: error: missing is not a folder"),
        (["convert-dalle", "missing.pkl", "missing.pkl", "out"], "vimpac convert-dalle: error: "),
        (["synthesize", "out", "--videos", "0"], "vimpac synthesize: error: videos is 0"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path):
    command = [sys.executable, "-m", "vimpac.cli", *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1
    assert result.stdout == "" and not list(tmp_path.iterdir())


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


def test_import_is_light():
    code = "import sys, vimpac.cli; print([m for m in ('torch', 'av', 'sklearn', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
