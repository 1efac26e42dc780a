"""info_nce in one process: the definition against loops, a kernel's slot against the definition, bad calls."""

import math

import pytest
import torch
import torch.nn.functional as F
from info_nce_calls import (
    EXACT,
    FLOAT32,
    LENGTHS,
    by_loops,
    features,
    length_does_not_matter,
    short_features_count_as_longer_ones,
    slot_backend,
    slot_forward,
    slot_pack,
    value_and_gradients,
)
from torch.testing import assert_close

from extension import needs_compiler
from vimpac.ops import dispatch, info_nce


@pytest.fixture(scope="module", autouse=True)
def slot():
    with slot_backend():
        yield


@pytest.fixture(params=["reference", "slot"])
def backend(request):
    return request.param


# --- one process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1, 7.0])
@pytest.mark.parametrize("n, d", [(1, 1), (1, 4), (2, 3), (7, 5)])
def test_is_equation_5(backend, n, d, temperature):
    z1, z2 = features(n, d, dtype=torch.float64)
    loss = info_nce(z1, z2, temperature, backend=backend)
    assert (loss.shape, loss.dtype) == ((), torch.float64)
    assert_close(loss.item(), by_loops(z1, z2, temperature), **EXACT)


@pytest.mark.parametrize("n, d", [(1, 1), (2, 1), (5, 3), (129, 65), (257, 256)])
@pytest.mark.parametrize("temperature", [0.05, 0.2])
def test_matches_float64(backend, device, n, d, temperature):
    z1, z2 = features(n, d, device)
    actual = value_and_gradients(info_nce, z1, z2, temperature, backend=backend)
    exact = value_and_gradients(info_nce, *(z.detach().double().requires_grad_() for z in (z1, z2)), temperature)
    for ours, true in zip(actual, exact, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours.double(), true, **FLOAT32)


def test_defaults():
    z1, z2 = features(4, 3)
    assert_close(info_nce(z1, z2, backend="reference"), info_nce(z1, z2, 0.2, None, "reference"), rtol=0, atol=0)
    assert_close(info_nce(z1, z2), info_nce(z1, z2, 0.2, None, "reference"))  # by whichever backend is the fastest here


def test_gradcheck(backend):
    """Against differences of the loss: float64, gradcheck's own tolerances."""
    torch.autograd.gradcheck(lambda *z: info_nce(*z, 0.3, backend=backend), features(4, 3, dtype=torch.float64))


def test_one_video_has_no_negatives(backend):
    loss, *grads = value_and_gradients(info_nce, *features(1, 6), backend=backend)
    assert loss.item() == 0
    assert all((grad == 0).all() for grad in grads)


def test_no_videos(backend):
    loss, *grads = value_and_gradients(info_nce, *features(0, 6, dtype=torch.bfloat16), backend=backend)
    assert (loss.item(), loss.dtype) == (0, torch.float32)
    assert [grad.shape for grad in grads] == [(0, 6), (0, 6)]


@pytest.mark.parametrize("length, dtype", LENGTHS)
def test_length_does_not_matter(backend, length, dtype):
    length_does_not_matter(length, dtype, backend)


@pytest.mark.parametrize("length", [1e-42, 1e-20, 1e-13])
def test_short_features_count_as_longer_ones(backend, length):
    short_features_count_as_longer_ones(length, backend)


def test_zero_features_are_finite(backend):
    z1, z2 = (z.detach() for z in features(3, 4))
    z1[1] = 0
    loss, *grads = value_and_gradients(info_nce, z1.requires_grad_(), z2.requires_grad_(), backend=backend)
    assert all(x.isfinite().all() for x in (loss, *grads))


@pytest.mark.parametrize("temperature, agree", [(1e-4, True), (1e-4, False), (1e4, True)])
def test_extreme_temperatures(backend, temperature, agree):
    """Scores of ±10^4 neither overflow nor lose the answer; scores of ±10^-4 give all 2n - 1 features the same share."""
    z1 = torch.eye(4, dtype=torch.float32).requires_grad_()
    z2 = (torch.eye(4) if agree else -torch.eye(4)).requires_grad_()
    loss, *grads = value_and_gradients(info_nce, z1, z2, temperature, backend=backend)
    expected = 2 * math.log(7) if temperature > 1 else 0 if agree else 2 * (1e4 + math.log(6))
    assert loss.item() == pytest.approx(expected, rel=1e-3, abs=1e-6)  # 7 shares differ by exp(1e-4)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_errors(dtype, device):
    """At most twice the error of plain PyTorch, which would multiply in float32 too, against float64."""
    z1, z2 = features(65, 64, device, dtype)

    def plain(z1, z2):
        f, g = F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1)
        scores = (torch.cat([f, g]) @ torch.cat([f, g]).T / 0.2).fill_diagonal_(-math.inf)
        partners = torch.arange(2 * len(f), device=f.device).roll(len(f))
        return 2 * F.cross_entropy(scores, partners)

    ours = value_and_gradients(info_nce, z1, z2)
    usual = value_and_gradients(plain, z1, z2)
    exact = value_and_gradients(info_nce, *(z.detach().double().requires_grad_() for z in (z1, z2)))
    for mine, theirs, true in zip(ours, usual, exact, strict=True):
        # + a rounding of the float32 sums: the loss's error is luck at that size
        assert (mine.double() - true).norm() <= 2 * (theirs.double() - true).norm() + 2e-7 * true.norm()
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]


def test_autocast_does_not_round_scores(backend):
    z1, z2 = features(33, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(z1, z2, 0.05, backend=backend)
    grads = torch.autograd.grad(1.75 * loss, (z1, z2))
    for ours, expected in zip((loss, *grads), value_and_gradients(info_nce, z1, z2, 0.05, backend="reference"), strict=True):
        assert_close(ours, expected, **FLOAT32)


def test_saves_features_not_scores():
    z1, z2 = features(50, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        info_nce(z1, z2, backend="slot")
    assert max(saved) <= 2 * 50 * 8  # both views; scores are 2 · 50 · 100


def test_second_derivatives_are_refused():
    """A kernel's gradient has none. That is an error, not a missing term of a sum, even for a constant upstream gradient."""
    z1, z2 = features(5, 4)
    value = info_nce(z1, z2, backend="slot")
    for loss in (value.square(), value):
        (grad,) = torch.autograd.grad(loss, z1, create_graph=True)
        for z in (z1, z2):
            with pytest.raises(RuntimeError, match="info_nce: its kernels have no second derivative"):
                torch.autograd.grad(grad.square().sum() + z.square().sum(), z, retain_graph=True)


# --- the slot under torch.compile and opcheck -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows, ranks, offset", [(12, 1, 0), (4, 3, 4), (2, 1, 0)])
def test_opcheck(dtype, rows, ranks, offset):
    z1, z2 = (z.detach() for z in features(rows // 2 * ranks, 4, dtype=dtype))
    torch.library.opcheck(dispatch.overload("info_nce_pack", "slot"), (z1, z2))
    packed = slot_pack(z1, z2)
    torch.library.opcheck(dispatch.overload("info_nce", "slot"), (*packed, offset, rows, 0.2))
    lse = torch.cat([slot_forward(*packed, rank * rows, rows, 0.2)[1] for rank in range(ranks)])
    arguments = (torch.full_like(lse[:ranks], 1.5), *packed, lse)
    torch.library.opcheck(dispatch.overload("info_nce_backward", "slot"), (*arguments, offset, rows, 0.2))
    learned = torch.full_like(lse[0], 0.2)
    torch.library.opcheck(dispatch.overload("info_nce_learned", "slot"), (*packed, learned, offset, rows))
    torch.library.opcheck(dispatch.overload("info_nce_learned_backward", "slot"), (*arguments, learned, offset, rows))


@needs_compiler
def test_compiles_whole(backend):
    compiled = torch.compile(lambda *z: info_nce(*z, backend=backend), fullgraph=True, dynamic=True)
    for n in (5, 8):
        expected = value_and_gradients(info_nce, *features(n, 6), backend="reference")
        for ours, true in zip(value_and_gradients(compiled, *features(n, 6)), expected, strict=True):
            assert_close(ours, true, **FLOAT32)


def test_compiles_one_tensor_twice(backend):
    compiled = torch.compile(lambda z: info_nce(z, z, backend=backend), fullgraph=True, backend="aot_eager")
    z, _ = features(5, 6)
    (grad,), (expected,) = (torch.autograd.grad(f(z), z) for f in (compiled, lambda z: info_nce(z, z, backend="reference")))
    assert_close(grad, expected, **FLOAT32)


# --- bad calls --------------------------------------------------------------------------------------------------------

Z = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "call, shown",
    [
        ((Z[0], Z[0]), r"must both be \[n, d\], got shapes \(3,\) and \(3,\)"),
        ((Z, Z[:3]), r"got shapes \(4, 3\) and \(3, 3\)"),
        ((Z, Z[:, :2]), r"got shapes \(4, 3\) and \(4, 2\)"),
        ((Z.int(), Z.int()), "share one floating dtype, got torch.int32 and torch.int32"),
        ((Z, Z.bfloat16()), "share one floating dtype, got torch.float32 and torch.bfloat16"),
        ((Z, Z.to("meta")), "one device, got cpu and meta"),
        ((Z, Z, 0.0), "temperature must be positive and finite, got 0.0"),
        ((Z, Z, -0.2), "got -0.2"),
        ((Z, Z, math.nan), "got nan"),
        ((Z, Z, math.inf), "got inf"),
        ((Z, Z, torch.ones(1)), r"number or a 0-dimensional floating tensor on cpu, got torch.float32 of shape \(1,\) on cpu"),
        ((Z, Z, torch.tensor(1)), r"0-dimensional floating tensor on cpu, got torch.int64 of shape \(\) on cpu"),
        ((Z, Z, torch.ones((), device="meta")), r"0-dimensional floating tensor on cpu, got torch.float32 .* on meta"),
        ((Z, Z, 0.2, None, "turbo"), "no backend 'turbo'; it has cpu, "),
    ],
)
def test_bad_calls_are_shown(call, shown):
    with pytest.raises(ValueError, match=shown):
        info_nce(*call)
