"""LAMB."""

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
    name="lamb",
    states={"exp_avg": None, "exp_avg_sq": None},
    ranges={
        "lr": Range("learning rate"),
        "betas": betas(),
        "eps": Range("epsilon value"),
        "weight_decay": Range("weight_decay value"),
    },
    squares=frozenset({"exp_avg_sq"}),
)


class LAMB(CountsInGroups, FusedOptimizer):
    """LAMB (You et al., `arXiv 1904.00962 <https://arxiv.org/abs/1904.00962>`_), which torch does not have: Adam with a
    learning rate for each tensor, in proportion to its norm over its update's. Arguments and checkpoints are those of
    timm's class, but for its ``max_grad_norm`` of 1, which is None here as everywhere.

    Args:
        params: parameters, named parameters or parameter groups: float32, float64, bfloat16, float16 or
            complex, of any shape and strides.
        lr: learning rate, a number or a 1-element tensor, read at every step; on a GPU without waiting for it.
        bias_correction: whether both averages are corrected for having begun at 0.
        betas: decay rates of the averages of the gradient and of its square, both in [0, 1).
        eps: added to the denominator.
        weight_decay: decay that is part of the update of which the norm is taken.
        grad_averaging: whether the gradient enters its average times ``1 - betas[0]``; else it is summed up.
        trust_clip: the ratio of the norms is at most 1.
        always_adapt: without ``weight_decay`` too, where a tensor's learning rate is ``lr`` otherwise.
        decoupled_decay: decay as :class:`AdamW` does.
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
    own_options = ("bias_correction", "grad_averaging", "trust_clip", "always_adapt", "decoupled_decay")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        grad_averaging: bool = True,
        *,
        trust_clip: bool = False,
        always_adapt: bool = False,
        decoupled_decay: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
        backend: str = "auto",
        **step_options: Unpack[StepOptions],
    ) -> None:
        own = dict(
            lr=lr,
            bias_correction=bias_correction,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            grad_averaging=grad_averaging,
            trust_clip=trust_clip,
            always_adapt=always_adapt,
            decoupled_decay=decoupled_decay,
            maximize=maximize,
            capturable=capturable,
        )
        self._construct_own(params, backend, step_options, own, foreach=foreach, fused=fused)


class LAMB8bit(LAMB):
    """:class:`LAMB` with moments in 8 bits: ``state_dtype`` is ``torch.int8`` unless given."""

    default_state_dtype = torch.int8
