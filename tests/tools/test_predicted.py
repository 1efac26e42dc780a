"""tools/predicted.py: the model by loops whose time is known, and what it says of the kernels that exist."""

import pytest

import nvcc
from kernel_checks import not_interpreted
from machine_code import LATENCIES, Instruction, instructions, longest_loop
from predicted import CASES, COPY_BYTES, KERNELS, Compiled, cycles, resident_warps

pytestmark = not_interpreted
UNEVEN = 0.02  # a round's share that warps' different starts may cost


def instruction(text, stall=1, raises=None, reads=None, waits=()):
    return Instruction(0, text, stall, raises, reads, tuple(waits))


def test_reads_what_the_assembler_wrote():
    """Lines of cuobjdump 13.0 for sm_90a. Their second words' bits 41…44 stall, 46…48 and 49…51 counters, 52…57 waits."""
    listing = """
        /*0090*/                   R2UR UR13, R3 ;                                         /* 0x00000000030d72ca */
                                                                                           /* 0x000fe200000e0000 */
        /*00a0*/                   MUFU.RCP R0, R0 ;                                       /* 0x0000000000007308 */
                                                                                           /* 0x002e640000001000 */
        /*00b0*/              @!P1 VIADD R2, R0, 0xffffffe ;                               /* 0x0ffffffe00027836 */
                                                                                           /* 0x002fcc0000000000 */
        /*00c0*/               @P0 BRA 0xa0 ;                                              /* 0x0ffffffe00027836 */
                                                                                           /* 0x004fea0000000000 */
    """
    code = instructions(listing)
    assert [x.name for x in code] == ["R2UR", "MUFU", "VIADD", "BRA"] and [x.address for x in code] == [0x90, 0xA0, 0xB0, 0xC0]
    assert [x.stall for x in code] == [1, 2, 6, 5]
    assert [x.raises for x in code] == [None, 1, None, None] and [x.reads for x in code] == [None] * 4
    assert [x.waits for x in code] == [(), (1,), (1,), (2,)]
    assert longest_loop(code) == code[1:]


@pytest.mark.parametrize("warps", [1, 2, 4])
@pytest.mark.parametrize(
    "loop, alone, least",
    [
        ([instruction("FFMA R0, R1, R2, R3")] * 100, 100, 100),  # one a cycle, however many warps
        ([instruction("FADD R0, R0, R2", stall=5)] * 100, 500, 100),  # each waits for the last: other warps' turn
        ([instruction("LOP3.LUT R0, R1, R2, R3")] * 100, 200, 200),  # half the lanes
        ([instruction("MUFU.EX2 R0, R1")] * 100, 800, 800),
        ([instruction("HMMA.16816.F32.BF16 R0, R4, R8, R0")] * 100, 800, 800),
        ([instruction("FFMA R0, R1, R2, R3"), instruction("LOP3.LUT R0, R1, R2, R3")] * 50, 100, 100),  # different units
        ([instruction("IMAD R0, R1, R2, R3"), instruction("FFMA R4, R5, R6, R7")] * 50, 100, 100),  # both halves of one
    ],
)
def test_issues_and_waits_for_units(loop, alone, least, warps):
    assert cycles(loop, warps) == pytest.approx(max(alone / warps, least), rel=UNEVEN)


@pytest.mark.parametrize("warps", [1, 2, 4])
def test_waits_for_loads(warps):
    """What a counter guards takes a load's latency, unless the load is cached, or made one or two rounds ahead. Warps whose
    loads end together then wait for each other."""

    def between(loop, latency, ahead=0, **options):
        least = max(len(loop), (latency + len(loop) - 1) / warps / (ahead + 1))
        most = max(len(loop), (latency + warps * (len(loop) - 1)) / warps / (ahead + 1))
        return 0.98 * least <= cycles(loop, warps, rounds=24, **options) <= 1.02 * most

    use = [instruction("FFMA R0, R1, R2, R3", waits=[0])] + [instruction("FFMA R0, R1, R2, R3")] * 98
    load = instruction("LDG.E.128 R4, [R2.64]", raises=0)
    memory, cache = LATENCIES["memory"], LATENCIES["L1"]
    assert between([load, *use], memory) and between([load, *use], cache, cached=frozenset([0]))
    copy, group = instruction("LDGSTS.E.128 [R4], [R2.64]"), instruction("LDGDEPBAR")
    for ahead in (0, 1, 2):
        assert between([copy, group, instruction(f"DEPBAR.LE SB0, 0x{ahead}"), *use[1:]], memory, ahead)


def test_room_for_warps():
    """65,536 registers in four quarters, in units of 8 a lane; 228 KB of shared memory, of which each block takes 1 KB more."""
    assert [resident_warps(n, 0, 1) for n in (32, 96, 97, 128, 129, 168, 169, 255)] == [8, 5, 4, 4, 3, 3, 2, 2]
    assert resident_warps(32, 0, 4) == 16  # few registers: 64 warps a multiprocessor
    assert resident_warps(128, 28 << 10, 1) == 1 and resident_warps(128, 28 << 10, 2) == 3


# Of a copy's bandwidth: the goals.
LEAST = {"triton": {"forward": 0.85, "backward": 0.75}, "cuda": {"forward": 0.90, "backward": 0.80}}


@pytest.mark.parametrize("kernels", ["triton", "cuda"])
def test_kernels_keep_up_with_memory(kernels):
    """By the model no kernel is slower than a memory-bound op may be: no word about a GPU, but a kernel that becomes slower in
    itself is seen."""
    if kernels == "triton":
        triton = pytest.importorskip("triton")
        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
            pytest.skip("Triton before 3.9 needs more registers and exchanges: lines of 32 tokens are slower backward")
    elif not nvcc.tool("nvcc"):
        pytest.skip("no nvcc on PATH or in $CUDA_HOME/bin")
    compiled = list(KERNELS[kernels]())
    assert len(compiled) == len({(kernel.title, kernel.which) for kernel in compiled}) == 2 * len(CASES)
    slow = [str(kernel) for kernel in compiled if kernel.bytes_a_clock < LEAST[kernels][kernel.which] * COPY_BYTES]
    assert not slow


def test_bytes_a_clock():
    """16 rows of 64 two-byte numbers in 4 tensors, a loop of 100 cycles, four quarters."""
    lines = ["FFMA R0, R1, R2, R3"] * 99 + ["BRA 0x0"]
    listing = "\n".join(f"/*{16 * i:04x}*/ {x} ; /* 0x{0:016x} */ /* 0x000fe20000000000 */" for i, x in enumerate(lines))
    kernel = Compiled("a kernel", "forward", 64, listing, registers=128, shared=0, warps=1, tokens=16)
    assert kernel.bytes_a_clock == pytest.approx(4 * 16 * 64 * 2 * 4 / 100, rel=UNEVEN)
