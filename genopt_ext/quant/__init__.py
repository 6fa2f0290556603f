"""Numbers in 8 or 4 bits: :func:`quantize`, :func:`dequantize`, :class:`QuantizedTensor`.

Training for them: :func:`fake_quantize`. The weights of a whole model: :func:`quantize_module_`.

    q = genopt_ext.quant.quantize(weight, bits=4, scheme="block", block_size=64)
    weight = genopt_ext.quant.dequantize(q)

The same bits on every device, instruction set and number of threads, and from plain torch where there are no kernels.
Both trace under ``torch.compile(fullgraph=True)``, as ``torch.ops.genopt_ext.quantize`` and ``dequantize``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .fake import fake_quantize
from .form import QuantizedTensor, check_choice, check_form, check_input, check_out, check_tensors
from .modules import QuantizationReport, quantize_module_

__all__ = [
    "QuantizationReport",
    "QuantizedTensor",
    "dequantize",
    "fake_quantize",
    "quantize",
    "quantize_module_",
]


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
    """Codes of 8 or 4 bits for the numbers in ``x``, and the scales behind them.

    A number becomes ``round(x * (1 / scale)) + zero_point``, never beyond the lowest or highest code: -127 to 127 with
    8 bits and -7 to 7 with 4, one lower if asymmetric. ``scale`` is the largest magnitude over the highest code; if
    asymmetric the range of ``x``, 0 included, over the number of steps between codes, and then 0.0 has a code of its
    own, ``zero_point``. So each number comes back with an error of half a scale at most (a scale, if stochastic),
    beside float rounding. The arithmetic is float32, for float64 double; scales are float32.

    Blocks take one pass over memory, tensors and channels two. The result is not differentiable.

    Args:
        x: float32, bfloat16, float16 or float64; any shape and strides, also empty or 0-dim.
        bits: 8, or 4: two codes a byte.
        scheme: what shares a scale: the whole ``"tensor"``; each index of ``axis`` (``"channel"``); ``block_size``
            consecutive elements in row-major order (``"block"``), the last of which may be fewer.
        axis: for ``"channel"``; may be negative. Else ignored.
        block_size: for ``"block"``: a power of two from 32 to 4096. Else ignored.
        symmetric: codes centered on zero; False makes better use of them where numbers are mostly of one sign.
        rounding: ``"nearest"``, ties to even; or ``"stochastic"``: up as often as the number is nearer to there, so
            that the mean of many results is ``x``.
        generator: for ``"stochastic"``: one 64-bit seed is drawn from it; the random bits depend on that and an
            element's index alone, and are the same on every device. None: torch's default generator of the CPU. One on
            ``x``'s GPU is not waited for. Under ``torch.compile``: None.
        nonfinite: what NaN and infinity do: ``"error"`` refuses them; this waits for a GPU, and reads blocks once more
            if ``out`` is given, so that nothing is written before. ``"propagate"`` makes their unit's scale NaN and its
            codes 0, so that all of it comes back as NaN. A float64 unit beyond the scales of float32 (4e40) counts as
            infinite.
        out: tensors to write into: codes, scale and, if asymmetric, zero point, as they would be made, with memory of
            their own; or a :class:`QuantizedTensor`.

    Returns:
        What :func:`dequantize` takes. All-zero units come back as exact zeros. A scale is never below the smallest
        normal float32, 1.2e-38, so denormal numbers give no infinities; they come back rounded to multiples of it.

    Raises:
        TypeError: ``x`` is of another dtype or layout; an option or a tensor in ``out`` is of a wrong type.
        ValueError: an option has a wrong value; NaN or infinity; tensors in ``out`` of another shape, on another
            device, not contiguous or sharing memory. Nothing has been written then.
    """
    where = "quantize"
    check_input(where, x)
    check_choice(where, "rounding", rounding, ("nearest", "stochastic"))
    form = check_form(where, x.shape, bits, scheme, axis, block_size, symmetric)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{where}: generator must be a torch.Generator or None, got {type(generator).__name__}")
    given = None if out is None else check_out(where, form, out)
    seed = _draw_seed(generator) if rounding == "stochastic" else None
    if given is None:
        codes, scale, zero_point = ops.quantize(x.detach(), *form, nonfinite, seed)
    else:
        codes, scale, zero_point = given
        ops.quantize_out(x.detach(), codes, scale, zero_point, *form, nonfinite, seed)
    return QuantizedTensor(
        codes,
        scale,
        None if form.symmetric else zero_point,
        form.bits,
        form.scheme,
        form.axis if form.scheme == "channel" else None,
        form.block_size if form.scheme == "block" else None,
        x.shape,
        x.dtype,
    )


def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """The numbers behind codes: ``(code - zero_point) * scale``, in the shape of what was quantized.

    Args:
        q: from :func:`quantize`.
        dtype: float32, bfloat16, float16 or float64; None: that of what was quantized.
        out: a contiguous tensor of that shape and dtype to write into.

    Returns:
        A contiguous tensor, or ``out``. No number is beyond the largest finite one of its dtype; NaN where its scale
        is.

    Raises:
        TypeError: ``q`` is none, or its tensors or ``dtype`` are of a wrong dtype.
        ValueError: the tensors in ``q`` do not fit together, or ``out`` does not fit.
    """
    where = "dequantize"
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"{where}: q must be a QuantizedTensor, got {type(q).__name__}")
    check_tensors(where, codes=q.codes, scale=q.scale)
    how = q.bits, q.scheme, q.axis or 0, q.block_size or 0
    if out is None:
        return ops.dequantize(q.codes, q.scale, q.zero_point, q.shape, q.dtype if dtype is None else dtype, *how)
    check_tensors(where, out=out)
    if dtype is not None and out.dtype != dtype:
        raise TypeError(f"{where}: out is {out.dtype} and dtype {dtype}; pass one of them")
    ops.dequantize_out(q.codes, q.scale, q.zero_point, q.shape, out, *how)
    return out
