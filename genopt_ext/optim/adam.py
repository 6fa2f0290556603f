"""Adam and AdamW."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .optimizer import FusedOptimizer
from .options import Range, StepOptions, betas
from .rule import Rule

RULE = Rule(
    name="adam",
    states={"exp_avg": None, "exp_avg_sq": None, "max_exp_avg_sq": "amsgrad"},
    ranges={
        "lr": Range("learning rate"),
        "betas": betas(),
        "eps": Range("epsilon value"),
        "weight_decay": Range("weight_decay value"),
    },
    torch_class=torch.optim.Adam,
    squares=frozenset({"exp_avg_sq", "max_exp_avg_sq"}),
    sparse_class="torch.optim.SparseAdam",
)


class Adam(FusedOptimizer, torch.optim.Adam):
    """Adam (Kingma and Ba, `arXiv 1412.6980 <https://arxiv.org/abs/1412.6980>`_), as :class:`torch.optim.Adam`.

    Args:
        params: parameters, named parameters or parameter groups: float32, float64, bfloat16, float16 or
            complex, of any shape and strides.
        lr: learning rate, a number or a 1-element tensor, read at every step; on a GPU without waiting for it.
        betas: decay rates of the averages of the gradient and of its square, both in [0, 1).
        eps: added to the denominator.
        weight_decay: L2 penalty (in :class:`AdamW`: decoupled decay, times ``lr``).
        amsgrad: divide by the largest average so far.
        maximize: ascend instead of descending.
        decoupled_weight_decay: decay as :class:`AdamW` does.
        foreach, fused: accepted: every step is fused and covers all tensors at once.
        capturable: a step can be captured into a CUDA graph with and without it; on CPU it is refused.
        differentiable: the step is recorded by autograd, as torch's own code takes it, without options of ours.
        cautious: ``"weight_decay"``: decoupled decay spares what the update moves away from 0 (Chen et al., `arXiv
            2510.12402 <https://arxiv.org/abs/2510.12402>`_); ``"update"``: the update is 0 where its sign is not the
            gradient's and by 1 / max(0.001, the part of a tensor that is left) larger elsewhere (Liang et al., `arXiv
            2411.16085 <https://arxiv.org/abs/2411.16085>`_). Both with decoupled decay only.
        backend: ``"auto"`` picks kernels by device; ``"cpu"`` and ``"cuda"`` insist on them; ``"reference"`` is
            plain torch.
        step_options: what every class has besides: :class:`StepOptions`.

    State per parameter, under torch's names: ``step`` (0-dim float32), ``exp_avg``, ``exp_avg_sq`` and,
    with ``amsgrad``, ``max_exp_avg_sq``, in the parameter's shape and dtype.

    Raises:
        TypeError: an argument or a parameter of the wrong type.
        ValueError: an argument out of its range.
    """

    rule = RULE
    own_options = ("cautious",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        cautious: str | None = None,
        backend: str = "auto",
        **step_options: Unpack[StepOptions],
    ) -> None:
        given = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._construct(params, backend, step_options, given, cautious=cautious)


class AdamW(Adam, torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter, `arXiv 1711.05101 <https://arxiv.org/abs/1711.05101>`_), as
    :class:`torch.optim.AdamW`: :class:`Adam` with decoupled weight decay, 0.01 by default.

    Decay and update leave the parameter in one subtraction, which rounds it once a step.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        cautious: str | None = None,
        backend: str = "auto",
        **step_options: Unpack[StepOptions],
    ) -> None:
        given = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._construct(params, backend, step_options, given, cautious=cautious)


class Adam8bit(Adam):
    """:class:`Adam` with moments in 8 bits: ``state_dtype`` is ``torch.int8`` unless given."""

    default_state_dtype = torch.int8


class AdamW8bit(AdamW):
    """:class:`AdamW` with moments in 8 bits: ``state_dtype`` is ``torch.int8`` unless given."""

    default_state_dtype = torch.int8
