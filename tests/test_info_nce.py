"""info_nce: the definition against loops, a kernel's slot against the definition, ranks of a group against one process."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing import assert_close

from extension import needs_compiler
from vimpac.ops import backend as backends
from vimpac.ops import info_nce, info_nce_reference
from vimpac.ops.info_nce import _AllGather, packed_dtype

RANKS, ROWS, WIDTH = 4, 3, 5
EXACT = {"rtol": 1e-12, "atol": 1e-13}  # float64, sums of some dozen terms of order 1
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}  # scores up to 1 / γ = 20 and sums of 514 terms: some 20 roundings of 6e-8


def features(n, d, device="cpu", dtype=torch.float32, length=1.0, seed=0):
    """Two views that partly agree, z1 with strided rows and z2 permuted, lengths far from 1."""
    generator = torch.Generator().manual_seed(seed)
    z1 = torch.randn(n, 2, d, generator=generator)[:, 1]
    z2 = (0.7 * z1 + torch.randn(d, n, generator=generator).T).mul(3)
    strided = torch.empty(n, 2, d, dtype=dtype, device=device)[:, 1].copy_(length * z1)
    permuted = torch.empty(d, n, dtype=dtype, device=device).T.copy_(length * z2)
    return strided.requires_grad_(), permuted.requires_grad_()


def value_and_gradients(function, z1, z2, *options, upstream=1.75, **named):
    loss = function(z1, z2, *options, **named)
    return loss, *torch.autograd.grad(loss, (z1, z2), torch.full_like(loss, upstream))


def by_loops(z1, z2, temperature):
    """Eq. 5 with Eq. 19 and 20, term by term in Python floats, on unit vectors."""
    f, g = ([[x / math.sqrt(sum(y * y for y in z)) for x in z] for z in zs.tolist()] for zs in (z1, z2))
    n = len(f)

    def e(a, b):
        return math.exp(sum(x * y for x, y in zip(a, b, strict=True)) / temperature)

    first = [
        -math.log(e(f[i], g[i]) / (sum(e(f[i], f[k]) for k in range(n) if k != i) + sum(e(f[i], x) for x in g)))
        for i in range(n)
    ]
    second = [
        -math.log(e(g[i], f[i]) / (sum(e(g[i], x) for x in f) + sum(e(g[i], g[k]) for k in range(n) if k != i)))
        for i in range(n)
    ]
    return sum(first) / n + sum(second) / n


# --- a kernel's slot --------------------------------------------------------------------------------------------------


def slot_pack(z1, z2):
    features = torch.cat([z1, z2]).to(packed_dtype(z1.dtype))
    return features, 1 / features.to(torch.promote_types(z1.dtype, torch.float32)).norm(dim=1).clamp_min(1e-12)


def slot_scores(features, inverse, offset, rows, temperature):
    """Unit features, scores of the rows without the row itself, and each row's partner among the columns."""
    unit = features.to(inverse.dtype) * inverse[:, None]
    itself = offset + torch.arange(rows, device=features.device)
    scores = (unit[offset : offset + rows] @ unit.T / temperature).scatter(1, itself[:, None], -math.inf)
    return unit, scores, itself.roll(rows // 2)[:, None]


def slot_forward(features, inverse, offset, rows, temperature):
    assert features.is_contiguous() and inverse.dtype in (torch.float32, torch.float64)
    _, scores, partner = slot_scores(features, inverse, offset, rows, temperature)
    lse = scores.logsumexp(1)
    return (lse - scores.gather(1, partner)[:, 0]).sum() / (rows // 2), lse


def slot_backward(grad, features, inverse, lse, offset, rows, temperature):
    unit, scores, partner = slot_scores(features, inverse, offset, rows, temperature)
    mine, lengths = slice(offset, offset + rows), inverse[offset : offset + rows, None]
    of_columns = grad.repeat_interleave(rows)
    weights = of_columns[mine, None] * (scores - lse[mine, None]).exp() + of_columns * (scores - lse).exp()
    weights = weights.scatter_add(1, partner, -2 * of_columns[mine, None])
    g = weights @ unit / (rows // 2 * temperature)
    along = (g * unit[mine]).sum(1, keepdim=True) * (lengths < 1e12)
    return ((g - along * unit[mine]) * lengths).to(features.dtype)


def add_slot():
    """A backend "slot" behind its own overloads, as a kernel would come."""
    from vimpac.ops.info_nce import SCHEMAS

    for name, function in (("info_nce_pack", slot_pack), ("info_nce", slot_forward), ("info_nce_backward", slot_backward)):
        backends.define_overload(name, "slot", *SCHEMAS[name])
        backends.implement(name, "slot", "CompositeExplicitAutograd", function)
    backends.register("info_nce", "slot", backends.always)


@pytest.fixture(scope="module", autouse=True)
def slot():
    add_slot()
    yield
    del backends._REGISTRY["info_nce"]["slot"]


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


@pytest.mark.parametrize("length", [1e-6, 1.0, 1e15])
def test_length_does_not_matter(backend, length):
    """Gradients shrink as the features grow."""
    expected = value_and_gradients(info_nce, *features(6, 5), backend=backend)
    loss, *grads = value_and_gradients(info_nce, *features(6, 5, length=length), backend=backend)
    assert_close(loss, expected[0], **FLOAT32)
    for ours, true in zip(grads, expected[1:], strict=True):
        assert_close(ours * length, true, **FLOAT32)


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
    """A kernel's gradient has none: said aloud, not left out of a sum, where the upstream gradient is a constant, too."""
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
    torch.library.opcheck(backends.overload("info_nce_pack", "slot"), (z1, z2))
    packed = slot_pack(z1, z2)
    torch.library.opcheck(backends.overload("info_nce", "slot"), (*packed, offset, rows, 0.2))
    lse = torch.cat([slot_forward(*packed, rank * rows, rows, 0.2)[1] for rank in range(ranks)])
    arguments = (torch.full_like(lse[:ranks], 1.5), *packed, lse, offset, rows, 0.2)
    torch.library.opcheck(backends.overload("info_nce_backward", "slot"), arguments)


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


# --- ranks of a group -------------------------------------------------------------------------------------------------


def _rank(rank, folder):
    """Each rank's rows against all ranks' and against its pair's; writes losses and gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", world_size=RANKS, rank=rank)
    add_slot()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results = {}
    for backend in ("reference", "slot"):
        for name, group in (("world", dist.group.WORLD), ("pair", pairs[rank // 2])):
            z1, z2 = (z.detach()[ROWS * rank : ROWS * (rank + 1)].requires_grad_() for z in features(RANKS * ROWS, WIDTH))
            loss = info_nce(z1, z2, 0.1, group, backend)
            again = torch.autograd.grad(loss, (z1, z2), retain_graph=True)
            grads = torch.autograd.grad(loss, (z1, z2))
            assert all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))
            results[backend, name] = loss.detach(), *grads
    grad = torch.ones(RANKS * ROWS, WIDTH)
    (summed,) = torch.autograd.grad(_AllGather.apply(z1, dist.group.WORLD), z1, grad)
    assert (summed == RANKS).all() and (grad == 1).all()  # the incoming gradient is someone else's: not summed in place
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank, (str(folder),), RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("members", [[0, 1, 2, 3], [0, 1], [2, 3]])
def test_ranks_equal_one_process(ranks, backend, members):
    """Mean of losses = the loss, and a gradient averaged as DistributedDataParallel does = the gradient: to float32."""
    z1, z2 = (z.detach()[ROWS * members[0] : ROWS * (members[-1] + 1)].requires_grad_() for z in features(RANKS * ROWS, WIDTH))
    expected = value_and_gradients(info_nce, z1, z2, 0.1, backend="reference", upstream=1.0)
    results = [ranks[rank][backend, "world" if len(members) == 4 else "pair"] for rank in members]
    loss = torch.stack([loss for loss, *_ in results]).mean()
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-6)
    for view in (1, 2):
        averaged = torch.cat([result[view] for result in results]) / len(members)
        assert (averaged - expected[view]).norm() <= 1e-6 * expected[view].norm()


def test_group_of_one_is_no_group(tmp_path):
    z1, z2 = features(4, 3)
    dist.init_process_group("gloo", f"file://{tmp_path}/meet", world_size=1, rank=0)
    try:
        assert_close(info_nce(z1, z2, 0.2, dist.group.WORLD), info_nce(z1, z2), rtol=0, atol=0)
    finally:
        dist.destroy_process_group()


def test_offset_rows_are_a_part_of_all(device):
    columns = [F.normalize(z.detach(), dim=1) for z in features(6, 4, device)]
    parts = [info_nce_reference(*(c[i : i + 2] for c in columns), *columns, i, 0.2) for i in (0, 2, 4)]
    assert_close(torch.stack(parts).mean(), info_nce_reference(*columns, *columns), **FLOAT32)


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
        ((Z, Z, 0.2, None, "turbo"), "no backend 'turbo'; it has cpu, "),
    ],
)
def test_bad_calls_are_shown(call, shown):
    with pytest.raises(ValueError, match=shown):
        info_nce(*call)
