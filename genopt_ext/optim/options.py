"""The options of the optimizers: what each may be, and what every class takes beside torch's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypedDict

from torch import Tensor


@dataclass(frozen=True)
class Range:
    """The numbers that an option may be: finite, and ``at_least <= x < below``."""

    label: str
    at_least: float | None = 0.0
    below: float | None = None
    items: int = 0  # > 0: a tuple of so many
    finite: bool = True

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
        if not (inside and (math.isfinite(number) or not (self.finite or math.isnan(number)))):
            allowed = " and".join(filter(None, (low, high)))
            kind = "a finite number" if self.finite else "a number"
            raise ValueError(f"{where}: Invalid {label}: {value}; {name} must be {kind}{allowed}")


FLAGS = ("amsgrad", "capturable", "centered", "decoupled_weight_decay", "maximize", "nesterov", "skip_nonfinite")


class StepOptions(TypedDict, total=False):
    """What every class takes beside torch's arguments, as keywords. Each is left out unless it is given.

    All of it happens inside the step's own passes over memory; ``.grad`` stays as it is. A group's own value, also of
    ``max_grad_norm``, takes the place of the one given here.

    Attributes:
        max_grad_norm: scales all gradients such that the norm of all together is at most this, as
            :func:`torch.nn.utils.clip_grad_norm_` before the step. A group with a value of its own is clipped by its
            own norm, and left out of the others'. Infinity clips nothing, and tells ``opt.grad_norm``.
        clip_per_param: the same with each parameter's own norm.
        agc: adaptive gradient clipping (Brock et al., `arXiv 2102.06171 <https://arxiv.org/abs/2102.06171>`_) of each
            parameter: its gradient's norm is at most this times the weight's norm, which counts as at least 1e-3. At
            most one of these three.
        clip_grad_value: limits each element of the scaled gradient.
        ema_decay: keeps a moving average of the weights in ``state[p]["ema"]`` (float32 for 16-bit parameters), equal
            to :class:`torch.optim.swa_utils.AveragedModel` with this decay, updated after every step. In [0, 1). See
            :meth:`FusedOptimizer.swap_ema`.
        skip_nonfinite: a step whose gradients hold NaN or infinity changes nothing, and is counted in
            ``opt.skipped_steps``; nothing waits for the device.
    """

    max_grad_norm: float | None
    clip_per_param: float | None
    agc: float | None
    clip_grad_value: float | None
    ema_decay: float | None
    skip_nonfinite: bool


NORM_CLIPS = ("max_grad_norm", "clip_per_param", "agc")
GROUP_OPTIONS = {
    "max_grad_norm": Range("max_grad_norm value", finite=False),
    "clip_per_param": Range("clip_per_param value"),
    "agc": Range("agc value"),
    "clip_grad_value": Range("clip_grad_value value"),
    "ema_decay": Range("ema_decay value", below=1.0),
}


def clips_alone(group: dict[str, Any]) -> bool:
    """Whether a group is clipped by a norm of its own, or its tensors' own, and left out of the optimizer's."""
    return any(group.get(name) is not None for name in NORM_CLIPS)
