"""Quantization-aware training: :func:`fake_quantize` rounds as codes would, and lets gradients straight through.

The operator behind it gives torch's numbers where torch has such a function: ``round(x * (1 / scale))``, ties to even,
the inverse in float32 also for float64. Where torch casts out-of-range numbers to integers (infinity, 1e30), which C++
leaves undefined, this clamps.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from . import ops
from .form import Form, check_form, check_input, check_nonfinite, check_tensors
from .ops import _HOW, _library, _operator

_WHERE = "fake_quantize"
_TINY, _HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_LARGEST_CODE = 2**23  # so that codes and their differences are exact in float32
_POINT_DTYPES = (torch.int32, torch.int8, torch.uint8, torch.int16, torch.int64)


def _checked(
    x: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bits: int,
    scheme: str,
    axis: int,
    block_size: int,
    symmetric: bool,
    quant_min: int,
    quant_max: int,
    nonfinite: str,
) -> Form:
    """What can be told without looking at numbers on a device."""
    check_input(_WHERE, x)
    check_nonfinite(_WHERE, nonfinite)
    form = check_form(_WHERE, x.shape, bits, scheme, axis, block_size, symmetric)
    if scale is None:
        return form
    if scale.dtype != torch.float32:
        raise TypeError(f"{_WHERE}: scale must be float32, got {scale.dtype}; pass scale.float()")
    if zero_point is not None and zero_point.dtype not in _POINT_DTYPES:
        raise TypeError(f"{_WHERE}: zero_point must be of integers, got {zero_point.dtype}; pass zero_point.int()")
    if not -_LARGEST_CODE <= quant_min < quant_max <= _LARGEST_CODE:
        raise ValueError(
            f"{_WHERE}: quant_min must be below quant_max and both within -2**23 and 2**23, "
            f"got {quant_min} and {quant_max}"
        )
    units = form.units(x.shape)
    for name, t in (("scale", scale), ("zero_point", zero_point)):
        if t is None:
            continue
        if t.device != x.device:
            raise ValueError(f"{_WHERE}: {name} is on {t.device} and x on {x.device}; move one of them")
        if t.layout != torch.strided:
            raise TypeError(f"{_WHERE}: {name} must be dense, got {t.layout}")
        if t.numel() != units or t.dim() > 1:
            what = {"channel": f"of axis {form.axis}", "block": f"of {form.block_size}-element blocks"}.get(scheme, "")
            raise ValueError(
                f"{_WHERE}: {name} must have {units} element{'s' * (units != 1)} in at most one dimension for scheme "
                f"{scheme!r} {what}".rstrip()
                + f" and x of shape {list(x.shape)}, got shape {list(t.shape)}"
            )
    return form


def _refuse_values(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> None:
    wrong = ~(scale >= _TINY) | (scale > _HUGE)
    if bool(wrong.any()):
        value = scale.reshape(-1)[wrong.reshape(-1)][0].item()
        raise ValueError(f"{_WHERE}: every scale must be finite and at least {_TINY:.2g}, got {value}")
    if zero_point is not None:
        wrong = (zero_point < quant_min) | (zero_point > quant_max)
        if bool(wrong.any()):
            value = zero_point.reshape(-1)[wrong.reshape(-1)][0].item()
            raise ValueError(f"{_WHERE}: zero_point must be from {quant_min} to {quant_max}, got {value}")
    elif not quant_min <= 0 <= quant_max:
        raise ValueError(f"{_WHERE}: 0 is not from {quant_min} to {quant_max}; pass a zero_point that is")
    # The lowest and highest are NaN where any is, and take one pass and no memory.
    if x.numel() and not bool(torch.stack(x.aminmax()).isfinite().all()):
        count = int((~x.isfinite()).sum())
        raise ValueError(
            f"{_WHERE}: x (shape {list(x.shape)}) has {count} elements that are NaN or infinite; mend them, or pass "
            "nonfinite='propagate'"
        )


def _with_scale(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, form: Form, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32

    def spread(t: Tensor) -> Tensor:
        """One number a unit, so that it broadcasts with ``x``."""
        if form.scheme == "tensor":
            return t.reshape(())
        if form.scheme == "channel":
            return t.reshape([-1 if i == form.axis else 1 for i in range(x.dim())])
        return t.reshape(-1).repeat_interleave(form.block_size)[: x.numel()].view(x.shape)

    scale = torch.where((scale >= _TINY) & (scale <= _HUGE), scale, torch.nan)
    inverse = torch.ones_like(scale) / scale
    zero = torch.zeros_like(scale, dtype=compute) if zero_point is None else zero_point.to(compute)
    low, high = spread(quant_min - zero), spread(quant_max - zero)
    y = (x.to(compute) * spread(inverse).to(compute)).round_()
    mask = (y >= low) & (y <= high)
    # Adding 0.0: a code has no sign of zero.
    y = torch.minimum(torch.maximum(y, low), high).add_(0.0).mul_(spread(scale).to(compute))
    largest = torch.finfo(x.dtype).max
    return y.clamp_(-largest, largest).to(x.dtype), mask


def _fake(x: Tensor, scale: Tensor | None, *how: Any) -> tuple[Tensor, Tensor]:
    _checked(x, scale, *how)
    if scale is None:
        return x.new_empty(x.shape), x.new_empty(0, dtype=torch.bool)
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


@_operator(
    f"(Tensor x, Tensor? scale, Tensor? zero_point, {_HOW}, bool symmetric, int quant_min, int quant_max, "
    "str nonfinite) -> (Tensor, Tensor)",
    _fake,
)
def fake_quantize_cachemask(
    x: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bits: int,
    scheme: str,
    axis: int,
    block_size: int,
    symmetric: bool,
    quant_min: int,
    quant_max: int,
    nonfinite: str,
) -> tuple[Tensor, Tensor]:
    """(numbers, where gradients pass): the latter is empty without ``scale``, as they pass everywhere."""
    form = _checked(x, scale, zero_point, bits, scheme, axis, block_size, symmetric, quant_min, quant_max, nonfinite)
    x = x.detach()
    if scale is None:
        codes, found, point = ops.quantize(x, *form, nonfinite, None)
        y = ops.dequantize(codes, found, None if symmetric else point, x.shape, x.dtype, *form[:4])
        return y, x.new_empty(0, dtype=torch.bool)
    if nonfinite == "error":
        _refuse_values(x, scale, zero_point, quant_min, quant_max)
    return _with_scale(x, scale.detach(), zero_point, form, quant_min, quant_max)


def _keep_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.everywhere = inputs[1] is None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _straight_through(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    return (grad if ctx.everywhere else grad * ctx.saved_tensors[0], *[None] * 10)


torch.library.register_autograd(
    "genopt_ext::fake_quantize_cachemask", _straight_through, setup_context=_keep_mask, lib=_library
)


def _code(name: str, value: Any, default: int) -> int:
    if value is None:
        return default
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{_WHERE}: {name} must be an integer or None, got {value!r}")


def _scale_tensor(x: Tensor, scale: Any) -> Tensor:
    if isinstance(scale, Tensor):
        return scale.detach()
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"{_WHERE}: scale must be a number, a tensor or None, got {type(scale).__name__}")
    if not _TINY <= scale <= _HUGE:
        raise ValueError(f"{_WHERE}: scale must be finite and at least {_TINY:.2g}, got {scale}")
    return torch.full((), scale, dtype=torch.float32, device=x.device)


def fake_quantize(
    x: Tensor,
    scale: Tensor | float | None = None,
    zero_point: Tensor | int | None = None,
    *,
    bits: int = 8,
    scheme: str = "tensor",
    axis: int = 0,
    block_size: int = 256,
    symmetric: bool | None = None,
    quant_min: int | None = None,
    quant_max: int | None = None,
    nonfinite: str = "error",
) -> Tensor:
    """What ``x`` would be after quantization and back, with a straight-through gradient.

    Without ``scale`` it is ``dequantize(quantize(x, ...))``, to the bit: scales fit the numbers, nothing is clamped,
    and the gradient of ``x`` is that of the result. This is the one for weights.

    With ``scale`` (of an observer, say) it is ``(code - zero_point) * scale``, where ``code = round(x * (1 / scale)) +
    zero_point``, ties to even, is clamped to ``quant_min`` and ``quant_max``; the gradient is 0 where it was clamped.
    These are the numbers and gradients of :func:`torch.fake_quantize_per_tensor_affine` and, with ``scheme="channel"``,
    :func:`torch.fake_quantize_per_channel_affine`. Results beyond the dtype are its largest
    finite number, not infinite; and float64 is not rounded to float32, as the former does.

    ``scale`` and ``zero_point`` get no gradient. Traces under ``torch.compile(fullgraph=True)``.

    Args:
        x: float32, bfloat16, float16 or float64; any shape and strides.
        scale: a number or float32 tensor: one element for ``"tensor"``, else 1-D, one for each index of ``axis`` or
            each block. None: found as :func:`~genopt_ext.quant.quantize` does.
        zero_point: an integer or a tensor of integers with as many elements, from ``quant_min`` to ``quant_max``.
            None: 0. Only with ``scale``.
        bits: 8 or 4; with ``quant_min`` and ``quant_max`` it does not count.
        scheme, axis, block_size: what shares a scale, see :func:`~genopt_ext.quant.quantize`.
        symmetric: None: whether there is no ``zero_point``. With ``scale`` it can be nothing else.
        quant_min, quant_max: the lowest and highest code, at most 2**23 in size; None: those of
            :func:`~genopt_ext.quant.quantize`, -127 (asymmetric -128) and 127 with 8 bits. Only with ``scale``.
        nonfinite: ``"error"`` refuses NaN and infinity in ``x``, and scales and zero points out of range; this waits
            for a GPU. ``"propagate"`` does not look at values: without ``scale`` all that shares one with NaN or
            infinity becomes NaN; with it, NaN stays NaN, infinity is clamped, and a bad scale makes its unit NaN.

    Returns:
        A tensor of the shape and dtype of ``x``; contiguous without ``scale``.

    Raises:
        TypeError: ``x``, ``scale`` or ``zero_point`` is of a wrong type, dtype or layout.
        ValueError: an option has a wrong value; scales are not as many as needed, on another device, not positive and
            finite; NaN or infinity in ``x``.
    """
    check_tensors(_WHERE, x=x)
    if scale is None:
        for name, value in (("zero_point", zero_point), ("quant_min", quant_min), ("quant_max", quant_max)):
            if value is not None:
                raise ValueError(f"{_WHERE}: {name} goes with scale only; pass both or neither")
        symmetric = True if symmetric is None else symmetric
    elif symmetric is None:
        symmetric = zero_point is None
    elif symmetric != (zero_point is None):
        expected = "no zero_point" if symmetric else "a zero_point"
        raise ValueError(f"{_WHERE}: symmetric={symmetric} with a scale expects {expected}; leave symmetric out")
    form = check_form(_WHERE, x.shape, bits, scheme, axis, block_size, symmetric)
    low, high = _code("quant_min", quant_min, form.lowest), _code("quant_max", quant_max, form.highest)
    given = None if scale is None else _scale_tensor(x, scale)
    point: Tensor | None = None
    if isinstance(zero_point, Tensor):
        point = zero_point
    elif zero_point is not None:
        value = _code("zero_point", zero_point, 0)
        if not low <= value <= high:
            raise ValueError(f"{_WHERE}: zero_point must be from {low} to {high}, got {value}")
        assert given is not None
        point = torch.full_like(given, value, dtype=torch.int32)
    result: Tensor = fake_quantize_cachemask(x, given, point, *form, low, high, nonfinite)[0]
    return result
