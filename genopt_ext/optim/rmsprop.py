"""RMSprop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .optimizer import FusedOptimizer
from .options import Range, StepOptions
from .rule import Rule

RULE = Rule(
    name="rmsprop",
    states={"square_avg": None, "momentum_buffer": "momentum", "grad_avg": "centered"},
    ranges={
        "lr": Range("learning rate"),
        "alpha": Range("alpha value"),
        "eps": Range("epsilon value"),
        "weight_decay": Range("weight_decay value"),
        "momentum": Range("momentum value"),
    },
    torch_class=torch.optim.RMSprop,
    squares=frozenset({"square_avg"}),
    begins_unset=frozenset({"momentum_buffer"}),
)


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    """RMSprop (Tieleman and Hinton, 2012), centered (Graves, `arXiv 1308.0850
    <https://arxiv.org/abs/1308.0850>`_) and with momentum, as :class:`torch.optim.RMSprop`.

    Args:
        params: parameters, named parameters or parameter groups: float32, float64, bfloat16, float16 or
            complex, of any shape and strides.
        lr: learning rate, a number or a 1-element tensor, read at every step; on a GPU without waiting for it.
        alpha: decay rate of the average of squared gradients.
        eps: added to the denominator.
        weight_decay: L2 penalty.
        momentum: decay rate of a momentum buffer; 0 keeps no buffer.
        centered: divide by the gradient's standard deviation instead of its root mean square. The
            variance is kept at or above one rounding of the mean square, where torch may give NaN.
        capturable: a step can be captured into a CUDA graph with and without it; on CPU it is refused.
        foreach: accepted: every step covers all tensors at once.
        maximize: ascend instead of descending.
        differentiable: the step is recorded by autograd, as torch's own code takes it, without options of ours.
        backend: ``"auto"`` picks kernels by device; ``"cpu"`` and ``"cuda"`` insist on them; ``"reference"`` is
            plain torch.
        step_options: what every class has besides: :class:`StepOptions`.

    State per parameter, under torch's names: ``step`` (0-dim float32), ``square_avg`` and, as options
    ask, ``momentum_buffer`` and ``grad_avg``, in the parameter's shape and dtype.

    Raises:
        TypeError: an argument or a parameter of the wrong type.
        ValueError: an argument out of its range.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        backend: str = "auto",
        **step_options: Unpack[StepOptions],
    ) -> None:
        given = dict(
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
        )
        self._construct(params, backend, step_options, given, fused=fused)


class RMSprop8bit(RMSprop):
    """:class:`RMSprop` with moments in 8 bits: ``state_dtype`` is ``torch.int8`` unless given."""

    default_state_dtype = torch.int8
