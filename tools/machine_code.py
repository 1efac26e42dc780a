"""NVIDIA's machine code as cuobjdump lists it: what each instruction waits for, and which unit of an H100 it keeps busy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# The unit of a quarter that an instruction keeps busy, and for how many cycles a warp: from the CUDA programming guide's
# throughputs for compute capability 9.0, with 1024 multiply-adds of matrices a clock and multiprocessor. All else: integers.
UNITS = {
    **dict.fromkeys(("FFMA", "FADD", "FMUL"), ("float", 1)),
    **dict.fromkeys(("MUFU", "I2F", "F2I"), ("special", 8)),
    **dict.fromkeys(("HMMA", "IMMA"), ("matrix", 8)),
    **dict.fromkeys(("SHFL", "LDS", "STS", "LDSM", "STSM", "MOVM", "LDC", "S2R"), ("exchange", 4)),
    **dict.fromkeys(("LDG", "STG", "LDGSTS", "LDL", "STL"), ("load", 4)),
    **dict.fromkeys(("BRA", "BSSY", "BSYNC", "BAR", "NOP", "WARPSYNC", "DEPBAR", "LDGDEPBAR"), ("other", 1)),
    **dict.fromkeys(("CS2R", "VOTE", "R2UR", "EXIT"), ("other", 1)),
    "IMAD": ("product", 2),
}

# Cycles until a result is there, where the instruction does not say: assumed, memory's under load.
LATENCIES = {"memory": 1000, "L1": 40, "SHFL": 24, "MUFU": 22, "LDS": 29, "LDSM": 33, "MOVM": 30, "other": 25, "operands": 20}


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
        unit, busy = UNITS.get(self.name, ("uniform" if self.name.startswith("U") else "integer", 2))
        if unit == "load":  # 128 bytes of the L1 cache a clock, shared by four quarters
            busy *= 4 if ".128" in self.text else 2 if ".64" in self.text else 1
        if unit == "matrix" and "16816" not in self.text:
            busy //= 2
        if unit == "product" and (".WIDE" in self.text or ".HI" in self.text):
            busy *= 2
        return unit, busy

    @property
    def copies_left(self) -> int | None:
        """How many groups of asynchronous copies may still be under way when it starts; None: it does not wait for any."""
        found = re.match(r"(?:@\S+ )?DEPBAR\S* SB\d, (0x[0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None

    def delay(self, cached: bool) -> int:
        """Cycles until its result is there."""
        return LATENCIES["L1" if cached else "memory"] if self.name == "LDG" else LATENCIES.get(self.name, LATENCIES["other"])


def instructions(listing: str) -> list[Instruction]:
    """What cuobjdump -sass lists of one kernel. The control bits are 41 to 57 of an instruction's second word."""
    found = []
    pattern = r"/\*([0-9a-f]{4,})\*/ +(.*?) *; +/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/"
    for address, text, word in re.findall(pattern, listing):
        bits = int(word, 16) >> 41
        raises, reads = (None if x == 7 else x for x in (bits >> 5 & 7, bits >> 8 & 7))
        waits = tuple(i for i in range(6) if bits >> 11 >> i & 1)
        found.append(Instruction(int(address, 16), text, max(1, bits & 15), raises, reads, waits))
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
