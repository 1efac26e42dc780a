"""One update of fine-tuning against the released program and against plain formulas."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from golden_files import TOLERANCE, distance, load, released_weights
from vimpac.config import FinetuneConfig, ModelConfig
from vimpac.data.format import StoreSettings, TokenizerInfo
from vimpac.data.labelled import LabelledVideos
from vimpac.data.labelled_clips import LabelledClips
from vimpac.data.store import StoreWriter, TokenStore, finish_store
from vimpac.distributed import World
from vimpac.model import ClassificationModel
from vimpac.released import from_authors, released_names
from vimpac.training.batch import LabelledBatch
from vimpac.training.finetune_step import FinetuneStep
from vimpac.training.finetune_task import balanced_weights, finetuning_loop, layer_scale
from vimpac.training.optim import adamw
from vimpac.training.plan import Schedule, plan_classification
from vimpac.weights import Training

CPU = World(0, 1, torch.device("cpu"))
CONFIG = ModelConfig(layers=2, width=32, heads=4, grid=(4, 4, 4), dropout=0.0)


@pytest.fixture
def released_clips(tmp_path):
    """The released step's six clips as the videos of a store, which are shorter where the clips end in PAD."""
    golden = load("finetune")
    writer = StoreWriter(tmp_path / "store", StoreSettings(TokenizerInfo("dalle", 8192, 8, "d" * 64), 2.0, 32))
    for i, clip in enumerate(golden["in/codes"]):
        frames = int((clip != CONFIG.pad_id).flatten(1).all(1).sum())
        assert (clip[frames:] == CONFIG.pad_id).all()
        writer.add(f"{i}.mp4", clip[None, :frames].numpy())
    writer.close()
    finish_store(tmp_path / "store")
    videos = LabelledVideos(np.arange(6), golden["in/labels"].numpy())
    return LabelledClips(TokenStore(tmp_path / "store"), videos, [0], 4, CONFIG.pad_id, seed=3)


@pytest.mark.parametrize("micro_batch", [6, 2])
def test_an_update_is_the_released_programs(released_clips, tmp_path, micro_batch):
    """Through the store, the sampler, the task and the loop: loss and gradients, with and without accumulation."""
    golden = load("finetune")
    model = from_authors(released_weights(golden), CONFIG)
    options = {"output": str(tmp_path), "batch_size": 6, "micro_batch": micro_batch, "grad_clip": 1e9, "start": "none"}
    config = FinetuneConfig(**options, model=CONFIG, precision="fp32", activation_checkpointing="none")
    plan = plan_classification(6, micro_batch, 1)
    training = Training(class_names=tuple("abcde"))
    loop = finetuning_loop(config, model, training, released_clips, lambda step: None, plan, Schedule(1, 1), CPU)
    loop.module.train()
    metrics = loop.update()
    assert released_clips.padded and distance(metrics["loss"], golden["out/loss"]) < TOLERANCE
    right = (golden["out/logits"].argmax(-1) == golden["in/labels"]).float().mean()
    assert float(metrics["accuracy"]) == pytest.approx(float(right))
    names = released_names(model)
    for name, parameter in model.named_parameters():
        released = torch.cat([golden[f"grad/{part}"] for part in names[name]]).reshape(parameter.shape)
        assert distance(parameter.grad, released) < TOLERANCE, name


def small_batch(seed: int = 0) -> LabelledBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(8192, (8, 4, 4, 4), generator=generator)
    return LabelledBatch(tokens, torch.randint(3, (8,), generator=generator))


def classifier(seed: int = 0) -> ClassificationModel:
    torch.manual_seed(seed)
    model = ClassificationModel(CONFIG, 3)
    torch.nn.init.normal_(model.classifier.weight)
    return model


def test_class_weights_and_label_smoothing():
    """The loss by its formula. Halves of the batch average to the whole."""
    batch, model, weights = small_batch(), classifier(), torch.tensor([0.5, 2.0, 1.0])
    step = FinetuneStep(model, False, weights, label_smoothing=0.2)
    found = step(batch)["loss"]
    log = model(batch.tokens, False).log_softmax(-1)
    target = 0.8 * F.one_hot(batch.labels, 3) + 0.2 / 3
    expected = -(target * log * weights).sum(-1).mean()
    torch.testing.assert_close(found, expected)
    halves = [step(LabelledBatch(*(x[part] for x in batch)))["loss"] for part in (slice(4), slice(4, 8))]
    torch.testing.assert_close(sum(halves) / 2, expected)


def test_balanced_weights():
    found = balanced_weights(np.array([0, 0, 0, 1, 3, 3]), 4)
    torch.testing.assert_close(found, torch.tensor([6 / (4 * 3), 6 / 4, 0.0, 6 / (4 * 2)]))


def test_a_frozen_backbone_has_neither_gradients_nor_dropout():
    model = ClassificationModel(ModelConfig(layers=1, width=32, heads=4, grid=(4, 4, 4), dropout=0.5), 3)
    torch.nn.init.normal_(model.classifier.weight)
    step = FinetuneStep(model, False, freeze_backbone=True).train()
    first, second = (step(small_batch())["loss"] for _ in range(2))
    assert torch.equal(first, second)
    first.backward()
    assert all(p.grad is None for p in model.backbone.parameters()) and model.classifier.weight.grad is not None
    assert not torch.equal(*(FinetuneStep(model, False).train()(small_batch())["loss"] for _ in range(2)))


def test_last_dropout_is_of_cls():
    model = classifier()
    step = FinetuneStep(model, False, last_dropout=0.5).train()
    assert not torch.equal(step(small_batch())["loss"], step(small_batch())["loss"])
    assert torch.equal(step.eval()(small_batch())["loss"], step(small_batch())["loss"])


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_layer_decay(norm):
    """Every parameter's rate, as a multiple of the classifier's."""
    model = ClassificationModel(ModelConfig(layers=2, width=32, heads=4, grid=(4, 4, 4), norm=norm), 3)
    optimizer = adamw(model, 0.01, (0.9, 0.999), 1e-8, rate_scale=layer_scale(0.5, 2))
    found = {name: group["rate_scale"] for group in optimizer.param_groups for name in group["param_names"]}
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, scale in found.items():
        layer = {"backbone.layers.0": 0.25, "backbone.layers.1": 0.5}.get(".".join(name.split(".")[:3]))
        top = name.startswith(("classifier", "backbone.final_norm"))
        assert scale == (layer or (1.0 if top else 0.125)), name
    plain = adamw(model, 0.01, (0.9, 0.999), 1e-8)
    assert [group["weight_decay"] for group in plain.param_groups] == [0.01, 0.0]


@pytest.mark.parametrize(
    "batch, micro, ranks, expected", [(128, None, 1, (128, 1)), (128, 4, 8, (4, 4)), (1200, None, 2, (120, 5))]
)
def test_plans(batch, micro, ranks, expected):
    plan = plan_classification(batch, micro, ranks)
    assert (plan.micro_batch, plan.micro_steps, plan.parts) == (*expected, 1)
    assert plan.micro_batch * plan.micro_steps * ranks == batch and math.gcd(batch, ranks) == ranks
