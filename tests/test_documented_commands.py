"""The commands of the documents: each parses, and those of a newcomer's first hour run, on small videos.

Not run here, and why: `make train` and `make test` (the demo takes minutes, and this is the suite), presets other than demo (an
update of Small takes half a minute on two cores), `make gpu` and launches on several machines (there are none), `pip install`
(tests/test_house.py and tests/ops/test_extension.py install from a copy), `convert-dalle` (OpenAI's files are downloads;
tests/data/test_dalle.py converts some of the same kind), benchmarks (tests/benchmarks runs each with --quick).
"""

import re
import shlex
from pathlib import Path

import pytest

from films import noise, write_video
from runs import metrics
from vimpac.commands import main as vimpac
from vimpac.commands.options import read_command
from vimpac.commands.train import parse

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def commands(document):
    """Its command lines as words: indented lines, and code within a line that begins with `vimpac`."""
    text = (ROOT / document).read_text().replace("\\\n", " ")
    lines = [*re.findall(r"^    (.*)$", text, re.MULTILINE), *re.findall(r"`(vimpac [a-z][^`]*)`", text)]
    for line in lines:
        line = line.partition(" #")[0].strip()
        if re.match(r"(vimpac [a-z]|make train ARGS=|python -m vimpac\.training\.launch )", line) and "…" not in line:
            yield shlex.split(line)


def options(document):
    """Options of training, as in the tables of a document."""
    text = (ROOT / document).read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [x for row in rows for x in re.findall(r"`(--[^`]*)`", row) if "…" not in x]


def check(words):
    if words[0] == "make":
        parse(words[2].removeprefix("ARGS=").split(), "train.py")
    elif words[0] == "python":
        parse(words[words.index("train.py") + 1 :], "train.py")
    elif words[1] == "train":
        parse(
            [word for word in words[2:] if word != "PRESET"] if words[2] != "PRESET" else ["small", *words[3:]], "vimpac train"
        )
    else:
        read_command(vimpac.COMMANDS, words[1:], "vimpac", vimpac.DESCRIPTION)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_parses(document):
    for words in commands(document):
        if len(words) > 2 and "--help" not in words:  # a name alone is a mention
            check(words)


def test_commands_are_found():
    found = [words for document in DOCUMENTS for words in commands(document)]
    assert {"tokenize", "verify", "synthesize", "figures", "convert-dalle"} <= {words[1] for words in found}
    assert sum(words[0] == "make" for words in found) >= 5
    with pytest.raises(SystemExit):
        check(["vimpac", "tokenize", "VIDEOS", "STORE", "--no-such-option"])


@pytest.mark.parametrize("option", options("docs/training.md"))
def test_every_option_of_a_table_parses(option):
    parse(["small", "--data", "STORE", *option.split()], "train.py")


def test_the_first_hour(tmp_path, monkeypatch, capsys, undrawn):
    """README's own videos: tokenize, train, resume, verify, and tokens of more videos with the same vocabulary."""
    monkeypatch.chdir(tmp_path)
    Path("VIDEOS").mkdir()
    for i in range(6):
        write_video(tmp_path / "VIDEOS" / f"{i}.mp4", noise(75))
    made = [words for words in commands("README.md") if words[0] == "make"]
    demo = made[0][2].removeprefix("ARGS=").split()
    small = ["--steps", "2", "--batch-size", "2", "--contrastive-videos", "2", "--eval-batches", "1", "--model.layers", "1"]
    for words in commands("README.md"):
        if words[:2] == ["vimpac", "tokenize"]:
            assert vimpac.main([*words[1:], "--frame-size", "32", "--codes", "16", "--fps", "5"]) == 0
        elif words == made[0]:
            assert vimpac.main(["train", *demo, *small]) == 0
        elif words[:2] == ["vimpac", "verify"]:
            assert vimpac.main(words[1:]) == 0
    assert vimpac.main(["train", *demo, *small, "--resume"]) == 0
    assert metrics(tmp_path / "runs" / "mine")[-1]["step"] == 2
    assert vimpac.main(["tokenize", "VIDEOS", "STORE2", "--tokenizer-path", "STORE", "--frame-size", "64"]) == 0
