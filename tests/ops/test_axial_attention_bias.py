"""axial_attention_packed's `bias`: its gradient is that of a bias that is really added, in float64."""

import math

import pytest
import torch
from attention_calls import padding
from torch.testing import assert_close

from extension import needs_cpu
from vimpac.ops import axial_attention_packed

BACKENDS = ["reference", "sdpa", pytest.param("cpu", marks=needs_cpu)]
B, GRID, N, D = 2, (3, 4, 2), 6, 8
TOKENS, WIDTH = B * math.prod(GRID), N * D
AXES = ("T", "H", "W")
CASES = [  # dropout, PAD, cls_in_context
    (0.0, False, True),
    (0.0, True, False),
    (0.3, False, False),
    (0.3, True, True),
]


def inputs(dtype, device="cpu", broken=False):
    """Rows without the bias, the bias, PAD, and an upstream gradient, exact in every dtype. broken: NaN queries at PAD."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(TOKENS + B, 3, N, D, generator=generator).half().to(dtype)
    bias = (torch.randn(3 * WIDTH, generator=generator) / 2).half().float()
    grad = torch.randn(D, N, TOKENS + B, generator=generator).half().to(dtype).permute(2, 1, 0)
    pad = padding(B, GRID)
    if broken:
        rows[:TOKENS][pad.flatten(), 0] = math.nan
    return rows.to(device), bias.to(device), pad.to(device), grad.to(device)


def truth(rows, bias, grad, pad, p, seed, context):
    """float64, the bias added where autograd sees it."""
    bias = bias.detach().double().requires_grad_()
    qkv = rows.double() + bias.view(3, N, D)
    out = axial_attention_packed(qkv, GRID, AXES, pad, p, seed, context, "reference")
    return torch.autograd.grad(out, (bias, qkv), grad.double())


def check_bias(backend, dtype, p, padded, context, device="cpu"):
    rows, bias, pad, grad = inputs(dtype, device, broken=padded)
    pad, bias = pad if padded else None, bias.requires_grad_()
    qkv = (rows.double() + bias.detach().double().view(3, N, D)).to(dtype)  # as a linear layer makes it, rounded once
    rounding = (qkv.double() - bias.detach().double().view(3, N, D)).nan_to_num()
    exact = torch.where(rows.isnan(), math.nan, rounding)  # rows whose sum with the bias is exactly qkv
    qkv.requires_grad_()
    options = (GRID, AXES, pad, p, 5, context, backend)
    out = axial_attention_packed(qkv, *options, bias=bias)
    assert torch.equal(out, axial_attention_packed(qkv, *options))
    of_bias, of_qkv = torch.autograd.grad(out, (bias, qkv), grad, retain_graph=True)
    assert torch.equal(of_qkv, torch.autograd.grad(axial_attention_packed(qkv, *options), qkv, grad)[0])
    assert torch.equal(of_bias, torch.autograd.grad(out, bias, grad)[0])  # alone
    true, _ = truth(exact, bias, grad, pad, p, 5, context)
    assert of_bias.dtype == bias.dtype and of_bias.isfinite().all() and float(true.abs().max()) > 1
    # a sum of 50 rows, each of them with the errors of two softmaxes and of products of 8: some 100 roundings of `dtype`, or a
    # tenth of that where only the inputs of float32 sums are rounded
    eps = max(torch.finfo(dtype).eps, torch.finfo(of_bias.dtype).eps)
    scale = float(true.abs().max())
    assert_close(of_bias.double(), true, rtol=0, atol=scale * (16 * eps if eps < 1e-4 else 2 * eps))
    of_keys = of_bias.view(3, WIDTH)[1]
    assert true.view(3, WIDTH)[1].abs().max() < 1e-12 * scale
    if backend not in ("reference", "sdpa"):
        assert not of_keys.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p, padded, context", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient(backend, p, padded, context, dtype):
    if backend == "sdpa" and p > 0:
        pytest.skip("its dropout is torch's own")
    check_bias(backend, dtype, p, padded, context)


def test_dropout_of_torchs_own():
    """sdpa with a mask of its own: the sum over rows of the gradient that qkv itself gets."""
    rows, bias, pad, grad = inputs(torch.float64)
    rows, bias = rows.requires_grad_(), bias.double().requires_grad_()
    torch.manual_seed(0)
    out = axial_attention_packed(rows, GRID, AXES, pad, 0.3, 5, True, "sdpa", bias)
    of_rows, of_bias = torch.autograd.grad(out, (rows, bias), grad)
    assert_close(of_bias, of_rows.sum(0).flatten(), rtol=1e-11, atol=1e-11)  # float64, a sum of 50


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_bias_wants_a_gradient(backend):
    rows, bias, pad, grad = inputs(torch.float32)
    results = []
    for wanted in (True, False):
        leaves = [rows.clone().requires_grad_(wanted), bias.clone().requires_grad_()]
        out = axial_attention_packed(leaves[0], GRID, AXES, pad, backend=backend, bias=leaves[1])
        results.append(torch.autograd.grad(out, leaves[1], grad)[0])
    assert torch.equal(*results)


@needs_cpu
@pytest.mark.parametrize("clips", [1, 3])
def test_any_number_of_threads(clips):
    generator, before, results = torch.Generator().manual_seed(0), torch.get_num_threads(), []
    qkv = torch.randn(clips * 161, 3, 4, 8, generator=generator)
    bias = torch.zeros(96, requires_grad=True)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = axial_attention_packed(qkv, (5, 8, 4), ("H", "W"), None, 0.1, 3, True, "cpu", bias)
            results.append(torch.autograd.grad(out.square().sum(), bias)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_cpu
def test_a_second_derivative_raises():
    rows, bias, _, _ = inputs(torch.float32)
    bias.requires_grad_()
    out = axial_attention_packed(rows.requires_grad_(), GRID, AXES, backend="cpu", bias=bias)
    (first,) = torch.autograd.grad(out.square().sum(), bias, create_graph=True)
    with pytest.raises(RuntimeError, match="axial_attention: its kernels have no second derivative"):
        torch.autograd.grad(first.square().sum(), bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "bias, shown",
    [
        (torch.zeros(3 * WIDTH - 1), r"bias must be floating \[3·N·D\] = \[144\] on cpu, got torch.float32 of shape \(143,\)"),
        (torch.zeros(3, WIDTH), r"got torch.float32 of shape \(3, 48\) on cpu"),
        (torch.zeros(WIDTH), r"got torch.float32 of shape \(48,\)"),
        (torch.zeros(3 * WIDTH, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(3 * WIDTH, device="meta"), r"of shape \(144,\) on meta"),
    ],
)
def test_bad_calls(bias, shown, backend):
    rows, *_ = inputs(torch.float32)
    with pytest.raises(ValueError, match=shown):
        axial_attention_packed(rows, GRID, AXES, backend=backend, bias=bias)


def test_what_is_no_tensor():
    rows, *_ = inputs(torch.float32)
    with pytest.raises(TypeError, match=r"bias must be a torch\.Tensor, got builtins\.float"):
        axial_attention_packed(rows, GRID, AXES, bias=0.0)
