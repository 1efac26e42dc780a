"""axial_attention: every backend against the docstring written as loops, dropout bits included; and a kernel's slot."""

import functools
import itertools
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from test_philox import philox_ints
from torch.testing import assert_close

from extension import CPU_ERROR, needs_compiler, needs_cpu
from vimpac.ops import axial_attention, axial_attention_packed, axial_attention_reference
from vimpac.ops import dispatch as backends

MODULE = sys.modules["vimpac.ops.axial_attention"]  # the package exports the function under the module's name
EXACT = {"rtol": 1e-11, "atol": 1e-12}  # float64, sums of some hundred terms of order 1
FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}  # sums of up to 1281 terms of order 1, a softmax between: some 100 roundings of 6e-8
SHORT = [("T",), ("H",), ("W",), ("H", "W"), ("T", "H", "W"), ("W", "T", "W", "T")]
PRODUCTS = [("HxW",), ("WxT",), ("TxHxW",), ("T", "HxW"), ("TxH", "W", "TxHxW")]


# --- the definition, line by line -------------------------------------------------------------------------------------


def lines_of(axis, grid):
    """Lists of (t, h, w), one a line, tokens in raster order."""
    letters = axis.split("x")
    rest = [range(size) if letter not in letters else [None] for letter, size in zip("THW", grid, strict=True)]
    for fixed in itertools.product(*rest):
        yield [at for at in itertools.product(*map(range, grid)) if all(f in (None, x) for f, x in zip(fixed, at, strict=True))]


@functools.lru_cache(1 << 16)
def words_of(row, call, is_cls, seed):
    return philox_ints((row % 2**32, row >> 32, call, is_cls), seed, 7)


def kept(r, n, N, k, keys, is_cls, seed, p):
    """Whether dropout keeps key k of `keys` of head n's row of query token r, by the docstring."""
    call, word = (0, k // 2) if keys <= 8 else (4 * (k // 32) + (k % 8) // 2, k % 32 // 8)
    bits = words_of(r * N + n, call, is_cls, seed)[word] >> 16 * (k % 2) & 0xFFFF
    return bits >= round(p * 2**16)


def by_lines(qkv, cls_qkv, axes, pad=None, dropout_p=0.0, seed=None, cls_in_context=True):
    """Eq. 9, 11-13 and 15 one query at a time, in qkv's own dtype."""
    B, T, H, W, _, N, D = qkv.shape
    out, cls_outs = torch.zeros(B, T, H, W, N, D, dtype=qkv.dtype), torch.zeros(B, N, D, dtype=qkv.dtype)
    rows, cls_rows = {}, {}
    for b, n in itertools.product(range(B), range(N)):
        for line in lines_of(axes[n * len(axes) // N], (T, H, W)):
            tokens = torch.stack([qkv[b, t, h, w, :, n] for t, h, w in line])  # [L, 3, D]
            context = torch.cat([tokens, cls_qkv[None, b, :, n]]) if cls_in_context else tokens
            keys = [k for k in range(len(context)) if k == len(line) or pad is None or not pad[(b, *line[k])]]
            for i, query in enumerate([*tokens[:, 0], cls_qkv[b, 0, n]]):
                is_cls = i == len(line)
                t, h, w = line[0 if is_cls else i]
                result = torch.zeros(D, dtype=qkv.dtype) + 0 * query
                if keys:
                    probs = (context[keys, 1] @ query / math.sqrt(D)).softmax(0)
                    if dropout_p > 0:
                        r = ((b * T + t) * H + h) * W + w
                        keep = [kept(r, n, N, k, len(context), int(is_cls), seed, dropout_p) for k in keys]
                        probs = probs * torch.tensor(keep) * (2**16 / (2**16 - round(dropout_p * 2**16)))
                    result = probs.to(qkv.dtype) @ context[keys, 2]
                if is_cls:
                    cls_rows.setdefault((b, n), []).append(result)
                else:
                    rows[b, t, h, w, n] = result
    out = torch.stack([rows[at] for at in itertools.product(*map(range, (B, T, H, W, N)))]).view(B, T, H, W, N, D)
    cls_outs = torch.stack([torch.stack(cls_rows[at]).mean(0) for at in itertools.product(range(B), range(N))])
    return out, cls_outs.view(B, N, D)


# --- inputs -----------------------------------------------------------------------------------------------------------


def inputs(B, grid, N, D, device="cpu", dtype=torch.float32, seed=0):
    """qkv and cls_qkv with permuted strides and a contiguous last dimension."""
    generator = torch.Generator().manual_seed(seed)
    T, H, W = grid
    qkv = torch.randn(B, N, W, 3, T, H, 2 * D, generator=generator).to(device, dtype).permute(0, 4, 5, 2, 3, 1, 6)[..., :D]
    cls_qkv = torch.randn(N, 3, B, D, generator=generator).to(device, dtype).permute(2, 1, 0, 3)
    assert (B * T * H * W * N == 0 or qkv.stride(-1) == 1) and qkv.shape == (B, T, H, W, 3, N, D)
    return qkv.requires_grad_(), cls_qkv.requires_grad_()


def padding(B, grid, device="cpu"):
    """PAD on the last frame, on one whole line of each axis where the grid has several, and at random."""
    generator = torch.Generator().manual_seed(7)
    pad = torch.rand(B, *reversed(grid), generator=generator).permute(0, 3, 2, 1) < 0.2
    pad[:, -1] |= torch.rand(grid[1:], generator=generator) < 0.7
    pad[0, 0, 0], pad[0, 0, :, 0], pad[0, :, -1, -1] = True, True, True
    return pad.to(device)


def upstream(outputs):
    """Gradients with strides of their own, different everywhere, exact in every dtype."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(-128, 129, (*reversed(y.shape),), generator=generator)
        .div(128)
        .to(y.device, y.dtype)
        .permute(*reversed(range(y.ndim)))
        for y in outputs
    ]


def values_and_gradients(function, qkv, cls_qkv, *options, **named):
    outputs = function(qkv, cls_qkv, *options, **named)
    return *outputs, *torch.autograd.grad(outputs, (qkv, cls_qkv), upstream(outputs))


def nothing_leaves_padding(run, qkv, cls_qkv, pad, value, dropout=(0.0, None), apart=True):
    """What is not finite at PAD gives what zeros there give, in every output and every gradient but the broken queries' own,
    which is zero: in q, k and v at once, and with `apart` in each alone.

    run(qkv, cls_qkv, pad, dropout_p, seed, cls_in_context) → outputs and gradients, tokens' first.
    """
    zeros = qkv.detach().masked_fill(pad[..., None, None, None], 0.0)
    broken = zeros.clone()
    broken[..., 0][pad] = value  # of each row in q, k and v
    parts = [zeros.clone() for _ in range(3 * apart)]
    for part, x in enumerate(parts):
        x[..., part, :, 0][pad] = value
    for context in (True, False):
        expected = run(zeros, cls_qkv, pad, *dropout, context)
        for x in (broken, *parts):
            got = run(x, cls_qkv, pad, *dropout, context)
            of_queries = got[2][..., 0, :, :][pad]
            assert not of_queries.any() if x is broken else of_queries.isfinite().all()
            for ours, true in zip(got, expected, strict=True):
                assert ours.isfinite().all()
                ours, true = (y[~pad] if y.shape[:4] == pad.shape and y.ndim == 7 else y for y in (ours, true))
                assert torch.equal(ours, true)


def packed(qkv, cls_qkv, *options, **named):
    """The packed function under the other one's signature."""
    B, *grid = qkv.shape[:4]
    rows = axial_attention_packed(torch.cat([qkv.flatten(0, 3), cls_qkv]), grid, *options, **named)
    return rows[: B * math.prod(grid)].view(*qkv.shape[:4], *rows.shape[1:]), rows[B * math.prod(grid) :]


def doubles(*tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def assert_all_close(actual, expected, **tolerance):
    for ours, true in zip(actual, expected, strict=True):
        assert_close(ours, true.to(ours.dtype), **tolerance)


# --- a kernel's slot --------------------------------------------------------------------------------------------------


def slot_forward(qkv, *call):
    return MODULE.pack(*axial_attention_reference(qkv, *call))


def slot_backward(grad, qkv, cls_qkv, *call):
    assert grad.is_contiguous()
    device = grad.device
    # On the CPU, whose graphs the calling thread runs: a CUDA device's are run by one thread, which waits for this here.
    grad, qkv, cls_qkv, *call = (x.cpu() if isinstance(x, torch.Tensor) else x for x in (grad, qkv, cls_qkv, *call))

    def recompute():
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (qkv, cls_qkv)]
            return MODULE.pack(*torch.autograd.grad(slot_forward(*leaves, *call), leaves, grad))

    with ThreadPoolExecutor(1) as pool:  # inside an op autograd may be off: another thread's is not
        return pool.submit(recompute).result().to(device)


@pytest.fixture(scope="module", autouse=True)
def slot():
    """A backend "slot" behind its own overloads, as a kernel would come: the definition, differentiated by recomputation."""
    for (name, (schema, fake)), function in zip(MODULE.SCHEMAS.items(), (slot_forward, slot_backward), strict=True):
        backends.define_overload(name, "slot", schema, fake)
        backends.implement(name, "slot", "CompositeExplicitAutograd", function)
    backends.register(
        "axial_attention", "slot", lambda qkv, *_: ["float16 is too narrow"] if qkv.dtype == torch.float16 else []
    )
    yield
    del backends._REGISTRY["axial_attention"]["slot"]


@pytest.fixture(params=["reference", "sdpa", "slot", pytest.param("cpu", marks=needs_cpu)])
def backend(request):
    return request.param


def skip_beyond(backend, axes, longest=0, device="cpu"):
    """The C++ kernels take lines of 64 tokens, no products, and a CPU."""
    if backend == "cpu" and (any("x" in axis for axis in axes) or longest > 64 or torch.device(device).type != "cpu"):
        pytest.skip("the cpu backend takes lines of at most 64 tokens, on a CPU")


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
    """What stands at a PAD position reaches no other output, and the position itself still gets one."""
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
    assert_close(out, MODULE.pack(*apart), rtol=0, atol=0)
    assert_close(actual, MODULE.pack(*expected), rtol=1e-6, atol=1e-6)  # sums of another order in [CLS]'s gradient


@pytest.mark.parametrize("function", [axial_attention, packed])
def test_saves_inputs_only(function):
    """No probabilities and no outputs: backward recomputes them."""
    qkv, cls_qkv = inputs(2, (3, 4, 5), 2, 8)
    pad, seed, saved = padding(2, (3, 4, 5)), torch.tensor(3), []
    rows = MODULE.pack(qkv, cls_qkv)
    qkv, cls_qkv = MODULE.unpack(rows, (2, 3, 4, 5))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        if function is axial_attention:
            axial_attention(qkv, cls_qkv, ("H", "W"), pad, 0.1, seed, backend="slot")
        else:
            axial_attention_packed(rows, (3, 4, 5), ("H", "W"), pad, 0.1, seed, backend="slot")
    inputs_kept = {x.untyped_storage().data_ptr() for x in (rows, pad, seed)}
    assert {x.untyped_storage().data_ptr() for x in saved} == inputs_kept


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("axis, keys", [("T", 6), ("W", 17), ("TxH", 41), ("H", 8)])
def test_dropout_rate(axis, keys, p, device):
    """Shares of dropped tokens' and [CLS]'s elements within 4 standard deviations (1 seed in 16,000) of the threshold's."""
    shape, seed = (8, 5, 8, 16, 3, 4, 1), torch.tensor(2021, device=device)
    dropped = (~MODULE.dropout_keep(seed, p, shape, slice(0, 4), axis, keys)).double()
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
    assert MODULE.dropout_threshold(p) == threshold and MODULE.dropout_scale(p) == 2**16 / (2**16 - threshold)
    out, cls_out = axial_attention(*inputs(2, (2, 3, 4), 2, 4), ("T", "H"), None, p, 1, backend="reference")
    assert out.isfinite().all() and cls_out.isfinite().all()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["reference", "sdpa", "cpu", "triton", "cuda"])
def test_reasons_break_no_graph(name, dynamic):
    """The choice of a backend is traced, with whatever it asks of tensors, views of larger ones included."""

    def call(qkv, cls_qkv):
        return qkv + len(backends.why_not("axial_attention", name, qkv, cls_qkv, ("T",), None, 0.1, None, True))

    torch._dynamo.reset()  # every case is the same code to it, recompiled
    tensors = torch.randn(9, 1, 2, 2, 3, 2, 32)[1:], torch.randn(9, 3, 2, 32)[1:]
    traced = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="eager")
    assert torch.equal(traced(*tensors), call(*tensors))


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
    monkeypatch.setitem(backends._REGISTRY, "axial_attention", {"reference": backends.always, "sdpa": backends.always})
    for name in ("reference", "sdpa"):
        monkeypatch.setattr(MODULE, f"axial_attention_{name}", lambda *_, name=name: (_ for _ in ()).throw(LookupError(name)))
    qkv, cls_qkv = inputs(1, grid, 2, 1)
    with pytest.raises(LookupError, match=chosen):
        axial_attention(qkv, cls_qkv, axes)
    with pytest.raises(LookupError, match=chosen):
        axial_attention_packed(MODULE.pack(qkv, cls_qkv), grid, axes)
    with pytest.raises(LookupError, match="reference"):
        axial_attention(qkv, cls_qkv, axes, backend="reference")


def test_kernels_come_first_where_they_can_run(monkeypatch):
    monkeypatch.delenv("VIMPAC_BACKEND", raising=False)
    asked = []
    for name in ("triton", "cpu"):
        monkeypatch.setitem(backends._REGISTRY["axial_attention"], name, lambda *call: asked.append(call) or ["no GPU"])
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
    """A kernel's gradient has none: said aloud, not left out of a sum, where the upstream gradient is a constant, too."""
    rows = torch.randn(2 * 7, 3, 2, 4, requires_grad=True)
    if packed:
        out = axial_attention_packed(rows, (2, 1, 3), ("T", "W"), backend="slot")
    else:
        out = axial_attention(*MODULE.unpack(rows, (2, 2, 1, 3)), ("T", "W"), backend="slot")[0]
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
    torch.library.opcheck(backends.overload("axial_attention", overload), call)
    grad = torch.randn(2 * 6 + 2, 2, 4, dtype=dtype)
    torch.library.opcheck(backends.overload("axial_attention_backward", overload), (grad, *call))


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
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\), got 2"):
        axial_attention_packed(torch.zeros(122, 3, 6, 8), (3, 4, 5), ("T",), None, 2)
