"""One step of one parameter: load, join, rule, part, round, average, as ``csrc/cpu/assembly.h`` does them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import binned, sharding, tracing
from ..tracing import Number
from . import codecs, norms, rounding
from .math import compute_dtype, is_unset, lerp, real, rounded
from .rules import PLAIN, RULES, SHARES, TOTALED
from .rules.shared import Total


class _Loaded(NamedTuple):
    """A parameter, its gradient and states, as a rule sees them."""

    p: Tensor
    g: Tensor
    states: dict[str, Tensor]


def _load(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    names: list[str],
    factor: Number,
    clip_value: float | None,
    extra: str | None,
) -> _Loaded:
    compute = compute_dtype(param)
    if grad.is_complex():
        grad = grad.resolve_conj()
    values = {name: real(codecs.read(state, name)).to(compute) for name in names}
    weights, g = real(param), real(grad).to(compute)
    g = g * rounded(factor, g)
    if clip_value is not None:
        limit = float(rounded(clip_value, g))
        g = g.clamp(-limit, limit)
    start = state["master"] if extra == "master" else weights.to(compute)
    if extra == "compensation":
        start = start + state["compensation"].to(compute)
    return _Loaded(start, g, values)


@torch.no_grad()
def shares(
    rule: str,
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    names: list[str],
    *,
    factor: Number = 1.0,
    clip_value: float | None = None,
    extra: str | None = None,
    shared: dict[str, Number],
    **options: Number | str | None,
) -> list[Tensor]:
    """What one parameter adds to the totals of all, before it is stepped, as words of :mod:`genopt_ext.binned`.

    Arguments: :func:`step`.
    """
    loaded = _load(param, grad, state, names, factor, clip_value, extra)
    return [norms.total(x, squares=False) for x in SHARES[rule](*loaded, shared=shared, **options)]


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
    running: Iterable[str] = (),
    shared: dict[str, Number] | None = None,
    totals: Sequence[Number] = (),
    whole: Tensor | None = None,
    places: Tensor | None = None,
    join: Callable[[Tensor], Tensor] | None = None,
    **options: Number | str | None,
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
        running: states that are one number.
        unbiased: whether states of 16 bits are not rounded to the nearest.
        shared: numbers that all parameters share, which are advanced.
        totals: the sums of all parameters' :func:`shares`.
        whole: the tensor of which ``param`` is a part; None: it is one itself.
        places: of the elements in the whole, in the shape of ``param``; None: they follow one another from its begin.
        join: makes of the words of :mod:`genopt_ext.binned` that a part has what the whole comes to (0-dim float64).
        options: the rule's keyword arguments.
    """
    start, g, values = _load(param, grad, state, names, factor, clip_value, extra)
    weights = real(param)
    t: Number = 0.0
    if counts and "step" in state:
        state["step"].add_(1)
        t = tracing.number(state["step"])
    numbers = {name: tracing.number(state[name]) for name in running}
    given: dict[str, Any] = dict(options)
    if numbers:
        given["running"] = numbers
    if shared is not None:
        given.update(shared=shared, totals=totals)
    if rule in TOTALED:
        join = join or binned.value
        count = (param if whole is None else whole).numel() * (2 if param.is_complex() else 1)
        given["total"] = Total(lambda x: tracing.number(join(norms.total(x, squares=rule not in PLAIN))), count)
    new = RULES[rule](start, g, values, t=t, **given)
    if sharding.is_spread(param):  # torch's operations may have left it cut in another way
        new = sharding.cut_as(new, param)
        values.update({name: sharding.cut_as(values[name], state[name]) for name in names if name in state})
    for name, number in numbers.items():
        state[name].copy_(torch.as_tensor(number, dtype=torch.float64, device=state[name].device))
    _store(param, new, state, extra)
    if seed is None:
        weights.copy_(new)
    else:
        bits = rounding.random_bits(_order(param, places), seed, t)
        codecs.fill(param, rounding.round_by(codecs.flat(new, param), param.dtype, bits), param)
    for name in names:
        coded = state.get(name) is None
        evenly = coded or (unbiased and state[name].dtype in codecs.HALVES)
        thresholds = rounding.thresholds(_order(param, places), t) if evenly else None
        if param.is_complex():
            real(state[name]).copy_(values[name])
        else:
            codecs.write(state, name, param, values[name], thresholds)


def _order(param: Tensor, places: Tensor | None) -> Tensor:
    """The places of elements, in the order in which they lie in memory."""
    return torch.arange(param.numel(), device=param.device) if places is None else codecs.flat(places, param)


@torch.no_grad()
def interpolate(param: Tensor, state: dict[str, Any], end: Tensor, weight: float, extra: str | None) -> None:
    """Moves the parameter to ``param + weight (end - param)``, as precisely as its state keeps it.

    Args:
        param: updated in place, as ``state["master"]`` or ``state["compensation"]`` where ``extra`` names it.
        end: of the parameter's shape, as ``state["z"]`` of the classes without a schedule.
        weight: from any side: a negative one moves away from ``end``.
    """
    weights, compute = real(param), compute_dtype(param)
    start = state["master"] if extra == "master" else weights.to(compute)
    if extra == "compensation":
        start = start + state["compensation"].to(compute)
    new = lerp(start, real(end).to(compute), rounded(weight, start))
    _store(param, new, state, extra)
    weights.copy_(new)


def _store(param: Tensor, new: Tensor, state: dict[str, Any], extra: str | None) -> None:
    """What ``param`` keeps beside itself of its new value."""
    if extra == "master":
        state["master"].copy_(new)
    elif extra == "compensation":
        stored = new.to(param.dtype).to(new.dtype)
        state["compensation"].copy_(torch.where((stored - stored) == 0, new - stored, 0.0))


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
    averages, compute = real(ema), compute_dtype(param)
    e, p = averages.to(compute), real(param).to(compute)
    averages.copy_(torch.where(is_unset(e), p, lerp(e, p, rounded(1.0 - decay, p))) + 0.0)


@contextlib.contextmanager
@torch.no_grad()
def swapped(params: list[Tensor], averages: list[Tensor]) -> Iterator[None]:
    """Within the block parameters are their averages, where those have begun."""
    kept = [p.clone() for p in params]
    try:
        for p, e in zip(params, averages, strict=True):
            p.copy_(torch.where(is_unset(e), p.to(e.dtype), e))
        yield
    finally:
        for p, old in zip(params, kept, strict=True):
            p.copy_(old)
