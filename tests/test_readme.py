"""The README's recipes run as they stand there."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from genopt_ext import optim

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.skipif(not README.exists(), reason="the tests were copied without it")
def test_recipes():
    text = README.read_text()
    section = text[text.index("## Recipes") :].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        torch.manual_seed(0)
        model, generator, discriminator = nn.Linear(4, 1), nn.Linear(4, 4), nn.Linear(4, 1)
        before = [p.detach().clone() for p in (*model.parameters(), *generator.parameters())]
        given = dict(torch=torch, optim=optim, softplus=softplus, batches=[torch.randn(8, 4) for _ in range(3)])
        given.update(model=model, generator=generator, discriminator=discriminator)
        given.update(opt=optim.SGD(model.parameters(), lr=0.1))
        exec(block, given)
        trained = [p.detach() for p in (*model.parameters(), *generator.parameters())]
        moved = [not torch.equal(a, b) for a, b in zip(trained, before, strict=True)]
        assert moved == ([True] * 2 + [False] * 2 if "norm" in given else [False] * 2 + [True] * 2)
        assert "samples" not in given or given["samples"].shape == (16, 4)
