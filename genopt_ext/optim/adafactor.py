"""Adafactor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .optimizer import FusedOptimizer
from .options import Range, StepOptions
from .rule import Rule

RULE = Rule(
    name="adafactor",
    states={"variance": None, "row_var": None, "col_var": None},
    factors=("row_var", "col_var"),
    ranges={
        "lr": Range("learning rate"),
        "beta2_decay": Range("beta2_decay value", at_least=None, at_most=0.0),
        "eps": Range("eps", each=(Range("epsilon1 value", is_optional=True), Range("epsilon2 value"))),
        "d": Range("clipping threshold d", at_least=1.0),
        "weight_decay": Range("weight_decay value"),
    },
    squares=frozenset({"variance", "row_var", "col_var"}),
    precise=frozenset({"variance", "row_var", "col_var"}),
    items={"eps": ("eps1", "eps2")},
    dtype_eps="eps1",
    is_real=True,
)


class Adafactor(FusedOptimizer, torch.optim.Adafactor):
    """Adafactor (Shazeer and Stern, `arXiv 1804.04235 <https://arxiv.org/abs/1804.04235>`_), as
    :class:`torch.optim.Adafactor`: of a matrix it keeps an average of squared gradients for each row and each column,
    instead of for each element.

    Args:
        params: parameters, named parameters or parameter groups: float32, float64, bfloat16 or float16, of any shape
            and strides. Those of two dimensions and more are stacks of matrices, in their last two.
        lr: the most that the relative step size is, which falls as ``1 / sqrt(step)``, and what decay is times: a
            number or a 1-element tensor, read at every step; on a GPU without waiting for it.
        beta2_decay: the averages are of weight ``step**beta2_decay`` for the newest squares; at most 0.
        eps: the least that a gradient is divided by, and the least that the root mean square of a parameter counts as.
            None: the machine epsilon of the parameter's dtype, which is large for bfloat16 (0.0078); of the master's
            with ``master_weights``.
        d: how large the root mean square of an update may be, before ``lr``; at least 1.
        weight_decay: decoupled decay, times ``lr``.
        foreach, fused: accepted: every step is fused and covers all tensors at once.
        maximize: ascend instead of descending.
        capturable: torch has it not here; a step can be captured into a CUDA graph with and without it, and on CPU it
            is refused.
        backend: ``"auto"`` picks kernels by device; ``"cpu"`` and ``"cuda"`` insist on them; ``"reference"`` is
            plain torch.
        step_options: what every class has besides: :class:`StepOptions`, but for ``state_dtype``, which is refused
            unless it is ``torch.float32``: there is too little state for less to save anything.

    State per parameter, under torch's names: ``step`` (0-dim float32), and ``row_var`` and ``col_var``, of the
    parameter's shape with 1 for its last or its last but one size; ``variance``, of the parameter's shape, where that
    has fewer than two dimensions. They are float32 for parameters of 16 bits too, where torch's are of their dtype.
    Complex parameters and sparse gradients are refused, as torch does.

    Raises:
        TypeError: an argument or a parameter of the wrong type.
        ValueError: an argument out of its range.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        backend: str = "auto",
        **step_options: Unpack[StepOptions],
    ) -> None:
        given = dict(
            lr=lr,
            beta2_decay=beta2_decay,
            eps=eps,
            d=d,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
        )
        self._construct(params, backend, step_options, given, capturable=capturable, fused=fused)
