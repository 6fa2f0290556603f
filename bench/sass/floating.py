"""Instructions on float32, on halves, and conversions. Results are exact: a fused product is rounded once.

What the hardware only approximates (MUFU) is correctly rounded here: the code after it has to mend any approximation.
"""

from __future__ import annotations

import numpy as np

from .disassembly import Instruction, UnknownInstruction
from .integer import LOW, WORD, set_both
from .warp import LANES, Array, Warp, opcode

ROUNDINGS = "RM RP RZ"


def rounding(ins: Instruction) -> str:
    return next((each for each in ROUNDINGS.split() if ins.has(each)), "RN")


def sum_to_odd(a: Array, b: Array) -> Array:
    """a + b in float64; where that is not exact, of the two neighbours the odd one, so that it can be rounded again."""
    total = a + b
    part = total - a
    rest = (a - (total - part)) + (b - part)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (rest != 0) & (bits & 1 == 0)
    outwards = (rest > 0) == (total > 0)
    return np.where(inexact, bits + np.where(outwards, 1, -1), bits).view(np.float64)


def to_float32(x: Array, mode: str = "RN") -> Array:
    nearest = x.astype(np.float32)
    if mode == "RN":
        return nearest
    up, down = nearest < x, nearest > x
    if mode == "RZ":
        up, down = up & (x < 0), down & (x > 0)
    elif mode == "RP":
        down = np.zeros_like(down)
    else:
        up = np.zeros_like(up)
    moved = np.where(up, np.nextafter(nearest, np.float32(np.inf)), nearest)
    return np.where(down, np.nextafter(nearest, np.float32(-np.inf)), moved)


def flushed(ins: Instruction, x: Array) -> Array:
    """With FTZ subnormal numbers are zeros of their sign."""
    if not ins.has("FTZ"):
        return x
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def sources(warp: Warp, ins: Instruction, first: int, count: int) -> list[Array]:
    return [flushed(ins, warp.number(each)) for each in ins.operands[first : first + count]]


@opcode("FADD", modifiers=f"FTZ {ROUNDINGS}")
def add(warp: Warp, ins: Instruction, active: Array) -> None:
    a, b = (x.astype(np.float64) for x in sources(warp, ins, 1, 2))
    warp.write_number(ins.operands[0], flushed(ins, to_float32(sum_to_odd(a, b), rounding(ins))), active)


@opcode("FMUL", modifiers=f"FTZ {ROUNDINGS}")
def multiply(warp: Warp, ins: Instruction, active: Array) -> None:
    a, b = (x.astype(np.float64) for x in sources(warp, ins, 1, 2))
    warp.write_number(ins.operands[0], flushed(ins, to_float32(a * b, rounding(ins))), active)


@opcode("FFMA", modifiers=f"FTZ {ROUNDINGS}")
def multiply_add(warp: Warp, ins: Instruction, active: Array) -> None:
    a, b, c = (x.astype(np.float64) for x in sources(warp, ins, 1, 3))
    result = to_float32(sum_to_odd(a * b, c), rounding(ins))  # the product of two float32 is exact in float64
    warp.write_number(ins.operands[0], flushed(ins, result), active)


def extreme_of(a: Array, b: Array, is_min: Array) -> Array:
    """NaN only where both are; -0 is less than 0."""
    smaller = np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))
    larger = np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))
    return np.where(is_min, smaller, larger)


@opcode("FMNMX", modifiers="NAN FTZ")
def extreme(warp: Warp, ins: Instruction, active: Array) -> None:
    a, b = sources(warp, ins, 1, 2)
    result = extreme_of(a, b, warp.predicate(ins.operands[3]))
    if ins.has("NAN"):
        result = np.where(np.isnan(a) | np.isnan(b), np.float32(np.nan), result)
    warp.write_number(ins.operands[0], result, active)


_COMPARISONS = "GE GT LT LE EQ NE GEU GTU LTU LEU EQU NEU NAN NUM"


def holds(name: str, a: Array, b: Array) -> Array:
    """GE and its like are false of NaN, GEU and its like are true."""
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("NAN", "NUM"):
        return unordered if name == "NAN" else ~unordered
    ordered = {"GE": a >= b, "GT": a > b, "LT": a < b, "LE": a <= b, "EQ": a == b, "NE": a != b}[name[:2]]
    return ordered | unordered if name.endswith("U") else ordered & ~unordered


@opcode("FSETP", modifiers=f"{_COMPARISONS} AND OR XOR FTZ")
def compare(warp: Warp, ins: Instruction, active: Array) -> None:
    a, b = sources(warp, ins, 2, 2)
    set_both(warp, ins, holds(ins.modifiers[0], a, b), ins.operands[4], active)


@opcode("FSET", modifiers=f"BF {_COMPARISONS} AND FTZ")
def compare_to_number(warp: Warp, ins: Instruction, active: Array) -> None:
    if ins.modifiers[0] != "BF":
        raise UnknownInstruction(ins.text)
    a, b = sources(warp, ins, 1, 2)
    result = holds(ins.modifiers[1], a, b) & warp.predicate(ins.operands[3])
    warp.write(ins.operands[0], np.where(result, np.float32(1), np.float32(0)).view(np.uint32), active)


@opcode("FSEL", modifiers="FTZ")
def select(warp: Warp, ins: Instruction, active: Array) -> None:
    a, b = sources(warp, ins, 1, 2)
    warp.write(ins.operands[0], np.where(warp.predicate(ins.operands[3]), a, b).view(np.uint32), active)


@opcode("MUFU", modifiers="RCP RSQ SQRT RCP64H RSQ64H FTZ")
def approximate(warp: Warp, ins: Instruction, active: Array) -> None:
    to, source = ins.operands
    kind = ins.modifiers[0]
    if kind.endswith("64H"):  # of a double's upper word, the lower one being 0
        x = (warp.bits(source).astype(np.uint64) << WORD).view(np.float64)
        result = 1 / x if kind == "RCP64H" else 1 / np.sqrt(x)
        warp.write(to, result.view(np.uint64) >> WORD, active)
        return
    x = warp.number(source).astype(np.float64)
    result = {"RCP": np.reciprocal, "RSQ": lambda x: 1 / np.sqrt(x), "SQRT": np.sqrt}[kind](x)
    warp.write_number(to, flushed(ins, result.astype(np.float32)), active)


@opcode("FCHK")
def check_division(warp: Warp, ins: Instruction, active: Array) -> None:
    """Whether a / b may leave the range in which the fast sequence is exact. Which exponents the hardware takes to be
    such is not documented: these are those for which an intermediate result can be subnormal or overflow."""
    _, a, b = ins.operands
    of_a, of_b = ((warp.number(each).view(np.uint32) >> np.uint32(23) & np.uint32(255)).astype(int) for each in (a, b))
    special = (of_a == 255) | (of_b == 255) | (of_b == 0) | (of_b >= 253)
    far = (np.abs(of_a - of_b) >= 126) | (of_a <= 24)
    warp.set_predicate(ins.operands[0], special | far, active)


def half_bits(ins: Instruction, x: Array) -> Array:
    """As bfloat16 or float16; NaN is 0x7fff, which differs from what CPUs make of it."""
    if ins.has("BF16"):
        bits = x.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    else:
        rounded = x.astype(np.float16).view(np.uint16).astype(np.uint32)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded)


@opcode("F2FP", modifiers="BF16 F16 F32 PACK_AB")
def pack_halves(warp: Warp, ins: Instruction, active: Array) -> None:
    to, upper, lower = ins.operands
    halves = half_bits(ins, warp.number(upper)) << np.uint32(16) | half_bits(ins, warp.number(lower))
    warp.write(to, halves, active)


@opcode("F2F", modifiers="F16 BF16 F32 F64")
def convert(warp: Warp, ins: Instruction, active: Array) -> None:
    to, source = ins.operands
    match ins.modifiers:
        case ("F32", "F64"):
            warp.write_number(to, warp.double(source).astype(np.float32), active)
        case ("F64", "F32"):
            warp.write_double(to, warp.number(source).astype(np.float64), active)
        case ("F16" | "BF16", "F32"):
            warp.write(to, half_bits(ins, warp.number(source)), active)
        case _:
            raise UnknownInstruction(ins.text)


@opcode("HADD2", modifiers="F32")
def widen_half(warp: Warp, ins: Instruction, active: Array) -> None:
    """HADD2.F32 R, -RZ, R.H0_H0: from float16 to float32."""
    to, nothing, source = ins.operands
    if not ins.has("F32") or nothing.index is not None or source.half is None or source.negated or source.absolute:
        raise UnknownInstruction(ins.text)
    half = (warp.bits(source) >> np.uint32(16 * source.half)).astype(np.uint16).view(np.float16)
    warp.write_number(to, half.astype(np.float32), active)


@opcode("HFMA2", modifiers="MMA")
def load_two_halves(warp: Warp, ins: Instruction, active: Array) -> None:
    """HFMA2.MMA R, -RZ, RZ, x, y: a way to load a constant."""
    to, a, b, *halves = ins.operands
    if a.index is not None or b.index is not None or any(each.kind != "number" for each in halves):
        raise UnknownInstruction(ins.text)
    upper, lower = (int(np.float16(each.value).view(np.uint16)) for each in halves)
    warp.write(to, np.full(LANES, upper << 16 | lower, np.uint32), active)


def whole_number(warp: Warp, ins: Instruction) -> Array:
    """The integer that is to be converted, as int64, or uint64 where it is U64."""
    source = ins.operands[1]
    if ins.has("U64") or ins.has("S64"):
        x = warp.pair(source)
        return x if ins.has("U64") else x.view(np.int64)
    x = warp.integer(source)
    if ins.has("U16"):
        return (x & np.uint32(0xFFFF)).astype(np.int64)
    return (x if ins.has("U32") else x.view(np.int32)).astype(np.int64)


@opcode("I2FP", modifiers="F32 S32 U32")
@opcode("I2F", modifiers=f"U16 U32 S32 U64 S64 F64 {ROUNDINGS}")
def from_integer(warp: Warp, ins: Instruction, active: Array) -> None:
    x = whole_number(warp, ins)
    word = x.dtype.type(32)
    # Each part is exact in float64, so that a sum of them is rounded once.
    upper, lower = (x >> word).astype(np.float64) * 2.0**32, (x & x.dtype.type(LOW)).astype(np.float64)
    if not ins.has("F64"):
        warp.write_number(ins.operands[0], to_float32(sum_to_odd(upper, lower), rounding(ins)), active)
    elif rounding(ins) == "RN":
        warp.write_double(ins.operands[0], upper + lower, active)
    else:
        raise UnknownInstruction(ins.text)


@opcode("F2I", modifiers="FTZ U32 S32 U64 F64 TRUNC NTZ")
def to_integer(warp: Warp, ins: Instruction, active: Array) -> None:
    to, source = ins.operands
    x = warp.double(source) if ins.has("F64") else warp.number(source).astype(np.float64)
    if not ins.has("TRUNC") or np.isnan(x[active]).any():
        raise UnknownInstruction(f"rounded to the nearest, or of NaN: {ins.text}")
    x = np.where(active, np.trunc(x), 0)
    if ins.has("U64"):
        clamped = np.array([min(max(int(each), 0), (1 << 64) - 1) for each in np.nan_to_num(x)], np.uint64)
        warp.write_pair(to, clamped, active)
    elif ins.has("U32"):
        warp.write(to, np.clip(x, 0, 2.0**32 - 1).astype(np.uint32), active)
    else:
        warp.write(to, np.clip(x, -(2.0**31), 2.0**31 - 1).astype(np.int32).view(np.uint32), active)
