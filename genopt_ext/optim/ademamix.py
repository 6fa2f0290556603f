"""AdEMAMix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .optimizer import FusedOptimizer
from .options import Range, StepOptions, betas
from .rule import Rule

RULE = Rule(
    name="ademamix",
    states={"exp_avg_fast": "beta1", "exp_avg_slow": None, "exp_avg_sq": None},
    ranges={
        "lr": Range("learning rate"),
        "betas": betas(3),
        "alpha": Range("alpha value"),
        "beta3_warmup": Range("beta3_warmup value", is_optional=True),
        "alpha_warmup": Range("alpha_warmup value", is_optional=True),
        "eps": Range("epsilon value"),
        "weight_decay": Range("weight_decay value"),
    },
    squares=frozenset({"exp_avg_sq"}),
    items={"betas": ("beta1", "beta2", "beta3")},
)


class AdEMAMix(FusedOptimizer):
    """AdEMAMix (Pagliardini, Ablin and Grangier, `arXiv 2409.03137 <https://arxiv.org/abs/2409.03137>`_), which torch
    does not have: AdamW with a second, slower average of the gradient. Arguments and checkpoints are those of its
    authors' class.

    Args:
        params: parameters, named parameters or parameter groups: float32, float64, bfloat16, float16 or
            complex, of any shape and strides.
        lr: learning rate, a number or a 1-element tensor, read at every step; on a GPU without waiting for it.
        betas: decay rates of the fast average of the gradient, of that of its square, and of the slow one of the
            gradient, all in [0, 1). With a first one of 0 the gradient itself is the fast average, and has no state.
        alpha: weight of the slow average.
        beta3_warmup: steps in which the slow average's decay rate grows from the fast one's; None: none.
        alpha_warmup: steps in which ``alpha`` grows from 0; None: none.
        eps: added to the denominator.
        weight_decay: decoupled decay, times ``lr``.
        maximize: ascend instead of descending.
        foreach, fused: accepted: every step is fused and covers all tensors at once.
        capturable: a step can be captured into a CUDA graph with and without it; on CPU it is refused.
        backend: ``"auto"`` picks kernels by device; ``"cpu"`` and ``"cuda"`` insist on them; ``"reference"`` is
            plain torch.
        step_options: what every class has besides: :class:`StepOptions`.

    State per parameter: ``step`` (0-dim float32), ``exp_avg_fast``, ``exp_avg_slow`` and ``exp_avg_sq``, in the
    parameter's shape and dtype. ``differentiable`` and sparse gradients, which torch's own code steps for other
    classes, are refused.

    Raises:
        TypeError: an argument or a parameter of the wrong type.
        ValueError: an argument out of its range.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: int | None = None,
        alpha_warmup: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0,
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
            alpha=alpha,
            beta3_warmup=beta3_warmup,
            alpha_warmup=alpha_warmup,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            capturable=capturable,
        )
        self._construct_own(params, backend, step_options, own, foreach=foreach, fused=fused)


class AdEMAMix8bit(AdEMAMix):
    """:class:`AdEMAMix` with moments in 8 bits: ``state_dtype`` is ``torch.int8`` unless given."""

    default_state_dtype = torch.int8
