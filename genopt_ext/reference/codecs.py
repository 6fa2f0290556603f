"""How values are stored: as numbers, or as codes of 8 bits with a scale for each block of up to 256.

The codes are those of ``csrc/codecs/int8_block.h``, spelled in torch operations: the same bits. A state ``S`` of a
parameter is one tensor ``S``, or two: ``S_codes`` (the parameter's shape and strides; int8, or uint8 for averages of
squares, which are never negative) and ``S_scales`` (float32, one for each block in the order in which codes lie; of the
shape that :func:`scales_shapes` tells).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import sharding
from .rounding import round_by

BLOCK, _SMALLEST_BLOCK, _BLOCK_STEP = 256, 64, 16  # as csrc/plan/tiles.h has them
MIXES = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that parameters, gradients and states may mix
HALVES = (torch.bfloat16, torch.float16)
STEPPED = (*MIXES, torch.float64, torch.complex64, torch.complex128)  # dtypes of parameters that can take a step

_FINE = 19  # bits of a float below a code's last one, where an octave has 16 codes; 2 more where it has 4


def order_of(like: Tensor) -> list[int]:
    """Dimensions as they lie in memory, the one that varies fastest last."""
    strides = like.stride()
    return sorted(range(like.dim()), key=lambda d: -strides[d])


def flat(t: Tensor, like: Tensor) -> Tensor:
    """The elements of ``t`` in the order in which ``like`` lies in memory."""
    return t.permute(order_of(like)).reshape(-1)


def fill(t: Tensor, values: Tensor, like: Tensor) -> None:
    """The reverse of :func:`flat`."""
    order = order_of(like)
    t.permute(order).copy_(values.view([t.shape[d] for d in order]))


def _dividing(length: int) -> int:
    sizes = range(BLOCK, _SMALLEST_BLOCK - 1, -_BLOCK_STEP)
    return next((size for size in sizes if length and length % size == 0), 0)


def block_of(p: Tensor) -> int:
    """How many elements share a scale of ``p``'s codes, where such blocks make slices along the first dimension.

    Then no cut along that dimension divides a block. 0: none does, or slices do not lie one after another; elements
    share a scale 256 by 256 then, without regard to slices.
    """
    if p.dim() < 2 or (len(p) != 1 and any(p.shape[d] != 1 and p.stride(d) > p.stride(0) for d in range(1, p.dim()))):
        return 0
    return _dividing(p.shape[1:].numel())


def scales_shapes(p: Tensor) -> list[torch.Size]:
    """One scale for each block: [slices, blocks of each], or [blocks] where they know no slices.

    Returns:
        First that of ``p``. Others can be read: of format 1, and of ``p`` with other strides.
    """
    shapes = [torch.Size([-(-p.numel() // BLOCK)])]
    length = p.shape[1:].numel() if p.dim() else 0
    if p.dim() > 1 and (block := _dividing(length)):
        shapes.insert(0 if block_of(p) else 1, torch.Size([p.shape[0], length // block]))
    return shapes


def _block_in(codes: Tensor, scales: Tensor) -> int:
    return codes.shape[1:].numel() // scales.shape[1] if scales.dim() == 2 else BLOCK


def blocks(x: Tensor, block: int = BLOCK) -> Tensor:
    return torch.nn.functional.pad(x, (0, -len(x) % block)).view(-1, block)


def _border(scales: Tensor, signed: bool) -> tuple[Tensor, int, int]:
    """From where on octaves have 16 codes: the bits of values and the code; and the largest code."""
    largest, octaves = (127, 6) if signed else (255, 12)
    return scales.view(torch.int32).unsqueeze(1) - (octaves << 23), largest - 16 * octaves, largest


def _scales_for(largest: Tensor, signed: bool) -> Tensor:
    """Of blocks whose largest magnitude, as a float's bits, this is."""
    rounded = (largest + 0x1FFFFF) & ~0x1FFFFF
    scales = rounded.clamp((15 if signed else 29) << 23, 0x7F600000).view(torch.float32)
    scales = torch.where(largest == 0, 0.0, scales)
    return torch.where(largest >= 0x7F800000, torch.nan, scales)


def encode(x: Tensor, signed: bool, thresholds: Tensor | None = None, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Codes and scales of a vector.

    Args:
        x: float32, 1-D.
        signed: whether values may be negative.
        thresholds: int64 in [0, 2**32), one an element, which decide which way to round; None: to the nearest code.
        block: how many share a scale.

    Returns:
        Codes (int8, or uint8 where not signed) and scales (float32, one for each block).
    """
    bits = blocks(x, block).view(torch.int32)
    size = bits & 0x7FFFFFFF
    scales = _scales_for(size.amax(1) if len(size) else size.new_zeros(0), signed)
    border, code, largest = _border(scales, signed)
    up = torch.full_like(size, 1 << 31, dtype=torch.int64) if thresholds is None else blocks(thresholds, block)
    fine = size - border
    codes = ((torch.maximum(fine, fine >> 2) + (up >> (32 - _FINE)).int()) >> _FINE) + code
    codes = codes.clamp(0 if signed else 1, largest)
    codes = torch.where((scales.unsqueeze(1) > 0) & ((size != 0) | signed), codes, 0)
    codes = torch.where(bits < 0, -codes, codes) if signed else codes
    return codes.to(torch.int8 if signed else torch.uint8).view(-1).narrow(0, 0, len(x)), scales


def decode(codes: Tensor, scales: Tensor, block: int = BLOCK) -> Tensor:
    """The values of a vector of codes, in float32."""
    border, code, _ = _border(scales, codes.dtype == torch.int8)
    numbers = blocks(codes, block).int()
    fine = (numbers.abs() - code) << _FINE
    values = (border + torch.minimum(fine, fine << 2)).view(torch.float32)
    values = torch.where(numbers < 0, -values, values)
    fills = torch.where(scales > 0, 0.0, scales).unsqueeze(1)
    return torch.where(numbers == 0, fills, values).view(-1).narrow(0, 0, len(codes))


# A state in a parameter's state dict


def read(state: dict[str, Any], name: str) -> Tensor:
    """The state ``name``, in its own dtype, or in float32 where it is stored in codes."""
    if state.get(name) is not None:
        plain: Tensor = state[name]
        return plain
    whole, scales = state[name + "_codes"], sharding.local(state[name + "_scales"])
    codes: Tensor = sharding.local(whole)
    values = torch.empty_like(codes, dtype=torch.float32)
    fill(values, decode(flat(codes, codes), scales.reshape(-1), _block_in(codes, scales)), codes)
    return sharding.spread_as(values, whole)


def write(state: dict[str, Any], name: str, p: Tensor, values: Tensor, thresholds: Tensor | None = None) -> None:
    """Stores values of ``p``'s shape as ``state`` keeps it; ``thresholds``: for :func:`encode`, in ``p``'s order."""
    plain = state.get(name)
    if plain is None:
        codes, scales = (sharding.local(state[name + end]) for end in ("_codes", "_scales"))
        values, p = sharding.local(values), sharding.local(p)
        new, found = encode(flat(values, p), codes.dtype == torch.int8, thresholds, _block_in(codes, scales))
        fill(codes, new, p)
        scales.view(-1).copy_(found)
    elif thresholds is not None and plain.dtype in HALVES:
        fill(plain, round_by(flat(values, p), plain.dtype, thresholds), p)
    else:
        plain.copy_(values)
