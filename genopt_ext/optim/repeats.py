"""Parameters that are listed more than once, of which torch only warns: each listing is a step of its own."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from .. import reference

if TYPE_CHECKING:
    from torch import Tensor

    from .step import Step

# What looks at all gradients together, or changes them between two steps of one parameter.
_NOT_SERVED = {
    "grads": "accumulate() or grads=",
    "max_norm": "max_grad_norm",
    "guard": "skip_nonfinite, or genopt_ext.GradScaler without unscale_(),",
    "measure": "a clip by norm",
    "shared": "an estimate that is of all parameters",
}


def turns(step: Step, arguments: Collection[str]) -> list[set[int]]:
    """The rows in turns, the n-th listing of a parameter in the n-th: the order of torch's for-loop.

    Raises where a step that is asked for with ``arguments`` can not be taken in turns.
    """
    places = step.places
    if len({id(p) for _, _, p in places}) == len(places):
        return [set(range(len(places)))]
    listed: dict[Tensor, list[int]] = {}
    for r, (_, _, p) in enumerate(places):
        listed.setdefault(p, []).append(r)
    found: list[set[int]] = [set()]
    for p, rows in listed.items():
        stepped = [r for r in rows if step.takes_part(places[r])]
        if len(stepped) < 2:
            found[0].update(rows)
            continue
        # One step is one average.
        asked = ["ema_decay" for r in stepped if step.group(places[r]).get("ema_decay") is not None]
        if step.gradient(p) is not None:
            asked = [what for name, what in _NOT_SERVED.items() if name in arguments] + asked
        if asked:
            raise RuntimeError(
                f"{step.owner}.step: {step.describe(places[rows[0]])} is the same parameter as "
                f"{step.describe(places[rows[1]])}, which can not go with {asked[0]}; list each parameter once"
            )
        found += [set() for _ in range(len(rows) - len(found))]
        for turn, r in zip(found, rows, strict=False):
            turn.add(r)
    return found


def first_buffers(step: Step, turns: list[set[int]]) -> list[Tensor]:
    """Buffers that wait for their first gradient: torch's SGD has each listing begin with none, then keeps the last."""
    found = [step.state_of(step.places[r][2]) for turn in turns[1:] for r in turn]
    buffers = [state.get(name) for state in found for name in step.rule.made_when_set]
    return [b for b in buffers if b is not None and reference.is_all_unset(b)]
