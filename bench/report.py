"""What a result says: rows, a table for the terminal, verdicts, and comparisons."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .method import FEW, LIMIT, NOISY, OURS

NEAR = 0.95  # of the limit, from which on a row is as good as it gets
Entry = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One subject in one case. ``of_limit`` compares bytes a second; None where a case has no limit.

    ``noise`` is the largest, ``rounds`` the fewest, of those that are compared: the row, the limit and the best peer.
    """

    case: str
    subject: str
    median: float
    low: float
    high: float
    noise: float
    rounds: int
    bytes_an_element: float
    speed: float  # bytes a second
    of_limit: float | None
    peer: str  # the best of the others
    peer_other: str  # in which way its arithmetic is not the case's
    peer_over_ours: float | None  # above 1: slower than this row
    info: dict[str, Any]

    @property
    def doubt(self) -> str:
        """Why the numbers count for little; empty where they do."""
        return "noisy" if self.noise > NOISY else "few rounds" if self.rounds < FEW else ""


def load(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: another program's file.
    """
    data = json.loads(path.read_text())
    entries = data.get("benchmarks", []) if isinstance(data, dict) else []
    if not entries or "kind" not in entries[0].get("extra_info", {}) or "device" not in data.get("machine_info", {}):
        raise ValueError(f"{path}: not made by python -m bench run")
    return data


def by_case(data: dict[str, Any]) -> dict[str, dict[str, Entry]]:
    """{case: {subject: pytest-benchmark's entry}}."""
    grouped: dict[str, dict[str, Entry]] = defaultdict(dict)
    for entry in data["benchmarks"]:
        grouped[entry["extra_info"]["case"]][entry["extra_info"]["subject"]] = entry
    return dict(grouped)


def is_ours(subject: str) -> bool:
    return subject.startswith(OURS)


def peers(entries: dict[str, Entry]) -> dict[str, float]:
    """Medians of the others that do the same; of all others where none does."""
    others = {s: e for s, e in entries.items() if s != LIMIT and not is_ours(s)}
    same = {s: e for s, e in others.items() if e["extra_info"]["rival"]}
    return {s: e["stats"]["median"] for s, e in (same or others).items()}


def rows(data: dict[str, Any]) -> list[Row]:
    """All cases and subjects, without the limit."""
    made = []
    for case, entries in by_case(data).items():
        limit = entries.get(LIMIT)
        rivals = peers(entries)
        for subject, entry in entries.items():
            if subject == LIMIT:
                continue
            stats, info = entry["stats"], entry["extra_info"]
            of_limit = None
            if limit is not None:
                of_limit = limit["stats"]["median"] / stats["median"]
                if info["bytes"]:  # the limit may move a little less: scales are left out, arrays end at 64 bytes
                    of_limit *= info["bytes"] / limit["extra_info"]["moved"]
            best = min(rivals, key=rivals.__getitem__, default="")
            compared = [e for s, e in entries.items() if s in (subject, LIMIT, best)]
            made.append(
                Row(
                    case=case,
                    subject=subject,
                    median=stats["median"],
                    low=stats["q1"],
                    high=stats["q3"],
                    noise=max(e["extra_info"]["noise"] for e in compared),
                    rounds=min(e["stats"]["rounds"] for e in compared),
                    bytes_an_element=info["bytes"] / info["elements"],
                    speed=info["bytes"] / stats["median"],
                    of_limit=of_limit,
                    peer=best,
                    peer_other=entries[best]["extra_info"]["other"] if best else "",
                    peer_over_ours=rivals[best] / stats["median"] if best else None,
                    info=info,
                )
            )
    return made


def duration(seconds: float) -> str:
    units = ((1.0, "s"), (1e3, "ms"), (1e6, "us"))
    factor, unit = next((each for each in units if seconds * each[0] >= 1), units[-1])
    return f"{seconds * factor:.3g} {unit}"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def table(data: dict[str, Any]) -> Table:
    """Every case and subject; ours first, then from fast to slow."""
    shown = Table(title=f"Medians of rounds taken in turn: {described(data)}")
    wide = ("case", "subject")
    numbers = ("median", "quartiles", "B/param", "GB/s", "of limit", "peer / ours", "state B", "rounds", "noise")
    for name in (*wide, *numbers):
        shown.add_column(name, justify="left" if name in wide else "right", no_wrap=True)
    goals = any(entry["extra_info"].get("goal") for entry in data["benchmarks"])
    launches = any("host_ms" in entry["extra_info"] for entry in data["benchmarks"])
    for name in ("host ms", "launches") * launches + ("goal",) * goals:
        shown.add_column(name, justify="right", no_wrap=True)
    all_rows = rows(data)
    for case, entries in by_case(data).items():
        shown.add_section()
        mine = [row for row in all_rows if row.case == case]
        mine.sort(key=lambda row: (not is_ours(row.subject), row.median))
        title = case
        if LIMIT in entries:
            limit = entries[LIMIT]
            stats, info = limit["stats"], limit["extra_info"]
            whole = info["bytes"] / info["moved"] if "moved" in info else 1.0  # a copy on a GPU may move fewer
            span = f"{duration(whole * stats['q1'])} to {duration(whole * stats['q3'])}"
            speed = f"{info['moved'] / stats['median'] / 1e9:.3g}" if "moved" in info else ""
            width = f"{info['bytes'] / info['elements']:.4g}" if info["bytes"] else ""
            shown.add_row(title, LIMIT, duration(whole * stats["median"]), span, width, speed, style="dim")
            title = ""
        for row in mine:
            ours = is_ours(row.subject)
            better = row.peer_over_ours is None or row.peer_over_ours >= 1
            against = ratio(row.peer_over_ours) if ours else ""
            name = row.subject + (f" ({row.info['other']})" if row.info["other"] else "")
            cells = [
                title,
                name,
                duration(row.median),
                f"{duration(row.low)} to {duration(row.high)}",
                f"{row.bytes_an_element:.4g}" if row.bytes_an_element else "",
                f"{row.speed / 1e9:.3g}" if row.speed else "",
                "" if row.of_limit is None else f"{row.of_limit:.0%}",
                against if better else f"[red]{against}[/red]",
                f"{row.info['state_bytes']:.3g}" if "state_bytes" in row.info else "",
                str(row.rounds),
                f"[yellow]{row.noise:.0%} {row.doubt}[/yellow]" if row.doubt else f"{row.noise:.0%}",
            ]
            if launches:
                cells += [f"{row.info['host_ms']:.3f}" if "host_ms" in row.info else ""]
                cells += [str(row.info.get("launches", ""))]
            if goals:
                cells += [row.info["goal"] if ours else ""]
            shown.add_row(*cells, style="bold" if ours else "")
            title = ""
    return shown


def footnotes(data: dict[str, Any]) -> list[str]:
    """Who is absent and why, each reason once; what failed."""
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for case, absent in data.get("absent", {}).items():
        for subject, reason in absent.items():
            reasons[subject, reason].append(case)
    total = len(by_case(data))
    said = []
    for (subject, reason), where in sorted(reasons.items()):
        named = f"{len(where)} cases" if 4 < len(where) <= total else ", ".join(where)
        said.append(f"Absent: {subject} ({reason}): {named}.")
    said += [f"FAILED: {case}: {why}" for case, why in data.get("failed", {}).items()]
    return said


def behind(data: dict[str, Any]) -> list[Row]:
    """Our rows that are not ahead of every peer, from the worst."""
    lagging = [
        row for row in rows(data) if row.subject == OURS and row.peer_over_ours is not None and row.peer_over_ours < 1
    ]
    return sorted(lagging, key=lambda row: row.peer_over_ours or 0.0)


def verdicts(data: dict[str, Any]) -> list[str]:
    """Where we stand, in sentences."""
    mine = [row for row in rows(data) if row.subject == OURS]
    against = [row for row in mine if row.peer_over_ours is not None]
    ahead = sum(row.peer_over_ours >= 1 for row in against if row.peer_over_ours)
    near = sum(row.of_limit is not None and row.of_limit >= NEAR for row in mine)
    said = [f"Ahead of the best peer in {ahead} of {len(against)} cases; at {NEAR:.0%} of the limit or more in {near}."]
    for row in behind(data):
        limit = "" if row.of_limit is None else f", {row.of_limit:.0%} of the limit"
        doubt = f", {row.doubt}" if row.doubt else ""
        said.append(f"Behind: {row.case}: {row.peer} takes {row.peer_over_ours:.2f} of our time{limit}{doubt}.")
    return said


def show(data: dict[str, Any], console: Console) -> None:
    console.print(table(data))
    for line in [*footnotes(data), *verdicts(data)]:
        console.print(line, markup=False, soft_wrap=True)


def described(data: dict[str, Any]) -> str:
    """The machine, in a line."""
    m = data["machine_info"]
    changed = " with changes" if m["changed"] else ""
    where = f"{m['device']}, {m['threads']} threads, torch {m['versions']['torch']}"
    return f"{where}, {m['date'][:10]}, {m['commit']}{changed}"


def comparison(a: dict[str, Any], b: dict[str, Any]) -> Table:
    """Of two results, what drift leaves: how near ours is to the limit, and the best peer's time over ours."""
    shown = Table(title="A against B, by ratios within each run")
    for name in ("case", "subject", "of limit A", "of limit B", "change", "peer / ours A", "peer / ours B", "doubt"):
        shown.add_column(name, justify="left" if name in ("case", "subject") else "right", no_wrap=True)
    olds = {(row.case, row.subject): row for row in rows(a) if is_ours(row.subject)}
    for new in rows(b):
        old = olds.get((new.case, new.subject))
        if old is None:
            continue
        known = old.of_limit is not None and new.of_limit is not None
        shown.add_row(
            new.case,
            new.subject,
            f"{old.of_limit:.0%}" if known else "",
            f"{new.of_limit:.0%}" if known else "",
            f"{new.of_limit / old.of_limit - 1:+.0%}" if known else "",  # type: ignore[operator]
            ratio(old.peer_over_ours),
            ratio(new.peer_over_ours),
            old.doubt or new.doubt,
        )
    return shown
