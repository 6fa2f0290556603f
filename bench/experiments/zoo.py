"""``python -m bench.experiments.zoo``: how every optimizer converges, on Rosenbrock's function and on the demo's GPT.

A learning rate is tuned for each class, on the first seed; with the best, all seeds are trained by our class and, where
torch has it, by torch's. What the record has is not run again: a run that was stopped goes on where it was.
zoo_report.py has the tables. A new optimizer adds a line to ``MIDDLE``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import inspect
import json
import math
import multiprocessing
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from genopt_ext import optim

from ..method import OURS, RESULTS, ROOT, commit, device_name, machine
from ..readme import write_between
from .models import GPTTask, Make, evaluating, schedule_of
from .zoo_report import BEGIN, GPT, ROSENBROCK, TORCH, Record, Row, Run, markdown, row, table

# Of each class, a good learning rate on Rosenbrock's function and on the GPT: those around it are tried too. None: the
# task is not for it.
MIDDLE: dict[str, tuple[float | None, float | None]] = {
    "Adadelta": (1.0, 1.0),
    "Adagrad": (3.0, 0.01),
    "Adam": (1.0, 3e-3),
    "AdamW": (1.0, 3e-3),
    "Adamax": (10.0, 1e-2),
    "AdEMAMix": (1.0, 3e-3),
    "Lion": (0.01, 1e-3),
    "Muon": (None, 0.01),
    "AdamWScheduleFree": (0.3, 0.01),
    "SGDScheduleFree": (3e-3, 1.0),
    "RAdamScheduleFree": (0.3, 0.01),
    "StableAdamW": (1.0, 3e-3),
    "LAMB": (1.0, 0.01),
    "LARS": (None, 10.0),
    "Adafactor": (1.0, 0.03),
    "Prodigy": (0.3, 0.1),
    "ADOPT": (3.0, 3e-3),
    "Adan": (0.1, 3e-3),
    "ASGD": (3e-3, 0.3),
    "NAdam": (0.1, 3e-3),
    "RAdam": (0.3, 0.01),
    "RMSprop": (0.03, 1e-3),
    "Rprop": (0.1, 0.03),
    "SGD": (3e-3, 0.1),
}
# Beside the defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "LARS": {"momentum": 0.9, "always_adapt": True},
    "Muon": {"adjust_lr_fn": "match_rms_adamw"},  # so that AdamW inside has the same learning rate
}
NAMES = (*optim.OURS, "Muon")
STEPS = dict.fromkeys(ROSENBROCK, 2000) | {GPT: 500}
START = (-1.2, 1.0)
TASKS = tuple(STEPS)


def grid(middle: float, each_way: int = 2) -> list[float]:
    """Learning rates around ``middle``: 1 and 3 of each power of 10."""
    at = round(2 * math.log10(middle))
    return [float(f"{10 ** (i / 2):.0e}") for i in range(at - each_way, at + each_way + 1)]


def middle(task: str, name: str) -> float | None:
    """Raises LookupError for a class without an entry."""
    if name not in MIDDLE:
        raise LookupError(f"{name} has no learning rates in bench/experiments/zoo.py: add it to MIDDLE")
    return MIDDLE[name][0 if task in ROSENBROCK else 1]


def packages(name: str) -> tuple[str, ...]:
    return (OURS, TORCH) if name in optim.TORCHS else (OURS,)


def maker(package: str, name: str, task: str) -> Make:
    """Rosenbrock's function is trained without weight decay, which would move its minimum."""
    make = getattr(optim if package == OURS else torch.optim, name)
    options = dict(OPTIONS.get(name, {}))
    if task in ROSENBROCK and "weight_decay" in inspect.signature(make).parameters:
        options["weight_decay"] = 0
    return functools.partial(make, **options)


def rosenbrock(make: Make, lr: float, dtype: torch.dtype, steps: int) -> float:
    """The distance from (1, 1) after ``steps`` on (1 - x)^2 + 100 (y - x^2)^2."""
    p = nn.Parameter(torch.tensor(START, dtype=dtype))
    opt = make([p], lr=lr)
    schedule = schedule_of(opt, steps)
    for _ in range(steps):
        opt.zero_grad()
        x, y = p
        ((1 - x) ** 2 + 100 * (y - x * x) ** 2).backward()
        opt.step()
        schedule.step()
    with evaluating(opt):
        return (p.detach().double() - 1).norm().item()


@functools.lru_cache(maxsize=1)
def gpt() -> GPTTask:
    return GPTTask(width=64)


def train(run: Run) -> Record:
    begin = time.perf_counter()
    make = maker(run.package, run.optimizer, run.task)
    if run.task in ROSENBROCK:
        value = rosenbrock(make, run.lr, ROSENBROCK[run.task], run.steps)
    else:
        value = gpt().train(make, run.lr, run.seed, run.steps, named=run.optimizer == "Muon").final
    date = datetime.datetime.now().isoformat(timespec="seconds")
    return Record(
        **asdict(run),
        value=value if math.isfinite(value) else None,
        seconds=round(time.perf_counter() - begin, 2),
        commit=commit()[0],
        date=date,
        torch=torch.__version__,
        device=device_name("cpu"),
    )


def missing(task: str, name: str, seeds: int, steps: int, records: Iterable[Record]) -> list[Record]:
    """The runs that the row of a class lacks, run now: every learning rate, then every seed with the best."""
    done = {record.run: record for record in records}
    new: list[Record] = []

    def run(package: str, lr: float, seed: int) -> None:
        wanted = Run(task, name, package, lr, seed, steps)
        if wanted not in done:
            done[wanted] = train(wanted)
            new.append(done[wanted])

    centre = middle(task, name)
    if centre is None:
        return new
    for lr in grid(centre):
        run(OURS, lr, 0)
    best = row(task, name, steps, done.values()).lr
    for seed in range(1 if task in ROSENBROCK else seeds):
        for package in packages(name) if best is not None else ():
            run(package, best, seed)
    return new


def load(path: Path) -> list[Record]:
    return [Record(**entry) for entry in json.loads(path.read_text())["runs"]] if path.exists() else []


def save(path: Path, records: list[Record], command: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {"machine_info": machine() | {"command": command}, "runs": [asdict(record) for record in records]}
    whole = path.with_suffix(".new")  # a run that is stopped while it writes loses nothing
    whole.write_text(json.dumps(saved, indent=1) + "\n")
    whole.replace(path)


@contextlib.contextmanager
def in_processes(jobs: int) -> Iterator[Callable[..., Iterable[list[Record]]]]:
    """``map``, in so many processes of one thread each."""
    if jobs == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield executor.map
    finally:
        executor.shutdown(cancel_futures=True)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m bench.experiments.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--only", nargs="+", default=list(NAMES), choices=NAMES, help="these classes")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of the GPT with the best lr (default: 3)")
    parser.add_argument("--steps", type=int, help=f"of a training (default: {', '.join(map(str, STEPS.values()))})")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each (default: 1)")
    default = RESULTS / "zoo" / "zoo.json"
    parser.add_argument("--json", type=Path, default=default, help="the record; what it has is not run again")
    page = ROOT / "docs" / "optimizers" / "README.md"
    parser.add_argument("--docs", action="store_true", help=f"also put the tables into {page.relative_to(ROOT)}")
    args = parser.parse_args(arguments)
    if args.docs and not ({*TASKS} <= {*args.tasks} and {*NAMES} <= {*args.only}):
        parser.error("--docs writes the tables of all classes and tasks: leave out --only and --tasks")
    console = Console(width=None if sys.stdout.isatty() else 130)
    records, threads = load(args.json), torch.get_num_threads()
    steps = {task: args.steps or STEPS[task] for task in args.tasks}
    rows = [(task, name) for task in args.tasks for name in args.only]
    torch.set_num_threads(1)
    try:
        tasks, names = zip(*rows, strict=True)
        given = (tasks, names, [args.seeds] * len(rows), [steps[task] for task in tasks], [list(records)] * len(rows))
        with in_processes(args.jobs) as mapped:
            for (task, name), new in zip(rows, mapped(missing, *given), strict=True):
                if new:
                    records += new
                    save(args.json, records, shlex.join(["python", "-m", "bench.experiments.zoo", *arguments]))
                console.print(f"{task}, {name}: {len(new)} runs, {sum(record.seconds for record in new):.0f} s")
    finally:
        torch.set_num_threads(threads)
    reported = [row(task, name, steps[task], records) for task, name in rows]
    for task in args.tasks:
        console.print(table([each for each in reported if each.task == task]))
    console.print(f"record: {args.json}", soft_wrap=True)
    if args.docs:
        where = json.loads(args.json.read_text())["machine_info"]
        where["device"] = "; ".join(dict.fromkeys(record.device for record in records))
        write_between(page, BEGIN, markdown(reported, where))
        console.print(f"{page.relative_to(ROOT)} has the tables")
    return reported


if __name__ == "__main__":
    main()
