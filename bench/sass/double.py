"""Instructions on float64."""

from __future__ import annotations

import ctypes
import ctypes.util

import numpy as np

from .disassembly import Instruction
from .floating import holds
from .integer import set_both
from .warp import Array, Warp, opcode

_fma = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6").fma
_fma.restype = ctypes.c_double
_fma.argtypes = [ctypes.c_double] * 3


@opcode("DADD")
def add(warp: Warp, ins: Instruction, active: Array) -> None:
    warp.write_double(ins.operands[0], warp.double(ins.operands[1]) + warp.double(ins.operands[2]), active)


@opcode("DMUL")
def multiply(warp: Warp, ins: Instruction, active: Array) -> None:
    warp.write_double(ins.operands[0], warp.double(ins.operands[1]) * warp.double(ins.operands[2]), active)


@opcode("DFMA")
def multiply_add(warp: Warp, ins: Instruction, active: Array) -> None:
    operands = [warp.double(each).tolist() for each in ins.operands[1:4]]
    warp.write_double(ins.operands[0], np.array([_fma(a, b, c) for a, b, c in zip(*operands, strict=True)]), active)


@opcode("DSETP", modifiers="GE GT LT LE EQ NE GEU GTU LTU LEU EQU NEU NAN NUM MAX MIN AND OR XOR")
def compare(warp: Warp, ins: Instruction, active: Array) -> None:
    _, _, first, second, with_this = ins.operands
    a, b = warp.double(first), warp.double(second)
    name = ins.modifiers[0]
    if name not in ("MAX", "MIN"):
        set_both(warp, ins, holds(name, a, b), with_this, active)
        return
    # Of a maximum in several instructions: whether it is the first, and whether both are NaN.
    takes_first = (a > b if name == "MAX" else a < b) | np.isnan(b)
    warp.set_predicate(ins.operands[0], takes_first & ~np.isnan(a), active)
    warp.set_predicate(ins.operands[1], np.isnan(a) & np.isnan(b), active)
