"""The dispatch: which backend runs, what an error says, and that importing the ops does no work."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import vimpac.ops as ops
from vimpac.ops import autograd, dispatch

OPS = {
    "axial_attention": ["cpu", "cuda", "triton"],
    "axial_attention_backward": ["cpu", "cuda", "triton"],
    "block_mask": ["cpu", "cuda", "triton"],
    "dropout_add": ["cpu", "cuda", "triton"],
    "dropout_add_backward": ["cpu", "cuda", "triton"],
    "info_nce": ["cpu", "cuda", "triton"],
    "info_nce_backward": ["cpu", "cuda", "triton"],
    "masked_cross_entropy": ["chunked", "cpu", "cuda", "triton"],
}


def test_constants_are_marked_as_torch_marks_them():
    def asks():
        return 1

    theirs = torch.compiler.assume_constant_result(lambda: 1)
    assert vars(dispatch.constant_when_compiled(asks)) == vars(theirs) and asks() == 1


@pytest.fixture
def registry(monkeypatch):
    """An op "add" whose backends are "fast" (positive arguments only), "small" (arguments below 10) and "any"."""
    monkeypatch.delenv("VIMPAC_BACKEND", raising=False)
    monkeypatch.setitem(dispatch._REGISTRY, "add", {})
    dispatch.register("add", "fast", lambda x: [f"{x} is not positive", "no luck"] if x <= 0 else [])
    dispatch.register("add", "small", lambda x: [] if x < 10 else [f"{x} is 10 or more"])
    dispatch.register("add", "any", dispatch.always)


@pytest.mark.parametrize(
    "preference, x, chosen",
    [
        (("fast", "small", "any"), 1, "fast"),
        (("fast", "small", "any"), -1, "small"),
        (("small", "fast", "any"), 10, "fast"),
        (("missing", "any"), 1, "any"),
    ],
)
def test_first_that_can_run(registry, preference, x, chosen):
    assert dispatch.choose("add", None, preference, x) == chosen


def test_named_runs_or_raises(registry):
    assert dispatch.choose("add", "small", ("any",), 1) == "small"
    with pytest.raises(ValueError, match="add: backend 'fast' cannot run this call: -3 is not positive; no luck"):
        dispatch.choose("add", "fast", ("any",), -3)
    with pytest.raises(ValueError, match="add: no backend 'turbo'; it has any, fast, small"):
        dispatch.choose("add", "turbo", ("any",), 1)


def test_nothing_can_run(registry):
    dispatch.register("add", "odd", lambda x: [] if x % 2 else [f"{x} is even"])
    with pytest.raises(ValueError, match=r"add: no backend can run this call\. small: 10 is 10 or more\. odd: 10 is even"):
        dispatch.choose("add", None, ("small", "missing", "odd"), 10)


@pytest.mark.parametrize(
    "value, chosen",
    [
        ("", "any"),
        ("small", "small"),
        (" small ", "small"),
        ("add=small", "small"),
        ("info_nce=reference,add=small", "small"),
        (" info_nce = reference , add = small ", "small"),
        ("info_nce=reference", "any"),
    ],
)
def test_environment_names_one(registry, monkeypatch, value, chosen):
    monkeypatch.setenv("VIMPAC_BACKEND", value)
    assert dispatch.choose("add", None, ("any",), 1) == chosen
    assert dispatch.choose("add", "fast", ("any",), 1) == "fast"  # the argument wins


@pytest.mark.parametrize(
    "value, shown",
    [
        ("turbo", "no backend 'turbo'"),
        ("add=turbo", "no backend 'turbo'"),
        ("small", "10 is 10 or more"),
        ("ad=small", "'ad=small' is not OP=BACKEND with OP one of add, "),
        ("add=small,fast", "'fast' is not OP=BACKEND"),
        ("add=", "'add=' is not OP=BACKEND"),
        ("add=small=fast", "'add=small=fast' is not OP=BACKEND"),
    ],
)
def test_environment_never_falls_back(registry, monkeypatch, value, shown):
    monkeypatch.setenv("VIMPAC_BACKEND", value)
    with pytest.raises(ValueError, match=shown):
        dispatch.choose("add", None, ("any",), 10)


@pytest.mark.parametrize("value", ["turbo", "{op}=turbo"])
@pytest.mark.parametrize("op", ["axial_attention", "block_mask", "dropout_add", "info_nce", "masked_cross_entropy"])
def test_every_op_obeys_the_environment(monkeypatch, op, value):
    monkeypatch.setenv("VIMPAC_BACKEND", value.format(op=op))
    arguments = {
        "axial_attention": (torch.zeros(1, 1, 1, 1, 3, 1, 1), torch.zeros(1, 3, 1, 1), ("T",)),
        "block_mask": (torch.zeros(1, 1, 1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 0),
        "dropout_add": (torch.zeros(1), torch.zeros(1), 0.1, 0),
        "info_nce": (torch.zeros(1, 1), torch.zeros(1, 1)),
        "masked_cross_entropy": (torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), torch.zeros(1, dtype=torch.int64)),
    }
    with pytest.raises(ValueError, match=f"{op}: no backend 'turbo'; it has .*reference"):
        getattr(ops, op)(*arguments[op])


def test_environment_says_which_ops_have_a_backend(registry, monkeypatch):
    monkeypatch.setenv("VIMPAC_BACKEND", "cpu")
    having = ("axial_attention", "bias_gelu", "block_mask", "dropout_add", "info_nce", "residual_norm")
    named = f"VIMPAC_BACKEND={','.join(f'{op}=cpu' for op in having)} names it for the ops that have it"
    with pytest.raises(ValueError, match=f"^VIMPAC_BACKEND=cpu: add: no backend 'cpu'; it has any, fast, small .{named}"):
        dispatch.choose("add", None, ("any",), 1)


@pytest.mark.parametrize("wrong", [None, [1.0], np.zeros(3)], ids=["None", "list", "numpy"])
@pytest.mark.parametrize("op", ["axial_attention", "axial_attention_packed", "block_mask", "dropout_add", "info_nce"])
def test_arguments_that_are_no_tensors(op, wrong):
    rest = {
        "axial_attention": (("T",),),
        "axial_attention_packed": ((1, 1, 1), ("T",)),
        "block_mask": (0,),
        "dropout_add": (0.0,),
    }
    tensors = (wrong,) if op == "axial_attention_packed" else (wrong, wrong)
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got (builtins\.NoneType|builtins\.list|numpy\.ndarray)"):
        getattr(ops, op)(*tensors, *rest.get(op, ()))


X, IDS = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
QKV, CLS, ROWS = torch.zeros(1, 1, 1, 1, 3, 1, 1), torch.zeros(1, 3, 1, 1), torch.zeros(2, 3, 1, 1)
NUMBERS = {  # op, argument → a call with this number
    ("axial_attention", "dropout_p"): lambda p: ops.axial_attention(QKV, CLS, ("T",), None, p, 0),
    ("axial_attention_packed", "dropout_p"): lambda p: ops.axial_attention_packed(ROWS, (1, 1, 1), ("T",), None, p, 0),
    ("axial_attention_packed", "T"): lambda T: ops.axial_attention_packed(ROWS, (T, 1, 1), ("T",)),
    ("block_mask", "n_blocks"): lambda n: ops.block_mask(IDS.view(1, 1, 1, 1), IDS, 0, n_blocks=n),
    ("block_mask", "ratio"): lambda ratio: ops.block_mask(IDS.view(1, 1, 1, 1), IDS, 0, ratio=ratio),
    ("block_mask", "vocab_size"): lambda V: ops.block_mask(IDS.view(1, 1, 1, 1), IDS, 0, vocab_size=V),
    ("dropout", "p"): lambda p: ops.dropout(X, p, 0),
    ("dropout_add", "p"): lambda p: ops.dropout_add(X, X, p, 0),
    ("info_nce", "temperature"): lambda temperature: ops.info_nce(X, X, temperature),
}


@pytest.mark.parametrize("wrong", ["0.2", [0.2], 0.2j, None], ids=repr)
@pytest.mark.parametrize("op, name", NUMBERS)
def test_numbers_that_are_none(op, name, wrong):
    if (name, wrong) == ("ratio", None):
        pytest.skip("None is its default")
    with pytest.raises(TypeError, match=rf"^{name} must be a number, got {re.escape(repr(wrong))}$"):
        NUMBERS[op, name](wrong)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), 0.5], ids=lambda x: type(x).__name__)
def test_numpys_numbers_are_numbers(number):
    assert torch.equal(ops.dropout_add(X, X, number, 0, "reference"), X)
    assert ops.info_nce(X, X, number).isfinite()


@pytest.mark.parametrize("missing", ["compiler", "headers"])
def test_triton_without_what_it_compiles_with(monkeypatch, tmp_path, missing):
    """A reason of the backend's, so that another one runs: not an error of the first launch."""
    pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    monkeypatch.setattr(CudaDriver, "is_active", staticmethod(lambda: True))
    for name in ("_default", "_active"):
        monkeypatch.setattr(driver, name, None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))  # asked for before anything is compiled
    if missing == "compiler":
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CC", "false")  # a compiler that fails, as one does without Python.h
    reason = dispatch.triton_error.__wrapped__()
    assert re.fullmatch(r"triton cannot launch a kernel \(.*\): it takes a C compiler \(.*\) and Python's headers", reason)
    assert ("Failed to find C compiler" if missing == "compiler" else "non-zero exit status") in reason


@pytest.mark.parametrize("name", OPS)
def test_kernels_find_their_overloads(name):
    """Schema and fake of every compiled backend are there before any kernel is."""
    assert set(getattr(torch.ops.vimpac, name).overloads()) >= set(OPS[name])
    for overload in OPS[name]:
        assert dispatch.overload(name, overload)._schema.overload_name == overload
        assert torch.Tag.pt2_compliant_tag in dispatch.overload(name, overload).tags


def test_full_precision():
    x = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.mm(x, x).dtype == torch.bfloat16
        assert autograd.full_precision(torch.mm)(x, mat2=x).dtype == torch.float32
        assert torch.mm(x, x).dtype == torch.bfloat16  # autocast is back


def test_import_does_no_work():
    program = """
import logging, os, sys
before = dict(os.environ)
import vimpac
assert "torch" not in sys.modules, "import vimpac loads torch"
import torch
def asked(*args, **kwargs): raise AssertionError("a device was asked for at import")
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = torch.cuda.get_device_capability = asked
threads, precision, state = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_rng_state()
import vimpac.ops
assert not torch.cuda.is_initialized()
assert not [name for name in sys.modules if name.startswith("vimpac.kernels.")], "kernels are loaded at import"
assert (threads, precision) == (torch.get_num_threads(), torch.get_float32_matmul_precision())
assert torch.equal(state, torch.get_rng_state()) and not logging.getLogger().handlers and before == dict(os.environ)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""
