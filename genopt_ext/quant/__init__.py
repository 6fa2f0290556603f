"""Numbers in 8 or 4 bits: :func:`quantize`, :func:`dequantize`, :class:`QuantizedTensor`.

    q = genopt_ext.quant.quantize(weight, bits=4, scheme="block", block_size=64)
    weight = genopt_ext.quant.dequantize(q)

The same bits on every device, instruction set and number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .form import QuantizedTensor, check_dtype, check_form, check_input, check_parts, check_rounding

__all__ = ["QuantizedTensor", "dequantize", "quantize"]


def _draw_seed(generator: torch.Generator | None) -> Tensor:
    """64 random bits, on the generator's device; the default generator is the CPU's, whatever device is quantized."""
    device = "cpu" if generator is None else generator.device
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, generator=generator, device=device)


def quantize(
    x: Tensor,
    *,
    bits: int = 8,
    scheme: str = "tensor",
    axis: int = 0,
    block_size: int = 256,
    symmetric: bool = True,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
    nonfinite: str = "error",
    out: Sequence[Tensor | None] | None = None,
) -> QuantizedTensor:
    """Codes of 8 or 4 bits for the numbers in ``x``, and the scales behind them."""
    where = "quantize"
    check_input(where, x)
    form = check_form(where, x.shape, bits, scheme, axis, block_size, symmetric)
    check_rounding(where, rounding, nonfinite)
    seed = _draw_seed(generator) if rounding == "stochastic" else None
    scale, zero_point = reference.scales(x, form)
    if nonfinite == "error" and bool(scale.isnan().any()):
        raise ValueError(f"{where}: x has NaN or infinity; pass nonfinite='propagate' to let their units become NaN")
    codes = reference.encode(x, form, scale, zero_point, rounding, seed)
    return QuantizedTensor(
        codes,
        scale,
        zero_point,
        form.bits,
        form.scheme,
        form.axis if scheme == "channel" else None,
        form.block_size if scheme == "block" else None,
        x.shape,
        x.dtype,
    )


def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """The numbers behind codes: ``(code - zero_point) * scale``, in the shape of what was quantized."""
    where = "dequantize"
    dtype = q.dtype if dtype is None else dtype
    check_dtype(where, "dtype", dtype)
    check_parts(where, q.form, q.shape, *q[:3])
    return reference.dequantize(q.codes, q.scale, q.zero_point, q.form, q.shape, dtype)
