"""Whether machine code lets only some lanes of a warp reach an instruction that needs all of them.

`divergent(listing)` follows which registers and predicates may differ between lanes through the code of a kernel, as cuobjdump
prints it. A branch whose condition may differ splits the warp, until a BSYNC of a barrier that was set before the branch.
On the way there no instruction may be one of `COLLECTIVE`, nor may one have a guard that differs.

Lanes differ in their thread's number; in what is exchanged, multiplied on tensor cores, or loaded from addresses that differ;
in what is computed from that; and in what is written while the warp is split. Uniform registers and results of votes are the
same in all lanes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import NamedTuple

PRODUCTS = r"[HIQO]MMA|[HQI]GMMA|UTC\w*MMA"
COLLECTIVE = re.compile(rf"{PRODUCTS}|LDSM|STSM|SHFL|MOVM|VOTE|REDUX|MATCH")
DIFFERENT = re.compile(rf"{PRODUCTS}|LDSM|MOVM|SHFL|MATCH|ATOM|LDL|LDTM|ELECT")  # results, whatever goes in
NUMBERS = re.compile(r"SR_(TID|LANEID|EQMASK|LTMASK|LEMASK|GTMASK|GEMASK)")
SAME = re.compile(r"VOTEU?$|REDUX|R2UR")
WITHOUT_RESULT = re.compile(r"ST[GLS]?$|STSM|RED$|BRA|JMP|EXIT|RET|CALL|BSYNC|BSSY|BREAK|BAR|NOP|YIELD|WARPSYNC|MEMBAR|CCTL")
WITH_CARRY = re.compile(r"U?(IADD3?|LEA|IMAD)$")


class Place(NamedTuple):
    """A register or a predicate; or one bit of a register, where ptxas keeps predicates that it has no room for."""

    name: str
    bit: int = 0  # its value, 0 for all


# Register or predicate → which bits may differ (0: all), and the predicates that hold where they do (none: everywhere).
Facts = dict[str, frozenset[tuple[int, frozenset[str]]]]
EVERYWHERE: frozenset[str] = frozenset()


@dataclass
class Instruction:
    address: int
    guard: str  # a predicate, "!" before it for its opposite, "" without one
    name: str  # with its suffixes
    operands: list[str]
    results: set[Place] = field(default_factory=set)
    sources: set[Place] = field(default_factory=set)
    successors: list[int] = field(default_factory=list)  # indices

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def conditions(self) -> list[str]:
        """Whether it happens; of a branch, whether it is taken."""
        own = [x for x in self.operands if re.fullmatch(r"!?U?P\d", x)] if self.kind == "BRA" else []
        return [x for x in (self.guard, *own) if x]

    def __str__(self) -> str:
        return f"/*{self.address:04x}*/ {self.guard and f'@{self.guard} '}{self.name} {', '.join(self.operands)}"


def divergent(listing: str) -> list[str]:
    """The collective instructions that only some lanes of a warp may reach."""
    code = parse(listing)
    barriers = _barriers(code)
    split: set[int] = set()
    while True:
        apart = _apart(code, split)
        found = {i for branch in apart for i in _until_together(code, branch, barriers[branch])}
        if found <= split:
            break
        split |= found
    return sorted({str(code[i]) for i in split.union(apart) if COLLECTIVE.match(code[i].kind)})


# --- code -------------------------------------------------------------------------------------------------------------


def parse(listing: str) -> list[Instruction]:
    found = re.findall(r"/\*([0-9a-f]{4,})\*/ +(?:@(!?U?P\w+) )?\s*([A-Z0-9][\w.]*) ?([^;]*);", listing)
    code = []
    for address, guard, name, text in found:
        operands = [word.strip().replace(".reuse", "") for word in text.split(",")] if text.strip() else []
        instruction = Instruction(int(address, 16), guard, name, operands)
        instruction.results, instruction.sources = _places(instruction)
        code.append(instruction)
    index = {x.address: i for i, x in enumerate(code)}
    for i, x in enumerate(code):
        assert x.kind not in ("BRX", "JMX", "BRXU"), f"where does {x} go?"
        # to .DIV goes a warp that is split, of which ptxas does not know; BREAK takes lanes out of a barrier, a branch follows
        jumps = x.kind in ("BRA", "JMP", "CALL") and ".DIV" not in x.name
        if jumps:
            x.successors.append(index[int(x.operands[-1].strip("`()"), 16)])
        if i + 1 < len(code) and (x.conditions or not (jumps or x.kind in ("RET", "EXIT"))):
            x.successors.append(i + 1)
    for i in [i for i, x in enumerate(code) if x.kind == "CALL"]:
        _copy_function(code, i)
    return code


def _copy_function(code: list[Instruction], call: int) -> None:
    """A call runs a copy of its own of the function, so that what other callers know does not come back from it."""
    copies: dict[int, int] = {}
    waiting = [code[call].successors[0]]
    while waiting:
        i = waiting.pop()
        if i not in copies:
            copies[i] = len(code)
            code.append(replace(code[i]))
            waiting += code[i].successors
    for copy in copies.values():
        code[copy].successors = [copies[i] for i in code[copy].successors]
        if code[copy].kind == "RET":
            code[copy].successors.append(call + 1)
    code[call].successors[0] = copies[code[call].successors[0]]


def _places(x: Instruction) -> tuple[set[Place], set[Place]]:
    """What is written and read; a register of several words is all its words."""
    if x.kind == "LOP3" and (bit := _bit_of_register(x)):
        return bit
    if x.kind == "R2P":  # PR, word, which predicates
        return _predicates(x.operands[2]), set(_named(x.operands[1], 1))
    if x.kind == "P2R":  # word, PR, the other bits, which predicates
        return set(_named(x.operands[0], 1)), _predicates(x.operands[3]).union(_named(x.operands[2], 1))
    count = _results(x)
    words = 4 if ".128" in x.name or x.kind == "HMMA" else 2 if re.search(r"64|WIDE|^D[A-Z]+|^F\w+2\b|^CS2R$", x.name) else 1
    results = {place for operand in x.operands[:count] for place in _named(operand, words)}
    sources = x.operands[count:]
    narrow = len(sources) if x.kind.startswith("LD") else 2 if "WIDE" in x.name else 0  # addresses say how wide they are
    widths = [1 if i < narrow else min(words, 2) for i in range(len(sources))]
    return results, {place for operand, width in zip(sources, widths, strict=True) for place in _named(operand, width)}


def _results(x: Instruction) -> int:
    """How many operands are written: the first, predicates before the first register and carries after it."""
    if WITHOUT_RESULT.match(x.kind) or not x.operands:
        return 0
    if x.kind in ("VOTE", "VOTEU", "FCHK"):
        return 2 if len(x.operands) > 2 and x.kind != "FCHK" else 1
    is_predicate = [bool(re.fullmatch(r"U?P[\dT]", operand)) for operand in x.operands]
    if is_predicate[0]:
        return 2
    count = 1
    while WITH_CARRY.match(x.kind) and is_predicate[count]:
        count += 1
    return count


def _bit_of_register(x: Instruction) -> tuple[set[Place], set[Place]] | None:
    """R4 & ~bit and R4 | bit, which write a bit of R4; R4 & bit == 0, which reads it."""
    number, unused, table, _ = x.operands[-4:]
    if not re.fullmatch(r"0x[0-9a-f]+", number) or unused != "RZ":
        return None
    value, rest = int(number, 16), int(number, 16) ^ 0xFFFFFFFF
    is_bit, is_rest = (bin(x).count("1") == 1 for x in (value, rest))
    if len(x.operands) == 7 and x.operands[1] == "RZ" and table == "0xc0" and is_bit:  # P0, RZ, R4, 0x8, RZ, 0xc0, !PT
        return {Place(x.operands[0])}, {Place(x.operands[2], value)}
    if len(x.operands) == 6 and x.operands[0] == x.operands[1]:  # R4, R4, 0x8, RZ, 0xfc, !PT
        if table == "0xfc" and is_bit:
            return {Place(x.operands[0], value)}, set()
        if table == "0xc0" and is_rest:
            return {Place(x.operands[0], rest)}, set()
    return None


def _predicates(mask: str) -> set[Place]:
    return {Place(f"P{i}") for i in range(7) if int(mask, 16) >> i & 1}


def _named(operand: str, words: int) -> list[Place]:
    places = [Place(name) for name in re.findall(r"(?<![\w.])P\d\b", operand)]
    for register, suffix in re.findall(r"(?<![\w.])R(\d+)((?:\.\w+)*)", operand):
        places += [Place(f"R{int(register) + i}") for i in range(2 if ".64" in suffix else words)]
    return places


# --- what is known before each instruction ----------------------------------------------------------------------------


def _apart(code: list[Instruction], split: set[int]) -> list[int]:
    """What only some lanes may do, or branches that only some may take, where the warp is split at some instructions."""
    starts = {0}.union(*(x.successors for i, x in enumerate(code) if x.successors != [i + 1]))
    before: dict[int, Facts] = {0: {}}  # what differs at the start of a straight piece of code, after any that it may follow
    waiting, apart = [0], set()
    while waiting:
        i = waiting.pop()
        facts = dict(before[i])
        while True:
            if _depends(code[i], facts):
                apart.add(i)
            _note(code[i], facts, i in split)
            if code[i].successors != [i + 1] or i + 1 in starts:
                break
            i += 1
        for successor in code[i].successors:
            state = _along(code[i], facts, successor == i + 1)
            known = before.get(successor, {})
            more = {name: found | known[name] if name in known else found for name, found in state.items()}
            if successor not in before or any(found != known.get(name) for name, found in more.items()):
                before[successor] = known | more
                waiting.append(successor)
    return sorted(apart)


def _opposite(condition: str) -> str:
    return condition[1:] if condition.startswith("!") else f"!{condition}"


def _differs(place: Place, where: str, facts: Facts) -> bool:
    found = facts.get(place.name, ())
    return any((place.bit in (0, bit) or bit == 0) and _opposite(where) not in when for bit, when in found)


def _depends(x: Instruction, facts: Facts) -> bool:
    """Whether only some lanes may do it, or take the branch."""
    return any(_differs(Place(condition.lstrip("!")), "", facts) for condition in x.conditions)


def _note(x: Instruction, facts: Facts, split: bool) -> None:
    """What differs after an instruction."""
    if not x.results:
        return
    differs = DIFFERENT.match(x.kind) or NUMBERS.search(" ".join(x.operands))
    differs = differs or any(_differs(source, x.guard, facts) for source in x.sources)
    differs = split or _depends(x, facts) or (differs and not SAME.match(x.kind))
    for name, bit in x.results:
        known = facts.pop(name, frozenset())
        if differs:
            known |= {(bit, EVERYWHERE)}
        elif known:  # where the guard does not hold it is left as it was
            written = {(b, when) for b, when in known if bit in (0, b)}
            left = {(b, when | {_opposite(x.guard)}) for b, when in written if x.guard and x.guard not in when}
            known = known - written | left
        if known:
            facts[name] = known
    changed = {sign + place.name for place in x.results if place.name.startswith("P") for sign in ("", "!")}
    if changed:  # with a new value they no longer say where something differs
        for name, known in facts.items():
            if any(when and not when.isdisjoint(changed) for _, when in known):
                facts[name] = frozenset((bit, when - changed) for bit, when in known)


def _along(x: Instruction, facts: Facts, goes_on: bool) -> Facts:
    """Without what cannot be where a branch was taken, or was not."""
    if x.kind != "BRA" or x.conditions != [x.guard]:
        return facts
    impossible = x.guard if goes_on else _opposite(x.guard)
    return {name: frozenset(fact for fact in known if impossible not in fact[1]) for name, known in facts.items()}


# --- where a warp is split --------------------------------------------------------------------------------------------


def _barriers(code: list[Instruction]) -> list[frozenset[str]]:
    """Before each instruction: the barriers that may be set."""
    before: list[frozenset[str] | None] = [None] * len(code)
    before[0] = frozenset()
    waiting = [0]
    while waiting:
        i = waiting.pop()
        after = before[i] or frozenset()
        if code[i].kind in ("BSSY", "BSYNC"):
            after = after | {code[i].operands[0]} if code[i].kind == "BSSY" else after - {code[i].operands[0]}
        for successor in code[i].successors:
            known = before[successor]
            if known is None or not after <= known:
                before[successor] = after | (known or frozenset())
                waiting.append(successor)
    return [state or frozenset() for state in before]


def _until_together(code: list[Instruction], branch: int, barriers: frozenset[str]) -> set[int]:
    """What some lanes may run before all are together again at a BSYNC of one of these barriers. It does not wait for lanes
    that have left the kernel."""
    if code[branch].kind == "EXIT":
        barriers = frozenset()
    elif len(code[branch].successors) < 2:
        return set()
    reached: set[int] = set()
    waiting = list(code[branch].successors)
    while waiting:
        i = waiting.pop()
        if i in reached or (code[i].kind == "BSYNC" and code[i].operands[0] in barriers):
            continue
        reached.add(i)
        waiting += code[i].successors
    return reached
