"""What decides which way to round: random bits for weights, thresholds for moments.

As ``csrc/math/random.h``, and ``round_by`` in ``csrc/codecs/plain.h``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tracing import Number


def _number(x: int) -> Tensor:
    return torch.tensor(x, device="cpu")  # whatever device is the default


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers (held in int64) of which every bit changes all others."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def _counted(t: Number) -> Tensor:
    if isinstance(t, Tensor):
        return t.clamp(min=0).long() & 0xFFFFFFFF
    return _number(int(max(t, 0)) & 0xFFFFFFFF)


def random_bits(i: Tensor, seed: int, t: Number) -> Tensor:
    """32 random bits for each place ``i`` of a parameter's elements, at step ``t``: int64."""
    step = mix(_number(int(seed)) ^ mix(_counted(t)))
    return mix((mix((i >> 32) ^ step) + i) & 0xFFFFFFFF)


def thresholds(i: Tensor, t: Number) -> Tensor:
    """As :func:`random_bits`, but evenly spread over elements and steps: a Weyl sequence of rounding thresholds."""
    step = _counted(t)
    return (i * 0x91E10DA5 + (step * 0x9E3779B9 & 0xFFFFFFFF) + mix(step >> 8)) & 0xFFFFFFFF


def round_by(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """float32 ``x`` as one of its neighbours in ``dtype``, a half: the upper one where ``bits`` reach up to it."""
    number = x.view(torch.int32)
    if dtype == torch.bfloat16:
        rounded = ((number + (bits >> 16).int()) & ~0xFFFF).view(torch.float32)
    else:
        size = number & 0x7FFFFFFF
        normal = ((size + (bits >> 19).int()) & ~0x1FFF).view(torch.float32)
        places = (size.view(torch.float32) * 2.0**24).clamp(max=1024.0)
        subnormal = (places + (bits >> 19).float() * 2.0**-13).nan_to_num(0.0).int().float() * 2.0**-24
        rounded = torch.where(size < 113 << 23, subnormal, normal)
        rounded = torch.where(number < 0, -rounded, rounded)
    return torch.where(x.isnan(), x, rounded).to(dtype)
