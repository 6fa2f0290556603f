"""Trains a small character-level GPT with torch.optim and with genopt_ext.optim, side by side.

The text is the English of Python's own manual, `pydoc_data.topics`, so nothing is downloaded. Every subject starts
from the same weights and sees the same batches; a table and a plot of the losses close the run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from genopt_ext import optim

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# The one line that differs between subjects; a further optimizer joins here.
SUBJECTS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch.optim.AdamW": torch.optim.AdamW,
    "genopt_ext.optim.AdamW": optim.AdamW,
    "genopt_ext.optim.AdamW8bit": optim.AdamW8bit,
}


@dataclass
class Result:
    """One subject's training: losses per step, seconds per step, bytes of optimizer state."""

    name: str
    losses: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)
    optimizer_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    state_bytes: int = 0

    @property
    def final_loss(self) -> float:
        return self.validation[max(self.validation)]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    def __init__(self, symbols: int, context: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, max(1, width // 32)) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def load_text() -> tuple[Tensor, int]:
    """The text as symbol numbers, and how many symbols there are."""
    text = "\n".join(topics[name] for name in sorted(topics))
    symbols = {c: i for i, c in enumerate(sorted(set(text)))}
    return torch.tensor([symbols[c] for c in text]), len(symbols)


def batches(ids: Tensor, args: argparse.Namespace, count: int, seed: int) -> list[Tensor]:
    """`count` batches of windows with one symbol more than the context, to predict."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - args.context, (count, args.batch, 1), generator=generator)
    return list(ids[starts + torch.arange(args.context + 1)])


def loss_of(model: GPT, batch: Tensor) -> Tensor:
    return functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def train(name: str, make: Callable[..., Any], args: argparse.Namespace, advance: Callable[[float], None]) -> Result:
    ids, symbols = load_text()
    split = int(0.95 * len(ids))
    torch.manual_seed(args.seed)
    model = GPT(symbols, args.context, args.width, args.layers)
    opt = make(model.parameters(), lr=args.lr, weight_decay=0.1)
    schedule = optim.lr_scheduler.OneCycleLR(opt, args.lr, total_steps=args.steps + 1, cycle_momentum=False)
    held_out = batches(ids[split:], args, 8, seed=args.seed + 1)
    result = Result(name)
    for step, batch in enumerate(batches(ids[:split], args, args.steps, seed=args.seed)):
        begin = time.perf_counter()
        opt.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        before = time.perf_counter()
        opt.step()
        end = time.perf_counter()
        schedule.step()
        result.losses.append(loss.item())
        result.optimizer_seconds.append(end - before)
        result.step_seconds.append(end - begin)
        if (step + 1) % max(1, args.steps // 10) == 0 or step + 1 == args.steps:
            with torch.no_grad():
                result.validation[step + 1] = statistics.fmean(loss_of(model, b).item() for b in held_out)
        advance(result.losses[-1])
    states = (t for state in opt.state.values() for t in state.values())
    result.state_bytes = sum(t.numel() * t.element_size() for t in states)
    return result


def plot(results: list[Result], path: str) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (result, style) in enumerate(zip(results, ("-", "--", ":", "-.") * len(results), strict=False)):
        window = max(1, len(result.losses) // 50)
        smooth = [statistics.fmean(result.losses[max(0, k - window) : k + 1]) for k in range(len(result.losses))]
        axes.plot(smooth, style, color=f"C{i}", linewidth=3 - 1.5 * (i > 0), label=f"{result.name}: training")
        axes.plot(*zip(*result.validation.items(), strict=True), "ox+s"[i % 4], color=f"C{i}", label="held-out text")
    axes.set(xlabel="training step", ylabel="loss (nats a character)", title="The same model, text and seed")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(results: list[Result]) -> Table:
    shown = Table(title="Character-level GPT on the Python manual")
    for column in ("optimizer", "final loss", "optimizer step (ms)", "share of training step", "state (MB)"):
        shown.add_column(column, justify="left" if column == "optimizer" else "right", no_wrap=column == "optimizer")
    for result in results:
        step = statistics.median(result.optimizer_seconds)
        share = step / statistics.median(result.step_seconds)
        megabytes = result.state_bytes / 1e6
        shown.add_row(result.name, f"{result.final_loss:.4f}", f"{step * 1e3:.2f}", f"{share:.1%}", f"{megabytes:.2f}")
    return shown


def main(argv: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--plot", default="demo.png", help="where the loss curves go")
    args = parser.parse_args(argv)
    console = Console()
    columns = TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    results = []
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as progress:
        for name, make in SUBJECTS.items():
            task = progress.add_task(name, total=args.steps, loss=float("nan"))
            results.append(train(name, make, args, lambda loss, task=task: progress.update(task, advance=1, loss=loss)))
    console.print(table(results))
    plot(results, args.plot)
    console.print(f"loss curves: {args.plot}")
    return results


if __name__ == "__main__":
    main()
