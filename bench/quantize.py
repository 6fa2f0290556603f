"""Quantization among the cases: int8 blocks of 256 into given tensors, and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from genopt_ext import quant

NAMES = ("quantize", "dequantize")
BLOCK = 256


def _blocks(n: int) -> tuple[Tensor, quant.QuantizedTensor]:
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    return x, quant.quantize(x, scheme="block", block_size=BLOCK)


def floor(name: str, n: int) -> Callable[[], None]:
    """Reads four bytes and writes one past the caches, or the reverse, four streams beside one. Scales are left out."""
    from genopt_ext import _C

    n = n // 64 * 64
    wide, narrow = torch.zeros(n + 16), torch.zeros(n + 64, dtype=torch.uint8)
    begin, end = -(-wide.data_ptr() // 64) * 64, -(-narrow.data_ptr() // 64) * 64
    arrays = [(begin + i * n, name == "dequantize") for i in range(4)] + [(end, name == "quantize")]
    threads = torch.get_num_threads()

    def run() -> None:
        assert wide is not None and narrow is not None
        _C.stream(arrays, n, threads, True)

    return run


def compiled(name: str, n: int) -> Callable[[], Any]:
    """torch operations for the same, compiled."""
    x, q = _blocks(n // BLOCK * BLOCK)

    def quantize() -> None:
        blocks = x.view(-1, BLOCK)
        scale = blocks.abs().amax(1) / 127
        q.codes.view(-1, BLOCK).copy_((blocks / scale[:, None]).round().clamp(-127, 127).to(torch.int8))
        q.scale.copy_(scale)

    def dequantize() -> None:
        x.view(-1, BLOCK).copy_(q.codes.view(-1, BLOCK) * q.scale[:, None])

    return torch.compile(quantize if name == "quantize" else dequantize)


def running(name: str, n: int, variant: str | None) -> Callable[[], Any]:
    """``variant``: torch's; None: ours."""
    if variant == "compiled":
        return compiled(name, n)
    x, q = _blocks(n)
    if variant is None and name == "quantize":
        return lambda: quant.quantize(x, scheme="block", block_size=BLOCK, nonfinite="propagate", out=q)
    if variant is None:
        return lambda: quant.dequantize(q, out=x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        theirs = torch.quantize_per_tensor(x, 0.05, 0, torch.qint8)
    if name == "quantize":
        return lambda: torch.quantize_per_tensor(x, 0.05, 0, torch.qint8)
    return theirs.dequantize


def check(name: str, n: int) -> None:
    x, q = _blocks(min(n, 5000))
    error = (quant.dequantize(q) - x).abs().view(-1)
    if not (error <= q.scale.repeat_interleave(BLOCK)[: len(error)] * 0.5001).all():
        raise AssertionError(f"{name}: an error of more than half a scale")
