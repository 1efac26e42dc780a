"""The model around its Triton kernels: compiled whole, exported, under autocast, in CUDA graphs, and 50 updates of training.

On a GPU as it is; in the interpreter smaller, with the compiler's code generation left out (aot_eager).
"""

import pytest
import torch
from torch.testing import assert_close

from kernel_checks import DEVICE, INTERPRETED, NATIVE, run_in_interpreter, runs_kernels
from runs import make_step
from vimpac.config import ModelConfig, PretrainConfig
from vimpac.model import PretrainModel
from vimpac.ops import axial_attention_packed, info_nce, masked_cross_entropy
from vimpac.training.batch import map_tensors

pytest.importorskip("triton", reason="triton is not installed")

MODEL = ModelConfig(
    layers=1, width=32, heads=2, grid=(2, 2, 2), dropout=0.0, head_layers=2, head_width=16, head_out=16, vocab_size=20
)
COMPILER = "inductor" if NATIVE else "aot_eager"
VIDEOS = 4 if NATIVE else 2  # of an update; a clip takes the interpreter most of a second, forward and backward
# A fresh model's [CLS] states differ by a thousandth of their size; batch norm magnifies their rounding a thousand times.
ROUNDED = {"rtol": 2e-4, "atol": 2e-5}


@pytest.fixture
def kernels(monkeypatch):
    """Every op runs its Triton kernel, and nothing else may."""
    monkeypatch.setenv("VIMPAC_BACKEND", "triton")


def model(config=MODEL, scale=10.0):
    """Weights ten times the usual size: [CLS] states that differ by more than rounding."""
    torch.manual_seed(0)
    model = PretrainModel(config)
    with torch.no_grad():
        for p in model.backbone.parameters():
            if p.ndim > 1:
                p.mul_(scale)
    return model.to(DEVICE)


def tokens(clips, config=MODEL, seed=0):
    ids = torch.randint(config.vocab_size, (clips, *config.grid), generator=torch.Generator().manual_seed(seed))
    ids[::2, -1] = config.pad_id
    return ids.to(DEVICE)


def losses(model, ids):
    """Both losses of the model, every position predicted."""
    cls, hidden = model.backbone(ids)
    head = model.token_head
    loss, accuracy = masked_cross_entropy(head.transform(hidden.flatten(0, 3)), head.decoder, head.bias, ids.flatten())
    return loss, accuracy, info_nce(*model.cls_head(cls).chunk(2))


def losses_and_gradients(function, model, ids):
    loss, accuracy, contrastive = function(model, ids)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [loss, accuracy, contrastive, *torch.autograd.grad(loss + contrastive, parameters, allow_unused=True)]


def assert_all_close(actual, expected, rtol, atol):
    """atol: of the largest value of all, since a bias in front of batch norm has a gradient of nothing but roundings."""
    largest = max(x.abs().max().item() for x in expected if x is not None)
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, rtol=rtol, atol=atol * largest)


def test_in_the_interpreter():
    run_in_interpreter(__file__)


@runs_kernels
def test_compiles_whole_for_any_batch(kernels, monkeypatch):
    """No graph break forward or backward, one compilation for every batch size, the reference's losses and gradients."""
    torch.compiler.reset()
    net = model()
    compiled = torch.compile(losses, fullgraph=True, dynamic=True, backend=COMPILER)
    for clips in (4, 6):
        with torch.compiler.set_stance("default" if clips == 4 else "fail_on_recompile"):
            got = losses_and_gradients(compiled, net, tokens(clips))
        with monkeypatch.context() as patch:
            patch.setenv("VIMPAC_BACKEND", "reference")
            assert_all_close(got, losses_and_gradients(losses, net, tokens(clips)), **ROUNDED)


@runs_kernels
def test_backbone_exports(kernels):
    """torch.export keeps the kernels as ops of the graph, and the program takes any batch."""
    backbone = model().backbone.eval()
    batch = torch.export.Dim("batch", min=2, max=1024)
    program = torch.export.export(backbone, (tokens(4),), dynamic_shapes={"tokens": {0: batch}})
    assert "vimpac.axial_attention.triton" in program.graph_module.code
    with torch.no_grad():
        for clips in (4, 7):
            assert_all_close(program.module()(tokens(clips)), backbone(tokens(clips)), rtol=0, atol=0)


@runs_kernels
def test_autocast(kernels, monkeypatch):
    """In half precision the losses are as far from float32's as the reference backends' are, to a factor of two."""
    dtype = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter's bfloat16 arithmetic is wrong
    net, ids = model(scale=3.0), tokens(8)

    def run(backend, autocast):
        monkeypatch.setenv("VIMPAC_BACKEND", backend)
        with torch.autocast(DEVICE.type, dtype, enabled=autocast):
            out = losses(net, ids)
        return torch.stack([out[0], out[2]]).detach().double()

    exact, ours, plain = run("reference", False), run("triton", True), run("reference", True)
    # + two roundings of the hidden states, since either error may be luck
    assert ((ours - exact).abs() <= 2 * (plain - exact).abs() + 4 * torch.finfo(dtype).eps * exact.abs()).all()


def batch(step, ids, sample_ids):
    """As the loader makes it: on the CPU, then copied."""
    return map_tensors(step.batch(ids.cpu(), sample_ids), lambda x: x.to(DEVICE))


def train(backend, updates, monkeypatch, dtype=None):
    """Losses of some updates of AdamW on the same clips and masks, with dropout 0.1."""
    monkeypatch.setenv("VIMPAC_BACKEND", backend)
    config = PretrainConfig(
        model=ModelConfig(**{**vars(MODEL), "dropout": 0.1}), batch_size=VIDEOS, contrastive_videos=VIDEOS, steps=updates
    )
    step = make_step(config, True, dtype, model(config.model))
    optimizer = torch.optim.AdamW(step.parameters(), 1e-3, eps=1e-2)  # a large eps: signs of tiny gradients are rounding
    torch.manual_seed(1)
    history = []
    for i in range(updates):
        optimizer.zero_grad()
        clips = 2 * VIDEOS
        out = step(batch(step, tokens(clips, config.model, seed=i), torch.arange(clips) + clips * i))
        out["loss"].backward()
        optimizer.step()
        history.append(torch.stack([out["mask_loss"], out["contrastive_loss"]]).detach())
    return torch.stack(history)


@runs_kernels
def test_training_gives_the_references_losses(monkeypatch):
    """50 updates (5 in the interpreter), the same elements dropped, in float32: within 1e-4, sums in another order."""
    updates = 50 if NATIVE else 5
    assert_close(train("triton", updates, monkeypatch), train("reference", updates, monkeypatch), rtol=1e-4, atol=1e-5)


@runs_kernels
def test_training_in_half_precision_is_as_far_from_float32s_as_the_references(monkeypatch):
    """50 updates in bfloat16 (3 in float16 in the interpreter). In so small a model batch norm makes much of a rounding: the
    reference's contrastive loss in bfloat16 is up to 1.1 from float32's (on a CPU), so losses in half precision are compared by
    their mean distance from those, to a factor of two and a rounding."""
    updates, dtype = (50, torch.bfloat16) if NATIVE else (3, torch.float16)  # the interpreter's bfloat16 arithmetic is wrong
    exact = train("reference", updates, monkeypatch)
    ours, theirs = ((train(backend, updates, monkeypatch, dtype) - exact).abs().mean(0) for backend in ("triton", "reference"))
    assert (ours <= 2 * theirs + torch.finfo(dtype).eps * exact.abs().mean(0)).all()


@runs_kernels
def test_kernels_are_the_default_on_a_gpu(monkeypatch):
    """Without a name, training runs kernels of ours where tensors are on a GPU (or the interpreter is on)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.delenv("VIMPAC_BACKEND", raising=False)
    ran = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "vimpac":
                ran.add(str(func).removeprefix("vimpac."))
            return func(*args, **(kwargs or {}))

    config = PretrainConfig(model=MODEL, batch_size=VIDEOS, contrastive_videos=VIDEOS, steps=1)
    step = make_step(config, True, model=model())
    with Names():
        step(batch(step, tokens(2 * VIDEOS), torch.arange(2 * VIDEOS)))["loss"].backward()
        step.masking.draw(tokens(8), torch.arange(8, device=DEVICE))
    on_the_host = {"block_mask.cpu", "block_mask.reference"}  # where a batch is made
    ran = [name.split(".") for name in ran - on_the_host]
    ops = {"axial_attention", "axial_attention_backward", "block_mask", "info_nce", "info_nce_backward", "masked_cross_entropy"}
    assert {op for op, _ in ran} >= ops
    assert {backend for _, backend in ran} <= {"triton", "cuda"}


@runs_kernels
def test_graph_replays_with_changing_seeds():
    """A captured forward and backward of the attention reads its seed anew at each replay."""
    if INTERPRETED:
        pytest.skip("CUDA graphs need a GPU")
    rows = torch.randn(4 * (2 * 16 * 16 + 1), 3, 4, 32, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    seed, call = torch.zeros((), dtype=torch.int64, device=DEVICE), ((2, 16, 16), ("H", "W"), None, 0.2)

    def run():
        out = axial_attention_packed(rows, *call, seed, backend="triton")
        return out, torch.autograd.grad(out, rows, torch.ones_like(out))[0]

    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        run()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for value in (3, 2**40 + 1, -5):
        seed.fill_(value)
        graph.replay()
        for a, b in zip(captured, run(), strict=True):
            assert torch.equal(a, b)
