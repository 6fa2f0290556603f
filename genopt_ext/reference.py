"""The rules in plain torch operations: the fallback without the extension, and the truth in tests.

One function per rule, in the order of operations of ``csrc/rules/*.h``, so that both give the same bits.
``p``, ``g`` and the state tensors are real and of the compute dtype (float32, or float64 for float64
parameters). A function writes the new states into ``state`` and returns the new parameter.

Numbers such as the learning rate are floats, or 0-dim tensors while torch traces the step (see ``tracing.py``).

Only operations that torch computes exactly rounded are used, on scalars rounded to the compute dtype
beforehand: no ``alpha=``, ``addcmul`` or ``lerp``, which contract on some machines.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import storage, tracing
from .tracing import Number


def _rounded(x: Number, like: Tensor) -> Number:
    """``x`` in the precision of ``like``."""
    if isinstance(x, Tensor):
        return x.to(like.dtype)
    return ctypes.c_float(x).value if like.dtype == torch.float32 else x


def _may_count(x: Number) -> bool:
    return isinstance(x, Tensor) or x != 0


def _lerp(start: Tensor, end: Tensor, weight: Number) -> Tensor:
    difference = end - start
    if isinstance(weight, Tensor):
        return torch.where(weight < 0.5, start + difference * weight, end - difference * (1.0 - weight))
    return start + difference * weight if weight < 0.5 else end - difference * (1.0 - weight)


def _finite(x: Tensor) -> Tensor:
    return x.clamp(max=torch.finfo(x.dtype).max)


def _average_square(average: Tensor, g: Tensor, weight: Number) -> Tensor:
    return _lerp(_finite(average), _finite(g * g), weight)


def is_unset(x: Tensor) -> Tensor:
    """Where a state waits for its first value: -0.0, see ``csrc/rules/math.h``."""
    return (x == 0) & (x.real if x.is_complex() else x).signbit()


def is_all_unset(x: Tensor) -> bool:
    """Whether the whole state waits for its first value; waits for the device."""
    return not x.is_sparse and tracing.has_number(x) and bool(is_unset(x).all())


def _sqrt(x: Tensor) -> Tensor:
    # torch.sqrt of float32 is not always exactly rounded on CPU; through float64 it is.
    return x.double().sqrt().to(x.dtype)


def _multiply_add(a: Number, x: Tensor, b: Tensor) -> Tensor:
    """``a x + b``, rounded once in float32; in float64 after each operation."""
    if x.dtype != torch.float32:
        return x * a + b
    product, b = x.double() * a, b.double()  # the product is exact
    total = product + b
    back = total - product
    error = (product - (total - back)) + (b - back)
    # Rounded to odd first, a number of twice the bits is rounded as if it had been exact.
    bits = total.view(torch.int64)
    odd = (bits - (error.signbit() != total.signbit()).long()) | 1
    return torch.where((error != 0) & error.isfinite(), odd.view(torch.float64), total).float()


def _scaled_add(factor: Number, x: Tensor, b: Tensor) -> Tensor:
    """``factor x + b``, the factor in two parts."""
    most = _rounded(factor, x)
    limit = torch.finfo(x.dtype).max
    return _multiply_add(most, x, _multiply_add(_rounded(factor - most, x), x.clamp(-limit, limit), b))


def _power(base: Number, n: Number) -> Number:
    if isinstance(base, Tensor) or isinstance(n, Tensor):
        power: Tensor = base**n
        return power
    result, k = 1.0, int(max(n, 0.0))
    while k:
        if k & 1:
            result *= base
        base *= base
        k >>= 1
    return result


def _root(x: Number) -> Number:
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


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
) -> Tensor:
    """Adam, AdamW and AMSGrad: ``csrc/rules/adam.h``."""
    correction = _root(1.0 - _power(beta2, t))
    rate = _rounded(lr * correction / (1.0 - _power(beta1, t)), p)
    l2 = _rounded(0.0 if decoupled_weight_decay else weight_decay, p)
    decay = _rounded(lr * weight_decay if decoupled_weight_decay else 0.0, p)
    if maximize:
        g = -g
    if _may_count(l2):
        g = g + p * l2
    m = state["exp_avg"] = _lerp(state["exp_avg"], g, _rounded(1.0 - beta1, p))
    v = state["exp_avg_sq"] = _average_square(state["exp_avg_sq"], g, _rounded(1.0 - beta2, p))
    if amsgrad:
        v = state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], v)
    u = m * rate / (_sqrt(v) + _rounded(eps * correction, p))
    if _may_count(decay):
        u = p * decay + u
    return p - u


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
    l2 = _rounded(weight_decay, p)
    if maximize:
        g = -g
    if _may_count(l2):
        g = _multiply_add(l2, p, g)
    if "momentum_buffer" in state:
        old = state["momentum_buffer"]
        b = torch.where(is_unset(old), g, _scaled_add(momentum, old, g * _rounded(1.0 - dampening, p))) + 0.0
        state["momentum_buffer"] = b
        g = _multiply_add(_rounded(momentum, p), b, g) if nesterov else b
    return _multiply_add(-_rounded(lr, p), g, p)


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
    l2, weight = _rounded(weight_decay, p), _rounded(1.0 - alpha, p)
    if maximize:
        g = -g
    if _may_count(l2):
        g = g + p * l2
    s = variance = state["square_avg"] = _average_square(state["square_avg"], g, weight)
    if centered:
        c = state["grad_avg"] = _lerp(state["grad_avg"], g, weight)
        variance = torch.maximum(s - c * c, s * torch.finfo(s.dtype).eps)
    u = g / (_sqrt(variance) + _rounded(eps, p))
    if "momentum_buffer" in state:
        b = state["momentum_buffer"] = state["momentum_buffer"] * _rounded(momentum, p) + u
        return _multiply_add(-_rounded(lr, p), b, p)
    return p - u * _rounded(lr, p)


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
    l2 = _rounded(weight_decay, p)
    if maximize:
        g = -g
    if _may_count(l2):
        g = g + p * l2
    s = state["sum"] = state["sum"] + g * g
    return p - g / (_sqrt(s) + _rounded(eps, p)) * _rounded(lr / (1.0 + (t - 1.0) * lr_decay), p)


RULES: dict[str, Callable[..., Tensor]] = {"adam": adam, "sgd": sgd, "rmsprop": rmsprop, "adagrad": adagrad}


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


@torch.no_grad()
def step(
    rule: str,
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    names: list[str],
    *,
    factor: Number = 1.0,
    clip_value: float | None = None,
    extra: str | None = None,
    seed: int | None = None,
    unbiased: bool = False,
    counts: bool = True,
    **options: Number,
) -> None:
    """One step of one parameter: load, rule, store.

    Args:
        rule: a key of :data:`RULES`.
        param: updated in place; float32, float64, bfloat16, float16 or complex, any shape and strides.
        grad: of the parameter's shape.
        state: tensors of the parameter's shape under ``names``, or their codes, and ``"step"`` where there is one.
        factor: of the gradient.
        clip_value: limits the gradient's elements, after the factor.
        extra: the state that keeps what the parameter can not hold: ``"master"``, ``"compensation"`` or None.
        seed: of the random bits by which the parameter is rounded; None: to the nearest.
        counts: whether ``"step"`` is advanced.
        unbiased: whether states of 16 bits are not rounded to the nearest.
        options: the rule's keyword arguments.
    """
    compute = compute_dtype(param)
    if grad.is_complex():
        grad = grad.resolve_conj()
    values = {name: _real(storage.read(state, name)).to(compute) for name in names}
    t: Number = 0.0
    if counts and "step" in state:
        state["step"].add_(1)
        t = tracing.number(state["step"])
    real, g = _real(param), _real(grad).to(compute)
    g = g * _rounded(factor, g)
    if clip_value is not None:
        limit = float(_rounded(clip_value, g))
        g = g.clamp(-limit, limit)
    start = state["master"] if extra == "master" else real.to(compute)
    if extra == "compensation":
        start = start + state["compensation"].to(compute)
    new = RULES[rule](start, g, values, t=t, **options)
    if extra == "master":
        state["master"].copy_(new)
    elif extra == "compensation":
        rounded = new.to(param.dtype).to(compute)
        state["compensation"].copy_(torch.where((rounded - rounded) == 0, new - rounded, 0.0))
    if seed is None:
        real.copy_(new)
    else:
        bits = storage.random_bits(param, seed, t)
        storage.fill(param, storage.round_by(storage.flat(new, param), param.dtype, bits), param)
    for name in names:
        coded = state.get(name) is None
        turns = storage.turns(param, t) if coded or (unbiased and state[name].dtype in storage.HALVES) else None
        if param.is_complex():
            _real(state[name]).copy_(values[name])
        else:
            storage.write(state, name, param, values[name], turns)


@contextlib.contextmanager
def undone_where(skip: Tensor, tensors: list[Tensor]) -> Iterator[None]:
    """Takes back what is done to the tensors in the block where ``skip`` (0-dim) turns out to be not zero."""
    before = [t.detach().clone() for t in tensors]
    yield
    for t, old in zip(tensors, before, strict=True):
        if skip.is_meta and not t.is_meta:
            continue  # a step count beside a parameter without numbers
        t.detach().copy_(torch.where(skip != 0, old, t.detach()))


@torch.no_grad()
def average(param: Tensor, ema: Tensor, decay: float) -> None:
    """Moves the average ``ema`` towards the parameter, as :class:`torch.optim.swa_utils.AveragedModel` does."""
    real, compute = _real(ema), compute_dtype(param)
    e, p = real.to(compute), _real(param).to(compute)
    real.copy_(torch.where(is_unset(e), p, _lerp(e, p, _rounded(1.0 - decay, p))) + 0.0)


def compute_dtype(param: Tensor) -> torch.dtype:
    """What the rules compute in: float64 for float64 parameters, else float32."""
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32


# Norms, in the order of csrc/plan.h: an element's place in its tile of 256, then 32 tiles a span, then 32 spans.
_TILE, _SPAN, _SUMS = 256, 32, 32

Join = Callable[[Tensor, Tensor], Tensor]


def join_of(norm: float) -> Join:
    """How two parts of a ``norm``-norm's sum make one."""
    return torch.maximum if norm == math.inf else torch.add


def _by_halves(x: Tensor, join: Join) -> Tensor:
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = join(x.narrow(-1, 0, half), x.narrow(-1, half, half))
    return x.select(-1, 0)


def _in_turn(x: Tensor, join: Join) -> Tensor:
    total = x.select(-2, 0)
    for i in range(1, x.shape[-2]):
        total = join(total, x.select(-2, i))
    return total


def join(sums: Tensor) -> Tensor:
    """The sum of a vector, in the order in which a norm's parts are added up."""
    return _by_halves(_in_turn(_padded(sums, _SUMS).view(-1, _SUMS), torch.add), torch.add)


def _padded(x: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, -len(x) % multiple)) if len(x) else x.new_zeros(multiple)


def _measure_subclass(x: Tensor, norm: float) -> Tensor:
    """In the subclass's own order of additions: DTensor adds over all devices."""
    values = x.double()
    total = values.abs().max() if norm == math.inf else (values.square() if norm == 2 else values.abs()).sum()
    if hasattr(total, "full_tensor"):
        whole: Tensor = total.full_tensor()
        return whole
    return torch.tensor(total.item(), dtype=torch.float64, device=x.device)


@torch.no_grad()
def measure(x: Tensor, like: Tensor, norm: float = 2.0) -> Tensor:
    """The sum of squares of ``x`` (``norm`` 2), of absolute values (1) or their maximum (infinity), in float64.

    Args:
        x: of any floating-point or complex dtype; a complex number counts as two.
        like: the parameter in whose order in memory the elements are taken.
        norm: 2, 1 or infinity.
    """
    if tracing.is_subclass(x):
        return _measure_subclass(x, norm)
    strides = [*like.stride(), 0] if like.is_complex() else like.stride()
    order = sorted(range(len(strides)), key=lambda d: -strides[d])
    if x.is_complex():
        x = x.resolve_conj()
    values = _real(x).permute(order).reshape(-1).double()
    values = values * values if norm == 2 else values.abs()
    join = join_of(norm)
    tiles = _padded(values, _SPAN * _TILE).view(-1, _SPAN, _TILE)
    spans = _by_halves(_in_turn(tiles, join), join)
    return _by_halves(_in_turn(_padded(spans, _SUMS).view(-1, _SUMS), join), join)
