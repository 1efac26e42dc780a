"""dropout_add: every backend against the docstring in Python integers, the statistics of its masks, and its promises."""

import itertools
import math
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_philox import philox_ints
from torch.testing import assert_close

from extension import needs_compiler, needs_cpu
from vimpac.dropout_rate import dropout_scale, dropout_threshold
from vimpac.ops import dispatch, dropout, dropout_add, dropout_add_reference, libraries
from vimpac.ops.philox import seed_tensor

MODULE = sys.modules["vimpac.ops.dropout_add"]  # the package exports the function under the module's name
SEEDS = [0, -1, 1234567890123456789]
SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu)]
EVERY = [*BACKENDS, "torch"]


def inputs(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(2)]


def upstream(out):
    """A gradient of its own for every element, with permuted strides."""
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(out.shape[::-1], generator=generator).to(out.device, out.dtype)
    return grad.permute(tuple(reversed(range(out.ndim))))


def value_and_gradients(function, x, y, *options, **named):
    out = function(x, y, *options, **named)
    return out, *torch.autograd.grad(out, (x, y), upstream(out))


def kept(i, p, seed):
    """Whether dropout keeps element i, by the docstring."""
    c = 16 * (i // 64) + i % 16
    words = philox_ints((c % 2**32, c >> 32, 0, 2), seed, 7)
    return words[i % 64 // 16] >= round(p * 2**32)


# --- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("elements", [0, 1, 3, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_docstring(backend, elements, seed):
    p = 0.3
    x, y = inputs(elements, dtype=torch.float64)
    out, grad_x, grad_y = value_and_gradients(dropout_add, x, y, p, seed, backend)
    scale = 1 / (1 - round(p * 2**32) / 2**32)
    factor = torch.tensor([kept(i, p, seed) * scale for i in range(elements)], dtype=torch.float64)
    assert elements < 63 or 0 < factor.count_nonzero() < elements
    assert_close(out, x + factor * y, rtol=0, atol=1e-14)  # float64, a product and a sum of order 1
    assert_close(grad_y, factor * upstream(out), rtol=1e-15, atol=0)
    assert torch.equal(grad_x, upstream(out))


def test_the_reference_on_every_device(device):
    x, y = inputs(5, 7, 11, dtype=torch.float64, device=device)
    here = value_and_gradients(dropout_add, x, y, 0.3, 5, "reference")
    x, y = inputs(5, 7, 11, dtype=torch.float64)
    for mine, theirs in zip(here, value_and_gradients(dropout_add, x, y, 0.3, 5, "reference"), strict=True):
        assert torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_reference_rounds_once(dtype):
    x, y = inputs(1000, dtype=dtype)
    out = dropout_add(x, y, 0.3, 1, "reference")
    exact = dropout_add(x.double(), y.double(), 0.3, 1, "reference")
    assert out.dtype == dtype and (out == exact.to(dtype)).double().mean() > 0.99  # a sum in float32 may round to a tie


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("backend", EVERY)
def test_keep_rate(backend, p):
    """Within 5 standard errors; so are neighbours of which both are kept, at every distance of lanes, words and groups."""
    torch.manual_seed(0)
    n = 640_000
    out = dropout_add(torch.zeros(n), torch.ones(n), p, 7, backend)
    keep = out != 0
    assert abs(keep.double().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    assert_close(out[keep], torch.full((int(keep.sum()),), 1 / (1 - p)), rtol=1e-6, atol=0)
    both = (1 - p) ** 2
    for distance in (1, 4, 8, 16, 32, 64, 4096):
        pairs = (keep[:-distance] & keep[distance:]).double().mean()
        assert abs(pairs - both) < 5 * math.sqrt(3 * both * (1 - both) / n)  # pairs overlap: at most thrice the variance


@pytest.mark.parametrize("backend", BACKENDS)
def test_seeds_are_independent(backend):
    """Of any two masks as many elements agree as chance has it, and the same seed gives the same mask."""
    n, p = 100_000, 0.5
    seeds = [0, 1, 2, 2**32, -1, 2**62]
    masks = [dropout_add(torch.zeros(n), torch.ones(n), p, seed, backend) != 0 for seed in seeds]
    for i, (seed, mask) in enumerate(zip(seeds, masks, strict=True)):
        again = dropout_add(torch.zeros(n), torch.ones(n), p, torch.tensor(seed), backend) != 0
        assert torch.equal(mask, again)
        assert all(abs((mask == other).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(n) for other in masks[:i])


@pytest.mark.parametrize("p, threshold", [(1e-11, 0), (2**-32, 1), (0.1, 429496730), (0.5, 2**31), (1 - 1e-12, 2**32 - 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_threshold(backend, p, threshold):
    assert dropout_threshold(p, 32) == threshold and dropout_scale(p, 32) == 2**32 / (2**32 - threshold)
    x, y = inputs(1000)
    out = dropout_add(x, y, p, 1, backend)
    assert out.isfinite().all()
    if p < 2**-31 or p > 0.9:
        assert_close(out, x + y if p < 0.5 else x, rtol=1e-6, atol=1e-6)  # all of 1000, or none


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rate_to_its_last_bit(backend):
    """An element is kept at the rate that its own word is, and dropped at the next one."""
    for i, (counter, word) in {0: (0, 0), 17: (1, 1), 95: (31, 1), 112: (16, 3)}.items():
        value = philox_ints((counter, 0, 0, 2), 5, 7)[word]
        at = [dropout_add(torch.zeros(130), torch.ones(130), p / 2**32, 5, backend)[i] for p in (value, value + 1)]
        assert at[0] > 0 and at[1] == 0


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("backend", [None, *EVERY])
def test_without_dropout_it_is_the_sum(backend, seed):
    x, y = inputs(3, 5)
    assert torch.equal(dropout_add(x, y, 0.0, seed, backend), x + y)


def test_torch_draws_from_its_generator():
    x, y = inputs(100)
    torch.manual_seed(0)
    first, second = (dropout_add(x, y, 0.5, 1, "torch") for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(first, x + F.dropout(y, 0.5)) and not torch.equal(first, second)


# --- promises ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend):
    """Elements are numbered in raster order whatever their strides are, and inputs stay as they were."""
    x, y = (z.detach() for z in inputs(6, 5, 7))
    expected = value_and_gradients(dropout_add, x.requires_grad_(), y.requires_grad_(), 0.4, 9, backend)
    permuted = y.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0)
    spread = torch.full((6, 10, 8), math.nan)[:, 1::2, :7].copy_(y.detach())
    offset = torch.full((6 * 5 * 7 + 3,), math.nan)[3:].view(6, 5, 7).copy_(y.detach())
    for same in (permuted, spread, offset):
        before = same.clone()
        assert all(map(torch.equal, value_and_gradients(dropout_add, x, same.requires_grad_(), 0.4, 9, backend), expected))
        ours = dropout_add(same.detach(), same.detach(), 0.4, 9, backend)
        assert torch.equal(ours, dropout_add(y, y, 0.4, 9, backend)) and torch.equal(same, before)
    one = y[:1].detach().expand(6, -1, -1)  # the same memory, other elements
    assert torch.equal(dropout_add(x, one, 0.4, 9, backend), dropout_add(x, one.contiguous(), 0.4, 9, backend))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 5), (1,)])
@pytest.mark.parametrize("backend", EVERY)
def test_empty_and_single(backend, shape):
    results = value_and_gradients(dropout_add, *inputs(*shape), 0.5, 1, backend)
    assert [x.shape for x in results] == [torch.Size(shape)] * 3


@pytest.mark.parametrize(
    "dtypes, backend",
    [
        *itertools.product([(SINGLE, BRAIN), (BRAIN, SINGLE), (HALF, HALF)], [None, "reference", "torch"]),
        pytest.param((SINGLE, BRAIN), "cpu", marks=needs_cpu),
    ],
)
def test_two_dtypes(dtypes, backend):
    """As a sum has them; each gradient in its input's dtype."""
    (x, _), (_, y) = (inputs(1000, dtype=dtype) for dtype in dtypes)
    out, grad_x, grad_y = value_and_gradients(dropout_add, x, y, 0.5, 1, backend)
    assert out.dtype == (x + y).dtype and (grad_x.dtype, grad_y.dtype) == dtypes
    keep = grad_y != 0
    assert 400 < keep.sum() < 600
    assert_close(out, x + 2 * keep * y, rtol=1e-3, atol=1e-3)  # float16 rounds to 5e-4
    if backend in ("reference", "cpu"):
        assert torch.equal(keep, MODULE.dropout_keep((1000,), 0.5, torch.tensor(1)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    call = inputs(3, 43, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x, y: dropout_add(x, y, 0.3, 5, backend), call)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_input_without_a_gradient(backend):
    x, y = inputs(100)
    expected = value_and_gradients(dropout_add, x, y, 0.3, 5, backend)
    for i, call in enumerate([(x, y.detach()), (x.detach(), y)]):
        out = dropout_add(*call, 0.3, 5, backend)
        assert torch.equal(torch.autograd.grad(out, call[i], upstream(out))[0], expected[1 + i])
    assert not dropout_add(x.detach(), y.detach(), 0.3, 5, backend).requires_grad


@needs_cpu
def test_the_mask_is_not_saved():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        dropout_add(*inputs(1000), 0.3, torch.tensor(5), "cpu")
    assert [x.numel() for x in saved] == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", EVERY)
def test_dropout_alone_is_the_sum_with_zeros(backend, dtype):
    """Values and gradient of a transposed y."""
    y = inputs(7, 130, dtype=dtype)[1].detach().t().requires_grad_()
    found = []
    for call in (partial(dropout, y), partial(dropout_add, torch.zeros_like(y), y)):
        torch.manual_seed(0)  # of torch's own
        out = call(0.3, 5, backend)
        found.append((out, torch.autograd.grad(out, y, upstream(out))[0]))
    for got, expected in zip(*found, strict=True):
        assert got.dtype == dtype and 0 < (got == 0).float().mean() < 0.5
        assert torch.equal(got, expected)
    assert dropout(y, 0.0) is y
    with pytest.raises(ValueError, match=r"p=0\.3 needs a seed"):
        dropout(y, 0.3)


@needs_cpu
@pytest.mark.parametrize("dtype, error", [(SINGLE, 1e-5), (BRAIN, 2**-6)])  # a dozen roundings of products; of y's gradients
def test_higher_derivatives(dtype, error):
    """The op is linear: its gradient's gradient is the op once more."""
    x, y = inputs(10)[0], inputs(10, dtype=dtype)[1]
    found = []
    for backend in ("cpu", "reference"):
        out = dropout_add(x, y, 0.3, 5, backend)
        (grad,) = torch.autograd.grad(out.pow(4).sum(), y, create_graph=True)
        (second,) = torch.autograd.grad(grad.pow(2).sum(), y, create_graph=True)
        found.append((grad, second, torch.autograd.grad(second.sum(), y)[0]))
    for got, expected in zip(*found, strict=True):
        largest = float(expected.abs().max())
        assert largest > 0
        assert_close(got, expected, rtol=error, atol=error * largest)


@pytest.mark.parametrize("backend", EVERY)
def test_autocast_rounds_nothing(backend):
    x, y = inputs(5, 7)
    torch.manual_seed(0)
    expected = dropout_add(x, y, 0.3, 5, backend)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dropout_add(x, y, 0.3, 5, backend), expected)
        assert dropout_add(x.bfloat16(), y.bfloat16(), 0.3, 5, backend).dtype == torch.bfloat16


@needs_cpu
@pytest.mark.parametrize("dtypes", [(SINGLE, SINGLE), (torch.float64,) * 2, (BRAIN, BRAIN), (SINGLE, BRAIN)])
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 13, 3)])
def test_opcheck(shape, dtypes):
    x, y = (z.detach().to(dtype) for z, dtype in zip(inputs(*shape), dtypes, strict=True))
    torch.library.opcheck(dispatch.overload("dropout_add", "cpu"), (x, y, 0.3, torch.tensor(7)))
    torch.library.opcheck(dispatch.overload("dropout_add_backward", "cpu"), (x, 0.3, torch.tensor(7), y.dtype))


@pytest.mark.parametrize(
    "backend, compiler",
    [
        pytest.param("reference", "inductor", marks=needs_compiler),
        pytest.param("cpu", "inductor", marks=[needs_compiler, needs_cpu]),
        pytest.param("cpu", "aot_eager", marks=needs_cpu),
        ("reference", "aot_eager"),
    ],
)
def test_traces_whole_with_any_size(backend, compiler):
    """Forward and backward, mask included; another size or seed does not trace again."""
    torch.compiler.reset()

    def run(x, y, seed):
        return dropout_add(x, y, 0.3, seed, backend)

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    for rows, seed in ((50, 5), (70, -(2**62))):
        with torch.compiler.set_stance("default" if rows == 50 else "fail_on_recompile"):
            x, y = (z.detach().T.requires_grad_() for z in inputs(3, rows))
            for z in (x, y):
                torch._dynamo.mark_dynamic(z, 0)
            call = x, y, torch.tensor(seed)
            for a, b in zip(value_and_gradients(compiled, *call), value_and_gradients(run, *call), strict=True):
                assert_close(a, b, rtol=1e-6, atol=1e-6)  # compiled code may multiply and add in one rounding


def test_torch_traces_whole():
    compiled = torch.compile(lambda x, y, seed: dropout_add(x, y, 0.5, seed, "torch"), fullgraph=True, backend="aot_eager")
    x, y = inputs(10_000)
    out, grad_x, grad_y = value_and_gradients(compiled, x, y, torch.tensor(1))
    keep = grad_y != 0
    assert 4500 < keep.sum() < 5500
    assert_close(out, x + 2 * keep * y)
    assert torch.equal(grad_x, upstream(out)) and torch.equal(grad_y, 2 * keep * upstream(out))


# --- dispatch and bad calls -------------------------------------------------------------------------------------------


def test_choice(monkeypatch):
    """The kernels where they can run, which draw the reference's mask; torch's own ops for what neither takes."""
    monkeypatch.delenv("VIMPAC_BACKEND", raising=False)

    def chosen(x, y, device="cpu"):
        order = dispatch.order(MODULE.BACKENDS, torch.device(device))
        return dispatch.choose("dropout_add", None, order, x, y, 0.1, seed_tensor(1, x.device))

    x, y = inputs(4)
    assert MODULE.BACKENDS["cuda"][0] == "triton" and chosen(x, y, "cuda") == "torch"  # these lie on a CPU
    assert chosen(x.bfloat16(), y) == chosen(x.half(), y.half()) == "torch"
    assert chosen(x, y) == chosen(x, y.bfloat16()) == ("torch" if libraries.library_error("cpu") else "cpu")


@needs_cpu
def test_says_why_it_cannot_run():
    x, y = inputs(4)
    with pytest.raises(ValueError, match=r"'cpu' cannot run .*: x of torch.bfloat16 and y of torch.float32, it takes one"):
        dropout_add(x.bfloat16(), y, 0.1, 1, "cpu")
    with pytest.raises(ValueError, match=r"torch.float16, it takes float32, float64, bfloat16"):
        dropout_add(x.half(), y.half(), 0.1, 1, "cpu")
    with pytest.raises(ValueError, match="tensors are on meta, it needs the CPU"):
        dropout_add(x.to("meta"), y.to("meta"), 0.1, 1, "cpu")


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "call, shown",
    [
        ((X, X[:1], 0.1, 1), r"x and y must have one shape, got \(2, 3\) and \(1, 3\)"),
        ((X, X.T, 0.0), r"got \(2, 3\) and \(3, 2\)"),
        ((X, X.int(), 0.1, 1), "x and y must be floating, got torch.float32 and torch.int32"),
        ((X.to(torch.complex64), X, 0.1, 1), "must be floating, got torch.complex64"),
        ((X, X.to("meta"), 0.1, 1), "x and y must be on one device, got cpu and meta"),
        ((X, X, -0.1, 1), r"p must be in \[0, 1\), got -0.1"),
        ((X, X, 1.0, 1), "got 1.0"),
        ((X, X, math.nan, 1), "got nan"),
        ((X, X, 0.1), "p=0.1 needs a seed"),
        ((X, X, 0.1, None, "torch"), "p=0.1 needs a seed"),
        ((X, X, 0.1, 1.5), "seed must be .*, got 1.5"),
        ((X, X, 0.1, torch.tensor([1])), r"seed must be .* of shape \(1,\)"),
        ((X, X, 0.1, 1, "turbo"), "no backend 'turbo'; it has cpu, reference, torch, triton"),
    ],
)
def test_bad_calls_are_shown(call, shown):
    with pytest.raises(ValueError, match=shown):
        dropout_add(*call)


def test_the_reference_is_a_function_of_its_own():
    x, y = inputs(70)
    assert torch.equal(dropout_add_reference(x, y, 0.3, torch.tensor(2)), dropout_add(x, y, 0.3, 2, "reference"))
