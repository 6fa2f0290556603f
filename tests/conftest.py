"""Where the tests run.

``GENOPT_TEST_DEVICE=cuda`` puts every tensor on the GPU. ``GENOPT_TEST_CUDA_ON_CPU=path/_C.so`` takes the
extension that CMake builds with ``GENOPT_PYTHON=ON``: its CUDA kernels run on a CPU, and serve CPU tensors.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch

# Before anything imports genopt_ext.
if path := os.environ.get("GENOPT_TEST_CUDA_ON_CPU"):
    spec = importlib.util.spec_from_file_location("genopt_ext._C", path)
    assert spec is not None and spec.loader is not None
    sys.modules["genopt_ext._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["genopt_ext._C"])

if device := os.environ.get("GENOPT_TEST_DEVICE"):
    torch.set_default_device(device)


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """For tests that hold for kernels and reference alike."""
    return str(request.param)
