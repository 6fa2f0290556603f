"""The cases that ``gpu_check.py`` times, the most telling ones first, and whom ours is to beat in each."""

from __future__ import annotations

import dataclasses

import torch

from .cases import Case, Shape

FUSED, FOREACH = ("torch fused",), ("torch foreach",)
# Others' packages. What fails with one of them is tried again without.
PACKAGES = ("bitsandbytes", "torchao", "flashoptim", "optimi")
EIGHT_BIT = (*FUSED, "bitsandbytes", "torchao", "flashoptim")
ROOM = 120e9  # bytes of a GPU in which five subjects of 1B parameters stand side by side


def cases(scale: float, memory: float) -> list[tuple[Case, tuple[str, ...]]]:
    """``scale`` shrinks the tensors. 8-bit cases, which have most subjects, are half as large where memory is short."""

    def tensors(count: int, n: float) -> tuple[Shape, ...]:
        return ((max(1, int(n * scale)),),) * count

    one = tensors(1, 1e9)
    half, n = (one, "1B") if memory > ROOM or not memory else (tensors(1, 5e8), "500M")
    small, tiny, tinier = tensors(1000, 1024), tensors(10_000, 64), tensors(20_000, 64)
    momentum = {"momentum": 0.9}
    bf16, fp32, int8 = torch.bfloat16, torch.float32, torch.int8
    mixed = {"dtype": bf16, "state": fp32}
    table = [
        (Case("AdamW 1B", "AdamW", one, goal="95 % of copy"), FUSED),
        (Case("AdamW clipped 1B", "AdamW", one, clip=1.0, goal="93 % of copy, 1.2 x torch"), FUSED),
        (Case("AdamW mixed 1B", "AdamW", one, **mixed, goal="92 % of copy"), FUSED),
        (Case("AdamW 10000 x 64", "AdamW", tiny, goal="10 x torch"), FUSED),
        (Case("AdamW 1000 x 1024", "AdamW", small, goal="10 x torch"), FUSED),
        (Case("AdamW 10000 x 64 replayed", "AdamW", tiny, graph=True), FUSED),
        (Case("AdamW 1000 x 1024 replayed", "AdamW", small, graph=True), FUSED),
        (Case(f"AdamW int8 {n}", "AdamW", half, state=int8, goal="85 % of copy, 1.5 x torch"), EIGHT_BIT),
        (Case(f"AdamW int8 bf16 {n}", "AdamW", half, dtype=bf16, state=int8, goal="70 % of copy"), EIGHT_BIT),
        (Case("AdamW bf16 1B", "AdamW", one, dtype=bf16, goal="92 % of copy"), (*FUSED, "optimi")),
        (Case("AdamW AMP clipped 1B", "AdamW", one, clip=1.0, amp=True, goal="1.4 x torch"), FUSED),
        (Case("SGD momentum 1B", "SGD", one, kwargs=momentum, goal="93 % of copy"), FUSED),
        (Case("RMSprop 1B", "RMSprop", one, goal="93 % of copy, 5 x torch"), FOREACH),
        (Case("Adagrad 1B", "Adagrad", one, goal="93 % of copy"), FUSED + FOREACH),
        (Case("AdamW 200 x 5M", "AdamW", tensors(200, 5e6), goal="95 % of copy"), FUSED),
        (Case("AdamW mixed stochastic 1B", "AdamW", one, **mixed, rounding="stochastic", goal="92 %"), FUSED),
        (Case("AdamW mixed master 1B", "AdamW", one, **mixed, master=True, goal="90 %"), (*FUSED, "flashoptim")),
        (Case("AdamW bf16 kahan 1B", "AdamW", one, dtype=bf16, rounding="kahan"), (*FUSED, "optimi")),
        (Case("AdamW EMA 1B", "AdamW", one, ema=0.999), FUSED),
        (Case(f"RMSprop int8 {n}", "RMSprop", half, state=int8, goal="85 % of copy"), (*FOREACH, "bitsandbytes")),
        (Case("quantize 1B", "AdamW", one, kind="quantize", goal="90 % of copy"), ("bitsandbytes",)),
        (Case("dequantize 1B", "AdamW", one, kind="dequantize", goal="90 % of copy"), ("bitsandbytes",)),
        (Case("AdamW 2000 x 1024", "AdamW", tensors(2000, 1024), goal="host 0.3 ms, 3 launches"), FUSED),
        (Case("AdamW 20000 x 64", "AdamW", tinier), FUSED),
        (Case("AdamW 20000 x 64 replayed", "AdamW", tinier, graph=True), FUSED),
        (Case("AdamW unaligned 1B", "AdamW", one, offset=1), FUSED),
        (Case("AdamW mixed unaligned 1B", "AdamW", one, **mixed, offset=1), FUSED),
        (Case("AdamW 10000 x 64 without gradients", "AdamW", tiny, gradients=False), FUSED),
    ]
    return [(dataclasses.replace(case, main=True), others) for case, others in table]
