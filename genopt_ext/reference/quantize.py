"""Quantization in plain torch operations: the fallback without kernels, and the truth in tests.

The order of operations is that of ``csrc/quant/code.h``, so that both give the same bits. float64 is computed in
double, everything else in float32; scales are float32 always.

    symmetric    scale = largest |x| / highest code
    asymmetric   scale = high / span + low / span, where high and low are how far x goes above and below 0, and
                 span = highest - lowest code; zero_point = lowest + round(low * (1 / scale))
    both         at least the smallest normal float32, so that 1 / scale is finite; NaN if it would not be finite
    code         round(clamp(x * (1 / scale), lowest - zero_point, highest - zero_point)) + zero_point
    back         (code - zero_point) * scale, within the finite numbers of the dtype

Rounding is to nearest, ties to even; or stochastic: up where a random number in [0, 1) is below the fraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .rounding import mix

if TYPE_CHECKING:
    from ..quant.form import Form

_TINY = torch.finfo(torch.float32).tiny
_MASK = 0xFFFFFFFF


def random_numbers(seed: Tensor, index: Tensor) -> Tensor:
    """Numbers in [0, 1), float32 multiples of 2**-24, for elements at ``index`` (int64): a function of both alone."""
    seed = seed.to(index.device).reshape(())
    low, high = seed & _MASK, (seed >> 32) & _MASK
    key = mix(mix(mix(low) ^ high) ^ (index >> 32))
    bits = mix((((index & _MASK) * 0x9E3779B1) & _MASK) ^ key)
    return (bits >> 8).float() * 2.0**-24


def _by_unit(flat: Tensor, form: Form, shape: Sequence[int]) -> Tensor:
    """Row-major elements as rows, one a unit; a short last block is padded with zeros."""
    units, run = form.units(shape), form.run(shape)
    if form.scheme == "channel":
        if not flat.numel():
            return flat.new_zeros((units, 0))
        return flat.view(-1, units, run).transpose(0, 1).reshape(units, -1)
    if form.scheme == "tensor":
        return flat.view(1, -1)
    padded = flat.new_zeros(units * run)
    padded[: flat.numel()] = flat
    return padded.view(units, run)


def _from_units(rows: Tensor, form: Form, shape: Sequence[int], numel: int) -> Tensor:
    """The inverse of :func:`_by_unit`, flat."""
    if form.scheme == "channel" and numel:
        return rows.view(rows.shape[0], -1, form.run(shape)).transpose(0, 1).reshape(-1)
    return rows.reshape(-1)[:numel]


def _pack(codes: Tensor) -> Tensor:
    """Flat int8 codes in -8..7 as bytes of two."""
    nibbles = torch.zeros(codes.numel() + codes.numel() % 2, dtype=torch.uint8, device=codes.device)
    nibbles[: codes.numel()] = codes.view(torch.uint8) & 15
    return nibbles[::2] | (nibbles[1::2] << 4)


def _unpack(packed: Tensor, numel: int) -> Tensor:
    nibbles = torch.stack((packed & 15, packed >> 4), 1).view(-1)[:numel]
    return (nibbles ^ 8).to(torch.int8) - 8


def scales(x: Tensor, form: Form) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of every unit of ``x``; scale NaN and zero point 0 where one would not be finite."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = _by_unit(x.detach().reshape(-1).to(compute), form, x.shape)
    if not rows.numel():
        rows = rows.new_zeros((rows.shape[0], 1))

    # A tensor for every divisor: dividing by a number may become multiplying by its reciprocal.
    def over(t: Tensor, divisor: int) -> Tensor:
        return t / torch.full_like(t, divisor)

    low: Tensor | None = None
    if form.symmetric:
        scale = over(rows.abs().amax(1), form.highest)
    else:
        span = form.highest - form.lowest
        high, low = rows.amax(1).clamp(min=0), (-rows).amax(1).clamp(min=0)
        scale = over(high, span) + over(low, span)
    scale = scale.float().clamp(min=_TINY)
    valid = scale.isfinite()
    scale = torch.where(valid, scale, torch.nan)
    zero_point = None
    if low is not None:
        wide = scale.to(compute)
        zero_point = (low * (torch.ones_like(wide) / wide)).round() + form.lowest
        zero_point = torch.where(valid, zero_point.clamp(form.lowest, form.highest), 0).to(torch.int8)
    shape = form.scale_shape(x.shape)
    return scale.reshape(shape), None if zero_point is None else zero_point.reshape(shape)


def encode(
    x: Tensor, form: Form, scale: Tensor, zero_point: Tensor | None, rounding: str, seed: Tensor | None
) -> Tensor:
    """The codes of ``x`` with given scales. NaN has the lowest code where its scale is finite."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = _by_unit(x.detach().reshape(-1).to(compute), form, x.shape)
    wide = scale.reshape(-1, 1).to(compute)
    valid = wide.isfinite()
    zero = torch.zeros_like(wide) if zero_point is None else zero_point.reshape(-1, 1).to(compute)
    lowest, highest = (torch.where(valid, bound - zero, 0) for bound in (form.lowest, form.highest))
    y = rows * torch.where(valid, torch.ones_like(wide) / wide, 0)
    y = torch.where(y > lowest, y, lowest)
    y = torch.where(y < highest, y, highest)
    if rounding == "nearest":
        y = y.round()
    else:
        assert seed is not None
        index = _by_unit(torch.arange(x.numel(), device=x.device), form, x.shape)
        floor = y.floor()
        y = floor + (random_numbers(seed, index) < y - floor)
    codes = _from_units((y + zero).to(torch.int8), form, x.shape, x.numel())
    return codes.view(x.shape) if form.bits == 8 else _pack(codes)


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, form: Form, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The numbers behind codes."""
    numel = codes.numel() if form.bits == 8 else int(torch.Size(shape).numel())
    flat = codes.reshape(-1) if form.bits == 8 else _unpack(codes, numel)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    rows = _by_unit(flat, form, shape).to(compute)
    if zero_point is not None:
        rows = rows - zero_point.reshape(-1, 1).to(compute)
    largest = torch.finfo(dtype).max
    numbers = (rows * scale.reshape(-1, 1).to(compute)).clamp(-largest, largest)
    return _from_units(numbers.to(dtype), form, shape, numel).reshape(shape)
