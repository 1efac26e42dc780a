"""The Triton kernels of info_nce: on a GPU, in the interpreter, and compiled for three architectures."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from kernel_checks import (
    DEVICE,
    INTERPRETED,
    not_interpreted,
    poison_new_tensors,
    run_in_interpreter,
    runs_kernels,
)
from vimpac.ops import dispatch, info_nce, info_nce_reference

pytest.importorskip("triton", reason="triton is not installed")

on_a_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU: hours in the interpreter, or CUDA's own")
# Relative error of storing a gradient; the interpreter cuts bfloat16 off where a GPU rounds it.
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float32: 0}


def test_in_the_interpreter():
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch):
    """The interpreter multiplies bfloat16 numbers as the integers that hold them: give it their values."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    dot = InterpreterBuilder.create_dot

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.view("uint16").astype("uint32") << 16).view("float32"), tl.float32)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest))


def inputs(n, d, dtype=torch.float32, length=1.0):
    """Two views that partly agree: z1 with strided rows, z2 permuted, whatever lies between is NaN."""
    g = torch.Generator().manual_seed(n + d)
    z1 = torch.randn(n, d, generator=g)
    z2 = (0.7 * z1 + torch.randn(n, d, generator=g)) * 3
    strided = torch.full((n, d + 3), math.nan)
    strided[:, :d] = length * z1
    return strided.to(DEVICE, dtype)[:, :d], (length * z2).T.contiguous().to(DEVICE, dtype).T


def run(function, z1, z2, *options, **named):
    """Loss and gradients for an upstream gradient that is not one."""
    leaves = [z.detach().requires_grad_() for z in (z1, z2)]
    loss = function(*leaves, *options, **named)
    return loss.detach(), *torch.autograd.grad(1.75 * loss, leaves)


def compare(z1, z2, temperature):
    """Triton's kernels against float64."""
    got = run(info_nce, z1, z2, temperature, backend="triton")
    exact = run(info_nce, z1.double(), z2.double(), temperature, backend="reference")
    assert [x.dtype for x in got] == [torch.float32, z1.dtype, z2.dtype]
    # Scores are sums of d products that float32 holds to 6e-8, times up to 1 / γ: some 20 roundings.
    # A gradient is a sum of terms up to 1.75 · 2 / (n γ length).
    assert_close(got[0].double(), exact[0], rtol=1e-5, atol=2e-6)
    for ours, true, z in zip(got[1:], exact[1:], (z1, z2), strict=True):
        terms = 3.5 / (len(z) * temperature * z.double().norm(dim=1, keepdim=True).clamp_min(1e-12))
        assert ((ours - true).abs() <= 2e-6 / temperature * terms + 1.01 * ROUNDING[z.dtype] * true.abs() + 1e-7).all()


# --- values and gradients ---------------------------------------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize("temperature", [0.05, 0.2])
@pytest.mark.parametrize("n, d", [(1, 1), (2, 3), (5, 16), (65, 40), (130, 96), (33, 300)])
def test_is_exact_in_float32(n, d, temperature, monkeypatch):
    """One video, odd numbers, one past the tile, a width past one program's; outputs start as NaN."""
    poison_new_tensors(monkeypatch)
    compare(*inputs(n, d), temperature)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n, d", [(5, 16), (40, 72)])
def test_half_is_exact_to_its_rounding(n, d, dtype, monkeypatch):
    poison_new_tensors(monkeypatch)
    compare(*inputs(n, d, dtype), 0.2)


@runs_kernels
@pytest.mark.parametrize("length", [1e-20, 2e-12, 1e-6, 1e15, 5e16])
def test_length_does_not_matter(length):
    compare(*inputs(6, 5, length=length), 0.2)


@runs_kernels
def test_zero_and_tiny_features():
    """A length below 1e-12 counts as 1e-12, as in F.normalize: the gradient is not projected there."""
    z1, z2 = inputs(3, 4)
    z1[1] = 0
    z2[2] *= 1e-14
    got, expected = (run(info_nce, z1, z2, backend=backend) for backend in ("triton", "reference"))
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.isfinite().all()
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # float32 sums in another order


@runs_kernels
@pytest.mark.parametrize("temperature, agree", [(1e-4, True), (1e-4, False), (1e4, True)])
def test_extreme_temperatures(temperature, agree):
    """Scores of ±10^4 neither overflow nor lose the answer; scores of ±10^-4 give all 2n - 1 features the same share."""
    z = torch.eye(4, device=DEVICE)
    loss, *grads = run(info_nce, z, z if agree else -z, temperature, backend="triton")
    expected = 2 * math.log(7) if temperature > 1 else 0 if agree else 2 * (1e4 + math.log(6))
    assert loss.item() == pytest.approx(expected, rel=1e-3, abs=1e-6)  # 7 shares differ by exp(1e-4)
    assert all(grad.isfinite().all() for grad in grads)


@runs_kernels
def test_nan_is_not_hidden():
    """Training must see that its features broke."""
    z1, z2 = inputs(5, 4)
    z2[3, 1] = math.nan
    assert all(x.isnan().any() for x in run(info_nce, z1, z2, backend="triton"))


@runs_kernels
def test_one_program_or_several(monkeypatch):
    """The same sums in another order; and several run twice give the same bits."""
    from vimpac.kernels import info_nce as kernels

    z1, z2 = inputs(100, 24)
    results = {}
    for splits in (1, 3, 4):
        monkeypatch.setattr(kernels, "count_splits", lambda tiles, columns, programs, s=splits: min(s, columns))
        results[splits] = run(info_nce, z1, z2, 0.1, backend="triton")
    again = run(info_nce, z1, z2, 0.1, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(again, results[4], strict=True))
    for splits in (1, 3):
        for a, b in zip(results[splits], results[4], strict=True):
            assert_close(a, b, rtol=1e-5, atol=1e-7)  # as above; a gradient's elements are around 1e-3


@runs_kernels
def test_parts_of_many_programs_add_up(monkeypatch):
    """Logsumexp and mean loss of parts, more programs than the last one adds in a step; again with the same counter."""
    from vimpac.kernels import info_nce as kernels

    poison_new_tensors(monkeypatch)
    rows, splits = 38, 3  # 10 programs of 4 rows, the last one half empty
    part = torch.randn(3, splits, rows, generator=torch.Generator().manual_seed(0))
    part[1] = part[1].abs() + 0.1
    log = torch.logsumexp((part[0] + part[1].log2()) * math.log(2), 0)
    expected = (log - part[2].sum(0) * math.log(2)).sum() / (rows // 2)
    lse, loss, sums = (torch.empty(n, device=DEVICE) for n in (rows, 1, 12))
    for _ in range(2):
        count = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        arguments = (part.to(DEVICE), sums, count, lse, loss, rows, splits)
        kernels._combine[(10,)](*arguments, R=4, SPLITS=4, BS=4, num_warps=1)
        assert_close(lse.cpu(), log, rtol=1e-5, atol=1e-6)  # float32's exp2 and log2
        assert_close(loss.cpu()[0], expected, rtol=1e-5, atol=1e-6)
        assert count.item() == 10


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, d, temperature", [(1, 1, 0.2), (5, 16, 0.05), (65, 40, 0.2), (33, 300, 3.0)])
def test_learned_temperature(n, d, temperature, dtype, monkeypatch):
    """Against float64 on the same numbers, one feature shorter than counts; outputs start as NaN."""
    poison_new_tensors(monkeypatch)
    z1, z2 = inputs(n, d, dtype)
    z1[-1] *= 1e-14

    def gradient(z1, z2, backend):
        learned = torch.tensor(temperature, device=DEVICE, dtype=torch.float64, requires_grad=True)
        leaves = [z.detach().requires_grad_() for z in (z1, z2)]
        loss = info_nce(*leaves, learned.to(torch.promote_types(z1.dtype, torch.float32)), backend=backend)
        return loss.detach(), *torch.autograd.grad(1.75 * loss, (*leaves, learned))

    got, exact = gradient(z1, z2, "triton"), gradient(z1.double(), z2.double(), "reference")
    number = run(info_nce, z1, z2, temperature, backend="triton")
    for ours, theirs in zip(got[:3], number, strict=True):
        rounding = 2 * ROUNDING[ours.dtype] if ours.ndim else 0
        assert_close(ours, theirs, rtol=1e-5 + rounding, atol=1e-6 + 1e-5 * float(theirs.abs().max()))
    # weights of bfloat16 features keep 16 bits; sums of 2n terms of up to 2 / (n γ²), both signs
    precision = 2e-6 if dtype == torch.float32 else 2**-15
    assert abs(got[3] - exact[3]) <= precision * 3.5 * 2 / temperature**2 + 1e-7


@runs_kernels
def test_long_sums_are_taken_in_parts(monkeypatch):
    """A float32 gradient over more columns than one sum may run over: several launches, the same result."""
    from vimpac.kernels import info_nce as kernels

    z1, z2 = inputs(130, 16)
    whole = run(info_nce, z1, z2, backend="triton")
    monkeypatch.setattr(kernels, "COLUMNS", 64)
    monkeypatch.setattr(kernels, "MAX_SPLITS", 2)
    kernels.count_splits.cache_clear()
    for a, b in zip(run(info_nce, z1, z2, backend="triton"), whole, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)  # sums in another order
    kernels.count_splits.cache_clear()


# --- the gathered form ------------------------------------------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize("m, d", [(3, 5), (33, 20)])
def test_rows_of_a_rank(m, d, monkeypatch):
    """Three ranks' rows against everyone's: mean of the losses and sum of the gradients by autograd through the reference."""
    poison_new_tensors(monkeypatch)
    z1, z2 = (z.detach().requires_grad_() for z in inputs(3 * m, d))
    pack, forward, backward = (dispatch.overload(f"info_nce{x}", "triton") for x in ("_pack", "", "_backward"))
    upstream = torch.tensor([0.5, -1.0, 2.0], device=DEVICE)  # the ranks need not agree
    unit = [F.normalize(z, dim=1) for z in (z1, z2)]
    losses = [info_nce_reference(*(u[r * m : r * m + m] for u in unit), *unit, r * m, 0.1) for r in range(3)]
    expected = torch.autograd.grad((torch.stack(losses) * upstream).sum(), (z1, z2))
    packed = [pack(*(z.detach()[r * m : r * m + m] for z in (z1, z2))) for r in range(3)]
    features, inverse = (torch.cat(x) for x in zip(*packed, strict=True))
    got = [forward(features, inverse, 2 * m * r, 2 * m, 0.1) for r in range(3)]
    lse = torch.cat([x[1] for x in got])
    for r, (loss, _) in enumerate(got):
        assert_close(loss, losses[r].detach(), rtol=1e-5, atol=1e-6)  # float32 sums in another order
        dz = backward(upstream, features, inverse, lse, 2 * m * r, 2 * m, 0.1)
        for ours, theirs in zip(dz.chunk(2), expected, strict=True):
            assert_close(ours, theirs[r * m : r * m + m], rtol=1e-4, atol=1e-6)  # elements cancel down from about 0.1


# --- as a torch op ----------------------------------------------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows, ranks, offset", [(12, 1, 0), (4, 3, 4)])
def test_opcheck(rows, ranks, offset, dtype):
    z1, z2 = inputs(rows // 2 * ranks, 4, dtype)
    pack, forward, backward = (dispatch.overload(f"info_nce{x}", "triton") for x in ("_pack", "", "_backward"))
    torch.library.opcheck(pack, (z1, z2))
    packed = pack(z1, z2)
    torch.library.opcheck(forward, (*packed, offset, rows, 0.2))
    lse = torch.cat([forward(*packed, rank * rows, rows, 0.2)[1] for rank in range(ranks)])
    call = (torch.full_like(lse[:ranks], 1.5), *packed, lse)
    torch.library.opcheck(backward, (*call, offset, rows, 0.2))
    learned = torch.full_like(lse[0], 0.2)
    torch.library.opcheck(dispatch.overload("info_nce_learned", "triton"), (*packed, learned, offset, rows))
    torch.library.opcheck(dispatch.overload("info_nce_learned_backward", "triton"), (*call, learned, offset, rows))


@runs_kernels
def test_compiles_whole():
    compiled = torch.compile(lambda *z: info_nce(*z, backend="triton"), fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 8):
        z1, z2 = inputs(n, 6)
        for ours, true in zip(run(compiled, z1, z2), run(info_nce, z1, z2, backend="reference"), strict=True):
            assert_close(ours, true, rtol=1e-5, atol=1e-6)  # float32 sums in another order


class Sizes(TorchDispatchMode):
    """Bytes of every new tensor."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.bytes.append(x.untyped_storage().nbytes())
        return out


@runs_kernels
def test_memory_is_linear():
    """Nothing larger than the partial sums: features, split up to 16 ways; a score matrix has 4 · 128² · 4 bytes."""
    with Sizes() as sizes:
        run(info_nce, *inputs(128, 4), backend="triton")
    assert sizes.bytes and max(sizes.bytes) <= 16 * (2 * 128) * 4 * 4


@runs_kernels
@on_a_gpu
def test_many_videos():
    """n = 131,072: past 65,535 tiles, against the reference's rows in chunks."""
    n, d, temperature = 131_072, 64, 0.1
    torch.manual_seed(0)
    z1 = torch.randn(n, d, device=DEVICE)
    z2 = z1 + torch.randn(n, d, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, *dz = run(info_nce, z1, z2, temperature, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 16 * z1.nbytes  # scores are 8192 times z1
    unit = torch.cat([F.normalize(z.double(), dim=1) for z in (z1, z2)])
    index = torch.arange(2 * n, device=DEVICE)
    total, lse = 0.0, []
    for rows in index.split(1024):
        scores = (unit[rows] @ unit.T / temperature).scatter_(1, rows[:, None], -math.inf)
        lse.append(scores.logsumexp(1))
        total = total + (lse[-1] - scores.gather(1, (rows[:, None] + n) % (2 * n))[:, 0]).sum()
    assert_close(loss.double(), total / n, rtol=1e-5, atol=0)  # float32 sums of 262,143 terms
    lse = torch.cat(lse)
    for view in (0, 1):  # a partner among the last columns, and among the first: its large term comes late or early in a sum
        rows = index[:1024] + n * view
        scores = (unit[rows] @ unit.T / temperature).scatter_(1, rows[:, None], -math.inf)
        weights = (scores - lse[rows, None]).exp() + (scores - lse).exp()
        g = weights @ unit - 2 * unit[(rows + n) % (2 * n)]
        lengths = (z1, z2)[view][:1024].double().norm(dim=1, keepdim=True)
        expected = 1.75 * (g - unit[rows] * (g * unit[rows]).sum(1, keepdim=True)) / lengths / (n * temperature)
        assert (dz[view][:1024] - expected).norm() <= 1e-4 * expected.norm()  # float32 sums of 262,143 terms of both signs


@runs_kernels
@on_a_gpu
def test_cuda_graph_replays():
    """Two replays on new features give what a plain call gives, to the bit."""
    z1, z2 = (z.contiguous().requires_grad_() for z in inputs(300, 64))

    def step():
        loss = info_nce(z1, z2, backend="triton")
        return loss, *torch.autograd.grad(loss, (z1, z2))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            z1.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@not_interpreted
def test_says_why_it_cannot_run():
    z = torch.zeros(4, 0, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"on cpu, it needs a CUDA device; torch.float64.*; features of width 0"):
        info_nce(z, z, backend="triton")
