"""``python -m bench``: times the cases, prints the table, draws the plot. Results go to bench/results/local."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
NOISY = 0.25  # interquartile range over median


def load(path: Path) -> dict[str, dict[str, Any]]:
    """{case: {subject: pytest-benchmark's entry}}."""
    results: dict[str, dict[str, Any]] = defaultdict(dict)
    for entry in json.loads(path.read_text())["benchmarks"]:
        results[entry["extra_info"]["case"]][entry["extra_info"]["subject"]] = entry
    return results


def table(results: dict[str, dict[str, Any]]) -> Table:
    shown = Table(title="One optimizer step: medians of rounds taken in turn")
    for name in ("case", "floor ms", "ours ms", "torch's best ms", "ours / floor", "torch / ours", "GB/s", "noisy"):
        shown.add_column(name, justify="left" if name == "case" else "right", no_wrap=True)
    for case, by_subject in results.items():
        ms = {subject: entry["stats"]["median"] * 1e3 for subject, entry in by_subject.items()}
        ours, floor = ms["genopt_ext"], ms["floor"]
        theirs = {subject: value for subject, value in ms.items() if subject.startswith("torch")}
        best = min(theirs, key=theirs.__getitem__)
        info = by_subject["genopt_ext"]["extra_info"]
        noise = max(by_subject[subject]["extra_info"]["noise"] for subject in ("floor", "genopt_ext", best))
        shown.add_row(
            case,
            f"{floor:.2f}",
            f"{ours:.2f}",
            f"{theirs[best]:.2f} ({best.removeprefix('torch ')})",
            f"{ours / floor:.2f}",
            f"{theirs[best] / ours:.2f}",
            f"{info['bytes'] / ours / 1e6:.1f}",
            f"{noise:.0%}" if noise > NOISY else "",
        )
    return shown


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Time relative to the floor: 1 is as fast as memory allows."""
    names = list(results)
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(names) + 1.5), layout="constrained")
    labels = sorted({s for by_subject in results.values() for s in by_subject} - {"floor"})
    height = 0.8 / len(labels)
    for k, label in enumerate(labels):
        bars = [
            (i + (k - (len(labels) - 1) / 2) * height, r[label]["stats"]["median"] / r["floor"]["stats"]["median"])
            for i, r in enumerate(results.values())
            if label in r
        ]
        axes.barh([y for y, _ in bars], [x for _, x in bars], height, label=label)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(
        xscale="log", yticks=range(len(names)), xlabel="time over the floor of the bytes moved (log; 1 is the limit)"
    )
    axes.set_yticklabels(names)
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--scale", default="0.25", help="1 times single tensors of 64M elements (default: 0.25)")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--seconds", default="6", help="time for each case (default: 6)")
    parser.add_argument("--compiled", action="store_true", help="also time torch.compile of torch's step")
    parser.add_argument("--report", type=Path, help="only show the results in this JSON")
    args = parser.parse_args()
    path = args.report
    if path is None:
        path = HERE / "results" / "local" / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        env = {
            **os.environ,
            "BENCH_SCALE": args.scale,
            "BENCH_CASES": args.cases,
            "BENCH_SECONDS": args.seconds,
            "BENCH_COMPILED": str(int(args.compiled)),
        }
        options = ["-q", "--benchmark-only", f"--benchmark-json={path}", "--benchmark-columns=median,iqr,rounds"]
        command = [sys.executable, "-m", "pytest", str(HERE / "test_steps.py"), *options]
        code = subprocess.run(command, env=env, cwd=HERE.parent).returncode
        if code:
            return code
    results = load(path)
    Console(width=None if sys.stdout.isatty() else 130).print(table(results))
    plot(results, path.with_suffix(".png"))
    print(f"results: {path}\nplot: {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
