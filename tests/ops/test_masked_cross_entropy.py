"""masked_cross_entropy: the definition against loops, every backend against the definition, and what it keeps in memory."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from extension import needs_compiler
from vimpac.ops import dispatch, masked_cross_entropy, masked_cross_entropy_reference

MODULE = sys.modules["vimpac.ops.masked_cross_entropy"]  # the package exports the function under the module's name
EXACT = {"rtol": 1e-12, "atol": 1e-13}  # float64, sums of some hundred terms of order 1
FLOAT32 = {"rtol": 2e-5, "atol": 2e-6}  # sums of up to 8197 terms of order 1 in another order: some 50 roundings of 6e-8


def inputs(M, C, V, device="cpu", dtype=torch.float32, ignored=0.0, seed=0):
    """hidden and target strided, weight permuted from nothing but its rows; some targets negative."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(M, 2, C, generator=generator).to(device, dtype)[:, 1].requires_grad_()
    weight = (torch.randn(V, C + 3, generator=generator) / math.sqrt(C)).to(device, dtype)[:, :C].requires_grad_()
    bias = torch.randn(2 * V, generator=generator).to(device, dtype)[::2].requires_grad_()
    target = torch.randint(V, (2 * M,), generator=generator)[::2]
    target[torch.rand(M, generator=generator) < ignored] = -100
    target[: min(1, M)] = V - 1  # one row counts, with the last class
    return hidden, weight, bias, target.to(device)


def values_and_gradients(function, hidden, weight, bias, target, **options):
    loss, accuracy = function(hidden, weight, bias, target, **options)
    upstream = torch.full((), 1.75, dtype=loss.dtype, device=loss.device)
    return loss, accuracy, *torch.autograd.grad(loss, (hidden, weight, bias), upstream)


def by_loops(hidden, weight, bias, target):
    """The docstring's formula row by row in Python floats."""
    losses, hits, weight, bias = [], 0, weight.tolist(), bias.tolist()
    for row, label in zip(hidden.tolist(), target.tolist(), strict=True):
        if label >= 0:
            logits = [sum(a * b for a, b in zip(row, w, strict=True)) + c for w, c in zip(weight, bias, strict=True)]
            losses.append(math.log(sum(math.exp(x - max(logits)) for x in logits)) + max(logits) - logits[label])
            hits += logits.index(max(logits)) == label
    return sum(losses) / max(1, len(losses)), hits / max(1, len(losses))


@pytest.fixture(scope="module", autouse=True)
def slot():
    """A backend "slot" behind its own overload, as a kernel would come: all logits at once and their gradient in full."""

    def implementation(hidden, weight, bias, target, gradients):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        h, w = hidden.to(dtype), weight.to(dtype)
        logits = h @ w.T + bias.to(dtype)
        loss = F.cross_entropy(logits, target.clamp(min=-1), ignore_index=-1, reduction="sum")
        hits = (logits.argmax(-1) == target).sum().to(dtype)
        if not gradients:
            return loss, hits, hidden.new_empty(0, h.shape[1]), h.new_empty(0, h.shape[1]), h.new_empty(0)
        grad = logits.softmax(-1) - F.one_hot(target.clamp(min=0), len(w))
        grad = grad * (target >= 0)[:, None]
        return loss, hits, (grad @ w).to(hidden.dtype), grad.T @ h, grad.sum(0)

    dispatch.define_overload("masked_cross_entropy", "slot", MODULE.SCHEMA, MODULE._zeros)
    dispatch.implement("masked_cross_entropy", "slot", "CompositeExplicitAutograd", implementation)
    dispatch.register("masked_cross_entropy", "slot", dispatch.always)
    yield
    del dispatch._REGISTRY["masked_cross_entropy"]["slot"]


@pytest.fixture(params=["chunked", "slot"])
def backend(request):
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 3 rows at V = 11."""
    monkeypatch.setattr(MODULE, "CHUNK_LOGITS", 35)


@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_reference_is_the_formula(ignored):
    hidden, weight, bias, target = inputs(9, 5, 7, dtype=torch.float64, ignored=ignored)
    assert ignored < 1 or (target < 0).sum() == 8
    loss, accuracy = masked_cross_entropy_reference(hidden, weight, bias, target)
    expected = by_loops(hidden, weight, bias, target)
    assert_close((loss.item(), accuracy.item()), expected, **EXACT)


@pytest.mark.parametrize("M, C, V", [(1, 1, 1), (1, 8, 11), (3, 5, 11), (4, 5, 11), (10, 5, 11), (2047, 32, 8197)])
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_matches_reference(backend, device, M, C, V, ignored, monkeypatch):
    if V == 11:
        monkeypatch.setattr(MODULE, "CHUNK_LOGITS", 35)  # 1, 1, 2 and 4 chunks of up to 3 rows; one more than one at 8197
    call = inputs(M, C, V, device, ignored=ignored)
    actual = values_and_gradients(masked_cross_entropy, *call, backend=backend)
    assert actual[0].dtype == actual[1].dtype == torch.float32
    for ours, expected in zip(actual, values_and_gradients(masked_cross_entropy_reference, *call), strict=True):
        assert_close(ours, expected, **FLOAT32)


def test_counts_right_answers(backend, device, small_chunks):
    """8 rows that point at a class each, 2 of them ignored, 2 of the rest labelled wrongly."""
    hidden = torch.eye(11, device=device)[:8]
    target = torch.tensor([0, 1, 3, 3, -1, 5, -7, 6], device=device)
    loss, accuracy = masked_cross_entropy(
        hidden, 50 * torch.eye(11, device=device), torch.zeros(11, device=device), target, backend
    )
    assert accuracy.item() == pytest.approx(4 / 6)
    assert loss.item() == pytest.approx(2 * 50 / 6)  # a wrong row loses 50, a right one 10·exp(-50)


@pytest.mark.parametrize("M", [0, 1, 7])
def test_no_row_counts(backend, device, M, small_chunks):
    hidden, weight, bias, target = inputs(M, 5, 11, device)
    target.fill_(-1)
    for value in values_and_gradients(masked_cross_entropy, hidden, weight, bias, target, backend=backend):
        assert_close(value, torch.zeros_like(value), rtol=0, atol=0)


def rows_that_do_not_count_reach_nothing(value, backend, device="cpu"):
    """0 · NaN is NaN: with zeros in their place the same loss and gradients, and none of their own."""
    hidden, weight, bias, target = (x.detach() for x in inputs(7, 5, 11, device, ignored=0.5))
    zeros = hidden.masked_fill(target[:, None] < 0, 0.0)
    broken = hidden.masked_fill(target[:, None] < 0, value)
    assert broken.isfinite().any() and not broken.isfinite().all()
    leaves = [[x.requires_grad_() for x in (h, weight.clone(), bias.clone())] for h in (broken, zeros)]
    got, expected = (values_and_gradients(masked_cross_entropy, *x, target, backend=backend) for x in leaves)
    for ours, true in zip(got, expected, strict=True):
        assert ours.isfinite().all() and torch.equal(ours, true)
    assert not got[2][target < 0].any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_rows_that_do_not_count_reach_nothing(value, backend, device, small_chunks):
    rows_that_do_not_count_reach_nothing(value, backend, device)


def test_gradcheck(backend, small_chunks):
    """Against differences of the loss: float64, gradcheck's own tolerances."""
    hidden, weight, bias, target = inputs(7, 3, 11, dtype=torch.float64, ignored=0.3)
    torch.autograd.gradcheck(lambda *x: masked_cross_entropy(*x, target, backend)[0], (hidden, weight, bias))


@pytest.mark.parametrize("scale", [1.0, 1024.0, 65536.0])  # loss scales: GradScaler starts at 2^16
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_errors(dtype, scale, device):
    """At most twice the error of plain PyTorch at that dtype, against float64; both under the same loss scale."""
    M, C, V = 1024, 64, 8197
    hidden, weight, bias, target = (x.detach() for x in inputs(M, C, V, device, ignored=0.1))
    hidden, weight, bias = hidden.to(dtype), (0.1 * weight).to(dtype), bias * 0.0

    def run(function, dtype):
        leaves = [x.to(dtype).clone().requires_grad_() for x in (hidden, weight, bias)]
        loss = function(*leaves, target)
        return loss.double(), *(x.double() / scale for x in torch.autograd.grad(loss * scale, leaves))

    def plain(hidden, weight, bias, target):
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), target, ignore_index=-100)

    exact = run(lambda *x: masked_cross_entropy_reference(*x)[0], torch.float64)
    ours = run(lambda *x: masked_cross_entropy(*x)[0], dtype)
    usual = run(plain, dtype)
    assert all(x.isfinite().all() for x in ours)
    for mine, theirs, true in zip(ours, usual, exact, strict=True):
        # + one rounding of the value itself: where the usual error is smaller, it is luck
        assert (mine - true).norm() <= 2 * (theirs - true).norm() + torch.finfo(dtype).eps / 2 * true.norm()


def test_float16_sums_do_not_overflow(monkeypatch, device):
    """All rows want one class of few: its weight's gradient is a sum over rows, of which float16 holds 65504."""
    M, V = 40000, 4
    hidden = torch.full((M, 2), 8.0, dtype=torch.float16, device=device).requires_grad_()
    weight = torch.tensor([[1.0], [-1], [-1], [-1]], device=device).mul(-1).expand(V, 2).half().contiguous().requires_grad_()
    bias = torch.zeros(V, device=device).requires_grad_()
    target = torch.zeros(M, dtype=torch.int64, device=device)
    masked_cross_entropy(hidden, weight, bias, target)[0].backward()
    expected = -8.0 * torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3], device=device)[:, None].expand(V, 2)
    # softmax of (-16, 16, 16, 16) is (0, 1/3, 1/3, 1/3) to 1e-14; 1/3 in float16 is off by up to 2^-12 of it
    assert_close(weight.grad.float(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", [None, "reference", "chunked"])
def test_autocast(backend):
    """The product runs in autocast's dtype, the sums and results in float32, gradients in each input's dtype."""
    hidden, weight, bias, target = call = inputs(37, 16, 300, ignored=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        actual = values_and_gradients(masked_cross_entropy, *call, backend=backend)
    rounded = [x.detach().bfloat16().float().requires_grad_() for x in (hidden, weight)]
    for ours, true in zip(actual, values_and_gradients(masked_cross_entropy_reference, *rounded, bias, target), strict=True):
        assert ours.dtype == torch.float32
        # 2^-9 is bfloat16's rounding; logits of order 3, and up to 4 roundings of each
        assert_close(ours, true, rtol=4 * 2**-9, atol=4 * 2**-9 * true.abs().max().item())


def test_autocast_mixes_dtypes():
    hidden, weight, bias, target = inputs(5, 16, 30)
    with torch.autocast("cpu", torch.bfloat16):
        masked_cross_entropy(hidden.bfloat16(), weight, bias, target)[0].backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.float32, torch.float32)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an op returns, and all ops' names and arguments."""

    def __init__(self):
        super().__init__()
        self.elements, self.calls = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        self.calls.append((str(func), args))
        return out


def test_logits_in_memory(monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK_LOGITS", 4000)
    hidden, weight, bias, target = inputs(200, 8, 301)
    with Largest() as largest:
        MODULE._chunked(hidden.detach(), weight.detach(), bias.detach(), target, True)
    assert largest.elements <= 4000  # 13 rows of 301 logits; weight and its gradient have 2408
    with Largest() as reference:
        masked_cross_entropy_reference(hidden, weight, bias, target)
    assert reference.elements == 200 * 301  # the counter does see logits


def test_saves_gradients_not_logits(monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK_LOGITS", 4000)
    call, saved = inputs(200, 8, 301), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        masked_cross_entropy(*call)
    assert max(x.numel() for x in saved) <= 301 * 8


@pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_no_gradient_no_work(how):
    """Evaluation does not pay for the three gradients, whether by mode or because nothing requires one."""
    call = inputs(10, 5, 11)
    if how is torch.enable_grad:
        call = [x.detach() for x in call]
    with how(), Largest() as ops:
        loss, accuracy = masked_cross_entropy(*call)
    assert [arguments[-1] for name, arguments in ops.calls if name == "vimpac.masked_cross_entropy.chunked"] == [False]
    assert not loss.requires_grad
    assert_close((loss, accuracy), masked_cross_entropy_reference(*call), **FLOAT32)
    with Largest() as ops:
        masked_cross_entropy(*inputs(10, 5, 11))
    assert [arguments[-1] for name, arguments in ops.calls if "vimpac" in name] == [True]


def test_second_gradient_of_one_forward(backend, small_chunks):
    """What is saved is scaled, not overwritten: two losses' gradients from one forward, and an accumulated one."""
    hidden, weight, bias, target = inputs(10, 5, 11, ignored=0.3)
    loss, accuracy = masked_cross_entropy(hidden, weight, bias, target, backend)
    assert not accuracy.requires_grad
    once = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, (hidden, weight, bias))
    for a, b in zip(once, thrice, strict=True):
        assert_close(3 * a, b, rtol=1e-6, atol=0)  # one rounding of the factor, one of the product


def test_second_derivatives_are_refused(backend, small_chunks):
    hidden, weight, bias, target = inputs(10, 5, 11)
    value, _ = masked_cross_entropy(hidden, weight, bias, target, backend)
    for loss in (value.square(), value):
        (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
        for x in (hidden, weight, bias):
            with pytest.raises(RuntimeError, match="masked_cross_entropy: its kernels have no second derivative"):
                torch.autograd.grad(grad.square().sum() + x.square().sum(), x, retain_graph=True)


def test_inputs_do_not_outlive_the_forward_pass(backend, small_chunks):
    """The gradients are kept instead; a graph of them is tied to the inputs by parts without elements."""
    hidden, weight, bias, target = inputs(10, 5, 11)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        masked_cross_entropy(hidden, weight, bias, target, backend)
    storages = {x.untyped_storage().data_ptr() for x in saved if x.numel()}
    assert storages.isdisjoint(x.untyped_storage().data_ptr() for x in (hidden, weight, bias, target))


def test_frozen_weight(backend, small_chunks):
    hidden, weight, bias, target = inputs(10, 5, 11)
    weight, bias = weight.detach(), bias.detach()
    masked_cross_entropy(hidden, weight, bias, target, backend)[0].backward()
    (expected,) = torch.autograd.grad(masked_cross_entropy_reference(hidden, weight, bias, target)[0], hidden)
    assert_close(hidden.grad, expected, **FLOAT32)


@pytest.mark.parametrize("overload", ["chunked", "slot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("M", [0, 7])
@pytest.mark.parametrize("gradients", [True, False])
def test_opcheck(overload, dtype, M, gradients, small_chunks):
    call = inputs(M, 5, 11, dtype=dtype, ignored=0.3)
    arguments = (*(x.detach() for x in call), gradients)
    torch.library.opcheck(dispatch.overload("masked_cross_entropy", overload), arguments)


@needs_compiler
@pytest.mark.parametrize("backend", ["chunked", "slot", "reference"])
def test_compiles_whole(backend):
    compiled = torch.compile(lambda *x: masked_cross_entropy(*x, backend=backend), fullgraph=True, dynamic=True)
    for M in (5, 9):
        call = inputs(M, 6, 13, ignored=0.3)
        expected = values_and_gradients(masked_cross_entropy_reference, *call)
        for ours, true in zip(values_and_gradients(compiled, *call), expected, strict=True):
            assert_close(ours, true, **FLOAT32)


H, W, B, Y = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(5), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, shown",
    [
        ((H[0], W, B, Y), r"hidden must be \[M, C\] and weight \[V, C\], got shapes \(3,\) and \(5, 3\)"),
        ((H, W[:, :2], B, Y), r"got shapes \(4, 3\) and \(5, 2\)"),
        ((H, W[0], B, Y), r"got shapes \(4, 3\) and \(3,\)"),
        ((H, W[:0], B[:0], Y), r"at least one class, got shape \(0, 3\)"),
        ((H, W, B[:4], Y), r"bias must be \[V\] = \[5\], got shape \(4,\)"),
        ((H, W, B, Y[:3]), r"target must be int64 \[4\], got torch.int64 of shape \(3,\)"),
        ((H, W, B, Y.int()), r"target must be int64 \[4\], got torch.int32"),
        ((H.int(), W, B, Y), "must be floating, got torch.int32, torch.float32"),
        ((H, W.bfloat16(), B, Y), "share one dtype outside autocast, got torch.float32 and torch.bfloat16"),
        ((H, W, B, Y.to("meta")), r"one device, got \['cpu', 'cpu', 'cpu', 'meta'\]"),
        ((H, W, B, Y, "turbo"), "no backend 'turbo'; it has chunked, reference"),
    ],
)
def test_bad_calls_are_shown(call, shown):
    with pytest.raises(ValueError, match=shown):
        masked_cross_entropy(*call)
