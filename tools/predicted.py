"""What axial attention's compiled kernels allow on an H100, read from their machine code. No GPU is needed, and none has
measured these numbers: they compare versions of a kernel with each other, and with what memory asks for.

The assembler writes into every instruction how many cycles its warp waits after it, which of six counters is up until its
result is there, and which of them must be down before it may start. So the loop over blocks of a kernel can be played through
for a quarter of a multiprocessor: as many warps as its registers and shared memory have room for, one instruction a cycle,
units that are busy for as long as UNITS says, results of loads and exchanges after LATENCIES. What comes out is how many bytes
of the tensors that must move a multiprocessor gets through in a clock; a copy between tensors moves 13.4 (3.0 TB/s, 132
multiprocessors, 1.7 GHz). A kernel well above that is bound by memory, one below by itself.

Left out: conflicts over banks, the caches' capacity, and what the four quarters do to each other beyond their shares of the
load and exchange unit. Branches ahead count as not taken.

    python tools/predicted.py [--kernels triton|cuda] [--write]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

import harness
from render import fill, table

ROOT = harness.ROOT
sys.path.insert(0, str(ROOT / "tests"))  # for what compiles kernels without a GPU
DOCUMENT = ROOT / "docs" / "kernels.md"
START = re.compile(r"<!-- predicted: (\S+) -->")

ARCHITECTURE = 90
COPY_BYTES = 13.4  # a clock and multiprocessor
QUARTER_REGISTERS, SHARED_BYTES, SHARED_OF_BLOCK, QUARTER_WARPS = 16384, 228 << 10, 1024, 16
DROPOUT = 0.1
SHAPES = [  # those whose speed has a goal: grid, heads, head width
    ((5, 16, 16), 8, 64),
    ((5, 16, 16), 16, 32),
    ((10, 32, 32), 16, 32),
]
AXES = [("T",), ("H", "W")]
CASES = [(*shape, axes) for shape in SHAPES for axes in AXES]  # grid, heads, head width, axes
TENSORS = {"forward": 4, "backward": 7}  # that must move

# Cycles for which a warp's instruction keeps a unit of a quarter busy, from the CUDA programming guide's table of throughputs
# for compute capability 9.0 (results a clock and multiprocessor: float32 arithmetic 128, integers and logic 64, special
# functions 16, exchanges 32). Wide integer products are taken for twice as long as plain ones, matrix products as 1024
# multiply-adds a clock, loads as 128 bytes of the L1 cache a clock, shared by four quarters.
UNITS = {"float": 1, "product": 2, "wide product": 4, "integer": 2, "special": 8, "exchange": 4, "matrix": 8, "uniform": 2}
LOAD_CYCLES = {16: 16, 8: 8, 4: 4}  # by bytes a lane

# Cycles until a result is there, where the instruction does not say: assumed, memory's under load.
LATENCIES = {"memory": 1000, "L1": 40, "SHFL": 24, "MUFU": 22, "LDS": 29, "LDSM": 33, "MOVM": 30, "other": 25, "operands": 20}


# --- machine code -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    stall: int  # cycles until the warp's next instruction may start
    raises: int | None  # the counter that is up until the result is there
    reads: int | None  # the counter that is up until the operands were read
    waits: tuple[int, ...]  # counters that must be zero

    @property
    def name(self) -> str:
        """Without predicate and modifiers."""
        words = self.text.split()
        return words[self.text.startswith("@")].split(".")[0]

    @property
    def unit(self) -> tuple[str, int]:
        """The unit that runs it, and for how many cycles."""
        name, text = self.name, self.text
        if name in ("FFMA", "FADD", "FMUL"):
            return "float", UNITS["float"]
        if name == "IMAD":
            return "product", UNITS["wide product" if ".WIDE" in text or ".HI" in text else "product"]
        if name in ("MUFU", "I2F", "F2I"):
            return "special", UNITS["special"]
        if name in ("HMMA", "IMMA"):
            return "matrix", UNITS["matrix"] // (1 if "16816" in text else 2)
        if name in ("SHFL", "LDS", "STS", "LDSM", "STSM", "MOVM", "LDC", "S2R"):
            return "exchange", UNITS["exchange"]
        if name in ("LDG", "STG", "LDGSTS", "LDL", "STL"):
            return "load", LOAD_CYCLES[16 if ".128" in text else 8 if ".64" in text else 4]
        if name in ("BRA", "BSSY", "BSYNC", "BAR", "NOP", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "CS2R", "VOTE", "R2UR", "EXIT"):
            return "other", 1
        return ("uniform", UNITS["uniform"]) if name.startswith("U") else ("integer", UNITS["integer"])


def instructions(listing: str) -> list[Instruction]:
    """What cuobjdump -sass lists of one kernel. The control bits are 41 to 57 of an instruction's second word."""
    found = []
    pattern = r"/\*([0-9a-f]{4,})\*/ +(.*?) *; +/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/"
    for address, text, word in re.findall(pattern, listing):
        bits = int(word, 16) >> 41
        raises, reads, waits = bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63
        counters = tuple(i for i in range(6) if waits >> i & 1)
        found.append(
            Instruction(int(address, 16), text, max(1, bits & 15), *(None if x == 7 else x for x in (raises, reads)), counters)
        )
    return found


def longest_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """The instructions between the target of a branch back and that branch."""
    at = {instruction.address: i for i, instruction in enumerate(code)}
    loops = []
    for end, instruction in enumerate(code):
        target = re.search(r"BRA.* `?\(?0x([0-9a-f]+)", instruction.text)
        start = at.get(int(target[1], 16)) if target else None
        if start is not None and start < end:
            loops.append(code[start : end + 1])
    return max(loops, key=len)


# --- the model --------------------------------------------------------------------------------------------------------


def cycles(loop: Sequence[Instruction], warps: int, cached: frozenset[int] = frozenset(), rounds: int = 12) -> float:
    """Cycles a round of the loop, in which `warps` warps of a quarter take turns.

    cached: the loads, by their place in the loop, that find their rows in the L1 cache.
    """
    units = [instruction.unit for instruction in loop]
    delays = [_delay(instruction, i in cached) for i, instruction in enumerate(loop)]
    keep = [_copies_left(instruction) for instruction in loop]
    place, turn, ready = [0] * warps, [0] * warps, [37 * warp for warp in range(warps)]
    counters = [[0] * 6 for _ in range(warps)]  # when each is zero again
    copies = [[] for _ in range(warps)]  # groups of asynchronous copies to shared memory: when each is there
    under_way = [0] * warps  # the copies of the group that is being made
    busy: dict[str, int] = defaultdict(int)
    ended, now, last = [], 0, 0

    def earliest(warp: int) -> int:
        i = place[warp]
        unit, _ = units[i]
        free = min(busy["product"], busy["float"]) if unit == "float" else busy[unit]  # two halves: one takes products, too
        waits = [counters[warp][c] for c in loop[i].waits]
        if keep[i] is not None:
            waits += copies[warp][: len(copies[warp]) - keep[i]]
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


def _delay(instruction: Instruction, cached: bool) -> int:
    if instruction.name == "LDG":
        return LATENCIES["L1" if cached else "memory"]
    return LATENCIES.get(instruction.name, LATENCIES["other"])


def _copies_left(instruction: Instruction) -> int | None:
    """How many groups of asynchronous copies may still be under way when it starts, None = it does not ask."""
    found = re.search(r"DEPBAR\S* SB\d, (0x[0-9a-f]+)", instruction.text)
    return int(found[1], 16) if found and not instruction.text.startswith("LDGDEPBAR") else None


def busiest_unit(loop: Sequence[Instruction]) -> tuple[str, int]:
    """The unit that is busy longest in a round, and its cycles: what no number of warps can hide."""
    total: Counter = Counter()
    for instruction in loop:
        unit, takes = instruction.unit
        total["product" if unit == "float" else unit] += takes
    total["issue"] = len(loop)
    return total.most_common(1)[0]


def resident_warps(registers: int, shared: int, warps: int) -> int:
    """Warps that a quarter of a multiprocessor has room for; a block has `warps`."""
    by_registers = QUARTER_REGISTERS // (-(-registers // 8) * 8 * 32)
    by_shared = SHARED_BYTES // (shared + SHARED_OF_BLOCK) * warps // 4
    return min(by_registers, by_shared, QUARTER_WARPS, 8 * warps)  # 32 blocks a multiprocessor


# --- kernels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """One kernel for one shape."""

    kernels: str  # triton or cuda
    which: str  # forward or backward
    grid: tuple[int, int, int]
    heads: int
    width: int
    axes: tuple[str, ...]
    listing: str
    registers: int
    shared: int
    warps: int  # of a block
    tokens: int  # of a block's rows

    def row(self) -> dict:
        loop = longest_loop(instructions(self.listing))
        resident = resident_warps(self.registers, self.shared, self.warps)
        moved = self.tokens * self.width * 2 * TENSORS[self.which] / self.warps  # bytes, by each warp
        unit, busy = busiest_unit(loop)
        return {
            **{key: value for key, value in asdict(self).items() if key not in ("listing", "tokens")},
            "warps_of_multiprocessor": 4 * resident,
            "instructions": len(loop),
            "busiest": unit,
            "bytes_a_clock_of_busiest": round(4 * moved / busy, 1),
            "bytes_a_clock": round(4 * moved / cycles(loop, resident, read_again(loop)), 1),
        }


def read_again(loop: Sequence[Instruction]) -> frozenset[int]:
    """The loads that find their rows in the L1 cache: in the CUDA kernels all that come after the first matrix that is turned
    round, in Triton's none."""
    turned = [i for i, instruction in enumerate(loop) if instruction.name == "MOVM"]
    return frozenset(i for i, instruction in enumerate(loop) if instruction.name == "LDG" and turned and i > turned[0])


def length_of_lines(grid: tuple[int, int, int], axes: tuple[str, ...]) -> int:
    return grid["THW".index(axes[0])]  # the same along all axes of a case


def triton_kernels() -> Iterator[Compiled]:
    from kernel_checks import compile_attention
    from vimpac.kernels.axial_attention import lines_of_block

    for grid, heads, width, axes in CASES:
        length = length_of_lines(grid, axes)
        for which in TENSORS:
            binary, launch = compile_attention(ARCHITECTURE, f"_{which}", grid, heads, width, axes, torch.bfloat16, DROPOUT)
            registers = int(re.search(r"REG:(\d+)", binary.usage)[1])
            found = binary.listing, registers, binary.shared, launch["num_warps"], lines_of_block(length) * length
            yield Compiled("triton", which, grid, heads, width, axes, *found)


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
        length = length_of_lines(grid, axes)
        lines = min(4, 16 // length) if length <= 7 else 1  # of a tile
        for which in TENSORS:
            name = f"{length}, {width}, {1 if length <= 16 else 2}, {str(which == 'forward').lower()}"
            cases[name] = (which, grid, heads, width, axes), lines * length
    source = CUDA_SOURCE + "".join(f"template __global__ void sample<{name}>(const Call);\n" for name in cases) + "}\n"
    with tempfile.TemporaryDirectory() as folder:
        path, cubin = Path(folder) / "sample.cu", Path(folder) / "sample.cubin"
        path.write_text(source)
        include = f"-I{ROOT / 'csrc'}"
        code = f"-gencode=arch=compute_{ARCHITECTURE}a,code=sm_{ARCHITECTURE}a"
        subprocess.run([compiler, *nvcc.FLAGS, include, code, "-cubin", str(path), "-o", str(cubin)], check=True)
        listing, usage = (nvcc.output(cuobjdump, flag, str(cubin)) for flag in ("-sass", "-res-usage"))
    for name, (case, tokens) in cases.items():
        length, width, halves, forward = name.split(", ")
        mangled = f"sampleILi{length}ELi{width}ELi{halves}ELb{int(forward == 'true')}E"
        code = next(part for part in re.split(r"\n\s*Function : ", listing) if mangled in part.split("\n", 1)[0])
        registers = int(re.search(mangled + r"\S*:\s*REG:(\d+)", usage)[1])
        yield Compiled("cuda", *case, code, registers, 0, 1, tokens)


KERNELS = {"triton": triton_kernels, "cuda": cuda_kernels}


# --- the document -----------------------------------------------------------------------------------------------------


def document_table(rows: Sequence[dict], kernels: str) -> list[str]:
    """A line a shape: registers, warps of a multiprocessor, instructions of a block and warp, bytes a clock."""
    lines = []
    for grid, heads, width, axes in CASES:
        cells = [f"{'×'.join(map(str, grid))}, {heads}×{width}", "|".join(axes)]
        for which in TENSORS:
            wanted = {"kernels": kernels, "which": which, "grid": grid, "width": width, "axes": axes}
            (row,) = (row for row in rows if all(row[key] == value for key, value in wanted.items()))
            cells.append(f"{row['registers']}, {row['warps_of_multiprocessor']}, {row['instructions']}")
            cells.append(f"{row['bytes_a_clock']:.0f}, {row['bytes_a_clock_of_busiest']:.0f} ({row['busiest']})")
        lines.append(cells)
    head = ["grid, heads × width", "axes"]
    for which in TENSORS:
        head += [f"{which}: registers, warps, instructions", "bytes a clock: predicted, of the busiest unit"]
    return table(head, lines)


def main(argv: Sequence[str] | None = None, document: Path = DOCUMENT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", choices=list(KERNELS), help="default: both")
    parser.add_argument("--write", action="store_true", help="rewrite the tables of docs/kernels.md")
    options = parser.parse_args(argv)
    rows = [kernel.row() for name, make in KERNELS.items() if options.kernels in (None, name) for kernel in make()]
    found = [name for name in KERNELS if any(row["kernels"] == name for row in rows)]
    for name in found:
        print("\n".join([f"## {name}", "", *document_table(rows, name), ""]))
    if options.write:
        missing = set(KERNELS) - set(found)
        if missing:
            parser.error(f"--write needs the kernels of {', '.join(sorted(KERNELS))}, no {', '.join(missing)} here")
        tables = {name: partial(document_table, rows, name) for name in KERNELS}
        document.write_text(fill(document.read_text(), START, tables, document.name)[0])
    said = {"benchmark": "predicted", "computed": True, "device": f"sm_{ARCHITECTURE}", "torch": torch.__version__}
    print(json.dumps({**said, "triton": harness.triton_version(), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
