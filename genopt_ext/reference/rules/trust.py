"""Rules that step a tensor the further or the less far for what all of it comes to.

``total``: the sum of the squares of a tensor's elements, or in StableAdamW of themselves, in float64 and added up as a
norm is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...tracing import Number
from ..math import average_square, lerp, may_count, multiply_add, power, root, rounded, sqrt
from .adams import decays, moments
from .others import sgd_step
from .shared import Total, choose, less


def _trust(a: Number, b: Number, ratio: Number) -> Number:
    return choose((a > 0) & (b > 0), ratio, 1.0)


def lars(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    total: Total,
    lr: Number,
    momentum: Number,
    dampening: Number,
    weight_decay: Number,
    nesterov: bool,
    trust_coeff: Number,
    eps: Number,
    trust_clip: bool,
    always_adapt: bool,
    maximize: bool,
) -> Tensor:
    """LARS: ``csrc/rules/lars.h``."""
    l2 = rounded(weight_decay, p)
    if maximize:
        g = -g
    ratio: Number = 1.0
    if always_adapt or may_count(weight_decay):
        p_norm, g_norm = root(total(p)), root(total(g))
        denominator = g_norm + p_norm * l2 + rounded(eps, p)
        trust = rounded(trust_coeff, p) * p_norm / choose(denominator == 0, 1.0, denominator)
        ratio = _trust(p_norm, g_norm, trust)
        if trust_clip and may_count(lr):
            ratio = ratio / rounded(lr, p)
            ratio = choose(ratio > 1.0, 1.0, ratio)
    g = multiply_add(l2, p, g) if may_count(l2) else g
    return sgd_step(p, g * rounded(ratio, p), state, lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov)


def lamb(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    total: Total,
    lr: Number,
    bias_correction: bool,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    grad_averaging: bool,
    trust_clip: bool,
    always_adapt: bool,
    decoupled_decay: bool,
    maximize: bool,
) -> Tensor:
    """LAMB: ``csrc/rules/lamb.h``."""
    correction = root(1.0 - power(beta2, t)) if bias_correction else 1.0
    scale = correction / (1.0 - power(beta1, t)) if bias_correction else 1.0
    rate, (l2, decay) = rounded(lr, p), decays(p, lr, weight_decay, decoupled_decay)
    g = -g if maximize else g
    before = state["exp_avg"]
    m, v = moments(p, g, state, beta1, beta2)
    if not grad_averaging and may_count(beta1):
        m = state["exp_avg"] = before * rounded(beta1, p) + g
    u = m * rounded(scale, p) / (sqrt(v) + rounded(eps * correction, p))
    u = u + p * l2 if may_count(l2) else u
    if always_adapt or may_count(weight_decay):
        p_norm, u_norm = root(total(p - p * decay if may_count(decay) else p)), root(total(u))
        ratio = _trust(p_norm, u_norm, p_norm / choose(u_norm == 0, 1.0, u_norm))
        if trust_clip:
            ratio = choose(ratio > 1.0, 1.0, ratio)
        rate = rounded(rate * ratio, p)
    return less(p, u * rate, decay)


def stable_adamw(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    total: Total,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    maximize: bool,
) -> Tensor:
    """StableAdamW: ``csrc/rules/stable_adamw.h``."""
    rate, decay, least = rounded(lr, p), rounded(lr * weight_decay, p), rounded(eps, p)
    g = -g if maximize else g
    m_weight, v_weight = ((1.0 - beta) / (1.0 - power(beta, t)) for beta in (beta1, beta2))
    m = state["exp_avg"] = lerp(state["exp_avg"], g, rounded(m_weight, p))
    v = state["exp_avg_sq"] = average_square(state["exp_avg_sq"], g, rounded(v_weight, p))
    square = torch.where(v > (floor := rounded(eps * eps, p)), v, floor)
    excess = root(total.mean(torch.where(square > 0, g * g / square, 0.0)))
    excess = choose(excess > 1.0, excess, 1.0)
    return less(p, m * rounded(rate / excess, p) / (sqrt(v) + least), rounded(decay / excess, p))
