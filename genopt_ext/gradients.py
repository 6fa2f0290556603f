"""What a step leaves in the gradients, in torch operations: ``Gradients`` in ``csrc/plan.h``."""

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


def unscale_(grads: Sequence[Tensor], factor: float | Tensor, skips: Tensor | None = None) -> None:
    """Takes a loss scale off gradients: once also where they share memory, and not where the step ``skips``.

    Args:
        grads: all of a step that may share memory.
        factor: what :func:`unscaling` gives.
        skips: 0-dim bool, or None: no.
    """
    elements = [_elements(g) for g in grads]
    unscaled = [_unscaled(g, factor) for g in elements]
    for g, new in zip(elements, unscaled, strict=True):
        g.copy_(new if skips is None else torch.where(skips.to(g.device), g, new))


def unscaling(loss_scale: Tensor) -> Tensor:
    """1 / loss scale, as float64: torch rounds it to float32."""
    return loss_scale.double().reciprocal().float().double()


def _unscaled(g: Tensor, factor: float | Tensor) -> Tensor:
    if g.is_complex():
        parts = _unscaled(torch.view_as_real(g.resolve_conj()), factor)
        return torch.view_as_complex(parts)
    wide = g.to(reference.compute_dtype(g))
    return (wide * (factor.to(wide) if isinstance(factor, Tensor) else factor)).to(g.dtype)
