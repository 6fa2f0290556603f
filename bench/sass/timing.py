"""A warp's trace as steps for scheduler.py: what each waits for, how long its result takes, what it occupies.

Latencies are assumptions: those of the arithmetic from microbenchmarks of Ampere and Hopper as published, those of
memory rounded from the same. The model is good for ten points of bandwidth, and better for comparing two kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .warp import Event

# Clocks until a result can be used.
LATENCY = {
    "arithmetic": 5,  # fixed; the compiler places dependent instructions so far apart
    "predicate": 8,  # a comparison, until a branch or a guard sees it
    "uniform": 8,  # the uniform datapath has one lane and a longer pipe
    "to_uniform": 12,
    "special": 24,  # MUFU and conversions go through a queue and a scoreboard
    "double": 16,
    "shared": 30,
    "table": 36,  # rows and scalars: other warps have just read the same lines into the L1
    "constant": 40,  # LDC, by an address in a register; ULDC counts as uniform
    "between_lanes": 25,
    "register_special": 25,  # S2R
}
# Clocks in which one scheduler's unit takes no other instruction: 32 lanes over 16 (half the lanes of FADD and its
# like, which take one clock), 4 for MUFU.
OCCUPANCY = {"integer": 2, "multiply": 2, "double": 2, "special": 8}
# Clocks until the same warp issues again.
JUMP, FALL_THROUGH, RECONVERGE, WIDE = 12, 2, 8, 2

_SPECIAL = {"MUFU", "I2F", "F2I", "F2F", "FCHK", "POPC", "UPOPC", "FLO", "UFLO"}
_INTEGER = {"IADD3", "LOP3", "ISETP", "SEL", "FSEL", "FSET", "FSETP", "FMNMX", "VIMNMX", "VIMNMX3", "VIADDMNMX"}
_INTEGER |= {"PRMT", "SHF", "LEA", "PLOP3", "MOV", "IABS", "VIADD", "P2R", "R2P", "F2FP", "HADD2", "LDS", "I2FP"}
_BRANCHES = {"BRA", "CALL", "RET"}


def is_data(piece: str) -> bool:
    """Whether a piece of memory is an operand of a row: see launches.cpp."""
    return piece.split(" ")[0] not in ("table", "step", "norm", "shared")


@dataclass(frozen=True, slots=True)
class Step:
    needs: tuple[int, ...]  # indexes of earlier steps
    latency: int
    issue: int  # clocks until the warp's next step
    unit: str | None
    bytes: int  # to or from the memory of the device
    stores: bool
    loads_data: bool  # for the first time, so from the memory of the device


def latency_of(event: Event) -> str:
    ins = event.instruction
    if ins.opcode in _SPECIAL:
        return "special"
    match ins.opcode:
        case "LDG" | "LD" | "LDL":
            return "table"
        case "LDS":
            return "shared"
        case "R2UR":
            return "to_uniform"
        case "REDUX" | "SHFL" | "VOTE" | "VOTEU" | "ATOM" | "ATOMG":
            return "between_lanes"
        case "ISETP" | "FSETP" | "PLOP3" | "DSETP":
            return "predicate"
        case "S2R" | "S2UR":
            return "register_special"
        case "LDC":
            return "constant"
    if ins.opcode[0] == "D":
        return "double"
    return "uniform" if ins.opcode[0] == "U" else "arithmetic"


def unit_of(event: Event) -> str | None:
    code = event.instruction.opcode
    if code in _SPECIAL:
        return "special"
    if code in _INTEGER:
        return "integer"
    return "multiply" if code == "IMAD" else "double" if code[0] == "D" else None


def issue_of(event: Event) -> int:
    ins = event.instruction
    if ins.opcode in _BRANCHES:
        return 1 + (JUMP if event.jumped else FALL_THROUGH)
    if ins.opcode == "BSYNC":
        return 1 + RECONVERGE
    return WIDE if ins.opcode == "IMAD" and (ins.has("WIDE") or ins.has("HI")) else 1


def steps_of(trace: Sequence[Event]) -> list[Step]:
    made_by: dict[int, int] = {}  # registers, by the step that wrote them last
    seen: set[int] = set()  # sectors of data that are in the L1
    steps = []
    for index, event in enumerate(trace):
        access = event.access
        moves = access is not None and any(map(is_data, access.pieces))
        stores = access is not None and access.stores
        is_new = moves and not stores and not access.sectors <= seen
        if moves:
            seen |= access.sectors
        needs = {made_by[each] for each in event.reads | event.writes if each in made_by}
        steps.append(
            Step(
                needs=tuple(sorted(needs)),
                latency=LATENCY[latency_of(event)],
                issue=issue_of(event),
                unit=unit_of(event),
                bytes=access.bytes if is_new or (moves and stores) else 0,
                stores=stores,
                loads_data=is_new,
            )
        )
        for each in event.writes:
            made_by[each] = index
    return steps


def loads_before_wait(steps: Sequence[Step]) -> int:
    """How many loads of data are under way when the first of them is waited for."""
    under_way: set[int] = set()
    for index, step in enumerate(steps):
        if not under_way.isdisjoint(step.needs):
            break
        if step.loads_data:
            under_way.add(index)
    return len(under_way)
