"""Steps of one warp, run by several on one scheduler, a fourth of an SM: what share of copy bandwidth they reach."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from .timing import OCCUPANCY, Step


@dataclass(frozen=True)
class Device:
    """An H200."""

    copy_bandwidth: float = 4.33e12  # bytes a second, read and written: of 4.8e12, what a copy reaches
    clock: float = 1.98e9  # boost; memory-bound kernels stay there
    processors: int = 132
    schedulers: int = 4  # of a processor
    registers: int = 65536  # of a processor, as all below
    shared_bytes: int = 227 << 10
    threads: int = 2048
    blocks: int = 32

    def bytes_a_clock(self) -> float:
        """For one scheduler."""
        return self.copy_bandwidth / self.clock / self.processors / self.schedulers

    def warps(self, registers: int, shared_bytes: int, threads: int) -> int:
        """Warps on one scheduler, from what a kernel takes; ``threads``: of a block."""
        by_registers = self.registers // ((registers + 7) // 8 * 8 * threads)
        by_memory = self.shared_bytes // (shared_bytes + 1024)  # 1 KiB of each block is the system's
        blocks = min(by_registers, by_memory, self.threads // threads, self.blocks)
        return max(1, blocks * threads // 32 // self.schedulers)


H200 = Device()
MEMORY_LATENCY = 800  # clocks, of a load from the memory under way to saturation; unloaded 600 to 700
NEXT_TILE = 600  # clocks until another block takes the place of one that has ended
TILES = 16  # that each warp runs, where they are short; the start is staggered
MOST_STEPS = 60_000  # of all warps: of long tiles fewer are run


class _Lane:
    """One warp that works through tiles: when it can issue its next step, as far as that is its own affair."""

    __slots__ = ("done", "last", "ready", "step", "tiles")

    def __init__(self, start: int, steps: int) -> None:
        self.step, self.ready, self.last, self.tiles = 0, float(start), -1.0, 0
        self.done = [0.0] * steps

    def advance(self, steps: Sequence[Step], free: float) -> None:
        self.step += 1
        if self.step < len(steps):
            done = self.done
            for need in steps[self.step].needs:
                if done[need] > free:
                    free = done[need]
        self.ready = free


def clocks_a_tile(steps: Sequence[Step], warps: int, device: Device = H200) -> float:
    """Of one scheduler: it issues one instruction a clock, of the warp that has waited longest of those that can."""
    rng = random.Random(0)
    tiles = max(3, min(TILES, MOST_STEPS // (warps * len(steps))))
    lanes = [_Lane(rng.randrange(3000), len(steps)) for _ in range(warps)]
    units: dict[str | None, float] = {None: 0.0} | dict.fromkeys(OCCUPANCY, 0.0)
    rate = device.bytes_a_clock()
    clock, memory_free = 0.0, 0.0
    while lanes:
        chosen, soonest = None, float("inf")
        for lane in lanes:
            ready = lane.ready
            if (busy := units[steps[lane.step].unit]) > ready:
                ready = busy
            if ready <= clock:
                if chosen is None or lane.last < chosen.last:
                    chosen = lane
            elif ready < soonest:
                soonest = ready
        if chosen is None:
            clock = float(math.ceil(soonest))
            continue
        step = steps[chosen.step]
        done = clock + step.latency
        if step.bytes:
            memory_free = max(memory_free, clock) + step.bytes / rate
            if step.loads_data:
                done = memory_free + MEMORY_LATENCY
        chosen.done[chosen.step] = done
        if step.unit:
            units[step.unit] = clock + OCCUPANCY[step.unit]
        chosen.last = clock
        chosen.advance(steps, clock + step.issue)
        if chosen.step == len(steps):
            chosen.step, chosen.tiles, chosen.ready = 0, chosen.tiles + 1, clock + NEXT_TILE
            if chosen.tiles == tiles:
                lanes.remove(chosen)
        clock += 1
    return max(clock, memory_free) / (warps * tiles)


def share_of_copy(steps: Sequence[Step], traffic: int, warps: int, device: Device = H200) -> float:
    """``traffic``: bytes that a tile has to load and store."""
    return traffic / clocks_a_tile(steps, warps, device) / device.bytes_a_clock()
