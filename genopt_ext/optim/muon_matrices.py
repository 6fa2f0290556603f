"""The matrices of a step of Muon: which are stepped together, and what is made of each between its two phases."""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import sharding
from ..reference import codecs
from . import routing
from . import state as states
from .muon_owners import Loads, Owners
from .orthogonal import Coefficients, coefficients_of, dtype_of, orthogonalized
from .rule import Group
from .step import Place, describe

ELEMENTS = 1 << 24  # of matrices that are stepped at a time, for what products need of memory

# A group's options that say how its matrices are made orthogonal.
PRODUCT_OPTIONS = (
    "ns_coefficients",
    "ns_steps",
    "eps",
    "adjust_lr_fn",
    "split_sizes",
    "num_heads",
    "stacked",
    "normuon",
    "normuon_beta2",
    "cautious",
)
_STORAGE = ("state_dtype", "min_int8_size")
MOMENTUM_OPTIONS = ("momentum", "nesterov", "clip_grad_value", *_STORAGE)
UPDATE_OPTIONS = (
    "lr",
    "weight_decay",
    "cautious",
    "ema_decay",
    "param_rounding",
    "rounding_seed",
    "master_weights",
    *_STORAGE,
)


def form_of(p: Tensor) -> tuple[Any, ...]:
    """All of a parameter that decides with which others it is stepped."""
    cut = (p.device_mesh, p.placements) if sharding.is_spread(p) else None  # type: ignore[attr-defined]
    return p.dtype == torch.float64, p.device, p.shape, p.stride(), cut


def shape_scale(scaling: str | None, rows: int, columns: int) -> float:
    """What the learning rate of a matrix is multiplied with: torch's ``adjust_lr_fn``."""
    if scaling == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / max(columns, 1)))


@dataclass
class Batch:
    """Parameters of one form.

    Attributes:
        places: where they stand.
        updates: what is made orthogonal for each: ``[parameters, *shape]``, of DTensors this process' parts.
        owners: who makes them orthogonal, where processes have parts.
        dtype: of products.
        blocks: the rows of the matrices in each, one below the other, and ``scales``, theirs.
        columns: of them all.
        coefficients, eps: of the iteration.
        beta2: NorMuon's, or None.
        is_cautious: whether updates are kept where their sign is the gradient's alone.
    """

    places: list[Place]
    updates: Tensor
    owners: Owners | None
    dtype: torch.dtype
    blocks: tuple[int, ...]
    columns: int
    scales: list[float]
    coefficients: Coefficients
    eps: float
    beta2: float | None
    is_cautious: bool

    @classmethod
    def make(cls, places: list[Place], group: Group, loads: Loads) -> Batch:
        p = places[0][2]
        blocks = routing.matrix_blocks(p, group)
        assert blocks is not None
        blocks = blocks or (0,)  # a stack of no matrix
        _, _, columns = routing.matrices(p, group)
        dtype = dtype_of(min(blocks), columns, p.device)
        return cls(
            places,
            _room(len(places), p, torch.float64 if p.dtype == torch.float64 else dtype),
            Owners.make(p, len(places), loads) if sharding.is_spread(p) else None,
            dtype,
            blocks,
            columns,
            [shape_scale(group["adjust_lr_fn"], rows, columns) for rows in blocks],
            coefficients_of(group["ns_coefficients"], group["ns_steps"]),
            float(group["eps"]),
            float(group["normuon_beta2"]) if group["normuon"] else None,
            group.get("cautious") == "update",
        )

    def orthogonal(
        self, state: MutableMapping[Tensor, Any], found_inf: Any, gradient: Callable[[Tensor], Any]
    ) -> Sequence[Tensor]:
        """The updates, each matrix made orthogonal, in the parameters' shape. ``gradient``: of a parameter."""
        whole = self.updates if self.owners is None else self.owners.gather(self.updates)
        x = whole.reshape(len(whole), sum(self.blocks), self.columns).to(self.dtype)
        if x.numel() == 0:
            made = x
        elif len(set(self.blocks)) == 1:
            one = x.reshape(len(x) * len(self.blocks), self.blocks[0], self.columns)
            made = orthogonalized(one, self.coefficients, self.eps).reshape(x.shape)
        else:
            made = self._of_unequal_blocks(x)
        if self.beta2 is not None:
            self._normalize_rows(made, state, found_inf, self.beta2)
        if self.is_cautious:
            self._mask(made, [gradient(p) for _, _, p in self.places])
        made = made.reshape(whole.shape)
        return self.as_parameters(made if self.owners is None else self.owners.scatter(made, self.updates))

    def as_parameters(self, made: Tensor) -> Sequence[Tensor]:
        """``[parameters, *shape]`` one by one; of DTensors, from this process' parts, DTensors."""
        return [sharding.spread_as(t, p) for t, (_, _, p) in zip(made.unbind(), self.places, strict=True)]

    def _of_unequal_blocks(self, x: Tensor) -> Tensor:
        parts = []
        for part, scale in zip(x.split(self.blocks, dim=1), self.scales, strict=True):
            part = orthogonalized(part, self.coefficients, self.eps)
            parts.append(part if scale == self.scales[0] else part * (scale / self.scales[0]))
        return torch.cat(parts, dim=1)

    def _normalize_rows(self, made: Tensor, state: MutableMapping[Tensor, Any], found_inf: Any, beta2: float) -> None:
        """NorMuon (Li et al., arXiv 2510.05491): rows divided by the root of their running mean square.

        The norm of each matrix stays, so that scalings of the learning rate mean what they do without.
        """
        averages = [state[p]["row_square_avg"] for _, _, p in self.places]
        squares = torch.linalg.vector_norm(made, dim=2, dtype=torch.float32).square()
        old = torch.stack(averages)
        new = old.lerp(squares / max(self.columns, 1), 1.0 - beta2)
        factors = new.sqrt().add_(1e-8).reciprocal_()
        whole, scaled = self._by_matrix(squares), self._by_matrix(squares * factors.square())
        made.mul_((factors * (whole / scaled.clamp(min=1e-30)).sqrt()).unsqueeze(2))
        if found_inf is not None:
            new = torch.where(torch.as_tensor(found_inf, device=new.device) != 0, old, new)
        torch._foreach_copy_(averages, list(new.unbind()))

    def _mask(self, made: Tensor, grads: list[Tensor]) -> None:
        """Cautious (Liang et al., arXiv 2411.16085): 0 where a gradient has not the same sign, the rest larger."""
        signs = torch.stack([g.sign().to(made.dtype) for g in grads]).reshape(made.shape)
        agrees = signs.mul_(made.sign()) > 0  # of signs, as a product of small numbers may be 0
        shares = self._by_matrix(agrees.sum(2, dtype=torch.float32))
        shares = shares / self._by_matrix(torch.full_like(shares, self.columns))
        made.mul_(agrees).div_(shares.clamp(min=1e-3).unsqueeze(2))  # a product leaves NaN what it is

    def _by_matrix(self, of_rows: Tensor) -> Tensor:
        """At each of the rows, the sum over those of its matrix: of [parameters, rows]."""
        if len(set(self.blocks)) == 1:
            of_blocks = of_rows.unflatten(1, (len(self.blocks), self.blocks[0]))
            return of_blocks.sum(2, keepdim=True).expand_as(of_blocks).flatten(1)
        return torch.cat([part.sum(1, keepdim=True).expand_as(part) for part in of_rows.split(self.blocks, 1)], 1)


def check_row_averages(owner: str, groups: list[Group], places: list[Place], state: Any) -> list[Place]:
    """Raises RuntimeError for NorMuon's state that is none of its parameter.

    Returns:
        The parameters that have none yet.
    """
    lacking = []
    for place in places:
        i, _, p = place
        if not groups[i]["normuon"]:
            continue
        found = state[p].get("row_square_avg") if p in state else None
        if found is None:
            lacking.append(place)
        elif not isinstance(found, Tensor) or _form(found) != (torch.float32, (_rows_of(p, groups[i]),), p.device):
            got = type(found).__name__
            if isinstance(found, Tensor):
                got = f"{found.dtype} of shape {list(found.shape)} on {found.device}"
            raise RuntimeError(
                f"{owner}.step: {describe(groups, place)}: state 'row_square_avg' is {got}, expected torch.float32 of "
                f"shape [{_rows_of(p, groups[i])}] on {p.device}; load a checkpoint of this model, or delete this "
                "state to start it anew"
            )
    return lacking


def _form(t: Tensor) -> tuple[torch.dtype, tuple[int, ...], torch.device]:
    return t.dtype, tuple(t.shape), t.device


def make_row_averages(owner: str, groups: list[Group], lacking: list[Place], state: Any) -> None:
    if lacking:
        states.refuse_capture(owner)
    with torch.inference_mode(False):
        for i, _, p in lacking:
            rows = _rows_of(p, groups[i])
            state[p]["row_square_avg"] = torch.zeros(rows, dtype=torch.float32, device=p.device)


def _rows_of(p: Tensor, group: Group) -> int:
    count, rows, _ = routing.matrices(p, group)
    return count * rows


def _room(count: int, p: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for ``count`` matrices that lie as ``p`` does."""
    p = sharding.local(p)
    order = codecs.order_of(p)
    with torch.inference_mode(False):  # it is kept for steps outside of it
        room = torch.empty([count, *(p.shape[d] for d in order)], dtype=dtype, device=p.device)
    return room if order == sorted(order) else room.permute([0, *(order.index(d) + 1 for d in range(p.dim()))])


class Made:
    """Groups that are made of an optimizer's for one phase.

    Attributes:
        groups: the made ones.
        origins: the index of the optimizer's group that each is made of.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.groups: list[Group] = []
        self.origins: list[int] = []
        self._made: dict[Any, tuple[Group, list[Any]]] = {}

    def add(self, groups: list[Group], place: Place, p: Tensor, source: Any = None, **more: float) -> None:
        """``p``: what stands in the parameter's place; ``source``: of its gradient; ``more``: further options."""
        i, k, _ = place
        key = (i, *more.values())
        if key not in self._made:
            self._made[key] = {"params": [], "listed_as": [], "param_names": [], **more}, []
            self.groups.append(self._made[key][0])
            self.origins.append(i)
        made, sources = self._made[key]
        sources.append(source)
        made["params"].append(p)
        made["listed_as"].append((i, k))
        if names := groups[i].get("param_names"):
            made["param_names"].append(names[k])

    @property
    def sources(self) -> list[Any]:
        """In the order of the groups' parameters."""
        return [source for _, sources in self._made.values() for source in sources]

    def renew(self, groups: list[Group]) -> None:
        """Takes the options as they are now."""
        for made, i in zip(self.groups, self.origins, strict=True):
            group = groups[i]
            for name in self.names:
                if name in group:
                    made[name] = group[name]
                else:
                    made.pop(name, None)
            if made.get("cautious") == "update":  # done where matrices are made orthogonal
                made["cautious"] = None


class Chunk:
    """What is stepped at a time.

    Attributes:
        momentum, update: the groups of both phases.
        grads_of: the parameters whose gradients the first takes; ``made_at``: the batch and the place in it of those
            that the second takes.
    """

    def __init__(self, groups: list[Group], batches: list[list[Place]]) -> None:
        loads: Loads = {}
        self.batches = [Batch.make(places, groups[places[0][0]], loads) for places in batches]
        self.momentum, self.update = Made(MOMENTUM_OPTIONS), Made(UPDATE_OPTIONS)
        for b, batch in enumerate(self.batches):
            for r, (place, u) in enumerate(zip(batch.places, batch.as_parameters(batch.updates), strict=True)):
                self.momentum.add(groups, place, u, source=place[2])
                self.update.add(groups, place, place[2], source=(b, r), shape_scale=batch.scales[0])
        self.grads_of: list[Tensor] = self.momentum.sources
        self.made_at: list[tuple[int, int]] = self.update.sources
        self._of: list[Any] = [None] * len(self.grads_of)
        self._states: dict[Tensor, dict[str, Any]] = {}
        self._matrices = [u for group in self.momentum.groups for u in group["params"]]

    def renew(self, groups: list[Group]) -> None:
        self.momentum.renew(groups)
        self.update.renew(groups)

    def momentum_state(self, state: MutableMapping[Tensor, Any]) -> dict[Tensor, dict[str, Any]]:
        """The first phase's state: what the second alone is to see is left out."""
        for k, p in enumerate(self.grads_of):
            own = state[p]
            if "master" in own or "compensation" in own:
                own = {name: own[name] for name in _MOMENTUM_STATE if name in own}
            if own is not self._of[k]:
                self._of[k] = self._states[self._matrices[k]] = own
        return self._states

    def update_state(self, state: MutableMapping[Tensor, Any]) -> MutableMapping[Tensor, Any]:
        """The second phase's state: a step count that the first has advanced stands where it was."""
        made = [group for group in self.update.groups if group.get("param_rounding") == "stochastic"]
        twice = [p for group in made for p in group["params"] if _counts_twice(group, p)]
        if not twice:
            return state
        before = {p: {**state[p], "step": (state[p]["step"] - 1).clamp_(min=0)} for p in twice}
        return {p: before.get(p, state[p]) for p in self.grads_of}


_MOMENTUM_STATE = ("step", "momentum_buffer", "momentum_buffer_codes", "momentum_buffer_scales")


def _counts_twice(group: Group, p: Tensor) -> bool:
    """Whether both phases round by the step count."""
    return states.is_stochastic(group, p) and states.state_dtype(group, p) in (torch.int8, torch.bfloat16)


def split(groups: list[Group], places: list[Place]) -> list[list[list[Place]]]:
    """Parameters of one form and with the same options together: lists for the batches of each chunk."""
    options = [tuple(str(group.get(name)) for name in PRODUCT_OPTIONS) for group in groups]
    alike: dict[Any, list[Place]] = {}
    for place in places:
        alike.setdefault((form_of(place[2]), options[place[0]]), []).append(place)
    found: list[list[list[Place]]] = [[]]
    elements = 0
    for some in alike.values():
        p = some[0][2]
        at_once = max(1, ELEMENTS // max(1, p.numel()))
        for first in range(0, len(some), at_once):
            batch = some[first : first + at_once]
            elements += len(batch) * p.numel()
            if found[-1] and (elements > ELEMENTS or found[-1][0][0][2].device != p.device):
                found.append([])
                elements = len(batch) * p.numel()
            found[-1].append(batch)
    return [batches for batches in found if batches]
