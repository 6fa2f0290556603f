"""The moving average inside the step: torch's AveragedModel, updated after every step."""

from __future__ import annotations

import pytest
import torch
from cases import (
    BACKENDS,
    CASES,
    KERNELS,
    NARROW,
    SHAPES,
    SIXTEEN,
    SIZES,
    STATEFUL,
    STORED,
    Case,
    assert_same_bits,
    assert_same_state,
    assert_unchanged,
    come_and_go,
    grouped,
    pairs,
    parameters,
    places,
    randn,
    set_grads,
    snapshot,
    stored,
    train,
)
from low_precision import MIXED, assert_same, run_both, run_one, take
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

# Large steps, so that average and parameter differ.
SGD = Case("SGD", dict(lr=0.3, momentum=0.9))
ALL_DTYPES = [*NARROW, torch.float64, torch.complex64]


class Average:
    """torch's average of parameters as they are after each step; of 16-bit ones in float32."""

    def __init__(self, params, decay):
        self.params, self.decay = params, decay
        self.wide = torch.nn.ParameterList(self.widened())
        self.model = AveragedModel(self.wide, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def widened(self):
        return [
            torch.nn.Parameter(p.detach().to(torch.float32 if p.dtype in SIXTEEN else p.dtype)) for p in self.params
        ]

    def update(self):
        with torch.no_grad():
            for q, p in zip(self.wide, self.widened(), strict=True):
                q.copy_(p)
        self.model.update_parameters(self.wide)

    def assert_in(self, opt, what=""):
        for p, q in zip(self.params, self.model.module, strict=True):
            ours = opt.state.get(p, {}).get("ema", p)  # none yet: the parameter never had a gradient
            assert ours.shape == p.shape and ours.device == p.device and not ours.requires_grad or ours is p
            if ours is not p:
                assert ours.dtype == q.dtype and ours.data_ptr() != p.data_ptr() or not p.numel()
            tolerance = dict(rtol=1e-5, atol=1e-6) if q.dtype != torch.float64 else dict(rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(
                ours.detach().to(q.dtype), q.detach(), **tolerance, msg=lambda text: f"{what}: {text}"
            )


def train_beside(opt, params, *averages, steps, skip=lambda step: lambda i: False):
    """Steps after each of which ``opt`` has these averages."""
    for step in steps:
        set_grads(params, step, skip(step))
        opt.step()
        for average in averages:
            average.update()
            average.assert_in(opt, step)


@pytest.mark.parametrize(("case", "dtype", "backend"), pairs([*STATEFUL, SGD], ALL_DTYPES, BACKENDS), ids=str)
def test_as_averaged_model(case, dtype, backend):
    for decay in (0.7, 0.0) if case is SGD else (0.7,):
        params = parameters(SHAPES, dtype)
        opt = case.ours(params, ema_decay=decay, backend=backend)
        train_beside(opt, params, Average(params, decay), steps=range(5))
        if decay and "lr" in case.kwargs and dtype not in (torch.float16, torch.complex64):
            gap = opt.state[params[0]]["ema"].double() - params[0].detach().double()
            assert gap.abs().max() > 1e-3


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_parameters_that_sometimes_have_no_gradient(case, backend):
    """Their average goes on towards them; from the first step on, whether or not they take part in it."""
    params = parameters([(300,), (7, 5), (5,), (4,)])
    opt = case.ours([dict(params=params, lr=case.kwargs.get("lr", 0.1))], ema_decay=0.8, backend=backend)
    without = [{2, 3}, {0, 3}, {0, 3}, {1, 2, 3}, {3}, {0, 1, 2, 3}, set(), {2}]
    average = Average(params, 0.8)
    train_beside(opt, params, average, steps=range(8), skip=lambda step: without[step].__contains__)


def test_decay_by_group_and_between_steps(backend):
    params = parameters(SHAPES * 2)
    halves = params[:5], params[5:]
    averages = [Average(half, decay) for half, decay in zip(halves, (0.9, 0.2), strict=True)]
    opt = SGD.ours([{"params": each.params, "ema_decay": each.decay} for each in averages], backend=backend)
    train_beside(opt, params, *averages, steps=range(2))
    opt.param_groups[0]["ema_decay"] = 0.5
    averages[0].model.multi_avg_fn = get_ema_multi_avg_fn(0.5)
    train_beside(opt, params, *averages, steps=range(2, 4))
    # One group alone, and one that is added later.
    opt = SGD.ours([{"params": halves[0], "ema_decay": 0.9}, {"params": halves[1]}], backend=backend)
    train(opt, params, 2)
    assert "ema" in opt.state[halves[0][0]] and "ema" not in opt.state[halves[1][0]]
    extra = parameters([(33,)], seed=9)
    opt.add_param_group({"params": extra, "ema_decay": 0.5})
    train_beside(opt, extra, Average(extra, 0.5), steps=range(3))


@KERNELS
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_from_the_reference(case, dtype):
    def act(opt, params, step):
        set_grads(params, step, come_and_go(step))
        opt.step()

    shapes = [(n,) for n in SIZES] + [(3, 5, 7)]
    for opt in run_both(case, lambda: parameters(shapes, dtype), dict(ema_decay=0.99), steps=4, act=act):
        assert any("ema" in state for state in opt.state.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_average_changes_nothing_else(case, backend):
    opts = [run_one(case, lambda: parameters(SHAPES), dict(ema_decay=decay), backend=backend) for decay in (0.9, None)]
    for p, state in list(opts[0].state.items()):
        del state["ema"]
        if not state:
            del opts[0].state[p]
    assert_same_state(*opts, case)


def test_layouts(backend):
    """Strided parameters, and averages replaced by others of other strides."""
    base = randn((40, 30, 20), 0)
    views = [base.clone().transpose(0, 2), base.clone()[:, ::2, 1:], randn((1031,), 1)[1:], base.clone()[3:, 5, 7]]
    params = [torch.nn.Parameter(v) for v in views]
    average = Average(params, 0.7)
    opt = SGD.ours(params, ema_decay=0.7, backend=backend)
    train_beside(opt, params, average, steps=range(2))
    for state in opt.state.values():
        state["ema"] = state["ema"].clone(memory_format=torch.contiguous_format)
    train_beside(opt, params, average, steps=range(2, 4))
    before = snapshot(opt)
    with opt.swap_ema():
        average.assert_in(opt)
        for p, q in zip(params, average.model.module, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
    assert_unchanged(opt, before)


# swap_ema


def trained(dtype, backend):
    return run_one(SGD, lambda: parameters(SHAPES, dtype), dict(ema_decay=0.9), backend=backend)


def assert_swapped(opt, averages):
    for p, e in zip(places(opt), averages, strict=True):
        assert_same_bits(p.detach(), e.to(p.dtype))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_swap_ema(dtype, backend):
    """Nested swaps are refused, and nothing is left of any, an exception within it or not."""
    opt = trained(dtype, backend)
    before = snapshot(opt)
    averages = [opt.state[p]["ema"].clone() for p in places(opt)]
    assert any((p.detach().to(e.dtype) != e).any() for p, e in zip(places(opt), averages, strict=True))
    with opt.swap_ema():
        assert_swapped(opt, averages)
        with pytest.raises(RuntimeError, match="swap_ema"), opt.swap_ema():
            pass
        assert_swapped(opt, averages)
        assert all(p.dtype == dtype for p in places(opt))
    assert_unchanged(opt, before)
    assert all(p.requires_grad and p.is_leaf for p in places(opt))
    for error in (KeyError, KeyboardInterrupt):
        with pytest.raises(error), opt.swap_ema():
            raise error
        assert_unchanged(opt, before)
    with opt.swap_ema():  # and again afterwards
        assert_swapped(opt, averages)


@pytest.mark.parametrize(
    ("case", "backend", "storage", "dtype"), stored(STATEFUL, BACKENDS, storages=[STORED["plain"], *MIXED]), ids=str
)
def test_swapping_leaves_no_trace_in_training(case, backend, storage, dtype):
    """Nor in codes, masters and compensations."""

    def swap_and_take(opt, params, step):
        take(opt, params, step)
        before = snapshot(opt)
        with opt.swap_ema(), torch.no_grad():
            assert_swapped(opt, [opt.state[p]["ema"] for p in params])
            sum(p.sum() for p in params)
        assert_unchanged(opt, before)

    options = dict(ema_decay=0.9, **storage.options)
    opts = [
        run_one(case, lambda: parameters(SHAPES, dtype), options, act=act, backend=backend)
        for act in (take, swap_and_take)
    ]
    assert_same(*opts, case)


def test_parameters_without_an_average_stay(backend):
    """In a group without one, or before their first step."""
    params = parameters([(5,), (6,), (7,)])
    opt = SGD.ours(grouped(params, [dict(ema_decay=0.9), {}, dict(ema_decay=0.5)]), backend=backend)
    for step in range(3):
        set_grads(params, step, lambda i: i == 2)
        opt.step()
    before = [p.detach().clone() for p in params]
    with opt.swap_ema():
        assert (params[0].detach() != before[0]).all()
        assert_same_bits([p.detach() for p in params[1:]], before[1:])
    assert_same_bits([p.detach() for p in params], before)
