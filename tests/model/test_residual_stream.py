"""The residual stream in autocast's dtype: what is passed on, and that nothing is lost by it."""

import copy

import pytest
import torch

from extension import needs_cpu
from vimpac.config import ModelConfig
from vimpac.model import PretrainModel
from vimpac.model.losses import contrastive_loss, mask_loss

pytestmark = [needs_cpu, pytest.mark.usefixtures("one_thread")]
CONFIG = {"layers": 3, "width": 64, "heads": 4, "grid": (3, 4, 4), "vocab_size": 100, "head_width": 128, "head_out": 32}


def model_of(norm="post"):
    torch.manual_seed(0)
    return PretrainModel(ModelConfig(**CONFIG, dropout=0.0, norm=norm)).train()


def gradients(model, tokens, residual, autocast):
    model = copy.deepcopy(model)
    model.backbone.residual = residual
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        cls, hidden = model.backbone(tokens)
        states = hidden.flatten(0, 3)[::5]
        loss = mask_loss(model, states, tokens.flatten()[::5])[0] + 0.2 * contrastive_loss(model, cls, 0.2)
    loss.backward()
    found = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
    return cls.detach().double(), found


def test_is_as_exact_as_float32_states():
    """Of the same bfloat16 products: [CLS]'s differences between clips, and all gradients, against float64.

    The errors are those of the products, and differ by chance: a factor of 1.5. With [CLS] rounded from layer to layer the
    first is 13 times larger.
    """
    model, tokens = model_of(), torch.randint(100, (16, 3, 4, 4), generator=torch.Generator().manual_seed(1))
    exact_cls, exact = gradients(model.double(), tokens, "auto", False)
    model.float()
    errors = []
    for residual in ("auto", "fp32"):
        cls, found = gradients(model, tokens, residual, True)
        difference = (cls - cls.mean(0)) - (exact_cls - exact_cls.mean(0))
        errors.append([float(difference.norm()), float((found - exact).norm())])
    for narrow, wide in zip(*errors, strict=True):
        assert narrow < 1.5 * wide


@pytest.mark.parametrize(
    "norm, residual, dtype",
    [("post", "auto", torch.bfloat16), ("post", "fp32", torch.float32), ("pre", "auto", torch.float32)],
)
def test_dtype_between_layers(norm, residual, dtype):
    model, seen = model_of(norm), []
    model.backbone.residual = residual
    for layer in model.backbone.layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        cls, hidden = model.backbone(torch.randint(100, (2, 3, 4, 4)))
    assert seen == 3 * [dtype] and hidden.dtype == dtype and cls.dtype == torch.float32
    cls, hidden = model.backbone(torch.randint(100, (2, 3, 4, 4)))
    assert cls.dtype == hidden.dtype == torch.float32


def test_small_norm_weights_keep_the_sum():
    """What backward reads is chosen when weights are loaded: a norm's output, but its input if a weight is small."""
    model = model_of()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    state["backbone.layers.1.mlp.norm.weight"][3] = 0.0
    model.load_state_dict(state)
    blocks = [block for layer in model.backbone.layers for block in (*layer.attention, layer.mlp)]
    assert [block.keeps_output for block in blocks] == [True] * 5 + [False] + [True] * 3
    model.load_state_dict(state | {"backbone.layers.1.mlp.norm.weight": torch.ones(64)})
    assert all(block.keeps_output for block in blocks)
