"""The Triton kernel of block_mask, bit for bit: on a GPU, in the interpreter, and compiled for three architectures."""

import pytest
import torch
from test_block_mask import DTYPES, GRIDS, OPTIONS, SAMPLES, SEEDS, assert_same, clips

from kernel_checks import (
    ARCHITECTURES,
    DEVICE,
    NATIVE,
    check_binary,
    compile_kernel,
    not_interpreted,
    poison_new_tensors,
    run_in_interpreter,
    runs_kernels,
)
from vimpac.ops import block_mask, dispatch

pytest.importorskip("triton", reason="triton is not installed")


def test_in_the_interpreter():
    run_in_interpreter(__file__)


@pytest.fixture
def kernels(monkeypatch):
    """The kernel's module, with no state left from other tests and outputs full of wrong values."""
    from vimpac.kernels import block_mask as module

    monkeypatch.setattr(module, "STATES", {})
    poison_new_tensors(monkeypatch)
    return module


def check(tokens, ids, seed, **options):
    expected = block_mask(tokens, ids, seed, backend="reference", **options)
    assert_same(block_mask(tokens, ids, seed, backend="triton", **options), expected)
    return expected


@runs_kernels
def test_leaves_its_state_as_it_was(kernels):
    """What the programs tell one another is zero again after every call, for calls of other sizes too.

    The first test of the kernel: with a state that is not zero the programs of all others would wait for ever.
    """
    for B in (5, 40, 2, 5):
        check(clips(B, (2, 3, 4), DEVICE), torch.arange(B, device=DEVICE), B)
        (state,) = kernels.STATES.values()
        assert state.numel() == kernels.PROGRAMS + 2 and not state.any()


@runs_kernels
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("grid", GRIDS)
def test_is_the_reference(grid, options, kernels):
    ids = torch.tensor(SAMPLES, device=DEVICE)
    sizes = (5, 1, 0) if grid != (10, 32, 32) else (2,)
    for B, seed in zip(sizes, reversed(SEEDS), strict=False):
        check(clips(B, grid, DEVICE), ids[:B], seed, **options)


@runs_kernels
@pytest.mark.parametrize("B", [3, 4, 5, 11])
def test_several_clips_a_program(B, kernels, monkeypatch):
    """Up to 4 programs: every split of the clips over them, indices that go on where the program before ended."""
    monkeypatch.setattr(kernels, "PROGRAMS", 4)
    tokens, ids = clips(B, (5, 6, 7), DEVICE), torch.arange(B, device=DEVICE)
    for options in ({}, {"ratio": 0.9}, {"ratio": 0.0}, {"ratio": 1.0}):
        result = check(tokens, ids, 3, **options)
        assert options.get("ratio") == 0.0 or (result.counts > 0).all()


@runs_kernels
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(
    "dtype, vocab_size",
    DTYPES,
)
def test_every_integer_dtype(dtype, vocab_size, noisy, kernels):
    tokens = clips(3, (2, 5, 6), DEVICE, torch.int64, vocab_size).to(dtype)
    check(tokens, torch.arange(3, device=DEVICE), 1, noisy=noisy, vocab_size=vocab_size)


@runs_kernels
@pytest.mark.parametrize("options", [{"noisy": True}, {"ratio": 0.5}])
def test_strides_do_not_matter(options, kernels):
    tokens = clips(4, (3, 5, 6), DEVICE)
    spread = torch.full((4, 3, 2, 5, 7, 3), -1, dtype=tokens.dtype, device=DEVICE)[:, :, 1, :, :6, 2].copy_(tokens)
    permuted = tokens.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    one = tokens[:1].expand(4, -1, -1, -1)
    for same in (spread, permuted, one, tokens.flip(0)[1:3]):
        ids = torch.arange(2 * len(same), device=DEVICE)[::2] - 3
        check(same, ids, 1, **options)
    check(tokens, torch.tensor(2**40, device=DEVICE).expand(4), 1, **options)


@runs_kernels
@pytest.mark.parametrize("options", [(5, None, True), (1, 0.4, False)])
def test_opcheck(options):
    tokens, ids = clips(4, (3, 5, 6), DEVICE), torch.arange(4, device=DEVICE)
    seed = torch.tensor(7, device=DEVICE)
    torch.library.opcheck(dispatch.overload("block_mask", "triton"), (tokens, ids, seed, *options, 8192))


@runs_kernels
def test_traces_whole_with_any_batch():
    def draw(tokens, ids, seed):
        return block_mask(tokens, ids, seed, 5, None, True, backend="triton")

    compiled = torch.compile(draw, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, seed in ((3, 5), (6, -(2**62))):
        tokens, ids = clips(B, (4, 5, 6), DEVICE), torch.arange(B, device=DEVICE)
        seed = torch.tensor(seed, device=DEVICE)
        assert_same(compiled(tokens, ids, seed), block_mask(tokens, ids, seed, 5, None, True, backend="reference"))


# --- on a GPU only ----------------------------------------------------------------------------------------------------

needs_a_gpu = pytest.mark.skipif(not NATIVE, reason="no CUDA device")


@pytest.mark.gpu
@needs_a_gpu
def test_more_clips_than_a_grid_dimension():
    check(clips(70_000, (2, 3, 4), DEVICE), torch.arange(70_000, device=DEVICE), 4)


@pytest.mark.gpu
@needs_a_gpu
def test_real_batches_one_after_the_other():
    """Every program waits for others; 20 times, since a race need not show at once."""
    tokens, ids = clips(512, (5, 16, 16), DEVICE, torch.int64), torch.arange(512, device=DEVICE)
    for seed in range(20):
        check(tokens, ids, seed)


@pytest.mark.gpu
@needs_a_gpu
def test_streams_do_not_meet(kernels):
    tokens, ids = clips(512, (5, 16, 16), DEVICE), torch.arange(512, device=DEVICE)
    streams, results = [torch.cuda.Stream() for _ in range(3)], []
    torch.cuda.synchronize()
    for seed in range(12):
        with torch.cuda.stream(streams[seed % 3]):
            results.append(block_mask(tokens, ids, seed, backend="triton"))
    torch.cuda.synchronize()
    assert len(kernels.STATES) == 3
    for seed, result in enumerate(results):
        assert_same(result, block_mask(tokens, ids, seed, backend="reference"))


@pytest.mark.gpu
@needs_a_gpu
def test_cuda_graph_draws_anew(kernels):
    """A replay reads the seed and the ids that are there then, and eager calls in between do not disturb it."""
    tokens, ids = clips(40, (5, 16, 16), DEVICE), torch.arange(40, device=DEVICE)
    seed = torch.tensor(1, device=DEVICE)
    block_mask(tokens, ids, seed, backend="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = block_mask(tokens, ids, seed, backend="triton")
    for value in (1, 2, -(2**40)):
        seed.fill_(value)
        ids += 7
        graph.replay()
        expected = check(tokens, ids, seed)
        assert_same(result, expected)


@pytest.mark.gpu
@needs_a_gpu
def test_reduce_overhead_and_its_pool(kernels):
    """torch.compile's own CUDA graphs, which check that no tensor keeps memory of their pool."""
    compiled = torch.compile(lambda *call: block_mask(*call, backend="triton"), fullgraph=True, mode="reduce-overhead")
    tokens, ids = clips(40, (5, 16, 16), DEVICE), torch.arange(40, device=DEVICE)
    for value in (1, 2, 3, 4):
        seed = torch.tensor(value, device=DEVICE)
        torch.compiler.cudagraph_mark_step_begin()
        assert_same(compiled(tokens, ids, seed), block_mask(tokens, ids, seed, backend="reference"))


# --- without a GPU ----------------------------------------------------------------------------------------------------


@not_interpreted
def test_says_why_it_cannot_run():
    tokens = torch.zeros(1, 1, 1, 1025, dtype=torch.uint32)
    with pytest.raises(ValueError, match=r"torch.uint32, it takes int64.*W of 1025, it takes up to 1024; vocab_size of"):
        block_mask(tokens, torch.zeros(1, dtype=torch.int64), 0, vocab_size=2**31 - 4, backend="triton")


TYPES = {
    "sample_ids": "*i64",
    "seed": "*i64",
    "mask": "*i1",
    "indices": "*i64",
    "counts": "*i64",
    "state": "*i64",
    "B": "i32",
    "n_blocks": "i32",
    "threshold": "i64",
    "strides": ("i32",) * 3,
    "s_sample": "i32",
}


@not_interpreted
@pytest.mark.parametrize(
    "grid, dtype, ratio, noisy",  # Table 2's grids
    [
        ((5, 16, 16), "*i64", None, False),
        ((5, 16, 16), "*i16", 0.15, True),
        ((5, 32, 32), "*i16", None, True),
        ((10, 16, 16), "*i64", None, True),
        ((10, 32, 32), "*i64", None, False),
        ((10, 32, 32), "*i16", None, False),
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills(architecture, grid, dtype, ratio, noisy):
    from vimpac.kernels import block_mask as kernels

    constants = {"CONST": kernels.constants(grid, 5, ratio is not None, noisy, 8192), "s_w": 1}
    types = {"tokens": dtype, "new": dtype} | TYPES
    binary = compile_kernel(kernels._draw, architecture, types, constants, kernels.OPTIONS)
    check_binary(binary, architecture, matrix=False)
    registers = int(binary.usage.split("REG:")[1].split()[0])
    assert registers <= 128  # 4 programs of 128 threads on a multiprocessor
    assert "mul.hi.s32" not in binary.ptx and "mul.hi.u32" in binary.ptx  # Philox's words are unsigned
    assert "ld.volatile.global" in binary.ptx and binary.ptx.count("atom.global.gpu") == 3
