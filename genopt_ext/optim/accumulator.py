"""Sums of gradients over micro-batches, in buffers of the optimizer's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import clip
from .rule import Group
from .step import describe, places_of


class Accumulator:
    """Buffers are zero between two cycles, for a step zeroes what it takes.

    Attributes:
        micro_batches: how often gradients were added since the last step.
        sums: by parameter.
    """

    def __init__(self) -> None:
        self.micro_batches = 0
        self.sums: Mapping[Tensor, Tensor] = {}
        self._buffers: Mapping[Tensor, Tensor] = {}

    def discard(self) -> None:
        """Forgets the sums, and frees the buffers."""
        self.__init__()  # type: ignore[misc]

    def add(self, where: str, groups: list[Group]) -> None:
        """Adds each ``.grad`` to its sum, and sets it to None.

        Raises:
            RuntimeError: a group is ``differentiable=True``, or a gradient has another shape, kind or device than its
                parameter or than the sum so far; nothing is changed then. ``where`` begins the message.
        """
        for i, group in enumerate(groups):
            if group.get("differentiable"):
                raise RuntimeError(
                    f"{where}: group {i} is differentiable=True, and sums of gradients forget "
                    "where they came from; add up the losses instead, or use differentiable=False"
                )
        places = places_of(groups)
        rows = [place for place in places if place[2].grad is not None]
        # What no longer belongs to a parameter is let go.
        buffers = {p: b for _, _, p in places if (b := self._buffers.get(p)) is not None and _fits(b, p)}
        sums = dict(self.sums) if self.micro_batches else {}
        for _, _, p in rows:
            if p in sums and not _fits(sums[p], p):
                raise RuntimeError(
                    f"{where}: a parameter of shape {list(p.shape)} on {p.device} had shape {list(sums[p].shape)} "
                    f"on {sums[p].device} in an earlier micro-batch; call discard_accumulated() after such a change"
                )
        for place in rows:
            p, g = place[2], place[2].grad
            assert g is not None
            if (g.shape, g.device, g.is_complex()) != (p.shape, p.device, p.is_complex()) or g._is_zerotensor():
                raise RuntimeError(
                    f"{where}: {describe(groups, place)}: gradient is {g.dtype} of shape {list(g.shape)} on "
                    f"{g.device}, parameter is {p.dtype} on {p.device}; clear gradients with zero_grad() and "
                    "compute them anew"
                )
            if p not in sums:
                if p not in buffers:
                    wide = p.dtype if p.is_complex() or p.element_size() >= 4 else torch.float32
                    with torch.inference_mode(False):
                        buffers[p] = torch.zeros_like(p, dtype=wide, memory_format=torch.preserve_format)
                sums[p] = buffers[p]
        params = [p for _, _, p in rows]
        clip.add_([sums[p] for p in params], [p.grad for p in params])
        self._buffers, self.sums = buffers, sums
        self.micro_batches += 1
        for p in params:
            p.grad = None


def _fits(buffer: Tensor, p: Tensor) -> bool:
    return buffer.shape == p.shape and buffer.device == p.device
