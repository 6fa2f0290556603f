"""Where pytest-benchmark meets the cases: run by `python -m bench run`, whose plugin names them (see session.py)."""

from __future__ import annotations

from typing import Any


def test_case(benchmark: Any, session: Any, case: Any, subject: str) -> None:
    session.time(benchmark, case, subject)
