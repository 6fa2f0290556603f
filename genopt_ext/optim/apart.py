"""A step on several devices, or with rows of the reference: what they share is decided here and told to each.

``csrc/plan/decide.h`` is its native twin, for the rows of one device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import clip, gradients, reference, sharding, tracing
from ..tracing import Number
from . import state as states
from .options import clips_alone
from .step import Place, Step

if TYPE_CHECKING:
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
    if not active and arguments.get("measure"):  # the norm of nothing
        results_on(None).grad_norm.zero_()
        arguments = {}
    home = devices[0] if devices else torch.device("cpu")
    if step.resolved != "reference" and len(devices) <= 1 and not apart:
        _must_step(step, native((), arguments_on(home) if active else {}))
        return
    arguments = {**arguments, **arguments_on(home)} if arguments else {}
    scale, group_scales, found = decide(step, active, apart, home, arguments, results_on)
    if step.resolved != "reference" and len(apart) < len(places):
        shared = ("grads", "gradients", "scale")
        told: dict[str, Any] = {name: arguments[name] for name in shared if name in arguments}
        told.update(group_scales=[group_scales.to(d) for d in devices])
        if "grad_scale" in arguments:
            told.update(grad_scale=[arguments["grad_scale"][0].to(d) for d in devices])
        if found is not None:
            told.update(found_inf=[found.to(d) for d in devices])
        _must_step(step, native(by_reference, told))
    if not apart or (found is not None and tracing.has_number(found) and found != 0):
        return
    for r in by_reference:
        p = places[r][2]
        with contextlib.ExitStack() as stack:
            if found is not None and not tracing.has_number(found):
                tensors = [t for t in step.state_of(p).values() if isinstance(t, Tensor)]
                stack.enter_context(reference.undone_where(found, [p, *tensors]))
            factor = scale * tracing.number(group_scales.select(0, places[r][0]))
            _step_row(step, places[r], factor)


def _must_step(step: Step, refusal: Any) -> None:
    if refusal is not None:
        raise RuntimeError(f"{step.owner}.step: the kernels refused {refusal}; please report this")


def _option(value: Any) -> Number | str | None:
    if isinstance(value, Tensor):
        return tracing.number(value)
    return value if value is None or isinstance(value, str) else float(value)


def _step_row(step: Step, place: Place, scale: Number) -> None:
    """One row by the reference. ``scale``: of its gradient."""
    p, group, rule, state = place[2], step.group(place), step.rule, step.state_of(place[2])
    g = step.gradient(p)
    if g is not None:
        options = {name: _option(value) for name, value in rule.options(group).items()}
        if _clips_by_tensor(group):
            norm, weight_norm = (reference.measure(t, p).sqrt() for t in (g, p))
            scale = scale * clip.tensor_coefficient(group, norm * scale, weight_norm)
        reference.step(
            rule.name,
            p,
            g,
            state,
            rule.state_names(group),
            factor=scale,
            clip_value=group.get("clip_grad_value"),
            extra=states.extra(group, p),
            seed=int(group.get("rounding_seed", 0)) if states.is_stochastic(group, p) else None,
            unbiased=states.state_dtype(group, p) == torch.bfloat16 and not tracing.is_subclass(p),
            counts=states.counts_steps(rule, group, p),
            running=rule.running,
            **options,
        )
    if group.get("ema_decay") is not None and "ema" in state:
        source = state["master"] if g is not None and states.extra(group, p) == "master" else p
        reference.average(source, state["ema"], float(group["ema_decay"]))


def _clips_by_tensor(group: dict[str, Any]) -> bool:
    return group.get("clip_per_param") is not None or group.get("agc") is not None


def decide(
    step: Step,
    active: list[tuple[int, Tensor]],
    apart: set[int],
    home: torch.device,
    arguments: dict[str, Any],
    results_on: Callable[[torch.device | None], Results],
) -> tuple[Number, Tensor, Tensor | None]:
    """What norms come to.

    Returns:
        The scale of all gradients where it is known here, the factor of each group's (float64, on ``home``), and
        whether to skip (0-dim, or None: not asked).
    """
    scale, scale_tensor = arguments.get("scale", 1.0), torch.ones((), dtype=torch.float64, device=home)
    if "grad_scale" in arguments:
        scale_tensor = gradients.reciprocal(arguments["grad_scale"][0].to(home))
        if apart:
            scale = scale * tracing.number(scale_tensor)
    whole = scale_tensor * arguments.get("scale", 1.0)
    params = [p for _, _, p in step.places]
    factors, found = torch.ones(len(step.groups), dtype=torch.float64, device=home), None
    if "group_scales" in arguments:
        factors = arguments["group_scales"][0].to(home)
    if "found_inf" in arguments:
        found = sharding.agree(arguments["found_inf"][0].to(home) != 0, params)
    if arguments.get("measure"):
        sums, first = _sums(step, active, apart, home)
        alone = torch.tensor([clips_alone(step.group(place)) for place in step.places], device=home)
        shared = reference.join(torch.where(alone, 0.0, sums))
        norm = reference.join(sums).sqrt() * whole
        results = results_on(home)
        results.grad_norm.copy_(norm)
        if arguments.get("guard"):
            nonfinite = sharding.agree(~torch.isfinite(norm), params)
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
    return scale, factors, found if found is None else found.float()


def _sums(
    step: Step, active: list[tuple[int, Tensor]], apart: set[int], home: torch.device
) -> tuple[Tensor, dict[int, int]]:
    """Sums of squares by row, and the first row of each group; a group's rows on kernels count as one, in the first."""
    sums = torch.zeros(len(step.places), dtype=torch.float64, device=home)
    native: dict[int, list[Tensor]] = {}
    first = {i: r for r, (i, _, _) in reversed(list(enumerate(step.places)))}
    for r, g in active:
        i, _, p = step.places[r]
        if step.resolved == "reference" or r in apart:
            sums.select(0, r).copy_(reference.measure(g, p))
        else:
            native.setdefault(i, []).append(g)
    for i, grads in native.items():
        sums.select(0, first[i]).add_(clip.sum_of_squares(grads, home))
    return sums, first
