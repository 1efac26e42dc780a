"""axial_attention in C++ on a CPU: what test_axial_attention.py, which runs it beside the others, does not reach."""

import itertools

import pytest
import torch
from attention_calls import doubles, inputs, padding, values_and_gradients

from extension import narrower_isas, needs_cpu, on_any_processor, python, run_with
from kernel_checks import poison_new_tensors
from vimpac.ops import axial_attention, axial_attention_reference, dispatch

pytestmark = needs_cpu

LENGTHS = [1, 2, 4, 5, 7, 8, 9, 15, 16, 17, 24, 32, 33, 48, 64]
WIDTHS = [1, 3, 4, 7, 8, 16, 20, 24, 33, 64, 72, 128, 136]


@pytest.mark.parametrize("isa", narrower_isas())
def test_narrower_instruction_sets(isa):
    """This file once more with what other processors would run."""
    run_with(__file__, VIMPAC_CPU_ISA=isa)


@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("L", LENGTHS)
def test_every_length_of_line(L, context, monkeypatch):
    """Registers full, half full and one lane beyond; PAD and dropout on; nothing that memory held before shows."""
    poison_new_tensors(monkeypatch)
    check((2, 1, L), ("W", "T"), 2, 16, context)


@pytest.mark.parametrize("D", WIDTHS)
def test_every_width_of_head(D, monkeypatch):
    poison_new_tensors(monkeypatch)
    check((3, 2, 9), ("T", "W"), 4, D, True)


def check(grid, axes, N, D, context):
    for dtype, p in itertools.product((torch.float64, torch.float32, torch.bfloat16), (0.0, 0.3)):
        qkv, cls_qkv = inputs(2, grid, N, D, dtype=dtype)
        call = axes, padding(2, grid), p, 2**40 + 3, context
        exact = values_and_gradients(axial_attention, *doubles(qkv, cls_qkv), *call, backend="reference")
        ours = values_and_gradients(axial_attention, qkv, cls_qkv, *call, backend="cpu")
        usual = values_and_gradients(axial_attention, qkv, cls_qkv, *call, backend="reference")
        for mine, theirs, true in zip(ours, usual, exact, strict=True):
            assert mine.dtype == dtype
            if dtype == torch.float64:
                torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-12)  # sums of some hundred terms of order 1
            else:  # float32: its last bits differ, more so where few elements leave nothing to average over
                floor = 1e-6 if dtype == torch.float32 else 0.0
                assert (mine.double() - true).norm() <= 2 * (theirs.double() - true).norm() + floor * true.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_models_own_shapes(dtype):
    """Small and Large-Half at 5×16×16, all axes, several items of work a clip."""
    for (N, D), axes in itertools.product([(8, 64), (16, 32)], [("T",), ("H", "W"), ("T", "H", "W", "T")]):
        qkv, cls_qkv = inputs(2, (5, 16, 16), N, D, dtype=dtype)
        pad = padding(2, (5, 16, 16))
        exact = values_and_gradients(axial_attention_reference, *doubles(qkv, cls_qkv), axes, pad)
        ours = values_and_gradients(axial_attention, qkv, cls_qkv, axes, pad, backend="cpu")
        usual = values_and_gradients(axial_attention_reference, qkv, cls_qkv, axes, pad)
        for mine, theirs, true in zip(ours, usual, exact, strict=True):
            assert (mine.double() - true).norm() <= 2 * (theirs.double() - true).norm()


def test_results_larger_than_the_caches():
    """22 MB of output, which are written past them."""
    qkv, cls_qkv = (torch.randn(shape, requires_grad=True) for shape in ((8, 5, 16, 17, 3, 8, 64), (8, 3, 8, 64)))
    ours = values_and_gradients(axial_attention, qkv, cls_qkv, ("T", "H"), backend="cpu")
    usual = values_and_gradients(axial_attention, qkv, cls_qkv, ("T", "H"), backend="reference")
    for a, b in zip(ours, usual, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # float32 sums of up to 640 terms of order 1, in another order


def test_same_bits_for_any_number_of_threads_and_any_batch():
    qkv, cls_qkv = inputs(3, (5, 9, 16), 4, 32)
    call = ("T", "W"), padding(3, (5, 9, 16)), 0.2, 3
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(values_and_gradients(axial_attention, qkv, cls_qkv, *call, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
    one = axial_attention(qkv[:1], cls_qkv[:1], ("T", "W"), call[1][:1], 0.2, 3, backend="cpu")
    assert all(torch.equal(a, b[:1]) for a, b in zip(one, results[0], strict=False))


def test_scores_of_any_size():
    """The largest score is subtracted before it is exponentiated; a key far below counts nothing."""
    qkv, cls_qkv = inputs(1, (2, 3, 9), 2, 16)
    with torch.no_grad():
        qkv[..., :2, :, :] *= 60.0  # scores of some thousand
    for context in (True, False):
        call = ("W", "T"), None, 0.0, None, context
        ours = axial_attention(qkv, cls_qkv, *call, backend="cpu")
        for mine, true in zip(ours, axial_attention_reference(*doubles(qkv, cls_qkv), *call), strict=True):
            torch.testing.assert_close(mine, true.float(), rtol=1e-3, atol=1e-3)  # scores to 7 digits: 1e-3 of a thousand's


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_what_is_not_finite_stays_so(part, value, dtype):
    """An overflow in q, k or v shows in the same outputs as the reference's: training must not go on as if nothing were."""
    qkv, cls_qkv = (x.detach() for x in inputs(1, (1, 2, 5), 2, 16, dtype=dtype))
    qkv[0, 0, 1, 2, part, :, 3] = value
    ours, expected = (axial_attention(qkv, cls_qkv, ("W", "H"), backend=name) for name in ("cpu", "reference"))
    assert all(torch.equal(a.isfinite(), b.isfinite()) for a, b in zip(ours, expected, strict=True))
    assert not expected[0].isfinite().all()


def test_what_pad_holds_is_not_read():
    """Keys that are NaN at PAD positions; a key past the line's end in a register is no key either."""
    qkv, cls_qkv = (x.detach() for x in inputs(1, (1, 2, 5), 2, 8))
    pad = torch.zeros(1, 1, 2, 5, dtype=torch.bool)
    pad[0, 0, 0, 1] = True
    expected = axial_attention(qkv, cls_qkv, ("W", "H"), pad, backend="cpu")
    qkv[0, 0, 0, 1, 1] = float("nan")
    actual = axial_attention(qkv, cls_qkv, ("W", "H"), pad, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_it_is_the_default_on_a_cpu(monkeypatch):
    monkeypatch.delenv("VIMPAC_BACKEND", raising=False)
    qkv, cls_qkv = inputs(1, (2, 3, 4), 2, 8)
    named = axial_attention(qkv, cls_qkv, ("T", "W"), None, 0.1, 3, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(axial_attention(qkv, cls_qkv, ("T", "W"), None, 0.1, 3), named, strict=True))
    torch.testing.assert_close(
        axial_attention(qkv.half(), cls_qkv.half(), ("T",))[0].float(),
        axial_attention(qkv, cls_qkv, ("T",))[0],
        rtol=2e-2,
        atol=2e-2,
    )  # float16 goes to the reference


def test_says_why_it_cannot_run():
    qkv, cls_qkv = inputs(1, (1, 2, 65), 34, 1, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"torch.float16, it takes float32, float64, bfloat16.*at most 64 tokens; 17 axes, it"):
        axial_attention(qkv, cls_qkv, ("W",) * 17, backend="cpu")
    with pytest.raises(ValueError, match="tensors are on meta, it needs the CPU"):
        axial_attention(qkv.float().to("meta"), cls_qkv.float().to("meta"), ("T",), backend="cpu")


@on_any_processor
def test_the_op_by_name_loads_its_library():
    """As a saved program calls it: without the dispatch that would have loaded the library before."""
    code = """
import torch, vimpac.ops
qkv, cls = torch.ones(1, 2, 1, 1, 3, 1, 4), torch.ones(1, 3, 1, 4)
out = torch.ops.vimpac.axial_attention.cpu(qkv, cls, ["T"], None, 0.0, None, True)
assert torch.equal(out, torch.ones(3, 1, 4))
"""
    ended = python(code)
    assert ended.returncode == 0, ended.stderr


def test_wrong_types_reach_no_memory():
    """The ops called directly, past the checks of Python."""
    op = dispatch.overload("axial_attention", "cpu")
    qkv, cls_qkv = torch.ones(1, 2, 1, 1, 3, 1, 4), torch.ones(1, 3, 1, 4)
    with pytest.raises(RuntimeError, match="float32, float64 and bfloat16"):
        op(qkv.half(), cls_qkv.half(), ["T"], None, 0.0, None, True)
    with pytest.raises(RuntimeError, match="axis TxH, it takes T, H and W"):
        op(qkv, cls_qkv, ["TxH"], None, 0.0, None, True)
    with pytest.raises(RuntimeError, match="at most 64 tokens"):
        op(torch.ones(1, 65, 1, 1, 3, 1, 4), cls_qkv, ["T"], None, 0.0, None, True)
    for bad in (cls_qkv.double(), cls_qkv[..., :2], cls_qkv.expand(2, 3, 1, 4), cls_qkv.transpose(1, 3)):
        with pytest.raises(RuntimeError, match="of one dtype, rows contiguous"):
            op(qkv, bad, ["T"], None, 0.0, None, True)
    with pytest.raises(RuntimeError, match="1 heads cannot be split over 2 axes"):
        op(qkv, cls_qkv, ["T", "H"], None, 0.0, None, True)
    with pytest.raises(RuntimeError, match="dropout needs a seed"):
        op(qkv, cls_qkv, ["T"], None, 0.5, None, True)
    with pytest.raises(RuntimeError, match="clips of up to 2\\^30 tokens"):
        op(qkv[:, :1].expand(1, 1, 2**16, 2**16, 3, 1, 4), cls_qkv, ["T"], None, 0.0, None, True)
    for pad in (torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.bool)):
        with pytest.raises(RuntimeError, match=r"pad as bool \[B, T, H, W\]"):
            op(qkv, cls_qkv, ["T"], pad, 0.0, None, True)
    backward = dispatch.overload("axial_attention_backward", "cpu")
    for grad in (torch.ones(2, 1, 4), torch.ones(3, 1, 4).double(), torch.ones(3, 1, 8)[..., ::2]):
        with pytest.raises(RuntimeError, match="grad as contiguous rows"):
            backward(grad, qkv, cls_qkv, ["T"], None, 0.0, None, True)
    with pytest.raises(RuntimeError, match="dense and on a cpu device"):
        torch.ops.vimpac.info_nce_pack.cpu(torch.ones(2, 2).to_sparse(), torch.ones(2, 2).to_sparse())
