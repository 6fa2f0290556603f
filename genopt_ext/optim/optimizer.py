"""What the five optimizers share: option checks, state, checkpoints, and the step itself.

A subclass declares its rule, the names of its states and the ranges of its options, and inherits its
constructor's defaults from the torch class that it mirrors. Only this file walks parameters, and only
where the native plan (``csrc/torch_plan.h``) can not take a step as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _backend, reference


@dataclass(frozen=True)
class Range:
    """The numbers that an option may be: finite, and ``at_least <= x < below``."""

    label: str
    at_least: float | None = 0.0
    below: float | None = None
    items: int = 0  # > 0: a tuple of so many

    def check(self, where: str, name: str, value: Any) -> None:
        """Raises TypeError or ValueError, in torch's words and with what is allowed."""
        if not self.items:
            self._check_number(where, name, self.label, value)
            return
        if not isinstance(value, (tuple, list)) or len(value) != self.items:
            raise TypeError(f"{where}: {name} must be {self.items} numbers, got {value!r}")
        for i, item in enumerate(value):
            self._check_number(where, f"{name}[{i}]", self.label.format(i), item)

    def _check_number(self, where: str, name: str, label: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{where}: Tensor {name} must be 1-element, got shape {list(value.shape)}")
        try:
            number = float("x") if isinstance(value, (str, bytes)) else float(value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{where}: Invalid {label}: {value!r}; {name} must be a number") from None
        low = "" if self.at_least is None else f" >= {self.at_least:g}"
        high = "" if self.below is None else f" < {self.below:g}"
        inside = (self.at_least is None or number >= self.at_least) and (self.below is None or number < self.below)
        if not (math.isfinite(number) and inside):
            allowed = " and".join(filter(None, (low, high)))
            raise ValueError(f"{where}: Invalid {label}: {value}; {name} must be a finite number{allowed}")


FLAGS = ("amsgrad", "capturable", "centered", "decoupled_weight_decay", "maximize", "nesterov")

SERVED = {"cpu", "cuda"}  # device types that have kernels

# A parameter and where it stands: (group index, index in the group, the parameter).
Place = tuple[int, int, Tensor]


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the optimizers in :mod:`genopt_ext.optim`; a mixin before the torch class it mirrors."""

    rule: ClassVar[str]
    has_step: ClassVar[bool] = True
    sparse_class: ClassVar[str] = "torch.optim.SGD or torch.optim.Adagrad"
    ranges: ClassVar[dict[str, Range]]

    backend: str = "auto"
    _plan: Any = None

    @classmethod
    def state_names(cls, group: dict[str, Any]) -> list[str]:
        """The state tensors that a parameter of ``group`` has, besides ``step``, in torch's order."""
        raise NotImplementedError

    @classmethod
    def rule_options(cls, group: dict[str, Any]) -> dict[str, Any]:
        """``group`` as keyword arguments of the rule's function in :mod:`genopt_ext.reference`."""
        raise NotImplementedError

    def _initial_value(self, param: Tensor, name: str) -> complex:
        return 0.0

    # GradScaler must unscale and skip by itself, also with fused=True, for which torch's constructors
    # announce a step that does both.
    @property
    def _step_supports_amp_scaling(self) -> bool:
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, announced: bool) -> None:
        pass

    # Options

    def _begin(self, backend: str, **options: Any) -> None:
        """The start of every constructor: checks before torch's constructor changes anything."""
        self._check_options(type(self).__name__, options)
        _backend.resolve(backend)
        self.backend = backend

    def _set_capturable(self, capturable: bool) -> None:
        """For classes whose torch constructor has no ``capturable``; groups have the key only where it is set."""
        self._check_options(type(self).__name__, {"capturable": capturable})
        if capturable:
            self.defaults["capturable"] = True
            for group in self.param_groups:
                group.setdefault("capturable", True)

    def _check_options(self, where: str, options: dict[str, Any]) -> None:
        for name, allowed in self.ranges.items():
            if name in options:
                allowed.check(where, name, options[name])
        for name in FLAGS:
            if name in options and not isinstance(options[name], (bool, int)):
                raise TypeError(f"{where}: {name} must be True or False, got {options[name]!r}")
        if options.get("differentiable"):
            torch_class = f"torch.optim.{type(self).__name__}"
            raise ValueError(f"{where}: differentiable=True is not served by fused kernels; use {torch_class}")
        if options.get("nesterov") and not (options["momentum"] > 0 and options["dampening"] == 0):
            raise ValueError(f"{where}: Nesterov momentum requires a momentum and zero dampening")

    def _check_group(self, i: int, group: dict[str, Any]) -> None:
        self._check_options(f"{type(self).__name__}: group {i}", group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group's options and dtypes are checked too, and a refused group is not added.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        super().add_param_group(param_group)
        i = len(self.param_groups) - 1
        try:
            self._check_group(i, self.param_groups[i])
            for k, p in enumerate(self.param_groups[i]["params"]):
                if not (p.is_floating_point() or p.is_complex()):
                    raise TypeError(
                        f"{type(self).__name__}: {self._name((i, k, p))}: parameters must be floating-point "
                        f"or complex, got {p.dtype}; leave it out: [p for p in params if p.is_floating_point()]"
                    )
        except (TypeError, ValueError):
            del self.param_groups[i]
            raise

    # Checkpoints, pickle and deepcopy

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for i, group in enumerate(state.get("param_groups", ())):
            self._check_group(i, group)
        super().__setstate__(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of the torch class it mirrors.

        State keeps the dtype that it was saved with, where torch casts it to the parameter's. The loaded
        tensors are copies: two optimizers loaded from one ``state_dict`` in one process share nothing.

        Args:
            state_dict: what ``state_dict()`` returned.

        Raises:
            ValueError: groups of other sizes, or an option out of its range; nothing is changed then.
        """
        loaded: dict[str, Any] = {}

        # torch casts between its hooks and the assignment; what the last hook leaves is kept beside it.
        def keep(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
            loaded.update(final)

        handle = self.register_load_state_dict_pre_hook(keep)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        saved_params = [key for group in loaded["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(saved_params, params, strict=True):
            for name, saved in loaded["state"].get(key, {}).items():
                if not isinstance(saved, Tensor):
                    continue
                current = self.state[p][name]
                dtype = saved.dtype if saved.is_floating_point() else current.dtype
                if current is saved or current.dtype != dtype:
                    device = current.device
                    self.state[p][name] = saved.detach().to(device=device, dtype=dtype, copy=True)

    # The step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step over all groups, in one native call.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a gradient, state or parameter that can not be served; the message names it and
                says what to do. Parameters, gradients and state are then as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._resolved == "reference":
            rows = [r for r, (_, _, p) in enumerate(self._places()) if p.grad is not None]
            self._settle(rows, range(len(self.param_groups)), ())
            return loss
        if self._plan is None:
            assert _backend.native is not None
            # Later, only what the plan can not take is looked at in Python.
            for i, group in enumerate(self.param_groups):
                self._check_group(i, group)
            for place in self._places():
                if place[2].grad is not None:
                    self._check(place)
            self._plan = _backend.native.Plan(self.rule, self._resolved)
        refusal = self._plan.step(self.param_groups, self.state, (), ())
        if refusal is not None:
            self._settle(*refusal)
        return loss

    @property
    def _resolved(self) -> str:
        return _backend.resolve(self.backend)

    def _places(self) -> list[Place]:
        return [(i, k, p) for i, group in enumerate(self.param_groups) for k, p in enumerate(group["params"])]

    @torch.no_grad()
    def _settle(self, rows: Sequence[int], groups: Sequence[int], overlaps: Sequence[tuple[int, int]]) -> None:
        """Takes the step that the native plan could not take as it is.

        Raises for what is wrong with ``rows`` (indices into :meth:`_places`), ``groups`` or ``overlaps``;
        else makes missing state and steps, rows that kernels do not serve with the reference.
        """
        places = self._places()
        for i in groups:
            self._check_group(i, self.param_groups[i])
        self._check_overlaps(places, overlaps)
        fresh = [r for r in rows if self._check(places[r])]
        away = [p for _, _, p in (places[r] for r in rows) if self._step_is_away(p)]
        if (fresh or away) and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{type(self).__name__}.step: state has to be made or moved before a CUDA graph captures a step, else "
                "every replay would do it again; take one step before the capture"
            )
        made = self._make_state([places[r] for r in fresh])
        for r, state in zip(fresh, made, strict=True):
            self.state[places[r][2]].update(state)
        for p in away:  # as in torch's own checkpoints, which have steps of GPU parameters on the CPU
            self.state[p]["step"] = self.state[p]["step"].to(p.device)

        by_reference: Sequence[int] = rows
        if self._resolved != "reference":
            refusal = self._plan.step(self.param_groups, self.state, fresh, ())
            if refusal is None:
                return
            by_reference, _, overlaps = refusal
            self._check_overlaps(places, overlaps)
            self._tell_reference(places[by_reference[0]])
            self._plan.step(self.param_groups, self.state, set(fresh) - set(by_reference), by_reference)
        for r in by_reference:
            i, _, p = places[r]
            group = self.param_groups[i]
            assert p.grad is not None
            options = {name: float(value) for name, value in self.rule_options(group).items()}
            reference.step(self.rule, p, p.grad, self.state.get(p, {}), self.state_names(group), r in fresh, **options)

    def _step_is_away(self, p: Tensor) -> bool:
        step = self.state.get(p, {}).get("step")
        return isinstance(step, Tensor) and step.device != p.device and {p.device.type, step.device.type} <= SERVED

    def _make_state(self, places: list[Place]) -> list[dict[str, Tensor]]:
        made: list[dict[str, Tensor]] = [{} for _ in places]
        if self.has_step:
            # A device's step counters are views of one buffer: they stay together in memory.
            devices = [p.device if p.is_cuda else torch.device("cpu") for _, _, p in places]
            counters = {d: iter(torch.zeros(devices.count(d), device=d).unbind()) for d in set(devices)}
            for state, device in zip(made, devices, strict=True):
                state["step"] = next(counters[device])
        for state, (i, _, p) in zip(made, places, strict=True):
            for name in self.state_names(self.param_groups[i]):
                state[name] = torch.full_like(p, self._initial_value(p, name), memory_format=torch.preserve_format)
        return made

    def _tell_reference(self, place: Place) -> None:
        p = place[2]
        what = f"{p.device.type} {p.layout}" if type(p) in (Tensor, torch.nn.Parameter) else type(p).__name__
        reason = f"there are no kernels for {what} parameters such as {self._name(place)}"
        if self._resolved != "auto":
            raise RuntimeError(f"{type(self).__name__}.step: backend is {self._resolved!r}, but {reason}; use 'auto'")
        _backend.warn_once(f"{type(self).__name__}: {reason}; the slower plain-torch reference serves them")

    # What can be wrong with a row, told in one sentence each

    def _name(self, place: Place) -> str:
        i, k, p = place
        names = self.param_groups[i].get("param_names")
        name = f"'{names[k]}', " if names else ""
        return f"group {i} parameter {k} ({name}shape {list(p.shape)})"

    def _check_overlaps(self, places: list[Place], overlaps: Sequence[tuple[int, int]]) -> None:
        for a, b in overlaps:
            where = f"{type(self).__name__}.step: {self._name(places[a])}"
            if a == b:
                raise RuntimeError(
                    f"{where}: its elements, or its state's, share memory with one another (as after expand()), so an "
                    "update in place would be wrong; give it memory of its own with .clone()"
                )
            if places[a][2] is places[b][2]:
                raise RuntimeError(
                    f"{where} is the same parameter as {self._name(places[b])}; list each parameter once"
                )
            raise RuntimeError(
                f"{where} or its state shares memory with {self._name(places[b])}, so an update in place would be "
                "wrong; list only one of them, or give them memory of their own with .clone()"
            )

    def _check(self, place: Place) -> bool:
        """Whether the row's state is to be made; raises where the row can not be served."""
        i, _, p = place
        g, group = p.grad, self.param_groups[i]
        assert g is not None

        def refuse(problem: str, fix: str) -> None:
            raise RuntimeError(f"{type(self).__name__}.step: {self._name(place)}: {problem}; {fix}")

        if g.is_sparse or g.layout != torch.strided:
            own = type(self).__name__
            refuse(f"{own} does not support sparse gradients (got {g.layout})", f"use {self.sparse_class}")
        if p.layout != torch.strided:
            refuse(f"parameter is {p.layout}, expected torch.strided", "store it dense")
        if g.shape != p.shape:
            refuse(f"gradient has shape {list(g.shape)}, parameter {list(p.shape)}", "clear gradients with zero_grad()")
        if g.dtype != p.dtype:
            refuse(f"gradient is {g.dtype}, parameter is {p.dtype}", f"cast the gradient to {p.dtype}")
        if g.device != p.device:
            refuse(f"gradient is on {g.device}, parameter on {p.device}", f"move the gradient to {p.device}")
        if p.dtype in (torch.complex32,) or p.element_size() < 2:
            refuse(f"parameter is {p.dtype}", "use float32, float64, bfloat16, float16, complex64 or complex128")
        if p.is_inference() and not torch.is_inference_mode_enabled():
            refuse("parameter is an inference tensor", "make it outside of torch.inference_mode()")
        if group.get("capturable") and p.device.type == "cpu":
            refuse("capturable=True, but it is on cpu, where there are no graphs to capture", "use capturable=False")
        return self._check_state(refuse, p, self.state.get(p, {}), self.state_names(group))

    def _check_state(self, refuse: Callable[[str, str], None], p: Tensor, state: Any, names: list[str]) -> bool:
        if not isinstance(state, dict):
            refuse(f"its state is {type(state).__name__}, expected dict", "delete it to start anew")
        wanted = (["step"] if self.has_step else []) + names
        absent = [name for name in wanted if state.get(name) is None]
        if len(absent) == len(wanted):
            return bool(wanted)
        if absent:
            fix = f"add torch.zeros_like(parameter) as state['{absent[0]}'], or delete its state to start anew"
            refuse(f"its state has {sorted(state)} but no '{absent[0]}', which the group's options ask for", fix)
        for name in names:
            t = state[name]
            if not isinstance(t, Tensor) or t.shape != p.shape:
                got = f"shape {list(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
                refuse(f"state '{name}' has {got}, expected {list(p.shape)}", "load a checkpoint of this model")
            if t.is_complex() != p.is_complex() or not (t.is_complex() or t.is_floating_point()):
                refuse(f"state '{name}' is {t.dtype}, parameter is {p.dtype}", f"cast it to {p.dtype}")
            if t.device != p.device:
                refuse(f"state '{name}' is on {t.device}, parameter on {p.device}", f"move it to {p.device}")
        step = state.get("step")
        if self.has_step and not (isinstance(step, Tensor) and step.numel() == 1 and step.is_floating_point()):
            refuse(
                f"state 'step' is {step!r}, expected a 0-dim float32 tensor",
                "replace it with torch.tensor(float(step))",
            )
        return False
