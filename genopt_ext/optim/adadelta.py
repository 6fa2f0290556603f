"""Adadelta."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .optimizer import FusedOptimizer
from .options import Range, StepOptions
from .rule import Rule

RULE = Rule(
    name="adadelta",
    states={"square_avg": None, "acc_delta": None},
    ranges={
        "lr": Range("learning rate"),
        "rho": Range("rho value", at_most=1.0),
        "eps": Range("epsilon value"),
        "weight_decay": Range("weight_decay value"),
    },
    torch_class=torch.optim.Adadelta,
    squares=frozenset({"square_avg", "acc_delta"}),
)


class Adadelta(FusedOptimizer, torch.optim.Adadelta):
    """Adadelta (Zeiler, `arXiv 1212.5701 <https://arxiv.org/abs/1212.5701>`_), as :class:`torch.optim.Adadelta`.

    Args:
        params: parameters, named parameters or parameter groups: float32, float64, bfloat16, float16 or
            complex, of any shape and strides.
        lr: learning rate, a number or a 1-element tensor, read at every step; on a GPU without waiting for it.
        rho: decay rate of the averages of squares, in [0, 1].
        eps: added to both averages.
        weight_decay: L2 penalty.
        foreach, fused: accepted: every step is fused and covers all tensors at once.
        maximize: ascend instead of descending.
        capturable: a step can be captured into a CUDA graph with and without it; on CPU it is refused.
        differentiable: the step is recorded by autograd, as torch's own code takes it, without options of ours.
        backend: ``"auto"`` picks kernels by device; ``"cpu"`` and ``"cuda"`` insist on them; ``"reference"`` is
            plain torch.
        step_options: what every class has besides: :class:`StepOptions`.

    State per parameter, under torch's names: ``step`` (0-dim float32), ``square_avg`` and ``acc_delta``, in the
    parameter's shape and dtype.

    Raises:
        TypeError: an argument or a parameter of the wrong type.
        ValueError: an argument out of its range.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str = "auto",
        **step_options: Unpack[StepOptions],
    ) -> None:
        given = dict(
            lr=lr,
            rho=rho,
            eps=eps,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
        self._construct(params, backend, step_options, given, fused=fused)


class Adadelta8bit(Adadelta):
    """:class:`Adadelta` with its averages in 8 bits: ``state_dtype`` is ``torch.int8`` unless given."""

    default_state_dtype = torch.int8
