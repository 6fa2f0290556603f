"""Both calls of ``gpu_check.py`` on a CPU with small tensors, with failures planted: what is left must be readable."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cases import Case
from .gpu_check import Facts, Machine, checks, times

FILES = 8  # in a folder: who fetches them may have a limit
CASES = ("AdamW 1B", "AdamW 10000 x 64 replayed", "AdamW mixed unaligned 1B")
CRASHES = CASES[1]  # not the last

TESTS = '''"""Tests of a rehearsal, some of which fail on purpose."""
import os
import pytest
planted = pytest.mark.skipif({skip}, reason="not planted")
@pytest.mark.parametrize("i", range(8))
def test_that_passes(i):
    pass
@planted
def test_that_fails():
    assert 1 == 2, "planted failure"
@planted
def test_that_crashes():
    os.abort()
@planted
def test_that_breaks_the_gpu(monkeypatch):
    from bench import gpu_tests
    gpu_tests.broken = lambda: True
    assert 3 == 4, "planted fault"
'''


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@dataclass
class Rehearsal(Machine):
    """``plant``: which command fails: ``build``, ``case``, ``test``, or none."""

    folder: Path
    plant: str = ""
    device, scale, seconds = "cpu", 1e-4, 0.01

    def table(self, facts: Facts) -> list[tuple[Case, tuple[str, ...]]]:
        names = CASES[1:] if self.plant else CASES[:1]
        return [(case, others) for case, others in super().table(facts) if case.name in names]

    def build(self, facts: Facts) -> list[str]:
        told = "[print('compiling', i) for i in range(100)]"
        return python(f"{told}; raise SystemExit('planted: no such register')" if self.plant == "build" else told)

    def timed(self, case: Case, others: tuple[str, ...], facts: Facts, path: Path) -> list[str]:
        if self.plant == "case" and case.name == CRASHES:
            return python("import os; input(); print('planted: illegal access', flush=True); os.abort()")
        return ["env", "OMP_NUM_THREADS=1", *super().timed(case, others, facts, path)]

    def profile(self, facts: Facts) -> list[str] | None:
        return None

    def tested(self) -> list[str]:
        path = self.folder / "planted_tests.py"
        path.write_text(TESTS.format(skip=self.plant != "test"))
        return [str(path)]

    def compile(self, facts: Facts, program: Path) -> list[str]:
        return python("print('compiling the program')")

    def kernels(self, program: Path) -> list[str]:
        return python("print('all bits are the same')")

    def sanitizer(self, tool: str, program: Path) -> list[str]:
        if self.plant == "test" and tool == "racecheck":
            return python("print('planted: a race'); raise SystemExit(9)")
        return python(f"print('{tool}: 0 errors')")


@dataclass
class Left:
    """What a call has left."""

    status: int
    said: str
    folder: Path

    def data(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name).read_text())

    def expect(self, what: str, holds: bool) -> None:
        if not holds:
            raise AssertionError(f"{self.folder}: not so: {what}\n{self.said}")

    def log(self, name: str, *words: str) -> None:
        text = (self.folder / name).read_text()
        for word in words:
            self.expect(f"{name} says {word!r}", word in text)

    def screen(self, *words: str) -> None:
        for word in words:
            self.expect(f"the screen says {word!r}", word in self.said)


def timed_subjects(data: dict[str, Any]) -> set[tuple[str, str]]:
    return {(e["extra_info"]["case"], e["extra_info"]["subject"]) for e in data["benchmarks"]}


def times_pass(left: Left) -> None:
    data = left.data("times.json")
    left.expect("it passes", left.status == 0 and not data["failed"])
    wanted = {(CASES[0], who) for who in ("limit", "genopt_ext", "torch fused")}
    left.expect("all are timed", timed_subjects(data) == wanted)
    left.log("report.txt", CASES[0])
    left.screen(CASES[0], "0 failed")


def no_build(left: Left) -> None:
    data = left.data("times.json")
    left.expect("it fails and times nothing", left.status == 1 and "benchmarks" not in data)
    left.expect("the JSON has the end of the log", "planted: no such register" in data["checks"][-1]["last"])
    left.expect("nothing else was begun", not (left.folder / "cases.log").exists())
    left.log("build.log", "compiling 0", "compiling 99", "planted: no such register")
    left.screen("FAILED (1)   build", "planted: no such register", "nothing is timed, as the build failed")


def one_case(left: Left) -> None:
    data = left.data("times.json")
    left.expect("it fails by one case", left.status == 1 and list(data["failed"]) == [CRASHES])
    left.expect("its words are kept", "planted: illegal access" in data["failed"][CRASHES])
    left.expect("the next is timed", {case for case, _ in timed_subjects(data)} == {CASES[2]})
    left.log("cases.log", f"== {CRASHES}: CRASHED (SIGABRT)", f"== {CASES[2]}: passed")
    left.screen(f"CRASHED (SIGABRT) {CRASHES}", "planted: illegal access", f"1 failed: {CRASHES}")


def one_test(left: Left) -> None:
    data = left.data("checks.json")
    by_name = {step["name"]: step["status"] for step in data["checks"]}
    left.expect("tests and a sanitizer fail alone", [n for n, status in by_name.items() if status] == FAILING)
    left.expect("what comes after them has run", {"kernels", "synccheck"} <= set(by_name))
    # Each of three costs itself alone, and is named.
    names = ("test_that_fails", "test_that_crashes", "test_that_breaks_the_gpu")
    left.log("tests.log", "8 passed", "planted failure", "planted fault", "has broken its process's GPU", *names)
    left.log("sanitizers.log", "memcheck: 0 errors", "planted: a race", "synccheck: 0 errors")
    left.screen("FAILED (1)   tests", *names, "planted: a race", "2 failed: tests, racecheck")


FAILING = ["tests", "racecheck"]
PLAYS: dict[str, tuple[str, Callable[[Left], None]]] = {
    "times": ("", times_pass),
    "times-build": ("build", no_build),
    "times-case": ("case", one_case),
    "checks-test": ("test", one_test),
}


def play(name: str, folder: Path) -> None:
    """
    Raises:
        AssertionError: what it has left does not say what happened.
    """
    plant, judge = PLAYS[name]
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        machine = Rehearsal(folder, plant)
        status = times(machine, folder) if name.startswith("times") else checks(machine, folder)
    left = Left(status, said.getvalue(), folder)
    judge(left)
    left.expect(f"at most {FILES} files", sum(path.is_file() for path in folder.iterdir()) <= FILES)
    left.expect("a screen of some lines", len(left.said) < 12_000)


def rehearse(folder: Path) -> int:
    begin = time.perf_counter()
    for name in PLAYS:
        start = time.perf_counter()
        play(name, folder)
        print(f"rehearsed {name} in {time.perf_counter() - start:.0f} s", flush=True)
    print(f"gpu-check rehearsed in {time.perf_counter() - begin:.0f} s: {shlex.quote(str(folder))}")
    return 0
