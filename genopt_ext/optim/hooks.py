"""What goes around every ``step()``: step hooks and profilers where there are some, one opaque call for Dynamo."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling
from torch.optim import optimizer as torch_optimizer

from .. import _backend


def _is_observed() -> bool:
    """Whether something may be listening to regions such as ``Optimizer.step#AdamW.step``."""
    monitor = sys.modules.get("torch.profiler._cupti_monitor")
    if getattr(monitor, "_monitor_singleton", None) is not None:
        return True
    return _backend.native is None or _backend.native.is_observed()


def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
    """torch's wrapper of every ``step``, for the hooks and for profilers, taken only where there is one of them.

    Without a profiler it costs as much as stepping some fifty tensors.
    """
    observed = torch.optim.Optimizer.profile_hook_step(func)

    @functools.wraps(func)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = torch_optimizer._global_optimizer_pre_hooks or self._optimizer_step_pre_hooks
        # Spelled out here: each function that Dynamo enters on the way to the opaque call is a graph break more.
        if is_dynamo_compiling():
            closure = args[0] if args else kwargs.get("closure")
            if closure is None or before or kwargs.get("grads") is not None:  # hooks run before the closure
                return hidden(self, *args, **kwargs)
            with torch.enable_grad():
                loss = closure()
            hidden(self)
            return loss
        after = torch_optimizer._global_optimizer_post_hooks or self._optimizer_step_post_hooks
        # A closure may register hooks that then run after this very step.
        if before or after or any(each is not None for each in args) or kwargs or _is_observed():
            return observed(self, *args, **kwargs)
        return func(self, *args)

    hidden = _disable_dynamo(step)
    return step


def is_replaced(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``step`` was replaced on this object, as by Accelerate, which takes no call for a skipped step."""
    step = vars(optimizer).get("step")
    own = getattr(step, "__self__", None) is optimizer or hasattr(step, "_wrapped_by_lr_sched")
    return not (step is None or own)
