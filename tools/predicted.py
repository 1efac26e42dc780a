"""Whether axial attention's compiled kernels keep up with memory: a model of their machine code for an H100.

The assembler writes into every instruction how many cycles its warp waits after it, which of six counters is up until its
result is there, and which of them must be down before it may start. So the main loop of a kernel can be played through for a
quarter of a multiprocessor, with as many warps as registers and shared memory allow: one instruction a cycle, units busy as
UNITS says, results of loads and exchanges after LATENCIES. That gives the bytes of tensors that a multiprocessor moves in a
clock. A copy moves COPY_BYTES; a kernel well above that is bound by memory, a kernel below it by its own instructions.

This is a model, not a measurement: use it to compare versions of a kernel. It leaves out bank conflicts, the caches' capacity,
and what the quarters do to each other beyond their shares of the load and exchange units. Forward branches count as not taken.

    python tools/predicted.py [--kernels triton|cuda]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from checkout import ROOT
from machine_code import LATENCIES, Instruction, instructions, longest_loop

ARCHITECTURE = 90
COPY_BYTES = 13.4  # a clock and multiprocessor: 3.0 TB/s, 132 multiprocessors, 1.7 GHz
QUARTER_REGISTERS, SHARED_BYTES, SHARED_OF_BLOCK, QUARTER_WARPS = 16384, 228 << 10, 1024, 16
DROPOUT = 0.1
SHAPES = [((5, 16, 16), 8, 64), ((5, 16, 16), 16, 32), ((10, 32, 32), 16, 32)]  # grid, heads, head width
CASES = [(*shape, axes) for shape in SHAPES for axes in (("T",), ("H", "W"))]
TENSORS = {"forward": 4, "backward": 7}  # that must move


def cycles(loop: Sequence[Instruction], warps: int, cached: frozenset[int] = frozenset(), rounds: int = 12) -> float:
    """Cycles a round of the loop, in which `warps` warps of a quarter take turns.

    cached: the loads, by their place in the loop, that find their rows in the L1 cache.
    """
    units = [instruction.unit for instruction in loop]
    delays = [instruction.delay(i in cached) for i, instruction in enumerate(loop)]
    keep = [instruction.copies_left for instruction in loop]
    place, turn, ready = [0] * warps, [0] * warps, [37 * warp for warp in range(warps)]
    counters = [[0] * 6 for _ in range(warps)]  # when each is zero again
    copies: list[list[int]] = [[] for _ in range(warps)]  # groups of asynchronous copies to shared memory: when each is there
    under_way = [0] * warps  # the copies of the group that is being made
    busy: dict[str, int] = defaultdict(int)
    ended, now, last = [], 0, 0

    def earliest(warp: int) -> int:
        i = place[warp]
        unit, _ = units[i]
        free = (
            min(busy["product"], busy["float"]) if unit == "float" else busy[unit]
        )  # two halves, one of which takes products as well
        waits = [counters[warp][c] for c in loop[i].waits]
        if (left := keep[i]) is not None:
            waits += copies[warp][: len(copies[warp]) - left]
        return max(ready[warp], free, *waits)

    while len(ended) < rounds * warps:
        order = [(last + 1 + i) % warps for i in range(warps)]
        times = {warp: earliest(warp) for warp in order if turn[warp] < rounds}
        warp = min(times, key=lambda w: max(times[w], now))
        now = max(now, times[warp])
        i = place[warp]
        instruction, (unit, takes) = loop[i], units[i]
        if unit == "float":
            busy[min("product", "float", key=lambda half: busy[half])] = now + 2
        else:
            busy[unit] = now + takes
        if instruction.raises is not None:
            counters[warp][instruction.raises] = max(counters[warp][instruction.raises], now + delays[i])
        if instruction.reads is not None:
            counters[warp][instruction.reads] = max(counters[warp][instruction.reads], now + LATENCIES["operands"])
        if instruction.name == "LDGSTS":
            under_way[warp] = now + LATENCIES["memory"]
        if instruction.name == "LDGDEPBAR":
            copies[warp] = [*copies[warp][-7:], under_way[warp]]
        ready[warp], last, place[warp] = now + instruction.stall, warp, i + 1
        if place[warp] == len(loop):
            place[warp], turn[warp] = 0, turn[warp] + 1
            ended.append(now)
        now += 1
    first, final = rounds // 3 * warps, rounds * 5 // 6 * warps  # from when it runs evenly until warps begin to be missing
    return (ended[final - 1] - ended[first - 1]) / (final - first)


def resident_warps(registers: int, shared: int, warps: int) -> int:
    """Warps that a quarter of a multiprocessor has room for; a block has `warps`."""
    by_registers = QUARTER_REGISTERS // (-(-registers // 8) * 8 * 32)
    by_shared = SHARED_BYTES // (shared + SHARED_OF_BLOCK) * warps // 4
    return min(by_registers, by_shared, QUARTER_WARPS, 8 * warps)  # 32 blocks a multiprocessor


@dataclass(frozen=True)
class Compiled:
    """One kernel for one shape."""

    title: str
    which: str  # forward or backward
    width: int  # of a head
    listing: str
    registers: int
    shared: int
    warps: int  # of a block
    tokens: int  # of a block's rows

    @cached_property
    def bytes_a_clock(self) -> float:
        """Bytes of tensors that a multiprocessor moves in a clock, by the model."""
        loop = longest_loop(instructions(self.listing))
        moved = self.tokens * self.width * 2 * TENSORS[self.which] / self.warps  # by a warp, in a round of the loop
        return 4 * moved / cycles(loop, resident_warps(self.registers, self.shared, self.warps), read_again(loop))

    def __str__(self) -> str:
        return f"{self.which} {self.title}: {self.registers} registers, {self.bytes_a_clock:.1f} bytes a clock"


def case_title(grid: tuple[int, int, int], heads: int, width: int, axes: tuple[str, ...]) -> str:
    return f"{'×'.join(map(str, grid))}, {heads} heads of width {width}, along {'|'.join(axes)}"


def read_again(loop: Sequence[Instruction]) -> frozenset[int]:
    """The loads that find their rows in the L1 cache: in the CUDA kernels all that come after the first matrix that is turned
    round, in Triton's none."""
    turned = [i for i, instruction in enumerate(loop) if instruction.name == "MOVM"]
    return frozenset(i for i, instruction in enumerate(loop) if instruction.name == "LDG" and turned and i > turned[0])


def triton_kernels() -> Iterator[Compiled]:
    from kernel_checks import compile_attention
    from vimpac.kernels.axial_attention import lines_of_block

    for grid, heads, width, axes in CASES:
        length = grid["THW".index(axes[0])]  # the same along all axes of a case
        for which in TENSORS:
            binary, launch = compile_attention(ARCHITECTURE, f"_{which}", grid, heads, width, axes, torch.bfloat16, DROPOUT)
            registers, tokens = register_count("", binary.usage), lines_of_block(length) * length
            title, warps = case_title(grid, heads, width, axes), launch["num_warps"]
            yield Compiled(title, which, width, binary.listing, registers, binary.shared, warps, tokens)


def register_count(function: str, usage: str) -> int:
    """Registers of the first function in `usage`, cuobjdump's -res-usage, whose name contains `function`."""
    found = re.search(rf"{function}\S*:\s*REG:(\d+)" if function else r"REG:(\d+)", usage)
    assert found, f"no registers of {function} in {usage}"
    return int(found[1])


# The kernels' own loops, with what decides their branches known to the compiler.
CUDA_SOURCE = """#define KERNELS_ONLY
#include "axial_attention.cu"
namespace vimpac::axial {
template <int L, int D, int M, bool FORWARD>
__global__ void __launch_bounds__(warp::LANES, FORWARD ? FORWARD_WARPS<D, M> : BACKWARD_WARPS<D, M>) sample(const Call given) {
  Call call = given;
  call.grid.T = L;
  call.axes = 0;
  call.pad = nullptr;
  call.cls_in_context = true;
  if (call.dropout_threshold == 0) __builtin_unreachable();
  if (FORWARD) forward_lines<warp::BFloat16, D, M>(call, Work(call, blockIdx.x));
  else backward_lines<warp::BFloat16, D, M>(call, Work(call, blockIdx.x));
}
"""


def cuda_kernels() -> Iterator[Compiled]:
    """Nothing where there is no nvcc."""
    import nvcc

    compiler, cuobjdump = nvcc.tool("nvcc"), nvcc.tool("cuobjdump")
    if not compiler or not cuobjdump:
        print("no nvcc or no cuobjdump: the CUDA kernels are left out", file=sys.stderr)
        return
    cases = {}
    for grid, heads, width, axes in CASES:
        length = grid["THW".index(axes[0])]
        lines = min(4, 16 // length) if length <= 7 else 1  # of a tile
        for which in TENSORS:
            parameters = (length, width, 1 if length <= 16 else 2, int(which == "forward"))
            cases[parameters] = case_title(grid, heads, width, axes), which, lines * length
    samples = ("sample<{}, {}, {}, {}>".format(*parameters) for parameters in cases)
    source = CUDA_SOURCE + "".join(f"template __global__ void {sample}(const Call);\n" for sample in samples) + "}\n"
    with tempfile.TemporaryDirectory() as folder:
        path, cubin = Path(folder) / "sample.cu", Path(folder) / "sample.cubin"
        path.write_text(source)
        include = f"-I{ROOT / 'csrc'}"
        code = f"-gencode=arch=compute_{ARCHITECTURE}a,code=sm_{ARCHITECTURE}a"
        subprocess.run([compiler, *nvcc.FLAGS, include, code, "-cubin", str(path), "-o", str(cubin)], check=True)
        listing, usage = (nvcc.output(cuobjdump, flag, str(cubin)) for flag in ("-sass", "-res-usage"))
    for parameters, (title, which, tokens) in cases.items():
        mangled = "sampleILi{}ELi{}ELi{}ELb{}E".format(*parameters)
        code = next(part for part in re.split(r"\n\s*Function : ", listing) if mangled in part.split("\n", 1)[0])
        yield Compiled(title, which, parameters[1], code, register_count(mangled, usage), 0, 1, tokens)


KERNELS = {"triton": triton_kernels, "cuda": cuda_kernels}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", choices=list(KERNELS), help="default: both")
    options = parser.parse_args(argv)
    print(f"a copy: {COPY_BYTES} bytes a clock and multiprocessor")
    for name in [options.kernels] if options.kernels else KERNELS:
        print(name, *KERNELS[name](), sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
