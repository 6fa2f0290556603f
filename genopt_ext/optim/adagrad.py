"""Adagrad."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from . import state as states
from .optimizer import FusedOptimizer
from .options import Range, StepOptions
from .rule import Rule

RULE = Rule(
    name="adagrad",
    states={"sum": None},
    ranges={
        "lr": Range("learning rate"),
        "lr_decay": Range("lr_decay value"),
        "weight_decay": Range("weight_decay value"),
        "initial_accumulator_value": Range("initial_accumulator_value value"),
        "eps": Range("epsilon value"),
    },
    torch_class=torch.optim.Adagrad,
    squares=frozenset({"sum"}),
    initial={"sum": "initial_accumulator_value"},
    serves_sparse=True,
)


class Adagrad(FusedOptimizer, torch.optim.Adagrad):
    """Adagrad (Duchi, Hazan and Singer, JMLR 12, 2011), as :class:`torch.optim.Adagrad`.

    Args:
        params: parameters, named parameters or parameter groups: float32, float64, bfloat16, float16 or
            complex, of any shape and strides.
        lr: learning rate, a number or a 1-element tensor, read at every step; on a GPU without waiting for it.
        lr_decay: step ``t`` uses ``lr / (1 + (t - 1) * lr_decay)``.
        weight_decay: L2 penalty.
        initial_accumulator_value: where the sum of squares starts.
        eps: added to the denominator.
        foreach, fused: accepted: every step is fused and covers all tensors at once.
        maximize: ascend instead of descending.
        capturable: torch has it not here; a step can be captured into a CUDA graph with and without it, and on
            CPU it is refused.
        differentiable: the step is recorded by autograd, as torch's own code takes it, without options of ours.
        backend: ``"auto"`` picks kernels by device; ``"cpu"`` and ``"cuda"`` insist on them; ``"reference"`` is
            plain torch.
        step_options: what every class has besides: :class:`StepOptions`.

    State per parameter, under torch's names and made by the constructor: ``step`` (0-dim float32) and
    ``sum``, in the parameter's shape and dtype.

    Sparse gradients, as of ``nn.Embedding(sparse=True)``, are stepped by torch's own code.

    Raises:
        TypeError: an argument or a parameter of the wrong type.
        ValueError: an argument out of its range.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        backend: str = "auto",
        **step_options: Unpack[StepOptions],
    ) -> None:
        given = dict(
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
        self._construct(params, backend, step_options, given, capturable=capturable)
        # torch has made them, in the parameter's dtype and in the default one.
        for group in self.param_groups:
            for p in group["params"]:
                device = p.device if p.is_cuda else "cpu"
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=device)
                if (dtype := states.state_dtype(group, p)) is not None:
                    del self.state[p]["sum"]
                    value = RULE.initial_value(self.defaults, p, "sum")
                    self.state[p].update(states.make(p, "sum", value, dtype, signed=False))


class Adagrad8bit(Adagrad):
    """:class:`Adagrad` with moments in 8 bits: ``state_dtype`` is ``torch.int8`` unless given."""

    default_state_dtype = torch.int8
