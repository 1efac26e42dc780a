"""The linear layer that goes through oneDNN in training: the same function as torch's, wherever it is used."""

import copy

import pytest
import torch
from torch import nn

from vimpac.config import ModelConfig
from vimpac.model import PretrainModel, linear
from vimpac.model.linear import Linear

needs_onednn = pytest.mark.skipif(
    not (linear.X86 and torch.backends.mkldnn.is_available()), reason="torch without oneDNN, or no x86 CPU"
)
# Of float32 sums of 96 to 257 products in another order: 3e-7 of the largest element seen.
CLOSE = {"rtol": 0, "atol": 3e-6}


def pair(inputs=96, outputs=160, bias=True):
    torch.manual_seed(0)
    ours = Linear(inputs, outputs, bias)
    theirs = nn.Linear(inputs, outputs, bias)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def convolved(function) -> bool:
    """Whether a function makes a convolution."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return any("conv" in event.name for event in profile.events())


@needs_onednn
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("rows", (1, 2, 257))
def test_values_and_gradients_are_torchs(rows, bias):
    ours, theirs = pair(bias=bias)
    x = torch.randn(rows, 96, requires_grad=True)
    upstream = torch.randn(rows, 160)
    results = []
    for layer in (ours, theirs):
        out = layer(x)
        assert out.is_contiguous()
        results.append([out, *torch.autograd.grad(out, (x, *layer.parameters()), upstream)])
    for got, expected in zip(*results, strict=True):
        scale = expected.detach().abs().max()
        torch.testing.assert_close(got / scale, expected / scale, **CLOSE)
    assert convolved(lambda: ours(x)) and not convolved(lambda: theirs(x))


@needs_onednn
def test_a_gradient_that_is_not_contiguous():
    ours, theirs = pair()
    x = torch.randn(40, 96, requires_grad=True)
    upstream = torch.randn(160, 40).t()
    got, expected = (torch.autograd.grad(layer(x), x, upstream)[0] for layer in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)  # sums of 160 products of size 0.1


@needs_onednn
def test_only_what_is_asked_for_is_computed():
    ours, _ = pair()
    ours.weight.requires_grad_(False)
    x = torch.randn(8, 96)
    ours(x).sum().backward()
    assert ours.weight.grad is None
    torch.testing.assert_close(ours.bias.grad, torch.full((160,), 8.0), rtol=0, atol=0)


@needs_onednn
def test_second_derivatives_and_torch_func():
    ours, theirs = pair()
    x = torch.randn(12, 96, requires_grad=True)
    seconds = []
    for layer in (ours, theirs):
        first = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
        seconds.append(torch.autograd.grad(first.square().sum(), (x, layer.weight)))
    for got, expected in zip(*seconds, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4 * float(expected.abs().max()))  # four products deep

    def loss(weights, layer, x):
        return torch.func.functional_call(layer, weights, (x,)).square().sum()

    for transform in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f), (None, None, 0))):
        each = x.detach() if transform is torch.func.grad else x.detach().view(3, 4, 96)
        got, expected = (transform(loss)(dict(layer.named_parameters()), layer, each) for layer in (ours, theirs))
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize(
    "case", ("evaluation", "float64", "bfloat16", "autocast", "three dimensions", "no rows", "strided", "compiled")
)
def test_where_it_is_torchs_own(case):
    ours, theirs = pair()
    x = torch.randn(6, 96)
    call = ours
    if case == "evaluation":
        ours.eval()
    elif case in ("float64", "bfloat16"):
        dtype = getattr(torch, case)
        ours.to(dtype), theirs.to(dtype)
        x = x.to(dtype)
    elif case == "three dimensions":
        x = x.view(2, 3, 96)
    elif case == "no rows":  # a convolution refuses them
        x = x[:0]
    elif case == "strided":
        x = x.t().contiguous().t()
    elif case == "compiled":
        call = torch.compile(ours, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        call(x)
        assert not convolved(lambda: call(x))
        torch.testing.assert_close(call(x), theirs(x), rtol=0, atol=0)


@needs_onednn
def test_the_layers_of_a_model_use_it_in_training():
    model = PretrainModel(ModelConfig(layers=1, width=32, heads=4, grid=(2, 4, 4), vocab_size=20, head_width=8, head_out=8))
    tokens = torch.randint(20, (2, 2, 4, 4))
    assert convolved(lambda: model.backbone(tokens))
    assert not convolved(lambda: copy.deepcopy(model).eval().backbone(tokens))
