"""The cases that are timed, and for each the subjects that take turns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genopt_ext import optim

Shape = tuple[int, ...]

GPT2: list[Shape] = [
    (50257, 768),
    (1024, 768),
    *(
        [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,)]
        + [(768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)]
    )
    * 12,
    (768,),
    (768,),
]


@dataclass(frozen=True)
class Case:
    """``arrays`` tensors as large as the parameters are read in a step, of which ``written`` are written."""

    name: str
    optimizer: str
    shapes: tuple[Shape, ...]
    arrays: int
    written: int
    dtype: torch.dtype = torch.float32
    kwargs: dict[str, Any] = field(default_factory=dict)
    cold: bool = False

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize * (self.arrays + self.written)


def cases(scale: float) -> list[Case]:
    """The table; ``scale`` shrinks the one-tensor cases from 64M elements."""
    large = ((max(4096, int((1 << 26) * scale)),),)
    gpt2 = tuple(shape if scale >= 1 else (max(1, int(math.prod(shape) * scale)),) for shape in GPT2)
    million = f"{large[0][0] / 2**20:.3g}M"
    momentum, centered = {"momentum": 0.9}, {"centered": True, "momentum": 0.9}
    small, tiny = ((1024,),) * 2000, ((64,),) * 20000
    return [
        Case(f"AdamW {million}", "AdamW", large, 4, 3),
        Case("AdamW GPT-2" + (f" x{scale:g}" if scale < 1 else ""), "AdamW", gpt2, 4, 3),
        Case(f"AdamW bf16 {million}", "AdamW", large, 4, 3, torch.bfloat16),
        Case("AdamW 2000x1024", "AdamW", small, 4, 3),
        Case("AdamW 2000x1024 cold", "AdamW", small, 4, 3, cold=True),
        Case("AdamW 20000x64", "AdamW", tiny, 4, 3),
        Case("AdamW 20000x64 cold", "AdamW", tiny, 4, 3, cold=True),
        Case("AdamW 2000x1", "AdamW", ((1,),) * 2000, 4, 3),
        Case(f"RMSprop {million}", "RMSprop", large, 3, 2),
        Case(f"RMSprop centered momentum {million}", "RMSprop", large, 5, 4, kwargs=centered),
        Case(f"SGD momentum {million}", "SGD", large, 3, 2, kwargs=momentum),
        Case("SGD momentum 2000x1024", "SGD", small, 3, 2, kwargs=momentum),
        Case(f"Adagrad {million}", "Adagrad", large, 3, 2),
        Case("Adagrad 2000x1024", "Adagrad", small, 3, 2),
    ]


def parameters(case: Case, largest: int | None = None) -> list[torch.nn.Parameter]:
    """Parameters with gradients; at most 50 tensors of ``largest`` elements where that is given."""
    generator = torch.Generator().manual_seed(0)
    shapes = case.shapes
    if largest is not None:
        shapes = tuple((min(math.prod(shape), largest),) for shape in shapes[:50])
    params = []
    for shape in shapes:
        p = torch.nn.Parameter(torch.randn(shape, generator=generator).to(case.dtype))
        p.grad = torch.randn(shape, generator=generator).to(case.dtype)
        params.append(p)
    return params


def floor(case: Case) -> Callable[[], None]:
    """Moves the case's bytes and computes nothing."""
    from genopt_ext import _C

    nbytes = case.elements * case.dtype.itemsize // 64 * 64
    buffers: list[Tensor] = [torch.zeros(nbytes + 64, dtype=torch.uint8) for _ in range(case.arrays)]
    arrays = [(-(-b.data_ptr() // 64) * 64, i < case.written) for i, b in enumerate(buffers)]
    threads = torch.get_num_threads()

    def run() -> None:
        assert buffers
        _C.stream(arrays, nbytes, threads)

    return run


def subjects(case: Case, compiled: bool) -> dict[str, Callable[[], Any]]:
    """What takes turns: the floor, ours, and torch's own implementations."""
    theirs = getattr(torch.optim, case.optimizer)
    made: dict[str, Callable[[], Any]] = {
        "floor": floor(case),
        "genopt_ext": getattr(optim, case.optimizer)(parameters(case), **case.kwargs).step,
    }
    if case.optimizer != "RMSprop":
        made["torch fused"] = theirs(parameters(case), fused=True, **case.kwargs).step
    if len(case.shapes) <= 2000:
        made["torch foreach"] = theirs(parameters(case), foreach=True, **case.kwargs).step
    if compiled and len(case.shapes) == 1:
        lr = torch.tensor(1e-3)
        made["torch compiled"] = torch.compile(theirs(parameters(case), lr=lr, foreach=False, **case.kwargs).step)
    return made


def check(case: Case) -> None:
    """The kernels' result is the reference's, bit for bit, on a small copy of the case."""
    results = []
    for backend in ("cpu", "reference"):
        params = parameters(case, largest=5000)
        opt = getattr(optim, case.optimizer)(params, backend=backend, **case.kwargs)
        for _ in range(2):
            opt.step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        if not torch.equal(p, q):
            raise AssertionError(f"{case.name}: kernels and reference differ")
