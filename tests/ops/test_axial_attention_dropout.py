"""axial_attention's dropout: bit by bit against the docstring, its statistics, and torch's own in sdpa."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from attention_calls import (
    EXACT,
    PRODUCTS,
    assert_all_close,
    by_lines,
    inputs,
    padding,
    slot_backend,
    values_and_gradients,
)
from torch.testing import assert_close

from extension import CPU_ERROR
from vimpac.dropout_rate import dropout_scale, dropout_threshold
from vimpac.ops import axial_attention
from vimpac.ops.axial_attention import dropout_keep


@pytest.fixture(scope="module", autouse=True)
def slot():
    with slot_backend():
        yield


@pytest.mark.parametrize("cls_in_context", [True, False])
@pytest.mark.parametrize("L", [1, 5, 7, 8, 9, 16, 31, 32, 33, 64])
def test_dropout_is_the_docstring(L, cls_in_context, monkeypatch):
    """Bit by bit: keys on both sides of 8, 32 and 64, PAD among them, two clips, heads and lines, a negative seed."""
    grid, seed = (1, 2, L), -1234567890123456789
    for axes, shape, device_seed in ((("W", "T"), grid, seed), (("H",), (2, L, 1), torch.tensor(seed))):
        if L > 33 and axes == ("H",):
            continue
        qkv, cls_qkv = inputs(2, shape, 2, 2, dtype=torch.float64)
        call = qkv, cls_qkv, axes, padding(2, shape), 0.3
        expected = values_and_gradients(by_lines, *call, seed, cls_in_context)
        for name in ("reference", "slot", *([] if CPU_ERROR else ["cpu"])):
            actual = values_and_gradients(axial_attention, *call, device_seed, cls_in_context, backend=name)
            assert_all_close(actual, expected, **EXACT)


@pytest.mark.parametrize("axes", PRODUCTS, ids="|".join)
def test_dropout_on_products(axes):
    qkv, cls_qkv = inputs(1, (3, 2, 4), len(axes), 2, dtype=torch.float64)
    call = qkv, cls_qkv, axes, None, 0.5, 17, True
    assert_all_close(axial_attention(*call, backend="reference"), by_lines(*call), **EXACT)


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("axis, keys", [("T", 6), ("W", 17), ("TxH", 41), ("H", 8)])
def test_dropout_rate(axis, keys, p, device):
    """Shares of dropped tokens' and [CLS]'s elements within 4 standard deviations (1 seed in 16,000) of the threshold's."""
    shape, seed = (8, 5, 8, 16, 3, 4, 1), torch.tensor(2021, device=device)
    dropped = (~dropout_keep(seed, p, shape, slice(0, 4), axis, keys)).double()
    rate = round(p * 65536) / 65536
    for part in (dropped[..., :-1, :], dropped[..., -1, :], dropped[..., -1], dropped[..., 0], dropped[:, :, 3], dropped[-1]):
        sigma = math.sqrt(rate * (1 - rate) / part.numel())
        assert abs(part.mean().item() - rate) < 4 * sigma
    for dim in range(5):  # neighbours in any direction agree as often as independent draws would
        a, b = dropped.narrow(dim, 0, dropped.shape[dim] - 1), dropped.narrow(dim, 1, dropped.shape[dim] - 1)
        together, sigma = rate**2, math.sqrt(rate**2 * (1 - rate**2) / a.numel())
        assert abs((a * b).mean().item() - together) < 5 * sigma  # pairs overlap, which widens the spread


def test_dropout_is_named_by_seed_and_element(device):
    """More clips leave the first ones' masks alone; another seed, head, axis or line changes them."""
    qkv, cls_qkv = (x.detach()[:1].expand(3, *x.shape[1:]) for x in inputs(1, (3, 4, 5), 4, 8, device))

    def run(B, seed, axes=("H", "W")):
        return axial_attention(qkv[:B], cls_qkv[:B], axes, None, 0.5, seed, backend="reference")

    for many, one in zip(run(3, 5), run(1, 5), strict=True):
        assert_close(many[:1], one, rtol=1e-6, atol=1e-6)  # batched products may sum in another order
        assert (many[1] - many[0]).abs().max() > 0.1 and (many[2] - many[1]).abs().max() > 0.1  # equal clips, other masks
    for other in (run(1, 6), run(1, 5 + 2**32), run(1, 5, ("W", "H"))):
        assert (other[0] - run(1, 5)[0]).abs().max() > 0.1
    assert_close(run(1, torch.tensor(5, device=device)), run(1, 5), rtol=0, atol=0)


@pytest.mark.parametrize("p, threshold", [(1e-6, 0), (2**-16, 1), (0.1, 6554), (0.5, 32768), (1 - 1e-9, 65535)])
def test_dropout_threshold(p, threshold):
    assert dropout_threshold(p, 16) == threshold and dropout_scale(p, 16) == 2**16 / (2**16 - threshold)
    out, cls_out = axial_attention(*inputs(2, (2, 3, 4), 2, 4), ("T", "H"), None, p, 1, backend="reference")
    assert out.isfinite().all() and cls_out.isfinite().all()


@pytest.mark.parametrize("p, exact", [(0.0, True), (0.125, True), (0.1, False)])
def test_sdpa_keeps_cudnn_from_rounding_dropout(monkeypatch, p, exact):
    """cuDNN's attention has dropout rates of multiples of 1/16 only. That it is kept out breaks no graph."""
    call = functools.partial(axial_attention, axes=("HxW",), dropout_p=p, seed=1, backend="sdpa")
    tensors = torch.randn(1, 1, 2, 2, 3, 2, 4), torch.randn(1, 3, 2, 4)
    torch.compile(call, fullgraph=True, backend="aot_eager")(*tensors)
    allowed, attend = [], F.scaled_dot_product_attention

    def watched(*arguments):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*arguments)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    call(*tensors)
    assert allowed == [exact] and torch.backends.cuda.cudnn_sdp_enabled()


def test_sdpa_drops_from_torchs_generator():
    qkv, cls_qkv = inputs(2, (3, 4, 5), 2, 8)
    torch.manual_seed(0)
    first, second = (axial_attention(qkv, cls_qkv, ("HxW",), None, 0.5, 1)[0] for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(first, axial_attention(qkv, cls_qkv, ("HxW",), None, 0.5, 1)[0]) and not torch.equal(first, second)
    still = axial_attention(qkv, cls_qkv, ("HxW",), None, 0.0, 1)[0]
    mean = torch.stack([axial_attention(qkv, cls_qkv, ("HxW",), None, 0.5, 1)[0] for _ in range(400)]).mean(0)
    assert (mean - still).abs().mean() < 0.1 * still.abs().mean()  # 1 / √400 of a spread about as wide as the values
