"""The Triton kernels of axial_attention: on a GPU, in the interpreter, and compiled for three architectures."""

import re
from types import SimpleNamespace

import pytest
import torch
from attention_calls import nothing_leaves_padding

from kernel_checks import (
    DEVICE,
    NATIVE,
    EagerBytes,
    count_kernel_bytes,
    not_interpreted,
    poison_new_tensors,
    run_in_interpreter,
    runs_in_interpreter,
    runs_kernels,
)
from vimpac.ops import axial_attention, axial_attention_packed, axial_attention_reference, dispatch
from vimpac.ops.philox import philox, split_words

pytest.importorskip("triton", reason="triton is not installed")

CASES = [  # grid, axes, heads, head width, cls_in_context, dropout
    ((1, 1, 1), ("T",), 1, 16, True, 0.0),
    ((5, 2, 4), ("T",), 2, 16, True, 0.6),  # 3 lines a block
    ((2, 4, 3), ("T", "H", "W"), 3, 16, True, 0.4),  # 8, 4 and 5 lines a block
    ((1, 16, 2), ("H",), 1, 64, True, 0.1),  # the model's own: 17 keys
    ((1, 2, 16), ("W",), 1, 64, True, 0.1),
    ((7, 1, 9), ("T", "W"), 2, 20, False, 0.4),  # 7 and 9 keys, head width padded to 32
    ((10, 3, 2), ("T",), 1, 32, True, 0.1),
    ((2, 32, 2), ("H", "T"), 2, 32, True, 0.3),  # [CLS] is key 32: a call of its own
    ((1, 33, 2), ("W", "H"), 2, 16, True, 0.2),
    ((2, 64, 3), ("H",), 1, 64, False, 0.2),
    ((2, 32, 3), ("H",), 1, 128, False, 0.2),
    ((1, 64, 2), ("H",), 1, 16, True, 0.2),
    ((2, 7, 2), ("H",), 1, 16, True, 0.3),  # 8 keys, with [CLS] and without
    ((2, 8, 2), ("H",), 1, 16, False, 0.3),
    ((1, 8, 8), ("H", "W"), 4, 16, True, 0.3),  # one code for both axes, 9 keys, two heads each
    ((4, 4, 4), ("T", "H", "W"), 3, 16, True, 0.3),  # one for all
    ((5, 3, 3), ("W", "T", "H"), 3, 16, True, 0.2),  # one for the first and the last
    ((3, 2, 3), ("T", "W"), 2, 16, True, 0.3),  # equally long, numbered differently: two
]


def test_in_the_interpreter():
    run_in_interpreter(__file__)


def inputs(grid, heads, width, dtype, clips=2):
    """Permuted strides, as views of a larger tensor whose other entries are NaN."""
    g = torch.Generator().manual_seed(3)
    T, H, W = grid
    whole = torch.full((heads, clips, 3, T, H, W, width + 2), float("nan"))
    whole[..., :width] = torch.randn(whole[..., :width].shape, generator=g)
    qkv = whole.to(dtype)[..., :width].permute(1, 3, 4, 5, 2, 0, 6)
    cls = torch.full((clips, heads, 3, width + 2), float("nan"))
    cls[..., :width] = torch.randn(cls[..., :width].shape, generator=g)
    cls = cls.to(dtype)[..., :width].transpose(1, 2)
    pad = torch.rand(clips, W, T, H, generator=g).permute(0, 2, 3, 1) < 0.3
    pad[0, :, 0] = True  # lines without any token
    return qkv.to(DEVICE), cls.to(DEVICE), pad.to(DEVICE)


def run(function, qkv, cls, *arguments, **options):
    """Outputs and gradients for a strided upstream gradient."""
    g = torch.Generator().manual_seed(4)
    leaves = [x.detach().requires_grad_() for x in (qkv, cls)]
    out = function(*leaves, *arguments, **options)
    upstream = [torch.randn(x.shape, generator=g).to(x).transpose(0, -1).contiguous().transpose(0, -1) for x in out]
    return [*out, *torch.autograd.grad(out, leaves, upstream)]


@runs_kernels
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grid, axes, heads, width, context, p", CASES)
def test_float32_is_the_reference(grid, axes, heads, width, context, p, padded, monkeypatch):
    """Values, gradients, [CLS], PAD and dropout, element by element; outputs start as NaN. One program a clip, or several."""
    from vimpac.kernels import axial_attention as kernels

    poison_new_tensors(monkeypatch)
    monkeypatch.setattr(kernels, "BLOCKS", 1 if padded else 16)
    kernels.constants.cache_clear()
    qkv, cls, pad = inputs(grid, heads, width, torch.float32, clips=1 if heads == 4 else 2)  # the interpreter is slow
    call = (axes, pad if padded else None, p, 98765432109876, context)
    got = run(axial_attention, qkv, cls, *call, backend="triton")
    expected = run(axial_attention, qkv, cls, *call, backend="reference")
    for a, b in zip(got, expected, strict=True):
        # float32 sums of up to 65 keys and, for [CLS], of all lines, in another order
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5 if a.ndim == 4 else 5e-6)


@runs_kernels
@pytest.mark.parametrize("grid, axes, heads, width, context, p", CASES[1:6])
def test_float16_is_as_exact_as_plain_torch(grid, axes, heads, width, context, p):
    """At most twice the error of the reference's own products in float16, both against float64."""
    qkv, cls, pad = inputs(grid, heads, width, torch.float16)
    call = (axes, pad, p, 5, context)
    seed = torch.tensor(5, device=DEVICE)
    exact = run(axial_attention_reference, qkv.double(), cls.double(), axes, pad, p, seed, context)
    got = run(axial_attention, qkv, cls, *call, backend="triton")
    plain = run(axial_attention, qkv, cls, *call, backend="reference")
    for a, b, e in zip(got, plain, exact, strict=True):
        ours, theirs = (float((x.double() - e).abs().max()) for x in (a, b))
        assert ours <= 2 * theirs + 1e-3 * float(e.abs().max())  # the kernel multiplies float16 probabilities


@runs_kernels
def test_packed_rows_and_empty_batches():
    rows = torch.randn(2 * (5 * 3 * 2 + 1), 3, 4, 16, device=DEVICE)
    call = ((5, 3, 2), ("T", "W"), None, 0.2, 7)
    both = []
    for backend in ("triton", "reference"):
        x = rows.clone().requires_grad_()
        y = axial_attention_packed(x, *call, backend=backend)
        both.append([y, *torch.autograd.grad(y, x, torch.ones_like(y).cumsum(0) / 62)])
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)  # as above
    assert axial_attention_packed(rows[:0], *call, backend="triton").shape == (0, 4, 16)


@runs_kernels
def test_one_program_or_several(monkeypatch):
    """However a clip's lines are split over programs, the tokens' bits are the same and [CLS] agrees."""
    from vimpac.kernels import axial_attention as kernels

    qkv, cls, pad = inputs((5, 4, 3), 2, 16, torch.float32)
    results = []
    for blocks in (1, 1000):
        monkeypatch.setattr(kernels, "BLOCKS", blocks)
        kernels.constants.cache_clear()
        results.append(run(axial_attention, qkv, cls, ("T", "H"), pad, 0.1, 3, backend="triton"))
    for name, a, b in zip(("out", "cls_out", "qkv.grad", "cls_qkv.grad"), *results, strict=True):
        if name.startswith("cls"):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-6)  # sums over lines, in another order
        else:
            assert torch.equal(a, b)
    kernels.constants.cache_clear()  # of what BLOCKS was here


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("padded, p, context", [(False, 0.0, True), (True, 0.2, False)])
def test_opcheck(dtype, strided, padded, p, context):
    """Schema, fake and aliasing of the real ops."""
    qkv, cls, pad = inputs((2, 3, 2), 2, 16, dtype)
    if not strided:
        qkv, cls = qkv.contiguous(), cls.contiguous()
    seed = torch.tensor(5, device=DEVICE) if p else None
    call = (qkv, cls, ("T", "W"), pad if padded else None, p, seed, context)
    torch.library.opcheck(dispatch.overload("axial_attention", "triton"), call)
    grad = torch.randn(2 * 13, 2, 16, device=DEVICE).to(dtype)
    torch.library.opcheck(dispatch.overload("axial_attention_backward", "triton"), (grad, *call))


@runs_kernels
@pytest.mark.parametrize("clips", [1024, 1100])
def test_more_lines_than_65535(clips):
    """65,536 lines and more, where a grid's second and third dimension end."""
    if not NATIVE:
        pytest.skip("too many lines for the interpreter")
    qkv = torch.randn(clips, 1, 64, 4, 3, 1, 16, device=DEVICE)
    cls = torch.randn(clips, 3, 1, 16, device=DEVICE)
    for backend in ("triton", "sdpa"):
        got = run(axial_attention, qkv, cls, ("W",), backend=backend)
        for a, b in zip(got, run(axial_attention, qkv, cls, ("W",), backend="reference"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # float32 sums in another order


@runs_kernels
@pytest.mark.parametrize(
    "far, shape, axes",
    [
        ("clips", (3, 1, 2, 1, 3, 1, 16), ("T",)),
        ("frames", (1, 3, 2, 1, 3, 1, 16), ("T",)),
        ("rows", (1, 1, 3, 3, 3, 2, 16), ("H", "W")),  # whose code is one
        ("kinds", (1, 1, 2, 1, 3, 1, 16), ("T",)),
        ("heads", (1, 1, 2, 1, 3, 3, 16), ("T",)),
    ],
)
def test_offsets_past_two_to_the_31(far, shape, axes):
    """Strides below 2^31 whose products are above: a clip's own offset, and (WIDE) offsets within a clip, need 64 bits."""
    step = 2**30 + 2**28
    whole = torch.empty(2 * step + 10_000, dtype=torch.float16, device=DEVICE)  # 5 GiB, hardly any of it touched
    dimension = {"clips": 0, "frames": 1, "rows": 2, "kinds": 4, "heads": 5}[far]
    strides = list(torch.empty(shape, device="meta").stride())
    strides[dimension] = step
    qkv = whole.as_strided(shape, strides)
    qkv.copy_(torch.randn(qkv.shape))
    cls = torch.randn(shape[0], 3, shape[5], 16).to(qkv)
    near = qkv.clone(memory_format=torch.contiguous_format)
    for a, b in zip(*(run(axial_attention, x, cls, axes, backend="triton") for x in (qkv, near)), strict=True):
        assert torch.equal(a, b)


@runs_kernels
@pytest.mark.parametrize("axes", [("T",), ("H", "W")])
def test_cls_is_not_read_where_it_is_no_key(axes):
    """cls_in_context=False: whatever [CLS]'s key and value are, they reach nothing."""
    qkv, cls, _ = inputs((2, 3, 2), 2, 16, torch.float32)
    expected = run(axial_attention, qkv, cls, axes, None, 0.0, None, False, backend="reference")
    cls = cls.clone()
    cls[:, 1:] = float("inf")
    for a, b in zip(run(axial_attention, qkv, cls, axes, None, 0.0, None, False, backend="triton"), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)  # as above


@runs_kernels
@pytest.mark.parametrize(
    "grid, axes, value, dtype",
    [
        ((5, 2, 2), ("T",), float("nan"), torch.float32),  # several lines a block
        ((2, 9, 1), ("H", "T"), float("inf"), torch.float16),
    ],
)
def test_what_is_not_finite_stays_in_padding(grid, axes, value, dtype):
    qkv, cls, pad = inputs(grid, 2, 16, dtype, clips=3)
    pad[1] = False  # a clip that runs the code for none

    def attend(*call):
        return run(axial_attention, *call[:2], axes, *call[2:], backend="triton")

    nothing_leaves_padding(attend, qkv, cls, pad, value, apart=False)
    alone = attend(qkv[1:2], cls[1:2], None, 0.0, None, True)
    for all_three, one in zip(attend(qkv, cls, pad, 0.0, None, True)[:2], alone[:2], strict=True):
        assert torch.equal(all_three[1:2], one)


@runs_kernels
def test_words_of_rows_past_two_to_the_32():
    """No tensor here has so many rows; the counter's high word, and a seed's, count all the same."""
    global tl, kernel_philox  # where Triton looks names up
    import triton
    import triton.language as tl

    from vimpac.kernels.philox import philox as kernel_philox
    from vimpac.ops.attention_dropout import DROPOUT_ROUNDS

    @triton.jit
    def draw(rows, seed, out):
        i = tl.arange(0, 4)
        w0, w1, w2, w3 = kernel_philox(tl.load(rows + i), 5, 1, tl.load(seed), 7)
        tl.store(out + i, w0.to(tl.int64))
        tl.store(out + 4 + i, w1.to(tl.int64))
        tl.store(out + 8 + i, w2.to(tl.int64))
        tl.store(out + 12 + i, w3.to(tl.int64))

    rows = torch.tensor([7, 2**32 + 7, 2**40 - 1, 2**62], device=DEVICE)
    seed = torch.tensor(-(2**61) + 3, device=DEVICE)
    out = torch.zeros(4, 4, dtype=torch.int64, device=DEVICE)
    draw[(1,)](rows, seed, out)
    assert torch.equal(out, torch.stack(philox((*split_words(rows), 5, 1), seed, DROPOUT_ROUNDS)))


# --- bytes ------------------------------------------------------------------------------------------------------------


def tensors_moved(grid, axes, backend, dtype, count):
    """Bytes that forward, and backward, ask of memory, in units of one tensor [B, T, H, W, N, D]."""
    qkv = torch.randn(1, *grid, 3, 2, 64, dtype=dtype)
    leaves = [qkv.requires_grad_(), qkv[:, 0, 0, 0].detach().clone().requires_grad_()]
    unit = qkv.numel() // 3 * qkv.element_size()
    p = 0.1 if backend == "triton" else 0.0  # the reference's random numbers would count for themselves
    moved = []
    with count() as counter:
        out = axial_attention(*leaves, axes, None, p, 1, backend=backend)
        moved.append(total(counter) / unit)
    upstream = [torch.randn_like(x) for x in out]
    with count() as counter:
        torch.autograd.grad(out, leaves, upstream)
        moved.append(total(counter) / unit)
    return moved


def total(counter):
    return counter.bytes if isinstance(counter, EagerBytes) else sum(counter)


@runs_in_interpreter
@pytest.mark.parametrize("grid, axes", [((5, 6, 8), ("T",)), ((1, 16, 16), ("H", "W"))])  # 16 blocks a program, as in the model
def test_moves_each_tensor_once(grid, axes):
    """Forward reads q, k, v and writes out; backward reads q, k, v and a gradient and writes three. [CLS] and parts: 5 %."""
    forward, backward = tensors_moved(grid, axes, "triton", torch.float16, count_kernel_bytes)
    assert 4 <= forward <= 1.05 * 4
    assert 7 <= backward <= 1.05 * 7


@not_interpreted
@pytest.mark.parametrize("axes", [("T",), ("H", "W")])
@pytest.mark.parametrize("backend, least", [("reference", (20, 25)), ("sdpa", (11, 20))])
def test_plain_torch_moves_several_times_as_much(backend, least, axes):
    """The same count of what torch's ops read and write: the factor that docs/kernels.md expects of a GPU."""
    forward, backward = tensors_moved((5, 16, 16), axes, backend, torch.float32, EagerBytes)
    assert forward > least[0] and backward > least[1]


@not_interpreted
def test_says_why_it_cannot_run():
    qkv, cls, _ = inputs((2, 65, 2), 2, 144, torch.float64)
    with pytest.raises(ValueError, match=r"on cpu, it needs a CUDA device; torch.float64.*at most 64 tokens; head width 144"):
        axial_attention(qkv, cls, ("H",), backend="triton")


@not_interpreted
@pytest.mark.parametrize(
    "dtype, length, width, has, needed",
    [
        (torch.float32, 64, 128, 232448, 245760),  # an H100
        (torch.float32, 33, 64, 101376, 131072),  # the smallest GPUs
        (torch.bfloat16, 64, 65, 101376, 135168),
        (torch.bfloat16, 64, 128, 232448, 0),
        (torch.float32, 64, 64, 232448, 0),
        (torch.float32, 64, 32, 101376, 0),
        (torch.float32, 32, 128, 101376, 0),
        (torch.float64, 64, 128, 232448, 0),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_says_where_shared_memory_is_short(monkeypatch, dtype, length, width, has, needed, padded):
    from vimpac.ops.axial_attention import AttentionCall, _why_not_triton

    monkeypatch.setattr(dispatch, "_unfit_for_triton", lambda device: "")
    monkeypatch.setattr(dispatch, "shared_memory", lambda device: has)
    qkv = SimpleNamespace(
        shape=(1, 2, length, 2, 3, 1, width), dtype=dtype, itemsize=dtype.itemsize, device=torch.device("cuda", 0)
    )
    pad = torch.zeros(()) if padded else None
    if padded and (dtype, length, width) == (torch.float32, 32, 128):
        needed = 147456
    call = AttentionCall(qkv, None, ("H",), pad, 0.0, None, True)
    reasons = [text for text in _why_not_triton(call) if "shared" in text]
    assert [re.search(r"takes (\d+) bytes .* has (\d+)", text).groups() for text in reasons] == (
        [(str(needed), str(has))] if needed else []
    )
