"""Norms, added up in the order that "Norms" in ``csrc/README.md`` spells out."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import tracing
from .math import real

_TILE, _SPAN, _SUMS = 256, 32, 32

Join = Callable[[Tensor, Tensor], Tensor]
Of = Callable[[Tensor], Tensor]


def join_of(norm: float) -> Join:
    """How two parts of a ``norm``-norm's sum make one."""
    return torch.maximum if norm == math.inf else torch.add


def _by_halves(x: Tensor, join: Join) -> Tensor:
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = join(x.narrow(-1, 0, half), x.narrow(-1, half, half))
    return x.select(-1, 0)


def _in_turn(x: Tensor, join: Join) -> Tensor:
    total = x.select(-2, 0)
    for i in range(1, x.shape[-2]):
        total = join(total, x.select(-2, i))
    return total


def join(sums: Tensor) -> Tensor:
    """The sum over the last dimension, in the order in which a norm's parts are added up."""
    return _by_halves(_in_turn(_padded(sums, _SUMS).unflatten(-1, (-1, _SUMS)), torch.add), torch.add)


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
    across = join(_by_halves(_in_turn(panels, torch.add), torch.add))
    bands = _padded(squares.mT, band).mT.unflatten(-2, (-1, band)) if rows > band else squares.unsqueeze(-3)
    down = join(_in_turn(bands, torch.add).mT)
    return (across / columns).unsqueeze(-1), (down / rows).unsqueeze(-2)


def mean_of_rows(of_rows: Tensor) -> Tensor:
    """Of what matrices have of each row, in float64."""
    if tracing.is_subclass(of_rows):
        return of_rows.double().mean(-2, keepdim=True)
    rows = of_rows.shape[-2]
    together = _padded(of_rows.squeeze(-1).double(), _SUMS).unflatten(-1, (-1, _SUMS))
    return (join(_by_halves(together, torch.add)) / rows)[..., None, None]


def _padded(x: Tensor, multiple: int) -> Tensor:
    size = x.shape[-1]
    return torch.nn.functional.pad(x, (0, -size % multiple)) if size else x.new_zeros((*x.shape[:-1], multiple))


def _of_subclass(x: Tensor, of: Of, join: Join) -> Tensor:
    """In the subclass's own order of additions: DTensor adds over all devices."""
    values = of(x.double())
    total = values.max() if join is torch.maximum else values.sum()
    if hasattr(total, "full_tensor"):
        whole: Tensor = total.full_tensor()
        return whole
    return torch.tensor(total.item(), dtype=torch.float64, device=x.device)


@torch.no_grad()
def measure(x: Tensor, like: Tensor, norm: float = 2.0) -> Tensor:
    """The sum of squares of ``x`` (``norm`` 2), of absolute values (1) or their maximum (infinity), in float64.

    Args:
        x: of any floating-point or complex dtype; a complex number counts as two.
        like: the parameter in whose order in memory the elements are taken.
        norm: 2, 1 or infinity.
    """
    return _joined(x, like, torch.square if norm == 2 else torch.abs, join_of(norm))


@torch.no_grad()
def total(x: Tensor, like: Tensor) -> Tensor:
    """The sum of ``x``, in float64 and the order of a norm."""
    return _joined(x, like, lambda values: values, torch.add)


def _joined(x: Tensor, like: Tensor, of: Of, join: Join) -> Tensor:
    if tracing.is_subclass(x):
        return _of_subclass(x, of, join)
    strides = [*like.stride(), 0] if like.is_complex() else like.stride()
    order = sorted(range(len(strides)), key=lambda d: -strides[d])
    if x.is_complex():
        x = x.resolve_conj()
    values = of(real(x).permute(order).reshape(-1).double())
    tiles = _padded(values, _SPAN * _TILE).view(-1, _SPAN, _TILE)
    spans = _by_halves(_in_turn(tiles, join), join)
    return _by_halves(_in_turn(_padded(spans, _SUMS).view(-1, _SUMS), join), join)
