"""An optimizer as a value: its maths by name, its states and its options."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import options
from .options import Range

Group = dict[str, Any]

NO_OPTIONS = ("t", "running", "total", "shared", "totals")  # keyword arguments of a rule's function beside them


@dataclass(frozen=True)
class Rule:
    """What a step needs to know of an optimizer.

    Attributes:
        name: of the rule in ``csrc/rules`` and of its function in :mod:`genopt_ext.reference.rules`.
        states: the tensors that a parameter has beside ``step``, in torch's order, each with the option that asks for
            it, or None.
        ranges: the numbers that options may be.
        running: states that are one number, after ``step``: with what each begins, a number or an option.
        running_dtype: of those numbers.
        shared: numbers that all parameters share, in the order of the rule's ``kShared``: they stand in groups.
        factors: two states that parameters of two dimensions and more have in the place of all others: a number for
            each row of each matrix in their last two dimensions, and one for each column.
        precise: states that are float32 for parameters of 16 bits whatever is asked of moments.
        weights: states that are weights and not moments: they begin as the parameter, and are float32 for parameters of
            16 bits and in the place of any ``state_dtype``.
        torch_class: torch's own, which steps ``differentiable=True`` and, where ``serves_sparse``, sparse gradients.
        counts_steps: whether a parameter has ``step`` whatever the options.
        squares: states that are never negative.
        begins_unset: states that a first gradient sets rather than changes: they begin as -0.0.
        made_when_set: those that torch's class makes at a parameter's first step, and knows that step by.
        initial: options that say with what a state begins, where that is not 0.
        serves_sparse: whether ``torch_class`` is given sparse gradients.
        sparse_class: what a message recommends for them else.
        dtype_eps: what the rule's function calls the option of which None is the machine epsilon of the parameter's
            dtype.
        is_real: whether complex parameters are refused.
        items: what the rule's function calls the numbers of an option that is a tuple.
    """

    name: str
    states: Mapping[str, str | None]
    ranges: Mapping[str, Range]
    running: Mapping[str, float | str] = field(default_factory=dict)
    running_dtype: torch.dtype = torch.float32
    shared: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()
    precise: frozenset[str] = frozenset()
    weights: frozenset[str] = frozenset()
    torch_class: type[torch.optim.Optimizer] | None = None
    counts_steps: bool = True
    squares: frozenset[str] = frozenset()
    begins_unset: frozenset[str] = frozenset()
    made_when_set: frozenset[str] = frozenset()
    initial: Mapping[str, str] | None = None
    serves_sparse: bool = False
    sparse_class: str = "torch.optim.SGD or torch.optim.Adagrad"
    dtype_eps: str | None = None
    is_real: bool = False
    items: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"betas": ("beta1", "beta2")})

    def state_names(self, group: Group, p: Tensor | None = None) -> list[str]:
        """The states that ``p`` of ``group`` has, besides ``step``; those that any may have without it."""
        names = [name for name, option in self.states.items() if option is None or self._value(group, option) != 0]
        if p is None or not self.factors:
            return names
        return [name for name in names if (name in self.factors) == (p.dim() > 1)]

    def state_shape(self, name: str, p: Tensor) -> torch.Size:
        """Of the state ``name`` of ``p``."""
        if name not in self.factors or p.dim() < 2:
            return p.shape
        shape = list(p.shape)
        shape[-1 - self.factors.index(name)] = 1
        return torch.Size(shape)

    def check(self, where: str, group: Group) -> None:
        """Raises TypeError or ValueError for an option out of its range, or that can not go with another."""
        options.check(where, self.ranges, group)
        dtype = group.get("state_dtype")
        if self.states and self.precise.issuperset(self.states) and dtype not in (None, torch.float32):
            raise ValueError(
                f"{where}: Invalid state_dtype: {dtype}; the state is float32 whatever is asked, as there are few "
                "numbers beside a parameter's own: leave it out"
            )

    def options(self, group: Group) -> dict[str, Any]:
        """``group`` as keyword arguments of the rule's function: ``beta1`` is the first of its ``betas``."""
        given = inspect.signature(reference.RULES[self.name]).parameters.values()
        wanted = [each for each in given if each.kind is each.KEYWORD_ONLY and each.name not in NO_OPTIONS]
        # A group has an option with a default only where it is set.
        known = {each.name: each.default for each in wanted if each.default is not each.empty} | group
        return {each.name: self._value(known, each.name) for each in wanted}

    def _value(self, group: Group, name: str) -> Any:
        for key, names in self.items.items():
            if name in names:
                return group[key][names.index(name)]
        return group[name]

    def initial_number(self, group: Group, name: str) -> float:
        """With what the running number ``name`` begins."""
        begin = self.running[name]
        return float(group[begin] if isinstance(begin, str) else begin)

    def initial_value(self, group: Group, p: Tensor, name: str) -> complex:
        """With what the state ``name`` of ``p`` begins. -0.0 says "not yet set": see ``csrc/math/numbers.h``."""
        option = (self.initial or {}).get(name)
        value = float(group[option]) if option else -0.0 if name == "ema" or name in self.begins_unset else 0.0
        return complex(value, value) if p.is_complex() else value
