"""What the five optimizers share: option checks, state, checkpoints, and the step itself.

A subclass declares its rule, the names of its states and the ranges of its options, and inherits its
constructor's defaults from the torch class that it mirrors. Only this file walks parameters, and only
where the native plan (``csrc/torch_plan.h``) can not take a step as it is.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import _backend, clip, gradients, overlap, reference, sharding, storage, tracing
from ..tracing import Number
from . import by_torch, checkpoint, hooks, repeats
from .options import (
    FLAGS,
    GROUP_OPTIONS,
    NORM_CLIPS,
    Range,
    StepOptions,
    check_storage,
    clips_alone,
    is_step_count,
)

if TYPE_CHECKING:
    from ..in_backward import InBackward


SERVED = {"cpu", "cuda"}  # device types that have kernels

# A parameter and where it stands: (group index, index in the group, the parameter).
Place = tuple[int, int, Tensor]

Pairs = Sequence[tuple[int, int]]


class Refusal(NamedTuple):
    """What the native plan could not take: see csrc/torch_plan.h."""

    rows: Sequence[int] = ()
    groups: Sequence[int] = ()
    overlaps: Pairs = ()
    grad_overlaps: Pairs = ()
    devices: Sequence[int] = ()
    gradients_overlap: bool = False


# Calls the native plan with the rows to leave out, and what it is told besides.
NativeStep = Callable[[Sequence[int], dict[str, Any]], "Refusal | None"]


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the optimizers in :mod:`genopt_ext.optim`; a mixin before the torch class it mirrors."""

    rule: ClassVar[str]
    has_step: ClassVar[bool] = True
    serves_sparse: ClassVar[bool] = False
    sparse_class: ClassVar[str] = "torch.optim.SGD or torch.optim.Adagrad"
    ranges: ClassVar[dict[str, Range]]
    squares: ClassVar[frozenset[str]] = frozenset()  # states that are never negative
    default_state_dtype: ClassVar[torch.dtype | None] = None

    backend: str = "auto"
    skip_nonfinite: bool = False
    _max_grad_norm: float | None = None
    _plan: Any = None
    # How many groups there were, the last one, and the parameters of all, by id.
    _listed: tuple[list[tuple[int, int]], set[int]] = ([], set())
    _resolution: tuple[str, str] = ("", "")  # a backend and what it comes to in this process
    _results: dict[str, Tensor] | None = None  # what a step writes beside the parameters, on their device
    _zeroes = False  # the running step zeroes gradients
    _keeps_scale = False  # the running step leaves the loss scale in gradients
    _checks = False  # the running step finds infinities for a GradScaler
    _swapped = False
    _piece: tuple[list[tuple[int, int, bool]], Place | None] = ([], None)  # the first of FSDP1, and where it was sought
    _in_backward: InBackward | None = None  # while genopt_ext.step_in_backward is on
    _opt_called: bool = False  # torch.optim.lr_scheduler's: whether a step was taken
    # What accumulate() keeps: how often since the last step, sums that are zero between two cycles, and those in use.
    _micro_batches: int = 0
    _buffers: dict[Tensor, Tensor] = {}  # noqa: RUF012 - replaced, never changed in place
    _gathered: dict[Tensor, Tensor] = {}  # noqa: RUF012

    @classmethod
    def state_names(cls, group: dict[str, Any]) -> list[str]:
        """The state tensors that a parameter of ``group`` has, besides ``step``, in torch's order."""
        raise NotImplementedError

    @classmethod
    def rule_options(cls, group: dict[str, Any]) -> dict[str, Any]:
        """``group`` as keyword arguments of the rule's function in :mod:`genopt_ext.reference`."""
        raise NotImplementedError

    def _initial_value(self, param: Tensor, name: str) -> complex:
        # -0.0 says "not yet set": see csrc/rules/math.h.
        value = -0.0 if name in ("ema", "momentum_buffer") else 0.0
        return complex(value, value) if param.is_complex() else value

    # Asked by GradScaler: with fused=True it hands over its scale and what it found, and neither unscales nor skips.
    @property
    def _step_supports_amp_scaling(self) -> bool:
        if self._in_backward is not None:
            self._in_backward._refuse_grad_scaler()
        if self._micro_batches and not self._checks:
            raise RuntimeError(
                f"{type(self).__name__}: torch.amp.GradScaler looks at .grad alone, and knows nothing of what "
                "accumulate() has gathered; take genopt_ext.GradScaler, without unscale_()"
            )
        if not any(group.get("fused") for group in self.param_groups) or self._has_its_calls_noted():
            return False
        # There torch's scalers agree over all processes only where they unscale gradients themselves.
        return self._find_piece() is None

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, announced: bool) -> None:
        pass

    def _has_its_calls_noted(self) -> bool:
        """Whether ``step`` was replaced on this object, as by Accelerate, which takes no call for a skipped step."""
        step = self.__dict__.get("step")
        return not (step is None or getattr(step, "__self__", None) is self or hasattr(step, "_wrapped_by_lr_sched"))

    # Options

    def _begin(self, backend: str, step_options: StepOptions, **options: Any) -> None:
        """The start of every constructor: checks before torch's constructor changes anything."""
        where = type(self).__name__
        for name in step_options:
            if name not in StepOptions.__annotations__:
                raise TypeError(f"{where}.__init__() got an unexpected keyword argument '{name}'")
        step_options.setdefault("state_dtype", self.default_state_dtype)
        self._check_options(where, {**options, **step_options})
        _backend.resolve(backend)
        self.backend = backend

    def _set_options(self, step_options: StepOptions, **more: Any) -> None:
        """The end of every constructor: options that torch's lacks. Groups have a key only where it is set."""
        self._check_options(type(self).__name__, more)
        given: dict[str, Any] = {**step_options, **more}
        self.max_grad_norm = given.pop("max_grad_norm", None)
        self.skip_nonfinite = bool(given.pop("skip_nonfinite", False))
        unset = {name for name, value in given.items() if value is None or value is False or value == "nearest"}
        given = {name: value for name, value in given.items() if name not in unset}
        self.defaults.update(given)
        for group in self.param_groups:
            self._set_defaults(group)

    def _set_defaults(self, group: dict[str, Any]) -> None:
        alone = clips_alone(group)
        for name, value in self.defaults.items():
            if name not in group and name != "params":
                group[name] = None if alone and name in NORM_CLIPS else value
        self._complete(group)

    def _complete(self, group: dict[str, Any]) -> None:
        """Adds what the group's other options ask for."""
        if group.get("state_dtype") == torch.int8:
            group.setdefault("min_int8_size", storage.MIN_INT8_SIZE)
            group["int8_format"] = storage.FORMAT
        else:
            group.pop("int8_format", None)
        if group.get("param_rounding") == "stochastic":
            group.setdefault("rounding_seed", torch.initial_seed() & 0xFFFFFFFF)

    @property
    def max_grad_norm(self) -> float | None:
        """The bound for the norm of all gradients together; may be set between steps."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, bound: float | None) -> None:
        self._check_options(type(self).__name__, {"max_grad_norm": bound})
        self._max_grad_norm = None if bound is None else float(bound)

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients of the last step that computed one, unclipped: 0-dim, on the parameters' device.

        Such are steps with a clip by norm or with ``skip_nonfinite``; None before the first. A copy, which the next
        step leaves alone.
        """
        return None if self._results is None else self._results["grad_norm"].clone()

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps ``skip_nonfinite`` has skipped: 0-dim int64, on the parameters' device."""
        return self._results_on(None)["skipped_steps"].clone()

    def _check_options(self, where: str, options: dict[str, Any]) -> None:
        for name, allowed in self.ranges.items():
            if name in options:
                allowed.check(where, name, options[name])
        for name, allowed in GROUP_OPTIONS.items():
            if options.get(name) is not None:
                allowed.check(where, name, options[name])
        check_storage(where, options)
        norms = [name for name in NORM_CLIPS if options.get(name) is not None]
        if len(norms) > 1:
            raise ValueError(f"{where}: {' and '.join(norms)} clip by a norm each; give only one of them")
        for name in FLAGS:
            if name in options and not (isinstance(options[name], (bool, int)) and options[name] in (0, 1)):
                raise TypeError(f"{where}: {name} must be True or False, got {options[name]!r}")
        if options.get("nesterov") and not (options["momentum"] > 0 and options["dampening"] == 0):
            raise ValueError(f"{where}: Nesterov momentum requires a momentum and zero dampening")

    def _check_group(self, i: int, group: dict[str, Any]) -> None:
        self._check_options(f"{type(self).__name__}: group {i}", group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group's options are checked too, and a refused group is not added.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        if isinstance(param_group, dict):
            self._set_defaults(param_group)
        self._append_group(param_group)
        i = len(self.param_groups) - 1
        try:
            self._check_group(i, self.param_groups[i])
            if self._in_backward is not None:
                self._in_backward._add_groups((i,))
        except (TypeError, ValueError):
            del self.param_groups[i]
            raise

    def _append_group(self, param_group: dict[str, Any]) -> None:
        """torch's ``add_param_group``, which would look at every earlier parameter again for each group."""
        groups = self.param_groups
        marks, listed = self._listed
        if not groups or marks != [(id(group["params"]), len(group["params"])) for group in groups]:
            listed = {id(p) for group in groups for p in group["params"]}
        # One earlier group says whether they have names.
        self.param_groups = [{**group, "params": []} for group in groups[:1]]
        try:
            super().add_param_group(param_group)
            added = self.param_groups.pop()
        finally:
            self.param_groups = groups
        ids = [id(p) for p in added["params"]]
        if not listed.isdisjoint(ids):  # let torch say so
            super().add_param_group(param_group)
        else:
            groups.append(added)
        listed.update(ids)
        self._listed = [(id(group["params"]), len(group["params"])) for group in groups], listed

    # Checkpoints, pickle and deepcopy

    def __getstate__(self) -> dict[str, Any]:
        if self._micro_batches:
            raise RuntimeError(
                f"{type(self).__name__}: accumulated gradients are no part of a copy; call step() or "
                "discard_accumulated() before copying or pickling"
            )
        own = {name: getattr(self, name) for name in ("backend", "skip_nonfinite", "_max_grad_norm")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for i, group in enumerate(state.get("param_groups", ())):
            self._check_group(i, group)
        # torch's looks for a step in every entry, also where only the average of a parameter is kept.
        entries = state.get("state", {})
        kept: dict[Any, Any] = defaultdict(dict)
        others: dict[Any, Any] = {}
        for key, entry in entries.items():
            counts = isinstance(key, Tensor) and isinstance(entry, dict) and "step" in entry
            (kept if counts else others)[key] = entry
        super().__setstate__({**state, "state": kept})
        self.state.update(others)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of the torch class it mirrors.

        State keeps the dtype that it was saved with, where torch casts it to the parameter's. The loaded
        tensors are copies: two optimizers loaded from one ``state_dict`` in one process share nothing.

        Args:
            state_dict: what ``state_dict()`` returned.

        Raises:
            ValueError: groups of other sizes, an option out of its range, state that is not that of these parameters,
                or what is no checkpoint at all; the message names the entry, and nothing is changed then.
        """
        checkpoint.load(self, state_dict)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, of numbers, strings and tensors alone: ``state_dtype`` is a name there, such as ``"int8"``."""
        return checkpoint.with_plain_groups(super().state_dict())

    # The step

    profile_hook_step = staticmethod(hooks.profile_hook_step)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step over all groups, in one native call.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a gradient, state or parameter that can not be served; the message names it and
                says what to do. Parameters, gradients and state are then as they were, but that gradients which
                stand beside accumulated ones are accumulated too.
        """
        try:
            self._refuse_swapped()
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if self._micro_batches and any(p.grad is not None for _, _, p in self._places()):
                self._refuse_pieces()
                self.accumulate()
            arguments = self._arguments(None)
            if self._resolved == "reference":
                places = self._places()
                rows = [r for r, place in enumerate(places) if self._takes_part(place)]
                everything = Refusal(rows, list(dict.fromkeys(places[r][0] for r in rows)))
                self._settle(everything, arguments, places, self._step_natively)
            else:
                if self._plan is None:
                    self._plan = self._make_plan(self._places())
                refusal = self._step_natively((), arguments)
                if refusal is not None:
                    self._settle(refusal, arguments, self._places(), self._step_natively)
        except BaseException:
            # torch's GradScaler has set both for this step, and takes them back only where it succeeds.
            if "found_inf" in self.__dict__:
                for name in ("grad_scale", "found_inf"):
                    self.__dict__.pop(name, None)
            raise
        self._micro_batches = 0
        return loss

    @tracing.opaque
    def step_and_zero_(self, closure: Callable[[], Any] | None = None) -> Any:
        """As :meth:`step`, and sets gradients to zero in the same pass, in their own memory; also in a skipped step.

        For loops that keep gradient memory, as ``zero_grad(set_to_none=False)`` after every step.
        """
        self._zeroes = True
        try:
            return self.step(closure)
        finally:
            self._zeroes = False

    def _step_scaled(self, scale: Tensor, keeps_scale: bool, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """A step with gradients that are ``scale`` times too large; also tells whether one was not finite (0 or 1)."""
        self.grad_scale, self._keeps_scale, self._checks = scale, keeps_scale, True
        try:
            result = self.step(*args, **kwargs)
        finally:
            self.__dict__.pop("grad_scale", None)
            self._keeps_scale = self._checks = False
        return result, self._results_on(None)["nonfinite"]

    def _refuse_swapped(self) -> None:
        if self._swapped:
            raise RuntimeError(
                f"{type(self).__name__}.step: the averaged weights are in the model; leave swap_ema() first"
            )

    def _find_piece(self) -> Place | None:
        """The first parameter of which FSDP1 leaves this process a piece."""
        if not sharding.is_distributed():
            return None
        # Also an optimizer that has stepped before its model was wrapped, which keeps the parameters.
        lists = [group["params"] for group in self.param_groups]
        marks = [(id(params), len(params), bool(params) and sharding.is_piece(params[0])) for params in lists]
        if self._piece[0] != marks:
            self._piece = marks, next((place for place in self._places() if sharding.is_piece(place[2])), None)
        return self._piece[1]

    def _refuse_pieces(self, *options: str) -> None:
        """Raises where norms, or ``options``, would be of the pieces that FSDP1 leaves this process."""
        if (piece := self._find_piece()) is None:
            return
        asked = {name for name in NORM_CLIPS for group in self.param_groups if group.get(name) is not None}
        if self._max_grad_norm is not None:
            asked.add("max_grad_norm")
        if self.skip_nonfinite:
            asked.add("skip_nonfinite")
        if asked or options:
            sharding.refuse_piece(f"{type(self).__name__}.step: {self._name(piece)}", [*sorted(asked), *options])

    @property
    def _resolved(self) -> str:
        asked, answer = self._resolution
        if asked != self.backend:
            answer = _backend.resolve(self.backend)
            self._resolution = self.backend, answer
        return answer

    def _places(self) -> list[Place]:
        return [(i, k, p) for i, group in enumerate(self.param_groups) for k, p in enumerate(group["params"])]

    def _gradient(self, p: Tensor) -> Tensor | None:
        """What the step takes as the parameter's gradient: what was accumulated, or ``.grad``."""
        return self._gathered.get(p) if self._micro_batches else p.grad

    def _takes_part(self, place: Place) -> bool:
        i, _, p = place
        averages = self.param_groups[i].get("ema_decay") is not None and p.dtype in storage.STEPPED
        return self._gradient(p) is not None or (averages and (p.requires_grad or bool(self.state.get(p))))

    def _make_plan(self, places: list[Place]) -> Any:
        assert _backend.native is not None
        # Later, only what the plan can not take is looked at in Python.
        for i in dict.fromkeys(place[0] for place in places if self._takes_part(place)):
            self._check_group(i, self.param_groups[i])
        for place in places:
            if self._gradient(place[2]) is not None:
                self._check(place)
        return _backend.native.Plan(self.rule, self._resolved)

    def _step_natively(self, skipped: Sequence[int], arguments: dict[str, Any]) -> Refusal | None:
        refused = self._plan.step(self.param_groups, self.state, skipped, **arguments)
        return None if refused is None else Refusal(*refused)

    def _arguments(self, device: torch.device | None, writes_gradients: bool = True) -> dict[str, Any]:
        """What the native plan is told of this step beside the groups; results are made on ``device``."""
        arguments: dict[str, Any] = {}
        if self._micro_batches:
            arguments.update(
                grads=[self._gathered.get(p) for _, _, p in self._places()], scale=1.0 / self._micro_batches
            )
        if self._max_grad_norm is not None:
            arguments.update(max_norm=self._max_grad_norm)
        if self.skip_nonfinite or self._checks:
            arguments.update(guard=True)
        if "max_norm" in arguments or "guard" in arguments or any(map(clips_alone, self.param_groups)):
            if sharding.is_distributed():
                self._refuse_pieces()
            results = self._results_on(device)
            arguments.update(grad_norm=[results["grad_norm"]], measure=True)
            if self.skip_nonfinite:
                arguments.update(skipped_steps=[results["skipped_steps"]])
            if "guard" in arguments:
                arguments.update(nonfinite=[results["nonfinite"]])
        # GradScaler sets these for one step.
        for name in ("grad_scale", "found_inf"):
            given = getattr(self, name, None)
            if given is not None:
                t = self._number(name, given)
                arguments[name] = [t if device is None else t.to(device)]
        if writes_gradients and (left := self._gradients_left()) is not None:
            arguments.update(gradients=left)
        return arguments

    def _gradients_left(self) -> str | None:
        """What the running step leaves in gradients: see ``gradients.py``. None: it does not write them."""
        if self._zeroes or self._micro_batches:
            return "zeroed"
        return "unscaled" if getattr(self, "grad_scale", None) is not None and not self._keeps_scale else None

    def _number(self, name: str, given: Any) -> Tensor:
        """A number that was given for one step, as the kernels read it."""
        if not isinstance(given, Tensor):
            return torch.tensor(float(given), dtype=torch.float32, device="cpu")
        if given.numel() != 1 or given.is_complex() or given.layout != torch.strided or given.device.type == "meta":
            raise RuntimeError(
                f"{type(self).__name__}.step: {name} must be a number or a real tensor of one element, got shape "
                f"{list(given.shape)}, {given.dtype}, {given.layout} on {given.device}; GradScaler gives 0-dim tensors"
            )
        return given if given.is_floating_point() else given.double()

    def _results_on(self, device: torch.device | None) -> dict[str, Tensor]:
        first = next((p for group in self.param_groups for p in group["params"]), None)
        if self._results is None or (device is not None and self._results["grad_norm"].device != device):
            where = device or (first.device if first is not None else torch.device("cpu"))
            precise = clip.is_precise(p for group in self.param_groups for p in group["params"])
            self._refuse_capture()
            old = self._results
            with torch.inference_mode(False):
                self._results = {
                    "grad_norm": torch.zeros((), dtype=torch.float64 if precise else torch.float32, device=where),
                    "nonfinite": torch.zeros((), dtype=torch.float32, device=where),
                    "skipped_steps": torch.zeros((), dtype=torch.int64, device=where),
                }
            if old is not None:
                self._results["skipped_steps"].copy_(old["skipped_steps"])
        return self._results

    def _refuse_capture(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{type(self).__name__}.step: state has to be made or moved before a CUDA graph captures a step, else "
                "every replay would do it again; take one step before the capture"
            )

    @torch.no_grad()
    def _settle(self, refusal: Refusal, arguments: dict[str, Any], places: list[Place], step: NativeStep) -> None:
        """Takes the step that the native plan could not take as it is.

        Raises for what is wrong with the refused rows (indices into ``places``), groups or overlaps; else makes
        missing state and steps with ``step``, rows that kernels do not serve with the reference.
        """
        rows = refusal.rows
        for i in refusal.groups:
            self._check_group(i, self.param_groups[i])
            self._complete(self.param_groups[i])
        turns = repeats.turns(self, places, arguments)
        self._refuse_overlaps(places, refusal.overlaps, refusal.grad_overlaps)
        torchs = [r for r in rows if self._is_for_torch(places[r])]
        for r in torchs:
            by_torch.check_step(self, places[r], arguments)
        missing = {r: names for r in rows if (names := self._check(places[r]))}
        if self._resolved == "reference":
            self._refuse_overlaps(places, *self._find_overlaps(places, rows))
        away = [p for _, _, p in (places[r] for r in rows) if self._step_is_away(p)]
        if missing or away:
            self._refuse_capture()
        made = self._make_state([(places[r], names) for r, names in missing.items()])
        for r, state in zip(missing, made, strict=True):
            self.state[places[r][2]].update(state)
        rows = [r for r in rows if r not in torchs]
        for r in rows:
            by_torch.to_dense(self.state.get(places[r][2], {}))
            self._store_anew(places[r][2], self.state.get(places[r][2], {}), self.param_groups[places[r][0]])
        for p in away:  # as in torch's own checkpoints, which have steps of GPU parameters on the CPU
            self.state[p]["step"] = self.state[p]["step"].to(p.device)

        if not torchs and len(turns) == 1:
            self._step_resolved(rows, arguments, places, step)
            return
        left = arguments.pop("gradients", None)  # not before the last turn
        buffers = repeats.first_buffers(self, places, turns)
        for turn in turns:
            for buffer in buffers:
                buffer.fill_(-0.0)
            others = [r for r in range(len(places)) if r not in turn or r in torchs]

            def step_turn(skipped: Sequence[int], given: dict[str, Any], others: list[int] = others) -> Refusal | None:
                return step([*skipped, *others], given)

            self._step_resolved([r for r in rows if r in turn], arguments, places, step_turn)
        by_torch.step(self, [places[r] for r in torchs])
        self._leave_gradients(left, arguments, places)

    def _is_for_torch(self, place: Place) -> bool:
        return by_torch.serves(self, self.param_groups[place[0]], self._gradient(place[2]))

    def _step_resolved(
        self, rows: Sequence[int], arguments: dict[str, Any], places: list[Place], step: NativeStep
    ) -> None:
        """A step of rows that have their state: by kernels, or of ``rows`` by the reference where there are none."""
        by_reference, gradients_overlap = rows, False
        if self._resolved != "reference":
            again = step((), arguments)
            if again is None:
                return
            by_reference = again.rows
            self._refuse_overlaps(places, again.overlaps, again.grad_overlaps)
            if by_reference:
                self._tell_reference(places[by_reference[0]])
            gradients_overlap = again.gradients_overlap
        if "gradients" not in arguments or not (by_reference or gradients_overlap):
            self._step_apart(by_reference, arguments, places, step)
            return
        # Gradients may share memory: within the step one row would see what another left.
        left = arguments.pop("gradients")
        self._step_apart(by_reference, arguments, places, step)
        self._leave_gradients(left, arguments, places)

    def _leave_gradients(self, left: str | None, arguments: dict[str, Any], places: list[Place]) -> None:
        """Writes gradients after the step with ``arguments``."""
        grads = [g for _, _, p in places if (g := self._gradient(p)) is not None]
        if left == "zeroed":
            gradients.zero_(grads)
        elif left == "unscaled":
            skips = [self._results_on(None)["nonfinite"]] if "guard" in arguments else []
            gradients.unscale_(grads, arguments["grad_scale"][0], [*skips, *arguments.get("found_inf", [])])

    def _step_apart(
        self, by_reference: Sequence[int], arguments: dict[str, Any], places: list[Place], step: NativeStep
    ) -> None:
        """A step on several devices, or with rows ``by_reference``: what they share is decided here and told to each.

        Where kernels serve all rows, nothing waits for a device.
        """
        active = [(r, g) for r, (_, _, p) in enumerate(places) if (g := self._gradient(p)) is not None]
        # Also of rows of which only the average moves.
        devices = list({place[2].device: None for place in places if self._takes_part(place)})
        apart = set(by_reference)
        if not active and arguments.get("measure"):  # the norm of nothing
            self._results_on(None)["grad_norm"].zero_()
            arguments = {}
        home = devices[0] if devices else torch.device("cpu")
        writes = "gradients" in arguments
        if self._resolved != "reference" and len(devices) <= 1 and not apart:
            self._must_step(step((), self._arguments(home, writes) if active else {}))
            return
        arguments = {**arguments, **self._arguments(home, writes)} if arguments else {}
        scale, group_scales, found = self._decide(places, active, apart, home, arguments)
        if self._resolved != "reference" and len(apart) < len(places):
            told = ("grads", "gradients", "scale")
            native: dict[str, Any] = {name: arguments[name] for name in told if name in arguments}
            native.update(group_scales=[group_scales.to(d) for d in devices])
            if "grad_scale" in arguments:
                native.update(grad_scale=[arguments["grad_scale"][0].to(d) for d in devices])
            if found is not None:
                native.update(found_inf=[found.to(d) for d in devices])
            self._must_step(step(by_reference, native))
        if not apart:
            return
        for r in by_reference if found is None or not tracing.has_number(found) or found == 0 else ():
            i, _, p = places[r]
            with contextlib.ExitStack() as stack:
                if found is not None and not tracing.has_number(found):
                    states = [t for t in self.state.get(p, {}).values() if isinstance(t, Tensor)]
                    stack.enter_context(reference.undone_where(found, [p, *states]))
                factor = scale * tracing.number(group_scales.select(0, i))
                self._step_by_reference(p, self._gradient(p), self.param_groups[i], factor)

    def _must_step(self, refusal: Refusal | None) -> None:
        if refusal is not None:
            raise RuntimeError(f"{type(self).__name__}.step: the kernels refused {refusal}; please report this")

    def _step_by_reference(self, p: Tensor, g: Tensor | None, group: dict[str, Any], scale: Number) -> None:
        state: dict[str, Any] = self.state.get(p, {})
        if g is not None:
            options = {
                name: tracing.number(value) if isinstance(value, Tensor) else float(value)
                for name, value in self.rule_options(group).items()
            }
            if self._clips_by_tensor(group):
                norm, weight_norm = (reference.measure(t, p).sqrt() for t in (g, p))
                scale = scale * clip.tensor_coefficient(group, norm * scale, weight_norm)
            value = group.get("clip_grad_value")
            names = self.state_names(group)
            reference.step(
                self.rule,
                p,
                g,
                state,
                names,
                factor=scale,
                clip_value=value,
                extra=storage.extra(group, p),
                seed=int(group.get("rounding_seed", 0)) if storage.is_stochastic(group, p) else None,
                unbiased=storage.state_dtype(group, p) == torch.bfloat16 and not tracing.is_subclass(p),
                counts=self.has_step or "step" in self._further_names(group, p),
                **options,
            )
        if group.get("ema_decay") is not None and "ema" in state:
            source = state["master"] if g is not None and storage.extra(group, p) == "master" else p
            reference.average(source, state["ema"], float(group["ema_decay"]))

    @staticmethod
    def _clips_by_tensor(group: dict[str, Any]) -> bool:
        return group.get("clip_per_param") is not None or group.get("agc") is not None

    def _decide(
        self,
        places: list[Place],
        active: list[tuple[int, Tensor]],
        apart: set[int],
        home: torch.device,
        arguments: dict[str, Any],
    ) -> tuple[Number, Tensor, Tensor | None]:
        """What ``Plan::decide`` (``csrc/plan.cpp``) does, for rows anywhere.

        Returns:
            The scale of all gradients where it is known here, the factor of each group's (float64, on ``home``), and
            whether to skip (0-dim, or None: not asked).
        """
        scale, scale_tensor = arguments.get("scale", 1.0), torch.ones((), dtype=torch.float64, device=home)
        if "grad_scale" in arguments:
            scale_tensor = gradients.reciprocal(arguments["grad_scale"][0].to(home))
            if apart:
                scale = scale * tracing.number(scale_tensor)
        whole = scale_tensor * arguments.get("scale", 1.0)
        factors = torch.ones(len(self.param_groups), dtype=torch.float64, device=home)
        params = [p for _, _, p in places]
        found = None
        if "found_inf" in arguments:
            found = sharding.agree(arguments["found_inf"][0].to(home) != 0, params)
        if arguments.get("measure"):
            everything = self._resolved == "reference"
            # Each group's rows in their order; rows that kernels serve as one number, where the first of them stands.
            sums = torch.zeros(len(places), dtype=torch.float64, device=home)
            native: dict[int, list[Tensor]] = {}
            first = {i: r for r, (i, _, _) in reversed(list(enumerate(places)))}
            for r, g in active:
                i, _, p = places[r]
                if everything or r in apart:
                    sums.select(0, r).copy_(reference.measure(g, p))
                else:
                    native.setdefault(i, []).append(g)
            for i, grads in native.items():
                sums.select(0, first[i]).add_(clip.sum_of_squares(grads, home))
            alone = torch.tensor([clips_alone(self.param_groups[i]) for i, _, _ in places], device=home)
            shared = reference.join(torch.where(alone, 0.0, sums))
            norm = reference.join(sums).sqrt() * whole
            self._results_on(home)["grad_norm"].copy_(norm)
            if arguments.get("guard"):
                nonfinite = sharding.agree(~torch.isfinite(norm), params)
                found = nonfinite if found is None else found | nonfinite
                self._results_on(home)["nonfinite"].copy_(nonfinite)
                if self.skip_nonfinite:
                    self._results_on(home)["skipped_steps"].add_(nonfinite)
            for i, group in enumerate(self.param_groups):
                own, bound = group.get("max_grad_norm"), self._max_grad_norm
                if own is not None and i in first:
                    together = sums.narrow(0, first[i], len(group["params"]))
                    factor = clip.coefficient(float(own), reference.join(together).sqrt() * whole)
                elif bound is not None and not self._clips_by_tensor(group):
                    factor = clip.coefficient(bound, shared.sqrt() * whole)
                else:
                    continue
                factors.select(0, i).copy_(factor)
        return scale, factors, found if found is None else found.float()

    def _step_is_away(self, p: Tensor) -> bool:
        step = self.state.get(p, {}).get("step")
        return isinstance(step, Tensor) and step.device != p.device and {p.device.type, step.device.type} <= SERVED

    @torch.inference_mode(False)  # what is made within it could not be stepped outside of it; this enables gradients
    @torch.no_grad()
    def _make_state(self, missing: list[tuple[Place, list[str]]]) -> list[dict[str, Tensor]]:
        made: list[dict[str, Tensor]] = [{} for _ in missing]
        # A device's step counters are views of one buffer: they stay together in memory.
        devices = [p.device if p.is_cuda else torch.device("cpu") for (_, _, p), names in missing if "step" in names]
        counters = {
            d: iter(torch.zeros(devices.count(d), dtype=torch.float32, device=d).unbind()) for d in set(devices)
        }
        for state, ((i, _, p), names) in zip(made, missing, strict=True):
            self._tell_widened(self.param_groups[i], p)
            for name in names:
                if name == "step":
                    state[name] = next(counters[p.device if p.is_cuda else torch.device("cpu")])
                else:
                    dtype = storage.state_dtype(self.param_groups[i], p)
                    if name in ("ema", "master"):
                        dtype = torch.float32 if p.dtype in storage.HALVES else None
                    elif name == "compensation":
                        dtype = None
                    value = self._initial_value(p, name)
                    state.update(storage.make(p, name, value, dtype, signed=name not in self.squares))
                    if name == "master":
                        state[name].copy_(p)
        return made

    @torch.inference_mode(False)
    @torch.no_grad()
    def _store_anew(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Stores the parameter's states as its group asks for them, where they are stored in another way."""
        if not state:
            return
        self._complete(group)
        self._tell_widened(group, p)
        for name in dict.fromkeys((*self.state_names(group), *storage.names_in(state))):
            there = state.get(name) is not None or state.get(name + "_codes") is not None
            dtype = storage.state_dtype(group, p)
            signed = name not in self.squares
            # What does not fit is left for the step to refuse.
            if there and storage.fits(state, name, p, signed) and not storage.is_stored(state, name, p, dtype):
                self._refuse_capture()
                storage.convert(state, name, p, dtype, signed)
        for name, dtype in (("master", torch.float32), ("compensation", p.dtype)):
            if name != storage.extra(group, p):
                state.pop(name, None)
            elif isinstance(state.get(name), Tensor) and state[name].dtype != dtype:
                state[name] = state[name].to(dtype)

    # What goes around the step

    @contextlib.contextmanager
    @torch.no_grad()
    def swap_ema(self) -> Iterator[None]:
        """Puts the averaged weights into the model, and takes them back at the end, also after an exception.

        Parameters that have no average yet stay as they are.

        Raises:
            RuntimeError: no group has ``ema_decay``, or the averages are in the model already.
        """
        where = f"{type(self).__name__}.swap_ema"
        if self._swapped:
            raise RuntimeError(f"{where}: the averaged weights are in the model already")
        if all(group.get("ema_decay") is None for group in self.param_groups):
            raise RuntimeError(f"{where}: no averages are kept; construct the optimizer with ema_decay=")
        pairs = [(p, self.state[p]["ema"]) for _, _, p in self._places() if "ema" in self.state.get(p, {})]
        kept = [p.clone() for p, _ in pairs]
        self._swapped = True
        try:
            for p, e in pairs:
                p.copy_(torch.where(reference.is_unset(e), p.to(e.dtype), e))
            yield
        finally:
            self._swapped = False
            for (p, _), old in zip(pairs, kept, strict=True):
                p.copy_(old)

    @tracing.opaque
    @torch.no_grad()
    def accumulate(self) -> None:
        """Adds every ``.grad`` to a buffer of the optimizer's own, in one native call, and sets it to None.

        Buffers are float32 for 16-bit gradients, so that the sum of many micro-batches loses nothing to their
        rounding. :meth:`step` then takes the mean over the calls, a ``.grad`` that it finds counting as one more.

        Raises:
            RuntimeError: the optimizer steps in backward, or a gradient has another shape than the sum so far; nothing
                is changed then.
        """
        if self._in_backward is not None:
            raise RuntimeError(
                f"{type(self).__name__}.accumulate: step_in_backward() steps each parameter at once, so there is "
                "nothing to accumulate; remove its hooks first"
            )
        for i, group in enumerate(self.param_groups):
            if group.get("differentiable"):
                raise RuntimeError(
                    f"{type(self).__name__}.accumulate: group {i} is differentiable=True, and sums of gradients forget "
                    "where they came from; add up the losses instead, or use differentiable=False"
                )
        where = f"{type(self).__name__}.accumulate"
        places = self._places()
        repeats.turns(self, places, {"grads": None})
        rows = [place for place in places if place[2].grad is not None]
        first = not self._micro_batches
        # What no longer belongs to a parameter is let go.
        buffers = {p: b for _, _, p in places if (b := self._buffers.get(p)) is not None and self._fits(b, p)}
        gathered = {} if first else dict(self._gathered)
        for _, _, p in rows:
            if p in gathered and not self._fits(gathered[p], p):
                raise RuntimeError(
                    f"{where}: a parameter of shape {list(p.shape)} on {p.device} had shape {list(gathered[p].shape)} "
                    f"on {gathered[p].device} in an earlier micro-batch; call discard_accumulated() after such a change"
                )
        for place in rows:
            p, g = place[2], place[2].grad
            assert g is not None
            if (g.shape, g.device, g.is_complex()) != (p.shape, p.device, p.is_complex()) or g._is_zerotensor():
                raise RuntimeError(
                    f"{where}: {self._name(place)}: gradient is {g.dtype} of shape {list(g.shape)} on {g.device}, "
                    f"parameter is {p.dtype} on {p.device}; clear gradients with zero_grad() and compute them anew"
                )
            if p not in gathered:
                if p not in buffers:
                    wide = p.dtype if p.is_complex() or p.element_size() >= 4 else torch.float32
                    with torch.inference_mode(False):
                        buffers[p] = torch.zeros_like(p, dtype=wide, memory_format=torch.preserve_format)
                gathered[p] = buffers[p]
        params = [p for _, _, p in rows]
        clip.add_([gathered[p] for p in params], [p.grad for p in params])
        self._buffers, self._gathered = buffers, gathered
        self._micro_batches += 1
        for p in params:
            p.grad = None

    def discard_accumulated(self) -> None:
        """Forgets what :meth:`accumulate` has gathered since the last step, and frees its buffers."""
        self._micro_batches, self._buffers, self._gathered = 0, {}, {}

    @staticmethod
    def _fits(buffer: Tensor, p: Tensor) -> bool:
        return buffer.shape == p.shape and buffer.device == p.device

    def _tell_reference(self, place: Place) -> None:
        p = place[2]
        assert _backend.native is not None
        if _backend.native.is_watched() or (self._resolved == "auto" and not tracing.has_number(p)):
            return
        what = type(p).__name__ if tracing.is_subclass(p) else f"{p.device.type} {p.layout}"
        reason = f"there are no kernels for {what} parameters such as {self._name(place)}"
        if self._resolved != "auto":
            raise RuntimeError(f"{type(self).__name__}.step: backend is {self._resolved!r}, but {reason}; use 'auto'")
        _backend.warn_once(f"{type(self).__name__}: {reason}; the slower plain-torch reference serves them")

    def _tell_widened(self, group: dict[str, Any], p: Tensor) -> None:
        if storage.is_widened(group, p) and (states := len(self.state_names(group))):
            _backend.warn_once(
                f"{type(self).__name__}: 8-bit state is kept in float32 here, for parameters that are "
                f"{type(p).__name__}s: {4 * states} bytes a parameter instead of {states}; with "
                f"state_dtype=torch.bfloat16 it is {2 * states}"
            )

    # What can be wrong with a row, told in one sentence each

    def _name(self, place: Place) -> str:
        i, k, p = place
        names = self.param_groups[i].get("param_names")
        name = f"'{names[k]}', " if names else ""
        return f"group {i} parameter {k} ({name}shape {list(p.shape)})"

    def _find_overlaps(self, places: list[Place], rows: Sequence[int]) -> tuple[Pairs, Pairs]:
        """What ``check_overlaps`` in ``csrc/torch_plan.h`` finds, where ``rows`` take part."""
        writes, takes_part = self._gradients_left() is not None, set(rows)
        owned: list[Tensor] = []
        owners: list[int] = []
        for r, (_, _, p) in enumerate(places):
            own = [t for t in (p, *self.state.get(p, {}).values()) if isinstance(t, Tensor) and overlap.has_memory(t)]
            owned += own
            owners += [r] * len(own)
        grads = [(r, g) for r in rows if (g := self._gradient(places[r][2])) is not None and overlap.has_memory(g)]
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

    def _refuse_overlaps(self, places: list[Place], overlaps: Pairs, grad_overlaps: Pairs) -> None:
        for a, b in grad_overlaps:
            whose = "its own parameter or state" if a == b else f"the parameter or state of {self._name(places[b])}"
            raise RuntimeError(
                f"{type(self).__name__}.step: {self._name(places[a])}: its gradient shares memory with {whose}, which "
                "the step changes while it reads, or zeroes with the gradient; give it memory of its own: "
                "p.grad = p.grad.clone()"
            )
        for a, b in overlaps:
            if a != b and places[a][2] is places[b][2]:
                continue  # stepped in turns
            where = f"{type(self).__name__}.step: {self._name(places[a])}"
            if a == b:
                raise RuntimeError(
                    f"{where}: its elements, or its state's, share memory with one another (as after expand()), so an "
                    "update in place would be wrong; give it memory of its own with .clone()"
                )
            raise RuntimeError(
                f"{where} or its state shares memory with {self._name(places[b])}, so an update in place would be "
                "wrong; list only one of them, or give them memory of their own with .clone()"
            )

    def _check(self, place: Place) -> list[str]:
        """The row's states that are to be made; raises where the row can not be served."""
        i, _, p = place
        g, group = self._gradient(p), self.param_groups[i]

        def refuse(problem: str, fix: str) -> None:
            raise RuntimeError(f"{type(self).__name__}.step: {self._name(place)}: {problem}; {fix}")

        if g is None:  # only an average moves; it begins with the others'
            if (ema := self.state.get(p, {}).get("ema")) is None:
                return ["ema"]
            self._check_numbers(refuse, p, "ema", ema)
            return []
        for_torch = by_torch.serves(self, group, g)
        if g.layout != torch.strided and not for_torch:
            own = type(self).__name__
            refuse(f"{own} does not support sparse gradients (got {g.layout})", f"use {self.sparse_class}")
        if p.layout != torch.strided:
            refuse(f"parameter is {p.layout}, expected torch.strided", "store it dense")
        if g.shape != p.shape:
            refuse(f"gradient has shape {list(g.shape)}, parameter {list(p.shape)}", "clear gradients with zero_grad()")
        mixes = g.dtype in storage.MIXES and p.dtype in storage.MIXES
        if g.dtype != p.dtype and not mixes and not self._micro_batches:
            refuse(f"gradient is {g.dtype}, parameter is {p.dtype}", f"cast the gradient to {p.dtype}")
        if g.device != p.device:
            refuse(f"gradient is on {g.device}, parameter on {p.device}", f"move the gradient to {p.device}")
        if p.dtype not in storage.STEPPED:
            refuse(
                f"parameter is {p.dtype} and has a gradient",
                "clear it, or use float32, float64, bfloat16, float16, complex64 or complex128",
            )
        native = _backend.native
        if self._resolved in SERVED and native is not None and native.kernels_for(p) != self._resolved:
            self._tell_reference(place)
        if storage.is_stochastic(group, p) and tracing.is_subclass(p):
            refuse(
                f"param_rounding is 'stochastic', but it is a {type(p).__name__}", "use 'kahan' or master_weights=True"
            )
        if p.is_meta and group.get("fused"):
            refuse(
                "`fused=True` requires all the params to be floating point Tensors of supported devices, "
                f"but got {p.dtype} and {p.device.type}",
                "use fused=None, or materialize it with to_empty()",
            )
        writes = self._gradients_left() is not None
        for name, t in self._operands(place, g).items():
            if t.is_inference() and not torch.is_inference_mode_enabled() and (name != "gradient" or writes):
                refuse(f"{name} is an inference tensor", "make it outside of torch.inference_mode()")
            if t._is_zerotensor():
                refuse(f"{name} is a zero tensor, without memory", "use its .clone()")
            made_of_sparse = self.serves_sparse and t.layout == torch.sparse_coo and name.startswith("state")
            if (t.layout != torch.strided or t.is_nested) and not (for_torch or made_of_sparse):
                kind = "nested" if t.is_nested else t.layout
                refuse(f"{name} is {kind}, expected torch.strided", "replace it with a dense tensor")
        if group.get("capturable") and p.device.type == "cpu":
            refuse("capturable=True, but it is on cpu, where there are no graphs to capture", "use capturable=False")
        if for_torch:
            by_torch.check(self, place, g, refuse)
        state = self.state.get(p, {})
        missing = self._check_state(refuse, p, state, self.state_names(group))
        further = self._further_names(group, p)
        if self.has_step or "step" in further:
            self._check_step(refuse, p, state)
        for name in further:
            if state.get(name) is None and name not in missing:
                missing.append(name)
        return by_torch.to_make(self, missing) if for_torch else missing

    def _operands(self, place: Place, g: Tensor) -> dict[str, Tensor]:
        """The tensors that the row's step reads or writes, as far as they are there."""
        i, _, p = place
        state = self.state.get(p, {})
        states = [*self.state_names(self.param_groups[i]), "step", "ema", "master", "compensation"]
        keys = [f"{name}{end}" for name in states for end in ("", "_codes", "_scales")]
        found = (
            {} if not isinstance(state, dict) else {key: t for key in keys if isinstance(t := state.get(key), Tensor)}
        )
        return {"parameter": p, "gradient": g, **{f"state '{key}'": t for key, t in found.items()}}

    def _further_names(self, group: dict[str, Any], p: Tensor) -> list[str]:
        """What else the group's options ask for, which is made where it lacks."""
        names = ["ema"] if group.get("ema_decay") is not None else []
        if (extra := storage.extra(group, p)) is not None:
            names.append(extra)
        narrow = storage.state_dtype(group, p) in (torch.int8, torch.bfloat16)
        if storage.is_stochastic(group, p) or (narrow and self.state_names(group)):
            names.append("step")  # rounding turns with it
        return names

    def _check_state(self, refuse: Callable[[str, str], None], p: Tensor, state: Any, names: list[str]) -> list[str]:
        if not isinstance(state, dict):
            refuse(f"its state is {type(state).__name__}, expected dict", "delete it to start anew")
        wanted = (["step"] if self.has_step else []) + names
        absent = [name for name in wanted if state.get(name) is None and state.get(name + "_codes") is None]
        scales = [name for name in names if state.get(name + "_scales") is not None]
        missing = absent if len(absent) == len(wanted) and not scales else []
        for name in scales:
            self._check_codes(refuse, p, state, name)
        if absent and not missing:
            fix = "load a checkpoint that has it, or delete the parameter's state to start anew"
            refuse(f"its state has {sorted(state)} but no '{absent[0]}', which the group's options ask for", fix)
        for name in names:
            if state.get(name) is None and name not in scales and name not in missing:
                self._check_codes(refuse, p, state, name)
        for name in [*names, "ema", "master", "compensation"]:
            if (t := state.get(name)) is not None:
                self._check_numbers(refuse, p, name, t)
        return missing

    @staticmethod
    def _check_numbers(refuse: Callable[[str, str], None], p: Tensor, name: str, t: Any) -> None:
        if not isinstance(t, Tensor) or t.shape != p.shape:
            got = f"shape {list(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            refuse(f"state '{name}' has {got}, expected {list(p.shape)}", "load a checkpoint of this model")
        if t.is_complex() != p.is_complex() or t.dtype not in storage.STEPPED:
            refuse(f"state '{name}' is {t.dtype}, parameter is {p.dtype}", f"cast it to {p.dtype}")
        if t.device != p.device:
            refuse(f"state '{name}' is on {t.device}, parameter on {p.device}", f"move it to {p.device}")

    def _check_step(self, refuse: Callable[[str, str], None], p: Tensor, state: dict[str, Any]) -> None:
        step = state.get("step")
        if step is None:
            return
        if not (
            isinstance(step, Tensor) and step.numel() == 1 and step.dtype in storage.STEPPED and not step.is_complex()
        ):
            got = f"of shape {list(step.shape)}, {step.dtype}" if isinstance(step, Tensor) else repr(step)
            refuse(
                f"state 'step' is {got}, expected a 0-dim float32 tensor", "replace it with torch.tensor(float(step))"
            )
        if step.is_cpu and tracing.has_number(step) and not is_step_count(step.item()):
            refuse(
                f"state 'step' is {step.item()}, expected a whole number from 0 to 2**53",
                "load a checkpoint that was saved whole, or delete the parameter's state to start anew",
            )

    def _check_codes(self, refuse: Callable[[str, str], None], p: Tensor, state: dict[str, Any], name: str) -> None:
        if (broken := storage.broken(state, name, p, name not in self.squares)) is not None:
            refuse(*broken)
