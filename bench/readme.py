"""The README's section, written between two markers from the newest committed result of each device."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .method import FEW, NOISY, OURS, RESULTS, ROOT
from .report import duration, load, ratio, rows, verdicts

BEGIN, END = "<!-- python -m bench readme --write: begin -->", "<!-- end -->"
FIGURES = {
    "bandwidth": "Bandwidth of each case against the limit",
    "memory": "Memory for a parameter",
    "loss": "Training loss against time",
}


def newest(results: Path = RESULTS) -> list[Path]:
    """The last result of each device. Names begin with the date; what other programs wrote is passed over."""
    found = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir() and path.name != "local"):
        for path in sorted(folder.glob("*.json"), reverse=True):
            try:
                load(path)
            except ValueError:
                continue
            found.append(path)
            break
    return found


def markdown_table(data: dict[str, Any]) -> list[str]:
    """The main cases."""
    lines = [
        "| case | time | GB/s | of limit | best peer | peer / ours | |",
        "|---|--:|--:|--:|---|--:|---|",
    ]
    for row in rows(data):
        if row.subject != OURS or not row.info["main"]:
            continue
        cells = [
            row.case,
            duration(row.median),
            f"{row.speed / 1e9:.3g}" if row.speed else "",
            "" if row.of_limit is None else f"{row.of_limit:.0%}",
            row.peer + (f" ({row.peer_other})" if row.peer_other else ""),
            ratio(row.peer_over_ours),
            row.doubt,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def section(path: Path, root: Path = ROOT) -> list[str]:
    """Of one device: where, the main rows, the figures beside the JSON, and how to make it all again."""
    data = load(path)
    m = data["machine_info"]
    name = path.relative_to(root).as_posix()
    packages = ", ".join(f"{package} {version}" for package, version in m["versions"].items())
    changed = " with changes" if m["changed"] else ""
    loads = {"at the beginning": m["load"], "at the end": m["load at the end"]}
    load_said = ", ".join(f"{load:g} {when}" for when, load in loads.items() if load is not None)
    lines = [f"### {m['device']}", ""]
    lines += [
        f"{m['date'][:10]}, commit {m['commit']}{changed}, {m['threads']} threads, {m['capability']}, "
        f"load average {load_said}. {packages}. [All rows]({name}).",
        "",
        *markdown_table(data),
        "",
        *(line for line in verdicts(data)[:1]),
        *sorted(
            {
                f"Absent: {s} ({why})."
                for absent in data["absent"].values()
                for s, why in absent.items()
                if s not in {e["extra_info"]["subject"] for e in data["benchmarks"]}
            }
        ),
    ]
    for figure, title in FIGURES.items():
        picture = path.with_name(f"{path.stem}-{figure}.png")
        if picture.exists():
            lines += ["", f"![{title}]({picture.relative_to(root).as_posix()})"]
    again = [f"python -m bench {m['command']} --json {name}", f"python -m bench plot {name}"]
    if m["command"] == "gpu-check":
        again[0] = f"make gpu-times  # writes {name}"
    grown = path.parent.with_name("growth") / f"{path.parent.name}.json"
    picture = grown.with_name(f"{grown.stem}-tensors.png")
    if picture.exists():
        lines += ["", f"![Time against the number of tensors]({picture.relative_to(root).as_posix()})"]
        again.append(json.loads(grown.read_text())["machine_info"]["command"])
    return [*lines, "", "```sh", *again, "python -m bench readme --write", "```"]


def markdown(paths: Iterable[Path], root: Path = ROOT) -> str:
    sections = [line for path in paths for line in [*section(path, root), ""]]
    return "\n".join([*sections, "### How to read the table", "", *(f"- {line}" for line in LEGEND)])


LEGEND = (
    "**time**: the median of rounds in which all candidates take turns. Tensors rotate, so that most come from memory.",
    "**of limit**: against the fastest loop that moves the same bytes and computes nothing; for the training step, "
    "against forward and backward alone.",
    "**best peer**: the fastest that does the case's arithmetic. What it does otherwise is in brackets.",
    "**peer / ours**: above 1, ours is faster.",
    f"**noisy**: quartiles are more than {NOISY:.0%} of the median apart. **few rounds**: fewer than {FEW}.",
    "More on each: [how benchmarks measure](CONTRIBUTING.md#how-benchmarks-measure).",
)


def between(text: str, begin: str) -> str:
    """What stands between this marker and the next end.

    Raises:
        ValueError: they are not there.
    """
    if begin not in text or END not in text.split(begin, 1)[1]:
        raise ValueError(f"has no lines {begin!r} and {END!r}; add them")
    return text.split(begin, 1)[1].split(END, 1)[0].strip("\n")


def write_between(path: Path, begin: str, new: str) -> None:
    """Replaces what stands between this marker and the next end.

    Raises:
        ValueError: they are not there.
    """
    old = path.read_text()
    try:
        between(old, begin)
    except ValueError as error:
        raise ValueError(f"{path.name} {error}") from None
    head, rest = old.split(begin, 1)
    path.write_text(f"{head}{begin}\n{new}\n{END}{rest.split(END, 1)[1]}")
