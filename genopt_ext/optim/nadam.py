"""NAdam."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .optimizer import FusedOptimizer
from .options import Range, StepOptions, betas
from .rule import Rule

RULE = Rule(
    name="nadam",
    states={"exp_avg": None, "exp_avg_sq": None},
    running={"mu_product": 1.0},
    ranges={
        "lr": Range("learning rate"),
        "betas": betas(),
        "eps": Range("epsilon value"),
        "weight_decay": Range("weight_decay value"),
        "momentum_decay": Range("momentum_decay value"),
    },
    torch_class=torch.optim.NAdam,
    squares=frozenset({"exp_avg_sq"}),
)


class NAdam(FusedOptimizer, torch.optim.NAdam):
    """NAdam (Dozat, `2016 <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_), as :class:`torch.optim.NAdam`:
    Adam with Nesterov momentum.

    Args:
        params: parameters, named parameters or parameter groups: float32, float64, bfloat16, float16 or
            complex, of any shape and strides.
        lr: learning rate, a number or a 1-element tensor, read at every step; on a GPU without waiting for it.
        betas: decay rates of the averages of the gradient and of its square, both in [0, 1).
        eps: added to the denominator.
        weight_decay: L2 penalty, or decoupled decay, times ``lr``.
        momentum_decay: how fast the momentum rises from half of ``betas[0]`` to all of it.
        decoupled_weight_decay: decay as :class:`AdamW` does.
        foreach, fused: accepted: every step is fused and covers all tensors at once.
        maximize: ascend instead of descending.
        capturable: a step can be captured into a CUDA graph with and without it; on CPU it is refused.
        differentiable: the step is recorded by autograd, as torch's own code takes it, without options of ours.
        backend: ``"auto"`` picks kernels by device; ``"cpu"`` and ``"cuda"`` insist on them; ``"reference"`` is
            plain torch.
        step_options: what every class has besides: :class:`StepOptions`.

    State per parameter, under torch's names: ``step`` and ``mu_product``, the product of all momenta so far (0-dim
    float32), ``exp_avg`` and ``exp_avg_sq``, in the parameter's shape and dtype.

    Raises:
        TypeError: an argument or a parameter of the wrong type.
        ValueError: an argument out of its range.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str = "auto",
        **step_options: Unpack[StepOptions],
    ) -> None:
        given = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            momentum_decay=momentum_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
        self._construct(params, backend, step_options, given, fused=fused)


class NAdam8bit(NAdam):
    """:class:`NAdam` with moments in 8 bits: ``state_dtype`` is ``torch.int8`` unless given."""

    default_state_dtype = torch.int8
