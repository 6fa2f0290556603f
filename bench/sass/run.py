"""One case: all its launches by the emulator, against the memory that the CPU leaves; and what one warp costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import control, double, floating, integer  # noqa: F401  they register instructions
from .cases import Case
from .disassembly import UnknownInstruction
from .launches import Launch, Recorded
from .memory import BadAddress, Memory
from .scheduler import H200, share_of_copy
from .timing import is_data, loads_before_wait, steps_of
from .toolchain import Kernel, Kernels
from .warp import LANES, Event, Stuck, Warp


@dataclass
class Result:
    """``share``: of copy bandwidth, in per cent, by the model. ``wrong``: what is not as the CPU has it."""

    kernel: str
    instructions: int
    registers: int
    spilled_bytes: int
    loads_before_wait: int
    share: float
    wrong: str | None = None


@dataclass
class _WarpRun:
    launch: Launch
    kernel: Kernel
    trace: list[Event]
    traffic: int  # bytes of operands, those loaded and those stored, each once


def _run_warps(memory: Memory, launch: Launch, kernel: Kernel) -> list[tuple[_WarpRun, dict[str, np.ndarray]]]:
    done = []
    for block in range(launch.blocks):
        memory.share(kernel.shared_bytes)
        for first_thread in range(0, launch.threads, LANES):
            memory.forget()
            warp = Warp(kernel.program, memory, launch.arguments, block, first_thread)
            warp.run()
            touched = {piece.name: piece.touched.copy() for piece in memory.pieces}
            operands = [each for name, each in touched.items() if is_data(name)]
            traffic = sum(int((each & bit != 0).sum()) for each in operands for bit in (1, 2))
            done.append((_WarpRun(launch, kernel, warp.trace, traffic), touched))
    return done


def _difference(memory: Memory, recorded: Recorded) -> str | None:
    for piece in memory.pieces:
        expected = np.frombuffer(recorded.after[piece.name][1], np.uint8)
        if (wrong := np.flatnonzero(piece.data != expected)).size:
            return f"{piece.name}: {wrong.size} bytes differ, the first at {wrong[0]}"
    return None


def run(case: Case, recorded: Recorded, kernels: Kernels) -> Result:
    try:
        return _run(case, recorded, kernels)
    except (UnknownInstruction, BadAddress, Stuck) as error:
        return Result("", 0, 0, 0, 0, 0.0, wrong=f"{type(error).__name__}: {error}")


def _run(case: Case, recorded: Recorded, kernels: Kernels) -> Result:
    memory = Memory(recorded.before)
    warps: list[tuple[_WarpRun, dict[str, np.ndarray]]] = []
    for launch in recorded.launches:
        warps += _run_warps(memory, launch, kernels.find(launch.kernel))
    end = 0 if case.shape == "whole" else -1
    turns = iter(warps) if case.counts_first else reversed(warps)
    counted = next(each for each, touched in turns if touched[case.operand][end])
    return measured(counted.launch, counted.kernel, counted.trace, counted.traffic, _difference(memory, recorded))


def measured(launch: Launch, kernel: Kernel, trace: Sequence[Event], traffic: int, wrong: str | None) -> Result:
    steps = steps_of(trace)
    warps = H200.warps(kernel.registers, kernel.shared_bytes, launch.threads)
    return Result(
        kernel=launch.kernel,
        instructions=len(trace),
        registers=kernel.registers,
        spilled_bytes=kernel.spilled_bytes,
        loads_before_wait=loads_before_wait(steps),
        share=round(100 * share_of_copy(steps, traffic, warps), 1),
        wrong=wrong,
    )
