"""``torch.ops.genopt_ext.quantize``, ``dequantize`` and their ``_out`` twins: checks, then kernels or the reference.

They have fake kernels, so they trace under ``torch.compile`` and ``torch.export``; what looks at values (``nonfinite``)
does so when they run. Codes are stochastic where a seed is given, a 1-element int64 tensor on the CPU or the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from ..reference import quantize as reference
from .form import Form, check_dtype, check_form, check_input, check_nonfinite, check_part, check_parts

# Puts less between a call and its work than torch.library.custom_op: 13 instead of 50 us.
_library = torch.library.Library("genopt_ext", "FRAGMENT")

_HOW = "int bits, str scheme, SymInt axis, SymInt block_size"
_QUANTIZE = f"{_HOW}, bool symmetric, str nonfinite, Tensor? seed"
_DEQUANTIZE = f"Tensor codes, Tensor scale, Tensor? zero_point, SymInt[] shape, ScalarType dtype, {_HOW}"


def _kernels(t: Tensor) -> Any:
    """The native module where its kernels serve the tensor; else None."""
    if _backend.resolve("auto") == "reference":
        return None
    assert _backend.native is not None
    return _backend.native if _backend.native.kernels_for(t) else None


def _checked(
    where: str,
    x: Tensor,
    bits: int,
    scheme: str,
    axis: int,
    block_size: int,
    symmetric: bool,
    nonfinite: str,
    seed: Tensor | None,
) -> Form:
    check_input(where, x)
    check_nonfinite(where, nonfinite)
    if seed is not None:
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"{where}: seed must be one int64, got shape {list(seed.shape)}, {seed.dtype}")
        if seed.device.type != "cpu" and seed.device != x.device:
            raise ValueError(
                f"{where}: the generator is on {seed.device} and x on {x.device}; take one on x's device or the CPU"
            )
    return check_form(where, x.shape, bits, scheme, axis, block_size, symmetric)


def _new(x: Tensor, form: Form) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and zero point to be written."""
    codes = x.new_empty(form.codes_shape(x.shape), dtype=form.codes_dtype)
    scale = x.new_empty(form.scale_shape(x.shape), dtype=torch.float32)
    return codes, scale, None if form.symmetric else torch.empty_like(scale, dtype=torch.int8)


def _refuse_nonfinite(where: str, x: Tensor, scale: Tensor) -> None:
    if not bool(scale.isnan().any()):
        return
    wrong = (~x.isfinite()).reshape(-1).nonzero()
    if wrong.numel():
        i = int(wrong[0])
        what = f"{len(wrong)} elements that are NaN or infinite, the first at {i} ({x.reshape(-1)[i].item()})"
    else:
        what = "numbers too large for a scale in float32"
    raise ValueError(
        f"{where}: x (shape {list(x.shape)}) has {what}; mend them, or pass nonfinite='propagate', and what shares "
        "their scale becomes NaN"
    )


def _find_scales(x: Tensor, form: Form, nonfinite: str, native: Any) -> tuple[Tensor, Tensor | None]:
    """In new tensors: nothing else has been written when a number is refused. ``x`` is contiguous."""
    if native is None:
        scale, zero_point = reference.scales(x, form)
    else:
        _, scale, zero_point = _new(x.new_empty(()).expand(x.shape), form)
        how = {"bits": form.bits, "run": form.run(x.shape)}
        if form.scheme == "block":
            native.quantize_blocks(x, None, scale, zero_point, None, **how)
        else:
            ranges = torch.zeros(2 * scale.numel(), dtype=torch.int64, device=x.device) if native.has_cuda else None
            native.find_scales(x, scale, zero_point, ranges, **how)
    if nonfinite == "error":
        _refuse_nonfinite("quantize", x, scale)
    return scale, zero_point


def _quantize_into(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    form: Form,
    nonfinite: str,
    seed: Tensor | None,
    fresh: bool,
) -> None:
    """``fresh``: nobody sees what is written if a number is refused."""
    native = _kernels(x)
    x = x.detach().contiguous()
    if native is not None and form.scheme == "block" and (fresh or nonfinite == "propagate"):
        native.quantize_blocks(x, codes, scale, zero_point, seed, bits=form.bits, run=form.run(x.shape))
        if nonfinite == "error":
            _refuse_nonfinite("quantize", x, scale)
        return
    found, point = _find_scales(x, form, nonfinite, native)
    scale.copy_(found)
    if zero_point is not None and point is not None:
        zero_point.copy_(point)
    if native is None:
        codes.copy_(reference.encode(x, form, scale, zero_point, "nearest" if seed is None else "stochastic", seed))
    else:
        native.encode(x, codes, scale, zero_point, seed, bits=form.bits, run=form.run(x.shape))


def _extent(t: Tensor) -> tuple[int, int]:
    """The first address of a tensor and the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.itemsize if t.numel() else t.data_ptr()


def _check_overlaps(where: str, named: dict[str, Tensor | None]) -> None:
    """Raises ValueError where two of the tensors may share memory."""
    spans = sorted((*_extent(t), name) for name, t in named.items() if t is not None and t.numel())
    for (_, end, first), (begin, _, second) in zip(spans, spans[1:], strict=False):
        if begin < end:
            raise ValueError(f"{where}: {first} and {second} share memory; pass tensors with memory of their own")


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """The function below as an operator: its name in torch, what runs on every device, and what is traced."""

    def define(run: Callable[..., Any]) -> Any:
        name = run.__name__
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"genopt_ext::{name}", fake, lib=_library)
        return getattr(torch.ops.genopt_ext, name).default

    return define


def _fake_quantize(x: Tensor, *how: Any) -> tuple[Tensor, Tensor, Tensor]:
    form = _checked("quantize", x, *how)
    codes, scale, zero_point = _new(x, form)
    return codes, scale, scale.new_empty(0, dtype=torch.int8) if zero_point is None else zero_point


def _fake_quantize_out(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, *how: Any) -> None:
    check_parts("quantize: out", _checked("quantize", x, *how), x.shape, codes, scale, zero_point, like=x)


def _fake_dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, shape: Sequence[int], dtype: torch.dtype, *how: Any
) -> Tensor:
    _decoded_form(codes, scale, zero_point, shape, dtype, *how)
    return codes.new_empty(shape, dtype=dtype)


def _fake_dequantize_out(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, shape: Sequence[int], out: Tensor, *how: Any
) -> None:
    _decoded_form(codes, scale, zero_point, shape, out.dtype, *how)
    check_part("dequantize", "out", out, shape, out.dtype, codes.device, "codes")


@_operator(f"(Tensor x, {_QUANTIZE}) -> (Tensor, Tensor, Tensor)", _fake_quantize)
def quantize(
    x: Tensor,
    bits: int,
    scheme: str,
    axis: int,
    block_size: int,
    symmetric: bool,
    nonfinite: str,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, zero point): the last one is empty if symmetric."""
    form = _checked("quantize", x, bits, scheme, axis, block_size, symmetric, nonfinite, seed)
    codes, scale, zero_point = _new(x, form)
    _quantize_into(x, codes, scale, zero_point, form, nonfinite, seed, fresh=True)
    return codes, scale, scale.new_empty(0, dtype=torch.int8) if zero_point is None else zero_point


@_operator(
    f"(Tensor x, Tensor(a!) codes, Tensor(b!) scale, Tensor(c!)? zero_point, {_QUANTIZE}) -> ()",
    _fake_quantize_out,
)
def quantize_out(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    scheme: str,
    axis: int,
    block_size: int,
    symmetric: bool,
    nonfinite: str,
    seed: Tensor | None,
) -> None:
    """The same into given tensors."""
    form = _checked("quantize", x, bits, scheme, axis, block_size, symmetric, nonfinite, seed)
    check_parts("quantize: out", form, x.shape, codes, scale, zero_point, like=x)
    _check_overlaps("quantize", {"x": x, "codes": codes, "scale": scale, "zero_point": zero_point})
    _quantize_into(x, codes, scale, zero_point, form, nonfinite, seed, fresh=False)
    for written in (codes, scale, zero_point):
        if written is not None:
            torch.autograd.graph.increment_version(written)  # kernels tell autograd nothing


def _decoded_form(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    bits: int,
    scheme: str,
    axis: int,
    block_size: int,
) -> Form:
    check_dtype("dequantize", "dtype", dtype)
    form = check_form("dequantize", shape, bits, scheme, axis, block_size, zero_point is None)
    check_parts("dequantize", form, shape, codes, scale, zero_point)
    return form


def _dequantize_into(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, form: Form, shape: Sequence[int], out: Tensor
) -> None:
    native = _kernels(codes)
    if native is None:
        out.copy_(reference.dequantize(codes, scale, zero_point, form, shape, out.dtype))
    else:
        native.decode(codes, scale, zero_point, out, bits=form.bits, run=form.run(shape))


@_operator(f"({_DEQUANTIZE}) -> Tensor", _fake_dequantize)
def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    bits: int,
    scheme: str,
    axis: int,
    block_size: int,
) -> Tensor:
    """The numbers behind codes, contiguous."""
    form = _decoded_form(codes, scale, zero_point, shape, dtype, bits, scheme, axis, block_size)
    out = codes.new_empty(shape, dtype=dtype)
    _dequantize_into(codes, scale.detach(), zero_point, form, shape, out)
    return out


@_operator(
    f"(Tensor codes, Tensor scale, Tensor? zero_point, SymInt[] shape, Tensor(a!) out, {_HOW}) -> ()",
    _fake_dequantize_out,
)
def dequantize_out(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    shape: Sequence[int],
    out: Tensor,
    bits: int,
    scheme: str,
    axis: int,
    block_size: int,
) -> None:
    """The same into a given tensor, whose dtype counts."""
    form = _decoded_form(codes, scale, zero_point, shape, out.dtype, bits, scheme, axis, block_size)
    check_part("dequantize", "out", out, shape, out.dtype, codes.device, "codes")
    _check_overlaps("dequantize", {"out": out, "codes": codes})
    _check_overlaps("dequantize", {"out": out, "scale": scale})
    if zero_point is not None:
        _check_overlaps("dequantize", {"out": out, "zero_point": zero_point})
    _dequantize_into(codes, scale.detach(), zero_point, form, shape, out)
    torch.autograd.graph.increment_version(out)
