"""Each optimizer's page says what its class is: formula, defaults, state and bytes; so does the table of all."""

from __future__ import annotations

import ast
import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import in_training

from genopt_ext import optim
from genopt_ext.optim.options import StepOptions

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "optimizers"
INDEX = PAGES / "README.md"
COMMON = {"params", "foreach", "fused", "capturable", "differentiable", "maximize", "backend"}
COMMON |= StepOptions.__annotations__.keys()
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="the tests were copied without it")


def page_of(name: str) -> Path:
    return PAGES / f"{getattr(optim, name).rule.name}.md"


def classes_of(page: Path) -> list[str]:
    return [name for name in optim.OURS if page_of(name) == page]


def table(text: str, first: str) -> list[dict[str, str]]:
    """The rows of the table whose first column is called so; what is in backticks without them."""
    lines = iter(text.splitlines())
    header = next((line for line in lines if line.startswith(f"| {first} |")), "")
    next(lines, "")
    rows = [header]
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(line)
    names, *cells = ([cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in rows)
    return [dict(zip(names, row, strict=True)) for row in cells]


def options(text: str) -> dict[str, Any]:
    """``a=1, b=2`` as a dict."""
    call = ast.parse(f"f({text})", mode="eval").body
    assert isinstance(call, ast.Call)
    return {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}


def literal(text: str) -> Any:
    return math.inf if text == "inf" else ast.literal_eval(text)


def stepped(name: str, dtype: torch.dtype, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state of a parameter after two steps."""
    p = torch.nn.Parameter(torch.ones(64, 256))
    opt = in_training(getattr(optim, name)([p], state_dtype=dtype, **given))
    for _ in range(2):
        p.grad = torch.ones_like(p)
        opt.step()
    return dict(opt.state[p])


def size_of(name: str, dtype: torch.dtype, given: dict[str, Any]) -> str:
    """Bytes of an element; a dash where the class refuses to store its state so."""
    if getattr(optim, name).rule.precise and dtype != torch.float32:
        with pytest.raises(ValueError, match="Invalid state_dtype"):
            stepped(name, dtype, given)
        return "—"
    return bytes_of(stepped(name, dtype, given))


def bytes_of(state: dict[str, torch.Tensor]) -> str:
    """Of an element, without ``step``."""
    return f"{sum(t.nbytes for name, t in state.items() if name != 'step') / (64 * 256):.3g}"


def formula(text: str) -> list[str]:
    """The assignments, without what is said beside them."""
    lines = [line.removeprefix("//").strip() for line in text.splitlines() if "<-" in line]
    return [re.sub(r" {3,}.*", "", line) for line in lines]


def wrong(text: str, names: list[str]) -> list[str]:
    """What the page of these classes says that is not so."""
    found = []
    defaults = {row["option"]: row for row in table(text, "option")}
    for name in names:
        cls = getattr(optim, name)
        own = {k: v.default for k, v in inspect.signature(cls).parameters.items() if k not in COMMON}
        said = {option: row[name] for option, row in defaults.items() if row.get(name)}
        if (read := {option: literal(value) for option, value in said.items()}) != own:
            found.append(f"defaults of {name}: the page has {read}, the constructor {own}")
        states = set()
        for row in table(text, "options"):
            given, said_states = options(row["options"]), [each for each in row["state"].split(", ") if each]
            if (names_of := list(stepped(name, torch.float32, given))) != said_states:
                found.append(f"state of {name} with {given}: the page has {said_states}, a step makes {names_of}")
            states |= set(said_states)
            for column, dtype in STORED.items():
                if (size := size_of(name, dtype, given)) != row[column]:
                    found.append(f"{column} bytes of {name} with {given}: the page has {row[column]}, a step {size}")
        states |= {each for each in cls.rule.states if cls.rule.factors and f"`{each}`" in text}
        if unsaid := set(cls.rule.states) - states:
            found.append(f"states of {name} that the page does not have: {unsaid}")
        wanted = [f"`{name}8bit`"] if f"{name}8bit" in optim.EIGHT_BIT else []
        wanted += [f"`torch.optim.{name}`"] if name in optim.TORCHS else []
        found += [f"the page of {name} does not say {each}" for each in wanted if each not in text]
        header = ROOT / "csrc" / "rules" / f"{cls.rule.name}.h"
        if header.exists() and formula(text) != formula(header.read_text().split("#pragma once")[0]):
            found.append(f"the formula of {name} is not that of {header.relative_to(ROOT)}")
    return found


def unpaged(names: tuple[str, ...] = optim.OURS) -> list[str]:
    return [f"{name} has no page: {page_of(name).relative_to(ROOT)}" for name in names if not page_of(name).exists()]


def test_every_class_has_a_page() -> None:
    assert not unpaged()


def test_every_page_has_a_class() -> None:
    assert not [page.name for page in PAGES.glob("*.md") if page != INDEX and not classes_of(page)]


@pytest.mark.parametrize("page", sorted({page_of(name) for name in optim.OURS}), ids=lambda page: page.stem)
def test_page_is_true(page: Path) -> None:
    if page.exists():  # else test_every_class_has_a_page names it
        found = wrong(page.read_text(), classes_of(page))
        assert not found, "\n".join(found)


def test_table_of_all_is_true() -> None:
    rows = {re.sub(r"\[(.*)\]\((.*)\)", r"\1", row["class"]): row for row in table(INDEX.read_text(), "class")}
    assert sorted(rows) == sorted(optim.OURS)
    for name, row in rows.items():
        assert f"]({page_of(name).name})" in row["class"], name
        state = stepped(name, torch.float32, {})
        expected = (", ".join(state), bytes_of(state), size_of(name, torch.int8, {}))
        assert (row["state"], row["fp32"], row["int8"]) == expected, name


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("| 1e-3 | 1e-3 |", "| 1e-3 | 2e-3 |", "defaults of AdamW"),
        ("| `eps` | 1e-8 | 1e-8 |\n", "", "defaults of Adam:"),
        ("| `step`, `exp_avg`, `exp_avg_sq` |", "| `exp_avg`, `exp_avg_sq` |", "state of Adam "),
        ("| 8 | 4 | 2.03 |", "| 8 | 4 | 2 |", "int8 bytes of Adam "),
        ("| `amsgrad=True` |", "| `amsgrad=False` |", "state of Adam "),
        ("lerp(m, g, 1 - beta1)", "lerp(m, g, beta1)", "formula of Adam "),
        ("`AdamW8bit`", "`AdamW`", "AdamW8bit"),
        ("`torch.optim.AdamW`", "torch's", "torch.optim.AdamW"),
    ],
)
def test_what_is_wrong_is_found(old: str, new: str, says: str) -> None:
    text = page_of("Adam").read_text()
    assert old in text
    assert any(says in each for each in wrong(text.replace(old, new), ["Adam", "AdamW"]))


def test_a_missing_page_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(f"{__name__}.PAGES", tmp_path)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert unpaged(("Lion",)) == ["Lion has no page: lion.md"]
