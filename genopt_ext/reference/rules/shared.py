"""What several rules do."""

from __future__ import annotations

import torch
from torch import Tensor

from ...tracing import Number
from ..math import may_count


def with_penalty(g: Tensor, p: Tensor, l2: Number, maximize: bool) -> Tensor:
    """The gradient, negated to maximize, with the L2 penalty's."""
    g = -g if maximize else g
    return g + p * l2 if may_count(l2) else g


def less(p: Tensor, u: Tensor, decay: Number, cautious: str | None = None) -> Tensor:
    """The parameter less its update and decoupled decay, in one subtraction."""
    if not may_count(decay):
        return p - u
    decayed = p * decay + u
    return p - (decayed if cautious is None else torch.where(u * p < 0, u, decayed))
