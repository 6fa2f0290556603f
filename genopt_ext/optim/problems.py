"""What keeps the reference from stepping a row: the twin of ``csrc/torch/rows.h``, check by check in its order.

A row is a parameter with its gradient and state. A problem is an operand and a reason, by the names of
``csrc/torch/refusal.h``; reasons of layouts and subclasses are the reference's own. ``refusals.py`` words them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import overlap, sharding, tracing
from ..reference import codecs
from ..reference.codecs import MIXES, STEPPED
from . import by_torch
from . import state as states
from .options import is_step_count
from .rule import Group, Rule

# An operand ("parameter", "gradient", "state" or a key of the state dict), and the reason.
Problem = tuple[str, str]

MENDABLE = frozenset(("missing", "storage", "away"))
OF_KERNELS = frozenset(("watched", "differentiable", "no kernel", "unaligned"))  # others may step the row


class Row(NamedTuple):
    """``is_sum``: the gradient was accumulated by this package; ``writes_gradient``: the step writes to it."""

    owner: str
    rule: Rule
    group: Group
    p: Tensor
    g: Tensor | None
    state: Any
    is_sum: bool = False
    writes_gradient: bool = False

    @property
    def is_torchs(self) -> bool:
        """Whether torch's own code steps it."""
        return by_torch.serves(self.rule, self.group, self.g)


def find(row: Row) -> Sequence[Problem]:
    """All that can be mended, or the one thing that can not."""
    if row.g is not None and (problem := _find_in_gradient(row, row.g)) is not None:
        return [problem]
    return find_in_state(row, only_averages=row.g is None)


def _find_in_gradient(row: Row, g: Tensor) -> Problem | None:
    p, group = row.p, row.group
    for operand, t, is_written in (("gradient", g, row.writes_gradient), ("parameter", p, True)):
        if (reason := _of_memory(t, is_written, may_be_sparse=row.is_torchs)) is not None:
            return operand, reason
    if sharding.is_spread(p) != sharding.is_spread(g):
        return "gradient", "spread"
    if g.shape != p.shape:
        return "gradient", "shape"
    mixes = row.is_sum or (g.dtype in MIXES and p.dtype in MIXES)
    if g.is_complex() != p.is_complex() or not (mixes or g.dtype == p.dtype):
        return "gradient", "dtype"
    if g.device != p.device:
        return "gradient", "device"
    if p.dtype not in STEPPED:
        return "parameter", "dtype"
    if row.rule.is_real and p.is_complex():
        return "parameter", "complex"
    # Factors are of whole matrices, which the reference steps as they are.
    knows_places = sharding.knows_places(p) and not (row.rule.factors and p.dim() > 1)
    if states.is_stochastic(group, p) and tracing.is_subclass(p) and not knows_places:
        return "parameter", "stochastic"
    if p.is_meta and group.get("fused"):
        return "parameter", "meta"
    if group.get("capturable") and p.is_cpu:
        return "parameter", "capturable"
    return None


def _of_memory(t: Tensor, is_written: bool, may_be_sparse: bool) -> str | None:
    if (t.layout != torch.strided or t.is_nested) and not may_be_sparse:
        return "layout"
    if t._is_zerotensor():
        return "zero tensor"
    if is_written and t.is_inference() and not torch.is_inference_mode_enabled():
        return "inference"
    return None if overlap.is_backed(t) else "freed"


def find_in_state(row: Row, only_averages: bool) -> Sequence[Problem]:
    """As :func:`find`, of the state alone."""
    if not isinstance(row.state, dict):
        return [("state", "not a dict")]
    rule, group = row.rule, row.group
    further = ["ema"] if only_averages else states.further_names(rule, group, row.p)
    counts = ["step"] if rule.counts_steps else []
    own = [] if only_averages else [*counts, *rule.running, *rule.state_names(group, row.p)]
    state = {name: t for name, t in row.state.items() if t is not None}
    found: list[Problem] = []
    for name, t in state.items():
        if name in ("master", "compensation") and name not in further:
            if not only_averages:
                found.append((name, "storage"))  # what another choice of storage has left behind
        elif (stem := _stem(name)) in own or name in further:
            reason = _of_entry(row, name, stem, t)
            if reason in MENDABLE:
                found.append((name, reason))
            elif reason is not None:
                return [(name, reason)]
    unnamed = [name for name in own if name not in state]
    for name in unnamed:
        codes, scales = name + "_codes", name + "_scales"
        if (codes in state) != (scales in state):
            return [(scales if codes in state else codes, "incomplete")]
    absent = [name for name in unnamed if name + "_codes" not in state]
    if absent and len(absent) < len(own):
        return [(absent[0], "incomplete")]
    absent += [name for name in further if name not in own and name not in state]
    return found + [(name, "missing") for name in absent]


def _stem(name: Any) -> str:
    return str(name).removesuffix("_codes").removesuffix("_scales")


def _of_entry(row: Row, name: str, stem: str, t: Any) -> str | None:
    """Of what the state has as ``name``, by that name's own form, whether or not it is the one that is wanted."""
    p = row.p
    if not isinstance(t, Tensor):
        return "not a tensor"
    is_sparse = row.rule.serves_sparse and t.layout == torch.sparse_coo
    if (reason := _of_memory(t, True, may_be_sparse=row.is_torchs or is_sparse)) is not None:
        return reason
    if name == "step" or name in row.rule.running:
        reason = of_step_count(t) if name == "step" else of_number(t)
        return reason or ("away" if states.is_away(p, t) else None)
    if sharding.is_spread(p) != sharding.is_spread(t):
        return "spread"
    are_codes, are_scales = name == stem + "_codes", name == stem + "_scales"
    if are_codes or are_scales:
        dtype, shape = form_of_codes(row, name)
        fits = t.dtype == dtype and not p.is_complex()
    else:
        shape, fits = row.rule.state_shape(stem, p), t.dtype in STEPPED and t.is_complex() == p.is_complex()
    if t.shape not in (_scales_that_may_be(p) if are_scales else [shape]):
        return "shape"
    if not fits:
        return "dtype"
    if t.device != p.device:
        return "device"
    return None if states.is_as_asked(row.rule, row.group, p, name, t) else "storage"


def _scales_that_may_be(p: Tensor) -> list[torch.Size]:
    """Their shapes. Those of other blocks are stored anew, but for DTensors, whose cuts would have divided these."""
    shapes = codecs.scales_shapes(p)
    return shapes[:1] if sharding.is_spread(p) else shapes


def form_of_codes(row: Row, name: str) -> tuple[torch.dtype, torch.Size]:
    """The dtype and shape of a state's codes, or of their scales."""
    if name.endswith("_scales"):
        return torch.float32, codecs.scales_shapes(row.p)[0]
    return torch.uint8 if _stem(name) in row.rule.squares else torch.int8, row.p.shape


def of_number(t: Tensor) -> str | None:
    """The reason why ``t`` can not be a number of the state."""
    if t.numel() != 1:
        return "shape"
    return "dtype" if t.dtype not in STEPPED or t.is_complex() else None


def of_step_count(step: Tensor) -> str | None:
    """The reason why ``step`` can not be a count; one on a GPU is not read."""
    if (reason := of_number(step)) is not None:
        return reason
    is_read = step.is_cpu and tracing.has_number(step)
    return "count" if is_read and not is_step_count(step.item()) else None
