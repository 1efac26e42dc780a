"""residual_norm and residual_sum_norm: every backend against the definition in float64, and the promises of the docstrings."""

import itertools
import math
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from extension import needs_cpu
from vimpac.dropout_rate import dropout_scale
from vimpac.ops import dispatch, dropout_add, libraries, residual_norm, residual_sum_norm
from vimpac.ops.dropout_add import dropout_keep
from vimpac.ops.philox import seed_tensor

MODULE = sys.modules["vimpac.ops.residual_norm"]  # the package exports the function under the module's name
SINGLE, DOUBLE, HALF, BRAIN = torch.float32, torch.float64, torch.float16, torch.bfloat16
FORMS = ["sum", "output", "both"]  # residual_norm's `keeps`, and residual_sum_norm
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu)]
DTYPES = [(SINGLE, SINGLE), (DOUBLE, DOUBLE), (BRAIN, BRAIN), (SINGLE, BRAIN)]  # of x and y, as the C++ kernels take them
SEED = 2**40 + 3


def inputs(rows, columns, dtypes=(SINGLE, SINGLE), device="cpu", shift=0.0):
    """x, y, bias, weight, norm_bias."""
    generator = torch.Generator().manual_seed(rows + columns)
    x, y = (torch.randn(rows, columns, generator=generator) + shift for _ in range(2))
    bias, weight, norm_bias = (0.3 * torch.randn(columns, generator=generator) for _ in range(3))
    of_vectors = torch.promote_types(dtypes[0], SINGLE)
    kinds = (*dtypes, *[of_vectors] * 3)
    given = (x, y, bias, 1 + weight.clamp(-0.7, 0.7), norm_bias)
    return [v.to(device, kind).requires_grad_() for v, kind in zip(given, kinds, strict=True)]


def upstream(outputs):
    """Gradients of their own for every element, with permuted strides, exact in every dtype."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(out.shape[::-1], generator=generator).to(BRAIN).to(out).t() for out in outputs]


def apply(form, call, p=0.1, seed=SEED, eps=1e-12, backend=None):
    """The outputs of a form: [norm], or of "both" [sum, norm]."""
    if form == "both":
        return residual_sum_norm(*call, p, seed, eps, backend)
    return (residual_norm(*call, p, seed, eps, form, backend),)


def outputs_and_gradients(function, call):
    """Of call's tensors that require one."""
    outputs = function(call)
    wanted = [v for v in call if v is not None and v.requires_grad]
    pairs = [pair for pair in zip(outputs, upstream(outputs), strict=True) if pair[0].requires_grad]
    return *outputs, *torch.autograd.grad([out for out, _ in pairs], wanted, [grad for _, grad in pairs])


def plain(form, call, p=0.1, seed=SEED, eps=1e-12):
    """The same in torch's own ops, each in the tensors' dtype."""
    x, y, bias, weight, norm_bias = call
    added = y if bias is None else y + bias.to(y.dtype)
    if p > 0:
        keep = dropout_keep(y.shape, p, torch.tensor(seed, device=y.device))
        added = added * keep.to(y.dtype) * dropout_scale(p, 32)
    s = x + added
    out = F.layer_norm(s, s.shape[1:], weight.to(s.dtype), norm_bias.to(s.dtype), eps)
    return (s, out) if form == "both" else (out,)


def doubles(call):
    return [None if v is None else v.detach().double().requires_grad_(v.requires_grad) for v in call]


def is_exact(form, call, backend, p=0.1, eps=1e-12, times=2.0):
    """Every output and gradient is at most `times` as far from float64 as plain PyTorch's, and has its input's dtype.

    A rounding of the largest element is allowed, since plain PyTorch may be exact by luck, and ten in float64, where it is the
    truth.
    """
    got = outputs_and_gradients(lambda given: apply(form, given, p, SEED, eps, backend), call)
    peer = outputs_and_gradients(lambda given: plain(form, given, p, SEED, eps), call)
    true = outputs_and_gradients(lambda given: plain(form, given, p, SEED, eps), doubles(call))
    assert [v.dtype for v in got] == [call[0].dtype] * (len(got) - len(call)) + [v.dtype for v in call]
    assert len(got) == len(true) == len(peer)
    for i, (ours, theirs, exact) in enumerate(zip(got, peer, true, strict=True)):
        rounding = torch.finfo(ours.dtype).eps / 2 * float(exact.detach().abs().max()) * math.sqrt(exact.numel())
        slack = rounding if ours.dtype != DOUBLE else 10 * rounding
        error, theirs = (float((v.double() - exact).detach().norm()) for v in (ours, theirs))
        assert error <= times * theirs + slack, f"tensor {i}: error {error:.3g}, plain PyTorch's {theirs:.3g}"


# --- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p, eps", [(0.0, 1e-12), (0.3, 0.5)])
@pytest.mark.parametrize("form", FORMS)
def test_the_reference_is_torchs(form, p, eps, device):
    call = inputs(5, 130, (DOUBLE, DOUBLE), device)
    got = outputs_and_gradients(lambda given: apply(form, given, p, SEED, eps, "reference"), call)
    expected = outputs_and_gradients(lambda given: plain(form, given, p, SEED, eps), call)
    for ours, true in zip(got, expected, strict=True):
        assert_close(ours, true, rtol=1e-11, atol=1e-12)  # float64, sums of 130 terms


@needs_cpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_is_as_exact_as_plain_pytorch(dtypes, form):
    for columns, p in itertools.product((7, 64, 130, 512, 768, 1024), (0.0, 0.1)):
        is_exact(form, inputs(33, columns, dtypes), "cpu", p)


@needs_cpu
@pytest.mark.parametrize("form", FORMS)
def test_one_column(form):
    check_one_column(form, inputs(9, 1), "cpu")


def check_one_column(form, call, backend):
    """Its norm is norm_bias, whatever the sum: no gradient but norm_bias's, and the sum's own."""
    *outputs, of_x, of_y, of_bias, of_weight, of_norm_bias = outputs_and_gradients(partial(apply, form, backend=backend), call)
    of_sum, of_norm = upstream(outputs) if form == "both" else (torch.zeros_like(of_x), *upstream(outputs))
    keep = dropout_keep((9, 1), 0.1, torch.tensor(SEED, device=of_x.device)) * dropout_scale(0.1, 32)
    assert torch.equal(outputs[-1], call[4].expand(9, 1)) and not of_weight.any()
    assert torch.equal(of_x, of_sum)
    expected = of_sum * keep, (of_sum * keep).sum(0), of_norm.sum(0)
    for ours, true in zip((of_y, of_bias, of_norm_bias), expected, strict=True):
        assert_close(ours, true.float(), rtol=1e-6, atol=1e-6)  # sums of 9


@needs_cpu
@pytest.mark.parametrize("form", FORMS)
def test_rows_far_from_zero(form):
    """The variance is that of centred numbers."""
    is_exact(form, inputs(9, 130, shift=500.0), "cpu", eps=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_and_no_bias(backend):
    for form in FORMS:
        x, y, _, weight, norm_bias = inputs(9, 30)
        is_exact(form, [x, y, *inputs(9, 30)[2:]], backend, eps=0.5)
        got = outputs_and_gradients(partial(apply, form, backend=backend), [x, y, None, weight, norm_bias])
        zeros = torch.zeros(30)
        expected = outputs_and_gradients(partial(apply, form, backend=backend), [x, y, zeros, weight, norm_bias])
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("columns", [1, 7, 64, 130, 192])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mask_is_dropout_adds(backend, columns):
    """Forward and backward, whatever the width of a row is beside a group of 64 elements."""
    for seed, p in itertools.product((0, -1, SEED), (0.1, 0.5)):
        x, y, _, weight, norm_bias = inputs(21, columns)
        keep = dropout_keep(y.shape, p, torch.tensor(seed))
        total, _ = residual_sum_norm(torch.zeros_like(x), y, None, weight, norm_bias, p, seed, backend=backend)
        assert torch.equal(total != 0, keep)
        assert torch.equal(total, dropout_add(torch.zeros_like(x), y, p, seed, backend))
        (of_y,) = torch.autograd.grad(total, y, torch.ones_like(total))
        assert torch.equal(of_y != 0, keep)


@pytest.mark.parametrize("p, all_of", [(1e-11, True), (1 - 1e-12, False)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rates_of_none_and_all(backend, p, all_of):
    x, y, bias, *_ = call = inputs(9, 70)
    total, _, of_x, of_y = outputs_and_gradients(partial(apply, "both", p=p, backend=backend), call)[:4]
    assert_close(total, x + y + bias if all_of else x, rtol=1e-6, atol=1e-6)
    assert torch.equal(of_y, of_x if all_of else torch.zeros_like(y))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_is_of_the_sum_as_returned(backend):
    """In bfloat16: rounded once more, from the rounded sum."""
    total, out = apply("both", inputs(40, 512, (BRAIN, BRAIN)), backend=backend)
    weight, norm_bias = inputs(40, 512)[3:]
    expected = F.layer_norm(total.double(), (512,), weight.double(), norm_bias.double(), 1e-12).to(BRAIN)
    assert (out == expected).double().mean() > 0.995  # a float32 result may round to the other side of a tie


@needs_cpu
@pytest.mark.parametrize("value", [0.0, 1e-40])
def test_a_weight_of_zero(value):
    """keeps="sum" is exact; with "output" the column's normalised numbers count as 0, the rest is as it would be."""
    call = inputs(33, 130)
    with torch.no_grad():
        call[3][5], call[3][64:70] = value, value
    for form in ("sum", "both"):
        is_exact(form, call, "cpu")
    check_zero_weights(call, "cpu")


def check_zero_weights(call, backend):
    """keeps="output" against its formula."""
    x, y, bias, weight, _ = (v.detach().double() for v in call)
    got = outputs_and_gradients(partial(apply, "output", backend=backend), call)
    keep = dropout_keep(y.shape, 0.1, torch.tensor(SEED, device=y.device)) * dropout_scale(0.1, 32)
    s = x + (y + bias) * keep
    rstd = (s.var(1, correction=0, keepdim=True) + 1e-12).rsqrt()
    n = (s - s.mean(1, keepdim=True)) * rstd * (weight.abs() > 1e-38)
    g = upstream(got[:1])[0].double()
    a = g * weight
    of_x = rstd * (a - a.mean(1, keepdim=True) - n * (a * n).mean(1, keepdim=True))
    expected = of_x, of_x * keep, (of_x * keep).sum(0), (g * n).sum(0), g.sum(0)
    for ours, true in zip(got[1:], expected, strict=True):
        assert_close(ours, true.to(ours.dtype), rtol=1e-4, atol=2e-5)  # float32, sums of up to 130 terms; outputs recovered


# --- promises ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend, form):
    results = outputs_and_gradients(partial(apply, form, backend=backend), inputs(0, 5))
    assert [v.shape for v in results[-5:]] == [(0, 5), (0, 5), (5,), (5,), (5,)]
    assert all(v.shape == (0, 5) for v in results[:-5]) and not any(v.any() for v in results[-3:])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend, form):
    """Elements are numbered in raster order whatever their strides are, and inputs stay as they were."""
    run = partial(apply, form, backend=backend)
    x, y, bias, weight, norm_bias = (v.detach() for v in inputs(12, 70))
    expected = outputs_and_gradients(run, [v.clone().requires_grad_() for v in (x, y, bias, weight, norm_bias)])
    permuted = y.t().contiguous().t()
    spread = torch.full((24, 75), math.nan)[1::2, 5:].copy_(y)
    offset = torch.full((12 * 70 + 3,), math.nan)[3:].view(12, 70).copy_(y)
    vectors = [torch.full((140,), math.nan)[::2].copy_(v).requires_grad_() for v in (bias, weight, norm_bias)]
    for same in (permuted, spread, offset):
        before = same.clone()
        for call in ([x.t().contiguous().t(), same, *vectors], [x, same, *vectors]):
            got = outputs_and_gradients(run, [call[0].clone().requires_grad_(), same.requires_grad_(), *vectors])
            assert torch.equal(same, before)
            for ours, true in zip(got, expected, strict=True):  # torch adds in the order of strides
                assert torch.equal(ours, true) if backend == "cpu" else torch.allclose(ours, true, 1e-4, 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, form):
    call = inputs(3, 11, (DOUBLE, DOUBLE))
    torch.autograd.gradcheck(lambda *given: apply(form, given, 0.3, 5, 1e-5, backend), call)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_one_output(backend):
    """The other's is none, which counts as zeros."""
    call = inputs(9, 70)
    for i in (0, 1):
        outputs = apply("both", call, backend=backend)
        grads = [grad if j == i else torch.zeros_like(grad) for j, grad in enumerate(upstream(outputs))]
        expected = torch.autograd.grad(outputs, call, grads, retain_graph=True)
        got = torch.autograd.grad(outputs[i], call, grads[i], materialize_grads=True)
        for ours, true in zip(got, expected, strict=True):
            assert_close(ours, true, rtol=1e-6, atol=1e-6)  # torch may add zeros in another order


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_some_gradients(backend, form):
    run, call = partial(apply, form, backend=backend), inputs(9, 70)
    expected = outputs_and_gradients(run, call)[-5:]
    for i in range(5):
        alone = [v.detach().requires_grad_(j == i) for j, v in enumerate(call)]
        assert torch.equal(outputs_and_gradients(run, alone)[-1], expected[i])
    assert not any(out.requires_grad for out in run([v.detach() for v in call]))


@needs_cpu
def test_what_is_saved():
    """One tensor [R, C], two numbers a row, the vectors and the seed: not the mask."""
    call = inputs(100, 70)
    for form in FORMS:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v, saved=saved: saved.append(v) or v, lambda v: v):
            outputs = apply(form, call, seed=torch.tensor(5), backend="cpu")
        assert sorted(v.numel() for v in saved if v.numel()) == [1, 70, 70, 200, 7000]
        (kept,) = [v for v in saved if v.numel() == 7000]
        if form != "sum":  # what the caller has anyway
            assert kept.data_ptr() == outputs[0].data_ptr()


@needs_cpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wanted", [None, 0, 1, 2, 3, 4])
def test_second_derivatives_raise(form, wanted):
    """With every argument that a gradient may depend on, all alone as well; upstream gradients are constants."""
    call = [v.detach().requires_grad_(wanted in (None, i)) for i, v in enumerate(inputs(5, 13))]
    leaves = [v for v in call if v.requires_grad]
    grads = torch.autograd.grad(sum(out.square().sum() for out in apply(form, call, backend="cpu")), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="residual_norm: its kernels have no second derivative"):
        torch.autograd.grad(grads[0].square().sum(), leaves)
    out = apply(form, call, backend="cpu")[-1]
    grads = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="residual_norm: its kernels have no second derivative"):
        torch.autograd.grad(grads[0].square().sum(), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_rounds_nothing(backend):
    call = inputs(5, 70)
    for form in FORMS:
        expected = outputs_and_gradients(partial(apply, form, backend=backend), call)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(map(torch.equal, outputs_and_gradients(partial(apply, form, backend=backend), call), expected))


@needs_cpu
@pytest.mark.parametrize("dtypes", [(DOUBLE, DOUBLE), (SINGLE, BRAIN)])
def test_opcheck(dtypes):
    forward, backward = (dispatch.overload(f"residual_norm{name}", "cpu") for name in ("", "_backward"))
    for rows, p, one in ((0, 0.3, True), (5, 0.0, True), (5, 0.3, False)):
        x, y, bias, weight, norm_bias = (v.detach() for v in inputs(rows, 13, dtypes))
        seed = torch.tensor(7) if p > 0 else None
        torch.library.opcheck(forward, (x, y, bias if one else None, weight, norm_bias, p, seed, 1e-12, one))
        statistics = torch.rand(2, rows).to(weight)
        for grad_sum in (x, None):
            torch.library.opcheck(backward, (x, grad_sum, x, statistics, weight, norm_bias, p, seed, one, y.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_traces_whole_with_any_number_of_rows(backend):
    """Forward and backward, mask included; another number of rows or seed does not trace again."""
    torch.compiler.reset()

    def run(call):
        *tensors, seed = call
        pre = residual_sum_norm(*tensors, 0.3, seed, backend=backend)
        return *pre, residual_norm(*tensors, 0.3, seed, keeps="output", backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for rows, seed in ((50, 5), (70, -(2**62))):
        with torch.compiler.set_stance("default" if rows == 50 else "fail_on_recompile"):
            call = [*inputs(rows, 24), torch.tensor(seed)]
            for v in call[:2]:
                torch._dynamo.mark_dynamic(v, 0)
            for a, b in zip(outputs_and_gradients(compiled, call), outputs_and_gradients(run, call), strict=True):
                assert_close(a, b, rtol=1e-5, atol=1e-5)  # compiled code may add in another order


# --- dispatch and bad calls -------------------------------------------------------------------------------------------


def test_choice(monkeypatch):
    monkeypatch.delenv("VIMPAC_BACKEND", raising=False)

    def chosen(dtypes):
        call = (*inputs(4, 8, dtypes), 0.1, seed_tensor(1, torch.device("cpu")), 1e-12)
        return dispatch.choose("residual_norm", None, dispatch.order(MODULE.BACKENDS, torch.device("cpu")), *call)

    assert MODULE.BACKENDS["cuda"] == ("triton", "reference")
    best = "reference" if libraries.library_error("cpu") else "cpu"
    assert [chosen(dtypes) for dtypes in DTYPES] == [best] * 4
    assert chosen((HALF, HALF)) == chosen((DOUBLE, SINGLE)) == "reference"
    if best == "cpu":
        with pytest.raises(ValueError, match=r"'cpu' cannot run .*: x of torch.float64 and y of torch.float32, it takes one"):
            apply("sum", inputs(4, 8, (DOUBLE, SINGLE)), backend="cpu")


X, V = torch.zeros(2, 3), torch.zeros(3)


@pytest.mark.parametrize("function", [residual_norm, residual_sum_norm])
@pytest.mark.parametrize(
    "changes, shown",
    [
        ({"y": X[:1]}, r"x and y must be \[R, C\] of one shape, C at least 1, got \(2, 3\) and \(1, 3\)"),
        ({"x": V, "y": V}, r"must be \[R, C\] of one shape, C at least 1, got \(3,\) and \(3,\)"),
        ({"x": X[:, :0], "y": X[:, :0]}, r"C at least 1, got \(2, 0\) and \(2, 0\)"),
        ({"bias": V[:2]}, r"bias must be \[C\] = \[3\], got shape \(2,\)"),
        ({"weight": X}, r"weight must be \[C\] = \[3\], got shape \(2, 3\)"),
        ({"norm_bias": V[:1]}, r"norm_bias must be \[C\] = \[3\], got shape \(1,\)"),
        ({"x": X.int()}, "x must be floating, got torch.int32"),
        ({"weight": V.bool()}, "weight must be floating, got torch.bool"),
        ({"y": X.double()}, "y must be of x's dtype torch.float32 or a narrower one, got torch.float64"),
        ({"x": X.half(), "y": X.bfloat16()}, "y must be of x's dtype torch.float16 or a narrower one, got torch.bfloat16"),
        ({"norm_bias": V.to("meta")}, "norm_bias must be on x's device cpu, got meta"),
        ({"p": 1.0}, r"p must be in \[0, 1\), got 1.0"),
        ({"p": math.nan}, "got nan"),
        ({"p": 0.1}, "p=0.1 needs a seed"),
        ({"p": 0.1, "seed": 1.5}, "seed must be .*, got 1.5"),
        ({"eps": -1e-5}, "eps must be at least 0, got -1e-05"),
        ({"eps": math.nan}, "eps must be at least 0, got nan"),
        ({"backend": "turbo"}, "no backend 'turbo'; it has cpu, reference, triton"),
    ],
)
def test_bad_calls_are_shown(function, changes, shown):
    with pytest.raises(ValueError, match=shown):
        function(**{"x": X, "y": X, "bias": V, "weight": V, "norm_bias": V} | changes)


def test_other_bad_calls():
    with pytest.raises(ValueError, match="keeps must be 'sum' or 'output', got 'both'"):
        residual_norm(X, X, V, V, V, keeps="both")
    with pytest.raises(TypeError, match=r"weight must be a torch\.Tensor, got builtins\.NoneType"):
        residual_norm(X, X, None, None, V)
