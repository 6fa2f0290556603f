"""Which parameters Muon steps as matrices, and which it leaves to AdamW, and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .. import sharding, tracing
from . import muon_owners

ALGORITHMS = ("muon", "adamw")

Predicate = Callable[[str, Tensor], bool]


class Route(NamedTuple):
    """``algorithm``: ``"muon"`` or ``"adamw"``; ``why`` in a few words."""

    algorithm: str
    why: str


_ASKED = "asked for by its group"
_WORDS = re.compile(r"[._]")
_EMBEDDINGS = {"emb", "tok", "wpe", "wte"}


def is_embedding(name: str) -> bool:
    """Whether a name is that of a table of embeddings, as GPT-2's ``wte`` or Llama's ``embed_tokens``."""
    words = _WORDS.split(name.lower())
    return any("embed" in word or word in _EMBEDDINGS for word in words)


def is_head(name: str) -> bool:
    """Whether a name is that of the last layer: ``lm_head``, ``head`` or ``output``, and not in a numbered layer."""
    parts = name.lower().split(".")
    return not any(part.isdigit() for part in parts) and any(
        _WORDS.split(part)[-1] in ("head", "output") for part in parts[:-1]
    )


def route(name: str | None, p: Tensor, asked: str | None, adamw: Predicate | None, stacked: bool | None) -> Route:
    """Where a parameter goes. ``asked``, ``stacked``: by its group; ``adamw``: in the place of our look at names."""
    if asked is not None:
        return Route(asked, _ASKED)
    if p.is_complex() or not p.is_floating_point():
        return Route("adamw", f"{p.dtype}")
    if p.dim() < 2:
        return Route("adamw", f"{p.dim()} dimensions" if p.dim() != 1 else "1 dimension")
    if name is not None and adamw is not None:
        return Route("adamw", "asked for by adamw=") if adamw(name, p) else Route("muon", _shape(p, stacked))
    if name is not None and is_embedding(name):
        return Route("adamw", "named as an embedding")
    if name is not None and is_head(name):
        return Route("adamw", "named as a head")
    return Route("muon", _shape(p, stacked))


def _shape(p: Tensor, stacked: bool | None) -> str:
    if p.dim() == 2:
        return "a matrix"
    if stacked:
        return f"{p.shape[:-2].numel()} matrices of [{p.shape[-2]}, {p.shape[-1]}]"
    return f"flattened to [{p.shape[0]}, {p.shape[1:].numel()}]"


def refuse_misrouted(where: str, p: Tensor, route: Route, group: dict[str, Any]) -> None:
    """Raises for what no algorithm was asked for and can not be told, and for what Muon can not step."""
    if route.algorithm == "muon" or (hasattr(p, sharding.MARK) and route.why != _ASKED):
        refuse_no_matrix(where, p, group)


def refuse_no_matrix(where: str, p: Tensor, group: dict[str, Any]) -> None:
    """Raises for what can not be a whole matrix, or not be cut as its group says."""
    if hasattr(p, sharding.MARK):
        raise ValueError(
            f"{where} belongs to FullyShardedDataParallel (FSDP1), which flattens and cuts it, and Muon needs whole "
            "matrices; use torch.distributed.fsdp.fully_shard and give Muon what is not sharded, or another optimizer"
        )
    if sharding.is_spread(p):
        _refuse_spread(where, p, group)
    elif tracing.is_subclass(p):
        raise ValueError(
            f"{where} is a {type(p).__name__}, of which a process may hold a part, and Muon needs whole matrices; "
            "give it a plain tensor, or route it by algorithm='adamw'"
        )
    if p.dim() < 2:
        raise ValueError(
            f"{where} has {p.dim()} dimension{'s' * (p.dim() != 1)}, and Muon needs matrices; "
            "route it by algorithm='adamw', and reshape what was flattened"
        )
    if p.is_complex() or not p.is_floating_point():
        raise ValueError(f"{where} is {p.dtype}, and Muon needs real matrices; route it by algorithm='adamw'")
    if _is_ambiguous(p, group):
        n, rows, columns = p.shape
        raise ValueError(
            f"{where} may be {n} matrices of [{rows}, {columns}], as of experts, or a convolution, which is one of "
            f"[{n}, {rows * columns}]; give stacked=True for the first or stacked=False for the second, in its group "
            "or for all"
        )
    if matrix_blocks(p, group) is None:
        sizes, heads, (_, rows, _) = group.get("split_sizes"), group.get("num_heads"), matrices(p, group)
        what = f"num_heads={heads} does not divide" if sizes is None else f"split_sizes={sizes} do not add up to"
        raise ValueError(f"{where} has {rows} rows, which {what}; give that option in a group of its own")


def _refuse_spread(where: str, p: Tensor, group: dict[str, Any]) -> None:
    """Raises for a DTensor whose matrices are not served, or an option of its group that is not."""
    if (why := muon_owners.why_not(p)) is not None:
        placements = p.placements  # type: ignore[attr-defined]
        raise ValueError(f"{where} is a DTensor of {placements}, {why}; route it by algorithm='adamw'")
    asked = ["normuon=True"] * bool(group.get("normuon"))
    asked += ["cautious='update'"] * (group.get("cautious") == "update")
    if asked:
        raise ValueError(
            f"{where} is a DTensor, and {' and '.join(asked)} is served for plain tensors alone; leave it out, or "
            "route it by algorithm='adamw'"
        )


def _is_ambiguous(p: Tensor, group: dict[str, Any]) -> bool:
    """Whether nothing tells a stack of matrices from a convolution: only those of one dimension have three."""
    return p.dim() == 3 and group.get("stacked") is None


def matrices(p: Tensor, group: dict[str, Any]) -> tuple[int, int, int]:
    """How many matrices ``p`` is a stack of, before its group cuts them further, and the rows and columns of each."""
    if group.get("stacked"):
        return p.shape[:-2].numel(), p.shape[-2], p.shape[-1]
    return 1, p.shape[0], p.shape[1:].numel()


def matrix_blocks(p: Tensor, group: dict[str, Any]) -> tuple[int, ...] | None:
    """The rows of each of the matrices that ``p`` is made of, one below the other; None: it can not be cut so."""
    sizes, heads, (count, rows, _) = group.get("split_sizes"), group.get("num_heads"), matrices(p, group)
    if _is_ambiguous(p, group):
        return None
    if heads is not None:
        return None if rows % heads else (rows // heads,) * heads * count
    if sizes is None:
        return (rows,) * count
    return tuple(sizes) * count if sum(sizes) == rows else None


def described(routes: dict[str, Route]) -> str:
    """The routing as text: how many go where, and the matrices that AdamW has by name."""
    muon = [name for name, each in routes.items() if each.algorithm == "muon"]
    by_why: dict[str, list[str]] = {}
    for name, each in routes.items():
        if each.algorithm == "adamw":
            by_why.setdefault(each.why, []).append(name)
    lines = [f"Muon steps {len(muon)} parameters by Muon, {len(routes) - len(muon)} by AdamW"]
    for why, names in by_why.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"  AdamW, {why}: {shown}")
    return "\n".join(lines)
