"""One step, as everything that answers for it sees it: what is stepped, by which rule, and what was asked for."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..reference.codecs import STEPPED
from .problems import Row
from .rule import Group, Rule

# A parameter and where it stands: (group index, index in the group, the parameter).
Place = tuple[int, int, Tensor]


def places_of(groups: list[Group]) -> list[Place]:
    return [(i, k, p) for i, group in enumerate(groups) for k, p in enumerate(group["params"])]


def describe(groups: list[Group], place: Place) -> str:
    """The parameter's name in a message. ``listed_as``: of groups made for a step, where their parameters stand."""
    i, k, p = place
    names = groups[i].get("param_names")
    name = f"'{names[k]}', " if names else ""
    i, k = groups[i]["listed_as"][k] if "listed_as" in groups[i] else (i, k)
    return f"group {i} parameter {k} ({name}shape {list(p.shape)})"


class InOrder(Mapping[Tensor, Tensor]):
    """Gradients in the order of the groups' parameters: most steps need to look up none of them."""

    def __init__(self, groups: list[Group], listed: Sequence[Tensor | None]) -> None:
        self.groups, self.listed = groups, listed

    @functools.cached_property
    def _by_parameter(self) -> dict[Tensor, Tensor]:
        params = (p for _, _, p in places_of(self.groups))
        return {p: g for p, g in zip(params, self.listed, strict=True) if g is not None}

    def __getitem__(self, p: Tensor) -> Tensor:
        return self._by_parameter[p]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._by_parameter)

    def __len__(self) -> int:
        return len(self.listed)


@dataclass
class Inputs:
    """What is asked of one step beside the groups' options. Mostly nothing: that is :data:`NOTHING_ELSE`.

    Attributes:
        sums: gradients in the place of ``.grad``: sums over ``micro_batches``, or what was given; None: neither.
        max_grad_norm: for all groups that do not clip alone.
        skip_nonfinite: whether gradients that are not finite skip the step, and are counted.
        checks: whether they skip it, as a GradScaler asks.
        grad_scale, found_inf: a GradScaler's, numbers or 1-element tensors.
        gradients: what the step leaves in gradients, see ``gradients.py``; None: it does not write them.
        group_scales: factors of the groups' gradients, where norms were measured and decided on before: float64.
    """

    sums: Mapping[Tensor, Tensor] | None = None
    micro_batches: int = 0
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    checks: bool = False
    grad_scale: Any = None
    found_inf: Any = None
    gradients: str | None = None
    group_scales: Tensor | None = None


NOTHING_ELSE = Inputs()


@dataclass(slots=True)
class Step:
    """``owner`` is the class, for messages; ``resolved`` what ``backend`` comes to in this process."""

    owner: str
    rule: Rule
    backend: str
    resolved: str
    groups: list[Group]
    state: MutableMapping[Tensor, dict[str, Any]]
    inputs: Inputs
    places: list[Place]

    def gradient(self, p: Tensor) -> Tensor | None:
        """What the step takes as the parameter's gradient."""
        return p.grad if self.inputs.sums is None else self.inputs.sums.get(p)

    def group(self, place: Place) -> Group:
        return self.groups[place[0]]

    def state_of(self, p: Tensor) -> dict[str, Any]:
        return self.state.get(p, {})

    def takes_part(self, place: Place) -> bool:
        p = place[2]
        averages = self.group(place).get("ema_decay") is not None and p.dtype in STEPPED
        return self.gradient(p) is not None or (averages and (p.requires_grad or bool(self.state.get(p))))

    def row(self, place: Place) -> Row:
        p, inputs = place[2], self.inputs
        return Row(
            self.owner,
            self.rule,
            self.group(place),
            p,
            self.gradient(p),
            self.state_of(p),
            is_sum=inputs.sums is not None,
            writes_gradient=inputs.gradients is not None,
        )

    def describe(self, place: Place) -> str:
        return describe(self.groups, place)
