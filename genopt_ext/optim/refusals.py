"""What is wrong with a row of a step, told in one sentence each. It is found by the kernels, or by ``problems.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backend, overlap, sharding, tracing
from . import by_torch, problems
from .problems import Problem, Row
from .step import Place, Step

Pairs = Sequence[tuple[int, int]]


def find_mendable(step: Step, place: Place, found: Sequence[Problem], is_torchs: bool) -> Sequence[Problem]:
    """What is to be mended before a row's step, of which the kernels ``found`` problems; raises for what can not be."""
    of_kernels = found[0][1] in problems.OF_KERNELS
    if not (of_kernels or is_torchs) and all(reason in problems.MENDABLE for _, reason in found):
        return found  # as of a first step, where every parameter comes here
    row = step.row(place)
    if of_kernels:
        found = problems.find(row)
    where = f"{step.owner}.step: {step.describe(place)}"
    for operand, reason in found:
        if reason not in problems.MENDABLE:
            raise RuntimeError(f"{where}: {'; '.join(words(row, operand, reason))}")
    if row.g is not None and is_torchs:

        def refuse(problem: str, fix: str) -> None:
            raise RuntimeError(f"{where}: {problem}; {fix}")

        by_torch.check(step, place, row.g, refuse)
    elif of_kernels and step.resolved in _backend.DEVICES:
        tell_reference(step, place)
    return found


_OF_THIS_MODEL = "load a checkpoint of this model"
_WHOLE = "load a checkpoint that has it, or delete the parameter's state to start anew"


def words(row: Row, operand: str, reason: str) -> tuple[str, str]:
    """What is wrong with an operand, and how to mend it."""
    p, g = row.p, row.g
    what = operand if operand in ("parameter", "gradient") else f"state '{operand}'"
    t: Any = row.state.get(operand) if isinstance(row.state, dict) else None
    if reason == "inference":
        return f"{what} is an inference tensor", "make it outside of torch.inference_mode()"
    if reason == "freed":
        return f"{what} has a storage that was made smaller than it is", "resize it back, or give it other memory"
    if reason == "zero tensor":
        return f"{what} is a zero tensor, without memory", "use its .clone()"
    if reason == "spread":
        whole, part = (what, "parameter") if sharding.is_spread(p) else ("parameter", what)
        fix = "spread it as the parameter is, with torch.distributed.tensor.distribute_tensor()"
        return f"{part} is a DTensor, and {whole} is not", fix if whole == what else "replace it by its full_tensor()"
    if operand == "parameter":
        return _of_parameter(row, reason)
    if operand == "gradient":
        assert g is not None
        return _of_gradient(row, g, reason)
    if reason == "not a dict":
        return f"its state is {type(row.state).__name__}, expected dict", "delete it to start anew"
    if reason == "layout":
        kind = "nested" if t.is_nested else t.layout
        return f"{what} is {kind}, expected torch.strided", "replace it with a dense tensor"
    if operand == "step" or operand in row.rule.running:
        return _of_number(operand, t, reason)
    if reason == "device":
        return f"{what} is on {t.device}, parameter on {p.device}", f"move it to {p.device}"
    if operand.endswith(("_codes", "_scales")):
        return _of_codes(row, operand, t, reason)
    if reason == "incomplete":
        return f"its state has {sorted(row.state)} but no '{operand}', which the group's options ask for", _WHOLE
    if reason in ("shape", "not a tensor"):
        got = f"shape {list(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
        return f"{what} has {got}, expected {list(row.rule.state_shape(operand, p))}", _OF_THIS_MODEL
    assert reason == "dtype", reason
    return f"{what} is {t.dtype}, parameter is {p.dtype}", f"cast it to {p.dtype}"


def _of_parameter(row: Row, reason: str) -> tuple[str, str]:
    p = row.p
    problem, fix = {
        "layout": (f"parameter is {'nested' if p.is_nested else p.layout}, expected torch.strided", "store it dense"),
        "dtype": (
            f"parameter is {p.dtype} and has a gradient",
            "clear it, or use float32, float64, bfloat16, float16, complex64 or complex128",
        ),
        "complex": (f"{row.owner} does not support complex parameters", "use Adam or another class"),
        "stochastic": (
            f"param_rounding is 'stochastic', but it is a {type(p).__name__}",
            "use 'kahan' or master_weights=True",
        ),
        "meta": (
            "`fused=True` requires all the params to be floating point Tensors of supported devices, "
            f"but got {p.dtype} and {p.device.type}",
            "use fused=None, or materialize it with to_empty()",
        ),
        "capturable": (
            "capturable=True, but it is on cpu, where there are no graphs to capture",
            "use capturable=False",
        ),
    }[reason]
    return problem, fix


def _of_gradient(row: Row, g: Tensor, reason: str) -> tuple[str, str]:
    p, owner = row.p, row.owner
    if reason == "layout":
        if g.layout == torch.strided:
            return "gradient is nested, expected torch.strided", "replace it with a dense tensor"
        return f"{owner} does not support sparse gradients (got {g.layout})", f"use {row.rule.sparse_class}"
    if reason == "shape":
        return f"gradient has shape {list(g.shape)}, parameter {list(p.shape)}", "clear gradients with zero_grad()"
    if reason == "dtype":
        return f"gradient is {g.dtype}, parameter is {p.dtype}", f"cast the gradient to {p.dtype}"
    assert reason == "device", reason
    return f"gradient is on {g.device}, parameter on {p.device}", f"move the gradient to {p.device}"


def _of_number(name: str, number: Any, reason: str) -> tuple[str, str]:
    if reason == "count":
        return (
            f"state 'step' is {number.item()}, expected a whole number from 0 to 2**53",
            "load a checkpoint that was saved whole, or delete the parameter's state to start anew",
        )
    if reason == "incomplete":
        return f"its state has no '{name}'", _WHOLE
    got = f"of shape {list(number.shape)}, {number.dtype}" if isinstance(number, Tensor) else repr(number)
    return f"state '{name}' is {got}, expected a 0-dim float32 tensor", f"replace it with torch.tensor(float({name}))"


def _of_codes(row: Row, operand: str, t: Any, reason: str) -> tuple[str, str]:
    p, fix = row.p, _OF_THIS_MODEL + ", or delete the parameter's state to start anew"
    if p.is_complex():
        return f"state '{operand}' is of codes of real numbers, and the parameter is {p.dtype}", fix
    if reason in ("incomplete", "not a tensor"):
        return f"its state has {sorted(map(str, row.state))}, and '{operand}' is {type(t).__name__}", fix
    dtype, shape = problems.form_of_codes(row, operand)
    return f"state '{operand}' is {t.dtype} of shape {list(t.shape)}, expected {dtype} of {list(shape)}", fix


def tell_reference(step: Step, place: Place) -> None:
    """Warns that the reference steps a row, or raises where kernels were insisted on."""
    p = place[2]
    assert _backend.native is not None
    if _backend.native.is_watched() or (step.resolved == "auto" and not tracing.has_number(p)):
        return
    what = type(p).__name__ if tracing.is_subclass(p) else f"{p.device.type} {p.layout}"
    if step.rule.factors and p.dim() > 1 and not p.is_contiguous():
        what = f"non-contiguous {what}"
    reason = f"there are no kernels for {what} parameters such as {step.describe(place)}"
    if step.resolved != "auto":
        raise RuntimeError(f"{step.owner}.step: backend is {step.resolved!r}, but {reason}; use 'auto'")
    _backend.warn_once(f"{step.owner}: {reason}; the slower plain-torch reference serves them")


# Rows that share memory


def find_overlaps(step: Step, rows: Sequence[int]) -> tuple[Pairs, Pairs]:
    """What ``Overlaps`` in ``csrc/torch/overlaps.h`` finds, where ``rows`` take part."""
    writes, takes_part = step.inputs.gradients is not None, set(rows)
    owned: list[Tensor] = []
    owners: list[int] = []
    for r, (_, _, p) in enumerate(step.places):
        own = [t for t in (p, *step.state_of(p).values()) if isinstance(t, Tensor) and overlap.can_meet(t)]
        owned += own
        owners += [r] * len(own)
    grads = [(r, g) for r in rows if (g := step.gradient(step.places[r][2])) is not None and overlap.can_meet(g)]
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


def refuse_devices(step: Step) -> None:
    """Raises where parameters that step together stand on several devices."""
    first: Place | None = None
    for place in step.places:
        if not step.takes_part(place):
            continue
        first = first or place
        if place[2].device != first[2].device:
            raise RuntimeError(
                f"{step.owner}.step: {step.describe(first)} is on {first[2].device} and {step.describe(place)} on "
                f"{place[2].device}, and all parameters step by one estimate; give each device an optimizer of its own"
            )


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
