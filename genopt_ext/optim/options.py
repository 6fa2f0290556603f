"""The options of the optimizers: what each may be, and what every class takes beside torch's."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, get_type_hints

import torch
from torch import Tensor

from .. import tracing
from .state import FORMAT, MIN_INT8_SIZE, NAMED, complete


@dataclass(frozen=True)
class Range:
    """The numbers that an option may be: each bound is left out where it is None.

    Attributes:
        label: what a message calls it; where numbers of a tuple are called as the tuple, it shows all.
        at_least, above, at_most, below: bounds, the second and the last not allowed themselves.
        finite: whether infinity is not allowed either.
        each: the option is a tuple, of numbers in these ranges.
        is_optional: it may be None.
    """

    label: str
    at_least: float | None = 0.0
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    finite: bool = True
    each: tuple[Range, ...] = ()
    is_optional: bool = False

    def check(self, where: str, name: str, value: Any) -> None:
        """Raises TypeError or ValueError, in torch's words and with what is allowed."""
        if value is None and self.is_optional:
            return
        if not self.each:
            self._check_number(where, name, value, value)
            return
        if not isinstance(value, (tuple, list)) or len(value) != len(self.each):
            raise TypeError(f"{where}: {name} must be {len(self.each)} numbers, got {value!r}")
        for i, (item, allowed) in enumerate(zip(value, self.each, strict=True)):
            if item is None and allowed.is_optional:
                continue
            shown = ", ".join(map(str, value)) if allowed.label == self.label else item
            allowed._check_number(where, f"{name}[{i}]", item, shown)

    def _check_number(self, where: str, name: str, value: Any, shown: Any) -> None:
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{where}: Tensor {name} must be 1-element, got shape {list(value.shape)}")
        if isinstance(value, Tensor) and not tracing.has_number(value):
            return
        try:
            number = (
                float("x")
                if isinstance(value, (str, bytes))
                else float(value.detach() if isinstance(value, Tensor) else value)
            )
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise TypeError(f"{where}: Invalid {self.label}: {value!r}; {name} must be a number") from None
        bounds = (
            (">=", self.at_least, operator.ge),
            (">", self.above, operator.gt),
            ("<=", self.at_most, operator.le),
            ("<", self.below, operator.lt),
        )
        given = [(sign, bound, holds(number, bound)) for sign, bound, holds in bounds if bound is not None]
        inside = all(holds for *_, holds in given)
        if not (inside and (math.isfinite(number) or not (self.finite or math.isnan(number)))):
            allowed = " and".join(f" {sign} {bound:g}" for sign, bound, _ in given)
            kind = "a finite number" if self.finite else "a number"
            raise ValueError(f"{where}: Invalid {self.label}: {shown}; {name} must be {kind}{allowed}")


def betas(count: int = 2) -> Range:
    """So many decay rates, as Adam has two of them."""
    return Range("betas", each=tuple(Range(f"beta parameter at index {i}", below=1.0) for i in range(count)))


FLAGS = (
    "always_adapt",
    "amsgrad",
    "bias_correction",
    "capturable",
    "centered",
    "decouple",
    "decoupled_decay",
    "decoupled_weight_decay",
    "differentiable",
    "fsdp_in_use",
    "grad_averaging",
    "master_weights",
    "maximize",
    "nesterov",
    "no_prox",
    "safeguard_warmup",
    "silent_sgd_phase",
    "skip_nonfinite",
    "train_mode",
    "trust_clip",
    "use_bias_correction",
)


class StepOptions(TypedDict, total=False):
    """What every class takes beside torch's arguments, as keywords. Each is left out unless it is given.

    All of it happens inside the step's own passes over memory; ``.grad`` stays as it is. A group's own value, also of
    ``max_grad_norm``, takes the place of the one given here.

    Attributes:
        max_grad_norm: scales all gradients such that the norm of all together is at most this, as
            :func:`torch.nn.utils.clip_grad_norm_` before the step. A group with a value of its own is clipped by its
            own norm, and left out of the others'. Infinity clips nothing, and tells ``opt.grad_norm``.
        clip_per_param: the same with each parameter's own norm.
        agc: adaptive gradient clipping (Brock et al., `arXiv 2102.06171 <https://arxiv.org/abs/2102.06171>`_) of each
            parameter: its gradient's norm is at most this times the weight's norm, which counts as at least 1e-3. At
            most one of these three.
        clip_grad_value: limits each element of the scaled gradient.
        ema_decay: keeps a moving average of the weights in ``state[p]["ema"]`` (float32 for 16-bit parameters), equal
            to :class:`torch.optim.swa_utils.AveragedModel` with this decay, updated after every step. In [0, 1). See
            :meth:`FusedOptimizer.swap_ema`.
        state_dtype: how moments are stored: ``torch.float32``, ``torch.bfloat16``, or ``torch.int8`` for one code of 8
            bits each and a float32 scale for up to 256 of them (``docs/8-bit-format.md``). None: as torch, in the
            parameter's dtype. Complex and float64 parameters keep the state that torch has; other tensor
            subclasses, and DTensors whose cuts might divide a block, have float32 for codes. What is stored narrow is
            rounded without bias, which needs a step count: SGD then has ``state[p]["step"]``.
        min_int8_size: parameters with fewer elements have float32 moments where ``state_dtype`` is int8.
        param_rounding: how bfloat16 and float16 parameters take an update that may be smaller than what separates two
            of their numbers. ``"nearest"``: as torch, which loses it; ``"stochastic"``: to either neighbour, such that
            the mean is right, by bits that depend on ``torch.initial_seed()``, step and element alone; ``"kahan"``:
            what rounding leaves over is kept in ``state[p]["compensation"]``, in the parameter's dtype.
        master_weights: keeps bfloat16 and float16 parameters as float32 in ``state[p]["master"]`` and rounds them from
            there; a change made to such a parameter by other hands is lost.
        skip_nonfinite: a step whose gradients hold NaN or infinity changes nothing, and is counted in
            ``opt.skipped_steps``; nothing waits for the device.
    """

    max_grad_norm: float | None
    clip_per_param: float | None
    agc: float | None
    clip_grad_value: float | None
    ema_decay: float | None
    skip_nonfinite: bool
    state_dtype: torch.dtype | None
    min_int8_size: int
    param_rounding: str
    master_weights: bool


# What they are where they are not given, apart from None.
DEFAULTS = {
    "skip_nonfinite": False,
    "min_int8_size": MIN_INT8_SIZE,
    "param_rounding": "nearest",
    "master_weights": False,
}


def is_step_count(value: float) -> bool:
    """Whether a step counter can be this: a whole number from 0 to 2**53, up to which float64 has all of them."""
    return 0 <= value <= 2**53 and value == math.floor(value)


STORAGE_OPTIONS = ("state_dtype", "min_int8_size", "param_rounding", "master_weights")
STATE_DTYPES = tuple(NAMED.values())
PARAM_ROUNDINGS = ("nearest", "stochastic", "kahan")


def check_storage(where: str, options: dict[str, Any]) -> None:
    """Raises TypeError or ValueError for options that say how state and parameters are stored."""
    dtype = options.get("state_dtype")
    if dtype is not None and dtype not in STATE_DTYPES:
        kind = ValueError if isinstance(dtype, torch.dtype) else TypeError
        allowed = ", ".join(map(str, STATE_DTYPES))
        raise kind(f"{where}: Invalid state_dtype: {dtype!r}; it must be one of {allowed}, or None")
    size = options.get("min_int8_size", 0)
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{where}: min_int8_size must be an integer, got {size!r}")
    if size < 0:
        raise ValueError(f"{where}: Invalid min_int8_size: {size}; it must be a number of elements >= 0")
    rounding = options.get("param_rounding", "nearest")
    if rounding not in PARAM_ROUNDINGS:
        kind = ValueError if isinstance(rounding, str) else TypeError
        allowed = ", ".join(map(repr, PARAM_ROUNDINGS))
        raise kind(f"{where}: Invalid param_rounding: {rounding!r}; it must be one of {allowed}")
    if options.get("master_weights") and rounding != "nearest":
        raise ValueError(
            f"{where}: master_weights=True keeps parameters in float32, and param_rounding={rounding!r} rounds them; "
            "give only one of them"
        )
    seed = options.get("rounding_seed", 0)
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"{where}: rounding_seed must be an integer from 0 to 2**32 - 1, got {seed!r}")
    if (version := options.get("int8_format", FORMAT)) not in range(1, FORMAT + 1):
        raise ValueError(
            f"{where}: int8_format is {version!r}, and this genopt_ext reads 8-bit state of formats 1 to {FORMAT}; "
            "load it with the version that saved it, and save it with state_dtype=torch.float32"
        )


NORM_CLIPS = ("max_grad_norm", "clip_per_param", "agc")
GROUP_OPTIONS = {
    "max_grad_norm": Range("max_grad_norm value", finite=False),
    "clip_per_param": Range("clip_per_param value"),
    "agc": Range("agc value"),
    "clip_grad_value": Range("clip_grad_value value"),
    "ema_decay": Range("ema_decay value", below=1.0),
}


def clips_alone(group: dict[str, Any]) -> bool:
    """Whether a group is clipped by a norm of its own, or its tensors' own, and left out of the optimizer's."""
    # Spelled out, as every step asks it of every group.
    return (
        group.get("max_grad_norm") is not None
        or group.get("clip_per_param") is not None
        or group.get("agc") is not None
    )


def check(where: str, ranges: Mapping[str, Range], options: dict[str, Any]) -> None:
    """Raises TypeError or ValueError for an option out of its range, or that can not go with another."""
    for name, allowed in ranges.items():
        if name in options:
            allowed.check(where, name, options[name])
    for name, allowed in GROUP_OPTIONS.items():
        if options.get(name) is not None:
            allowed.check(where, name, options[name])
    check_storage(where, options)
    norms = [name for name in NORM_CLIPS if options.get(name) is not None]
    if len(norms) > 1:
        raise ValueError(f"{where}: {' and '.join(norms)} clip by a norm each; give only one of them")
    for name in FLAGS:
        if name in options and not (isinstance(options[name], (bool, int)) and options[name] in (0, 1)):
            raise TypeError(f"{where}: {name} must be True or False, got {options[name]!r}")
    if (cautious := options.get("cautious")) is not None:
        if cautious not in ("weight_decay", "update"):
            raise ValueError(f"{where}: Invalid cautious: {cautious!r}; it must be 'weight_decay', 'update' or None")
        if options.get("decoupled_weight_decay") is False:
            raise ValueError(
                f"{where}: cautious={cautious!r} goes with decoupled decay; use it with decoupled_weight_decay=True"
            )
    if (
        options.get("nesterov")
        and "dampening" in ranges
        and not (options["momentum"] > 0 and options["dampening"] == 0)
    ):
        raise ValueError(f"{where}: Nesterov momentum requires a momentum and zero dampening")


def given_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are set: others are no keys of groups."""
    return {name: x for name, x in given.items() if not (x is None or x is False or x == "nearest")}


def set_defaults(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Gives a group the options that it lacks."""
    alone = clips_alone(group)
    for name, value in defaults.items():
        if name not in group and name != "params":
            group[name] = None if alone and name in NORM_CLIPS else value
    complete(group)


def document(cls: Any) -> None:
    """Spells the step options out in the signature of an optimizer's class, as ``help`` shows it."""
    signature = inspect.signature(cls.__init__)
    _, *parameters = signature.parameters.values()
    if parameters and str(parameters[-1].annotation) == "Unpack[StepOptions]":
        types, defaults = get_type_hints(StepOptions), {**DEFAULTS, "state_dtype": cls.default_state_dtype}
        parameters[-1:] = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name), annotation=types[name])
            for name in StepOptions.__annotations__
        ]
    cls.__signature__ = signature.replace(parameters=parameters)


class Listed:
    """The parameters of an optimizer's groups, by id: adding groups one by one stays linear."""

    def __init__(self) -> None:
        self.marks: list[tuple[int, int]] = []  # the groups' lists as they were last, by id and length
        self.ids: set[int] = set()

    def append(self, optimizer: torch.optim.Optimizer, group: dict[str, Any], add: Callable[[Any], None]) -> None:
        """``add``, torch's ``add_param_group``, which would look at every earlier parameter again for each group."""
        groups = optimizer.param_groups
        if not groups or self.marks != _marks(groups):
            self.ids = {id(p) for each in groups for p in each["params"]}
        # One earlier group says whether they have names.
        optimizer.param_groups = [{**each, "params": []} for each in groups[:1]]
        try:
            add(group)
            added = optimizer.param_groups.pop()
        finally:
            optimizer.param_groups = groups
        ids = [id(p) for p in added["params"]]
        if not self.ids.isdisjoint(ids):  # let torch say so
            add(group)
        else:
            groups.append(added)
        self.ids.update(ids)
        self.marks = _marks(groups)


def _marks(groups: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(id(group["params"]), len(group["params"])) for group in groups]
