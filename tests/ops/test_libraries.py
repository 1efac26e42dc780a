"""csrc's libraries in use: which GPU and driver they are for, what is said if one cannot be used, and what they hold."""

import ctypes
import re
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from extension import CPU_ERROR, needs_cpu, python
from vimpac.errors import InputError
from vimpac.ops import block_mask, dispatch, info_nce, libraries
from vimpac.ops.axial_attention import AttentionCall, backends_of


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


@pytest.fixture
def cuda_library(monkeypatch):
    """A CUDA library for 8.0, 9.0 and 10.0 with the runtime of 13.1, a GPU and a driver: set(capability, driver)."""
    functions = {"vimpac_cuda_archs": lambda: b"80 90a 100", "vimpac_cuda_runtime": lambda: 13010}
    monkeypatch.setattr(libraries, "_load", lambda path: (SimpleNamespace(**functions), ""))
    monkeypatch.setattr(dispatch, "_unfit_for_triton", lambda device: "")
    monkeypatch.setattr(dispatch, "shared_memory", lambda device: 232448)
    monkeypatch.delenv("VIMPAC_BACKEND", raising=False)

    def set(capability, driver):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(libraries, "driver_version", lambda: driver)
        return functions

    return set


def attention_on_cuda():
    """The backend that attention takes for a tensor on a GPU, and why the CUDA library is not it."""
    with FakeTensorMode():
        options = {"dtype": torch.bfloat16, "device": "cuda"}
        qkv, cls_qkv = torch.empty(1, 2, 4, 4, 3, 2, 64, **options), torch.empty(1, 3, 2, 64, **options)
        call = AttentionCall(qkv, cls_qkv, ("H", "W"), None, 0.0, None, True)
        chosen, refused = dispatch.pick("axial_attention", None, backends_of(call), call)
    return chosen, refused.get("cuda", [])


@pytest.mark.parametrize(
    "capability, driver, runs",
    [
        ((9, 0), (13, 1), True),
        ((9, 0), (13, 0), True),  # any driver of the same major version has what the runtime needs
        ((9, 0), (14, 0), True),
        ((9, 0), (12, 8), False),
        ((8, 6), (12, 9), False),
        ((12, 0), (13, 1), True),
        ((12, 0), (13, 0), False),  # PTX, of a newer compiler than the driver's own
        ((9, 0), None, True),  # nothing to ask
    ],
)
def test_an_old_driver_is_a_reason(cuda_library, capability, driver, runs):
    """Triton takes over, instead of an error at the first launch."""
    cuda_library(capability, driver)
    chosen, reasons = attention_on_cuda()
    assert chosen == ("cuda" if runs else "triton")
    if not runs:
        version = ".".join(map(str, driver))
        assert reasons == [
            f"the NVIDIA driver is for CUDA {version}, _ops_cuda.so was built with 13.1: update the driver, or reinstall "
            f"vimpac with the nvcc of CUDA {version} or older"
        ]


def test_a_library_without_its_runtime_is_an_old_one(cuda_library):
    del cuda_library((9, 0), (13, 1))["vimpac_cuda_runtime"]
    chosen, (reason,) = attention_on_cuda()
    assert chosen == "triton" and re.search(r"_ops_cuda\.so is older than this vimpac: reinstall vimpac", reason)


@pytest.mark.parametrize("failed, version", [(0, (12, 8)), (35, None)])
def test_asks_the_driver_for_its_version(monkeypatch, failed, version):
    """Without initialising CUDA: cuDriverGetVersion is the one function of the driver that needs no cuInit."""

    class Driver:
        def __init__(self, name):
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, number):
            number._obj.value = 12080
            return failed

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    assert libraries.driver_version.__wrapped__() == version


def test_no_driver_has_no_version(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert libraries.driver_version.__wrapped__() is None


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
        (
            "host_config.h:1: error: gcc 16 is not supported",
            r"vimpac was installed without _ops_cpu.so, which did not compile \(host_config.h:1: error: gcc 16 is not "
            r"supported\): reinstall vimpac beside",
        ),
        (b"no library", f"torch {re.escape(torch.__version__)} cannot load .*_ops_cpu.so, which was built for another machine"),
    ],
)
def test_said_at_use(tmp_path, content, shown):
    """Not at import. The default goes on without the library; naming it raises an error."""
    if isinstance(content, bytes):
        (tmp_path / "_ops_cpu.so").write_bytes(content)
    elif content:
        (tmp_path / "_ops_cpu.txt").write_text(content + "\n")
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
    """If they would have run and no other backend was named; inside a graph as well."""
    ended = python(ABSENT.format(call=call), VIMPAC_LIBRARIES=str(tmp_path), VIMPAC_BACKEND=named)
    assert ended.returncode == 0 and ended.stderr.count("MissingKernelsWarning: ") == warnings, ended.stderr
    assert not warnings or "reinstall vimpac beside this torch, with pip's --no-build-isolation" in ended.stderr


def test_training_says_it_in_its_own_words(tmp_path):
    code = """
import torch
from vimpac.config import PretrainConfig
from vimpac.ops import info_nce
from vimpac.training.device import op_calls_of, plain_ops
cpu = torch.device("cpu")
print(plain_ops(op_calls_of(PretrainConfig().model, "fp32", cpu), cpu))
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
    """The library's own sentence, without the place in its source."""
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
