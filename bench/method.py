"""How anything here is timed: subjects in turn within one process, medians with quartiles, and where it was.

A machine whose speed drifts slows all of them alike, so ratios within one run count and times alone do not.
"""

from __future__ import annotations

import datetime
import gc
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .packages import PEERS, installed

Run = Callable[[], object]
OURS, LIMIT = "genopt_ext", "limit"
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
NOISY = 0.25  # interquartile range over median: from here on a row says that it is noisy
FEW = 8  # rounds: with fewer, quartiles say little of the noise


def in_turn(
    runs: dict[str, Run],
    seconds: float,
    *,
    min_rounds: int = 5,
    max_rounds: int = 300,
    before: Run | None = None,
    device: str = "cpu",
    progress: Callable[[float], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each round of each run, which take turns for about ``seconds`` in all, ``min_rounds`` at least.

    Who begins is shuffled anew for every round, with a fixed seed. Runs share the time, not the rounds: one that is
    slow sits out until the others have had as much, so its rounds too are spread over the whole time. ``before`` runs
    ahead of each turn and is not timed; ``progress`` is told the share of the work that is done.
    On CUDA a round is as many calls as take 10 ms (50 at most) between two events, and counts one call's time: a
    training loop's host runs ahead of the device too.
    """
    timed = _on_cuda if device.startswith("cuda") else _on_cpu
    repeats = {name: timed(run, None) for name, run in runs.items()}  # the warm-up
    rounds: dict[str, list[float]] = {name: [] for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    order, shuffle = list(runs), random.Random(0).shuffle
    begin = time.perf_counter()

    def left() -> float:
        rounds_left = 1 - min(map(len, rounds.values()), default=min_rounds) / min_rounds
        return max(rounds_left, 1 - (time.perf_counter() - begin) / seconds if seconds else 0.0)

    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        while left() > 0 and any(len(times) < max_rounds for times in rounds.values()):
            shuffle(order)
            taken = False
            fair = sum(spent.values()) / len(runs)
            for name in order:
                enough = len(rounds[name]) >= min_rounds
                if len(rounds[name]) >= max_rounds or (enough and spent[name] > fair):
                    continue
                taken = True
                if before is not None:
                    before()
                start = time.perf_counter()
                rounds[name].append(timed(runs[name], repeats[name])[0])
                spent[name] += time.perf_counter() - start
            if not taken:  # the fast ones are through, and the slow ones have had as much time
                break
            if progress is not None:
                progress(min(1.0, 1 - left()))
    finally:
        if enabled:
            gc.enable()
    if progress is not None:
        progress(1.0)
    return rounds


def _on_cpu(run: Run, repeats: Any) -> tuple[float, int]:
    if repeats is None:
        run()
        run()
        return 0.0, 1
    start = time.perf_counter()
    run()
    return time.perf_counter() - start, 1


def _on_cuda(run: Run, repeats: Any) -> tuple[float, int]:
    """Seconds of a call, and how many calls make a round. ``repeats``: what an earlier call returned; None: warm up."""
    if repeats is None:
        run()
        once = _on_cuda(run, (0.0, 2))[0]
        return once, max(1, min(50, int(0.01 / max(once, 1e-6))))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats[1]):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats[1], repeats[1]


def quartiles(seconds: list[float]) -> tuple[float, float, float]:
    if len(seconds) < 2:
        return (seconds[0],) * 3
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, middle, high


def noise(seconds: list[float]) -> float:
    """Interquartile range over median."""
    low, middle, high = quartiles(seconds)
    return (high - low) / middle


def device_name(device: str = "cpu") -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def device_folder(device: str = "cpu") -> str:
    """The folder's name in bench/results/."""
    name = re.sub(r"\((r|tm)\)", "", device_name(device).lower())
    return re.sub(r"[^a-z0-9.]+", "-", name).strip("-")


def free_memory(device: str = "cpu") -> int:
    """Bytes."""
    if device.startswith("cuda"):
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # which tensors to come can have
        return torch.cuda.mem_get_info()[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def last_level_cache() -> int:
    """Bytes."""
    sizes = [64 << 20]
    try:
        texts = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        sizes = [int(text[:-1]) << {"K": 10, "M": 20}[text[-1]] for text in texts] or sizes
    except (OSError, KeyError, ValueError):
        pass
    return max(sizes)


@lru_cache(maxsize=1)
def commit() -> tuple[str, bool]:
    """The commit in short, and whether the native code or the package differ from it."""

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    return git("rev-parse", "--short", "HEAD") or "unknown", bool(git("status", "--porcelain", "csrc", "genopt_ext"))


def machine(device: str = "cpu") -> dict[str, Any]:
    """Where and with what it was measured; ``load`` is the machine's at this moment."""
    from genopt_ext import _backend

    native = _backend.native
    name, changed = commit()
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "capability": native.cpu_capability() if native is not None else "reference",
        "cache": last_level_cache(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **installed(PEERS)},
        "commit": name,
        "changed": changed,
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 2),
    }
