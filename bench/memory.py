"""The memory that an optimizer takes: its state, and what a step needs in passing."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import torch
from torch import Tensor

from .method import Run


def storage(value: Tensor) -> list[Tensor]:
    """The plain tensors that a state tensor is made of: torchao's are subclasses."""
    if hasattr(value, "__tensor_flatten__"):
        return [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    return [value]


def state_bytes(*optimizers: torch.optim.Optimizer) -> int:
    """Of the optimizers' state; what parameters share (a code book) counts once."""
    values = [v for opt in optimizers for state in opt.state.values() for v in state.values()]
    tensors = [t for v in values if torch.is_tensor(v) and v.numel() for t in storage(v)]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_above_rest(run: Run, device: str) -> int | None:
    """Bytes that a call takes beside those that are there before it; None where this can not be seen."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or the heap's free space would take what should be seen
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
        before = resident()
        run()
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return max(0, (int(peak.split()[1]) << 10) - before)
    except (OSError, AttributeError, StopIteration):
        return None
