"""The public face of the optimizers: options, checkpoints, and the step, which ``stepper.py`` takes.

A subclass names its :class:`Rule` and has the constructor of the torch class that it mirrors, where there is one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import _backend, tracing
from . import checkpoint, hooks, options
from .accumulator import Accumulator
from .averages import Averages
from .options import Listed, StepOptions
from .rule import Rule
from .step import NOTHING_ELSE, InOrder, Inputs, places_of
from .stepper import Stepper

if TYPE_CHECKING:
    from ..in_backward import InBackward


class FusedOptimizer(Averages, torch.optim.Optimizer):
    """Base of the optimizers in :mod:`genopt_ext.optim`; a mixin before the torch class it mirrors, if torch has it.

    Attributes:
        backend: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"reference"``.
        skip_nonfinite: whether a step whose gradients hold NaN or infinity changes nothing; may be set between steps.
        in_backward: the handle of :func:`genopt_ext.step_in_backward` while it is on.
    """

    rule: ClassVar[Rule]
    default_state_dtype: ClassVar[torch.dtype | None] = None
    own_options: ClassVar[tuple[str, ...]] = ()  # of groups, which torch's checkpoints do not have
    together: ClassVar[str | None] = None  # why a parameter can not be stepped before all gradients are there

    backend: str = "auto"
    skip_nonfinite: bool = False
    in_backward: InBackward | None = None
    _max_grad_norm: float | None = None
    _listed: Listed | None = None
    _zeroes = False  # the running step zeroes gradients
    _keeps_scale = False  # the running step leaves the loss scale in gradients
    _checks = False  # the running step finds infinities for a GradScaler
    _opt_called: bool = False  # torch.optim.lr_scheduler's: whether a step was taken

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        options.document(cls)

    @functools.cached_property
    def stepper(self) -> Stepper:
        """What takes the steps: for this package's own use, as is :attr:`accumulator`."""
        return Stepper(type(self).__name__, self.rule, self.backend)

    @functools.cached_property
    def accumulator(self) -> Accumulator:
        """What holds sums of gradients."""
        return Accumulator()

    # Asked by GradScaler: with fused=True it hands over its scale and what it found, and neither unscales nor skips.
    @property
    def _step_supports_amp_scaling(self) -> bool:
        if self.in_backward is not None:
            self.in_backward.refuse_grad_scaler()
        if self.accumulator.micro_batches and not self._checks:
            raise RuntimeError(
                f"{type(self).__name__}: torch.amp.GradScaler looks at .grad alone, and knows nothing of what "
                "accumulate() has gathered; take genopt_ext.GradScaler, without unscale_()"
            )
        if not any(group.get("fused") for group in self.param_groups) or hooks.is_replaced(self):
            return False
        # There torch's scalers agree over all processes only where they unscale gradients themselves.
        return self.stepper.find_piece(self.param_groups) is None

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, announced: bool) -> None:
        pass

    # Options

    def _construct(
        self, params: ParamsT, backend: str, step_options: StepOptions, given: dict[str, Any], **more: Any
    ) -> None:
        """The constructor of a class that torch has too. ``given``: torch's arguments; ``more``: what it lacks."""
        self._begin(backend, step_options, **given)
        super().__init__(params, **given)  # torch's class: it follows in the order of bases
        self._set_options(step_options, **more)

    def _construct_own(
        self,
        params: ParamsT,
        backend: str,
        step_options: StepOptions,
        own: dict[str, Any],
        *,
        foreach: bool | None,
        fused: bool | None,
        **more: Any,
    ) -> None:
        """The constructor of a class that torch lacks. ``own``: its arguments."""
        self._begin(backend, step_options, **own)
        super().__init__(params, {**own, "foreach": foreach, "fused": fused})
        self._set_options(step_options, **more)

    def _begin(self, backend: str, step_options: StepOptions, **given: Any) -> None:
        """The start of every constructor: checks before torch's constructor changes anything."""
        where = type(self).__name__
        for name in step_options:
            if name not in StepOptions.__annotations__:
                raise TypeError(f"{where}.__init__() got an unexpected keyword argument '{name}'")
        step_options.setdefault("state_dtype", self.default_state_dtype)
        self.rule.check(where, {**given, **step_options})
        _backend.resolve(backend)
        self.backend = backend

    def _set_options(self, step_options: StepOptions, **more: Any) -> None:
        """The end of every constructor: options that torch's lacks. Groups have a key only where it is set."""
        self.rule.check(type(self).__name__, {**self.defaults, **more})
        given: dict[str, Any] = {**step_options, **more}
        self.max_grad_norm = given.pop("max_grad_norm", None)
        self.skip_nonfinite = bool(given.pop("skip_nonfinite", False))
        self.defaults.update(options.given_options(given))
        for group in self.param_groups:
            options.set_defaults(group, self.defaults)

    @property
    def max_grad_norm(self) -> float | None:
        """The bound for the norm of all gradients together; may be set between steps."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, bound: float | None) -> None:
        self.rule.check(type(self).__name__, {"max_grad_norm": bound})
        self._max_grad_norm = None if bound is None else float(bound)

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients of the last step that computed one, unclipped: 0-dim, on the parameters' device.

        Such are steps with a clip by norm or with ``skip_nonfinite``; None before the first. A copy, which the next
        step leaves alone.
        """
        results = self.stepper.results
        return None if results is None else results.grad_norm.clone()

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps ``skip_nonfinite`` has skipped: 0-dim int64, on the parameters' device."""
        return self.stepper.results_on(self.param_groups).skipped_steps.clone()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group's options are checked too, and a refused group is not added.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        if isinstance(param_group, dict):
            options.set_defaults(param_group, self.defaults)
        if self._listed is None:
            self._listed = Listed()
        self._listed.append(self, param_group, super().add_param_group)
        i = len(self.param_groups) - 1
        try:
            self.stepper.check_group(self.param_groups, i)
            if self.in_backward is not None:
                self.in_backward.add_groups((i,))
        except (TypeError, ValueError):
            del self.param_groups[i]
            raise

    # Checkpoints, pickle and deepcopy

    def __getstate__(self) -> dict[str, Any]:
        if self.accumulator.micro_batches:
            raise RuntimeError(
                f"{type(self).__name__}: accumulated gradients are no part of a copy; call step() or "
                "discard_accumulated() before copying or pickling"
            )
        own = {name: getattr(self, name) for name in ("backend", "skip_nonfinite", "_max_grad_norm")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        groups = state.get("param_groups", [])
        for i in range(len(groups)):
            self.stepper.check_group(groups, i)
        kept, others = checkpoint.with_step(state.get("state", {}))
        super().__setstate__({**state, "state": kept})
        self.state.update(others)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of the torch class it mirrors, if torch has it.

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

    def step(self, closure: Callable[[], Any] | None = None, *, grads: Sequence[Tensor | None] | None = None) -> Any:
        """Performs one optimization step over all groups, in one native call.

        Args:
            closure: reevaluates the model and returns the loss.
            grads: gradients in the place of ``.grad``, which is neither read nor written: one of the parameter's shape
                and device for each in the order of the groups, or None for one that has none. 16-bit parameters may
                have float32 ones.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError: ``grads`` is no sequence of tensors and None, or has another dtype.
            ValueError: ``grads`` is of another length, or comes with a closure or beside sums of gradients.
            RuntimeError: a gradient, state or parameter that can not be served; the message names it and
                says what to do. Parameters, gradients and state are then as they were, but that gradients which
                stand beside accumulated ones are accumulated too.
        """
        try:
            self.refuse_swapped()
            loss = given = None
            accumulator = self.accumulator
            if grads is not None:
                given = self._in_order(grads, closure)
            elif closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if accumulator.micro_batches and any(p.grad is not None for _, _, p in places_of(self.param_groups)):
                self.stepper.refuse_pieces(self.param_groups, self._inputs())
                self.accumulate()
            self.stepper.backend = self.backend
            self.stepper.step(self.param_groups, self.state, self._inputs(given))
        except BaseException:
            # torch's GradScaler has set both for this step, and takes them back only where it succeeds.
            if "found_inf" in self.__dict__:
                for name in ("grad_scale", "found_inf"):
                    self.__dict__.pop(name, None)
            raise
        accumulator.micro_batches = 0
        return loss

    def _in_order(self, grads: Sequence[Tensor | None], closure: Any) -> InOrder:
        where = f"{type(self).__name__}.step"
        if closure is not None:
            raise ValueError(f"{where}: grads= takes no closure: its gradients would be ignored")
        if self.accumulator.micro_batches:
            raise ValueError(
                f"{where}: gradients were accumulated; step without grads=, or discard_accumulated() first"
            )
        if isinstance(grads, (Tensor, Mapping)):
            raise TypeError(
                f"{where}: grads= is a {type(grads).__name__}; it has to be a list in the parameters' order"
            )
        given, places = [*grads], places_of(self.param_groups)
        if len(given) != len(places):
            raise ValueError(
                f"{where}: grads= has {len(given)} entries for {len(places)} parameters; None stands for no gradient"
            )
        for r, (g, (_, _, p)) in enumerate(zip(given, places, strict=True)):
            if g is None:
                continue
            if not isinstance(g, Tensor):
                raise TypeError(f"{where}: grads[{r}] is a {type(g).__name__}; it has to be a Tensor or None")
            if g.dtype is not p.dtype and not (g.dtype is torch.float32 and p.dtype in (torch.bfloat16, torch.float16)):
                raise TypeError(f"{where}: grads[{r}] has {g.dtype} for a parameter of {p.dtype}; convert it")
        return InOrder(self.param_groups, given)

    @tracing.opaque
    def init_state(self) -> None:
        """Makes the state that a first step would make, of every parameter that requires a gradient, and takes none.

        For checkpoints that are loaded into what is there, or saved before the first step, as of
        ``torch.distributed.checkpoint``: its own helpers take a step with gradients of zero to have state made, which
        counts as one. State that there is stays as it is.

        Raises:
            RuntimeError: a parameter or its state can not be served, or a CUDA graph is being captured; nothing is
                changed then.
        """
        grads = {p: p.detach() for _, _, p in places_of(self.param_groups) if p.requires_grad}
        as_if = Inputs(sums=grads, micro_batches=1)
        self.stepper.backend = self.backend
        self.stepper.prepare(self.param_groups, self.state, as_if, makes=True)

    def _inputs(self, given: InOrder | None = None) -> Inputs:
        accumulator, own = self.accumulator, self.__dict__
        asked = self._max_grad_norm is not None or self.skip_nonfinite or self._checks or self._zeroes
        if not (asked or accumulator.micro_batches or given is not None or "grad_scale" in own or "found_inf" in own):
            return NOTHING_ELSE
        scale = own.get("grad_scale")
        sums = accumulator.sums if accumulator.micro_batches else None
        unscales = scale is not None and not self._keeps_scale and given is None
        return Inputs(
            sums=sums if given is None else given,
            micro_batches=accumulator.micro_batches or 1,
            max_grad_norm=self._max_grad_norm,
            skip_nonfinite=self.skip_nonfinite,
            checks=self._checks,
            grad_scale=scale,
            found_inf=own.get("found_inf"),
            gradients="zeroed" if self._zeroes or sums is not None else "unscaled" if unscales else None,
        )

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

    def step_scaled(self, scale: Tensor, keeps_scale: bool, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """A step with gradients that are ``scale`` times too large, for :class:`genopt_ext.GradScaler`.

        Returns:
            What ``step(*args, **kwargs)`` did, and whether a gradient was not finite (0-dim, 0 or 1).
        """
        self.grad_scale, self._keeps_scale, self._checks = scale, keeps_scale, True
        try:
            result = self.step(*args, **kwargs)
        finally:
            self.__dict__.pop("grad_scale", None)
            self._keeps_scale = self._checks = False
        return result, self.stepper.results_on(self.param_groups).nonfinite

    # Sums of gradients

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
        where = f"{type(self).__name__}.accumulate"
        if self.in_backward is not None:
            raise RuntimeError(
                f"{where}: step_in_backward() steps each parameter at once, so there is "
                "nothing to accumulate; remove its hooks first"
            )
        self.stepper.refuse_repeats(self.param_groups, self.state)
        self.accumulator.add(where, self.param_groups)

    def discard_accumulated(self) -> None:
        """Forgets what :meth:`accumulate` has gathered since the last step, and frees its buffers."""
        self.accumulator.discard()
