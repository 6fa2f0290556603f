"""``python -m bench.experiments.mappings``: which map of moments to 8 bits, and which rounding, loses least.

Each candidate keeps shadow states beside fp32 ones, fed the same gradients of real trainings and quantized at every
step in blocks of 256. What counts is the update m / (sqrt(v) + eps) that comes of them: its mean squared error over
the mean square of the fp32 update; for Adagrad's sum, the relative error. ``--train`` then trains with some of them.

Maps: powers (largest * (code / last code)^power), the dynamic-exponent code book of Dettmers et al.
(arXiv 2110.02861), and the bits of a float32 without the lowest ones ("bits 4,2": 4 fraction bits for the larger
values, 2 for the smaller ones). Roundings: to nearest; random; and "sequence": up with the same probability, but an
element's numbers over the steps are frac(phase + step * golden ratio), which are spread far more evenly. Every 256
steps the phase jumps, as gradients that come back after 89, 144, ... steps would meet almost the same number for long.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..report import RESULTS
from .models import TASKS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BLOCK = 256
EPS = 1e-8
ROUNDINGS = ("nearest", "random", "sequence")
Map = Callable[[Tensor, "Tensor | None"], Tensor]

# A map takes rows of 256 values and, unless it is to round to nearest, as many numbers of [0, 1) that decide which
# ones go up; it returns what is decoded after encoding. A second moment that is not zero never becomes zero.


@dataclass
class Levels:
    """Decodes to largest * levels[code]."""

    levels: Tensor  # ascending from 0 to 1; of magnitudes where the moment is signed
    signed: bool
    may_vanish: bool = False

    def __call__(self, x: Tensor, up: Tensor | None) -> Tensor:
        largest = x.abs().amax(1, keepdim=True)
        y = x.abs() / largest.clamp_min(torch.finfo(torch.float32).tiny)
        low = (torch.bucketize(y, self.levels, right=True) - 1).clamp(0, len(self.levels) - 2)
        below, above = self.levels[low], self.levels[low + 1]
        part = (y - below) / (above - below)
        code = low + (part > 0.5 if up is None else part > up)
        if not self.signed and not self.may_vanish:
            code = torch.where(y > 0, code.clamp_min(1), code)
        return self.levels[code] * largest * x.sign()


def power(exponent: float, signed: bool) -> Levels:
    last = 127 if signed else 255
    return Levels((torch.arange(last + 1) / last) ** exponent, signed)


def dynamic(signed: bool, may_vanish: bool = False) -> Levels:
    """Leading zero bits tell the power of ten, the bits after the first one divide 0.1 to 1 evenly."""
    bits = 7 if signed else 8
    values = [0.0, 1.0]
    for zeros in range(7):
        count = 2 ** (bits - 1 - zeros)
        values += [10.0**-zeros * (0.1 + 0.9 * (k + 0.5) / count) for k in range(count)]
    return Levels(torch.tensor(sorted(values)), signed, may_vanish)


@dataclass
class FloatBits:
    """The distance between a float32's bits and those of the block's largest, which is rounded up, is the code's.

    ``pieces``: fraction bits and octaves from the top down, the last one for as long as there are codes. The code is
    a convex function of the bits, so it is the largest of some shifts with offsets.
    """

    signed: bool
    pieces: tuple[tuple[int, int], ...]

    def __call__(self, x: Tensor, up: Tensor | None) -> Tensor:
        bits = x.abs().view(torch.int32)
        last = 127 if self.signed else 255
        grid = 23 - self.pieces[-1][0]
        top = ((bits.amax(1, keepdim=True) + ((1 << grid) - 1)) >> grid) << grid
        top = top.clamp_min(29 << 23)  # 2^-98, so that the smallest code's value is a normal number
        border, at = top, last
        codes, values = [], []
        for fraction, octaves in self.pieces:
            shift = 23 - fraction
            extra = 1 << (shift - 1) if up is None else (up * (1 << shift)).to(torch.int32)
            codes.append(((bits + extra) >> shift) - (border >> shift) + at)
            values.append((border, shift, at))
            border, at = border - (octaves << 23), at - (octaves << fraction)
        code = torch.stack(codes).amax(0).clamp(0, last)
        if not self.signed:
            code = torch.where(bits > 0, code.clamp_min(1), 0)
        decoded = torch.stack([border + ((code - at) << shift) for border, shift, at in values]).amin(0)
        return torch.where(code > 0, decoded, 0).view(torch.float32) * x.sign()


SIGNED: dict[str, Map] = {
    "power 1": power(1, True),
    "power 2": power(2, True),
    "power 3": power(3, True),
    "dynamic": dynamic(True),
    "bits 4": FloatBits(True, ((4, 0),)),
    "bits 3": FloatBits(True, ((3, 0),)),
    "bits 4,3": FloatBits(True, ((4, 4), (3, 0))),
    "bits 4,2": FloatBits(True, ((4, 6), (2, 0))),
}
UNSIGNED: dict[str, Map] = {
    "power 1": power(1, False),
    "power 2": power(2, False),
    "power 4": power(4, False),
    "power 6": power(6, False),
    "dynamic, may vanish": dynamic(False, may_vanish=True),
    "dynamic": dynamic(False),
    "bits 4": FloatBits(False, ((4, 0),)),
    "bits 3": FloatBits(False, ((3, 0),)),
    "bits 4,3": FloatBits(False, ((4, 8), (3, 0))),
    "bits 4,2": FloatBits(False, ((4, 12), (2, 0))),
}


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


def mixed(x: int) -> int:
    """A 32-bit hash."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


class Rounding:
    """Numbers of [0, 1), one an element, other ones at every step. "sequence" gives all moments the same ones."""

    def __init__(self, kind: str, shape: tuple[int, ...], seed: int) -> None:
        self.kind, self.shape = kind, shape
        self.generator = torch.Generator().manual_seed(seed)
        self.phase = torch.arange(math.prod(shape)).view(shape) * 0x91E10DA5

    def __call__(self, step: int) -> Tensor | None:
        if self.kind == "nearest":
            return None
        if self.kind == "random":
            return torch.rand(self.shape, generator=self.generator)
        u = (self.phase + step * 0x9E3779B9 + mixed(step >> 8)) & 0xFFFFFFFF
        return (u >> 8) / 2.0**24


class Stored:
    """A moment as one candidate stores it: what is written is quantized."""

    def __init__(self, mapping: Map | None, kind: str, shape: tuple[int, ...], seed: int) -> None:
        self.mapping, self.rounding, self.value = mapping, Rounding(kind, shape, seed), torch.zeros(shape)

    def write(self, value: Tensor, step: int) -> None:
        self.value = self.mapping(value, self.rounding(step)) if self.mapping else value


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


def show(results: dict[str, Any], console: Console) -> None:
    sources = results["sources"]
    names = list(dict.fromkeys(n for s in sources.values() for n in s["update"]))
    shown = Table(title="Mean squared error of Adam's update, relative to its mean square")
    shown.add_column("stored in 8 bits", no_wrap=True)
    for source in sources:
        shown.add_column(source, justify="right")
    for name in names:
        row = [s["update"].get(name) for s in sources.values()]
        shown.add_row(name, *("" if x is None else f"{x:.4f}" if x < 10 else f"{x:.0e}" for x in row))
    console.print(shown)
    sums = {source: s["sum"] for source, s in sources.items() if s["sum"]}
    shown = Table(title="Adagrad's sum: relative error, root mean square (mean)")
    shown.add_column("stored in 8 bits", no_wrap=True)
    for source in sums:
        shown.add_column(source, justify="right")
    for name in next(iter(sums.values()), {}):
        shown.add_row(name, *(f"{s[name][0]:.3f} ({s[name][1]:+.3f})" for s in sums.values()))
    console.print(shown)
    if not results["trained"]:
        return
    shown = Table(title="Final loss relative to fp32 state, mean of seeds (standard error), per cent")
    shown.add_column("stored in 8 bits", no_wrap=True)
    for case in results["trained"]:
        shown.add_column(case, justify="right")
    for label in next(iter(results["trained"].values())):
        row = []
        for finals in results["trained"].values():
            change = [100 * (a / b - 1) for a, b in zip(finals[label], finals["fp32"], strict=True)]
            spread = statistics.stdev(change) / len(change) ** 0.5 if len(change) > 1 else 0.0
            row.append(f"{statistics.fmean(change):+.2f} ({spread:.2f})")
        shown.add_row(label, *row)
    console.print(shown)


def plot(results: dict[str, Any], path: Path) -> None:
    """Errors of the pairs over the steps, for each source."""
    sources = {name: s for name, s in results["sources"].items() if s["curves"]}
    columns = min(3, len(sources))
    rows = -(-len(sources) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.4 * rows), layout="constrained", sharey=True, squeeze=False
    )
    for axes, (name, source) in zip(grid.flat, sources.items(), strict=False):
        for i, (label, curve) in enumerate(source["curves"].items()):
            window = max(1, len(curve) // 40)
            smooth = [statistics.fmean(curve[max(0, k - window) : k + 1]) for k in range(len(curve))]
            axes.plot(smooth, color=f"C{i}", linewidth=2.5 if i == 0 else 1.2, label=label)
        axes.set(yscale="log", ylim=(2e-4, 1), xlabel="step", title=name)
    for axes in grid[:, 0]:
        axes.set_ylabel("error of the update")
    for axes in list(grid.flat)[len(sources) :]:
        axes.set_visible(False)
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
