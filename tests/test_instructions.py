"""The check of instruction counts, on counts that are given: see bench/instructions.py."""

from __future__ import annotations

from pathlib import Path

import pytest

instructions = pytest.importorskip("bench.instructions", reason="run from the repository's root")

OUTPUT = "compiler\t12.2.0\ncapability\tavx2\ncase\tAdamW 2x64\t128\n"
DUMP = "version: 1\n\ndesc: Trigger: Client Request: AdamW 2x64@{}\n\nevents: Ir\nsummary: {}\n\nfn=(1) main\n1 5\n"


def counted(first: int = 1100, third: int = 3100) -> dict[str, instructions.Counts]:
    ending = "desc: Trigger: Program termination\nsummary: 7\n"
    return {"kernels": instructions.parse(OUTPUT, [DUMP.format(3, third), DUMP.format(1, first), ending])}


def test_parse_takes_the_difference() -> None:
    counts = counted()["kernels"]
    assert counts.instructions == {"AdamW 2x64": 1000} and counts.elements == {"AdamW 2x64": 128}
    assert counts.made_with == {"compiler": "12.2.0", "capability": "avx2"}


def test_more_instructions_fail_and_fewer_are_told(tmp_path: Path) -> None:
    instructions.save(counted(), tmp_path / "record.json")
    recorded = instructions.load(tmp_path / "record.json")
    assert instructions.compare(recorded, counted()) == ([], [])
    assert instructions.compare(recorded, counted(third=3100 + 18)) == ([], [])
    wrong, notes = instructions.compare(recorded, counted(third=3100 + 22))
    assert len(wrong) == 1 and not notes
    assert wrong[0].startswith("AdamW 2x64: 1,000 instructions") and instructions.UPDATE in wrong[0]
    wrong, notes = instructions.compare(recorded, counted(third=3100 - 22))
    assert not wrong and len(notes) == 1


def test_cases_that_come_and_go_fail() -> None:
    recorded = counted()
    recorded["kernels"].instructions["gone"] = 5
    del recorded["kernels"].instructions["AdamW 2x64"]
    wrong, _ = instructions.compare(recorded, counted())
    assert [sentence.split(";")[0] for sentence in wrong] == ["AdamW 2x64: only counted", "gone: only recorded"]
    wrong, _ = instructions.compare({}, counted())
    assert len(wrong) == 1 and "nothing is recorded" in wrong[0]


def test_another_compiler_is_not_compared() -> None:
    recorded = counted()
    recorded["kernels"].made_with["compiler"] = "13.1.0"
    wrong, notes = instructions.compare(recorded, counted(third=9000))
    assert not wrong and notes == ["kernels: not compared: compiler is 12.2.0, recorded with 13.1.0"]


def test_what_is_recorded_has_every_part() -> None:
    recorded = instructions.load(instructions.RECORD)
    assert recorded.keys() == instructions.TOLERANCES.keys()
    for part in recorded.values():
        assert part.made_with["compiler"] and all(count > 0 for count in part.instructions.values())
