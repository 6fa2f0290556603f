"""``python -m bench.experiments.growth``: how AdamW's step grows with tensors, elements, groups and threads.

Each curve has its straight line: a fixed cost and a cost per unit, fitted to the curve's own lower points; for elements
and threads, the time that a native loop takes to move the same bytes. Where ours bends away from its line, the table
says by what factor. "once" is what happens once in a training, by the number of tensors: construction, the first step,
checkpoints. growth_report.py has the lines, tables and figures.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.stats import Stats
from rich.console import Console
from rich.progress import Progress
from torch import nn

from genopt_ext import optim

from ..method import LIMIT, OURS, RESULTS, Run, device_folder, free_memory, in_turn, machine, noise
from ..native import MemoryLoop
from .growth_report import Axis, Curve, Point, figure, table

SMALL = 64  # elements of a tensor where it is their number that counts
GROUPED = 1000  # tensors that parameter groups share
SHARED = 1 << 16  # elements from which on ours too wakes a second thread
LOADED = 10_000  # tensors, up to which torch's load_state_dict, which takes their square, is waited for

SUBJECTS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    OURS: lambda groups: optim.AdamW(groups),
    "torch fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "torch foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
}
# Bytes an element beside parameter and gradient: two moments, and foreach makes tensors of its own in passing.
STATE_BYTES = {OURS: 8, "torch fused": 8, "torch foreach": 16}
ACTS = ("construct", "construct and first step", "state_dict", "load_state_dict")


def steps_of(last: int, factor: float) -> list[int]:
    """Powers of ``factor`` from 1 on, as whole numbers, up to ``last``."""
    return sorted({round(factor**i) for i in range(64) if round(factor**i) <= last})


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


def steps(groups: list[dict[str, Any]], names: Sequence[str]) -> dict[str, Run]:
    return {name: optimizer.step for name, optimizer in stepping(groups, names).items()}


def moving(p: nn.Parameter, optimizer: torch.optim.Optimizer) -> Run:
    """Moves the bytes of a step of ``optimizer`` over ``p`` and computes nothing; values stay as they are."""
    assert p.grad is not None
    state = optimizer.state[p]
    arrays = [(t.data_ptr(), True) for t in (p, state["exp_avg"], state["exp_avg_sq"])]
    arrays.append((p.grad.data_ptr(), False))
    size, threads = p.numel() * 4, torch.get_num_threads() if p.numel() >= SHARED else 1
    return MemoryLoop.fastest(arrays, size, threads)


def tensor_points(names: Sequence[str], up_to: int) -> Iterator[Point]:
    for x in steps_of(up_to, 10**0.5):
        yield x, steps([{"params": parameters(x, SMALL)}], names), {}


def group_points(names: Sequence[str], up_to: int) -> Iterator[Point]:
    params = parameters(max(GROUPED, up_to), SMALL)
    for x in steps_of(up_to, 10**0.5):
        edges = [len(params) * i // x for i in range(x + 1)]
        yield x, steps([{"params": params[a:b]} for a, b in zip(edges, edges[1:], strict=False)], names), {}


def large(x: int, names: Sequence[str]) -> Point:
    """One tensor of ``x`` elements, for as many subjects as there is memory for."""
    free, needed, there, absent = free_memory() * 0.9, 8 * x, [], {}
    for name in names:
        more = needed + STATE_BYTES[name] * x
        if more > free:
            absent[name] = f"with it, {more / 2**30:.3g} GiB are needed, and {free / 2**30:.3g} GiB are free"
        else:
            there.append(name)
            needed = more
    if OURS not in there:
        return x, {}, absent
    params = parameters(1, x)
    optimizers = stepping([{"params": params}], there)
    runs: dict[str, Run] = {name: optimizer.step for name, optimizer in optimizers.items()}
    return x, {**runs, LIMIT: moving(params[0], optimizers[OURS])}, absent


def element_points(names: Sequence[str], up_to: int) -> Iterator[Point]:
    for x in steps_of(up_to, 4):
        yield large(x, names)


def thread_points(names: Sequence[str], up_to: int) -> Iterator[Point]:
    before = torch.get_num_threads()
    try:
        for x in sorted({*steps_of(up_to, 2), up_to}):
            torch.set_num_threads(x)
            yield x, *large(1 << 24, names)[1:]
    finally:
        torch.set_num_threads(before)


def once_points(names: Sequence[str], up_to: int) -> Iterator[Point]:
    for x in steps_of(up_to, 10**0.5):
        params = parameters(x, SMALL)
        runs: dict[str, Run] = {}
        absent: dict[str, str] = {}
        for name in names:
            make = SUBJECTS[name]
            optimizer = make(params)
            optimizer.step()
            saved = copy.deepcopy(optimizer.state_dict())
            acts: dict[str, Run] = {
                "construct": lambda make=make, params=params: make(params),
                "construct and first step": lambda make=make, params=params: make(params).step(),
                "state_dict": optimizer.state_dict,
                "load_state_dict": lambda optimizer=optimizer, saved=saved: optimizer.load_state_dict(saved),
            }
            if name != OURS and x > LOADED:
                del acts["load_state_dict"]
                absent[f"{name}: load_state_dict"] = "its time grows with the square, to minutes"
            runs |= {f"{name}: {act}": run for act, run in acts.items()}
        yield x, runs, absent


AXES = {
    axis.name: axis
    for axis in (
        Axis("tensors", "tensors", f"A step by the number of tensors, {SMALL} elements each", tensor_points, 100_000),
        Axis(
            "elements",
            "elements",
            "A step by the elements of one tensor",
            element_points,
            1 << 32,
            line="a fixed cost and the limit",
        ),
        Axis(
            "groups", "parameter groups", f"A step by the number of groups of {GROUPED} tensors", group_points, GROUPED
        ),
        Axis(
            "threads",
            "threads",
            "A step of 16M elements by threads",
            thread_points,
            os.cpu_count() or 1,
            line="shared among threads, down to the limit",
        ),
        Axis("once", "tensors", "What happens once, by the number of tensors", once_points, 100_000, ACTS),
    )
}


def processor_time(run: Run, spent: list[float]) -> Run:
    def timed() -> None:
        start = time.process_time()
        run()
        spent.append(time.process_time() - start)

    return timed


def measure(
    axis: Axis, seconds: float, up_to: int, names: Sequence[str], min_rounds: int = 5, cpu_time: bool = False
) -> tuple[list[Curve], dict[int, dict[str, str]]]:
    """``seconds`` for each point; one curve for each of the axis' acts, and who is absent where and why."""
    rounds: dict[str, dict[str, dict[int, list[float]]]] = {act: defaultdict(dict) for act in axis.acts}
    absent: dict[int, dict[str, str]] = {}
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task(axis.name, total=1.0)
        for x, runs, why in axis.points(names, up_to):
            progress.update(task, description=f"{x:,} {axis.unit}", completed=0)
            absent |= {x: why} if why else {}
            spent: dict[str, list[float]] = {s: [] for s in runs}
            if cpu_time:
                runs = {s: processor_time(run, spent[s]) for s, run in runs.items()}

            def tell(done: float) -> None:
                progress.update(task, completed=done)

            taken = in_turn(runs, seconds, min_rounds=min_rounds, progress=tell) if runs else {}
            for subject, times in taken.items():
                own, _, act = subject.partition(": ")
                # Without the warm-up.
                rounds[act or axis.acts[0]][own][x] = spent[subject][-len(times) :] if cpu_time else times
            del runs
    titles = {act: axis.title if len(axis.acts) == 1 else act for act in axis.acts}
    return [Curve(axis, titles[act], dict(by_subject)) for act, by_subject in rounds.items()], absent


def entries(curves: list[Curve], where: dict[str, Any]) -> list[dict[str, Any]]:
    """As pytest-benchmark writes them."""
    made = []
    for curve in curves:
        for subject, by_x in curve.rounds.items():
            for x, seconds in by_x.items():
                axis = curve.axis.name
                case = f"growth {axis} {x}" + (f" {curve.title}" if axis == "once" else "")
                info = {"case": case, "axis": axis, "title": curve.title, "x": x, "subject": subject}
                info |= {"expected": curve.expected.get(subject, {}).get(x), "noise": noise(seconds), **where}
                stats = Stats()
                for each in seconds:
                    stats.update(each)
                made.append(
                    {
                        "group": case,
                        "name": f"{case}-{subject}",
                        "fullname": f"bench/experiments/growth.py::{case}-{subject}",
                        "params": None,
                        "param": None,
                        "extra_info": info,
                        "options": {},
                        "stats": {**stats.as_dict(), "iterations": 1},
                    }
                )
    return made


def save(curves: list[Curve], absent: dict[str, dict[int, dict[str, str]]], path: Path, where: dict[str, Any]) -> None:
    saved = {
        "machine_info": {"machine": platform.machine(), "python_version": platform.python_version(), **where},
        "commit_info": {"id": where["commit"], "dirty": where["changed"]},
        "benchmarks": entries(curves, {name: where[name] for name in ("commit", "threads", "capability", "clock")}),
        "absent": absent,
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "version": "bench.experiments.growth",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> list[Curve]:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m bench.experiments.growth", description=__doc__)
    parser.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES), help="default: all")
    parser.add_argument("--seconds", type=float, default=3, help="for each point (default: 3)")
    parser.add_argument("--rounds", type=int, default=5, help="for each point, however long they take (default: 5)")
    others = [name for name in SUBJECTS if name != OURS]
    parser.add_argument("--subjects", nargs="*", choices=others, default=others, help="beside ours (default: all)")
    help_time = "measure the processor's time: on a busy machine, what is longer than a time slice waits for others too"
    parser.add_argument("--cpu-time", action="store_true", help=help_time)
    parser.add_argument("--threads", type=int, help="except where they are what grows (default: all)")
    parser.add_argument("--up-to", type=int, help="the largest number on each axis, where that is less")
    default = RESULTS / "growth" / f"{device_folder()}.json"
    parser.add_argument("--json", type=Path, default=default, help="with a figure for each axis beside it")
    args = parser.parse_args(arguments)
    if args.cpu_time and "threads" in args.axis:
        parser.error("--cpu-time adds up threads, so it can not be asked for with --axis threads")
    threads = torch.get_num_threads()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    clock = "processor time" if args.cpu_time else "time"
    command = shlex.join(["python", "-m", "bench.experiments.growth", *arguments])
    where = machine() | {"clock": clock, "command": command}
    console = Console(width=None if sys.stdout.isatty() else 150)
    everything: list[Curve] = []
    absent: dict[str, dict[int, dict[str, str]]] = {}
    try:
        for name in args.axis:
            axis = AXES[name]
            up_to = min(axis.up_to, args.up_to or axis.up_to)
            curves, absent[name] = measure(
                axis, args.seconds, up_to, (OURS, *args.subjects), args.rounds, args.cpu_time
            )
            for curve in curves:
                console.print(table(curve))
            for x, reasons in absent[name].items():
                for who, why in reasons.items():
                    console.print(f"{x:,} {axis.unit}: {who}: not measured: {why}")
            everything += curves
            save(everything, absent, args.json, where)
            figure(curves, args.json.with_name(f"{args.json.stem}-{name}"), clock)
    finally:
        torch.set_num_threads(threads)
    console.print(f"results and figures: {args.json}", soft_wrap=True)
    return everything


if __name__ == "__main__":
    main()
