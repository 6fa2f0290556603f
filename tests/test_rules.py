"""What single rules do beside or beyond torch's; their numbers in general: test_bits.py, test_state.py."""

import math

import pytest
import torch
from cases import INF, NAN
from hypothesis import given
from hypothesis import strategies as st
from low_precision import stepped

from genopt_ext import optim
from genopt_ext.reference.math import exponential, logarithm


def test_rprop_takes_the_sign_of_a_product_as_torch_does(backend):
    """Which underflows where both gradients are below 1e-23 in float32: their step sizes stay as they are."""
    ends = []
    for make in (torch.optim.Rprop, lambda params: optim.Rprop(params, backend=backend)):
        p = torch.nn.Parameter(torch.zeros(300))
        opt = make([p])
        stepped(opt, 1e-30, 1e-30, -1e-30, 1e-10, -1e-10)
        ends.append(opt.state[p]["step_size"])
    torch.testing.assert_close(*ends)
    assert (ends[0] == 0.005).all()


def test_rprop_passes_over_nan_as_torch_does(backend):
    ends = []
    for make in (torch.optim.Rprop, lambda params: optim.Rprop(params, backend=backend)):
        p = torch.nn.Parameter(torch.zeros(300))
        stepped(make([p]), 1.0, NAN, 1.0, -1.0, INF)
        ends.append(p.detach())
    torch.testing.assert_close(*ends)
    assert ends[0].isfinite().all()


def test_adamax_keeps_nan(backend):
    """A maximum that drops it would go on as if nothing had been."""
    p = torch.nn.Parameter(torch.zeros(300))
    opt = optim.Adamax([p], backend=backend)
    stepped(opt, NAN, 1.0)
    assert opt.state[p]["exp_inf"].isnan().all() and p.isnan().all()


def test_radam_is_rectified_from_the_sixth_step_on(backend):
    """Before that the variance of so few gradients is not known, and the step is momentum's alone."""
    p = torch.nn.Parameter(torch.zeros(300))
    opt = optim.RAdam([p], lr=1.0, backend=backend)
    moved = []
    for _ in range(7):
        before = p[0].item()
        stepped(opt, 100.0)
        moved.append(before - p[0].item())
    assert moved[:5] == pytest.approx([100.0] * 5, rel=1e-5)
    assert all(0 < step < 1 for step in moved[5:])


def test_ademamix_goes_on_from_its_authors_checkpoint(backend):
    """Theirs has a number for the step, and None for a fast average that is the gradient."""
    p, q = (torch.nn.Parameter(torch.ones(300)) for _ in range(2))
    options = dict(lr=0.01, betas=(0.0, 0.9, 0.99), alpha=3.0)
    opt, other = optim.AdEMAMix([p], **options, backend=backend), optim.AdEMAMix([q], **options, backend=backend)
    stepped(opt, 1.0, -0.5)
    theirs = opt.state_dict()
    state = theirs["state"][0]
    assert "exp_avg_fast" not in state
    theirs["state"][0] = {**state, "step": 2, "exp_avg_fast": None}
    ours = ("params", "lr", "betas", "alpha", "beta3_warmup", "alpha_warmup", "eps", "weight_decay")
    theirs["param_groups"] = [{key: group[key] for key in ours} for group in theirs["param_groups"]]
    with torch.no_grad():
        q.copy_(p)
    other.load_state_dict(theirs)
    assert torch.equal(stepped(opt, 0.25), stepped(other, 0.25))


@given(st.floats(-700, 700))
def test_logarithm_and_exponential(x):
    """Ours, as maths libraries differ in their last bits: some units in the last place."""
    assert exponential(x) == pytest.approx(math.exp(x), rel=1e-15)
    assert logarithm(math.exp(x)) == pytest.approx(math.log(math.exp(x)), rel=1e-15, abs=1e-16)


def test_adopt_measures_at_its_first_step(backend):
    p = torch.nn.Parameter(torch.ones(300))
    opt = optim.ADOPT([p], lr=0.1, weight_decay=0.5, decouple=True, backend=backend)
    stepped(opt, 2.0)
    assert (p == 1).all() and (opt.state[p]["exp_avg"] == 0).all() and (opt.state[p]["exp_avg_sq"] == 4).all()
    stepped(opt, 100.0)  # 50 times as large as the gradients before: limited to 1^0.25
    torch.testing.assert_close(p.detach(), torch.full((300,), 1 - 0.1 * 0.5 - 0.1 * 0.1))


def test_adan_reads_and_writes_its_authors_checkpoints(backend):
    """They count steps in groups."""
    params = [torch.nn.Parameter(torch.ones(300)) for _ in range(2)]
    opt = optim.Adan(params, ema_decay=0.9, backend=backend)
    for p in params[:1] * 3:
        p.grad = torch.full_like(p, 0.3)
        opt.step()
    saved = opt.state_dict()
    assert saved["param_groups"][0]["step"] == 3 and "step" not in opt.param_groups[0]
    del saved["state"][0]["step"]
    other = optim.Adan([p.detach().clone().requires_grad_() for p in params], ema_decay=0.9, backend=backend)
    other.load_state_dict(saved)
    assert other.state[other.param_groups[0]["params"][0]]["step"] == 3
    assert list(other.state[other.param_groups[0]["params"][1]]) == ["ema"]
    assert "step" not in other.param_groups[0]


def test_each_parameter_has_numbers_of_its_own(backend):
    """Also where all have taken as many steps."""
    ends = []
    for make in (torch.optim.NAdam, lambda params: optim.NAdam(params, backend=backend)):
        params = [torch.nn.Parameter(torch.ones(300)) for _ in range(3)]
        opt = make(params)
        for step in range(2):
            for p in params:
                p.grad = torch.full_like(p, 0.3 + step)
            opt.step()
            if step == 0:
                opt.state[params[1]]["mu_product"].fill_(0.1)
                opt.state[params[2]]["mu_product"] = torch.tensor(0.1, dtype=torch.float64)
        ends.append([*(p.detach() for p in params), *(opt.state[p]["mu_product"].float() for p in params)])
    torch.testing.assert_close(*ends)
    assert ends[0][3] > 2 * ends[0][4]


def test_numbers_of_a_skipped_step(backend):
    for name, names, options in (("NAdam", ["mu_product"], {}), ("ASGD", ["eta", "mu"], dict(t0=0.0))):
        p = torch.nn.Parameter(torch.ones(300))
        opt = getattr(optim, name)([p], skip_nonfinite=True, backend=backend, **options)
        stepped(opt, 0.3, 0.3)
        before = [opt.state[p][each].clone() for each in names]
        stepped(opt, NAN)
        assert [opt.state[p][each] for each in names] == before
        stepped(opt, 0.3)
        assert all(opt.state[p][each] != old for each, old in zip(names, before, strict=True))
