"""``python -m genopt_ext.env``: versions, what was built, and which backend serves which device and why.

Made to be pasted into a bug report.
"""

from __future__ import annotations

import os
import platform
import sys

import torch

from . import __version__, _backend

VARIABLES = ("GENOPT_BACKEND", "GENOPT_CPU_CAPABILITY", "GENOPT_CPU_TUNING", "OMP_NUM_THREADS")


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = (line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
            return next(names, platform.machine())
    except OSError:
        return platform.machine()


def _cpu_backend() -> str:
    if _backend.native is None:
        return f"reference, as {_backend.why_not_native}"
    try:
        used, tuning = _backend.native.cpu_capability(), _backend.native.cpu_tuning()
    except RuntimeError as error:
        return f"none: {error}"
    available = ", ".join(_backend.native.cpu_capabilities())
    why = "set by GENOPT_CPU_CAPABILITY" if os.environ.get("GENOPT_CPU_CAPABILITY") else "the best this processor has"
    chosen = "set by GENOPT_CPU_TUNING" if os.environ.get("GENOPT_CPU_TUNING") else "for this processor"
    return (
        f"native kernels, {used} ({why}; available: {available}), {tuning} ({chosen}), "
        f"{torch.get_num_threads()} threads"
    )


def _cuda_backend() -> str:
    info = _backend.build_info
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    seen = f"devices: {', '.join(devices) or 'none'}"
    if _backend.native is None or info is None:
        return f"reference, as {_backend.why_not_native}; {seen}"
    if not _backend.native.has_cuda:
        return f"reference, as {info.CUDA_REASON}; {seen}"
    return f"native kernels for {info.CUDA_ARCHITECTURES} ({info.CUDA_REASON}); {seen}"


def _auto() -> str:
    try:
        return _backend.resolve("auto")
    except (RuntimeError, ValueError) as error:
        return f"none: {error}"


def report() -> dict[str, str]:
    """What ``python -m genopt_ext.env`` prints, a line per entry."""
    info = _backend.build_info
    lines = {
        "genopt_ext": f"{__version__} in {os.path.dirname(__file__)}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'not built'}",
        "python": f"{sys.version.split()[0]} on {platform.platform()}",
        "processor": _cpu_model(),
        "built with": f"torch {info.TORCH}, {info.COMPILER}" if info else f"nothing: {_backend.why_not_native}",
        "backend 'auto'": _auto(),
        "cpu": _cpu_backend(),
        "cuda": _cuda_backend(),
    }
    return {**lines, **{name: os.environ[name] for name in VARIABLES if name in os.environ}}


if __name__ == "__main__":
    for name, value in report().items():
        print(f"{name:14}: {value}")
