"""What a step leaves in the gradients, in torch operations: ``Gradients`` in ``csrc/plan/plan.h``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference


def _elements(g: Tensor) -> Tensor:
    """Each element in memory once, also where they share it, as after ``expand()``."""
    strides = g.stride()
    return g[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)] if 0 in strides else g


def zero_(grads: Sequence[Tensor]) -> None:
    for g in grads:
        _elements(g).zero_()


def unscale_(grads: Sequence[Tensor], loss_scale: Tensor, skips: Sequence[Tensor] = ()) -> None:
    """Takes a loss scale off gradients: once also where they share memory, and not where one of ``skips`` is not 0."""
    elements = [_elements(g) for g in grads]
    factor = reciprocal(loss_scale)
    skipped = [skip.to(loss_scale.device) != 0 for skip in skips]
    keeps = torch.stack(skipped).any() if skipped else None
    # All before the first is written.
    unscaled = [_unscaled(g, factor) for g in elements]
    for g, new in zip(elements, unscaled, strict=True):
        g.copy_(new if keeps is None else torch.where(keeps.to(g.device), g, new))


def reciprocal(loss_scale: Tensor) -> Tensor:
    """In float64, and rounded to float32 as torch does."""
    return loss_scale.double().reciprocal().float().double()


def _unscaled(g: Tensor, factor: Tensor) -> Tensor:
    if g.is_complex():
        return torch.view_as_complex(_unscaled(torch.view_as_real(g.resolve_conj()), factor))
    compute = reference.compute_dtype(g)
    return (g.to(compute) * factor.to(device=g.device, dtype=compute)).to(g.dtype)
