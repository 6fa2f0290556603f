"""SGD."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .optimizer import FusedOptimizer
from .options import Range, StepOptions
from .rule import Rule

RULE = Rule(
    name="sgd",
    states={"momentum_buffer": "momentum"},
    ranges={
        "lr": Range("learning rate"),
        "momentum": Range("momentum value"),
        "dampening": Range("dampening value", at_least=None),
        "weight_decay": Range("weight_decay value"),
    },
    torch_class=torch.optim.SGD,
    counts_steps=False,
    begins_unset=frozenset({"momentum_buffer"}),
    made_when_set=frozenset({"momentum_buffer"}),
    serves_sparse=True,
)


class SGD(FusedOptimizer, torch.optim.SGD):
    """Stochastic gradient descent with momentum (Sutskever et al., 2013), as :class:`torch.optim.SGD`.

    Args:
        params: parameters, named parameters or parameter groups: float32, float64, bfloat16, float16 or
            complex, of any shape and strides.
        lr: learning rate, a number or a 1-element tensor, read at every step; on a GPU without waiting for it.
        momentum: decay rate of the momentum buffer; 0 keeps no buffer.
        dampening: the gradient enters the buffer times ``1 - dampening``, except at the first step.
        weight_decay: L2 penalty.
        nesterov: look ahead along the buffer; needs momentum and no dampening.
        maximize: ascend instead of descending.
        foreach, fused: accepted: every step is fused and covers all tensors at once.
        capturable: torch has it not here; a step can be captured into a CUDA graph with and without it, and on
            CPU it is refused.
        differentiable: the step is recorded by autograd, as torch's own code takes it, without options of ours.
        backend: ``"auto"`` picks kernels by device; ``"cpu"`` and ``"cuda"`` insist on them; ``"reference"`` is
            plain torch.
        step_options: what every class has besides: :class:`StepOptions`.

    State per parameter, under torch's name: ``momentum_buffer``, in the parameter's shape and dtype.

    Sparse gradients, as of ``nn.Embedding(sparse=True)``, are stepped by torch's own code.

    Raises:
        TypeError: an argument or a parameter of the wrong type.
        ValueError: an argument out of its range.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        backend: str = "auto",
        **step_options: Unpack[StepOptions],
    ) -> None:
        given = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._construct(params, backend, step_options, given, capturable=capturable)


class SGD8bit(SGD):
    """:class:`SGD` with moments in 8 bits: ``state_dtype`` is ``torch.int8`` unless given."""

    default_state_dtype = torch.int8
