"""Which backend serves whom: loads the native extension, or says in one sentence why it can not."""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType

import torch

BACKENDS = ("auto", "cpu", "cuda", "reference")
DEVICES = {"cpu", "cuda"}  # device types that have kernels
INSTALL = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _load() -> tuple[ModuleType | None, ModuleType | None, str]:
    """(the extension, its build info, why there is none)."""
    mend = f"run `{INSTALL}` in the source tree of genopt_ext"
    try:
        info = importlib.import_module("genopt_ext._build_info")
    except ImportError:
        return None, None, f"the native extension is not built; {mend}"
    # Checked before the extension is loaded: with another torch it might crash instead of failing.
    if _minor(info.TORCH) != _minor(torch.__version__):
        reason = (
            f"the native extension was built with torch {info.TORCH} and runs with torch {torch.__version__}; {mend}"
        )
        return None, info, reason
    try:
        return importlib.import_module("genopt_ext._C"), info, ""
    except ImportError as error:
        return None, info, f"the native extension can not be loaded ({error}); {mend}"


native, build_info, why_not_native = _load()
if build_info is not None and native is None:
    warnings.warn(f"genopt_ext: {why_not_native}", stacklevel=2)

_told: set[str] = set()


def warn_once(message: str) -> None:
    """Warns the first time that it is called with ``message`` in this process."""
    if message not in _told:
        _told.add(message)
        warnings.warn(f"genopt_ext: {message}", stacklevel=5)


def resolve(backend: str) -> str:
    """What ``backend`` comes to in this process: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"reference"``.

    ``"auto"`` here means native kernels where there are some for a parameter, and the reference elsewhere.

    Raises:
        ValueError: not the name of a backend.
        RuntimeError: a backend that this build does not have, or a wrong ``GENOPT_CPU_CAPABILITY`` or
            ``GENOPT_CPU_TUNING``.
    """
    asked = "backend"
    if backend == "auto" and os.environ.get("GENOPT_BACKEND"):
        asked, backend = "GENOPT_BACKEND", os.environ["GENOPT_BACKEND"]
    if backend not in BACKENDS:
        raise ValueError(f"{asked} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return backend
    if native is None:
        if backend != "auto":
            raise RuntimeError(f"{asked} is {backend!r}, but {why_not_native}")
        warn_once(f"{why_not_native}; until then the slower plain-torch reference is used")
        return "reference"
    if backend == "cuda" and not native.has_cuda:
        assert build_info is not None
        raise RuntimeError(f"{asked} is 'cuda', but the CUDA kernels are not built: {build_info.CUDA_REASON}")
    native.cpu_capability()  # raises where the environment names one that this machine lacks
    return backend
