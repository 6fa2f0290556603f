"""The optimizers converge, and bench/experiments/zoo.py says how fast."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from genopt_ext import optim

zoo = pytest.importorskip("bench.experiments.zoo", reason="run from the repository's root")
from bench import readme  # noqa: E402
from bench.experiments import zoo_report  # noqa: E402

pytestmark = pytest.mark.skipif("GENOPT_TEST_DEVICE" in os.environ, reason="the experiments run on a CPU")
FP64, FP32 = zoo_report.ROSENBROCK


def test_every_class_has_learning_rates() -> None:
    assert not [f"{name}: add it to MIDDLE in bench/experiments/zoo.py" for name in zoo.NAMES if name not in zoo.MIDDLE]
    assert {*optim.OURS} <= {*zoo.NAMES}
    assert not [f"{name} is no class of ours" for name in {**zoo.MIDDLE, **zoo.OPTIONS} if name not in zoo.NAMES]
    with pytest.raises(LookupError, match="NAdam2 has no learning rates"):
        zoo.middle(FP64, "NAdam2")


def test_learning_rates_are_1_and_3_of_each_power_of_10() -> None:
    assert zoo.grid(0.01) == [1e-3, 3e-3, 1e-2, 3e-2, 0.1] and zoo.grid(3.0, 1) == [1.0, 3.0, 10.0]


@pytest.mark.parametrize("name", [name for name, (lr, _) in zoo.MIDDLE.items() if lr is not None])
def test_converges_on_rosenbrock(name: str) -> None:
    """From a distance of 2.2, and as torch's class does."""
    lr = zoo.middle(FP64, name)
    distance = zoo.rosenbrock(zoo.maker(zoo.OURS, name, FP64), lr, torch.float64, 1500)
    assert distance < 0.5, f"{name} ends {distance} from the minimum, with a learning rate of {lr}"
    makes = [zoo.maker(package, name, FP64) for package in zoo.packages(name)]
    ours, *theirs = [zoo.rosenbrock(make, lr / 10, torch.float64, 50) for make in makes]
    assert theirs == [pytest.approx(ours, rel=1e-9)] * len(theirs), f"{name}: torch's and ours"


def test_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "zoo.json"
    few = ["--tasks", FP64, FP32, "--only", "Adam", "Lion", "--steps", "20", "--json", str(path)]
    rows = zoo.main(few)
    assert [(each.task, each.optimizer) for each in rows] == [(t, n) for t in (FP64, FP32) for n in ("Adam", "Lion")]
    saved = json.loads(path.read_text())
    assert saved["machine_info"]["command"].startswith("python -m bench.experiments.zoo --tasks")
    assert {"device", "date", "commit", "versions"} <= saved["machine_info"].keys()
    runs = saved["runs"]
    assert len(runs) == 2 * (5 + 5 + 1)  # learning rates of each, and torch's Adam with the best
    assert {run["torch"] for run in runs} == {torch.__version__}
    text = zoo_report.markdown(rows, saved["machine_info"])
    for each in rows:
        best = min(
            (r for r in runs if (r["task"], r["optimizer"]) == (each.task, each.optimizer)), key=lambda r: r["value"]
        )
        assert each.lr == best["lr"] and f"| {each.optimizer} | {each.lr:g}" in text
    assert f"{rows[0].values[zoo.OURS][0]:.1e}" in text and f"commit {saved['machine_info']['commit']}" in text

    # What is recorded is not run again; what is not is.
    monkeypatch.setattr(zoo, "train", lambda run: pytest.fail(f"ran {run}"))
    assert zoo.main(few) == rows and json.loads(path.read_text())["runs"] == runs
    with pytest.raises(pytest.fail.Exception, match="steps=21"):
        zoo.main([*few, "--steps", "21"])


def test_report_says_seeds_edges_differences_and_what_is_missing() -> None:
    def record(package: str, lr: float, seed: int, value: float | None) -> zoo_report.Record:
        return zoo_report.Record("GPT", "Adam", package, lr, seed, 5, value, 1.0, "abc", "2026-01-01", "2.13", "a")

    ours = [record(zoo.OURS, 0.1, seed, value) for seed, value in enumerate((2.0, 2.2, 2.4))]
    tried = [*ours, record(zoo.OURS, 0.3, 0, 1.9999), record(zoo.OURS, 1.0, 0, None)]
    edge = zoo_report.row("GPT", "Adam", 5, ours)
    assert edge.at_edge and zoo_report.cells(edge)[1:3] == ("0.1 (edge)", "2.2000 ± 0.2000")
    best = zoo_report.row("GPT", "Adam", 5, [*tried, record("torch", 0.3, 0, 2.0)])
    assert (best.lr, best.at_edge) == (0.3, False) and best.difference == pytest.approx(5e-5)
    absent = zoo_report.row("GPT", "Lion", 5, tried)
    text = zoo_report.markdown([absent, best], {"device": "a", "date": "b", "commit": "c", "versions": {"torch": "d"}})
    assert "| Adam | 0.3 | 1.9999 | 2.0000 | 0.005 % |" in text.splitlines()
    assert text.index("| Adam") < text.index("| Lion") and "Not run: Lion on GPT." in text
    assert "no seed's loss is further than 0.005 % from torch's." in text
    other = zoo_report.Row("GPT", "SGD", 0.1, values={zoo.OURS: {0: 2.2}, "torch": {0: 2.0}})
    text = zoo_report.markdown([other, best], {"device": "a", "date": "b", "commit": "c", "versions": {"torch": "d"}})
    assert "no seed's loss is further than 0.005 % from torch's, but SGD by 10 %." in text


def test_the_page_has_a_row_of_each_class_and_task() -> None:
    text = (Path(__file__).parent.parent / "docs" / "optimizers" / "README.md").read_text()
    gpt, rosenbrock = readme.between(text, zoo_report.BEGIN).split("distance in fp64")
    for name, (of_rosenbrock, of_gpt) in zoo.MIDDLE.items():
        assert of_gpt is None or f"| {name} |" in gpt, name
        assert of_rosenbrock is None or f"| {name} |" in rosenbrock, name
    with pytest.raises(SystemExit):
        zoo.main(["--docs", "--only", "Adam"])
