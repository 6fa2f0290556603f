"""``python -m bench.experiments.mappings``: which map of moments to 8 bits, and which rounding, loses least.

Each candidate keeps shadow states beside fp32 ones, fed the same gradients of real trainings and quantized at every
step in blocks of 256. What counts is the update m / (sqrt(v) + eps) that comes of them: its mean squared error over
the mean square of the fp32 update; for Adagrad's sum, the relative error. ``--train`` then trains with some of them.
maps.py has the maps and roundings, mappings_report.py tables and figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ..method import RESULTS
from .mappings_report import plot, show
from .maps import BLOCK, ROUNDINGS, SIGNED, UNSIGNED, Stored
from .models import TASKS

EPS = 1e-8


@dataclass(frozen=True)
class Candidate:
    """A map by name and a rounding for each of the two moments; no name: fp32."""

    signed: str = ""
    signed_rounding: str = "nearest"
    unsigned: str = ""
    unsigned_rounding: str = "nearest"

    def __str__(self) -> str:
        m = f"m {self.signed}, {self.signed_rounding}" if self.signed else ""
        v = f"v {self.unsigned}, {self.unsigned_rounding}" if self.unsigned else ""
        return "; ".join(filter(None, (m, v))) or "fp32"


ALONE = [Candidate(signed=name, signed_rounding=r) for name in SIGNED for r in ROUNDINGS]
ALONE += [Candidate(unsigned=name, unsigned_rounding=r) for name in UNSIGNED for r in ROUNDINGS]
BOTH = [
    Candidate("bits 4,2", "sequence", "bits 4,2", "sequence"),
    Candidate("bits 4,2", "random", "bits 4,2", "random"),
    Candidate("bits 4,2", "nearest", "bits 4,2", "sequence"),
    Candidate("bits 4,3", "sequence", "bits 4,3", "sequence"),
    Candidate("bits 3", "sequence", "bits 3", "sequence"),
    Candidate("power 2", "nearest", "power 4", "nearest"),
    Candidate("power 2", "random", "power 4", "random"),
    Candidate("power 2", "sequence", "power 4", "sequence"),
    Candidate("dynamic", "nearest", "dynamic", "nearest"),
    Candidate("dynamic", "nearest", "dynamic, may vanish", "nearest"),
]
TRAINED = [BOTH[0], BOTH[5], BOTH[8]]


class Shadow:
    """fp32 Adam states fed with gradients, and beside them those of every candidate; sums too, as Adagrad has."""

    def __init__(self, blocks: int, betas: tuple[float, float], which: list[Candidate], sums: bool) -> None:
        shape = (blocks, BLOCK)
        self.betas, self.steps = betas, 0
        self.m, self.v, self.total = (torch.zeros(shape) for _ in range(3))
        self.states = {
            str(c): (
                Stored(SIGNED.get(c.signed), c.signed_rounding, shape, 0),
                Stored(UNSIGNED.get(c.unsigned), c.unsigned_rounding, shape, 1),
            )
            for c in which
        }
        self.sums = {f"{n}, {r}": Stored(UNSIGNED[n], r, shape, 2) for n in UNSIGNED for r in ROUNDINGS if sums}
        self.errors: dict[str, list[float]] = {name: [] for name in self.states}

    def step(self, g: Tensor) -> None:
        self.steps += 1
        beta1, beta2 = self.betas

        def averaged(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return m.lerp(g, 1 - beta1), v * beta2 + (1 - beta2) * g.square()

        def update(m: Tensor, v: Tensor) -> Tensor:
            return m / (1 - beta1**self.steps) / ((v / (1 - beta2**self.steps)).sqrt() + EPS)

        self.m, self.v = averaged(self.m, self.v)
        exact = update(self.m, self.v)
        mean_square = exact.square().sum(dtype=torch.float64)
        for name, (m, v) in self.states.items():
            new_m, new_v = averaged(m.value, v.value)
            error = (update(new_m, new_v) - exact).square().sum(dtype=torch.float64) / mean_square
            self.errors[name].append(float(error))
            m.write(new_m, self.steps)
            v.write(new_v, self.steps)
        self.total += g.square()
        for total in self.sums.values():
            total.write(total.value + g.square(), self.steps)

    def summary(self) -> dict[str, Any]:
        """Errors of updates, averaged over the last half; of sums, root mean square and mean."""
        seen = self.total > 0
        relative = {name: s.value[seen] / self.total[seen] - 1 for name, s in self.sums.items()}
        return {
            "betas": self.betas,
            "steps": self.steps,
            "update": {name: statistics.fmean(e[len(e) // 2 :]) for name, e in self.errors.items()},
            "sum": {n: (float(r.square().mean().sqrt()), float(r.mean())) for n, r in relative.items()},
            "curves": {name: [float(f"{x:.3g}") for x in e] for name, e in self.errors.items() if ";" in name},
        }


def blocks_of(model: nn.Module, count: int) -> Tensor:
    """Gradients of large parameters in blocks, a short last one filled with zeros; ``count`` of them, evenly taken."""
    rows = []
    for p in model.parameters():
        if p.numel() >= 4096 and p.grad is not None:
            g = p.grad.detach().flatten()
            rows.append(torch.cat([g, g.new_zeros(-len(g) % BLOCK)]).view(-1, BLOCK))
    stacked = torch.cat(rows)
    return stacked[torch.linspace(0, len(stacked) - 1, min(len(stacked), count)).long()]


def recorded(
    name: str, steps: int, blocks: int, betas: tuple[float, float], which: list[Candidate], sums: bool
) -> dict[str, Any]:
    """Trains with torch's fp32 AdamW and runs the shadow states beside it."""
    task, shadows = TASKS[name](), []

    def observe(step: int, model: nn.Module) -> None:
        g = blocks_of(model, blocks)
        if not shadows:
            shadows.append(Shadow(len(g), betas, which, sums))
        shadows[0].step(g)

    def make(params: Iterator[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=lr, weight_decay=0.1, betas=betas)

    task.train(make, task.lr["AdamW"], 0, steps, observe)
    return shadows[0].summary()


def synthetic(sigma: float, steps: int) -> dict[str, Any]:
    """Normal gradients whose sizes within a block are lognormal, with this spread of their logarithm."""
    generator = torch.Generator().manual_seed(0)
    size = torch.randn(64, BLOCK, generator=generator).mul(sigma).exp()
    shadow = Shadow(64, (0.9, 0.999), BOTH, sums=False)
    for _ in range(steps):
        shadow.step(size * torch.randn(64, BLOCK, generator=generator))
    return shadow.summary()


class Prototype(torch.optim.Optimizer):
    """AdamW and RMSprop in plain torch, with the moments of large parameters stored as a candidate does."""

    def __init__(self, params: Any, candidate: Candidate, rule: str, lr: float, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.candidate, self.rule, self.steps = candidate, rule, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, group["lr"], group["weight_decay"])

    def update(self, p: Tensor, lr: float, weight_decay: float) -> None:
        g = nn.functional.pad(p.grad.flatten(), (0, -p.numel() % BLOCK)).view(-1, BLOCK)
        state = self.state[p]
        if not state:
            c, large, shape = self.candidate, p.numel() >= 4096, tuple(g.shape)
            state["m"] = Stored(SIGNED.get(c.signed) if large else None, c.signed_rounding, shape, 0)
            state["v"] = Stored(UNSIGNED.get(c.unsigned) if large else None, c.unsigned_rounding, shape, 1)
        m, v = state["m"], state["v"]
        if self.rule == "AdamW":
            new_m, new_v = m.value.lerp(g, 0.1), v.value * 0.999 + 0.001 * g.square()
            bias1, bias2 = 1 - 0.9**self.steps, 1 - 0.999**self.steps
            change = new_m / bias1 / ((new_v / bias2).sqrt() + EPS)
            m.write(new_m, self.steps)
            p.mul_(1 - lr * weight_decay)
        else:
            new_v = v.value * 0.99 + 0.01 * g.square()
            change = g / (new_v.sqrt() + EPS)
        v.write(new_v, self.steps)
        p.sub_(change.flatten()[: p.numel()].view_as(p), alpha=lr)


def trained(names: list[str], optimizers: list[str], seeds: int, steps: int | None, say: Any) -> dict[str, Any]:
    """Final losses with the best candidates and with torch: {task and optimizer: {candidate: one loss a seed}}."""
    results: dict[str, Any] = {}
    for name in names:
        task = TASKS[name]()
        for rule in optimizers:
            makers: dict[str, Any] = {
                str(c): lambda params, lr, c=c, rule=rule: Prototype(params, c, rule, lr)
                for c in [Candidate(), *TRAINED]
            }
            decay = {"weight_decay": 0.1} if rule == "AdamW" else {}
            makers["torch fp32"] = lambda params, lr, rule=rule, decay=decay: getattr(torch.optim, rule)(
                params, lr=lr, **decay
            )
            for label, make in makers.items():
                finals = [task.train(make, task.lr[rule], s, steps or task.steps).final for s in range(seeds)]
                results.setdefault(f"{name} {rule}", {})[label] = finals
                say(f"{name} {rule}, {label}: {', '.join(f'{x:.4f}' for x in finals)}")
    return results


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m bench.experiments.mappings", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--steps", type=int, default=200, help="steps whose gradients are recorded (default: 200)")
    parser.add_argument("--blocks", type=int, default=64, help="blocks of gradients that are looked at (default: 64)")
    parser.add_argument("--train", action="store_true", help="also train with the best candidates")
    parser.add_argument("--train-steps", type=int, help="default: each task's own")
    parser.add_argument("--optimizers", nargs="+", default=["AdamW", "RMSprop"], choices=["AdamW", "RMSprop"])
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each (default: 3)")
    parser.add_argument("--results", type=Path, default=RESULTS / "mappings", help="a folder for JSON and plot")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)

    sources = {}
    for name in args.tasks:
        console.print(f"gradients of {name}")
        sources[name] = recorded(name, args.steps, args.blocks, (0.9, 0.999), ALONE + BOTH, sums=True)
    first = args.tasks[0]
    for betas in ((0.95, 0.95), (0.99, 0.999)):
        name = "VAE" if "VAE" in args.tasks else first
        sources[f"{name} {betas[0]:g}, {betas[1]:g}"] = recorded(name, args.steps, args.blocks, betas, BOTH, sums=False)
    for sigma in (1.0, 2.0):
        sources[f"lognormal {sigma:g}"] = synthetic(sigma, min(args.steps, 200))
    results: dict[str, Any] = {"torch": torch.__version__, "sources": sources, "trained": {}}
    if args.train:
        results["trained"] = trained(args.tasks, args.optimizers, args.seeds, args.train_steps, console.print)
    show(results, console)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "mappings.json").write_text(json.dumps(results) + "\n")
    plot(results, args.results / "mappings.png")
    console.print(f"results and plot: {args.results}")
    return results


if __name__ == "__main__":
    main()
