"""ASGD."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .optimizer import FusedOptimizer
from .options import Range, StepOptions
from .rule import Rule

RULE = Rule(
    name="asgd",
    states={"ax": None},
    running={"eta": "lr", "mu": 1.0},
    ranges={
        "lr": Range("learning rate"),
        "lambd": Range("lambd value"),
        "alpha": Range("alpha value", at_least=None),
        "t0": Range("t0 value", at_least=None, finite=False),
        "weight_decay": Range("weight_decay value"),
    },
    torch_class=torch.optim.ASGD,
)


class ASGD(FusedOptimizer, torch.optim.ASGD):
    """Averaged SGD (Polyak and Juditsky, `1992 <https://doi.org/10.1137/0330046>`_), as :class:`torch.optim.ASGD`.

    Args:
        params: parameters, named parameters or parameter groups: float32, float64, bfloat16, float16 or
            complex, of any shape and strides.
        lr: learning rate, a number or a 1-element tensor, read at every step; on a GPU without waiting for it.
        lambd: decay of the weights, times ``eta``, and of ``eta`` itself: lr / (1 + lambd lr t)^alpha.
        alpha: the power in it.
        t0: the step from which on weights are averaged.
        weight_decay: L2 penalty.
        foreach, fused: accepted: every step is fused and covers all tensors at once.
        maximize: ascend instead of descending.
        differentiable: the step is recorded by autograd, as torch's own code takes it, without options of ours.
        capturable: a step can be captured into a CUDA graph with and without it; on CPU it is refused.
        backend: ``"auto"`` picks kernels by device; ``"cpu"`` and ``"cuda"`` insist on them; ``"reference"`` is
            plain torch.
        step_options: what every class has besides: :class:`StepOptions`.

    State per parameter, under torch's names: ``step``, ``eta`` and ``mu``, the learning rate and the weight of the
    average at the next step (0-dim float32), and ``ax``, the averaged weights, in the parameter's shape and dtype.

    Raises:
        TypeError: an argument or a parameter of the wrong type.
        ValueError: an argument out of its range.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
        fused: bool | None = None,
        backend: str = "auto",
        **step_options: Unpack[StepOptions],
    ) -> None:
        given = dict(
            lr=lr,
            lambd=lambd,
            alpha=alpha,
            t0=t0,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )
        self._construct(params, backend, step_options, given, fused=fused)


class ASGD8bit(ASGD):
    """:class:`ASGD` with the averaged weights in 8 bits: ``state_dtype`` is ``torch.int8`` unless given."""

    default_state_dtype = torch.int8
