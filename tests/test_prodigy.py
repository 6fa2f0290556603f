"""Prodigy: its estimate is of all parameters together; its authors' package. Its numbers in general: test_bits.py."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io

import pytest
import torch
from cases import (
    EMULATED,
    INT8,
    KERNELS,
    NAN,
    SIXTEEN,
    Odd,
    assert_same_bits,
    assert_same_state,
    copies_of,
    parameters,
    places,
    randn,
    refused,
    saved,
    set_grads,
    train,
)

from genopt_ext import GradScaler, optim, step_in_backward

NUMBERS = optim.Prodigy.rule.shared
SHAPES = [(300,), (5, 7), (), (9000,)]
OPTIONS = [
    {},
    dict(weight_decay=0.1),
    dict(betas=(0.0, 0.9), d0=1e-4),
    dict(use_bias_correction=True, beta3=0.9, lr=0.5),
    dict(safeguard_warmup=True, growth_rate=1.02, d_coef=2.0),
    dict(decouple=False, weight_decay=0.01, eps=1e-5),
]


def authors(params, **options):
    package = pytest.importorskip("prodigyopt")
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of its decay
        return package.Prodigy(params, **options)


def numbers(opt):
    return [float(opt.param_groups[0][name]) for name in NUMBERS]


def pull(opt, steps, first=0):
    """Steps towards 1, the later parameters the faster: the estimate grows."""
    for step in range(first, first + steps):
        for i, p in enumerate(places(opt)):
            p.grad = (2 + i) * (p.detach() - 1) + 0.1 * randn(p.shape, 100 * step + i, p.dtype)
        opt.step()


def in_groups(shapes, *per_group, dtype=torch.float64):
    params = parameters(shapes, dtype)
    return [{"params": params[i :: len(per_group)], **own} for i, own in enumerate(per_group)]


# Their package


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_authors_numbers(options, backend):
    """Over 40 steps, in which the estimate grows by orders of magnitude; in float64, as that amplifies rounding."""
    ours = optim.Prodigy(parameters(SHAPES, torch.float64), **options, backend=backend)
    theirs = authors(parameters(SHAPES, torch.float64), **options)
    for step in range(40):
        for opt in (ours, theirs):
            pull(opt, 1, step)
        torch.testing.assert_close(numbers(ours), numbers(theirs), rtol=1e-7, atol=0)
    torch.testing.assert_close([*map(torch.Tensor.detach, places(ours))], [*map(torch.Tensor.detach, places(theirs))])
    assert ours.param_groups[0]["d"] > (1.5 if "growth_rate" in options else 100) * ours.param_groups[0]["d0"]


def test_the_authors_numbers_over_groups(backend):
    """One with another decay, and one that rests."""
    groups = [dict(weight_decay=0.1), dict(weight_decay=0.0, eps=1e-6), dict(lr=0.0)]
    ours, theirs = (make(in_groups(SHAPES, *groups)) for make in (lambda g: optim.Prodigy(g, backend=backend), authors))
    before = [p.detach().clone() for p in ours.param_groups[2]["params"]]
    for opt in (ours, theirs):
        pull(opt, 30)
    torch.testing.assert_close(numbers(ours), numbers(theirs), rtol=1e-7, atol=0)
    torch.testing.assert_close([*map(torch.Tensor.detach, places(ours))], [*map(torch.Tensor.detach, places(theirs))])
    assert_same_bits([p.detach() for p in ours.param_groups[2]["params"]], before)
    assert all(group["d"] is ours.param_groups[0]["d"] for group in ours.param_groups)


@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[2]], ids=str)
def test_the_authors_checkpoints(options, backend):
    """Each loads the other's and goes on, also where a parameter is 0 all over, of which theirs keeps a number."""

    def ours(params):
        return optim.Prodigy(params, **options, backend=backend)

    def theirs(params):
        return authors(params, **options)

    for first, second in ((ours, theirs), (theirs, ours)):
        params = parameters(SHAPES, torch.float64)
        params[1].data.zero_()
        opt = first(params)
        pull(opt, 12)
        other = second(copies_of(params))
        other.load_state_dict(saved(opt.state_dict()))
        assert numbers(other) == numbers(opt)
        for each in (opt, other):
            pull(each, 12, 12)
        torch.testing.assert_close(numbers(opt), numbers(other), rtol=1e-7, atol=0)
        torch.testing.assert_close([p.detach() for p in places(opt)], [p.detach() for p in places(other)])


def test_signature_is_the_authors():
    package = pytest.importorskip("prodigyopt")
    ours, theirs = (list(inspect.signature(c).parameters.values()) for c in (optim.Prodigy, package.Prodigy))
    assert [(p.name, p.default) for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        (p.name, p.default) for p in theirs
    ]


# The estimate


def test_a_parameter_that_comes_and_goes(backend):
    """It steps by the estimate of all, whenever it takes part."""
    opts = [make(parameters(SHAPES, torch.float64)) for make in (lambda p: optim.Prodigy(p, backend=backend), authors)]
    for step in range(12):
        for opt in opts:
            params = places(opt)
            for i, p in enumerate(params):
                late = i == 1 and step < 4
                p.grad = None if late or (i == 2 and step % 3 == 1) else (2 + i) * (p.detach() - 1)
            opt.step()
    torch.testing.assert_close(numbers(opts[0]), numbers(opts[1]), rtol=1e-9, atol=0)
    torch.testing.assert_close(*([p.detach() for p in places(opt)] for opt in opts))


def test_groups_share_the_estimate_and_take_over_what_is_set(backend):
    opt = optim.Prodigy(parameters(SHAPES), backend=backend)
    opt.add_param_group({"params": parameters([(3,)], seed=9)})
    pull(opt, 3)
    d = opt.param_groups[1]["d"]
    assert d is opt.param_groups[0]["d"] and d.dtype == torch.float64 and opt.param_groups[1]["k"] == 3
    opt.param_groups[0]["d"] = 1e-3
    opt.param_groups[0]["d_max"] = torch.tensor(1e-3)
    pull(opt, 1, 3)
    assert opt.param_groups[1]["d"] >= 1e-3 and opt.param_groups[1]["k"] == 4
    opt.param_groups[0]["d"] *= 2  # in place
    before = opt.param_groups[1]["d"].item()
    assert before >= 2e-3


@pytest.mark.parametrize("how", [copy.deepcopy, lambda opt: opt], ids=["copy", "itself"])
def test_checkpoints_are_of_plain_numbers(how, backend):
    opt = optim.Prodigy(parameters(SHAPES), backend=backend)
    pull(opt, 3)
    opt = how(opt)
    checkpoint = saved(opt.state_dict())
    (group,) = checkpoint["param_groups"]
    assert type(group["d"]) is float and type(group["k"]) is int and group["k"] == 3
    assert [checkpoint["state"][1][name].shape for name in ("s", "p0", "exp_avg")] == [(35,), (35,), (5, 7)]
    other = optim.Prodigy(copies_of(places(opt)), backend=backend)
    other.load_state_dict(checkpoint)
    for each in (opt, other):
        pull(each, 2, 3)
    assert_same_state(opt, other)
    assert numbers(opt) == numbers(other)


@pytest.mark.parametrize("scales", [False, True], ids=["alone", "scaler"])
def test_a_skipped_step_keeps_the_estimate(scales, backend):
    opt = optim.Prodigy(parameters(SHAPES), skip_nonfinite=not scales, backend=backend)
    scaler = GradScaler("cpu" if not places(opt)[0].is_cuda else "cuda", init_scale=4.0, enabled=scales)
    for first in (True, False):
        before = [p.detach().clone() for p in places(opt)], numbers(opt)
        set_grads(places(opt), 0)
        places(opt)[1].grad.fill_(NAN)
        scaler.scale(torch.ones(()))
        scaler.step(opt)
        scaler.update()
        assert_same_bits(([p.detach() for p in places(opt)], numbers(opt)), before)
        if first:
            pull(opt, 5)
            assert opt.param_groups[0]["k"] == 5


def test_without_gradients_nothing_moves(backend):
    """Gradients of zero tell nothing of the distance: not even decay moves the weights."""
    opt = optim.Prodigy(parameters(SHAPES), weight_decay=0.1, backend=backend)
    before = [p.detach().clone() for p in places(opt)], numbers(opt)
    for p in places(opt):
        p.grad = torch.zeros_like(p)
    opt.step()
    assert_same_bits(([p.detach() for p in places(opt)], numbers(opt)), before)


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_where_it_began_is_kept_as_weights_are(dtype, backend):
    opt = optim.Prodigy(parameters([(5000,)], dtype), **INT8, master_weights=True, backend=backend)
    (p,) = places(opt)
    begin = p.detach().float().clone()
    pull(opt, 3)
    state = opt.state[p]
    assert_same_bits(state["p0"], begin)
    assert state["p0"].dtype == torch.float32 and {"s_codes", "exp_avg_codes", "exp_avg_sq_codes"} <= state.keys()


def test_totals_are_of_clipped_gradients(backend):
    ends = []
    for options in (dict(max_grad_norm=0.5), {}):
        opt = optim.Prodigy(parameters([(300,)]), backend=backend, **options)
        (p,) = places(opt)
        for _ in range(6):
            p.grad = 3 * (p.detach() - 1)
            if not options:
                p.grad *= 0.5 / (p.grad.double().norm().item() + 1e-6)
            opt.step()
        ends.append((p.detach(), numbers(opt)))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


# What can not be served


def test_what_needs_parameters_one_by_one_is_refused(backend):
    opt = optim.Prodigy(parameters(SHAPES), backend=backend)
    with pytest.raises(TypeError, match="Prodigy steps all parameters by one estimate"):
        step_in_backward(opt)
    (p,) = parameters([(3,)])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        twice = optim.Prodigy([p, p], backend=backend)
    p.grad = torch.ones(3)
    refused(twice, "can not go with an estimate that is of all parameters; list each parameter once")


@pytest.mark.parametrize(
    "own",
    [dict(lr=0.5), dict(betas=(0.9, 0.99)), dict(beta3=0.9), dict(d0=1e-5), dict(d_coef=2.0), dict(growth_rate=1.5)],
    ids=str,
)
def test_groups_that_would_make_the_estimate_in_two_ways_are_refused(own, backend):
    opt = optim.Prodigy(in_groups(SHAPES, {}, own), backend=backend)
    set_grads(places(opt), 0)
    refused(opt, f"{next(iter(own))} is .* in group 1 and .* all parameters step by one estimate")
    opt.param_groups[1].update({name: opt.param_groups[0][name] for name in own})
    train(opt, places(opt), 1)


@pytest.mark.parametrize(("option", "value"), [("slice_p", 11), ("fsdp_in_use", True)])
def test_options_that_are_not_served(option, value):
    with pytest.raises(ValueError, match=f"group 0: {option}=.*{value}"):
        optim.Prodigy(parameters([(3,)]), **{option: value})


@pytest.mark.skipif(EMULATED, reason="all memory passes for a GPU's")
def test_parameters_on_two_devices_are_refused(backend):
    here, there = parameters([(3,)]), [torch.nn.Parameter(torch.zeros(3, device="meta"))]
    opt = optim.Prodigy([*here, *there], backend=backend)
    for p in places(opt):
        p.grad = torch.ones_like(p)
    refused(opt, "group 0 parameter 1 .* on meta, and all parameters step by one estimate")


@KERNELS
@pytest.mark.filterwarnings("ignore:genopt_ext. .*no kernels for Odd")
def test_where_kernels_serve_some_alone_the_reference_steps_all():
    ends = []
    for wrap in (lambda t: t, Odd):
        params = [t.detach() for t in parameters(SHAPES)]
        mixed = [wrap(t) if i == 1 else t for i, t in enumerate(params)]
        opt = optim.Prodigy(mixed)
        for step in range(4):
            for i, (p, t) in enumerate(zip(mixed, params, strict=True)):
                p.grad = wrap(randn(t.shape, 10 * step + i)) if i == 1 else randn(t.shape, 10 * step + i)
            opt.step()
        ends.append(([t.clone() for t in params], numbers(opt)))
    torch.testing.assert_close(*ends)
