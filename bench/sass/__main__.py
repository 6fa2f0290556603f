"""``python -m bench.sass``: CUDA kernels as compiled for an H200, run and counted without one.

Every case, a signature times a shape, is run by an emulator of one warp; its bits have to be those of the CPU kernels.
Counted are the instructions of the warp that has the tile, loads of data that are under way before the first of them
is waited for, registers and spilled bytes; a model adds the share of copy bandwidth that all this allows. Recorded in
bench/sass.json, and compared with it only where the same nvcc has compiled. No chance is in it: --check runs nothing
where the very sources that are recorded, kernels and emulator, meet the same nvcc.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import toolchain
from .cases import Case, all_cases
from .launches import record
from .run import Result, run

RECORD = Path(__file__).parents[1] / "sass.json"
TOLERANCE = 0.02
UPDATE = "python -m bench.sass --update"
# What is compared; whether more is better; what it is called.
COMPARED = {
    "instructions": (False, "instructions a tile"),
    "registers": (False, "registers"),
    "spilled_bytes": (False, "bytes spilled"),
    "loads_before_wait": (True, "loads before the first wait"),
    "share": (True, "% of copy bandwidth"),
}
Results = dict[str, Result]


def run_all(cases: Sequence[Case], jobs: int) -> Results:
    kernels = toolchain.Kernels()
    kernels.compile([toolchain.ROOT / "csrc" / case.source for case in cases], jobs)
    recorded = record(toolchain.recorder(), cases)
    for launch in (launch for each in recorded for launch in each.launches):
        kernels.find(launch.kernel)  # compiles what is missing, before there are several processes
    if jobs == 1:
        return {case.name: run(case, each, kernels) for case, each in zip(cases, recorded, strict=True)}
    with ProcessPoolExecutor(jobs) as pool:
        results = pool.map(run, cases, recorded, [kernels] * len(cases))
        return {case.name: result for case, result in zip(cases, results, strict=True)}


def load(path: Path) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """What the record was made with, and its numbers."""
    if not path.exists():
        return {}, {}
    saved = json.loads(path.read_text())
    return saved["made_with"], saved["cases"]


def numbers_of(result: Result) -> dict[str, float]:
    return {key: value for key, value in asdict(result).items() if key in COMPARED}


def save(numbers: dict[str, dict[str, float]], made_with: dict[str, str], path: Path) -> None:
    cases = ",\n".join(f"    {json.dumps(name)}: {json.dumps(each)}" for name, each in numbers.items())
    path.write_text(f'{{\n  "made_with": {json.dumps(made_with)},\n  "cases": {{\n{cases}\n  }}\n}}\n')


def compare(recorded: dict[str, dict[str, float]], results: Results) -> tuple[list[str], list[str]]:
    """What is worse, and what is worth a note; a sentence each."""
    worse, notes = [], []
    for name, result in results.items():
        if result.wrong:
            continue
        if name not in recorded:
            worse.append(f"{name}: nothing is recorded; record it with: {UPDATE}")
            continue
        for key, (more_is_better, what) in COMPARED.items():
            before, after = recorded[name][key], numbers_of(result)[key]
            gain = (after - before) * (1 if more_is_better else -1)
            change = f"{name}: {before:,} {what} were recorded, now {after:,}"
            if gain < -TOLERANCE * before:
                worse.append(f"{change}; find out why, or if it has to be: {UPDATE}")
            elif gain > TOLERANCE * before:
                notes.append(f"{change}; keep the gain with: {UPDATE}")
    return worse, notes


def table(recorded: dict[str, dict[str, float]], results: Results) -> Table:
    shown = Table(title="Instructions that one warp takes for a tile, and a model of an H200")
    titles = ("case", "kernel", "takes", "recorded", "registers", "spilled", "loads", "% of copy", "bits")
    for title in titles:
        shown.add_column(title, justify="left" if title in ("case", "kernel") else "right", no_wrap=True)
    for name, each in results.items():
        before = recorded.get(name)
        shown.add_row(
            name,
            each.kernel.split("<")[0].split("::")[-1],
            f"{each.instructions:,}",
            f"{before['instructions']:,}" if before else "",
            str(each.registers),
            str(each.spilled_bytes),
            str(each.loads_before_wait),
            f"{each.share:.1f}" if each.share else "",
            "wrong" if each.wrong else "equal",
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sass", description=__doc__)
    parser.add_argument("--check", action="store_true", help=f"fail where a case is more than {TOLERANCE:.0%}% worse")
    parser.add_argument("--update", action="store_true", help=f"record these numbers in bench/{RECORD.name}")
    parser.add_argument("--only", default="", help="only cases with this in their name", metavar="TEXT")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; all processors")
    args = parser.parse_args(arguments)
    if (reason := toolchain.missing()) is not None:
        print(f"bench.sass: nothing is run: {reason}")
        return 0
    cases = [case for case in all_cases() if args.only in case.name]
    if not cases:
        parser.error(f"no case has {args.only!r} in its name")
    compiler = {"nvcc": toolchain.compiler(), "architecture": f"sm_{toolchain.ARCHITECTURE}"}
    made_with = compiler | {"sources": toolchain.sources()}
    known_with, recorded = load(RECORD)
    if args.check and not args.only and known_with == made_with:
        print("bench.sass: nothing is run: sources, emulator and nvcc are those of the record")
        return 0
    is_comparable = known_with.items() >= compiler.items()
    results = run_all(cases, args.jobs)
    Console(width=None if sys.stdout.isatty() else 150).print(table(recorded, results))
    wrong = [f"{name}: {each.wrong}" for name, each in results.items() if each.wrong]
    if args.update and not wrong:
        kept = recorded if args.only and is_comparable else {}
        if args.only:  # the others may be those of other sources
            made_with["sources"] = ""
        numbers = kept | {name: numbers_of(each) for name, each in results.items()}
        save({case.name: numbers[case.name] for case in all_cases() if case.name in numbers}, made_with, RECORD)
        print(f"recorded in {RECORD.name}")
        return 0
    worse, notes = compare(recorded, results)
    if not is_comparable:
        worse, notes = [], [f"not compared: made with {compiler}, recorded with {known_with}"]
    elif not args.only and (gone := recorded.keys() - results.keys()):
        worse.append(f"only recorded: {', '.join(sorted(gone))}; if the cases have changed: {UPDATE}")
    for sentence in (*notes, *worse, *wrong):
        print(sentence)
    return 1 if wrong or (args.check and worse) else 0


if __name__ == "__main__":
    sys.exit(main())
