"""``python -m bench.experiments.quality``: final losses with 8-bit state against fp32 state, ours and others'.

Every subject starts from the same weights and sees the same batches and noise, for each seed. Losses are compared
with those of our fp32 state. Two subjects show how much of a difference is noise: torch's fp32 optimizer, which rounds
elsewhere, and ours with a learning rate that is 1 % larger.
Packages that are not installed are told as absent: ``pip install torchao bitsandbytes`` brings them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from genopt_ext import optim

from .. import plots
from ..memory import state_bytes, storage
from ..method import RESULTS, ROOT
from ..packages import Absent, eight_bit, installed
from ..readme import write_between
from .models import TASKS
from .quality_report import (
    BASE,
    BEGIN,
    NUDGED,
    PACKAGES,
    SMALLEST,
    Result,
    markdown,
    plot,
    table,
    verdicts,
)

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
        return lambda params, **kwargs: make(params, **kwargs, **options)

    return subject


def torchao(rule: str) -> Make:
    """Stores in 8 bits what has at least 4096 elements and a multiple of 256. Compiles for every shape: minutes."""
    return eight_bit("torchao.optim", rule)


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


def measure_state(optimizers: list[torch.optim.Optimizer]) -> tuple[float, float]:
    """Share of elements with 8-bit moments, and bytes of state an element."""
    total = narrow = 0
    for opt in optimizers:
        for p in (p for group in opt.param_groups for p in group["params"]):
            tensors = [t for v in opt.state[p].values() if torch.is_tensor(v) for t in storage(v)]
            total += p.numel()
            narrow += p.numel() * any(t.element_size() == 1 and t.numel() == p.numel() for t in tensors)
    return narrow / total, state_bytes(*optimizers) / total


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


def save(results: list[Result], args: argparse.Namespace, path: Path) -> None:
    entries = [
        asdict(r) | {"losses": [[round(x, 6) for x in plots.smoothed(s)[::10]] for s in r.losses]} for r in results
    ]
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
    parser.add_argument("--docs", action="store_true", help="also put the table into docs/quality.md")
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
    plot(results, list(SUBJECTS), args.plot)
    console.print(f"results: {args.json}\nplot: {args.plot}")
    if args.docs:
        write_between(ROOT / "docs" / "quality.md", BEGIN, markdown(results, args.seeds))
        console.print("docs/quality.md has the table")
    return results


if __name__ == "__main__":
    main()
