"""The benchmarks' own arithmetic: statistics, tables, byte counts, the README's section. No time is ever asserted."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

report = pytest.importorskip("bench.report", reason="run from the repository's root")
from bench import __main__ as command_line  # noqa: E402
from bench import cases as tables  # noqa: E402
from bench import checks, limit, memory, method, native, packages, plots, readme, rounds, session, subjects  # noqa: E402
from bench.cases import Case  # noqa: E402
from bench.method import OURS  # noqa: E402
from genopt_ext import optim  # noqa: E402

pytestmark = pytest.mark.skipif("GENOPT_TEST_DEVICE" in os.environ, reason="gpu-check times on a GPU")
ROOT = Path(__file__).parent.parent
CASES = tables.cases(0.001, memory=8e9)
NAMES = [case.name for case in CASES]


# --- the method -----------------------------------------------------------------------------------------------------


def test_quartiles_and_noise() -> None:
    assert method.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert method.noise([4.0, 1.0, 3.0, 2.0, 5.0]) == pytest.approx(2 / 3)
    assert method.quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_all_take_turns() -> None:
    calls: list[str] = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    shares: list[float] = []
    rounds = method.in_turn(runs, 0.0, min_rounds=7, progress=shares.append)
    assert {name: len(times) for name, times in rounds.items()} == dict.fromkeys("abc", 7)
    assert all(seconds >= 0 for times in rounds.values() for seconds in times)
    timed = calls[6:]  # the warm-up came first
    thirds = [timed[i : i + 3] for i in range(0, 21, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in thirds)
    assert len({tuple(each) for each in thirds}) > 1, "the same one always begins"
    assert shares[-1] == 1.0 and shares == sorted(shares)


@pytest.fixture
def spend(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """``spend(seconds)`` sets the clock forward, which stands otherwise."""
    now = [0.0]
    monkeypatch.setattr(method.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.append(now.pop() + seconds)


def test_slow_ones_share_the_time_and_not_the_rounds(spend: Callable[[float], None]) -> None:
    rounds = method.in_turn({"slow": lambda: spend(1.0), "fast": lambda: spend(0.01)}, 20.0, min_rounds=5)
    assert 5 <= len(rounds["slow"]) <= 15 and len(rounds["fast"]) == 300
    assert rounds["slow"] == pytest.approx([1.0] * len(rounds["slow"]))


def test_before_is_not_timed(spend: Callable[[float], None]) -> None:
    rounds = method.in_turn({"a": lambda: spend(0.5)}, 0.0, min_rounds=3, before=lambda: spend(10.0))
    assert rounds["a"] == [0.5] * 3


def test_replay_gives_what_was_measured() -> None:
    clock = session.Replay([0.5, 0.25])
    ticks = [clock() for _ in range(4)]
    assert [ticks[1] - ticks[0], ticks[3] - ticks[2]] == [0.5, 0.25]


def test_copies_outgrow_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method, "last_level_cache", lambda: 100)
    assert [session.copies(n, "cpu") for n in (1, 30, 100, 199, 200, 1000)] == [8, 7, 2, 2, 1, 1]


# --- the cases ------------------------------------------------------------------------------------------------------


def test_names_are_unique_and_selected() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert [case.name for case in tables.selected(CASES, ["gpt-2"])] == [name for name in NAMES if "GPT-2" in name]
    assert [case.name for case in tables.selected(CASES, ["^AdamW int8", "EMA"])] == [
        name for name in NAMES if name.startswith("AdamW int8") or "EMA" in name
    ]
    with pytest.raises(ValueError, match="no case is called 'Lion'"):
        tables.selected(CASES, ["Lion"])


def test_shapes_are_the_models() -> None:
    full = {case.name: case for case in tables.cases(1.0, memory=1e15)}
    assert full["AdamW GPT-2"].elements == 124_439_808
    assert full["AdamW Llama 1B"].elements == 1_235_814_400
    assert full["AdamW 64M"].elements == 1 << 26
    assert len(full["AdamW 20000x64"].shapes) == 20000
    small = next(case for case in tables.cases(0.25, memory=1e9) if "Llama" in case.name)
    assert 160 * small.elements <= 0.4e9


@pytest.mark.parametrize("case", [c for c in CASES if c.kind in ("step", "save")], ids=lambda case: case.name)
def test_bytes_are_those_of_real_state(case: Case) -> None:
    """On one tensor of whole blocks: counters of steps are less than a thousandth."""
    factored = case.optimizer == "Adafactor"  # with a number for each row and column
    few = tables.Case(**{**vars(case), "shapes": ((256, 256) if factored else (256 * 256,),)})
    params = rounds.parameters(few)
    opt = subjects.ours(few, params)
    opt.step()
    assert memory.state_bytes(opt) / few.elements == pytest.approx(case.state_bytes, abs=0.05 if factored else 1e-3)
    rounds.forget()
    if case.kind == "step":
        width = case.dtype.itemsize
        reads = 1 + (case.clip is not None or case.amp)
        both = case.state_bytes * 2 + width * (reads + 1 + (not case.master))
        totals = {
            "LAMB": 16,
            "StableAdamW": 8,
            "LARS": 8,
            "Prodigy": 16 - 4,
            "Adafactor": 12,
        }  # fp32, read before the step too
        both += totals.get(case.optimizer, 8 if "cautious" in case.kwargs else 0)
        assert case.bytes_an_element == pytest.approx(both)


KNOWN = {
    "AdamW 0.0625M": 28, "AdamW bf16 0.0625M": 14, "AdamW mixed 0.0625M": 22, "AdamW mixed master 0.0625M": 28,
    "AdamW int8 0.0625M": 16.0625, "AdamW int8 bf16 0.0625M": 10.0625, "SGD momentum 0.0625M": 20,
    "RMSprop 0.0625M": 20, "RMSprop centered momentum 0.0625M": 36, "AdamW EMA 0.0625M": 36,
    "AdamW clipped GPT-2 /1024": 32, "quantize int8 0.0625M": 5.015625, "clip_grad_norm_ GPT-2 /1024": 4,
}  # fmt: skip


def test_bytes_are_the_published_ones() -> None:
    table = {case.name: case for case in tables.cases(2**-10, memory=8e9)}
    assert {name: table[name].bytes_an_element for name in KNOWN} == KNOWN


@pytest.mark.parametrize("case", [c for c in CASES if c.moves], ids=lambda case: case.name)
def test_limit_moves_the_bytes(case: Case) -> None:
    """All but the scales, one part in 64 of the codes."""
    an_element = sum(each.bytes for each in limit.passes(case.moves))
    assert all(len(each.written) <= limit.ARRAYS for each in limit.passes(case.moves))
    whole = sum(int(move.width) * (move.read + move.written) for move in case.moves)
    assert an_element == whole and an_element >= 0.98 * case.bytes_an_element
    run, moved = limit.limit(case, "cpu")
    run()
    assert moved == pytest.approx(case.elements * an_element, abs=64 * 12 * 8) or case.elements < 4096


@pytest.mark.parametrize("fresh", (False, True))
def test_every_loop_of_the_limit_leaves_numbers_as_they_are(fresh: bool) -> None:
    from genopt_ext import _C

    kept = [torch.zeros(4096 + 16) if fresh else torch.randn(4096 + 16) for _ in range(3)]
    before = [t.clone() for t in kept]
    arrays = [(-(-t.data_ptr() // 64) * 64, written) for t, written in zip(kept, (True, False, True), strict=True)]
    for prefetches, non_temporal, capability in itertools.product((False, True), (False, True), _C.cpu_capabilities()):
        native.MemoryLoop(arrays, 4096 * 4, 2, fresh, prefetches, non_temporal, capability)()
    native.MemoryLoop.fastest(arrays, 4096 * 4, 2, fresh)()
    assert all(torch.equal(t, old) for t, old in zip(kept, before, strict=True))


def test_only_packages_imports_what_others_made() -> None:
    others = "|".join(name.removeprefix("torch-") for name in packages.PEERS)
    imports = re.compile(rf"^\s*(import|from) ({others}|importlib)\b|^class Absent", re.MULTILINE)
    found = [path.name for path in (ROOT / "bench").rglob("*.py") if imports.search(path.read_text())]
    assert found == ["packages.py"]


def test_offsets_and_missing_gradients() -> None:
    params = rounds.parameters(tables.Case("AdamW", "AdamW", ((4, 3), (5,)), offset=1))
    assert all(t.storage_offset() == 1 and t.is_contiguous() for p in params for t in (p, p.grad))
    rounds.forget()
    case = tables.Case("AdamW", "AdamW", ((4, 3),), gradients=False)
    assert rounds.parameters(case)[0].grad is None and case.bytes == 0
    rounds.forget()


def test_a_step_is_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: calls.append("replay")))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext(calls.append("capture")))
    run = rounds.replaying(lambda: calls.append("step"))
    for _ in range(3):
        run()
    assert calls == ["step", "capture", "step", "replay", "replay"]


def test_what_is_wrong_is_timed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(case: Case, device: str) -> None:
        raise AssertionError("kernels and reference differ")

    monkeypatch.setattr(session, "check", check)
    monkeypatch.setattr(session, "tolerance", lambda case: 0.0)
    case = tables.Case("AdamW", "AdamW", ((300,),))
    with pytest.raises(AssertionError, match="differ"):
        session.measure(case, session.Settings(0.0, subjects=(OURS,)))
    measured = session.measure(case, session.Settings(0.0, subjects=(OURS, "torch fused"), strict=False))
    assert OURS in measured.rounds and "torch fused" in measured.absent
    assert measured.wrong[0] == "kernels and reference differ" and "computes something else" in measured.wrong[1]


@pytest.mark.parametrize("name", optim.OURS)
def test_every_class_has_something_to_be_compared_with(name: str) -> None:
    given = dict(silent_sgd_phase=False) if name == "RAdamScheduleFree" else {}
    _, moved = checks.expected(Case(name, name, ((700,),), kwargs=given), "cpu")
    assert moved.isfinite().all() and moved.any()


def test_wrong_results_are_seen() -> None:
    case = tables.Case("SGD", "SGD", ((300,),), kwargs={"momentum": 0.9})
    truth = checks.expected(case, "cpu")
    made = rounds.make("torch fused", case, "cpu")
    assert made is not None and checks.wrong_by(made, *truth) == pytest.approx(1.0)  # has not moved
    made.run()
    made.run()
    assert checks.wrong_by(made, *truth) < 1e-4
    made.run()
    assert checks.wrong_by(made, *truth) > 0.3


def test_who_is_absent_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tables.Case("AdamW int8", "AdamW", ((4096,),), state=torch.int8)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    packages.package.cache_clear()
    with pytest.raises(packages.Absent, match="."):
        rounds.make("bitsandbytes", case, "cpu")
    packages.package.cache_clear()
    many = tables.Case("many", "AdamW", ((1,),) * (subjects.MANY + 1))
    with pytest.raises(packages.Absent, match="too slow with 5001 tensors"):
        rounds.make("torch for-loop", many, "cpu")
    assert rounds.make("torch for-loop", case, "cpu") is None  # torch has no 8-bit state


def test_what_a_subject_does_otherwise_is_said() -> None:
    codes = tables.Case("quantize int8", "AdamW", ((4096,),), kind="quantize")
    state = tables.Case("AdamW int8", "AdamW", ((4096,),), state=torch.int8)
    assert [subjects.other("bitsandbytes", case) for case in (codes, state)] == [subjects.OWN_CODES] * 2
    assert subjects.other("torch per tensor", codes) == "one scale for all"
    assert subjects.other("torch fused", state) == "fp32 moments"
    assert subjects.other("genopt_ext", codes) == subjects.other("torch compiled", codes) == ""


# --- the report -----------------------------------------------------------------------------------------------------


def entry(case: str, subject: str, median: float, **info: Any) -> dict[str, Any]:
    common = {
        "case": case, "kind": "step", "subject": subject, "elements": 10**9,
        "tensors": 1, "bytes": 28e9, "rival": not info.get("other"),
        "noise": 0.01, "weight_bytes": 4, "other": "", "scale": 1,
        "main": True, "goal": "", "state_bytes": 8.0,
    }  # fmt: skip
    stats = {"median": median, "q1": 0.9 * median, "q3": 1.1 * median, "iqr": 0.2 * median, "rounds": 9}
    return {"extra_info": common | info, "stats": stats}


def made_up() -> dict[str, Any]:
    machine = {
        "device": "Abacus", "threads": 2, "capability": "beads", "commit": "abc", "changed": False, "load": 0.5,
        "date": "2026-01-02T03:04:05", "load at the end": 0.6, "command": "run --scale 1",
        "versions": {"torch": "9.9", "python": "3.99"},
    }  # fmt: skip
    entries = [
        entry("one", "limit", 1.0, moved=28e9),
        entry("one", "genopt_ext", 1.25, peak_bytes=0.0),
        entry("one", "torch fused", 1.5, peak_bytes=4.0),
        entry("one", "torch foreach", 5.0),
        entry("two", "limit", 1.0, moved=14e9),  # half the bytes
        entry("two", "genopt_ext", 4.0, noise=0.3),
        entry("two", "torch fused", 1.0, other="bf16 moments"),
        entry("two", "optimi", 2.0),
    ]
    absent = {"one": {"torchao": "not installed"}, "two": {"torchao": "not installed"}}
    return {"machine_info": machine, "benchmarks": entries, "absent": absent, "failed": {}}


def test_report_arithmetic() -> None:
    rows = {(row.case, row.subject): row for row in report.rows(made_up())}
    one, two = rows["one", "genopt_ext"], rows["two", "genopt_ext"]
    assert (one.of_limit, one.peer, one.speed, one.bytes_an_element) == (0.8, "torch fused", 22.4e9, 28.0)
    assert one.peer_over_ours == pytest.approx(1.2) and not one.doubt
    # The limit moved half: it would have taken 2 s. Torch does something else, so optimi is the peer.
    assert (two.of_limit, two.peer, two.peer_over_ours, two.doubt) == (0.5, "optimi", 0.5, "noisy")
    few = made_up()
    few["benchmarks"][2]["stats"]["rounds"] = 5  # of torch fused, the best peer
    assert {(row.subject, row.doubt) for row in report.rows(few) if row.case == "one"} == {
        (subject, "few rounds") for subject in ("genopt_ext", "torch fused", "torch foreach")
    }
    assert [row.case for row in report.behind(made_up())] == ["two"]
    first, second = report.verdicts(made_up())
    assert first == "Ahead of the best peer in 1 of 2 cases; at 95% of the limit or more in 0."
    assert second == "Behind: two: optimi takes 0.50 of our time, 50% of the limit, noisy."
    assert report.footnotes(made_up()) == ["Absent: torchao (not installed): one, two."]


def test_durations_and_ratios() -> None:
    assert [report.duration(s) for s in (2.5, 0.0125, 3.21e-4, 5e-8)] == ["2.5 s", "12.5 ms", "321 us", "0.05 us"]
    assert [report.ratio(x) for x in (None, 1.234, 56.7)] == ["", "1.23x", "57x"]


def test_section_and_figures(tmp_path: Path) -> None:
    path = tmp_path / "bench" / "results" / "abacus" / "2026-01-02-abc.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(made_up()))
    written = plots.draw(path)
    assert path.with_name("2026-01-02-abc-bandwidth.png") in written
    assert all(p.stat().st_size > 1000 for p in written)
    text = readme.markdown([path], tmp_path)
    assert "| one | 1.25 s | 22.4 | 80% | torch fused | 1.20x |  |" in text
    assert "| two | 4 s | 7 | 50% | optimi | 0.50x | noisy |" in text
    assert "![Bandwidth of each case against the limit](bench/results/abacus/2026-01-02-abc-bandwidth.png)" in text
    assert "python -m bench run --scale 1 --json bench/results/abacus/2026-01-02-abc.json" in text
    assert "Absent: torchao (not installed)." in text
    assert "number of tensors" not in text
    grown = tmp_path / "bench" / "results" / "growth" / "abacus.json"
    grown.parent.mkdir()
    grown.write_text('{"machine_info": {"command": "python -m bench.experiments.growth --seconds 1"}}')
    grown.with_name("abacus-tensors.png").write_bytes(b"")
    text = readme.markdown([path], tmp_path)
    assert "![Time against the number of tensors](bench/results/growth/abacus-tensors.png)" in text
    assert "python -m bench.experiments.growth --seconds 1\n" in text
    old = path.with_name("2025-12-31-old.json")
    old.write_text(json.dumps(made_up()))
    path.with_name("2027-01-01-other.json").write_text('{"results": []}')
    (tmp_path / "bench" / "results" / "local").mkdir()
    assert readme.newest(tmp_path / "bench" / "results") == [path]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"benchmarks": [{"extra_info": {"case": "old"}}]}')
    with pytest.raises(ValueError, match="not made by python -m bench run"):
        report.load(path)


def test_readme_is_not_stale() -> None:
    """`python -m bench readme --write` mends it."""
    paths = readme.newest()
    assert paths, "no result is committed"
    assert readme.between((ROOT / "README.md").read_text(), readme.BEGIN) == readme.markdown(paths).strip("\n")


def test_figures_of_the_readme_are_there() -> None:
    text = readme.between((ROOT / "README.md").read_text(), readme.BEGIN)
    pictures = [line.split("](", 1)[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert pictures and all((ROOT / picture).exists() for picture in pictures)


def test_each_result_is_linked() -> None:
    """By its path, or by a pattern of bench/results/README.md; dated ones by path alone, as newer ones replace them."""
    results = method.RESULTS
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/*.md")]
    text = "\n".join(page.read_text() for page in pages)
    named = [words for words in (results / "README.md").read_text().split("`")[1::2] if "<date>" not in words]
    patterns = [re.sub("<[a-z]+>", "[^/]+", re.escape(words)) for words in named]
    files = [path.relative_to(results).as_posix() for path in results.rglob("*") if path.is_file()]
    lost = [
        file
        for file in files
        if not file.startswith("local/") and file != "README.md" and f"results/{file}" not in text
        if not any(re.fullmatch(pattern, file) for pattern in patterns)
    ]
    assert files and not lost


# --- all of it ------------------------------------------------------------------------------------------------------


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": "-n 2"}  # which is for tests
    command = [sys.executable, "-W", "ignore", "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_run_and_compare(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    chosen = ["--cases", "^AdamW 0", "AdamW int8 0", "training", "save"]
    names = ["genopt_ext", "genopt_ext int8", "torch fused", "torch foreach", "flashoptim"]
    few = ["--scale", "0.0001", "--seconds", "0.01"]
    done = bench("run", *few, *chosen, "--subjects", *names, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    data = report.load(path)
    grouped = report.by_case(data)
    assert len(grouped) == 4 and data["failed"] == {}
    if not torch.cuda.is_available():
        assert "flashoptim" in data["absent"]["AdamW int8 0.00391M"]
    for case, entries in grouped.items():
        assert {"limit", "genopt_ext"} <= set(entries), case
        for subject, each in entries.items():
            assert each["stats"]["median"] > 0 and math.isfinite(each["extra_info"]["noise"]), (case, subject)
    losses = grouped["training step of the demo's GPT"]["genopt_ext"]["extra_info"]["losses"]
    assert len(losses) == 5 and all(math.isfinite(loss) for loss in losses)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".png"}
    again = path.with_name("again.json")
    again.write_text(path.read_text())
    assert command_line.main(["compare", str(path), str(again), "--times"]) == 0
    said = capfd.readouterr().out
    assert "+0%" in said and "Median" in said
    monkeypatch.setattr(command_line.shutil, "which", lambda *_, **__: None)
    assert command_line.main(["compare", str(path), str(again), "--times"]) == 2
    assert "--times needs the command pytest-benchmark" in capfd.readouterr().err


def test_launches_are_counted_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU there are none."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    case = tables.Case("AdamW", "AdamW", ((8,),))
    ours, torchs, reference = (rounds.make(n, case, "cpu") for n in (OURS, "torch fused", OURS + " reference"))
    for each in (ours, torchs, reference):
        each.run()
    counted = session.host_part(ours)
    assert counted["launches"] == 0 and counted["host_ms"] > 0
    assert session.host_part(torchs) == session.host_part(reference) == {}


def test_wrong_arguments_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["run", "--cases", "Lion"]) == 2
    assert "no case is called 'Lion'" in capsys.readouterr().err
