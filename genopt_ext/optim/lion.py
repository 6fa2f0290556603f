"""Lion."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .optimizer import FusedOptimizer
from .options import Range, StepOptions, betas
from .rule import Rule

RULE = Rule(
    name="lion",
    states={"exp_avg": None},
    ranges={
        "lr": Range("learning rate"),
        "betas": betas(),
        "weight_decay": Range("weight_decay value"),
    },
    counts_steps=False,
)


class Lion(FusedOptimizer):
    """Lion (Chen et al., `arXiv 2302.06675 <https://arxiv.org/abs/2302.06675>`_), which torch does not have.

    Every element moves by ``lr``, against the sign of an average; its authors recommend an ``lr`` 3 to 10 times smaller
    than AdamW's, and a ``weight_decay`` as many times larger. A complex number is two real ones, as to every class, and
    each moves by a sign of its own. NaN has no sign: it goes into the parameter.

    Args:
        params: parameters, named parameters or parameter groups: float32, float64, bfloat16, float16 or
            complex, of any shape and strides.
        lr: learning rate, a number or a 1-element tensor, read at every step; on a GPU without waiting for it.
        betas: decay rates of the average whose sign is taken, and of the one that is kept; both in [0, 1).
        weight_decay: decoupled decay, times ``lr``.
        maximize: ascend instead of descending.
        foreach, fused: accepted: every step is fused and covers all tensors at once.
        capturable: a step can be captured into a CUDA graph with and without it; on CPU it is refused.
        cautious: ``"weight_decay"``: decay spares what the update moves away from 0; ``"update"``: the update spares
            what it would move against the gradient; see :class:`AdamW`.
        backend: ``"auto"`` picks kernels by device; ``"cpu"`` and ``"cuda"`` insist on them; ``"reference"`` is
            plain torch.
        step_options: what every class has besides: :class:`StepOptions`.

    State per parameter: ``exp_avg``, in the parameter's shape and dtype. ``differentiable`` and sparse gradients, which
    torch's own code steps for other classes, are refused.

    Raises:
        TypeError: an argument or a parameter of the wrong type.
        ValueError: an argument out of its range.
    """

    rule = RULE
    own_options = ("cautious",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
        cautious: str | None = None,
        backend: str = "auto",
        **step_options: Unpack[StepOptions],
    ) -> None:
        own = dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize, capturable=capturable)
        self._construct_own(params, backend, step_options, own, foreach=foreach, fused=fused, cautious=cautious)


class Lion8bit(Lion):
    """:class:`Lion` with momentum in 8 bits: ``state_dtype`` is ``torch.int8`` unless given."""

    default_state_dtype = torch.int8
