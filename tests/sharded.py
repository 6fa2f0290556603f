"""What the processes of test_sharding.py run: each function here is one of a world of several, with gloo."""

from __future__ import annotations

import gc
import math
import os
import re
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta
from itertools import product
from unittest import mock

import cases
import pytest
import torch
import torch.distributed as dist
from cases import NAN, assert_same_bits, randn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import genopt_ext
from genopt_ext import _backend, optim, sharding, step_in_backward
from genopt_ext.reference import codecs


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
        torch.set_num_threads(1)  # makes a fork's pool, which threads of backward would make at the same time, and fail
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
            net = wrapped(use_orig_params)
            opt = optim.Prodigy(net.parameters(), backend=backend)
            backward(net)
            refused(opt.step, ["Prodigy.step: group 0 parameter 0 ", "FSDP1", "the estimate of Prodigy"], opt)
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
                    assert_same_bits(opts[1].grad_norm, opts[0].grad_norm, f"{what}, step {step}")
                for i, (p, q) in enumerate(zip(whole, parts, strict=True)):
                    assert_same_bits(full(q).detach(), p.detach(), f"{what}, step {step}, parameter {i}")
            assert opts[0].skipped_steps == opts[1].skipped_steps == 2 * ("skip_nonfinite" in options), what


def clips(rank):
    """Functions that clip see all of a DTensor, whatever its mesh and what stands beside it."""
    for (name, at), norm in product(placements(*meshes()), (2.0, 1.0, math.inf)):
        what = f"{name}, norm {norm}"
        for spoiled in (False, True):
            whole = [torch.nn.Parameter(randn(shape, i)) for i, shape in enumerate(SHAPES)]
            parts = [torch.nn.Parameter(spread(p.detach(), to)) for p, to in zip(whole, at, strict=True)]
            for i, (p, q) in enumerate(zip(whole, parts, strict=True)):
                p.grad = randn(p.shape, 10 + i)
                q.grad = spread(p.grad, at[i])
            if spoiled:
                whole[0].grad.view(-1)[-1] = NAN
                spoil(parts[0].grad)
                for call in (genopt_ext.clip_grad_norm_, genopt_ext.get_total_norm):
                    given = [q.grad for q in parts] if call is genopt_ext.get_total_norm else parts
                    more = {"max_norm": 0.5} if call is genopt_ext.clip_grad_norm_ else {}
                    with pytest.raises(RuntimeError, match="non-finite"):
                        call(given, norm_type=norm, error_if_nonfinite=True, **more)
            norms = [genopt_ext.get_total_norm([p.grad for p in ps], norm) for ps in (whole, parts)]
            norms += [genopt_ext.clip_grad_norm_(ps, 0.5, norm) for ps in (whole, parts)]
            if spoiled:
                assert torch.stack(norms).isnan().all(), what
                continue
            for found in norms[1:]:
                assert_same_bits(found, norms[0], what)
            for p, q in zip(whole, parts, strict=True):
                assert_same_bits(full(q.grad), p.grad, what)
    # Gradients that are yet to be added up.
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    q = torch.nn.Parameter(spread(randn((6, 4), 0), (mesh, [Replicate()])))
    q.grad = DTensor.from_local(randn((6, 4), rank), mesh, [Partial()], run_check=False)
    whole = sum(randn((6, 4), k) for k in range(dist.get_world_size()))
    assert_close(genopt_ext.clip_grad_norm_([q], 0.5), whole.norm(), "partial")
    assert_close(full(q.grad).norm(), torch.tensor(0.5), "partial")


# Rows that processes share unevenly, or of which some have none; less and more than a tile.
CUT = [(5, 3), (7,), (600, 2), (3, 2, 90), (), (1, 300), (0, 4)]
# Rules that know of a parameter as a whole, which the reference serves. What Adafactor knows of a matrix' rows and
# columns is added up in another order.
WHOLES = ("LARS", "LAMB", "StableAdamW", "Prodigy", "Adafactor")
ASKED = [
    dict(max_grad_norm=0.5),
    dict(ema_decay=0.9, clip_per_param=0.3),
    dict(clip_grad_value=0.5, skip_nonfinite=True),
    dict(agc=0.05),
    {},
]


# Those whose 8-bit state is the same however they are cut: of whole blocks in each row, or smaller than SMALL.
CODED, SMALL = [(5, 3), (7,), (3, 3072), (70, 64), (3, 2, 96), (), (1, 320), (0, 128), (2, 160)], 64

# Those that are rounded natively however they are cut: what a process has of a row is made of whole tiles.
IN_RUNS = [(7,), (4, 384), (), (3, 2, 384)]


def cuts():
    """Each a name, where a tensor of a shape lies, and whether what a process has is contiguous in the whole."""
    line, *grids = meshes()
    yield "FSDP2", lambda shape: (line, [Shard(0) if shape else Replicate()]), True
    yield "TP", lambda shape: (line, [Shard(len(shape) - 1) if shape else Replicate()]), False
    for grid in grids:
        yield "HSDP", lambda shape, grid=grid: (grid, [Replicate(), Shard(0) if shape else Replicate()]), True
        both = ([Replicate()] * 2, [Shard(0), Shard(1)])
        yield "2-D", lambda shape, grid=grid, both=both: (grid, both[len(shape) > 1]), False


def same_bits(rank):
    """Steps have the bits of one process that has all, states too."""
    size = dist.get_world_size()
    rows = cases.stored(cases.STATEFUL, list(cuts()))
    for n, (case, (name, cut, follows), storage, dtype) in enumerate(rows):
        if n % 4 != size % 4 or cases.is_refused({"case": case, "storage": storage, "dtype": dtype}):
            continue
        asked, way = ASKED[n % len(ASKED)], ("step", "accumulate", "step_and_zero_")[n // 3 % 3]
        adds_up = case.name == "Adafactor"
        rounds = storage.options.get("state_dtype") == torch.bfloat16 or "param_rounding" in storage.options
        native = case.name not in WHOLES
        if case.name == "Adafactor" and "param_rounding" in storage.options:
            continue  # which matrices refuse
        kept, shapes = storage.options, CUT if follows or not rounds else IN_RUNS
        if "int8" in storage.name:
            kept, shapes = {**kept, "min_int8_size": SMALL}, CODED if follows else CODED[:3]
        what = f"{name}, {case}, {storage}, {dtype}, {asked}, {way}"
        whole = [torch.nn.Parameter(randn(shape, i, dtype)) for i, shape in enumerate(shapes)]
        parts = [torch.nn.Parameter(spread(p.detach(), cut(p.shape))) for p in whole]
        opts = [
            case.ours(ps, backend=backend, **asked, **kept)
            for ps, backend in ((whole, "auto"), (parts, cases.NATIVE if native else "auto"))
        ]
        for group in (group for opt in opts for group in opt.param_groups if "rounding_seed" in group):
            group["rounding_seed"] = 5
        for step in range(3):
            for i, (p, q) in enumerate(zip(whole, parts, strict=True)):
                p.grad = None if (i + step) % 4 == 3 else randn(p.shape, 100 * (step + 1) + i, dtype)
                q.grad = None if p.grad is None else spread(p.grad, cut(p.shape))
            for opt in opts:
                if way == "accumulate":
                    opt.accumulate()
                opt.step_and_zero_() if way == "step_and_zero_" else opt.step()
        same = assert_close if adds_up else assert_same_bits
        for i, (p, q) in enumerate(zip(whole, parts, strict=True)):
            if adds_up and dtype in cases.SIXTEEN:
                continue  # where a sum has another last bit, another weight is rounded up
            same(full(q).detach(), p.detach(), f"{what}, parameter {i}")
            of_whole, of_part = opts[0].state[p], opts[1].state[q]
            assert of_whole.keys() == of_part.keys(), what
            for key, t in of_whole.items():
                same(full(of_part[key]), t, f"{what}, parameter {i}, {key}")


# Matrices of one form and of others; more and fewer rows than processes, and stacks.
MATRICES = [(12, 8), (12, 8), (12, 8), (7, 40), (3, 5), (40, 24), (1, 6), (4, 6, 10), (4, 6, 10)]
CODED_MATRICES = [(12, 64), (12, 64), (7, 128), (3, 4, 16)]
OF_MUON = [
    {},
    dict(max_grad_norm=0.5, ema_decay=0.9, weight_decay=0.1),
    dict(skip_nonfinite=True, nesterov=False, adjust_lr_fn="match_rms_adamw"),
    dict(ns_coefficients="polar_express", clip_grad_value=0.5, cautious="weight_decay"),
]


def muon(rank):
    """Muon steps matrices that processes share as one process that has all, to the bit."""
    size = dist.get_world_size()
    line, *grids = meshes()
    cuts = {
        "FSDP2": (line, lambda shape: [Shard(0)]),
        "TP": (line, lambda shape: [Shard(len(shape) - 1)]),
        "alike": (line, lambda shape: [Replicate()]),
    }
    for grid in grids[:1]:
        cuts["HSDP"] = grid, lambda shape: [Replicate(), Shard(0)]
    storages = [
        ({}, torch.float32),
        ({}, torch.float64),
        (dict(master_weights=True), torch.bfloat16),
        (dict(param_rounding="stochastic"), torch.bfloat16),
        (dict(state_dtype=torch.int8, min_int8_size=SMALL), torch.float32),
    ]
    for (name, (mesh, cut)), asked, (storage, dtype) in product(cuts.items(), OF_MUON, storages):
        what = f"{name}, {asked}, {storage}, {dtype}"
        shapes = MATRICES
        if "state_dtype" in storage:
            if name == "TP":
                continue  # in float32
            shapes = CODED_MATRICES
        whole = [torch.nn.Parameter(randn(shape, i, dtype)) for i, shape in enumerate([*shapes, (9,)])]
        at = [(mesh, cut(p.shape)) for p in whole]
        parts = [torch.nn.Parameter(spread(p.detach(), to)) for p, to in zip(whole, at, strict=True)]
        opts = []
        by_reference = name == "TP" and "param_rounding" in storage
        for ps, backend in ((whole, "auto"), (parts, "auto" if by_reference else cases.NATIVE)):
            named = [(f"layer.{i}.weight", p) for i, p in enumerate(ps)]
            opts.append(optim.Muon(named, lr=0.1, stacked=True, backend=backend, **asked, **storage))
            for group in opts[-1].param_groups:
                group.update({"rounding_seed": 5} if "rounding_seed" in group else {})
        for step in range(4):
            for i, (p, q) in enumerate(zip(whole, parts, strict=True)):
                p.grad = None if (i + step) % 5 == 4 else randn(p.shape, 100 * (step + 1) + i, dtype)
                q.grad = None if p.grad is None else spread(p.grad, at[i])
            if "skip_nonfinite" in asked and step == 2:
                whole[0].grad[-1, -1] = NAN
                spoil(parts[0].grad)
            for opt in opts:
                opt.step()
        if name in ("FSDP2", "TP") and size > 1:
            batches = [batch for chunk in opts[1].stepper._last[1] for batch in chunk.batches]
            numels = [batch.places[0][2].numel() for batch in batches]
            owned = [sum(b.owners.counts[k] * n for b, n in zip(batches, numels, strict=True)) for k in range(size)]
            assert max(owned) - min(owned) <= max(numels), what
        for i, (p, q) in enumerate(zip(whole, parts, strict=True)):
            assert_same_bits(full(q).detach(), p.detach(), f"{what}, parameter {i}")
            of_whole, of_part = opts[0].state[p], opts[1].state[q]
            assert of_whole.keys() == of_part.keys(), what
            for key, t in of_whole.items():
                assert_same_bits(full(of_part[key]), t, f"{what}, parameter {i}, {key}")
        assert opts[0].skipped_steps == opts[1].skipped_steps == ("skip_nonfinite" in asked), what
    # All skip what one process alone is told to, plain tensors of AdamW too; asked once for both algorithms.
    q = torch.nn.Parameter(spread(randn((12, 8), 0), (line, [Shard(0)])))
    bias = torch.nn.Parameter(randn((8,), 1))
    opt = optim.Muon([("layer.weight", q), ("layer.bias", bias)], lr=0.1)
    q.grad, bias.grad = torch.ones_like(q), torch.ones_like(bias)
    before = [local(p).detach().clone() for p in (q, bias)]
    opt.found_inf = torch.tensor(float(rank == size - 1))
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as asked:
        opt.step()
    assert asked.call_count == (size > 1), asked.call_count
    assert_same_bits([local(p).detach() for p in (q, bias)], before, f"skipped, process {rank}")

    refuses = [({}, [Shard(0), Shard(1)])] if grids else []
    refuses += [({"normuon": True}, None), ({"cautious": "update"}, None)]
    for options, placements in refuses:
        q = torch.nn.Parameter(spread(randn((8, 6), 0), (grids[0], placements) if placements else (line, [Shard(0)])))
        with pytest.raises(ValueError, match="is a DTensor"):
            optim.Muon([("layer.weight", q)], **options)


def parts_change(rank):
    """What is done to a DTensor between steps is seen, and autograd sees what a step does."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cut = mesh, [Shard(0)]

    def made(seed, shapes=((6, 4), (5,), (2, 3))):
        whole = [torch.nn.Parameter(randn(shape, seed + i)) for i, shape in enumerate(shapes)]
        return whole, [torch.nn.Parameter(spread(p.detach(), cut)) for p in whole]

    def backward(whole, parts, step, to=cut):
        for i, (p, q) in enumerate(zip(whole, parts, strict=True)):
            p.grad = randn(p.shape, 100 * step + i)
            q.grad = spread(p.grad, to)

    def check(whole, parts, opts, what):
        for opt in opts:
            opt.step()
        for p, q in zip(whole, parts, strict=True):
            assert_same_bits(full(q).detach(), p.detach(), what)
            assert_same_bits(full(opts[1].state[q]["exp_avg"]), opts[0].state[p]["exp_avg"], what)

    whole, parts = made(0)
    opts = [optim.AdamW(whole, lr=0.1), optim.AdamW(parts, lr=0.1, backend=cases.NATIVE)]
    for step in range(3):
        backward(whole, parts, step)
        before = [(q._version, local(q)._version) for q in parts]
        grads = [q.grad._version for q in parts]
        check(whole, parts, opts, "at first")
        for q, old, of_grad in zip(parts, before, grads, strict=True):
            assert q._version > old[0] and local(q)._version > old[1] and q.grad._version == of_grad
    # Other local tensors, as after a checkpoint was loaded with assign=True.
    for p, q in zip(whole, parts, strict=True):
        p.data = p.data.clone() + 1
        q._local_tensor = local(q).detach().clone() + 1
        opts[0].state[p]["exp_avg"].mul_(2)
        opts[1].state[q]["exp_avg"]._local_tensor = local(opts[1].state[q]["exp_avg"]) * 2
    backward(whole, parts, 4)
    check(whole, parts, opts, "other local tensors")
    # A gradient with another spec object that says the same.
    backward(whole, parts, 5)
    for q in parts:
        q.grad = DTensor.from_local(local(q.grad), mesh, [Shard(0)], run_check=False, shape=q.shape, stride=q.stride())
    check(whole, parts, opts, "other specs")
    # Of another cut: not served by kernels.
    backward(whole, parts, 6, (mesh, [Replicate()]))
    if dist.get_world_size() > 1:
        refused(opts[1].step, ["AdamW.step: ", "no kernels for DTensor", "group 0 parameter 0"], opts[1])
    opts[1].backend = "auto"
    if dist.get_world_size() > 1:
        check(whole, parts, opts, "whole gradients")
    # Sums of all processes yet to be taken.
    backward(whole, parts, 7)
    for q in parts:
        q.grad = DTensor.from_local(
            full(q.grad) / dist.get_world_size(), mesh, [Partial()], run_check=False, shape=q.shape, stride=q.stride()
        )
    for opt in opts:
        opt.step()
    for p, q in zip(whole, parts, strict=True):
        assert_close(full(q).detach(), p.detach(), "partial gradients")
    # No DTensor beside one.
    for ours in ("auto", "reference"):
        whole, parts = made(1)
        opt = optim.AdamW(parts, lr=0.1, backend=ours)
        backward(whole, parts, 8)
        opt.step()
        state = opt.state[parts[1]]
        good = state["exp_avg"]
        state["exp_avg"] = full(good)
        refused(opt.step, ["AdamW.step: group 0 parameter 1", "exp_avg", "DTensor"], opt)
        state["exp_avg"] = good
        opt.step()
    # Where no process has all, memory is shared as elsewhere.
    whole, parts = made(2)
    parts[1]._local_tensor = local(parts[0]).view(-1)[: local(parts[1]).numel()]
    opt = optim.AdamW(parts)
    backward(whole, parts, 9)
    if local(parts[1]).numel():
        refused(opt.step, ["shares memory"], opt)


def estimates(rank):
    """Prodigy's is of all shards of all parameters: the same as that of one process."""
    for name, places in placements(*meshes()):
        whole = [torch.nn.Parameter(randn(shape, i)) for i, shape in enumerate(SHAPES)]
        parts = [torch.nn.Parameter(spread(p.detach(), at)) for p, at in zip(whole, places, strict=True)]
        opts = [optim.Prodigy(ps, d0=1e-3, weight_decay=0.1) for ps in (whole, parts)]
        for step in range(6):
            for i, (p, q) in enumerate(zip(whole, parts, strict=True)):
                p.grad = (2 + i) * (p.detach() - 1)
                q.grad = spread(p.grad, places[i])
            for opt in opts:
                opt.step()
            d, expected = (opt.param_groups[0]["d"] for opt in reversed(opts))
            assert_same_bits(d, expected, f"{name}, step {step}")
            assert step < 5 or expected > 1e-2
            for i, (p, q) in enumerate(zip(whole, parts, strict=True)):
                assert_same_bits(full(q).detach(), p.detach(), f"{name}, step {step}, parameter {i}")


def factors(rank):
    """Adafactor's are of whole matrices, however these are spread."""
    q = torch.nn.Parameter(spread(randn((4, 6), 0, torch.bfloat16), (next(meshes()), [Shard(0)])))
    q.grad = torch.ones_like(q)
    opt = optim.Adafactor([q], param_rounding="stochastic")
    refused(opt.step, ["param_rounding", "stochastic", "DTensor"], opt)
    for name, places in placements(*meshes()):
        whole = [torch.nn.Parameter(randn(shape, i)) for i, shape in enumerate(SHAPES)]
        parts = [torch.nn.Parameter(spread(p.detach(), at)) for p, at in zip(whole, places, strict=True)]
        opts = [optim.Adafactor(ps, lr=0.1, weight_decay=0.1) for ps in (whole, parts)]
        for step in range(3):
            for i, (p, q) in enumerate(zip(whole, parts, strict=True)):
                p.grad = randn(p.shape, 100 * (step + 1) + i)
                q.grad = spread(p.grad, places[i])
            for opt in opts:
                opt.step()
        for i, (p, q) in enumerate(zip(whole, parts, strict=True)):
            assert_close(full(q).detach(), p.detach(), f"{name}, parameter {i}")
            for key, t in opts[0].state[p].items():
                assert_close(full(opts[1].state[q][key]), t, f"{name}, parameter {i}, state {key}")


def scalers(rank):
    """One process finds an infinity: all skip, and our scaler's scale stays the same in all.

    torch's scaler agrees over shards, not over what all have; under fused=True the optimizer does.
    """
    for (name, places), make in product(placements(*meshes()), (genopt_ext.GradScaler, torch.amp.GradScaler)):
        if make is torch.amp.GradScaler and len({at and at[0] for at in places}) > 1:
            continue  # torch's own does not unscale plain tensors and DTensors, or two meshes, together
        classes = {"AdamW": {"fused": True}, "Adam": {"fused": False}, "Muon": {"stacked": True}}
        for each, options in classes.items() if make is genopt_ext.GradScaler else [("AdamW", {"fused": True})]:
            if (each, name) == ("Muon", "2-D"):
                continue
            what = f"{name}, {make}, {each}, process {rank}"
            params = [torch.nn.Parameter(spread(randn(shape, 0), at)) for shape, at in zip(SHAPES, places, strict=True)]
            opt = getattr(optim, each)(params, lr=0.1, **options)
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


# torch's own ways to use several processes


def zero1(rank):
    """ZeroRedundancyOptimizer, under DDP: each process steps some parameters, and saving gathers all state."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.Tanh(), torch.nn.Linear(80, 70))

    for options in ({}, dict(fused=True, ema_decay=0.9), dict(state_dtype=torch.int8, min_int8_size=0)):
        nets = [DistributedDataParallel(net(), gradient_as_bucket_view=True) for _ in range(2)]
        spread_out = ZeroRedundancyOptimizer(nets[0].parameters(), optimizer_class=optim.AdamW, lr=0.01, **options)
        plain = optim.AdamW(nets[1].parameters(), lr=0.01, **options)

        def train(first, nets=nets, opts=(spread_out, plain)):
            for step in range(first, first + 3):
                for model_, opt in zip(nets, opts, strict=True):
                    model_(randn((4, 64), 10 * step + rank)).square().mean().backward()
                    genopt_ext.clip_grad_norm_(model_.parameters(), 0.01)
                    opt.step()
                    opt.zero_grad()
            assert_same_bits([p.detach() for p in nets[0].parameters()], [p.detach() for p in nets[1].parameters()])

        train(0)
        spread_out.consolidate_state_dict(0)
        saved = [spread_out.state_dict() if rank == 0 else None]
        dist.broadcast_object_list(saved, 0)
        fresh = net()
        opt = optim.AdamW(fresh.parameters(), lr=0.01, **options)
        opt.load_state_dict(saved[0])
        for p, q in zip(fresh.parameters(), nets[1].parameters(), strict=True):
            assert_same_bits(opt.state[p], plain.state[q])
        spread_out.load_state_dict(saved[0])
        train(3)


def sends(rank):
    """Processes make the calls that bench.experiments.scale tells, of which its tables for thousands are made."""
    from bench.experiments import scale

    size = dist.get_world_size()
    for way in ("fsdp2", "zero1", "muon", *(["hsdp"] if size == 4 else [])):
        assert not scale.differences(*scale.counted(way)), (way, scale.differences(*scale.counted(way)))


def ddp(rank):
    """Under DDP, with a static graph and with sums over backward passes of which the last alone is reduced."""
    from contextlib import nullcontext

    from torch.nn.parallel import DistributedDataParallel

    for more in (dict(static_graph=True), dict(gradient_as_bucket_view=True)):
        nets = [DistributedDataParallel(model(), **more) for _ in range(2)]
        asked = dict(lr=0.1, max_grad_norm=0.1, skip_nonfinite=True, ema_decay=0.9)
        opts = [
            optim.AdamW(net.parameters(), backend=b, **asked)
            for net, b in zip(nets, ("auto", "reference"), strict=True)
        ]
        for step in range(4):
            for net, opt in zip(nets, opts, strict=True):
                for last in (False, True):
                    with nullcontext() if last or "static_graph" in more else net.no_sync():
                        net(randn((4, 7), 10 * step + 2 * rank + last)).square().sum().backward()
                if step == 1 and rank == 0:  # the sum has it already: it is found everywhere
                    next(net.parameters()).grad.view(-1)[0] = NAN
                if step == 1:
                    dist.all_reduce(next(net.parameters()).grad)
                opt.step_and_zero_()
        assert opts[0].skipped_steps == 1
        for p, q in zip(*(net.parameters() for net in nets), strict=True):
            assert_same_bits(p.detach(), q.detach(), f"{more}")
            all_of = [torch.empty_like(p) for _ in range(dist.get_world_size())]
            dist.all_gather(all_of, p.detach())
            for each in all_of:
                assert_same_bits(each, p.detach(), f"{more}, other processes")


def in_backward(rank):
    """Steps in backward of FSDP2's parameters are those after it, and hold no gradient."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    nets = [model() for _ in range(2)]
    for net in nets:
        for layer in (net[0], net[2], net):
            fully_shard(layer, mesh=mesh)
    opts = [optim.AdamW(net.parameters(), lr=0.1, clip_grad_value=0.05) for net in nets]
    with step_in_backward(opts[1]):
        for step in range(3):
            for net, opt in zip(nets, opts, strict=True):
                net(randn((4, 7), 10 * step + rank)).square().sum().backward()
                if opt is opts[0]:
                    opt.step_and_zero_()
            assert all(p.grad is None for p in nets[1].parameters())
            for p, q in zip(*(net.parameters() for net in nets), strict=True):
                assert_same_bits(local(p).detach(), local(q).detach(), f"step {step}")


def tensor_parallel(rank):
    """A module cut by parallelize_module has DTensors of two cuts beside plain tensors, and one norm of all."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    nets = [
        torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 4), torch.nn.LayerNorm(4))
        for _ in range(2)
    ]
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        p.data.copy_(randn(p.shape, p.numel()))
        q.data.copy_(p.data)
    parallelize_module(nets[1], mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    assert {type(p.data) for p in nets[1].parameters()} == {torch.Tensor, DTensor}
    opts = [
        optim.AdamW(net.parameters(), lr=0.1, max_grad_norm=0.5, skip_nonfinite=True, ema_decay=0.9) for net in nets
    ]
    for step in range(4):
        for net, opt in zip(nets, opts, strict=True):
            (net(randn((3, 8), step)).square().sum() * (NAN if step == 2 else 1.0)).backward()
            opt.step()
            opt.zero_grad()
        if step != 2:
            assert_close(opts[1].grad_norm, opts[0].grad_norm, f"step {step}")
        for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert_close(full(q).detach(), p.detach(), f"step {step}")
    assert opts[0].skipped_steps == opts[1].skipped_steps == 1
    assert opts[1].stepper.plan is not None


def fsdp_over_tp(rank):
    """Steps of parameters cut by FSDP2 over tensor parallelism (_StridedShard) have the bits of one process."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net = torch.nn.Sequential(torch.nn.Linear(768, 512), torch.nn.Linear(512, 64))
    shapes = [p.shape for p in net.parameters()]
    for p in net.parameters():
        p.data = torch.arange(p.numel(), dtype=torch.float32).view(p.shape)
    parallelize_module(net, grid["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    cut = list(fully_shard(net, mesh=grid["dp"]).parameters())
    assert {type(each).__name__ for p in cut for each in p.placements} >= {"_StridedShard", "Shard"}
    places = [local(p).long() for p in cut]  # as torch has cut them

    def part(t, i):
        here, p = t.flatten()[places[i]], cut[i]
        return DTensor.from_local(here, p.device_mesh, p.placements, shape=t.shape, stride=t.stride(), run_check=False)

    strided = next(p for p in cut if any(type(each).__name__ == "_StridedShard" for each in p.placements))
    with pytest.raises(ValueError, match="is a DTensor"):
        optim.Muon([("layer.weight", strided)])
    for dtype, options in (
        (torch.float32, dict(state_dtype=torch.int8, min_int8_size=1000, max_grad_norm=0.5)),
        (torch.bfloat16, dict(param_rounding="stochastic")),
        (torch.bfloat16, dict(state_dtype=torch.bfloat16, ema_decay=0.9)),
        (torch.float32, dict(max_grad_norm=0.5)),
    ):
        whole = [torch.nn.Parameter(randn(shape, i, dtype)) for i, shape in enumerate(shapes)]
        parts = [torch.nn.Parameter(part(p.detach(), i)) for i, p in enumerate(whole)]
        opts = [
            optim.AdamW(ps, lr=0.1, backend=backend, **options)
            for ps, backend in ((whole, "auto"), (parts, cases.NATIVE))
        ]
        for group in (opt.param_groups[0] for opt in opts):
            group.update({"rounding_seed": 5} if "rounding_seed" in group else {})
        for step in range(3):
            for i, (p, q) in enumerate(zip(whole, parts, strict=True)):
                p.grad = randn(p.shape, 100 * (step + 1) + i, dtype)
                q.grad = part(p.grad, i)
            for opt in opts:
                opt.step()
        for i, (p, q) in enumerate(zip(whole, parts, strict=True)):
            assert_same_bits(local(q).detach(), p.detach().flatten()[places[i]], f"{options}, parameter {i}")
            for key, t in opts[0].state[p].items():
                mine = opts[1].state[q][key]
                of_whole = t.shape == p.shape
                expected, found = (t.flatten()[places[i]], local(mine)) if of_whole else (t, full(mine))
                assert_same_bits(found, expected, f"{options}, parameter {i}, {key}")


def widened(rank):
    """Which DTensors have float32 state where codes were asked for: the same in all processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    asked = dict(state_dtype=torch.int8, min_int8_size=64)
    for shape, cut, coded in (
        ((5, 64), Shard(0), True),
        ((1, 64), Shard(0), True),
        ((5, 64), Replicate(), True),
        ((2, 512), Shard(1), True),
        ((2, 64), Shard(1), False),  # half a block each
        ((2, 3, 256), Shard(1), False),  # unequal parts
        ((2, 2, 256), Shard(2), False),
        ((80, 60), Shard(0), False),  # 60 has no blocks
        ((8192,), Shard(0), False),
    ):
        p = torch.nn.Parameter(spread(randn(shape, 0), (mesh, [cut])))
        p.grad = spread(randn(shape, 1), (mesh, [cut]))
        _backend._told.clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            opt = optim.AdamW([p], **asked)
            opt.step()
        assert ("exp_avg_codes" in opt.state[p]) == coded, (shape, cut)
        of_it = [str(each.message) for each in told if "8-bit state is kept in float32" in str(each.message)]
        assert len(of_it) == (not coded and len(shape) > 1), (shape, cut, of_it)
        # Both ways to load, and from what was cut in another way.
        for first, second in (({}, asked), (asked, {})):
            opt, other = (optim.AdamW([p], **options) for options in (first, second))
            opt.step()
            other.load_state_dict(opt.state_dict())
            assert ("exp_avg_codes" in other.state[p]) == (coded and second == asked), (shape, cut)
            torch.testing.assert_close(
                codecs.read(other.state[p], "exp_avg"), codecs.read(opt.state[p], "exp_avg"), rtol=0.07, atol=0.002
            )
            other.step()
        if not coded:
            continue
        expected = full(codecs.read(other.state[p], "exp_avg"))
        for form, kept in ((asked, asked), ({}, asked)):
            for to in (Replicate(), Shard(0), Shard(len(shape) - 1)):
                opt = optim.AdamW([p], **form)
                opt.step()
                expected = full(codecs.read(opt.state[p], "exp_avg"))
                saved = opt.state_dict()
                for key, t in saved["state"][0].items():
                    saved["state"][0][key] = t.redistribute(placements=[to]) if isinstance(t, DTensor) else t
                other = optim.AdamW([p], **kept)
                other.load_state_dict(saved)
                found = full(codecs.read(other.state[p], "exp_avg"))
                torch.testing.assert_close(found, expected, rtol=0.07, atol=0.002, msg=f"{shape}, {cut}, {to}, {form}")
                assert other.state[p]["exp_avg_codes"].placements == p.placements
                other.step()
    # Scales of format 1, which know no slices, are none of a DTensor's.
    p = torch.nn.Parameter(spread(randn((6, 64), 0), (mesh, [Shard(0)])))
    p.grad = torch.ones_like(p)
    opt = optim.AdamW([p], **asked)
    opt.step()
    saved = opt.state_dict()
    saved["state"][0]["exp_avg_scales"] = spread(torch.ones(2), (mesh, [Shard(0)]))
    refused(lambda: opt.load_state_dict(saved), ["'exp_avg_scales'", "[2]", "expected"], opt, ValueError)
    # A place in memory that is none in the slice: a part of a slice is no block there.
    whole = torch.empty_strided((4, 8, 256), (2048, 1, 8)).copy_(randn((4, 8, 256), 0))
    q = torch.nn.Parameter(spread(whole, (mesh, [Shard(1)])))
    assert sharding.keeps_blocks(q, 256) == (q.stride() == (2048, 256, 1))
    # Of a vector that is too large to list.
    shape, size = torch.Size([1 << 40]), dist.get_world_size()
    here = torch.empty(1, device="meta").expand(shape[0] // size)
    spec = DTensor.from_local(here, mesh, [Shard(0)], run_check=False, shape=shape, stride=(1,))
    assert sharding.runs(spec) == (-(-shape[0] // size) * rank, 0, 0)


def no_leaks(rank):
    """Steps make nothing that stays: no object, and no memory."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [torch.nn.Parameter(spread(randn((6, 4), i), (mesh, [Shard(0)]))) for i in range(10)]
    opt = optim.AdamW(params, max_grad_norm=0.5)

    def some(steps):
        for _ in range(steps):
            for p in params:
                p.grad = spread(torch.ones(6, 4), (mesh, [Shard(0)]))
            opt.step()
        gc.collect()
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        return len(gc.get_objects()), pages * os.sysconf("SC_PAGE_SIZE")

    some(3)
    objects, held = some(100)
    after, holds = some(1000)
    assert after <= objects + 20  # a leak would be of one for each step at least
    # A spec for each of ten parameters would be more; gloo takes some hundred kB.
    assert holds - held < 3_000_000, holds - held


# Checkpoints

KEPT = [
    ("AdamW", dict(ema_decay=0.9)),
    ("AdamW", dict(state_dtype=torch.bfloat16)),
    ("AdamW", dict(state_dtype=torch.int8, min_int8_size=100)),
    ("NAdam", dict(max_grad_norm=0.5)),
    ("SGD", dict(lr=0.1, momentum=0.9, skip_nonfinite=True)),
    ("Muon", dict(adamw_lr=0.01)),
]
folder = ""  # that worlds share


def resharded(path):
    """Saved by two processes before and after a first step, loaded by three and then by one, they go on as one did."""
    global folder
    folder = path
    for size, name in ((2, "first"), (3, "second"), (1, "third")):
        world(size, name)


def kept_model(seed=0):
    """Of uneven shards, of which the first has 8-bit state."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def _stages(stages):
    """Each stage loads what the one before saved, but for the first; takes two steps; and saves."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for n, (name, options) in enumerate(KEPT):
        whole = kept_model()
        expected = getattr(optim, name)(whole.parameters(), **options)
        for stage in range(stages + 1):
            net = fully_shard(kept_model(1), mesh=mesh)
            opt = getattr(optim, name)(net.parameters(), **options)
            last = stage == stages
            if last:
                opt.init_state()
                assert all(t.numel() != 1 or t == 0 for s in opt.state.values() for k, t in s.items() if k == "step")
                state = dict(zip(("model", "optimizer"), get_state_dict(net, opt), strict=True))
                at = f"{folder}/{n}-{stage}"
                if stage:
                    dcp.load(state, checkpoint_id=at)
                else:
                    for p, q in zip(whole.parameters(), net.parameters(), strict=True):
                        q.data.copy_(spread(p.detach(), (mesh, [Shard(0)])))
                    state = dict(zip(("model", "optimizer"), get_state_dict(net, opt), strict=True))
                    dcp.async_save(state, checkpoint_id=f"{folder}/{n}").result()
                    dcp.load(state, checkpoint_id=f"{folder}/{n}")
                set_state_dict(net, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            for step in (2 * stage, 2 * stage + 1):
                for i, (p, q) in enumerate(zip(whole.parameters(), net.parameters(), strict=True)):
                    p.grad = randn(p.shape, 10 * step + i)
                    q.grad = spread(p.grad, (mesh, [Shard(0)])) if last else None
                expected.step()
                if last:
                    opt.step()
        for p, q in zip(whole.parameters(), net.parameters(), strict=True):
            assert_same_bits(full(q).detach(), p.detach(), f"{name}, {options}, stage {stages}")
            for key, t in expected.state[p].items():
                assert_same_bits(full(opt.state[q][key]), t, f"{name}, {options}, stage {stages}, {key}")
        state = dict(zip(("model", "optimizer"), get_state_dict(net, opt), strict=True))
        dcp.save(state, checkpoint_id=f"{folder}/{n}-{stages + 1}")


def first(rank):
    _stages(0)


def second(rank):
    _stages(1)


def third(rank):
    _stages(2)


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
