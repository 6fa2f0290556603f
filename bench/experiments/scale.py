"""``python -m bench.experiments.scale``: what a step of sharded training sends, for any number of processes.

A model of the calls of FSDP2, HSDP and ZeRO-1, and of what the optimizer adds to them: the norm's sums, and Muon's
matrices on their way to their owners and back. Processes of tests/test_sharding.py train a small model, and have to
make the calls that are told here, with as many bytes. ``--docs`` writes the tables of docs/sharding.md.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from genopt_ext import binned, optim

from ..method import ROOT
from ..readme import write_between

# Assumed, of a GPU among many: none was measured.
LINK = 50e9  # bytes a second that a process sends: 400 Gbit/s
ROUND = 10e-6  # seconds of latency in each round of a call
MESSAGE = 1e-6  # seconds to send each of many messages that need not wait for one another
MEMORY = 0.9 * 4.8e12  # bytes a second, of an H200
PRODUCTS = 0.7 * 989e12  # operations a second of bfloat16
PAGE = ROOT / "docs" / "sharding.md"
BEGIN = "<!-- python -m bench.experiments.scale --docs: begin -->"


@dataclass(frozen=True)
class Shapes:
    """A transformer. ``block``: the shapes of one layer's parameters; ``rest``: of those outside of layers."""

    blocks: int
    block: tuple[tuple[int, ...], ...]
    rest: tuple[tuple[int, ...], ...]

    @property
    def numel(self) -> int:
        return self.blocks * sum(map(math.prod, self.block)) + sum(map(math.prod, self.rest))

    @property
    def rows(self) -> int:
        return self.blocks * len(self.block) + len(self.rest)

    @property
    def matrices(self) -> Counter[tuple[int, ...]]:
        """Those of layers, by shape: what Muon steps."""
        return Counter({s: self.blocks * n for s, n in Counter(self.block).items() if len(s) == 2})


def transformer(layers: int, width: int, words: int) -> Shapes:
    block = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width), (width,), (width,))
    return Shapes(layers, block, ((words, width), (width,), (words, width)))


MODELS = {
    "1B": transformer(16, 2048, 50_304),
    "70B": transformer(84, 8192, 128_256),
    "1T": transformer(136, 24_576, 128_256),
}


@dataclass(frozen=True)
class Call:
    """``size``: bytes of the whole: gathered, reduced, or of all_to_all those that one process gives away."""

    kind: str
    ranks: int
    size: int
    times: int = 1

    @property
    def sent(self) -> float:
        """Bytes that one process sends, in a ring."""
        share = (self.ranks - 1) / self.ranks
        return self.times * self.size * {"all_reduce": 2 * share, "broadcast": 1.0}.get(self.kind, share)

    @property
    def messages(self) -> int:
        each = {"all_reduce": 2 * (self.ranks - 1), "broadcast": 1}.get(self.kind, self.ranks - 1)
        return self.times * each if self.ranks > 1 else 0

    @property
    def seconds(self) -> float:
        """Small ones go along a tree; messages of all_to_all need not wait for one another."""
        if self.ranks == 1:
            return 0.0
        rounds = math.ceil(math.log2(self.ranks)) * (2 if self.kind == "all_reduce" else 1)
        wait = MESSAGE * (self.ranks - 1) if self.kind == "all_to_all" else ROUND * rounds
        return self.times * wait + self.sent / LINK


def padded(shape: tuple[int, ...], ranks: int) -> int:
    """Elements that FSDP2 sends of a parameter: all processes have as many rows."""
    return -(-shape[0] // ranks) * ranks * math.prod(shape[1:])


def of_fsdp2(model: Shapes, shards: int, replicas: int = 1, weight: int = 2, grad: int = 2) -> list[Call]:
    """Weights gathered forward and backward, of what is in no layer once; gradients reduced, also among replicas."""
    if shards * replicas == 1:
        return []
    calls = []
    for shapes, count, gathers in ((model.block, model.blocks, 2), (model.rest, 1, 1)):
        numel = sum(padded(shape, shards) for shape in shapes)
        calls.append(Call("all_gather", shards, numel * weight, gathers * count))
        calls.append(Call("reduce_scatter", shards, numel * grad, count))
        if replicas > 1:
            calls.append(Call("all_reduce", replicas, numel // shards * grad, count))
    return calls


def of_zero1(model: Shapes, ranks: int, weight: int = 2, grad: int = 2) -> list[Call]:
    """DDP's sums, and each parameter from the process that has stepped it."""
    return [
        Call("all_reduce", ranks, model.numel * grad),
        *(Call("broadcast", ranks, math.prod(s) * weight, model.blocks) for s in model.block),
        *(Call("broadcast", ranks, math.prod(s) * weight) for s in model.rest),
    ]


def of_norm(model: Shapes, *lines: int) -> list[Call]:
    """Exact sums of each parameter's squares (genopt_ext.binned), along each dimension of the mesh."""
    words = binned.spread(torch.zeros(binned.WORDS, dtype=torch.int64), is_narrow=True)
    return [Call("all_reduce", ranks, words.nbytes * model.rows) for ranks in lines if ranks > 1]


def owned(model: Shapes, ranks: int) -> list[Counter[tuple[int, ...]]]:
    """The matrices of each process, by shape: each goes to who has least."""
    loads, made = [0] * ranks, [Counter[tuple[int, ...]]() for _ in range(ranks)]
    for shape in model.matrices.elements():
        owner = loads.index(min(loads))
        loads[owner] += math.prod(shape)
        made[owner][shape] += 1
    return made


def of_muon(model: Shapes, shards: int, rank: int = 0) -> list[Call]:
    """What one process sends of updates in bfloat16, to the owners, and back, of each shape."""
    calls, own = [], owned(model, shards)[rank]
    for shape, count in model.matrices.items() if shards > 1 else ():
        each = -(-shape[0] // shards)
        here = max(0, min(each, shape[0] - each * rank))
        calls.append(Call("all_to_all", shards, count * here * shape[1] * 2))
        calls.append(Call("all_to_all", shards, own[shape] * math.prod(shape) * 2))
    return calls


class Counting(TorchDispatchMode):
    """Counts calls of processes to each other, and their bytes, by kind, while it is entered."""

    KINDS = {
        "_allgather_base_": ("all_gather", 0),
        "_reduce_scatter_base_": ("reduce_scatter", 1),
        "allreduce_": ("all_reduce", 0),
        "alltoall_base_": ("all_to_all", 1),
        "broadcast_": ("broadcast", 0),
    }

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[str] = Counter()
        self.sizes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if func.namespace == "c10d" and name in self.KINDS:
            kind, place = self.KINDS[name]
            given = args[place]
            self.times[kind] += 1
            self.sizes[kind] += sum(t.nbytes for t in (given if isinstance(given, (list, tuple)) else [given]))
        return func(*args, **(kwargs or {}))


SMALL = transformer(3, 36, 50)


class _Small(nn.Module):
    """Has the parameters of :data:`SMALL`, and uses each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(_Layer(SMALL.block) for _ in range(SMALL.blocks))
        self.rest = nn.ParameterList(torch.randn(shape) for shape in SMALL.rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return torch.stack([x.sum(), *(p.sum() for p in self.rest)]).sum()


class _Layer(nn.Module):
    def __init__(self, shapes: Iterable[tuple[int, ...]]) -> None:
        super().__init__()
        self.params = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.stack([p.square().mean() for p in self.params]).sum()


def counted(way: str) -> tuple[Counting, list[Call]]:
    """What one process of those at hand sends in a second step with float32, and what the model says of it.

    Args:
        way: ``"fsdp2"``, ``"hsdp"`` (two replicas), ``"zero1"`` or ``"muon"`` (on FSDP2).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    ranks, net = dist.get_world_size(), _Small()
    opt: Any
    module: nn.Module = net
    if way == "zero1":
        module = DistributedDataParallel(net)
        opt = ZeroRedundancyOptimizer(module.parameters(), optimizer_class=optim.AdamW, lr=0.01)
        expected = of_zero1(SMALL, ranks, 4, 4)
    else:
        replicas = 2 if way == "hsdp" else 1
        shape = (replicas, ranks // replicas) if way == "hsdp" else (ranks,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
        shards = ranks // replicas
        expected = of_fsdp2(SMALL, shards, replicas, 4, 4) + of_norm(SMALL, shards, replicas)
        if way == "muon":
            named = [(f"{name}.{'embed' if 'rest' in name else 'weight'}", p) for name, p in net.named_parameters()]
            opt = optim.Muon(named, lr=0.01, max_grad_norm=1.0)
            expected += of_muon(SMALL, shards, dist.get_rank())
        else:
            opt = optim.AdamW(net.parameters(), lr=0.01, max_grad_norm=1.0)
    for _ in range(3):
        with Counting() as counting:
            module(torch.ones(())).backward()
            opt.step()
        opt.zero_grad()
    return counting, expected


def differences(counting: Counting, expected: Iterable[Call]) -> list[str]:
    """What was counted otherwise than expected."""
    times, sizes = Counter[str](), Counter[str]()
    for call in expected:
        times[call.kind] += call.times
        sizes[call.kind] += call.times * call.size
    return [
        f"{kind}: {counting.times[kind]} calls, {counting.sizes[kind]} bytes; expected {times[kind]}, {sizes[kind]}"
        for kind in sorted({*counting.times, *times})
        if (counting.times[kind], counting.sizes[kind]) != (times[kind], sizes[kind])
    ]


def products(model: Shapes, ranks: int) -> float:
    """Seconds of the owner with most to do: five iterations, each of two products with a square and one of it."""

    def work(a: int, b: int) -> int:
        n, m = min(a, b), max(a, b)
        return 5 * (4 * n * n * m + 2 * n**3)

    return max(sum(count * work(*s) for s, count in own.items()) for own in owned(model, ranks)) / PRODUCTS


def _seconds(x: float) -> str:
    return f"{1e6 * x:.0f} us" if x < 1e-3 else f"{1e3 * x:.3g} ms" if x < 1 else f"{x:.3g} s"


def _bytes(x: float) -> str:
    unit, name = next((u, n) for u, n in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if x >= u or n == "MB")
    return f"{x / unit:.3g} {name}"


WAYS: dict[str, Callable[[Shapes, int], tuple[list[Call], float, list[Call]]]] = {
    "FSDP2": lambda m, n: (of_fsdp2(m, n), 16 / n, of_norm(m, n)),
    "HSDP, 8 shards": lambda m, n: (of_fsdp2(m, 8, n // 8), 16 / 8, of_norm(m, 8, n // 8)),
    "ZeRO-1": lambda m, n: (of_zero1(m, n), 4 + 12 / n, []),
}


def tables() -> str:
    """Markdown."""
    lines = [
        "| | processes | | memory each | sent each, a step | messages each | s sending | norm | AdamW's bytes |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, model in MODELS.items():
        for ranks in (8, 512, 8192):
            for way, made in WAYS.items():
                if "HSDP" in way and ranks == 8:
                    continue  # FSDP2
                calls, held, norm = made(model, ranks)
                cells = [
                    name,
                    f"{ranks:,}",
                    way,
                    _bytes(held * model.numel),
                    _bytes(sum(call.sent for call in calls)),
                    f"{sum(call.messages for call in calls):,}",
                    _seconds(sum(call.seconds for call in calls)),
                    _seconds(sum(call.seconds for call in norm)) if norm else "—",
                    _seconds(28 * model.numel / (8 if "HSDP" in way else ranks) / MEMORY),
                ]
                lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| Muon on FSDP2 | processes | sent each, a step | s sending | its products, s | owners |"]
    lines.append("|---|--:|--:|--:|--:|--:|")
    for name, model in MODELS.items():
        for ranks in (8, 512, 8192):
            calls = of_muon(model, ranks)
            cells = [name, f"{ranks:,}", _bytes(sum(c.sent for c in calls)), _seconds(sum(c.seconds for c in calls))]
            cells += [_seconds(products(model, ranks)), f"{min(ranks, sum(model.matrices.values())):,}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help=f"write the tables into {PAGE.name}")
    if parser.parse_args().docs:
        write_between(PAGE, BEGIN, tables())
    else:
        print(tables())


if __name__ == "__main__":
    main()
