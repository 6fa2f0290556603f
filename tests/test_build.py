"""What setup.py leaves behind: see "release build" in CONTRIBUTING.md."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_C = pytest.importorskip("genopt_ext._C", reason="the extension is not built")
from genopt_ext import _build_info  # noqa: E402

LARGEST = 8 << 20  # bytes; debug symbols are 30 MB


@pytest.mark.skipif("GENOPT_TEST_CUDA_ON_CPU" in os.environ, reason="CMake's build has what CMake was asked for")
@pytest.mark.skipif(_build_info.CUDA, reason="CUDA kernels for several architectures are larger than all the rest")
@pytest.mark.skipif(getattr(_build_info, "DEBUG", False), reason="built with GENOPT_DEBUG=1")
def test_a_release_build_has_no_debug_symbols() -> None:
    built = Path(_C.__file__).read_bytes()
    assert len(built) < LARGEST and b".debug_info" not in built, f"{_C.__file__}: {len(built):,} bytes; build it again"
