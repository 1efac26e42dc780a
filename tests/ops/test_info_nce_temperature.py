"""info_nce with a learned temperature: its gradient, its dtypes, and that its value is not read."""

import pytest
import torch
from info_nce_calls import EXACT, FLOAT32, features, is_learned, slot_backend, with_temperature
from torch.testing import assert_close

from vimpac.ops import info_nce


@pytest.fixture(scope="module", autouse=True)
def slot():
    with slot_backend():
        yield


@pytest.fixture(params=["reference", "slot"])
def backend(request):
    return request.param


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
