"""What the documents name exists: files, scripts, commands, presets."""

import re
from pathlib import Path

import pytest

from vimpac.commands.main import COMMANDS
from vimpac.config import PRESETS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "kernels/README.md", "csrc/README.md"),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
FOLDERS = ("vimpac", "kernels", "csrc", "benchmarks", "tools", "tests", "docs")
EXAMPLES = {"json.py"}  # of a file that a stranger's folder may hold
PLACEHOLDER = re.compile(r"[A-Z]{2,}|[<*…=]")


def words(text: str) -> list[str]:
    return [word.rstrip(".:") for word in re.split(r"[\s`(),;|\"'\[\]]+", text)]


def missing(text: str) -> list[str]:
    """The paths, files and commands of a document that are not there."""
    found = [word for word in words(text) if word.startswith(tuple(f"{name}/" for name in FOLDERS))]
    paths = [path for path in found if not PLACEHOLDER.search(path.replace("README", "")) and not (ROOT / path).exists()]
    names = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")} | {"train.py", "setup.py"} | EXAMPLES
    files = [name for name in re.findall(r"`([a-z]\w*\.py)`", text) if name not in names]
    run = re.findall(r"python -m (vimpac[\w.]*\w)", text)
    modules = [x for x in run if not any((ROOT / x.replace(".", "/")).with_suffix(end).exists() for end in (".py", ""))]
    shown = "\n".join([*re.findall(r"`([^`]+)`", text), *re.findall(r"^ {4}(.*)$", text, re.MULTILINE)])
    commands = [f"vimpac {x}" for x in re.findall(r"^vimpac ([a-z][\w-]*)", shown, re.MULTILINE) if x not in COMMANDS]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    made = [f"make {x}" for x in re.findall(r"^make ([a-z]+)", shown, re.MULTILINE) if x not in targets]
    presets = re.findall(r"(?:train\.py|vimpac train|ARGS=\") ?([a-z][a-z0-9-]*)\b(?! are)", shown)
    return [*paths, *files, *modules, *commands, *made, *(x for x in presets if x not in PRESETS)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_names_exists(document):
    assert not missing((ROOT / document).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "text, named",
    [
        ("| `vimpac/ops/nothing.py` | see `docs/kernels.md`, `vimpac/ops/`.", ["vimpac/ops/nothing.py"]),
        ("`tests/test_NAME.py`, `kernels/<op>.py` and `csrc/README.md`", []),
        ("`vimpac/data/store.py`, `format.py`, `formats.py`", ["formats.py"]),
        ("run `python benchmarks/nothing.py --quick`", ["benchmarks/nothing.py"]),
        ("    vimpac tokenize VIDEOS STORE\n    vimpac tokenise VIDEOS", ["vimpac tokenise"]),
        ("`python -m vimpac.training.launch` or `python -m vimpac.launch`", ["vimpac.launch"]),
        ("`make gpu` and `make cpu` make something", ["make cpu"]),
        ('`make train ARGS="small --steps 3"` or `train.py smal --steps 3`', ["smal"]),
    ],
)
def test_what_is_missing_is_named(text, named):
    assert missing(text) == named


@pytest.mark.parametrize("document, most", [("README.md", 150), ("docs/scaling.md", 120)])
def test_documents_stay_short(document, most):
    lines = len((ROOT / document).read_text(encoding="utf-8").splitlines())
    assert lines <= most, f"{document} has {lines} lines, at most {most}: move what few need to docs/"
