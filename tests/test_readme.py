"""The documentation holds: its Python runs as it stands there, and its links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

import genopt_ext
from genopt_ext import optim

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PROSE = sorted([*ROOT.glob("*.md"), *DOCS, ROOT / "csrc" / "README.md", *(ROOT / "bench").rglob("*.md")])
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.skipif(not README.exists(), reason="the tests were copied without it")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[str]:
    return [code for language, code in CODE.findall(page.read_text()) if language == "python"]


def names() -> dict[str, object]:
    """What the pages use without defining it."""
    torch.manual_seed(0)
    model, generator, discriminator = nn.Linear(4, 1), nn.Linear(4, 4), nn.Linear(4, 1)
    given = dict(torch=torch, nn=nn, genopt_ext=genopt_ext, optim=optim, softplus=softplus, evaluate=lambda model: None)
    given.update(model=model, generator=generator, discriminator=discriminator)
    given.update(opt=optim.SGD(model.parameters(), lr=0.1), batches=[torch.randn(8, 4) for _ in range(3)])
    return given


def run(page: Path) -> dict[str, object]:
    """Runs the page's blocks one after another, and returns what they leave."""
    given = names()
    for block in blocks(page):
        if 'device="cuda"' not in block or torch.cuda.is_available():
            exec(compile(block, name_of(page), "exec"), given)
    return given


@pytest.mark.parametrize("page", [page for page in [README, *DOCS] if page.exists() and blocks(page)], ids=name_of)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(page)


def test_recipes_train() -> None:
    clipping, gan = blocks(ROOT / "docs" / "recipes.md")
    for block, trained in ((clipping, ["model"]), (gan, ["generator", "discriminator"])):
        given = names()
        networks = {name: given[name] for name in ("model", "generator", "discriminator")}
        before = {name: network.weight.detach().clone() for name, network in networks.items()}
        exec(block, given)
        assert [name for name, old in before.items() if not torch.equal(networks[name].weight, old)] == trained
        assert "samples" not in given or given["samples"].shape == (16, 4)


def test_quick_start_learns(capsys: pytest.CaptureFixture[str]) -> None:
    run(README)
    assert 0 < float(re.search(r"^loss (\S+),", capsys.readouterr().out).group(1)) < 0.5


def test_classes_that_tables_name_can_be_made() -> None:
    """`optim.AdamW(params, ...)` in the text of a page."""
    found = [call for page in DOCS for call in re.findall(r"`(optim\.\w+\(params.*?\))`", page.read_text())]
    assert len(found) > 5
    for call in found:
        eval(call, {"optim": optim, "torch": torch, "params": [nn.Parameter(torch.ones(2))], "lr": 0.1})


def test_8_bit_format_is_as_its_page_says() -> None:
    given = run(ROOT / "docs" / "8-bit-format.md")
    plain = optim.AdamW([given["weight"]])  # converts when it loads
    plain.load_state_dict(given["opt"].state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        assert given[name].count_nonzero() > 6000
        assert torch.equal(given[name], plain.state[given["weight"]][name])


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text())):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{name_of(page)} links to {link}"
        assert target.resolve().is_relative_to(ROOT), f"{name_of(page)} links to {link}, outside of the repository"
        assert not anchor or anchor in anchors(target), f"{name_of(page)} links to {link}: there is no such heading"


def test_index_lists_every_page_with_its_sentence() -> None:
    """The index of its folder; that of a folder is itself in the one above."""
    for page in DOCS:
        if page != ROOT / "docs" / "README.md":
            index = page.parent.parent if page.name == "README.md" else page.parent
            link = page.relative_to(index).as_posix()
            assert f"]({link})" in (index / "README.md").read_text(), link
            title, _, sentence = page.read_text().split("\n", 3)[:3]
            assert title.startswith("# ") and sentence.startswith("This page "), link
