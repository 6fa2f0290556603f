"""The rules, one function each, in the order of operations of ``csrc/rules/*.h``, so that both give the same bits.

``p``, ``g`` and the state tensors are real and of the compute dtype (float32, or float64 for float64 parameters). A
function writes the new states into ``state`` and returns the new parameter. Its keyword arguments are the options of
``struct Options`` there, and ``t``, the step count. ``running``: states that are one number each, which it advances.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..tracing import Number
from .math import (
    average_square,
    exponential,
    is_unset,
    lerp,
    logarithm,
    may_count,
    multiply_add,
    power,
    root,
    rounded,
    scaled_add,
    sqrt,
)


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


def adam(
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
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
    cautious: str | None,
) -> Tensor:
    """Adam, AdamW and AMSGrad: ``csrc/rules/adam.h``."""
    correction = root(1.0 - power(beta2, t))
    rate = rounded(lr * correction / (1.0 - power(beta1, t)), p)
    l2 = rounded(0.0 if decoupled_weight_decay else weight_decay, p)
    decay = rounded(lr * weight_decay if decoupled_weight_decay else 0.0, p)
    g = with_penalty(g, p, l2, maximize)
    m = state["exp_avg"] = lerp(state["exp_avg"], g, rounded(1.0 - beta1, p))
    v = state["exp_avg_sq"] = average_square(state["exp_avg_sq"], g, rounded(1.0 - beta2, p))
    if amsgrad:
        v = state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], v)
    u = m * rate / (sqrt(v) + rounded(eps * correction, p))
    return less(p, u, decay, cautious)


def sgd(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    lr: Number,
    momentum: Number,
    dampening: Number,
    weight_decay: Number,
    nesterov: bool,
    maximize: bool,
) -> Tensor:
    """SGD with momentum, dampening and Nesterov momentum: ``csrc/rules/sgd.h``."""
    l2 = rounded(weight_decay, p)
    if maximize:
        g = -g
    if may_count(l2):
        g = multiply_add(l2, p, g)
    if "momentum_buffer" in state:
        old = state["momentum_buffer"]
        b = torch.where(is_unset(old), g, scaled_add(momentum, old, g * rounded(1.0 - dampening, p))) + 0.0
        state["momentum_buffer"] = b
        g = multiply_add(rounded(momentum, p), b, g) if nesterov else b
    return multiply_add(-rounded(lr, p), g, p)


def rmsprop(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    lr: Number,
    alpha: Number,
    eps: Number,
    weight_decay: Number,
    momentum: Number,
    centered: bool,
    maximize: bool,
) -> Tensor:
    """RMSprop, centered and with momentum: ``csrc/rules/rmsprop.h``."""
    l2, weight = rounded(weight_decay, p), rounded(1.0 - alpha, p)
    g = with_penalty(g, p, l2, maximize)
    s = variance = state["square_avg"] = average_square(state["square_avg"], g, weight)
    if centered:
        c = state["grad_avg"] = lerp(state["grad_avg"], g, weight)
        variance = torch.maximum(s - c * c, s * torch.finfo(s.dtype).eps)
    u = g / (sqrt(variance) + rounded(eps, p))
    if "momentum_buffer" in state:
        b = state["momentum_buffer"] = state["momentum_buffer"] * rounded(momentum, p) + u
        return multiply_add(-rounded(lr, p), b, p)
    return p - u * rounded(lr, p)


def adagrad(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    lr: Number,
    lr_decay: Number,
    eps: Number,
    weight_decay: Number,
    maximize: bool,
) -> Tensor:
    """Adagrad: ``csrc/rules/adagrad.h``."""
    l2 = rounded(weight_decay, p)
    g = with_penalty(g, p, l2, maximize)
    s = state["sum"] = state["sum"] + g * g
    return p - g / (sqrt(s) + rounded(eps, p)) * rounded(lr / (1.0 + (t - 1.0) * lr_decay), p)


def lion(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    lr: Number,
    beta1: Number,
    beta2: Number,
    weight_decay: Number,
    maximize: bool,
    cautious: str | None,
) -> Tensor:
    """Lion: ``csrc/rules/lion.h``."""
    rate, decay = rounded(lr, p), rounded(lr * weight_decay, p)
    if maximize:
        g = -g
    u = lerp(state["exp_avg"], g, rounded(1.0 - beta1, p))
    step = torch.where(u > 0, rate, torch.where(u < 0, -rate, u))
    p = less(p, step, decay, cautious)
    state["exp_avg"] = lerp(state["exp_avg"], g, rounded(1.0 - beta2, p))
    return p


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


def adadelta(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    lr: Number,
    rho: Number,
    eps: Number,
    weight_decay: Number,
    maximize: bool,
) -> Tensor:
    """Adadelta: ``csrc/rules/adadelta.h``."""
    l2, weight, small = rounded(weight_decay, p), rounded(1.0 - rho, p), rounded(eps, p)
    g = with_penalty(g, p, l2, maximize)
    s = state["square_avg"] = average_square(state["square_avg"], g, weight)
    d = sqrt(state["acc_delta"] + small) / sqrt(s + small) * g
    state["acc_delta"] = average_square(state["acc_delta"], d, weight)
    return p - d * rounded(lr, p)


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
    beta2_t = power(beta2, t)
    correction2 = 1.0 - beta2_t
    longest = 2.0 / (1.0 - beta2) - 1.0
    length = longest - 2.0 * t * beta2_t / correction2
    plain = lr / (1.0 - power(beta1, t))
    l2 = rounded(0.0 if decoupled_weight_decay else weight_decay, p)
    decay = rounded(lr * weight_decay if decoupled_weight_decay else 0.0, p)
    g = with_penalty(g, p, l2, maximize)
    m = state["exp_avg"] = lerp(state["exp_avg"], g, rounded(1.0 - beta1, p))
    v = state["exp_avg_sq"] = average_square(state["exp_avg_sq"], g, rounded(1.0 - beta2, p))

    def rectified() -> Tensor:
        ratio = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length)
        return m * rounded(plain * (root(correction2) * root(ratio)), p) / (sqrt(v) + rounded(eps, p))

    if isinstance(length, Tensor):
        u = torch.where(length > 5.0, rectified(), m * rounded(plain, p))
    else:
        u = rectified() if length > 5.0 else m * rounded(plain, p)
    return less(p, u, decay)


def rprop(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    etaminus: Number,
    etaplus: Number,
    step_size_min: Number,
    step_size_max: Number,
    maximize: bool,
) -> Tensor:
    """Rprop: ``csrc/rules/rprop.h``."""
    if maximize:
        g = -g
    agreement = g * state["prev"]
    factor = torch.where(agreement > 0, rounded(etaplus, p), torch.ones_like(p))
    factor = torch.where(agreement < 0, rounded(etaminus, p), factor)
    least, most = (
        torch.as_tensor(rounded(x, p), dtype=p.dtype, device=p.device) for x in (step_size_min, step_size_max)
    )
    s = state["step_size"] = (state["step_size"] * factor).clamp(least, most)
    g = state["prev"] = torch.where(agreement < 0, 0.0, g)
    return p - g.sign() * s


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
    l2 = rounded(0.0 if decoupled_weight_decay else weight_decay, p)
    decay = rounded(lr * weight_decay if decoupled_weight_decay else 0.0, p)
    g = with_penalty(g, p, l2, maximize)
    m = state["exp_avg"] = lerp(state["exp_avg"], g, rounded(1.0 - beta1, p))
    v = state["exp_avg_sq"] = average_square(state["exp_avg_sq"], g, rounded(1.0 - beta2, p))
    u = (g * of_gradient + m * of_average) / (sqrt(v) + rounded(eps * correction, p))
    return less(p, u, decay)


def asgd(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    running: dict[str, Number],
    lr: Number,
    lambd: Number,
    alpha: Number,
    t0: Number,
    weight_decay: Number,
    maximize: bool,
) -> Tensor:
    """ASGD: ``csrc/rules/asgd.h``."""
    eta, mu, since = running["eta"], running["mu"], t - t0
    g = with_penalty(g, p, rounded(weight_decay, p), maximize)
    p = less(p, g * rounded(eta, p), rounded(lambd * eta, p))
    average = lerp(state["ax"], p, rounded(mu, p))
    if isinstance(mu, Tensor):
        state["ax"] = torch.where(mu == 1.0, p, average)
    else:
        state["ax"] = p.clone() if mu == 1.0 else average
    running["eta"] = lr * exponential(-alpha * logarithm(1.0 + lambd * lr * t))
    running["mu"] = 1.0 / (since.clamp(min=1.0) if isinstance(since, Tensor) else max(since, 1.0))
    return p


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
    g = with_penalty(g, p, rounded(0.0 if decouple else weight_decay, p), maximize)
    v = state["exp_avg_sq"]
    n = g / torch.maximum(sqrt(v), torch.as_tensor(rounded(eps, p), dtype=p.dtype, device=p.device))
    m = state["exp_avg"] = lerp(state["exp_avg"], n.clamp(-limit, limit), rounded(1.0 - beta1, p))
    state["exp_avg_sq"] = average_square(v, g, rounded(by_step(1.0, lambda: 1.0 - beta2), p))
    return less(p, m * rounded(lr, p), rounded(by_step(0.0, lambda: lr * weight_decay if decouple else 0.0), p))


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


def muon_momentum(
    p: Tensor, g: Tensor, state: dict[str, Tensor], *, t: Number, momentum: Number, nesterov: bool
) -> Tensor:
    """Muon's momentum, where ``p`` is the matrix that is made orthogonal next: ``csrc/rules/muon_momentum.h``."""
    b = state["momentum_buffer"] = lerp(state["momentum_buffer"], g, rounded(1.0 - momentum, p))
    return lerp(g, b, rounded(momentum, p)) if nesterov else b


def muon_update(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    lr: Number,
    shape_scale: Number,
    weight_decay: Number,
    cautious: str | None,
) -> Tensor:
    """Muon's update by an orthogonal ``g``: ``csrc/rules/muon_update.h``."""
    return less(p, g * rounded(lr * shape_scale, p), rounded(lr * weight_decay, p), cautious)


def warmed_up(t: Number, steps: Number | None, at: Callable[[Number], Number], end: Number) -> Number:
    """``at(t / steps)`` for the first ``steps``, ``end`` after them or without."""
    if steps is None:
        return end
    if isinstance(t, Tensor) or isinstance(steps, Tensor):
        return torch.where(torch.as_tensor(t < steps), at(t / steps), end)
    return at(t / steps) if t < steps else end


RULES: dict[str, Callable[..., Tensor]] = {
    rule.__name__: rule
    for rule in (
        adam,
        sgd,
        rmsprop,
        adagrad,
        lion,
        adamax,
        adadelta,
        radam,
        rprop,
        ademamix,
        nadam,
        asgd,
        adopt,
        adan,
        muon_momentum,
        muon_update,
    )
}
