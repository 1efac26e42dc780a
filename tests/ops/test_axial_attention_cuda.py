"""The CUDA kernels of axial_attention: run by an emulator of warps, compiled for three architectures, and on a GPU."""

import ctypes
import itertools
import math
import re

import pytest
import torch
from attention_calls import nothing_leaves_padding

import nvcc
from divergence import divergent
from extension import needs_gpu
from kernel_checks import uneven_sums
from vimpac.ops import axial_attention, axial_attention_packed
from vimpac.ops.axial_attention import axial_attention_reference
from vimpac.ops.lines import pack, unpack
from warp_emulator import build, extent

DTYPES = [torch.float16, torch.bfloat16]


# --- kernels in the emulator ------------------------------------------------------------------------------------------


class Arguments(ctypes.Structure):
    """As in tests/emulator/axial_attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad", "qkv", "cls_qkv", "pad", "seed", "out", "parts", "clip_sums", "sums")),
        *((name, ctypes.c_int64) for name in ("qkv_bytes", "cls_qkv_bytes")),
        *((name, ctypes.c_int64 * count) for name, count in (("sizes", 7), ("strides", 7), ("cls_strides", 4))),
        ("dropout_p", ctypes.c_double),
        ("axes", ctypes.c_char_p),
        *((name, ctypes.c_int32) for name in ("bfloat", "cls_in_context", "forward", "splits")),
    )


class Emulated:
    """The kernels on host memory. Outputs start as NaN, and what lies outside the tensors' own elements is out of bounds."""

    def __init__(self, folder):
        self.library = build("axial_attention", folder)
        self.library.run.restype = ctypes.c_char_p
        for name in ("parts", "bytes_stored"):
            getattr(self.library, name).restype = ctypes.c_int64

    def __call__(self, qkv, cls, axes, pad=None, p=0.0, seed=None, context=True, grad=None, splits=0):
        """Packed rows of the outputs, or with `grad`, packed rows too, of the gradients, whose sums are in `self.sums`."""
        B, T, H, W, _, N, D = qkv.shape
        pad = None if pad is None else pad.contiguous()
        shape = (B * T * H * W + B, N, D) if grad is None else (B * T * H * W + B, 3, N, D)
        out = torch.full(shape, float("nan"), dtype=qkv.dtype)
        a = Arguments()
        a.sizes, a.strides, a.cls_strides = tuple(qkv.shape), tuple(qkv.stride()), tuple(cls.stride())
        a.qkv_bytes, a.cls_qkv_bytes = extent(qkv), extent(cls)
        a.dropout_p, a.axes, a.splits = p, "".join(axes).encode(), splits
        a.bfloat, a.cls_in_context, a.forward = qkv.dtype == torch.bfloat16, context, grad is None
        parts = torch.full((self.library.parts(ctypes.byref(a)),), float("nan"))
        clip_sums, self.sums = (torch.full((*n, 3, N, D), float("nan")) for n in ((B,), ()))
        tensors = dict(grad=grad, qkv=qkv, cls_qkv=cls, pad=pad, seed=seed, out=out, parts=parts)
        for name, x in (tensors | dict(clip_sums=clip_sums, sums=self.sums)).items():
            setattr(a, name, None if x is None else x.data_ptr())
        if error := self.library.run(ctypes.byref(a)).decode():
            raise RuntimeError(error)
        floats = parts.numel() + (0 if grad is None else clip_sums.numel() + self.sums.numel())
        assert self.library.bytes_stored() == 2 * out.numel() + 4 * floats  # nothing is written twice
        return out


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return Emulated(tmp_path_factory.mktemp("emulator"))


def inputs(grid, heads, width, dtype, clips=2, device="cpu"):
    """Permuted strides, as views of a larger tensor whose other entries are NaN; PAD with lines that are nothing else."""
    g = torch.Generator().manual_seed(3)
    T, H, W = grid
    whole = torch.full((heads, clips, 3, T, H, W, width + 8), float("nan"))
    whole[..., :width] = torch.randn(whole[..., :width].shape, generator=g)
    cls = torch.full((clips, heads, 3, width + 8), float("nan"))
    cls[..., :width] = torch.randn(cls[..., :width].shape, generator=g)
    pad = torch.rand(clips, W, T, H, generator=g).permute(0, 2, 3, 1) < 0.3
    pad[0, :, 0] = True
    pad[0, 0] = True
    qkv = whole.to(device, dtype)[..., :width].permute(1, 3, 4, 5, 2, 0, 6)  # moved before it is cut: a copy would be dense
    return qkv, cls.to(device, dtype)[..., :width].transpose(1, 2), pad.to(device)


def differentiate(function, qkv, cls, upstream):
    """Packed outputs and packed gradients."""
    leaves = [x.detach().requires_grad_() for x in (qkv, cls)]
    out = pack(*function(*leaves))
    return out.detach(), pack(*torch.autograd.grad(out, leaves, upstream.to(out.dtype)))


def check(got, plain, exact, clips):
    """Of tokens and of [CLS], of queries, keys and values: at most twice the error of the reference, which multiplies in
    float32, plus once the rounding of probabilities and their gradients before products, both against float64."""
    assert not got.isnan().any()
    kinds = [(got, plain, exact)] if got.ndim == 3 else zip(got.unbind(1), plain.unbind(1), exact.unbind(1), strict=True)
    for (a, b, e), rows in itertools.product(kinds, (slice(None, -clips), slice(-clips, None))):
        ours, theirs = (float((x[rows].double() - e[rows]).abs().max()) for x in (a, b))
        assert ours <= 2 * theirs + torch.finfo(got.dtype).eps / 2 * float(e[rows].abs().max())


def check_sums(got, plain, exact):
    """Of gradients over rows: at most twice the error of adding up the reference's rounded rows, plus a random walk of the
    rounding of each row's weights. Those of keys are 0."""
    assert torch.equal(got[1], torch.zeros_like(got[1]))
    for kind in (0, 2):
        expected = exact[:, kind].sum(0)
        ours, theirs = (float((x.double() - expected).abs().max()) for x in (got[kind], plain[:, kind].double().sum(0)))
        rounding = torch.finfo(plain.dtype).eps / 2 * float(exact[:, kind].norm(dim=0).max())
        assert ours <= 2 * theirs + 2 * rounding


CASES = [  # grid, axes, heads, head width, cls_in_context, dropout, splits
    ((1, 2, 3), "T", 1, 32, True, 0.0, 0),  # lines of one token
    ((1, 2, 3), "T", 1, 64, False, 0.3, 0),  # and no other key
    ((5, 4, 6), "T", 2, 64, True, 0.3, 2),  # 3 lines a tile
    ((2, 4, 3), "THW", 3, 32, True, 0.4, 0),  # 4 lines a tile
    ((7, 2, 2), "T", 1, 32, True, 0.3, 0),  # 8 keys: one call of Philox
    ((8, 2, 3), "T", 1, 64, False, 0.3, 0),  # 8 keys of a line alone in its tile
    ((8, 2, 2), "T", 1, 32, True, 0.3, 0),  # 9 keys
    ((2, 15, 2), "HT", 2, 64, True, 0.2, 3),
    ((1, 16, 16), "HW", 4, 32, True, 0.1, 0),  # the model's own: 17 keys
    ((2, 16, 2), "WH", 2, 64, False, 0.2, 0),
    ((3, 17, 2), "TH", 2, 32, True, 0.3, 0),  # two halves, short lines in the same launch
    ((1, 31, 2), "H", 1, 64, True, 0.3, 2),
    ((2, 32, 2), "HT", 2, 64, True, 0.3, 3),  # [CLS] is key 32: a call of its own; more warps than tiles
    ((1, 32, 2), "H", 1, 32, False, 0.3, 0),
    ((10, 2, 3), "T", 3, 32, True, 0.0, 0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grid, axes, heads, width, context, p, splits", CASES)
def test_is_the_reference(emulated, grid, axes, heads, width, context, p, splits, padded, dtype):
    qkv, cls, pad = inputs(grid, heads, width, dtype)
    seed = torch.tensor(98765432109876)
    call = (axes, pad if padded else None, p, seed, context)
    grad = torch.randn(2 * torch.Size(grid).numel() + 2, heads, width, generator=torch.Generator().manual_seed(4)).to(dtype)
    got = emulated(qkv, cls, *call, splits=splits), emulated(qkv, cls, *call, grad=grad, splits=splits)

    def reference(q, c):
        return axial_attention_reference(q, c, *call)

    plain, exact = (differentiate(reference, *xs, grad) for xs in ((qkv, cls), (qkv.double(), cls.double())))
    for a, b, e in zip(got, plain, exact, strict=True):
        check(a, b, e, clips=2)
    check_sums(emulated.sums, plain[1], exact[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", ["T", "HW"])
def test_the_models_own_grid(emulated, axes, dtype):
    """Several tiles a warp and several warps a line-up, as in pre-training."""
    qkv, cls, _ = inputs((5, 16, 16), 2, 64, dtype, clips=1)
    grad = torch.randn(1281, 2, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
    call = (axes, None, 0.1, torch.tensor(-3))
    got = emulated(qkv, cls, *call), emulated(qkv, cls, *call, grad=grad)

    def reference(q, c):
        return axial_attention_reference(q, c, *call)

    plain, exact = (differentiate(reference, *xs, grad) for xs in ((qkv, cls), (qkv.double(), cls.double())))
    for a, b, e in zip(got, plain, exact, strict=True):
        check(a, b, e, clips=1)
    check_sums(emulated.sums, plain[1], exact[1])


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("L", [1, 2, 3, 5, 6, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32])
def test_dropout_bit_by_bit(emulated, L, context):
    """Equal scores and values that are unit vectors: outputs are the masks. Each line's [CLS] row: a clip of one line."""
    for lines in (1, 7):
        qkv = torch.zeros(2, L, lines, 1, 3, 1, 64, dtype=torch.float16)
        qkv[..., 2, 0, :L] = torch.eye(L, dtype=torch.float16)[:, None, None]
        cls = torch.zeros(2, 3, 1, 64, dtype=torch.float16)
        cls[:, 2, 0, L] = 1
        call = ("T", None, 0.5, torch.tensor(2**62 + 12345), context)
        got, expected = emulated(qkv, cls, *call), pack(*axial_attention_reference(qkv, cls, *call))
        tokens = len(got) if lines == 1 else len(got) - 2
        assert torch.equal(got[:tokens] != 0, expected[:tokens] != 0)
        torch.testing.assert_close(got[-2:], expected[-2:], rtol=2e-3, atol=1e-6)  # a mean over lines, rounded


def test_clips_do_not_depend_on_the_batch(emulated):
    qkv, cls, pad = inputs((3, 4, 5), 2, 32, torch.float16)
    grad = torch.randn(122, 2, 32, generator=torch.Generator().manual_seed(4)).half()
    seed = torch.tensor(1)
    tokens, of_cls = unpack(emulated(qkv, cls, "TW", pad, 0.2, seed), (2, 3, 4, 5))
    d_tokens, d_cls = unpack(emulated(qkv, cls, "TW", pad, 0.2, seed, grad=grad), (2, 3, 4, 5))
    first = torch.cat([grad[:60], grad[120:121]])
    alone = (
        emulated(qkv[:1], cls[:1], "TW", pad[:1], 0.2, seed),
        emulated(qkv[:1], cls[:1], "TW", pad[:1], 0.2, seed, grad=first),
    )
    assert torch.equal(pack(tokens[:1], of_cls[:1]), alone[0])
    assert torch.equal(pack(d_tokens[:1], d_cls[:1]), alone[1])


def test_cls_is_not_read_where_it_is_no_key(emulated):
    qkv, cls, _ = inputs((2, 3, 17), 2, 32, torch.float16)
    grad = torch.randn(206, 2, 32, generator=torch.Generator().manual_seed(4)).half()
    call = ("TW", None, 0.0, None, False)
    expected = emulated(qkv, cls, *call), emulated(qkv, cls, *call, grad=grad)
    cls = cls.clone()
    cls[:, 1:] = float("inf")
    got = emulated(qkv, cls, *call), emulated(qkv, cls, *call, grad=grad)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "grid, axes, width", [((5, 2, 3), "T", 64), ((2, 16, 2), "HT", 32), ((1, 32, 2), "H", 64), ((2, 17, 2), "H", 32)]
)
def test_what_is_not_finite_stays_in_padding(emulated, grid, axes, width, dtype, value):
    """Several lines a tile, one, and one of two halves."""
    qkv, cls, pad = inputs(grid, 2, width, dtype)
    tokens = 2 * math.prod(grid)
    grad = torch.randn(tokens + 2, 2, width, generator=torch.Generator().manual_seed(4)).to(dtype)

    def attend(qkv, cls, *call):
        seed = None if call[2] is None else torch.tensor(call[2])
        rows = [emulated(qkv, cls, axes, *call[:2], seed, call[3], grad=g) for g in (None, grad)]
        return [x for both in rows for x in unpack(both, (2, *grid))]

    nothing_leaves_padding(attend, qkv, cls, pad, value, (0.3, 5))


@pytest.mark.parametrize("far", ["clips", "frames", "heads", "kinds"])
def test_offsets_past_two_to_the_31(emulated, far):
    """Strides below 2^31 whose products are above."""
    step = 2**30 + 2**28
    whole = torch.empty(2 * step + 10_000, dtype=torch.float16)  # 5 GiB, hardly any of it touched
    dimension = {"clips": 0, "frames": 1, "kinds": 4, "heads": 5}[far]
    shape = [1, 1, 2, 1, 3, 1, 32]
    shape[dimension] = 3
    strides = list(torch.empty(shape, device="meta").stride())
    strides[dimension] = step
    qkv = whole.as_strided(shape, strides)
    qkv.copy_(torch.randn(qkv.shape))
    cls = torch.randn(shape[0], 3, shape[5], 32).half()
    grad = torch.randn(shape[0] * (shape[1] * 2 + 1), shape[5], 32).half()
    near = qkv.clone(memory_format=torch.contiguous_format)
    assert torch.equal(emulated(qkv, cls, "T"), emulated(near, cls, "T"))
    assert torch.equal(emulated(qkv, cls, "T", grad=grad), emulated(near, cls, "T", grad=grad))


@pytest.mark.parametrize(
    "grid, heads, width, axes, strides, message",
    [
        ((33, 2, 2), 1, 32, "T", None, "lines of more than 32 tokens"),
        ((5, 2, 2), 1, 48, "T", None, "a head width other than 32 and 64"),
        ((5, 2, 2), 1, 32, "T" * 33, None, "more than 32 axes"),
        ((5, 2, 2), 1, 32, "T", 36, "no multiples of 8"),
    ],
)
def test_says_why_it_cannot_run(emulated, grid, heads, width, axes, strides, message):
    qkv = torch.zeros(1, *grid, 3, heads, strides or width, dtype=torch.float16)[..., :width]
    with pytest.raises(RuntimeError, match=message):
        emulated(qkv, torch.zeros(1, 3, heads, width, dtype=torch.float16), axes)


# --- compiled without a GPU -------------------------------------------------------------------------------------------


def test_compiles_without_spills():
    """Registers leave at least 8 warps on a multiprocessor, 12 for lines of up to 16 tokens."""
    kernels = nvcc.kernels(nvcc.ptxas_report("axial_attention.cu"))
    assert len(kernels) == len(nvcc.ARCHITECTURES) * (2 * 2 * 2 * 2 + 3)
    for kernel in kernels:
        if kernel["architecture"] != "80" or "backward_kernel" not in kernel["name"] or "Li64ELi2EEEv" not in kernel["name"]:
            assert kernel["stack"] == kernel["spilled"] == 0, kernel
        else:  # two registers, a store and a load of each for a tile of 32 rows: what the sums over tokens need more
            assert kernel["spilled"] <= 16, kernel
        assert kernel["registers"] <= (168 if "Li1EEEv" in kernel["name"] else 255), kernel


@pytest.mark.parametrize("architecture", nvcc.ARCHITECTURES)
def test_compiles_to_tensor_cores(architecture):
    for name, code in nvcc.sass("axial_attention.cu", architecture).items():
        if "add_parts" not in name and "add_clips" not in name:
            kind = "F32.BF16" if "BFloat16" in name else "F32"
            assert f"HMMA.16816.{kind} " in code and f"HMMA.1688.{kind} " in code
            assert "LDG.E.128" in code and "STG.E.128" in code
            local = "" if architecture == "80" and "Li64ELi2EEEv" in name else "LDL|STL|"  # see test_compiles_without_spills
            assert not re.search(rf"\b({local}LDS|STS|ATOM|RED)\b", code)
            assert not uneven_sums(code)
            if "BFloat16" in name:  # float16's code is the same but for the names of instructions
                assert not divergent(code)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grid, axes, heads, width, context, p, splits", CASES)
def test_gpu_is_the_reference(grid, axes, heads, width, context, p, splits, padded, dtype):
    qkv, cls, pad = inputs(grid, heads, width, dtype, device="cuda")
    seed = torch.tensor(98765432109876, device="cuda")
    call = (tuple(axes), pad if padded else None, p, seed, context)
    generator = torch.Generator().manual_seed(4)
    grad = torch.randn(2 * torch.Size(grid).numel() + 2, heads, width, generator=generator).to("cuda", dtype)

    def run(backend):
        return lambda q, c: axial_attention(q, c, *call, backend=backend)

    got, plain = (differentiate(run(backend), qkv, cls, grad) for backend in ("cuda", "reference"))
    exact = differentiate(run("reference"), qkv.double(), cls.double(), grad)
    for a, b, e in zip(got, plain, exact, strict=True):
        check(a, b, e, clips=2)
    check_sums(emulated.sums, plain[1], exact[1])
    again = differentiate(run("cuda"), qkv, cls, grad)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))  # no atomics


@needs_gpu
@pytest.mark.parametrize("clips", [1024, 1100])
def test_gpu_more_lines_than_65535(clips):
    qkv = torch.randn(clips, 1, 64, 4, 3, 1, 32, device="cuda", dtype=torch.float16)
    cls = torch.randn(clips, 3, 1, 32, device="cuda", dtype=torch.float16)
    grad = torch.randn(clips * 257, 1, 32, device="cuda", dtype=torch.float16)

    def run(backend):
        return lambda q, c: axial_attention(q, c, ("W",), backend=backend)

    got, plain = (differentiate(run(backend), qkv, cls, grad) for backend in ("cuda", "reference"))
    exact = differentiate(run("reference"), qkv.double(), cls.double(), grad)
    for a, b, e in zip(got, plain, exact, strict=True):
        check(a, b, e, clips)


@needs_gpu
def test_gpu_in_a_graph():
    """Forward and backward captured once; a replay reads new inputs and a new seed."""
    rows = torch.randn(2 * 31, 3, 4, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    seed, grad = torch.tensor(1, device="cuda"), torch.randn(2 * 31, 4, 32, device="cuda", dtype=torch.bfloat16)

    def run():
        out = axial_attention_packed(rows, (5, 3, 2), ("T", "W"), None, 0.2, seed, backend="cuda")
        return out, *torch.autograd.grad(out, rows, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        rows.copy_(torch.randn_like(rows))
        seed.fill_(2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


@needs_gpu
def test_gpu_empty_batches():
    rows = torch.zeros(0, 3, 4, 32, device="cuda", dtype=torch.float16)
    assert axial_attention_packed(rows, (5, 3, 2), ("T",), backend="cuda").shape == (0, 4, 32)


@needs_gpu
def test_gpu_views_that_start_anywhere():
    """Even between two pieces of 16 bytes."""
    whole = torch.randn(62 * 3 * 4 * 32 + 1, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(62 * 4 * 32 + 1, device="cuda", dtype=torch.bfloat16)

    def run(whole, grad):
        rows = whole.view(62, 3, 4, 32).requires_grad_()
        out = axial_attention_packed(rows, (5, 3, 2), ("T", "W"), None, 0.2, 7, backend="cuda")
        return out, *torch.autograd.grad(out, rows, grad.view(62, 4, 32))

    aligned = run(whole[1:].clone(), grad[1:].clone())
    assert all(torch.equal(a, b) for a, b in zip(aligned, run(whole[1:], grad[1:]), strict=True))


@needs_gpu
def test_gpu_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    rows = torch.randn(2 * 31, 3, 4, 32, dtype=torch.bfloat16)
    here, there = (
        axial_attention_packed(rows.to(device), (5, 3, 2), ("T", "W"), None, 0.2, 3, backend="cuda")
        for device in ("cuda:0", "cuda:1")
    )
    assert there.device.index == 1 and torch.equal(here.cpu(), there.cpu())
