"""Sums that are the same in whatever order and parts numbers are added up: ``csrc/plan/binned.h`` in torch operations.

A sum is five int64 words, as ``BinnedTotal`` there: the bin of the largest number, how often the sum has the bin's grid
and the finer one, each as ``high * 2**32 + low``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BITS, _TOP, _INFINITE, _NAN = 48, 42, 62, 63
_LOW = 2**32 - 1
WORDS = 5


def _power_of_2(exponents: Tensor) -> Tensor:
    """Of normal numbers; by operations on the device alone."""
    return ((exponents + 1023) << 52).view(torch.float64)


def _grids(bins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A factor for numbers, and the magic numbers of a bin's grid and of the finer one: ``Grids`` in binned.h."""
    is_top = bins >= _TOP
    near = torch.where(is_top, _TOP - 2, bins)
    coarse, fine = (1.5 * _power_of_2(_BITS * each - 970) for each in (near, near - 1))
    return _power_of_2(torch.where(is_top, -2 * _BITS, 0)), coarse, fine


def total(numbers: Tensor) -> Tensor:
    """The words of a sum of numbers, in float64."""
    numbers = numbers.reshape(-1)
    if not numbers.numel():
        return torch.zeros(WORDS, dtype=torch.int64, device=numbers.device)
    largest = numbers.abs().max()  # of NaN, that
    # As it is stored: frexp() is of no avail for subnormal numbers where these are flushed.
    exponent = largest.view(torch.int64) >> 52
    bins = torch.where(largest.isfinite(), exponent // _BITS, torch.where(largest.isnan(), _NAN, _INFINITE))
    scale, coarse, fine = _grids(bins)
    scaled = numbers * scale
    rounded = scaled + coarse
    multiples = torch.stack([_bits(rounded) - _bits(coarse), _bits(scaled + ((coarse + fine) - rounded)) - _bits(fine)])
    words = _normal(torch.stack([multiples >> 32, multiples & _LOW], -1).sum(-2))
    return torch.cat([bins.reshape(1), torch.where(bins > _TOP, 0, words).flatten()])


def maximum(numbers: Tensor) -> Tensor:
    """As :func:`total`, of the largest number (at least 0) in the place of a sum."""
    words = torch.zeros(WORDS, dtype=torch.int64, device=numbers.device)
    if numbers.numel():
        largest = numbers.max()
        words.select(0, 0).copy_(torch.where(largest.isnan(), 0x7FF8 << 48, _bits(largest)))
    return words


def largest(words: Tensor) -> Tensor:
    """The numbers of which :func:`maximum` made words, in the last dimension."""
    return words.select(-1, 0).contiguous().view(torch.float64)


def value(words: Tensor) -> Tensor:
    """The sums, of words in the last dimension."""
    bins = words.select(-1, 0)
    high, low = words.narrow(-1, 1, WORDS - 1).unflatten(-1, (2, 2)).double().unbind(-1)
    coarse, fine = (high * 2.0**32 + low).unbind(-1)
    half = _power_of_2(_BITS // 2 * bins.clamp(max=_TOP) - 535)
    finite = (coarse * 2.0**_BITS + fine) * half * half
    return torch.where(bins > _TOP, torch.where(bins == _NAN, math.nan, math.inf), finite)


# How processes add up their words: multiples of the grids of all bins that may be, side by side. Words of a grid are
# the high one, and the low one with how many processes have this bin above.

_PRESENT = 48  # where the count of processes begins


def _range(is_narrow: bool) -> tuple[int, int]:
    """The first grid of numbers that may be, and how many there are. ``is_narrow``: |x| or x * x of float32 or less."""
    return (15, 13) if is_narrow else (0, _TOP + 2)


def spread(words: Tensor, is_narrow: bool) -> Tensor:
    """What is to be added up."""
    first, count = _range(is_narrow)
    bins = words.select(-1, 0)
    here = (bins - first).clamp(0, count - 2)  # below are zeros alone
    known = words.narrow(-1, 1, WORDS - 1).unflatten(-1, (2, 2)).clone()
    known.select(-1, 1).select(-1, 0).add_((bins <= _TOP).long() << _PRESENT)
    grids = torch.zeros(*bins.shape, count, 2, dtype=torch.int64, device=words.device)
    index = torch.stack([here + 1, here], -1).unsqueeze(-1).expand(known.shape)
    others = (bins == _INFINITE).long() + ((bins == _NAN).long() << 32)
    return torch.cat([grids.scatter_(-2, index, known).flatten(-2), others.unsqueeze(-1)], -1)


def gathered(added: Tensor, is_narrow: bool) -> Tensor:
    """The words of the sum of all."""
    first, count = _range(is_narrow)
    grids, others = added.narrow(-1, 0, 2 * count).unflatten(-1, (count, 2)), added.select(-1, -1)
    is_present = grids.select(-1, 1) >= 1 << _PRESENT
    top = (is_present * torch.arange(count, device=added.device)).amax(-1).clamp(min=1)
    index = torch.stack([top, top - 1], -1).unsqueeze(-1).expand(*top.shape, 2, 2)
    high, low = grids.gather(-2, index).unbind(-1)
    known = _normal(torch.stack([high, low & ((1 << _PRESENT) - 1)], -1)).flatten(-2)
    bins = torch.where(others == 0, top - 1 + first, torch.where(others >= 2**32, _NAN, _INFINITE)).unsqueeze(-1)
    return torch.cat([bins, torch.where(bins > _TOP, 0, known)], -1)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int64)


def _normal(words: Tensor) -> Tensor:
    high, low = words.unbind(-1)
    return torch.stack([high + (low >> 32), low & _LOW], -1)
