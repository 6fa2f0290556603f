"""Branches, barriers, what lanes tell each other, special registers and memory."""

from __future__ import annotations

import numpy as np

from .disassembly import Instruction, UnknownInstruction
from .integer import is_predicate
from .memory import BadAddress
from .warp import LANES, STACK_BYTES, STACK_TOP, Array, Warp, opcode

LANE = np.arange(LANES, dtype=np.uint32)


# Nothing that one warp could see.
@opcode("NOP", "YIELD", "NANOSLEEP", "ERRBAR", "CGAERRBAR")
@opcode("MEMBAR", modifiers="SC ALL GPU SYS VC")
@opcode("CCTL", modifiers="IVALL")
def nothing(warp: Warp, ins: Instruction, active: Array) -> None:
    pass


@opcode("BSSY", modifiers="RECONVERGENT")
def begin_region(warp: Warp, ins: Instruction, active: Array) -> None:
    warp.barriers[ins.operands[0].text] = active.copy()


@opcode("BSYNC", modifiers="RECONVERGENT")
def end_region(warp: Warp, ins: Instruction, active: Array) -> None:
    warp.wait(ins.operands[0].text, active)


@opcode("BREAK")
def leave_region(warp: Warp, ins: Instruction, active: Array) -> None:
    *conditions, barrier = ins.operands
    for condition in conditions:
        active = active & warp.predicate(condition)
    warp.take_no_part(barrier.text, active)


@opcode("WARPSYNC", modifiers="ALL")
def meet(warp: Warp, ins: Instruction, active: Array) -> None:
    if not ins.has("ALL"):
        raise UnknownInstruction(ins.text)
    warp.wait("all", active)


@opcode("BRA", modifiers="DIV U")
def branch(warp: Warp, ins: Instruction, active: Array) -> None:
    *conditions, target = ins.operands
    if ins.has("DIV"):  # taken unless all lanes in the mask are here
        mask = warp.bits(conditions[0]) >> LANE & np.uint32(1) != 0
        if not (mask & ~warp.exited & ~active).any():
            return
        conditions = []
    for condition in conditions:
        active = active & warp.predicate(condition)
    warp.at[active] = warp.label(target)


@opcode("EXIT")
def leave(warp: Warp, ins: Instruction, active: Array) -> None:
    warp.exit(active)


@opcode("CALL", modifiers="REL NOINC")
def call(warp: Warp, ins: Instruction, active: Array) -> None:
    warp.at[active] = warp.label(ins.operands[-1])


@opcode("RET", modifiers="REL NODEC")
def come_back(warp: Warp, ins: Instruction, active: Array) -> None:
    warp.at[active] = warp.bits(ins.operands[0])[active] // 16


@opcode("S2R", "S2UR")
def special(warp: Warp, ins: Instruction, active: Array) -> None:
    to, source = ins.operands
    values = {
        "SR_TID.X": LANE + np.uint32(warp.first_thread),
        "SR_CTAID.X": np.full(LANES, warp.block, np.uint32),
        "SR_LANEID": LANE,
        "SR_EQMASK": np.uint32(1) << LANE,
        "SR_LTMASK": (np.uint32(1) << LANE) - np.uint32(1),
        "SR_CgaCtaId": np.zeros(LANES, np.uint32),
    }
    if source.text not in values:
        raise UnknownInstruction(ins.text)
    warp.write(to, values[source.text], active)


@opcode("CS2R", modifiers="32")
def clear(warp: Warp, ins: Instruction, active: Array) -> None:
    if ins.operands[1].text != "SRZ":
        raise UnknownInstruction(ins.text)
    for word in range(1 if ins.has("32") else 2):
        warp.write(ins.operands[0], np.zeros(LANES, np.uint32), active, word)


@opcode("LDC", "ULDC", modifiers="64 U8")
def load_constant(warp: Warp, ins: Instruction, active: Array) -> None:
    to, source = ins.operands
    offsets = warp.address_of(source).astype(np.int64)
    offsets = np.where(active, offsets, offsets[active.argmax()])  # where nobody asks, anything may stand
    if ins.has("U8"):
        words = warp.constant_words(offsets // 4 * 4)
        warp.write(to, words >> (8 * (offsets % 4)).astype(np.uint32) & np.uint32(255), active)
        return
    for word in range(2 if ins.has("64") else 1):
        warp.write(to, warp.constant_words(offsets + 4 * word), active, word)


# Between lanes


@opcode("VOTE", "VOTEU", modifiers="ANY ALL")
def vote(warp: Warp, ins: Instruction, active: Array) -> None:
    *to, condition = ins.operands
    votes = warp.predicate(condition) & active
    for operand in to:
        if is_predicate(operand):
            result = votes.any() if ins.has("ANY") else bool((votes == active).all())
            warp.set_predicate(operand, np.full(LANES, result), active)
        else:
            warp.write(operand, np.full(LANES, int(np.packbits(votes, bitorder="little").view("<u4")[0])), active)


@opcode("REDUX", modifiers="MAX MIN SUM OR S32")
def reduce(warp: Warp, ins: Instruction, active: Array) -> None:
    to, source = ins.operands
    x = (warp.signed(source) if ins.has("S32") else warp.integer(source))[active].astype(np.int64)
    operation = {"MAX": np.max, "MIN": np.min, "SUM": np.sum, "OR": np.bitwise_or.reduce}
    kind = ins.modifiers[0] if ins.modifiers else "OR"
    if kind not in operation:
        raise UnknownInstruction(ins.text)
    warp.write(to, np.full(LANES, int(operation[kind](x)) & 0xFFFFFFFF, np.uint32), active)


@opcode("SHFL", modifiers="BFLY IDX UP DOWN")
def shuffle(warp: Warp, ins: Instruction, active: Array) -> None:
    tells, to, source, by, bounds = ins.operands
    values, amount, bound = warp.bits(source), warp.bits(by) & np.uint32(31), warp.bits(bounds)
    clamp, segment = bound & np.uint32(31), bound >> np.uint32(8) & np.uint32(31)
    lowest, highest = LANE & segment, (LANE & segment) | (clamp & ~segment)
    match ins.modifiers[0]:
        case "UP":
            lane = LANE.astype(np.int64) - amount
            found = lane >= highest
        case "DOWN":
            lane = LANE.astype(np.int64) + amount
            found = lane <= highest
        case "BFLY":
            lane = (LANE ^ amount).astype(np.int64)
            found = lane <= highest
        case _:
            lane = (lowest | (amount & ~segment)).astype(np.int64)
            found = lane <= highest
    lane = np.where(found, lane, LANE)
    if not active[lane[active]].all():
        raise UnknownInstruction(f"a lane asks another one that is not here: {ins.text}")
    warp.write(to, values[lane], active)
    warp.set_predicate(tells, found, active)


# Memory

_SIZES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
# How long a line may stay in which cache, and who has to see a store: one warp can not tell.
_HINTS = "E EF EL LU NA EN STRONG WEAK GPU SYS SM CONSTANT LTC64B LTC128B LTC256B U"


def size_of(ins: Instruction) -> int:
    return next((_SIZES[each] for each in ins.modifiers if each in _SIZES), 4)


def on_stack(addresses: Array, size: int) -> Array:
    """Where bytes of each lane lie in its local memory."""
    first = addresses.astype(np.int64) - (STACK_TOP - STACK_BYTES)
    if (first < 0).any() or (first + size > STACK_BYTES).any() or (first % size).any():
        raise BadAddress(f"{size} bytes at {int(addresses[0]):#x} are not on the stack, or not aligned")
    return first[:, None] + np.arange(size)


@opcode("LDG", "LD", "LDS", "LDL", modifiers=f"{_HINTS} {' '.join(_SIZES)}")
def load(warp: Warp, ins: Instruction, active: Array) -> None:
    to, source = ins.operands
    size, addresses = size_of(ins), warp.address_of(source)[active]
    if ins.opcode == "LDL":
        found = warp.local[np.flatnonzero(active)[:, None], on_stack(addresses, size)]
    else:
        found, warp.access = warp.memory.load(addresses, size, ins.opcode == "LDS")
    words = np.zeros((LANES, max(size, 4)), np.uint8)
    words[active, :size] = found
    if ins.has("S8") or ins.has("S16"):
        words[:, size:] = (words[:, size - 1 : size] >> 7) * np.uint8(255)
    for word, values in enumerate(words.view("<u4").T):
        warp.write(to, np.ascontiguousarray(values), active, word)


@opcode("STG", "ST", "STS", "STL", modifiers=f"{_HINTS} {' '.join(_SIZES)}")
def store(warp: Warp, ins: Instruction, active: Array) -> None:
    to, source = ins.operands
    size, addresses = size_of(ins), warp.address_of(to)[active]
    values = np.stack([warp.bits(source, word) for word in range(max(size // 4, 1))], axis=1)
    bytes_of = values.astype("<u4").view(np.uint8)[active, :size]
    if ins.opcode == "STL":
        warp.local[np.flatnonzero(active)[:, None], on_stack(addresses, size)] = bytes_of
    else:
        warp.access = warp.memory.store(addresses, bytes_of, ins.opcode == "STS")


@opcode("ATOM", "ATOMG", "REDG", modifiers="E ADD MAX MIN 64 STRONG GPU")
def atomic(warp: Warp, ins: Instruction, active: Array) -> None:
    """Lane by lane; REDG does not tell what was there before."""
    *told, address, source = ins.operands
    if told and (not is_predicate(told[0]) or told[0].index is not None):
        raise UnknownInstruction(ins.text)
    words = 2 if ins.has("64") else 1
    join = max if ins.has("MAX") else min if ins.has("MIN") else int.__add__
    addresses, by = warp.address_of(address), warp.pair(source) if words == 2 else warp.bits(source)
    before = np.zeros((LANES, words), np.uint32)
    for lane in np.flatnonzero(active):
        here = addresses[lane : lane + 1]
        found, _ = warp.memory.load(here, 4 * words, False)
        before[lane] = found.view("<u4")[0]
        after = join(int.from_bytes(found.tobytes(), "little"), int(by[lane])) & (1 << 32 * words) - 1
        stored = np.frombuffer(after.to_bytes(4 * words, "little"), np.uint8)[None]
        warp.access = warp.memory.store(here, stored, False)
    for word in range(words if told else 0):
        warp.write(told[1], before[:, word], active, word)
