"""What the tests of info_nce share: Eq. 5 as loops, inputs, a backend for a kernel to come, and checks of any backend."""

import math
from contextlib import contextmanager

import torch
from torch.testing import assert_close

from vimpac.ops import dispatch, info_nce
from vimpac.ops.info_nce import SCHEMAS, packed_dtype

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


SLOT = slot_pack, slot_forward, slot_backward, slot_learned, slot_learned_backward
for _name, _function in zip(SCHEMAS, SLOT, strict=True):
    dispatch.define_overload(_name, "slot", *SCHEMAS[_name])
    dispatch.implement(_name, "slot", "CompositeExplicitAutograd", _function)


@contextmanager
def slot_backend():
    """A backend "slot" behind its own overloads, as a kernel would come."""
    dispatch.register("info_nce", "slot", dispatch.always)
    yield
    del dispatch._REGISTRY["info_nce"]["slot"]


# --- checks of any backend --------------------------------------------------------------------------------------------


LENGTHS = [(2e-12, torch.float32), (1e-6, torch.float32), (1e15, torch.float32), (5e16, torch.float32), (1e148, torch.float64)]


def length_does_not_matter(length, dtype, backend):
    """Gradients shrink as the features grow, in the whole range that the docstring names."""
    expected = value_and_gradients(info_nce, *features(6, 5, dtype=dtype), backend=backend)
    loss, *grads = value_and_gradients(info_nce, *features(6, 5, dtype=dtype, length=length), backend=backend)
    assert_close(loss, expected[0], **FLOAT32)
    for ours, true in zip(grads, expected[1:], strict=True):
        assert_close(ours * length, true, **FLOAT32)


def short_features_count_as_longer_ones(length, backend):
    """Of 1e-12, whatever they are, down to numbers that float32 has not many digits of."""
    z1, z2 = (z.detach().requires_grad_() for z in features(6, 5, length=length))
    exact = value_and_gradients(info_nce, *(z.detach().double().requires_grad_() for z in (z1, z2)), backend="reference")
    for ours, true in zip(value_and_gradients(info_nce, z1, z2, backend=backend), exact, strict=True):
        assert_close(ours.double(), true, rtol=1e-5, atol=1e-5 * float(true.detach().abs().max()))  # float32 sums of 11 terms


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
