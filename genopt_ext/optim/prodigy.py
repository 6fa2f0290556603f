"""Prodigy."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .. import sharding, tracing
from . import state as states
from .optimizer import FusedOptimizer
from .options import Range, StepOptions, betas
from .rule import Group, Rule
from .step import Inputs, Place
from .stepper import Stepper

RULE = Rule(
    name="prodigy",
    states={"s": None, "p0": None, "exp_avg_sq": None, "exp_avg": "beta1"},
    shared=("d", "d_max", "d_numerator", "k"),
    weights=frozenset({"p0"}),
    ranges={
        "lr": Range("learning rate"),
        "betas": betas(),
        "beta3": Range("beta3 value", below=1.0, is_optional=True),
        "eps": Range("epsilon value", at_least=None, above=0.0),
        "weight_decay": Range("weight_decay value"),
        "d0": Range("d0 value", at_least=None, above=0.0),
        "d_coef": Range("d_coef value", at_least=None, above=0.0),
        "growth_rate": Range("growth_rate value", at_least=1.0, finite=False),
    },
    squares=frozenset({"exp_avg_sq"}),
)
# Options that the estimate is made with.
_COMMON = ("betas", "beta3", "use_bias_correction", "d0", "d_coef", "growth_rate")
_BESIDE = ("s", "p0")  # states that the authors' class has in one dimension


class ProdigyStepper(Stepper):
    """Steps all parameters by one estimate, whose numbers stand in every group: 0-dim views of one tensor."""

    def __init__(self, owner: str, backend: str) -> None:
        super().__init__(owner, RULE, backend)
        self.views: dict[str, Tensor] = {}

    def check_group(self, groups: list[Group], i: int) -> None:
        super().check_group(groups, i)
        where, group = f"{self.owner}: group {i}", groups[i]
        if (slices := group.get("slice_p", 1)) != 1:
            raise ValueError(f"{where}: slice_p={slices!r} is not served: every element counts; use slice_p=1")
        if group.get("fsdp_in_use"):
            raise ValueError(
                f"{where}: fsdp_in_use=True is of FSDP1's pieces, which are not served; leave it out and shard by "
                "torch.distributed.fsdp.fully_shard (FSDP2), whose parameters are known by themselves"
            )

    def step(
        self,
        groups: list[Group],
        state: MutableMapping[Tensor, dict[str, Any]],
        inputs: Inputs,
        only: Place | None = None,
    ) -> None:
        self.refuse_differences(groups)
        if sharding.is_distributed():
            self.refuse_pieces(groups, inputs, "the estimate of Prodigy")
        self.gather(groups, inputs)
        super().step(groups, state, inputs, only)

    def refuse_differences(self, groups: list[Group]) -> None:
        """Raises where groups would make the estimate in several ways."""
        first = groups[0]
        rate: Any = None
        for i, group in enumerate(groups):
            for name in _COMMON:
                if _differ(group.get(name), first.get(name)):
                    raise RuntimeError(
                        f"{self.owner}.step: {name} is {group[name]!r} in group {i} and {first[name]!r} in group 0, "
                        "and all parameters step by one estimate; give all groups the same"
                    )
            lr = group["lr"]
            if not _is_read(lr) or lr == 0:
                continue
            rate = lr if rate is None else rate
            if _differ(lr, rate):
                raise RuntimeError(
                    f"{self.owner}.step: lr is {lr!r} in group {i} and {rate!r} in another, and all parameters step by "
                    "one estimate; give each group this lr, or 0 for none"
                )

    def gather(self, groups: list[Group], inputs: Inputs | None = None) -> None:
        """Has every group share the numbers of group 0, on the device of the parameters."""
        device = self._device(groups, inputs)
        shared = self.shared
        if shared is not None and shared.device == device:
            views = self.views
            if all(group.get(name) is t for group in groups for name, t in views.items()):
                return
        states.refuse_capture(self.owner)
        first = groups[0]
        begin = {"d": first["d0"], "d_max": first["d0"], "d_numerator": 0.0, "k": 0.0}
        values = [_number(first.get(name, begin[name])) for name in RULE.shared]
        with torch.inference_mode(False), torch.no_grad():
            if shared is None or shared.device != device:
                self.shared = shared = torch.empty(len(values), dtype=torch.float64, device=device)
                self.views = dict(zip(RULE.shared, shared.unbind(), strict=True))
            shared.copy_(torch.tensor(values, dtype=torch.float64, device="cpu"))
        for group in groups:
            group.update(self.views)

    @staticmethod
    def _device(groups: list[Group], inputs: Inputs | None) -> torch.device:
        """Of the first parameter with a gradient, which mostly is the very first."""
        sums = None if inputs is None else inputs.sums
        params = itertools.chain.from_iterable(group["params"] for group in groups)
        given = (p for p in params if (p.grad if sums is None else sums.get(p)) is not None)
        p = next(given, next((group["params"][0] for group in groups if group["params"]), None))
        return torch.device("cpu") if p is None or not p.is_cuda else p.device


def _is_read(x: Any) -> bool:
    """Whether a number can be looked at without waiting for a device."""
    return not isinstance(x, Tensor) or (x.is_cpu and x.numel() == 1 and tracing.has_number(x))


def _differ(a: Any, b: Any) -> bool:
    if a is b:
        return False
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) != len(b) or any(map(_differ, a, b))
    return _is_read(a) and _is_read(b) and bool(a != b)


def _number(x: Any) -> float:
    return float(x.item() if isinstance(x, Tensor) else x)


class Prodigy(FusedOptimizer):
    """Prodigy (Mishchenko and Defazio, `arXiv 2306.06101 <https://arxiv.org/abs/2306.06101>`_), which torch does not
    have: Adam that estimates its learning rate. Arguments and checkpoints are those of its authors' ``prodigyopt``.

    Args:
        params: parameters, named parameters or parameter groups: float32, float64, bfloat16, float16 or
            complex, of any shape and strides.
        lr: factor of the estimate, a number or a 1-element tensor, read at every step; on a GPU without waiting for
            it. The same in all groups, or 0, with which a group rests.
        betas: decay rates of the averages of the gradient and of its square, both in [0, 1). With a first of 0 there is
            no average of the gradient.
        beta3: decay rate of what the estimate is made of; None: the square root of the second of ``betas``.
        eps: added to the denominator, times the estimate.
        weight_decay: decay.
        decouple: decay as :class:`AdamW` does; else an L2 penalty.
        use_bias_correction: whether both averages are corrected for having begun at 0.
        safeguard_warmup: leaves the learning rate out of the estimate's denominator, for schedules with a warmup.
        d0: with what the estimate begins.
        d_coef: factor of the estimate, the option to tune.
        growth_rate: by which the estimate may grow in a step, at least 1.
        fsdp_in_use: refused if set: FSDP2's parameters are known by themselves.
        slice_p: refused unless 1.
        maximize: ascend instead of descending.
        foreach, fused: accepted: every step is fused and covers all tensors at once.
        capturable: a step can be captured into a CUDA graph with and without it; on CPU it is refused.
        backend: ``"auto"`` picks kernels by device; ``"cpu"`` and ``"cuda"`` insist on them; ``"reference"`` is
            plain torch.
        step_options: what every class has besides: :class:`StepOptions`.

    State per parameter: ``step`` (0-dim float32), ``s``, ``exp_avg_sq`` and ``exp_avg``, in the parameter's shape and
    dtype, and ``p0``, where it began: that is weights, float32 for 16-bit parameters, and no ``state_dtype`` is of it.
    Every group has ``d``, the estimate, ``d_max``, ``d_numerator`` and ``k``, the number of steps: 0-dim float64
    tensors on the parameters' device, the same in all groups; what is set in group 0 is taken over. ``differentiable``
    and sparse gradients, which torch's own code steps for other classes, are refused.

    Raises:
        TypeError: an argument or a parameter of the wrong type.
        ValueError: an argument out of its range.
    """

    rule = RULE
    own_options = (
        "decouple",
        "use_bias_correction",
        "safeguard_warmup",
        "fsdp_in_use",
        "slice_p",
        *RULE.shared,
    )
    together = "steps all parameters by one estimate"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = float("inf"),
        fsdp_in_use: bool = False,
        slice_p: int = 1,
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
            beta3=beta3,
            eps=eps,
            weight_decay=weight_decay,
            decouple=decouple,
            use_bias_correction=use_bias_correction,
            safeguard_warmup=safeguard_warmup,
            d0=d0,
            d_coef=d_coef,
            growth_rate=growth_rate,
            fsdp_in_use=fsdp_in_use,
            slice_p=slice_p,
            maximize=maximize,
            capturable=capturable,
        )
        self._construct_own(params, backend, step_options, own, foreach=foreach, fused=fused)

    @functools.cached_property
    def stepper(self) -> ProdigyStepper:
        """What takes the steps: for this package's own use."""
        return ProdigyStepper(type(self).__name__, self.backend)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As :meth:`FusedOptimizer.add_param_group`; the group shares the estimate of the others."""
        super().add_param_group(param_group)
        if self.stepper.shared is None:
            self.stepper.gather(self.param_groups)
        self.param_groups[-1].update(self.stepper.views)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`FusedOptimizer.state_dict`, in the authors' form: numbers in groups, flat ``s`` and ``p0``."""
        self.stepper.gather(self.param_groups)
        saved = super().state_dict()
        if not all(map(tracing.has_number, self.stepper.views.values())):
            return saved
        numbers: dict[str, float] = {name: t.item() for name, t in self.stepper.views.items()}
        for group in saved["param_groups"]:
            group.update(numbers, k=int(numbers["k"]))
        saved["state"] = {key: _flat(entry) for key, entry in saved["state"].items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`FusedOptimizer.load_state_dict`; also a checkpoint of the authors' class."""
        _check_numbers(f"{type(self).__name__}.load_state_dict", state_dict)
        super().load_state_dict(_in_shape(state_dict, self.param_groups))
        self.stepper.gather(self.param_groups)


def _check_numbers(where: str, saved: Any) -> None:
    groups = saved.get("param_groups") if isinstance(saved, Mapping) else None
    for i, group in enumerate(groups if isinstance(groups, (list, tuple)) else ()):
        for name in RULE.shared if isinstance(group, Mapping) else ():
            x = group.get(name, 0.0)
            if isinstance(x, Tensor) and x.numel() == 1 and tracing.has_number(x):
                x = x.item()
            if isinstance(x, Tensor) and not tracing.has_number(x):
                continue
            if isinstance(x, bool) or not isinstance(x, (int, float)):
                raise ValueError(f"{where}: group {i}: {name} is {x!r}, expected a number; load a whole checkpoint")


def _flat(entry: Any) -> Any:
    """The state of a parameter, ``s`` and ``p0`` in one dimension."""
    if not isinstance(entry, Mapping):
        return entry
    whole = {name: t for name in _BESIDE if isinstance(t := entry.get(name), Tensor) and not tracing.is_subclass(t)}
    return {**entry, **{name: t.flatten() for name, t in whole.items()}}


def _in_shape(saved: Any, groups: list[Group]) -> Any:
    """A checkpoint with ``s`` and ``p0`` in the shape of their parameters."""
    if not isinstance(saved, Mapping) or not isinstance(saved.get("state"), Mapping):
        return saved  # which is refused in its own words
    state, given = dict(saved["state"]), saved.get("param_groups")
    for group, own in zip(given if isinstance(given, (list, tuple)) else (), groups, strict=False):
        keys = group.get("params") if isinstance(group, Mapping) else None
        for key, p in zip(keys if isinstance(keys, (list, tuple)) else (), own["params"], strict=False):
            entry = state.get(key) if isinstance(key, Hashable) else None
            if not isinstance(entry, Mapping):
                continue
            new = dict(entry)
            for name in _BESIDE:
                t = entry.get(name)
                if not isinstance(t, Tensor) or tracing.is_subclass(t):
                    continue
                if t.dim() == 1 and t.numel() == p.numel():
                    new[name] = t.reshape(p.shape)
                elif name == "p0" and t.dim() == 0:  # theirs of a parameter that was 0 all over
                    new[name] = t.expand(p.shape)
            state[key] = new
    return {**saved, "state": state}


class Prodigy8bit(Prodigy):
    """:class:`Prodigy` with moments in 8 bits: ``state_dtype`` is ``torch.int8`` unless given."""

    default_state_dtype = torch.int8
