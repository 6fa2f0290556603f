"""Parameters that are spread over processes, of which none may decide alone how large a gradient is.

FSDP1 (``FullyShardedDataParallel``) leaves each process its piece of a flat parameter, as a plain tensor that says
nothing of the others: what would measure it is refused. A DTensor is measured over its mesh, and whether a step is
skipped is agreed on by all processes of every mesh.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _backend, binned

MARK = "_fsdp_flattened"  # by which FSDP1 knows its flat parameters and the views of them

_AVAILABLE = dist.is_available()


def is_distributed() -> bool:
    """Whether this is one of several processes."""
    return _AVAILABLE and dist.is_initialized() and dist.get_world_size() > 1


def is_piece(p: Tensor) -> bool:
    """Whether FSDP1 has, or may have, cut ``p``: a view does not tell NO_SHARD, a flat parameter does."""
    if not hasattr(p, MARK):
        return False
    whole: torch.Size | None = getattr(p, "_unpadded_unsharded_size", None)
    return whole is None or whole.numel() != p.numel()


def _dtensor() -> type[Tensor] | None:
    """DTensor, where a program has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def is_spread(t: Tensor) -> bool:
    """Whether ``t`` is a DTensor."""
    return type(t) is _dtensor()


def local(t: Any) -> Any:
    """What this process has of a DTensor; others as they are."""
    return t._local_tensor if is_spread(t) else t


def are_cut_alike(a: Tensor, b: Tensor, shapes_too: bool = True) -> bool:
    """Whether two DTensors are spread over the same processes in the same way."""
    x, y = (t._spec for t in (a, b))  # type: ignore[attr-defined]
    alike = x is y or (x.mesh == y.mesh and x.placements == y.placements)
    return bool(alike and (not shapes_too or x.shape == y.shape))


def _is_cut(placement: Any) -> bool:
    """Whether it is a ``Shard``, or another that divides a dimension as ``_StridedShard`` does."""
    return hasattr(placement, "_split_tensor")


def is_cut_plainly(p: Tensor) -> bool:
    """Whether all of a DTensor's placements are ``Shard`` and ``Replicate``."""
    from torch.distributed.tensor import Replicate, Shard

    return all(type(each) in (Replicate, Shard) for each in p.placements)  # type: ignore[attr-defined]


def keeps_blocks(p: Tensor, block: int) -> bool:
    """Whether cuts of a DTensor divide no block: so many elements, which make slices along its first dimension."""
    from torch.distributed.tensor import Shard

    parts = 1  # of each slice
    for dim, each in enumerate(p.placements):  # type: ignore[attr-defined]
        if each.is_replicate() or (_is_cut(each) and each.dim == 0):
            continue
        if type(each) is not Shard or each.dim != 1:
            return False
        parts *= p.device_mesh.size(dim)  # type: ignore[attr-defined]
    if parts == 1:
        return True
    # All processes have to find the same. In memory a part of a slice has to be one of its blocks too.
    in_order = all(p.shape[d] == 1 or p.stride(d) <= p.stride(1) for d in range(2, p.dim()))
    return in_order and p.shape[1] % parts == 0 and p.shape[1:].numel() // parts % block == 0


def cut_as(t: Tensor, like: Tensor) -> Tensor:
    """``t`` spread as ``like`` is, where both are over the same processes; else as it was."""
    if t.device_mesh != like.device_mesh:  # type: ignore[attr-defined]
        return t
    return t.redistribute(placements=like.placements)  # type: ignore[attr-defined]


def spread_as(t: Tensor, like: Tensor, shape: torch.Size | None = None) -> Tensor:
    """``t``; where ``like`` is a DTensor, one that is spread as it, of which this process has ``t``.

    Args:
        shape: of the whole, which is contiguous; None: that of ``like``.
    """
    if not is_spread(like):
        return t
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    stride = like.stride() if shape is None else tuple(_strides(shape))
    return DTensor.from_local(t, mesh, placements, run_check=False, shape=shape or like.shape, stride=stride)


def is_first(p: Tensor) -> bool:
    """Whether this process comes first in the mesh of a DTensor, or has ``p`` alone."""
    return not is_spread(p) or not any(p.device_mesh.get_coordinate() or ())  # type: ignore[attr-defined]


def _indices(p: Tensor) -> list[range | Tensor] | None:
    """Of each dimension, where in the whole a DTensor's local tensor has its elements; None: not known.

    Tensors are int64, of those that do not follow one another.
    """
    mesh, here = p.device_mesh, local(p)  # type: ignore[attr-defined]
    if not here.numel():
        return [range(size) for size in here.shape]
    along: list[range | Tensor] = [range(size) for size in p.shape]
    plainly = is_cut_plainly(p)
    for k, each in enumerate(p.placements):  # type: ignore[attr-defined]
        if each.is_replicate():
            continue
        if not _is_cut(each):
            return None
        of, number, size = along[each.dim], mesh.get_local_rank(k), mesh.size(k)
        if plainly and isinstance(of, range):
            some = -(-len(of) // size)
            along[each.dim] = of[some * number : some * (number + 1)]
            continue
        indices = torch.as_tensor(of, device="cpu").view(*[1] * each.dim, -1)
        parts, _ = each._split_tensor(indices, size, with_padding=False)
        found = parts[number].reshape(-1)
        first, last = int(found[0]), int(found[-1])
        along[each.dim] = range(first, last + 1) if last - first == len(found) - 1 else found
    return along if [len(each) for each in along] == list(here.shape) else None


def _strides(shape: Sequence[int]) -> list[int]:
    """Of a contiguous tensor."""
    strides = [1] * len(shape)
    for d in range(len(shape) - 1, 0, -1):
        strides[d - 1] = strides[d] * shape[d]
    return strides


def runs(p: Tensor) -> tuple[int, int, int] | None:
    """Where the elements of a DTensor's local tensor are in the whole, if they lie there in runs at equal distances.

    Returns:
        The place of the first element, how many follow one another, and how many others lie between two runs; 0 and 0
        if all follow one another. None: they lie otherwise, or it is not known.
    """
    along, here = _indices(p), local(p).shape
    if along is None:
        return None
    if not here.numel():
        return 0, 0, 0
    first = 0
    for each, stride in zip(along, _strides(p.shape), strict=True):
        if not isinstance(each, range):
            return None
        first += each.start * stride
    cut = [d for d in range(p.dim()) if here[d] != p.shape[d]]
    last = cut[-1] if cut else 0
    if here[:last].numel() == 1:
        return first, 0, 0
    if len(cut) > 1 and here[: cut[-2]].numel() != 1:
        return None
    return first, here[last:].numel(), p.shape[last:].numel() - here[last:].numel()


def knows_places(p: Tensor) -> bool:
    """Whether :func:`places` knows where elements are: the same in all processes."""
    return is_spread(p) and all(each.is_replicate() or _is_cut(each) for each in p.placements)  # type: ignore[attr-defined]


def places(p: Tensor) -> Tensor | None:
    """The place in the whole of each element of a DTensor's local tensor (int64, of its shape); None: not known."""
    if (along := _indices(p)) is None:
        return None
    here = local(p)
    found = torch.zeros(here.shape, dtype=torch.int64, device=here.device)
    for d, (each, stride) in enumerate(zip(along, _strides(p.shape), strict=True)):
        indices = each if isinstance(each, Tensor) else torch.arange(each.start, each.stop)
        found += (indices.to(here.device) * stride).view([-1 if k == d else 1 for k in range(p.dim())])
    return found


class _Line(NamedTuple):
    """Processes that differ in one coordinate of a mesh; ``number``: of this one."""

    group: Any
    device: str
    number: int


def _lines(params: Iterable[Tensor]) -> dict[tuple[int, ...], _Line]:
    """Those of the parameters' meshes that this process is one of, by their ranks: in the same order in all of them."""
    meshes = dict.fromkeys(mesh for p in params if (mesh := getattr(p, "device_mesh", None)) is not None)
    lines = {}
    for mesh in meshes:
        for dim in range(mesh.ndim if mesh.get_coordinate() is not None else 0):
            if mesh.size(dim) > 1:
                group = mesh.get_group(dim)
                lines[tuple(dist.get_process_group_ranks(group))] = _Line(
                    group, mesh.device_type, mesh.get_local_rank(dim)
                )
    return lines


def agree(found: Tensor, params: Iterable[Tensor]) -> Tensor:
    """Whether any process of the parameters' meshes has ``found`` (0-dim, bool): the same answer in all of them."""
    # Along one dimension after the other, it comes round in a mesh.
    for group, device, _ in _lines(params).values():
        flag = found.to(device, torch.float32)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
        found = flag.to(found.device) != 0
    return found


class Joining:
    """Joins what each process has added up of its part of each parameter: of DTensors, over their meshes.

    What several processes have alike counts once; where one of them has NaN or infinity, so have all.

    Args:
        params: DTensors and others, in an order that all processes share.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params, self._specs = list(params), [getattr(p, "_spec", None) for p in params]
        self._turns: list[tuple[_Line, Tensor | None]] = []  # and what counts here, where not all does
        for ranks, line in _lines(params).items():
            counts = [int(line.number == 0 or _is_cut_along(p, ranks)) for p in params]
            self._turns.append((line, None if all(counts) else torch.tensor(counts, device="cpu")))
        self._is_narrow = not any(p.dtype in (torch.float64, torch.complex128) for p in params)

    def serves(self, params: Sequence[Tensor]) -> bool:
        """Whether it was made for these, spread as they are."""
        was = len(params) == len(self._params) and all(map(operator.is_, params, self._params))
        return was and all(getattr(p, "_spec", None) is spec for p, spec in zip(params, self._specs, strict=True))

    def sums(self, words: Tensor) -> Tensor:
        """Exact sums of what the words of :mod:`.binned` say: float64, [..., parameters].

        Args:
            words: int64, [..., parameters, words].
        """
        if not self._turns:
            return binned.value(words)
        together = binned.spread(words, self._is_narrow)
        for turn, (line, counts) in enumerate(self._turns):
            given = together
            if counts is not None:
                if counts.device != words.device:
                    counts = counts.to(words.device)
                    self._turns[turn] = line, counts
                given = together * counts.unsqueeze(-1)
                given.select(-1, -1).copy_(together.select(-1, -1))  # NaN counts wherever it is: binned.spread()
            given = given.to(line.device)
            dist.all_reduce(given, group=line.group)
            together = given.to(words.device)
        return binned.value(binned.gathered(together, self._is_narrow))

    def largest(self, numbers: Tensor) -> Tensor:
        """As :meth:`sums`, the largest of each parameter's numbers (float64, at least 0, not words); NaN stays NaN."""
        for line, _ in self._turns:
            given = torch.stack([numbers.nan_to_num(nan=math.inf, posinf=math.inf), numbers.isnan().double()])
            given = given.to(line.device)
            dist.all_reduce(given, dist.ReduceOp.MAX, group=line.group)
            largest, unknown = given.to(numbers.device).unbind()
            numbers = torch.where(unknown != 0, math.nan, largest)
        return numbers


def _is_cut_along(p: Tensor, ranks: tuple[int, ...]) -> bool:
    mesh = getattr(p, "device_mesh", None)
    if mesh is None or mesh.get_coordinate() is None:
        return False
    return any(
        not placement.is_replicate() and tuple(dist.get_process_group_ranks(mesh.get_group(dim))) == ranks
        for dim, placement in enumerate(p.placements)  # type: ignore[attr-defined]
    )


def refuse_piece(where: str, options: Sequence[str]) -> None:
    """Raises for options that would see a piece alone."""
    raise RuntimeError(
        f"{where} is a piece of a parameter of FullyShardedDataParallel (FSDP1), and {' and '.join(options)} would see "
        "this process' piece alone; leave that out and clip by the model's own clip_grad_norm_(max_norm) before the "
        "step, find infinities by torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler, or shard by "
        "torch.distributed.fsdp.fully_shard (FSDP2), where all of it is served"
    )


def warn_of_pieces(where: str, params: Sequence[Tensor]) -> None:
    """Warns once of a norm that is of this process' pieces alone, as torch's would be."""
    k = next((k for k, p in enumerate(params) if is_piece(p)), None) if is_distributed() else None
    if k is not None:
        _backend.warn_once(
            f"{where}: parameter {k} (shape {list(params[k].shape)}) is a piece of a parameter of "
            "FullyShardedDataParallel (FSDP1), so the norm is that of this process' pieces alone, as "
            f"torch.nn.utils.{where} would have it; call the model's own clip_grad_norm_(max_norm)"
        )


def without_partial_sums(t: Tensor) -> Tensor:
    """A DTensor with its sums made whole, where processes have parts of them; any other tensor as it is."""
    placements = getattr(t, "placements", ())
    if not any(placement.is_partial() for placement in placements):
        return t
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(t, DTensor)
    whole: Tensor = t.redistribute(placements=[Replicate() if each.is_partial() else each for each in placements])
    return whole
