"""What torch's dispatch modes see of a step: operations of torch's, and no number that is read."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from cases import (
    CASES,
    DEVICE,
    FIRST,
    NUMBERS,
    STATEFUL,
    Case,
    assert_same_bits,
    assert_same_state,
    is_refused,
    made,
    parameters,
    places,
    randn,
    refused,
    set_grads,
    trained,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import genopt_ext
from genopt_ext import optim

OPTIONS = {
    "plain": {},
    "max_grad_norm, ema": dict(max_grad_norm=0.5, ema_decay=0.9),
    "clip_per_param, skip_nonfinite": dict(clip_per_param=0.5, skip_nonfinite=True),
    "agc, clip_grad_value": dict(agc=0.01, clip_grad_value=0.5),
    "int8": dict(state_dtype=torch.int8, min_int8_size=64),
    "bf16 state": dict(state_dtype=torch.bfloat16),
}
NARROW = {
    "master": dict(master_weights=True),
    "kahan": dict(param_rounding="kahan"),
    "stochastic": dict(param_rounding="stochastic", state_dtype=torch.int8, min_int8_size=64),
}
TABLE = [(case, name, torch.float32) for case in STATEFUL for name in OPTIONS]
TABLE += [(case, name, torch.bfloat16) for case in STATEFUL for name in NARROW]
TABLE = [row for row in TABLE if not is_refused({"case": row[0], "options": {**OPTIONS, **NARROW}[row[1]]})]


def described(opt):
    return [
        {name: (t.shape, t.dtype, t.device.type == "meta" or t.device) for name, t in opt.state[p].items()}
        for p in places(opt)
    ]


def step_twice(case, options, dtype, device):
    params = [torch.nn.Parameter(torch.empty(s, dtype=dtype, device=device)) for s in [(20, 15), (5,)]]
    opt = case.ours(params, **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.empty_like(p)
        opt.step()
    return opt


@pytest.mark.parametrize("case, options, dtype", TABLE)
def test_fake_and_meta_tensors_have_the_state_that_real_ones_have(case, options, dtype):
    options = {**OPTIONS, **NARROW}[options]
    real = trained(partial(case.ours, **options), parameters([(20, 15), (5,)], dtype), 2)
    with FakeTensorMode():
        fake = step_twice(case, options, dtype, DEVICE)
    assert described(fake) == described(real)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        meta = step_twice(case, options, dtype, "meta")
    for a, b in zip(described(meta), described(real), strict=True):
        assert {name: d[:2] for name, d in a.items()} == {name: d[:2] for name, d in b.items()}
        assert all(d[2] is True or name in NUMBERS for name, d in a.items())


@pytest.mark.parametrize("name", list(FIRST))
def test_fused_on_meta_is_refused_as_by_torch(name):
    p = torch.nn.Parameter(torch.empty(3, device="meta"))
    opt = made(name, [p], fused=True)
    p.grad = torch.empty_like(p)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point"):
        opt.step()
    assert name == "Adagrad" or not opt.state


# make_fx. The state goes in and out, so that a graph can be replayed step after step.


def functional(make):
    def step(p, g, state):
        p = p.clone()
        opt = make([p])
        opt.state[p].update({name: t.clone() for name, t in state.items()})
        p.grad = g
        opt.step()
        return p.detach(), dict(opt.state[p])

    return step


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("case, options, dtype", [*((c, "plain", torch.float32) for c in CASES), *TABLE])
def test_a_traced_step_replays(case, options, dtype, mode):
    """Bit for bit, as the tensors' way to compute gives the floats' numbers but for the last bit of a power."""
    if mode != "fake" and (options != "plain" or case not in STATEFUL):
        return  # the same code as in "fake"
    options = {**OPTIONS, **NARROW}[options]
    step = functional(lambda params: case.ours(params, **options))
    p = randn((20, 15), 0, dtype)
    traced = eager = step(p, randn(p.shape, 9, dtype), {})
    graph = make_fx(step, tracing_mode=mode)(p, randn(p.shape, 1, dtype), traced[1])
    for i in range(3):
        g = randn(p.shape, i, dtype) * (torch.inf if i == 1 and "skip_nonfinite" in options else 1)
        traced, eager = graph(traced[0], g, traced[1]), step(eager[0], g, eager[1])
        assert_same_bits(*map(in_single, (traced, eager)), (case, options))
    assert case.still == 4 or not torch.equal(traced[0], p)


def in_single(run):
    """Numbers of the state in float32, which a power's last bit in double does not reach."""
    p, state = run
    return p, {name: t.float() if name in NUMBERS else t for name, t in state.items()}


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
@pytest.mark.parametrize("name", list(FIRST))
def test_a_step_of_closed_over_parameters_is_recorded(name, lr):
    """As torch's is, where torch's for-loop can be traced: the graph updates the parameter and its state."""
    case = Case(name, {**FIRST[name].kwargs, "lr": lr})
    runs = []
    for _ in range(2):
        p = parameters([(5,)])[0]
        opt = case.ours([p])
        p.grad = randn((5,), 0)
        opt.step()
        runs.append((p, opt))
    (p, opt), (q, other) = runs

    def step(g):
        p.grad = g
        opt.step()
        return p.detach().clone()

    shared = [opt.param_groups[0][each] for each in opt.rule.shared]
    before = p.detach().clone(), copy.deepcopy(opt.state[p]), copy.deepcopy(shared)
    graph = make_fx(step)(randn((5,), 1))
    with torch.no_grad():  # tracing has taken a step
        p.copy_(before[0])
        for key, t in before[1].items():
            opt.state[p][key].copy_(t)
        for t, old in zip(shared, before[2], strict=True):
            t.copy_(old)
    for i in range(3):
        q.grad = randn((5,), i)
        other.step()
        with torch.no_grad():  # which the graph, as torch's, has not recorded
            assert_same_bits(graph(randn((5,), i)), q.detach(), (name, i))


def test_pre_dispatch_and_functional_tracing():
    step = functional(FIRST["AdamW"].ours)
    p = randn((5,), 0)
    state = step(p, randn((5,), 1), {})[1]
    graph = make_fx(step, tracing_mode="real", pre_dispatch=True)(p, randn((5,), 2), state)
    expected = step(p, randn((5,), 3), state)
    for other in (graph, torch.func.functionalize(step)):
        assert_same_bits(other(p, randn((5,), 3), state)[0], expected[0])


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_any_mode_sees_the_update_and_the_bits_are_the_kernels(case, backend):
    if backend == "cpu" and DEVICE != "cpu":
        return
    ps, qs = parameters([(300,), (5, 7)]), parameters([(300,), (5, 7)])
    a, b = case.ours(ps, max_grad_norm=0.5, backend=backend), case.ours(qs, max_grad_norm=0.5)
    for step in range(3):
        set_grads(ps, step), set_grads(qs, step)
        b.step()
        with Names() as names:
            a.step()
        assert names.seen.count("copy_") >= 2
    assert_same_state(a, b, case)
    assert_same_bits(a.grad_norm, b.grad_norm)


def test_clipping_of_fake_gradients():
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.empty(5, device=DEVICE))
        p.grad = torch.empty_like(p)
        assert genopt_ext.clip_grad_norm_([p], 1.0).shape == ()
        assert genopt_ext.clip_grad_norm_([p], 1.0, norm_type=3.0).dtype == torch.float32
        genopt_ext.clip_grad_value_([p], 1.0)


def test_other_refusals_hold_under_modes():
    p = parameters([(3,)])[0]
    opt = optim.SGD([p], lr=0.1)
    p.grad = randn((3,), 0)
    p.data = p.data[:2]
    with Names():
        refused(opt, "gradient has shape")
