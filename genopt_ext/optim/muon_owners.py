"""Matrices that processes share: each is made orthogonal whole, by one of the processes, its owner.

Before the products each process sends what it has of a matrix to its owner, and after them the owner sends each process
its part of the update: one ``all_to_all`` each way for all matrices of one form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import sharding

Loads = dict[Any, list[int]]  # of a group of processes: the elements that each owns so far


def why_not(p: Tensor) -> str | None:
    """Why the matrices of a DTensor can not be stepped; None where they can."""
    if not sharding.is_cut_plainly(p):
        return "whose part here is none that Shard or Replicate would leave"
    if sum(each.is_shard() for each in p.placements) > 1:  # type: ignore[attr-defined]
        return "and Muon serves matrices that are cut along one dimension of their mesh"
    return None


@dataclass
class Owners:
    """Who owns which of some matrices of one form, that are DTensors cut alike.

    Attributes:
        group: the processes that share each matrix, and ``number``, that of this one.
        dim: along which matrices are cut, and ``lengths``, what each process has along it.
        counts: how many matrices each process owns, the first of them the first.
    """

    group: Any
    number: int
    dim: int
    lengths: list[int]
    counts: list[int]

    @classmethod
    def make(cls, p: Tensor, count: int, loads: Loads) -> Owners | None:
        """Of ``count`` matrices like the DTensor ``p``; each goes to who has least, which ``loads`` is told.

        Returns:
            None where every process has all of them.
        """
        mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
        along = next((k for k, each in enumerate(placements) if each.is_shard() and mesh.size(k) > 1), None)
        if along is None:
            return None
        group, size, dim = mesh.get_group(along), mesh.size(along), placements[along].dim
        each = -(-p.shape[dim] // size)
        lengths = [max(0, min(each, p.shape[dim] - each * k)) for k in range(size)]
        owned = loads.setdefault(tuple(dist.get_process_group_ranks(group)), [0] * size)
        counts = [0] * size
        for _ in range(count):
            least = owned.index(min(owned))
            counts[least] += 1
            owned[least] += p.numel()
        return cls(group, mesh.get_local_rank(along), dim, lengths, counts)

    def gather(self, parts: Tensor) -> Tensor:
        """Of this process' parts of all matrices, ``[matrices, *part]``: the whole ones that it owns."""
        shapes = []
        for length in self.lengths:
            shape = [self.counts[self.number], *parts.shape[1:]]
            shape[self.dim + 1] = length
            shapes.append(torch.Size(shape))
        got = self._exchanged(parts, self._of_others(parts), [shape.numel() for shape in shapes])
        return torch.cat([part.view(shape) for part, shape in zip(got, shapes, strict=True)], self.dim + 1)

    def scatter(self, made: Tensor, parts: Tensor) -> Tensor:
        """The way back: of the matrices that this process owns, its parts of all; ``parts``: those before."""
        sent = [part.reshape(-1) for part in made.split(self.lengths, self.dim + 1)]
        got = self._exchanged(torch.cat(sent), [part.numel() for part in sent], self._of_others(parts))
        return torch.cat(got).view(parts.shape)

    def _of_others(self, parts: Tensor) -> list[int]:
        """How many numbers of this process' parts belong to matrices of each owner."""
        return [count * parts.shape[1:].numel() for count in self.counts]

    def _exchanged(self, t: Tensor, sent: list[int], received: list[int]) -> tuple[Tensor, ...]:
        """So many numbers of ``t`` to each process, one after the other, and what each sends."""
        size, got = t.element_size(), t.new_empty(sum(received))
        dist.all_to_all_single(  # as bytes: not every backend knows every dtype
            got.view(torch.uint8),
            t.contiguous().view(-1).view(torch.uint8),
            [n * size for n in received],
            [n * size for n in sent],
            group=self.group,
        )
        return got.split(received)
