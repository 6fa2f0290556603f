"""What nvdisasm prints, as instructions with parsed operands."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class UnknownInstruction(Exception):
    """An instruction, a modifier or an operand that the emulator does not know: add it, do not guess."""


@dataclass(frozen=True)
class Operand:
    """A register, predicate, number, constant, address or label.

    ``kind``: "R", "UR", "P", "UP" with its number in ``index`` (RZ, URZ, PT and UPT have None); "number"; "constant",
    in bank 0 at ``offset`` plus what ``parts`` say; "address", the sum of ``parts`` and ``offset``; "label"; "barrier";
    "special".
    """

    text: str
    kind: str
    index: int | None = None
    negated: bool = False  # for predicates: not
    inverted: bool = False
    absolute: bool = False
    half: int | None = None  # 0 or 1: .H0_H0 or .H1_H1
    value: int | float = 0
    offset: int = 0
    parts: tuple[tuple[Operand, int, bool], ...] = ()  # register, factor, whether it is a pair


@dataclass
class Instruction:
    address: int
    text: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Operand | None  # a predicate

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers


@dataclass
class Program:
    """One kernel. ``labels`` lead to indexes of instructions, which are parsed when they are first asked for."""

    name: str
    texts: list[str] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    parsed: dict[int, Instruction] = field(default_factory=dict)

    def __getitem__(self, index: int) -> Instruction:
        if index not in self.parsed:
            if not 0 <= index < len(self.texts):
                raise UnknownInstruction(f"{self.name}: nothing stands at {16 * index:#x}")
            self.parsed[index] = parse_instruction(16 * index, self.texts[index])
        return self.parsed[index]


_REGISTER = re.compile(r"(UR|UP|R|P)(\d+|Z|T)")
_BARRIER = re.compile(r"B\d+|PR")


def _number(text: str) -> int | float | None:
    if re.fullmatch(r"[+-]?0x[0-9a-f]+", text):
        return int(text, 16)
    if re.fullmatch(r"[+-]?(INF|QNAN)", text):
        return float(text.replace("QNAN", "nan"))
    try:
        return float(text)
    except ValueError:
        return None


def _register(text: str) -> tuple[str, int | None] | None:
    found = _REGISTER.fullmatch(text)
    if not found or found[2] == ("Z" if found[1].endswith("P") else "T"):
        return None
    return found[1], None if found[2] in "ZT" else int(found[2])


def _sum(text: str) -> tuple[int, tuple[tuple[Operand, int, bool], ...]]:
    """``R4.64+UR8+-0x10``: its constant, and its registers."""
    offset, parts = 0, []
    for sign, term in re.findall(r"([+-]*)([^+-]+)", text):
        name, *suffixes = term.split(".")
        if (number := _number(name)) is not None:
            offset += -int(number) if sign.count("-") % 2 else int(number)
        elif (register := _register(name)) is not None and "-" not in sign:
            factor = next((int(s[1:]) for s in suffixes if re.fullmatch(r"X\d+", s)), 1)
            if unknown := [s for s in suffixes if s not in ("64", "U32") and not re.fullmatch(r"X\d+", s)]:
                raise UnknownInstruction(f"address {text}: {unknown}")
            parts.append((Operand(term, register[0], register[1]), factor, "64" in suffixes))
        else:
            raise UnknownInstruction(f"address {text}")
    return offset, tuple(parts)


def parse_operand(text: str) -> Operand:
    whole = re.sub(r"^(R\d+) `\(.*\)$", r"\1", text.strip())  # RET names the kernel that it returns to
    if label := re.fullmatch(r"`\((.*)\)", whole):
        return Operand(label[1], "label")
    if found := re.fullmatch(r"(?:desc\[UR\d+\])?\[(.*)\]", whole):
        offset, parts = _sum(found[1])
        return Operand(whole, "address", offset=offset, parts=parts)
    if (number := _number(whole)) is not None:
        return Operand(whole, "number", value=number)
    rest = whole
    negated = rest.startswith(("-", "!"))
    inverted = rest.startswith("~")
    rest = rest[1:] if negated or inverted else rest
    suffixes = rest.rsplit("]", 1)[-1].split(".")[1:]
    rest = rest[: len(rest) - sum(len(s) + 1 for s in suffixes)]
    absolute = rest.startswith("|") and rest.endswith("|")
    if rest.startswith("|") and not absolute and suffixes:
        absolute = True
    rest = rest.strip("|")
    half = None
    for suffix in suffixes:
        suffix = suffix.strip("|")
        if suffix in ("H0_H0", "H1_H1"):
            half = int(suffix[1])
        elif suffix not in ("reuse", "64", ""):
            return Operand(whole, "special")  # such as SR_TID.X
    if found := re.fullmatch(r"c\[0x0\]\[(.*)\]", rest):
        offset, parts = _sum(found[1])
        return Operand(whole, "constant", None, negated, inverted, absolute, half, 0, offset, parts)
    if (register := _register(rest)) is not None:
        return Operand(whole, *register, negated, inverted, absolute, half)
    return Operand(whole, "barrier" if _BARRIER.fullmatch(rest) else "special")


def parse_instruction(address: int, text: str) -> Instruction:
    guard, rest = None, text
    if found := re.match(r"@(!?U?P\w+)\s+(.*)", rest):
        guard, rest = parse_operand(found[1]), found[2]
    name, _, arguments = rest.partition(" ")
    opcode, *modifiers = name.split(".")
    operands = tuple(parse_operand(each) for each in re.split(r",(?![^\[]*\])", arguments) if each.strip())
    return Instruction(address, text, opcode, tuple(modifiers), operands, guard)


def parse(text: str) -> dict[str, Program]:
    """All kernels of a cubin, by their mangled names, from what ``nvdisasm -c`` prints."""
    programs: dict[str, Program] = {}
    program: Program | None = None
    for line in text.splitlines():
        if found := re.match(r"\.text\.(\S+):", line):
            program = programs[found[1]] = Program(found[1])
        elif line.startswith("\t.section"):
            program = None
        elif program is None:
            continue
        elif found := re.match(r"(\.L_x_\d+|\$\S+):", line):
            program.labels[found[1]] = len(program.texts)
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            if int(found[1], 16) != 16 * len(program.texts):
                raise UnknownInstruction(f"{program.name}: instructions of 16 bytes each are expected, got {line}")
            program.texts.append(found[2])
    return programs
