"""Gradient scalers: unscaling, clipping and skipping in the step's own passes, and torch's scale, step by step."""

from __future__ import annotations

import copy
import inspect
import pickle
from functools import partial

import pytest
import torch
from cases import (
    BACKENDS,
    CASES,
    DEVICE,
    FIRST,
    INF,
    KERNELS,
    NAN,
    NATIVE,
    SHAPES,
    STATEFUL,
    Case,
    Odd,
    assert_gradients_kept,
    assert_same_bits,
    assert_same_state,
    assert_unchanged,
    gradients_of,
    pairs,
    parameters,
    places,
    randn,
    refused,
    snapshot,
)
from low_precision import assert_same
from recipe import SCALES, Recipe

import genopt_ext
from genopt_ext import _backend, optim

SGD = Case("SGD", dict(lr=0.1, momentum=0.9, dampening=0.5))
FACTORS = dict(growth_factor=4.0, backoff_factor=0.25, growth_interval=2)


SCALERS = ("torch", "ours")


@pytest.fixture(params=SCALERS)
def make_scaler(request):
    def make(init_scale=1024.0, **more):
        scaler = genopt_ext.GradScaler if request.param == "ours" else torch.amp.GradScaler
        return started(scaler(DEVICE, init_scale=init_scale, **{**FACTORS, **more}))

    return make


def started(scaler):
    scaler.scale(torch.zeros(()))  # which makes its tensors
    return scaler


def step_scaled(opt, scaler):
    scaler.step(opt)
    scaler.update()


def twins(backend, case=SGD, plain=None, **options):
    """An optimizer that takes scaled gradients and one that takes plain ones, each with its parameters."""
    params, others = parameters(SHAPES), parameters(SHAPES)
    opt = case.ours(params, backend=backend, **options)
    return opt, params, case.ours(others, backend=backend, **(plain or {})), others


def step_plain(opt, params, step):
    set_grads(params, step, 1.0)
    opt.step()


def set_grads(params, step, scale, bad=None):
    """``scale`` times gradients whose size changes from step to step; an element of them ``bad``."""
    for i, p in enumerate(params):
        p.grad = randn(p.shape, 1000 * (step + 1) + i, p.dtype) * SCALES[step % len(SCALES)] * scale
    if bad is not None:
        params[0].grad[-1] = bad


def take(opt, params, scaler, bads, first=0):
    """Scaled steps; the scale after each."""
    scales = []
    for step, bad in enumerate(bads, first):
        set_grads(params, step, scaler.get_scale(), bad)
        step_scaled(opt, scaler)
        scales.append(scaler.get_scale())
    return scales


def assert_same_scaled(opts, make_scaler, bads, what):
    """Both have the same bits, norms and scales after these steps."""
    scales = [take(opt, places(opt), make_scaler(), bads) for opt in opts]
    assert scales[0] == scales[1], what
    assert_same(*opts, what)


def unscaled(grad, scale):
    """As torch: times 1 / scale, which is rounded to float32, in float32 or, for float64, in that."""
    factor = (1.0 / torch.tensor(scale, dtype=torch.float64, device="cpu")).float().item()
    if grad.is_complex():
        return torch.view_as_complex(unscaled(torch.view_as_real(grad), scale))
    return (grad.to(torch.promote_types(grad.dtype, torch.float32)) * factor).to(grad.dtype)


@pytest.mark.parametrize("name", optim.OURS)
def test_who_unscales(name):
    """fused=True announces it to GradScaler, copies included."""
    make = getattr(optim, name)
    for fused in (True, False, None):
        opt = make(parameters([(3,)]), fused=fused)
        for o in (opt, copy.deepcopy(opt)):
            assert bool(getattr(o, "_step_supports_amp_scaling", False)) == bool(fused)


@pytest.mark.parametrize("scheduled", [False, True])
def test_who_notes_calls_of_step_sees_that_one_was_skipped(scheduled, backend):
    """Accelerate does so, in these words: schedulers follow what it saw."""
    p = torch.nn.Parameter(torch.ones(3))
    opt = optim.AdamW([p], lr=0.1, fused=True, backend=backend)
    if scheduled:
        optim.lr_scheduler.StepLR(opt, 1)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
    original, called = opt.step, []

    def noted(*args, **kwargs):
        called.append(True)
        return original(*args, **kwargs)

    for bad in (False, True, False):
        before = p.detach().clone()
        p.grad = torch.full((3,), NAN if bad else 8.0)
        scaler.scale(torch.ones(()))
        opt.step = noted
        step_scaled(opt, scaler)
        opt.step = original
        assert len(called) == (not bad) and torch.equal(p.detach(), before) == bad
        assert opt._step_supports_amp_scaling  # where nobody notes
        called.clear()


WIDE = [dict(max_grad_norm=10.0), {}, dict(agc=0.2, clip_grad_value=0.1)]


@pytest.mark.parametrize(
    ("row", "make_scaler", "backend"),
    pairs([(c, w) for c in CASES for w in (WIDE if c in STATEFUL[2:4] else WIDE[:1])], SCALERS, BACKENDS),
    indirect=["make_scaler"],
    ids=str,
)
def test_scaled_steps(row, make_scaler, backend):
    """What unscale_, torch's clipping and torch's step give; the skipped first step and a later one included."""
    case, wide = row
    params = parameters(SHAPES)
    recipe = Recipe(case, [{"params": params}], **wide)
    opt = case.ours(params, fused=True, backend=backend, **wide)
    scaler = make_scaler()
    for step, bad in enumerate([INF, None, None, NAN, None]):
        set_grads(params, step, scaler.get_scale(), bad)
        before, saved = scaler.get_scale(), snapshot(opt)
        recipe.step(before, bad is not None)
        step_scaled(opt, scaler)
        if bad is None:
            recipe.assert_followed_by(opt, (case, wide, step))
        else:
            assert_unchanged(opt, saved, may_begin=True)
            for p, q in recipe.pairs():
                torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-5)
    assert scaler.get_scale() == 1024.0 / 4 * 4 / 4
    assert not hasattr(opt, "found_inf") or opt.found_inf is None


# What stays in .grad

KINDS = dict(
    torch=torch.amp.GradScaler,
    ours=genopt_ext.GradScaler,
    unscaling=partial(genopt_ext.GradScaler, unscale_grads=True),
)
CLIPS = [{}, dict(max_grad_norm=1.0), dict(clip_per_param=0.5), dict(agc=0.1), dict(clip_grad_value=0.01)]


def strided_like(grad):
    """The same numbers in another order in memory, with gaps."""
    room = torch.full((*grad.shape[::-1], 2), 7, dtype=grad.dtype)
    view = room[..., 0].permute(*range(grad.dim() - 1, -1, -1))
    return view.copy_(grad)


@pytest.mark.parametrize(
    ("kind", "backend", "dtype", "wide"),
    pairs(
        list(KINDS),
        BACKENDS,
        [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128],
        CLIPS,
    ),
    ids=str,
)
def test_gradients_after_a_scaled_step(kind, backend, dtype, wide):
    """Without their scale, which is no power of two, but not clipped; a skipped step leaves them, and rows at rest."""
    if dtype.is_complex and "clip_grad_value" in wide:
        wide = {}
    params = parameters([(257,), (1,), (), (0,), (40, 30), (2, 3, 40), (70_001,)], dtype)
    half = [p for p in params if p.dim() == 2 and not p.is_complex()]
    opt = optim.AdamW(params, fused=True, ema_decay=0.9, backend=backend, **wide)
    scaler = started(KINDS[kind](DEVICE, init_scale=37.0, **FACTORS))
    for step, bad in enumerate([None, INF, None]):
        scale = scaler.get_scale()
        set_grads(params, step, scale, bad)
        params[-2].grad = strided_like(params[-2].grad)
        if dtype == torch.bfloat16:
            for p in half:
                p.grad_dtype = None
                p.grad = p.grad.float()  # mixed
        if step:
            params[1].grad = None
        before = gradients_of(params)
        if kind == "torch" and dtype.is_complex:  # which its check does not take
            opt.grad_scale, opt.found_inf = scaler._get_scale_async(), torch.tensor(float(bad is not None))
            opt.step()
        else:
            step_scaled(opt, scaler)
        writes = kind != "ours" and bad is None
        for p, (grad, old, version) in ((p, kept) for p, kept in zip(params, before, strict=True) if kept):
            assert p.grad is grad
            assert_same_bits(grad, unscaled(old, scale) if writes else old, (p.shape, step))
            assert not writes or grad._version > version
    if half and not half[0].grad.is_contiguous():
        assert (params[-2].grad.untyped_storage()[1::2] == 7).all()


FUSED = [name for name in optim.TORCHS if "fused" in inspect.signature(getattr(torch.optim, name)).parameters]


@pytest.mark.parametrize("name", FUSED)
def test_gradients_are_as_torchs_fused_classes_leave_them(name):
    """torch's, ours with kernels and the reference, with torch's scaler; a skipped step too."""
    left = []
    for make in (
        partial(getattr(torch.optim, name), fused=True),
        partial(getattr(optim, name), fused=True, max_grad_norm=0.1),
        partial(getattr(optim, name), fused=True, max_grad_norm=0.1, backend="reference"),
    ):
        params = parameters(SHAPES)
        scaler = started(torch.amp.GradScaler(DEVICE, init_scale=2.0**16))
        opt = make(params)
        seen = []
        for step, bad in enumerate([None, INF, None]):
            set_grads(params, step, scaler.get_scale(), bad)
            step_scaled(opt, scaler)
            seen += [p.grad.clone() for p in params]
        left.append(seen)
    assert_same_bits(left[1], left[0])
    assert_same_bits(left[2], left[0])


@pytest.mark.filterwarnings("ignore:genopt_ext. .*no kernels for Odd")
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("how", ["same", "shifted", "expanded", "beside a subclass"])
def test_gradients_that_share_memory_are_unscaled_once(how, skips, backend):
    """And no row sees what another one left."""
    room = torch.arange(1.0, 1001.0) * 37.0
    params = parameters([(600,), (600,)])
    weights = [p.detach() for p in params]
    if how == "beside a subclass":
        params[1] = Odd(weights[1])
    grads = {
        "shifted": lambda: (room[:600], room[100:700]),
        "expanded": lambda: (room[:1].expand(600), room[:600]),
    }.get(how, lambda: (room[:600], room[:600]))()
    opt = optim.SGD(params, lr=1.0, fused=True, backend=backend)
    before, old = [w.clone() for w in weights], [g.clone() for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = Odd(g) if isinstance(p, Odd) else g
    opt.grad_scale, opt.found_inf = torch.tensor(37.0), torch.tensor(float(skips))
    opt.step()
    for w, start, seen, g in zip(weights, before, grads, old, strict=True):
        assert_same_bits(seen, g if skips else unscaled(g, 37.0))
        torch.testing.assert_close(w, start if skips else start - g / 37.0)


def test_a_nonfinite_step_leaves_gradients_as_they_are(backend):
    """Where skip_nonfinite skips it, and no scaler has looked."""
    params = parameters(SHAPES)
    opt = optim.SGD(params, fused=True, skip_nonfinite=True, backend=backend)
    set_grads(params, 0, 8.0, NAN)
    params[1].grad = params[0].grad[:35].view(7, 5) if backend == "auto" else params[1].grad  # they share memory
    before = gradients_of(params)
    opt.grad_scale = torch.tensor(8.0)
    opt.step()
    assert_gradients_kept(params, before, version=False)
    assert opt.skipped_steps == 1


def test_a_gradient_that_can_not_be_unscaled_is_refused(backend):
    params = parameters([(7,), (300,)])
    opt = optim.SGD(params, momentum=0.9, fused=True, backend=backend)
    set_grads(params, 0, 8.0)
    with torch.inference_mode():
        params[1].grad = torch.ones(300)
    opt.grad_scale = torch.tensor(8.0)
    refused(opt, r"group 0 parameter 1 .*inference")
    del opt.grad_scale
    opt.step()


def test_options_and_state_of_the_scaler():
    """Torch's, and one that is keyword-only, off, and part of a copy."""
    assert issubclass(genopt_ext.GradScaler, torch.amp.GradScaler) and "GradScaler" in genopt_ext.__all__
    ours = started(genopt_ext.GradScaler(DEVICE, init_scale=8.0, **FACTORS))
    theirs = started(torch.amp.GradScaler(DEVICE, init_scale=8.0, **FACTORS))
    assert ours.state_dict() == theirs.state_dict()
    ours.load_state_dict({**theirs.state_dict(), "scale": 64.0})
    assert ours.get_scale() == 64.0
    with pytest.raises(TypeError):
        genopt_ext.GradScaler(DEVICE, 8.0, 2.0, 0.5, 1, True, True)
    for scaler in (KINDS["unscaling"](DEVICE, init_scale=8.0), genopt_ext.GradScaler(DEVICE, init_scale=8.0)):
        for copied in (scaler, copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
            params = parameters([(300,)])
            opt = optim.SGD(params, backend="auto")
            set_grads(params, 0, 8.0)
            old = params[0].grad.clone()
            started(copied).step(opt)
            assert_same_bits(params[0].grad, old / 8 if scaler._unscale_grads else old)


@pytest.mark.parametrize(
    ("case", "wide", "make_scaler", "backend"),
    pairs(STATEFUL, [{}, dict(max_grad_norm=10.0), dict(clip_per_param=1.0)], SCALERS, BACKENDS),
    indirect=["make_scaler"],
    ids=str,
)
def test_the_ordinary_path_gives_the_same(case, wide, make_scaler, backend):
    """For scales that are powers of two, to the bit."""
    opts = [case.ours(parameters(SHAPES), fused=fused, backend=backend, **wide) for fused in (True, None)]
    assert_same_scaled(opts, make_scaler, [INF, None, None, NAN, None, None, None], (case, wide))


@pytest.mark.parametrize("more", [{}, dict(max_grad_norm=INF)], ids=str)
def test_the_scales_reciprocal_is_rounded_to_float32(more, backend):
    """As in torch's scaler; float64 gradients show it."""
    params = [torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (300, 3)]
    opt = optim.SGD(params, lr=1.0, fused=True, backend=backend, **more)
    set_grads(params, 0, 37.0)
    scaled = [p.grad.clone() for p in params]
    opt.grad_scale, opt.found_inf = torch.tensor(37.0), torch.tensor(0.0)
    opt.step()
    for p, g in zip(params, scaled, strict=True):
        torch.testing.assert_close(-p.detach(), g * torch.tensor(1 / 37.0).double(), rtol=1e-14, atol=0)


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_same_bits_from_the_reference(case, dtype, make_scaler):
    """Also for a scale that is no power of two. torch's unscale_ refuses fp16; the step serves it."""
    options = dict(fused=True, max_grad_norm=10.0, ema_decay=0.9)
    params = [parameters([*((n,) for n in (257, 1, 7, 0)), (40, 30)], dtype) for _ in range(2)]
    opts = [case.ours(ps, backend=b, **options) for ps, b in zip(params, (NATIVE, "reference"), strict=True)]
    assert_same_scaled(opts, partial(make_scaler, 37.0), [INF, None, None, NAN, None], (case, dtype))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_any_found_inf_skips(case, trained, backend):
    """Not only 1, on the first step too; and what follows goes as if the step had not been."""
    options = dict(fused=True, ema_decay=0.9, max_grad_norm=5.0)
    opt, params, plain, others = twins(backend, SGD if case.name == "SGD" else case, options, **options)
    if trained:
        step_plain(opt, params, 0)
        step_plain(plain, others, 0)
    before = snapshot(opt)
    for value in (1.0, 2.0, 0.5, -1.0, 1e-30, NAN, INF):
        set_grads(params, 1, 8.0)
        opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(value)
        opt.step_and_zero_() if value == INF else opt.step()
        assert_unchanged(opt, before, may_begin=True)
    assert all((p.grad == 0).all() for p in params)
    opt.found_inf = torch.tensor(0.0)
    set_grads(params, 2, 8.0)
    opt.step()
    del opt.grad_scale, opt.found_inf
    step_plain(plain, others, 2)
    step_plain(opt, params, 3)
    step_plain(plain, others, 3)
    assert_same_state(opt, plain, case)


BADS = [None, None, INF, None, None, None, NAN, -INF, None, None, None, None, None]


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("init_scale", [1024.0, 3.0, 2.0**16])
def test_the_scale_evolves_as_torchs(init_scale, fused, make_scaler, backend):
    theirs = parameters(SHAPES)
    torch_scaler = started(torch.amp.GradScaler(DEVICE, init_scale=init_scale, **FACTORS))
    expected = take(torch.optim.SGD(theirs, foreach=False), theirs, torch_scaler, BADS)
    params = parameters(SHAPES)
    scaler = make_scaler(init_scale)
    assert take(optim.SGD(params, fused=fused, backend=backend), params, scaler, BADS) == expected
    assert scaler.state_dict() == torch_scaler.state_dict()
    assert len(set(expected)) > 2
    torch.testing.assert_close(params, theirs)


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("where", range(5))
def test_infinities_anywhere_and_large_finite_gradients(where, fused, make_scaler, backend):
    """An infinity in any tensor backs the scale off; a sum of squares that overflows does not."""
    shapes = [(300,), (7, 5), (), (4099,), (2, 3, 40)]
    params = parameters(shapes)
    opt = optim.SGD(params, lr=1e-40, fused=fused, max_grad_norm=1.0, backend=backend)
    scaler = make_scaler(4.0, growth_interval=100)
    before = snapshot(opt)
    set_grads(params, 0, 4.0)
    params[where].grad.view(-1)[-1] = INF
    step_scaled(opt, scaler)
    assert scaler.get_scale() == 1.0
    assert_unchanged(opt, before, may_begin=True)
    for p in params:
        p.grad = torch.full_like(p, 3e38)
    step_scaled(opt, scaler)
    assert scaler.get_scale() == 1.0


def test_a_disabled_scaler_only_steps(backend):
    for scaler in (genopt_ext.GradScaler, torch.amp.GradScaler):
        opt, params, plain, others = twins(backend, fused=True)
        off = scaler(DEVICE, enabled=False)
        for step in range(2):
            set_grads(params, step, 1.0)
            off.unscale_(opt)
            step_scaled(opt, off)
            step_plain(plain, others, step)
        assert_same_state(opt, plain)


@pytest.mark.parametrize("fused", [True, None])
def test_unscale_by_the_user(fused, make_scaler, backend):
    """Unscaled once, not twice; an infinity that unscale_ found skips."""
    opt, params, plain, others = twins(backend, fused=fused, max_grad_norm=20.0, plain=dict(max_grad_norm=20.0))
    scaler = make_scaler()
    scales = []
    for step, bad in enumerate([NAN, None, INF, None, None]):
        set_grads(params, step, scaler.get_scale(), bad)
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(params, 40.0)
        with pytest.raises(RuntimeError, match="already been called"):
            scaler.unscale_(opt)
        before = snapshot(opt)
        scaler.step(opt)
        with pytest.raises(RuntimeError, match="already been called"):
            scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
        if bad is not None:
            assert_unchanged(opt, before, may_begin=True)
        else:
            set_grads(others, step, 1.0)
            torch.nn.utils.clip_grad_norm_(others, 40.0)
            plain.step()
    assert_same_state(opt, plain)
    assert scales == [256.0, 256.0, 64.0, 64.0, 256.0]


@pytest.mark.skipif(_backend.native is None, reason="the kernels' own norm pass")
def test_our_scaler_needs_no_pass_of_its_own(monkeypatch):
    """With fused=True torch's check reads no gradient; with torch's scaler it does."""
    passes = []
    theirs = torch._amp_foreach_non_finite_check_and_unscale_

    def counted(*args):
        passes.append(1)
        return theirs(*args)

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", counted)
    for scaler, count in ((genopt_ext.GradScaler, 0), (torch.amp.GradScaler, 3)):
        passes.clear()
        params = parameters(SHAPES)
        opt = SGD.ours(params, fused=True, max_grad_norm=1.0, backend=NATIVE)
        take(opt, params, started(scaler(DEVICE, init_scale=8.0, **FACTORS)), [None, INF, None])
        assert len(passes) == count


@pytest.mark.parametrize("fused", [True, None])
def test_two_optimizers_and_one_scaler(fused, make_scaler, backend):
    """An overflow in one skips that one; the scale backs off once."""
    params = [parameters(SHAPES), parameters(SHAPES, seed=50), parameters(SHAPES, seed=90)]
    opts = [SGD.ours(params[0], fused=fused, backend=backend), optim.AdamW(params[1], fused=fused, backend=backend)]
    opts.append(torch.optim.SGD(params[2], foreach=False))
    scaler = make_scaler(64.0)
    for bad in range(3):
        before = [snapshot(o) for o, ps in zip(opts, params, strict=True)]
        scale = scaler.get_scale()
        for i, ps in enumerate(params):
            set_grads(ps, bad, scale, INF if i == bad else None)
        for o in opts:
            scaler.step(o)
        scaler.update()
        assert scaler.get_scale() == scale / 4
        for i, (o, ps) in enumerate(zip(opts, params, strict=True)):
            if i == bad:
                assert_unchanged(o, before[i], may_begin=True)
            else:
                assert (ps[0].detach() != before[i][0][0]).all()


def test_some_and_no_gradients(make_scaler, backend):
    params = parameters(SHAPES)
    recipe = Recipe(SGD, [{"params": params}], max_grad_norm=1.0)
    opt = SGD.ours(params, fused=True, max_grad_norm=1.0, backend=backend)
    scaler = make_scaler(8.0)
    for step in range(2):
        set_grads(params, step, 8.0)
        params[step].grad = None
        recipe.step(8.0)
        scaler.step(opt)
        recipe.assert_followed_by(opt)
        scaler._per_optimizer_states.clear()  # as update() does, without another scale
    before = snapshot(opt)
    for p in params:
        p.grad = None
    # torch's scaler hands the number 0 over then.
    opt.grad_scale, opt.found_inf = scaler._get_scale_async(), 0
    opt.step()
    del opt.grad_scale, opt.found_inf
    assert_unchanged(opt, before, may_begin=True)


def test_gradient_scale_of_the_users_own(make_scaler, backend):
    """torch multiplies the scale with an optimizer.grad_scale that is set."""
    opt, params, plain, others = twins(backend, fused=True)
    opt.grad_scale = torch.tensor(4.0)
    set_grads(params, 0, 32.0)
    make_scaler(8.0).step(opt)
    step_plain(plain, others, 0)
    assert_same_state(opt, plain)


def test_skip_nonfinite_beside_a_scaler(make_scaler, backend):
    """Both skip: once, and what follows is right."""
    options = dict(fused=True, skip_nonfinite=True, ema_decay=0.5)
    opt, params, plain, others = twins(backend, **options, plain=dict(ema_decay=0.5))
    scaler = make_scaler()
    take(opt, params, scaler, [INF, NAN])
    assert scaler.get_scale() == 64.0
    take(opt, params, scaler, [None, None], first=2)
    for step in (2, 3):
        step_plain(plain, others, step)
    assert_same_state(opt, plain)


def test_a_training_loop(make_scaler):
    """autocast, scaler, clipping: the loss that torch's loop has."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 50), torch.nn.Tanh(), torch.nn.Linear(50, 2))
    twin = copy.deepcopy(model)
    x, y = randn((64, 6), 0), randn((64, 2), 1)
    losses = []
    for net, ours in ((model, True), (twin, False)):
        scaler = make_scaler(256.0) if ours else started(torch.amp.GradScaler(DEVICE, init_scale=256.0, **FACTORS))
        opt = (
            optim.AdamW(net.parameters(), lr=0.01, fused=True, max_grad_norm=0.1)
            if ours
            else torch.optim.AdamW(net.parameters(), lr=0.01, foreach=False)
        )
        for _ in range(8):
            opt.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16):
                out = net(x)
            loss = (out.float() - y).square().mean()
            scaler.scale(loss).backward()
            if not ours:
                scaler.unscale_(opt)
                torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            scaler.step(opt)
            scaler.update()
            losses.append(loss.item())
    assert losses[:8] == pytest.approx(losses[8:], rel=1e-2)
    assert losses[7] < losses[0]


def test_a_refused_step_leaves_no_scale_behind(backend):
    """As torch's scaler does, whose retry would multiply by it."""
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    opt = optim.Adam(params, lr=1.0, fused=True, backend=backend)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
    for p in params:
        scaler.scale(torch.ones(()))
        p.grad = torch.full((4,), 8.0)
    opt.state[params[1]]["exp_avg"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="exp_avg"):
        scaler.step(opt)
    assert not hasattr(opt, "grad_scale") and not hasattr(opt, "found_inf")
    del opt.state[params[1]]
    scaler.step(opt)
    for p in params:
        torch.testing.assert_close(p.detach(), torch.full((4,), -1.0))
        assert_same_bits(p.grad, torch.ones(4))
