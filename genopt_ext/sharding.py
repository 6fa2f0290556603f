"""Parameters that are spread over processes, of which none may decide alone how large a gradient is.

FSDP1 (``FullyShardedDataParallel``) leaves each process its piece of a flat parameter, as a plain tensor that says
nothing of the others: what would measure it is refused. A DTensor is measured over its mesh, and whether a step is
skipped is agreed on by all processes of every mesh.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from . import _backend

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


def agree(found: Tensor, params: Iterable[Tensor]) -> Tensor:
    """Whether any process of the parameters' meshes has ``found`` (0-dim, bool): the same answer in all of them."""
    meshes = dict.fromkeys(mesh for p in params if (mesh := getattr(p, "device_mesh", None)) is not None)
    groups = {}
    for mesh in meshes:
        for dim in range(mesh.ndim if mesh.get_coordinate() is not None else 0):
            if mesh.size(dim) > 1:
                group = mesh.get_group(dim)
                groups[tuple(dist.get_process_group_ranks(group))] = group, mesh.device_type
    # Along one dimension after the other, it comes round in a mesh.
    for group, device in groups.values():
        flag = found.to(device, torch.float32)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
        found = flag.to(found.device) != 0
    return found


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
