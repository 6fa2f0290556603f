"""``python -m bench.growth``: how AdamW's step grows with tensors, elements, parameter groups and threads.

Each curve has its straight line: a fixed cost and a cost per unit, fitted to the curve's own lower points; for elements
and threads, the time that a native loop takes to move the same bytes. Where ours bends away from its line, the table
says by what factor. "once" is what happens once in a training, by the number of tensors: construction, the first step,
checkpoints.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from pytest_benchmark.stats import Stats
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from genopt_ext import _C, optim

from .method import NOISY, Run, device_folder, in_turn, machine, noise

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
OURS, LIMIT = "genopt_ext", "limit"
BENDS = 1.3  # times its line, by the lower quartile: from here on a row is marked
SMALL = 64  # elements of a tensor where it is their number that counts
GROUPED = 1000  # tensors that parameter groups share
SHARED = 1 << 16  # elements from which on ours too wakes a second thread

SUBJECTS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    OURS: lambda groups: optim.AdamW(groups),
    "torch fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "torch foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
}
# Bytes an element beside parameter and gradient: two moments, and foreach makes tensors of its own in passing.
STATE_BYTES = {OURS: 8, "torch fused": 8, "torch foreach": 16}
ACTS = ("construct", "construct and first step", "state_dict", "load_state_dict")

# (x, its runs by subject; or why there are none)
Point = tuple[int, "dict[str, Run] | str"]


@dataclass(frozen=True)
class Curve:
    """Medians and quartiles by subject, in seconds, at ``xs``."""

    axis: str
    title: str
    xs: list[int]
    rounds: dict[str, dict[int, list[float]]]
    expected: dict[str, dict[int, float]]


@dataclass(frozen=True)
class Axis:
    unit: str
    title: str
    points: Callable[[int], Iterator[Point]]
    up_to: int
    acts: tuple[str, ...] = ("step",)


def steps_of(last: int, factor: float) -> list[int]:
    """Powers of ``factor`` from 1 on, as whole numbers, up to ``last``."""
    return sorted({round(factor**i) for i in range(64) if round(factor**i) <= last})


def available() -> int:
    """Bytes of memory that nobody uses."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def parameters(tensors: int, elements: int) -> list[nn.Parameter]:
    """With gradients; subjects share them, so each finds in the caches what a turn of another has left there."""
    params = [nn.Parameter(torch.full((elements,), 0.5)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    return params


def stepping(groups: list[dict[str, Any]], names: Sequence[str]) -> dict[str, torch.optim.Optimizer]:
    """Optimizers that have their state."""
    # Each has dicts of its own, but the parameters' are the same.
    optimizers = {name: SUBJECTS[name]([dict(group) for group in groups]) for name in names}
    for optimizer in optimizers.values():
        optimizer.step()
    return optimizers


def steps(groups: list[dict[str, Any]], names: Sequence[str] = tuple(SUBJECTS)) -> dict[str, Run]:
    return {name: optimizer.step for name, optimizer in stepping(groups, names).items()}


def moving(p: nn.Parameter, optimizer: torch.optim.Optimizer) -> Run:
    """Moves the bytes of a step of ``optimizer`` over ``p`` and computes nothing; values stay as they are."""
    assert p.grad is not None
    state = optimizer.state[p]
    arrays = [(t.data_ptr(), True) for t in (p, state["exp_avg"], state["exp_avg_sq"])]
    arrays.append((p.grad.data_ptr(), False))
    size, threads = p.numel() * 4, torch.get_num_threads() if p.numel() >= SHARED else 1
    return lambda: _C.stream(arrays, size, threads)


def tensor_points(up_to: int) -> Iterator[Point]:
    for x in steps_of(up_to, 10**0.5):
        yield x, steps([{"params": parameters(x, SMALL)}])


def group_points(up_to: int) -> Iterator[Point]:
    params = parameters(max(GROUPED, up_to), SMALL)
    for x in steps_of(up_to, 10**0.5):
        edges = [len(params) * i // x for i in range(x + 1)]
        yield x, steps([{"params": params[a:b]} for a, b in zip(edges, edges[1:], strict=False)])


def large(x: int) -> dict[str, Run] | str:
    """One tensor of ``x`` elements, for as many subjects as there is memory for."""
    free, names, needed = available() * 0.9, [], 8 * x
    for name, state in STATE_BYTES.items():
        if needed + state * x > free:
            break
        needed += state * x
        names.append(name)
    if not names:
        return f"AdamW needs 16 bytes a parameter, {16 * x / 2**30:.3g} GiB; {free / 2**30:.3g} GiB are free"
    params = parameters(1, x)
    optimizers = stepping([{"params": params}], names)
    runs: dict[str, Run] = {name: optimizer.step for name, optimizer in optimizers.items()}
    return {**runs, LIMIT: moving(params[0], optimizers[OURS])}


def element_points(up_to: int) -> Iterator[Point]:
    for x in steps_of(up_to, 4):
        yield x, large(x)


def thread_points(up_to: int) -> Iterator[Point]:
    before = torch.get_num_threads()
    try:
        for x in sorted({*steps_of(up_to, 2), up_to}):
            torch.set_num_threads(x)
            yield x, large(1 << 24)
    finally:
        torch.set_num_threads(before)


def once_points(up_to: int) -> Iterator[Point]:
    for x in steps_of(up_to, 10**0.5):
        params = parameters(x, SMALL)
        runs: dict[str, Run] = {}
        for name, make in SUBJECTS.items():
            optimizer = make(params)
            optimizer.step()
            saved = copy.deepcopy(optimizer.state_dict())
            for act, run in {
                "construct": lambda make=make, params=params: make(params),
                "construct and first step": lambda make=make, params=params: make(params).step(),
                "state_dict": optimizer.state_dict,
                "load_state_dict": lambda optimizer=optimizer, saved=saved: optimizer.load_state_dict(saved),
            }.items():
                runs[f"{name}: {act}"] = run
        yield x, runs


AXES = {
    "tensors": Axis("tensors", f"A step by the number of tensors, {SMALL} elements each", tensor_points, 100_000),
    "elements": Axis("elements", "A step by the elements of one tensor", element_points, 1 << 32),
    "groups": Axis("parameter groups", f"A step by the number of groups of {GROUPED} tensors", group_points, 1000),
    "threads": Axis("threads", "A step of 16M elements by threads", thread_points, os.cpu_count() or 1),
    # torch's load_state_dict, and so ours, takes minutes for 100,000 tensors.
    "once": Axis("tensors", "What happens once, by the number of tensors", once_points, 10_000, ACTS),
}


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


def stats_of(seconds: list[float]) -> Stats:
    stats = Stats()
    for each in seconds:
        stats.update(each)
    return stats


def processor_time(run: Run, spent: list[float]) -> Run:
    def timed() -> None:
        start = time.process_time()
        run()
        spent.append(time.process_time() - start)

    return timed


def measure(
    name: str,
    seconds: float,
    up_to: int | None = None,
    *,
    subjects: Sequence[str] = tuple(SUBJECTS),
    min_rounds: int = 5,
    cpu_time: bool = False,
) -> tuple[list[Curve], dict[int, str]]:
    """``seconds`` for each point; one curve for each of the axis' acts, and why points are absent."""
    axis = AXES[name]
    rounds: dict[str, dict[str, dict[int, list[float]]]] = {act: defaultdict(dict) for act in axis.acts}
    absent: dict[int, str] = {}
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task(name, total=1.0)
        for x, runs in axis.points(min(axis.up_to, up_to or axis.up_to)):
            progress.update(task, description=f"{x:,} {axis.unit}", completed=0)
            if isinstance(runs, str):
                absent[x] = runs
                continue
            runs = {s: run for s, run in runs.items() if s.partition(": ")[0] in (OURS, LIMIT, *subjects)}
            spent: dict[str, list[float]] = {s: [] for s in runs}
            if cpu_time:
                runs = {s: processor_time(run, spent[s]) for s, run in runs.items()}

            def tell(done: float) -> None:
                progress.update(task, completed=done)

            taken = in_turn(runs, seconds, min_rounds=min_rounds, progress=tell)
            for subject, times in taken.items():
                own, _, act = subject.partition(": ")
                # Without the warm-up.
                rounds[act or axis.acts[0]][own][x] = spent[subject][-len(times) :] if cpu_time else times
            del runs
    curves = []
    for act, by_subject in rounds.items():
        medians = {s: {x: stats_of(t).median for x, t in each.items()} for s, each in by_subject.items()}
        title = axis.title if len(axis.acts) == 1 else act
        xs = sorted({x for each in by_subject.values() for x in each})
        curves.append(Curve(name, title, xs, dict(by_subject), expectation(name, medians)))
    return curves, absent


def entries(curves: list[Curve], where: dict[str, Any]) -> list[dict[str, Any]]:
    """As pytest-benchmark writes them."""
    made = []
    for curve in curves:
        for subject, by_x in curve.rounds.items():
            for x, seconds in by_x.items():
                expected = curve.expected.get(subject, {}).get(x)
                case = f"growth {curve.axis} {x}" + (f" {curve.title}" if curve.axis == "once" else "")
                info = {"case": case, "axis": curve.axis, "title": curve.title, "x": x, "subject": subject}
                made.append(
                    {
                        "group": case,
                        "name": f"{case}-{subject}",
                        "fullname": f"bench/growth.py::{case}-{subject}",
                        "params": None,
                        "param": None,
                        "extra_info": {**info, "expected": expected, "noise": noise(seconds), **where},
                        "options": {},
                        "stats": {**stats_of(seconds).as_dict(), "iterations": 1},
                    }
                )
    return made


def factor(curve: Curve, x: int) -> float | None:
    """Ours over its line where it bends away from it, else None."""
    expected = curve.expected.get(OURS, {}).get(x)
    if expected is None:
        return None
    stats = stats_of(curve.rounds[OURS][x])
    return stats.median / expected if stats.q1 > BENDS * expected else None


def show(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, scale in (("s ", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def table(curve: Curve) -> Table:
    axis = AXES[curve.axis]
    shown = Table(title=f"{curve.title}: medians of rounds taken in turn")
    others = [name for name in curve.rounds if name != OURS]
    titles = [axis.unit, "ours", "quartiles", "ours a unit", "its line", "bends", *others, "torch / ours", "noisy"]
    for title in titles:
        shown.add_column(title, justify="right", no_wrap=True)
    for x in curve.xs:
        stats = {name: stats_of(times[x]) for name, times in curve.rounds.items() if x in times}
        ours = stats[OURS]
        theirs = [stats[name].median for name in stats if name.startswith("torch")]
        bend = factor(curve, x)
        noisy = max(noise(times[x]) for times in curve.rounds.values() if x in times)
        shown.add_row(
            f"{x:,}",
            show(ours.median),
            f"{show(ours.q1)} - {show(ours.q3)}",
            show(ours.median / x) if curve.axis != "elements" else f"{ours.median / x * 1e9:.3g} ns",
            show(curve.expected.get(OURS, {}).get(x)),
            f"{bend:.2f}" if bend else "",
            *(show(stats[name].median) if name in stats else "" for name in others),
            f"{min(theirs) / ours.median:.2f}" if theirs else "",
            f"{noisy:.0%}" if noisy > NOISY else "",
            style="bold red" if bend else None,
        )
    return shown


COLORS = {OURS: "#d1495b", "torch fused": "#30638e", "torch foreach": "#7a9e7e", LIMIT: "#555555"}


def plot(curves: list[Curve], path: Path, clock: str) -> None:
    """Curves of one axis, as PNG and SVG."""
    axis = AXES[curves[0].axis]
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    size = (7.2, 5.0) if len(curves) == 1 else (5.6 * columns, 4.2 * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharex=True)
    for curve, panel in zip(curves, panels.flat, strict=False):
        for subject in sorted(curve.rounds, key=lambda name: name == OURS):  # ours on top
            by_x = curve.rounds[subject]
            xs = sorted(by_x)
            stats = [stats_of(by_x[x]) for x in xs]
            ours, color = subject == OURS, COLORS[subject]
            middle = [s.median for s in stats]
            bars = [[s.median - s.q1 for s in stats], [s.q3 - s.median for s in stats]]
            label = "limit: the same bytes moved, nothing computed" if subject == LIMIT else subject
            marker = "" if subject == LIMIT else "o"
            width, opaque = (2.4, 1.0) if ours else (1.2, 0.85)
            panel.errorbar(
                xs, middle, bars, marker=marker, markersize=5 if ours else 3, linewidth=width, alpha=opaque,
                color=color, capsize=2.5, elinewidth=1, label=label, linestyle=":" if subject == LIMIT else "-",
            )  # fmt: skip
            if subject in curve.expected:
                line = curve.expected[subject]
                panel.plot(xs, [line[x] for x in xs], "--", linewidth=0.9, color=color, alpha=opaque)
        for x in curve.xs:
            if (bend := factor(curve, x)) is not None:
                at = (x, stats_of(curve.rounds[OURS][x]).median)
                panel.annotate(
                    f"{bend:.1f}×",
                    at,
                    (7, -9),
                    textcoords="offset points",
                    ha="left",
                    fontsize=8,
                    color=COLORS[OURS],
                )
        panel.set(xscale="log", yscale="log", title=curve.title)
        if axis.unit == "threads":
            panel.set_xscale("log", base=2)
            panel.set_xticks(curve.xs, [str(x) for x in curve.xs])
        elif curves[0].axis == "elements":
            panel.set_xscale("log", base=2)
        panel.grid(True, which="major", linewidth=0.4, alpha=0.6)
        panel.yaxis.set_major_formatter(lambda seconds, _: show(seconds).strip())
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel(axis.unit)
    for row in panels:
        row[0].set_ylabel(clock)
    handles, labels = panels[0][0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: (labels[i].startswith("limit"), labels[i] != OURS, labels[i]))
    (dashes,) = panels[0][0].plot([], [], "--", linewidth=0.9, color="black")
    panels[0][0].legend(
        [*(handles[i] for i in order), dashes], [*(labels[i] for i in order), "its own straight line"],
        fontsize=8, frameon=False, loc="upper left",
    )  # fmt: skip
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_name(path.name + suffix), dpi=130)
    plt.close(figure)


def save(curves: list[Curve], absent: dict[str, dict[int, str]], path: Path, clock: str) -> None:
    where = {**machine(), "clock": clock}
    commit = {"id": where["commit"], "dirty": where["changed"]}
    saved = {
        "machine_info": {"machine": platform.machine(), "python_version": platform.python_version(), **where},
        "commit_info": commit,
        "benchmarks": entries(curves, {name: where[name] for name in ("commit", "threads", "capability", "clock")}),
        "absent": absent,
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "version": "bench.growth",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> list[Curve]:
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=__doc__)
    parser.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES), help="default: all")
    parser.add_argument("--seconds", type=float, default=3, help="for each point (default: 3)")
    parser.add_argument("--rounds", type=int, default=5, help="for each point, however long they take (default: 5)")
    parser.add_argument("--subjects", nargs="*", choices=[s for s in SUBJECTS if s != OURS], default=list(SUBJECTS))
    help_time = "measure the processor's time: on a busy machine, what is longer than a time slice waits for others too"
    parser.add_argument("--cpu-time", action="store_true", help=help_time)
    parser.add_argument("--threads", type=int, help="except where they are what grows (default: all)")
    parser.add_argument("--up-to", type=int, help="the largest number on each axis, where that is less")
    parser.add_argument("--json", type=Path, help="where results go, with a plot for each axis beside them")
    args = parser.parse_args(arguments)
    clock = "processor time" if args.cpu_time else "time"
    if args.cpu_time and "threads" in args.axis:
        parser.error("--cpu-time adds up threads, so it can not be asked for with --axis threads")
    threads = torch.get_num_threads()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    path = args.json
    if path is None:
        folder = HERE / "results" / device_folder()
        path = folder / f"growth-{datetime.date.today()}-{machine()['commit']}.json"
    console = Console(width=None if sys.stdout.isatty() else 150)
    everything: list[Curve] = []
    missing: dict[str, dict[int, str]] = {}
    try:
        for name in args.axis:
            curves, missing[name] = measure(
                name,
                args.seconds,
                args.up_to,
                subjects=args.subjects,
                min_rounds=args.rounds,
                cpu_time=args.cpu_time,
            )
            for curve in curves:
                console.print(table(curve))
            for x, reason in missing[name].items():
                console.print(f"{x:,} {AXES[name].unit}: not measured: {reason}")
            everything += curves
            save(everything, missing, path, clock)
            plot(curves, path.with_name(f"{path.stem}-{name}"), clock)
    finally:
        torch.set_num_threads(threads)
    console.print(f"results and plots: {path}", soft_wrap=True)
    return everything


if __name__ == "__main__":
    main()
