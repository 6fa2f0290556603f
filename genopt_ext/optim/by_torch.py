"""What torch's own code steps: groups with ``differentiable=True``, and sparse gradients of SGD and Adagrad.

Our state and groups are torch's, so its class runs on them as they are: it is given an optimizer that shares the state
and lists only these parameters; the others have been stepped before, by kernels or the reference.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import reference
from . import state as states

if TYPE_CHECKING:
    from .rule import Group, Rule
    from .step import Place, Step

Refuse = Callable[[str, str], None]

# Options of a group that torch's code does not know.
_UNKNOWN_TO_TORCH = ("max_grad_norm", "clip_per_param", "agc", "clip_grad_value", "cautious")

# What a step was asked for besides, by the names of what the native plan is told.
_ASKED = {
    "max_norm": "max_grad_norm",
    "guard": "skip_nonfinite, or genopt_ext.GradScaler without unscale_(),",
    "measure": "a clip by norm in another group",
    "grad_scale": "a GradScaler with fused=True",
    "found_inf": "a GradScaler with fused=True",
    "gradients": "step_and_zero_()",
}


def serves(rule: Rule, group: Group, g: Tensor | None) -> bool:
    """Whether torch's code steps a parameter of ``group`` with the gradient ``g``."""
    if g is None:
        return False
    sparse = rule.serves_sparse and g.layout == torch.sparse_coo
    return sparse or (bool(group.get("differentiable")) and g.layout == torch.strided)


def find(step: Step, rows: Iterable[int]) -> dict[int, Place]:
    """Those of ``rows`` that torch's code steps."""
    if not (step.rule.serves_sparse or any(group.get("differentiable") for group in step.groups)):
        return {}
    places = {r: step.places[r] for r in rows}
    return {r: place for r, place in places.items() if serves(step.rule, step.group(place), step.gradient(place[2]))}


def check(step: Step, place: Place, g: Tensor, refuse: Refuse) -> None:
    """Refuses the row where torch's code would fail in the middle, or would not do what an option says."""
    p = place[2]
    group, state = step.group(place), step.state_of(p)
    what = "sparse gradients" if g.is_sparse else "differentiable=True"
    served = f"torch's own code steps {what}"
    if step.rule.torch_class is None:
        refuse(f"{served}, and there is none of {step.owner}", "use differentiable=False")
    if step.backend not in ("auto", "reference"):
        refuse(f"backend is {step.backend!r}, but {served}", "use backend='auto'")
    options = [name for name in _UNKNOWN_TO_TORCH if group.get(name) is not None]
    options += ["state_dtype"] if states.state_dtype(group, p) not in (None, p.dtype) else []
    options += ["master_weights"] if states.extra(group, p) == "master" else []
    narrow = states.extra(group, p) == "compensation" or states.is_stochastic(group, p)
    options += ["param_rounding"] if narrow else []
    if options:
        refuse(f"{served}, which does not know {options[0]}", f"give it a group without {options[0]}")
    if g.dtype != p.dtype:
        refuse(f"gradient is {g.dtype}, parameter is {p.dtype}, and {served}", f"cast the gradient to {p.dtype}")
    for name, t in state.items():
        if isinstance(t, Tensor) and t.requires_grad and t.is_leaf:
            refuse(
                f"state '{name}' requires grad, and can not be changed in place",
                f"use its .detach(), as torch's own '{name}' is",
            )
        if isinstance(t, Tensor) and t.is_sparse and g.is_sparse and t.sparse_dim() != g.sparse_dim():
            refuse(
                f"its gradient has {g.sparse_dim()} sparse dimensions, and its state '{name}' {t.sparse_dim()}",
                f"keep to one kind of sparse gradients, or replace the state with state['{name}'].to_dense()",
            )
    if not g.is_sparse:
        if p.is_leaf and p.requires_grad:
            refuse(
                "differentiable=True, but a leaf Variable that requires grad is being used in an in-place operation",
                "give the optimizer a .clone() of it, which remembers where it came from",
            )
        if isinstance(count := state.get("step"), Tensor) and count.requires_grad:
            refuse("`requires_grad` is not supported for `step` in differentiable mode", "detach it")
        return
    if group.get("differentiable") and p.requires_grad:
        refuse("differentiable=True, but its gradient is sparse", "use sparse=False")
    if group["weight_decay"] != 0:
        refuse("weight_decay option is not compatible with sparse gradients", "give it a group with weight_decay=0")
    buffer = state.get("momentum_buffer")
    is_dense = isinstance(buffer, Tensor) and not (buffer.is_sparse or reference.is_all_unset(buffer))
    if group.get("nesterov") and is_dense:
        refuse(
            "its gradient is sparse and its momentum is dense, which can not go with nesterov=True",
            "keep its gradients sparse, or use nesterov=False",
        )


def check_step(step: Step, place: Place, arguments: dict[str, Any]) -> None:
    """Refuses what was asked of the whole step and can not be had where torch's code steps ``place``."""
    if step.rule.torch_class is None:
        return  # ``check`` refuses the row, whatever was asked
    differentiable = step.group(place).get("differentiable")
    what = "group is differentiable=True" if differentiable else "gradient is sparse"
    for name, asked in _ASKED.items():
        if name in arguments:
            raise RuntimeError(
                f"{step.owner}.step: {step.describe(place)}: its {what}, so torch's own code steps it, "
                f"and {asked} can not go with that; do without, or step this parameter by an optimizer of its own"
            )


def to_make(rule: Rule, missing: list[str]) -> list[str]:
    """Which of the missing states torch's code needs: for its SGD, a missing buffer says that it is the first step."""
    return [name for name in missing if name not in rule.made_when_set]


def to_dense(state: dict[str, Any]) -> None:
    """Gives kernels a buffer that torch's SGD has made of sparse gradients. What is zero there has been set."""
    for name, t in state.items():
        if isinstance(t, Tensor) and t.is_sparse:
            state[name] = t.to_dense() + 0.0


def take(step: Step, places: Iterable[Place]) -> None:
    """One step of ``places`` by torch's code."""
    places, made_later = list(places), step.rule.made_when_set
    groups: dict[int, dict[str, Any]] = {}
    for i, _, p in places:
        # For-loops: others know neither autograd nor sparse gradients.
        given = {**step.groups[i], "params": [], "foreach": False, "fused": False}
        groups.setdefault(i, given)["params"].append(p)
        for name in made_later & step.state_of(p).keys():
            if isinstance(t := step.state[p][name], Tensor) and reference.is_all_unset(t):
                del step.state[p][name]
    torch_class = step.rule.torch_class
    assert torch_class is not None
    # No hooks and no second look at what the options allow.
    torchs = inspect.unwrap(torch_class.step)
    with _in_grad(step, [p for _, _, p in places]):
        for group in groups.values():
            twin = object.__new__(torch_class)
            twin.__dict__.update(state=step.state, param_groups=[group], defaults={})
            with torch.set_grad_enabled(bool(group.get("differentiable"))):
                torchs(twin)
    for place in places:
        if (decay := step.group(place).get("ema_decay")) is not None:
            reference.average(place[2], step.state[place[2]]["ema"], float(decay))


@contextlib.contextmanager
def _in_grad(step: Step, params: list[Tensor]) -> Iterator[None]:
    """Within the block ``.grad``, which torch's code reads, is what the step takes as gradients."""
    if step.inputs.sums is None:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors that are no leaves
        kept = [p.grad for p in params]
    try:
        for p in params:
            p.grad = step.gradient(p)
        yield
    finally:
        for p, grad in zip(params, kept, strict=True):
            p.grad = grad
