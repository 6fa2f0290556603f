"""How steps grow, on few and small points; see bench/experiments/growth.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

growth = pytest.importorskip("bench.experiments.growth", reason="run from the repository's root")
from bench.experiments import growth_report  # noqa: E402


def test_fit_finds_fixed_cost_and_cost_of_a_unit() -> None:
    xs = [1, 10, 100, 1000]
    assert growth_report.fit(xs, [5 + 0.25 * x for x in xs]) == pytest.approx((5, 0.25))
    assert growth_report.fit(xs, [2.0 * x for x in xs]) == pytest.approx((0, 2))
    assert growth_report.fit(xs, [3.0] * 4) == pytest.approx((3, 0))
    assert growth_report.fit([4], [8.0]) == (8, 0)
    # Neither is below 0.
    a, b = growth_report.fit([1, 2, 4], [1.0, 4.0, 16.0])
    assert a == 0 and b > 0
    a, b = growth_report.fit([1, 2, 4], [4.0, 2.0, 1.0])
    assert a > 0 and b == 0


def test_a_curve_that_bends_is_marked_where_it_does() -> None:
    xs = growth.steps_of(10_000, 10**0.5)
    assert xs[:4] == [1, 3, 10, 32] and xs[-1] == 10_000
    seconds = {x: 1e-4 + 1e-6 * x * (4 if x > 1000 else 1) for x in xs}
    curve = growth_report.Curve(growth.AXES["tensors"], "", {growth.OURS: {x: [seconds[x]] * 5 for x in xs}})
    assert curve.xs == xs
    bends = {x: bend for x in xs if (bend := curve.bend(x)) is not None}
    assert list(bends) == [3162, 10_000] and 3.5 < bends[10_000] < 4.5


def test_bytes_and_threads_have_the_limit_as_their_line() -> None:
    ours, limit = {1: 2.0, 4: 2.5, 16: 9.0}, {1: 0.5, 4: 2.0, 16: 8.0}
    medians = {growth.OURS: ours, growth.LIMIT: limit}
    assert growth_report.expectation("elements", medians) == {growth.OURS: {1: 2.5, 4: 4.0, 16: 10.0}}
    medians = {growth.OURS: {1: 8.0, 2: 4.5, 4: 4.0}, growth.LIMIT: {1: 6.0, 2: 3.5, 4: 3.0}}
    assert growth_report.expectation("threads", medians) == {growth.OURS: {1: 8.0, 2: 4.0, 4: 3.0}}


def test_what_does_not_fit_into_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(growth.SUBJECTS)
    monkeypatch.setattr(growth, "free_memory", lambda: 17 << 20)
    _, runs, absent = growth.large(1 << 20, names)
    assert not runs and list(absent) == names
    assert absent[growth.OURS] == "with it, 0.0156 GiB are needed, and 0.0149 GiB are free"
    monkeypatch.setattr(growth, "free_memory", lambda: 28 << 20)
    _, runs, absent = growth.large(1 << 20, names)
    assert list(runs) == [growth.OURS, "torch fused", growth.LIMIT] and list(absent) == ["torch foreach"]


def test_torchs_slow_loading_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "LOADED", 3)
    for x, runs, absent in growth.once_points([growth.OURS, "torch fused"], 10):
        assert len(runs) == (8 if x <= 3 else 7)
        assert list(absent) == ([] if x <= 3 else ["torch fused: load_state_dict"])


def test_who_is_left_out_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(growth.SUBJECTS, "torch foreach", None)
    for axis in growth.AXES.values():
        if axis.name != "threads":  # 16M elements
            x, runs, _ = next(axis.points([growth.OURS, "torch fused"], 1))
            assert x == 1 and not any("foreach" in name for name in runs)


def test_axes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "GROUPED", 4)
    path = tmp_path / "growth.json"
    few = ["--up-to", "4", "--seconds", "0", "--rounds", "2", "--threads", "1", "--json", str(path)]
    axes = ["elements", "groups", "once"]
    curves = growth.main(["--axis", *axes, "--cpu-time", *few])
    assert [curve.axis.name for curve in curves] == ["elements", "groups"] + ["once"] * 4
    entries = json.loads(path.read_text())["benchmarks"]
    named = {(e["extra_info"]["axis"], e["extra_info"]["subject"]) for e in entries}
    assert named == {(a, s) for a in axes for s in growth.SUBJECTS} | {("elements", growth.LIMIT)}
    for e in entries:
        assert e["stats"]["rounds"] == 2 and e["stats"]["median"] > 0
        assert (e["extra_info"]["expected"] is None) == (e["extra_info"]["subject"] == growth.LIMIT)
    for axis in axes:
        assert (tmp_path / f"growth-{axis}.png").stat().st_size > 1000
