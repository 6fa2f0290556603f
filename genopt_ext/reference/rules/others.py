"""SGD, and all that are not of Adam's kind."""

from __future__ import annotations

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
    multiply_add,
    rounded,
    scaled_add,
    sqrt,
)
from .shared import Total, less, with_caution, with_penalty


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
    return sgd_step(p, g, state, lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov)


def sgd_step(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    lr: Number,
    momentum: Number,
    dampening: Number,
    nesterov: bool,
) -> Tensor:
    """What :func:`sgd` does with a gradient that has its penalty."""
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


def lion(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    total: Total,
    lr: Number,
    beta1: Number,
    beta2: Number,
    weight_decay: Number,
    maximize: bool,
    cautious: str | None = None,
) -> Tensor:
    """Lion: ``csrc/rules/lion.h``."""
    rate, decay = rounded(lr, p), rounded(lr * weight_decay, p)
    if maximize:
        g = -g
    u = lerp(state["exp_avg"], g, rounded(1.0 - beta1, p))
    step = torch.where(u > 0, rate, torch.where(u < 0, -rate, u))
    if cautious == "update":
        step = with_caution(step, u, g, total)
    p = less(p, step, decay, cautious)
    state["exp_avg"] = lerp(state["exp_avg"], g, rounded(1.0 - beta2, p))
    return p


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
    cautious: str | None = None,
) -> Tensor:
    """Muon's update by an orthogonal ``g``: ``csrc/rules/muon_update.h``."""
    return less(p, g * rounded(lr * shape_scale, p), rounded(lr * weight_decay, p), cautious)
