"""Snapshots of the released program, made from models of ours."""

import torch

from vimpac.released import released_names


def released(model):
    """A state dict under the released names that `from_authors` should turn into this model."""
    state = {}
    for ours, parts in released_names(model).items():
        for part, x in zip(parts, model.state_dict()[ours].chunk(len(parts)), strict=True):
            state[part] = x.clone()
    state["backbone.positional_embedding.cls_pos_embedding"].unsqueeze_(0)
    return state


def drawn(model, seed=0):
    """The model in evaluation mode, with no two parameters alike: a fresh one's biases are all 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def outputs(model, tokens):
    """All that a model computes from tokens."""
    with torch.no_grad():
        cls, hidden = model.backbone(tokens)
        heads = (model(tokens),) if hasattr(model, "classifier") else (model.token_head(hidden), model.cls_head(cls))
    return [cls, hidden, *heads]


class RunsCode:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return open, (self.proof, "w")
