"""The cases that are timed, and for each the subjects that take turns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import genopt_ext
from genopt_ext import optim

from . import quantize

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
    """``arrays`` tensors as large as the parameters are read in a step, of which ``written`` are written.

    ``clip``: the norm of all gradients is clipped before, one array more to read. ``ema``: the weights' average is
    kept. ``optimizer`` may be ``clip_grad_norm_``, ``quantize`` or ``dequantize``, which then is all there is.
    """

    name: str
    optimizer: str
    shapes: tuple[Shape, ...]
    arrays: int
    written: int
    dtype: torch.dtype = torch.float32
    kwargs: dict[str, Any] = field(default_factory=dict)
    cold: bool = False
    clip: float | None = None
    ema: float | None = None
    coded: int = 0  # moments stored in 8 bits, which are read and written beside the arrays
    rounding: str = "nearest"  # of 16-bit parameters

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def bytes(self) -> int:
        if self.optimizer in quantize.NAMES:
            return self.elements * 5 + self.elements // 64
        plain = self.dtype.itemsize * (self.arrays + self.written + (self.clip is not None))
        return int(self.elements * (plain + self.coded * 2 * (1 + 4 / 256)))

    @property
    def ours(self) -> dict[str, Any]:
        """Options that only our classes have."""
        given = {"max_grad_norm": self.clip, "ema_decay": self.ema}
        given.update({"state_dtype": torch.int8, "min_int8_size": 0} if self.coded else {})
        given.update({"param_rounding": self.rounding} if self.rounding != "nearest" else {})
        return {name: value for name, value in given.items() if value is not None}


def cases(scale: float) -> list[Case]:
    """The table; ``scale`` shrinks the one-tensor cases from 64M elements."""
    large = ((max(4096, int((1 << 26) * scale)),),)
    gpt2 = tuple(shape if scale >= 1 else (max(1, int(math.prod(shape) * scale)),) for shape in GPT2)
    name = "GPT-2" + (f" x{scale:g}" if scale < 1 else "")
    million = f"{large[0][0] / 2**20:.3g}M"
    momentum, centered = {"momentum": 0.9}, {"centered": True, "momentum": 0.9}
    small, tiny = ((1024,),) * 2000, ((64,),) * 20000
    return [
        Case(f"AdamW {million}", "AdamW", large, 4, 3),
        Case("AdamW " + name, "AdamW", gpt2, 4, 3),
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
        Case("AdamW clipped " + name, "AdamW", gpt2, 4, 3, clip=1.0),
        Case("AdamW clipped 2000x1024", "AdamW", small, 4, 3, clip=1.0),
        Case("AdamW clipped 20000x64", "AdamW", tiny, 4, 3, clip=1.0),
        Case("clip_grad_norm_ " + name, "clip_grad_norm_", gpt2, 1, 0),
        Case(f"AdamW int8 {million}", "AdamW", large, 2, 1, coded=2),
        Case(f"AdamW int8 bf16 {million}", "AdamW", large, 2, 1, torch.bfloat16, coded=2),
        Case("AdamW int8 2000x1024", "AdamW", small, 2, 1, coded=2),
        Case(f"AdamW bf16 stochastic {million}", "AdamW", large, 4, 3, torch.bfloat16, rounding="stochastic"),
        Case(f"RMSprop int8 {million}", "RMSprop", large, 2, 1, coded=1),
        Case(f"AdamW EMA {million}", "AdamW", large, 5, 4, ema=0.999),
        Case(f"quantize int8 block 256 {million}", "quantize", large, 1, 0),
        Case(f"dequantize int8 block 256 {million}", "dequantize", large, 1, 0),
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
    if case.optimizer in quantize.NAMES:
        return quantize.floor(case.optimizer, case.elements)
    from genopt_ext import _C

    nbytes = case.elements * case.dtype.itemsize // 64 * 64
    buffers: list[Tensor] = [torch.zeros(nbytes + 64, dtype=torch.uint8) for _ in range(case.arrays)]
    arrays = [(-(-b.data_ptr() // 64) * 64, i < case.written) for i, b in enumerate(buffers)]
    codes = None
    if case.coded:
        codes = torch.zeros(int(case.elements * case.coded * (1 + 4 / 256)) // 64 * 64, dtype=torch.uint8)
    threads = torch.get_num_threads()

    def run() -> None:
        assert buffers
        if case.clip is not None:
            _C.stream(arrays[-1:], nbytes, threads)
        _C.stream(arrays, nbytes, threads)
        if codes is not None:
            _C.stream([(codes.data_ptr(), True)], codes.numel(), threads)

    return run


def stepping(case: Case, variant: str | None) -> Callable[[], Any]:
    """The whole step of one subject; ``variant``: torch's; None: ours."""
    params = parameters(case)
    if case.optimizer == "clip_grad_norm_":  # with a bound that no norm reaches, so that nothing is written
        clip: Any = torch.nn.utils.clip_grad_norm_ if variant else genopt_ext.clip_grad_norm_
        return lambda: clip(params, 1e9)
    if variant is None:
        return getattr(optim, case.optimizer)(params, **case.kwargs, **case.ours).step
    kwargs: dict[str, Any] = {"lr": torch.tensor(1e-3)} if variant == "compiled" else {variant: True}
    foreach = {"foreach": False} if variant == "compiled" else {}
    opt = getattr(torch.optim, case.optimizer)(params, **kwargs, **foreach, **case.kwargs)
    step = torch.compile(opt.step) if variant == "compiled" else opt.step
    averages = [p.detach().clone() for p in params] if case.ema is not None else []

    def run() -> None:
        if case.clip is not None:
            torch.nn.utils.clip_grad_norm_(params, case.clip)
        step()
        if case.ema is not None:  # as AveragedModel's get_ema_multi_avg_fn
            with torch.no_grad():
                torch._foreach_lerp_(averages, params, 1.0 - case.ema)

    return run if case.ours else step


def subjects(case: Case, compiled: bool) -> dict[str, Callable[[], Any]]:
    """What takes turns: the floor, ours, and torch's own implementations."""
    if case.optimizer in quantize.NAMES:
        names = {
            "genopt_ext": None,
            "torch per tensor": "per tensor",
            **({"torch compiled": "compiled"} if compiled else {}),
        }
        running = {name: quantize.running(case.optimizer, case.elements, variant) for name, variant in names.items()}
        return {"floor": floor(case), **running}
    made = {"floor": floor(case), "genopt_ext": stepping(case, None)}
    if case.optimizer not in ("RMSprop", "clip_grad_norm_"):
        made["torch fused"] = stepping(case, "fused")
    if len(case.shapes) <= 2000:
        made["torch foreach"] = stepping(case, "foreach")
    if compiled and len(case.shapes) == 1 and not case.ours:
        made["torch compiled"] = stepping(case, "compiled")
    return made


def check(case: Case) -> None:
    """The kernels' result is the reference's, bit for bit, on a small copy of the case."""
    if case.optimizer in quantize.NAMES:
        quantize.check(case.optimizer, case.elements)
        return
    if case.optimizer == "clip_grad_norm_":
        params = parameters(case, largest=5000)
        norm = genopt_ext.get_total_norm([p.grad.double() for p in params if p.grad is not None])
        torch.testing.assert_close(genopt_ext.clip_grad_norm_(params, 1.0).double(), norm, rtol=1e-6, atol=0)
        return
    results = []
    for backend in ("cpu", "reference"):
        params = parameters(case, largest=5000)
        opt = getattr(optim, case.optimizer)(params, backend=backend, **case.kwargs, **case.ours)
        for _ in range(2):
            opt.step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        if not torch.equal(p, q):
            raise AssertionError(f"{case.name}: kernels and reference differ")
