"""info_nce: the definition against loops, a kernel's slot against the definition, ranks of a group against one process."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing import assert_close

from extension import needs_compiler
from vimpac.ops import dispatch, info_nce, info_nce_reference
from vimpac.ops.info_nce import _AllGather, packed_dtype

RANKS, ROWS, WIDTH = 4, 3, 5
EXACT = {"rtol": 1e-12, "atol": 1e-13}  # float64, sums of some dozen terms of order 1
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}  # scores up to 1 / γ = 20 and sums of 514 terms: some 20 roundings of 6e-8


def features(n, d, device="cpu", dtype=torch.float32, length=1.0, seed=0):
    """Two views that partly agree, z1 with strided rows and z2 permuted, lengths far from 1."""
    generator = torch.Generator().manual_seed(seed)
    z1 = torch.randn(n, 2, d, generator=generator)[:, 1]
    z2 = (0.7 * z1 + torch.randn(d, n, generator=generator).T).mul(3)
    strided = torch.empty(n, 2, d, dtype=dtype, device=device)[:, 1].copy_(length * z1.double())
    permuted = torch.empty(d, n, dtype=dtype, device=device).T.copy_(length * z2.double())
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


def slot_backward(*call):
    return slot_gradients(*call)[0]


def slot_gradients(grad, features, inverse, lse, offset, rows, temperature):
    unit, scores, partner = slot_scores(features, inverse, offset, rows, temperature)
    mine, lengths = slice(offset, offset + rows), inverse[offset : offset + rows, None]
    of_columns = grad.repeat_interleave(rows)
    weights = of_columns[mine, None] * (scores - lse[mine, None]).exp() + of_columns * (scores - lse).exp()
    weights = weights.scatter_add(1, partner, -2 * of_columns[mine, None])
    g = weights @ unit / (rows // 2 * temperature)
    along = (g * unit[mine]).sum(1, keepdim=True)
    return ((g - along * (lengths < 1e12) * unit[mine]) * lengths).to(features.dtype), along[:, 0]


def slot_learned(features, inverse, learned, offset, rows):
    return slot_forward(features, inverse, offset, rows, learned)


def slot_learned_backward(grad, features, inverse, lse, learned, offset, rows):
    return slot_gradients(grad, features, inverse, lse, offset, rows, learned)


def add_slot():
    """A backend "slot" behind its own overloads, as a kernel would come."""
    from vimpac.ops.info_nce import SCHEMAS

    functions = slot_pack, slot_forward, slot_backward, slot_learned, slot_learned_backward
    for name, function in zip(SCHEMAS, functions, strict=True):
        dispatch.define_overload(name, "slot", *SCHEMAS[name])
        dispatch.implement(name, "slot", "CompositeExplicitAutograd", function)
    dispatch.register("info_nce", "slot", dispatch.always)


@pytest.fixture(scope="module", autouse=True)
def slot():
    add_slot()
    yield
    del dispatch._REGISTRY["info_nce"]["slot"]


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


def length_does_not_matter(length, dtype, backend):
    """Gradients shrink as the features grow, in the whole range that the docstring names."""
    expected = value_and_gradients(info_nce, *features(6, 5, dtype=dtype), backend=backend)
    loss, *grads = value_and_gradients(info_nce, *features(6, 5, dtype=dtype, length=length), backend=backend)
    assert_close(loss, expected[0], **FLOAT32)
    for ours, true in zip(grads, expected[1:], strict=True):
        assert_close(ours * length, true, **FLOAT32)


LENGTHS = [(2e-12, torch.float32), (1e-6, torch.float32), (1e15, torch.float32), (5e16, torch.float32), (1e148, torch.float64)]


@pytest.mark.parametrize("length, dtype", LENGTHS)
def test_length_does_not_matter(backend, length, dtype):
    length_does_not_matter(length, dtype, backend)


@pytest.mark.parametrize("length", [1e-42, 1e-20, 1e-13])
def test_short_features_count_as_longer_ones(backend, length):
    short_features_count_as_longer_ones(length, backend)


def short_features_count_as_longer_ones(length, backend):
    """Of 1e-12, whatever they are, down to numbers that float32 has not many digits of."""
    z1, z2 = (z.detach().requires_grad_() for z in features(6, 5, length=length))
    exact = value_and_gradients(info_nce, *(z.detach().double().requires_grad_() for z in (z1, z2)), backend="reference")
    for ours, true in zip(value_and_gradients(info_nce, z1, z2, backend=backend), exact, strict=True):
        assert_close(ours.double(), true, rtol=1e-5, atol=1e-5 * float(true.detach().abs().max()))  # float32 sums of 11 terms


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


# --- a learned temperature --------------------------------------------------------------------------------------------


def with_temperature(z1, z2, temperature, dtype=None, upstream=1.75, **named):
    """Loss, gradients of both views and of γ, a tensor."""
    learned = torch.tensor(temperature, dtype=dtype or z1.dtype, device=z1.device, requires_grad=True)
    loss = info_nce(z1, z2, learned, **named)
    return loss, *torch.autograd.grad(loss, (z1, z2, learned), torch.full_like(loss, upstream))


def is_learned(z1, z2, temperature, backend):
    """Loss and gradients are those of a number, and the temperature's is float64's."""
    got = with_temperature(z1, z2, temperature, backend=backend)
    number = value_and_gradients(info_nce, z1, z2, temperature, backend=backend)
    exact = with_temperature(*(z.detach().double().requires_grad_() for z in (z1, z2)), temperature, backend="reference")
    for ours, theirs, true in zip(got, (*number, got[3]), exact, strict=True):
        # γ as a float32 tensor and no double rounds each score once more: 6e-8 of 1 / γ, and so its exponential
        tolerance = {"rtol": 1e-5 + 1e-6 / temperature, "atol": 1e-6 * max(1.0, float(true.detach().abs().max()))}
        assert_close(ours, theirs, **tolerance)
        assert_close(ours.double(), true, **tolerance)


@pytest.mark.parametrize("temperature", [0.02, 0.2, 3.0])
@pytest.mark.parametrize("n, d", [(1, 1), (2, 3), (5, 3), (33, 16), (257, 40)])
def test_learned_temperature(backend, n, d, temperature):
    is_learned(*features(n, d), temperature, backend)


def test_temperature_gradcheck(backend):
    learned = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda *x: info_nce(*x, backend=backend), (*features(4, 3, dtype=torch.float64), learned))


def test_temperature_of_short_features(backend):
    """Below a length of 1e-12 the normalisation takes nothing out; the products with the unit features count all the same."""
    z1, z2 = (z.detach() for z in features(4, 3, dtype=torch.float64))
    z1[1], z2[2] = 0, z2[2] * 1e-14
    call = z1.requires_grad_(), z2.requires_grad_(), 0.3
    for ours, true in zip(with_temperature(*call, backend=backend), with_temperature(*call, backend="reference"), strict=True):
        assert_close(ours, true, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_temperature_alone_and_of_any_dtype(backend, dtype):
    z1, z2 = (z.detach() for z in features(5, 4))
    learned = torch.tensor(0.25, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(z1, z2, learned, backend=backend)
    (grad,) = torch.autograd.grad(loss, learned)
    expected = with_temperature(*features(5, 4), 0.25, backend="reference", upstream=1.0)[3]
    assert grad.dtype == dtype
    assert_close(grad.float(), expected, rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-6)


def test_temperature_without_videos(backend):
    loss, *_, grad = with_temperature(*features(0, 6, dtype=torch.bfloat16), 0.2, torch.float32, backend=backend)
    assert (loss.item(), loss.dtype, grad.item()) == (0, torch.float32, 0)


def test_temperature_has_no_second_derivative():
    z1, z2 = features(5, 4)
    learned = torch.tensor(0.2, requires_grad=True)
    value = info_nce(z1, z2, learned, backend="slot")
    for of, by in ((learned, learned), (learned, z1), (z1, learned)):
        (grad,) = torch.autograd.grad(value, of, create_graph=True)
        with pytest.raises(RuntimeError, match="info_nce: its kernels have no second derivative"):
            torch.autograd.grad(grad.square().sum() + by.square().sum(), by, retain_graph=True)


def test_temperature_is_not_read(backend, monkeypatch):
    """No one waits for the device to say what it is."""

    def read(*_):
        raise AssertionError("the temperature's value was read")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, read)
    with_temperature(*features(5, 4), 0.2, backend=backend)


def test_temperature_compiles_whole(backend):
    compiled = torch.compile(lambda *x: info_nce(*x, backend=backend), fullgraph=True, dynamic=True, backend="aot_eager")
    for n, temperature in ((5, 0.2), (8, 0.4)):
        learned = torch.tensor(temperature, requires_grad=True)
        leaves = (*features(n, 6), learned)
        expected = torch.autograd.grad(info_nce(*leaves, backend="reference"), leaves)
        for ours, true in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            assert_close(ours, true, **FLOAT32)


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
            for x in (z1, z2):
                x.grad = None
            results[backend, name, "learned"] = [
                x.detach() for x in with_temperature(z1, z2, 0.1, group=group, backend=backend, upstream=1.0 + rank)
            ]
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


@pytest.mark.parametrize("members", [[0, 1, 2, 3], [0, 1], [2, 3]])
def test_ranks_learn_one_temperature(ranks, backend, members):
    """One parameter on all ranks: the mean of its gradients is that of the mean of losses, each with a factor of its own."""
    z1, z2 = (z.detach()[ROWS * members[0] : ROWS * (members[-1] + 1)].requires_grad_() for z in features(RANKS * ROWS, WIDTH))
    learned, unit = torch.tensor(0.1, requires_grad=True), [F.normalize(z, dim=1) for z in (z1, z2)]
    offsets = [ROWS * i for i in range(len(members))]
    losses = [info_nce_reference(*(u[i : i + ROWS] for u in unit), *unit, i, learned) for i in offsets]
    mean = sum((1.0 + rank) * loss for rank, loss in zip(members, losses, strict=True)) / len(members)
    expected = torch.autograd.grad(mean, (z1, z2, learned))
    results = [ranks[rank][backend, "world" if len(members) == 4 else "pair", "learned"] for rank in members]
    for view in (1, 2):
        averaged = torch.cat([result[view] for result in results]) / len(members)
        assert (averaged - expected[view - 1]).norm() <= 2e-6 * expected[view - 1].norm()
    averaged = torch.stack([result[3] for result in results]).mean()
    assert averaged.item() == pytest.approx(expected[2].item(), rel=5e-6)  # float32 sums of both signs


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
        ((Z, Z, torch.ones(1)), r"number or a 0-dimensional floating tensor on cpu, got torch.float32 of shape \(1,\) on cpu"),
        ((Z, Z, torch.tensor(1)), r"0-dimensional floating tensor on cpu, got torch.int64 of shape \(\) on cpu"),
        ((Z, Z, torch.ones((), device="meta")), r"0-dimensional floating tensor on cpu, got torch.float32 .* on meta"),
        ((Z, Z, 0.2, None, "turbo"), "no backend 'turbo'; it has cpu, "),
    ],
)
def test_bad_calls_are_shown(call, shown):
    with pytest.raises(ValueError, match=shown):
        info_nce(*call)
