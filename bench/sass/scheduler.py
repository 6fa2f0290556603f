"""Steps of one warp, run by several on one scheduler, a fourth of an SM: what share of copy bandwidth they reach."""

from __future__ import annotations

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
TILES = 16  # that each warp runs; the start is staggered


class _Lane:
    """One warp that works through tiles."""

    def __init__(self, start: int, steps: int) -> None:
        self.step, self.free, self.last, self.tiles = 0, start, -1, 0
        self.done = [0.0] * steps


def clocks_a_tile(steps: Sequence[Step], warps: int, device: Device = H200) -> float:
    """Of one scheduler: it issues one instruction a clock, of the warp that has waited longest of those that can."""
    rng = random.Random(0)
    lanes = [_Lane(rng.randrange(3000), len(steps)) for _ in range(warps)]
    units = dict.fromkeys(OCCUPANCY, 0.0)
    rate = device.bytes_a_clock()
    clock, memory_free, finished = 0.0, 0.0, 0
    while finished < warps * TILES:
        chosen, soonest = None, float("inf")
        for lane in lanes:
            if lane.tiles == TILES:
                continue
            step = steps[lane.step]
            ready = max([lane.free, *(lane.done[k] for k in step.needs)])
            if step.unit:
                ready = max(ready, units[step.unit])
            if ready <= clock and (chosen is None or lane.last < chosen.last):
                chosen = lane
            soonest = min(soonest, ready)
        if chosen is None:
            clock = max(clock + 1, float(-(-soonest // 1)))
            continue
        step = steps[chosen.step]
        chosen.done[chosen.step] = clock + step.latency
        if step.bytes:
            memory_free = max(memory_free, clock) + step.bytes / rate
            if step.loads_data:
                chosen.done[chosen.step] = memory_free + MEMORY_LATENCY
        if step.unit:
            units[step.unit] = clock + OCCUPANCY[step.unit]
        chosen.free, chosen.last = clock + step.issue, clock
        chosen.step += 1
        if chosen.step == len(steps):
            chosen.step, chosen.tiles, chosen.free = 0, chosen.tiles + 1, clock + NEXT_TILE
            chosen.done = [0.0] * len(steps)
            finished += 1
        clock += 1
    return clock / (warps * TILES)


def share_of_copy(steps: Sequence[Step], traffic: int, warps: int, device: Device = H200) -> float:
    """``traffic``: bytes that a tile has to load and store."""
    return traffic / clocks_a_tile(steps, warps, device) / device.bytes_a_clock()
