"""make gpu-check without a GPU: its budget, its cases, and what is left when a step of it fails."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("bench.report", reason="run from the repository's root")
from bench import gpu_check, gpu_measure, gpu_probe, gpu_rehearsal, gpu_steps, session  # noqa: E402
from bench.cases import Case  # noqa: E402
from bench.gpu_cases import PACKAGES, cases  # noqa: E402
from bench.gpu_rehearsal import Rehearsal, python  # noqa: E402
from bench.method import OURS  # noqa: E402

pytestmark = pytest.mark.skipif("GENOPT_TEST_DEVICE" in os.environ, reason="gpu-check times on a GPU")
ROOT = Path(__file__).parent.parent
FACTS = {"memory": 0, "missing": {}, "tools": [], "architecture": "9.0"}


# --- steps and their time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", (gpu_check.TIMES, gpu_check.CHECKS), ids=("times", "checks"))
def test_budgets_are_nine_minutes(budget: dict[str, float], tmp_path: Path) -> None:
    assert sum(budget.values()) <= 9 * 60
    gpu_steps.Call(tmp_path, "call", budget)
    with pytest.raises(AssertionError, match="of 540"):
        gpu_steps.Call(tmp_path, "call", budget | {"more": 60.0})


def failed(folder: Path) -> dict[str, str]:
    """The cases that ``gpu_check.times`` tells to have failed, and why."""
    return json.loads((folder / "times.json").read_text())["failed"]


def test_who_takes_less_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(gpu_steps.time, "perf_counter", lambda: now[0])
    call = gpu_steps.Call(tmp_path, "call", {"build": 100.0, "cases": 200.0, "profile": 40.0})
    assert call.left("build") == 100
    now[0] = 30.0
    assert (call.left("cases"), call.left("profile")) == (270, 310)
    call.budget["profile"] = 0.0
    assert call.left("cases") == 310


def test_a_step_that_hangs_or_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = gpu_steps.Call(tmp_path, "call", {"hangs": 1.0, "absent": 1.0})
    hangs = "import subprocess, time; print('begun'); subprocess.run(['sleep', '60'])"
    stopped = call.run("hangs", python(hangs), grace=1.0)
    assert stopped.status == gpu_steps.TIMED_OUT and stopped.seconds < 10
    text = (tmp_path / "hangs.log").read_text()
    assert "\nbegun\n" in text and "stopped after" in text
    assert call.run("absent", ["no-such-command"]).status == gpu_steps.NOT_FOUND
    said = capsys.readouterr().out
    assert "OUT OF TIME  hangs" in said and "No such file or directory: 'no-such-command'" in said
    known = json.loads(call.path.read_text())["checks"]
    assert [step["status"] for step in known] == [124, 127] == [step.status for step in call.steps]


def test_the_whole_log_is_kept(tmp_path: Path) -> None:
    call = gpu_steps.Call(tmp_path, "call", {"build": 60.0})
    step = call.run("build", python("[print('line', i) for i in range(1000)]; raise SystemExit(2)"))
    assert len(step.last) == gpu_steps.SHOWN and step.last[-1] == "line 999"
    assert len((tmp_path / "build.log").read_text().splitlines()) == 1001  # the command too


# --- the cases ------------------------------------------------------------------------------------------------------


TABLE = cases(1e-4, 0)


def test_what_matters_most_comes_first() -> None:
    names = [case.name for case, _ in TABLE]
    assert names[:3] == ["AdamW 1B", "AdamW clipped 1B", "AdamW mixed 1B"] and len(set(names)) == len(names)
    large, short = ({case.name: case for case, _ in cases(1.0, memory)} for memory in (150e9, 85e9))
    assert large["AdamW int8 1B"].elements == 2 * short["AdamW int8 500M"].elements == 10**9
    assert {len(case.shapes) for case in large.values() if case.graph} == {1000, 10_000, 20_000}


@pytest.mark.parametrize(("case", "others"), TABLE, ids=[case.name for case, _ in TABLE])
def test_each_case_can_be_timed(case: Case, others: tuple[str, ...], set_threads: Callable[[int], None]) -> None:
    set_threads(1)  # several wait long for each other where other processes of the tests have the cores
    few = dataclasses.replace(case, shapes=case.shapes[:20], warm=True)
    settings = session.Settings(0.0, device="cpu", subjects=(OURS, *others), strict=False)
    measured = session.measure(few, settings)
    assert not measured.wrong and OURS in measured.rounds
    assert {*measured.rounds, *measured.absent} >= set(others) - set(PACKAGES)


# --- what fails -----------------------------------------------------------------------------------------------------


def test_the_reference_is_not_timed_under_our_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = gpu_measure._backend
    monkeypatch.setattr(backend, "native", SimpleNamespace(has_cuda=False))
    assert "the CUDA kernels are not built" in gpu_measure.refusal("cuda") and not gpu_measure.refusal("cpu")
    monkeypatch.setattr(backend, "native", None)
    monkeypatch.setattr(backend, "why_not_native", "nobody built it")
    monkeypatch.setattr(sys, "argv", ["gpu_measure", "AdamW 1B", "--device", "cpu", "--json", str(tmp_path / "x.json")])
    assert gpu_measure.main() == gpu_steps.NOT_BUILT and not any(tmp_path.iterdir())
    assert capsys.readouterr().out == "not timed: nobody built it\n"


@dataclasses.dataclass
class Quick(Rehearsal):
    """Cases whose processes only say something: ``code`` of each, after the line that lets it begin."""

    code: str = ""

    def probe(self) -> list[str]:
        return python(f"print({json.dumps(FACTS)!r})")

    def table(self, facts: gpu_check.Facts) -> list[tuple[Case, tuple[str, ...]]]:
        case = Case("AdamW", "AdamW", ((8,),))
        return [(dataclasses.replace(case, name=f"case {i}"), ("torch fused", "torchao")) for i in range(3)]

    def timed(self, case: Case, others: tuple[str, ...], facts: gpu_check.Facts, path: Path) -> list[str]:
        return python(f"input(); print({case.name!r}, {others!r}); {self.code}")


def test_one_process_without_kernels_ends_the_cases(tmp_path: Path) -> None:
    assert gpu_check.times(Quick(tmp_path, code="raise SystemExit(3)"), tmp_path) == 1
    assert list(failed(tmp_path)) == ["case 0"] and failed(tmp_path)["case 0"].startswith("FAILED (3)")


def test_what_crashes_is_tried_again_without_packages(tmp_path: Path) -> None:
    assert gpu_check.times(Quick(tmp_path, code="import os; os.abort()"), tmp_path) == 1
    log = (tmp_path / "cases.log").read_text()
    assert [log.count(f"\ncase {i} ('torch fused', 'torchao')\n") for i in range(3)] == [1, 1, 1]
    assert [log.count(f"\ncase {i} ('torch fused',)\n") for i in range(3)] == [1, 1, 1]
    assert len(failed(tmp_path)) == 3


def test_a_table_that_fails_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.report, "rows", lambda data: 1 / 0)
    assert gpu_check.times(Quick(tmp_path), tmp_path) == 1
    assert list(failed(tmp_path)) == ["case 0", "case 1", "case 2"]


def test_without_time_no_case_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LEAST", 1e9)
    assert gpu_check.times(Quick(tmp_path), tmp_path) == 1
    assert failed(tmp_path) == {f"case {i}": "no time was left" for i in range(3)}
    assert not (tmp_path / "cases.log").exists()


def test_a_machine_without_a_gpu_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Bare(Quick):
        def probe(self) -> list[str]:
            return python("raise RuntimeError('Found no NVIDIA driver')")

    class Mute(Quick):
        def probe(self) -> list[str]:
            return python("")

    assert gpu_check.times(Bare(tmp_path), tmp_path) == gpu_check.checks(Bare(tmp_path), tmp_path) == 1
    said = capsys.readouterr().out
    assert said.count("Found no NVIDIA driver") == 2 and "nothing is timed, as the probe failed" in said
    assert gpu_check.times(Mute(tmp_path), tmp_path) == 1


@pytest.mark.parametrize("name", ("times-build", "checks-test"))
def test_a_planted_failure_leaves_a_readable_report(name: str, tmp_path: Path) -> None:
    """``gpu_check.py rehearse`` has the others."""
    gpu_rehearsal.play(name, tmp_path)


# --- packages -------------------------------------------------------------------------------------------------------


def pins(name: str) -> dict[str, str]:
    text = (ROOT / name).read_text()
    return dict(re.findall(r"^([\w-]+)==([\w.]+)$", text, re.MULTILINE))


def test_wheels_are_those_of_the_other_lists() -> None:
    wheels, others = pins("requirements-gpu-check.txt"), pins("requirements-dev.txt") | pins("requirements-peers.txt")
    del wheels["setuptools"]  # torch 2.11's
    assert {name: others[name] for name in wheels if name in others} == {n: v for n, v in wheels.items() if n in others}
    wanted = {package for package, what in gpu_probe.NEEDED.items() if what == "its times"}
    assert wanted | {"expecttest", "hypothesis"} <= set(wheels)


def test_who_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_probe, "installed", lambda names: {name: "1.0" for name in names if name != "expecttest"})
    assert list(gpu_probe.facts("cpu")["missing"]) == ["expecttest"]
