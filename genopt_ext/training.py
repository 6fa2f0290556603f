"""Training control: when to stop, and learning rates over a run that torch has no scheduler for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["EarlyStopping", "warmup_cosine", "warmup_stable_decay"]


class EarlyStopping:
    """Says when a metric has stopped getting better, and puts the weights of its best value back into the model.

    Call it with the metric after each evaluation::

        stopping = EarlyStopping(model, opt, patience=3)
        for epoch in range(epochs):
            train(model, opt)
            if stopping(evaluate(model)):
                break

    Where the optimizer keeps averaged weights, by ``ema_decay`` or as a class without a schedule, it is they that are
    kept and put back: evaluate them, as within ``opt.swap_ema()``, and leave the block before the call. Weights that
    are put back are the optimizer's averages and master weights too, and a class without a schedule is in evaluation
    then. Moments stay those of the last step: to train on, load a checkpoint instead.

    Args:
        model: whose parameters and buffers are kept. All of ``state_dict()`` that are tensors; copies lie on their
            devices, as shards where they are sharded.
        optimizer: the one that trains it; any of torch's kind. None if it keeps no averages and no master weights.
        patience: so many calls in a row without a better value stop. At least 1.
        min_delta: a value is better if it is so by more than this. At least 0, finite.
        mode: ``"min"`` for a metric that is to fall, as a loss; ``"max"`` for one that is to rise.
        restore_best: whether weights are kept, and put back when it says stop. Without, nothing is copied.

    Attributes:
        best: the best value, or None before the first that is a number. NaN is never better.
        waited: calls in a row without a better value.
        stopped: whether it has said stop. It says so at each further call, and does nothing else.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        patience: int = 10,
        min_delta: float = 0.0,
        mode: Literal["min", "max"] = "min",
        restore_best: bool = True,
    ) -> None:
        if not isinstance(patience, int) or patience < 1:
            raise ValueError(f"EarlyStopping: patience is {patience!r}; it has to be an int of 1 or more")
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"EarlyStopping: min_delta is {min_delta!r}; it has to be 0 or more, and finite")
        if mode not in ("min", "max"):
            raise ValueError(f"EarlyStopping: mode is {mode!r}; it has to be 'min' or 'max'")
        self.model, self.optimizer = model, optimizer
        self.patience, self.min_delta, self.mode, self.restore_best = patience, float(min_delta), mode, restore_best
        self.best: float | None = None
        self.waited, self.stopped = 0, False
        self._weights: dict[str, Tensor] | None = None

    def __call__(self, metric: float | Tensor) -> bool:
        """Takes the metric of the model as it is; returns whether to stop.

        Raises:
            RuntimeError: weights are to be kept, and it is called while averages are in the model, as within
                ``opt.swap_ema()``.
        """
        self._refuse_swapped()
        if self.stopped:
            return True
        value = float(metric)
        if self._is_better(value):
            self.best, self.waited = value, 0
            if self.restore_best:
                with self._averages():
                    self._weights = {name: t.clone() for name, t in self._tensors().items()}
        else:
            self.waited += 1
        self.stopped = self.waited >= self.patience
        if self.stopped and self._weights is not None:
            self.restore()
        return self.stopped

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the best weights into the model, where its tensors lie. Called when it says stop.

        Raises:
            RuntimeError: none were kept; averages are in the model; its tensors are no longer those of then.
        """
        self._refuse_swapped()
        if self._weights is None:
            raise RuntimeError("EarlyStopping.restore: no weights were kept: no metric was a number, or restore_best")
        tensors = self._tensors()
        if other := sorted(tensors.keys() ^ self._weights.keys()):
            raise RuntimeError(f"EarlyStopping.restore: the model's tensors have changed: {', '.join(other)}")
        for name, t in tensors.items():
            t.copy_(self._weights[name])
        if self.optimizer is None:
            return
        for p, state in self.optimizer.state.items():
            for name in ("master", "ema"):
                if name in state:
                    state[name].copy_(p)
            if "compensation" in state:
                state["compensation"].zero_()
        for group in self.optimizer.param_groups:
            if "train_mode" in group:  # of a class without a schedule: averages are in the model, as after eval()
                group["train_mode"] = False

    def state_dict(self) -> dict[str, Any]:
        """All that a later run needs to go on: the counts, and the best weights by their names in the model."""
        return dict(best=self.best, waited=self.waited, stopped=self.stopped, weights=self._weights)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave; weights are copied to the devices of the model's tensors.

        Raises:
            ValueError: weights have other names than the model's tensors.
        """
        weights, tensors = state_dict["weights"], self._tensors()
        if weights is not None:
            if other := sorted(tensors.keys() ^ weights.keys()):
                raise ValueError(f"EarlyStopping.load_state_dict: not the tensors of this model: {', '.join(other)}")
            weights = {name: t.to(tensors[name].device, copy=True) for name, t in weights.items()}
        self._weights = weights
        self.best, self.waited, self.stopped = (state_dict[name] for name in ("best", "waited", "stopped"))

    def _is_better(self, value: float) -> bool:
        if self.best is None:
            return not math.isnan(value)
        return value < self.best - self.min_delta if self.mode == "min" else value > self.best + self.min_delta

    def _tensors(self) -> dict[str, Tensor]:
        return {name: t.detach() for name, t in self.model.state_dict().items() if isinstance(t, Tensor)}

    def _refuse_swapped(self) -> None:
        if self.restore_best and getattr(self.optimizer, "is_swapped", False):
            raise RuntimeError("EarlyStopping: the averaged weights are in the model; leave swap_ema() first")

    def _averages(self) -> contextlib.AbstractContextManager[None]:
        """Within it averages are in the model, where the optimizer keeps some."""
        opt: Any = self.optimizer
        if hasattr(opt, "evaluating"):
            return opt.evaluating()
        if opt is not None and any(group.get("ema_decay") is not None for group in opt.param_groups):
            return opt.swap_ema()
        return contextlib.nullcontext()


# How the learning rate falls from 1 to 0 as ``done`` goes from 0 to 1.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "1-sqrt": lambda done: 1.0 - math.sqrt(done),
}


def warmup_stable_decay(
    optimizer: Optimizer,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int,
    *,
    min_ratio: float = 0.0,
    decay: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt",
) -> LambdaLR:
    """Learning rates that rise linearly, stay, and fall at the end (`arXiv 2404.06395
    <https://arxiv.org/abs/2404.06395>`_; ``"1-sqrt"`` by `arXiv 2405.18392 <https://arxiv.org/abs/2405.18392>`_).

    Step ``s``, counted from 0, of a warmup of ``w`` has ``(s + 1) / (w + 1)`` of each group's ``lr``: no step is
    without effect. Behind the end it is ``min_ratio * lr``.

    Args:
        optimizer: whose groups are scheduled.
        warmup_steps, stable_steps, decay_steps: how long each part is, in calls of the scheduler's ``step()``.
        min_ratio: the share of ``lr`` at the end, 0 to 1.
        decay: the form of the last part.

    Raises:
        ValueError: an argument is out of range.
    """
    for name, length in dict(warmup_steps=warmup_steps, stable_steps=stable_steps, decay_steps=decay_steps).items():
        if length < 0:
            raise ValueError(f"warmup_stable_decay: {name} is {length}; it has to be 0 or more")
    if not 0.0 <= min_ratio <= 1.0:
        raise ValueError(f"warmup_stable_decay: min_ratio is {min_ratio}; it has to be 0 to 1")
    if decay not in DECAYS:
        raise ValueError(f"warmup_stable_decay: decay is {decay!r}; it has to be one of {', '.join(DECAYS)}")
    return LambdaLR(optimizer, partial(_ratio, warmup_steps, stable_steps, decay_steps, min_ratio, decay))


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, steps: int, *, min_ratio: float = 0.0) -> LambdaLR:
    """Learning rates that rise linearly for ``warmup_steps`` of ``steps``, then fall as half a cosine to
    ``min_ratio * lr`` (`arXiv 1608.03983 <https://arxiv.org/abs/1608.03983>`_): :func:`warmup_stable_decay` without a
    stable part.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 <= warmup_steps <= steps:
        raise ValueError(f"warmup_cosine: warmup_steps is {warmup_steps}; it has to be 0 to {steps}, the steps")
    return warmup_stable_decay(optimizer, warmup_steps, 0, steps - warmup_steps, min_ratio=min_ratio, decay="cosine")


def _ratio(warmup: int, stable: int, falling: int, least: float, decay: str, step: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if step < warmup + stable:
        return 1.0
    done = (step - warmup - stable) / falling if step < warmup + stable + falling else 1.0
    return least + (1.0 - least) * DECAYS[decay](done)
