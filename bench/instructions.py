"""``python -m bench.instructions``: how many instructions CPU cases take, by callgrind, against what is recorded.

Counts do not depend on the machine's load, so a change of some per cent shows where times would drown it. They depend
on what compiled and ran them: that is recorded too, and with anything else nothing is compared. "kernels" are steps and
quantization without torch (instructions.cpp); "host" is all that ``step()`` does around the kernels, Python included
(instructions_host.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
BUILD = HERE.parent / "build" / "instructions"
RECORD = HERE / "instructions.json"
# Kernels repeat to the instruction. On the host, where objects lie decides how often a dict looks twice.
TOLERANCES = {"kernels": 0.01, "host": 0.05}
UPDATE = "python -m bench.instructions --update"


@dataclass
class Counts:
    """What one program counted; ``made_with`` is all that a count may depend on."""

    made_with: dict[str, str] = field(default_factory=dict)
    instructions: dict[str, int] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)


def missing() -> str | None:
    """Why nothing can be counted here, or None."""
    for tool in ("valgrind", "cmake", "ninja"):
        if not shutil.which(tool):
            return f"there is no {tool}; install it"
    return None


def build() -> None:
    targets = ["instructions", "callgrind_requests"]
    for command in (
        ["cmake", "-S", str(HERE.parent), "-B", str(BUILD), "-G", "Ninja"],
        ["cmake", "--build", str(BUILD), "--target", *targets],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"bench.instructions: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def parse(output: str, dumps: Sequence[str]) -> Counts:
    """``output``: a program's lines of words between tabs; ``dumps``: what callgrind wrote for each of its counts."""
    counts, totals = Counts(), {}
    for dump in dumps:
        name = re.search(r"^desc: Trigger: Client Request: (.*)$", dump, re.M)
        total = re.search(r"^summary: (\d+)$", dump, re.M)
        if name and total:
            totals[name[1]] = int(total[1])
    for line in output.splitlines():
        key, *words = line.split("\t")
        if key == "case":
            name, elements = words
            # The mean of the second and third run.
            counts.instructions[name] = round((totals[f"{name}@3"] - totals[f"{name}@1"]) / 2)
            counts.elements[name] = int(elements)
        elif words:
            counts.made_with[key] = words[0]
    return counts


def count(options: Sequence[str], program: Sequence[str]) -> Counts:
    # The choices for one kind of processor, on any.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "GENOPT_CPU_TUNING": "prefetch=2"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = ["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={out}", *options, *program]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent)
        if done.returncode:
            raise SystemExit(f"bench.instructions: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        return parse(done.stdout, [path.read_text() for path in Path(folder).iterdir()])


def count_all() -> dict[str, Counts]:
    host = [sys.executable, "-m", "bench.instructions_host", str(BUILD / "libcallgrind_requests.so")]
    return {
        "kernels": count([], [str(BUILD / "instructions")]),
        # Importing torch takes 12 times as long with instrumentation.
        "host": count(["--instr-atstart=no"], host),
    }


def load(path: Path) -> dict[str, Counts]:
    return {part: Counts(**saved) for part, saved in json.loads(path.read_text()).items()} if path.exists() else {}


def save(counts: dict[str, Counts], path: Path) -> None:
    kept = {part: {"made_with": c.made_with, "instructions": c.instructions} for part, c in counts.items()}
    path.write_text(json.dumps(kept, indent=2) + "\n")


def difference(recorded: Counts, now: Counts) -> str | None:
    """What keeps two counts from being compared, or None."""
    for key in recorded.made_with.keys() | now.made_with.keys():
        old, new = recorded.made_with.get(key), now.made_with.get(key)
        if old != new:
            return f"{key} is {new}, recorded with {old}"
    return None


def compare(recorded: dict[str, Counts], now: dict[str, Counts]) -> tuple[list[str], list[str]]:
    """What is wrong, and what is worth a note; a sentence each."""
    wrong, notes = [], []
    for part, counts in now.items():
        old = recorded.get(part)
        if old is None:
            wrong.append(f"{part}: nothing is recorded; record it with: {UPDATE}")
            continue
        if (other := difference(old, counts)) is not None:
            notes.append(f"{part}: not compared: {other}")
            continue
        tolerance = TOLERANCES[part]
        for name in sorted(old.instructions.keys() ^ counts.instructions.keys()):
            where = "recorded" if name in old.instructions else "counted"
            wrong.append(f"{name}: only {where}; if the cases have changed: {UPDATE}")
        for name, after in counts.instructions.items():
            before = old.instructions.get(name, after)
            change = f"{name}: {before:,} instructions a run were recorded, now {after:,} ({after / before - 1:+.1%})"
            if after > before * (1 + tolerance):
                wrong.append(f"{change}, more than {tolerance:.0%} above; find out why, or if it has to be: {UPDATE}")
            elif after < before * (1 - tolerance):
                notes.append(f"{change}; keep the gain with: {UPDATE}")
    return wrong, notes


def table(recorded: dict[str, Counts], now: dict[str, Counts]) -> Table:
    shown = Table(title="Instructions of one run on one thread")
    for title in ("case", "recorded", "now", "ratio", "per element"):
        shown.add_column(title, justify="left" if title == "case" else "right", no_wrap=True)
    for part, counts in now.items():
        old = recorded.get(part, Counts())
        for name, after in counts.instructions.items():
            before = old.instructions.get(name)
            same = before is not None and difference(old, counts) is None
            shown.add_row(
                name,
                f"{before:,}" if before is not None else "",
                f"{after:,}",
                f"{after / before:.3f}" if before is not None and same else "",
                f"{after / counts.elements[name]:,.2f}",
            )
        shown.add_section()
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where a case takes more than its tolerance allows")
    parser.add_argument("--update", action="store_true", help=f"record these counts in bench/{RECORD.name}")
    args = parser.parse_args(arguments)
    if (reason := missing()) is not None:
        print(f"bench.instructions: nothing is counted: {reason}")
        return 0
    build()
    recorded, now = load(RECORD), count_all()
    Console(width=None if sys.stdout.isatty() else 120).print(table(recorded, now))
    if args.update:
        save(now, RECORD)
        print(f"recorded in {RECORD.name}")
        return 0
    wrong, notes = compare(recorded, now)
    for sentence in (*notes, *wrong):
        print(sentence)
    return 1 if args.check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
