"""Prodigy, which steps all tensors by one estimate of the distance to the solution: ``csrc/rules/prodigy.h``.

``shared``: the numbers of all tensors, ``d``, ``d_max``, ``d_numerator`` and ``k``. ``totals``: what
:func:`prodigy_shares` of all tensors come to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...tracing import Number
from ..math import average_square, lerp, power, root, rounded, sqrt
from .adams import decays
from .shared import choose, less, with_penalty


@dataclass
class _Scalars:
    d: Number
    beta3: Number
    s_rate: Number
    n_rate: Number
    rate: Number
    l2: Number
    decay: Number

    def next(self, s: Tensor, g: Tensor) -> Tensor:
        return s * self.beta3 + g * self.s_rate


def _scalars(
    p: Tensor,
    shared: dict[str, Number],
    *,
    lr: Number,
    beta1: Number,
    beta2: Number,
    beta3: Number | None,
    weight_decay: Number,
    decouple: bool,
    use_bias_correction: bool,
    safeguard_warmup: bool,
    d0: Number,
    **_: Any,  # those of the estimate
) -> _Scalars:
    d, k = shared["d"], shared["k"] + 1.0
    correction = root(1.0 - power(beta2, k)) / (1.0 - power(beta1, k)) if use_bias_correction else 1.0
    c, ratio = d * lr * correction, d / d0
    l2, decay = decays(p, c, weight_decay, decouple)
    return _Scalars(
        d=rounded(d, p),
        beta3=rounded(_beta3(beta2, beta3), p),
        s_rate=rounded(ratio * (d if safeguard_warmup else c), p),
        n_rate=rounded(ratio * c, p),
        rate=rounded(c, p),
        l2=l2,
        decay=decay,
    )


def _beta3(beta2: Number, beta3: Number | None) -> Number:
    return root(beta2) if beta3 is None else beta3


def prodigy_shares(
    p: Tensor, g: Tensor, state: dict[str, Tensor], *, shared: dict[str, Number], maximize: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """What each element adds to the numerator and to the denominator of the estimate; ``options``: of the rule."""
    scalars = _scalars(p, shared, **options)
    g, rests, zero = with_penalty(g, p, scalars.l2, maximize), scalars.n_rate == 0, torch.zeros_like(p)
    along = (g * scalars.n_rate) * (state["p0"] - p)
    return choose(rests, zero, along), choose(rests, zero, scalars.next(state["s"], g).abs())


def prodigy(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    shared: dict[str, Number],
    totals: Sequence[Number],
    lr: Number,
    beta1: Number,
    beta2: Number,
    beta3: Number | None,
    eps: Number,
    weight_decay: Number,
    decouple: bool,
    use_bias_correction: bool,
    safeguard_warmup: bool,
    d0: Number,
    d_coef: Number,
    growth_rate: Number,
    maximize: bool,
) -> Tensor:
    """Prodigy: ``csrc/rules/prodigy.h``."""
    scalars = _scalars(
        p,
        shared,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        beta3=beta3,
        weight_decay=weight_decay,
        decouple=decouple,
        use_bias_correction=use_bias_correction,
        safeguard_warmup=safeguard_warmup,
        d0=d0,
    )
    begun = totals[1] != 0
    rate, decay = choose(begun, scalars.rate, 0.0), choose(begun, scalars.decay, 0.0)
    _advance(shared, totals, _beta3(beta2, beta3), d0=d0, d_coef=d_coef, growth_rate=growth_rate)
    g, rests = with_penalty(g, p, scalars.l2, maximize), scalars.n_rate == 0
    scaled, s, v = g * scalars.d, state["s"], state["exp_avg_sq"]
    state["s"] = choose(rests, s, scalars.next(s, g))
    v = state["exp_avg_sq"] = choose(rests, v, average_square(v, scaled, rounded(1.0 - beta2, p)))
    u = g
    if "exp_avg" in state:
        m = state["exp_avg"]
        u = state["exp_avg"] = choose(rests, m, lerp(m, scaled, rounded(1.0 - beta1, p)))
    else:
        rate = choose(begun, rounded(rate * shared["d"], p), 0.0)
    u = u * rate / (sqrt(v) + rounded(shared["d"] * eps, p))
    return choose(rests, p, less(p, u, decay))


def _advance(
    shared: dict[str, Number],
    totals: Sequence[Number],
    beta3: Number,
    *,
    d0: Number,
    d_coef: Number,
    growth_rate: Number,
) -> None:
    """Advances the numbers of all tensors, where there has been a gradient."""
    begun, d, highest = totals[1] != 0, shared["d"], shared["d_max"]
    numerator = beta3 * shared["d_numerator"] + totals[0]
    estimate = d_coef * numerator / choose(begun, totals[1], 1.0)
    first = choose(d == d0, choose(estimate > d, estimate, d), d)
    most = choose(estimate > highest, estimate, highest)
    grown = first * growth_rate
    new = {"d": choose(grown < most, grown, most), "d_max": most, "d_numerator": numerator, "k": shared["k"] + 1.0}
    for name, number in new.items():
        shared[name] = choose(begun, number, shared[name])
