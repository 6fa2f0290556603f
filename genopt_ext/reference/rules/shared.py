"""What several rules do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...tracing import Number
from ..math import may_count, rounded


@dataclass(frozen=True)
class Total:
    """Adds up what elements of a parameter share. ``count``: how many it has, wherever they are."""

    add_up: Callable[[Tensor], Number]
    count: int

    def __call__(self, x: Tensor) -> Number:
        return self.add_up(x)

    def mean(self, x: Tensor) -> Number:
        return self.add_up(x) / max(self.count, 1)


def choose(condition: bool | Tensor, a: Any, b: Any) -> Any:
    """``a`` where the condition holds, else ``b``: numbers or tensors."""
    if not isinstance(condition, Tensor):
        return a if condition else b
    return torch.where(condition, a, b)


def with_penalty(g: Tensor, p: Tensor, l2: Number, maximize: bool) -> Tensor:
    """The gradient, negated to maximize, with the L2 penalty's."""
    g = -g if maximize else g
    return g + p * l2 if may_count(l2) else g


def less(p: Tensor, u: Tensor, decay: Number, cautious: str | None = None) -> Tensor:
    """The parameter less its update and decoupled decay, in one subtraction."""
    if not may_count(decay):
        return p - u
    decayed = p * decay + u
    return p - (torch.where(u * p < 0, u, decayed) if cautious == "weight_decay" else decayed)


def with_caution(u: Tensor, x: Tensor, g: Tensor, total: Total) -> Tensor:
    """An update that is 0 where ``x`` and the gradient have not the same sign, and larger by that elsewhere."""
    moves = torch.where(g > 0, x, torch.where(g < 0, -x, 0.0)) > 0
    mean = total.mean(moves.to(u.dtype))
    gain = rounded(1.0 / choose(mean > 1e-3, mean, 1e-3), u)
    return torch.where(moves, u * gain, u * 0.0)  # NaN stays NaN
