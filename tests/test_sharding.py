"""Parameters spread over processes: worlds of gloo in which every process steps as one process would, or refuses."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from cases import EMULATED, NATIVE

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
# gloo works on a CPU, and what is decided is no device's own. What CUDA's kernels measure, their stand-in does too.
on_cpu = pytest.mark.skipif(NATIVE != "cpu", reason="for CPU kernels")
ON_STAND_IN = [("dtensors", 2), ("clips", 2), ("scalers", 4), ("muon", 2)]


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
        ("fsdp_over_tp", 4),
        ("widened", 2),
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
    if NATIVE != "cpu" and not (EMULATED and (name, size) in ON_STAND_IN):
        pytest.skip("for CPU kernels")
    if name == "sends" and not find_spec("bench"):
        pytest.skip("needs the bench, which is not installed")
    succeeds(f"import conftest, sharded; sharded.world({size}, {name!r})")  # conftest loads the stand-in


@on_cpu
def test_resharded(tmp_path, succeeds):
    """A checkpoint of torch.distributed.checkpoint goes on in a world of another size, to the bit."""
    succeeds(f"import sharded; sharded.resharded({str(tmp_path)!r})")


@on_cpu
def test_tables_of_larger_worlds_are_those_of_the_model():
    scale = pytest.importorskip("bench.experiments.scale")
    from bench.readme import between

    assert between(scale.PAGE.read_text(), scale.BEGIN).strip() == scale.tables().strip()
