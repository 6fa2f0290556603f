"""What can be wrong with a row of a step, told in one sentence each; a row is a parameter with what belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backend, overlap, tracing
from ..reference.codecs import MIXES, STEPPED
from . import by_torch
from . import state as states
from .options import is_step_count
from .rule import Rule
from .step import Place, Step

Refuse = Callable[[str, str], Any]  # raises, for a problem and its fix

Pairs = Sequence[tuple[int, int]]


def check(step: Step, place: Place) -> list[str]:
    """The row's states that are to be made; raises where the row can not be served."""
    p = place[2]
    g, group, rule, state = step.gradient(p), step.group(place), step.rule, step.state_of(p)

    def refuse(problem: str, fix: str) -> None:
        raise RuntimeError(f"{step.owner}.step: {step.describe(place)}: {problem}; {fix}")

    if g is None:  # only an average moves; it begins with the others'
        if (ema := state.get("ema")) is None:
            return ["ema"]
        check_numbers(refuse, p, "ema", ema)
        return []
    for_torch = by_torch.serves(rule, group, g)
    _check_gradient(step, p, g, for_torch, refuse)
    if step.resolved in _backend.DEVICES and _kernels_for(p) != step.resolved:
        tell_reference(step, place)
    if states.is_stochastic(group, p) and tracing.is_subclass(p):
        refuse(f"param_rounding is 'stochastic', but it is a {type(p).__name__}", "use 'kahan' or master_weights=True")
    if p.is_meta and group.get("fused"):
        refuse(
            "`fused=True` requires all the params to be floating point Tensors of supported devices, "
            f"but got {p.dtype} and {p.device.type}",
            "use fused=None, or materialize it with to_empty()",
        )
    _check_memory(step, place, g, for_torch, refuse)
    if group.get("capturable") and p.device.type == "cpu":
        refuse("capturable=True, but it is on cpu, where there are no graphs to capture", "use capturable=False")
    if for_torch:
        by_torch.check(step, place, g, refuse)
    missing = check_state(rule, refuse, p, state, rule.state_names(group))
    further = states.further_names(rule, group, p)
    if states.counts_steps(rule, group, p):
        check_step_count(refuse, state)
    missing += [name for name in further if state.get(name) is None and name not in missing]
    return by_torch.to_make(rule, missing) if for_torch else missing


def _kernels_for(p: Tensor) -> str | None:
    assert _backend.native is not None
    backend: str | None = _backend.native.kernels_for(p)
    return backend


def _check_gradient(step: Step, p: Tensor, g: Tensor, for_torch: bool, refuse: Refuse) -> None:
    if g.layout != torch.strided and not for_torch:
        refuse(f"{step.owner} does not support sparse gradients (got {g.layout})", f"use {step.rule.sparse_class}")
    if p.layout != torch.strided:
        refuse(f"parameter is {p.layout}, expected torch.strided", "store it dense")
    if g.shape != p.shape:
        refuse(f"gradient has shape {list(g.shape)}, parameter {list(p.shape)}", "clear gradients with zero_grad()")
    mixes = g.dtype in MIXES and p.dtype in MIXES
    if g.dtype != p.dtype and not mixes and step.inputs.sums is None:
        refuse(f"gradient is {g.dtype}, parameter is {p.dtype}", f"cast the gradient to {p.dtype}")
    if g.device != p.device:
        refuse(f"gradient is on {g.device}, parameter on {p.device}", f"move the gradient to {p.device}")
    if p.dtype not in STEPPED:
        refuse(
            f"parameter is {p.dtype} and has a gradient",
            "clear it, or use float32, float64, bfloat16, float16, complex64 or complex128",
        )


def _check_memory(step: Step, place: Place, g: Tensor, for_torch: bool, refuse: Refuse) -> None:
    """Looks at the tensors that the row's step reads or writes, as far as they are there."""
    p, state = place[2], step.state_of(place[2])
    operands = {"parameter": p, "gradient": g}
    for name in [*step.rule.state_names(step.group(place)), "step", "ema", "master", "compensation"]:
        for key in (name, f"{name}_codes", f"{name}_scales") if isinstance(state, dict) else ():
            if isinstance(t := state.get(key), Tensor):
                operands[f"state '{key}'"] = t
    writes = step.inputs.gradients is not None
    for name, t in operands.items():
        if t.is_inference() and not torch.is_inference_mode_enabled() and (name != "gradient" or writes):
            refuse(f"{name} is an inference tensor", "make it outside of torch.inference_mode()")
        if t._is_zerotensor():
            refuse(f"{name} is a zero tensor, without memory", "use its .clone()")
        made_of_sparse = step.rule.serves_sparse and t.layout == torch.sparse_coo and name.startswith("state")
        if (t.layout != torch.strided or t.is_nested) and not (for_torch or made_of_sparse):
            kind = "nested" if t.is_nested else t.layout
            refuse(f"{name} is {kind}, expected torch.strided", "replace it with a dense tensor")


def check_state(rule: Rule, refuse: Refuse, p: Tensor, state: Any, names: list[str]) -> list[str]:
    """Which of ``names`` and ``step`` are to be made, all or none; raises for what is not the state of ``p``."""
    if not isinstance(state, dict):
        refuse(f"its state is {type(state).__name__}, expected dict", "delete it to start anew")
    wanted = (["step"] if rule.counts_steps else []) + names
    absent = [name for name in wanted if state.get(name) is None and state.get(name + "_codes") is None]
    scales = [name for name in names if state.get(name + "_scales") is not None]
    missing = absent if len(absent) == len(wanted) and not scales else []
    for name in scales:
        _check_codes(rule, refuse, p, state, name)
    if absent and not missing:
        fix = "load a checkpoint that has it, or delete the parameter's state to start anew"
        refuse(f"its state has {sorted(state)} but no '{absent[0]}', which the group's options ask for", fix)
    for name in names:
        if state.get(name) is None and name not in scales and name not in missing:
            _check_codes(rule, refuse, p, state, name)
    for name in [*names, "ema", "master", "compensation"]:
        if (t := state.get(name)) is not None:
            check_numbers(refuse, p, name, t)
    return missing


def check_numbers(refuse: Refuse, p: Tensor, name: str, t: Any) -> None:
    """Raises where the state ``t`` can not be numbers of ``p``."""
    if not isinstance(t, Tensor) or t.shape != p.shape:
        got = f"shape {list(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
        refuse(f"state '{name}' has {got}, expected {list(p.shape)}", "load a checkpoint of this model")
    if t.is_complex() != p.is_complex() or t.dtype not in STEPPED:
        refuse(f"state '{name}' is {t.dtype}, parameter is {p.dtype}", f"cast it to {p.dtype}")
    if t.device != p.device:
        refuse(f"state '{name}' is on {t.device}, parameter on {p.device}", f"move it to {p.device}")


def check_step_count(refuse: Refuse, state: dict[str, Any]) -> None:
    """Raises where ``step``, if it is there, can not be a count; one on a GPU is not read."""
    step = state.get("step")
    if step is None:
        return
    if not (isinstance(step, Tensor) and step.numel() == 1 and step.dtype in STEPPED and not step.is_complex()):
        got = f"of shape {list(step.shape)}, {step.dtype}" if isinstance(step, Tensor) else repr(step)
        refuse(f"state 'step' is {got}, expected a 0-dim float32 tensor", "replace it with torch.tensor(float(step))")
    if step.is_cpu and tracing.has_number(step) and not is_step_count(step.item()):
        refuse(
            f"state 'step' is {step.item()}, expected a whole number from 0 to 2**53",
            "load a checkpoint that was saved whole, or delete the parameter's state to start anew",
        )


def _check_codes(rule: Rule, refuse: Refuse, p: Tensor, state: dict[str, Any], name: str) -> None:
    if (broken := states.broken(state, name, p, name not in rule.squares)) is not None:
        refuse(*broken)


def tell_reference(step: Step, place: Place) -> None:
    """Warns that the reference steps a row, or raises where kernels were insisted on."""
    p = place[2]
    assert _backend.native is not None
    if _backend.native.is_watched() or (step.resolved == "auto" and not tracing.has_number(p)):
        return
    what = type(p).__name__ if tracing.is_subclass(p) else f"{p.device.type} {p.layout}"
    reason = f"there are no kernels for {what} parameters such as {step.describe(place)}"
    if step.resolved != "auto":
        raise RuntimeError(f"{step.owner}.step: backend is {step.resolved!r}, but {reason}; use 'auto'")
    _backend.warn_once(f"{step.owner}: {reason}; the slower plain-torch reference serves them")


# Rows that share memory


def find_overlaps(step: Step, rows: Sequence[int]) -> tuple[Pairs, Pairs]:
    """What ``check_overlaps`` in ``csrc/torch_plan.h`` finds, where ``rows`` take part."""
    writes, takes_part = step.inputs.gradients is not None, set(rows)
    owned: list[Tensor] = []
    owners: list[int] = []
    for r, (_, _, p) in enumerate(step.places):
        own = [t for t in (p, *step.state_of(p).values()) if isinstance(t, Tensor) and overlap.has_memory(t)]
        owned += own
        owners += [r] * len(own)
    grads = [(r, g) for r in rows if (g := step.gradient(step.places[r][2])) is not None and overlap.has_memory(g)]
    overlaps, of_gradients = [], []
    for a, b in overlap.pairs([*owned, *(g for _, g in grads)]):
        if b < len(owned):
            if {owners[a], owners[b]} <= takes_part:
                overlaps.append((owners[a], owners[b]))
        elif a < len(owned):
            r, g = grads[b - len(owned)]
            # The very same elements in the same order are read before they are written.
            same = owners[a] == r and g.data_ptr() == owned[a].data_ptr() and g.dtype == owned[a].dtype
            same = same and (g.shape, g.stride()) == (owned[a].shape, owned[a].stride())
            if writes or (owners[a] in takes_part and not same):
                of_gradients.append((r, owners[a]))
    return overlaps, of_gradients


def refuse_overlaps(step: Step, overlaps: Pairs, grad_overlaps: Pairs) -> None:
    places = step.places
    for a, b in grad_overlaps:
        whose = "its own parameter or state" if a == b else f"the parameter or state of {step.describe(places[b])}"
        raise RuntimeError(
            f"{step.owner}.step: {step.describe(places[a])}: its gradient shares memory with {whose}, which "
            "the step changes while it reads, or zeroes with the gradient; give it memory of its own: "
            "p.grad = p.grad.clone()"
        )
    for a, b in overlaps:
        if a != b and places[a][2] is places[b][2]:
            continue  # stepped in turns
        where = f"{step.owner}.step: {step.describe(places[a])}"
        if a == b:
            raise RuntimeError(
                f"{where}: its elements, or its state's, share memory with one another (as after expand()), so an "
                "update in place would be wrong; give it memory of its own with .clone()"
            )
        raise RuntimeError(
            f"{where} or its state shares memory with {step.describe(places[b])}, so an update in place would be "
            "wrong; list only one of them, or give them memory of their own with .clone()"
        )
