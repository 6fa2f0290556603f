"""Rules without a schedule: ``csrc/rules/schedule_free.h``, and what is its own of each."""

from __future__ import annotations

import torch
from torch import Tensor

from ...tracing import Number
from ..math import average_square, lerp, may_count, multiply_add, power, real_power, root, rounded, sqrt
from .adams import rectification
from .shared import with_penalty


def averaged(
    p: Tensor,
    u: Tensor,
    state: dict[str, Tensor],
    running: dict[str, Number],
    *,
    t: Number,
    lr: Number,
    beta: Number,
    r: Number,
    weight_lr_power: Number,
) -> Tensor:
    """The parameter moved towards ``z`` and by ``u``, and ``z`` by ``u``."""
    running["lr_max"] = highest = _larger(lr, running["lr_max"])
    weight = real_power(t, r) * real_power(highest, weight_lr_power)
    total = running["weight_sum"] = running["weight_sum"] + weight
    if isinstance(total, Tensor):
        part: Number = torch.where(total != 0.0, weight / total, 0.0)
    else:
        part = weight / total if total != 0.0 else 0.0
    z = state["z"]
    state["z"] = multiply_add(-rounded(lr, p), u, z)
    return multiply_add(-rounded(lr * (1.0 - beta * (1.0 - part)), p), u, lerp(p, z, rounded(part, p)))


def _larger(a: Number, b: Number) -> Number:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return torch.where(a > b, a, b)
    return a if a > b else b


def warmed_up(lr: Number, t: Number, steps: Number) -> Number:
    """The learning rate of step ``t``, of which the first ``steps`` warm up."""
    if isinstance(t, Tensor) or isinstance(steps, Tensor):
        return torch.where(torch.as_tensor(t <= steps), lr * (t / steps), lr)
    return lr * (t / steps) if t <= steps else lr


def normalized(g: Tensor, v: Tensor, correction: Number, eps: Number) -> Tensor:
    return g * rounded(correction, g) / (sqrt(v) + rounded(eps * correction, g))


def adamw_schedule_free(
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
    warmup_steps: Number,
    r: Number,
    weight_lr_power: Number,
    maximize: bool,
) -> Tensor:
    """AdamWScheduleFree: ``csrc/rules/adamw_schedule_free.h``."""
    g = -g if maximize else g
    v = state["exp_avg_sq"] = average_square(state["exp_avg_sq"], g, rounded(1.0 - beta2, p))
    u = with_penalty(normalized(g, v, root(1.0 - power(beta2, t)), eps), p, rounded(weight_decay, p), False)
    lr = warmed_up(lr, t, warmup_steps)
    return averaged(p, u, state, running, t=t, lr=lr, beta=beta1, r=r, weight_lr_power=weight_lr_power)


def sgd_schedule_free(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: Number,
    running: dict[str, Number],
    lr: Number,
    momentum: Number,
    weight_decay: Number,
    warmup_steps: Number,
    r: Number,
    weight_lr_power: Number,
    maximize: bool,
) -> Tensor:
    """SGDScheduleFree: ``csrc/rules/sgd_schedule_free.h``."""
    l2 = rounded(weight_decay, p)
    g = -g if maximize else g
    g = multiply_add(l2, p, g) if may_count(l2) else g
    lr = warmed_up(lr, t, warmup_steps)
    return averaged(p, g, state, running, t=t, lr=lr, beta=momentum, r=r, weight_lr_power=weight_lr_power)


def radam_schedule_free(
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
    r: Number,
    weight_lr_power: Number,
    silent_sgd_phase: bool,
    maximize: bool,
) -> Tensor:
    """RAdamScheduleFree: ``csrc/rules/radam_schedule_free.h``."""
    correction2, length, ratio = rectification(beta2, t)
    plain = 0.0 if silent_sgd_phase else lr
    g = -g if maximize else g
    v = state["exp_avg_sq"] = average_square(state["exp_avg_sq"], g, rounded(1.0 - beta2, p))
    u = normalized(g, v, root(correction2), eps)
    if isinstance(length, Tensor):
        lr, u = torch.where(length > 4.0, lr * root(ratio()), plain), torch.where(length > 4.0, u, g)
    else:
        lr, u = (lr * root(ratio()), u) if length > 4.0 else (plain, g)
    u = with_penalty(u, p, rounded(weight_decay, p), False)
    return averaged(p, u, state, running, t=t, lr=lr, beta=beta1, r=r, weight_lr_power=weight_lr_power)
