"""``python -m bench.experiments.in_backward``: peak memory and step time of a model stepped in backward or after.

The model is a stack of Linear layers. Each subject runs in processes of its own, taken in turn. Memory is the largest
resident set of the process on a CPU, what torch allocated at most on a GPU; "above rest" is that without what is there
between two steps (on a CPU Python and torch too): gradients, activations and workspaces. A step is forward, backward
and the optimizer's.

glibc's malloc is told to return large blocks when they are freed (``--mmap-threshold``). Left to itself it puts them
into its heap, where the state that the first backward makes between the gradients keeps their holes from being
used: on glibc 2.36 the resident set then is as large as with all gradients at once.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

SUBJECTS = {
    "after": "backward, then step",
    "in_backward": "step_in_backward",
    "torch": "torch's recipe: a fused optimizer each",
}


def measure(subject: str, args: argparse.Namespace) -> dict[str, Any]:
    """One subject, in this process."""
    # Not above: a process that has been started by one with torch in memory counts that memory in its ru_maxrss.
    import torch

    from genopt_ext import optim, step_in_backward

    from ..memory import resident

    torch.manual_seed(0)
    torch.set_default_device(args.device)
    cuda = args.device.startswith("cuda")
    layers = [torch.nn.Linear(args.width, args.width, dtype=getattr(torch, args.dtype)) for _ in range(args.layers)]
    model = torch.nn.Sequential(*layers)
    x = torch.randn(args.batch, args.width, dtype=getattr(torch, args.dtype))
    if subject == "torch":
        each = {p: getattr(torch.optim, args.optimizer)([p], lr=1e-4, fused=True) for p in model.parameters()}

        def hook(p: torch.Tensor) -> None:
            each[p].step()
            each[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(hook)
    else:
        opt = getattr(optim, args.optimizer)(model.parameters(), lr=1e-4)
        if subject == "in_backward":
            step_in_backward(opt)

    times = []
    for _ in range(args.warmup + args.steps):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model(x).square().mean().backward()
        if subject == "after":
            opt.step()
            opt.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if cuda:
        peak, rest = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    else:
        peak, rest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, resident()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"times": times[args.warmup :], "peak": peak, "rest": rest, "gradients": gradients}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.experiments.in_backward",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--optimizer", default="AdamW", choices=["Adagrad", "Adam", "AdamW", "SGD"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed, for each round")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each subject")
    parser.add_argument("--mmap-threshold", type=int, default=2**20, help="bytes; 0 leaves malloc as it is")
    parser.add_argument("--subject", choices=list(SUBJECTS), help="measure only this one, here, and print JSON")
    args = parser.parse_args()
    if args.subject:
        print(json.dumps(measure(args.subject, args)))
        return

    environment = dict(os.environ)
    if args.mmap_threshold:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(args.mmap_threshold)
    results: dict[str, list[dict[str, Any]]] = {subject: [] for subject in SUBJECTS}
    for _ in range(args.rounds):
        for subject, rounds in results.items():
            command = [sys.executable, "-m", "bench.experiments.in_backward", *sys.argv[1:], "--subject", subject]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            rounds.append(json.loads(run.stdout.splitlines()[-1]))

    gradients = results["after"][0]["gradients"] / 2**20
    title = (
        f"{args.optimizer}, {args.layers} x Linear({args.width}), {args.dtype}, batch {args.batch}, {args.device}: "
        f"{gradients:.1f} MiB of gradients"
    )
    table = Table(title=title)
    for name in ("", "peak MiB", "saved MiB", "above rest MiB", "step ms", "spread"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    peak = {s: statistics.median(r["peak"] for r in rounds) / 2**20 for s, rounds in results.items()}
    for subject, rounds in results.items():
        times = sorted(t * 1e3 for r in rounds for t in r["times"])
        low, middle, high = statistics.quantiles(times, n=4)
        above = statistics.median(r["peak"] - r["rest"] for r in rounds) / 2**20
        table.add_row(
            SUBJECTS[subject],
            f"{peak[subject]:.1f}",
            f"{peak['after'] - peak[subject]:.1f}",
            f"{above:.1f}",
            f"{middle:.2f}",
            f"{(high - low) / middle:.0%}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
