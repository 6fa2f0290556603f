"""Rprop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .optimizer import FusedOptimizer
from .options import Range, StepOptions
from .rule import Rule

_SHRINKS = Range("eta values", at_least=None, above=0.0, below=1.0)
_GROWS = Range("eta values", at_least=None, above=1.0)
RULE = Rule(
    name="rprop",
    states={"prev": None, "step_size": None},
    ranges={
        "lr": Range("learning rate"),
        "etas": Range("eta values", each=(_SHRINKS, _GROWS)),
        "step_sizes": Range("step sizes", each=(Range("step sizes"), Range("step sizes"))),
    },
    torch_class=torch.optim.Rprop,
    squares=frozenset({"step_size"}),
    initial={"step_size": "lr"},
    items={"etas": ("etaminus", "etaplus"), "step_sizes": ("step_size_min", "step_size_max")},
)


class Rprop(FusedOptimizer, torch.optim.Rprop):
    """Rprop (Riedmiller and Braun, 1993), as :class:`torch.optim.Rprop`: for whole batches, as only the gradient's sign
    counts.

    Args:
        params: parameters, named parameters or parameter groups: float32, float64, bfloat16, float16 or
            complex, of any shape and strides.
        lr: how far every element moves in the first step.
        etas: what that is multiplied by where the gradient's sign has changed, in (0, 1), and where it is
            the same, above 1.
        step_sizes: the least and the largest that it becomes.
        foreach, fused: accepted: every step is fused and covers all tensors at once.
        maximize: ascend instead of descending.
        capturable: a step can be captured into a CUDA graph with and without it; on CPU it is refused.
        differentiable: the step is recorded by autograd, as torch's own code takes it, without options of ours.
        backend: ``"auto"`` picks kernels by device; ``"cpu"`` and ``"cuda"`` insist on them; ``"reference"`` is
            plain torch.
        step_options: what every class has besides: :class:`StepOptions`.

    State per parameter, under torch's names: ``step`` (0-dim float32), ``prev`` and ``step_size``, in the parameter's
    shape and dtype.

    Raises:
        TypeError: an argument or a parameter of the wrong type.
        ValueError: an argument out of its range.
    """

    rule = RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str = "auto",
        **step_options: Unpack[StepOptions],
    ) -> None:
        given = dict(
            lr=lr,
            etas=etas,
            step_sizes=step_sizes,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
        self._construct(params, backend, step_options, given, fused=fused)


class Rprop8bit(Rprop):
    """:class:`Rprop` with its state in 8 bits: ``state_dtype`` is ``torch.int8`` unless given."""

    default_state_dtype = torch.int8
