"""How an optimizer's state is kept: what a group's options ask for, made, converted and looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _backend, sharding, tracing
from ..reference import codecs
from ..reference.codecs import HALVES, MIXES

if TYPE_CHECKING:
    from .rule import Group, Rule

FORMAT = 2  # of the codes, kept in a group with 8-bit state as "int8_format"
MIN_INT8_SIZE = 4096
NAMED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}  # of states, as checkpoints say it


def state_dtype(group: Group, p: Tensor) -> torch.dtype | None:
    """How ``p``'s moments are to be stored: int8 for codes, None for whatever they are."""
    wanted: torch.dtype | None = group.get("state_dtype")
    if p.dtype not in MIXES or wanted is None:
        return None
    if wanted == torch.int8 and (_divides_blocks(p) or p.numel() < group.get("min_int8_size", MIN_INT8_SIZE)):
        return torch.float32
    return wanted


def _divides_blocks(p: Tensor) -> bool:
    """Whether ``p`` is spread over devices so that a block of codes might be too."""
    if not tracing.is_subclass(p):
        return False
    block = codecs.block_of(p)
    return not (block and sharding.is_spread(p) and sharding.keeps_blocks(p, block))


def stored_dtype(rule: Rule, group: Group, p: Tensor, name: str) -> torch.dtype | None:
    """As :func:`state_dtype`, of the state ``name``."""
    if name in rule.precise:
        return torch.float32 if p.dtype in MIXES else p.dtype
    if name in rule.weights:
        return torch.float32 if p.dtype in MIXES else None
    return state_dtype(group, p)


def is_widened(group: Group, p: Tensor) -> bool:
    """Whether ``p`` is large enough for the 8-bit state that its group asks for, and yet has it in float32.

    Of vectors, which never have codes where they are spread over devices, only the documentation tells.
    """
    if sharding.is_spread(p) and p.dim() < 2:
        return False
    if group.get("state_dtype") != torch.int8 or p.numel() < group.get("min_int8_size", MIN_INT8_SIZE):
        return False
    return state_dtype(group, p) == torch.float32


def extra(group: Group, p: Tensor) -> str | None:
    """The state that keeps what a 16-bit parameter can not hold: ``"master"`` or ``"compensation"``."""
    if p.dtype not in HALVES:
        return None
    if group.get("master_weights"):
        return "master"
    return "compensation" if group.get("param_rounding") == "kahan" else None


def is_stochastic(group: Group, p: Tensor) -> bool:
    """Whether ``p`` is rounded at random."""
    return p.dtype in HALVES and group.get("param_rounding") == "stochastic"


def make(p: Tensor, name: str, value: complex, dtype: torch.dtype | None, signed: bool) -> dict[str, Tensor]:
    """The state ``name`` of ``p``, full of ``value``. ``dtype``: int8 for codes, None for the parameter's."""
    if dtype != torch.int8:
        return {name: torch.full_like(p, value, dtype=dtype)}
    number = torch.full((1,), float(value.real), dtype=torch.float32, device=p.device)
    code, scale = codecs.encode(number, signed)
    filler = number if value == 0 else scale  # -0.0 stays
    here, shape = sharding.local(p), codecs.scales_shapes(p)[0]
    of_here = (here.shape[0], here.shape[1:].numel() // block) if (block := codecs.block_of(p)) else shape
    codes = _compact_like(here, code.dtype).copy_(code.squeeze(0))
    scales = filler.expand(of_here).clone(memory_format=torch.contiguous_format)
    return {name + "_codes": sharding.spread_as(codes, p), name + "_scales": sharding.spread_as(scales, p, shape)}


def _compact_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for ``p``'s elements in their order, without the holes that a slice has."""
    t = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format)
    if _lie_alike(t, p):
        return t
    order = codecs.order_of(p)
    return t.new_empty([p.shape[d] for d in order]).permute([order.index(d) for d in range(p.dim())])


def is_as_asked(rule: Rule, group: Group, p: Tensor, name: str, t: Tensor) -> bool:
    """Whether the entry ``name`` of the state of ``p`` is kept as its group asks for it."""
    if name == "ema":
        return True
    if name in ("master", "compensation"):
        return t.dtype == (torch.float32 if name == "master" else p.dtype)
    dtype = stored_dtype(rule, group, p, name.removesuffix("_codes").removesuffix("_scales"))
    if dtype == torch.int8 and sharding.is_spread(p) and not sharding.are_cut_alike(p, t, shapes_too=False):
        return False
    if name.endswith("_scales"):
        return dtype != torch.int8 or (sharding.local(t).is_contiguous() and t.shape == codecs.scales_shapes(p)[0])
    if name.endswith("_codes"):
        return dtype == torch.int8 and _lie_alike(sharding.local(t), sharding.local(p))
    return (dtype is None or t.dtype == dtype) and (name not in rule.factors or t.is_contiguous())


def _lie_alike(codes: Tensor, p: Tensor) -> bool:
    """Whether codes lie in the order of the parameter's elements, without holes."""
    expected = 1
    for d in sorted((d for d in range(p.dim()) if p.shape[d] != 1), key=lambda d: p.stride(d)):
        if codes.stride(d) != expected:
            return p.numel() == 0
        expected *= p.shape[d]
    return True


def convert(state: dict[str, Any], name: str, p: Tensor, dtype: torch.dtype | None, signed: bool) -> None:
    """Stores ``name`` anew, as ``dtype`` asks for it. None: codes become float32; other states keep their dtype."""
    there = {name + end: t for end in ("", "_codes", "_scales") if (t := state.pop(name + end, None)) is not None}
    values = codecs.read({key: sharding.cut_as(t, p) if sharding.is_spread(t) else t for key, t in there.items()}, name)
    if dtype != torch.int8:
        state[name] = values.to(dtype or values.dtype)
        return
    state.update(make(p, name, 0.0, dtype, signed))
    codecs.write(state, name, p, values.float())
    # A block that waits for its first gradient goes on to.
    here, scales = sharding.local(p), sharding.local(state[name + "_scales"])
    flat = codecs.flat(sharding.local(values), here)
    waits = codecs.blocks((flat != 0) | ~flat.signbit(), codecs.block_of(p) or codecs.BLOCK).any(1).logical_not()
    scales.view(-1).masked_fill_(waits, -0.0)


# All that a parameter keeps


def further_names(rule: Rule, group: Group, p: Tensor) -> list[str]:
    """What the group's options ask for beside the rule's states; it is made where it lacks."""
    names = ["ema"] if group.get("ema_decay") is not None else []
    if (kept := extra(group, p)) is not None:
        names.append(kept)
    narrow = state_dtype(group, p) in (torch.int8, torch.bfloat16)
    if is_stochastic(group, p) or (narrow and moments(rule, group)):
        names.append("step")  # rounding thresholds move with it
    return names


def moments(rule: Rule, group: Group) -> list[str]:
    """The states that ``state_dtype`` is of."""
    return [name for name in rule.state_names(group) if name not in rule.weights | rule.precise]


def counts_steps(rule: Rule, group: Group, p: Tensor) -> bool:
    return rule.counts_steps or "step" in further_names(rule, group, p)


def complete(group: Group) -> None:
    """Adds the keys that go with a group's options: the format of its codes, the seed of its rounding."""
    if group.get("state_dtype") == torch.int8:
        group.setdefault("min_int8_size", MIN_INT8_SIZE)
        group["int8_format"] = FORMAT
    else:
        group.pop("int8_format", None)
    if group.get("param_rounding") == "stochastic":
        group.setdefault("rounding_seed", torch.initial_seed() & 0xFFFFFFFF)


def is_away(p: Tensor, number: Tensor) -> bool:
    """Whether a number of its state is on another device than ``p``, as in torch's own checkpoints of a GPU's."""
    return number.device != p.device and {p.device.type, number.device.type} <= _backend.DEVICES


def is_captured() -> bool:
    """Whether a CUDA graph captures what is done now."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def refuse_capture(owner: str) -> None:
    if is_captured():
        raise RuntimeError(
            f"{owner}.step: state has to be made or moved before a CUDA graph captures a step, else "
            "every replay would do it again; take one step before the capture"
        )


class Missing:
    """States that are to be made: lists, as a tuple for each parameter would be one more object to collect."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.params: list[Tensor] = []
        self.names: list[Sequence[str]] = []

    def add(self, group: Group, p: Tensor, names: Sequence[str]) -> None:
        self.groups.append(group)
        self.params.append(p)
        self.names.append(names)


@torch.inference_mode(False)  # what is made within it could not be stepped outside of it; this enables gradients
@torch.no_grad()
def make_missing(owner: str, rule: Rule, missing: Missing) -> list[dict[str, Tensor]]:
    """The states that parameters lack, by name."""
    made: list[dict[str, Tensor]] = [{} for _ in missing.params]
    # A device's step counters are views of one buffer: they stay together in memory.
    cpu = torch.device("cpu")
    devices = [p.device if p.is_cuda else cpu for p in missing.params]
    numbers = Counter(d for d, names in zip(devices, missing.names, strict=True) if "step" in names)
    counters = {d: iter(torch.zeros(n, dtype=torch.float32, device=d).unbind()) for d, n in numbers.items()}
    forms: dict[Any, list[Any]] = {}
    for state, device, group, p, names in zip(
        made, devices, missing.groups, missing.params, missing.names, strict=True
    ):
        of_moments = state_dtype(group, p)
        if of_moments == torch.float32:
            tell_widened(owner, rule, group, p)
        key = (id(group), p.dtype, of_moments, *names)
        if key not in forms:
            forms[key] = [_form(rule, group, p, name) for name in names]
        for name, value, dtype, signed in forms[key]:
            if name == "step":
                state[name] = next(counters[device])
            elif name in rule.running:
                state[name] = torch.full((), value.real, dtype=rule.running_dtype, device=device)
            elif name in rule.factors:
                state[name] = _factor(rule, p, name, dtype)
            elif value is _ZERO and dtype != torch.int8:
                state[name] = torch.zeros_like(p, dtype=dtype)  # in half the time of make()
            else:
                state.update(make(p, name, value, dtype, signed))
        for name in state.keys() & {"master", *rule.weights}:
            state[name].copy_(p)
    return made


_ZERO = 0.0


def _factor(rule: Rule, p: Tensor, name: str, dtype: torch.dtype | None) -> Tensor:
    """Zeros for the rows or columns of ``p``'s matrices."""
    if not tracing.is_subclass(p):
        return torch.zeros(rule.state_shape(name, p), dtype=dtype or p.dtype, device=p.device)
    # Spread over devices as the parameter is, and whole on all of them along what is summed.
    zeros = torch.zeros_like(p, dtype=dtype).sum(-1 - rule.factors.index(name), keepdim=True)
    return sharding.without_partial_sums(zeros)


def _form(rule: Rule, group: Group, p: Tensor, name: str) -> tuple[str, complex, torch.dtype | None, bool]:
    """What :func:`make` is told of a state."""
    dtype = stored_dtype(rule, group, p, name)
    if name in ("ema", "master"):
        dtype = torch.float32 if p.dtype in HALVES else None
    elif name == "compensation":
        dtype = None
    value = rule.initial_number(group, name) if name in rule.running else rule.initial_value(group, p, name)
    return name, _ZERO if str(value) == "0.0" else value, dtype, name not in rule.squares


@torch.inference_mode(False)
@torch.no_grad()
def store_anew(owner: str, rule: Rule, group: Group, p: Tensor, state: dict[str, Any]) -> None:
    """Stores the parameter's states as its group asks for them, where they are stored in another way.

    They have to be states of ``p``: see ``problems.find_in_state``.
    """
    complete(group)
    for name in rule.state_names(group, p):
        there = [key for key in (name, name + "_codes", name + "_scales") if state.get(key) is not None]
        if any(not is_as_asked(rule, group, p, key, state[key]) for key in there):
            refuse_capture(owner)
            convert(state, name, p, stored_dtype(rule, group, p, name), signed=name not in rule.squares)
            if name in rule.factors:
                state[name] = state[name].contiguous()
    for name, dtype in (("master", torch.float32), ("compensation", p.dtype)):
        if name != extra(group, p):
            state.pop(name, None)
        elif isinstance(state.get(name), Tensor) and state[name].dtype != dtype:
            state[name] = state[name].to(dtype)


def tell_widened(owner: str, rule: Rule, group: Group, p: Tensor) -> None:
    """Warns, once, where ``p`` has float32 state instead of the 8-bit state that was asked for."""
    if is_widened(group, p) and (states := len(moments(rule, group))):
        why = " of rows or cuts that divide what shares a scale" if sharding.is_spread(p) else ""
        _backend.warn_once(
            f"{owner}: 8-bit state is kept in float32 here, for parameters that are "
            f"{type(p).__name__}s{why}: {4 * states} bytes a parameter instead of {states}; with "
            f"state_dtype=torch.bfloat16 it is {2 * states}"
        )
