"""The averaged weights that ``ema_decay`` keeps, put into the model for a while."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import reference
from .rule import Group


class Averages:
    """What an optimizer has for them.

    Attributes:
        is_swapped: whether they are in the model.
    """

    is_swapped = False

    if TYPE_CHECKING:
        param_groups: list[Group]
        state: defaultdict[Tensor, Any]

    @contextlib.contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Puts the averaged weights into the model, and takes them back at the end, also after an exception.

        Parameters that have no average yet stay as they are.

        Raises:
            RuntimeError: no group has ``ema_decay``, or the averages are in the model already.
        """
        where = f"{type(self).__name__}.swap_ema"
        if self.is_swapped:
            raise RuntimeError(f"{where}: the averaged weights are in the model already")
        if all(group.get("ema_decay") is None for group in self.param_groups):
            raise RuntimeError(f"{where}: no averages are kept; construct the optimizer with ema_decay=")
        params = [p for group in self.param_groups for p in group["params"] if "ema" in self.state.get(p, {})]
        self.is_swapped = True
        try:
            with reference.swapped(params, [self.state[p]["ema"] for p in params]):
                yield
        finally:
            self.is_swapped = False

    def refuse_swapped(self) -> None:
        """Raises where others than the weights in training are in the model, as within :meth:`swap_ema`."""
        if self.is_swapped:
            raise RuntimeError(
                f"{type(self).__name__}.step: the averaged weights are in the model; leave swap_ema() first"
            )
