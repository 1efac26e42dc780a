"""axial_attention: which backend runs, what torch.compile and opcheck say, and how bad calls are shown."""

import math
import sys

import pytest
import torch
from attention_calls import FLOAT32, assert_all_close, inputs, packed, padding, skip_beyond, slot_backend, values_and_gradients
from torch.testing import assert_close

from extension import needs_compiler, needs_cpu
from vimpac.ops import axial_attention, axial_attention_packed, axial_attention_reference, dispatch
from vimpac.ops.axial_attention import AttentionCall
from vimpac.ops.lines import pack, unpack

MODULE = sys.modules["vimpac.ops.axial_attention"]  # the package exports the function under the module's name


@pytest.fixture(scope="module", autouse=True)
def slot():
    with slot_backend():
        yield


@pytest.fixture(params=["reference", "sdpa", "slot", pytest.param("cpu", marks=needs_cpu)])
def backend(request):
    return request.param


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["reference", "sdpa", "cpu", "triton", "cuda"])
def test_reasons_break_no_graph(name, dynamic):
    """The choice of a backend is traced, with whatever it asks of tensors, views of larger ones included."""

    def call(qkv, cls_qkv):
        return qkv + len(dispatch.why_not("axial_attention", name, AttentionCall(qkv, cls_qkv, ("T",), None, 0.1, None, True)))

    torch._dynamo.reset()  # every case is the same code to it, recompiled
    tensors = torch.randn(9, 1, 2, 2, 3, 2, 32)[1:], torch.randn(9, 3, 2, 32)[1:]
    traced = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="eager")
    assert torch.equal(traced(*tensors), call(*tensors))


# --- dispatch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "axes, grid, chosen",
    [
        (("T",), (64, 1, 1), "reference"),
        (("T",), (65, 1, 1), "sdpa"),
        (("T", "W"), (1, 1, 65), "sdpa"),
        (("H",), (65, 2, 65), "reference"),
        (("HxW",), (1, 2, 2), "sdpa"),
        (("T", "HxW"), (2, 2, 2), "sdpa"),
        (("H", "W"), (5, 16, 16), "reference"),
    ],
)
def test_choice(monkeypatch, axes, grid, chosen):
    monkeypatch.delenv("VIMPAC_BACKEND", raising=False)
    monkeypatch.setitem(dispatch._REGISTRY, "axial_attention", {"reference": dispatch.always, "sdpa": dispatch.always})
    for name in ("reference", "sdpa"):
        monkeypatch.setattr(MODULE, f"axial_attention_{name}", lambda *_, name=name: (_ for _ in ()).throw(LookupError(name)))
    qkv, cls_qkv = inputs(1, grid, 2, 1)
    with pytest.raises(LookupError, match=chosen):
        axial_attention(qkv, cls_qkv, axes)
    with pytest.raises(LookupError, match=chosen):
        axial_attention_packed(pack(qkv, cls_qkv), grid, axes)
    with pytest.raises(LookupError, match="reference"):
        axial_attention(qkv, cls_qkv, axes, backend="reference")


def test_kernels_come_first_where_they_can_run(monkeypatch):
    monkeypatch.delenv("VIMPAC_BACKEND", raising=False)
    asked = []
    for name in ("triton", "cpu"):
        monkeypatch.setitem(dispatch._REGISTRY["axial_attention"], name, lambda call: asked.append(call) or ["no GPU"])
    qkv, cls_qkv = inputs(1, (2, 3, 4), 2, 4)
    pad = padding(1, (2, 3, 4))
    assert_close(axial_attention(qkv, cls_qkv, ["H", "W"], pad), axial_attention_reference(qkv, cls_qkv, ("H", "W"), pad))
    assert len(asked) == 2 and asked[0][2:] == asked[1][2:] == (("H", "W"), pad, 0.0, None, True)
    with pytest.raises(ValueError, match="axial_attention: backend 'triton' cannot run this call: no GPU"):
        axial_attention(qkv, cls_qkv, ("H", "W"), pad, backend="triton")
    with pytest.raises(ValueError, match="backend 'slot' cannot run this call: float16 is too narrow"):
        axial_attention(qkv.half(), cls_qkv.half(), ("H", "W"), backend="slot")


def test_environment(monkeypatch):
    qkv, cls_qkv = inputs(1, (2, 3, 4), 2, 4)
    for value in ("slot", "axial_attention=slot", "block_mask=reference,axial_attention=slot"):
        monkeypatch.setenv("VIMPAC_BACKEND", value)
        with pytest.raises(ValueError, match="float16 is too narrow"):
            axial_attention(qkv.half(), cls_qkv.half(), ("H",))
        with pytest.raises(ValueError, match="float16 is too narrow"):
            packed(qkv.half(), cls_qkv.half(), ("H",))


@pytest.mark.parametrize("axes", [("H", "W"), ("HxW",)], ids="|".join)
def test_autocast_rounds_nothing(backend, axes):
    """Inside autocast float32 stays float32: what a linear layer there gave is half already."""
    skip_beyond(backend, axes)
    qkv, cls_qkv = inputs(2, (2, 3, 4), 2, 8)
    expected = axial_attention(qkv, cls_qkv, axes, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        for inside in (axial_attention(qkv, cls_qkv, axes, backend=backend), packed(qkv, cls_qkv, axes, backend=backend)):
            assert_close(inside, expected, rtol=0, atol=0)
        half = axial_attention(qkv.bfloat16(), cls_qkv.bfloat16(), axes, backend=backend)
    assert half[0].dtype == half[1].dtype == torch.bfloat16
    assert_close(
        axial_attention_reference(qkv, cls_qkv, axes), expected, rtol=1e-5, atol=1e-5
    )  # and the definition itself, called directly


@pytest.mark.parametrize("packed", [False, True])
def test_second_derivatives_are_refused(packed):
    """A kernel's gradient has none. That is an error, not a missing term of a sum, even for a constant upstream gradient."""
    rows = torch.randn(2 * 7, 3, 2, 4, requires_grad=True)
    if packed:
        out = axial_attention_packed(rows, (2, 1, 3), ("T", "W"), backend="slot")
    else:
        out = axial_attention(*unpack(rows, (2, 2, 1, 3)), ("T", "W"), backend="slot")[0]
    for loss in (out.square().sum(), out.sum()):
        (grad,) = torch.autograd.grad(loss, rows, create_graph=True)
        with pytest.raises(RuntimeError, match=r"axial_attention: its kernels have no second derivative.* backend='reference'"):
            torch.autograd.grad(grad.square().sum() + rows.square().sum(), rows)


# --- the slot under opcheck and torch.compile -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("options", ["none", "pad", "dropout", "all"])
@pytest.mark.parametrize("overload", ["slot", pytest.param("cpu", marks=needs_cpu)])
def test_opcheck(overload, dtype, strided, options):
    qkv, cls_qkv = (x.detach() for x in inputs(2, (2, 1, 3), 2, 4, dtype=dtype))
    pad = padding(2, (2, 1, 3)) if options in ("pad", "all") else None
    dropout = (0.25, torch.tensor(9)) if options in ("dropout", "all") else (0.0, None)
    if not strided:
        qkv, cls_qkv, pad = qkv.contiguous(), cls_qkv.contiguous(), None if pad is None else pad.contiguous()
    call = (qkv, cls_qkv, ["T", "W"], pad, *dropout, options != "all")
    torch.library.opcheck(dispatch.overload("axial_attention", overload), call)
    grad = torch.randn(2 * 6 + 2, 2, 4, dtype=dtype)
    torch.library.opcheck(dispatch.overload("axial_attention_backward", overload), (grad, *call))


@pytest.mark.parametrize(
    "function, name, compiler",
    [
        pytest.param(axial_attention, "slot", "inductor", marks=needs_compiler),
        pytest.param(packed, "slot", "inductor", marks=needs_compiler),
        pytest.param(packed, "cpu", "inductor", marks=needs_cpu),
        (axial_attention, "reference", "aot_eager"),
        (packed, "sdpa", "aot_eager"),
        pytest.param(axial_attention, "cpu", "aot_eager", marks=needs_cpu),
    ],
)
def test_traces_whole_with_any_batch(function, name, compiler):
    """Forward and backward, PAD and dropout on, the seed a tensor; another batch size or seed does not trace again."""
    torch.compiler.reset()
    dropout = 0.0 if name == "sdpa" else 0.3

    def run(qkv, cls_qkv, pad, seed):
        return function(qkv, cls_qkv, ("T", "W"), pad, dropout, seed, backend=name)

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    for B, seed in ((5, 5), (7, -(2**62))):
        with torch.compiler.set_stance("default" if B == 5 else "fail_on_recompile"):
            call = *inputs(B, (2, 3, 4), 2, 8), padding(B, (2, 3, 4)), torch.tensor(seed)
            for x in call[:3]:
                torch._dynamo.mark_dynamic(x, 0)
            assert_all_close(values_and_gradients(compiled, *call), values_and_gradients(run, *call), rtol=1e-6, atol=1e-6)


def test_traces_any_shape():
    """Every dimension unknown."""

    def run(rows, grid):
        return axial_attention_packed(rows, grid, ("H", "W"), backend="slot")

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, grid, D in ((2, (3, 4, 5), 8), (6, (2, 7, 3), 16)):
        rows = torch.randn(B * (math.prod(grid) + 1), 3, 2, D)
        assert_close(compiled(rows, grid), run(rows, grid))


@needs_compiler
def test_compiled_reference_is_the_same():
    """Compiled code for real, dropout bits included; one shape, since it takes seconds."""

    def run(qkv, cls_qkv, seed):
        return axial_attention(qkv, cls_qkv, ("T",), None, 0.3, seed, backend="reference")

    compiled = torch.compile(run, fullgraph=True, dynamic=False)
    for seed in (3, -(2**62)):
        call = *inputs(2, (5, 2, 2), 2, 8), torch.tensor(seed)
        assert_all_close(values_and_gradients(compiled, *call), values_and_gradients(run, *call), **FLOAT32)


# --- bad calls --------------------------------------------------------------------------------------------------------

Q, C, P = torch.zeros(2, 3, 4, 5, 3, 6, 8), torch.zeros(2, 3, 6, 8), torch.zeros(2, 3, 4, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    "call, shown",
    [
        ((Q[0], C, "T"), r"qkv must be \[B, T, H, W, 3, N, D\], got shape \(3, 4, 5, 3, 6, 8\)"),
        ((Q[:, :, :, :, :2], C, "T"), r"got shape \(2, 3, 4, 5, 2, 6, 8\)"),
        ((Q, C[:1], "T"), r"cls_qkv must be \[B, 3, N, D\] = \(2, 3, 6, 8\), got shape \(1, 3, 6, 8\)"),
        ((Q, C[..., :4], "T"), r"got shape \(2, 3, 6, 4\)"),
        ((Q.int(), C.int(), "T"), "share one floating dtype, got torch.int32 and torch.int32"),
        ((Q, C.bfloat16(), "T"), "share one floating dtype, got torch.float32 and torch.bfloat16"),
        ((Q, C.to("meta"), "T"), "on one device, got cpu and meta"),
        ((Q[:, :, :0], C, "T"), r"at least 1, got qkv of shape \(2, 3, 0, 5, 3, 6, 8\)"),
        ((Q[:, :, :, :, :, :0], C[:, :, :0], "T"), r"at least 1, got qkv of shape \(2, 3, 4, 5, 3, 0, 8\)"),
        (
            (Q.transpose(5, 6).contiguous().transpose(5, 6), C, "T"),
            r"must be contiguous \(stride 1\), got strides \(.*, 1, 6\)",
        ),
        ((Q, C.transpose(2, 3).contiguous().transpose(2, 3), "T"), r"must be contiguous \(stride 1\), got strides .*, 1, 6\)"),
        ((Q[..., ::2], C[..., ::2], "T"), r"must be contiguous \(stride 1\)"),
        (
            (Q, C, "T", P[:1]),
            r"pad must be bool \[B, T, H, W\] = \(2, 3, 4, 5\) on cpu, got torch.bool of shape \(1, 3, 4, 5\)",
        ),
        ((Q, C, "T", P.int()), "pad must be bool .* got torch.int32"),
        ((Q, C, "T", P.to("meta")), "pad must be bool .* on meta"),
        ((Q, C, "T", None, -0.1, 1), r"dropout_p must be in \[0, 1\), got -0.1"),
        ((Q, C, "T", None, 1.0, 1), "got 1.0"),
        ((Q, C, "T", None, math.nan, 1), "got nan"),
        ((Q, C, "T", None, 0.1), "dropout_p=0.1 needs a seed"),
        ((Q, C, "T", None, 0.1, 1.5), "seed must be .*, got 1.5"),
        ((Q, C, "T", None, 0.1, torch.tensor([1])), r"seed must be .* of shape \(1,\)"),
        ((Q, C, ()), r"6 heads cannot be split evenly over 0 axes \(\)"),
        ((Q, C, "THWT"), r"6 heads cannot be split evenly over 4 axes \('T', 'H', 'W', 'T'\)"),
        ((Q, C, ("X",)), "bad axis 'X': expected T, H, W or a product"),
        ((Q, C, ("TxT",)), "bad axis 'TxT'"),
        ((Q, C, ("",)), "bad axis ''"),
        ((Q, C, (1,)), "bad axis 1"),
        ((Q, C, "T", None, 0.0, None, True, "turbo"), "no backend 'turbo'; it has cpu, "),
    ],
)
def test_bad_calls_are_shown(call, shown):
    qkv, cls_qkv, axes, *options = call
    with pytest.raises(ValueError, match=shown):
        axial_attention(qkv, cls_qkv, tuple(axes), *options)


def test_bad_axes_and_rows_are_shown():
    with pytest.raises(ValueError, match=r"axes must be a sequence .* such as \('H', 'W'\), got 'HxW'"):
        axial_attention(Q, C, "HxW")
    with pytest.raises(ValueError, match=r"qkv has 121 rows, not a multiple of T·H·W \+ 1 = 61 for grid=\(3, 4, 5\)"):
        axial_attention_packed(torch.zeros(121, 3, 6, 8), (3, 4, 5), ("T",))
    with pytest.raises(ValueError, match=r"qkv must be \[B, T, H, W, 3, N, D\]"):
        axial_attention_packed(torch.zeros(122, 6, 8), (3, 4, 5), ("T",))
    with pytest.raises(ValueError, match=r"grid must be \(T, H, W\), got \(60, 1\)"):
        axial_attention_packed(torch.zeros(122, 3, 6, 8), (60, 1), ("T",))
    with pytest.raises(TypeError, match=r"^H must be a number, got '4'"):
        axial_attention_packed(torch.zeros(122, 3, 6, 8), (3, "4", 5), ("T",))
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\), got 2"):
        axial_attention_packed(torch.zeros(122, 3, 6, 8), (3, 4, 5), ("T",), None, 2)
