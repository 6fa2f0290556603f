"""Adan."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .counted import CountsInGroups
from .optimizer import FusedOptimizer
from .options import Range, StepOptions, betas
from .rule import Rule

RULE = Rule(
    name="adan",
    states={"exp_avg": None, "exp_avg_sq": None, "exp_avg_diff": None, "neg_pre_grad": None},
    ranges={
        "lr": Range("learning rate"),
        "betas": betas(3),
        "eps": Range("epsilon value"),
        "weight_decay": Range("weight_decay value"),
    },
    squares=frozenset({"exp_avg_sq"}),
    begins_unset=frozenset({"neg_pre_grad"}),
    items={"betas": ("beta1", "beta2", "beta3")},
)


class Adan(CountsInGroups, FusedOptimizer):
    """Adan (Xie et al., `arXiv 2208.06677 <https://arxiv.org/abs/2208.06677>`_), which torch does not have: Adam with
    Nesterov momentum by the differences of gradients. Arguments and checkpoints are those of its authors' class, but
    that ``max_grad_norm`` is this package's, None for none.

    Args:
        params: parameters, named parameters or parameter groups: float32, float64, bfloat16, float16 or
            complex, of any shape and strides.
        lr: learning rate, a number or a 1-element tensor, read at every step; on a GPU without waiting for it.
        betas: decay rates of the averages of the gradient, of its differences, and of squares, all in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled decay, times ``lr``.
        no_prox: decay as :class:`AdamW` does, and not as a proximal step, which divides by 1 + ``lr`` ``weight_decay``.
        maximize: ascend instead of descending.
        foreach, fused: accepted: every step is fused and covers all tensors at once.
        capturable: a step can be captured into a CUDA graph with and without it; on CPU it is refused.
        backend: ``"auto"`` picks kernels by device; ``"cpu"`` and ``"cuda"`` insist on them; ``"reference"`` is
            plain torch.
        step_options: what every class has besides: :class:`StepOptions`.

    State per parameter: ``step`` (0-dim float32), ``exp_avg``, ``exp_avg_sq``, ``exp_avg_diff`` and ``neg_pre_grad``,
    the last gradient negated, in the parameter's shape and dtype. ``state_dict()`` has ``step`` in the groups too, as
    its authors' class. ``differentiable`` and sparse gradients, which torch's own code steps for other classes, are
    refused.

    Raises:
        TypeError: an argument or a parameter of the wrong type.
        ValueError: an argument out of its range.
    """

    rule = RULE
    own_options = ("no_prox",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        no_prox: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
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
            no_prox=no_prox,
            maximize=maximize,
            capturable=capturable,
        )
        self._construct_own(params, backend, step_options, own, foreach=foreach, fused=fused)


class Adan8bit(Adan):
    """:class:`Adan` with its state in 8 bits: ``state_dtype`` is ``torch.int8`` unless given."""

    default_state_dtype = torch.int8
