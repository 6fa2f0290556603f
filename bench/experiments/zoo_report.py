"""Results of zoo.py: rows of its record, as a table and for docs/optimizers/README.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table

from ..method import OURS

BEGIN = "<!-- python -m bench.experiments.zoo --docs: begin -->"
TORCH = "torch"
ROSENBROCK = {"Rosenbrock fp64": torch.float64, "Rosenbrock fp32": torch.float32}
GPT = "GPT"
NOTED = 1e-4  # a difference from torch's beyond this is not rounding


@dataclass(frozen=True)
class Run:
    """One training; a seed changes only the GPT's."""

    task: str
    optimizer: str
    package: str
    lr: float
    seed: int
    steps: int


@dataclass(frozen=True)
class Record(Run):
    """A training that was run. ``value``: the distance from the minimum or the final loss; None: it diverged.

    A record may have runs of several machines, which agree to seven digits.
    """

    value: float | None
    seconds: float
    commit: str
    date: str
    torch: str
    device: str

    @property
    def run(self) -> Run:
        return Run(self.task, self.optimizer, self.package, self.lr, self.seed, self.steps)


@dataclass(frozen=True)
class Row:
    """Of a class on a task: the best learning rate that was tried, and the values with it, by package and seed."""

    task: str
    optimizer: str
    lr: float | None = None
    at_edge: bool = False  # whether all that were tried are on one side of it
    values: dict[str, dict[int, float]] = field(default_factory=dict)

    @property
    def difference(self) -> float | None:
        """Between ours and torch's, relative to torch's: the largest of a seed."""
        ours, theirs = self.values.get(OURS, {}), self.values.get(TORCH, {})
        changes = [abs(ours[seed] - theirs[seed]) / theirs[seed] for seed in ours if theirs.get(seed)]
        return max(changes, default=None)


def row(task: str, optimizer: str, steps: int, records: Iterable[Record]) -> Row:
    """What the record says; without runs, a row without numbers."""
    mine = [r for r in records if (r.task, r.optimizer, r.steps) == (task, optimizer, steps)]
    tried = {r.lr: r.value for r in mine if r.package == OURS and r.seed == 0}
    finals = {lr: value for lr, value in tried.items() if value is not None}
    if not finals:
        return Row(task, optimizer)
    best = min(finals, key=lambda lr: finals[lr])
    values: dict[str, dict[int, float]] = {}
    for r in mine:
        if r.lr == best and r.value is not None:
            values.setdefault(r.package, {})[r.seed] = r.value
    return Row(task, optimizer, best, best in (min(tried), max(tried)), values)


def spread(values: dict[int, float]) -> str:
    """Mean and standard deviation of seeds."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values.values()):.4f}"
    return f"{mean} ± {statistics.stdev(values.values()):.4f}" if len(values) > 1 else mean


def distance(values: dict[int, float]) -> str:
    return f"{values[0]:.1e}" if values else ""


def percent(ratio: float) -> str:
    return f"{100 * ratio:.2g} %"


def cells(each: Row) -> tuple[str, ...]:
    if each.lr is None:
        return (each.optimizer, "not run", "", "", *([""] if each.task == GPT else []))
    shown = spread if each.task == GPT else distance
    ours, theirs = (shown(each.values.get(package, {})) for package in (OURS, TORCH))
    four = (each.optimizer, f"{each.lr:g}" + (" (edge)" if each.at_edge else ""), ours, theirs)
    if each.task != GPT:
        return four
    return (*four, percent(each.difference) if each.difference is not None else "")


def header(task: str) -> tuple[str, ...]:
    four = ("class", "lr", "final loss" if task == GPT else "distance from (1, 1)", "torch's")
    return (*four, "largest difference") if task == GPT else four


def of_task(rows: Iterable[Row], task: str) -> list[Row]:
    """The best first, those without numbers last."""
    mine = [each for each in rows if each.task == task]
    return sorted(mine, key=lambda r: statistics.fmean(r.values[OURS].values()) if r.lr is not None else float("inf"))


def table(rows: list[Row]) -> Table:
    task = rows[0].task
    shown = Table(title=task)
    for name in header(task):
        shown.add_column(name, justify="left" if name == "class" else "right", no_wrap=True)
    for each in of_task(rows, task):
        shown.add_row(*cells(each))
    return shown


def markdown(rows: list[Row], where: dict[str, Any]) -> str:
    lines = []
    losses = of_task(rows, GPT)
    if losses:
        lines += ["| " + " | ".join(header(GPT)) + " |", "|---|--:|--:|--:|--:|"]
        lines += ["| " + " | ".join(cells(each)) + " |" for each in losses]
    first, second = ({r.optimizer: r for r in of_task(rows, task)} for task in ROSENBROCK)
    names = [name for name in first if name in second]
    if names:
        lines += ["", "| class | lr | distance in fp64 | torch's | lr | distance in fp32 | torch's |"]
        lines += ["|---|--:|--:|--:|--:|--:|--:|"]
        for name in names:
            lines.append("| " + " | ".join((*cells(first[name])[:4], *cells(second[name])[1:4])) + " |")
    versions = where["versions"]
    lines += ["", f"{where['device']}, {where['date'][:10]}, commit {where['commit']}, torch {versions['torch']}."]
    changes = {r.optimizer: r.difference for r in losses if r.difference is not None}
    if changes:
        noted = [f"{name} by {percent(change)}" for name, change in changes.items() if change > NOTED]
        largest = max((change for change in changes.values() if change <= NOTED), default=0.0)
        but = f", but {', '.join(noted)}" if noted else ""
        lines.append(f"On the GPT, no seed's loss is further than {percent(largest)} from torch's{but}.")
    absent = [f"{r.optimizer} on {r.task}" for r in rows if r.lr is None]
    return "\n".join([*lines, *([f"Not run: {', '.join(absent)}."] if absent else [])])
