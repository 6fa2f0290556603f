"""SGD without a learning rate schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .options import Range, StepOptions
from .rule import Group, Rule
from .schedule_free import RANGES, RUNNING, WEIGHTS, ScheduleFree, open_interval

RULE = Rule(
    name="sgd_schedule_free",
    states={"z": None},
    running=RUNNING,
    running_dtype=torch.float64,
    weights=WEIGHTS,
    ranges={
        **RANGES,
        "momentum": open_interval("momentum value"),
        "warmup_steps": Range("warmup_steps value"),
    },
)


class SGDScheduleFree(ScheduleFree):
    """SGD without a schedule (Defazio et al., `arXiv 2405.15682 <https://arxiv.org/abs/2405.15682>`_), which torch does
    not have. Arguments and checkpoints are those of its authors' ``schedulefree.SGDScheduleFree``.

    :meth:`train` has to be called before the first step, and :meth:`eval` before the model is evaluated or saved.

    Args:
        params: parameters, named parameters or parameter groups: float32, float64, bfloat16, float16 or
            complex, of any shape and strides.
        lr: learning rate, a number or a 1-element tensor, read at every step; on a GPU without waiting for it.
        momentum: how far the weights of training lie from ``z`` towards the average, in (0, 1).
        weight_decay: L2 penalty, of the weights of training.
        warmup_steps: over so many steps the learning rate grows linearly.
        r: the power of the step in its weight in the average.
        weight_lr_power: the power of the largest learning rate so far in it.
        foreach, fused: accepted: every step is fused and covers all tensors at once.
        maximize: ascend instead of descending.
        capturable: a step can be captured into a CUDA graph with and without it; on CPU it is refused.
        backend: ``"auto"`` picks kernels by device; ``"cpu"`` and ``"cuda"`` insist on them; ``"reference"`` is
            plain torch.
        step_options: what every class has besides: :class:`StepOptions`.

    State per parameter: ``step`` (0-dim float32), ``weight_sum`` and ``lr_max``, of the average (0-dim float64), and
    ``z`` in the parameter's shape. ``z`` is weights: it is kept as
    precisely as masters, in float32 for 16-bit parameters, and no ``state_dtype`` is of it. ``state_dict()`` has the
    numbers in the groups too, as its authors' class. ``differentiable`` and sparse gradients, which torch's own code
    steps for other classes, are refused.

    Raises:
        TypeError: an argument or a parameter of the wrong type.
        ValueError: an argument out of its range.
    """

    rule = RULE

    @staticmethod
    def _beta(group: Group) -> Any:
        return group["momentum"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        backend: str = "auto",
        **step_options: Unpack[StepOptions],
    ) -> None:
        own = dict(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            r=r,
            weight_lr_power=weight_lr_power,
            maximize=maximize,
            capturable=capturable,
        )
        self._construct_free(params, backend, step_options, own, foreach=foreach, fused=fused)
