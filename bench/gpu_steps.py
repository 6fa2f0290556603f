"""Commands in turn under one budget of time: what each says goes to a log, and what is known so far to a JSON.

Nothing here imports genopt_ext: whoever does so before it is built has what was built before.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
SECONDS = 540  # a call; ten minutes with what stands around it
SHOWN = 40  # lines of a failure
GRACE = 2.0  # seconds in which who was interrupted may say what it knew
TIMED_OUT, NOT_FOUND = 124, 127  # as a shell has them
NOT_BUILT = 3  # the status of a case's process where there are no kernels to be timed


@dataclass
class Step:
    """What became of a command; ``last``: the end of what it said."""

    name: str
    command: str
    status: int
    seconds: float
    log: str
    last: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.status == 0

    @property
    def verdict(self) -> str:
        if self.passed:
            return "passed"
        if self.status == TIMED_OUT:
            return "OUT OF TIME"
        return f"FAILED ({self.status})" if self.status > 0 else f"CRASHED ({signal.Signals(-self.status).name})"

    def __str__(self) -> str:
        return f"{self.verdict:12} {self.name} in {self.seconds:.0f} s: {self.log}"


class Child:
    """A command in a process group of its own, so that what it started ends with it. ``log`` gets its output.

    ``waits``: it is to read a line before it begins, which ``go`` writes.
    """

    def __init__(
        self, command: list[str], log: Path, environment: Mapping[str, str] | None = None, waits: bool = False
    ):
        self.command, self.log, self.start = shlex.join(command), log, time.perf_counter()
        self.process: subprocess.Popen[str] | None = None
        with log.open("a", errors="replace") as output:
            print("+", self.command, file=output, flush=True)
            self.begin = output.tell()
            try:
                self.process = self.started(command, output, environment or {}, waits)
            except OSError as error:
                print(error, file=output)

    @staticmethod
    def started(
        command: list[str], output: IO[str], environment: Mapping[str, str], waits: bool
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.PIPE if waits else subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )

    def go(self) -> None:
        self.start = time.perf_counter()
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended already
                self.process.stdin.write("go\n")
                self.process.stdin.close()

    def wait(self, name: str, seconds: float, grace: float = GRACE) -> Step:
        """Who takes longer is killed, and ``grace`` seconds ahead of that interrupted."""
        status = NOT_FOUND
        if self.process is not None:
            try:
                status = self.process.wait(max(1.0, seconds - grace))
            except subprocess.TimeoutExpired:
                status = TIMED_OUT
                self.process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(grace)
            self.kill()
            if status == TIMED_OUT:
                with self.log.open("a") as output:
                    print(f"\nstopped after {time.perf_counter() - self.start:.0f} s", file=output)
        with self.log.open("rb") as file:
            file.seek(self.begin)
            last = file.read().decode(errors="replace").strip().splitlines()[-SHOWN:]
        taken = time.perf_counter() - self.start
        return Step(name, self.command, status, round(taken, 1), self.log.name, last if status else last[-5:])

    def kill(self) -> None:
        """All of its group, whatever became of itself."""
        if self.process is not None:
            if self.process.stdin is not None:
                self.process.stdin.close()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it
                self.process.wait(GRACE)


class Call:
    """One call: its steps in turn, each with what is left of the time, and the JSON of what is known.

    ``budget`` promises seconds to each step, in order. Who takes less leaves the rest to those that follow.
    """

    def __init__(self, folder: Path, name: str, budget: Mapping[str, float]) -> None:
        assert sum(budget.values()) <= SECONDS, f"{name}: {sum(budget.values()):g} s of {SECONDS}"
        self.folder, self.path, self.budget = folder, folder / f"{name}.json", dict(budget)
        self.begin, self.total = time.perf_counter(), sum(budget.values())
        self.steps: list[Step] = []
        self.data: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob("*.log"), self.path):
            old.unlink(missing_ok=True)

    def left(self, step: str) -> float:
        """Seconds, without those promised to later steps."""
        names = list(self.budget)
        later = sum(self.budget[name] for name in names[names.index(step) + 1 :])
        return self.total - later - (time.perf_counter() - self.begin)

    def run(self, name: str, command: list[str], log: str = "", grace: float = GRACE, **environment: str) -> Step:
        """Runs a step to its end; its output goes to the end of ``log``, by default a file of its name."""
        child = Child(command, self.folder / (log or f"{name}.log"), environment)
        return self.add(child.wait(name, self.left(name), grace))

    def add(self, step: Step) -> Step:
        self.steps.append(step)
        self.write()
        print(step, flush=True)
        if not step.passed:
            print(*(f"    {line[:200]}" for line in step.last), sep="\n", flush=True)
        return step

    def skip(self, name: str, why: str) -> None:
        """A step that can not be taken and is no failure."""
        self.data.setdefault("skipped", {})[name] = why
        self.write()
        print(f"{'skipped':12} {name}: {why}", flush=True)

    def write(self) -> None:
        """Anew and whole: a reader, or the end of the machine, never meets half of it."""
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.data | {"checks": [asdict(step) for step in self.steps]}, indent=1))
        new.replace(self.path)

    def failed(self) -> list[str]:
        return [step.name for step in self.steps if not step.passed]
