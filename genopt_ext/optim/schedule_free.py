"""What classes without a learning rate schedule share (arXiv 2405.15682): two modes, and their authors' checkpoints.

In training the parameters are the weights y at which gradients are taken; the average x, which is what training is for,
is put in their place by ``eval()``. Both follow from one another and from ``z``, the third: see
``csrc/rules/schedule_free.h``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import reference, tracing
from . import state as states
from .optimizer import FusedOptimizer
from .options import Range
from .rule import Group

RUNNING = {"weight_sum": 0.0, "lr_max": -1.0}
WEIGHTS = frozenset({"z"})
# What the authors' groups count, with its begin; here each parameter does, but for the last, which nothing reads.
_COUNTED = {"k": 0, **RUNNING, "scheduled_lr": 0.0}


def open_interval(label: str) -> Range:
    """Of the factor by which y lies between z and x: at 0 no x would follow from y, and 1 would be x itself."""
    return Range(label, at_least=None, above=0.0, below=1.0)


RANGES = {
    "lr": Range("learning rate"),
    "weight_decay": Range("weight_decay value"),
    "r": Range("r value", at_least=None),
    "weight_lr_power": Range("weight_lr_power value"),
}


class ScheduleFree(FusedOptimizer):
    """Base of :class:`AdamWScheduleFree`, :class:`SGDScheduleFree` and :class:`RAdamScheduleFree`."""

    own_options: ClassVar[tuple[str, ...]] = ("train_mode",)

    def _construct_free(self, params: Any, backend: str, step_options: Any, own: dict[str, Any], **flags: Any) -> None:
        """The constructor: it begins in evaluation, as the authors' classes do."""
        own = {**own, "train_mode": False}
        self._construct_own(params, backend, step_options, own, **flags)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As :meth:`FusedOptimizer.add_param_group`; the group is in the mode of the others."""
        if self.param_groups and isinstance(param_group, dict):
            param_group.setdefault("train_mode", self.param_groups[0]["train_mode"])
        super().add_param_group(param_group)

    # The two modes

    def train(self) -> None:
        """Puts the weights of training into the model: before the first step, and again after :meth:`eval`.

        Nothing changes in groups that are in training. Parameters that were not stepped yet stay as they are.

        Raises:
            RuntimeError: within :meth:`evaluating` or :meth:`swap_ema`.
        """
        self._set_mode("train", True)

    def eval(self) -> None:
        """Puts the averaged weights into the model: to evaluate it, to save it, and when training is over.

        Nothing changes in groups that are in evaluation. Parameters that were not stepped yet stay as they are. What is
        rounded on the way to the average and back is not exact; :meth:`evaluating` is.

        Raises:
            RuntimeError: within :meth:`evaluating` or :meth:`swap_ema`.
        """
        self._set_mode("eval", False)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Puts the averaged weights into the model for a while; at the end those of before are there, bit for bit.

        It keeps a copy of the parameters for as long. Also after an exception they come back.

        Raises:
            RuntimeError: within another :meth:`evaluating` or within :meth:`swap_ema`.
        """
        modes = [group["train_mode"] for group in self.param_groups]
        moved = [p for group, on in zip(self.param_groups, modes, strict=True) if on for p in group["params"]]
        kept = [t for p in moved for t in self._weights_of(p)]
        copies = [t.detach().clone() for t in kept]
        self._set_mode("evaluating", False)
        self.is_swapped = True
        try:
            yield
        finally:
            self.is_swapped = False
            with torch.no_grad():
                for t, old in zip(kept, copies, strict=True):
                    t.copy_(old)
            for group, on in zip(self.param_groups, modes, strict=False):
                group["train_mode"] = on

    def _weights_of(self, p: Tensor) -> list[Tensor]:
        state = self.state.get(p, {})
        return [p, *(state[name] for name in ("master", "compensation") if name in state)] if "z" in state else []

    @tracing.opaque
    @torch.no_grad()
    def _set_mode(self, name: str, training: bool) -> None:
        if self.is_swapped:
            raise RuntimeError(
                f"{type(self).__name__}.{name}: other weights are in the model; leave swap_ema() or evaluating() first"
            )
        for group in self.param_groups:
            if bool(group["train_mode"]) == training:
                continue
            beta = float(self._beta(group))
            for p in group["params"]:
                state = self.state.get(p, {})
                if state.get("z") is not None:
                    extra = states.extra(group, p)
                    kept = extra if extra in state else None
                    reference.interpolate(p, state, state["z"], 1.0 - beta if training else 1.0 - 1.0 / beta, kept)
            group["train_mode"] = training

    @staticmethod
    def _beta(group: Group) -> Any:
        """How far y lies from z towards x."""
        return group["betas"][0]

    def refuse_swapped(self) -> None:
        if self.is_swapped:
            raise RuntimeError(
                f"{type(self).__name__}.step: other weights are in the model; leave swap_ema() or evaluating() first"
            )
        for i, group in enumerate(self.param_groups):
            if not group["train_mode"]:
                raise RuntimeError(
                    f"{type(self).__name__}.step: group {i} is in evaluation, with the averaged weights in the model; "
                    "call the optimizer's train() before training, beside the model's, and eval() before evaluating"
                )

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`FusedOptimizer.state_dict`, with what the authors' classes keep in groups: ``k`` and others.

        It may be saved in either mode, with the model's weights of that mode: both are there again after loading.
        """
        saved = super().state_dict()
        for group in saved["param_groups"]:
            entries = [saved["state"].get(key, {}) for key in group["params"]]
            last: Mapping[str, Any] = max(entries, key=_steps_of, default={})
            numbers = {name: last[name].item() for name in RUNNING} if _steps_of(last) else RUNNING
            group.update({**_COUNTED, "k": _steps_of(last), **numbers})
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`FusedOptimizer.load_state_dict`; also a checkpoint of the authors' class."""
        super().load_state_dict(_with_numbers(state_dict))
        for group in self.param_groups:
            for name in _COUNTED:
                group.pop(name, None)


def _steps_of(entry: Any) -> int:
    step = entry.get("step") if isinstance(entry, Mapping) else None
    if isinstance(step, Tensor):
        return int(step.item()) if step.numel() == 1 and tracing.has_number(step) else 0
    return step if isinstance(step, int) else 0


def _with_numbers(saved: Any) -> Any:
    """A checkpoint with what its groups count in each parameter's state, where they have counted on."""
    if not isinstance(saved, Mapping) or not isinstance(saved.get("state"), Mapping):
        return saved  # which is refused in its own words
    state, groups = dict(saved["state"]), saved.get("param_groups")
    for group in groups if isinstance(groups, (list, tuple)) else ():
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            continue
        if not all(isinstance(group.get(name), Real) for name in ("k", *RUNNING)):
            continue
        keys = [key for key in group["params"] if isinstance(key, Hashable)]
        entries = {key: state[key] for key in keys if "z" in _keys(state.get(key))}
        if group["k"] > max(map(_steps_of, entries.values()), default=0):
            numbers = {"step": group["k"], **{name: group[name] for name in RUNNING}}
            state.update({key: {**entry, **numbers} for key, entry in entries.items()})
    return {**saved, "state": state}


def _keys(entry: Any) -> Any:
    return entry.keys() if isinstance(entry, Mapping) else ()
