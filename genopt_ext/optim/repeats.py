"""Parameters that are listed more than once, of which torch only warns: each listing is a step of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import reference

if TYPE_CHECKING:
    from torch import Tensor

    from .optimizer import FusedOptimizer, Place

# What looks at all gradients together, or changes them between two steps of one parameter.
_NOT_SERVED = {
    "grads": "accumulate()",
    "max_norm": "max_grad_norm",
    "guard": "skip_nonfinite, or genopt_ext.GradScaler without unscale_(),",
    "measure": "a clip by norm",
}


def turns(optimizer: FusedOptimizer, places: list[Place], arguments: dict[str, Any]) -> list[set[int]]:
    """The rows in turns, the n-th listing of a parameter in the n-th: the order of torch's for-loop.

    Raises where a step that is asked for with ``arguments`` can not be taken in turns.
    """
    listed: dict[Tensor, list[int]] = {}
    for r, (_, _, p) in enumerate(places):
        listed.setdefault(p, []).append(r)
    if len(listed) == len(places):
        return [set(range(len(places)))]
    found: list[set[int]] = [set()]
    for p, rows in listed.items():
        if len(rows) == 1 or optimizer._gradient(p) is None:
            found[0].update(rows)
            continue
        asked = [what for name, what in _NOT_SERVED.items() if name in arguments]
        # One step is one average.
        asked += ["ema_decay" for r in rows if optimizer.param_groups[places[r][0]].get("ema_decay") is not None]
        if asked:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step: {optimizer._name(places[rows[0]])} is the same parameter as "
                f"{optimizer._name(places[rows[1]])}, which can not go with {asked[0]}; list each parameter once"
            )
        found += [set() for _ in range(len(rows) - len(found))]
        for turn, r in zip(found, rows, strict=False):
            turn.add(r)
    return found


def first_buffers(optimizer: FusedOptimizer, places: list[Place], turns: list[set[int]]) -> list[Tensor]:
    """Buffers that wait for their first gradient: torch's SGD has each listing begin with none, then keeps the last."""
    if optimizer.rule != "sgd":
        return []
    states = (optimizer.state.get(places[r][2], {}) for turn in turns[1:] for r in turn)
    buffers = (state.get("momentum_buffer") for state in states)
    return [b for b in buffers if b is not None and reference.is_all_unset(b)]
