"""Curves of growth.py: the straight line that each is expected to follow, where it bends away, a table, a figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter
from rich.table import Table

from .. import plots
from ..method import LIMIT, NOISY, OURS, Run, noise, quartiles
from ..report import duration

BENDS = 1.3  # times its line, by the lower quartile: from here on a row is marked

# x, what runs there, and who does not and why.
Point = tuple[int, dict[str, Run], dict[str, str]]


@dataclass(frozen=True)
class Axis:
    """``points`` takes the subjects' names and the last x. ``line``: what the expectation is made of."""

    name: str
    unit: str
    title: str
    points: Callable[[Sequence[str], int], Iterator[Point]]
    up_to: int
    acts: tuple[str, ...] = ("step",)
    line: str = "a fixed cost and a cost of each"


@dataclass(frozen=True)
class Curve:
    """``rounds``: seconds, by subject and x."""

    axis: Axis
    title: str
    rounds: dict[str, dict[int, list[float]]]

    @property
    def xs(self) -> list[int]:
        return sorted({x for by_x in self.rounds.values() for x in by_x})

    @cached_property
    def expected(self) -> dict[str, dict[int, float]]:
        """What each subject's own line says."""
        medians = {s: {x: statistics.median(times) for x, times in by_x.items()} for s, by_x in self.rounds.items()}
        return expectation(self.axis.name, medians)

    def quartiles(self, subject: str, x: int) -> tuple[float, float, float]:
        return quartiles(self.rounds[subject][x])

    def bend(self, x: int) -> float | None:
        """Ours over its line where it bends away from it, else None."""
        expected = self.expected.get(OURS, {}).get(x)
        if expected is None:
            return None
        low, median, _ = self.quartiles(OURS, x)
        return median / expected if low > BENDS * expected else None


def fit(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """The fixed cost a and the cost b of a unit, neither below 0, with the least squares of (a + b x) / y - 1."""
    u = [1 / y for y in ys]
    v = [x / y for x, y in zip(xs, ys, strict=True)]
    uu, uv, vv = sum(i * i for i in u), sum(i * j for i, j in zip(u, v, strict=True)), sum(j * j for j in v)
    determinant = uu * vv - uv * uv
    if determinant > 1e-12 * uu * vv:
        a = (sum(u) * vv - sum(v) * uv) / determinant
        b = (sum(v) * uu - sum(u) * uv) / determinant
        if a >= 0 and b >= 0:
            return a, b
        if a < 0:
            return 0.0, sum(v) / vv
    return sum(u) / uu, 0.0


def expectation(axis: str, medians: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """What each subject's own line says: {subject: {x: seconds}}."""
    expected: dict[str, dict[int, float]] = {}
    for subject, curve in medians.items():
        xs = sorted(curve)
        if subject == LIMIT or len(xs) < 2:
            continue
        if axis == "elements":  # what a step costs at all, and the bytes
            fixed = min(curve[x] for x in xs[:4])
            expected[subject] = {x: fixed + medians[LIMIT][x] for x in xs}
        elif axis == "threads":  # the threads share the work, until memory is the limit
            expected[subject] = {x: max(curve[xs[0]] * xs[0] / x, medians[LIMIT][x]) for x in xs}
        else:
            lower = xs[: max(2, round(len(xs) * 0.75))]
            a, b = fit(lower, [curve[x] for x in lower])
            expected[subject] = {x: a + b * x for x in xs}
    return expected


def table(curve: Curve) -> Table:
    shown = Table(title=f"{curve.title}: medians of rounds taken in turn")
    others = [name for name in curve.rounds if name != OURS]
    titles = ["ours", "quartiles", "ours a unit", "its line", "bends", *others, "torch / ours", "noisy"]
    for title in (curve.axis.unit, *titles):
        shown.add_column(title, justify="right", no_wrap=True)
    for x in curve.xs:
        low, ours, high = curve.quartiles(OURS, x)
        medians = {name: curve.quartiles(name, x)[1] for name in others if x in curve.rounds[name]}
        theirs = [median for name, median in medians.items() if name != LIMIT]
        expected = curve.expected.get(OURS, {}).get(x)
        bend = curve.bend(x)
        noisy = max(noise(times[x]) for times in curve.rounds.values() if x in times)
        shown.add_row(
            f"{x:,}",
            duration(ours),
            f"{duration(low)} - {duration(high)}",
            duration(ours / x) if curve.axis.name != "elements" else f"{ours / x * 1e9:.3g} ns",
            duration(expected) if expected is not None else "",
            f"{bend:.2f}" if bend else "",
            *(duration(medians[name]) if name in medians else "" for name in others),
            f"{min(theirs) / ours:.2f}" if theirs else "",
            f"{noisy:.0%}" if noisy > NOISY else "",
            style="bold red" if bend else None,
        )
    return shown


def figure(curves: list[Curve], path: Path, clock: str) -> list[Path]:
    """Of one axis: medians with bands between quartiles; dashed, what ours is expected to take."""
    axis = curves[0].axis
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    size = (7.5, 5.0) if len(curves) == 1 else (5.2 * columns, 3.8 * rows)
    drawn, panels = plots.plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharex=True)
    for curve, panel in zip(curves, panels.flat, strict=False):
        for subject in plots.ordered(curve.rounds):
            xs = sorted(curve.rounds[subject])
            low, middle, high = zip(*(curve.quartiles(subject, x) for x in xs), strict=True)
            look = {"color": plots.color(subject), "zorder": 3 if subject == OURS else 2}
            label = "limit: the same bytes moved, nothing computed" if subject == LIMIT else subject
            width, line = 2.4 if subject == OURS else 1.4, ":" if subject == LIMIT else "o-"
            panel.plot(xs, middle, line, label=label, linewidth=width, markersize=1.8 * width, **look)
            panel.fill_between(xs, low, high, alpha=0.25, linewidth=0, **look)
        if OURS in curve.expected:
            xs, expected = zip(*curve.expected[OURS].items(), strict=True)
            panel.plot(xs, expected, "--", color="black", linewidth=1, zorder=4, label=f"{OURS} expected: {axis.line}")
        for x in curve.xs:
            if (bend := curve.bend(x)) is not None:
                at = (x, curve.quartiles(OURS, x)[1])
                said = panel.annotate(
                    f"{bend:.1f}x expected", at, (-6, 6), textcoords="offset points", ha="right", fontsize=8
                )
                said.set(color=plots.OURS_COLOR, path_effects=[withStroke(linewidth=2, foreground="white")], zorder=5)
        panel.set(xscale="log", yscale="log", title=f"AdamW: {curve.title}")
        if axis.name in ("elements", "threads"):
            panel.set_xscale("log", base=2)
        if axis.name == "threads":
            panel.set_xticks(curve.xs, [str(x) for x in curve.xs])
        elif axis.name != "elements":
            panel.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        panel.yaxis.set_major_formatter(lambda seconds, _: duration(seconds))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(True, which="major", linewidth=0.4, alpha=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel(f"number of {axis.unit} (log scale)")
    for row in panels:
        row[0].set_ylabel(f"{clock}: median and quartiles (log scale)")
    plots.legend(drawn, panels[0][0], columns=2)
    return plots.save(drawn, path)
