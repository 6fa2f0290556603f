"""Muon: memory that parameters of both algorithms share, and gradients that they do."""

import pytest
import torch
from cases import DEVICE, INF, assert_same_bits, parameters, randn, refused, set_grads, train

import genopt_ext
from genopt_ext import optim
from genopt_ext.optim import muon_matrices


def made(matrix, other, backend, **more):
    """Of one parameter that Muon steps and one that AdamW does."""
    named = [("layers.0.weight", matrix), ("embed.weight", other)]
    opt = optim.Muon(named, lr=0.1, adamw_lr=0.01, backend=backend, **more)
    assert [route.algorithm for route in opt.routing().values()] == ["muon", "adamw"]
    return opt


def stepped(backend, **more):
    params = parameters([(6, 8), (6, 8)])
    opt = made(*params, backend, **more)
    train(opt, params, 2)
    set_grads(params, 2)
    return params, opt


EITHER = r"'(layers.0|embed).weight'.* shares memory with .*'(layers.0|embed).weight'"


@pytest.mark.parametrize("shift", [0, 8, 40, 47])
@pytest.mark.parametrize("turned", [False, True], ids=["matrix first", "matrix last"])
def test_parameters_of_both_that_share_memory_are_refused(shift, turned, backend):
    base = randn((96,), 0)
    views = [base[:48].view(6, 8), base[shift : shift + 48].view(6, 8)]
    matrix, other = views[::-1] if turned else views
    opt = made(matrix, other, backend)
    matrix.grad, other.grad = randn((6, 8), 1), randn((6, 8), 2)
    refused(opt, EITHER)
    # One that has no gradient does no harm, until it has one.
    other.grad = None
    opt.step()
    other.grad = randn((6, 8), 2)
    refused(opt, EITHER)


def test_parameters_of_both_beside_one_another_are_stepped(backend):
    base = randn((96,), 0)
    views = base[:48].view(6, 8), base[48:].view(6, 8)
    twins = [view.clone() for view in views]
    opt, other = made(*views, backend), made(*twins, backend)
    train(opt, views)
    train(other, twins)
    assert_same_bits(list(views), twins)


def test_a_parameter_that_comes_to_share_memory_with_the_others_is_refused(backend):
    params, opt = stepped(backend)
    own = params[1].data
    params[1].data = params[0].data
    refused(opt, EITHER)
    params[1].data = own
    opt.step()


@pytest.mark.parametrize(("k", "name"), [(0, "momentum_buffer"), (0, "ema"), (1, "exp_avg"), (1, "ema")])
def test_state_in_memory_of_the_other_algorithms_is_refused(k, name, backend):
    params, opt = stepped(backend, ema_decay=0.9)
    opt.state[params[k]][name] = params[1 - k].data
    refused(opt, EITHER)


@pytest.mark.parametrize("k", [0, 1])
def test_a_gradient_in_memory_of_the_other_algorithms_is_refused(k, backend):
    params, opt = stepped(backend)
    other = opt.state[params[1 - k]]["momentum_buffer" if k else "exp_avg"]
    for grad in (params[1 - k].data, other):
        params[k].grad = grad
        refused(opt, "its gradient shares memory with the parameter or state of")
    params[k].grad = randn((6, 8), 3)
    opt.step()


def test_a_parameter_listed_in_groups_of_both_is_refused(backend):
    params, opt = stepped(backend)
    opt.param_groups[1]["params"].append(params[0])
    opt.param_groups[1]["param_names"].append("layers.0.weight")
    refused(opt, "a parameter is listed twice; list each once")


def zeroing(opt, params):
    opt.step_and_zero_()
    assert all((p.grad == 0).all() for p in params)


def unscaling(opt, params):
    scaler = genopt_ext.GradScaler(DEVICE, init_scale=4.0, unscale_grads=True)
    scaler.scale(torch.zeros((), device=DEVICE))
    scaler.step(opt)


@pytest.mark.parametrize("step", [zeroing, unscaling])
@pytest.mark.parametrize("elements", [1 << 24, 10])
@pytest.mark.parametrize("skips", [False, True], ids=["", "skip"])
def test_gradients_that_share_memory_are_written_once_all_were_read(step, elements, skips, backend, monkeypatch):
    """Of both algorithms, and of matrices that are stepped some at a time."""
    monkeypatch.setattr(muon_matrices, "ELEMENTS", elements)
    ends = []
    for shares in (False, True):
        params = parameters([(6, 8), (6, 8), (6, 8)])
        names = ("layers.0.weight", "layers.1.weight", "embed.weight")
        named = list(zip(names, params, strict=True))
        opt = optim.Muon(named, lr=0.1, adamw_lr=0.01, backend=backend, skip_nonfinite=skips)
        for i in range(3):
            g = 4 * randn((6, 8), i)
            if i == 1 and skips:
                g[2, 3] = INF
            for p in params:
                p.grad = g if shares else g.clone()
            step(opt, params)
        ends.append([p.detach() for p in params] + [p.grad for p in params])
    assert_same_bits(*ends)
