"""The moving average inside the step: torch's AveragedModel, updated after every step."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from cases import (
    CASES,
    DEVICE,
    NATIVE,
    SHAPES,
    SIZES,
    STATEFUL,
    Case,
    assert_same_bits,
    assert_same_state,
    parameters,
    randn,
    set_grads,
    train,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from genopt_ext import _backend, optim

# Large steps, so that average and parameter differ.
SGD = Case("SGD", dict(lr=0.3, momentum=0.9))


class Average:
    """torch's average of parameters as they are after each step; of 16-bit ones in float32."""

    def __init__(self, params, decay):
        self.params = params
        self.wide = torch.nn.ParameterList(self.widened())
        self.model = AveragedModel(self.wide, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def widened(self):
        low = (torch.bfloat16, torch.float16)
        return [torch.nn.Parameter(p.detach().to(torch.float32 if p.dtype in low else p.dtype)) for p in self.params]

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


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
@pytest.mark.parametrize("case", [*STATEFUL, SGD], ids=str)
def test_as_averaged_model(case, dtype, backend):
    for decay in (0.7, 0.0) if case is SGD else (0.7,):
        params = parameters(SHAPES, dtype)
        average = Average(params, decay)
        opt = case.ours(params, ema_decay=decay, backend=backend)
        for step in range(5):
            set_grads(params, step)
            opt.step()
            average.update()
            average.assert_in(opt, (case, dtype, decay, step))
        if decay and "lr" in case.kwargs and dtype != torch.float16:
            gap = (opt.state[params[0]]["ema"].double() - params[0].detach().double()) if not dtype.is_complex else None
            assert gap is None or gap.abs().max() > 1e-3


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_parameters_that_sometimes_have_no_gradient(case, backend):
    """Their average goes on towards them; from the first step on, whether or not they take part in it."""
    params = parameters([(300,), (7, 5), (5,), (4,)])
    average = Average(params, 0.8)
    opt = case.ours(params, lr=0.1, ema_decay=0.8, backend=backend) if "lr" not in case.kwargs else None
    opt = opt or case.ours(params, ema_decay=0.8, backend=backend)
    without = [{2, 3}, {0, 3}, {0, 3}, {1, 2, 3}, {3}, {0, 1, 2, 3}, set(), {2}]
    for step, absent in enumerate(without):
        set_grads(params, step, lambda i, absent=absent: i in absent)
        opt.step()
        average.update()
        average.assert_in(opt, (case, step))


def test_decay_by_group_and_between_steps(backend):
    params = parameters(SHAPES * 2)
    halves = params[:5], params[5:]
    averages = [Average(half, decay) for half, decay in zip(halves, (0.9, 0.2), strict=True)]
    groups = [{"params": halves[0], "ema_decay": 0.9}, {"params": halves[1], "ema_decay": 0.2}]
    opt = SGD.ours(groups, backend=backend)
    for step in range(4):
        if step == 2:
            opt.param_groups[0]["ema_decay"] = 0.5
            averages[0].model.multi_avg_fn = get_ema_multi_avg_fn(0.5)
        set_grads(params, step)
        opt.step()
        for average in averages:
            average.update()
            average.assert_in(opt, step)
    # One group alone, and one that is added later.
    opt = SGD.ours([{"params": halves[0], "ema_decay": 0.9}, {"params": halves[1]}], backend=backend)
    extra = parameters([(33,)], seed=9)
    train(opt, params, 2)
    assert "ema" in opt.state[halves[0][0]] and "ema" not in opt.state[halves[1][0]]
    opt.add_param_group({"params": extra, "ema_decay": 0.5})
    average = Average(extra, 0.5)
    for step in range(3):
        set_grads(extra, step)
        opt.step()
        average.update()
        average.assert_in(opt)


@pytest.mark.skipif(_backend.native is None, reason="compares the kernels with the reference")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_from_the_reference(case, dtype):
    opts = []
    for backend in (NATIVE, "reference"):
        params = parameters([(n,) for n in SIZES] + [(3, 5, 7)], dtype)
        opt = case.ours(params, ema_decay=0.99, backend=backend)
        for step in range(4):
            set_grads(params, step, lambda i, step=step: (i + step) % 4 == 3)
            opt.step()
        opts.append(opt)
    assert_same_state(*opts, (case, dtype))
    assert any("ema" in state for state in opts[0].state.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_average_changes_nothing_else(case, backend):
    opts = []
    for decay in (0.9, None):
        params = parameters(SHAPES)
        opt = case.ours(params, ema_decay=decay, backend=backend)
        train(opt, params, 3)
        opts.append(opt)
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
    for step in range(4):
        set_grads(params, step)
        opt.step()
        average.update()
        average.assert_in(opt)
        if step == 1:
            for state in opt.state.values():
                state["ema"] = state["ema"].clone(memory_format=torch.contiguous_format)
    before = [p.detach().clone() for p in params]
    with opt.swap_ema():
        average.assert_in(opt)
        for p, q in zip(params, average.model.module, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
    for p, old in zip(params, before, strict=True):
        assert_same_bits(p.detach(), old)


def test_version_counters_are_bumped(backend):
    p = torch.nn.Parameter(randn((5,), 0))
    opt = SGD.ours([p], ema_decay=0.9, backend=backend)
    train(opt, [p], 2)
    version = opt.state[p]["ema"]._version
    train(opt, [p], 1)
    assert opt.state[p]["ema"]._version > version


# swap_ema


def trained(dtype=torch.float32, backend="auto", case=SGD):
    params = parameters(SHAPES, dtype)
    opt = case.ours(params, ema_decay=0.9, backend=backend)
    train(opt, params, 3)
    return opt, params


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str
)
def test_swap_ema(dtype, backend):
    opt, params = trained(dtype, backend)
    before = [p.detach().clone() for p in params]
    averages = [opt.state[p]["ema"].clone() for p in params]
    assert any((p.detach().to(e.dtype) != e).any() for p, e in zip(params, averages, strict=True))
    with opt.swap_ema():
        for p, e in zip(params, averages, strict=True):
            assert p.dtype == dtype
            assert_same_bits(p.detach(), e.to(dtype))
    for p, old, e in zip(params, before, averages, strict=True):
        assert_same_bits(p.detach(), old)
        assert_same_bits(opt.state[p]["ema"], e)
        assert p.requires_grad and p.is_leaf


def test_swap_ema_serves_the_model(backend):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    opt = optim.AdamW(model.parameters(), lr=0.1, ema_decay=0.5, backend=backend)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    x = randn((12, 6), 0)
    for _ in range(4):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
        average.update_parameters(model)
    plain = model(x)
    with opt.swap_ema():
        torch.testing.assert_close(model(x), average(x), rtol=1e-5, atol=1e-6)
        assert (model(x) - plain).abs().max() > 1e-3
    assert_same_bits(model(x), plain)


def test_swap_ema_after_an_exception(backend):
    opt, params = trained(backend=backend)
    before = [p.detach().clone() for p in params]
    averages = [opt.state[p]["ema"].clone() for p in params]
    for error in (KeyError, KeyboardInterrupt):
        with pytest.raises(error), opt.swap_ema():
            raise error
        for p, old, e in zip(params, before, averages, strict=True):
            assert_same_bits(p.detach(), old)
            assert_same_bits(opt.state[p]["ema"], e)
    with opt.swap_ema():
        pass


def test_nested_swaps_are_refused(backend):
    opt, params = trained(backend=backend)
    before = [p.detach().clone() for p in params]
    averages = [opt.state[p]["ema"].clone() for p in params]
    with opt.swap_ema():
        with pytest.raises(RuntimeError, match="swap_ema"):
            with opt.swap_ema():
                pass
        for p, e in zip(params, averages, strict=True):
            assert_same_bits(p.detach(), e)
    for p, old in zip(params, before, strict=True):
        assert_same_bits(p.detach(), old)
    with opt.swap_ema():  # and again afterwards
        assert_same_bits(params[0].detach(), averages[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_swapping_leaves_no_trace_in_training(case, dtype, backend):
    (opt, params), (plain, others) = trained(dtype, backend, case), trained(dtype, backend, case)
    for step in range(3, 6):
        with opt.swap_ema(), torch.no_grad():
            sum(p.double().sum() for p in params)
        train(opt, params, 1, first=step)
        train(plain, others, 1, first=step)
    assert_same_state(opt, plain, case)


def test_parameters_without_an_average_stay(backend):
    """In a group without one, or before their first step."""
    params = parameters([(5,), (6,), (7,)])
    groups = [
        {"params": params[:1], "ema_decay": 0.9},
        {"params": params[1:2]},
        {"params": params[2:], "ema_decay": 0.5},
    ]
    opt = SGD.ours(groups, backend=backend)
    for step in range(3):
        set_grads(params, step, lambda i: i == 2)
        opt.step()
    before = [p.detach().clone() for p in params]
    with opt.swap_ema():
        assert (params[0].detach() != before[0]).all()
        assert_same_bits(params[1].detach(), before[1])
        assert_same_bits(params[2].detach(), before[2])
    for p, old in zip(params, before, strict=True):
        assert_same_bits(p.detach(), old)


# Checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_checkpoints(case, dtype, backend):
    """The average is in the state dict, in its dtype, and comes back without loss."""
    params = parameters(SHAPES, dtype)
    opt = case.ours(params, ema_decay=0.9, backend=backend)
    train(opt, params, 3)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for i, p in enumerate(params):
        assert_same_bits(loaded["state"][i]["ema"], opt.state[p]["ema"])
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = case.ours(resumed, ema_decay=0.9, backend=backend)
    other.load_state_dict(loaded)
    wide = torch.float32
    assert all(other.state[p]["ema"].dtype == wide and other.state[p]["ema"].device.type == DEVICE for p in resumed)
    assert all(
        other.state[p]["ema"].data_ptr() != opt.state[q]["ema"].data_ptr()
        for p, q in zip(resumed, params, strict=True)
        if p.numel()
    )
    train(opt, params, 2, first=3)
    train(other, resumed, 2, first=3)
    assert_same_state(opt, other, case)


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_old_checkpoints_begin_an_average(case, backend):
    """As an AveragedModel that is made when the checkpoint is loaded."""
    params = parameters(SHAPES)
    old = case.ours(params, backend=backend)
    train(old, params, 3)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in params]
    opt = case.ours(resumed, ema_decay=0.6, backend=backend)
    opt.load_state_dict(copy.deepcopy(old.state_dict()))
    average = Average(resumed, 0.6)
    for step in range(3, 6):
        set_grads(resumed, step)
        opt.step()
        average.update()
        average.assert_in(opt, (case, step))


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_broken_averages_are_refused(case, backend):
    params = parameters([(6, 4), (5,)])
    opt = case.ours(params, ema_decay=0.9, backend=backend)
    train(opt, params, 2)
    for bad in (torch.zeros(3), torch.zeros(5, dtype=torch.int64), "average"):
        kept = opt.state[params[1]]["ema"]
        before = [p.detach().clone() for p in params]
        opt.state[params[1]]["ema"] = bad
        set_grads(params, 3)
        with pytest.raises(RuntimeError, match="group 0 parameter 1.*'ema'"):
            opt.step()
        for p, old in zip(params, before, strict=True):
            assert_same_bits(p.detach(), old)
        opt.state[params[1]]["ema"] = kept
        opt.step()
