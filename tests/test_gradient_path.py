"""Clipping, skipping, zeroing and accumulating inside the step, against torch's functions before torch's step."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from itertools import combinations

import hypothesis.strategies as st
import oracles
import pytest
import torch
from cases import (
    BACKENDS,
    CASES,
    COPIES,
    DEVICE,
    INF,
    KERNELS,
    NAN,
    NARROW,
    SHAPES,
    SIZES,
    STATEFUL,
    Case,
    Odd,
    assert_gradients_kept,
    assert_option_refused,
    assert_same_bits,
    assert_same_state,
    assert_unchanged,
    come_and_go,
    gradients_of,
    grouped,
    pairs,
    parameters,
    places,
    randn,
    refused,
    snapshot,
)
from hypothesis import given, settings
from low_precision import assert_copies_train_on_alone, assert_round_trip, run_both
from recipe import KINDS, OPTIONS, SCALES, Recipe, double

import genopt_ext
from genopt_ext import optim
from genopt_ext.optim.options import STORAGE_OPTIONS, StepOptions

SGD = Case("SGD", dict(lr=0.1, momentum=0.9))
PLAIN = Case("SGD", dict(lr=1.0))

# Limits between the norms that SCALES give, so that some steps are clipped and others are not.
WIDE = [
    dict(max_grad_norm=10.0),
    dict(clip_grad_value=0.5),
    dict(clip_per_param=5.0),
    dict(agc=0.2),
    dict(max_grad_norm=10.0, clip_grad_value=0.3),
    dict(agc=0.2, clip_grad_value=0.05),
    dict(max_grad_norm=10.0, skip_nonfinite=True, ema_decay=0.7),
]
SEVERAL = [{}, dict(max_grad_norm=0.5), dict(agc=0.15), dict(clip_per_param=2.0, clip_grad_value=0.2)]
# agc=0.1 would let the weight decay of 0.1 cancel a scalar's gradient, and RMSprop magnify what rounding leaves.


def set_grads(params, step, skip=lambda i: False):
    """As cases.set_grads, of a size that changes from step to step, and other strides."""
    for i, p in enumerate(params):
        grad = randn(p.shape, 1000 * (step + 1) + i, p.dtype) * SCALES[step % len(SCALES)]
        if p.dim() > 1 and (step + i) % 2:
            grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
        p.grad = None if skip(i) else grad


def spoil(p, k, value):
    """Sets the ``k``-th element of the gradient, whatever its strides."""
    p.grad[tuple(int(i) for i in torch.unravel_index(torch.tensor(k), p.shape))] = value


def train(opt, params, *steps):
    for step in steps:
        set_grads(params, step)
        opt.step()


def zeroed(params):
    return all((p.grad == 0).all() for p in params if p.grad is not None)


def followed(case, groups, backend="auto", **wide):
    return Recipe(case, groups, **wide), case.ours(groups, backend=backend, **wide)


def step_both(recipe, opt, what="", tolerance=2e-5):
    """A step of both, alike; gradients are left as they were, but for those that were accumulated."""
    before = None if recipe.calls else gradients_of(places(opt))
    recipe.step()
    opt.step()
    recipe.assert_followed_by(opt, what, tolerance)
    if before is not None:
        assert_gradients_kept(places(opt), before, what)


def pair_of(case, backend, per_group=({},), plain=None, **wide):
    """Two optimizers and their parameters; the second has other options where ``plain`` gives some."""
    made = []
    for options in (wide, wide if plain is None else plain):
        params = parameters(SHAPES * len(per_group))
        made += [case.ours(grouped(params, per_group), backend=backend, **options), params]
    return made


@pytest.mark.parametrize("name", optim.OURS)
def test_groups_without_options_have_torchs_keys_and_no_others(name):
    assert {*OPTIONS, *STORAGE_OPTIONS, "skip_nonfinite"} == set(StepOptions.__annotations__)
    unset = {option: None for option in OPTIONS}
    ours = getattr(optim, name)(parameters([(3,)]), skip_nonfinite=False, **unset).state_dict()["param_groups"]
    assert set(ours[0]) == set(getattr(oracles, name)(parameters([(3,)])).state_dict()["param_groups"][0])


FOLLOWED = [
    *((case, [{}], wide, torch.float32) for case in CASES for wide in (WIDE if case in STATEFUL else WIDE[4:])),
    *((case, SEVERAL, wide, torch.float32) for case in STATEFUL for wide in [{}, *WIDE[:5]]),
    *((SGD, [{}], wide, torch.float64) for wide in WIDE),
    *((SGD, [{}], wide, torch.complex64) for wide in WIDE if "clip_grad_value" not in wide),
]


@pytest.mark.parametrize(("case", "per_group", "wide", "dtype"), FOLLOWED, ids=str)
def test_as_torch_clips_and_steps(case, per_group, wide, dtype):
    """Groups with limits of their own, too."""
    params = parameters(SHAPES * len(per_group), dtype)
    recipe, opt = followed(case, grouped(params, per_group), **wide)
    tolerance = 1e-6 if dtype == torch.float64 else 2e-5  # factors may be fp32
    for step in range(4):
        set_grads(params, step, come_and_go(step))
        step_both(recipe, opt, (case, per_group, wide, step), tolerance)


@pytest.mark.parametrize("wide", WIDE, ids=str)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
def test_16_bit_parameters(dtype, rounding, wide):
    """After one step; a clipped gradient is not rounded on its way: the parameter is, once."""
    for scale in (1.0, 50.0):
        params = parameters(SHAPES, dtype)
        for i, p in enumerate(params):
            p.data *= 1e-3  # the step is large beside it
            p.grad = randn(p.shape, 100 + i, dtype) * scale
        recipe, opt = followed(PLAIN, [{"params": params}], **wide)
        recipe.step()
        opt.step()
        for p, q in recipe.pairs():
            torch.testing.assert_close(double(p), double(q), rtol=rounding * 1.01, atol=1e-6)


def test_limits_do_something():
    """What the other tests compare is not what a step without limits gives."""

    def stepped(**options):
        params = parameters(SHAPES)
        train(SGD.ours(params, **options), params, 1)
        return torch.cat([p.detach().flatten() for p in params])

    for wide in WIDE:
        assert (stepped(**wide) - stepped()).abs().max() > 0.1, wide


ALL = dict(max_grad_norm=10.0, clip_grad_value=0.5, skip_nonfinite=True, ema_decay=0.9)
SAME = [
    *((case, [{}], wide, [(n,) for n in SIZES] + [(3, 5, 7), ()]) for case in (CASES[6], SGD) for wide in WIDE),
    *((case, SEVERAL, ALL, [(1,), (257,), (7,), (0,), (40, 30), (1031,)]) for case in CASES),
]


@KERNELS
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(("case", "per_group", "wide", "shapes"), SAME, ids=str)
def test_same_bits_from_the_reference(case, per_group, wide, shapes, dtype):
    def act(opt, params, step):
        set_grads(params, step, come_and_go(step))
        if wide.get("skip_nonfinite") and step == 2:
            params[4].grad[-1] = NAN  # has one at this step
        if step == 3:  # the mean of three
            opt.accumulate()
            set_grads(params, 4)
            opt.accumulate()
            set_grads(params, 5, come_and_go(step))
        opt.step_and_zero_() if step % 2 else opt.step()
        assert not step % 2 or zeroed(params)

    run_both(case, lambda: parameters(shapes * len(per_group), dtype), wide, per_group, 4, act)


def test_grad_norm(backend):
    """Of all groups, unclipped, of the last step; a tensor for each step, on the device."""
    params = parameters(SHAPES * 4)
    opt = SGD.ours(grouped(params, SEVERAL), max_grad_norm=1.0, backend=backend)
    assert opt.grad_norm is None and opt.max_grad_norm == 1.0
    norms = []
    for step in range(3):
        set_grads(params, step, come_and_go(step))
        truth = torch.nn.utils.get_total_norm([double(p.grad) for p in params if p.grad is not None])
        opt.step()
        norms.append(opt.grad_norm)
        assert opt.grad_norm.shape == () and opt.grad_norm.device.type == DEVICE
        assert opt.grad_norm.is_floating_point() and not opt.grad_norm.requires_grad
        torch.testing.assert_close(opt.grad_norm.double(), truth.to(opt.grad_norm.device), rtol=1e-6, atol=0)
    assert len({norm.item() for norm in norms}) == 3
    plain = SGD.ours(parameters(SHAPES), backend=backend)
    plain.step()
    assert plain.grad_norm is None and plain.max_grad_norm is None


def test_only_limits_that_are_infinite_measure(backend):
    opt, params, plain, others = pair_of(SGD, backend, plain={}, max_grad_norm=INF)
    train(opt, params, 0, 1)
    train(plain, others, 0, 1)
    assert_same_state(opt, plain)
    assert opt.grad_norm.isfinite() and opt.grad_norm > 0


@pytest.mark.parametrize("option", [*KINDS, "clip_grad_value"])
def test_options_may_change_between_steps(option, backend):
    params = parameters(SHAPES * 2)
    recipe, opt = followed(SGD, grouped(params, [{option: 5.0}, {}]), backend)
    for step, (i, value) in enumerate([(0, 0.5), (1, 0.3), (0, 7.0), (1, 2.0)]):
        set_grads(params, step)
        opt.param_groups[i][option] = recipe.own[i][option] = value
        step_both(recipe, opt, (option, value))
    recipe, opt = followed(SGD, [{"params": params}], backend, max_grad_norm=5.0)
    for step, limit in enumerate((5.0, 0.5, None, 0, 20.0, 1)):
        opt.max_grad_norm = recipe.wide["max_grad_norm"] = limit
        set_grads(params, step)
        step_both(recipe, opt, limit)


@pytest.mark.parametrize("value", [1.0, 0.0])
@pytest.mark.parametrize("option", [*KINDS, "clip_grad_value"])
def test_zero_gradients_and_zero_limits(option, value, backend):
    params = parameters(SHAPES)
    opt = optim.SGD(params, lr=1.0, backend=backend, **{option: value})
    before = snapshot(opt)
    for make in (torch.zeros_like, lambda p: randn(p.shape, 5)):
        for p in params:
            p.grad = make(p)
        opt.step()
        if value and make is not torch.zeros_like:
            assert all((p.detach() != old).any() for p, old in zip(params, before[0], strict=True) if p.numel())
        else:
            assert_unchanged(opt, before)


def test_agc_of_small_and_zero_weights(backend):
    """The weight's norm counts as 1e-3 where it is smaller."""
    params = [torch.nn.Parameter(torch.full((300,), v)) for v in (0.0, 1e-9, 1e-3, 1.0)]
    recipe, opt = followed(SGD, [{"params": params}], backend, agc=0.01)
    set_grads(params, 0)
    step_both(recipe, opt, tolerance=1e-6)
    moved = params[0].detach().double().norm().item()
    assert moved == pytest.approx(0.1 * 0.01 * 1e-3, rel=1e-4)


@pytest.mark.parametrize("option", KINDS)
@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 60000.0), (torch.float32, 1e30)], ids=str)
def test_large_finite_gradients(option, dtype, value, backend):
    params = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in (4099, 7)]
    recipe, opt = followed(PLAIN, [{"params": params}], backend, **{option: 20.0}, skip_nonfinite=True)
    for p in params:
        p.grad = torch.full_like(p, value)
    step_both(recipe, opt, tolerance=1e-3)
    assert all((p != 1).all() for p in params) and int(opt.skipped_steps) == 0


@pytest.mark.parametrize("value", [NAN, INF])
def test_nonfinite_gradients_that_are_not_skipped(value, backend):
    """As after torch's clip_grad_norm_: NaN everywhere, or zero beside an infinity."""
    params = parameters([(300,), (7,)])
    recipe, opt = followed(PLAIN, [{"params": params}], backend, max_grad_norm=1.0)
    set_grads(params, 0)
    params[1].grad[3] = value
    step_both(recipe, opt)


@pytest.mark.parametrize(
    ("case", "first", "value", "backend"), pairs(STATEFUL, [True, False], [NAN, INF, -INF], BACKENDS), ids=str
)
def test_skip_nonfinite(case, first, value, backend):
    """A skipped step leaves everything as it was, and those after it go as if it had not been."""
    options = dict(skip_nonfinite=True, ema_decay=0.9, max_grad_norm=10.0)
    opt, params, plain, others = pair_of(case, backend, per_group=[{}, dict(agc=0.1)], **options)
    if not first:
        train(opt, params, 3)
        train(plain, others, 3)
    before = None if first else snapshot(opt)
    for n, (where, k) in enumerate([(0, 299), (9, 17), (7, 0)]):
        set_grads(params, 7 + n)
        spoil(params[where], k, value)
        opt.step()
        before = before or snapshot(opt)  # the very first makes state; ``plain`` tells what is in it
        assert_unchanged(opt, before)
        assert int(opt.skipped_steps) == n + 1
        assert not opt.grad_norm.isfinite()
    count = opt.skipped_steps
    assert count.shape == () and not count.is_floating_point() and count.device.type == DEVICE
    train(opt, params, 0, 1)
    train(plain, others, 0, 1)
    assert int(opt.skipped_steps) == 3 and int(plain.skipped_steps) == 0
    assert_same_state(opt, plain, case)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str
)
@pytest.mark.parametrize("option", [{}, dict(max_grad_norm=1.0), dict(agc=0.1), dict(clip_grad_value=1.0)], ids=str)
def test_any_nonfinite_element_is_found_and_no_finite_one(option, dtype, backend):
    """Clamping an infinity first would hide it; a square or a sum that overflows is no infinity."""
    if dtype.is_complex and "clip_grad_value" in option:
        return
    params = parameters([(1031,), (5,), ()], dtype)
    opt = optim.SGD(params, lr=1e-3, skip_nonfinite=True, backend=backend, **option)
    skipped = 0
    for which, k in [(0, 0), (0, 255), (0, 256), (0, 1030), (1, 4), (2, 0)]:
        for value in (NAN, INF, -INF):
            for i, p in enumerate(params):
                p.grad = randn(p.shape, i, dtype)
            spoil(params[which], k, value)
            opt.step()
            skipped += 1
            assert int(opt.skipped_steps) == skipped, (which, k, value)
    large = torch.finfo(dtype).max / 2 if dtype != torch.float64 else 1e150  # whose square is one
    for p in params:
        p.grad = torch.full_like(p, large)
    opt.step()
    assert int(opt.skipped_steps) == skipped


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_and_zero(case, backend):
    """The numbers of step(), and afterwards the same gradient tensors, zero."""
    opt, params, plain, others = pair_of(case, backend, skip_nonfinite=True, max_grad_norm=10.0)
    for step in range(4):
        for ps in (params, others):
            set_grads(ps, step, come_and_go(step))
            if step == 2:
                ps[0].grad[5] = NAN
        grads = [(p.grad, p.grad if p.grad is None else p.grad._version) for p in params]
        opt.step_and_zero_()
        plain.step()
        for p, (grad, version) in zip(params, grads, strict=True):
            assert p.grad is grad
            assert grad is None or ((grad == 0).all() and (grad._version > version or not grad.numel()))
    assert int(opt.skipped_steps) == 1
    assert_same_state(opt, plain, case)


def test_step_and_zero_writes_only_the_gradient(backend):
    base = randn((40, 30), 0)
    kept = base.clone()
    p = torch.nn.Parameter(torch.zeros(40, 10))
    p.grad = base[:, ::3]
    optim.SGD([p], lr=0.1, backend=backend).step_and_zero_()
    kept[:, ::3] = 0
    assert_same_bits(base, kept)


@pytest.mark.parametrize("left", [0.0, 1.0], ids=["zeroed", "unscaled"])
def test_the_source_of_a_lazy_copy_is_left_alone(left, backend):
    p = parameters([(300,)])[0]
    source = torch.full((300,), 8.0)
    p.grad = torch._lazy_clone(source)
    opt = optim.SGD([p], lr=0.1, fused=True, backend=backend)
    opt.grad_scale = torch.tensor(8.0)
    opt.step() if left else opt.step_and_zero_()
    assert (source == 8.0).all() and (p.grad == left).all()


def test_step_and_zero_is_a_step_to_hooks_and_schedulers(backend):
    params = parameters([(5,)])
    opt = optim.SGD(params, lr=0.1, backend=backend)
    scheduler = optim.lr_scheduler.StepLR(opt, 1)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    set_grads(params, 0)
    opt.step_and_zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
    assert calls == ["before", "after"]


@pytest.mark.parametrize(("case", "dtype"), [*((c, torch.float32) for c in STATEFUL), (SGD, torch.complex64)], ids=str)
def test_accumulate(case, dtype, backend):
    """The mean, by the number of calls also where a parameter had no gradient in some; clipped by its norm."""
    params = parameters(SHAPES, dtype)
    recipe, opt = followed(case, [{"params": params}], backend, max_grad_norm=3.0)
    draw = 0
    for calls, last in [(2, False), (3, True), (1, False), (0, True), (4, False), (1, True)]:
        for _ in range(calls):
            set_grads(params, draw, lambda i, draw=draw: (i + draw) % 3 == 0)
            draw += 1
            recipe.accumulate()
            assert opt.accumulate() is None
            assert all(p.grad is None for p in params)
        if last:
            set_grads(params, draw)
            draw += 1
        step_both(recipe, opt, (case, calls, last))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_accumulating_does_not_round(dtype, backend):
    """Summed in bf16 or fp16, the small ones would be lost beside the large one."""
    p = torch.nn.Parameter(torch.zeros(300, dtype=dtype))
    opt = optim.SGD([p], lr=1.0, backend=backend)
    values = [8.0, *[0.01] * 15]
    for v in values:
        p.grad = torch.full_like(p, v)
        opt.accumulate()
    opt.step()
    each = torch.tensor(values, dtype=dtype).double().mean()
    assert_same_bits(p.detach(), (-each).to(dtype).expand(300))


def test_accumulated_gradients_of_a_skipped_step_are_gone(backend):
    opt, params, plain, others = pair_of(SGD, backend, plain={}, skip_nonfinite=True)
    set_grads(params, 0)
    params[0].grad[7] = INF
    opt.accumulate()
    train(opt, params, 1)
    assert int(opt.skipped_steps) == 1
    for o, ps in ((opt, params), (plain, others)):
        for step in (2, 3):
            set_grads(ps, step)
            o.accumulate()
        o.step_and_zero_()
    assert int(opt.skipped_steps) == 1
    assert_same_state(opt, plain)


def test_closures(backend):
    params = parameters(SHAPES)
    recipe, opt = followed(SGD, [{"params": params}], backend, max_grad_norm=1.0)

    def closure():
        assert torch.is_grad_enabled()
        set_grads(params, 1)
        recipe.step()
        return 5.0

    assert opt.step(closure) == 5.0
    recipe.assert_followed_by(opt)


@pytest.mark.parametrize("shapes", [SHAPES, [(0,)]], ids=str)
@pytest.mark.parametrize(
    "option", [dict(max_grad_norm=1.0), dict(agc=0.1, skip_nonfinite=True, ema_decay=0.9)], ids=str
)
def test_without_any_gradient(option, shapes, backend):
    opt = SGD.ours(parameters(shapes), backend=backend, **option)
    before = [p.detach().clone() for p in places(opt)]
    for act in (opt.step, opt.accumulate, opt.step, opt.step_and_zero_):
        act()
    assert opt.grad_norm is None or opt.grad_norm.item() == 0
    assert_same_bits([p.detach() for p in places(opt)], before)


def test_many_parameters():
    params = [torch.nn.Parameter(t) for t in torch.ones(5000, 3).unbind()]
    opt = optim.SGD(grouped(params, [dict(clip_per_param=0.1), {}]), lr=1.0, max_grad_norm=1.0)
    for p in params:
        p.grad = torch.ones(3)
    opt.step()
    torch.testing.assert_close(opt.grad_norm.item(), 15000**0.5)
    for i, n in ((0, 0.1 / 3**0.5), (1, 7500**-0.5)):
        rows = torch.stack([p.detach() for p in params[i::2]])
        torch.testing.assert_close(rows, torch.full_like(rows, 1 - n))


@pytest.mark.parametrize("bad", ["shape", "option"])
def test_a_refused_step_changes_nothing(bad, backend):
    params = parameters(SHAPES)
    opt = SGD.ours(params, max_grad_norm=1.0, skip_nonfinite=True, ema_decay=0.9, backend=backend)
    train(opt, params, 0)
    norm = opt.grad_norm.clone()
    set_grads(params, 1)
    if bad == "shape":
        params[4].data = randn((3,), 0)
    else:
        opt.param_groups[0]["clip_grad_value"] = -1.0
    for call in ("step", "step_and_zero_"):
        refused(opt, "group 0 parameter 4|group 0.*clip_grad_value", (RuntimeError, ValueError), call)
    assert_same_bits(opt.grad_norm, norm)


# Arguments

BAD = [NAN, -1.0, "0.1", 1j, [0.1], torch.tensor([0.1, 0.1]), torch.tensor(NAN, device="cpu")]


@pytest.mark.parametrize(("option", "name", "backend"), pairs(OPTIONS, optim.OURS, BACKENDS))
def test_bad_options(option, name, backend):
    for value in [*BAD, *([1.0, 1.5, INF, -0.1] if option == "ema_decay" else [])]:
        assert_option_refused(name, {option: value}, option, backend)


def test_bad_max_grad_norm_between_steps(backend):
    params = parameters([(7,), (3,)])
    opt = SGD.ours(params, max_grad_norm=1.0, backend=backend)
    for value in BAD:
        train(opt, params, 0)

        def ask(value=value):
            opt.max_grad_norm = value
            opt.step()

        refused(opt, "max_grad_norm", (TypeError, ValueError), ask)
        opt.max_grad_norm = 2.0


@pytest.mark.parametrize("name", optim.OURS)
def test_one_way_to_clip_in_one_place(name, backend):
    make = getattr(optim, name)
    for several in ({a: 1.0 for a in kinds} for n in (2, 3) for kinds in combinations(KINDS, n)):
        assert_option_refused(name, several, "give only one of them", backend)
        # One for all and another for a group are two places.
        (a, x), (b, y) = list(several.items())[:2]
        make([{"params": parameters([(2,)]), a: x}, {"params": parameters([(2,)])}], **{b: y})
    for value in ("yes", 1.5, None):
        with pytest.raises(TypeError, match="skip_nonfinite"):
            make(parameters([(2,)]), skip_nonfinite=value)


# Copies and checkpoints


@pytest.mark.parametrize(("wide", "how", "backend"), pairs([*WIDE, ALL], list(COPIES), BACKENDS), ids=str)
def test_copies_keep_their_options(wide, how, backend):
    opt = SGD.ours(grouped(parameters(SHAPES * 4), SEVERAL), backend=backend, **wide)
    assert_copies_train_on_alone(opt, how, wide)
    twin = COPIES[how](opt)
    assert twin.max_grad_norm == opt.max_grad_norm
    if wide.get("skip_nonfinite"):
        set_grads(places(twin), 5)
        spoil(places(twin)[0], 0, NAN)
        twin.step()
        assert int(twin.skipped_steps) == 1


@pytest.mark.parametrize(
    ("row", "dtype", "backend"),
    pairs([*((c, ALL) for c in STATEFUL), *((SGD, w) for w in WIDE)], NARROW, BACKENDS),
    ids=str,
)
def test_checkpoints(row, dtype, backend):
    """Averages come back without loss, in float32 for parameters of 16 bits."""
    case, wide = row
    params = parameters(SHAPES * 4, dtype)
    opt = assert_round_trip(lambda ps: case.ours(grouped(ps, SEVERAL), backend=backend, **wide), params, wide)
    averages = [state["ema"] for state in opt.state.values() if "ema" in state]
    assert bool(averages) == ("ema_decay" in wide)
    assert all(t.dtype == torch.float32 and t.device.type == DEVICE for t in averages)


@pytest.mark.parametrize(
    ("row", "theirs", "backend"),
    pairs([*((c, ALL) for c in STATEFUL), *((SGD, w) for w in WIDE)], [True, False], BACKENDS),
    ids=str,
)
def test_old_checkpoints_leave_the_options_on(row, theirs, backend):
    """A checkpoint from before these options does not switch off what the constructor was given; averages begin."""
    case, wide = row
    params = parameters(SHAPES * 2)
    old = (case.torch if theirs else case.ours)(grouped(params, [{}, {}]))
    train(old, params, 0, 1)
    recipe, opt = followed(case, grouped(params, [{}, dict(agc=0.1)]), backend, **wide)
    for other in (recipe.opt, opt):
        other.load_state_dict(copy.deepcopy(old.state_dict()))
    for step in (3, 4):
        set_grads(params, step)
        step_both(recipe, opt, (case, wide))


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_checkpoints_load_into_torch(case):
    params = parameters(SHAPES)
    opt = case.ours(params, **ALL)
    train(opt, params, 0, 1)
    other = case.torch(params)
    other.load_state_dict(opt.state_dict())
    train(other, params, 3)


# All together

NUMBERS = st.sampled_from([0.01, 0.3, 2.0, 20.0])


@st.composite
def place(draw, whole):
    kind = draw(st.sampled_from([None, *KINDS]))
    options = {kind: draw(NUMBERS)} if kind else {}
    if draw(st.booleans()):
        options["clip_grad_value"] = draw(NUMBERS)
    if whole and draw(st.booleans()):
        options["ema_decay"] = draw(st.sampled_from([0.0, 0.3, 0.6, 0.999]))
    return options


ACTIONS = ["step", "zero", "accumulate", "nan", "inf", "raise", "none"]


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(CASES),
    wide=place(True),
    per_group=st.lists(place(False), min_size=1, max_size=3),
    shapes=st.lists(st.lists(st.integers(0, 20), max_size=3).map(tuple), min_size=1, max_size=3),
    actions=st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=6),
    backend=st.sampled_from(BACKENDS),
)
def test_fuzzed(case, wide, per_group, shapes, actions, backend):
    params = parameters(shapes * len(per_group))
    recipe, opt = followed(case, grouped(params, per_group), backend, **wide, skip_nonfinite=True)
    for step, action in enumerate(actions):
        set_grads(params, step, come_and_go(step) if action != "none" else lambda i: True)
        if action == "raise" and "max_grad_norm" in wide:
            opt.max_grad_norm = recipe.wide["max_grad_norm"] = 2 * opt.max_grad_norm
        for p in params:
            if action in ("nan", "inf") and p.grad is not None and p.numel():
                spoil(p, p.numel() - 1, float(action))
                break
        if action == "accumulate":
            recipe.accumulate()
            opt.accumulate()
            assert all(p.grad is None for p in params)
            continue
        recipe.step()
        opt.step_and_zero_() if action == "zero" else opt.step()
        assert action != "zero" or zeroed(params)
        recipe.assert_followed_by(opt, (action, step), 1e-4)


# Rows that kernels do not serve, beside rows that they do


@KERNELS
@pytest.mark.filterwarnings("ignore:genopt_ext. .*no kernels for Odd")
@pytest.mark.parametrize("wide", [*WIDE[:6], {"max_grad_norm": 0.3, "skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_one_norm_over_rows_served_differently(case, wide):
    """The odd row in the middle, by the reference, steps as a plain one would; so do its neighbours."""
    plain, mixed = parameters([(300,), (70,), (5,)]), [p.detach().clone() for p in parameters([(300,), (70,), (5,)])]
    odd = Odd(mixed[1])
    opts = [case.ours(plain, **wide), case.ours([mixed[0], odd, mixed[2]], **wide)]
    for step in range(4):
        for params in (plain, mixed):
            set_grads(params, step)
            if step == 2 and "skip_nonfinite" in wide:
                params[1].grad[3] = NAN
        odd.grad = Odd(mixed[1].grad)
        mixed[1].grad = None
        for opt in opts:
            opt.step_and_zero_() if step == 3 else opt.step()
        for p, q in zip(plain, mixed, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=1e-6, atol=1e-7)
        if opts[0].grad_norm is not None:
            torch.testing.assert_close(opts[0].grad_norm, opts[1].grad_norm, equal_nan=True)
    assert (odd.grad.inner == 0).all() and (mixed[0].grad == 0).all()
    if "skip_nonfinite" in wide:
        assert int(opts[0].skipped_steps) == int(opts[1].skipped_steps) == 1


@pytest.mark.parametrize("kind", ["expanded", "one for two", "windows"])
def test_zeroing_gradients_that_share_memory(kind, backend):
    """Each is read before any is zeroed."""
    n = 20_000
    params = [torch.nn.Parameter(torch.ones(n)) for _ in range(2)]
    if kind == "expanded":
        for p in params:
            p.grad = torch.full((1,), 0.5).expand(n)
    elif kind == "one for two":
        params[0].grad = params[1].grad = torch.full((n,), 0.5)
    else:
        whole = torch.full((n + 10,), 0.5)
        params[0].grad, params[1].grad = whole[:n], whole[10:]
    opt = optim.SGD(params, lr=1.0, backend=backend)
    for value in (0.5, 0.5):
        opt.step_and_zero_()
        assert zeroed(params) and all((p == value).all() for p in params)


def test_accumulation_and_scalers():
    """torch's scaler sees .grad alone, and is refused; ours checks and unscales what was gathered."""
    p = torch.nn.Parameter(torch.zeros(30))
    opt = optim.SGD([p], lr=1.0)
    for bad, last in [(False, False), (False, True), (True, True), (True, False)]:
        for scaler in (torch.amp.GradScaler(DEVICE, init_scale=8.0), genopt_ext.GradScaler(DEVICE, init_scale=8.0)):
            ours = isinstance(scaler, genopt_ext.GradScaler)
            with torch.no_grad():
                p.zero_()
            for step in range(3):
                p.grad = torch.full_like(p, INF if bad and step == 0 else 8.0)
                if step < 2 or not last:
                    opt.accumulate()
            scaler.scale(torch.zeros((), requires_grad=True))
            if not ours:
                with pytest.raises(RuntimeError, match=r"accumulate\(\) has gathered"):
                    scaler.step(opt)
                opt.discard_accumulated()
                continue
            scaler.step(opt)
            scaler.update()
            assert (p == (0.0 if bad else -1.0)).all() and scaler.get_scale() == (4.0 if bad else 8.0)


def test_accumulation_ends():
    params = parameters([(5,), (6,)])
    opt = optim.SGD(params, lr=1.0)
    saved = opt.state_dict()
    before = params[0].detach().clone()
    set_grads(params, 0)
    opt.accumulate()
    for copier in (copy.deepcopy, pickle.dumps):
        with pytest.raises(RuntimeError, match="accumulated gradients are no part of a copy"):
            copier(opt)
    with pytest.raises(RuntimeError, match="gradients are accumulated and wait"):
        genopt_ext.step_in_backward(opt)
    opt.load_state_dict(saved)
    opt.step()
    assert_same_bits(params[0].detach(), before)
    set_grads(params, 0)
    opt.accumulate()
    gone = weakref.ref(params.pop())
    del opt.param_groups[0]["params"][1]
    opt.step()
    set_grads(params, 1)
    opt.accumulate()
    gc.collect()
    assert gone() is None
    params[0].data = torch.zeros(7)
    params[0].grad = torch.ones(7)
    with pytest.raises(RuntimeError, match="had shape"):
        opt.accumulate()
    assert params[0].grad is not None
    opt.discard_accumulated()
    opt.step()
    assert (params[0] == -1).all()


def test_no_step_within_swap_ema_in_backward_or_closure():
    p = torch.nn.Parameter(torch.ones(3))
    opt = optim.SGD([p], lr=0.1, ema_decay=0.5)
    p.grad = torch.ones(3)
    opt.step()
    p.grad = None
    with opt.swap_ema():
        with pytest.raises(RuntimeError, match="leave swap_ema"):
            opt.step(lambda: pytest.fail("the closure ran"))
        with genopt_ext.step_in_backward(opt), pytest.raises(RuntimeError, match="leave swap_ema"):
            p.sum().backward()
