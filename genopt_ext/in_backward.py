"""The optimizer in backward: each parameter is stepped as soon as its gradient is complete, and the gradient freed.

After torch's tutorial "How to save memory by fusing the optimizer step into the backward pass"
(https://pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html), with one optimizer
instead of one for each parameter. The step itself is in ``optim/stepper.py``.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle, unserializable_hook

from . import _backend, sharding, tracing
from .optim.optimizer import FusedOptimizer
from .optim.step import NOTHING_ELSE, Place, describe, places_of
from .optim.stepper import Stepper

TUTORIAL = "https://pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html"


def step_in_backward(optimizer: torch.optim.Optimizer) -> InBackward:
    """Lets ``backward()`` step each parameter of ``optimizer`` once its gradient is complete, and free the gradient.

    Gradients then never are in memory all at once. Numbers, state, checkpoints and learning rate schedulers
    are those of ``optimizer.step()``; options are read from ``param_groups`` at every step::

        opt = optim.AdamW(model.parameters(), lr=3e-4)
        step_in_backward(opt)
        for batch in batches:
            model(batch).backward()
            scheduler.step()

    ``optimizer.step()`` may still be called. It steps what has a gradient then: parameters whose gradient was set
    by hand, and those without a hook, which did not require gradients when this was called or when their
    group was added. Only there do the optimizer's step hooks and an overridden ``step`` run. Groups added later
    are stepped in backward too. Compiled autograd breaks its graph at each parameter.

    What it can not go with:

    - Accumulation: every ``backward()`` is a step, so two of them in a row are two steps, and a gradient that is
      there before ``backward()`` is part of the sum that is stepped. The same holds for a parameter used in several
      segments of reentrant checkpointing, each of which is a backward of its own: pass ``use_reentrant=False``. A
      second ``backward()`` through a graph kept with ``retain_graph=True`` is one more step, or an error
      of autograd's where that graph saved a parameter that the first one has changed.
    - Clipping by a norm over all gradients, which needs all of them at once.
    - :class:`torch.amp.GradScaler`: gradients would be stepped with their scale. Its ``step()`` raises, but
      that is after one step was taken: use bfloat16, which needs no scaler.
    - Wrappers that average gradients, such as ``DistributedDataParallel``: the hook sees the local gradient.
      Parameters of ``FullyShardedDataParallel`` are refused.
    - Other hooks that read gradients after ``backward()``, or that were registered after these: they find None.
    - Backward passes of ``torch.compile``, as far as memory goes: one call returns all gradients of a graph.
    - Several threads in ``backward()`` of these parameters at a time: autograd would add to gradients that the other
      thread's step reads and frees. The second is refused; hold one lock around forward and backward in all threads.
    - Parameters that share memory: across parameters it is not looked for, and a step of one may change what the
      backward of another still needs.

    Args:
        optimizer: one of :mod:`genopt_ext.optim`. The hooks do not keep it alive: where it is deleted
            without :meth:`InBackward.remove`, the next ``backward()`` warns and takes them off.

    Returns:
        The handle that takes the hooks off again; also a context manager.

    Raises:
        TypeError: the optimizer is not one of :mod:`genopt_ext.optim`.
        RuntimeError: it is stepped in backward already.
        ValueError: ``max_grad_norm`` is set, or a parameter is no leaf, is listed twice or is stepped in backward by
            another optimizer. Nothing is changed then.

    ``backward()`` raises what ``optimizer.step()`` would, ValueError where ``max_grad_norm`` has been set since, and
    RuntimeError while another thread is in a ``backward()`` of these parameters, before any of them is stepped.
    The parameter that the message names, its gradient and its state are then as they were; those whose gradients
    were complete before have been stepped.
    """
    if not isinstance(optimizer, FusedOptimizer):
        kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        raise TypeError(
            f"step_in_backward: expected an optimizer of genopt_ext.optim, got {kind}; take the class of the same name "
            f"from there, or follow torch's recipe with one optimizer for each parameter: {TUTORIAL}"
        )
    if optimizer.together is not None:
        raise TypeError(
            f"step_in_backward: {type(optimizer).__name__} {optimizer.together}, so their gradients have to be there "
            "at once; call step() instead"
        )
    if optimizer.in_backward is not None:
        raise RuntimeError(
            f"step_in_backward: this {type(optimizer).__name__} is stepped in backward already; call remove() on the "
            "first handle before"
        )
    if optimizer.accumulator.micro_batches:
        raise RuntimeError(
            "step_in_backward: gradients are accumulated and wait for a step; call step() or "
            "discard_accumulated() before"
        )
    handle = InBackward(optimizer)
    handle.add_groups(range(len(optimizer.param_groups)))
    optimizer.in_backward = handle
    return handle


class InBackward:
    """The handle of :func:`step_in_backward`; as a context manager, it ends with :meth:`remove`."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        # Parameters hold hooks, which hold this: a strong reference would be a cycle.
        self._optimizer = weakref.ref(optimizer)
        self._handles: list[RemovableHandle | _Entrance] = []
        self._lock = threading.Lock()
        self._thread = 0  # whose passes these are
        self._passes: set[int] = set()  # of backward, in which a parameter was met and which have not ended

    def remove(self) -> None:
        """Takes the hooks off: gradients stay, and ``optimizer.step()`` steps again. Twice is once."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        optimizer = self._optimizer()
        if optimizer is not None and optimizer.in_backward is self:
            optimizer.in_backward = None

    def __enter__(self) -> InBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def add_groups(self, groups: Collection[int]) -> None:
        """Hooks the parameters of ``groups`` (indices), or raises before the first."""
        optimizer = self._optimizer()
        assert optimizer is not None
        for i in groups:
            _refuse_options(optimizer, i)
        places = [place for place in places_of(optimizer.param_groups) if place[0] in groups and place[2].requires_grad]
        seen: set[Tensor] = set()
        for place in places:
            p = place[2]
            where = f"step_in_backward: {describe(optimizer.param_groups, place)}"
            if not p.is_leaf:
                raise ValueError(
                    f"{where} is no leaf but the result of {p.grad_fn}, so its gradient is not accumulated; give the "
                    "optimizer the parameter that it was computed from, or .detach().requires_grad_()"
                )
            if sharding.is_distributed() and hasattr(p, sharding.MARK):
                raise ValueError(
                    f"{where} is part of FullyShardedDataParallel (FSDP1), which reduces gradients after backward's "
                    "hooks have seen them; call step() instead"
                )
            if p in seen:
                raise ValueError(f"{where} is listed twice; list each parameter once")
            seen.add(p)
            for hook in list((p._post_accumulate_grad_hooks or {}).values()):
                if not isinstance(hook, _Hook):
                    continue
                if hook.owner._optimizer() is not None:
                    raise ValueError(f"{where} is stepped in backward by another optimizer; call remove() there before")
                hook.owner.remove()
        self._watch([p for _, _, p in places])
        for i, k, p in places:
            self._handles.append(p.register_post_accumulate_grad_hook(_Hook(self, i, k, p)))

    def _watch(self, params: list[Tensor]) -> None:
        """Calls ``_enter`` in every pass before it adds to a gradient of ``params``."""
        if _backend.native is not None:
            self._handles.append(_Entrance(params, self._enter))
            return
        last = -1

        @unserializable_hook  # type: ignore[untyped-decorator]
        def enter(grad: Tensor | None) -> None:
            nonlocal last
            now = torch._C._current_graph_task_id()
            if now != last and grad is not None and grad.is_cpu:
                self._enter(now)
                last = now

        self._handles += [p.register_hook(enter) for p in params]

    @tracing.opaque
    def _enter(self, now: int) -> None:
        """Refuses the pass ``now`` while one of another thread is under way; those of one thread are nested."""
        if now in self._passes:
            return
        me = threading.get_ident()
        leave = _Leave(self._passes, now)
        with self._lock:
            if self._passes and self._thread != me:
                optimizer = self._optimizer()
                name = "" if optimizer is None else f"{type(optimizer).__name__}: "
                raise RuntimeError(
                    f"step_in_backward: {name}another thread is in backward() of these parameters, and both would "
                    "write the same gradients and parameters; none of them was changed by this backward(). Hold one "
                    "lock around forward and backward() in all threads"
                )
            self._thread = me
            self._passes.add(now)
        torch.autograd.Variable._execution_engine.queue_callback(leave)

    @staticmethod
    def refuse_grad_scaler() -> None:
        """Raises: there is no scaler that could go with it."""
        raise RuntimeError(
            "step_in_backward: GradScaler can not go with it: backward() has stepped with gradients that were scaled "
            "already; start again without a scaler, in bfloat16, or without step_in_backward"
        )


class _Leave:
    """Ends a pass: called where backward ends well, and deleted with what autograd knows of it where it does not."""

    def __init__(self, passes: set[int], this: int) -> None:
        self.passes, self.this = passes, this

    def __call__(self) -> None:
        self.passes.discard(self.this)

    __del__ = __call__


class _Entrance:
    """The handle of a native hook: see csrc/torch/hooks.h."""

    def __init__(self, params: list[Tensor], enter: Callable[[int], None]) -> None:
        self.params = [weakref.ref(p) for p in params]
        _backend.native.set_entrance(params, enter)  # type: ignore[union-attr]

    def remove(self) -> None:
        living = [p for ref in self.params if (p := ref()) is not None]
        _backend.native.set_entrance(living, None)  # type: ignore[union-attr]


class _Hook:
    """Steps the parameter that it is registered on. It holds neither the parameter nor its optimizer."""

    __slots__ = ("at", "owner", "stepper", "watched")

    def __init__(self, owner: InBackward, i: int, k: int, p: Tensor) -> None:
        self.owner = owner
        self.watched = p._backward_hooks is not None
        self.at = i, k
        self.stepper: Stepper | None = None

    @tracing.opaque
    def __call__(self, p: Tensor) -> None:
        optimizer = self.owner._optimizer()
        if optimizer is None:
            self.owner.remove()
            warnings.warn(
                "genopt_ext: the optimizer given to step_in_backward has been deleted, so backward() does not step any "
                "more; keep a reference to it, or call remove() before it is deleted",
                stacklevel=2,
            )
            return
        place = self._find(optimizer, p)
        if place is None or p.grad is None:
            return
        if not self.watched and p._backward_hooks is not None:  # torch clears native hooks with the first of these
            self.watched = True
            self.owner._watch([p])
        optimizer.refuse_swapped()
        _refuse_options(optimizer, place[0])
        if self.stepper is None:
            self.stepper = Stepper(type(optimizer).__name__, optimizer.rule, optimizer.backend)
        self.stepper.backend = optimizer.backend
        self.stepper.step(optimizer.param_groups, optimizer.state, NOTHING_ELSE, place)
        optimizer._opt_called = True  # what learning rate schedulers look at
        p.grad = None

    def _find(self, optimizer: FusedOptimizer, p: Tensor) -> Place | None:
        """Where ``p`` stands now; None: no more in the optimizer, which leaves it alone."""
        i, k = self.at
        groups = optimizer.param_groups
        if not (i < len(groups) and k < len(groups[i]["params"]) and groups[i]["params"][k] is p):
            places = (place for place in places_of(groups) if place[2] is p)
            i, k, _ = next(places, (-1, -1, p))
            if i < 0:
                return None
            self.at = i, k
        return i, k, p


def _refuse_options(optimizer: FusedOptimizer, i: int) -> None:
    if optimizer.skip_nonfinite:
        raise ValueError(
            f"step_in_backward: {type(optimizer).__name__}: skip_nonfinite looks at all gradients before the step, "
            "while in backward each is freed when it is complete; set it to False, or call step() instead"
        )
    if optimizer.param_groups[i].get("differentiable"):
        raise ValueError(
            f"step_in_backward: {type(optimizer).__name__}: group {i} is differentiable=True, and the step would "
            "change what the rest of this backward needs; set it to False, or call step() instead"
        )
    norm = optimizer.param_groups[i].get("max_grad_norm")
    norm = optimizer.max_grad_norm if norm is None else norm
    if norm is not None:
        raise ValueError(
            f"step_in_backward: {type(optimizer).__name__}: group {i}: max_grad_norm is {norm}, and a norm over all "
            "gradients needs all of them at once, while in backward each is freed when it is complete; set it to None "
            "and clip each parameter by itself (clip_per_param, agc, clip_grad_value), or call step() instead"
        )
