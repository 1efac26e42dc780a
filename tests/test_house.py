"""The rules of the house: which part may import which, what an import may do, how the package installs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A part may import itself, the leaves, and what stands beside it here. Everything flows one way.
LEAVES = {
    *("vimpac", "vimpac.errors", "vimpac.layouts", "vimpac.config", "vimpac.console", "vimpac.meta"),
    *("vimpac.dropout_rate", "vimpac.special_ids"),
    *("vimpac.files", "vimpac.files.atomic", "vimpac.files.checked", "vimpac.files.tensorfile"),
    *("vimpac.processes", "vimpac.processes.limits", "vimpac.processes.meeting", "vimpac.processes.ranks"),
}
MAY_IMPORT = {
    "vimpac.data": set(),
    "vimpac.kernels": {"vimpac.ops"},
    "vimpac.ops": {"vimpac.kernels"},
    "vimpac.model": {"vimpac.ops"},
    "vimpac.checkpoint": {"vimpac.model", "vimpac.data"},
    "vimpac.weights": {"vimpac.model", "vimpac.checkpoint", "vimpac.data.format"},
    "vimpac.released": {"vimpac.model"},
    "vimpac.figures": set(),
    "vimpac.evaluation": {"vimpac.data", "vimpac.model", "vimpac.ops", "vimpac.training.step"},
}  # training and the commands may import all


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
    return next((part for part in MAY_IMPORT if f"{module}.".startswith(f"{part}.")), None)


@pytest.mark.parametrize("path, module", list(modules()), ids=lambda x: x if isinstance(x, str) else "")
def test_imports_flow_one_way(path, module):
    part = part_of(module)
    for name in imports(path):
        if not name.startswith("vimpac") or part is None:
            continue
        leaf = any(name == leaf or name.rpartition(".")[0] == leaf for leaf in LEAVES) and part_of(name) is None
        inside = {part, *MAY_IMPORT[part]}
        assert leaf or any(f"{name}.".startswith(f"{allowed}.") for allowed in inside), f"{module} imports {name}"


def test_leaves_import_no_torch():
    for leaf in LEAVES:
        code = f"import sys, {leaf}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0, f"{leaf} imports torch or numpy"


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
