"""What is particular to CUDA: launches, graphs, streams, several devices. The other tests run on it as they are."""

from __future__ import annotations

import gc
import warnings
import weakref
from functools import partial

import pytest
import torch
from cases import (
    CASES,
    DEVICE,
    EMULATED,
    FIRST,
    NATIVE,
    STATEFUL,
    Case,
    assert_same_bits,
    assert_same_state,
    copies_of,
    in_threads,
    parameters,
    randn,
    set_grads,
    train,
    trained,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import genopt_ext
from genopt_ext import optim
from genopt_ext.optim import muon_stepper
from genopt_ext.optim.muon_stepper import on_host
from genopt_ext.reference.rules import SHARES, TOTALED

kernels = pytest.mark.skipif(NATIVE != "cuda", reason="counts launches of CUDA kernels")
gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU: GENOPT_TEST_DEVICE=cuda")


def launches(opt, step):
    before = opt.stepper.plan.launches
    step()
    return opt.stepper.plan.launches - before


# All that goes around a step in its own launches.
PATH = dict(max_grad_norm=0.5, clip_grad_value=0.1, skip_nonfinite=True, ema_decay=0.9)


@kernels
@pytest.mark.parametrize("path", [{}, PATH], ids=["plain", "path"])
@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_three_launches_at_most(case, path):
    """2000 tensors in 100 groups, with new gradients and a scheduler at every step; more if a rule needs totals."""
    groups = 10 if EMULATED else 100  # of 20 tensors
    params = parameters([(1 + i % 3 if i % 50 else 300,) for i in range(20 * groups)])
    opt = case.ours([{"params": params[i::groups]} for i in range(groups)], **path)
    scheduler = optim.lr_scheduler.ExponentialLR(opt, 0.9)
    most = 3 + (opt.stepper.rule.name in TOTALED) + 2 * (opt.stepper.rule.name in SHARES)
    train(opt, params, 1)
    for step in range(1, 5):
        old = [p.grad for p in params]  # alive, so that the new ones are elsewhere
        set_grads(params, step, skip=(lambda i: i % (6 * groups) > 0) if step == 4 else lambda i: False)
        for p, grad in zip(params, old, strict=True):
            p.grad = grad if p.grad is None else p.grad
        assert 2 <= launches(opt, opt.step) <= most
        del old
        scheduler.step()
    assert launches(opt, opt.step) <= most


@kernels
def test_a_step_without_gradients_launches_nothing():
    params = parameters([(5,), (0,)])
    opt = optim.AdamW(params)
    opt.step()
    assert opt.stepper.plan.launches == 0
    params[1].grad = torch.zeros(0)
    opt.step()
    assert opt.state[params[1]]["step"].item() == 1
    assert launches(opt, opt.step) == 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_capturable_is_accepted(case):
    params = parameters([(5,)])
    opt = case.ours(params, capturable=True)
    assert opt.param_groups[0]["capturable"] and opt.defaults["capturable"]
    opt.add_param_group({"params": parameters([(3,)])})
    assert opt.param_groups[1]["capturable"]
    set_grads(params, 0)
    if DEVICE == "cpu":
        for backend in ("auto", "reference"):
            with pytest.raises(RuntimeError, match="capturable=True, but it is on cpu"):
                case.ours(params, capturable=True, backend=backend).step()
    else:
        opt.step()


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_as_on_cpu(case, dtype):
    results = []
    for device in ("cuda", "cpu"):
        params = [torch.nn.Parameter(p.detach().to(device)) for p in parameters([(70_001,), (300, 7), (3,), ()], dtype)]
        opt = case.ours(params)
        for step in range(4):
            for i, p in enumerate(params):
                p.grad = randn(p.shape, 10 * step + i, dtype).to(device)
            opt.step()
        results.append([t.cpu() for p in params for t in (p.detach(), *opt.state[p].values())])
    assert_same_bits(*results, case)


def captured(opt, steps=1):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(steps):
            opt.step()
    return graph


@gpu
@pytest.mark.parametrize("path", [{}, PATH], ids=["plain", "path"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_graphs_replay_steps(case, path):
    """Replays, eager steps beside them, and a learning rate on the device that changes: as without a graph."""
    shapes = [(300,), (7, 5), (), (70_000,)]
    results = []
    for capture in (True, False):
        params = parameters(shapes)
        lr = torch.tensor(0.01)
        opt = case.ours(params, capturable=True, **path)
        opt.param_groups[0]["lr"] = lr
        set_grads(params, 0)
        opt.step()
        graph = captured(opt) if capture else None

        def run(graph=graph, opt=opt):
            graph.replay() if graph is not None else opt.step()

        fixed = [p.grad for p in params]
        run()
        lr.fill_(0.5)
        run()
        set_grads(params, 5)
        opt.step()
        for p, grad in zip(params, fixed, strict=True):
            p.grad = grad.mul_(-2)
        run()
        run()
        fixed[0].fill_(float("nan"))  # skipped, if that is asked
        run()
        fixed[0].fill_(0.25)
        run()
        results.append(opt)
    assert_same_state(*results, case)
    if path:
        assert results[0].skipped_steps.item() == results[1].skipped_steps.item() == 1
        assert_same_bits(results[0].grad_norm, results[1].grad_norm)


@gpu
def test_two_graphs_and_two_steps_in_one():
    results = []
    for capture in (True, False):
        params = parameters([(3000,), (5,)])
        opt = optim.AdamW(params)
        set_grads(params, 0)
        opt.step()
        if capture:
            first, twice = captured(opt), captured(opt, steps=2)
            for graph in (first, twice, first, twice):
                graph.replay()
        else:
            for _ in range(6):
                opt.step()
        results.append(opt)
    assert_same_state(*results)


@gpu
@pytest.mark.parametrize("case", [c for c in STATEFUL if c.name != "Adagrad"], ids=str)
def test_capture_before_any_step_is_refused(case):
    params = parameters([(5,)])
    opt = case.ours(params)
    set_grads(params, 0)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="take one step before the capture"):
        warnings.filterwarnings("ignore", "The CUDA Graph is empty")
        captured(opt)


MUONS = [
    {},
    dict(PATH, normuon=True),
    dict(cautious="update", split_sizes=(16, 8), normuon=True),
    dict(stacked=True, num_heads=2, ns_coefficients="polar_express"),
    dict(state_dtype=torch.int8, min_int8_size=1, master_weights=True),
    dict(param_rounding="stochastic", state_dtype=torch.bfloat16),
]


def muon(options, lr=0.01):
    """Of matrices and a vector, all but the first clipped by a norm of their own."""
    shapes = [(24, 40), (24, 40), (24, 16), (30,)]
    is_narrow = options.keys() & {"master_weights", "param_rounding"}
    params = parameters(shapes, torch.bfloat16 if is_narrow else torch.float32)
    named = [(f"layers.{i}.weight", p) for i, p in enumerate(params)]
    groups = [dict(params=named[:1]), dict(params=named[1:], max_grad_norm=0.5)]
    opt = optim.Muon(groups if "max_grad_norm" in options else named, lr=lr, **options)
    set_grads(params, 0)
    opt.step()
    return params, opt


@pytest.mark.parametrize("zeroes", [False, True])
@pytest.mark.parametrize("options", MUONS, ids=str)
def test_a_step_of_muon_reads_nothing_back(options, zeroes):
    """Nor does it bring numbers to a device: what is forbidden in a capture, and waits else."""
    params, opt = muon(options)
    set_grads(params, 1)
    if "max_grad_norm" not in options:
        opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step_and_zero_() if zeroes else opt.step()
    forbidden = ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "lift_fresh", "pin_memory")
    seen = {event.key for event in profile.key_averages()}
    assert "aten::baddbmm" in seen and seen.isdisjoint(f"aten::{name}" for name in forbidden)


def test_muon_does_not_look_at_numbers_on_a_device():
    with FakeTensorMode():
        lr = torch.tensor(0.1, device="cuda")
    assert on_host({"lr": lr, "eps": 1e-7, "momentum": torch.tensor(0.9)}).keys() == {"eps", "momentum"}


def test_memory_of_a_captured_step_of_muon_is_kept(monkeypatch):
    """Also if other matrices are stepped after it: a replay writes there."""
    params, opt = muon({})
    for captures in (False, True):
        monkeypatch.setattr(muon_stepper, "_is_captured", lambda places, captures=captures: captures)
        set_grads(params, 1)
        opt.step()
        memory = weakref.ref(opt.stepper._last[1][0].batches[0].updates)
        monkeypatch.setattr(muon_stepper, "_is_captured", lambda places: False)
        set_grads(params, 2, lambda i: i == 0)
        opt.step()
        gc.collect()
        assert (memory() is not None) == captures


@gpu
@pytest.mark.parametrize("options", MUONS, ids=str)
def test_graphs_replay_steps_of_muon(options):
    """But for products, which may be added up in another order."""
    ends = []
    for capture in (True, False):
        lr = torch.tensor(0.01)
        params, opt = muon(options, lr)
        graph = captured(opt) if capture else None
        fixed = [p.grad for p in params]
        for step in range(3):
            graph.replay() if graph is not None else opt.step()
            lr.fill_(0.02)
            if step == 1:  # other matrices, and an eager step
                set_grads(params, 5, lambda i: i == 0)
                opt.step()
            for p, grad in zip(params, fixed, strict=True):
                p.grad = grad.mul_(-2)
        ends.append([p.detach() for p in params])
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=2**-6, atol=0.06)


@gpu
def test_streams_and_freed_gradients():
    """State made on one stream and used on another; gradients freed at once; their memory written again."""
    results = []
    for streams in (True, False):
        params = parameters([(1 << 20,), (300,)])
        opt = optim.AdamW(params)
        side = [torch.cuda.Stream(), torch.cuda.Stream()] if streams else [torch.cuda.current_stream()] * 2
        for step in range(6):
            stream = side[step % 2]
            stream.wait_stream(side[1 - step % 2])
            stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream):
                set_grads(params, step)
                opt.step()
                for p in params:
                    shape, p.grad = p.shape, None
                    torch.full(shape, float("nan"))
        torch.cuda.synchronize()
        results.append(opt)
    assert_same_state(*results)


@gpu
def test_threads_with_their_own_streams():
    alone = [train_alone(seed) for seed in range(2)]
    together = [None, None]

    def work(seed):
        with torch.device("cuda"), torch.cuda.stream(torch.cuda.Stream()):
            together[seed] = train_alone(seed)
            torch.cuda.current_stream().synchronize()

    in_threads(lambda: work(0), lambda: work(1))
    for a, b in zip(alone, together, strict=True):
        assert_same_state(a, b)


def train_alone(seed):
    return trained(partial(optim.RMSprop, momentum=0.9), parameters([(100_000,), (30,)], seed=seed), 5)


@gpu
@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_cpu_and_gpu_parameters_in_one_optimizer(case):
    """Steps that stand on another device are moved: Adagrad's constructor makes them on the default one."""
    lr = torch.tensor(0.1)
    results = []
    for devices in (("cuda", "cpu", "cuda"), ("cpu", "cpu", "cpu")):
        params = [torch.nn.Parameter(randn((300,), i).to(d)) for i, d in enumerate(devices)]
        opt = case.ours(params, max_grad_norm=2.0)
        opt.param_groups[0]["lr"] = lr
        opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(0.0)  # once for each device
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = randn((300,), 10 * step + i).to(p.device)
            opt.step()
        results.append([p.detach().cpu() for p in params])
    torch.testing.assert_close(*results)  # the norm's parts meet in another order


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_whichever_is_current():
    params = [torch.nn.Parameter(randn((300,), 0).to(f"cuda:{i}")) for i in range(2)]
    opt = optim.AdamW(params)
    for step in range(3):
        for p in params:
            p.grad = randn((300,), step).to(p.device)
        with torch.cuda.device(step % 2):
            opt.step()
    assert_same_bits(params[0].detach().cpu(), params[1].detach().cpu())


@gpu
def test_torch_checkpoint_with_steps_on_the_cpu():
    params = parameters([(300,)])
    theirs = trained(torch.optim.Adam, params)
    for state in theirs.state.values():
        state["step"] = state["step"].cpu()
    twins = copies_of(params)
    ours = optim.Adam(twins)
    ours.load_state_dict(theirs.state_dict())
    train(theirs, params, 2, first=3)
    train(ours, twins, 2, first=3)
    torch.testing.assert_close(params, twins)
    assert ours.state[twins[0]]["step"].is_cuda and ours.state[twins[0]]["step"].item() == 5


@gpu
@pytest.mark.parametrize("path", [{}, PATH], ids=["plain", "path"])
def test_no_synchronization(path):
    params = parameters([(300,)] * 50)
    rates = [torch.tensor(0.1), torch.tensor(0.2)]
    opt = Case("Adam").ours(params, lr=rates[0], **path)
    set_grads(params, 0)
    opt.step()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode")
            torch.cuda.set_sync_debug_mode("error")
        opt.step()
        opt.param_groups[0]["lr"] = rates[1]
        opt.step_and_zero_()
        genopt_ext.clip_grad_norm_(params, 1.0)
        genopt_ext.clip_grad_value_(params, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_more_than_2_to_the_31_elements_on_the_gpu():
    n = 2**31 + 300
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("no memory for two tensors of 4 GiB")
    p = torch.ones(n, dtype=torch.bfloat16)
    p.grad = torch.ones_like(p)
    optim.SGD([p], lr=0.5).step()
    assert (p == 0.5).all()
