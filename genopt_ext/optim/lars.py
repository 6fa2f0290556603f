"""LARS."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .optimizer import FusedOptimizer
from .options import Range, StepOptions
from .rule import Rule

RULE = Rule(
    name="lars",
    states={"momentum_buffer": "momentum"},
    ranges={
        "lr": Range("learning rate"),
        "momentum": Range("momentum value"),
        "dampening": Range("dampening value", at_least=None),
        "weight_decay": Range("weight_decay value"),
        "trust_coeff": Range("trust_coeff value"),
        "eps": Range("epsilon value"),
    },
    counts_steps=False,
    begins_unset=frozenset({"momentum_buffer"}),
    made_when_set=frozenset({"momentum_buffer"}),
)


class LARS(FusedOptimizer):
    """LARS (You, Gitman and Ginsburg, `arXiv 1708.03888 <https://arxiv.org/abs/1708.03888>`_), which torch does not
    have: SGD with momentum and a learning rate for each tensor, in proportion to its norm over its gradient's.
    Arguments and checkpoints are those of timm's class.

    Args:
        params: parameters, named parameters or parameter groups: float32, float64, bfloat16, float16 or
            complex, of any shape and strides.
        lr: learning rate, a number or a 1-element tensor, read at every step; on a GPU without waiting for it.
        momentum: decay rate of the momentum buffer; 0 keeps no buffer.
        dampening: the gradient enters the buffer times ``1 - dampening``, except at the first step.
        weight_decay: L2 penalty.
        nesterov: look ahead along the buffer; needs momentum and no dampening.
        trust_coeff: a tensor's learning rate is ``lr`` times this times the weight's norm over the gradient's.
        eps: added to the denominator of that ratio.
        trust_clip: the ratio over ``lr``, and at most 1, takes the ratio's place.
        always_adapt: without ``weight_decay`` too, where a tensor's learning rate is ``lr`` otherwise.
        maximize: ascend instead of descending.
        foreach, fused: accepted: every step is fused and covers all tensors at once.
        capturable: a step can be captured into a CUDA graph with and without it; on CPU it is refused.
        backend: ``"auto"`` picks kernels by device; ``"cpu"`` and ``"cuda"`` insist on them; ``"reference"`` is
            plain torch.
        step_options: what every class has besides: :class:`StepOptions`.

    State per parameter: ``momentum_buffer``, in the parameter's shape and dtype.
    ``differentiable`` and sparse gradients, which torch's own code steps for other classes, are refused.

    Raises:
        TypeError: an argument or a parameter of the wrong type.
        ValueError: an argument out of its range.
    """

    rule = RULE
    own_options = ("nesterov", "trust_clip", "always_adapt")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        trust_coeff: float = 0.001,
        eps: float = 1e-8,
        trust_clip: bool = False,
        always_adapt: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
        backend: str = "auto",
        **step_options: Unpack[StepOptions],
    ) -> None:
        own = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            trust_coeff=trust_coeff,
            eps=eps,
            trust_clip=trust_clip,
            always_adapt=always_adapt,
            maximize=maximize,
            capturable=capturable,
        )
        self._construct_own(params, backend, step_options, own, foreach=foreach, fused=fused)


class LARS8bit(LARS):
    """:class:`LARS` with moments in 8 bits: ``state_dtype`` is ``torch.int8`` unless given."""

    default_state_dtype = torch.int8
