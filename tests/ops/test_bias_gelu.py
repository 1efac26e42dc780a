"""bias_gelu and gelu_linear: every backend against the definition in float64, and the promises of the docstrings."""

import math
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from extension import needs_cpu
from vimpac.ops import bias_gelu, bias_gelu_reference, dispatch, gelu_linear, libraries

MODULE = sys.modules["vimpac.ops.bias_gelu"]  # the package exports the function under the module's name
SINGLE, DOUBLE, HALF, BRAIN = torch.float32, torch.float64, torch.float16, torch.bfloat16
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu)]
DTYPES = [SINGLE, DOUBLE, BRAIN]  # as the C++ kernels take them
WIDTHS = [1, 7, 130, 2048]
FORMS = ["gelu", "again", "saved"]  # bias_gelu, and gelu_linear with recompute and without
OUT = 5  # columns of gelu_linear's result


def inputs(rows, columns, dtype=SINGLE, device="cpu", form="gelu"):
    """h, bias and, but for bias_gelu, weight. bias is at least float32."""
    generator = torch.Generator().manual_seed(rows + columns)
    h, bias = torch.randn(rows, columns, generator=generator), torch.randn(columns, generator=generator)
    weight = torch.randn(OUT, columns, generator=generator) / math.sqrt(columns)
    call = [h.to(device, dtype), bias.to(device, torch.promote_types(dtype, SINGLE)), weight.to(device, dtype)]
    return [v.requires_grad_() for v in call[: 2 if form == "gelu" else 3]]


def upstream(out):
    """Strides of its own, exact in every dtype."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(out.shape[::-1], generator=generator).to(BRAIN).to(out).t()


def apply(form, call, backend=None):
    return bias_gelu(*call, backend) if form == "gelu" else gelu_linear(*call, recompute=form == "again", backend=backend)


def plain(form, call):
    """torch's own ops, in the tensors' dtype."""
    h, bias, *weight = call
    out = F.gelu(h + bias)
    return out if form == "gelu" else F.linear(out, *weight)


def output_and_gradients(function, call):
    """Of call's tensors that require one."""
    out = function(call)
    return out, *torch.autograd.grad(out, [v for v in call if v.requires_grad], upstream(out))


def truth(form, call):
    return output_and_gradients(partial(plain, form), [v.detach().double().requires_grad_() for v in call])


def is_exact(form, call, backend):
    """Output and gradients in their inputs' dtypes, as far from float64 as their roundings.

    In half precision the rounding of a result, and in gelu_linear that of an activation and of its gradient, which no sum
    enlarges relative to its norm: at most half of eps each, and a third of that on average. In float32 and float64 some ten
    roundings of the distribution, and those of sums.
    """
    got = output_and_gradients(partial(apply, form, backend=backend), call)
    assert [v.dtype for v in got] == [call[0].dtype, *[v.dtype for v in call]]
    for i, (ours, true) in enumerate(zip(got, truth(form, call), strict=True)):
        assert ours.shape == true.shape
        wide = ours.dtype in (SINGLE, DOUBLE) and (call[0].dtype == ours.dtype or form == "gelu")
        bound = 10 * torch.finfo(ours.dtype).eps if wide else torch.finfo(call[0].dtype).eps
        # of a sum that cancels: the norm that its terms would give
        norm = max(float(true.detach().norm()), math.sqrt(len(call[0])) if true.ndim == 1 else 0.0)
        error = float((ours.double() - true).detach().norm())
        assert error <= bound * norm, f"tensor {i}: error {error:.3g} of {norm:.3g}"


# --- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend, columns, dtype, form):
    is_exact(form, inputs(37, columns, dtype, form=form), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_range(dtype, backend):
    check_range(dtype, backend)


def check_range(dtype, backend, device="cpu", in_tail=False):
    """z from -12 to 12. float32's absolute error is that of 1; with `in_tail` the relative one is that of exp(-z²/2), some
    z² roundings, as long as results are normal numbers."""
    h = torch.linspace(-12, 12, 24_001, dtype=DOUBLE).to(device, dtype).view(-1, 1).requires_grad_()
    bias = torch.full((1,), 0.125, dtype=torch.promote_types(dtype, SINGLE), device=device, requires_grad=True)
    call = [h, bias]
    out, of_h, _ = output_and_gradients(partial(apply, "gelu", backend=backend), call)
    true, true_of_h, _ = truth("gelu", call)
    eps = torch.finfo(dtype).eps
    assert_close(out.double(), true, rtol=eps, atol=4 * 12 * torch.finfo(bias.dtype).eps)
    # of z·φ(z): z² roundings of a number that is at most 0.24, largest near z = 2
    assert_close(of_h.double(), true_of_h, rtol=eps, atol=32 * torch.finfo(bias.dtype).eps)
    if in_tail:
        z = h.detach().double() + 0.125
        by_erfc = z * torch.special.erfc(z * -math.sqrt(0.5)) / 2  # which keeps its digits there
        assert_close(out.double(), by_erfc, rtol=200 * eps, atol=torch.finfo(dtype).tiny)


@needs_cpu
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_the_tail_keeps_its_digits(dtype):
    """torch's erf does not: its gelu(-6) in float32 is 0."""
    check_range(dtype, "cpu", in_tail=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite(backend, dtype):
    check_not_finite(dtype, backend)


def check_not_finite(dtype, backend, device="cpu"):
    """NaN and infinities go on; huge numbers are no overflow; the neighbours in the row are as they were."""
    values = [math.nan, math.inf, -math.inf, 3e4, -3e4] + ([1e30, -1e30] if dtype != HALF else [])
    call = inputs(len(values), 130, dtype, device)
    call[1].data.zero_()
    clean = output_and_gradients(partial(apply, "gelu", backend=backend), call)
    call[0].data[:, 77] = torch.tensor(values, dtype=dtype)
    out, of_h, of_bias = output_and_gradients(partial(apply, "gelu", backend=backend), call)
    expected = torch.tensor([math.nan, out[1, 77].item(), math.nan, *values[3:]], dtype=dtype, device=device)
    expected[4::2] = 0  # the negative ones
    assert not out[1, 77].isfinite()  # in torch's vectors NaN
    assert_close(out[:, 77], expected, rtol=0, atol=0, equal_nan=True)
    slope = torch.tensor([math.nan, math.nan, math.nan, 1, 0, 1, 0][: len(values)], dtype=dtype, device=device)
    assert_close(of_h[:, 77], slope * upstream(out)[:, 77], rtol=0, atol=0, equal_nan=True)
    others = torch.arange(130, device=device) != 77
    assert torch.equal(out[:, others], clean[0][:, others]) and torch.equal(of_h[:, others], clean[1][:, others])
    assert of_bias[77].isnan() and torch.equal(of_bias[others], clean[2][others])


# --- promises ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend, form):
    check_no_rows(form, backend)


def check_no_rows(form, backend, device="cpu"):
    call = inputs(0, 9, device=device, form=form)
    out, *gradients = output_and_gradients(partial(apply, form, backend=backend), call)
    assert out.shape == (0, 9 if form == "gelu" else OUT)
    assert [v.shape for v in gradients] == [v.shape for v in call] and not any(v.any() for v in gradients)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend, form):
    run = partial(output_and_gradients, partial(apply, form, backend=backend))
    h, bias, *weight = (v.detach() for v in inputs(12, 70, form=form))
    expected = run([v.clone().requires_grad_() for v in (h, bias, *weight)])
    spread = torch.full((24, 75), math.nan)[1::2, 5:].copy_(h)
    offset = torch.full((12 * 70 + 3,), math.nan)[3:].view(12, 70).copy_(h)
    vector = torch.full((140,), math.nan)[::2].copy_(bias)
    for same in (h.t().contiguous().t(), spread, offset):
        got = run([v.detach().requires_grad_() for v in (same, vector, *weight)])
        for ours, true in zip(got, expected, strict=True):  # torch adds in the order of strides
            assert torch.equal(ours, true) if backend == "cpu" else torch.allclose(ours, true, 1e-5, 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, form):
    torch.autograd.gradcheck(lambda *call: apply(form, call, backend), inputs(3, 11, DOUBLE, form=form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_some_gradients(backend, form):
    run, call = partial(apply, form, backend=backend), inputs(9, 70, form=form)
    expected = output_and_gradients(run, call)[1:]
    for i in range(len(call)):
        alone = [v.detach().requires_grad_(j == i) for j, v in enumerate(call)]
        assert torch.equal(output_and_gradients(run, alone)[-1], expected[i])
    assert not run([v.detach() for v in call]).requires_grad


@needs_cpu
@pytest.mark.parametrize("form, kept", [("gelu", 1), ("again", 1), ("saved", 2)])
def test_what_is_saved(form, kept):
    """h, and the activation only if it is not made again; which has the same bits then."""
    saved, call = [], inputs(100, 70, form=form)
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        apply(form, call, "cpu")
    assert [v.shape for v in saved if v is not None].count((100, 70)) == kept
    if form == "again":
        pair = [output_and_gradients(partial(apply, f, backend="cpu"), call) for f in ("again", "saved")]
        assert all(map(torch.equal, *pair))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_product_is_the_callers(backend):
    """Forward, and backward for the gradient of the activation."""
    shapes = []

    def product(x, weight):
        shapes.append((tuple(x.shape), tuple(weight.shape)))
        return F.linear(x, weight)

    call = inputs(9, 70, form="again")
    got = output_and_gradients(lambda call: gelu_linear(*call, product=product, backend=backend), call)
    assert all(map(torch.equal, got, output_and_gradients(partial(apply, "again", backend=backend), call)))
    assert shapes == [((9, 70), (OUT, 70)), ((9, OUT), (70, OUT))][: 1 if backend == "reference" else 2]


@needs_cpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wanted", [None, 0, 1, 2])
def test_second_derivatives_raise(form, wanted):
    call = inputs(5, 13, form=form)
    if wanted is not None and wanted >= len(call):
        pytest.skip("bias_gelu has no weight")
    call = [v.detach().requires_grad_(wanted in (None, i)) for i, v in enumerate(call)]
    leaves = [v for v in call if v.requires_grad]
    for loss in (apply(form, call, "cpu").square().sum(), apply(form, call, "cpu").sum()):
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="bias_gelu: its kernels have no second derivative"):
            torch.autograd.grad(grads[0].square().sum(), leaves)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_rounds_nothing(backend, form):
    """Forward; and backward of the kernels, where torch's own products round inside autocast."""
    run, call = partial(apply, form, backend=backend), inputs(5, 70, form=form)
    expected = output_and_gradients(run, call)
    with torch.autocast("cpu", BRAIN):
        out = run(call)
        assert torch.equal(out, expected[0])
        with torch.autocast("cpu", enabled=backend == "cpu"):
            assert all(map(torch.equal, torch.autograd.grad(out, call, upstream(out)), expected[1:]))


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    check_opcheck(dtype, "cpu")


def check_opcheck(dtype, backend, device="cpu"):
    forward, backward = (dispatch.overload(f"bias_gelu{name}", backend) for name in ("", "_backward"))
    for rows, with_output in ((5, True), (5, False), (0, True)):
        h, bias = (v.detach() for v in inputs(rows, 13, dtype, device))
        torch.library.opcheck(forward, (h, bias))
        torch.library.opcheck(backward, (h, h, bias, with_output))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_traces_whole_with_any_number_of_rows(backend, form):
    check_traces(form, backend)


def check_traces(form, backend, device="cpu"):
    torch.compiler.reset()
    run = partial(apply, form, backend=backend)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for rows in (20, 30):
        with torch.compiler.set_stance("default" if rows == 20 else "fail_on_recompile"):
            call = inputs(rows, 24, device=device, form=form)
            torch._dynamo.mark_dynamic(call[0], 0)
            for a, b in zip(output_and_gradients(compiled, call), output_and_gradients(run, call), strict=True):
                assert_close(a, b, rtol=1e-5, atol=1e-5)  # compiled code may add in another order


# --- dispatch and bad calls -------------------------------------------------------------------------------------------


def test_choice(monkeypatch):
    monkeypatch.delenv("VIMPAC_BACKEND", raising=False)
    best = "reference" if libraries.library_error("cpu") else "cpu"
    assert [MODULE.choose(*inputs(4, 8, dtype), None) for dtype in DTYPES] == [best] * 3
    assert MODULE.choose(*inputs(4, 8, HALF), None) == "reference" and MODULE.BACKENDS["cuda"] == ("triton", "reference")
    call = inputs(4, 8)
    assert torch.equal(bias_gelu_reference(*call), bias_gelu(*call, "reference"))


H, V, W = torch.zeros(2, 3), torch.zeros(3), torch.zeros(4, 3)


@pytest.mark.parametrize(
    "changes, shown",
    [
        ({"h": V}, r"h must be \[R, F\], F at least 1, and bias \[F\], got \(3,\) and \(3,\)"),
        ({"h": H[:, :0], "bias": V[:0], "weight": W[:, :0]}, r"F at least 1, and bias \[F\], got \(2, 0\) and \(0,\)"),
        ({"bias": V[:2]}, r"and bias \[F\], got \(2, 3\) and \(2,\)"),
        ({"bias": H}, r"and bias \[F\], got \(2, 3\) and \(2, 3\)"),
        ({"h": H.int()}, "h and bias must be floating, got torch.int32 and torch.float32"),
        ({"bias": V.bool()}, "must be floating, got torch.float32 and torch.bool"),
        ({"bias": V.to("meta")}, "h and bias must be on one device, got cpu and meta"),
        ({"backend": "turbo"}, "no backend 'turbo'; it has cpu, reference, triton"),
        ({"weight": V}, r"weight must be torch.float32 \[C, F\] with F = 3 on cpu, got torch.float32 of shape \(3,\) on cpu"),
        ({"weight": W[:, :2]}, r"got torch.float32 of shape \(4, 2\) on cpu"),
        ({"weight": W.double()}, r"got torch.float64 of shape \(4, 3\) on cpu"),
        ({"weight": W.to("meta")}, r"of shape \(4, 3\) on meta"),
    ],
)
def test_bad_calls_are_shown(changes, shown):
    call = {"h": H, "bias": V, "weight": W} | changes
    with pytest.raises(ValueError, match=shown):
        gelu_linear(**call)
    if not changes.keys() & {"weight"} or "h" in changes:
        with pytest.raises(ValueError, match=shown):
            bias_gelu(**{name: v for name, v in call.items() if name != "weight"})


def test_what_is_no_tensor():
    with pytest.raises(TypeError, match=r"bias must be a torch\.Tensor, got builtins\.NoneType"):
        bias_gelu(H, None)
    with pytest.raises(TypeError, match=r"weight must be a torch\.Tensor, got builtins\.NoneType"):
        gelu_linear(H, V, None)
