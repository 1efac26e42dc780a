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


SMALL = {
    "demo": "--steps 2 --batch-size 2 --contrastive-videos 2 --eval-batches 1 --model.layers 1",
    "finetune-demo": "--steps 2 --batch-size 2 --eval-clips 2",
    "evaluate": "--clips 2",
    "probe": "--epochs 1",
}


def in_small(words):
    """A command of README, on few videos and for a short time; None for a mention, and for a preset of large models."""
    if words[0] == "make":
        preset, *rest = words[2].removeprefix("ARGS=").split()
        return ["train", preset, *rest, *SMALL[preset].split()] if preset in SMALL else None
    _, name, *rest = words
    rest = [{"new.mp4": "VIDEOS/0.mp4", "VIDEO": "VIDEOS/1.mp4"}.get(word, word) for word in rest]
    if name == "tokenize":
        new = "--tokenizer-path" not in rest
        return [name, *rest, "--frame-size", "32", "--fps", "5", *(["--codes", "16"] if new else [])]
    return [name, *rest, *SMALL.get(name, "").split()] if rest and "--help" not in rest else None


def test_the_first_hour(tmp_path, monkeypatch, capsys, undrawn):
    """README's own videos: tokenize, train, resume, verify; then labels: fine-tune, evaluate, predict; features and probes."""
    monkeypatch.chdir(tmp_path)
    for folder in ("VIDEOS", "CLASSES/jump", "CLASSES/run"):
        Path(folder).mkdir(parents=True)
        for i in range(6):
            write_video(tmp_path / folder / f"{i}.mp4", noise(75))
    run = []
    for words in commands("README.md"):
        small = in_small(words)
        first_hour = {"tokenize", "train", "verify", "evaluate", "predict", "features", "probe", "similar"}
        if small and small[0] in first_hour and small not in run:
            assert vimpac.main(small) == 0, small
            run.append(small)
    assert first_hour == {words[0] for words in run} and [x[1] for x in run if x[0] == "train"] == ["demo", "finetune-demo"]
    said = capsys.readouterr().out
    assert "top-1" in said and "VIDEOS/0.mp4" in said
    demo = next(words for words in run if words[0] == "train")
    assert vimpac.main([*demo, "--resume"]) == 0
    assert metrics(tmp_path / "runs" / "mine")[-1]["step"] == 2
    assert {"top1", "top5"} <= metrics(tmp_path / "runs" / "tuned")[-1].keys()
    assert vimpac.main(["tokenize", "VIDEOS", "STORE2", "--tokenizer-path", "STORE", "--frame-size", "64"]) == 0
    scores = {}
    exec(python_of("docs/evaluation.md").replace("STORE", "LABELLED").replace("RUN", "runs/tuned"), scores)
    assert scores["scores"].shape == (12, 2)
    read = {}
    exec(python_of("docs/probes.md"), read)
    assert read["cls"].shape[0] == len(read["names"]) == 6


def python_of(document):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    return block
