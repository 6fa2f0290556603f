"""Takes the steps of one optimizer, of which it knows a rule and a backend: natively in one call, where that can be.

What the native stepper (``csrc/torch/stepper.h``) can not take as it is, it names and leaves as it was: ``unserved.py``
goes on from there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backend, clip, sharding
from . import apart, refusals, repeats, unserved
from . import state as states
from .options import NORM_CLIPS, clips_alone
from .problems import Problem
from .refusals import Pairs
from .rule import Group, Rule
from .step import NOTHING_ELSE, InOrder, Inputs, Place, Step, describe, places_of


class Refusal(NamedTuple):
    """What the native stepper could not take: ``csrc/torch/refusal.h``."""

    rows: Mapping[int, Sequence[Problem]] = {}
    groups: Sequence[int] = ()
    overlaps: Pairs = ()
    grad_overlaps: Pairs = ()
    devices: Sequence[int] = ()
    of_processes: bool = False
    gradients_overlap: bool = False


@dataclass
class Results:
    """What steps write beside the parameters, on their device; each 0-dim.

    Attributes:
        grad_norm: of all gradients of the last step that computed one, unclipped; float32 or float64.
        nonfinite: whether it was not finite, 0 or 1; float32.
        skipped_steps: how many ``skip_nonfinite`` has skipped; int64.
    """

    grad_norm: Tensor
    nonfinite: Tensor
    skipped_steps: Tensor

    @classmethod
    def make(cls, device: torch.device, is_precise: bool) -> Results:
        with torch.inference_mode(False):
            return cls(
                torch.zeros((), dtype=torch.float64 if is_precise else torch.float32, device=device),
                torch.zeros((), dtype=torch.float32, device=device),
                torch.zeros((), dtype=torch.int64, device=device),
            )


def _everything(step: Step) -> Refusal:
    """That no kernel takes any row: for the reference."""
    rows = {r: [("parameter", "no kernel")] for r, place in enumerate(step.places) if step.takes_part(place)}
    return Refusal(rows, groups=list(dict.fromkeys(step.places[r][0] for r in rows)))


class Stepper:
    """Steps parameter groups by a rule.

    Args:
        owner: the class of the optimizer, for messages.
        rule: what is done to an element.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"reference"``.
    """

    def __init__(self, owner: str, rule: Rule, backend: str) -> None:
        self.owner, self.rule, self.backend = owner, rule, backend
        self.asks_others = True  # whether processes that share parameters agree on steps that are skipped
        self.results: Results | None = None
        self.plan: Any = None  # the native stepper, with its plan
        self.shared: Tensor | None = None  # the numbers that all parameters share: float64, of the rule's names
        self._joining: sharding.Joining | None = None  # of the last norm of what is spread over processes
        self._resolution: tuple[str, str] = ("", "")  # a backend and what it comes to in this process
        # The first piece of FSDP1's, and where it was sought.
        self._piece: tuple[list[tuple[int, int, bool]], Place | None] = ([], None)

    @property
    def resolved(self) -> str:
        asked, answer = self._resolution
        if asked != self.backend:
            answer = _backend.resolve(self.backend)
            self._resolution = self.backend, answer
        return answer

    def step(
        self,
        groups: list[Group],
        state: MutableMapping[Tensor, dict[str, Any]],
        inputs: Inputs,
        only: Place | None = None,
    ) -> None:
        """One step.

        Args:
            groups: an optimizer's ``param_groups``, read afresh.
            state: its ``state``; what lacks is made.
            inputs: what else is asked of this step.
            only: the one parameter that is stepped, as if the optimizer had no other.

        Raises:
            RuntimeError: something that can not be served; nothing is changed then.
            TypeError, ValueError: an option out of its range.
        """
        if self.asks_others and inputs.found_inf is not None and sharding.is_distributed():
            inputs = self._agreed(groups, inputs)
        plain = only is not None or (inputs is NOTHING_ELSE and not any(map(clips_alone, groups)))
        arguments = {} if plain and self.shared is None else self.arguments(groups, inputs, None)
        if self.resolved != "reference":
            if self.plan is None:
                self._make_plan(groups, state, inputs, only)
            if only is None and not self._joining:  # spelled out, as most steps end here
                refused = self.plan.step(groups, state, (), **arguments)
                refusal = None if refused is None else Refusal(**refused)
            else:
                refusal = self.step_natively(groups, state, only, (), arguments)
            if refusal is not None:
                unserved.resolve(self, refusal, self._described(groups, state, inputs, only), only, arguments)
            return
        step = self._described(groups, state, inputs, only)
        unserved.resolve(self, _everything(step), step, only, arguments)

    def prepare(self, groups: list[Group], state: MutableMapping[Tensor, Any], inputs: Inputs, makes: bool) -> None:
        """Raises what a step would for its groups, parameters, gradients and state; takes none.

        Args:
            groups, state, inputs: as of :meth:`step`; norms and scales are not looked at.
            makes: whether state that lacks is made.
        """
        arguments = {} if inputs is NOTHING_ELSE else self.arguments(groups, inputs, None)
        step = self._described(groups, state, inputs, None)
        if self.resolved == "reference":
            refusal = _everything(step)
        else:
            if self.plan is None:
                self._make_plan(groups, state, inputs, None)
            refused = self.plan.step(groups, state, (), only_check=True, **arguments)
            if refused is None:
                return
            refusal = Refusal(**refused)
        examined = unserved.examine(self, refusal, step, arguments)
        if makes:
            unserved.mend(step, examined.mendable, examined.torchs)

    def find_overlaps(self, groups: list[Group], state: MutableMapping[Tensor, Any], inputs: Inputs) -> Refusal:
        """Which rows share memory, whatever else is wrong with them; takes no step, and raises nothing.

        Args:
            groups, state, inputs: as of :meth:`step`; norms and scales are not looked at.
        """
        if self.resolved == "reference":
            step = self._described(groups, state, inputs, None)
            rows = [r for r, place in enumerate(step.places) if step.takes_part(place)]
            # Which gradients do, nobody asks: the reference writes them last in any case.
            return Refusal({}, (), *refusals.find_overlaps(step, rows), gradients_overlap=inputs.gradients is not None)
        if self.plan is None:
            self._make_plan(groups, state, inputs, None)
        arguments = {} if inputs is NOTHING_ELSE else self.arguments(groups, inputs, None)
        refused = self.plan.step(groups, state, (), only_check=True, **arguments)
        return Refusal() if refused is None else Refusal(**refused)

    def _make_plan(self, groups: list[Group], state: Any, inputs: Inputs, only: Place | None) -> None:
        step = self._described(groups, state, inputs, only)
        for i in dict.fromkeys(place[0] for place in step.places if step.takes_part(place)):
            self.check_group(groups, i)
        assert _backend.native is not None
        self.plan = _backend.native.Stepper(self.rule.name, self.resolved)

    def _described(self, groups: list[Group], state: Any, inputs: Inputs, only: Place | None) -> Step:
        places = places_of(groups) if only is None else [only]
        return Step(self.owner, self.rule, self.backend, self.resolved, groups, state, inputs, places)

    def rule_of(self, group: Group) -> Rule:
        """By which a group's parameters are stepped."""
        return self.rule

    def check_group(self, groups: list[Group], i: int) -> None:
        self.rule_of(groups[i]).check(f"{self.owner}: group {i}", groups[i])

    def refuse_repeats(self, groups: list[Group], state: MutableMapping[Tensor, dict[str, Any]]) -> None:
        """Raises where a parameter that has a gradient is listed twice, which sums of gradients can not go with."""
        repeats.turns(self._described(groups, state, NOTHING_ELSE, None), ("grads",))

    def step_natively(
        self, groups: list[Group], state: Any, only: Place | None, skipped: Sequence[int], arguments: dict[str, Any]
    ) -> Refusal | None:
        if only is None:
            return self._step_together(groups, state, skipped, arguments)
        # The native stepper sees an optimizer of one parameter: reading through the state of all n would cost each of
        # them n look-ups.
        i, _, p = only
        given = {p: state[p]} if p in state else {}
        refused = self._step_together([{**groups[i], "params": [p]}], given, skipped, arguments)
        return None if refused is None else refused._replace(groups=(i,) if refused.groups else ())

    def _step_together(
        self, groups: list[Group], state: Any, skipped: Sequence[int], arguments: dict[str, Any]
    ) -> Refusal | None:
        """Where a norm is of what is spread over processes, measures it first, joins it, and then steps."""
        measures = "row_sums" not in arguments
        if not (measures and self._joining and "measure" in arguments):
            refused = self.plan.step(groups, state, skipped, **arguments)
            if refused is None:
                return None
            refusal = Refusal(**refused)
            if not refusal.of_processes or any(refusal._replace(of_processes=False)):
                return refusal
        places, leaves_out = places_of(groups), set(skipped)
        params = [p for _, _, p in places]
        given = arguments.get("grads") or [p.grad for p in params]
        grads = [None if r in leaves_out else g for r, g in enumerate(given)]
        words = apart.measure(params, grads, [groups[i] for i, _, _ in places])
        if self._joining is None or not self._joining.serves(params):
            self._joining = sharding.Joining(params)
        refused = self.plan.step(groups, state, skipped, row_sums=[apart.join(self._joining, words)], **arguments)
        return None if refused is None else Refusal(**refused)

    @staticmethod
    def _agreed(groups: list[Group], inputs: Inputs) -> Inputs:
        """Where parameters are spread over processes: all skip the step or none."""
        params = [p for _, _, p in places_of(groups)]
        given = inputs.found_inf
        home = params[0].device if params else torch.device("cpu")
        found = torch.as_tensor(given).to(home).reshape(()) != 0
        return dataclasses.replace(inputs, found_inf=sharding.agree(found, params).float())

    # What the native stepper is told beside the groups

    def arguments(
        self, groups: list[Group], inputs: Inputs, device: torch.device | None, writes_gradients: bool = True
    ) -> dict[str, Any]:
        """Keyword arguments of the native ``step()``. ``device``: where results are; None: with the parameters."""
        arguments: dict[str, Any] = {} if self.shared is None else {"shared": [self.shared]}
        if inputs.sums is not None:
            given = inputs.sums
            if isinstance(given, InOrder) and given.groups is groups:
                sums: list[Tensor | None] = [*given.listed]
            else:
                sums = [given.get(p) for group in groups for p in group["params"]]
            arguments.update(grads=sums, scale=1.0 / inputs.micro_batches)
        if inputs.max_grad_norm is not None:
            arguments.update(max_norm=inputs.max_grad_norm)
        if inputs.skip_nonfinite or inputs.checks:
            arguments.update(guard=True)
        if "max_norm" in arguments or "guard" in arguments or any(map(clips_alone, groups)):
            if sharding.is_distributed():
                self.refuse_pieces(groups, inputs)
            results = self.results_on(groups, device)
            arguments.update(grad_norm=[results.grad_norm], measure=True)
            if inputs.skip_nonfinite:
                arguments.update(skipped_steps=[results.skipped_steps])
            if "guard" in arguments:
                arguments.update(nonfinite=[results.nonfinite])
        for name, given in (("grad_scale", inputs.grad_scale), ("found_inf", inputs.found_inf)):
            if given is not None:
                t = self._number(name, given)
                arguments[name] = [t if device is None else t.to(device)]
        if (scales := inputs.group_scales) is not None:
            arguments.update(group_scales=[scales if device is None else scales.to(device)])
        if writes_gradients and inputs.gradients is not None:
            arguments.update(gradients=inputs.gradients)
        return arguments

    def _number(self, name: str, given: Any) -> Tensor:
        """A number that was given for one step, as the kernels read it."""
        if not isinstance(given, Tensor):
            return torch.tensor(float(given), dtype=torch.float32, device="cpu")
        if given.numel() != 1 or given.is_complex() or given.layout != torch.strided or given.device.type == "meta":
            raise RuntimeError(
                f"{self.owner}.step: {name} must be a number or a real tensor of one element, got shape "
                f"{list(given.shape)}, {given.dtype}, {given.layout} on {given.device}; GradScaler gives 0-dim tensors"
            )
        return given if given.is_floating_point() else given.double()

    def results_on(self, groups: list[Group], device: torch.device | None = None) -> Results:
        """The results of the last step, moved to ``device`` or made there; None: where the parameters are."""
        if self.results is None or (device is not None and self.results.grad_norm.device != device):
            params = [p for group in groups for p in group["params"]]
            states.refuse_capture(self.owner)
            old = self.results
            where = device or (params[0].device if params else torch.device("cpu"))
            self.results = Results.make(where, clip.is_precise(params))
            if old is not None:
                self.results.skipped_steps.copy_(old.skipped_steps)
        return self.results

    # FSDP1's pieces

    def find_piece(self, groups: list[Group]) -> Place | None:
        """The first parameter of which FSDP1 leaves this process a piece."""
        if not sharding.is_distributed():
            return None
        # Also an optimizer that has stepped before its model was wrapped, which keeps the parameters.
        lists = [group["params"] for group in groups]
        marks = [(id(params), len(params), bool(params) and sharding.is_piece(params[0])) for params in lists]
        if self._piece[0] != marks:
            self._piece = marks, next((place for place in places_of(groups) if sharding.is_piece(place[2])), None)
        return self._piece[1]

    def refuse_pieces(self, groups: list[Group], inputs: Inputs, *others: str) -> None:
        """Raises where norms, or ``others``, would be of the pieces that FSDP1 leaves this process."""
        if (piece := self.find_piece(groups)) is None:
            return
        asked = {name for name in NORM_CLIPS for group in groups if group.get(name) is not None}
        if inputs.max_grad_norm is not None:
            asked.add("max_grad_norm")
        if inputs.skip_nonfinite:
            asked.add("skip_nonfinite")
        if asked or others:
            sharding.refuse_piece(f"{self.owner}.step: {describe(groups, piece)}", [*sorted(asked), *others])
