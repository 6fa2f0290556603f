"""The experiments with 8-bit state run from their command lines, on a few steps; see bench/experiments."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn's digits are what the models learn")
mappings = pytest.importorskip("bench.experiments.mappings", reason="run from the repository's root")
quality = pytest.importorskip("bench.experiments.quality")
from bench import readme  # noqa: E402
from bench.experiments import maps, quality_report  # noqa: E402

pytestmark = pytest.mark.skipif("GENOPT_TEST_DEVICE" in os.environ, reason="the experiments run on a CPU")


def test_quality_runs(tmp_path: Path) -> None:
    own = [name for name in quality.SUBJECTS if name.startswith(("genopt_ext", "torch "))]
    files = ["--json", str(tmp_path / "q.json"), "--plot", str(tmp_path / "q.png")]
    results = quality.main(["--steps", "4", "--seeds", "2", "--optimizers", "AdamW", "--subjects", *own, *files])
    saved = json.loads((tmp_path / "q.json").read_text())["results"]
    assert len(saved) == len(results) == 3 * len(own) and (tmp_path / "q.png").stat().st_size > 0
    for case in quality_report.cases(results).values():
        base = case[quality_report.BASE]
        assert base.narrow == 0 and base.bytes == pytest.approx(8, abs=0.1)
        for r in case.values():
            if not r.absent:
                assert len(r.finals) == 2 and max(map(abs, r.change(base))) < 1, r


def test_table_goes_between_the_markers(tmp_path: Path) -> None:
    result = quality_report.Result("GPT", "AdamW", quality_report.BASE, finals=[2.0, 3.0])
    page = tmp_path / "README.md"
    page.write_text(f"before\n{quality_report.BEGIN}\nold\n{readme.END}\nafter\n")
    readme.write_between(page, quality_report.BEGIN, quality_report.markdown([result], seeds=2))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| GPT | AdamW | genopt_ext fp32 | 2.5000 |" in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="README.md has no lines"):
        readme.write_between(page, quality_report.BEGIN, "")


def test_the_page_has_the_markers() -> None:
    text = (Path(__file__).parent.parent / "docs" / "quality.md").read_text()
    assert readme.between(text, quality_report.BEGIN)


def test_mappings_run(tmp_path: Path) -> None:
    few = ["--tasks", "VAE", "--steps", "3", "--blocks", "4", "--train", "--train-steps", "2", "--seeds", "1"]
    results = mappings.main([*few, "--results", str(tmp_path)])
    assert set(results["trained"]) == {"VAE AdamW", "VAE RMSprop"}
    assert {path.name for path in tmp_path.iterdir()} == {"mappings.json", "mappings.png"}


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("name", ["power 2", "dynamic", "bits 3", "bits 4,3", "bits 4,2"])
def test_maps_are_exact_on_their_values_and_unbiased_between(name: str, signed: bool) -> None:
    mapping = (maps.SIGNED if signed else maps.UNSIGNED)[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 256, generator=generator)
    x = x if signed else x.square()
    kept = mapping(x, None)
    torch.testing.assert_close(mapping(kept, None), kept, rtol=1e-6, atol=0)
    rounding = maps.Rounding("sequence", tuple(x.shape), 0)
    mean = torch.stack([mapping(x, rounding(step)) for step in range(512)]).mean(0)
    large = x.abs() > x.abs().amax(1, keepdim=True) / 100  # where no map is at its end
    torch.testing.assert_close(mean[large], x[large], rtol=4e-3, atol=0)
    if not signed:
        assert (mapping(x * 1e-30, None) > 0).all()
