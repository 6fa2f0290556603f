"""One case of ``gpu_check.py`` in a process of its own: a GPU's memory fault ends with the process that met it.

Refuses where the kernels to be timed are not built: the plain-torch reference would be timed under our name.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
import torch._dynamo  # what every optimizer's constructor imports

from genopt_ext import _backend

from . import rounds, session
from .cases import Case
from .gpu_cases import cases
from .gpu_steps import NOT_BUILT
from .method import OURS


def refusal(device: str) -> str:
    """Why nothing of ours can be timed there; empty where it can."""
    if _backend.native is None:
        return _backend.why_not_native
    if device != "cuda":
        return ""
    if not _backend.native.has_cuda:
        return f"the CUDA kernels are not built: {getattr(_backend.build_info, 'CUDA_REASON', '')}"
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def profile(case: Case, device: str) -> None:
    """A few steps, for a profiler."""
    made = rounds.make(OURS, case, device)
    assert made is not None
    for _ in range(3):
        made.run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case")
    parser.add_argument("others", nargs="*", help="whom to compare with")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--memory", type=float, default=0.0, help="the GPU's bytes")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--wait", action="store_true", help="import all, then wait for a line before anything else")
    parser.add_argument("--profile", action="store_true", help="take a few steps and time nothing")
    arguments = parser.parse_args()
    if arguments.wait and not sys.stdin.readline():
        return 0  # nobody waits for this case any more
    device = arguments.device
    why = refusal(device)
    if why:
        print(f"not timed: {why}")
        return NOT_BUILT
    case = next(case for case, _ in cases(arguments.scale, arguments.memory) if case.name == arguments.case)
    if arguments.profile:
        profile(case, device)
        return 0
    if device == "cpu":  # a rehearsal
        case = dataclasses.replace(case, warm=True)
    settings = session.Settings(
        arguments.seconds, arguments.scale, device, "gpu-check", (OURS, *arguments.others), strict=False
    )
    failed = session.run([case], settings, arguments.json, lambda case, share: None)
    for why in failed.values():
        print(why)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
