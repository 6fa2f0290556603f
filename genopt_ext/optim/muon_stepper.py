"""A step of Muon: what is wrong, norms of all gradients together, AdamW's groups, and the matrices' three phases.

Momentum is one fused pass from gradients into matrices of bfloat16 (``csrc/rules/muon_momentum.h``); they are made
orthogonal by torch's products (``orthogonal.py``); decay, scaling and update are one fused pass more
(``csrc/rules/muon_update.h``). Masters, rounding and the weights' average belong to the last, what is done to gradients
to the first. Nothing is changed before everything was looked at, and nothing waits for a device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from .. import clip, sharding, tracing
from . import adam, apart, refusals, routing, unserved
from . import state as states
from .muon_matrices import (
    PRODUCT_OPTIONS,
    UPDATE_OPTIONS,
    Chunk,
    Made,
    check_row_averages,
    form_of,
    make_row_averages,
    split,
)
from .options import Range, clips_alone
from .rule import Group, Rule
from .step import NOTHING_ELSE, InOrder, Inputs, Place, describe, places_of
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
    stacked = group.get("stacked")
    if stacked is not None and not (isinstance(stacked, (bool, int)) and stacked in (0, 1)):
        raise TypeError(f"{where}: stacked must be True, False or None, got {stacked!r}")
    if heads is not None and not (isinstance(heads, int) and heads > 0):
        raise ValueError(f"{where}: num_heads must be a number of heads, got {heads!r}")


def on_host(group: Group) -> Group:
    """A group without what only a device knows: to read it would wait, and no graph could capture it."""
    return {name: x for name, x in group.items() if not isinstance(x, Tensor) or x.is_cpu}


class MuonStepper(Stepper):
    """Steps groups of both algorithms."""

    def __init__(self, owner: str, backend: str) -> None:
        super().__init__(owner, MUON, backend)
        self.adamw = Stepper(owner, ADAMW, backend)
        # The first looks at parameters, gradients and state as a whole, and steps none.
        self.whole, self.momentum, self.update = (Stepper(owner, rule, backend) for rule in (MUON, MUON, UPDATE))
        self.both = Stepper(owner, UPDATE, backend)  # looks at what the two algorithms share
        for each in (self.adamw, self.momentum, self.update):
            each.asks_others = False  # all of them were asked at once
        self._last: tuple[Any, list[Chunk]] = None, []  # what the last step was of, and how it was taken
        self._captured: list[list[Chunk]] = []  # their memory is that of graphs, for as long as they may be replayed

    def prepare(self, groups: list[Group], state: MutableMapping[Tensor, Any], inputs: Inputs, makes: bool) -> None:
        for each in (self.adamw, self.whole):
            each.backend = self.backend
        of_adamw, of_muon = ([_share(group, self.rule_of(group), rule) for group in groups] for rule in (ADAMW, MUON))
        self.adamw.prepare(of_adamw, state, inputs, makes)
        places = [place for place in places_of(of_muon) if _gradient(inputs, place[2]) is not None]
        lacking = check_row_averages(self.owner, groups, places, state)
        self.whole.prepare(of_muon, state, inputs, makes)
        if makes:
            make_row_averages(self.owner, groups, lacking, state)

    def rule_of(self, group: Group) -> Rule:
        return ADAMW if group.get("algorithm") == "adamw" else MUON

    def check_group(self, groups: list[Group], i: int) -> None:
        self._check(i, groups[i])

    def _check(self, i: int, group: Group) -> None:
        where = f"{self.owner}: group {i}"
        self.rule_of(group).check(where, group)
        check(where, group)

    @torch.no_grad()
    def step(
        self,
        groups: list[Group],
        state: MutableMapping[Tensor, dict[str, Any]],
        inputs: Inputs,
        only: Place | None = None,
    ) -> None:
        assert only is None
        for each in (self.adamw, self.whole, self.momentum, self.update, self.both):
            each.backend = self.backend
        for i, group in enumerate(groups):
            self._check(i, on_host(group))
        if inputs.found_inf is not None and sharding.is_distributed():
            inputs = self._agreed(groups, inputs)
        of_adamw, of_muon = ([_share(group, self.rule_of(group), rule) for group in groups] for rule in (ADAMW, MUON))
        seen = dataclasses.replace(
            inputs, max_grad_norm=None, skip_nonfinite=False, checks=False, grad_scale=None, found_inf=None
        )
        seen = NOTHING_ELSE if seen == NOTHING_ELSE else seen
        has_adamw = any(group["params"] for group in of_adamw)
        if has_adamw:
            self.adamw.prepare(of_adamw, state, seen, makes=False)
        places = [place for place in places_of(of_muon) if _gradient(inputs, place[2]) is not None]
        together = self._chunks(of_muon, places)
        # Gradients are left as asked for at the end, where the step has to read them once more.
        again = any(group.get("cautious") == "update" for group in of_muon)
        left = inputs.gradients if self._refuse_shared(groups, state, seen, has_adamw) or again else None
        lacking = check_row_averages(self.owner, groups, places, state)
        self.whole.prepare(of_muon, state, seen, makes=True)
        make_row_averages(self.owner, groups, lacking, state)
        inputs = self._decided(groups, state, inputs)
        if left is not None:
            inputs = dataclasses.replace(inputs, gradients=None)
        if has_adamw:
            self.adamw.step(of_adamw, state, inputs)
        if isinstance(together, list) and _is_captured(places) and together not in self._captured:
            self._captured.append(together)
        for chunk in together:
            chunk.renew(of_muon)
            self._step_chunk(chunk, state, inputs)
        self._average(of_muon, state, inputs)
        if left is not None:
            self._leave_gradients(groups, left, inputs)

    def _refuse_shared(self, groups: list[Group], state: Any, inputs: Inputs, has_adamw: bool) -> bool:
        """Raises where both algorithms' parameters, state or gradients share memory: each looks at its own alone.

        Returns:
            Whether gradients may share memory that a step is to write: then none is before all were read.
        """
        if not has_adamw and inputs.gradients is None:
            return False
        groups = [{**group, **_NO_NUMBERS} for group in groups]
        found = self.both.find_overlaps(groups, state, inputs)
        if not (found.overlaps or found.grad_overlaps):
            return found.gradients_overlap
        step = self._described(groups, state, inputs, None)
        for a, b in found.overlaps:
            (i, _, p), (j, _, q) = step.places[a], step.places[b]
            if p is q and self.rule_of(groups[i]) is not self.rule_of(groups[j]):
                raise RuntimeError(f"{self.owner}.step: {_TWICE}")
        refusals.refuse_overlaps(step, found.overlaps, found.grad_overlaps)
        return found.gradients_overlap

    def _leave_gradients(self, groups: list[Group], left: str, inputs: Inputs) -> None:
        """Writes gradients, after both algorithms have read them."""
        arguments = self.arguments(groups, inputs, None)
        unserved.leave_gradients(self, left, arguments, self._described(groups, {}, inputs, None))

    def _chunks(self, groups: list[Group], places: list[Place]) -> Iterable[Chunk]:
        """What ``places`` are stepped in: as at the last step, where only numbers have changed."""
        now = (
            [tuple(str(group.get(name)) for name in PRODUCT_OPTIONS) for group in groups],
            [(i, k, id(p), form_of(p)) for i, k, p in places],
        )
        last, together = self._last
        if last == now:
            return together
        for place in places:
            i, _, p = place
            if p.dim() < 2 or tracing.is_subclass(p) or routing.matrix_blocks(p, groups[i]) is None:
                routing.refuse_no_matrix(f"{self.owner}.step: {describe(groups, place)}", p, groups[i])
        if len({id(p) for _, _, p in places}) < len(places):
            raise RuntimeError(f"{self.owner}.step: {_TWICE}")
        found = split(groups, places)
        if len(found) > 1:  # each has its memory when its turn comes
            self._last = None, []
            return (Chunk(groups, batches) for batches in found)
        self._last = now, [Chunk(groups, batches) for batches in found]
        return self._last[1]

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
            decided = apart.decide(
                step, active, apart_, home, arguments, lambda device: self.results_on(groups, device)
            )
            scales, found = decided.group_scales, decided.found
        if isinstance(found, Tensor) and found.is_meta:
            found = None  # there is no number to skip by
        return dataclasses.replace(
            inputs, max_grad_norm=None, skip_nonfinite=False, checks=False, found_inf=found, group_scales=scales
        )

    def _step_chunk(self, chunk: Chunk, state: MutableMapping[Tensor, Any], inputs: Inputs) -> None:
        """Momentum, products and update of some matrices."""
        momentum, update, scales = chunk.momentum, chunk.update, inputs.group_scales
        grads: list[Any] = [_gradient(inputs, p) for p in chunk.grads_of]
        asked = dataclasses.replace(
            inputs,
            sums=InOrder(momentum.groups, grads),
            micro_batches=max(inputs.micro_batches, 1),
            group_scales=None if scales is None else torch.stack([scales.select(0, i) for i in momentum.origins]),
        )
        self.momentum.step(momentum.groups, chunk.momentum_state(state), asked)
        gradient = functools.partial(_gradient, inputs)
        made = [batch.orthogonal(state, inputs.found_inf, gradient) for batch in chunk.batches]
        sums = InOrder(update.groups, [made[b][r] for b, r in chunk.made_at])
        asked = Inputs(sums=sums, micro_batches=1, found_inf=inputs.found_inf)
        self.update.step(update.groups, chunk.update_state(state), asked)

    def _average(self, groups: list[Group], state: MutableMapping[Tensor, Any], inputs: Inputs) -> None:
        """Moves the averages of weights without gradient."""
        if all(group.get("ema_decay") is None for group in groups):
            return
        made = Made(UPDATE_OPTIONS)
        for place in places_of([group if group.get("ema_decay") is not None else {"params": []} for group in groups]):
            if _gradient(inputs, place[2]) is None:
                made.add(groups, place, place[2], shape_scale=1.0)
        if made.groups:
            made.renew(groups)
            self.update.step(made.groups, state, Inputs(sums={}, micro_batches=1, found_inf=inputs.found_inf))


_TWICE = "a parameter is listed twice; list each once"
# Of any group, for a look at memory alone.
_NO_NUMBERS = dict(lr=0.0, weight_decay=0.0, shape_scale=1.0, max_grad_norm=None, cautious=None)


def _is_captured(places: list[Place]) -> bool:
    return any(p.is_cuda for _, _, p in places[:1]) and states.is_captured()


def _gradient(inputs: Inputs, p: Tensor) -> Tensor | None:
    return p.grad if inputs.sums is None else inputs.sums.get(p)


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
