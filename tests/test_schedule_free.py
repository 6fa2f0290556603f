"""Classes without a schedule: their two modes, and their authors' package. Their numbers in general: test_bits.py."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cases import (
    FIRST,
    INF,
    NARROW,
    SIXTEEN,
    Case,
    assert_same_bits,
    assert_same_state,
    copies_of,
    in_training,
    made,
    pairs,
    parameters,
    places,
    refused,
    saved,
    set_grads,
    train,
    trained,
)
from low_precision import KEPT

from genopt_ext import optim, step_in_backward

NAMES = [name for name in FIRST if name.endswith("ScheduleFree")]
SHAPES = [(300,), (5, 7), ()]
OPTIONS = dict(r=0.5, weight_lr_power=1.5, weight_decay=0.1)
AGREED = [
    *(Case(name, dict(lr=0.1)) for name in NAMES),
    Case("AdamWScheduleFree", dict(lr=0.02, betas=(0.8, 0.95), eps=1e-6, warmup_steps=7, **OPTIONS)),
    Case("SGDScheduleFree", dict(lr=0.2, momentum=0.7, warmup_steps=7, **OPTIONS)),
    Case("RAdamScheduleFree", dict(lr=0.02, betas=(0.8, 0.95), silent_sgd_phase=False, **OPTIONS)),
]


def theirs(case, params):
    authors = pytest.importorskip("schedulefree")
    return in_training(getattr(authors, case.name)(params, **case.kwargs, foreach=False))


def weights(opt):
    return [p.detach().clone() for p in places(opt)]


# Their package


@pytest.mark.parametrize("case", AGREED, ids=str)
def test_the_authors_numbers(case, backend):
    """Over 25 steps with evaluations between them, within rounding."""
    opts = case.ours(parameters(SHAPES), backend=backend), theirs(case, parameters(SHAPES))
    for step in range(25):
        for opt in opts:
            train(opt, places(opt), 1, step)
            if step % 10 == 9:
                opt.eval()
        torch.testing.assert_close(weights(opts[0]), weights(opts[1]), rtol=2e-6, atol=2e-6)
        for opt in opts:
            opt.train()


@pytest.mark.parametrize("case", AGREED, ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_authors_checkpoints(case, mode, backend):
    """Each loads the other's and goes on, also where a parameter came later; back again nothing of before counts."""

    def ours(params):
        return case.ours(params, backend=backend)

    def begun(make):
        params = parameters(SHAPES)
        opt = make(params)
        for step in range(6):
            set_grads(params, step, lambda i, step=step: i == 1 and step < 2)
            opt.step()
        opt.zero_grad()
        return opt

    for first, second in ((ours, lambda params: theirs(case, params)), (lambda params: theirs(case, params), ours)):
        opt = begun(first)
        getattr(opt, mode)()
        other = second(copies_of(places(opt)))
        other.load_state_dict(saved(opt.state_dict()))
        assert other.param_groups[0]["train_mode"] == (mode == "train")
        for each in (opt, other):
            each.train()
            train(each, places(each)[:1], 4, 6)  # the others have what each package counts for them
        torch.testing.assert_close(weights(opt), weights(other), rtol=2e-6, atol=2e-6)
        back = first(copies_of(places(other)))
        back.load_state_dict(saved(other.state_dict()))
        for each in (opt, back):
            train(each, places(each)[:1], 3, 10)
            each.eval()
        torch.testing.assert_close(weights(opt)[0], weights(back)[0], rtol=5e-6, atol=5e-6)
        assert back.state_dict()["param_groups"][0]["k"] == 13


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_the_authors(name):
    import inspect

    authors = pytest.importorskip("schedulefree")
    ours, given = (list(inspect.signature(getattr(m, name)).parameters.values()) for m in (optim, authors))
    positional = [p for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == [p.name for p in given]
    assert [p.default for p in positional if p.name != "foreach"] == [p.default for p in given if p.name != "foreach"]


def test_each_parameter_counts_for_itself_and_groups_for_the_longest(backend):
    params = parameters([(300,), (300,)])
    opt = made("AdamWScheduleFree", params, lr=0.5, backend=backend)
    train(opt, params[:1], 2)
    params[0].grad = None
    train(opt, params[1:], 1)
    (group,) = opt.state_dict()["param_groups"]
    assert (group["k"], group["weight_sum"], group["lr_max"]) == (2, 0.5, 0.5)
    assert [opt.state[p]["weight_sum"].item() for p in params] == [0.5, 0.25]
    assert "k" not in opt.param_groups[0]
    opt.load_state_dict(opt.state_dict())
    assert [opt.state[p]["step"].item() for p in params] == [2, 1] and "k" not in opt.param_groups[0]


# The modes


@pytest.mark.parametrize("name", NAMES)
def test_the_average_is_that_of_z(name, backend):
    """With weights of one size, x is the mean of z after each step, and y lies between both."""
    p = parameters([(300,)], torch.float64)[0]
    opt = made(name, [p], lr=0.1, backend=backend, **({} if name != "RAdamScheduleFree" else {"weight_lr_power": 0.0}))
    beta = 0.9
    seen = []
    for step in range(8):
        train(opt, [p], 1, step)
        seen.append(opt.state[p]["z"].clone())
        x, y = torch.stack(seen).mean(0), p.detach().clone()
        torch.testing.assert_close(y, (1 - beta) * seen[-1] + beta * x)
        opt.eval()
        torch.testing.assert_close(p.detach(), x)
        opt.train()
        torch.testing.assert_close(p.detach(), y)


@pytest.mark.parametrize("name", NAMES)
def test_modes_change_once_and_pass_over_what_was_not_stepped(name, backend):
    params = parameters([(300,), (4,)])
    opt = getattr(optim, name)(params, lr=0.1, backend=backend)
    assert opt.param_groups[0]["train_mode"] is False
    begin = weights(opt)
    opt.eval(), opt.train(), opt.train(), opt.eval(), opt.train()
    assert_same_bits(weights(opt), begin)
    train(opt, params[:1], 8)
    trained_ = weights(opt)
    opt.train()
    assert_same_bits(weights(opt), trained_)
    opt.eval()
    averaged = weights(opt)
    assert (averaged[0] != trained_[0]).any()
    assert_same_bits(averaged[1], begin[1])
    opt.eval()
    assert_same_bits(weights(opt), averaged)
    opt.add_param_group({"params": parameters([(3,)])})
    opt.train()
    opt.add_param_group({"params": parameters([(3,)])})
    assert [group["train_mode"] for group in opt.param_groups] == [True] * 3
    torch.testing.assert_close(weights(opt)[:2], trained_)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_in_evaluation_is_refused(name, backend):
    params = parameters([(300,)])
    opt = getattr(optim, name)(params, backend=backend)
    set_grads(params, 0)
    told = rf"{name}.step: group 0 is in evaluation.*call the optimizer's train\(\) before training"
    refused(opt, told)
    assert not opt.state
    train(in_training(opt), params, 2)
    opt.eval()
    refused(opt, told)
    refused(opt, told, call=lambda: opt.step(lambda: pytest.fail("the closure is not called")))
    handle = step_in_backward(opt)
    with pytest.raises(RuntimeError, match=told):
        params[0].square().sum().backward()
    handle.remove()


@pytest.mark.parametrize(
    ("name", "dtype", "kept", "backend"), pairs(NAMES, NARROW, [{}, *KEPT, dict(ema_decay=0.9)], ["auto", "reference"])
)
def test_evaluating_changes_no_bit_of_training(name, dtype, kept, backend):
    ends = []
    for evaluates in (False, True):
        params = parameters(SHAPES, dtype)
        torch.manual_seed(0)
        opt = made(name, params, lr=0.1, backend=backend, **kept)
        for step in range(8):
            train(opt, params, 1, step)
            if evaluates:
                before = weights(opt)
                with pytest.raises(KeyError), opt.evaluating():
                    assert not opt.param_groups[0]["train_mode"]
                    assert step < 5 or any((p != old).any() for p, old in zip(params, before, strict=True))
                    refused(opt, "leave swap_ema\\(\\) or evaluating\\(\\) first")
                    for call in (opt.train, opt.eval, opt.evaluating().__enter__):
                        refused(opt, "leave swap_ema\\(\\) or evaluating\\(\\) first", call=call)
                    raise KeyError
        ends.append(opt)
    assert_same_state(*ends, (name, dtype, kept))
    with ends[0].evaluating():
        inside = weights(ends[0])
    ends[0].eval()
    assert_same_bits(weights(ends[0]), inside)
    with ends[0].evaluating():  # in evaluation already
        pass
    assert_same_bits(weights(ends[0]), inside)


@pytest.mark.parametrize(("name", "dtype", "kept"), pairs(NAMES, SIXTEEN, KEPT[1:]), ids=str)
def test_what_a_16_bit_parameter_keeps_goes_along(name, dtype, kept, backend):
    """The way to the average and back loses less than one rounding of the parameter."""
    params = parameters(SHAPES, dtype)
    opt = trained(lambda params: made(name, params, lr=0.1, backend=backend, **kept), params, 8)
    wide = made(name, copies_of([torch.nn.Parameter(_whole(opt, p)) for p in params]), lr=0.1)
    wide.load_state_dict(opt.state_dict())
    for each in (opt, wide):
        each.eval()
    for p, q in zip(params, places(wide), strict=True):
        torch.testing.assert_close(_whole(opt, p), q.detach(), rtol=1e-4, atol=1e-5)
        assert_same_bits(p.detach(), _whole(opt, p).to(dtype))


def _whole(opt, p):
    state = opt.state[p]
    return state["master"].clone() if "master" in state else p.detach().float() + state["compensation"].float()


@pytest.mark.parametrize("name", NAMES)
def test_swap_ema_and_modes_do_not_mix(name, backend):
    """The average that ema_decay keeps is that of the weights of training."""
    params = parameters(SHAPES)
    opt = trained(lambda params: made(name, params, ema_decay=0.9, lr=0.1, backend=backend), params, 8)
    with opt.swap_ema():
        refused(opt, "leave swap_ema", call=opt.eval)
    opt.eval()
    before = weights(opt)
    with opt.swap_ema():
        assert_same_bits(params[0].detach(), opt.state[params[0]]["ema"])
    assert_same_bits(weights(opt), before)


# State


@pytest.mark.parametrize("name", NAMES)
def test_z_is_kept_as_weights_are(name, backend):
    """In float32 for 16 bits, whatever moments are stored as; also from a checkpoint that has it narrow."""
    params = parameters([(5000,)], torch.bfloat16)
    opt = trained(lambda params: made(name, params, state_dtype=torch.int8, backend=backend), params, 2)
    state = opt.state[params[0]]
    assert state["z"].dtype == torch.float32 and "z_codes" not in state
    checkpoint = copy.deepcopy(opt.state_dict())
    checkpoint["state"][0]["z"] = checkpoint["state"][0]["z"].bfloat16()
    opt.load_state_dict(checkpoint)
    assert opt.state[params[0]]["z"].dtype == torch.float32
    opt.state[params[0]]["z"] = opt.state[params[0]]["z"].bfloat16()
    train(opt, params, 1, 2)
    assert opt.state[params[0]]["z"].dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_a_first_step_that_is_skipped_begins_nothing(name, backend):
    p = parameters([(300,)])[0]
    opt = made(name, [p], skip_nonfinite=True, backend=backend)
    p.grad = torch.full_like(p, INF)
    opt.step()
    assert_same_bits(opt.state[p]["z"], p.detach())
    assert [opt.state[p][each].item() for each in ("step", "weight_sum", "lr_max")] == [0, 0.0, -1.0]
    before = p.detach().clone()
    opt.eval()
    assert_same_bits(p.detach(), before)


def test_numbers_are_exact_over_checkpoints(backend):
    """They are float64, with flags that have them on the parameter's device too: a sum of 2**24 squares still grows."""
    p = parameters([(300,)])[0]
    opt = made("AdamWScheduleFree", [p], fused=True, backend=backend)
    train(opt, [p], 1)
    opt.state[p]["weight_sum"].fill_(2.0**24 * 0.0025**2)
    before = opt.state[p]["weight_sum"].item()
    opt.load_state_dict(saved(opt.state_dict()))
    assert opt.state[p]["weight_sum"].dtype == torch.float64 and opt.state[p]["weight_sum"].item() == before
    train(opt, [p], 1)
    assert opt.state[p]["weight_sum"].item() == before + 0.0025**2


@pytest.mark.parametrize("name", NAMES)
def test_a_learning_rate_of_zero_moves_nothing(name, backend):
    """The authors' ratio is 0 where no weight has counted yet."""
    p = parameters([(300,)])[0]
    before = p.detach().clone()
    opt = made(name, [p], lr=0.0, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(opt, [p], 6)
        opt.eval()
    assert_same_bits(p.detach(), before)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_no_average_follows_from_these(beta):
    with pytest.raises(ValueError, match="must be a finite number > 0 and < 1"):
        optim.AdamWScheduleFree(parameters([(2,)]), betas=(beta, 0.999))
    with pytest.raises(ValueError, match="momentum must be a finite number > 0 and < 1"):
        optim.SGDScheduleFree(parameters([(2,)]), momentum=beta)
