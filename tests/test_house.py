"""The rules of the house: which part may import which, what an import may do, how the package installs."""

import ast
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up. A file may import its own floor and those below it, and no two files import each other.
FLOORS = (
    ("vimpac", "vimpac.errors", "vimpac.layouts", "vimpac.dropout_rate", "vimpac.meta"),
    ("vimpac.config",),
    ("vimpac.files", "vimpac.processes", "vimpac.console"),
    ("vimpac.data", "vimpac.figures"),
    ("vimpac.kernels", "vimpac.distributed"),
    ("vimpac.ops",),
    ("vimpac.model",),
    ("vimpac.checkpoint", "vimpac.weights", "vimpac.released", "vimpac.convert", "vimpac.snapshot"),
    ("vimpac.evaluation",),
    ("vimpac.training",),
    ("vimpac.commands", "vimpac.__main__"),
)
PLAIN_FLOORS = 3  # that import neither torch nor numpy
APART = ("vimpac.data", "vimpac.figures")  # know nothing of each other, although they share a floor
MOST_LINES = {"": 400, "kernels": 800}  # of a file
MOST_LINES_A_FUNCTION = 60
MOST_PARAMETERS = 16  # of a kernel


def modules():
    for folder, package in ((ROOT / "vimpac", "vimpac"), (ROOT / "kernels", "vimpac.kernels")):
        for path in sorted(folder.rglob("*.py")):
            yield path, ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(module):
    """The part of a floor that a module belongs to, such as vimpac.data; "vimpac" is the package's own file."""
    return ".".join(module.split(".")[:2])


FLOOR = {part: i for i, floor in enumerate(FLOORS) for part in floor}
NAMES = {module for _, module in modules()}


def imported_modules(path):
    """Our modules that a file imports, inside functions as well: `from a.b import c` is a.b.c where that is a module."""
    for name in imports(path):
        if name.split(".")[0] == "vimpac":
            found = next(x for x in (name, name.rpartition(".")[0]) if x in NAMES)
            if found != "vimpac.kernels":  # the folder, not a file
                yield found


@pytest.mark.parametrize("path, module", list(modules()), ids=lambda x: x if isinstance(x, str) else "")
def test_no_import_goes_up(path, module):
    for name in imported_modules(path):
        part, own = part_of(name), part_of(module)
        assert FLOOR[part] <= FLOOR[own], f"{module} imports {name}, which is above it"
        assert part == own or part not in APART or own not in APART, f"{module} imports {name}"


def test_no_two_files_import_each_other():
    graph = {module: set(imported_modules(path)) - {module} for path, module in modules()}
    circle = TopologicalSorter(graph)
    try:
        circle.prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_the_ground_floors_import_no_torch():
    for module in sorted(name for name in NAMES if FLOOR[part_of(name)] < PLAIN_FLOORS):
        code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0, f"{module} imports torch or numpy"


def python_files():
    folders = ("vimpac", "kernels", "benchmarks", "tools", "tests")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))] + [
        ROOT / "train.py",
        ROOT / "setup.py",
    ]


def test_files_are_short():
    for path in python_files():
        most = MOST_LINES.get(path.relative_to(ROOT).parts[0], MOST_LINES[""])
        lines = len(path.read_text().splitlines())
        assert lines <= most, f"{path.relative_to(ROOT)} has {lines} lines, at most {most}: split it by what it does"


def test_functions_are_short():
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            where = f"{path.relative_to(ROOT)}: {node.name}"
            if "kernels" in path.parts and any("jit" in ast.unparse(x) for x in node.decorator_list):
                count = len(node.args.args)
                assert count <= MOST_PARAMETERS, f"{where} has {count} parameters, at most {MOST_PARAMETERS}"
            else:
                lines = node.end_lineno - node.lineno + 1
                assert lines <= MOST_LINES_A_FUNCTION, f"{where} has {lines} lines, at most {MOST_LINES_A_FUNCTION}"


def test_kernels_is_imported_as_vimpac_kernels():
    for path, module in modules():
        assert not any(name.split(".")[0] == "kernels" for name in imports(path)), f"{module} imports kernels"
    code = "import vimpac.kernels; print(list(vimpac.kernels.__path__)[0])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout
    assert Path(found.strip()).name == "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_catch_all_module():
    assert not [path for path, _ in modules() if path.stem in ("utils", "util", "misc", "helpers", "common")]


def test_import_does_no_work():
    """No device is asked for, no logging set up, no output; torch's compiler stays out, unless torch imports it itself."""
    code = """
import logging, sys, torch
torch.cuda.is_available = torch.cuda._lazy_init = lambda *a: (_ for _ in ()).throw(AssertionError("asked for CUDA"))
before = "torch._dynamo" in sys.modules
import vimpac.ops, vimpac.model, vimpac.convert, vimpac.config, vimpac.commands.main, vimpac.training.pretrain
assert ("torch._dynamo" in sys.modules) == before
assert not logging.getLogger().handlers
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_wheel_holds_the_package(tmp_path):
    """Built from a copy, so that nothing is left in the checkout."""
    import shutil
    import zipfile

    source = tmp_path / "source"
    skip = shutil.ignore_patterns(".git", ".venv", "runs", "*.egg-info", "build", "tests", "__pycache__", "*.so")
    shutil.copytree(ROOT, source, ignore=skip)
    (source / "kernels" / "probe.py").write_text("VALUE = 7\n")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*command, str(source)], check=True, capture_output=True, env={**os.environ, "VIMPAC_EXTENSION": "0"})
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"vimpac/{path.relative_to(ROOT / 'vimpac')}" for path, _ in modules() if ROOT / "vimpac" in path.parents}
    assert expected - {"vimpac/kernels/__init__.py"} <= names
    assert "vimpac/kernels/probe.py" in names and not any(name.startswith("kernels/") for name in names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import vimpac.kernels.probe as p; print(p.VALUE)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True)
    assert run.stdout.strip() == "7", run.stderr
