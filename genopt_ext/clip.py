"""Gradient clipping: drop-ins for ``torch.nn.utils``, and what the optimizers' own clipping shares with them.

Gradients are read once, and written only where clipping really changes them. The norm is summed such that no order
counts: the same bits for every number of threads and processes, and run after run. Nothing waits for a GPU, except with
``error_if_nonfinite=True``. Of DTensors each process measures its own part, and the parts of all are joined at once,
whatever their meshes, also beside plain tensors. Other tensor subclasses go through torch's own functions, which refuse
sparse gradients, and p-norms other than 1, 2 and infinity through torch operations in float64.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import utils as _torch

from . import _backend, binned, overlap, reference, sharding, tracing
from .tracing import Number, opaque

NORMS = {2.0: 0, 1.0: 1, math.inf: 2}  # as Norm in csrc/plan/norm.h

_TensorOrTensors = Tensor | Iterable[Tensor]
_NARROW = (torch.float16, torch.bfloat16)

_of_this_thread = threading.local()


def _stepper() -> Any:
    """The native stepper of this thread: a step in another thread must not disturb what it keeps."""
    if not hasattr(_of_this_thread, "stepper"):
        assert _backend.native is not None
        _of_this_thread.stepper = _backend.native.Stepper("transfer", "auto")
    return _of_this_thread.stepper


def _run(targets: list[Tensor], grads: list[Any], options: dict[str, Any], **arguments: Any) -> bool:
    """One native pass over tensors of one device; False: they can not be served, and nothing was changed."""
    if _backend.resolve("auto") == "reference":
        return False
    group = {"params": targets, "add": 0.0, **options}
    return _stepper().step([group], {}, (), grads=grads, **arguments) is None


def _by_device(tensors: Iterable[Tensor]) -> dict[torch.device, list[Tensor]]:
    found: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        found.setdefault(t.device, []).append(t)
    return found


def _listed(tensors: _TensorOrTensors) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _number(where: str, name: str, value: Any) -> float:
    try:
        number = float("x") if isinstance(value, (str, bytes)) and value != "inf" else float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{where}: {name} must be a number, got {value!r}") from None
    if not number >= 0:
        raise ValueError(f"{where}: {name} must be a number >= 0, got {value}")
    return number


def _order(where: str, norm_type: Any) -> float:
    try:
        return float(norm_type)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{where}: norm_type must be a number, got {norm_type!r}") from None


def coefficient(bound: float, norm: Tensor) -> Tensor:
    """What clipping to ``bound`` multiplies with: ``clip_coefficient`` in ``csrc/plan/norm.h``."""
    return torch.ones_like(norm) if math.isinf(bound) else (bound / (norm + 1e-6)).clamp(max=1.0)


def tensor_coefficient(group: dict[str, Any], norm: Tensor, weight_norm: Tensor) -> Number:
    """For a group that clips each tensor: ``tensor_coefficient`` in ``csrc/plan/norm.h``."""
    if group.get("clip_per_param") is not None:
        return tracing.number(coefficient(float(group["clip_per_param"]), norm))
    bound = float(group["agc"]) * torch.where(weight_norm > 1e-3, weight_norm, 1e-3)  # NaN gives 1e-3
    return tracing.number(torch.where(norm > bound, bound / norm, 1.0))


def _norms(tensors: Sequence[Tensor], norm: float) -> list[Tensor] | None:
    """The norm (of :data:`NORMS`) of the tensors on each device, in float64; None where only torch serves them."""
    found = []
    for device, here in _by_device(tensors).items():
        total = torch.zeros((), dtype=torch.float64, device=device)
        if not _run(here, list(here), {}, norm=NORMS[norm], measure=True, only_measure=True, grad_norm=[total]):
            if not all(is_plain(t) for t in here):
                return None
            words = torch.stack([reference.measure(t, norm) for t in here])
            total = binned.largest(words).max() if norm == math.inf else reference.join(binned.value(words))
            total = total.sqrt() if norm == 2 else total
        found.append(total)
    return found


def is_plain(t: Tensor) -> bool:
    return not tracing.is_subclass(t) and t.layout == torch.strided


def _total_norm(tensors: list[Tensor], norm: float) -> Tensor | None:
    """In float64, on the first tensor's device; None where only torch serves the tensors."""
    if norm in NORMS and any(map(sharding.is_spread, tensors)):
        return _norm_over_processes([sharding.without_partial_sums(t) for t in tensors], norm)
    # The kernels take a complex number as two: right for squares alone.
    real = [t.abs() if t.is_complex() and norm != 2 else t for t in tensors]
    norms = _norms(real, norm if norm in NORMS else math.inf)
    if norms is None:
        return None
    home = tensors[0].device
    together = torch.stack([n.to(home) for n in norms])
    if norm in NORMS:
        return torch.linalg.vector_norm(together, norm) if len(norms) > 1 else norms[0]
    real = [t for t in real if t.numel()]
    if not real:
        return torch.zeros_like(norms[0])
    if norm == 0:  # torch's norm of norms, which counts the tensors that are not all zero
        return torch.stack([t.any().to(home) for t in real]).sum().double()
    # The number that counts most: relative to it, no power leaves the range of float64.
    main = together.max() if norm > 0 else torch.stack([t.abs().min().double().to(home) for t in real]).min()
    if not norm > -math.inf:  # and of order NaN the norm is NaN
        return main if norm == -math.inf else main * norm
    scale = torch.where((main > 0) & main.isfinite(), main, 1.0)
    parts = [(t.double() / scale.to(t.device)).abs().pow(norm).sum().to(home) for t in real]
    return scale * torch.stack(parts).sum().pow(1 / norm)


def _norm_over_processes(tensors: list[Tensor], norm: float) -> Tensor:
    """As :func:`_total_norm`, where DTensors are among the tensors: each process measures what it has."""
    local = [sharding.local(t) for t in tensors]
    real = [t.abs() if t.is_complex() and norm != 2 else t for t in local]
    rows, joining = measure_rows(real, real, norm), sharding.Joining(tensors)
    if norm == math.inf:
        return joining.largest(binned.largest(rows)).max()
    total = reference.join(joining.sums(rows))
    return total.sqrt() if norm == 2 else total


def _norm_in_full(tensors: list[Tensor], norm: float, error_if_nonfinite: bool, foreach: bool | None) -> Tensor:
    """What :func:`get_total_norm` rounds: in float64, but where only torch serves the tensors."""
    if not tensors:
        return torch.tensor(0.0)
    total = _total_norm(tensors, norm)
    if total is None:
        total = _torch.get_total_norm([t.float() if t.dtype in _NARROW else t for t in tensors], norm, False, foreach)
    if error_if_nonfinite and not math.isfinite(_rounded(total, tensors)):
        where = next((i for i, t in enumerate(map(sharding.local, tensors)) if not torch.isfinite(t).all()), None)
        first = "all are finite, but not their norm" if where is None else f"the first is parameter {where}"
        raise RuntimeError(
            f"The total norm of order {norm} for gradients from `parameters` is non-finite, so it cannot be "
            f"clipped ({first}). To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    return total


def _rounded(total: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    return total if is_precise(tensors) else total.float()


def is_precise(tensors: Iterable[Tensor]) -> bool:
    """Whether a norm over them needs float64."""
    return any(t.dtype in (torch.float64, torch.complex128) for t in tensors)


def measure_rows(targets: Sequence[Tensor], rows: Sequence[Tensor | None], norm: float = 2.0) -> Tensor:
    """What each row's norm (of :data:`NORMS`) is made of: int64, [rows, words of :mod:`.binned`].

    Args:
        targets: parameters, on whose first one's device the words are. Of DTensors, here and in ``rows``, the local
            tensors are measured.
        rows: for each target a tensor of its shape, or None, of which there is nothing.
    """
    targets, rows = ([sharding.local(t) for t in each] for each in (targets, rows))
    devices = _by_device(t for t in rows if t is not None)
    shape = 2, len(rows), binned.WORDS
    found = {device: torch.zeros(shape, dtype=torch.int64, device=device) for device in devices}
    given = [*found.values()]
    if not _run(targets, rows, {}, norm=NORMS[norm], measure=True, only_measure=True, row_parts=given):
        for i, row in enumerate(rows):
            if row is not None:
                found[row.device][0, i].copy_(reference.measure(row, norm))
    words = torch.zeros(shape[1:], dtype=torch.int64, device=targets[0].device)
    for each in given:
        words += each[0].to(words.device)
    return words


def add_(targets: list[Tensor], grads: list[Any]) -> None:
    """Adds ``grads`` to ``targets``, which may be of a wider dtype, in one pass for each device."""
    for device in _by_device(targets):
        here = [i for i, t in enumerate(targets) if t.device == device]
        there = [targets[i] for i in here], [grads[i] for i in here]
        if not _run(*there, {"add": 1.0}):
            for t, g in zip(*there, strict=True):
                t.add_(g)


@opaque
@torch.no_grad()
def get_total_norm(
    tensors: _TensorOrTensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """The norm of all tensors together, as :func:`torch.nn.utils.get_total_norm`.

    Args:
        tensors: on any devices, of any floating-point dtypes.
        norm_type: any number, also infinity, 0 and below, as torch: order 0 counts the tensors that are not all zero.
        error_if_nonfinite: raise if the norm is NaN or infinite; waits for the device.
        foreach: accepted; every pass covers all tensors at once.

    Returns:
        0-dim, on the first tensor's device; float64 if a tensor is, else float32: the norm of 16-bit gradients need
        not fit into 16 bits.

    Raises:
        RuntimeError: a norm that is not finite, with ``error_if_nonfinite``; it names the first tensor.
        TypeError: ``norm_type`` is no number.
    """
    listed = _listed(tensors)
    return _rounded(_norm_in_full(listed, _order("get_total_norm", norm_type), error_if_nonfinite, foreach), listed)


@opaque
@torch.no_grad()
def clip_grads_with_norm_(
    parameters: _TensorOrTensors, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Scales gradients by ``max_norm / total_norm`` where that is below 1, as the function of torch.nn.utils.

    Args:
        parameters: those without gradient are passed over.
        max_norm: at least 0.
        total_norm: 0-dim, of all gradients.
        foreach: accepted; every pass covers all tensors at once.

    Raises:
        RuntimeError: a gradient's elements share memory with one another; nothing is changed then.
        TypeError, ValueError: ``max_norm`` is no number, or below 0.
    """
    bound = _number("clip_grads_with_norm_", "max_norm", max_norm)
    # as_tensor() would move a tensor to the default device.
    norm = total_norm if isinstance(total_norm, Tensor) else torch.tensor(total_norm, dtype=torch.float64, device="cpu")
    factor = coefficient(bound, norm.double()).reshape(1)
    grads = [p.grad for p in _listed(parameters) if p.grad is not None]
    overlap.refuse_unwritable("clip_grads_with_norm_", grads)
    for device, here in _by_device(grads).items():
        if not _run(here, list(here), {}, group_scales=[factor.to(device)]):
            own = factor.to(device).squeeze()
            looks = device.type == "cpu" and tracing.has_number(own)
            for g in here if not looks or own != 1 else ():
                g.mul_(own)


@opaque
@torch.no_grad()
def clip_grad_norm_(
    parameters: _TensorOrTensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scales gradients such that the norm of all together is at most ``max_norm``, as the function of torch.nn.utils.

    Args:
        parameters: those without gradient are passed over.
        max_norm: at least 0; infinity scales nothing.
        norm_type: any number, also infinity, 0 and below, as torch: order 0 counts the tensors that are not all zero.
        error_if_nonfinite: raise if the norm is NaN or infinite, and leave all gradients as they were; waits for the
            device.
        foreach: accepted; every pass covers all tensors at once.

    Returns:
        The norm before, as :func:`get_total_norm`.

    Raises:
        RuntimeError: a norm that is not finite, with ``error_if_nonfinite``; it names the first parameter. A gradient
            whose elements share memory with one another; nothing is changed then.
        TypeError, ValueError: ``max_norm`` is below 0 or no number, ``norm_type`` no number.
    """
    bound = _number("clip_grad_norm_", "max_norm", max_norm)
    norm = _order("clip_grad_norm_", norm_type)
    listed = _listed(parameters)
    sharding.warn_of_pieces("clip_grad_norm_", listed)
    grads = [p.grad for p in listed if p.grad is not None]
    at_once = norm in NORMS and (norm == 2 or not any(g.is_complex() for g in grads))
    if at_once and not error_if_nonfinite and len({g.device for g in grads}) == 1:
        dtype = torch.float64 if is_precise(grads) else torch.float32
        total = torch.empty((), dtype=dtype, device=grads[0].device)
        if _run(grads, list(grads), {}, max_norm=bound, norm=NORMS[norm], grad_norm=[total]):
            return total
    overlap.refuse_unwritable("clip_grad_norm_", grads)
    if error_if_nonfinite:  # named by its index among all parameters, with a gradient or without
        everything = [grads[0].new_zeros(0) if p.grad is None else p.grad for p in listed] if grads else []
        total = _norm_in_full(everything, norm, True, foreach)
    else:
        total = _norm_in_full(grads, norm, False, foreach)
    clip_grads_with_norm_(listed, bound, total, foreach)
    return _rounded(total, grads)


@opaque
@torch.no_grad()
def clip_grad_value_(parameters: _TensorOrTensors, clip_value: float, foreach: bool | None = None) -> None:
    """Limits every element of the gradients to [-clip_value, clip_value], as the function of torch.nn.utils.

    Args:
        parameters: those without gradient are passed over.
        clip_value: at least 0.
        foreach: accepted; every pass covers all tensors at once.

    Raises:
        RuntimeError: a gradient's elements share memory with one another; nothing is changed then.
        TypeError, ValueError: ``clip_value`` is no number, or below 0; complex gradients, which have no order.
    """
    limit = _number("clip_grad_value_", "clip_value", clip_value)
    grads = [p.grad for p in _listed(parameters) if p.grad is not None]
    if any(g.is_complex() for g in grads):
        raise TypeError("clip_grad_value_: gradients must be real to have an order; clip complex ones by their norm")
    overlap.refuse_unwritable("clip_grad_value_", grads)
    for device, here in _by_device(grads).items():
        # On a CPU a first look costs less than writing what does not change.
        look = dict(norm=NORMS[math.inf], measure=True) if device.type == "cpu" else {"scale": 1.0}
        if not _run(here, list(here), {"clip_grad_value": limit}, **look):
            for g in here:
                looks = device.type == "cpu" and tracing.has_number(g)
                if not looks or not (g.abs() <= limit).all():
                    g.clamp_(-limit, limit)
