"""What selective checkpointing keeps, and that it never takes one tensor for another. (test_step.py: no gradient changes.)"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from extension import needs_compiler, needs_cpu
from vimpac.config import ModelConfig
from vimpac.model.backbone import Backbone
from vimpac.model.recompute import recomputed, recomputing

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = {"layers": 2, "width": 32, "heads": 4, "grid": (3, 4, 4), "vocab_size": 20, "head_width": 8, "dropout": 0.1}


def saved_units(backbone, tokens):
    """Storage in units of one [R, C] matrix that hooks see saved, parameters and small things left out."""
    from vimpac.model import recompute

    seen, real = {}, recompute._pack

    def note(x):
        packed = real(x) if recompute._recipes.get() is not None else x
        units = x.untyped_storage().nbytes() / (4 * rows * backbone.config.width)
        if isinstance(packed, torch.Tensor) and x.dtype == torch.float32 and (x.shape[0] == rows or units >= 1):
            seen[x.untyped_storage().data_ptr()] = units
            alive.append(x)
        return packed

    rows, alive = tokens.numel() + len(tokens), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute, "_pack", note)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            backbone.rows(tokens, False)
    return sum(seen.values())


@needs_cpu
@pytest.mark.parametrize("norm", ["post", "pre", "pre-vit"])
def test_what_a_layer_keeps(norm):
    """C a row and layer, counted as a difference of layers. Post-norm: what blocks read, q, k, v and GELU's input, 13; all
    would add attention's outputs and GELU's, 19. Pre-norm: sums of the residual stream too, 3 more."""
    counts = {}
    for mode in ("none", "selective"):
        sizes = []
        for layers in (1, 3):
            torch.manual_seed(0)
            backbone = Backbone(ModelConfig(**{**MODEL, "layers": layers, "norm": norm}))
            backbone.activation_checkpointing = mode
            sizes.append(saved_units(backbone, torch.randint(20, (4, 3, 4, 4))))
        counts[mode] = (sizes[1] - sizes[0]) / 2
    more = 0 if norm == "post" else 3 + 2 / 32  # the first norm of a layer is torch's: mean and inverse deviation
    assert counts == {"none": pytest.approx(19 + more), "selective": pytest.approx(13 + more)}


@needs_cpu
@needs_compiler
def test_what_a_compiled_layer_keeps():
    """What blocks read 1 each, q, k, v 3 and the output 1 of an attention, GELU's input 4: 15; without checkpointing GELU's
    output 4 as well."""
    counts, gradients = {}, {}
    for mode in ("none", "selective"):
        sizes = []
        for layers in (1, 3):
            torch.compiler.reset()
            torch.manual_seed(0)
            backbone = Backbone(ModelConfig(**{**MODEL, "layers": layers}))
            backbone.activation_checkpointing = mode
            backbone.compile_parts()
            tokens = torch.randint(20, (4, 3, 4, 4))
            sizes.append(saved_units(backbone, tokens))
        torch.manual_seed(1)
        backbone.rows(tokens, False)[0].square().sum().backward()
        gradients[mode] = [p.grad for p in backbone.parameters()]
        counts[mode] = (sizes[1] - sizes[0]) / 2
    assert counts == {"none": pytest.approx(19), "selective": pytest.approx(15)}
    torch.testing.assert_close(gradients["selective"], gradients["none"])


def test_the_gradient_is_made_from_what_is_remade():
    """And made once, in backward; `function` runs twice in all."""
    calls = []

    def double(x):
        calls.append(torch.is_grad_enabled())
        return x * 2

    x, w = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    with recomputing():
        y = F.linear(recomputed(double, x), w)
    assert calls == [True]
    y.square().sum().backward()
    assert calls == [True, False]
    torch.testing.assert_close(w.grad, 2 * y.detach().T @ (2 * x.detach()))


def test_a_view_of_it():
    x, w = torch.randn(4, 2, 3, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    with recomputing():
        y = F.linear(recomputed(torch.exp, x).flatten(1), w)
    y.sum().backward()
    torch.testing.assert_close(w.grad, x.detach().exp().flatten(1).sum(0).expand(5, -1))


def test_another_tensor_in_the_same_memory():
    """A recomputed tensor may be freed; another tensor at its address is stored as it is."""
    x, memory = torch.randn(64, requires_grad=True), torch.empty(64)

    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return memory.view(64).copy_(x.exp())

        @staticmethod
        def backward(ctx, grad):
            return grad

    with recomputing():
        gone = recomputed(Exp.apply, x)
        assert gone.data_ptr() == memory.data_ptr()
        del gone
        other = memory.view(64).fill_(3.0)
        (x * other).sum().backward()
    assert (x.grad == 3.0).all()


def test_a_part_of_it_is_kept():
    x = torch.randn(6, 4, requires_grad=True)
    with recomputing():
        y = recomputed(torch.exp, x)
        z = y[:3] * y[:3]  # starts at the same address
    z.sum().backward()
    torch.testing.assert_close(x.grad[:3], 2 * (2 * x.detach()[:3]).exp())
    assert (x.grad[3:] == 0).all()


def test_off():
    """Outside, when disabled, and without gradients."""
    calls = []

    def double(x):
        calls.append(1)
        return x * 2

    x, linear = torch.randn(2, 3, requires_grad=True), nn.Linear(3, 3)
    linear(recomputed(double, x)).sum().backward()
    with recomputing(enabled=False):
        linear(recomputed(double, x)).sum().backward()
    with torch.no_grad(), recomputing():
        linear(recomputed(double, x))
    assert len(calls) == 3


def test_a_forward_pass_without_backward_is_freed():
    """An op that keeps its own output, as torch's fused attention does, does not keep it from being freed."""
    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    with recomputing():
        out = F.scaled_dot_product_attention(q, q, q)
    memory = StorageWeakRef(out.untyped_storage())
    del out
    assert memory.expired()
