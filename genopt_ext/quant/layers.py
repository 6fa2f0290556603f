"""Layers whose weight is kept as codes, which :func:`quantize_module_` (``modules.py``) makes of torch's.

A layer becomes a thin subclass of what it was, whose ``weight`` is a property that dequantizes. The codes live in a
child module, ``quantized_weight``, which layers with tied weights share: so ``.to()``, deepcopy, pickle and
``load_state_dict`` (also ``assign=True``) keep them tied, which plain buffers would not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from . import ops
from .form import QuantizedTensor


class QuantizedWeight(nn.Module):
    """A weight as codes. Calling it gives the numbers, in the dtype the model was cast to last.

    Its state dict is ``codes``, ``scale`` and, if asymmetric, ``zero_point``, as in
    :class:`~genopt_ext.quant.QuantizedTensor`. Casting the model (``.half()``) changes none of them, only what comes
    out. Loading refuses codes and scales of another shape or dtype.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    like: Tensor

    def __init__(self, q: QuantizedTensor) -> None:
        super().__init__()
        self.shape, self.bits, self.scheme, self.axis, self.block_size = (
            list(q.shape),
            q.bits,
            q.scheme,
            q.axis or 0,
            q.block_size or 0,
        )
        self.register_buffer("codes", q.codes)
        self.register_buffer("scale", q.scale)
        self.register_buffer("zero_point", q.zero_point)
        # Empty, and not saved: .half() and .to() tell it the dtype, as they do a weight.
        self.register_buffer("like", torch.empty(0, dtype=q.dtype, device=q.codes.device), persistent=False)

    def forward(self) -> Tensor:
        how = self.bits, self.scheme, self.axis, self.block_size
        result: Tensor = ops.dequantize(self.codes, self.scale, self.zero_point, self.shape, self.like.dtype, *how)
        return result

    def rows(self, index: Tensor) -> Tensor:
        """``forward()[index]`` of a matrix, without making all of it where scales do not cross rows."""
        units, columns = self.scale.numel() // max(1, self.shape[0]), self.shape[1]
        by_row = self.scheme == "tensor" or (self.scheme == "channel" and self.axis == 0)
        if self.scheme == "block" and columns and columns % self.block_size == 0:
            by_row = True
        if not by_row or (self.bits == 4 and columns % 2):
            return nn.functional.embedding(index, self())
        flat = index.reshape(-1)
        codes = self.codes.view(self.shape[0], -1).index_select(0, flat)
        scale, zero_point = self.scale, self.zero_point
        if self.scheme != "tensor":
            scale = scale.view(-1, units).index_select(0, flat).view(-1)
            if zero_point is not None:
                zero_point = zero_point.view(-1, units).index_select(0, flat).view(-1)
        shape = [flat.shape[0], columns]
        codes = codes.view(shape) if self.bits == 8 else codes.view(-1)
        how = self.bits, self.scheme, self.axis, self.block_size
        picked: Tensor = ops.dequantize(codes, scale, zero_point, shape, self.like.dtype, *how)
        return picked.view(*index.shape, columns)

    def _saved(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("codes", "scale", "zero_point"):
            t = self._buffers[name]
            if t is not None:
                yield name, t

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points together."""
        return sum(t.nbytes for _, t in self._saved())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        before = dict(self._saved())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            assert new is not None
            if new.dtype != old.dtype:
                new = old.to(new.device)
            self._buffers[name] = new.contiguous()  # memory_format=torch.channels_last is not for codes
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        errors = args[-1]
        wrong = []
        for name, mine in self._saved():
            given = state_dict.get(prefix + name)
            # torch would take the first of many scales for a 0-dim one, and cast without a word.
            if isinstance(given, Tensor) and (given.shape != mine.shape or given.dtype != mine.dtype):
                wrong.append(
                    f"{prefix}{name} must be {mine.dtype} of shape {list(mine.shape)}, got {given.dtype} of shape "
                    f"{list(given.shape)}; quantize with the options of the checkpoint"
                )
        if wrong:
            errors.extend(wrong)
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        how = {"channel": f", axis={self.axis}", "block": f", block_size={self.block_size}"}.get(self.scheme, "")
        return f"shape={self.shape}, bits={self.bits}, scheme={self.scheme!r}{how}, symmetric={self.zero_point is None}"


class QuantizedLayer:
    """What all quantized layers are, beside what they were: ``weight`` is made from codes at each use."""

    quantized_weight: QuantizedWeight

    if TYPE_CHECKING:
        weight: Any
    else:

        @property
        def weight(self) -> Tensor:
            """A new tensor of numbers; writing to it changes nothing."""
            return self.quantized_weight()


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """:class:`torch.nn.Linear` on codes."""


class QuantizedAttentionOutput(QuantizedLayer, NonDynamicallyQuantizableLinear):
    """``out_proj`` of :class:`torch.nn.MultiheadAttention` on codes."""


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """:class:`torch.nn.Embedding` on codes; dequantizes the rows it looks up, where scales do not cross rows."""

    def forward(self, input: Tensor) -> Tensor:
        return self.quantized_weight.rows(input)


class QuantizedEmbeddingBag(QuantizedLayer, nn.EmbeddingBag):
    """:class:`torch.nn.EmbeddingBag` on codes."""


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    """:class:`torch.nn.Conv1d` on codes."""


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """:class:`torch.nn.Conv2d` on codes."""


class QuantizedConv3d(QuantizedLayer, nn.Conv3d):
    """:class:`torch.nn.Conv3d` on codes."""


class QuantizedConvTranspose1d(QuantizedLayer, nn.ConvTranspose1d):
    """:class:`torch.nn.ConvTranspose1d` on codes."""


class QuantizedConvTranspose2d(QuantizedLayer, nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` on codes."""


class QuantizedConvTranspose3d(QuantizedLayer, nn.ConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d` on codes."""


# By the class that they are made of.
QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    NonDynamicallyQuantizableLinear: QuantizedAttentionOutput,
    nn.Embedding: QuantizedEmbedding,
    nn.EmbeddingBag: QuantizedEmbeddingBag,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
}
