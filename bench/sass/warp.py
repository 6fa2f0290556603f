"""One warp of a compiled kernel: registers, predicates, divergence and the loop that runs instructions.

Of lanes at different places those at the lowest address run first; at a BSYNC they wait for each other. Every
instruction leaves an ``Event``: what it read and wrote, for timing.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .disassembly import Instruction, Operand, Program, UnknownInstruction
from .memory import Access, Memory

LANES = 32
PARAMETERS = 0x210  # where a kernel's arguments begin in constant bank 0, on sm_90
_STACK, _DESCRIPTOR = 0x28, 0x208  # of the system's words below: the stack's top; what addresses are described with
STACK_TOP, STACK_BYTES = 0xFFFDC0, 8192  # of each lane's local memory, where spilled registers go
_LIMIT = 2_000_000  # instructions: a warp that takes more hangs

Array = np.ndarray
Handler = Callable[["Warp", Instruction, Array], None]
OPCODES: dict[str, tuple[Handler, frozenset[str]]] = {}


def opcode(*names: str, modifiers: str = "") -> Callable[[Handler], Handler]:
    """Registers what instructions of these names do; any other modifier than these is an error."""

    def register(handler: Handler) -> Handler:
        for name in names:
            OPCODES[name] = handler, frozenset(modifiers.split())
        return handler

    return register


class Stuck(Exception):
    """Lanes wait for each other, or a loop does not end."""


@dataclass(slots=True)
class Event:
    instruction: Instruction
    reads: frozenset[int]
    writes: frozenset[int]
    active: int  # lanes
    access: Access | None
    jumped: bool


def _identity(kind: str, index: int) -> int:
    return {"R": 0, "UR": 256, "P": 320, "UP": 328}[kind] + index


class Warp:
    def __init__(self, program: Program, memory: Memory, arguments: bytes, block: int, first_thread: int) -> None:
        self.program, self.memory = program, memory
        self.block, self.first_thread = block, first_thread
        padded = bytes(PARAMETERS) + arguments
        self.constants = np.frombuffer(padded + bytes(-len(padded) % 4), np.uint32).copy()
        self.constants[_STACK // 4] = STACK_TOP
        self.local = np.full((LANES, STACK_BYTES), 0xA5, np.uint8)
        self.registers = {
            "R": np.zeros((256, LANES), np.uint32),
            "UR": np.zeros((64, LANES), np.uint32),
            "P": np.zeros((8, LANES), bool),
            "UP": np.zeros((8, LANES), bool),
        }
        self.at = np.zeros(LANES, np.int64)  # the index of each lane's next instruction
        self.exited = np.zeros(LANES, bool)
        self.waiting: list[str | None] = [None] * LANES  # for which barrier
        self.barriers: dict[str, Array] = {}  # the lanes that take part
        self.trace: list[Event] = []
        self.access: Access | None = None
        self._reads: set[int] = set()
        self._writes: set[int] = set()
        self._zero, self._one = np.zeros(LANES, np.uint32), np.ones(LANES, bool)

    # Reading and writing

    def bits(self, operand: Operand, word: int = 0) -> Array:
        """The 32 bits of each lane, or the second word of a pair; signs and the like are not applied."""
        if operand.kind in ("R", "UR"):
            if operand.index is None:
                return self._zero
            self._reads.add(_identity(operand.kind, operand.index + word))
            return self.registers[operand.kind][operand.index + word]
        if operand.kind == "number" and isinstance(operand.value, int):
            return np.full(LANES, (operand.value >> 32 * word) & 0xFFFFFFFF, np.uint32)
        if operand.kind == "constant":
            offsets = self.address_of(operand).astype(np.int64) + 4 * word
            return self.constant_words(offsets)
        raise UnknownInstruction(f"no 32 bits: {operand.text}")

    def constant_words(self, offsets: Array) -> Array:
        offsets = offsets & 0xFFFF  # a bank has 64 KiB, and nvdisasm writes the upper half as negative
        known = (offsets >= PARAMETERS) | np.isin(offsets, (_STACK, _DESCRIPTOR, _DESCRIPTOR + 4))
        if not known.all() or (offsets >= 4 * len(self.constants)).any() or (offsets % 4).any():
            raise UnknownInstruction(f"c[0x0][{int(offsets[0]):#x}] is nothing that is known")
        return self.constants[offsets // 4]

    def integer(self, operand: Operand, word: int = 0) -> Array:
        x = self.bits(operand, word)
        if operand.half is not None:
            raise UnknownInstruction(f"half of an integer: {operand.text}")
        x = np.abs(x.view(np.int32)).view(np.uint32) if operand.absolute else x
        x = np.uint32(0) - x if operand.negated else x
        return ~x if operand.inverted else x

    def signed(self, operand: Operand) -> Array:
        return self.integer(operand).view(np.int32)

    def pair(self, operand: Operand) -> Array:
        """64 bits of a register and the next one."""
        return self.bits(operand).astype(np.uint64) | self.bits(operand, 1).astype(np.uint64) << np.uint64(32)

    def number(self, operand: Operand) -> Array:
        """As float32."""
        if operand.kind == "number" and isinstance(operand.value, float):
            return np.full(LANES, operand.value, np.float32)
        return self._with_sign(operand, self.bits(operand), np.uint32(1 << 31)).view(np.float32)

    def double(self, operand: Operand) -> Array:
        if operand.kind == "number":
            if isinstance(operand.value, float):
                return np.full(LANES, operand.value)
            return np.full(LANES, operand.value << 32, np.uint64).view(np.float64)  # the upper word is given
        return self._with_sign(operand, self.pair(operand), np.uint64(1 << 63)).view(np.float64)

    @staticmethod
    def _with_sign(operand: Operand, x: Array, sign: np.unsignedinteger) -> Array:
        if operand.inverted or operand.half is not None:
            raise UnknownInstruction(f"no number: {operand.text}")
        x = x & ~sign if operand.absolute else x
        return x ^ sign if operand.negated else x

    def predicate(self, operand: Operand) -> Array:
        if operand.kind not in ("P", "UP"):
            raise UnknownInstruction(f"no predicate: {operand.text}")
        if operand.index is None:
            return ~self._one if operand.negated else self._one
        self._reads.add(_identity(operand.kind, operand.index))
        x = self.registers[operand.kind][operand.index]
        return ~x if operand.negated else x

    def address_of(self, operand: Operand) -> Array:
        total = np.full(LANES, operand.offset & (1 << 64) - 1, np.uint64)
        for register, factor, is_pair in operand.parts:
            total = total + (
                self.pair(register) if is_pair else self.bits(register).astype(np.uint64) * np.uint64(factor)
            )
        return total

    def write(self, operand: Operand, value: Array, active: Array, word: int = 0) -> None:
        if operand.kind not in ("R", "UR"):
            raise UnknownInstruction(f"no register: {operand.text}")
        if operand.index is not None:
            self._put(operand.kind, operand.index + word, np.asarray(value).astype(np.uint32, copy=False), active)

    def write_pair(self, operand: Operand, value: Array, active: Array) -> None:
        self.write(operand, value & np.uint64(0xFFFFFFFF), active)
        self.write(operand, value >> np.uint64(32), active, 1)

    def write_number(self, operand: Operand, value: Array, active: Array) -> None:
        """A result of arithmetic: of NaN there is only one."""
        bits = np.asarray(value, np.float32).view(np.uint32)
        self.write(operand, np.where(np.isnan(value), np.uint32(0x7FFFFFFF), bits), active)

    def write_double(self, operand: Operand, value: Array, active: Array) -> None:
        bits = np.where(np.isnan(value), np.uint64(0x7FF8 << 48), np.asarray(value, np.float64).view(np.uint64))
        self.write_pair(operand, bits, active)

    def set_predicate(self, operand: Operand, value: Array, active: Array) -> None:
        if operand.kind not in ("P", "UP"):
            raise UnknownInstruction(f"no predicate: {operand.text}")
        if operand.index is not None:
            self._put(operand.kind, operand.index, value, active)

    def _put(self, kind: str, index: int, value: Array, active: Array) -> None:
        self._writes.add(_identity(kind, index))
        if kind.startswith("U"):  # the first lane's is everybody's
            self.registers[kind][index] = np.broadcast_to(value, LANES)[active.argmax()]
        else:
            np.copyto(self.registers[kind][index], value, where=active)

    # Running

    def label(self, operand: Operand) -> int:
        if operand.text not in self.program.labels:
            raise UnknownInstruction(f"no label: {operand.text}")
        return self.program.labels[operand.text]

    def wait(self, barrier: str, lanes: Array) -> None:
        for lane in np.flatnonzero(lanes):
            self.waiting[lane] = barrier
        self._release()

    def take_no_part(self, barrier: str, lanes: Array) -> None:
        self.barriers[barrier] = self.barriers[barrier] & ~lanes
        self._release()

    def _release(self) -> None:
        for barrier in {each for each in self.waiting if each is not None}:
            here = np.array([each == barrier for each in self.waiting])
            if (here | self.exited | ~self.barriers.get(barrier, self._one)).all():
                self.waiting = [None if each == barrier else each for each in self.waiting]

    def exit(self, lanes: Array) -> None:
        self.exited |= lanes
        self._release()

    def run(self) -> None:
        bound: dict[int, tuple[Instruction, Handler]] = {}
        while not self.exited.all():
            free = ~self.exited
            if any(self.waiting):
                free &= np.array([each is None for each in self.waiting])
                if not free.any():
                    raise Stuck(f"{self.program.name}: lanes wait for each other: {self.waiting}")
            index = int(self.at[free].min())
            if index not in bound:
                bound[index] = self._bind(self.program[index])
            instruction, handler = bound[index]
            group = free & (self.at == index)
            self._reads, self._writes, self.access = set(), set(), None
            active = group if instruction.guard is None else group & self.predicate(instruction.guard)
            self.at[group] = index + 1
            count = int(active.sum())
            if count:
                with np.errstate(all="ignore"):
                    handler(self, instruction, active)
            jumped = bool((self.at[group] != index + 1).any())
            self.trace.append(
                Event(instruction, frozenset(self._reads), frozenset(self._writes), count, self.access, jumped)
            )
            if len(self.trace) > _LIMIT:
                raise Stuck(f"{self.program.name}: more than {_LIMIT:,} instructions of one warp")

    @staticmethod
    def _bind(instruction: Instruction) -> tuple[Instruction, Handler]:
        if instruction.opcode not in OPCODES:
            raise UnknownInstruction(f"no opcode {instruction.opcode}: {instruction.text}")
        handler, modifiers = OPCODES[instruction.opcode]
        if unknown := set(instruction.modifiers) - modifiers:
            raise UnknownInstruction(f"no modifier {', '.join(sorted(unknown))}: {instruction.text}")
        return instruction, handler
