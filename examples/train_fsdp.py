"""Trains the GPT of train_gpt.py on several processes, sharded by FSDP2; any number of them resumes from a checkpoint.

    torchrun --nproc-per-node 2 examples/train_fsdp.py

With GPUs, as many processes as there are, over NCCL; without, over gloo. Each batch is the same for any number of
processes: they share it out. A network adds up gradients in an order that depends on the number of processes; with
--fixed-order 4 the gradients of four shares are added up one after another, whoever has them: then four processes that
are killed, and two that resume, end with the very bits of four that nobody disturbed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from train_gpt import GPT, batches, load_text, loss_of

from genopt_ext import optim


def last_checkpoint(folder: Path) -> Path | None:
    """The latest that was saved whole: its metadata is written last."""
    saved = [path.parent for path in folder.glob("step-*/.metadata")]
    return max(saved, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def state_of(model: torch.nn.Module, opt: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, opt)
    return {"model": of_model, "optimizer": of_optimizer, "step": step}


class InFixedOrder(ReduceScatter):
    """Adds up the gradients of shares in their order: each process has as many, which follow one another.

    Only the last share of a step makes the sum, and others zeros, as FSDP2 adds up what is made of each.
    """

    def __init__(self, shares_of_process: int) -> None:
        self.count, self.parts = shares_of_process, list[torch.Tensor]()

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        here = torch.empty_like(input_tensor)
        dist.all_to_all_single(here, input_tensor, group=group)
        self.parts.append(here.view(-1, output_tensor.numel()))  # a row of each process
        output_tensor.zero_()
        if len(self.parts) == self.count:
            for share in torch.stack(self.parts, 1).flatten(0, 1):
                output_tensor += share
            self.parts.clear()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=12, help="sequences in a step, of all processes together")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--optimizer", default="AdamW", help="a class of genopt_ext.optim")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("build/fsdp"), help="where to save, and to resume from"
    )
    parser.add_argument(
        "--fixed-order", type=int, metavar="N", help="add up the gradients of N shares of a batch in their order"
    )
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    return parser.parse_args()


def main() -> None:
    args = parse()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    shares = args.fixed_order or size
    if args.batch % shares or shares % size:
        raise SystemExit(f"--batch {args.batch} can not be shared out in {shares} shares among {size} processes")
    own = range(rank * shares // size, (rank + 1) * shares // size)
    if kind == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    ids, symbols = load_text()

    torch.manual_seed(args.seed)
    model = GPT(symbols, args.context, args.width, args.layers).to(kind)
    mesh = init_device_mesh(kind, (size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if args.fixed_order and isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(InFixedOrder(len(own)))
            module.set_gradient_divide_factor(1.0)
    # Clipping sees all shards: the norms of all processes are joined once a step.
    opt = getattr(optim, args.optimizer)(model.parameters(), lr=args.lr, weight_decay=0.1, max_grad_norm=1.0)

    first = 0
    if (path := last_checkpoint(args.checkpoints)) is not None:
        opt.init_state()  # to load into
        state = state_of(model, opt, 0)
        dcp.load(state, checkpoint_id=path)
        set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        first = state["step"]
        if rank == 0:
            print(f"resumes from {path}", flush=True)

    begin = time.perf_counter()
    for step, batch in enumerate(batches(ids, args, args.steps, seed=args.seed)):
        if step < first:
            continue
        loss = torch.zeros((), device=kind)
        for share in own:
            part = loss_of(model, batch[share::shares].to(kind))
            (part / shares if args.fixed_order else part).backward()  # FSDP2 itself takes the mean over processes
            loss += part.detach() / shares
        opt.step()
        opt.zero_grad()
        if (step + 1) % 10 == 0 or step + 1 == args.steps:
            dist.all_reduce(loss)
            if rank == 0:
                each = (time.perf_counter() - begin) / (step + 1 - first)
                print(
                    f"step {step + 1}: loss {loss:.4f}, gradient norm {opt.grad_norm:.3f}, {1e3 * each:.0f} ms a step",
                    flush=True,
                )
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            dcp.save(state_of(model, opt, step + 1), checkpoint_id=args.checkpoints / f"step-{step + 1}")
    dist.barrier()  # gloo's threads are done with what they were sent, before Python ends
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
