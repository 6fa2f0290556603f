"""``step(grads=…)``: gradients in the place of ``.grad``, with the bits that they would have there."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import (
    BACKENDS,
    DEVICE,
    EMULATED,
    FIRST,
    SHAPES,
    Case,
    assert_same_bits,
    made,
    parameters,
    randn,
    refused,
    set_grads,
)

from genopt_ext import optim
from genopt_ext.optim.muon import Muon

PATH = dict(max_grad_norm=0.5, clip_grad_value=0.1, skip_nonfinite=True, ema_decay=0.9)


def gradients(params: list[torch.Tensor], step: int, dtype: torch.dtype | None = None) -> list[torch.Tensor | None]:
    """One in three is None, another one each step."""
    of = [randn(p.shape, 100 * step + i).to(dtype or p.dtype) for i, p in enumerate(params)]
    return [None if i % 3 == step % 3 else g for i, g in enumerate(of)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case, options",
    [*((case, PATH) for case in FIRST.values()), (FIRST["AdamW"], {}), (FIRST["SGD"], dict(clip_per_param=0.3))],
    ids=str,
)
def test_as_if_they_were_grad(case: Case, options, backend):
    ps, qs = parameters(SHAPES), parameters(SHAPES)
    given, own = case.ours(ps, backend=backend, **options), case.ours(qs, backend=backend, **options)
    for step in range(4):
        grads = gradients(ps, step)
        before = [None if g is None else g.clone() for g in grads]
        others = [torch.full_like(p, 7.0) for p in ps]  # neither read nor written
        for p, other in zip(ps, others, strict=True):
            p.grad = other
        for q, g in zip(qs, grads, strict=True):
            q.grad = None if g is None else g.clone()
        given.step(grads=grads), own.step()
        assert all(p.grad is other and (other == 7).all() for p, other in zip(ps, others, strict=True))
        assert_same_bits(grads, before, "they are not written either")
        assert_same_bits([p.detach() for p in ps], [q.detach() for q in qs], f"step {step}")
    assert_same_bits(given.state_dict()["state"], own.state_dict()["state"])
    assert options.get("max_grad_norm") is None or given.grad_norm == own.grad_norm


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_gradients_of_narrow_weights(dtype, backend):
    ps, qs = (parameters(SHAPES, dtype=dtype) for _ in range(2))
    narrow, wide = (made("AdamW", params, lr=0.1, backend=backend) for params in (ps, qs))
    grads = [randn(p.shape, i).to(dtype) for i, p in enumerate(ps)]
    narrow.step(grads=grads), wide.step(grads=[g.float() for g in grads])
    assert_same_bits([p.detach() for p in ps], [q.detach() for q in qs])


@pytest.mark.skipif(EMULATED, reason="its products are of the CPU's tensors")
def test_muon_takes_them():
    results = []
    for given in (True, False):
        params = parameters([(8, 6), (8, 6), (5,)])
        opt = Muon([{"params": params[:2], "algorithm": "muon"}, {"params": params[2:], "algorithm": "adamw"}])
        for step in range(3):
            set_grads(params, step)
            grads = [p.grad for p in params]
            if given:
                opt.zero_grad()
                opt.step(grads=grads)
            else:
                opt.step()
        results.append([p.detach() for p in params])
    assert_same_bits(*results)


def test_sparse_and_strided_ones():
    results = []
    for given in (True, False):
        p, q = parameters([(5, 3), (4, 2)])
        opt = optim.SGD([p, q], lr=0.1, momentum=0.9)
        for step in range(2):
            sparse = torch.sparse_coo_tensor([[3, 1]], randn((2, 3), step), (5, 3), check_invariants=True).to(DEVICE)
            grads = [sparse, randn((2, 4), 9).t()]
            if given:
                opt.step(grads=grads)
            else:
                p.grad, q.grad = grads
                opt.step()
        results.append([p.detach(), q.detach()])
    assert_same_bits(*results)


def test_a_differentiable_step_leads_back_to_them():
    """As one writes an inner loop: the parameters are no leaves, and gradients come from torch.autograd.grad."""
    start = randn((5,), 0).requires_grad_()
    moved = start.clone()  # which the step changes in place
    opt = optim.SGD([moved], lr=0.1, differentiable=True)
    (g,) = torch.autograd.grad(start.pow(3).sum(), start, create_graph=True)
    opt.step(grads=[g])
    moved.sum().backward()
    torch.testing.assert_close(start.grad, 1 - 0.1 * 6 * start.detach())


def test_hooks_and_two_groups_and_grads_in_turn():
    """With and without ``grads=``, in any order; hooks see the keyword."""
    ps, qs = parameters([(5,), (3, 2)]), parameters([(5,), (3, 2)])
    ours, own = (optim.Adam([{"params": x[:1], "lr": 0.1}, {"params": x[1:]}]) for x in (ps, qs))
    seen = []
    ours.register_step_pre_hook(lambda opt, args, kwargs: seen.append(sorted(kwargs)))
    for step in range(4):
        set_grads(qs, step)
        grads = [q.grad for q in qs]
        if step % 2:
            ours.step(grads=tuple(grads))
        else:
            set_grads(ps, step)
            ours.step()
            ours.zero_grad()
        own.step()
    assert seen == [[], ["grads"], [], ["grads"]]
    assert_same_bits([p.detach() for p in ps], [q.detach() for q in qs])


def test_a_loss_scale_divides_them():
    ps, qs = parameters([(5,)]), parameters([(5,)])
    ours, own = optim.AdamW(ps), optim.AdamW(qs)
    g = randn((5,), 0)
    ours.grad_scale, ours.found_inf = torch.tensor([8.0], device=DEVICE), torch.zeros(1, device=DEVICE)
    scaled = g * 8
    ours.step(grads=[scaled]), own.step(grads=[g])
    assert_same_bits(ps[0].detach(), qs[0].detach())
    assert_same_bits(scaled, g * 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_refused_changes_nothing(backend):
    p, q = parameters([(5,), (3, 2)])
    opt = optim.AdamW([p, q], backend=backend)
    g, h = randn((5,), 0), randn((3, 2), 1)
    opt.step(grads=[g, h])
    before = copy.deepcopy((p, q, opt.state_dict()))
    for error, told, call in [
        (ValueError, "grads= has 1 entries for 2 parameters", lambda: opt.step(grads=[g])),
        (TypeError, r"grads\[1\] is a float", lambda: opt.step(grads=[g, 1.0])),
        (ValueError, "grads= takes no closure", lambda: opt.step(lambda: 1.0, grads=[g, h])),
        (RuntimeError, r"group 0 parameter 1 .*gradient", lambda: opt.step(grads=[g, h[:2]])),
        (TypeError, r"grads\[0\] has torch.complex64", lambda: opt.step(grads=[g.to(torch.complex64), h])),
        (TypeError, r"grads\[1\] has torch.int32", lambda: opt.step(grads=[None, h.int()])),
        (TypeError, r"grads\[0\] has torch.float64", lambda: opt.step(grads=[g.double(), h])),
        (TypeError, "grads= is a dict", lambda: opt.step(grads={p: g, q: h})),
        (TypeError, "grads= is a Tensor", lambda: opt.step(grads=torch.zeros(2, 5))),
    ]:
        with pytest.raises(error, match=told):
            call()
        assert_same_bits((p.detach(), q.detach()), (before[0].detach(), before[1].detach()))
        assert_same_bits(opt.state_dict()["state"], before[2]["state"])
    p.grad = g.clone()
    opt.accumulate()
    with pytest.raises(ValueError, match=r"gradients were accumulated.*discard_accumulated"):
        opt.step(grads=[g, h])
    opt.discard_accumulated()
    opt.step(grads=[None, h])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        twice = optim.SGD([p, p], lr=0.1, backend=backend)
    refused(twice, "grads", call=lambda: twice.step(grads=[g, g]))


def test_an_empty_optimizer_and_none_at_all():
    opt = optim.SGD([{"params": []}], lr=0.1)
    opt.step(grads=[])
    params = parameters([(5,)])
    before = params[0].detach().clone()
    opt = optim.AdamW(params, ema_decay=0.9)
    params[0].grad = randn((5,), 0)
    opt.step(grads=[None])
    assert_same_bits(params[0].detach(), before)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_step_takes_them():
    params, eager = parameters([(5,)]), parameters([(5,)])
    opt, other = optim.AdamW(params), optim.AdamW(eager)

    @torch.compile(backend="eager")
    def step(grads):
        opt.step(grads=grads)

    for i in range(2):
        step([randn((5,), i)])
        other.step(grads=[randn((5,), i)])
    assert_same_bits(params[0].detach(), eager[0].detach())
    with pytest.raises(ValueError, match="takes no closure"):
        torch.compile(lambda: opt.step(lambda: 1.0, grads=[randn((5,), 0)]), backend="eager")()
