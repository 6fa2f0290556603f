"""Norms and totals, added up as "Norms" in ``csrc/README.md`` spells out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import binned, tracing
from .math import real

_TILE, _SUMS = 256, 32


def _by_halves(x: Tensor) -> Tensor:
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x.narrow(-1, 0, half) + x.narrow(-1, half, half)
    return x.select(-1, 0)


def _in_turn(x: Tensor) -> Tensor:
    total = x.select(-2, 0)
    for i in range(1, x.shape[-2]):
        total = total + x.select(-2, i)
    return total


def join(sums: Tensor) -> Tensor:
    """The sum over the last dimension, in the order in which norms of rows are added up."""
    return _by_halves(_in_turn(_padded(sums, _SUMS).unflatten(-1, (-1, _SUMS))))


_BAND, _PIECES = 64, 1024  # of Matrices in csrc/plan/matrices.h


def mean_squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row and of each column of the matrices in the last two dimensions of ``x``, in float64."""
    if tracing.is_subclass(x):  # in its own order of additions
        squares = x.double().square()
        return squares.mean(-1, keepdim=True), squares.mean(-2, keepdim=True)
    *_, rows, columns = x.shape
    squares = x.double().square()
    band = _BAND * -(-rows * -(-columns // _TILE) // (_BAND * _PIECES))
    panels = _padded(squares, _TILE).unflatten(-1, (-1, _TILE // _SUMS, _SUMS))
    across = join(_by_halves(_in_turn(panels)))
    bands = _padded(squares.mT, band).mT.unflatten(-2, (-1, band)) if rows > band else squares.unsqueeze(-3)
    down = join(_in_turn(bands).mT)
    return (across / columns).unsqueeze(-1), (down / rows).unsqueeze(-2)


def mean_of_rows(of_rows: Tensor) -> Tensor:
    """Of what matrices have of each row, in float64."""
    if tracing.is_subclass(of_rows):
        return of_rows.double().mean(-2, keepdim=True)
    rows = of_rows.shape[-2]
    together = _padded(of_rows.squeeze(-1).double(), _SUMS).unflatten(-1, (-1, _SUMS))
    return (join(_by_halves(together)) / rows)[..., None, None]


def _padded(x: Tensor, multiple: int) -> Tensor:
    size = x.shape[-1]
    return torch.nn.functional.pad(x, (0, -size % multiple)) if size else x.new_zeros((*x.shape[:-1], multiple))


@torch.no_grad()
def measure(x: Tensor, norm: float = 2.0) -> Tensor:
    """What a ``norm``-norm of ``x`` is made of, as words of :mod:`genopt_ext.binned`.

    Args:
        x: of any floating-point or complex dtype; a complex number counts as two.
        norm: 2, 1 or infinity: squares are added up, absolute values, or their maximum is found.
    """
    values = real(x.resolve_conj() if x.is_complex() else x).double()
    values = values.square() if norm == 2 else values.abs()
    if tracing.is_subclass(x):  # in its own order of additions
        values = _whole(values.max() if norm == math.inf else values.sum()).reshape(1)
    return binned.maximum(values) if norm == math.inf else binned.total(values)


@torch.no_grad()
def total(x: Tensor, squares: bool) -> Tensor:
    """What a rule needs the sum of for its totals, or the sum of its squares, as words of :mod:`genopt_ext.binned`.

    Args:
        x: real.
    """
    values = x.double().square() if squares else x.double()
    return binned.total(_whole(values.sum()).reshape(1) if tracing.is_subclass(x) else values)


def _whole(total: Tensor) -> Tensor:
    """Of a number that operations of a subclass made: DTensor adds over all devices."""
    if hasattr(total, "full_tensor"):
        whole: Tensor = total.full_tensor()
        return whole
    return torch.tensor(total.item(), dtype=torch.float64, device=total.device)
