"""ADOPT."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .optimizer import FusedOptimizer
from .options import Range, StepOptions, betas
from .rule import Rule

RULE = Rule(
    name="adopt",
    states={"exp_avg": None, "exp_avg_sq": None},
    ranges={
        "lr": Range("learning rate"),
        "betas": betas(),
        "eps": Range("epsilon value"),
        "weight_decay": Range("weight_decay value"),
        "clip_exponent": Range("clip_exponent value", is_optional=True),
    },
    squares=frozenset({"exp_avg_sq"}),
)


class ADOPT(FusedOptimizer):
    """ADOPT (Taniguchi et al., `arXiv 2411.02853 <https://arxiv.org/abs/2411.02853>`_), which torch does not have: Adam
    that converges with any ``betas[1]``, as it divides by the average of squares before it takes the gradient into it.
    Arguments and checkpoints are those of its authors' class, but that ``clip_exponent`` stands for ``clip_lambda``.

    Args:
        params: parameters, named parameters or parameter groups: float32, float64, bfloat16, float16 or
            complex, of any shape and strides.
        lr: learning rate, a number or a 1-element tensor, read at every step; on a GPU without waiting for it.
        betas: decay rates of the averages of the normalized gradient and of the gradient's square, both in [0, 1).
        eps: the least that is divided by.
        weight_decay: L2 penalty, or decoupled decay, times ``lr``.
        decouple: decay as :class:`AdamW` does.
        clip_exponent: elements of the normalized gradient are limited to the count of the steps before to this power;
            None: they are not.
        maximize: ascend instead of descending.
        foreach, fused: accepted: every step is fused and covers all tensors at once.
        capturable: a step can be captured into a CUDA graph with and without it; on CPU it is refused.
        backend: ``"auto"`` picks kernels by device; ``"cpu"`` and ``"cuda"`` insist on them; ``"reference"`` is
            plain torch.
        step_options: what every class has besides: :class:`StepOptions`.

    State per parameter: ``step`` (0-dim float32), ``exp_avg`` and ``exp_avg_sq``, in the parameter's shape and dtype.
    A parameter's first step only sets ``exp_avg_sq``. ``differentiable`` and sparse gradients, which torch's own code
    steps for other classes, are refused.

    Raises:
        TypeError: an argument or a parameter of the wrong type.
        ValueError: an argument out of its range.
    """

    rule = RULE
    own_options = ("clip_exponent", "decouple")  # the first is not in its authors' checkpoints

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        decouple: bool = False,
        *,
        clip_exponent: float | None = 0.25,
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
            decouple=decouple,
            clip_exponent=clip_exponent,
            maximize=maximize,
            capturable=capturable,
        )
        self._construct_own(params, backend, step_options, own, foreach=foreach, fused=fused)


class ADOPT8bit(ADOPT):
    """:class:`ADOPT` with moments in 8 bits: ``state_dtype`` is ``torch.int8`` unless given."""

    default_state_dtype = torch.int8
