"""LARS, LAMB, StableAdamW and cautious updates: what a tensor's step makes of the whole tensor."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS, INT8, NAN, copies_of, parameters, randn

from genopt_ext import optim

CASES = {
    "LARS": dict(lr=1.0, momentum=0.9, weight_decay=0.1, trust_coeff=0.1),
    "LAMB": dict(lr=0.1, weight_decay=0.1),
    "StableAdamW": dict(lr=0.1),
    "AdamW": dict(lr=0.1, cautious="update"),
    "Lion": dict(lr=0.1, cautious="update"),
}
# More than a few rows take at a time, twice.
SHAPES = [(300,), (), (40, 30), (140_000,), (9000,), (140_000,), (2 * 8192 + 5,)]


def stepped(opt, params, grads, steps=2):
    for _ in range(steps):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        opt.step()
    return [p.detach() for p in params]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("storage", [{}, INT8], ids=["plain", "int8"])
def test_each_tensor_has_totals_of_its_own(name, storage, backend):
    """Also of other sizes, and where another one takes no part."""
    params = parameters(SHAPES)
    grads = [10.0**i * randn(p.shape, 50 + i) for i, p in enumerate(params)]
    alone = [copies_of([p]) for p in params]
    make = getattr(optim, name)
    together = stepped(make(params, **CASES[name], **storage, backend=backend), params, grads)
    for own, g, p in zip(alone, grads, together, strict=True):
        (q,) = stepped(make(own, **CASES[name], **storage, backend=backend), own, [g])
        assert torch.equal(p, q), p.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_lars_steps_by_the_weights_norm(dtype, backend):
    """Whatever the gradient's size: a tensor moves by ``lr trust_coeff`` of its norm."""
    p = torch.nn.Parameter(randn((700,), 0, dtype))
    before = p.detach().double().clone()
    opt = optim.LARS([p], lr=0.5, trust_coeff=0.2, eps=0.0, always_adapt=True, backend=backend)
    stepped(opt, [p], [1000.0 * randn((700,), 1, dtype)], steps=1)
    moved = (p.detach().double() - before).norm() / before.norm()
    assert moved.item() == pytest.approx(0.1, rel=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_lamb_steps_by_the_weights_norm(backend):
    params = parameters(SHAPES)
    before = [p.detach().clone() for p in params]
    opt = optim.LAMB(params, lr=0.1, always_adapt=True, backend=backend)
    after = stepped(opt, params, [randn(p.shape, i) for i, p in enumerate(params)], steps=1)
    for p, q in zip(before, after, strict=True):
        assert ((q - p).norm() / p.norm()).item() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("name", ["LARS", "LAMB"])
def test_without_norms_the_learning_rate_is_the_groups(name, backend):
    """Weights of zero, and gradients of zero."""
    p = torch.nn.Parameter(torch.zeros(300))
    opt = getattr(optim, name)([p], lr=0.5, always_adapt=True, weight_decay=0.0, backend=backend)
    stepped(opt, [p], [torch.ones(300)], steps=1)
    torch.testing.assert_close(p.detach(), torch.full((300,), -0.5), rtol=1e-5, atol=0)
    q = torch.nn.Parameter(torch.ones(300))
    stepped(getattr(optim, name)([q], lr=0.5, weight_decay=0.1, backend=backend), [q], [torch.zeros(300)], steps=1)
    assert q.isfinite().all() and (q < 1).all()


def test_clipping_comes_before_norms(backend):
    """LARS divides by the clipped gradient's."""
    ends = []
    for options, factor in ((dict(max_grad_norm=0.25), 1.0), ({}, None)):
        p = torch.nn.Parameter(torch.ones(400))
        g = randn((400,), 3)
        if factor is None:
            g = g * (0.25 / (g.double().norm().item() + 1e-6))
        opt = optim.LARS([p], lr=1.0, weight_decay=0.1, trust_coeff=0.1, backend=backend, **options)
        ends += stepped(opt, [p], [g], steps=1)
    torch.testing.assert_close(*ends)
    assert (ends[0] != 1).all()


def test_stable_adamw_survives_a_spike(backend):
    """AdamW moves by seven times its learning rate where StableAdamW moves by about one."""
    moved = {}
    for make in (optim.AdamW, optim.StableAdamW):
        p = torch.nn.Parameter(torch.ones(300))
        opt = make([p], lr=1e-3, betas=(0.5, 0.999), weight_decay=0.0, backend=backend)
        stepped(opt, [p], [torch.full((300,), 1e-3)], steps=200)
        before = p.detach().clone()
        stepped(opt, [p], [torch.ones(300)], steps=1)
        moved[make.__name__] = (p.detach() - before).abs().max().item()
    assert moved["StableAdamW"] < 2e-3 < 5e-3 < moved["AdamW"]


@pytest.mark.parametrize("name", CASES)
def test_a_skipped_step_makes_no_totals(name, backend):
    (p,) = parameters([(300,)])
    opt = getattr(optim, name)([p], **CASES[name], skip_nonfinite=True, backend=backend)
    stepped(opt, [p], [torch.ones(300)])
    before, state = p.detach().clone(), {k: t.clone() for k, t in opt.state[p].items()}
    stepped(opt, [p], [torch.full((300,), NAN)])
    assert torch.equal(p, before) and all(torch.equal(opt.state[p][k], t) for k, t in state.items())
    assert opt.skipped_steps == 2


def test_lamb_reads_and_writes_timms_checkpoints(backend):
    """They count steps in groups."""
    params = parameters([(300,)])
    opt = optim.LAMB(params, **CASES["LAMB"], backend=backend)
    stepped(opt, params, [torch.ones(300)], steps=3)
    saved = opt.state_dict()
    assert saved["param_groups"][0]["step"] == 3 and "step" not in opt.param_groups[0]
    theirs = {**saved, "state": {0: {k: t for k, t in saved["state"][0].items() if k != "step"}}}
    theirs["param_groups"] = [dict(saved["param_groups"][0], max_grad_norm=1.0, caution=False)]
    again = copies_of(params)
    other = optim.LAMB(again, **CASES["LAMB"], backend=backend)
    other.load_state_dict(theirs)
    other.param_groups[0]["max_grad_norm"] = None
    assert torch.equal(*stepped(opt, params, [torch.ones(300)]), *stepped(other, again, [torch.ones(300)]))


@pytest.mark.parametrize("against", [0, 100, 299, 300])
@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_a_cautious_update_moves_with_the_gradient_alone(name, against, backend):
    """And what moves goes as much further as there is less of it, up to 1000 times."""
    moved = {}
    for cautious in ("update", None):
        p = torch.nn.Parameter(torch.zeros(300))
        opt = getattr(optim, name)([p], lr=0.1, weight_decay=0.0, cautious=cautious, backend=backend)
        first = torch.ones(300)
        second = 1e-30 * torch.where(torch.arange(300) < against, -1.0, 1.0)  # times momentum, it would be 0
        stepped(opt, [p], [first], steps=1)
        before = p.detach().clone()
        stepped(opt, [p], [second], steps=1)
        moved[cautious] = p.detach() - before
    assert (moved["update"][:against] == 0).all()
    gain = 300 / max(300 - against, 0.3)
    torch.testing.assert_close(moved["update"][against:], gain * moved[None][against:])


@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_a_cautious_update_hides_no_nan(name, backend):
    p = torch.nn.Parameter(torch.ones(20))
    stepped(getattr(optim, name)([p], cautious="update", backend=backend), [p], [torch.tensor([NAN] + [1.0] * 19)])
    assert p[0].isnan() and p[1:].isfinite().all()
