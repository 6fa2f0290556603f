"""What setup.py asks for, and leaves behind: see "release build" in CONTRIBUTING.md."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest
import setuptools

_C = pytest.importorskip("genopt_ext._C", reason="the extension is not built")
from genopt_ext import _build_info  # noqa: E402

SETUP = Path(__file__).parent.parent / "setup.py"
LARGEST = 8 << 20  # bytes; debug symbols are 30 MB


@pytest.mark.skipif("GENOPT_TEST_CUDA_ON_CPU" in os.environ, reason="CMake's build has what CMake was asked for")
@pytest.mark.skipif(_build_info.CUDA, reason="CUDA kernels for several architectures are larger than all the rest")
@pytest.mark.skipif(getattr(_build_info, "DEBUG", False), reason="built with GENOPT_DEBUG=1")
def test_a_release_build_has_no_debug_symbols() -> None:
    built = Path(_C.__file__).read_bytes()
    assert len(built) < LARGEST and b".debug_info" not in built, f"{_C.__file__}: {len(built):,} bytes; build it again"


@pytest.mark.skipif(not SETUP.exists(), reason="these tests stand apart from setup.py")
def test_architectures_of_cuda_kernels(monkeypatch) -> None:
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("FORCE_CUDA", "0")
    architectures = runpy.run_path(str(SETUP))["architectures"]
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert architectures((12, 1)) == "8.0;9.0+PTX" and architectures((13, 0)) == "8.0;9.0;10.0;12.0+PTX"
    for given in ("8.6", "9.0a 12.0+PTX", "Ampere;Hopper", "8.0,10.0"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
        assert architectures((12, 1)) == given
    for given, old in (("7.5;8.0", "7.5"), ("8.0 7.0+PTX", "7.0"), ("Volta", "Volta"), ("Kepler+Tesla", "Kepler")):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
        with pytest.raises(SystemExit, match=f"8.0 or newer, TORCH_CUDA_ARCH_LIST has {old}.*FORCE_CUDA=0"):
            architectures((12, 1))
