"""StableAdamW."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .optimizer import FusedOptimizer
from .options import Range, StepOptions, betas
from .rule import Rule

RULE = Rule(
    name="stable_adamw",
    states={"exp_avg": None, "exp_avg_sq": None},
    ranges={
        "lr": Range("learning rate"),
        "betas": betas(),
        "eps": Range("epsilon value"),
        "weight_decay": Range("weight_decay value"),
    },
    squares=frozenset({"exp_avg_sq"}),
)


class StableAdamW(FusedOptimizer):
    """StableAdamW (Wortsman et al., `arXiv 2304.13013 <https://arxiv.org/abs/2304.13013>`_), which torch does not have:
    AdamW that steps a tensor less far where its gradient is larger than its average of squares knows, so that training
    survives spikes without clipping. Arguments are those of optimi's class.

    Args:
        params: parameters, named parameters or parameter groups: float32, float64, bfloat16, float16 or
            complex, of any shape and strides.
        lr: learning rate, a number or a 1-element tensor, read at every step; on a GPU without waiting for it.
        betas: decay rates of the averages of the gradient and of its square, both in [0, 1).
        eps: added to the denominator, and the least that the gradient is divided by to tell how far to step.
        weight_decay: decoupled decay, times the learning rate that the tensor has.
        maximize: ascend instead of descending.
        foreach, fused: accepted: every step is fused and covers all tensors at once.
        capturable: a step can be captured into a CUDA graph with and without it; on CPU it is refused.
        backend: ``"auto"`` picks kernels by device; ``"cpu"`` and ``"cuda"`` insist on them; ``"reference"`` is
            plain torch.
        step_options: what every class has besides: :class:`StepOptions`.

    State per parameter: ``step`` (0-dim float32), ``exp_avg`` and ``exp_avg_sq``, in the parameter's shape and dtype.
    ``differentiable`` and sparse gradients, which torch's own code steps for other classes, are refused.

    Raises:
        TypeError: an argument or a parameter of the wrong type.
        ValueError: an argument out of its range.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
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
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            capturable=capturable,
        )
        self._construct_own(params, backend, step_options, own, foreach=foreach, fused=fused)


class StableAdamW8bit(StableAdamW):
    """:class:`StableAdamW` with moments in 8 bits: ``state_dtype`` is ``torch.int8`` unless given."""

    default_state_dtype = torch.int8
