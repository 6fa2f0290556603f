"""What ``gpu_check.py`` asks of a machine first, in a process of its own: its GPU, and which packages it lacks."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from typing import Any

import torch

from .packages import installed

# Packages, and what can not be done without each.
NEEDED = {
    "setuptools": "the build",
    "ninja": "the build",
    "pytest": "tests and times",
    "pytest-benchmark": "times",
    "pytest-xdist": "tests in several processes",
    "pytest-timeout": "ending tests that hang",
    "expecttest": "tests that take torch's own cases: test_api.py, test_errors.py",
    "hypothesis": "the files of all tests that draw their cases",
    "bitsandbytes": "its times",
    "torchao": "its times",
    "flashoptim": "its times",
    "torch-optimi": "its times",
}
TOOLS = ("nvcc", "ncu", "compute-sanitizer")


def facts(device: str) -> dict[str, Any]:
    """``architecture``, such as "9.0", and ``memory`` in bytes; "" and 0 without a GPU."""
    versions = installed(NEEDED)
    known: dict[str, Any] = {"versions": {"python": platform.python_version(), "torch": torch.__version__, **versions}}
    known["missing"] = {name: what for name, what in NEEDED.items() if name not in versions}
    known |= {"tools": [name for name in TOOLS if shutil.which(name)], "architecture": "", "memory": 0}
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        known |= {"device": torch.cuda.get_device_name(), "architecture": f"{major}.{minor}"}
        known["memory"] = torch.cuda.get_device_properties(0).total_memory
    return known


if __name__ == "__main__":
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"])
    print(json.dumps(facts(sys.argv[1])))
