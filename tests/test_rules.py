"""What single rules do beside or beyond torch's; their numbers in general: test_bits.py, test_state.py."""

import pytest
import torch
from cases import INF, NAN
from low_precision import stepped

from genopt_ext import optim


def test_rprop_knows_the_sign_of_gradients_whose_product_underflows(backend):
    """torch takes the sign of g * prev, which is 0 for gradients below 1e-23 in float32."""
    p = torch.nn.Parameter(torch.zeros(300))
    opt = optim.Rprop([p], lr=0.01, backend=backend)
    stepped(opt, 1e-30, 1e-30)
    torch.testing.assert_close(opt.state[p]["step_size"], torch.full((300,), 0.012))
    stepped(opt, -1e-30)
    torch.testing.assert_close(opt.state[p]["step_size"], torch.full((300,), 0.006))


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
