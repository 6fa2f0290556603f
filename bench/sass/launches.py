"""The launches of cases and the memory that they work on, from launches.cpp."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .cases import Case

Pieces = dict[str, tuple[int, bytes]]  # address and bytes, by name


@dataclass
class Launch:
    kernel: str  # as C++ writes it
    blocks: int
    threads: int
    arguments: bytes


@dataclass
class Recorded:
    launches: list[Launch] = field(default_factory=list)
    before: Pieces = field(default_factory=dict)
    after: Pieces = field(default_factory=dict)


def _functions(program: Path) -> dict[int, str]:
    """The program's functions by their distance from anchor()."""
    listing = subprocess.run(["nm", "--demangle", program], capture_output=True, text=True, check=True).stdout
    found = {int(each[1], 16): each[2] for each in re.finditer(r"^([0-9a-f]+) [tTwWi] (.*)$", listing, re.M)}
    anchor = next(address for address, name in found.items() if name == "anchor")
    return {address - anchor: name for address, name in found.items()}


def kernel_name(function: str) -> str:
    """Without the result's type and the parameters, which compilers write differently."""
    name = function.removeprefix("void ")
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and not name.startswith("(anonymous namespace)", at):
            return name[:at]
    return name


def record(program: Path, cases: Sequence[Case]) -> list[Recorded]:
    lines = "".join(f"{case.line}\n" for case in cases)
    done = subprocess.run([program], input=lines, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench.sass: {program.name} failed: {done.stderr}")
    functions = _functions(program)
    recorded: list[Recorded] = []
    for line in done.stdout.splitlines():
        key, *words = line.split("\t")
        if key == "case":
            recorded.append(Recorded())
        elif key == "launch":
            kernel, blocks, threads, arguments = words
            name = kernel_name(functions[int(kernel)])
            recorded[-1].launches.append(Launch(name, int(blocks), int(threads), bytes.fromhex(arguments)))
        else:
            name, address, content = words
            into = recorded[-1].after if name in recorded[-1].before else recorded[-1].before
            into[name] = int(address), bytes.fromhex(content)
    return recorded
