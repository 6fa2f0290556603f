"""Times every case with pytest-benchmark: `python -m bench`, or `pytest bench/test_steps.py`.

The subjects of a case take turns within one process, a round each, so that a machine whose speed drifts
slows all of them alike. pytest-benchmark times one function after another; so all of a case's rounds run
when its first subject is asked for, and each subject's own rounds are handed to pytest-benchmark as they
were measured, for its statistics, JSON and comparisons.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from genopt_ext import _C, env

from .cases import Case, cases, check, subjects

SCALE = float(os.environ.get("BENCH_SCALE", "0.25"))
COMPILED = os.environ.get("BENCH_COMPILED") == "1"
SECONDS = float(os.environ.get("BENCH_SECONDS", "6"))  # per case
WANTED = os.environ.get("BENCH_CASES", "")
CASES = [case for case in cases(SCALE) if WANTED in case.name]
NAMES = ["floor", "genopt_ext", "torch fused", "torch foreach", "torch per tensor", "torch compiled"]
EVICT = torch.zeros(1 << 26)


@lru_cache(maxsize=1)
def measure(index: int) -> dict[str, list[float]]:
    """Seconds of each round of each subject."""
    case = CASES[index]
    check(case)
    gc.collect()
    running = subjects(case, COMPILED)
    for run in running.values():
        run()
        run()
    rounds: dict[str, list[float]] = {name: [] for name in running}
    gc.disable()
    try:
        begin = time.perf_counter()
        while len(rounds["floor"]) < 5 or (time.perf_counter() - begin < SECONDS and len(rounds["floor"]) < 300):
            for name, run in running.items():
                if case.cold:
                    EVICT.add_(1.0)
                start = time.perf_counter()
                run()
                rounds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return rounds


def noise(seconds: list[float]) -> float:
    """Interquartile range over median."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return (high - low) / middle


@lru_cache(maxsize=1)
def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


class Replay:
    """A clock that gives pytest-benchmark the durations that were measured."""

    def __init__(self, seconds: list[float]) -> None:
        self.ticks: Iterator[float] = iter([tick for duration in seconds for tick in (0.0, duration)])

    def __call__(self) -> float:
        return next(self.ticks)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile meets its own
@pytest.mark.parametrize("subject", NAMES)
@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
def test_step(benchmark: Any, index: int, subject: str) -> None:
    seconds = measure(index).get(subject)
    if seconds is None:
        pytest.skip("not a subject of this case")
    case: Case = CASES[index]
    benchmark.group = case.name
    benchmark.extra_info |= {
        "case": case.name,
        "subject": subject,
        "elements": case.elements,
        "tensors": len(case.shapes),
        "bytes": case.bytes,
        "noise": noise(seconds),
        "scale": SCALE,
        "threads": torch.get_num_threads(),
        "capability": _C.cpu_capability(),
        "commit": commit(),
        **{name: text.split(" in ")[0] for name, text in env.report().items()},  # not where it is installed
    }
    benchmark._timer = Replay(seconds)
    benchmark.pedantic(lambda: None, rounds=len(seconds), iterations=1)
