"""Adafactor, which knows the squares of a matrix' gradients by row and by column: ``csrc/rules/adafactor.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...tracing import Number
from .. import norms
from ..math import average_square, finite, lerp, real_power, root, rounded, sqrt
from .shared import Total, choose, less


def adafactor(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    total: Total,
    lr: Number,
    beta2_decay: Number,
    eps1: Number,
    eps2: Number,
    d: Number,
    weight_decay: Number,
    maximize: bool,
) -> Tensor:
    """Adafactor: ``csrc/rules/adafactor.h``. Empty tensors are left as they are."""
    if total.count == 0:
        return p
    root_of_t = 1.0 / root(t)
    rho, weight = choose(lr < root_of_t, lr, root_of_t), rounded(real_power(t, beta2_decay), p)
    g = -g if maximize else g
    if "variance" in state:
        v = state["variance"] = average_square(state["variance"], g, weight)
    else:
        for name, mean in zip(("row_var", "col_var"), norms.mean_squares(g), strict=True):
            state[name] = lerp(finite(state[name]), finite(mean.to(p.dtype)), weight)
        mean = norms.mean_of_rows(state["row_var"]).to(p.dtype)
        least = rounded(eps1, p)
        divisor = torch.where(mean < least, least, mean)  # NaN stays NaN
        v = state["row_var"] / torch.where(divisor == 0, 1.0, divisor) * state["col_var"]
    floor = rounded(eps1, p)
    floor = rounded(floor * floor, p)
    square = torch.where(v < floor, floor, v)
    u = torch.where(square == 0, 0.0, g / sqrt(square))
    p_size, u_size = root(total.mean(p)), root(total.mean(u)) / d
    rate = rounded(rho * choose(p_size > eps2, p_size, eps2) / choose(u_size > 1.0, u_size, 1.0), p)
    return less(p, u * rate, rounded(lr * weight_decay, p))
