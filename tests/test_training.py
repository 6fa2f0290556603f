"""Early stopping on any optimizer, and learning rates over a run against closed forms."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from cases import DEVICE, assert_same_bits, in_training, made, randn, set_grads
from torch import nn

from genopt_ext import optim
from genopt_ext.training import EarlyStopping, warmup_cosine, warmup_stable_decay

NAN = float("nan")


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).to(DEVICE, dtype)


def trained(net: nn.Module, opt: torch.optim.Optimizer | None, seed: int) -> None:
    net(randn((6, 4), seed).to(next(net.parameters()).dtype)).square().sum().backward()
    if opt is not None:
        opt.step()
        opt.zero_grad()


def tensors(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in net.state_dict().items()}


@pytest.mark.parametrize(
    "metrics, options, stops_at, best",
    [
        ([3, 2, 1, 1, 1], dict(patience=2), 4, 1),
        ([3, 2, 1, 1.5, 0.5, 1, 1, 0], dict(patience=2), 6, 0.5),
        ([3, 2.9, 2.8, 2.7], dict(patience=2, min_delta=0.15), None, 2.8),
        ([3, 2.9, 2.9, 2.8], dict(patience=2, min_delta=0.15), 2, 3),
        ([1, 2, 3, 2, 2], dict(patience=2, mode="max"), 4, 3),
        ([1, 1.1, 1.2], dict(patience=1, mode="max", min_delta=0.1), 1, 1),
        ([NAN, NAN, 1, NAN, NAN, NAN], dict(patience=3), 5, 1),
        ([NAN, NAN], dict(patience=2), 1, None),
        ([math.inf, 5, math.inf], dict(patience=2), None, 5),
    ],
)
@pytest.mark.parametrize("restore_best", [True, False])
def test_when_it_stops(metrics, options, stops_at, best, restore_best):
    net = network()
    stopping = EarlyStopping(net, restore_best=restore_best, **options)
    for i, metric in enumerate(metrics):
        assert stopping(torch.tensor(float(metric), dtype=torch.float64) if i % 2 else metric) == (
            stops_at is not None and i >= stops_at
        ), i
    assert stopping.best == best and stopping.stopped == (stops_at is not None)


@pytest.mark.parametrize("make", [None, torch.optim.AdamW, optim.AdamW], ids=["none", "torch", "ours"])
def test_the_best_weights_and_buffers_come_back_where_they_lie(make):
    net = network()
    opt = make(net.parameters(), lr=0.1) if make else None
    stopping = EarlyStopping(net, opt, patience=2)
    lie_at = [t.data_ptr() for t in net.state_dict().values()]
    best = {}
    for step, metric in enumerate([3.0, 1.0, 2.0, 2.0]):
        trained(net, opt, step)
        if metric == 1.0:
            best = tensors(net)
        stopped = stopping(metric)
    assert stopped
    assert_same_bits(tensors(net), best)
    assert [t.data_ptr() for t in net.state_dict().values()] == lie_at


def test_without_restoring_the_last_weights_stay():
    net = network()
    opt = optim.SGD(net.parameters(), lr=0.1)
    stopping = EarlyStopping(net, opt, patience=1, restore_best=False)
    stopping(1.0), trained(net, opt, 0)
    last = tensors(net)
    assert stopping(2.0)
    assert_same_bits(tensors(net), last)
    with pytest.raises(RuntimeError, match="no weights were kept"):
        stopping.restore()


def test_averages_are_what_is_kept():
    net = network()
    opt = optim.AdamW(net.parameters(), lr=0.1, ema_decay=0.5)
    stopping = EarlyStopping(net, opt, patience=1)
    for step in range(3):
        trained(net, opt, step)
    with opt.swap_ema():
        best = tensors(net)
        with pytest.raises(RuntimeError, match="leave swap_ema"):
            stopping(1.0)
    before = tensors(net)
    assert not stopping(1.0)
    assert_same_bits(tensors(net), before, "training goes on with its own weights")
    trained(net, opt, 9)
    with opt.swap_ema(), pytest.raises(RuntimeError, match="leave swap_ema"):
        stopping.restore()
    assert stopping(2.0)
    assert_same_bits(tensors(net), best)
    with opt.swap_ema():
        assert_same_bits(tensors(net), best, "they are the averages too")


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_a_class_without_a_schedule_ends_in_evaluation(name):
    net = network()
    opt = made(name, net.parameters(), lr=0.1)
    stopping = EarlyStopping(net, opt, patience=1)
    for step in range(3):
        trained(net, opt, step)
    with opt.evaluating():
        best = tensors(net)
    assert not stopping(1.0)
    trained(net, opt, 9)
    assert stopping(2.0)
    assert_same_bits(tensors(net), best)
    opt.eval()  # is so already
    assert_same_bits(tensors(net), best)


@pytest.mark.parametrize("options", [dict(master_weights=True), dict(param_rounding="kahan")], ids=str)
def test_narrow_weights_are_stepped_from_what_was_restored(options):
    net = network(torch.bfloat16)
    opt = optim.AdamW(net.parameters(), lr=0.1, **options)
    stopping = EarlyStopping(net, opt, patience=1)
    trained(net, opt, 0)
    assert not stopping(1.0)
    for step in range(5):
        trained(net, opt, 1 + step)
    assert stopping(2.0)
    best = tensors(net)
    set_grads(list(net.parameters()), 0)
    for group in opt.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0
    opt.step()
    assert_same_bits(tensors(net), best, "a step of length 0 moves nothing")


def test_a_killed_run_goes_on():
    whole, first = network(), network()
    runs = []
    for net in (whole, first):
        opt = optim.AdamW(net.parameters(), lr=0.1)
        runs.append((net, opt, EarlyStopping(net, opt, patience=3)))
    metrics = [3.0, 1.0, 2.0, 2.0, 2.0]
    for net, opt, stopping in runs:
        for step in range(3 if net is first else 5):
            trained(net, opt, step), stopping(metrics[step])
    file = io.BytesIO()
    torch.save([each.state_dict() for each in runs[1]], file)
    file.seek(0)
    net = network()
    opt = optim.AdamW(net.parameters(), lr=0.1)
    stopping = EarlyStopping(net, opt, patience=3)
    for each, state in zip((net, opt, stopping), torch.load(file), strict=True):
        each.load_state_dict(state)
    for step in range(3, 5):
        trained(net, opt, step)
        stopped = stopping(metrics[step])
    assert stopped and stopping.best == 1.0
    assert_same_bits(tensors(net), tensors(whole))
    with pytest.raises(ValueError, match=r"not the tensors of this model: 0\.bias, "):
        EarlyStopping(nn.Linear(4, 3, bias=False).to(DEVICE)).load_state_dict(stopping.state_dict())


def test_a_model_that_has_changed_is_refused():
    net = network()
    stopping = EarlyStopping(net)
    stopping(1.0)
    net.append(nn.Linear(3, 1).to(DEVICE))
    with pytest.raises(RuntimeError, match=r"tensors have changed: 2\.bias, 2\.weight"):
        stopping.restore()


@pytest.mark.parametrize(
    "options, told",
    [
        (dict(patience=0), "patience is 0"),
        (dict(patience=2.5), "patience is 2.5"),
        (dict(min_delta=-1), "min_delta is -1"),
        (dict(min_delta=NAN), "min_delta is nan"),
        (dict(mode="low"), "mode is 'low'"),
    ],
)
def test_bad_arguments(options, told):
    with pytest.raises(ValueError, match=told):
        EarlyStopping(network(), **options)


# --- learning rates -------------------------------------------------------------------------------------------------


def rates(scheduler: torch.optim.lr_scheduler.LambdaLR, count: int) -> list[list[float]]:
    """The learning rate of each group at each of so many steps."""
    found = []
    for _ in range(count):
        found.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step(), scheduler.step()
    return found


def two_groups() -> torch.optim.Optimizer:
    params = [nn.Parameter(randn((3,), i)) for i in range(2)]
    set_grads(params, 0)
    return in_training(optim.SGD([{"params": params[:1], "lr": 2.0}, {"params": params[1:]}], lr=0.5))


FORMS = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}


@pytest.mark.parametrize("decay", FORMS)
@pytest.mark.parametrize("least", [0.0, 0.1])
def test_warmup_stable_decay(decay, least):
    found = rates(warmup_stable_decay(two_groups(), 3, 4, 5, min_ratio=least, decay=decay), 15)
    falls = [least + (1 - least) * FORMS[decay](i / 5) for i in range(5)]
    expected = [0.25, 0.5, 0.75, *[1.0] * 4, *falls, *[least] * 3]
    torch.testing.assert_close(torch.tensor(found), torch.tensor([[2.0 * x, 0.5 * x] for x in expected]))


def test_parts_may_be_empty():
    assert [a for a, _ in rates(warmup_stable_decay(two_groups(), 0, 2, 0), 4)] == [2.0, 2.0, 0.0, 0.0]
    found = rates(warmup_cosine(two_groups(), 1, 3, min_ratio=0.5), 5)
    torch.testing.assert_close(torch.tensor(found)[:, 0], torch.tensor([1.0, 2.0, 1.5, 1.0, 1.0]))


def test_cosine_is_torchs():
    ours, theirs = two_groups(), two_groups()
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 7)
    torch.testing.assert_close(
        torch.tensor(rates(warmup_cosine(ours, 0, 7), 7)),
        torch.tensor(rates(torchs, 7)),  # type: ignore[arg-type]
    )


def test_a_schedule_is_resumed():
    whole, opt = (warmup_stable_decay(two_groups(), 2, 2, 4) for _ in range(2))
    expected = rates(whole, 8)
    rates(opt, 3)
    again = two_groups()
    later = warmup_stable_decay(again, 2, 2, 4)
    later.load_state_dict(copy.deepcopy(opt.state_dict()))
    again.load_state_dict(opt.optimizer.state_dict())
    assert rates(later, 5) == expected[3:]


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda opt: warmup_stable_decay(opt, -1, 2, 2), "warmup_steps is -1"),
        (lambda opt: warmup_stable_decay(opt, 1, 2, 2, min_ratio=2.0), "min_ratio is 2.0"),
        (lambda opt: warmup_stable_decay(opt, 1, 2, 2, decay="sine"), "decay is 'sine'"),
        (lambda opt: warmup_cosine(opt, 5, 3), "warmup_steps is 5"),
    ],
)
def test_bad_schedules(call, told):
    opt = two_groups()
    with pytest.raises(ValueError, match=told):
        call(opt)
    assert [group["lr"] for group in opt.param_groups] == [2.0, 0.5]
