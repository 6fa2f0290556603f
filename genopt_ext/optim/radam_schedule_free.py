"""RAdam without a learning rate schedule."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .options import Range, StepOptions
from .rule import Rule
from .schedule_free import RANGES, RUNNING, WEIGHTS, ScheduleFree, open_interval

RULE = Rule(
    name="radam_schedule_free",
    states={"z": None, "exp_avg_sq": None},
    running=RUNNING,
    running_dtype=torch.float64,
    weights=WEIGHTS,
    ranges={
        **RANGES,
        "betas": Range(
            "betas", each=(open_interval("beta parameter at index 0"), Range("beta parameter at index 1", below=1.0))
        ),
        "eps": Range("epsilon value"),
    },
    squares=frozenset({"exp_avg_sq"}),
)


class RAdamScheduleFree(ScheduleFree):
    """RAdam without a schedule (Defazio et al., `arXiv 2405.15682 <https://arxiv.org/abs/2405.15682>`_), which torch
    does not have, and without a warmup. Arguments and checkpoints are those of its authors'
    ``schedulefree.RAdamScheduleFree``.

    :meth:`train` has to be called before the first step, and :meth:`eval` before the model is evaluated or saved.

    Args:
        params: parameters, named parameters or parameter groups: float32, float64, bfloat16, float16 or
            complex, of any shape and strides.
        lr: learning rate, a number or a 1-element tensor, read at every step; on a GPU without waiting for it.
        betas: how far the weights of training lie from ``z`` towards the average, in (0, 1), and the decay rate of the
            average of squares, in [0, 1).
        eps: added to the denominator.
        weight_decay: decay times the learning rate, of the weights of training.
        r: the power of the step in its weight in the average.
        weight_lr_power: the power of the largest learning rate so far in it.
        silent_sgd_phase: the first steps, of which the variance of gradients is not known, move no weights; else they
            are steps of SGD.
        foreach, fused: accepted: every step is fused and covers all tensors at once.
        maximize: ascend instead of descending.
        capturable: a step can be captured into a CUDA graph with and without it; on CPU it is refused.
        backend: ``"auto"`` picks kernels by device; ``"cpu"`` and ``"cuda"`` insist on them; ``"reference"`` is
            plain torch.
        step_options: what every class has besides: :class:`StepOptions`.

    State per parameter: ``step`` (0-dim float32), ``weight_sum`` and ``lr_max``, of the average (0-dim float64), and
    ``z`` and ``exp_avg_sq`` in the parameter's shape. ``z`` is weights: it is kept as
    precisely as masters, in float32 for 16-bit parameters, and no ``state_dtype`` is of it. ``state_dict()`` has the
    numbers in the groups too, as its authors' class. ``differentiable`` and sparse gradients, which torch's own code
    steps for other classes, are refused.

    Raises:
        TypeError: an argument or a parameter of the wrong type.
        ValueError: an argument out of its range.
    """

    rule = RULE
    own_options = ("train_mode", "silent_sgd_phase")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        silent_sgd_phase: bool = True,
        *,
        maximize: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        backend: str = "auto",
        **step_options: Unpack[StepOptions],
    ) -> None:
        own = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            r=r,
            weight_lr_power=weight_lr_power,
            silent_sgd_phase=silent_sgd_phase,
            maximize=maximize,
            capturable=capturable,
        )
        self._construct_free(params, backend, step_options, own, foreach=foreach, fused=fused)


class RAdamScheduleFree8bit(RAdamScheduleFree):
    """:class:`RAdamScheduleFree` with ``exp_avg_sq`` in 8 bits: ``state_dtype`` is ``torch.int8`` unless given."""

    default_state_dtype = torch.int8
