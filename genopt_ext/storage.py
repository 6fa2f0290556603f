"""How an optimizer's state is stored: as numbers, or as codes of 8 bits with a scale for each block of 256.

The codes are those of ``csrc/codecs/int8_block.h``, spelled in torch operations: the same bits. A state ``S`` of a
parameter is one tensor ``S``, or two: ``S_codes`` (the parameter's shape and strides; int8, or uint8 for averages of
squares, which are never negative) and ``S_scales`` (float32, one for each block in the order in which codes lie).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from . import tracing
from .tracing import Number

BLOCK = 256
FORMAT = 1  # of the codes, kept in a group with 8-bit state as "int8_format"
MIN_INT8_SIZE = 4096
MIXES = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that parameters, gradients and states may mix
NAMED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}  # of states, as checkpoints say it
HALVES = (torch.bfloat16, torch.float16)
STEPPED = (*MIXES, torch.float64, torch.complex64, torch.complex128)  # dtypes of parameters that can take a step

_FINE = 19  # bits of a float below a code's last one, where an octave has 16 codes; 2 more where it has 4


def state_dtype(group: dict[str, Any], p: Tensor) -> torch.dtype | None:
    """How ``p``'s moments are to be stored: int8 for codes, None for whatever they are."""
    wanted: torch.dtype | None = group.get("state_dtype")
    if p.dtype not in MIXES or wanted is None:
        return None
    # A block of codes may not be spread over devices, as a DTensor's elements are.
    whole = not tracing.is_subclass(p) and p.numel() >= group.get("min_int8_size", MIN_INT8_SIZE)
    return torch.float32 if wanted == torch.int8 and not whole else wanted


def is_widened(group: dict[str, Any], p: Tensor) -> bool:
    """Whether ``p`` is large enough for the 8-bit state that its group asks for, and yet has it in float32."""
    large = p.numel() >= group.get("min_int8_size", MIN_INT8_SIZE)
    return group.get("state_dtype") == torch.int8 and large and state_dtype(group, p) == torch.float32


def extra(group: dict[str, Any], p: Tensor) -> str | None:
    """The state that keeps what a 16-bit parameter can not hold: ``"master"`` or ``"compensation"``."""
    if p.dtype not in HALVES:
        return None
    if group.get("master_weights"):
        return "master"
    return "compensation" if group.get("param_rounding") == "kahan" else None


def is_stochastic(group: dict[str, Any], p: Tensor) -> bool:
    """Whether ``p`` is rounded at random."""
    return p.dtype in HALVES and group.get("param_rounding") == "stochastic"


def _order(like: Tensor) -> list[int]:
    """Dimensions as they lie in memory, the one that varies fastest last."""
    strides = like.stride()
    return sorted(range(like.dim()), key=lambda d: -strides[d])


def flat(t: Tensor, like: Tensor) -> Tensor:
    """The elements of ``t`` in the order in which ``like`` lies in memory."""
    return t.permute(_order(like)).reshape(-1)


def fill(t: Tensor, values: Tensor, like: Tensor) -> None:
    """The reverse of :func:`flat`."""
    order = _order(like)
    t.permute(order).copy_(values.view([t.shape[d] for d in order]))


# The codes


def _blocks(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)


def _border(scales: Tensor, signed: bool) -> tuple[Tensor, int, int]:
    """From where on octaves have 16 codes: the bits of values and the code; and the largest code."""
    largest, octaves = (127, 6) if signed else (255, 12)
    return scales.view(torch.int32).unsqueeze(1) - (octaves << 23), largest - 16 * octaves, largest


def _scales_for(largest: Tensor, signed: bool) -> Tensor:
    """Of blocks whose largest magnitude, as a float's bits, this is."""
    rounded = (largest + 0x1FFFFF) & ~0x1FFFFF
    scales = rounded.clamp((15 if signed else 29) << 23, 0x7F600000).view(torch.float32)
    scales = torch.where(largest == 0, 0.0, scales)
    return torch.where(largest >= 0x7F800000, torch.nan, scales)


def encode(x: Tensor, signed: bool, turns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a vector.

    Args:
        x: float32, 1-D.
        signed: whether values may be negative.
        turns: int64 in [0, 2**32), one an element, which decides on the way to round; None: to the nearest code.

    Returns:
        Codes (int8, or uint8 where not signed) and scales (float32, one for each block of 256).
    """
    bits = _blocks(x).view(torch.int32)
    size = bits & 0x7FFFFFFF
    scales = _scales_for(size.amax(1) if len(size) else size.new_zeros(0), signed)
    border, code, largest = _border(scales, signed)
    turn = torch.full_like(size, 1 << 31, dtype=torch.int64) if turns is None else _blocks(turns)
    fine = size - border
    codes = ((torch.maximum(fine, fine >> 2) + (turn >> (32 - _FINE)).int()) >> _FINE) + code
    codes = codes.clamp(0 if signed else 1, largest)
    codes = torch.where((scales.unsqueeze(1) > 0) & ((size != 0) | signed), codes, 0)
    codes = torch.where(bits < 0, -codes, codes) if signed else codes
    return codes.to(torch.int8 if signed else torch.uint8).view(-1).narrow(0, 0, len(x)), scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The values of a vector of codes, in float32."""
    border, code, _ = _border(scales, codes.dtype == torch.int8)
    numbers = _blocks(codes).int()
    fine = (numbers.abs() - code) << _FINE
    values = (border + torch.minimum(fine, fine << 2)).view(torch.float32)
    values = torch.where(numbers < 0, -values, values)
    fills = torch.where(scales > 0, 0.0, scales).unsqueeze(1)
    return torch.where(numbers == 0, fills, values).view(-1).narrow(0, 0, len(codes))


# The way to round: csrc/rules/random.h, csrc/codecs/plain.h


def _number(x: int) -> Tensor:
    return torch.tensor(x, device="cpu")  # whatever device is the default


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers (held in int64) of which every bit changes all others."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def _counted(t: Number) -> Tensor:
    if isinstance(t, Tensor):
        return t.clamp(min=0).long() & 0xFFFFFFFF
    return _number(int(max(t, 0)) & 0xFFFFFFFF)


def random_bits(p: Tensor, seed: int, t: Number) -> Tensor:
    """32 random bits for each element of ``p`` in its order in memory, at step ``t``: int64."""
    i = torch.arange(p.numel(), device=p.device)
    step = mix(_number(int(seed)) ^ mix(_counted(t)))
    return mix((mix((i >> 32) ^ step) + i) & 0xFFFFFFFF)


def turns(p: Tensor, t: Number) -> Tensor:
    """The elements' turns at step ``t``: as :func:`random_bits`, evenly spread over elements and steps."""
    i = torch.arange(p.numel(), device=p.device)
    step = _counted(t)
    return (i * 0x91E10DA5 + (step * 0x9E3779B9 & 0xFFFFFFFF) + mix(step >> 8)) & 0xFFFFFFFF


def round_by(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """float32 ``x`` as one of its neighbours in ``dtype``, a half: the upper one where ``bits`` reach up to it."""
    number = x.view(torch.int32)
    if dtype == torch.bfloat16:
        rounded = ((number + (bits >> 16).int()) & ~0xFFFF).view(torch.float32)
    else:
        size = number & 0x7FFFFFFF
        normal = ((size + (bits >> 19).int()) & ~0x1FFF).view(torch.float32)
        places = (size.view(torch.float32) * 2.0**24).clamp(max=1024.0)
        subnormal = (places + (bits >> 19).float() * 2.0**-13).nan_to_num(0.0).int().float() * 2.0**-24
        rounded = torch.where(size < 113 << 23, subnormal, normal)
        rounded = torch.where(number < 0, -rounded, rounded)
    return torch.where(x.isnan(), x, rounded).to(dtype)


# A state in a parameter's state dict


def read(state: dict[str, Any], name: str) -> Tensor:
    """The state ``name``, in its own dtype, or in float32 where it is stored in codes."""
    if state.get(name) is not None:
        plain: Tensor = state[name]
        return plain
    codes = state[name + "_codes"]
    values = torch.empty_like(codes, dtype=torch.float32)
    fill(values, decode(flat(codes, codes), state[name + "_scales"]), codes)
    return values


def make(p: Tensor, name: str, value: complex, dtype: torch.dtype | None, signed: bool) -> dict[str, Tensor]:
    """The state ``name`` of ``p``, full of ``value``. ``dtype``: int8 for codes, None for the parameter's."""
    if dtype != torch.int8:
        return {name: torch.full_like(p, value, dtype=dtype, memory_format=torch.preserve_format)}
    number = torch.full((1,), float(value.real), dtype=torch.float32, device=p.device)
    code, scale = encode(number, signed)
    filler = number if value == 0 else scale  # -0.0 stays
    return {
        name + "_codes": _dense_like(p, code.dtype).copy_(code.squeeze(0)),
        name + "_scales": filler.expand(-(-p.numel() // BLOCK)).clone(memory_format=torch.contiguous_format),
    }


def _dense_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for ``p``'s elements in their order, without the holes that a slice has."""
    t = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format)
    if _lie_alike(t, p):
        return t
    order = _order(p)
    return t.new_empty([p.shape[d] for d in order]).permute([order.index(d) for d in range(p.dim())])


def write(state: dict[str, Any], name: str, p: Tensor, values: Tensor, turns: Tensor | None = None) -> None:
    """Stores ``values`` of ``p``'s shape as ``state`` has them; ``turns`` as of :func:`encode`, in ``p``'s order."""
    plain = state.get(name)
    if plain is None:
        codes = state[name + "_codes"]
        new, scales = encode(flat(values, p), codes.dtype == torch.int8, turns)
        fill(codes, new, p)
        state[name + "_scales"].copy_(scales)
    elif turns is not None and plain.dtype in HALVES:
        fill(plain, round_by(flat(values, p), plain.dtype, turns), p)
    else:
        plain.copy_(values)


def is_stored(state: dict[str, Any], name: str, p: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether ``state`` has ``name`` as ``dtype`` asks for it: see :func:`state_dtype`."""
    codes = state.get(name + "_codes")
    if dtype == torch.int8:
        alone = codes is not None and state.get(name) is None
        return bool(alone) and state[name + "_scales"].is_contiguous() and _lie_alike(state[name + "_codes"], p)
    return state.get(name) is not None and (dtype is None or state[name].dtype == dtype)


def fits(state: dict[str, Any], name: str, p: Tensor, signed: bool) -> bool:
    """Whether the state ``name`` is one of ``p``: of its shape and on its device, with as many scales as blocks."""
    plain = state.get(name)
    if plain is not None:
        return isinstance(plain, Tensor) and (plain.shape, plain.device) == (p.shape, p.device)
    return broken(state, name, p, signed) is None


def broken(state: dict[str, Any], name: str, p: Tensor, signed: bool) -> tuple[str, str] | None:
    """What keeps the codes of the state ``name`` from being those of ``p``, and how to mend it; or None."""
    fix = "load a checkpoint of this model, or delete the parameter's state to start anew"
    if p.is_complex():
        return f"state '{name}' is in codes of real numbers, and the parameter is {p.dtype}", fix
    for key, dtype, shape in (
        (name + "_codes", torch.int8 if signed else torch.uint8, list(p.shape)),
        (name + "_scales", torch.float32, [-(-p.numel() // BLOCK)]),
    ):
        t = state.get(key)
        if not isinstance(t, Tensor):
            return f"its state has {sorted(map(str, state))}, and '{key}' is {type(t).__name__}", fix
        if t.dtype != dtype or list(t.shape) != shape:
            return f"state '{key}' is {t.dtype} of shape {list(t.shape)}, expected {dtype} of {shape}", fix
        if t.device != p.device:
            return f"state '{key}' is on {t.device}, parameter on {p.device}", f"move it to {p.device}"
    return None


def _lie_alike(codes: Tensor, p: Tensor) -> bool:
    """Whether codes lie in the order of the parameter's elements, without holes."""
    expected = 1
    for d in sorted((d for d in range(p.dim()) if p.shape[d] != 1), key=lambda d: p.stride(d)):
        if codes.stride(d) != expected:
            return p.numel() == 0
        expected *= p.shape[d]
    return True


def convert(state: dict[str, Any], name: str, p: Tensor, dtype: torch.dtype | None, signed: bool) -> None:
    """Stores ``name`` anew, as ``dtype`` asks for it. None: codes become float32, in the place of float32 itself."""
    values = read(state, name)
    for suffix in ("", "_codes", "_scales"):
        state.pop(name + suffix, None)
    if dtype != torch.int8:
        state[name] = values.to(dtype or values.dtype)
        return
    state.update(make(p, name, 0.0, dtype, signed))
    write(state, name, p, values.float())
    # A block that waits for its first gradient goes on to.
    waits = _blocks((flat(values, p) != 0) | ~flat(values, p).signbit()).any(1).logical_not()
    state[name + "_scales"].masked_fill_(waits, -0.0)


def names_in(state: dict[str, Any]) -> Collection[str]:
    """The states that are stored in codes."""
    return [name.removesuffix("_codes") for name in state if str(name).endswith("_codes")]
