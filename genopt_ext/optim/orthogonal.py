"""Matrices of one shape made orthogonal together, by Muon's Newton-Schulz iteration in bfloat16.

An iteration takes X to a X + (b A + c A^2) X, where A = X X^T. The singular vectors stay, and every singular value s
goes to a s + b s^3 + c s^5, which moves it towards 1. The products are torch's: the same bits on one device with one
number of matrices, and not across devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Coefficients = Sequence[tuple[float, float, float]]

# Of each iteration, for singular values from 1e-3 to 1 after division by the Frobenius norm, after Polar Express
# (Amsel et al., arXiv 2505.16932): the odd polynomial of degree 5 that is nearest to 1 where those before it have led,
# with 1 % to spare for the rounding of bfloat16. tests/test_muon.py finds them anew.
POLAR_EXPRESS = (
    (8.3864642, -24.369650, 17.725117),
    (4.1414200, -3.0172747, 0.55242734),
    (3.9226310, -2.8671852, 0.53565246),
    (3.2540458, -2.3922331, 0.48273343),
    (2.2512376, -1.5962911, 0.39599139),
    (1.8700160, -1.2279491, 0.35824484),
    (1.8564365, -1.2132386, 0.35679973),
    (1.875, -1.25, 0.375),
)

# Elements that one batched product takes on a CPU: more leave its caches. Measured on an AMD Zen 4 with 2 threads, from
# 32 x 32 on (bench/NOTES.md). A GPU takes all.
AT_ONCE = 1 << 19


# Up to this side, products of float32 take half the time on a CPU that those of bfloat16 do, and are more accurate.
SMALL_SIDE = 16


def dtype_of(rows: int, columns: int, device: torch.device) -> torch.dtype:
    """In which matrices of that size are multiplied."""
    is_small = min(rows, columns) <= SMALL_SIDE and device.type == "cpu"
    return torch.float32 if is_small else torch.bfloat16


def coefficients_of(given: Any, steps: int) -> Coefficients:
    """The coefficients of each of ``steps`` iterations, of a triple or ``"polar_express"``."""
    if given != "polar_express":
        a, b, c = given
        return [(float(a), float(b), float(c))] * steps
    return [POLAR_EXPRESS[min(i, len(POLAR_EXPRESS) - 1)] for i in range(steps)]


def orthogonalized(x: Tensor, coefficients: Coefficients, eps: float) -> Tensor:
    """``x``, of shape [matrices, rows, columns] and :func:`dtype_of`, made orthogonal; its own memory is written to."""
    at_once = max(1, AT_ONCE // max(1, x[0].numel())) if x.is_cpu else len(x)
    if at_once >= len(x):
        return _iterated(x, coefficients, eps)
    for some in x.split(at_once):
        some.copy_(_iterated(some, coefficients, eps))
    return x


def _iterated(x: Tensor, coefficients: Coefficients, eps: float) -> Tensor:
    x.div_(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_(min=eps))
    is_tall = x.shape[1] > x.shape[2]  # then A is X^T X, the smaller one
    for a, b, c in coefficients:
        gram = torch.bmm(x.mT, x) if is_tall else torch.bmm(x, x.mT)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, gram, beta=a) if is_tall else torch.baddbmm(x, gram, x, beta=a)
    return x
