"""What the tests of axial_attention share: the docstring written as loops, inputs, and a backend for a kernel to come."""

import functools
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from test_philox import philox_ints
from torch.testing import assert_close

from vimpac.ops import axial_attention_packed, axial_attention_reference, dispatch
from vimpac.ops.axial_attention import SCHEMAS
from vimpac.ops.lines import pack, unpack

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
    B, T, H, W = qkv.shape[:4]
    rows = axial_attention_packed(torch.cat([qkv.flatten(0, 3), cls_qkv]), (T, H, W), *options, **named)
    return unpack(rows, (B, T, H, W))


def doubles(*tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def assert_all_close(actual, expected, **tolerance):
    for ours, true in zip(actual, expected, strict=True):
        assert_close(ours, true.to(ours.dtype), **tolerance)


# --- a kernel's slot --------------------------------------------------------------------------------------------------


def slot_forward(qkv, *call):
    return pack(*axial_attention_reference(qkv, *call))


def slot_backward(grad, qkv, cls_qkv, *call):
    assert grad.is_contiguous()
    device = grad.device
    # On the CPU, whose graphs the calling thread runs: a CUDA device's are run by one thread, which waits for this here.
    grad, qkv, cls_qkv, *call = (x.cpu() if isinstance(x, torch.Tensor) else x for x in (grad, qkv, cls_qkv, *call))

    def recompute():
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (qkv, cls_qkv)]
            packed = pack(*torch.autograd.grad(slot_forward(*leaves, *call), leaves, grad))
            return packed, packed.sum(0, dtype=torch.promote_types(packed.dtype, torch.float32))

    with ThreadPoolExecutor(1) as pool:  # inside an op autograd may be off: another thread's is not
        return tuple(x.to(device) for x in pool.submit(recompute).result())


for (_name, (_schema, _fake)), _function in zip(SCHEMAS.items(), (slot_forward, slot_backward), strict=True):
    dispatch.define_overload(_name, "slot", _schema, _fake)
    dispatch.implement(_name, "slot", "CompositeExplicitAutograd", _function)


@contextmanager
def slot_backend():
    """A backend "slot" behind its own overloads, as a kernel would come: the definition, differentiated by recomputation."""
    dispatch.register(
        "axial_attention", "slot", lambda call: ["float16 is too narrow"] if call.qkv.dtype == torch.float16 else []
    )
    yield
    del dispatch._REGISTRY["axial_attention"]["slot"]


def skip_beyond(backend, axes, longest=0, device="cpu"):
    """The C++ kernels take lines of 64 tokens, no products, and a CPU."""
    if backend == "cpu" and (any("x" in axis for axis in axes) or longest > 64 or torch.device(device).type != "cpu"):
        pytest.skip("the cpu backend takes lines of at most 64 tokens, on a CPU")
