"""Measures cases, one after another, and hands the rounds to pytest-benchmark for its statistics and its JSON.

The subjects of a case take turns; pytest-benchmark times one function after another. So all of a case's rounds run when
its first subject is asked for, and each subject's own are replayed to pytest-benchmark as they were measured.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import io
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from . import method
from .cases import Case
from .checks import check, expected, tolerance, wrong_by
from .limit import limit
from .memory import peak_above_rest, state_bytes
from .method import LIMIT, OURS, Run
from .packages import Absent
from .rounds import Made, forget, make, rotating
from .subjects import OWN_CODES, SUBJECTS, other

COPIES = 8
TRAINING_STEPS = 200


@dataclass
class Measured:
    """Of one case: the seconds of each subject's rounds, what else is known of it, and who is absent and why.

    ``wrong``: how ours failed its checks, where it was timed nevertheless.
    """

    rounds: dict[str, list[float]] = field(default_factory=dict)
    info: dict[str, dict[str, Any]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """``strict``: what fails its checks is not timed; else ours is, and the case has failed all the same."""

    seconds: float = 4.0
    scale: float = 0.25
    device: str = "cpu"
    command: str = ""  # what makes the result again
    subjects: tuple[str, ...] = tuple(name for name, subject in SUBJECTS.items() if subject.default)
    strict: bool = True


def copies(nbytes: float, device: str) -> int:
    """How many of something that large are twice the last-level cache."""
    cache = method.last_level_cache()
    if device.startswith("cuda"):
        cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(COPIES, -int(-2 * cache // max(1.0, nbytes))))


def prepare(
    name: str, case: Case, device: str, truth: Any, strict: bool = True
) -> tuple[Run, dict[str, Any], Made] | None:
    """A subject, warm: its copies, which take turns, made and stepped twice. None: not a subject of the case.

    Raises:
        Absent: it can not run here, or what it computes is wrong.
    """
    width = case.dtype.itemsize
    kept = case.state_bytes if case.kind != "clip" else 0.0
    one = case.elements * (sum(move.width for move in case.moves) or 2 * width + kept)
    alone = case.warm or case.kind in ("save", "load", "training") or name == "torch compiled"  # each copy compiles
    count = 1 if alone else copies(one, device)
    # Torch's state may be wider than the case's, and a loop over tensors makes some as large as the parameters.
    need = case.elements * (count * (2 * width + max(kept, 4.0 * case.moments)) + 12)
    # All of a GPU's memory is ours.
    if need > (0.9 if device.startswith("cuda") else 0.8) * method.free_memory(device):
        raise Absent(f"not enough memory: {need / 1e9:.1f} GB")
    made: list[Made] = []
    for _ in range(count):
        each = make(name, case, device)
        if each is None:
            return None
        if case.kind != "training":
            each.run()
            each.run()
        made.append(each)
    info: dict[str, Any] = {"copies": count}
    if truth is not None:
        error = info["error"] = round(wrong_by(made[0], *truth), 6)
        if not error < tolerance(case):
            info["wrong"] = f"computes something else: {error:.0%} off after two steps"
            if strict or not name.startswith(OURS):
                raise Absent(info["wrong"])
    return rotating([each.run for each in made]), info, made[0]


def measure(case: Case, settings: Settings, progress: Callable[[float], object] | None = None) -> Measured:
    """All rounds of a case.

    Raises:
        AssertionError: our numbers are not the reference's.
    """
    device, result = settings.device, Measured()
    try:
        check(case, device)
    except AssertionError as error:
        if settings.strict:
            raise
        result.wrong.append(str(error))
        forget()
    torch.compiler.reset()  # or it gives up after so many steps that are all different
    runs: dict[str, Run] = {}
    made: dict[str, Made] = {}
    if case.moves:
        arrays = copies(limit(case, device)[1] / 1.5, device) if not case.warm else 1
        moving = [limit(case, device) for _ in range(arrays)]
        runs[LIMIT], result.info[LIMIT] = rotating([run for run, _ in moving]), {"moved": moving[0][1]}
    elif case.kind == "training":  # nothing is faster than no optimizer
        none = make(OURS, case, device)
        assert none is not None and none.training is not None
        none.training.optimizer = None
        runs[LIMIT], result.info[LIMIT] = none.run, {}
    truth = expected(case, device) if case.kind == "step" and case.gradients else None
    for name in settings.subjects:
        try:
            prepared = prepare(name, case, device, truth, settings.strict)
        except Absent as absent:
            result.absent[name] = str(absent)
        except Exception as error:  # a package's own failure is no reason to lose the others' rows
            if name.startswith(OURS):
                raise
            said = (str(error).splitlines() or [""])[0].split(". ")[0]
            result.absent[name] = f"{type(error).__name__}: {said[:160]}"
        else:
            if prepared is not None:
                runs[name], result.info[name], made[name] = prepared
                if "wrong" in result.info[name]:
                    result.wrong.append(f"{name} {result.info[name]['wrong']}")
    del truth
    forget()
    gc.collect()
    if case.kind == "step" and len(case.shapes) == 1:
        for name in made:
            peak = peak_above_rest(runs[name], device)
            if peak is not None:
                result.info[name]["peak_bytes"] = peak / case.elements
    steps = max(5, int(TRAINING_STEPS * min(1.0, 100 * settings.scale)))
    rounds = {"min_rounds": steps, "max_rounds": steps}
    if case.kind != "training":
        rounds = {"min_rounds": method.FEW + 1, "max_rounds": 100}
    seconds = 0.0 if case.kind == "training" else settings.seconds
    result.rounds = method.in_turn(runs, seconds, device=device, progress=progress, **rounds)
    for name, each in made.items():
        info = result.info[name]
        if each.optimizer is not None:
            averages = case.dtype.itemsize if case.ema is not None and not name.startswith(OURS) else 0
            info["state_bytes"] = state_bytes(each.optimizer) / case.elements + averages
        if each.training is not None:
            info["optimizer_seconds"] = each.training.optimizer_seconds
            info["losses"] = [round(loss, 5) for loss in each.training.losses[-len(result.rounds[name]) :]]
        if case.kind == "step" and device.startswith("cuda"):
            info |= host_part(each)
    return result


def host_part(made: Made) -> dict[str, Any]:
    """The launches of a step of ours, and the host's time; nothing of others' and of the reference."""
    plan: Any = getattr(getattr(made.optimizer, "stepper", None), "plan", None)
    if plan is None:
        return {}
    before = plan.launches
    made.run()
    launches = plan.launches - before
    return {"launches": launches, "host_ms": 1e3 * statistics.median(host_seconds(made.run) for _ in range(20))}


def host_seconds(run: Run) -> float:
    """Until the call returns; the device is idle when it begins."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Replay:
    """A clock that gives pytest-benchmark the durations that were measured."""

    def __init__(self, seconds: list[float]) -> None:
        self.ticks: Iterator[float] = iter([tick for duration in seconds for tick in (0.0, duration)])

    def __call__(self) -> float:
        return next(self.ticks)


class Plugin:
    """What test_cases.py is run with. ``told`` hears of a case that begins, and of its progress."""

    def __init__(self, table: list[Case], settings: Settings, told: Callable[[Case, float], object]) -> None:
        self.table, self.settings, self.told = table, settings, told
        self.machine = method.machine(settings.device) | {"command": settings.command}  # as it is before the first case
        self.case: Case | None = None
        self.measured: Measured | AssertionError | RuntimeError = Measured()
        self.failed: dict[str, str] = {}
        # What has no entry of its own, as no subject of it ran, is kept here.
        self.absent: dict[str, dict[str, str]] = {}

    def pytest_generate_tests(self, metafunc: Any) -> None:
        pairs = [(case, subject) for case in self.table for subject in (LIMIT, *self.settings.subjects)]
        metafunc.parametrize("case,subject", pairs, ids=[f"{case.name}: {subject}" for case, subject in pairs])

    @pytest.fixture
    def session(self) -> Plugin:
        return self

    def measure(self, case: Case) -> Measured:
        if self.case is not case:
            self.case = case
            self.told(case, 0.0)
            self.measured = Measured()  # the last one's tensors make room
            gc.collect()
            if self.settings.device.startswith("cuda"):
                torch.cuda.empty_cache()
            try:
                self.measured = measure(case, self.settings, lambda share: self.told(case, share))
                self.absent[case.name] = self.measured.absent
                if self.measured.wrong:
                    self.failed[case.name] = "timed, but wrong: " + "; ".join(self.measured.wrong)
            except (AssertionError, RuntimeError) as error:
                self.measured = error
                self.failed[case.name] = str(error)
        if isinstance(self.measured, Measured):
            return self.measured
        raise self.measured

    def time(self, benchmark: Any, case: Case, subject: str) -> None:
        measured = self.measure(case)
        if subject not in measured.rounds:
            pytest.skip(measured.absent.get(subject, "not a subject of this case"))
        seconds = measured.rounds[subject]
        differs = other(subject, case) if subject != LIMIT else ""
        benchmark.group = case.name
        benchmark.extra_info |= {
            "case": case.name,
            "kind": case.kind,
            "subject": subject,
            "elements": case.elements,
            "tensors": len(case.shapes),
            "bytes": case.bytes,
            "noise": round(method.noise(seconds), 4),
            "weight_bytes": case.dtype.itemsize,
            "other": differs,
            # Instead of 8-bit state, other codes and more precise state are fair choices: who has them is a peer.
            "rival": differs in ("", OWN_CODES) or (case.kind == "step" and case.state == torch.int8),
            "scale": self.settings.scale,
            "main": case.main,
            "goal": case.goal,
            **measured.info[subject],
        }
        benchmark._timer = Replay(seconds)
        benchmark.pedantic(lambda: None, rounds=len(seconds), iterations=1)

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_generate_machine_info(self, config: Any) -> dict[str, Any]:
        return self.machine

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_generate_commit_info(self, config: Any) -> dict[str, Any]:
        return {"id": self.machine["commit"], "dirty": self.machine["changed"], "time": self.machine["date"]}

    def pytest_benchmark_update_json(self, config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
        output_json["machine_info"]["load at the end"] = method.machine(self.settings.device)["load"]
        output_json["absent"] = {case: reasons for case, reasons in self.absent.items() if reasons}
        output_json["failed"] = self.failed
        for entry in output_json["benchmarks"]:
            # Quartiles are kept; single rounds matter only where each is a point of a curve.
            keep = entry["extra_info"]["kind"] == "training"
            data = entry["stats"].pop("data", [])
            entry["params"] = {"subject": entry["extra_info"]["subject"]}  # a case's are long
            del entry["options"]["timer"]
            if keep:
                entry["stats"]["data"] = [float(f"{seconds:.4g}") for seconds in data]


def run(table: list[Case], settings: Settings, path: Path, told: Callable[[Case, float], object]) -> dict[str, str]:
    """Measures the cases into ``path``; returns those that failed, and why."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plugin = Plugin(table, settings, told)
    options = ["-s", "-q", "-p", "no:cacheprovider", "--benchmark-only", f"--benchmark-json={path}"]
    options += ["-W", "ignore"]  # in tests a warning is an error, and here it is no reason to lose a time
    said = io.StringIO()
    # Options for tests, and that they run within xdist, are not meant for this pytest.
    others = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("PYTEST_")}
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = pytest.main([str(Path(__file__).parent / "test_cases.py"), *options], plugins=[plugin])
    finally:
        os.environ.update(others)
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or (code and not plugin.failed):
        raise RuntimeError(f"pytest ended with {code}:\n{said.getvalue()[-4000:]}")
    return plugin.failed


def default_path(device: str) -> Path:
    """Where runs go that nobody commits."""
    return method.RESULTS / "local" / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}-{device}.json"
