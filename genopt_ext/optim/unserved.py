"""What the native stepper could not take: raises the error, makes missing state, or has rows stepped elsewhere.

Rows that kernels do not serve are stepped by the reference (``apart.py``) or by torch's own code (``by_torch.py``).
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import gradients
from . import apart, by_torch, refusals, repeats
from . import state as states
from .problems import OF_KERNELS, Problem
from .step import Place, Step

if TYPE_CHECKING:
    from .stepper import Refusal, Results, Stepper


class Examined(NamedTuple):
    """What a step could be taken with: rows in turns, those that torch steps, and what others lack."""

    turns: list[set[int]]
    torchs: Mapping[int, Place]
    mendable: Mapping[int, Sequence[Problem]]


def examine(stepper: Stepper, refusal: Refusal, step: Step, arguments: dict[str, Any]) -> Examined:
    """Raises for what is wrong, and changes no tensor."""
    places, rows = step.places, list(refusal.rows)
    for i in refusal.groups:
        stepper.check_group(step.groups, i)
        states.complete(step.groups[i])
    if step.rule.shared:
        refusals.refuse_devices(step)
    turns = repeats.turns(step, arguments)
    refusals.refuse_overlaps(step, refusal.overlaps, refusal.grad_overlaps)
    torchs = by_torch.find(step, rows)
    mendable = {r: refusals.find_mendable(step, places[r], found, r in torchs) for r, found in refusal.rows.items()}
    for place in torchs.values():
        by_torch.check_step(step, place, arguments)
    if step.resolved == "reference":
        refusals.refuse_overlaps(step, *refusals.find_overlaps(step, rows))
    return Examined(turns, torchs, mendable)


@torch.no_grad()
def resolve(stepper: Stepper, refusal: Refusal, step: Step, only: Place | None, arguments: dict[str, Any]) -> None:
    """Raises for what is wrong; else makes missing state and steps, rows that kernels do not serve elsewhere."""
    places, rows = step.places, list(refusal.rows)
    turns, torchs, mendable = examine(stepper, refusal, step, arguments)
    mend(step, mendable, torchs)

    kernels = [r for r in rows if r not in torchs]
    if not torchs and len(turns) == 1:
        _step_made(stepper, step, only, kernels, arguments)
        return
    left = arguments.pop("gradients", None)  # not before the last turn
    buffers = repeats.first_buffers(step, turns)
    for turn in turns:
        for buffer in buffers:
            buffer.fill_(-0.0)
        others = [r for r in range(len(places)) if r not in turn or r in torchs]
        _step_made(stepper, step, only, [r for r in kernels if r in turn], arguments, others)
    if torchs:
        by_torch.take(step, torchs.values())
    leave_gradients(stepper, left, arguments, step)


@torch.no_grad()
def mend(step: Step, mendable: Mapping[int, Sequence[Problem]], torchs: Container[int]) -> None:
    """Gives rows the state that they lack, stored as their groups ask for it."""
    missing, stored = states.Missing(), []
    away: list[tuple[Tensor, str]] = []
    last: Sequence[Problem] = ()
    lacking: list[str] = []
    reasons: set[str] = set()
    for r, found in mendable.items():
        i, _, p = step.places[r]
        if found is not last:  # most rows have what the last had
            last, reasons = found, {reason for _, reason in found}
            lacking = [name for name, reason in found if reason == "missing"]
        if names := by_torch.to_make(step.rule, lacking) if r in torchs else lacking:
            missing.add(step.groups[i], p, names)
        if "storage" in reasons and r not in torchs:
            stored.append((step.groups[i], p))
        if "away" in reasons:
            away += [(p, name) for name, reason in found if reason == "away"]
    if missing.params or away:
        states.refuse_capture(step.owner)
    made = states.make_missing(step.owner, step.rule, missing)
    for p, state in zip(missing.params, made, strict=True):
        if p in step.state:
            step.state[p].update(state)
        else:
            step.state[p] = state
    if step.rule.serves_sparse:
        for r in mendable:
            if r not in torchs:
                by_torch.to_dense(step.state_of(step.places[r][2]))
    for group, p in stored:
        states.store_anew(step.owner, step.rule, group, p, step.state_of(p))
    for p, name in away:
        step.state[p][name] = step.state[p][name].to(p.device)


def _step_made(
    stepper: Stepper,
    step: Step,
    only: Place | None,
    rows: Sequence[int],
    arguments: dict[str, Any],
    others: Sequence[int] = (),
) -> None:
    """Steps all but ``others``, which have their state: by kernels, or of ``rows`` by the reference."""

    def native(skipped: Sequence[int], given: dict[str, Any]) -> Refusal | None:
        return stepper.step_natively(step.groups, step.state, only, [*skipped, *others], given)

    by_reference, gradients_overlap = rows, False
    if step.resolved != "reference":
        again = native((), arguments)
        if again is None:
            return
        by_reference = list(again.rows)
        refusals.refuse_overlaps(step, again.overlaps, again.grad_overlaps)
        if any(reason not in OF_KERNELS for found in again.rows.values() for _, reason in found):
            raise RuntimeError(f"{step.owner}.step: the kernels refused {again}; please report this")
        if by_reference:
            refusals.tell_reference(step, step.places[by_reference[0]])
            if step.rule.shared:  # none can be stepped without the others
                by_reference = [r for r, place in enumerate(step.places) if step.takes_part(place)]
        gradients_overlap = again.gradients_overlap
    if "gradients" not in arguments or not (by_reference or gradients_overlap):
        _step_apart(stepper, step, by_reference, arguments, native)
        return
    # Gradients may share memory: within the step one row would see what another left.
    left = arguments.pop("gradients")
    _step_apart(stepper, step, by_reference, arguments, native)
    leave_gradients(stepper, left, arguments, step)


def _step_apart(
    stepper: Stepper, step: Step, by_reference: Sequence[int], arguments: dict[str, Any], native: apart.Native
) -> None:
    def arguments_on(device: torch.device) -> dict[str, Any]:
        return stepper.arguments(step.groups, step.inputs, device, "gradients" in arguments)

    def results_on(device: torch.device | None) -> Results:
        return stepper.results_on(step.groups, device)

    apart.take(step, by_reference, arguments, native, arguments_on, results_on)


def leave_gradients(stepper: Stepper, left: str | None, arguments: dict[str, Any], step: Step) -> None:
    """Writes gradients after the step with ``arguments``."""
    grads = [g for _, _, p in step.places if (g := step.gradient(p)) is not None]
    if left == "zeroed":
        gradients.zero_(grads)
    elif left == "unscaled":
        skips = [stepper.results_on(step.groups).nonfinite] if "guard" in arguments else []
        gradients.unscale_(grads, arguments["grad_scale"][0], [*skips, *arguments.get("found_inf", [])])
