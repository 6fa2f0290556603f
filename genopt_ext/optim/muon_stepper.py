"""A step of Muon: what is wrong, norms of all gradients together, AdamW's groups, and the matrices' three phases.

Momentum is one fused pass from gradients into matrices of bfloat16 (``csrc/rules/muon_momentum.h``); they are made
orthogonal by torch's products (``orthogonal.py``); decay, scaling and update are one fused pass more
(``csrc/rules/muon_update.h``). Masters, rounding and the weights' average belong to the last, what is done to gradients
to the first. Nothing is changed before everything was looked at, and nothing waits for a device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import clip, tracing
from ..reference import codecs
from . import adam, apart, options, routing
from . import state as states
from .options import Range, clips_alone
from .orthogonal import coefficients_of, orthogonalized
from .rule import Group, Rule
from .step import NOTHING_ELSE, Inputs, Place, describe, places_of
from .stepper import Stepper

MUON = Rule(
    name="muon_momentum",
    states={"momentum_buffer": None},
    ranges={
        "lr": Range("learning rate"),
        "weight_decay": Range("weight decay"),
        "momentum": Range("momentum"),
        "eps": Range("epsilon value"),
        "ns_steps": Range("ns_steps", below=100),
        "normuon_beta2": Range("normuon_beta2", below=1.0),
    },
    counts_steps=False,
    sparse_class="algorithm='adamw' and dense gradients",
)
UPDATE = Rule(name="muon_update", states={}, ranges={}, counts_steps=False)
ADAMW = adam.RULE

SCALINGS = (None, "original", "match_rms_adamw")
ELEMENTS = 1 << 24  # of matrices that are stepped at a time, for what products need of memory
_MOMENTUM_OPTIONS = ("momentum", "nesterov", "clip_grad_value", "state_dtype", "min_int8_size")
_UPDATE_OPTIONS = ("lr", "weight_decay", "ema_decay", "param_rounding", "rounding_seed", "master_weights")


class Matrix(NamedTuple):
    """A parameter of a step, with its group, its gradient and what it is made of."""

    place: Place
    group: Group
    grad: Tensor
    blocks: tuple[int, ...]


class Batch(NamedTuple):
    """Parameters of one shape, and what is made orthogonal for each: ``[parameters, *shape]``."""

    matrices: list[Matrix]
    updates: Tensor


def check(where: str, group: Group) -> None:
    """Raises TypeError or ValueError for a group's options that are Muon's alone."""
    algorithm = group.get("algorithm")
    if algorithm not in routing.ALGORITHMS:
        raise ValueError(f"{where}: Invalid algorithm: {algorithm!r}; it must be 'muon' or 'adamw'")
    for name in ("agc", "clip_per_param"):
        if group.get(name) is not None:
            raise ValueError(
                f"{where}: {name} is not served by Muon, whose update has the same size whatever the gradient's; use "
                "max_grad_norm or clip_grad_value"
            )
    if algorithm == "adamw":
        return
    if (scaling := group.get("adjust_lr_fn")) not in SCALINGS:
        raise ValueError(
            f"{where}: Adjust learning rate function {scaling} is not supported; it must be 'original', "
            "'match_rms_adamw' or None"
        )
    given: Any = group.get("ns_coefficients")
    if given != "polar_express":
        triple = isinstance(given, (tuple, list)) and len(given) == 3
        if not (triple and all(isinstance(x, (int, float)) and math.isfinite(x) for x in given)):
            raise ValueError(
                f"{where}: Invalid ns_coefficients: {given!r}; Coefficients must be a tuple of exactly 3 values, or "
                "'polar_express'"
            )
    if not isinstance(group.get("ns_steps"), int):
        raise TypeError(f"{where}: ns_steps must be an integer, got {group.get('ns_steps')!r}")
    if not isinstance(group.get("normuon"), (bool, int)):
        raise TypeError(f"{where}: normuon must be True or False, got {group.get('normuon')!r}")
    sizes, heads = group.get("split_sizes"), group.get("num_heads")
    if sizes is not None and heads is not None:
        raise ValueError(f"{where}: split_sizes and num_heads each say how a matrix is cut; give only one of them")
    wrong = sizes is not None and not (
        isinstance(sizes, (tuple, list)) and sizes and all(isinstance(n, int) and n > 0 for n in sizes)
    )
    if wrong:
        raise ValueError(f"{where}: split_sizes must be numbers of rows, got {sizes!r}")
    if heads is not None and not (isinstance(heads, int) and heads > 0):
        raise ValueError(f"{where}: num_heads must be a number of heads, got {heads!r}")


def shape_scale(scaling: str | None, rows: int, columns: int) -> float:
    """What the learning rate of a matrix is multiplied with: torch's ``adjust_lr_fn``."""
    if scaling == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / max(columns, 1)))


class MuonStepper(Stepper):
    """Steps groups of both algorithms."""

    def __init__(self, owner: str, backend: str) -> None:
        super().__init__(owner, MUON, backend)
        self.adamw = Stepper(owner, ADAMW, backend)
        # The first looks at parameters, gradients and state as a whole, and steps none.
        self.whole, self.momentum, self.update = (Stepper(owner, rule, backend) for rule in (MUON, MUON, UPDATE))

    def rule_of(self, group: Group) -> Rule:
        return ADAMW if group.get("algorithm") == "adamw" else MUON

    def check_group(self, groups: list[Group], i: int) -> None:
        where = f"{self.owner}: group {i}"
        options.check(where, self.rule_of(groups[i]).ranges, groups[i])
        check(where, groups[i])

    @torch.no_grad()
    def step(
        self,
        groups: list[Group],
        state: MutableMapping[Tensor, dict[str, Any]],
        inputs: Inputs,
        only: Place | None = None,
    ) -> None:
        assert only is None
        for each in (self.adamw, self.whole, self.momentum, self.update):
            each.backend = self.backend
        for i in range(len(groups)):
            self.check_group(groups, i)
        of_adamw, of_muon = ([_share(group, self.rule_of(group), rule) for group in groups] for rule in (ADAMW, MUON))
        seen = dataclasses.replace(
            inputs, max_grad_norm=None, skip_nonfinite=False, checks=False, grad_scale=None, found_inf=None
        )
        seen = NOTHING_ELSE if seen == NOTHING_ELSE else seen
        has_adamw = any(group["params"] for group in of_adamw)
        if has_adamw:
            self.adamw.prepare(of_adamw, state, seen, makes=False)
        found = self._matrices(of_muon, inputs)
        self.whole.prepare(of_muon, state, seen, makes=True)
        inputs = self._decided(groups, state, inputs)
        if has_adamw:
            self.adamw.step(of_adamw, state, inputs)
        for batches in _batches(found):
            self._step_batches(batches, state, inputs)
        self._average(of_muon, state, inputs)

    def _matrices(self, groups: list[Group], inputs: Inputs) -> list[Matrix]:
        """The parameters of Muon's groups that have a gradient."""
        found = []
        for place in places_of(groups):
            p, group = place[2], groups[place[0]]
            g = p.grad if inputs.sums is None else inputs.sums.get(p)
            if g is None:
                continue
            blocks = routing.matrix_blocks(p, group)
            if blocks is None or p.dim() < 2 or tracing.is_subclass(p):
                routing.refuse_no_matrix(f"{self.owner}.step: {describe(groups, place)}", p, group)
            found.append(Matrix(place, group, g, blocks or ()))
        return found

    def _decided(self, groups: list[Group], state: Any, inputs: Inputs) -> Inputs:
        """``inputs`` of both algorithms, after norms over all gradients were taken where they are asked for."""
        asked = inputs.max_grad_norm is not None or inputs.skip_nonfinite or inputs.checks
        if not asked and not any(map(clips_alone, groups)):
            return inputs
        step = self._described(groups, state, inputs, None)
        active = [(r, g) for r, (_, _, p) in enumerate(step.places) if (g := step.gradient(p)) is not None]
        home = active[0][1].device if active else None
        arguments = self.arguments(groups, inputs, home)
        found, scales = inputs.found_inf, None
        if home is None:
            self.results_on(groups).grad_norm.zero_()
        else:
            apart_ = {r for r, g in active if not clip.is_plain(g)}
            _, scales, found = apart.decide(
                step, active, apart_, home, arguments, lambda device: self.results_on(groups, device)
            )
        return dataclasses.replace(
            inputs, max_grad_norm=None, skip_nonfinite=False, checks=False, found_inf=found, group_scales=scales
        )

    def _step_batches(self, batches: list[Batch], state: MutableMapping[Tensor, Any], inputs: Inputs) -> None:
        """Momentum, products and update of some matrices."""
        momentum, update = _Made(_MOMENTUM_OPTIONS), _Made(_UPDATE_OPTIONS)
        buffers: dict[Tensor, dict[str, Tensor]] = {}
        sums: dict[Tensor, Tensor] = {}
        for matrices, updates in batches:
            for each, u in zip(matrices, updates.unbind(), strict=True):
                momentum.add(each, u)
                kept = state[each.place[2]]
                buffers[u] = {name: kept[name] for name in _MOMENTUM_STATE if name in kept}
                sums[u] = each.grad
        scales = inputs.group_scales
        self.momentum.step(
            momentum.groups,
            buffers,
            dataclasses.replace(
                inputs,
                sums=sums,
                micro_batches=max(inputs.micro_batches, 1),
                group_scales=None if scales is None else torch.stack([scales.select(0, i) for i in momentum.origins]),
            ),
        )
        rows: dict[Tensor, dict[str, Any]] = {}
        sums = {}
        for matrices, updates in batches:
            made = _orthogonal(matrices, updates)
            if matrices[0].group["normuon"]:
                _normalize_rows(matrices, made, state, inputs.found_inf)
            scale = _scale_of(matrices[0], 0)
            for each, u in zip(matrices, made.reshape(updates.shape).unbind(), strict=True):
                p = each.place[2]
                update.add(each, p, shape_scale=scale)
                sums[p] = u
                rows[p] = _of_update(each.group, p, state[p])
        self.update.step(update.groups, rows, Inputs(sums=sums, micro_batches=1, found_inf=inputs.found_inf))

    def _average(self, groups: list[Group], state: MutableMapping[Tensor, Any], inputs: Inputs) -> None:
        """Moves the averages of weights without gradient."""
        made = _Made(_UPDATE_OPTIONS)
        for place in places_of([g if g.get("ema_decay") is not None else {"params": []} for g in groups]):
            p = place[2]
            if (p.grad if inputs.sums is None else inputs.sums.get(p)) is None:
                made.add(Matrix(place, groups[place[0]], p, ()), p, shape_scale=1.0)
        if made.groups:
            self.update.step(made.groups, state, Inputs(sums={}, micro_batches=1, found_inf=inputs.found_inf))


_MOMENTUM_STATE = ("step", "momentum_buffer", "momentum_buffer_codes", "momentum_buffer_scales")
# What the rules read of a group that has no parameters.
_NO_GROUP: dict[str, Group] = {
    ADAMW.name: dict(
        params=[],
        lr=0.0,
        betas=(0.0, 0.0),
        eps=0.0,
        weight_decay=0.0,
        amsgrad=False,
        maximize=False,
        decoupled_weight_decay=True,
    ),
    MUON.name: dict(params=[], momentum=0.0, nesterov=False),
}


def _share(group: Group, own: Rule, rule: Rule) -> Group:
    """A group as the steppers of ``rule`` see it: without parameters if its own is another; norms are taken before."""
    if own is not rule:
        return _NO_GROUP[rule.name]
    return {**group, "max_grad_norm": None} if clips_alone(group) else group


class _Made:
    """Groups that are made of an optimizer's for one phase.

    Attributes:
        groups: the made ones.
        origins: the index of the optimizer's group that each is made of.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.groups: list[Group] = []
        self.origins: list[int] = []
        self._known: dict[Any, Group] = {}

    def add(self, each: Matrix, p: Tensor, **more: float) -> None:
        """``p``: what stands in the parameter's place; ``more``: options beside the group's own."""
        i, k, _ = each.place
        key = (i, *more.values())
        if key not in self._known:
            own = {name: each.group[name] for name in self.names if name in each.group}
            self._known[key] = {"params": [], "listed_as": [], "param_names": [], **own, **more}
            self.groups.append(self._known[key])
            self.origins.append(i)
        made = self._known[key]
        made["params"].append(p)
        made["listed_as"].append((i, k))
        if names := each.group.get("param_names"):
            made["param_names"].append(names[k])


def _batches(found: list[Matrix]) -> Iterator[list[Batch]]:
    """Matrices of one shape together, some batches at a time."""
    alike: dict[Any, list[Matrix]] = {}
    ways = {}  # how a group's matrices are made orthogonal
    for each in found:
        i, _, p = each.place
        if i not in ways:
            ways[i] = tuple(str(each.group[name]) for name in _PRODUCT_OPTIONS)
        key = (p.device, p.shape, p.dtype == torch.float64, p.stride(), each.blocks, ways[i])
        alike.setdefault(key, []).append(each)
    chunk: list[Batch] = []
    elements = 0
    for matrices in alike.values():
        p = matrices[0].place[2]
        at_once = max(1, ELEMENTS // max(1, p.numel()))
        for first in range(0, len(matrices), at_once):
            some = matrices[first : first + at_once]
            elements += len(some) * p.numel()
            if chunk and (elements > ELEMENTS or chunk[0].updates.device != p.device):
                yield chunk
                chunk, elements = [], len(some) * p.numel()
            chunk.append(Batch(some, _room(len(some), p)))
    if chunk:
        yield chunk


_PRODUCT_OPTIONS = ("ns_coefficients", "ns_steps", "eps", "adjust_lr_fn", "normuon", "normuon_beta2")


def _room(count: int, p: Tensor) -> Tensor:
    """Memory for ``count`` matrices that lie as ``p`` does."""
    order = codecs.order_of(p)
    dtype = torch.float64 if p.dtype == torch.float64 else torch.bfloat16
    room = torch.empty([count, *(p.shape[d] for d in order)], dtype=dtype, device=p.device)
    return room if order == sorted(order) else room.permute([0, *(order.index(d) + 1 for d in range(p.dim()))])


def _orthogonal(matrices: list[Matrix], updates: Tensor) -> Tensor:
    """The updates ``[parameters, rows, columns]``, each block of rows made orthogonal."""
    group, blocks = matrices[0].group, matrices[0].blocks
    x = updates.flatten(2).to(torch.bfloat16)
    if x.numel() == 0:
        return x
    coefficients = coefficients_of(group["ns_coefficients"], group["ns_steps"])
    if len(set(blocks)) == 1:
        one = x.reshape(len(x) * len(blocks), blocks[0], -1)
        return orthogonalized(one, coefficients, group["eps"]).reshape(x.shape)
    first = _scale_of(matrices[0], 0)
    made = []
    for b, part in enumerate(x.split(blocks, dim=1)):
        part = orthogonalized(part, coefficients, group["eps"])
        scale = _scale_of(matrices[0], b)
        made.append(part if scale == first else part * (scale / first))
    return torch.cat(made, dim=1)


def _scale_of(matrix: Matrix, block: int) -> float:
    p, rows = matrix.place[2], matrix.blocks[block]
    return shape_scale(matrix.group["adjust_lr_fn"], rows, p.numel() // max(p.shape[0], 1))


def _normalize_rows(matrices: list[Matrix], made: Tensor, state: MutableMapping[Tensor, Any], found_inf: Any) -> None:
    """NorMuon (Li et al., arXiv 2510.05491): rows divided by the root of their running mean square.

    The norm of the whole stays, so that scalings of the learning rate mean what they do without.
    """
    averages = []
    for each in matrices:
        p = each.place[2]
        if "row_square_avg" not in state[p]:
            with torch.inference_mode(False):
                state[p]["row_square_avg"] = torch.zeros(len(p), dtype=torch.float32, device=p.device)
        averages.append(state[p]["row_square_avg"])
    squares = torch.linalg.vector_norm(made, dim=2, dtype=torch.float32).square()
    columns = max(made.shape[2], 1)
    old = torch.stack(averages)
    new = old.lerp(squares / columns, 1.0 - matrices[0].group["normuon_beta2"])
    factors = new.sqrt().add_(1e-8).reciprocal_()
    whole, scaled = squares.sum(1, keepdim=True), (squares * factors.square()).sum(1, keepdim=True)
    made.mul_((factors * (whole / scaled.clamp_(min=1e-30)).sqrt()).unsqueeze(2))
    if found_inf is not None:
        new = torch.where(torch.as_tensor(found_inf, device=new.device) != 0, old, new)
    torch._foreach_copy_(averages, list(new.unbind()))


def _of_update(group: Group, p: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state as the last phase sees it: a step count that the first has advanced stands where it was."""
    if states.is_stochastic(group, p) and states.state_dtype(group, p) in (torch.int8, torch.bfloat16):
        return {**state, "step": (state["step"] - 1).clamp_(min=0)}
    return state
