"""axial_attention: values and gradients of every backend against the docstring written as loops."""

import functools
import math

import pytest
import torch
from attention_calls import (
    EXACT,
    FLOAT32,
    PRODUCTS,
    SHORT,
    assert_all_close,
    by_lines,
    doubles,
    inputs,
    nothing_leaves_padding,
    packed,
    padding,
    skip_beyond,
    slot_backend,
    upstream,
    values_and_gradients,
)
from torch.testing import assert_close

from extension import CPU_ERROR, needs_cpu
from vimpac.ops import axial_attention, axial_attention_packed, axial_attention_reference
from vimpac.ops.lines import pack, unpack


@pytest.fixture(scope="module", autouse=True)
def slot():
    with slot_backend():
        yield


@pytest.fixture(params=["reference", "sdpa", "slot", pytest.param("cpu", marks=needs_cpu)])
def backend(request):
    return request.param


# --- values and gradients ---------------------------------------------------------------------------------------------


@functools.cache
def docstring(axes, padded, cls_in_context):
    """A call, and its values and gradients by the docstring; once for all backends."""
    qkv, cls_qkv = inputs(2, (3, 2, 4), 2 * len(axes), 3, dtype=torch.float64)
    pad = padding(2, (3, 2, 4)) if padded else None
    call = qkv, cls_qkv, axes, pad, 0.0, None, cls_in_context
    return call, values_and_gradients(by_lines, *call)


@pytest.mark.parametrize("cls_in_context", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("axes", SHORT + PRODUCTS, ids="|".join)
def test_is_the_docstring(backend, axes, padded, cls_in_context):
    """Values and gradients in float64, on a grid of three different sizes."""
    skip_beyond(backend, axes)
    call, expected = docstring(tuple(axes), padded, cls_in_context)
    for function in (axial_attention, packed):
        assert_all_close(values_and_gradients(function, *call, backend=backend), expected, **EXACT)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "B, grid, axes, N, D",
    [
        (1, (1, 1, 1), ("T",), 1, 1),
        (3, (5, 1, 1), ("T", "H"), 2, 128),
        (2, (2, 3, 17), ("H", "W"), 6, 16),
        (1, (65, 1, 2), ("T",), 2, 8),
        (2, (5, 16, 16), ("T",), 8, 64),
        (2, (5, 16, 16), ("H", "W"), 8, 64),
        (1, (5, 16, 16), ("T", "HxW"), 4, 32),
        (1, (5, 16, 16), ("TxHxW",), 2, 32),
    ],
)
def test_matches_float64(backend, device, B, grid, axes, N, D, padded):
    skip_beyond(backend, axes, max(grid), device)
    qkv, cls_qkv = inputs(B, grid, N, D, device)
    pad = padding(B, grid, device) if padded else None
    expected = values_and_gradients(axial_attention_reference, *doubles(qkv, cls_qkv), axes, pad)
    actual = values_and_gradients(axial_attention, qkv, cls_qkv, axes, pad, backend=backend)
    assert all(x.dtype == torch.float32 for x in actual)
    assert_all_close(actual, expected, **FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("axes", [("T",), ("H", "W"), ("HxW",)], ids="|".join)
def test_half_errors(axes, dtype):
    """At most twice the error of the docstring's loops run in that dtype, against float64; values and gradients."""
    qkv, cls_qkv = inputs(2, (3, 4, 5), 2, 16, dtype=dtype)
    pad = padding(2, (3, 4, 5))
    exact = values_and_gradients(axial_attention_reference, *doubles(qkv, cls_qkv), axes, pad)
    usual = values_and_gradients(by_lines, qkv, cls_qkv, axes, pad)
    cpu = not CPU_ERROR and dtype == torch.bfloat16 and axes != ("HxW",)
    for name in ("reference", "sdpa", *(["cpu"] if cpu else [])):
        ours = values_and_gradients(axial_attention, qkv, cls_qkv, axes, pad, backend=name)
        assert all(x.dtype == dtype for x in ours)
        for mine, theirs, true in zip(ours, usual, exact, strict=True):
            assert (mine.double() - true).norm() <= 2 * (theirs.double() - true).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_reference_rounds_once(dtype):
    """The definition computes in float32: its results are float64's, rounded (a rare tie goes the other way: 1.01)."""
    qkv, cls_qkv = inputs(2, (5, 8, 8), 4, 16, dtype=dtype)
    exact = values_and_gradients(axial_attention_reference, *doubles(qkv, cls_qkv), ("H", "W"), None)
    for ours, true in zip(values_and_gradients(axial_attention_reference, qkv, cls_qkv, ("H", "W"), None), exact, strict=True):
        assert (ours.double() - true).norm() <= 1.01 * (true.to(dtype).double() - true).norm()


def test_gradcheck():
    """Against differences: float64, gradcheck's own tolerances; PAD and dropout on."""
    qkv, cls_qkv = inputs(1, (2, 1, 3), 2, 2, dtype=torch.float64)
    pad = padding(1, (2, 1, 3))
    cpu = [] if CPU_ERROR else [(axial_attention, "cpu"), (packed, "cpu")]
    for function, name in ((axial_attention, "reference"), (packed, "slot"), *cpu):
        call = functools.partial(function, axes=("T", "W"), pad=pad, dropout_p=0.3, seed=5, backend=name)
        torch.autograd.gradcheck(call, (qkv, cls_qkv), fast_mode=True)  # one random direction


@pytest.mark.parametrize("axes", [("T",), ("H", "W"), ("HxW",), ("T", "TxHxW")], ids="|".join)
def test_lines_without_keys_give_zeros(backend, axes, device):
    """Every position PAD: out is [CLS]'s value, or zero when [CLS] is no key; nothing is NaN."""
    skip_beyond(backend, axes, device=device)
    qkv, cls_qkv = inputs(2, (2, 3, 4), 2, 4, device)
    pad = torch.ones(2, 2, 3, 4, dtype=torch.bool, device=device)
    out, cls_out, *grads = values_and_gradients(axial_attention, qkv, cls_qkv, axes, pad, cls_in_context=False, backend=backend)
    assert not out.any() and not cls_out.any() and not any(grad.any() for grad in grads)
    out, cls_out = axial_attention(qkv, cls_qkv, axes, pad, backend=backend)
    assert_close(out, cls_qkv[:, None, None, None, 2].expand_as(out), **FLOAT32)
    assert_close(cls_out, cls_qkv[:, 2], **FLOAT32)


def test_pad_hides_keys_only(backend):
    """The values at a PAD position reach no other output. The position itself still has one."""
    qkv, cls_qkv = inputs(1, (2, 3, 4), 3, 4)
    pad = torch.zeros(1, 2, 3, 4, dtype=torch.bool)
    pad[0, 1, 2, 3] = True
    before = axial_attention(qkv, cls_qkv, ("T", "H", "W"), pad, backend=backend)
    changed = qkv.detach().clone()
    changed[0, 1, 2, 3] = 100.0
    after = axial_attention(changed, cls_qkv, ("T", "H", "W"), pad, backend=backend)
    assert_close(after[0][~pad], before[0][~pad], rtol=0, atol=0)
    assert_close(after[1], before[1], rtol=0, atol=0)
    assert before[0][pad].abs().min() > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("axes", [("T",), ("H", "W"), ("HxW",)], ids="|".join)
def test_what_is_not_finite_stays_in_padding(backend, axes, value):
    """0 · NaN is NaN: forward the value, backward the value, the key and the query of a PAD position would reach its line."""
    skip_beyond(backend, axes)
    pad, dropout = padding(2, (2, 3, 4)), (0.0, None) if backend == "sdpa" else (0.3, 5)

    def run(qkv, cls_qkv, *call):
        leaves = (x.detach().requires_grad_() for x in (qkv, cls_qkv))
        return values_and_gradients(axial_attention, *leaves, axes, *call, backend=backend)

    nothing_leaves_padding(run, *inputs(2, (2, 3, 4), 2, 8), pad, value, dropout)


@pytest.mark.parametrize("axes", [("T",), ("H", "W"), ("HxW",)], ids="|".join)
def test_empty_batch(backend, axes):
    skip_beyond(backend, axes)
    results = values_and_gradients(
        axial_attention, *inputs(0, (2, 3, 4), 2, 8), axes, padding(1, (2, 3, 4))[:0], backend=backend
    )
    assert [tuple(x.shape) for x in results] == [(0, 2, 3, 4, 2, 8), (0, 2, 8), (0, 2, 3, 4, 3, 2, 8), (0, 3, 2, 8)]
    assert axial_attention_packed(torch.zeros(0, 3, 2, 8), (2, 3, 4), axes, backend=backend).shape == (0, 2, 8)


def test_more_lines_than_65535(backend, device):
    """Lines of one token that see only themselves: values pass through, [CLS] gets their mean."""
    skip_beyond(backend, ("T",), device=device)
    qkv, cls_qkv = inputs(1, (1, 256, 257), 1, 1, device)
    out, cls_out = axial_attention(qkv, cls_qkv, ("T",), cls_in_context=False, backend=backend)
    assert_close(out, qkv[:, :, :, :, 2], rtol=0, atol=0)
    assert_close(cls_out.double(), qkv[:, :, :, :, 2].double().mean((1, 2, 3)), **FLOAT32)


# --- packed rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"padded": True}, {"dropout_p": 0.2, "seed": 3}, {"cls_in_context": False}])
def test_packed_rows(backend, options, device):
    """Rows that are slices of something wider, and a strided gradient: the same as apart, as one gradient."""
    skip_beyond(backend, ("H", "W"), device=device)
    grid = (3, 4, 5)
    wide = torch.randn(2 * 61, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(device)
    rows = wide[..., 3:11].requires_grad_()
    options = dict(options)
    if backend == "sdpa":
        options.pop("dropout_p", None)
    if options.pop("padded", False):
        options["pad"] = padding(2, grid, device)
    out = axial_attention_packed(rows, grid, ("H", "W"), backend=backend, **options)
    assert out.shape == (122, 2, 8)
    grad = upstream([out])[0]
    (actual,) = torch.autograd.grad(out, rows, grad)
    qkv, cls_qkv = (x.detach().requires_grad_() for x in (rows[:120].view(2, *grid, 3, 2, 8), rows[120:]))
    apart = axial_attention(qkv, cls_qkv, ("H", "W"), backend=backend, **options)
    expected = torch.autograd.grad(apart, (qkv, cls_qkv), (grad[:120].view(2, *grid, 2, 8), grad[120:]))
    assert_close(out, pack(*apart), rtol=0, atol=0)
    assert_close(actual, pack(*expected), rtol=1e-6, atol=1e-6)  # sums of another order in [CLS]'s gradient


@pytest.mark.parametrize("function", [axial_attention, packed])
def test_saves_inputs_only(function):
    """No probabilities and no outputs: backward recomputes them."""
    qkv, cls_qkv = inputs(2, (3, 4, 5), 2, 8)
    pad, seed, saved = padding(2, (3, 4, 5)), torch.tensor(3), []
    rows = pack(qkv, cls_qkv)
    qkv, cls_qkv = unpack(rows, (2, 3, 4, 5))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        if function is axial_attention:
            axial_attention(qkv, cls_qkv, ("H", "W"), pad, 0.1, seed, backend="slot")
        else:
            axial_attention_packed(rows, (3, 4, 5), ("H", "W"), pad, 0.1, seed, backend="slot")
    inputs_kept = {x.untyped_storage().data_ptr() for x in (rows, pad, seed)}
    assert {x.untyped_storage().data_ptr() for x in saved} == inputs_kept
