"""Which parameters Muon steps as matrices, and which it leaves to AdamW, and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .. import sharding, tracing

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


def route(name: str | None, p: Tensor, asked: str | None, adamw: Predicate | None) -> Route:
    """Where a parameter goes. ``asked``: by its group; ``adamw``: in the place of our own look at names."""
    if asked is not None:
        return Route(asked, _ASKED)
    if p.is_complex() or not p.is_floating_point():
        return Route("adamw", f"{p.dtype}")
    if p.dim() < 2:
        return Route("adamw", f"{p.dim()} dimensions" if p.dim() != 1 else "1 dimension")
    if name is not None and adamw is not None:
        return Route("adamw", "asked for by adamw=") if adamw(name, p) else Route("muon", _shape(p))
    if name is not None and is_embedding(name):
        return Route("adamw", "named as an embedding")
    if name is not None and is_head(name):
        return Route("adamw", "named as a head")
    return Route("muon", _shape(p))


def _shape(p: Tensor) -> str:
    return "a matrix" if p.dim() == 2 else f"flattened to [{p.shape[0]}, {p[0].numel() if len(p) else 0}]"


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
    if tracing.is_subclass(p):
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
    if matrix_blocks(p, group) is None:
        sizes, heads = group.get("split_sizes"), group.get("num_heads")
        what = f"num_heads={heads} does not divide" if sizes is None else f"split_sizes={sizes} do not add up to"
        raise ValueError(f"{where} has {p.shape[0]} rows, which {what}; give that option in a group of its own")


def matrix_blocks(p: Tensor, group: dict[str, Any]) -> tuple[int, ...] | None:
    """The rows of each of the matrices that ``p`` is made of, one below the other; None: it can not be cut so."""
    sizes, heads = group.get("split_sizes"), group.get("num_heads")
    rows = p.shape[0] if p.dim() else 0
    if heads is not None:
        return None if rows % heads else (rows // heads,) * heads
    if sizes is None:
        return (rows,)
    return tuple(sizes) if sum(sizes) == rows else None


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
