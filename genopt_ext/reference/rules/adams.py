"""Adam and its kin: rules that divide by the root of an average of squares, one for each element."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...tracing import Number
from ..math import (
    average_square,
    exponential,
    is_unset,
    lerp,
    logarithm,
    may_count,
    power,
    root,
    rounded,
    sqrt,
)
from .shared import Total, less, with_caution, with_penalty


def moments(p: Tensor, g: Tensor, state: dict[str, Tensor], beta1: Number, beta2: Number) -> tuple[Tensor, Tensor]:
    """The averages of the gradient and of its square, with ``g`` in them."""
    m = state["exp_avg"] = lerp(state["exp_avg"], g, rounded(1.0 - beta1, p))
    v = state["exp_avg_sq"] = average_square(state["exp_avg_sq"], g, rounded(1.0 - beta2, p))
    return m, v


def decays(p: Tensor, lr: Number, weight_decay: Number, decoupled: bool) -> tuple[Number, Number]:
    """Weight decay as an L2 penalty, and as decoupled decay: one of both is 0."""
    return rounded(0.0 if decoupled else weight_decay, p), rounded(lr * weight_decay if decoupled else 0.0, p)


def adam(
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
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
    cautious: str | None = None,
) -> Tensor:
    """Adam, AdamW and AMSGrad: ``csrc/rules/adam.h``."""
    correction = root(1.0 - power(beta2, t))
    rate = rounded(lr * correction / (1.0 - power(beta1, t)), p)
    l2, decay = decays(p, lr, weight_decay, decoupled_weight_decay)
    g = with_penalty(g, p, l2, maximize)
    m, v = moments(p, g, state, beta1, beta2)
    if amsgrad:
        v = state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], v)
    u = m * rate / (sqrt(v) + rounded(eps * correction, p))
    if cautious == "update":
        u = with_caution(u, m, g, total)
    return less(p, u, decay, cautious)


def adamax(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    maximize: bool,
) -> Tensor:
    """Adamax: ``csrc/rules/adamax.h``."""
    l2 = rounded(weight_decay, p)
    g = with_penalty(g, p, l2, maximize)
    m = state["exp_avg"] = lerp(state["exp_avg"], g, rounded(1.0 - beta1, p))
    u = state["exp_inf"] = torch.maximum(state["exp_inf"] * rounded(beta2, p), g.abs() + rounded(eps, p))
    return p - m * rounded(lr / (1.0 - power(beta1, t)), p) / u


def rectification(beta2: Number, t: Number) -> tuple[Number, Number, Callable[[], Number]]:
    """Of RAdam (arXiv 1908.03265): ``1 - beta2^t``, the length of the average, and the ratio of variances, above 4."""
    beta2_t = power(beta2, t)
    correction2 = 1.0 - beta2_t
    longest = 2.0 / (1.0 - beta2) - 1.0
    length = longest - 2.0 * t * beta2_t / correction2
    return (
        correction2,
        length,
        lambda: (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length),
    )


def radam(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    maximize: bool,
    decoupled_weight_decay: bool,
) -> Tensor:
    """RAdam: ``csrc/rules/radam.h``."""
    correction2, length, ratio = rectification(beta2, t)
    plain = lr / (1.0 - power(beta1, t))
    l2, decay = decays(p, lr, weight_decay, decoupled_weight_decay)
    g = with_penalty(g, p, l2, maximize)
    m, v = moments(p, g, state, beta1, beta2)

    def rectified() -> Tensor:
        return m * rounded(plain * (root(correction2) * root(ratio())), p) / (sqrt(v) + rounded(eps, p))

    if isinstance(length, Tensor):
        u = torch.where(length > 5.0, rectified(), m * rounded(plain, p))
    else:
        u = rectified() if length > 5.0 else m * rounded(plain, p)
    return less(p, u, decay)


def nadam(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    running: dict[str, Number],
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    momentum_decay: Number,
    maximize: bool,
    decoupled_weight_decay: bool,
) -> Tensor:
    """NAdam: ``csrc/rules/nadam.h``."""

    def momentum(t: Number) -> Number:
        return beta1 * (1.0 - 0.5 * exponential(t * momentum_decay * -0.040821994520255166))

    correction = root(1.0 - power(beta2, t))
    mu, following = momentum(t), momentum(t + 1.0)
    product = running["mu_product"] = running["mu_product"] * mu
    of_gradient = rounded(lr * correction * (1.0 - mu) / (1.0 - product), p)
    of_average = rounded(lr * correction * following / (1.0 - product * following), p)
    l2, decay = decays(p, lr, weight_decay, decoupled_weight_decay)
    g = with_penalty(g, p, l2, maximize)
    m, v = moments(p, g, state, beta1, beta2)
    u = (g * of_gradient + m * of_average) / (sqrt(v) + rounded(eps * correction, p))
    return less(p, u, decay)


def ademamix(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    lr: Number,
    beta1: Number,
    beta2: Number,
    beta3: Number,
    alpha: Number,
    beta3_warmup: Number | None,
    alpha_warmup: Number | None,
    eps: Number,
    weight_decay: Number,
    maximize: bool,
) -> Tensor:
    """AdEMAMix: ``csrc/rules/ademamix.h``."""

    def half_life(beta: Number) -> Number:
        return logarithm(0.5) / logarithm(beta + 1e-8)

    def beta3_of(part: Number) -> Number:
        between = (1.0 - part) * half_life(beta1) + part * half_life(beta3)
        return exponential(logarithm(0.5) / between)

    correction = root(1.0 - power(beta2, t))
    alpha = warmed_up(t, alpha_warmup, lambda part: part * alpha, alpha)
    slow = 1.0 - warmed_up(t, beta3_warmup, beta3_of, beta3)
    decay = rounded(lr * weight_decay, p)
    if maximize:
        g = -g
    fast = g
    if "exp_avg_fast" in state:
        fast = state["exp_avg_fast"] = lerp(state["exp_avg_fast"], g, rounded(1.0 - beta1, p))
    m = state["exp_avg_slow"] = lerp(state["exp_avg_slow"], g, rounded(slow, p))
    v = state["exp_avg_sq"] = average_square(state["exp_avg_sq"], g, rounded(1.0 - beta2, p))
    m = fast * rounded(lr * correction / (1.0 - power(beta1, t)), p) + m * rounded(lr * alpha * correction, p)
    u = m / (sqrt(v) + rounded(eps * correction, p))
    return less(p, u, decay)


def warmed_up(t: Number, steps: Number | None, at: Callable[[Number], Number], end: Number) -> Number:
    """``at(t / steps)`` for the first ``steps``, ``end`` after them or without."""
    if steps is None:
        return end
    if isinstance(t, Tensor) or isinstance(steps, Tensor):
        return torch.where(torch.as_tensor(t < steps), at(t / steps), end)
    return at(t / steps) if t < steps else end


def adopt(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    decouple: bool,
    clip_exponent: Number | None,
    maximize: bool,
) -> Tensor:
    """ADOPT: ``csrc/rules/adopt.h``."""

    def by_step(first: Number, later: Callable[[], Number]) -> Number:
        if isinstance(t, Tensor):
            return torch.where(t <= 1.0, first, later())
        return first if t <= 1.0 else later()

    limit = by_step(0.0, lambda: math.inf if clip_exponent is None else exponential(clip_exponent * logarithm(t - 1.0)))
    limit = torch.as_tensor(rounded(limit, p), dtype=p.dtype, device=p.device)
    l2, decay = decays(p, lr, weight_decay, decouple)
    g = with_penalty(g, p, l2, maximize)
    v = state["exp_avg_sq"]
    n = g / torch.maximum(sqrt(v), torch.as_tensor(rounded(eps, p), dtype=p.dtype, device=p.device))
    m = state["exp_avg"] = lerp(state["exp_avg"], n.clamp(-limit, limit), rounded(1.0 - beta1, p))
    state["exp_avg_sq"] = average_square(v, g, rounded(by_step(1.0, lambda: 1.0 - beta2), p))
    return less(p, m * rounded(lr, p), by_step(0.0, lambda: decay))


def adan(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    lr: Number,
    beta1: Number,
    beta2: Number,
    beta3: Number,
    eps: Number,
    weight_decay: Number,
    no_prox: bool,
    maximize: bool,
) -> Tensor:
    """Adan: ``csrc/rules/adan.h``."""
    correction, decay = root(1.0 - power(beta3, t)), lr * weight_decay
    of_average = rounded(lr * correction / (1.0 - power(beta1, t)), p)
    of_differences = rounded(lr * beta2 * correction / (1.0 - power(beta2, t)), p)
    decay = rounded(decay if no_prox else decay / (1.0 + decay), p)
    if maximize:
        g = -g
    last = state["neg_pre_grad"]
    difference = torch.where(is_unset(last), 0.0, g + last)
    m = state["exp_avg"] = lerp(state["exp_avg"], g, rounded(1.0 - beta1, p))
    d = state["exp_avg_diff"] = lerp(state["exp_avg_diff"], difference, rounded(1.0 - beta2, p))
    ahead = g + difference * rounded(beta2, p)
    v = state["exp_avg_sq"] = average_square(state["exp_avg_sq"], ahead, rounded(1.0 - beta3, p))
    u = (m * of_average + d * of_differences) / (sqrt(v) + rounded(eps * correction, p))
    state["neg_pre_grad"] = 0.0 - g
    if may_count(decay):
        u = (p if no_prox else p - u) * decay + u
    return p - u
