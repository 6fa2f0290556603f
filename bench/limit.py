"""The limit: what it takes to move a case's bytes through memory and compute nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import Case, Move
from .method import Run
from .native import ARRAYS, MemoryLoop

LARGEST = 4 << 30  # bytes of a device copy, which does not get faster from there on


@dataclass(frozen=True)
class Pass:
    """One call of the native loop: how many bytes an element each array has, which are written, and whether only so."""

    width: int
    written: tuple[bool, ...]
    fresh: bool = False

    @property
    def bytes(self) -> int:
        """An element."""
        return self.width * sum(1 + (written and not self.fresh) for written in self.written)


def passes(moves: tuple[Move, ...]) -> list[Pass]:
    """As few calls as 8 arrays of one width allow; wide things count as several narrow ones. Scales are left out."""
    first = [Pass(int(move.width), (False,)) for move in moves if move.read == 2]
    fresh = [move for move in moves if not move.read]
    both = [move for move in moves if move.read and move.written]
    if fresh and both:  # only written, or read and written: a call does one of the two
        alone = [Pass(int(move.width), (True,), fresh=True) for move in fresh]
        return first + alone + passes(tuple(move for move in moves if move.read))[len(first) :]
    unit = min(int(move.width) for move in moves)
    together = tuple(bool(move.written) for move in moves for _ in range(int(move.width) // unit))
    if len(together) <= ARRAYS:
        return [*first, Pass(unit, together, bool(fresh))]
    widths = sorted({int(move.width) for move in moves}, reverse=True)
    flags = {w: tuple(bool(move.written) for move in moves if int(move.width) == w) for w in widths}
    parts = [(w, flags[w][i : i + ARRAYS]) for w in widths for i in range(0, len(flags[w]), ARRAYS)]
    return first + [Pass(w, part, bool(fresh)) for w, part in parts]


def limit(case: Case, device: str) -> tuple[Run, float]:
    """A function that moves (nearly) the case's bytes, and how many it moves."""
    if device.startswith("cuda"):
        n = max(64, min(int(case.bytes / 2), LARGEST))
        source = torch.zeros(n, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2.0 * source.numel()
    calls, moved = [], 0.0
    threads = torch.get_num_threads()
    kept: list[Tensor] = []
    for each in passes(case.moves):
        n = max(64, case.elements * each.width // 64 * 64)
        buffers = [torch.zeros(n + 64, dtype=torch.uint8) for _ in each.written]
        kept += buffers
        arrays = [(-(-b.data_ptr() // 64) * 64, written) for b, written in zip(buffers, each.written, strict=True)]
        calls.append(MemoryLoop.fastest(arrays, n, threads, each.fresh))
        moved += n / each.width * each.bytes

    def run(kept: list[Tensor] = kept) -> None:  # keeps the memory that the addresses are of
        for call in calls:
            call()

    return run, moved
