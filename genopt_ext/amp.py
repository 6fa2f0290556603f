"""Automatic mixed precision: a GradScaler that looks for infinities in the step's own pass."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import OptState

from .optim.optimizer import FusedOptimizer
from .optim.step import Inputs


class GradScaler(torch.amp.GradScaler):
    """:class:`torch.amp.GradScaler`, whose scale evolves in the same way, with one pass less for our optimizers.

    torch's checks all gradients for infinities in a pass of its own that reads and writes them, before the step
    unscales or clips. With an optimizer of :mod:`genopt_ext.optim` the pass that measures their norm tells it too.
    After ``unscale_``, and for other optimizers, everything is as with torch's.

    Args:
        device, init_scale, growth_factor, backoff_factor, growth_interval, enabled: as torch's.
        unscale_grads: whether ``.grad`` is without its scale after :meth:`step`, as with torch's scaler, for those who
            look at it then. The step writes it in the same pass over memory; False saves that write. In a skipped step
            the gradients stay as they are.
    """

    _unscale_grads = False

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        unscale_grads: bool = False,
    ) -> None:
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self._unscale_grads = unscale_grads

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """As torch's: steps with unscaled gradients, or not at all where one is not finite.

        Raises:
            RuntimeError: called twice since the last ``update()``, or with a closure.
        """
        if not (isinstance(optimizer, FusedOptimizer) and self._enabled) or "closure" in kwargs:
            return super().step(optimizer, *args, **kwargs)
        if optimizer.in_backward is not None:
            optimizer.in_backward.refuse_grad_scaler()
        asked = Inputs(max_grad_norm=optimizer.max_grad_norm, skip_nonfinite=optimizer.skip_nonfinite)
        optimizer.stepper.refuse_pieces(optimizer.param_groups, asked, "genopt_ext.GradScaler")
        state = self._per_optimizer_states[id(optimizer)]
        params = (p for group in optimizer.param_groups for p in group["params"])
        has_gradients = optimizer.accumulator.micro_batches > 0 or any(p.grad is not None for p in params)
        if state["stage"] is not OptState.READY or not has_gradients:
            return super().step(optimizer, *args, **kwargs)
        self._check_scale_growth_tracker("step")
        scale = self._get_scale_async()
        assert scale is not None
        # As torch: a scale that the user has set counts too.
        scale = scale * getattr(optimizer, "grad_scale", 1)
        result, found = optimizer.step_scaled(scale, not self._unscale_grads, *args, **kwargs)
        state["found_inf_per_device"] = {found.device: found}
        state["stage"] = OptState.STEPPED
        return result
