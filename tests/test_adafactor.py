"""Adafactor: numbers as torch's, state by rows and columns, checkpoints both ways, and what it refuses."""

from __future__ import annotations

import copy
import inspect
from functools import partial

import pytest
import torch
from cases import (
    BACKENDS,
    DEVICE,
    EMULATED,
    INF,
    KERNELS,
    NAN,
    NATIVE,
    SIXTEEN,
    assert_same_bits,
    assert_same_state,
    copies_of,
    parameters,
    refused,
    saved,
    set_grads,
    train,
    trained,
)
from low_precision import run_both, seeded

import genopt_ext
from genopt_ext import optim
from genopt_ext.reference.norms import mean_of_rows, mean_squares

# Rows and columns of one, stacks, more than a panel, a band, and 32 rows together.
SHAPES = [(300,), (), (7, 5), (1, 64), (64, 1), (1, 1), (2, 3, 40), (4, 3, 3, 3), (130, 300), (2, 70, 513), (1, 1, 9)]
EMPTY = [(0,), (0, 5), (5, 0), (3, 0, 2)]
OPTIONS = [
    {},
    dict(lr=0.5, beta2_decay=-0.5, eps=(1e-3, 0.1), d=2.0, weight_decay=0.1, maximize=True),
    dict(eps=(1e-30, 1e-3), beta2_decay=0.0),
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def test_signature_is_torchs():
    ours = inspect.signature(optim.Adafactor).parameters
    theirs = inspect.signature(torch.optim.Adafactor).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values() if p.name in theirs] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours.values() if p.name not in theirs)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ten_steps_are_torchs(options, backend):
    """In float64 within its rounding; in float32 no further from that than torch's for-loop."""
    runs = {}
    for dtype in (torch.float64, torch.float32):
        eps = (torch.finfo(torch.float32).eps, 1e-3)
        given = {"eps": eps, **options}
        for make in (partial(optim.Adafactor, backend=backend), partial(torch.optim.Adafactor, foreach=False)):
            params = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters(SHAPES)]
            opt = make(params, **given)
            for step in range(10):
                for p, q in zip(params, parameters(SHAPES, seed=100 * step), strict=True):
                    p.grad = (10.0 ** (step % 3 - 1) * q.detach()).to(dtype)
                opt.step()
            runs[dtype, make.func] = params, [opt.state[p] for p in params]
    theirs, states = runs[torch.float64, torch.optim.Adafactor]
    ours, own = runs[torch.float64, optim.Adafactor]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    for a, b in zip(own, states, strict=True):
        assert a.keys() == b.keys()
        torch.testing.assert_close(dict(a), dict(b), rtol=1e-12, atol=0)
    errors = {}
    for make in (optim.Adafactor, torch.optim.Adafactor):
        found = zip(runs[torch.float32, make][0], theirs, strict=True)
        errors[make] = max((p.detach().double() - q.detach()).abs().max().item() for p, q in found)
    assert errors[optim.Adafactor] <= 1.05 * errors[torch.optim.Adafactor]


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        *OPTIONS,
        dict(max_grad_norm=0.5, ema_decay=0.9),
        dict(clip_grad_value=0.3),
        dict(agc=0.2, param_rounding="stochastic"),
        dict(clip_per_param=1.0, param_rounding="kahan"),
        dict(master_weights=True, state_dtype=torch.float32),
    ],
    ids=str,
)
def test_kernels_equal_reference(options, dtype, set_threads):
    """Of every shape, with one thread and with two."""
    # Several bands, and threads; on the stand-in for CUDA that takes minutes.
    shapes = [*SHAPES, *EMPTY, *([] if EMULATED else [(520, 770), (8200, 40)])]
    before = {}
    for threads in (1, 2):
        set_threads(threads)
        opt = seeded(lambda: optim.Adafactor(parameters(shapes, dtype), backend=NATIVE, **options))
        train(opt, opt.param_groups[0]["params"], 3)
        before[threads] = opt
    assert_same_state(before[1], before[2], "threads")
    other = seeded(lambda: optim.Adafactor(parameters(shapes, dtype), backend="reference", **options))
    train(other, other.param_groups[0]["params"], 3)
    assert_same_state(before[1], other, options)


@KERNELS
def test_gradients_may_lie_otherwise():
    """Of contiguous matrices: transposed, sliced, and of another dtype where accumulated."""

    def act(opt, params, step):
        set_grads(params, step)
        for p in params:
            if p.dim() > 1:
                p.grad = p.grad.transpose(-1, -2).contiguous().transpose(-1, -2)
        if step == 1:
            opt.accumulate()
            set_grads(params, 10)
        opt.step()

    from cases import FIRST

    for dtype in (torch.float32, torch.bfloat16):
        run_both(FIRST["Adafactor"], lambda dtype=dtype: parameters(SHAPES, dtype), act=act)


def test_sums_of_squares_are_those_of_float64():
    x = parameters([(3, 130, 600)])[0].detach()
    across, down = mean_squares(x)
    squares = x.double().square()
    torch.testing.assert_close(across, squares.mean(-1, keepdim=True), rtol=1e-14, atol=0)
    torch.testing.assert_close(down, squares.mean(-2, keepdim=True), rtol=1e-14, atol=0)
    torch.testing.assert_close(mean_of_rows(across), squares.mean((-1, -2), keepdim=True), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *SIXTEEN], ids=str)
def test_state_is_of_rows_and_columns(dtype, backend):
    params = parameters(SHAPES, dtype)
    opt = trained(partial(optim.Adafactor, backend=backend), params, 1)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    for p in params:
        state = opt.state[p]
        if p.dim() < 2:
            assert list(state) == ["step", "variance"] and state["variance"].shape == p.shape
        else:
            assert list(state) == ["step", "row_var", "col_var"]
            assert state["row_var"].shape == (*p.shape[:-1], 1)
            assert state["col_var"].shape == (*p.shape[:-2], 1, p.shape[-1])
        assert all(t.dtype == kept for name, t in state.items() if name != "step")


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
def test_checkpoints_go_both_ways(dtype, backend):
    """torch's of 16 bits are widened here, and ours narrowed there."""
    makes = partial(optim.Adafactor, backend=backend), torch.optim.Adafactor
    for first, second in (makes, makes[::-1]):
        params = parameters(SHAPES, dtype)
        opt = trained(first, params, 3)
        resumed = copies_of(params)
        other = second(resumed)
        other.load_state_dict(saved(opt.state_dict()))
        for p, q in zip(params, resumed, strict=True):
            assert opt.state[p].keys() == other.state[q].keys()
            for name, t in opt.state[p].items():
                torch.testing.assert_close(other.state[q][name].double(), t.double(), rtol=2.0**-8, atol=1e-6)
        train(opt, params, 2, first=3)
        train(other, resumed, 2, first=3)
        tolerance = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=3e-2, atol=3e-2)
        torch.testing.assert_close(params, resumed, **tolerance)


@pytest.mark.parametrize("name", ["row_var", "col_var"])
def test_state_of_another_shape_is_refused(name, backend):
    params = parameters([(7, 5)])
    opt = trained(partial(optim.Adafactor, backend=backend), params, 1)
    whole = copy.deepcopy(opt.state_dict())
    set_grads(params, 1)
    opt.state[params[0]][name] = torch.ones(7, 5, device=DEVICE)
    expected = r"\[7, 1\]" if name == "row_var" else r"\[1, 5\]"
    refused(opt, rf"group 0 parameter 0 .*state '{name}' has shape \[7, 5\], expected {expected}")
    whole["state"][0][name] = torch.ones(5, 7)
    with pytest.raises(ValueError, match=rf"state '{name}' has shape \[5, 7\], expected {expected}"):
        opt.load_state_dict(whole)
    del opt.state[params[0]][name]
    refused(opt, f"but no '{name}'")


@pytest.mark.parametrize("shape", [(300,), (30, 40)])
def test_gradients_of_zero_move_nothing(shape, backend):
    """Whatever the epsilon, as of rows of an embedding that were not used."""
    for eps in ((None, 1e-3), (1e-30, 1e-3), (0.0, 0.0)):
        (p,) = parameters([shape])
        before = p.detach().clone()
        opt = optim.Adafactor([p], lr=0.5, eps=eps, backend=backend)
        for _ in range(2):
            p.grad = torch.zeros_like(p)
            opt.step()
        assert_same_bits(p.detach(), before)
        p.grad[0] = 1.0
        opt.step()
        assert (p[0] != before[0]).all()
        assert_same_bits(p[1:].detach(), before[1:])


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
def test_epsilon_is_the_parameters_dtypes(dtype, backend):
    """None, beside parameters of another dtype in one group; of masters, float32's."""
    for more, seen in (({}, dtype), (dict(master_weights=True), torch.float32)):
        runs = []
        for eps in (None, torch.finfo(seen).eps):
            params = parameters([(30, 40), (50,)], dtype)
            others = parameters([(30, 40)], torch.float64)
            opt = optim.Adafactor([*others, *params], eps=(eps, 1e-3), backend=backend, **more)
            for step in range(2):
                set_grads([*others, *params], step)
                for p in params:
                    p.grad *= 1e-4
                opt.step()
            runs.append(params)
        assert_same_bits(runs[0], runs[1])


@pytest.mark.parametrize("value", [NAN, INF])
def test_skipped_steps_leave_the_factors(value, backend):
    params = parameters(SHAPES)
    opt = trained(partial(optim.Adafactor, skip_nonfinite=True, backend=backend), params, 2)
    before = copy.deepcopy(opt.state_dict()["state"]), [p.detach().clone() for p in params]
    set_grads(params, 2)
    params[2].grad[3, 1] = value
    opt.step()
    assert opt.skipped_steps == 1
    for i, p in enumerate(params):
        assert_same_bits(p.detach(), before[1][i])
        for name, t in before[0][i].items():
            assert_same_bits(opt.state[p][name], t, name)


def test_a_gradient_that_is_no_number_is_not_hidden(backend):
    (p,) = parameters([(30, 40)])
    p.grad = torch.ones_like(p)
    p.grad[3, 1] = NAN
    optim.Adafactor([p], backend=backend).step()
    assert p.isnan().all()


@pytest.mark.parametrize("scaler", [genopt_ext.GradScaler, torch.amp.GradScaler])
def test_scaled_gradients_are_those_unscaled(scaler, backend):
    runs = []
    for scale in (1.0, 1024.0):
        params = parameters(SHAPES)
        opt = optim.Adafactor(params, fused=True, backend=backend)
        amp = scaler(DEVICE, init_scale=scale)
        amp.scale(torch.ones((), device=DEVICE))  # which makes its tensors
        for step in range(2):
            set_grads(params, step)
            for p in params:
                p.grad *= scale
            amp.step(opt)
            amp.update()
        runs.append(params)
    assert_same_bits(runs[0], runs[1])


def test_parameters_that_are_not_contiguous_are_the_references():
    def make():
        return [torch.nn.Parameter(p.detach().mT.contiguous().mT) for p in parameters([(20, 30)])]

    opt = optim.Adafactor(make(), backend="reference")
    train(opt, opt.param_groups[0]["params"], 2)
    if genopt_ext._backend.native is not None:
        insisting = optim.Adafactor(make(), backend=NATIVE)
        set_grads(insisting.param_groups[0]["params"], 0)
        refused(insisting, "no kernels for non-contiguous .*use 'auto'")
    other = optim.Adafactor(parameters([(20, 30)]), backend="reference")
    train(other, other.param_groups[0]["params"], 2)
    torch.testing.assert_close(*(each.param_groups[0]["params"][0] for each in (opt, other)))


def test_what_is_refused(backend):
    for dtype in (torch.int8, torch.bfloat16):
        with pytest.raises(ValueError, match="Invalid state_dtype.*leave it out"):
            optim.Adafactor(parameters([(3,)]), state_dtype=dtype)
        opt = optim.Adafactor(parameters([(3,)]), backend=backend)
        with pytest.raises(ValueError, match="group 1: Invalid state_dtype"):
            opt.add_param_group({"params": parameters([(3,)]), "state_dtype": dtype})
        opt.param_groups[0]["state_dtype"] = dtype
        set_grads(opt.param_groups[0]["params"], 0)
        refused(opt, "group 0: Invalid state_dtype", ValueError)
    params = parameters([(3,), (4, 5)], torch.complex64)
    opt = optim.Adafactor(params, backend=backend)
    set_grads(params, 0)
    refused(opt, "Adafactor does not support complex parameters")
    for given, match in (
        (dict(beta2_decay=0.1), "beta2_decay"),
        (dict(d=0.5), "clipping threshold d"),
        (dict(eps=(-1.0, 1e-3)), "epsilon1"),
        (dict(eps=(None, None)), "epsilon2"),
        (dict(eps=1e-8), "eps must be 2 numbers"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            optim.Adafactor(parameters([(3,)]), **given)
