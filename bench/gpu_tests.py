"""A plugin of pytest for ``gpu_check.py``: a GPU's memory fault costs one worker and no test that comes later.

After an illegal access every call of CUDA in that process fails. A worker of pytest-xdist that has met one ends, and
another one takes its place.
"""

from __future__ import annotations

import os
import sys

import pytest

_failed = False


def broken() -> bool:
    """Whether this process can use its GPU no more."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _failed
    _failed = _failed or report.failed


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    global _failed
    if _failed and "PYTEST_XDIST_WORKER" in os.environ and broken():
        print(f"{nodeid} has broken its process's GPU; the worker ends", file=sys.__stderr__, flush=True)
        os._exit(70)
    _failed = False
