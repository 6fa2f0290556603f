"""``make gpu-check``: all that only a machine with an NVIDIA GPU can tell, in one run of at most ten minutes.

Builds the extension for the torch of this Python, runs the tests on ``cuda``, runs compute-sanitizer on the
torch-free test of the CUDA backend, counts launches and host time, and times the cases below against torch in
turn, beside the bandwidth of a device-to-device copy. Writes one JSON, after every part, and prints it as one table.

Needs a torch with CUDA, nvcc, and of requirements-dev.txt the packages for tests (expecttest too); ``--dry-run`` goes
through the timed part on a CPU with small tensors, to see that it works, and writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
MINUTES = 10  # for all of it
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """``bytes`` are moved for each parameter; ``theirs`` are torch's variants and packages to beat.

    ``ours``: options that only our classes have.
    torch keeps moments of bf16 parameters in bf16, and so moves 14 bytes where fp32 moments take 22.
    """

    name: str
    optimizer: str
    shapes: list[int]
    bytes: float
    goal: str
    dtype: torch.dtype = torch.float32
    kwargs: dict[str, Any] = field(default_factory=dict)
    theirs: tuple[str, ...] = ("fused",)
    clip: bool = False  # by the norm of all gradients
    scaled: bool = False  # by a GradScaler: ours finds infinities in the norm's pass, torch's in one of its own
    ours: dict[str, Any] = field(default_factory=lambda: {"state_dtype": torch.float32})


def cases(scale: float) -> list[Case]:
    """The goals' cases; ``scale`` shrinks the tensors."""

    def elements(n: float) -> int:
        return max(1, int(n * scale))

    one, momentum = [elements(1e9)], {"momentum": 0.9}
    coded, rivals = {"state_dtype": torch.int8, "min_int8_size": 0}, ("fused", "bitsandbytes", "torchao")
    stochastic, fp32 = {"param_rounding": "stochastic"}, {"state_dtype": torch.float32}
    return [
        Case("AdamW 1B", "AdamW", one, 28, "95 % of copy"),
        Case("AdamW 200 x 5M", "AdamW", [elements(5e6)] * 200, 28, "95 % of copy"),
        Case("AdamW bf16, fp32 moments 1B", "AdamW", one, 22, "92 % of copy", torch.bfloat16),
        Case("RMSprop 1B", "RMSprop", one, 20, "93 % of copy, 5 x torch", theirs=("foreach",)),
        Case("SGD momentum 1B", "SGD", one, 20, "93 % of copy", kwargs=momentum),
        Case("Adagrad 1B", "Adagrad", one, 20, "93 % of copy", theirs=("foreach", "fused")),
        Case("AdamW clipped 1B", "AdamW", one, 32, "93 % of copy, 1.2 x torch", clip=True),
        Case("AdamW clipped, GradScaler 1B", "AdamW", one, 32, "1.4 x torch", clip=True, scaled=True),
        Case("AdamW 1000 x 1024", "AdamW", [elements(1024)] * 1000, 28, "10 x torch"),
        Case("AdamW 10000 x 64", "AdamW", [elements(64)] * 10_000, 28, "10 x torch"),
        Case("AdamW int8 1B", "AdamW", one, 16.06, "85 % of copy, 1.5 x torch", theirs=rivals, ours=coded),
        Case("AdamW int8 bf16 1B", "AdamW", one, 10.06, "70 % of copy", torch.bfloat16, theirs=rivals, ours=coded),
        Case("RMSprop int8 1B", "RMSprop", one, 14.03, "85 % of copy", theirs=("foreach",), ours=coded),
        Case("AdamW bf16 stochastic 1B", "AdamW", one, 22, "92 % of copy", torch.bfloat16, ours=stochastic | fp32),
        Case(
            "AdamW bf16 master 1B",
            "AdamW",
            one,
            28,
            "90 % of copy",
            torch.bfloat16,
            ours=fp32 | {"master_weights": True},
        ),
        Case("AdamW 2000 x 1024", "AdamW", [elements(1024)] * 2000, 28, "host 0.3 ms, 3 launches"),
    ]


class Clock:
    """Times work on the device, host time included: from an idle device until it is idle again."""

    def __init__(self, device: str) -> None:
        self.device = device

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Run, repeats: int) -> float:
        """Of one of ``repeats`` calls in a row."""
        self.wait()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        self.wait()
        return (time.perf_counter() - start) / repeats

    def host_seconds(self, run: Run) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def in_turn(self, runs: dict[str, Run], seconds: float) -> dict[str, list[float]]:
        """Rounds in which each takes its turn, for about ``seconds`` in all."""
        repeats = {}
        for name, run in runs.items():
            self.seconds(run, 2)
            once = self.seconds(run, 2)
            repeats[name] = max(1, min(50, int(0.02 / once)))
        rounds: dict[str, list[float]] = {name: [] for name in runs}
        begin = time.perf_counter()
        while len(rounds[next(iter(runs))]) < 5 or time.perf_counter() - begin < seconds:
            for name, run in runs.items():
                rounds[name].append(self.seconds(run, repeats[name]))
        return rounds


def parameters(case: Case, device: str) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n, device=device, dtype=case.dtype)) for n in case.shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def subject(case: Case, device: str, torchs: str | None) -> tuple[torch.optim.Optimizer, Run]:
    """An optimizer with its state made, and its step. ``torchs``: the variant of torch's; None: ours."""
    import genopt_ext

    params = parameters(case, device)
    if torchs in ("bitsandbytes", "torchao"):
        module: Any = importlib.import_module(f"{torchs}.optim")
        opt = getattr(module, f"{case.optimizer}8bit")(params, **case.kwargs)
        return opt, opt.step
    module = torch.optim if torchs else genopt_ext.optim
    options = {torchs: True} if torchs else case.ours | ({"max_grad_norm": 1.0} if case.clip else {})
    opt = getattr(module, case.optimizer)(params, **case.kwargs, **options)
    opt.step()
    scaler = (torch.amp if torchs else genopt_ext).GradScaler(device, init_scale=1.0) if case.scaled else None
    if scaler is not None:
        scaler.scale(torch.zeros((), device=device))  # makes the scale

    def run() -> None:
        if torchs and scaler is not None:
            scaler.unscale_(opt)
        if torchs and case.clip:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        if scaler is None:
            opt.step()
        else:
            scaler.step(opt)
            scaler.update()

    return opt, run if case.clip or scaler is not None else opt.step


def check(case: Case, device: str) -> None:
    """The timed step gives the numbers of the plain-torch reference."""
    from genopt_ext import optim

    few = dataclasses.replace(case, shapes=[min(n, 5000) for n in case.shapes[:50]])
    results = []
    for backend in ("auto", "reference"):
        params = parameters(few, device)
        clip = {"max_grad_norm": 1.0} if case.clip else {}
        opt = getattr(optim, case.optimizer)(params, **case.kwargs, **case.ours, **clip, backend=backend)
        for _ in range(3):
            opt.step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def measure(case: Case, device: str, clock: Clock, copy: float, seconds: float) -> dict[str, Any]:
    check(case, device)
    made = {"genopt_ext": subject(case, device, None)}
    absent = {}
    for variant in case.theirs:
        try:
            made[f"torch {variant}"] = subject(case, device, variant)
        except (ImportError, RuntimeError, TypeError, ValueError) as error:  # fused Adagrad is not in every torch
            absent[variant] = str(error)
    rounds = clock.in_turn({name: run for name, (_, run) in made.items()}, seconds)
    opt, step = made["genopt_ext"]
    plan: Any = opt._plan  # type: ignore[attr-defined]
    before = plan.launches
    step()
    launches = plan.launches - before
    medians = {name: statistics.median(times) for name, times in rounds.items()}
    ours = medians.pop("genopt_ext")
    best = min(medians.values(), default=float("nan"))
    moved = sum(case.shapes) * case.bytes
    return {
        "case": case.name,
        "goal": case.goal,
        "absent": absent,
        "bytes": moved,
        "seconds": rounds,
        "ms": ours * 1e3,
        "torch_ms": best * 1e3,
        "torch_over_ours": best / ours,
        "of_copy": moved / ours / copy,
        "host_ms": statistics.median(clock.host_seconds(step) for _ in range(20)) * 1e3,
        "launches": launches,
    }


def measure_quantization(device: str, clock: Clock, copy: float, scale: float) -> list[dict[str, Any]]:
    """int8 in blocks of 256 into given tensors, and back, against a copy of as many bytes."""
    from genopt_ext import quant

    x = torch.randn(max(1024, int(1e9 * scale)), device=device)
    q = quant.quantize(x, scheme="block")
    if (quant.dequantize(q) - x).abs().max() > q.scale.max():
        raise AssertionError("quantization: an error of more than a scale")
    runs: dict[str, Run] = {
        "quantize 1B": lambda: quant.quantize(x, scheme="block", nonfinite="propagate", out=q),
        "dequantize 1B": lambda: quant.dequantize(q, out=x),
    }
    rounds = clock.in_turn(runs, 2.0 if scale == 1 else 0.05)
    moved = x.nbytes + q.codes.nbytes + q.scale.nbytes
    return [
        {
            "case": name,
            "goal": "90 % of copy",
            "bytes": moved,
            "seconds": times,
            "ms": (s := statistics.median(times)) * 1e3,
        }
        | {"of_copy": moved / s / copy, "torch_ms": float("nan"), "torch_over_ours": float("nan")}
        | {"host_ms": float("nan"), "launches": 1}
        for name, times in rounds.items()
    ]


def copy_bandwidth(device: str, clock: Clock, scale: float) -> float:
    """Bytes a second that a device-to-device copy reads and writes."""
    source = torch.randn(max(1024, int(1e9 * scale)), device=device)
    target = torch.empty_like(source)
    times = clock.in_turn({"copy": lambda: target.copy_(source)}, 1.0 if scale == 1 else 0.05)
    return 2 * source.nbytes / statistics.median(times["copy"])


def shell(command: list[str], seconds: float, **environment: str) -> dict[str, Any]:
    """Runs a command; its exit status, time and last lines."""
    start = time.perf_counter()
    print("+", *command, flush=True)
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            # A session of its own, so that what it started ends with it.
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status = process.wait(timeout=seconds)
        except FileNotFoundError as error:
            status = 127
            print(error, file=output)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = 124
            print(f"stopped after {seconds:.0f} s", file=output)
        output.seek(0)
        last = output.read().strip().splitlines()[-5:]
    print(*last, sep="\n", flush=True)
    return {"command": " ".join(command), "status": status, "seconds": time.perf_counter() - start, "last": last}


def checks() -> Iterator[dict[str, Any]]:
    """The build, the tests on the GPU, and the sanitizers, in turn."""
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}.{minor}"
    setup = [sys.executable, "setup.py", "build_ext", "--inplace"]
    program, tests = ROOT / "build" / "test_cuda", ["-q", "-n", "4", "--ignore=tests/test_demo.py", "tests"]
    program.parent.mkdir(exist_ok=True)
    # With the timed part, the limits come to less than ten minutes.
    yield shell(setup, 120, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST=architecture)
    yield shell([sys.executable, "-m", "pytest", *tests], 150, GENOPT_TEST_DEVICE="cuda")
    yield shell(["bash", "tests/cpp/build_cuda.sh", str(program), architecture.replace(".", "")], 70)
    yield shell([str(program)], 30)
    for tool in SANITIZERS:
        yield shell(["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", str(program), "few"], 35)


def show(results: list[dict[str, Any]], copy: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"One step; a copy moves {copy / 1e9:.0f} GB/s")
    for name in ("case", "ms", "torch's best ms", "torch / ours", "% of copy", "host ms", "launches", "goal"):
        table.add_column(name, justify="left" if name in ("case", "goal") else "right", no_wrap=True)
    for r in results:
        numbers = (f"{r['ms']:.3f}", f"{r['torch_ms']:.3f}", f"{r['torch_over_ours']:.2f}", f"{r['of_copy']:.0%}")
        table.add_row(r["case"], *numbers, f"{r['host_ms']:.3f}", str(r["launches"]), r["goal"])
    Console(width=140).print(table)


class Report:
    """The JSON: written anew whenever something is added, so that a run that is cut short has told what it knew."""

    def __init__(self, out: Path | None, commit: str, device: str) -> None:
        self.start = time.perf_counter()
        date, name = datetime.date.today().isoformat(), torch.cuda.get_device_name() if device == "cuda" else "cpu"
        if not commit and shutil.which("git"):
            head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
            commit = head.stdout.strip()
        commit = commit or "unknown"
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
        self.data: dict[str, Any] = {"device": name, "date": date, "commit": commit, "versions": versions}
        self.data |= {"checks": [], "results": [], "errors": []}
        folder = ROOT / "bench" / "results" / name.lower().replace(" ", "-")
        self.path = None if device == "cpu" else out or folder / f"{date}-{commit}.json"

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def add(self, part: str, entry: dict[str, Any]) -> None:
        self.data[part].append(entry)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.data, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the JSON (default: bench/results/<device>/<date>-<commit>.json)")
    parser.add_argument("--commit", default="", help="what is measured, where there is no git")
    parser.add_argument("--only-times", action="store_true", help="neither build nor test: time what is built")
    parser.add_argument("--dry-run", action="store_true", help="a small run on the CPU that writes nothing")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device; run it where one is, or try --dry-run")
        return 1
    device, scale, seconds = ("cpu", 1e-4, 0.02) if arguments.dry_run else ("cuda", 1.0, 4.0)
    report = Report(arguments.out, arguments.commit, device)
    if not arguments.dry_run and not arguments.only_times:
        for each in checks():
            report.add("checks", each)

    sys.path.insert(0, str(ROOT))
    clock = Clock(device)
    copy = report.data["copy_bytes_per_second"] = copy_bandwidth(device, clock, scale)
    for case in cases(scale):
        if report.seconds() > 60 * MINUTES - 30:
            report.add("errors", {"case": case.name, "error": f"no time left of {MINUTES} minutes"})
            continue
        try:
            report.add("results", measure(case, device, clock, copy, seconds))
        except (RuntimeError, AssertionError) as error:  # the other cases are still worth their time
            report.add("errors", {"case": case.name, "error": str(error)})
        if device == "cuda":
            torch.cuda.empty_cache()
    for entry in measure_quantization(device, clock, copy, scale):
        report.add("results", entry)
    show(report.data["results"], copy)
    for each in report.data["checks"]:
        print(f"{'passed' if each['status'] == 0 else 'FAILED'} in {each['seconds']:.0f} s: {each['command']}")
    for each in report.data["errors"]:
        print(f"FAILED: {each['case']}: {each['error']}")
    return int(bool(report.data["errors"]) or any(each["status"] for each in report.data["checks"]))


if __name__ == "__main__":
    sys.exit(main())
