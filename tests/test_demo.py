"""The examples in small: the demo trains, torch's optimizer and ours give the same curve, and a seed repeats."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")


def test_demo_in_small(tmp_path):
    path = Path(__file__).parent.parent / "examples" / "train_gpt.py"
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    demo = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(demo)
    small = "--steps 30 --layers 1 --width 32 --context 16 --batch 8".split()
    plot = tmp_path / "demo.png"
    theirs, ours, narrow = demo.main([*small, "--plot", str(plot)])
    assert plot.stat().st_size > 10_000
    for result in (theirs, ours, narrow):
        assert result.losses[-1] < result.losses[0] - 0.5
    # Rounding differs in the last place of a step; 30 steps do not let that grow to what a plot shows.
    assert max(abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True)) < 1e-3
    assert theirs.state_bytes == ours.state_bytes > narrow.state_bytes
    assert abs(narrow.final_loss - ours.final_loss) < 0.05
    again = demo.main([*small, "--plot", str(plot)])[1]
    assert again.losses == ours.losses


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_fsdp_in_small(tmp_path):
    """One process that resumes where two were comes to their loss."""
    path = Path(__file__).parent.parent / "examples" / "train_fsdp.py"
    small = "--layers 1 --width 32 --context 16 --batch 8 --save-every 4".split()

    def run(processes):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        given = [str(path), *small, "--steps", "8", "--checkpoints", str(tmp_path)]
        done = subprocess.run([*launch, *given], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    whole = run(2)
    (tmp_path / "step-8" / ".metadata").unlink()  # as if it had been killed while it saved
    resumed = run(1)
    assert "resumes from" not in whole and f"resumes from {tmp_path / 'step-4'}" in resumed
    losses = [float(text.split("step 8: loss ")[1].split(",")[0]) for text in (resumed, whole)]
    assert abs(losses[0] - losses[1]) < 2e-3
