"""The extension as a build: what it is made with, what it leaves out and says, which symbols it needs and exports."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from extension import CPU_ERROR, needs_compiler, needs_cpu, python
from vimpac.commands import doctor
from vimpac.errors import InputError
from vimpac.ops import block_mask, dispatch, info_nce, libraries

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "vimpac"
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="no nm (binutils)")
needs_elf = pytest.mark.skipif(sys.platform != "linux", reason="a Mac's libraries have no table of dynamic symbols")


def load_setup(monkeypatch):
    """setup.py as a module that sets nothing up."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("vimpac_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup(monkeypatch):
    return load_setup(monkeypatch)


def test_what_can_be_built_here_is_built(setup):
    """A test run that skips the C++ kernels although there is a compiler would hide that they do not compile."""
    missing = setup.missing_tools()
    files = {"_ops_cpu": "_ops_cpu.so", "_ops_cuda": "_ops_cuda.so"}
    for name, file in files.items():
        assert name in missing or (PACKAGE / file).exists(), f"{file} is not built: run make test, or pip install -e ."
    if "_ops_cpu" not in missing:
        assert CPU_ERROR == ""


# --- symbols ----------------------------------------------------------------------------------------------------------

STABLE = re.compile(r"(aoti_torch_|torch_)\w+")  # torch's C functions, which keep their meaning from version to version
SYSTEM = re.compile(r".*@.*|_ITM_\w+|__gmon_start__|__cxa_\w+|_Unwind_\w+|_Z\w*St\w+|_Z(nw|dl|na|da)\w+|__\w+|_ZT\w+")


def symbols(path, *flags):
    listed = subprocess.run(["nm", *flags, str(path)], capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in listed.splitlines() if line.strip()]


@needs_nm
@needs_elf
@pytest.mark.parametrize("file", libraries.LIBRARIES.values())
def test_only_the_stable_abi_is_needed(file):
    """No C++ symbol of torch, c10 or at: one library serves every torch from 2.11 on."""
    path = libraries.library_path(next(name for name, of in libraries.LIBRARIES.items() if of == file))
    if not path.exists():
        pytest.skip(f"{file} is not built")
    needed = symbols(path, "-D", "--undefined-only")
    of_torch = [name for name in needed if STABLE.fullmatch(name)]
    assert of_torch and not [
        name for name in needed if re.search(r"\d(c10|at|torch|caffe2)\w*", name) and name.startswith("_Z")
    ]
    unknown = [name for name in needed if not STABLE.fullmatch(name) and not SYSTEM.fullmatch(name)]
    assert not unknown, unknown


@needs_nm
@needs_elf
@needs_cpu
def test_little_is_exported():
    """Nothing but the C functions that Python asks for, so that no other library's symbols are taken or replaced."""
    exported = set(symbols(libraries.library_path("cpu"), "-D", "--defined-only"))
    ours = {
        name
        for name in exported
        if not re.match(r"_Z\w*(St|__gnu_cxx)", name) and name not in ("__bss_start", "_edata", "_end")
    }
    assert ours == {"vimpac_cpu_isa"}


@needs_nm
@needs_cpu
def test_no_instruction_set_leaks_into_another(setup, tmp_path):
    """What is compiled for AVX-512 defines nothing that the linker could take for the same function compiled for less."""
    compiler = setup.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    for source in sorted((ROOT / "csrc").glob("*_simd.cpp")):
        built = tmp_path / f"{source.stem}.o"
        widest, flags = list(setup.ISA_FLAGS.items())[-1]
        flags = [*setup.CXX_FLAGS, *flags, "-O1", f"-DVIMPAC_ISA={widest}", "-DVIMPAC_X86", f"-I{ROOT / 'csrc'}"]
        subprocess.run([compiler, *flags, "-c", source, "-o", built], check=True)
        listed = subprocess.run(["nm", str(built)], capture_output=True, text=True, check=True).stdout
        assert not re.findall(r"^\w* [WVu] .*", listed, re.MULTILINE)


# --- what is left out -------------------------------------------------------------------------------------------------


def run_setup(*command, **environment):
    names = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment}
    return subprocess.run([sys.executable, "setup.py", *command], cwd=ROOT, env=names, capture_output=True, text=True)


def test_without_a_compiler_it_is_pure_python(tmp_path):
    """One sentence a library, and a wheel for any machine, without the libraries of an earlier build."""
    source = tmp_path / "source"
    skip = shutil.ignore_patterns(".git", ".venv", "runs", "*.egg-info", "build", "tests", "__pycache__", "*.so")
    shutil.copytree(ROOT, source, ignore=skip)
    earlier = source / "build" / "lib" / "vimpac" / "_ops_cpu.so"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    tools = tmp_path / "bin"
    tools.mkdir()  # nothing in it
    command = [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", str(tmp_path)]
    environment = {"PATH": str(tools), "HOME": str(tmp_path)}
    ended = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for name in ("_ops_cpu", "_ops_cuda", "_C"):
        assert f"vimpac: without {name}: it needs a C++ compiler (Debian: apt-get install g++, macOS" in ended.stderr
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


TAG = """
import setuptools
from distutils.core import run_setup  # setuptools' own
wheel = run_setup("setup.py", stop_after="init").get_command_obj("bdist_wheel")
wheel.ensure_finalized()
print(*wheel.get_tag())
"""


@needs_cpu
@needs_compiler
@pytest.mark.parametrize(
    "libraries, python_tags", [("cpu", ["py3", "none"]), ("cpu,python", [f"cp3{sys.version_info.minor}"] * 2)]
)
def test_a_wheel_without_c_is_for_every_python(libraries, python_tags):
    environment = {**os.environ, "VIMPAC_EXTENSION": libraries}
    ended = subprocess.run([sys.executable, "-c", TAG], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    *tags, machine = ended.stdout.split()[-3:]
    assert tags == python_tags and machine != "any"


@pytest.mark.parametrize(
    "environment, shown",
    [
        ({"VIMPAC_EXTENSION": "gpu"}, "VIMPAC_EXTENSION='gpu': gpu is none of 0, cpu, cuda, python"),
        (
            {"VIMPAC_EXTENSION": "cpu", "CXX": "/no/such/compiler"},
            "without _ops_cpu: it needs a C++ compiler, and CXX='/no/such/compiler' is none that runs",
        ),
        (
            {"VIMPAC_EXTENSION": "cpu,python", "CXX": "false"},
            "without _C: it needs a C++ compiler, and CXX='false' is none that runs",
        ),
        ({"VIMPAC_EXTENSION": "0"}, "without _ops_cpu: VIMPAC_EXTENSION=0"),
        ({"VIMPAC_EXTENSION": "cpu"}, "without _ops_cuda: VIMPAC_EXTENSION=cpu"),
    ],
)
def test_says_what_is_missing(environment, shown):
    assert shown in run_setup("--version", **environment).stderr


def test_ptx_is_for_any_newer_gpu(setup, monkeypatch, tmp_path):
    """PTX of an architecture with an "a" runs on that one alone."""
    monkeypatch.setattr(setup, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(setup, "cuda_archs", lambda _: ["80", "90a"])
    text = setup.ninja_file(tmp_path, {"_ops_cuda": tmp_path / "_ops_cuda.so"})
    assert "code=sm_90a" in text and "arch=compute_90,code=compute_90" in text and "code=compute_90a" not in text


def test_architectures(setup, monkeypatch):
    """The default leaves out what this nvcc does not know; a name that it does not know is an error."""
    monkeypatch.setattr(setup, "output", lambda *_: "sm_75\nsm_80\nsm_90")
    monkeypatch.delenv("VIMPAC_CUDA_ARCHS", raising=False)
    assert setup.cuda_archs("nvcc") == ["80", "90a"]
    for named in ("8.0 9.0a", "80;90a", "80,90a"):
        monkeypatch.setenv("VIMPAC_CUDA_ARCHS", named)
        assert setup.cuda_archs("nvcc") == ["80", "90a"]
    monkeypatch.setenv("VIMPAC_CUDA_ARCHS", "80 100")
    with pytest.raises(SystemExit, match="VIMPAC_CUDA_ARCHS: nvcc does not know 100, it knows 75 80 90 90a"):
        setup.cuda_archs("nvcc")


@pytest.mark.parametrize(
    "arch, runs, not_on",
    [
        ("80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("100", [(10, 0), (10, 3)], [(12, 0)]),
    ],
)
def test_which_gpu_runs_what(arch, runs, not_on):
    assert all(libraries.runs_on(arch, *capability) for capability in runs)
    assert not any(libraries.runs_on(arch, *capability) for capability in not_on)


# --- a library that cannot be used ------------------------------------------------------------------------------------

USE = """
import torch
from vimpac.ops import axial_attention
from vimpac.ops import libraries
print(libraries.library_error("cpu"))
qkv, cls = torch.zeros(1, 1, 1, 1, 3, 1, 1), torch.zeros(1, 3, 1, 1)
axial_attention(qkv, cls, ("T",))
try:
    axial_attention(qkv, cls, ("T",), backend="cpu")
except ValueError as error:
    print(error)
try:
    torch.ops.vimpac.axial_attention.cpu(qkv, cls, ["T"], None, 0.0, None, True)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "content, shown",
    [
        (
            None,
            r"vimpac was installed without _ops_cpu.so, which takes a C\+\+ compiler, ninja: reinstall vimpac beside",
        ),
        (b"no library", f"torch {re.escape(torch.__version__)} cannot load .*_ops_cpu.so, which was built for another machine"),
    ],
)
def test_said_at_use(tmp_path, content, shown):
    """Not at import; the default goes on without it, and who asks for it by name is told."""
    if content:
        (tmp_path / "_ops_cpu.so").write_bytes(content)
    ended = python(USE, VIMPAC_LIBRARIES=str(tmp_path), VIMPAC_BACKEND="")
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout.splitlines()
    assert len(said) == 3 and re.match(shown, said[0])
    warned = "MissingKernelsWarning: axial_attention runs on backend 'reference', slower than by its kernels, and so may other"
    assert ended.stderr.count("MissingKernelsWarning") == 1 and f"{warned} ops: {said[0]}" in ended.stderr
    assert said[1].startswith("axial_attention: backend 'cpu' cannot run this call: ") and said[0] in said[1]
    assert said[2] == f"vimpac::axial_attention.cpu cannot run: {said[0]}"


@needs_cpu
def test_a_wrong_instruction_set_is_shown():
    """As an error of every op, and by the doctor instead of a name."""
    sentence = "VIMPAC_CPU_ISA=sse9 is not one of portable, avx2, avx512"
    assert sentence in python(USE, VIMPAC_CPU_ISA="sse9", VIMPAC_BACKEND="").stderr
    nce = "import torch; from vimpac.ops import info_nce; info_nce(torch.ones(2, 2), torch.ones(2, 2))"
    assert sentence in python(nce, VIMPAC_CPU_ISA="sse9", VIMPAC_BACKEND="").stderr
    ended = python("from vimpac.commands.doctor import report; print(report())", VIMPAC_CPU_ISA="sse9")
    assert ended.returncode == 0 and sentence in ended.stdout
    assert "isa.cpp" not in ended.stdout and "VIMPAC_CPU_ISA decides" in ended.stdout


ABSENT = """
import torch
from vimpac.ops import axial_attention, block_mask, info_nce
z = torch.randn(4, 8)
for _ in range(2):
    {call}
"""


@pytest.mark.parametrize(
    "call, named, warnings",
    [
        ("info_nce(z, z); axial_attention(torch.ones(1, 2, 1, 1, 3, 1, 4), torch.ones(1, 3, 1, 4), ('T',))", "", 1),
        ("info_nce(z.half(), z.half()); info_nce(z, z)", "", 1),
        ("torch.compile(lambda z: info_nce(z, z + 1), fullgraph=True, backend='aot_eager')(z)", "", 1),
        ("info_nce(z, z, backend='reference')", "", 0),
        ("info_nce(z, z)", "reference", 0),
        ("info_nce(z, z)", "info_nce=reference", 0),
        ("block_mask(torch.ones(1, 2, 2, 2).long(), torch.zeros(1).long(), 3, backend='any')", "reference", 0),
        ("axial_attention(torch.ones(1, 65, 1, 1, 3, 1, 4), torch.ones(1, 3, 1, 4), ('T',))", "", 0),  # sdpa's anyway
    ],
)
def test_warns_once_of_kernels_that_are_not_there(tmp_path, call, named, warnings):
    """Where they would have run, and nobody asked for something else; inside a graph, too."""
    ended = python(ABSENT.format(call=call), VIMPAC_LIBRARIES=str(tmp_path), VIMPAC_BACKEND=named)
    assert ended.returncode == 0 and ended.stderr.count("MissingKernelsWarning: ") == warnings, ended.stderr
    assert not warnings or "reinstall vimpac beside this torch, with pip's --no-build-isolation" in ended.stderr


def test_training_says_it_in_its_own_words(tmp_path):
    code = """
import torch
from vimpac.config import TrainConfig
from vimpac.ops import info_nce
from vimpac.training.device import op_calls_of, plain_ops
cpu = torch.device("cpu")
print(plain_ops(op_calls_of(TrainConfig().model, "fp32", cpu), cpu))
info_nce(torch.ones(2, 2), torch.ones(2, 2))
"""
    ended = python(code, VIMPAC_LIBRARIES=str(tmp_path), VIMPAC_BACKEND="")
    assert "run as plain PyTorch" in ended.stdout and "MissingKernels" not in ended.stderr, ended.stderr


@pytest.mark.parametrize("junk, shown", [("sse9", "=sse9"), ("avx2 ", "=avx2 "), ("\x1b[2J", r"='\x1b[2J'")])
def test_instruction_sets_that_are_none(monkeypatch, junk, shown):
    """The same sentence from the check at a start, of an op by name and by choice, and of training."""
    from vimpac.training.device import check_backends

    monkeypatch.setenv("VIMPAC_CPU_ISA", junk)
    monkeypatch.delenv("VIMPAC_BACKEND", raising=False)
    sentence = f"VIMPAC_CPU_ISA{shown} is not one of portable, avx2, avx512: name one of these, or unset it"
    assert libraries.cpu_isa_error() == sentence
    z = torch.ones(2, 2)
    calls = [dispatch.check_environment, lambda: check_backends([])]
    if not CPU_ERROR:
        calls += [lambda: info_nce(z, z), lambda: info_nce(z, z, backend="cpu")]
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        assert sentence in str(error.value)


def test_an_instruction_set_beyond_the_processor(monkeypatch):
    """The library's own sentence, without where in its source it stands."""
    said = "choose, /somewhere/isa.cpp:35, VIMPAC_CPU_ISA=avx512, but this processor has avx2 at most"
    monkeypatch.setenv("VIMPAC_CPU_ISA", "avx512")
    monkeypatch.setattr(libraries, "library", lambda backend: object())
    monkeypatch.setattr(libraries, "library_facts", lambda backend: said)
    with pytest.raises(InputError, match=r"^VIMPAC_CPU_ISA=avx512, but this processor has avx2 at most: name that or less, or"):
        dispatch.check_environment()
    monkeypatch.setattr(libraries, "library_facts", lambda backend: "avx512")
    dispatch.check_environment()


# --- facts ------------------------------------------------------------------------------------------------------------


def test_facts_of_the_build():
    _C = pytest.importorskip("vimpac._C", reason="vimpac._C is not built")
    facts = _C.build()
    assert set(facts) == {"revision", "compiler", "flags", "cpu_isas", "torch", "nvcc", "cuda_archs"}
    assert all(isinstance(value, str) for value in facts.values())
    assert facts["torch"].startswith("2.") and "TORCH_TARGET_VERSION=0x020b" in facts["flags"]


def test_sample_blocks_is_the_op():
    """The blocks of numpy's function cover what the op masks, wherever their words come from."""
    _C = pytest.importorskip("vimpac._C", reason="vimpac._C is not built")
    grid, ids = (5, 16, 7), torch.tensor([0, 3, -5, 2**40 + 1])
    for seed in (0, -(2**62) + 7):
        lengths, starts, mask = _C.sample_blocks(grid, seed, ids.numpy(), 6)
        drawn = block_mask(torch.zeros(4, *grid, dtype=torch.int64), ids, seed, 6, backend="reference").mask
        assert torch.equal(torch.from_numpy(mask), drawn)
        assert lengths.shape == starts.shape == (4, 6, 3) and lengths.dtype == starts.dtype == "int32"
        union = torch.zeros(4, *grid, dtype=torch.bool)
        for clip, (length, start) in enumerate(zip(lengths, starts, strict=True)):
            for (t, h, w), (T, H, W) in zip(start, length, strict=True):
                union[clip, t : t + T, h : h + H, w : w + W] = True
        assert torch.equal(union, drawn)
    assert _C.sample_blocks((1, 1, 1), 0, ids[:0].numpy())[2].shape == (0, 1, 1, 1)
    for call, shown in (
        (((0, 1, 1), 0, ids.numpy()), "T, H and W must be at least 1, got 0"),
        (((1, 1, 1), 0, ids.numpy(), 0), "n_blocks must be at least 1, got 0"),
        (((1, 1, 1), 0, ids.numpy()[None]), r"sample_ids must be \[B\], got 2 dimensions"),
    ):
        with pytest.raises(ValueError, match=shown):
            _C.sample_blocks(*call)


def test_doctor_runs_from_a_checkout_alone(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert doctor.versions() | {"vimpac": "not installed", "torch": torch.__version__} == doctor.versions()


def test_doctor_names_every_backend(capsys):
    from vimpac.commands.main import main

    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for op, implementations in dispatch._REGISTRY.items():
        blocks = re.findall(rf"^  {op} .*\n(?:    not .*\n?)*", shown, re.MULTILINE)
        assert blocks and all(re.search(rf"\b{name}\b", block) for name in implementations for block in blocks)
    for words in ("versions", f"torch         {torch.__version__}", "_ops_cpu.so", "_ops_cuda.so", "ops on cpu with bfloat16"):
        assert words in shown
    assert CPU_ERROR in shown
    assert "can run here, but" in shown and "it can run" not in shown


def test_doctor_says_why_a_backend_is_passed_over(monkeypatch):
    monkeypatch.setitem(dispatch._REGISTRY, "made up", dict.fromkeys(("first", "second", "unlisted"), dispatch.always))
    monkeypatch.delenv("VIMPAC_BACKEND", raising=False)
    call = ("made up", ("first", "second"), ())
    _, second, unlisted = doctor.choice("made up", call)
    assert second.startswith("    not second ") and second.endswith(" can run here, but comes after first")
    assert unlisted.endswith(" can run here, but is not in the order of backends for this call")
    for named in ("second", "unheard-of"):
        monkeypatch.setenv("VIMPAC_BACKEND", named)
        assert doctor.choice("made up", call)[1].endswith(" can run here, but VIMPAC_BACKEND decides")
