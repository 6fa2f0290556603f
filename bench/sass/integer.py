"""Instructions on integers, bits and predicates. What begins with U does the same on uniform registers."""

from __future__ import annotations

import numpy as np

from .disassembly import Instruction, Operand, UnknownInstruction
from .warp import LANES, Array, Warp, opcode

LOW = np.uint64(0xFFFFFFFF)
WORD = np.uint64(32)


def is_predicate(operand: Operand) -> bool:
    return operand.kind in ("P", "UP")


def split(ins: Instruction) -> tuple[Operand, list[Operand], list[Operand], list[Operand]]:
    """The destination; predicates that carries go to; sources; and predicates after these."""
    rest = list(ins.operands[1:])
    carries = []
    while rest and is_predicate(rest[0]):
        carries.append(rest.pop(0))
    after = []
    while rest and is_predicate(rest[-1]):
        after.insert(0, rest.pop())
    return ins.operands[0], carries, rest, after


def wide(warp: Warp, operand: Operand) -> Array:
    return warp.integer(operand).astype(np.uint64)


@opcode("MOV", "UMOV", "R2UR")
def move(warp: Warp, ins: Instruction, active: Array) -> None:
    warp.write(ins.operands[0], warp.integer(ins.operands[1]), active)


@opcode("IADD3", "UIADD3", modifiers="X")
def add3(warp: Warp, ins: Instruction, active: Array) -> None:
    to, carries, sources, carried = split(ins)
    total = np.zeros(LANES, np.uint64)
    for operand in sources:
        if operand.negated and ins.has("X"):
            raise UnknownInstruction(f"a negative with a carry: {ins.text}")
        # -x is ~x + 1, whose carry counts.
        x = (~warp.bits(operand)).astype(np.uint64) + np.uint64(1) if operand.negated else wide(warp, operand)
        total = total + x
    for operand in carried:
        total = total + warp.predicate(operand)
    warp.write(to, total & LOW, active)
    for least, operand in enumerate(carries, 1):
        warp.set_predicate(operand, (total >> WORD) >= least, active)


@opcode("VIADD", "UVIADD")
def add(warp: Warp, ins: Instruction, active: Array) -> None:
    warp.write(ins.operands[0], warp.integer(ins.operands[1]) + warp.integer(ins.operands[2]), active)


@opcode("IMAD", "UIMAD", modifiers="MOV U32 SHL IADD X WIDE HI")
def multiply_add(warp: Warp, ins: Instruction, active: Array) -> None:
    to, carries, (a, b, c), carried = split(ins)
    if ins.has("WIDE") or ins.has("HI"):
        if ins.has("U32"):
            product = wide(warp, a) * wide(warp, b)
        else:
            product = (warp.signed(a).astype(np.int64) * warp.signed(b).astype(np.int64)).view(np.uint64)
        addend = warp.pair(c)
        if c.negated or c.inverted:
            addend = ~addend + np.uint64(c.negated)
        total = product + addend
        overflows = total < product
        if ins.has("X"):
            carry = warp.predicate(carried[0]).astype(np.uint64)
            overflows |= (total + carry) < total
            total = total + carry
        for operand in carries:
            warp.set_predicate(operand, overflows, active)
        if ins.has("HI"):
            warp.write(to, total >> WORD, active)
        else:
            warp.write_pair(to, total, active)
        return
    if carries:
        raise UnknownInstruction(ins.text)
    total = wide(warp, a) * wide(warp, b) + wide(warp, c)
    if ins.has("X"):
        total = total + warp.predicate(carried[0])
    warp.write(to, total & LOW, active)


@opcode("LEA", "ULEA", modifiers="HI X SX32")
def shift_add(warp: Warp, ins: Instruction, active: Array) -> None:
    to, carries, sources, carried = split(ins)
    a, b, *rest = sources
    shift = np.uint64(int(rest[-1].value))
    if ins.has("HI"):
        if a.negated:
            raise UnknownInstruction(ins.text)
        low = wide(warp, a)
        high = (low >> np.uint64(31)) * LOW if ins.has("SX32") else wide(warp, rest[0])
        shifted = (((high << WORD) | low) << shift) >> WORD
    else:
        shifted = (warp.bits(a).astype(np.uint64) << shift) & LOW
        shifted = (~shifted & LOW) + np.uint64(1) if a.negated else shifted
    total = shifted + wide(warp, b)
    if ins.has("X"):
        total = total + warp.predicate(carried[0])
    warp.write(to, total & LOW, active)
    for operand in carries:
        warp.set_predicate(operand, total >> WORD != 0, active)


def look_up(a: Array, b: Array, c: Array, table: int) -> Array:
    result = np.zeros(LANES, a.dtype)
    for k in range(8):
        if table >> k & 1:
            result |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return result


@opcode("LOP3", "ULOP3", modifiers="LUT")
def logic(warp: Warp, ins: Instruction, active: Array) -> None:
    operands = list(ins.operands)
    tells = operands.pop(0) if is_predicate(operands[0]) else None
    to, a, b, c, table, also = operands
    result = look_up(warp.integer(a), warp.integer(b), warp.integer(c), int(table.value))
    warp.write(to, result, active)
    if tells is not None:
        warp.set_predicate(tells, (result != 0) | warp.predicate(also), active)


@opcode("PLOP3", "UPLOP3", modifiers="LUT")
def predicate_logic(warp: Warp, ins: Instruction, active: Array) -> None:
    first, second, *sources, one, two = ins.operands
    a, b, c = (warp.predicate(each) for each in sources)
    results = look_up(a, b, c, int(one.value)), look_up(a, b, c, int(two.value))
    warp.set_predicate(first, results[0], active)
    warp.set_predicate(second, results[1], active)


@opcode("SHF", "USHF", modifiers="L R U32 S32 U64 S64 HI W")
def funnel_shift(warp: Warp, ins: Instruction, active: Array) -> None:
    to, low, by, high = ins.operands
    is_wide, is_signed = ins.has("U64") or ins.has("S64"), ins.has("S32") or ins.has("S64")
    bits = 64 if is_wide else 32
    amount = wide(warp, by)
    amount = amount & np.uint64(bits - 1) if ins.has("W") else np.minimum(amount, np.uint64(bits))
    beyond, amount = amount >= 64, np.minimum(amount, np.uint64(63))
    lower, upper = wide(warp, low), wide(warp, high)
    both = upper << WORD | lower
    if ins.has("L"):
        shifted = np.where(beyond, np.uint64(0), both << amount)
        result = shifted >> WORD if ins.has("HI") else shifted
    elif ins.has("HI"):
        operand = upper.astype(np.uint32).view(np.int32).astype(np.int64).view(np.uint64) if is_signed else upper
        result = (operand.view(np.int64) >> amount.astype(np.int64)).view(np.uint64)
    elif is_signed:
        result = (both.view(np.int64) >> amount.astype(np.int64)).view(np.uint64)
    else:
        result = np.where(beyond, np.uint64(0), both >> amount)
    warp.write(to, result & LOW, active)


COMPARISONS = {"GE": np.greater_equal, "GT": np.greater, "LT": np.less, "LE": np.less_equal}
COMPARISONS |= {"EQ": np.equal, "NE": np.not_equal}


def set_both(warp: Warp, ins: Instruction, holds: Array, with_this: Operand, active: Array) -> None:
    """Writes a comparison's two predicates: joined with another one, and the opposite joined with it."""
    other = warp.predicate(with_this)
    join = np.logical_and if ins.has("AND") else np.logical_or if ins.has("OR") else np.logical_xor
    first, second = join(holds, other), join(~holds, other)
    warp.set_predicate(ins.operands[0], first, active)
    warp.set_predicate(ins.operands[1], second, active)


@opcode("ISETP", "UISETP", modifiers="GE GT LT LE EQ NE AND OR XOR U32 EX")
def compare(warp: Warp, ins: Instruction, active: Array) -> None:
    _, _, a, b, with_this, *low = ins.operands
    x, y = warp.integer(a), warp.integer(b)
    if not ins.has("U32"):
        x, y = x.view(np.int32), y.view(np.int32)
    name = ins.modifiers[0]
    holds = COMPARISONS[name](x, y)
    if ins.has("EX"):  # the upper words of two pairs, after the lower ones'
        lower, same = warp.predicate(low[0]), x == y
        decided = {"G": x > y, "L": x < y, "E": np.zeros(LANES, bool), "N": ~same}[name[0]]
        holds = decided | (same & lower)
    set_both(warp, ins, holds, with_this, active)


@opcode("SEL", "USEL")
def select(warp: Warp, ins: Instruction, active: Array) -> None:
    to, a, b, which = ins.operands
    warp.write(to, np.where(warp.predicate(which), warp.integer(a), warp.integer(b)), active)


@opcode("PRMT", "UPRMT")
def permute(warp: Warp, ins: Instruction, active: Array) -> None:
    to, a, selector, b = ins.operands
    both, chosen = wide(warp, b) << WORD | wide(warp, a), warp.integer(selector)
    result = np.zeros(LANES, np.uint32)
    for k in range(4):
        which = (chosen >> np.uint32(4 * k)) & np.uint32(15)
        byte = (both >> (np.uint64(8) * (which & np.uint32(7)))) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        byte = np.where(which & np.uint32(8), sign, byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * k)
    warp.write(to, result, active)


def smallest_or_largest(warp: Warp, ins: Instruction, values: list[Array], is_min: Operand) -> Array:
    values = values if ins.has("U32") else [each.view(np.int32) for each in values]
    low, high = values[0], values[0]
    for each in values[1:]:
        low, high = np.minimum(low, each), np.maximum(high, each)
    return np.where(warp.predicate(is_min), low, high).view(np.uint32)


@opcode("VIMNMX", "VIMNMX3", "IMNMX", "UIMNMX", "UVIMNMX", modifiers="U32")
def extreme(warp: Warp, ins: Instruction, active: Array) -> None:
    to, *operands, is_min = ins.operands
    warp.write(to, smallest_or_largest(warp, ins, [warp.integer(each) for each in operands], is_min), active)


@opcode("VIADDMNMX", modifiers="U32")
def add_extreme(warp: Warp, ins: Instruction, active: Array) -> None:
    to, a, b, c, is_min = ins.operands
    values = [warp.integer(a) + warp.integer(b), warp.integer(c)]
    warp.write(to, smallest_or_largest(warp, ins, values, is_min), active)


@opcode("IABS")
def absolute(warp: Warp, ins: Instruction, active: Array) -> None:
    warp.write(ins.operands[0], np.abs(warp.signed(ins.operands[1])).view(np.uint32), active)


@opcode("POPC", "UPOPC")
def count_bits(warp: Warp, ins: Instruction, active: Array) -> None:
    counts = [int(x).bit_count() for x in warp.integer(ins.operands[1])]
    warp.write(ins.operands[0], np.array(counts, np.uint32), active)


@opcode("FLO", "UFLO", modifiers="U32")
def highest_bit(warp: Warp, ins: Instruction, active: Array) -> None:
    found = [(int(x).bit_length() - 1) & 0xFFFFFFFF for x in warp.integer(ins.operands[1])]
    warp.write(ins.operands[0], np.array(found, np.uint32), active)


@opcode("P2R")
def pack_predicates(warp: Warp, ins: Instruction, active: Array) -> None:
    to, _, base, chosen = ins.operands
    mask = int(chosen.value)
    bits = sum(warp.predicate(Operand("", "P", k)).astype(np.uint32) << np.uint32(k) for k in range(7) if mask >> k & 1)
    warp.write(to, (warp.integer(base) & ~np.uint32(mask)) | bits, active)


@opcode("R2P")
def unpack_predicates(warp: Warp, ins: Instruction, active: Array) -> None:
    _, source, chosen = ins.operands
    bits = warp.integer(source)
    for k in range(7):
        if int(chosen.value) >> k & 1:
            warp.set_predicate(Operand("", "P", k), (bits >> np.uint32(k)) & np.uint32(1) != 0, active)
