"""info_nce in C++ on a CPU: what test_info_nce.py, which has the definition, does not reach."""

import math

import pytest
import torch
import torch.nn.functional as F
from info_nce_calls import (
    EXACT,
    LENGTHS,
    features,
    is_learned,
    length_does_not_matter,
    short_features_count_as_longer_ones,
    value_and_gradients,
    with_temperature,
)
from torch.testing import assert_close

from extension import narrower_isas, needs_cpu, on_any_processor, python, run_with
from kernel_checks import poison_new_tensors
from vimpac.ops import dispatch, info_nce, info_nce_reference

pytestmark = [needs_cpu, pytest.mark.usefixtures("one_thread")]  # or a busy machine's threads wait for each other

# Rows are 2n: a tile takes 512 of them, and 1024 from 8192 on; a strip 32, a vector up to 16.
SHAPES = [(1, 1), (1, 6), (2, 3), (5, 16), (65, 40), (129, 65), (256, 20), (257, 33), (520, 8)]
TEMPERATURES = [0.01, 0.032, 0.2, 10]  # below 2 / 64 in float32, 2 / 600 in float64, another way of summing
pack, forward, backward = (dispatch.overload(f"info_nce{x}", "cpu") for x in ("_pack", "", "_backward"))
learned, learned_backward = (dispatch.overload(f"info_nce_learned{x}", "cpu") for x in ("", "_backward"))


def doubles(*z):
    return [x.detach().double().requires_grad_() for x in z]


@pytest.mark.parametrize("isa", narrower_isas())
def test_narrower_instruction_sets(isa):
    """This file once more with what other processors would run."""
    run_with(__file__, VIMPAC_CPU_ISA=isa)


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.003, *TEMPERATURES])
@pytest.mark.parametrize("n, d", SHAPES)
def test_float64(n, d, temperature, monkeypatch):
    z = features(n, d, dtype=torch.float64)
    expected = value_and_gradients(info_nce, *z, temperature, backend="reference")
    poison_new_tensors(monkeypatch)
    for ours, true in zip(value_and_gradients(info_nce, *z, temperature, backend="cpu"), expected, strict=True):
        assert ours.dtype == torch.float64
        # scores up to 1 / γ keep 1e-16 of it, and so do their exponentials
        assert_close(ours, true, rtol=1e-14 + 1e-14 / temperature, atol=1e-15 / temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("n, d", SHAPES)
def test_at_most_twice_the_error_of_plain_pytorch(n, d, temperature, dtype):
    z = features(n, d, dtype=dtype)
    exact = value_and_gradients(info_nce, *doubles(*z), temperature, backend="reference")
    usual = value_and_gradients(info_nce, *z, temperature, backend="reference")
    ours = value_and_gradients(info_nce, *z, temperature, backend="cpu")
    # beside it a rounding of lse, which passes from forward to backward as one float32: 6e-8 of up to 1 / γ; and a few others
    floor = 1e-6 + 1e-7 / temperature
    for mine, theirs, true in zip(ours, usual, exact, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine.double() - true).norm() <= 2 * (theirs.double() - true).norm() + floor * true.norm()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("temperature", [0.02, 0.05])
@pytest.mark.parametrize("n", [40, 300])
def test_nothing_cancels_where_partners_agree(n, temperature, dtype, bound):
    """A loss of 1e-20, and its gradient, to the type's precision: score errors, 1e-7 of 1 / γ, are all that is left."""
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(n, 64, generator=generator).to(dtype)
    z2 = (z1 + 0.3 * torch.randn(n, 64, generator=generator)).to(dtype)

    def by_differences(z1, z2):
        unit = torch.cat([F.normalize(z, dim=1) for z in (z1, z2)])
        scores = unit @ unit.T / temperature
        partner = torch.arange(2 * n).roll(n)[:, None]
        negatives = scores.fill_diagonal_(-math.inf).scatter(1, partner, -math.inf)
        return (negatives - scores.gather(1, partner)).exp().sum(1).log1p().sum() / n

    exact = value_and_gradients(by_differences, *doubles(z1, z2))
    ours = value_and_gradients(info_nce, z1.requires_grad_(), z2.requires_grad_(), temperature, backend="cpu")
    assert exact[0] < 0.2
    for mine, true in zip(ours, exact, strict=True):
        assert (mine.double() - true).norm() <= bound / min(1, 5 * temperature) * true.norm()


@pytest.mark.parametrize("temperature", [0.01, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_video_has_no_negatives(dtype, temperature):
    for d in (1, 6, 40):
        loss, *grads = value_and_gradients(info_nce, *features(1, d, dtype=dtype), temperature, backend="cpu")
        assert loss == 0 and all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("temperature", [0.02, 0.3])
def test_gradcheck(temperature):
    torch.autograd.gradcheck(lambda *z: info_nce(*z, temperature, backend="cpu"), features(4, 3, dtype=torch.float64))


def test_gradcheck_over_tiles():
    """260 videos are three pairs of tiles; along a few directions."""
    z = features(260, 3, dtype=torch.float64)
    torch.autograd.gradcheck(lambda *z: info_nce(*z, 0.3, backend="cpu"), z, fast_mode=True)


@pytest.mark.parametrize("temperature, agree", [(1e-4, True), (1e-4, False), (1e4, True)])
def test_extreme_temperatures(temperature, agree):
    """Scores of ±10^4 neither overflow nor lose the answer; scores of ±10^-4 give all 2n - 1 features the same share."""
    z1, z2 = torch.eye(4).requires_grad_(), (torch.eye(4) if agree else -torch.eye(4)).requires_grad_()
    loss, *grads = value_and_gradients(info_nce, z1, z2, temperature, backend="cpu")
    expected = 2 * math.log(7) if temperature > 1 else 0 if agree else 2 * (1e4 + math.log(6))
    assert loss.item() == pytest.approx(expected, rel=1e-3, abs=1e-6)  # 7 shares differ by exp(1e-4)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("temperature", [0.01, 0.0313, 0.2])
@pytest.mark.parametrize("n", [4, 300])
def test_negatives_nearer_than_the_partner(n, temperature):
    """exp(score - partner's score) up to exp(2 / γ) in every term."""
    z1 = torch.ones(n, 8, dtype=torch.float64).requires_grad_()
    z2 = (-torch.ones(n, 8, dtype=torch.float64)).requires_grad_()
    loss = info_nce(z1, z2, temperature, backend="cpu")
    most = 2 / temperature
    assert loss.item() == pytest.approx(2 * (most + math.log(n - 1 + n * math.exp(-most))), rel=1e-12)
    assert info_nce(z1.float(), z2.float(), temperature, backend="cpu").item() == pytest.approx(loss.item(), rel=1e-6)


def test_zero_and_tiny_features():
    """A length below 1e-12 counts as 1e-12, as in F.normalize: the gradient is not projected there."""
    z1, z2 = (z.detach() for z in features(3, 4))
    z1[1] = 0
    z2[2] *= 1e-14
    z = z1.requires_grad_(), z2.requires_grad_()
    got, expected = (value_and_gradients(info_nce, *z, backend=backend) for backend in ("cpu", "reference"))
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.isfinite().all()
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # float32 sums in another order


@pytest.mark.parametrize("length, dtype", LENGTHS)
def test_length_does_not_matter(length, dtype):
    length_does_not_matter(length, dtype, "cpu")


@pytest.mark.parametrize("length", [1e-42, 1e-20, 1e-13])
def test_short_features_count_as_longer_ones(length):
    short_features_count_as_longer_ones(length, "cpu")


@pytest.mark.parametrize("temperature", [0.01, 0.2])
def test_nan_is_not_hidden(temperature):
    """Training must see that its features broke."""
    z1, z2 = (z.detach() for z in features(5, 4))
    z2[3, 1] = math.nan
    results = value_and_gradients(info_nce, z1.requires_grad_(), z2.requires_grad_(), temperature, backend="cpu")
    assert all(x.isnan().any() for x in results)


@pytest.mark.parametrize("temperature", [1 / 128, 0.25])
def test_same_bits_for_any_number_of_threads(temperature):
    """Scores are multiples of 1/4, so that torch's own products are exact in any order; not so in backward."""
    z = [(torch.randint(2, (300, 4), generator=torch.Generator().manual_seed(i)) - 0.5).requires_grad_() for i in (1, 2)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 5):
            torch.set_num_threads(threads)
            results.append(value_and_gradients(info_nce, *z, temperature, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for loss, *grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        for a, b in zip(grads, results[0][1:], strict=True):
            assert_close(a, b, rtol=1e-5, atol=1e-8)
    assert all(torch.equal(a, b) for a, b in zip(results[2], results[3], strict=True))


# --- a learned temperature --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.02, 0.2, 3.0])  # two ways of summing
@pytest.mark.parametrize("n, d", [(1, 6), (5, 16), (257, 33)])
def test_learned_temperature(n, d, temperature):
    is_learned(*features(n, d), temperature, "cpu")


@pytest.mark.parametrize("temperature", [0.003, 0.2])
def test_temperature_in_float64(temperature):
    z1, z2 = (z.detach() for z in features(65, 8, dtype=torch.float64))
    z1[1] = 0  # nothing is taken out of its gradient
    call = z1.requires_grad_(), z2.requires_grad_(), temperature
    for ours, true in zip(with_temperature(*call, backend="cpu"), with_temperature(*call, backend="reference"), strict=True):
        assert_close(ours, true, rtol=EXACT["rtol"], atol=EXACT["atol"] / temperature**2)


@pytest.mark.parametrize("temperature", [-0.2, -0.001, 0.0, math.nan])
def test_a_temperature_gone_astray_is_no_crash(temperature):
    """A learned one may have become anything: the definition's number, or NaN."""
    z = [x.detach() for x in features(5, 4)]
    ours, theirs = (info_nce(*z, torch.tensor(temperature), backend=backend) for backend in ("cpu", "reference"))
    assert ours.isnan() or not theirs.isfinite() or ours == pytest.approx(theirs.item(), rel=1e-5)
    assert not temperature < 0 or ours.isfinite()


@on_any_processor
def test_temperature_compiles_whole():
    compiled = torch.compile(lambda *x: info_nce(*x, backend="cpu"), fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 8):
        leaves = (*features(n, 6), torch.tensor(0.2, requires_grad=True))
        got, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, info_nce))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# --- the gathered form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
@pytest.mark.parametrize("m, d", [(1, 4), (3, 5), (33, 20), (260, 16)])
def test_rows_of_a_rank(m, d, temperature, dtype):
    """Three ranks' rows against everyone's: mean of the losses and sum of the gradients by autograd through the reference."""
    z = features(3 * m, d, dtype=dtype)
    upstream = torch.tensor([0.5, -1.0, 2.0], dtype=dtype)  # the ranks need not agree

    def by_reference(z1, z2):
        unit = [F.normalize(x, dim=1) for x in (z1, z2)]
        losses = [info_nce_reference(*(u[r * m : r * m + m] for u in unit), *unit, r * m, temperature) for r in range(3)]
        losses = torch.stack(losses)
        return losses.detach(), *torch.autograd.grad((losses * upstream).sum(), (z1, z2))

    packed = [pack(*(x.detach()[r * m : r * m + m] for x in z)) for r in range(3)]
    columns, inverse = (torch.cat(x) for x in zip(*packed, strict=True))
    got = [forward(columns, inverse, 2 * m * r, 2 * m, temperature) for r in range(3)]
    lse = torch.cat([x[1] for x in got])
    dz = [backward(upstream, columns, inverse, lse, 2 * m * r, 2 * m, temperature).chunk(2) for r in range(3)]
    ours = torch.stack([x[0] for x in got]), *(torch.cat(x) for x in zip(*dz, strict=True))
    exact = by_reference(*doubles(*z))
    for mine, theirs, true in zip(ours, by_reference(*z), exact, strict=True):
        floor = (1e-6 if dtype == torch.float32 else 1e-13) * (1 + 0.1 / temperature)  # of lse, as above
        assert (mine - true).norm() <= 2 * (theirs - true).norm() + floor * true.norm()
    scores = torch.cat([F.normalize(x.detach().double(), dim=1).unflatten(0, (3, m)) for x in z], 1).flatten(0, 1)
    scores = (scores @ scores.T / temperature).fill_diagonal_(-math.inf)
    assert_close(lse.double(), scores.logsumexp(1), rtol=1e-6, atol=1e-6)


# --- as torch ops -----------------------------------------------------------------------------------------------------


@on_any_processor
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows, ranks, offset", [(12, 1, 0), (4, 3, 4), (2, 1, 0)])
def test_opcheck(dtype, rows, ranks, offset):
    z1, z2 = (z.detach() for z in features(rows // 2 * ranks, 4, dtype=dtype))
    torch.library.opcheck(pack, (z1, z2))
    packed = pack(z1, z2)
    torch.library.opcheck(forward, (*packed, offset, rows, 0.2))
    lse = torch.cat([forward(*packed, rank * rows, rows, 0.2)[1] for rank in range(ranks)])
    call = (torch.full_like(lse[:ranks], 1.5), *packed, lse)
    torch.library.opcheck(backward, (*call, offset, rows, 0.2))
    torch.library.opcheck(learned, (*packed, torch.full_like(lse[0], 0.2), offset, rows))
    torch.library.opcheck(learned_backward, (*call, torch.full_like(lse[0], 0.2), offset, rows))


def test_packs():
    z1, z2 = (z.detach() for z in features(5, 4, dtype=torch.bfloat16))
    packed, inverse = pack(z1, z2)
    assert torch.equal(packed, torch.cat([z1, z2])) and packed.is_contiguous()
    assert_close(inverse, 1 / torch.cat([z1, z2]).float().norm(dim=1), rtol=1e-6, atol=0)


@on_any_processor
def test_compiles_whole():
    compiled = torch.compile(lambda *z: info_nce(*z, backend="cpu"), fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 8):
        z = features(n, 6)
        got, expected = value_and_gradients(compiled, *z), value_and_gradients(info_nce, *z, backend="cpu")
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


MEMORY = """
import resource, torch
from vimpac.ops import info_nce
torch.set_num_threads(1)
z = [torch.randn({n}, 16, requires_grad=True) for _ in range(2)]
info_nce(*(x[:600] for x in z), {temperature}, backend="cpu").backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
info_nce(*z, {temperature}, backend="cpu").backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_larger_tiles():
    """8200 rows: the first and the last 40 rows' logsumexp, and the gradient of both."""
    z1, z2 = (z.detach() for z in features(4100, 8))
    packed = pack(z1, z2)
    _, lse = forward(*packed, 0, 8200, 0.1)
    dz = backward(torch.ones(1), *packed, lse, 0, 8200, 0.1)
    unit = F.normalize(torch.cat([z1, z2]).double(), dim=1)
    me = torch.cat([torch.arange(40), torch.arange(8160, 8200)])
    partner = (me + 4100) % 8200
    scores = (unit[me] @ unit.T / 0.1).scatter(1, me[:, None], -math.inf)
    expected = scores.logsumexp(1)
    assert_close(lse[me].double(), expected, rtol=1e-6, atol=1e-6)
    weights = (scores - expected[:, None]).exp() + (scores - lse.double()).exp()
    g = weights @ unit - 2 * unit[partner]
    lengths = torch.cat([z1, z2])[me].double().norm(dim=1, keepdim=True)
    g = (g - unit[me] * (g * unit[me]).sum(1, keepdim=True)) / lengths / (4100 * 0.1)
    assert (dz[me] - g).norm() <= 1e-5 * g.norm()  # float32 sums of 8199 terms


@on_any_processor
@pytest.mark.parametrize("temperature", [0.01, 0.2])
def test_memory_is_linear(temperature):
    """Kilobytes that the process grows by: features take 0.3 MB, scores would take 100 MB."""
    ended = python(MEMORY.format(n=2500, temperature=temperature))
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 20_000


def test_says_why_it_cannot_run():
    z = torch.zeros(4, 2, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run this call: torch.float8_e4m3fn"):
        info_nce(z, z, backend="cpu")
