"""residual_norm's `exact`: the last rows of a half-precision stream, unrounded."""

import pytest
import torch
from torch.testing import assert_close

from extension import needs_cpu
from vimpac.ops import residual_norm

BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu)]
ROWS, COLUMNS, LAST = 70, 130, 9


def inputs(dtype, device):
    """x whose last rows are NaN, since they are not read; y, bias, weight, norm_bias, exact."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(ROWS, COLUMNS, generator=generator).to(dtype) for _ in range(2))
    x[-LAST:] = float("nan")
    bias, weight, norm_bias = (torch.randn(COLUMNS, generator=generator) for _ in range(3))
    exact = torch.randn(LAST, COLUMNS, generator=generator)
    return [v.to(device).requires_grad_() for v in (x, y, bias, 2 + weight.clamp(-1, 1), norm_bias, exact)]


@pytest.mark.parametrize("keeps", ["sum", "output"])
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_wide_call(backend, p, keeps):
    check_exact(backend, p, keeps, "cpu", torch.bfloat16)


def check_exact(backend, p, keeps, device, dtype):
    """Values and gradients are those of a float32 stream with the rows in place; x's own last rows get zeros."""
    *call, exact = inputs(dtype, device)
    out, last = residual_norm(*call, p, 5, 1e-12, keeps, backend, exact)
    assert out.dtype == dtype and last.dtype == torch.float32 and last.shape == exact.shape
    assert torch.equal(out[-LAST:], last.to(dtype))
    wide = [v.detach().float().requires_grad_() for v in (*call, exact)]
    stream = torch.cat([wide[0][:-LAST], wide[5]])
    expected = residual_norm(stream, *wide[1:5], p, 5, 1e-12, "sum", "reference")
    rounded = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
    assert_close(out.float(), expected, **rounded)
    assert_close(last, expected[-LAST:])
    grads = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)).to(device), torch.randn_like(last)
    got = torch.autograd.grad([out, last], [*call, exact], [grads[0].to(dtype), grads[1]])
    upstream = grads[0].to(dtype).float()
    found = torch.autograd.grad(expected, wide, torch.cat([upstream[:-LAST], upstream[-LAST:] + grads[1]]))
    assert torch.equal(got[0][-LAST:], torch.zeros_like(got[0][-LAST:]))
    for name, a, b in zip(("x", "y", "bias", "weight", "norm_bias", "exact"), got, found, strict=True):
        # backward reads what was kept rounded: an error of a rounding for each of the terms
        largest = float(b.abs().max())
        assert_close(
            a.float(), b, rtol=0, atol=4 * torch.finfo(dtype).eps * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_only_one_output_is_used(backend):
    *call, exact = inputs(torch.bfloat16, "cpu")
    for which in (0, 1):
        out = residual_norm(*call, 0.1, 5, 1e-12, "output", backend, exact)
        given = torch.autograd.grad(out[which].float().square().sum(), exact)
        assert given[0].abs().max() > 0


@pytest.mark.parametrize(
    "exact, shown",
    [
        (torch.zeros(71, 130), r"exact must be torch.float32 \[B, C\] with B at most 70 and C = 130 on cpu, got torch.float32"),
        (torch.zeros(3, 129), r"C = 130 on cpu, got torch.float32 of shape \(3, 129\)"),
        (torch.zeros(3, 130).half(), "got torch.float16"),
    ],
)
def test_bad_calls(exact, shown):
    *call, _ = inputs(torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match=shown):
        residual_norm(*call, exact=exact)
