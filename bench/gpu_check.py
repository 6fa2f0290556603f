"""``make gpu-check``: all that only a machine with an NVIDIA GPU can tell, in one run of at most ten minutes.

Builds the extension for the torch of this Python, runs the tests on ``cuda``, runs compute-sanitizer on the
torch-free test of the CUDA backend, and times the cases below as ``python -m bench run --device cuda`` does, host time
and launches included. Writes one JSON, after every part, and prints it as one table.

Needs a torch with CUDA, nvcc, and of requirements-dev.txt the packages for tests (expecttest too); ``--dry-run`` goes
through the timed part on a CPU with small tensors, to see that it works, and writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the Makefile runs this as a file

from bench import method, report  # noqa: E402
from bench.cases import Case, Shape  # noqa: E402

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
MINUTES = 10  # for all of it
FUSED, FOREACH = ("torch fused",), ("torch foreach",)
EIGHT_BIT = (*FUSED, "bitsandbytes", "torchao", "flashoptim")


def cases(scale: float) -> list[tuple[Case, tuple[str, ...]]]:
    """The goals' cases, and whom ours is to beat; ``scale`` shrinks the tensors."""

    def tensors(count: int, n: float) -> tuple[Shape, ...]:
        return ((max(1, int(n * scale)),),) * count

    one = tensors(1, 1e9)
    momentum = {"momentum": 0.9}
    bf16, fp32, int8 = torch.bfloat16, torch.float32, torch.int8
    stochastic = "stochastic"
    table = [
        (Case("AdamW 1B", "AdamW", one, goal="95 % of copy"), FUSED),
        (Case("AdamW 200 x 5M", "AdamW", tensors(200, 5e6), goal="95 % of copy"), FUSED),
        (Case("AdamW mixed 1B", "AdamW", one, dtype=bf16, state=fp32, goal="92 % of copy"), FUSED),
        (Case("RMSprop 1B", "RMSprop", one, goal="93 % of copy, 5 x torch"), FOREACH),
        (Case("SGD momentum 1B", "SGD", one, kwargs=momentum, goal="93 % of copy"), FUSED),
        (Case("Adagrad 1B", "Adagrad", one, goal="93 % of copy"), FUSED + FOREACH),
        (Case("AdamW clipped 1B", "AdamW", one, clip=1.0, goal="93 % of copy, 1.2 x torch"), FUSED),
        (Case("AdamW AMP clipped 1B", "AdamW", one, clip=1.0, amp=True, goal="1.4 x torch"), FUSED),
        (Case("AdamW 1000 x 1024", "AdamW", tensors(1000, 1024), goal="10 x torch"), FUSED),
        (Case("AdamW 10000 x 64", "AdamW", tensors(10_000, 64), goal="10 x torch"), FUSED),
        (Case("AdamW int8 1B", "AdamW", one, state=int8, goal="85 % of copy, 1.5 x torch"), EIGHT_BIT),
        (Case("AdamW int8 bf16 1B", "AdamW", one, dtype=bf16, state=int8, goal="70 % of copy"), EIGHT_BIT),
        (Case("RMSprop int8 1B", "RMSprop", one, state=int8, goal="85 % of copy"), FOREACH),
        (
            Case("AdamW mixed stochastic 1B", "AdamW", one, dtype=bf16, state=fp32, rounding=stochastic, goal="92 %"),
            FUSED,
        ),
        (Case("AdamW mixed master 1B", "AdamW", one, dtype=bf16, state=fp32, master=True, goal="90 %"), FUSED),
        (Case("AdamW 2000 x 1024", "AdamW", tensors(2000, 1024), goal="host 0.3 ms, 3 launches"), FUSED),
        (Case("quantize 1B", "AdamW", one, kind="quantize", goal="90 % of copy"), ("bitsandbytes",)),
        (Case("dequantize 1B", "AdamW", one, kind="dequantize", goal="90 % of copy"), ("bitsandbytes",)),
    ]
    return [(dataclasses.replace(case, main=True), others) for case, others in table]


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


def architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def build() -> dict[str, Any]:
    setup = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return shell(setup, 120, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST=architecture())


def checks() -> Iterator[dict[str, Any]]:
    """The tests on the GPU, and the sanitizers, in turn."""
    program, tests = ROOT / "build" / "test_cuda", ["-q", "-n", "4", "--ignore=tests/test_demo.py", "tests"]
    program.parent.mkdir(exist_ok=True)
    # With the timed part, the limits come to less than ten minutes.
    yield shell([sys.executable, "-m", "pytest", *tests], 150, GENOPT_TEST_DEVICE="cuda")
    yield shell(["bash", "tests/cpp/build_cuda.sh", str(program), architecture().replace(".", "")], 70)
    yield shell([str(program)], 30)
    for tool in SANITIZERS:
        yield shell(["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", str(program), "few"], 35)


class Report:
    """The JSON: written anew whenever something is added, so that a run that is cut short has told what it knew."""

    def __init__(self, path: Path | None, device: str, commit: str, start: float, built: list[dict[str, Any]]) -> None:
        self.path, self.start = path, start
        self.data: dict[str, Any] = {"machine_info": method.machine(device), "checks": built, "benchmarks": []}
        self.data |= {"absent": {}, "failed": {}}
        self.data["machine_info"]["command"] = "gpu-check"
        if commit:
            self.data["machine_info"] |= {"commit": commit, "changed": False}

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def write(self) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.data, indent=1))

    def add(self, result: dict[str, Any]) -> None:
        """A run of ``bench.session``."""
        self.data["benchmarks"] += result["benchmarks"]
        self.data["absent"] |= result["absent"]
        self.data["failed"] |= result["failed"]
        self.data["machine_info"]["load at the end"] = result["machine_info"]["load at the end"]
        self.write()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the JSON (default: bench/results/<device>/<date>-<commit>.json)")
    parser.add_argument("--commit", default="", help="what is measured, where there is no git")
    parser.add_argument("--only-times", action="store_true", help="neither build nor test: time what is built")
    parser.add_argument("--dry-run", action="store_true", help="a small run on the CPU that writes nothing")
    arguments = parser.parse_args()
    dry = arguments.dry_run
    if not dry and not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device; run it where one is, or try --dry-run")
        return 1
    device, scale, seconds = ("cpu", 1e-4, 0.02) if dry else ("cuda", 1.0, 4.0)
    tests = not (dry or arguments.only_times)
    start = time.perf_counter()
    built = [build()] if tests else []
    # Now that it is there: whoever imports the package earlier has what was built before, or the reference.
    from bench import session

    told = Report(None, device, arguments.commit, start, built)
    if not dry:
        info = told.data["machine_info"]
        name = f"{info['date'][:10]}-{info['commit']}.json"
        told.path = arguments.out or method.RESULTS / method.device_folder(device) / name
        if tests:
            for each in checks():
                told.data["checks"].append(each)
                told.write()
    for case, others in cases(scale):
        if told.seconds() > 60 * MINUTES - 30:
            told.data["failed"][case.name] = f"no time left of {MINUTES} minutes"
            continue
        print(f"+ {case.name}", flush=True)
        few = dataclasses.replace(case, warm=True) if dry else case
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "case.json"
            settings = session.Settings(seconds, scale, device, subjects=(method.OURS, *others))
            failed = session.run([few], settings, path, lambda case, share: None)
            if path.exists() and path.stat().st_size:
                told.add(json.loads(path.read_text()))
            told.data["failed"] |= failed
    told.write()
    report.show(told.data, Console(width=240))
    for each in told.data["checks"]:
        print(f"{'passed' if each['status'] == 0 else 'FAILED'} in {each['seconds']:.0f} s: {each['command']}")
    return int(bool(told.data["failed"]) or any(each["status"] for each in told.data["checks"]))


if __name__ == "__main__":
    sys.exit(main())
