"""The rules in plain torch operations: the fallback without the extension, and the truth in tests.

One function per rule, in the order of operations of ``csrc/rules/*.h``, so that both give the same bits.
``p``, ``g`` and the state tensors are real and of the compute dtype (float32, or float64 for float64
parameters). A function writes the new states into ``state`` and returns the new parameter.

Only operations that torch computes exactly rounded are used, on scalars rounded to the compute dtype
beforehand: no ``alpha=``, ``addcmul`` or ``lerp``, which contract on some machines.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def _rounded(x: float, like: Tensor) -> float:
    """``x`` in the precision of ``like``."""
    return ctypes.c_float(x).value if like.dtype == torch.float32 else x


def _lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    difference = end - start
    return start + difference * weight if weight < 0.5 else end - difference * (1.0 - weight)


def _finite(x: Tensor) -> Tensor:
    return x.clamp(max=torch.finfo(x.dtype).max)


def _average_square(average: Tensor, g: Tensor, weight: float) -> Tensor:
    return _lerp(_finite(average), _finite(g * g), weight)


def _sqrt(x: Tensor) -> Tensor:
    # torch.sqrt of float32 is not always exactly rounded on CPU; through float64 it is.
    return x.double().sqrt().to(x.dtype)


def _descend(p: Tensor, rate: float, u: Tensor) -> Tensor:
    return (p.double() - rate * u.double()).to(p.dtype)


def _power(base: float, n: float) -> float:
    result, k = 1.0, int(max(n, 0.0))
    while k:
        if k & 1:
            result *= base
        base *= base
        k >>= 1
    return result


def adam(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: float,
    fresh: bool,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
) -> Tensor:
    """Adam, AdamW and AMSGrad: ``csrc/rules/adam.h``."""
    correction = math.sqrt(1.0 - _power(beta2, t))
    rate = _rounded(lr * correction / (1.0 - _power(beta1, t)), p)
    l2 = _rounded(0.0 if decoupled_weight_decay else weight_decay, p)
    decay = _rounded(lr * weight_decay if decoupled_weight_decay else 0.0, p)
    if maximize:
        g = -g
    if l2 != 0:
        g = g + p * l2
    m = state["exp_avg"] = _lerp(state["exp_avg"], g, _rounded(1.0 - beta1, p))
    v = state["exp_avg_sq"] = _average_square(state["exp_avg_sq"], g, _rounded(1.0 - beta2, p))
    if amsgrad:
        v = state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], v)
    u = m * rate / (_sqrt(v) + _rounded(eps * correction, p))
    if decay != 0:
        u = p * decay + u
    return p - u


def sgd(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: float,
    fresh: bool,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> Tensor:
    """SGD with momentum, dampening and Nesterov momentum: ``csrc/rules/sgd.h``."""
    g = g.double()
    if maximize:
        g = -g
    if weight_decay != 0:
        g = g + p.double() * weight_decay
    if momentum != 0:
        b = g if fresh else state["momentum_buffer"].double() * momentum + g * (1.0 - dampening)
        state["momentum_buffer"] = b.to(p.dtype)
        g = g + b * momentum if nesterov else b
    return _descend(p, lr, g)


def rmsprop(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: float,
    fresh: bool,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    centered: bool,
    maximize: bool,
) -> Tensor:
    """RMSprop, centered and with momentum: ``csrc/rules/rmsprop.h``."""
    l2, weight = _rounded(weight_decay, p), _rounded(1.0 - alpha, p)
    if maximize:
        g = -g
    if l2 != 0:
        g = g + p * l2
    s = variance = state["square_avg"] = _average_square(state["square_avg"], g, weight)
    if centered:
        c = state["grad_avg"] = _lerp(state["grad_avg"], g, weight)
        variance = torch.maximum(s - c * c, s * torch.finfo(s.dtype).eps)
    u = g / (_sqrt(variance) + _rounded(eps, p))
    if momentum > 0:
        b = state["momentum_buffer"] = state["momentum_buffer"] * _rounded(momentum, p) + u
        return _descend(p, lr, b)
    return p - u * _rounded(lr, p)


def adagrad(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    t: float,
    fresh: bool,
    lr: float,
    lr_decay: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> Tensor:
    """Adagrad: ``csrc/rules/adagrad.h``."""
    l2 = _rounded(weight_decay, p)
    if maximize:
        g = -g
    if l2 != 0:
        g = g + p * l2
    s = state["sum"] = state["sum"] + g * g
    return p - g / (_sqrt(s) + _rounded(eps, p)) * _rounded(lr / (1.0 + (t - 1.0) * lr_decay), p)


RULES: dict[str, Callable[..., Tensor]] = {"adam": adam, "sgd": sgd, "rmsprop": rmsprop, "adagrad": adagrad}


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


@torch.no_grad()
def step(
    rule: str, param: Tensor, grad: Tensor, state: Mapping[str, Any], names: list[str], fresh: bool, **options: float
) -> None:
    """One step of one parameter: load, rule, store.

    Args:
        rule: a key of :data:`RULES`.
        param: updated in place; float32, float64, bfloat16, float16 or complex, any shape and strides.
        grad: of the parameter's shape.
        state: tensors of the parameter's shape under ``names``, and ``"step"`` where the rule has one.
        fresh: the state was made for this step.
        options: the rule's keyword arguments.
    """
    compute = torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32
    if grad.is_complex():
        grad = grad.resolve_conj()
    values = {name: _real(state[name]).to(compute) for name in names}
    t = 0.0
    if "step" in state:
        state["step"].add_(1)
        t = state["step"].item()
    real = _real(param)
    real.copy_(RULES[rule](real.to(compute), _real(grad).to(compute), values, t=t, fresh=fresh, **options))
    for name in names:
        _real(state[name]).copy_(values[name])
