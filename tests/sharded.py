"""What the processes of test_sharding.py run: each function here is one of a world of several, with gloo."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta
from itertools import product

import cases
import torch
import torch.distributed as dist
from cases import NAN, assert_same_bits, randn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import genopt_ext
from genopt_ext import optim, step_in_backward


def world(size, name):
    """Forks ``size`` processes that run the function ``name``; raises where one fails."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        children = [os.fork() or run(rank, size, name, f"{folder}/store") for rank in range(size)]
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * size


def run(rank, size, name, store):
    status = 1
    try:
        warnings.simplefilter("ignore")
        timeout = timedelta(seconds=30)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
        globals()[name](rank)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def refused(call, match, opt, kind=RuntimeError):
    """The call raises, with all these words, and parameters, gradients and state of this process are as they were."""
    said = "".join(f"(?=.*{re.escape(words)})" for words in match)
    cases.refused(opt, f"(?s){said}", kind, call)


# FSDP1


def model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))


def fsdp1(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    x = torch.linspace(-1, 1, 28).view(4, 7)

    def wrapped(use_orig_params, strategy="FULL_SHARD"):
        return FullyShardedDataParallel(
            model(),
            sharding_strategy=ShardingStrategy[strategy],
            use_orig_params=use_orig_params,
            device_id=torch.device("cpu"),
        )

    def backward(net, scale=1.0):
        (net(x).square().sum() * scale).backward()

    def pieces_of(plain, net):
        """The weights of ``plain`` as ``net`` has them, whole."""
        with FullyShardedDataParallel.summon_full_params(net):
            for p, q in zip(plain.parameters(), net.module.parameters(), strict=True):
                torch.testing.assert_close(p.detach().view_as(q), q.detach())

    asked = {
        "max_grad_norm": lambda opt: setattr(opt, "max_grad_norm", 0.1),
        "clip_per_param": lambda opt: opt.param_groups[0].update(clip_per_param=0.1),
        "agc": lambda opt: opt.param_groups[0].update(agc=0.1),
        "skip_nonfinite": lambda opt: setattr(opt, "skip_nonfinite", True),
    }
    for use_orig_params in (True, False):
        for backend in ("auto", "reference"):
            where = ["AdamW.step: group 0 parameter 0 ", "FSDP1", "clip_grad_norm_", "ShardedGradScaler", "fully_shard"]
            for name, ask in asked.items():
                given = {name: True if name == "skip_nonfinite" else 0.1}
                for strategy in ("FULL_SHARD", "SHARD_GRAD_OP"):
                    net = wrapped(use_orig_params, strategy)
                    opt = optim.AdamW(net.parameters(), lr=0.1, backend=backend, **given)
                    backward(net)
                    refused(opt.step, [*where, name], opt)
                net = wrapped(use_orig_params)
                opt = optim.AdamW(net.parameters(), lr=0.1, backend=backend)
                backward(net)
                opt.step()
                opt.zero_grad()
                backward(net)
                ask(opt)
                refused(opt.step, [*where, name], opt)
                opt.accumulate()
                backward(net)
                refused(opt.step, [*where, name], opt)
            # Element by element all is served, and FSDP clips.
            net, plain = wrapped(use_orig_params), model()
            opts = [
                optim.AdamW(m.parameters(), lr=0.1, backend=backend, clip_grad_value=0.05, ema_decay=0.9)
                for m in (net, plain)
            ]
            for _ in range(3):
                backward(net)
                backward(plain)
                norm = net.clip_grad_norm_(0.1)
                torch.testing.assert_close(norm, genopt_ext.clip_grad_norm_(plain.parameters(), 0.1))
                for opt in opts:
                    opt.step()
                    opt.zero_grad()
            pieces_of(plain, net)

        net = wrapped(use_orig_params)
        opt = optim.AdamW(net.parameters(), fused=True)
        backward(net)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(2):
                genopt_ext.clip_grad_norm_(net.parameters(), 1e9)
        assert [str(w.message).split("(")[0] for w in told] == ["genopt_ext: clip_grad_norm_: parameter 0 "]
        genopt_ext._backend._told.clear()
        refused(lambda opt=opt: step_in_backward(opt), ["group 0 parameter 0", "FSDP1"], opt, ValueError)
        scaler = genopt_ext.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(1))
        refused(lambda scaler=scaler, opt=opt: scaler.step(opt), ["genopt_ext.GradScaler would see"], opt)

        # One process finds an infinity, all skip.
        for fused in (True, False):
            net = wrapped(use_orig_params)
            opt = optim.AdamW(net.parameters(), fused=fused)
            scaler = ShardedGradScaler("cpu", init_scale=4.0)
            before = [p.detach().clone() for p in net.parameters()]
            backward(net, scaler.scale(torch.ones(())))
            if rank == 0:
                next(p.grad for p in net.parameters() if p.grad is not None)[0] = NAN
            scaler.step(opt)
            scaler.update()
            assert scaler.get_scale() == 2.0
            assert_same_bits([p.detach() for p in net.parameters()], before)

    # Each process has all of a flat parameter.
    net, plain = wrapped(False, "NO_SHARD"), model()
    opts = [optim.SGD(m.parameters(), lr=0.1, max_grad_norm=0.1, skip_nonfinite=True) for m in (net, plain)]
    for _ in range(2):
        backward(net)
        backward(plain)
        for opt in opts:
            opt.step()
            opt.zero_grad()
    torch.testing.assert_close(opts[0].grad_norm, opts[1].grad_norm)
    pieces_of(plain, net)


# DTensors

SHAPES = [(5, 3), (7,), (), (2, 3, 5), (6, 4)]
OPTIONS = [
    dict(max_grad_norm=0.5),
    dict(max_grad_norm=0.5, skip_nonfinite=True),
    dict(clip_per_param=0.3),
    dict(agc=0.05),
    dict(skip_nonfinite=True, clip_grad_value=0.5),
]


def meshes():
    """One of all processes; of four also a grid, and a line of it."""
    yield init_device_mesh("cpu", (dist.get_world_size(),))
    if dist.get_world_size() == 4:
        yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))


def placements(line, grid=None):
    """Where each of SHAPES lies: a mesh and placements, or None for a plain tensor that every process has."""
    yield "FSDP2", [(line, [Shard(0)]) if shape else (line, [Replicate()]) for shape in SHAPES]
    yield "TP", [(line, [Shard(len(shape) - 1) if len(shape) > 1 else Replicate()]) for shape in SHAPES]
    yield "some plain", [(line, [Shard(0)]) if len(shape) > 1 else None for shape in SHAPES]
    if grid is not None:
        yield "HSDP", [(grid, [Replicate(), Shard(0)]) if shape else (grid, [Replicate()] * 2) for shape in SHAPES]
        yield "2-D", [(grid, [Shard(0), Shard(1)]) if len(shape) > 1 else (grid, [Replicate()] * 2) for shape in SHAPES]
        yield "lines of a grid", [(grid["rows"], [Shard(0)]), *((grid["columns"], [Replicate()]) for _ in SHAPES[1:])]


def local(t):
    return t.to_local() if isinstance(t, DTensor) else t


def full(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def spread(whole, place):
    # No process has to ask another, as all have the same.
    return whole.clone() if place is None else distribute_tensor(whole.clone(), *place, src_data_rank=None)


def spoil(grad):
    """One element becomes NaN in one process alone, also where others have the same: in the last that has any."""
    counts = [0] * dist.get_world_size()
    dist.all_gather_object(counts, local(grad).numel())
    if dist.get_rank() == max(rank for rank, count in enumerate(counts) if count):
        local(grad).view(-1)[0] = NAN


def assert_close(given, expected, what):
    torch.testing.assert_close(given, expected, msg=lambda text: f"{what}, process {dist.get_rank()}: {text}")


def dtensors(rank):
    """Steps equal those of one process, and are skipped by all or by none."""
    ways = list(product(OPTIONS, [(False, "auto"), (True, "reference")]))
    for n, (name, places) in enumerate(placements(*meshes())):
        for options, (in_groups, backend) in ways[n % 3 :: 3]:
            what = f"{name}, {options}, in groups: {in_groups}"
            whole = [torch.nn.Parameter(randn(shape, i)) for i, shape in enumerate(SHAPES)]
            parts = [torch.nn.Parameter(spread(p.detach(), at)) for p, at in zip(whole, places, strict=True)]
            own = {key: value for key, value in options.items() if in_groups and key != "skip_nonfinite"}
            opts = [
                optim.AdamW([{"params": ps[:2], **own}, {"params": ps[2:]}], lr=0.1, backend=backend, **options)
                for ps in (whole, parts)
            ]
            for step in range(4):
                for i, (p, q) in enumerate(zip(whole, parts, strict=True)):
                    p.grad = randn(p.shape, 100 * (step + 1) + i)
                    q.grad = spread(p.grad, places[i])
                spoiled = step in (1, 2) and "skip_nonfinite" in options
                if spoiled:
                    k = 3 * step - 2  # what all have, or a shard
                    whole[k].grad.view(-1)[0] = NAN
                    spoil(parts[k].grad)
                for opt in opts:
                    if step == 3:
                        opt.accumulate()
                    opt.step()
                if opts[0].grad_norm is not None and not spoiled:
                    assert_close(opts[1].grad_norm, opts[0].grad_norm, f"{what}, step {step}")
                for i, (p, q) in enumerate(zip(whole, parts, strict=True)):
                    assert_close(full(q).detach(), p.detach(), f"{what}, step {step}, parameter {i}")
            assert opts[0].skipped_steps == opts[1].skipped_steps == 2 * ("skip_nonfinite" in options), what


def scalers(rank):
    """One process finds an infinity: all skip, and our scaler's scale stays the same in all.

    torch's scaler agrees over shards, not over what all have; under fused=True the optimizer does.
    """
    for (name, places), make in product(placements(*meshes()), (genopt_ext.GradScaler, torch.amp.GradScaler)):
        if make is torch.amp.GradScaler and len({at and at[0] for at in places}) > 1:
            continue  # torch's own does not unscale plain tensors and DTensors, or two meshes, together
        for fused in (True, False) if make is genopt_ext.GradScaler else (True,):
            what = f"{name}, {make}, fused: {fused}, process {rank}"
            params = [torch.nn.Parameter(spread(randn(shape, 0), at)) for shape, at in zip(SHAPES, places, strict=True)]
            opt = optim.AdamW(params, lr=0.1, fused=fused)
            scaler = make("cpu", init_scale=4.0)
            scaler.scale(torch.ones(1))
            for step in range(2):
                before = [local(p).detach().clone() for p in params]
                for i, p in enumerate(params):
                    p.grad = spread(randn(p.shape, 10 * step + i), places[i])
                if step == 1:
                    spoil(params[-1].grad)
                scaler.step(opt)
                scaler.update()
                assert make is torch.amp.GradScaler or scaler.get_scale() == (2.0 if step else 4.0), what
                for p, old in zip(params, before, strict=True):
                    assert torch.equal(local(p), old) == (step == 1 or not old.numel()), what


# Checkpoints


def alone(name, folder, **options):
    """In a world of one process: torch's own ways to save an optimizer's state give it back."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed._state_dict_utils import _offload_state_dict_to_cpu
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)

    def made(seed):
        torch.manual_seed(seed)
        net = torch.nn.Linear(64, 80)
        opt = getattr(optim, name)(net.parameters(), lr=0.1, **options)
        for _ in range(2):
            net(torch.ones(3, 64)).square().sum().backward()
            opt.step()
        opt.zero_grad()
        return net, opt

    net, opt = made(0)
    plain = opt.state_dict()
    assert_same_bits(_offload_state_dict_to_cpu(plain)["state"], plain["state"])
    dcp.save({"opt": plain}, checkpoint_id=f"{folder}/now")
    dcp.async_save({"opt": plain}, checkpoint_id=f"{folder}/later").result()
    for at in ("now", "later"):
        _, other = made(1)
        there = {"opt": other.state_dict()}
        dcp.load(there, checkpoint_id=f"{folder}/{at}")
        other.load_state_dict(there["opt"])
        assert_same_bits(other.state_dict()["state"], plain["state"])
        assert other.state_dict()["param_groups"] == plain["param_groups"]
    net2, other = made(1)
    set_optimizer_state_dict(net2, other, get_optimizer_state_dict(net, opt))
    assert_same_bits(other.state_dict()["state"], plain["state"])
    dist.destroy_process_group()
