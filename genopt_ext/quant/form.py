"""How numbers become codes: the options of a quantization, checked, and the tensors that come out of it."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BITS = (8, 4)
SCHEMES = ("tensor", "channel", "block")
NONFINITE = ("error", "propagate")
SMALLEST_BLOCK, LARGEST_BLOCK = 32, 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPE_NAMES = "float32, bfloat16, float16 and float64"


class Form(NamedTuple):
    """What codes mean, beside the tensors themselves. A *unit* is what shares one scale."""

    bits: int
    scheme: str
    axis: int  # of scheme "channel", not negative
    block_size: int  # of scheme "block"
    symmetric: bool

    @property
    def lowest(self) -> int:
        """The lowest code."""
        return -(2 ** (self.bits - 1)) + self.symmetric

    @property
    def highest(self) -> int:
        """The highest code."""
        return int(2 ** (self.bits - 1)) - 1

    def units(self, shape: Sequence[int]) -> int:
        """How many scales a tensor of this shape has."""
        if self.scheme == "tensor":
            return 1
        if self.scheme == "channel":
            return shape[self.axis]
        return -(-math.prod(shape) // self.block_size)

    def run(self, shape: Sequence[int]) -> int:
        """Element i in row-major order belongs to unit ``i // run % units``."""
        if self.scheme == "tensor":
            return max(1, math.prod(shape))
        if self.scheme == "channel":
            return max(1, math.prod(shape[self.axis + 1 :]))
        return self.block_size

    def codes_shape(self, shape: Sequence[int]) -> list[int]:
        return list(shape) if self.bits == 8 else [(math.prod(shape) + 1) // 2]

    def scale_shape(self, shape: Sequence[int]) -> list[int]:
        return [] if self.scheme == "tensor" else [self.units(shape)]

    @property
    def codes_dtype(self) -> torch.dtype:
        return torch.int8 if self.bits == 8 else torch.uint8


class QuantizedTensor(NamedTuple):
    """Codes, the scales that give them their size, and how they were made.

    A plain tuple: it saves with :func:`torch.save` and loads with ``weights_only=True`` once ``genopt_ext.quant`` is
    imported. The number behind a code is ``(code - zero_point) * scale``, see :func:`genopt_ext.quant.dequantize`.

    Attributes:
        codes: 8 bits: ``torch.int8``, contiguous, in the shape of the input. 4 bits: ``torch.uint8``, 1-D: the codes in
            row-major order, two a byte, the first in the low half, each in two's complement; an odd number is padded
            with 0.
        scale: ``torch.float32``: 0-dim for scheme ``"tensor"``; 1-D, one for each index of ``axis``, for ``"channel"``;
            1-D, one for each ``block_size`` consecutive elements in row-major order, the last one for what is left,
            for ``"block"``. NaN where the input had NaN or infinity and ``nonfinite="propagate"`` let it pass.
        zero_point: ``torch.int8`` in the shape of ``scale``: the code of 0.0; None if symmetric (it is 0).
        bits: 8 or 4.
        scheme: ``"tensor"``, ``"channel"`` or ``"block"``.
        axis: of scheme ``"channel"``, not negative; None for others.
        block_size: of scheme ``"block"``; None for others.
        shape: of the input.
        dtype: of the input, and of what :func:`~genopt_ext.quant.dequantize` returns unless told otherwise.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    scheme: str
    axis: int | None
    block_size: int | None
    shape: torch.Size
    dtype: torch.dtype

    @property
    def symmetric(self) -> bool:
        """Whether codes are centered on zero."""
        return self.zero_point is None

    @property
    def form(self) -> Form:
        """The options alone."""
        return Form(self.bits, self.scheme, self.axis or 0, self.block_size or 0, self.zero_point is None)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points together."""
        return sum(t.nbytes for t in self[:3] if t is not None)

    def to(self, device: torch.device | str | int) -> QuantizedTensor:
        """The same on another device."""
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return self._replace(codes=self.codes.to(device), scale=self.scale.to(device), zero_point=zero_point)

    def __repr__(self) -> str:
        how = {"channel": f", axis={self.axis}", "block": f", block_size={self.block_size}"}.get(self.scheme, "")
        return (
            f"QuantizedTensor(shape={list(self.shape)}, dtype={self.dtype}, bits={self.bits}, "
            f"scheme={self.scheme!r}{how}, symmetric={self.symmetric}, device={self.codes.device})"
        )


QuantizedTensor.__module__ = "genopt_ext.quant"  # files name it so, wherever it stands
torch.serialization.add_safe_globals([QuantizedTensor])


def _integer(where: str, name: str, value: Any) -> int:
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{where}: {name} must be an integer, got {value!r}")


def check_choice(where: str, name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raises ValueError unless the value is one of those allowed."""
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"{where}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_form(
    where: str, shape: Sequence[int], bits: Any, scheme: Any, axis: Any, block_size: Any, symmetric: Any
) -> Form:
    """The options as a :class:`Form`, with ``axis`` counted from the front; what a scheme does not use becomes 0.

    Raises:
        TypeError, ValueError: an option that is of the wrong type or not one of those allowed.
    """
    check_choice(where, "bits", bits, BITS)
    check_choice(where, "scheme", scheme, SCHEMES)
    if not isinstance(symmetric, bool):
        raise TypeError(f"{where}: symmetric must be True or False, got {symmetric!r}")
    axis, block_size = _integer(where, "axis", axis), _integer(where, "block_size", block_size)
    if scheme == "channel":
        if not -len(shape) <= axis < len(shape):
            allowed = f"from {-len(shape)} to {len(shape) - 1}" if shape else "none, as it has no dimensions"
            raise ValueError(
                f"{where}: axis {axis} is not one of a tensor of shape {list(shape)} ({allowed}); "
                "pass another axis or scheme"
            )
        axis %= len(shape)
    elif scheme == "block" and (block_size & (block_size - 1) or not SMALLEST_BLOCK <= block_size <= LARGEST_BLOCK):
        raise ValueError(
            f"{where}: block_size must be a power of two from {SMALLEST_BLOCK} to {LARGEST_BLOCK}, got {block_size}"
        )
    return Form(bits, scheme, axis if scheme == "channel" else 0, block_size if scheme == "block" else 0, symmetric)


def check_tensors(where: str, **named: Any) -> None:
    """Raises TypeError unless all are tensors."""
    for name, t in named.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{where}: {name} must be a tensor, got {type(t).__name__}")


def check_dtype(where: str, name: str, dtype: Any) -> None:
    """Raises TypeError unless ``dtype`` is one that can be quantized."""
    if dtype not in DTYPES:
        raise TypeError(f"{where}: {name} must be one of {_DTYPE_NAMES}, got {dtype}; convert it first")


def check_input(where: str, x: Any) -> None:
    """Raises TypeError unless ``x`` is a tensor that can be quantized."""
    check_tensors(where, x=x)
    if x.layout != torch.strided:
        raise TypeError(f"{where}: x must be dense or strided, got {x.layout}; convert it with x.to_dense()")
    check_dtype(where, "the dtype of x", x.dtype)


def check_nonfinite(where: str, nonfinite: Any) -> None:
    """Raises ValueError unless it is a known policy."""
    check_choice(where, "nonfinite", nonfinite, NONFINITE)


def check_part(
    where: str, name: str, t: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device, like: str
) -> None:
    """Raises unless ``t`` is a contiguous tensor of this shape and dtype, and on the device of ``like``."""
    check_tensors(where, **{name: t})
    if t.dtype != dtype:
        raise TypeError(f"{where}: {name} must be {dtype}, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{where}: {name} is on {t.device} and {like} on {device}; move one of them")
    if list(t.shape) != list(shape):
        raise ValueError(f"{where}: {name} must have shape {list(shape)}, got {list(t.shape)}")
    if t.layout != torch.strided or not t.is_contiguous():
        raise ValueError(f"{where}: {name} must be contiguous, got strides {t.stride()}; pass {name}.contiguous()")


def check_parts(
    where: str, form: Form, shape: Sequence[int], codes: Any, scale: Any, zero_point: Any, like: Tensor | None = None
) -> None:
    """Raises unless codes, scales and zero points are those of a tensor of this shape.

    ``like``: a tensor on whose device they have to be; None: that of ``codes``.
    """
    check_tensors(where, codes=codes)
    device, name = (codes.device, "codes") if like is None else (like.device, "x")
    check_part(where, "codes", codes, form.codes_shape(shape), form.codes_dtype, device, name)
    check_part(where, "scale", scale, form.scale_shape(shape), torch.float32, device, name)
    if form.symmetric != (zero_point is None):
        expected = "None for symmetric codes" if form.symmetric else "a tensor for asymmetric codes"
        raise ValueError(f"{where}: zero_point must be {expected}, got {type(zero_point).__name__}")
    if zero_point is not None:
        check_part(where, "zero_point", zero_point, form.scale_shape(shape), torch.int8, device, name)


def check_out(where: str, form: Form, out: Any) -> tuple[Any, Any, Any]:
    """``out`` as codes, scale and zero point or None; raises unless there are as many as the form needs."""
    if isinstance(out, QuantizedTensor):
        return out[:3]
    expected = 3 - form.symmetric
    if isinstance(out, Tensor) or not isinstance(out, Sequence):
        raise TypeError(f"{where}: out must be a sequence of tensors, got {type(out).__name__}")
    if len(out) not in (expected, 3):
        names = "codes and scale" if form.symmetric else "codes, scale and zero_point"
        raise ValueError(f"{where}: out must be {names}, {expected} tensors, got {len(out)}")
    return (*out, None)[:3]
