"""The CUDA kernel of block_mask, bit for bit: on the CPU's emulator, compiled for its architectures, and on a GPU."""

import ctypes
import re

import pytest
import torch
from test_block_mask import DTYPES, GRIDS, OPTIONS, SAMPLES, SEEDS, assert_same, clips

import nvcc
from extension import needs_gpu
from vimpac.ops import BlockMask, block_mask, dispatch
from vimpac.ops.block_mask import _word, longest_block
from warp_emulator import build, extent

# --- on a CPU: the kernel's threads as fibers, every access checked -----------------------------------------------------


class Arguments(ctypes.Structure):
    """tests/emulator/block_mask.cpp's struct of that name."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tokens", "sample_ids", "seed", "out", "mask", "indices", "counts", "state")),
        ("sizes", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4),
        *((name, ctypes.c_int64) for name in ("id_stride", "tokens_bytes", "ids_bytes", "bytes", "n_blocks", "vocab_size")),
        ("ratio", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("noisy", "blocks", "threads", "resident", "schedule")),
    )


class Emulator:
    """The kernel as a function of tensors on the CPU. blocks, threads: of the launch, 0 for its own. resident: blocks that run
    at a time, interleaved at random as the seed `schedule` decides; 1: one after another."""

    def __init__(self, folder):
        self.library = build("block_mask", folder)
        self.library.run.restype = ctypes.c_char_p
        self.library.state_size.restype = ctypes.c_int64
        for counter in (self.library.bytes_loaded, self.library.bytes_stored):
            counter.restype = ctypes.c_uint64
        self.state = torch.zeros(self.library.state_size(), dtype=torch.int64)

    def __call__(self, tokens, ids, seed, n_blocks=5, ratio=None, noisy=False, vocab_size=8192, **launch) -> BlockMask:
        new = BlockMask(
            torch.full(tokens.shape, 99, dtype=tokens.dtype),
            torch.full(tokens.shape, 99, dtype=torch.uint8),
            torch.full((tokens.numel(),), -99),
            torch.full((len(tokens),), -99),
        )
        seed = torch.tensor(seed)
        pointers = (x.data_ptr() for x in (tokens, ids, seed, *new, self.state))
        arguments = Arguments(
            *pointers,
            (ctypes.c_int64 * 4)(*tokens.shape),
            (ctypes.c_int64 * 4)(*tokens.stride()),
            ids.stride(0),
            extent(tokens),
            extent(ids),
            tokens.element_size(),
            n_blocks,
            vocab_size,
            -1.0 if ratio is None else ratio,
            noisy,
            *({"blocks": 0, "threads": 0, "resident": 1, "schedule": 0} | launch).values(),
        )
        if problem := self.library.run(ctypes.byref(arguments)).decode():
            raise RuntimeError(problem)
        assert not self.state.any()  # as the next launch needs it
        assert new.mask.max() <= 1
        return new._replace(mask=new.mask.bool())


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("emulator"))


def emulate(emulator, tokens, ids, seed, blocks=0, threads=0, resident=1, schedule=0, **options):
    launch = {"blocks": blocks, "threads": threads, "resident": resident, "schedule": schedule}
    result = emulator(tokens, ids, seed, **launch, **options)
    assert_same(result, block_mask(tokens, ids, seed, backend="reference", **options))
    return result


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("grid", GRIDS)
def test_is_the_reference(grid, options, emulator):
    ids = torch.tensor(SAMPLES)
    sizes = (5, 1) if grid != (10, 32, 32) else (2,)
    for B, seed in zip(sizes, reversed(SEEDS), strict=False):
        emulate(emulator, clips(B, grid), ids[:B], seed, **options)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("dtype, vocab_size", DTYPES)
def test_every_integer_dtype(dtype, vocab_size, noisy, emulator):
    for grid in ((2, 5, 6), (2, 5, 5), (3, 4, 8)):  # whole fours of tokens, an odd number, several to a row
        tokens = clips(3, grid, dtype=torch.int64, vocab_size=vocab_size).to(dtype)
        emulate(emulator, tokens, torch.arange(3), 1, noisy=noisy, vocab_size=vocab_size)


@pytest.mark.parametrize("options", [{"noisy": True}, {"ratio": 0.5}])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int16])
def test_strides_do_not_matter(dtype, options, emulator):
    tokens = clips(4, (3, 5, 8), dtype=dtype)
    spread = torch.full((4, 3, 2, 5, 9, 3), -1, dtype=dtype)[:, :, 1, :, :8, 2].copy_(tokens)
    permuted = tokens.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    shifted = torch.full((tokens.numel() + 1,), -1, dtype=dtype)[1:].view_as(tokens).copy_(tokens)  # no 16 bytes at once
    far = torch.full((4, 121), -1, dtype=dtype)[:, :120].unflatten(1, (3, 5, 8)).copy_(tokens)  # clips an odd number apart
    one = tokens[:1].expand(4, -1, -1, -1)
    for same in (spread, permuted, shifted, far, one, tokens[1:3]):
        ids = torch.arange(2 * len(same))[::2] - 3
        emulate(emulator, same, ids, 1, **options)
    emulate(emulator, tokens, torch.tensor(2**40).expand(4), 1, **options)


@pytest.mark.parametrize("B", [3, 4, 5, 11])
def test_several_clips_a_block(B, emulator):
    """Every split of the clips over up to 4 thread blocks, indices that go on where the block before ended."""
    tokens, ids = clips(B, (5, 6, 7)), torch.arange(B)
    for options in ({}, {"ratio": 0.9}, {"ratio": 0.0}, {"ratio": 1.0}):
        for blocks in range(1, min(B, 4) + 1):
            emulate(emulator, tokens, ids, 3, blocks=blocks, **options)


@pytest.mark.parametrize("schedule", range(8))
@pytest.mark.parametrize("resident", [3, 5])
def test_blocks_in_any_order(resident, schedule, emulator):
    """Blocks start in a random order, fewer at a time than there are, and take turns at random accesses. Each waits for the
    numbers of those before it, and the last one resets the counters: two launches in a row."""
    tokens, ids = clips(13, (2, 5, 6)), torch.arange(13)
    for options in ({"blocks": 7, "threads": 64}, {"threads": 32, "ratio": 0.5}):
        emulate(emulator, tokens, ids, 3, resident=resident, schedule=schedule, **options)


@pytest.mark.parametrize("threads", [32, 64, 320])
def test_any_number_of_threads(threads, emulator):
    """A thread with several fours of tokens, warps without any; 40 blocks, more than a warp."""
    for grid in ((5, 16, 16), (2, 3, 5)):
        for options in ({"n_blocks": 70}, {"ratio": 0.3, "noisy": True}):
            emulate(emulator, clips(2, grid), torch.arange(2), 5, threads=threads, **options)
    emulate(emulator, clips(40, (2, 3, 4)), torch.arange(40), 5, threads=threads)


def test_a_long_row_and_a_thousand_blocks(emulator):
    emulate(emulator, clips(2, (1, 1, 2000)), torch.arange(2), 0)
    emulate(emulator, clips(2, (3, 4, 5)), torch.arange(2), 0, n_blocks=1000)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16])
def test_bytes_moved(dtype, emulator):
    """Tokens in and out once, the mask written once and read twice, an index written once; the rest is a few numbers a clip."""
    tokens = clips(8, (5, 16, 16), dtype=dtype)
    emulate(emulator, tokens, torch.arange(8), 0)
    loaded, stored = emulator.library.bytes_loaded(), emulator.library.bytes_stored()
    size, few = tokens.element_size(), emulator.state.nbytes + 8 * 16 * (320 + 20)  # every thread reads seed and id
    assert 0 <= loaded - tokens.numel() * (size + 2) <= few
    assert 0 <= stored - tokens.numel() * (size + 1 + 8) <= few


def test_says_what_it_cannot_run(emulator):
    tokens, ids = clips(1, (1, 1, 1900)), torch.arange(1)
    with pytest.raises(RuntimeError, match=r"33 blocks with T . H . W of 1902"):
        emulator(tokens, ids, 0, n_blocks=33)
    with pytest.raises(RuntimeError, match="vocab_size of 2147483644"):
        emulator(tokens.long(), ids, 0, vocab_size=2**31 - 4)


def test_thresholds_are_pythons(emulator):
    """Halves of a word round to even."""
    threshold = emulator.library.threshold_of
    threshold.argtypes, threshold.restype = [ctypes.c_double], ctypes.c_uint64
    for probability in (0.0, 2**-33, 3 * 2**-33, 5 * 2**-33, 2**-34, 0.1, 0.15, 0.8, 0.9, 1 - 2**-33, 1 - 2**-40, 1.0):
        assert threshold(probability) == _word(probability)


@pytest.mark.parametrize("grid, n_blocks", [((1, 1, 1), 2), ((5, 16, 16), 5), ((3, 7, 2), 33)])
def test_blocks_on_the_host(grid, n_blocks, emulator):
    """csrc/block_mask.h's sampler: the blocks' union is the mask, and so is the reference's."""
    for sample, seed in zip(SAMPLES, [*SEEDS, 5, 6], strict=True):
        lengths, starts = torch.full((2, n_blocks, 3), -99, dtype=torch.int32)
        mask = torch.ones(grid, dtype=torch.bool)
        call = (ctypes.c_int32 * 3)(*grid), ctypes.c_int64(seed), ctypes.c_int64(sample), n_blocks
        emulator.library.sample(*call, *(ctypes.c_void_p(x.data_ptr()) for x in (lengths, starts, mask)))
        tokens = torch.zeros(1, *grid, dtype=torch.int32)
        assert torch.equal(mask, block_mask(tokens, torch.tensor([sample]), seed, n_blocks, backend="reference").mask[0])
        union = torch.zeros(grid, dtype=torch.bool)
        for length, start in zip(lengths.tolist(), starts.tolist(), strict=True):
            assert all(1 <= n <= most for n, most in zip(length, longest_block(grid), strict=True))
            union[tuple(slice(s, s + n) for s, n in zip(start, length, strict=True))] = True
        assert torch.equal(union, mask)


def test_the_emulator_sees_every_access(emulator, monkeypatch):
    monkeypatch.setitem(globals(), "extent", lambda x: x.nbytes - 1)
    with pytest.raises(RuntimeError, match=r"load of . bytes outside all buffers"):
        emulator(clips(2, (5, 6, 7)), torch.arange(2), 0)
    emulator.state.zero_()  # it had begun


# --- compiled without a GPU ---------------------------------------------------------------------------------------------


def test_compiles_without_spills():
    """48 registers let 4 thread blocks of 320 run on a multiprocessor."""
    kernels = nvcc.kernels(nvcc.ptxas_report("block_mask.cu"))
    assert len(kernels) == 4 * len(nvcc.ARCHITECTURES)
    for kernel in kernels:
        assert (kernel["stack"], kernel["spilled"]) == (0, 0), kernel
        assert kernel["registers"] <= 48, kernel


@pytest.mark.parametrize("architecture", nvcc.ARCHITECTURES)
def test_accesses_are_as_wide_as_four_tokens(architecture):
    """Up to 16 bytes; Philox's high halves come from 64-bit products."""
    wide = {"m": "128", "j": "128", "t": "64", "h": ""}  # mangled unsigned long, int, short, char: bits of an access
    for name, code in nvcc.sass("block_mask.cu", architecture).items():
        bits = f".{width}" if (width := wide[name.split("draw")[1][1]]) else ""
        assert re.search(rf"LDG\.E{bits}\.?[^\d]* R", code) and re.search(rf"STG\.E{bits} ", code), name
        assert "VOTE" in code and "IMAD.WIDE.U32" in code and "IMAD.HI " not in code, name


# --- on a GPU -----------------------------------------------------------------------------------------------------------


def check(tokens, ids, seed, **options):
    expected = block_mask(tokens, ids, seed, backend="reference", **options)
    assert_same(block_mask(tokens, ids, seed, backend="cuda", **options), expected)
    return expected


@needs_gpu
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("grid", GRIDS)
def test_on_a_gpu(grid, options):
    ids = torch.tensor(SAMPLES, device="cuda")
    for B, seed in zip((5, 1, 0), reversed(SEEDS), strict=True):
        check(clips(B, grid, "cuda"), ids[:B], seed, **options)


@needs_gpu
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("dtype, vocab_size", DTYPES)
def test_every_integer_dtype_on_a_gpu(dtype, vocab_size, noisy):
    for grid in ((2, 5, 6), (2, 5, 5)):
        tokens = clips(3, grid, "cuda", torch.int64, vocab_size).to(dtype)
        check(tokens, torch.arange(3, device="cuda"), 1, noisy=noisy, vocab_size=vocab_size)
        check(tokens.transpose(1, 2), torch.arange(3, device="cuda"), 1, noisy=noisy, vocab_size=vocab_size)


@needs_gpu
@pytest.mark.parametrize("B", [1025, 70_000])
def test_more_clips_than_thread_blocks(B):
    check(clips(B, (2, 3, 4), "cuda"), torch.arange(B, device="cuda"), 4)


@needs_gpu
def test_real_batches_one_after_the_other():
    """Every thread block waits for others; 20 times, since a race need not show at once."""
    tokens, ids = clips(512, (5, 16, 16), "cuda", torch.int64), torch.arange(512, device="cuda")
    for seed in range(20):
        check(tokens, ids, seed)


@needs_gpu
def test_streams_do_not_meet():
    tokens, ids = clips(512, (5, 16, 16), "cuda"), torch.arange(512, device="cuda")
    streams, results = [torch.cuda.Stream() for _ in range(3)], []
    torch.cuda.synchronize()
    for seed in range(12):
        with torch.cuda.stream(streams[seed % 3]):
            results.append(block_mask(tokens, ids, seed, backend="cuda"))
    torch.cuda.synchronize()
    for seed, result in enumerate(results):
        assert_same(result, block_mask(tokens, ids, seed, backend="reference"))


@needs_gpu
def test_cuda_graph_draws_anew():
    """A replay reads the seed and the ids that are there then, and eager calls in between do not disturb it."""
    tokens, ids = clips(40, (5, 16, 16), "cuda"), torch.arange(40, device="cuda")
    seed = torch.tensor(1, device="cuda")
    block_mask(tokens, ids, seed, backend="cuda")  # loads the kernel, which is not to happen while the graph is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = block_mask(tokens, ids, seed, backend="cuda")
        second = block_mask(tokens, ids, seed + 1, backend="cuda")  # may get the memory of the first one's state
    for value in (1, 2, -(2**40)):
        seed.fill_(value)
        ids += 7
        graph.replay()
        assert_same(first, check(tokens, ids, seed))
        assert_same(second, check(tokens, ids, seed + 1))


@needs_gpu
def test_reduce_overhead_and_its_pool():
    """torch.compile's own CUDA graphs, which check that no tensor keeps memory of their pool."""
    compiled = torch.compile(lambda *call: block_mask(*call, backend="cuda"), fullgraph=True, mode="reduce-overhead")
    tokens, ids = clips(40, (5, 16, 16), "cuda"), torch.arange(40, device="cuda")
    for value in (1, 2, 3, 4):
        seed = torch.tensor(value, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        assert_same(compiled(tokens, ids, seed), block_mask(tokens, ids, seed, backend="reference"))


@needs_gpu
@pytest.mark.parametrize("options", [(5, None, True), (1, 0.4, False)])
def test_opcheck_on_a_gpu(options):
    tokens, ids = clips(4, (3, 5, 6), "cuda"), torch.arange(4, device="cuda")
    call = tokens, ids, torch.tensor(7, device="cuda"), *options, 8192
    torch.library.opcheck(dispatch.overload("block_mask", "cuda"), call)
