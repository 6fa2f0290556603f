"""Results of mappings.py: tables and a figure."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import plots


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
    figure, grid = plots.plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.4 * rows), layout="constrained", sharey=True, squeeze=False
    )
    for axes, (name, source) in zip(grid.flat, sources.items(), strict=False):
        for i, (label, curve) in enumerate(source["curves"].items()):
            axes.plot(plots.smoothed(curve, 40), color=f"C{i}", linewidth=2.5 if i == 0 else 1.2, label=label)
        axes.set(yscale="log", ylim=(2e-4, 1), xlabel="step", title=name)
    for axes in grid[:, 0]:
        axes.set_ylabel("error of the update")
    for axes in list(grid.flat)[len(sources) :]:
        axes.set_visible(False)
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)
    plots.plt.close(figure)
