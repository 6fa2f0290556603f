"""Parameters spread over processes: worlds of gloo in which every process steps as one process would, or refuses."""

from __future__ import annotations

import pytest
import torch
from cases import NATIVE

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
    pytest.mark.skipif(NATIVE != "cpu", reason="gloo works on a CPU, and what is decided is no device's own"),
]


@pytest.mark.parametrize(("name", "size"), [("fsdp1", 2), ("dtensors", 2), ("dtensors", 4), ("scalers", 4)])
def test_world(name, size, succeeds):
    """What each process looks at is in sharded.py."""
    succeeds(f"import sharded; sharded.world({size}, {name!r})")
