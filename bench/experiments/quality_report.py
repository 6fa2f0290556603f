"""Results of quality.py: a table, for docs/quality.md too, what it says of the goals, and a figure."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from .. import plots
from ..packages import installed

BEGIN = "<!-- python -m bench.experiments.quality --docs: begin -->"
GOAL = 0.3  # per cent
SMALLEST = 4096  # smaller parameters keep fp32 state, with every subject
BASE = "genopt_ext fp32"
NUDGED = "genopt_ext fp32, lr +1 %"
PACKAGES = ("torch", "torchao", "bitsandbytes")


@dataclass
class Result:
    """One subject's trainings on one model with one optimizer; lists have an entry for every seed."""

    model: str
    optimizer: str
    subject: str
    absent: str = ""
    finals: list[float] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    narrow: float = 0.0  # share of the parameters' elements whose moments have 8 bits
    bytes: float = 0.0  # of optimizer state, an element
    seconds: float = 0.0

    def change(self, base: Result) -> list[float]:
        """Per cent, by seed."""
        return [100 * (a / b - 1) for a, b in zip(self.finals, base.finals, strict=True)]


def cases(results: list[Result]) -> dict[tuple[str, str], dict[str, Result]]:
    grouped: dict[tuple[str, str], dict[str, Result]] = {}
    for r in results:
        grouped.setdefault((r.model, r.optimizer), {})[r.subject] = r
    return grouped


HEADER = ("model", "optimizer", "state", "final loss", "against fp32", "worst seed", "in 8 bits", "bytes")


def rows(results: list[Result]) -> list[tuple[str, ...]]:
    shown = []
    for (model, rule), subjects in cases(results).items():
        base = subjects.get(BASE)
        for name, r in subjects.items():
            if r.absent:
                shown.append((model, rule, name, "absent", "", "", "", ""))
                continue
            change = r.change(base) if base else []
            shown.append(
                (
                    model,
                    rule,
                    name,
                    f"{statistics.fmean(r.finals):.4f}",
                    f"{statistics.fmean(change):+.3f} %" if base and r is not base else "",
                    f"{max(change, key=abs):+.3f} %" if base and r is not base else "",
                    f"{r.narrow:.1%}",
                    f"{r.bytes:.2f}",
                )
            )
    return shown


def verdicts(results: list[Result]) -> list[str]:
    """What the table says about the goals, in sentences."""
    said, worst, beside = [], [], []
    for case, subjects in cases(results).items():
        base, int8 = subjects.get(BASE), subjects.get("genopt_ext int8")
        if not base or not int8 or int8.absent:
            continue
        change = statistics.fmean(int8.change(base))
        worst.append((abs(change), change, case))
        for name in ("torchao 8-bit", "bitsandbytes 8-bit"):
            peer = subjects.get(name)
            if peer and not peer.absent:
                beside.append((change, statistics.fmean(peer.change(base)), f"{name.split()[0]} on {' '.join(case)}"))
    if worst:
        distance, change, case = max(worst)
        within = "within" if distance <= GOAL else "NOT within"
        said.append(f"Int8 state ends {within} {GOAL} % of fp32 state: furthest is {' '.join(case)}, {change:+.3f} %.")
    if beside:
        closer = sum(abs(ours) <= abs(theirs) for ours, theirs, _ in beside)
        said.append(f"It is closer to fp32 state than other 8-bit optimizers in {closer} of {len(beside)} comparisons.")
        above = [f"{name} ({theirs:+.3f} % against {ours:+.3f} %)" for ours, theirs, name in beside if ours > theirs]
        said.append(f"Its loss is higher than that of {', '.join(above) or 'none of them'}.")
    for name, what in (
        ("torch fp32", "torch's fp32 optimizers, which round elsewhere,"),
        (NUDGED, "1 % of learning rate"),
    ):
        changes = [
            abs(statistics.fmean(subjects[name].change(subjects[BASE])))
            for subjects in cases(results).values()
            if BASE in subjects and name in subjects
        ]
        if changes:
            makes = "make" if name == "torch fp32" else "makes"
            said.append(f"For comparison: {what} {makes} a difference of {max(changes):.2g} % at most.")
    said += sorted({f"Absent: {r.subject}, {r.optimizer}: {r.absent}." for r in results if r.absent})
    return said


def table(results: list[Result]) -> Table:
    shown = Table(title="8-bit optimizer state: final loss, mean of seeds")
    for name in HEADER:
        shown.add_column(name, justify="left" if name in HEADER[:3] else "right", no_wrap=True)
    previous: tuple[str, ...] = ()
    for row in rows(results):
        if previous and row[:2] != previous:
            shown.add_section()
        previous = row[:2]
        shown.add_row(*row)
    return shown


def markdown(results: list[Result], seeds: int) -> str:
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---|---|" + "--:|" * (len(HEADER) - 3)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(results)]
    versions = ", ".join(f"{name} {version}" for name, version in installed(PACKAGES).items())
    note = (
        f'Mean of {seeds} seeds; "in 8 bits": the share of elements whose moments are (parameters of less than '
        f"{SMALLEST} elements are not; torchao's also not where the size is no multiple of 256); bytes of state an "
        f"element. {versions}."
    )
    return "\n".join([*lines, "", note, "", *verdicts(results)])


def plot(results: list[Result], subjects: list[str], path: Path) -> None:
    """Above, training losses; below, how much they differ from those with fp32 state. Means of seeds, smoothed."""
    grouped = cases(results)
    figure, grid = plots.plt.subplots(
        2, len(grouped), figsize=(3.6 * len(grouped), 6), layout="constrained", squeeze=False, sharex="col"
    )
    names = [name for name in subjects if any(r.subject == name and not r.absent for r in results)]
    for column, ((model, rule), mine) in enumerate(grouped.items()):
        curves = {
            name: plots.smoothed([statistics.fmean(at) for at in zip(*r.losses, strict=True)])
            for name, r in mine.items()
            if not r.absent
        }
        for i, name in enumerate(names):
            if name not in curves:
                continue
            style = {"color": f"C{i}", "linewidth": 3 if name == BASE else 1.3}
            grid[0, column].plot(curves[name], label=name, **style)
            if BASE in curves:
                change = [100 * (a / b - 1) for a, b in zip(curves[name], curves[BASE], strict=True)]
                grid[1, column].plot(change, **style)
        grid[0, column].set(title=f"{model}, {rule}")
        grid[1, column].axhspan(-GOAL, GOAL, color="0.93", zorder=0)
        grid[1, column].set(xlabel="step", ylim=(-5 * GOAL, 5 * GOAL))
    grid[0, 0].set_ylabel("training loss")
    grid[1, 0].set_ylabel(f"% from fp32 state (grey: {GOAL})")
    handles = {label: h for axes in grid[0] for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(names))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plots.plt.close(figure)
