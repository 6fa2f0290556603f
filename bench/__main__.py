"""``python -m bench``: times optimizers against each other and against the limit of memory.

``run`` measures and shows; ``compare`` sets two results side by side; ``plot`` draws one; ``readme`` writes the
section of the README from the newest committed result of each device; ``list`` tells the cases and subjects.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import method, plots, readme, report, session
from .cases import Case, cases, selected, short
from .subjects import SUBJECTS

CONSOLE = Console(width=None if sys.stdout.isatty() else 190)


def measured(table: list[Case], settings: session.Settings, path: Path) -> dict[str, str]:
    """Runs the cases under a progress bar; returns those that failed, and why."""
    columns = TextColumn("{task.description:44}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%")
    stderr = Console(file=sys.stderr)  # this one: while pytest runs, sys.stderr is another
    with Progress(*columns, TimeElapsedColumn(), console=stderr, redirect_stdout=False) as progress:
        task = progress.add_task("", total=len(table))
        index = {case.name: i for i, case in enumerate(table)}

        def told(case: Case, share: float) -> None:
            progress.update(task, completed=index[case.name] + share, description=case.name)

        failed = session.run(table, settings, path, told)
        progress.update(task, completed=len(table), description="done")
    return failed


def run(args: argparse.Namespace) -> int:
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device")
    # Without --json: the README names the file that it was committed as.
    given = ["--scale", f"{args.scale:g}", "--seconds", f"{args.seconds:g}", "--device", args.device]
    given += ["--cases", *args.cases] * bool(args.cases) + ["--subjects", *args.subjects] * bool(args.subjects)
    subjects = tuple(args.subjects) or session.Settings.subjects
    settings = session.Settings(args.seconds, args.scale, args.device, shlex.join(["run", *given]), subjects)
    table = selected(cases(args.scale, method.free_memory(args.device)), args.cases)
    path = args.json or session.default_path(args.device)
    failed = measured(table, settings, path)
    report.show(report.load(path), CONSOLE)
    print(f"results: {path}")
    if not args.no_plots:
        print("figures:", *plots.draw(path), sep="\n  ")
    return int(bool(failed))


def compare(args: argparse.Namespace) -> int:
    CONSOLE.print(report.comparison(report.load(args.a), report.load(args.b)))
    if not args.times:
        return 0
    tool = shutil.which("pytest-benchmark", path=str(Path(sys.executable).parent)) or shutil.which("pytest-benchmark")
    if tool is None:
        raise ValueError("--times needs the command pytest-benchmark, which comes with the package of this name")
    columns = ["--columns=median,iqr,rounds", "--sort=name", "--group-by=group"]
    return subprocess.run([tool, "compare", *columns, str(args.a), str(args.b)]).returncode


def plot(args: argparse.Namespace) -> int:
    print(*plots.draw(args.file), sep="\n")
    return 0


def write_readme(args: argparse.Namespace) -> int:
    paths = readme.newest()
    if not paths:
        raise ValueError(
            "bench/results has no result of python -m bench run --json bench/results/DEVICE/DATE-COMMIT.json"
        )
    text = readme.markdown(paths)
    if args.write:
        readme.write_between(method.ROOT / "README.md", readme.BEGIN, text)
        print("README.md is written from", *[path.relative_to(method.ROOT) for path in paths])
    else:
        print(text)
    return 0


def show_list(args: argparse.Namespace) -> int:
    shown = Table(title="Cases")
    for name in ("case", "kind", "tensors", "elements", "B/param"):
        shown.add_column(name, justify="left" if name in ("case", "kind") else "right", no_wrap=True)
    for case in cases(args.scale, method.free_memory()):
        width = f"{case.bytes_an_element:.4g}" if case.moves else ""
        shown.add_row(case.name, case.kind, str(len(case.shapes)), f"{case.elements:,}", width)
    CONSOLE.print(shown)
    who = Table(title=f"Subjects ({short(torch.float32)} unless a case says otherwise)")
    for name in ("subject", "what", "here"):
        who.add_column(name, no_wrap=name != "what")
    for subject in SUBJECTS.values():
        why = subject.why_absent()
        who.add_row(subject.name, subject.about, f"absent: {why}" if why else "yes")
    CONSOLE.print(who)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="measure cases, show the table, draw the figures")
    one.add_argument("--cases", nargs="+", default=[], metavar="PART", help="part of a name, or a regular expression")
    one.add_argument("--subjects", nargs="+", default=[], choices=list(SUBJECTS), metavar="NAME", help="see: list")
    one.add_argument("--scale", type=float, default=0.25, help="1: single tensors of 64M elements (default: 0.25)")
    one.add_argument("--seconds", type=float, default=4.0, help="time for the turns of each case (default: 4)")
    one.add_argument("--device", default="cpu", help="cpu or cuda")
    one.add_argument("--json", type=Path, help="where the result goes (default: bench/results/local)")
    one.add_argument("--no-plots", action="store_true")
    one.set_defaults(do=run)
    two = commands.add_parser("compare", help="ratios of two results, side by side")
    two.add_argument("a", type=Path)
    two.add_argument("b", type=Path)
    two.add_argument("--times", action="store_true", help="also pytest-benchmark's comparison of times")
    two.set_defaults(do=compare)
    three = commands.add_parser("plot", help="draw a result's figures beside it")
    three.add_argument("file", type=Path)
    three.set_defaults(do=plot)
    four = commands.add_parser("readme", help="the README's section, from the newest result of each device")
    four.add_argument("--write", action="store_true", help="put it between the README's markers")
    four.set_defaults(do=write_readme)
    five = commands.add_parser("list", help="cases, and who can take part here")
    five.add_argument("--scale", type=float, default=0.25)
    five.set_defaults(do=show_list)
    args = parser.parse_args(argv)
    try:
        return args.do(args)
    except (ValueError, OSError) as error:
        print(f"python -m bench {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
