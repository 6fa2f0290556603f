"""Maps of an optimizer's moments to 8 bits in blocks of 256, and roundings, for mappings.py to compare.

Maps: powers (largest * (code / last code)^power), the dynamic-exponent code book of Dettmers et al.
(arXiv 2110.02861), and the bits of a float32 without the lowest ones ("bits 4,2": 4 fraction bits for the larger
values, 2 for the smaller ones). Roundings: to nearest; random; and "sequence": up with the same probability, but an
element's numbers over the steps are a Weyl sequence, frac(phase + step * golden ratio), spread far more evenly. Every
256 steps the phase jumps, as gradients that come back after 89, 144, ... steps would meet almost the same number for
long.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256
ROUNDINGS = ("nearest", "random", "sequence")

# A map takes rows of 256 values and, unless it is to round to nearest, as many numbers of [0, 1) that decide which
# ones go up; it returns what is decoded after encoding. A second moment that is not zero never becomes zero.
Map = Callable[[Tensor, "Tensor | None"], Tensor]


@dataclass
class Levels:
    """Decodes to largest * levels[code]."""

    levels: Tensor  # ascending from 0 to 1; of magnitudes where the moment is signed
    signed: bool
    may_vanish: bool = False

    def __call__(self, x: Tensor, up: Tensor | None) -> Tensor:
        largest = x.abs().amax(1, keepdim=True)
        y = x.abs() / largest.clamp_min(torch.finfo(torch.float32).tiny)
        low = (torch.bucketize(y, self.levels, right=True) - 1).clamp(0, len(self.levels) - 2)
        below, above = self.levels[low], self.levels[low + 1]
        part = (y - below) / (above - below)
        code = low + (part > 0.5 if up is None else part > up)
        if not self.signed and not self.may_vanish:
            code = torch.where(y > 0, code.clamp_min(1), code)
        return self.levels[code] * largest * x.sign()


def power(exponent: float, signed: bool) -> Levels:
    last = 127 if signed else 255
    return Levels((torch.arange(last + 1) / last) ** exponent, signed)


def dynamic(signed: bool, may_vanish: bool = False) -> Levels:
    """Leading zero bits tell the power of ten, the bits after the first one divide 0.1 to 1 evenly."""
    bits = 7 if signed else 8
    values = [0.0, 1.0]
    for zeros in range(7):
        count = 2 ** (bits - 1 - zeros)
        values += [10.0**-zeros * (0.1 + 0.9 * (k + 0.5) / count) for k in range(count)]
    return Levels(torch.tensor(sorted(values)), signed, may_vanish)


@dataclass
class FloatBits:
    """The distance between a float32's bits and those of the block's largest, which is rounded up, is the code's.

    ``pieces``: fraction bits and octaves from the top down, the last one for as long as there are codes. The code is
    a convex function of the bits, so it is the largest of some shifts with offsets.
    """

    signed: bool
    pieces: tuple[tuple[int, int], ...]

    def __call__(self, x: Tensor, up: Tensor | None) -> Tensor:
        bits = x.abs().view(torch.int32)
        last = 127 if self.signed else 255
        grid = 23 - self.pieces[-1][0]
        top = ((bits.amax(1, keepdim=True) + ((1 << grid) - 1)) >> grid) << grid
        top = top.clamp_min(29 << 23)  # 2^-98, so that the smallest code's value is a normal number
        border, at = top, last
        codes, values = [], []
        for fraction, octaves in self.pieces:
            shift = 23 - fraction
            extra = 1 << (shift - 1) if up is None else (up * (1 << shift)).to(torch.int32)
            codes.append(((bits + extra) >> shift) - (border >> shift) + at)
            values.append((border, shift, at))
            border, at = border - (octaves << 23), at - (octaves << fraction)
        code = torch.stack(codes).amax(0).clamp(0, last)
        if not self.signed:
            code = torch.where(bits > 0, code.clamp_min(1), 0)
        decoded = torch.stack([border + ((code - at) << shift) for border, shift, at in values]).amin(0)
        return torch.where(code > 0, decoded, 0).view(torch.float32) * x.sign()


SIGNED: dict[str, Map] = {
    "power 1": power(1, True),
    "power 2": power(2, True),
    "power 3": power(3, True),
    "dynamic": dynamic(True),
    "bits 4": FloatBits(True, ((4, 0),)),
    "bits 3": FloatBits(True, ((3, 0),)),
    "bits 4,3": FloatBits(True, ((4, 4), (3, 0))),
    "bits 4,2": FloatBits(True, ((4, 6), (2, 0))),
}
UNSIGNED: dict[str, Map] = {
    "power 1": power(1, False),
    "power 2": power(2, False),
    "power 4": power(4, False),
    "power 6": power(6, False),
    "dynamic, may vanish": dynamic(False, may_vanish=True),
    "dynamic": dynamic(False),
    "bits 4": FloatBits(False, ((4, 0),)),
    "bits 3": FloatBits(False, ((3, 0),)),
    "bits 4,3": FloatBits(False, ((4, 8), (3, 0))),
    "bits 4,2": FloatBits(False, ((4, 12), (2, 0))),
}


def mixed(x: int) -> int:
    """A 32-bit hash."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


class Rounding:
    """Numbers of [0, 1), one an element, other ones at every step. "sequence" gives all moments the same ones."""

    def __init__(self, kind: str, shape: tuple[int, ...], seed: int) -> None:
        self.kind, self.shape = kind, shape
        self.generator = torch.Generator().manual_seed(seed)
        self.phase = torch.arange(math.prod(shape)).view(shape) * 0x91E10DA5

    def __call__(self, step: int) -> Tensor | None:
        if self.kind == "nearest":
            return None
        if self.kind == "random":
            return torch.rand(self.shape, generator=self.generator)
        u = (self.phase + step * 0x9E3779B9 + mixed(step >> 8)) & 0xFFFFFFFF
        return (u >> 8) / 2.0**24


class Stored:
    """A moment as one candidate stores it: what is written is quantized."""

    def __init__(self, mapping: Map | None, kind: str, shape: tuple[int, ...], seed: int) -> None:
        self.mapping, self.rounding, self.value = mapping, Rounding(kind, shape, seed), torch.zeros(shape)

    def write(self, value: Tensor, step: int) -> None:
        self.value = self.mapping(value, self.rounding(step)) if self.mapping else value
