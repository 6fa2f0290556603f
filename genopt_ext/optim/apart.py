"""A step on several devices, or with rows of the reference: what they share is decided here and told to each.

``csrc/plan/decide.h`` is its native twin, for the rows of one device.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import binned, clip, gradients, reference, sharding, tracing
from ..tracing import Number
from . import state as states
from .options import clips_alone
from .step import Place, Step

if TYPE_CHECKING:
    from .rule import Group, Rule
    from .stepper import Results

# Calls the native stepper with the rows to leave out and what it is told; returns what it refused, or None.
Native = Callable[[Sequence[int], dict[str, Any]], Any]


def take(
    step: Step,
    by_reference: Sequence[int],
    arguments: dict[str, Any],
    native: Native,
    arguments_on: Callable[[torch.device], dict[str, Any]],
    results_on: Callable[[torch.device | None], Results],
) -> None:
    """Steps the rows ``by_reference``, and all others by ``native``: alone, it waits for no device."""
    places = step.places
    active = [(r, g) for r, (_, _, p) in enumerate(places) if (g := step.gradient(p)) is not None]
    # Also of rows of which only the average moves.
    devices = list({place[2].device: None for place in places if step.takes_part(place)})
    apart = set(by_reference)
    shared = {name: arguments[name] for name in ("shared",) if name in arguments}
    if not active and arguments.get("measure"):  # the norm of nothing
        results_on(None).grad_norm.zero_()
        arguments = shared
    home = devices[0] if devices else torch.device("cpu")
    if step.resolved != "reference" and len(devices) <= 1 and not apart:
        _must_step(step, native((), arguments_on(home) if active else shared))
        return
    arguments = {**arguments, **arguments_on(home)} if arguments else {}
    decided = decide(step, active, apart, home, arguments, results_on)
    scale, group_scales, found = decided.scale, decided.group_scales, decided.found
    if step.resolved != "reference" and len(apart) < len(places):
        kept = ("grads", "gradients", "scale")
        told: dict[str, Any] = {name: arguments[name] for name in kept if name in arguments}
        told.update(group_scales=[group_scales.to(d) for d in devices])
        if decided.row_sums is not None:
            told.update(row_sums=[decided.row_sums.to(d) for d in devices])
        if "grad_scale" in arguments:
            told.update(grad_scale=[arguments["grad_scale"][0].to(d) for d in devices])
        if found is not None:
            told.update(found_inf=[found.to(d) for d in devices])
        _must_step(step, native(by_reference, told))
    if not apart or (found is not None and tracing.has_number(found) and found != 0):
        return

    def undone(tensors: list[Tensor]) -> contextlib.AbstractContextManager[None]:
        if found is None or tracing.has_number(found):
            return contextlib.nullcontext()
        return reference.undone_where(found, tensors)

    factors = {r: scale * tracing.number(group_scales.select(0, places[r][0])) for r in by_reference}
    for r in by_reference:
        group = step.group(places[r])
        if _clips_by_tensor(group) and decided.row_sums is not None:
            norm, weights = decided.row_sums.view(2, -1).select(1, r).sqrt().to(places[r][2].device).unbind()
            factors[r] = factors[r] * clip.tensor_coefficient(group, norm * factors[r], weights)
    together = _Together(step, factors, shared["shared"][0], home) if shared and active else None
    for r in by_reference:
        p = places[r][2]
        with undone([p, *(t for t in step.state_of(p).values() if isinstance(t, Tensor))]):
            _step_row(step, places[r], factors[r], together)
    if together is not None:
        with undone([together.tensor]):
            together.store()


class _Together:
    """Numbers that all parameters share, and the totals of all.

    Args:
        factors: of the gradients of rows.
        tensor: with the numbers, float64.
    """

    def __init__(self, step: Step, factors: dict[int, Number], tensor: Tensor, home: torch.device) -> None:
        self.tensor = tensor
        self.before = dict(zip(step.rule.shared, map(tracing.number, tensor.unbind()), strict=True))
        self.after = self.before
        words: list[Tensor] = []
        for r, factor in factors.items():
            place = step.places[r]
            if (g := step.gradient(place[2])) is None:
                continue
            part = _part(step, place, g)
            shares = reference.shares(**part.named(), **_loading(step, place, factor), shared=dict(self.before))
            shape = len(step.places), binned.WORDS
            words = words or [torch.zeros(shape, dtype=torch.int64, device=home) for _ in shares]
            for total, share in zip(words, shares, strict=True):
                total.select(0, r).copy_(share)
        if words:
            joined = sharding.Joining([p for _, _, p in step.places]).sums(torch.stack(words))
            self.totals = [tracing.number(reference.join(total)) for total in joined]
        else:
            self.totals = []

    def given(self) -> dict[str, Any]:
        """What a row's step is told."""
        self.after = dict(self.before)
        return {"shared": self.after, "totals": self.totals}

    def store(self) -> None:
        for t, number in zip(self.tensor.unbind(), self.after.values(), strict=True):
            if isinstance(number, Tensor) and number.is_meta and not t.is_meta:
                continue  # beside parameters without numbers
            t.copy_(torch.as_tensor(number, dtype=torch.float64, device=t.device))


def _must_step(step: Step, refusal: Any) -> None:
    if refusal is not None:
        raise RuntimeError(f"{step.owner}.step: the kernels refused {refusal}; please report this")


def _option(value: Any) -> Number | str | None:
    if isinstance(value, Tensor):
        return tracing.number(value)
    return value if value is None or isinstance(value, str) else float(value)


@dataclass
class _Part:
    """What this process has of a row: of DTensors that are cut alike their local tensors, else all of it."""

    rule: Rule
    names: list[str]
    p: Tensor
    g: Tensor | None
    state: dict[str, Any]
    whole: Tensor | None = None

    def named(self) -> dict[str, Any]:
        """A row, as the reference is given it."""
        return dict(rule=self.rule.name, param=self.p, grad=self.g, state=self.state, names=self.names)


def _part(step: Step, place: Place, g: Tensor | None) -> _Part:
    p, rule = place[2], step.rule
    state, names = step.state_of(p), rule.state_names(step.group(place), p)
    whole = _Part(rule, names, p, g, state)
    if not sharding.is_spread(p):
        return whole
    if g is not None and sharding.is_spread(g) and not sharding.are_cut_alike(p, g):
        g = sharding.cut_as(g, p)
    others = {k: t for k, t in state.items() if isinstance(t, Tensor) and k != "step" and k not in rule.running}
    others.update({} if g is None else {"gradient": g})
    for name, t in others.items():
        if not sharding.is_spread(t) or not sharding.are_cut_alike(p, t, not name.endswith("_scales")):
            return whole
    of_state = {name: sharding.local(t) for name, t in state.items()}
    return _Part(rule, names, sharding.local(p), None if g is None else sharding.local(g), of_state, whole=p)


def _loading(step: Step, place: Place, scale: Number) -> dict[str, Any]:
    """What a row's rule is told beside it. ``scale``: of its gradient."""
    p, group = place[2], step.group(place)
    options = {name: _option(value) for name, value in step.rule.options(group).items()}
    if (eps := step.rule.dtype_eps) is not None and options[eps] is None:
        options[eps] = torch.finfo(torch.float32 if states.extra(group, p) == "master" else p.dtype).eps
    return dict(factor=scale, clip_value=group.get("clip_grad_value"), extra=states.extra(group, p), **options)


def _step_row(step: Step, place: Place, scale: Number, together: _Together | None) -> None:
    """One row by the reference. ``scale``: of its gradient."""
    p, group, rule, g = place[2], step.group(place), step.rule, step.gradient(place[2])
    part = _part(step, place, g)
    rounds = states.is_stochastic(group, p) or states.state_dtype(group, p) in (torch.bfloat16, torch.int8)
    places = sharding.places(p) if rounds and part.whole is not None else None
    # Of other subclasses an element's place is not known.
    unbiased = places is not None or not tracing.is_subclass(p)
    if g is not None:
        reference.step(
            **part.named(),
            **_loading(step, place, scale),
            **({} if together is None else together.given()),
            seed=int(group.get("rounding_seed", 0)) if states.is_stochastic(group, p) else None,
            unbiased=states.state_dtype(group, p) == torch.bfloat16 and unbiased,
            counts=states.counts_steps(rule, group, p),
            running=rule.running,
            whole=part.whole,
            places=places,
            join=None
            if part.whole is None
            else lambda total: sharding.Joining([p]).sums(total.unsqueeze(0)).squeeze(0),
        )
    if group.get("ema_decay") is not None and "ema" in part.state:
        source = part.state["master"] if g is not None and states.extra(group, p) == "master" else part.p
        reference.average(source, part.state["ema"], float(group["ema_decay"]))
    if part.whole is not None:  # autograd knows it by the whole
        increment_version([p, *(t for t in step.state_of(p).values() if sharding.is_spread(t))])


def _clips_by_tensor(group: dict[str, Any]) -> bool:
    return group.get("clip_per_param") is not None or group.get("agc") is not None


class Decided(NamedTuple):
    """What norms come to.

    Attributes:
        scale: of all gradients where it is known here.
        group_scales: the factor of each group's gradients; float64.
        found: whether to skip, 0-dim; None: not asked.
        row_sums: the squares of each gradient's elements, then of each parameter's, added up; float64. None: not asked.
    """

    scale: Number
    group_scales: Tensor
    found: Tensor | None
    row_sums: Tensor | None


def decide(
    step: Step,
    active: list[tuple[int, Tensor]],
    apart: set[int],
    home: torch.device,
    arguments: dict[str, Any],
    results_on: Callable[[torch.device | None], Results],
) -> Decided:
    """Takes norms where they are asked for, and decides."""
    scale, scale_tensor = arguments.get("scale", 1.0), torch.ones((), dtype=torch.float64, device=home)
    if "grad_scale" in arguments:
        scale_tensor = gradients.reciprocal(arguments["grad_scale"][0].to(home))
        if apart:
            scale = scale * tracing.number(scale_tensor)
    whole = scale_tensor * arguments.get("scale", 1.0)
    row_sums: Tensor | None = None
    factors, found = torch.ones(len(step.groups), dtype=torch.float64, device=home), None
    if "group_scales" in arguments:
        factors = arguments["group_scales"][0].to(home)
    if "found_inf" in arguments:
        found = arguments["found_inf"][0].to(home) != 0
    if arguments.get("measure"):
        row_sums = _row_sums(step, active, apart, home)
        sums = row_sums.narrow(0, 0, len(step.places))
        first = {i: r for r, (i, _, _) in reversed(list(enumerate(step.places)))}
        counts = Counter(i for i, _, _ in step.places)
        of_others = sums.clone()
        for i, group in enumerate(step.groups):
            if i in first and clips_alone(group):
                of_others.narrow(0, first[i], counts[i]).zero_()
        shared = reference.join(of_others)
        norm = reference.join(sums).sqrt() * whole
        results = results_on(home)
        results.grad_norm.copy_(norm)
        if arguments.get("guard"):
            nonfinite = ~torch.isfinite(norm)
            found = nonfinite if found is None else found | nonfinite
            results.nonfinite.copy_(nonfinite)
            if step.inputs.skip_nonfinite:
                results.skipped_steps.add_(nonfinite)
        bound = step.inputs.max_grad_norm
        for i, group in enumerate(step.groups):
            own = group.get("max_grad_norm")
            if own is not None and i in first:
                together = sums.narrow(0, first[i], len(group["params"]))
                factor = clip.coefficient(float(own), reference.join(together).sqrt() * whole)
            elif bound is not None and not _clips_by_tensor(group):
                factor = clip.coefficient(bound, shared.sqrt() * whole)
            else:
                continue
            factors.select(0, i).copy_(factor)
    return Decided(scale, factors, found if found is None else found.float(), row_sums)


def _row_sums(step: Step, active: list[tuple[int, Tensor]], apart: set[int], home: torch.device) -> Tensor:
    """As :attr:`Decided.row_sums`, of whole parameters, on ``home``."""
    params, groups = [p for _, _, p in step.places], [step.group(place) for place in step.places]
    words = torch.zeros(1 + any(map(weighs, groups)), len(params), binned.WORDS, dtype=torch.int64, device=home)
    by_kernels: dict[int, Tensor] = {}
    for r, g in active:
        if step.resolved != "reference" and r not in apart:
            by_kernels[r] = g
            continue
        part = _part(step, step.places[r], g)
        assert part.g is not None
        for column, t in enumerate((part.g, part.p) if weighs(groups[r]) else (part.g,)):
            measured = reference.measure(t)  # of a DTensor as such by all processes
            if part.whole is not None or sharding.is_first(part.p):
                words[column, r].copy_(measured)
    if by_kernels:
        words += measure(params, [by_kernels.get(r) for r in range(len(params))], groups).to(home)
    return join(sharding.Joining(params), words)


def measure(params: list[Tensor], grads: Sequence[Tensor | None], groups: Sequence[Group]) -> Tensor:
    """What norms of gradients are made of, and of parameters if a group weighs them: int64, [1 or 2, rows, words]."""
    measured = [clip.measure_rows(params, grads)]
    weighed = [weighs(group) for group in groups]
    if any(weighed):
        weights = [p if g is not None and w else None for p, g, w in zip(params, grads, weighed, strict=True)]
        measured.append(clip.measure_rows(params, weights))
    return torch.stack(measured)


def join(joining: sharding.Joining, words: Tensor) -> Tensor:
    """As :attr:`Decided.row_sums`, of whole parameters, from what :func:`measure` gave."""
    sums = joining.sums(words)
    return torch.cat([sums, torch.zeros(2 - len(sums), sums.shape[1], dtype=sums.dtype, device=sums.device)]).flatten()


def weighs(group: Group) -> bool:
    """Whether a group clips by the norms of parameters."""
    return group.get("agc") is not None
