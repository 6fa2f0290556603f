"""All that only a machine with an NVIDIA GPU can tell, in two calls of at most nine minutes, each useful alone.

``times`` builds the extension for the GPU that is there and times the cases of ``gpu_cases.py``, each in a process of
its own; a build that fails ends it. ``checks`` builds too, runs the tests on ``cuda``, and compute-sanitizer on the
torch-free test of the kernels. Each writes logs and one JSON into a folder, anew after every step and case.
``rehearse`` goes through both on a CPU, with failures planted, and sees that what they leave can be read.

Needs a torch with CUDA, nvcc, the packages for tests of requirements-dev.txt and, to compare with others,
requirements-gpu-check.txt. ``python bench/gpu_check.py times --out FOLDER``.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the Makefile runs this as a file

from rich.console import Console  # noqa: E402

from bench import method, report  # noqa: E402
from bench.cases import Case  # noqa: E402
from bench.gpu_cases import PACKAGES, cases  # noqa: E402
from bench.gpu_steps import NOT_BUILT, Call, Child, Step  # noqa: E402

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Seconds that each step is promised; what one leaves, later ones have. A first import of torch may take half a minute.
TIMES = {"probe": 60.0, "build": 120.0, "cases": 310.0, "profile": 50.0}
CHECKS = {"probe": 60.0, "build": 100.0, "tests": 170.0, "compile": 50.0, "kernels": 20.0}
CHECKS |= dict.fromkeys(SANITIZERS, 35.0)
CASE = 75.0  # at most, for one that hangs; torchao's compiles take half of it
SHORT = 6  # lines of a case's failure on the screen; the JSON and the log have more
LEAST = 12.0  # with less left, no case is begun
WORKERS = 12
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats", "SchedulerStats")
RESULT = "bench/results/<device>/<date>-<commit>.json"
# Tests that look at no device.
ELSEWHERE = ("demo", "growth", "instructions", "mutations", "quality", "sass")
Facts = dict[str, Any]


class Machine:
    """The commands that each step runs."""

    device, scale, seconds = "cuda", 1.0, 3.0

    def table(self, facts: Facts) -> list[tuple[Case, tuple[str, ...]]]:
        return cases(self.scale, facts["memory"])

    def probe(self) -> list[str]:
        return [sys.executable, "-m", "bench.gpu_probe", self.device]

    def build(self, facts: Facts) -> list[str]:
        given = ["FORCE_CUDA=1", f"TORCH_CUDA_ARCH_LIST={facts['architecture']}"]
        return ["env", *given, sys.executable, "setup.py", "build_ext", "--inplace"]

    def case(self, name: str, others: tuple[str, ...], facts: Facts, *more: str) -> list[str]:
        where = ["--device", self.device, "--scale", f"{self.scale:g}", "--memory", f"{facts['memory']:g}"]
        return [sys.executable, "-m", "bench.gpu_measure", name, *others, *where, *more]

    def timed(self, case: Case, others: tuple[str, ...], facts: Facts, path: Path) -> list[str]:
        return self.case(case.name, others, facts, "--seconds", f"{self.seconds:g}", "--json", str(path), "--wait")

    def profile(self, facts: Facts) -> list[str] | None:
        """Of a tenth of the parameters, as a profiler restores what a kernel writes. None: there is no profiler."""
        if "ncu" not in facts["tools"]:
            return None
        sections = [word for section in SECTIONS for word in ("--section", section)]
        which = ["--kernel-name", "regex:update|norm", "--launch-skip", "2", "--launch-count", "2"]
        steps = self.case("AdamW clipped 1B", (), facts, "--profile", "--scale", f"{self.scale / 10:g}")
        return ["ncu", "--clock-control", "none", *sections, *which, *steps]

    def tests(self, facts: Facts) -> list[str]:
        options = ["-v", "-o", "addopts=", "-o", "faulthandler_timeout=45", "-rfE", "--tb=short", "--durations=20"]
        options += ["-p", "no:cacheprovider", "-p", "bench.gpu_tests", "--continue-on-collection-errors"]
        if "pytest-timeout" not in facts["missing"]:
            options += ["--timeout=60", "--timeout-method=thread"]  # which ends the process
        if "pytest-xdist" not in facts["missing"]:
            workers = min(WORKERS, os.cpu_count() or 1)
            options += ["-n", str(workers), f"--max-worker-restart={WORKERS}"]
        return [sys.executable, "-m", "pytest", *options, *self.tested()]

    def tested(self) -> list[str]:
        return [*(f"--ignore=tests/test_{name}.py" for name in ELSEWHERE), "tests"]

    def compile(self, facts: Facts, program: Path) -> list[str]:
        return ["bash", "tests/cpp/build_cuda.sh", str(program), facts["architecture"].replace(".", "")]

    def kernels(self, program: Path) -> list[str]:
        return [str(program)]

    def sanitizer(self, tool: str, program: Path) -> list[str]:
        return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", str(program), "few"]


def begun(machine: Machine, folder: Path, name: str, budget: dict[str, float]) -> tuple[Call, Facts | None]:
    """A call with its first two steps. None: the machine has not even a GPU."""
    call = Call(folder, name, budget)
    probe = call.run("probe", machine.probe())
    told = [line for line in probe.last if line.startswith('{"')]  # warnings may follow it
    if not probe.passed or not told:
        return call, None
    facts: Facts = json.loads(told[-1])
    call.data["facts"] = facts
    for package, what in facts["missing"].items():
        print(f"    missing: {package}, for {what}; see requirements-gpu-check.txt")
    call.run("build", machine.build(facts))
    return call, facts


# --- times ----------------------------------------------------------------------------------------------------------


class Times:
    """The cases of a call, each in a process of its own; the next one's imports run while one is measured."""

    def __init__(self, call: Call, machine: Machine, facts: Facts, commit: str) -> None:
        self.call, self.machine, self.facts, self.commit = call, machine, facts, commit
        self.data = call.data
        self.data |= {"machine_info": {}, "benchmarks": [], "absent": {}, "failed": {}}
        self.log = call.folder / "cases.log"

    def all(self) -> None:
        table = self.machine.table(self.facts)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            following: Child | None = None
            for i, (case, others) in enumerate(table):
                if self.call.left("cases") < LEAST:
                    self.data["failed"][case.name] = "no time was left"
                    continue
                child = following or self.child(folder, i, case, others)
                child.go()
                following = self.child(folder, i + 1, *table[i + 1]) if i + 1 < len(table) else None
                step = self.ended(child, case)
                if step.status == NOT_BUILT:  # nor would any other case be timed
                    break
                mine = tuple(each for each in others if each not in PACKAGES)
                if not child.log.with_suffix(".json").exists() and mine != others and self.call.left("cases") > LEAST:
                    child = self.child(folder, len(table) + i, case, mine)
                    child.go()
                    self.ended(child, case)
            if following is not None:
                following.kill()
        self.call.write()

    def child(self, folder: Path, index: int, case: Case, others: tuple[str, ...]) -> Child:
        path = folder / f"{index}.json"
        return Child(self.machine.timed(case, others, self.facts, path), path.with_suffix(".log"), waits=True)

    def ended(self, child: Child, case: Case) -> Step:
        """Takes in what a case's process has found, and how it ended."""
        step = child.wait(case.name, min(CASE, self.call.left("cases")))
        with self.log.open("ab") as log:
            log.write(f"\n== {case.name}: {step.verdict}\n".encode() + child.log.read_bytes())
        path, failed = child.log.with_suffix(".json"), self.data["failed"]
        found: dict[str, Any] = {"benchmarks": [], "absent": {}, "failed": {}}
        if path.exists() and path.stat().st_size:
            found |= json.loads(path.read_text())
            self.data["machine_info"] = self.data["machine_info"] or found["machine_info"]
            self.data["machine_info"]["load at the end"] = found["machine_info"]["load at the end"]
            if self.commit:
                self.data["machine_info"] |= {"commit": self.commit, "changed": False}
        else:
            path.unlink(missing_ok=True)
        self.data["benchmarks"] += found["benchmarks"]
        self.data["absent"] |= found["absent"]
        failed |= found["failed"]
        if not (step.passed and found["benchmarks"]) and case.name not in found["failed"]:
            failed[case.name] = "\n".join([step.verdict, *step.last[-12:]])
        self.call.write()
        try:
            print(summary(case, found, step), flush=True)
            self.show()
        except Exception:  # what is measured is written; a table of it is no reason to measure no more
            traceback.print_exc(file=sys.stdout)
        if case.name in failed:
            print(*(f"    {each[:200]}" for each in failed[case.name].splitlines()[-SHORT:]), sep="\n", flush=True)
        return step

    def show(self) -> None:
        """The whole table, as text."""
        if self.data["benchmarks"]:
            text = io.StringIO()
            report.show(self.data, Console(file=text, width=240))
            (self.call.folder / "report.txt").write_text(text.getvalue())


def summary(case: Case, found: dict[str, Any], step: Step) -> str:
    """A case of a call in a line."""
    mine = next((row for row in report.rows(found) if row.subject == method.OURS), None)
    if mine is None:
        return f"{step.verdict:12} {case.name} in {step.seconds:.0f} s: not timed"
    said = [f"{case.name:35} {report.duration(mine.median):>7}"]
    if mine.speed:
        said.append(f"{mine.speed / 1e9:.0f} GB/s")
    if mine.of_limit is not None:
        said.append(f"{mine.of_limit:.0%} of copy")
    if mine.peer:
        said.append(f"{mine.peer} takes {report.ratio(mine.peer_over_ours)}")
    if "host_ms" in mine.info:
        said.append(f"host {mine.info['host_ms']:.3f} ms, {mine.info['launches']} launches")
    return ", ".join(said + [mine.doubt] * bool(mine.doubt))


def times(machine: Machine, folder: Path, commit: str = "") -> int:
    call, facts = begun(machine, folder, "times", TIMES)
    if facts is None or call.failed():
        print(f"nothing is timed, as the {'probe' if facts is None else 'build'} failed: {folder}")
        return 1
    measured, profile = Times(call, machine, facts, commit), machine.profile(facts)
    if profile is None:
        call.budget["profile"] = 0.0
    measured.all()
    if profile is not None:
        call.run("profile", profile)
    else:
        call.skip("profile", "ncu is not on the PATH")
    failed = [*call.failed(), *measured.data["failed"]]
    try:
        print(*report.verdicts(measured.data), sep="\n")
    except Exception:
        traceback.print_exc(file=sys.stdout)
    print(f"{len(failed)} failed{': ' * bool(failed)}{', '.join(failed)}; all of it: {folder}")
    return int(bool(failed))


# --- checks ---------------------------------------------------------------------------------------------------------


def checks(machine: Machine, folder: Path) -> int:
    """A step that fails costs those alone that need what it was to make."""
    call, facts = begun(machine, folder, "checks", CHECKS)
    if facts is None:
        print(f"nothing is checked, as the probe failed: {folder}")
        return 1
    if call.failed():
        call.skip("tests", "the build failed")
    else:
        environment = {"GENOPT_TEST_DEVICE": "cuda"} if machine.device == "cuda" else {}
        # xdist waits ten seconds for workers that hang, and tells of failures after that.
        environment |= {"PYTEST_ADDOPTS": "", "OMP_NUM_THREADS": "2"}  # threads of many processes wait for each other
        call.run("tests", machine.tests(facts), grace=15.0, **environment)
    program = ROOT / "build" / "test_cuda"
    program.parent.mkdir(exist_ok=True)
    if call.run("compile", machine.compile(facts, program), "kernels.log").passed:
        call.run("kernels", machine.kernels(program), "kernels.log")
        for tool in SANITIZERS:
            call.run(tool, machine.sanitizer(tool, program), "sanitizers.log")
    else:
        for name in ("kernels", *SANITIZERS):
            call.skip(name, "its program was not compiled")
    failed = call.failed()
    print(f"{len(failed)} failed{': ' * bool(failed)}{', '.join(failed)}; all of it: {folder}")
    return int(bool(failed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("times", "checks", "rehearse"))
    parser.add_argument("--out", type=Path, help="where a folder of its own goes (default: $OUT, else build/gpu-check)")
    parser.add_argument("--commit", default="", help="what is measured, where there is no git")
    arguments = parser.parse_args()
    given = arguments.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    folder = (given or ROOT / "build" / "gpu-check").absolute()
    folder /= arguments.what
    if arguments.what == "rehearse":
        from bench.gpu_rehearsal import rehearse

        return rehearse(folder)
    if arguments.what == "checks":
        return checks(Machine(), folder)
    status = times(Machine(), folder, arguments.commit)
    data = json.loads((folder / "times.json").read_text())
    if given is None and data.get("benchmarks"):
        info = data["machine_info"]
        kept = method.RESULTS / method.device_folder("cuda") / f"{info['date'][:10]}-{info['commit']}.json"
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "times.json", kept)
        print(f"result: {kept}")
    elif data.get("benchmarks"):
        print(f"times.json is to become {RESULT}")
    return status


if __name__ == "__main__":
    sys.exit(main())
