"""The figures: each says in its title what to see in it. Ours is coloured, others are muted, the limit is a line."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from . import report  # noqa: E402
from .method import LIMIT, OURS  # noqa: E402
from .report import Row  # noqa: E402

# Okabe and Ito's colours, which colour-blind people tell apart; the others in greys and pale tones.
OURS_COLOR, SECOND, THIRD = "#D55E00", "#E69F00", "#CC79A7"
COLORS = {
    OURS: OURS_COLOR,
    OURS + " int8": SECOND,
    OURS + " bf16": THIRD,
    "torch fused": "#0072B2",
    "torch foreach": "#56B4E9",
    "torch for-loop": "#A6CEE3",
    "torch compiled": "#009E73",
    "torch per tensor": "#8DA0CB",
    "bitsandbytes": "#666666",
    "torchao": "#999999",
    "optimi": "#BBBBBB",
    "flashoptim": "#D0D0D0",
    "DeepSpeed CPUAdam": "#8C8C8C",
    LIMIT: "black",
}
WIDEST = 130  # per cent: what caches or noise make longer is cut there
MARKERS = "oDsv^<>Pphd*"


def color(subject: str) -> str:
    return COLORS.get(subject, THIRD if subject.startswith(OURS) else "#888888")


def save(figure: Figure, path: Path) -> list[Path]:
    """As PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A device's name may have a dot, which with_suffix would cut at.
    written = path.with_name(path.name + ".png")
    figure.savefig(written, dpi=110)
    plt.close(figure)
    return [written]


def ordered(subjects: Any) -> list[str]:
    known = list(COLORS)
    return sorted(subjects, key=lambda s: (not s.startswith(OURS), known.index(s) if s in known else 99, s))


def legend(figure: Figure, axes: Axes, columns: int = 5) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False)


def smoothed(values: list[float], windows: int = 20) -> list[float]:
    """Each with the mean of those before it, a ``windows``th of all."""
    window = max(1, len(values) // windows)
    return [statistics.fmean(values[max(0, k - window) : k + 1]) for k in range(len(values))]


def bandwidth(data: dict[str, Any], path: Path) -> list[Path]:
    """Bars: the speed of each main case's subjects, of the limit's."""
    rows = [row for row in report.rows(data) if row.info["main"] and row.speed and row.of_limit is not None]
    grouped: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row.case].append(row)
    if not grouped:
        return []
    height, y, ticks, names = 0.8, 0.0, [], []
    total = sum(len(rows) + 1.2 for rows in grouped.values())
    figure, axes = plt.subplots(figsize=(9, 0.17 * total + 1.8), layout="constrained")
    seen: dict[str, Any] = {}
    for case, mine in grouped.items():
        mine.sort(key=lambda row: (not report.is_ours(row.subject), -(row.of_limit or 0)))
        begin = y
        for row in mine:
            value = 100 * (row.of_limit or 0)
            bar = axes.barh(y, min(value, WIDEST), height, color=color(row.subject))
            seen.setdefault(row.subject, bar)
            said = f"{value:.0f} %" + "*" * bool(row.info["other"]) + f", {row.doubt}" * bool(row.doubt)
            weight = "bold" if report.is_ours(row.subject) else "normal"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            at = min(value, WIDEST) + 1.2
            axes.text(at, y, said, va="center", fontsize=6.5, weight=weight, bbox=box, zorder=3)
            y += 1
        ticks.append((begin + y - 1) / 2)
        names.append(case)
        y += 1.2
    axes.axvline(100, color="black", linewidth=1.2, zorder=2.5)
    axes.text(
        100, -1.2, "the limit", ha="center", fontsize=8, bbox={"facecolor": "white", "edgecolor": "none"}, zorder=3
    )
    widest = min(WIDEST, max(100 * (row.of_limit or 0) for row in rows))
    axes.set(
        yticks=ticks,
        ylim=(y - 0.6, -2.2),
        xlim=(0, max(100, widest) + 15),
        xlabel="% of the speed at which the same bytes go through memory  (* another arithmetic: see the table)",
    )
    axes.set_yticklabels(names, fontsize=8)
    axes.set_title("How near to the limit of memory each optimizer comes (longer is better)", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    order = ordered(seen)
    figure.legend([seen[s] for s in order], order, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return save(figure, path)


def memory(data: dict[str, Any], path: Path) -> list[Path]:
    """Stacked: what one parameter takes, with each optimizer, while it steps."""
    bars: list[tuple[str, str, list[float]]] = []
    for case, entries in report.by_case(data).items():
        for subject in ordered(entries):
            info = entries[subject]["extra_info"]
            if info["kind"] == "step" and info["main"] and "peak_bytes" in info and case.startswith("AdamW"):
                parts = [info["weight_bytes"], info["weight_bytes"], info["state_bytes"], info["peak_bytes"]]
                bars.append((case, subject, parts))
    if not bars:
        return []
    figure, axes = plt.subplots(figsize=(9, 0.24 * len(bars) + 1.9), layout="constrained")
    parts = ("weights", "gradients", "optimizer state", "more while it steps")
    shades = ("#BBBBBB", "#DDDDDD", "#0072B2", "#F0E442")
    y, previous, names, ticks = 0.0, "", [], []
    for case, subject, widths in bars:
        y += 0.8 if previous and case != previous else 0.0
        previous, left = case, 0.0
        for part, width, shade in zip(parts, widths, shades, strict=True):
            ours = report.is_ours(subject) and part == "optimizer state"
            axes.barh(y, width, 0.8, left=left, color=OURS_COLOR if ours else shade)
            left += width
        axes.text(left + 0.2, y, f"{left:.1f}", va="center", fontsize=7)
        names.append(f"{case}: {subject}")
        ticks.append(y)
        y += 1
    handles = [plt.Rectangle((0, 0), 1, 1, color=shade) for shade in shades]
    handles.insert(3, plt.Rectangle((0, 0), 1, 1, color=OURS_COLOR))
    labels = [*parts[:3], "optimizer state, ours", parts[3]]
    axes.set(yticks=ticks, ylim=(y - 0.4, -0.7), xlabel="bytes a parameter")
    axes.set_yticklabels(names, fontsize=7)
    axes.set_title("Memory that one parameter takes (shorter is better)", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return save(figure, path)


def loss(data: dict[str, Any], path: Path) -> list[Path]:
    """Of the demo's model: loss against the time of whole training steps, and how much of these is the optimizer."""
    curves = {
        e["extra_info"]["subject"]: (
            e["stats"]["data"],
            e["extra_info"].get("losses"),
            e["extra_info"].get("optimizer_seconds"),
        )
        for e in data["benchmarks"]
        if e["extra_info"]["kind"] == "training"
    }
    if OURS not in curves:
        return []
    bare = statistics.median(curves[LIMIT][0])
    names = [name for name in ordered(curves) if name != LIMIT]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.5, 4.2), layout="constrained", gridspec_kw={"width_ratios": (2.2, 1)}
    )
    for name in names:
        seconds, losses, _ = curves[name]
        # Every step counts as the median one, as a single one that was interrupted would shift all that follow.
        step, smooth = statistics.median(seconds), smoothed(losses)
        at = [step * (k + 1) for k in range(len(losses))]
        style = {"linewidth": 2.4 if report.is_ours(name) else 1.4, "linestyle": "-" if name == OURS else "--"}
        left.plot(at, smooth, color=color(name), label=name, **style)
    costs = []
    for seconds, _, own in (curves[name] for name in names):
        costs.append(1e3 * (own if own is not None else max(0.0, statistics.median(seconds) - bare)))
    right.barh(range(len(names)), costs, 0.7, color=[color(name) for name in names])
    for k, cost in enumerate(costs):
        right.text(cost + 0.02 * max(costs), k, f"{cost:.2f}", va="center", fontsize=8)
    right.set(yticks=[], xlabel="ms", xlim=(0, 1.2 * max(costs) or 1))
    right.invert_yaxis()
    right.set_title(f"The optimizer in each step\n(forward and backward: {1e3 * bare:.1f} ms)", fontsize=10)
    left.set(xlabel="time in training steps (s)", ylabel="training loss (nats a character, smoothed)")
    left.set_title("The same training with each optimizer: demo GPT, AdamW", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    legend(figure, left)
    return save(figure, path)


FIGURES = {"bandwidth": bandwidth, "memory": memory, "loss": loss}


def draw(path: Path) -> list[Path]:
    """All figures that the JSON has numbers for, beside it."""
    data = report.load(path)
    written = []
    for name, figure in FIGURES.items():
        written += figure(data, path.with_name(f"{path.stem}-{name}"))
    return written
