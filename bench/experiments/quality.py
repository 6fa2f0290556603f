"""``python -m bench.experiments.quality``: final losses with 8-bit state against fp32 state, ours and others'.

Every subject starts from the same weights and sees the same batches and noise, for each seed. Losses are compared
with those of our fp32 state. Two subjects show how much of a difference is noise: torch's fp32 optimizer, which rounds
elsewhere, and ours with a learning rate that is 1 % larger.
Packages that are not installed are told as absent: ``pip install torchao bitsandbytes`` brings them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table

from genopt_ext import optim

from .. import report
from ..memory import storage
from ..method import ROOT
from ..packages import Absent, installed, package
from ..report import RESULTS
from .models import TASKS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BEGIN, END = "<!-- python -m bench.experiments.quality --readme: begin -->", "<!-- end -->"
GOAL = 0.3  # per cent
SMALLEST = 4096  # smaller parameters keep fp32 state, with every subject
BASE = "genopt_ext fp32"
NUDGED = "genopt_ext fp32, lr +1 %"
PACKAGES = ("torch", "torchao", "bitsandbytes")
OPTIONS: dict[str, dict[str, Any]] = {"AdamW": {"weight_decay": 0.1}}
Make = Callable[..., torch.optim.Optimizer]


def plain(rule: str) -> Make:
    return getattr(torch.optim, rule)


def ours(rule: str) -> Make:
    return getattr(optim, rule)


def nudged(rule: str) -> Make:
    make = getattr(optim, rule)
    return lambda params, lr, **kwargs: make(params, lr=1.01 * lr, **kwargs)


def ours_with(state_dtype: torch.dtype) -> Callable[[str], Make]:
    def subject(rule: str) -> Make:
        options: dict[str, Any] = {"state_dtype": state_dtype}
        if state_dtype == torch.int8:
            options["min_int8_size"] = SMALLEST
        make = getattr(optim, rule)
        try:
            make([torch.zeros(1, requires_grad=True)], **options)
        except TypeError as error:
            raise Absent(f"this genopt_ext has no state_dtype ({error})") from None
        return lambda params, **kwargs: make(params, **kwargs, **options)

    return subject


def eight_bit(module: str, rule: str) -> Make:
    """
    Raises:
        Absent: the package can not be imported, or has no such class.
    """
    make = getattr(package(module), rule + "8bit", None)
    if make is None:
        raise Absent(f"{module} has no {rule}8bit")
    return make


def torchao(rule: str) -> Make:
    """Stores in 8 bits what has at least 4096 elements and a multiple of 256. Compiles for every shape: minutes."""
    make = eight_bit("torchao.optim", rule)
    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")
    return make


def bitsandbytes(rule: str) -> Make:
    make = eight_bit("bitsandbytes.optim", rule)
    return lambda params, **kwargs: make(params, **kwargs, min_8bit_size=SMALLEST)


SUBJECTS: dict[str, Callable[[str], Make]] = {
    BASE: ours,
    "torch fp32": plain,
    NUDGED: nudged,
    "genopt_ext int8": ours_with(torch.int8),
    "genopt_ext bf16": ours_with(torch.bfloat16),
    "torchao 8-bit": torchao,
    "bitsandbytes 8-bit": bitsandbytes,
}


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


def measure_state(optimizers: list[torch.optim.Optimizer]) -> tuple[float, float]:
    """Share of elements with 8-bit moments, and bytes of state an element; what parameters share counts once."""
    total, narrow, seen = 0, 0, {}
    for opt in optimizers:
        for p in (p for group in opt.param_groups for p in group["params"]):
            tensors = [t for v in opt.state[p].values() if torch.is_tensor(v) for t in storage(v)]
            seen.update({t.data_ptr(): t.numel() * t.element_size() for t in tensors})
            total += p.numel()
            narrow += p.numel() * any(t.element_size() == 1 and t.numel() == p.numel() for t in tensors)
    return narrow / total, sum(seen.values()) / total


def run(model: str, rule: str, subject: str, seeds: int, steps: int | None) -> Result:
    task, result = TASKS[model](), Result(model, rule, subject)
    try:
        make = SUBJECTS[subject](rule)
    except Absent as absent:
        result.absent = str(absent)
        return result
    begin = time.perf_counter()
    for seed in range(seeds):
        made: list[torch.optim.Optimizer] = []

        def remembered(params: Any, lr: float, made: list[torch.optim.Optimizer] = made) -> torch.optim.Optimizer:
            made.append(make(params, lr=lr, **OPTIONS.get(rule, {})))
            return made[-1]

        training = task.train(remembered, task.lr[rule], seed, steps or task.steps)
        result.finals.append(training.final)
        result.losses.append(training.losses)
        result.narrow, result.bytes = measure_state(made)
    result.seconds = time.perf_counter() - begin
    return result


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


def write_readme(text: str, path: Path) -> None:
    """Replaces what stands between the two markers.

    Raises:
        ValueError: the markers are not there.
    """
    report.write_between(path, BEGIN, text, END)


def smoothed(losses: list[float]) -> list[float]:
    window = max(1, len(losses) // 20)
    return [statistics.fmean(losses[max(0, k - window) : k + 1]) for k in range(len(losses))]


def plot(results: list[Result], path: Path) -> None:
    """Above, training losses; below, how much they differ from those with fp32 state. Means of seeds, smoothed."""
    grouped = cases(results)
    figure, grid = plt.subplots(
        2, len(grouped), figsize=(3.6 * len(grouped), 6), layout="constrained", squeeze=False, sharex="col"
    )
    names = [name for name in SUBJECTS if any(r.subject == name and not r.absent for r in results)]
    for column, ((model, rule), subjects) in enumerate(grouped.items()):
        curves = {
            name: smoothed([statistics.fmean(at) for at in zip(*r.losses, strict=True)])
            for name, r in subjects.items()
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
    plt.close(figure)


def save(results: list[Result], args: argparse.Namespace, path: Path) -> None:
    entries = [asdict(r) | {"losses": [[round(x, 6) for x in smoothed(s)[::10]] for s in r.losses]} for r in results]
    given = {"seeds": args.seeds, "steps": args.steps, "threads": args.threads, "smallest": SMALLEST}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"versions": installed(PACKAGES), **given, "results": entries}, indent=1) + "\n")


def main(argv: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(prog="python -m bench.experiments.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--optimizers", nargs="+", default=["AdamW", "RMSprop"], choices=["AdamW", "RMSprop"])
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each (default: 3)")
    parser.add_argument("--steps", type=int, help="of a training (default: 400 for the GPT, 1000 for the others)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "quality" / "quality.json")
    parser.add_argument("--plot", type=Path, default=RESULTS / "quality" / "quality.png")
    parser.add_argument("--readme", action="store_true", help="also put the table into README.md")
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 130)
    results = []
    try:
        for model in args.models:
            for rule in args.optimizers:
                for subject in args.subjects:
                    r = run(model, rule, subject, args.seeds, args.steps)
                    results.append(r)
                    finals = ", ".join(f"{x:.5f}" for x in r.finals)
                    console.print(f"{model}, {rule}, {subject}: {r.absent or f'{finals} ({r.seconds:.0f} s)'}")
    finally:
        torch.set_num_threads(threads)
    console.print(table(results))
    for line in verdicts(results):
        console.print(line)
    save(results, args, args.json)
    plot(results, args.plot)
    console.print(f"results: {args.json}\nplot: {args.plot}")
    if args.readme:
        write_readme(markdown(results, args.seeds), ROOT / "README.md")
        console.print("README.md has the table")
    return results


if __name__ == "__main__":
    main()
