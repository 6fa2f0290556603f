"""Parameters spread over processes: worlds of gloo in which every process steps as one process would, or refuses."""

from __future__ import annotations

import pytest
import torch
from cases import NATIVE

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
    pytest.mark.skipif(NATIVE != "cpu", reason="gloo works on a CPU, and what is decided is no device's own"),
]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("fsdp1", 2),
        *(("dtensors", size) for size in (2, 4)),
        *(("clips", size) for size in (2, 4)),
        ("scalers", 4),
        ("zero1", 2),
        *(("sends", size) for size in (1, 2, 3, 4)),
        ("ddp", 2),
        ("in_backward", 2),
        ("tensor_parallel", 2),
        ("no_leaks", 2),
        ("estimates", 4),
        *(("factors", size) for size in (2, 4)),
        *(("same_bits", size) for size in (1, 2, 3, 4)),
        *(("parts_change", size) for size in (1, 2, 3)),
        *(("muon", size) for size in (1, 2, 3, 4)),
    ],
)
def test_world(name, size, succeeds):
    """What each process looks at is in sharded.py."""
    succeeds(f"import sharded; sharded.world({size}, {name!r})")


def test_resharded(tmp_path, succeeds):
    """A checkpoint of torch.distributed.checkpoint goes on in a world of another size, to the bit."""
    succeeds(f"import sharded; sharded.resharded({str(tmp_path)!r})")


def test_tables_of_larger_worlds_are_those_of_the_model():
    from bench.experiments import scale
    from bench.readme import between

    assert between(scale.PAGE.read_text(), scale.BEGIN).strip() == scale.tables().strip()
