"""Weights of 16 bits: stochastic rounding, Kahan's compensation, float32 masters; and mixes of dtypes."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import (
    BACKENDS,
    CASES,
    COPIES,
    FIRST,
    INF,
    INT8,
    NAN,
    NARROW,
    NATIVE,
    NON_FINITE,
    SIXTEEN,
    SIZES,
    STATEFUL,
    Case,
    assert_same_bits,
    in_turn,
    layouts,
    pairs,
    parameters,
    randn,
    set_grads,
    train,
)
from low_precision import (
    ADAMW,
    BLOCKS,
    CODED,
    KEPT,
    KERNELS,
    NEUTRAL,
    SOME,
    WIDE,
    WIDER,
    assert_broken_state_is_refused,
    assert_change_is_honoured,
    assert_copies_train_on_alone,
    assert_option_refused,
    assert_round_trip,
    assert_same,
    assert_same_for_threads,
    assert_same_in_backward,
    assert_same_in_layout,
    assert_shared_memory_is_refused,
    assert_state,
    assert_unchanged,
    decoded,
    grouped,
    moments,
    name_of,
    places,
    plain,
    run_both,
    run_one,
    run_scaled,
    saved,
    seeded,
    set_strained,
    snapshot,
    strides,
    take,
)

import genopt_ext
from genopt_ext import optim

STOCHASTIC, KAHAN, MASTER = KEPT
STATES = [{}, dict(state_dtype=torch.float32), dict(state_dtype=torch.bfloat16), INT8]
AFTER_ONE = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # the distance of numbers in [1, 2)

needs_grad_dtype = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")


def extras(options, p):
    """The state that keeping a weight in 16 bits adds."""
    if p.dtype not in SIXTEEN:
        return []
    kahan = ["compensation"] if options.get("param_rounding") == "kahan" else []
    return kahan + (["master"] if options.get("master_weights") else [])


def assert_kept(case, opt, options, what=""):
    """Names, dtypes, shapes and strides of what is kept beside the moments; weights are their rounded masters."""
    for p in places(opt):
        state = opt.state[p]
        what = (case, options, p.dtype, tuple(p.shape), what)
        for name, dtype in (("compensation", p.dtype), ("master", torch.float32)):
            assert (name in state) == (name in extras(options, p)), (what, list(state))
            if name in state:
                assert state[name].dtype == dtype and state[name].shape == p.shape, (what, name)
                assert strides(state[name]) == strides(torch.empty_like(p)), (what, name)
        if "master" in state:
            assert_same_bits(p.detach(), state["master"].to(p.dtype), what)


# The same bits


@KERNELS
@pytest.mark.parametrize(
    ("case", "kept", "dtype", "state"),
    # On a CPU, what is kept, dtype and state together choose the loop.
    [*pairs(CASES, KEPT, SIXTEEN, [{}, INT8]), *in_turn(CASES, KEPT, SIXTEEN, WIDER)],
    ids=str,
)
def test_kernels_equal_reference(case, kept, dtype, state):
    shapes = [(n,) for n in SIZES] + [(), (3, 5, 7)]
    options = {**kept, **state}
    for opt in run_both(case, lambda: parameters(shapes, dtype), options):
        assert_kept(case, opt, options)
        for p in places(opt):
            if state and p.numel():
                assert_state(case, opt, p, state["state_dtype"], kept, extras(kept, p))


@KERNELS
@pytest.mark.parametrize(
    ("case", "state_dtype", "dtype"), pairs(CASES, [torch.float32, torch.bfloat16], NARROW), ids=str
)
def test_narrow_and_wide_state_equal_reference(case, state_dtype, dtype):
    """Also narrower than the parameter, and wider."""
    shapes = [(n,) for n in SIZES] + [(), (3, 5, 7)]
    for opt in run_both(case, lambda: parameters(shapes, dtype), dict(state_dtype=state_dtype)):
        for p in places(opt):
            assert_state(case, opt, p, state_dtype)


@KERNELS
@pytest.mark.parametrize(
    ("case", "kept", "wide", "dtype"), pairs([CASES[6], CASES[9], CASES[14]], KEPT, WIDE, SIXTEEN), ids=str
)
def test_same_bits_on_the_gradient_path(case, kept, wide, dtype):
    run_both(
        case,
        lambda: parameters([*BLOCKS, (20, 30), (0,)], dtype),
        {**INT8, **kept, **wide},
        steps=5,
        act=lambda opt, params, step: take(opt, params, step, wide),
    )


@KERNELS
@pytest.mark.parametrize("stored", (KEPT[0], INT8, dict(state_dtype=torch.bfloat16)), ids=str)
def test_late_steps(stored):
    """What is drawn at a step is drawn from all of its digits."""

    def act(opt, params, step):
        for p in params if step else ():
            opt.state[p]["step"].fill_(float([0, 255, 511, 65_535, 2**24 - 2][step]))
        take(opt, params, step)

    run_both(ADAMW, lambda: parameters(BLOCKS, torch.bfloat16), stored, steps=5, act=act)


@KERNELS
@pytest.mark.parametrize(("kept", "layout", "dtype"), pairs(KEPT, list(layouts()), SIXTEEN), ids=str)
def test_layouts(kept, layout, dtype):
    for opt in assert_same_in_layout(CASES[2], layout, dtype, {**kept, **INT8}):
        assert_kept(CASES[2], opt, kept, layout)


@KERNELS
@pytest.mark.parametrize(("case", "kept", "dtype"), pairs(SOME, KEPT, SIXTEEN), ids=str)
def test_non_finite_and_extreme_values(case, kept, dtype):
    values = torch.tensor(NON_FINITE + [65504.0, -65504.0, 3.3895e38, 6e-8, -6e-8, 6e-5])

    def act(opt, params, step):
        params[0].grad = values.repeat_interleave(40).roll(step).to(dtype)
        for group in opt.param_groups:
            group["lr"] = (0.1, 1e30, 3e38, 0.0)[step]
        opt.step()

    run_both(case, lambda: [torch.nn.Parameter(values.repeat(40).to(dtype))], kept, steps=4, act=act)


@KERNELS
@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_same_bits_for_every_thread_count_and_run(kept):
    def make(params):
        return optim.AdamW(params, lr=0.01, backend=NATIVE, **kept, **INT8)

    assert_same_for_threads(make, torch.bfloat16, kept)


@pytest.mark.parametrize(("case", "kept"), pairs(SOME, KEPT), ids=str)
def test_step_in_backward(case, kept):
    assert_same_in_backward(case, lambda: parameters([*BLOCKS, ()], torch.bfloat16), [INT8, {}], **kept)


@KERNELS
@pytest.mark.parametrize(
    ("case", "kept", "make_scaler"),
    pairs([ADAMW, CASES[9]], KEPT, [genopt_ext.GradScaler, torch.amp.GradScaler]),
    ids=name_of,
)
def test_grad_scalers(case, kept, make_scaler):
    """What is kept beside the weights and the random bits included."""
    for p, q in run_scaled(case, make_scaler, torch.float16, 64.0, {**INT8, **kept}):
        torch.testing.assert_close(p, q, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("case", "kept", "backend"), pairs(SOME, KEPT, BACKENDS), ids=str)
def test_float32_parameters_are_not_affected(case, kept, backend):
    """Beside 16-bit ones, which are."""
    opts = []
    for options in (kept, {}):
        params = parameters(BLOCKS) + parameters([(300,)], torch.bfloat16)
        opt = seeded(lambda: case.ours(params, backend=backend, **options))  # noqa: B023
        for step in range(3):
            take(opt, params, step)
        opts.append(opt)
    *wide, narrow = places(opts[0])
    for p, q in zip(wide, places(opts[1]), strict=False):
        assert_same_bits(p.detach(), q.detach(), (case, kept))
        assert {*opts[0].state[p]} - {"step"} == {*opts[1].state[q]} - {"step"}, (case, kept)
    assert set(extras(kept, narrow)) <= set(opts[0].state[narrow])


# 300 steps of 1e-4


def tiny_steps(dtype, steps=300, size=2048, make=optim.AdamW, **options):
    """A weight of 1.0 after steps of 1e-4 downwards; its optimizer."""
    p = torch.nn.Parameter(torch.ones(size, dtype=dtype))
    opt = seeded(lambda: make([p], lr=1e-4, **options))
    p.grad = torch.full_like(p, 0.5)
    for _ in range(steps):
        opt.step()
    return p, opt


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_300_small_steps(dtype, state):
    truth, _ = tiny_steps(torch.float32)
    truth = truth[0].item()
    assert 0.968 < truth < 0.971
    spacing = AFTER_ONE[dtype] / 2  # below 1
    slack = 2e-5 if state.get("state_dtype") == torch.float32 else 2e-3  # moments of 16 or 8 bits are not exact
    nearest, _ = tiny_steps(dtype, **state)
    assert (nearest == 1.0).all(), (dtype, state)
    p, opt = tiny_steps(dtype, **KAHAN, **state)
    assert (p - truth).abs().max() <= spacing + slack, (dtype, state, p[0])
    sums = p.double() + opt.state[p]["compensation"].double()
    assert (sums - truth).abs().max() <= 1.5e-3 + slack, (dtype, state, sums[0], truth)
    p, opt = tiny_steps(dtype, **MASTER, **state)
    assert (opt.state[p]["master"] - truth).abs().max() <= slack, (dtype, state, opt.state[p]["master"][0])
    assert_same_bits(p.detach(), opt.state[p]["master"].to(dtype), (dtype, state))
    p, opt = tiny_steps(dtype, **STOCHASTIC, **state)
    chance = 1e-4 / spacing
    sigma = spacing * (300 * chance * (1 - chance) / p.numel()) ** 0.5
    assert abs(p.double().mean().item() - truth) <= 5 * sigma + slack, (dtype, state, p.double().mean(), sigma)
    assert p.unique().numel() > 4, (dtype, state)


@pytest.mark.parametrize("name", FIRST)
def test_small_steps_of_every_class(name):
    for dtype in SIXTEEN:
        for kept in KEPT:
            ends = []
            for run in (torch.float32, dtype):
                p = torch.nn.Parameter(torch.ones(2000, dtype=run))
                more = {} if run == torch.float32 else kept
                opt = seeded(lambda: getattr(optim, name)([p], lr=1e-4, **more))  # noqa: B023
                p.grad = torch.full_like(p, 1.0)
                for _ in range(100):
                    opt.step()
                whole = opt.state[p].get("master", p).double()
                if "compensation" in opt.state[p]:
                    whole = whole + opt.state[p]["compensation"].double()
                ends.append(whole.mean().item())
            moved = 1 - ends[0]
            assert moved > 5e-4, (name, moved)
            # 16-bit moments are not exact either; the stochastic mean has its spread
            assert ends[1] == pytest.approx(ends[0], abs=0.1 * moved + 1e-3), (name, dtype, kept, ends)


# Stochastic rounding


def drift(dtype, start, change, steps=1, size=50_000, seed=7, **more):
    """SGD whose every step adds ``change``, which has to be exact in the dtype."""
    p = torch.nn.Parameter(torch.full((size,), start, dtype=dtype))
    opt = seeded(lambda: optim.SGD([p], lr=1.0, param_rounding="stochastic", **more), seed)
    p.grad = torch.full((size,), -change, dtype=dtype)
    assert p.grad[0].item() == -change
    for _ in range(steps):
        opt.step()
    return p.detach()


@pytest.mark.parametrize(
    ("part", "start", "dtype", "backend"),
    pairs([2.0**-6, 0.25, 0.5, 0.875, -0.25], [1.0, -1.0], SIXTEEN, BACKENDS),
    ids=str,
)
def test_one_rounding_is_unbiased(dtype, start, part, backend):
    """Only the two neighbours, each as often as it is near; neighbours in memory independent of one another."""
    spacing = AFTER_ONE[dtype]
    start *= 1.5  # away from the power of two, where the distance changes
    p = drift(dtype, start, part * spacing, backend=backend).double()
    units = (p - start) / spacing
    what = (dtype, start, part)
    low, chance = (-1.0, 1 + part) if part < 0 else (0.0, part)
    assert ((units == low) | (units == low + 1)).all(), (what, units.unique())
    ups = units - low
    n = ups.numel()
    sigma = (chance * (1 - chance) / n) ** 0.5
    assert abs(ups.mean().item() - chance) < 5 * sigma, (what, ups.mean(), chance, sigma)
    for lag in (1, 2, 8, 32, 256, 4096):
        together = (ups[lag:] * ups[:-lag]).mean().item()
        assert abs(together - chance**2) < 6 * (chance / n) ** 0.5, (what, lag, together, chance**2)
    # In every lane of a tile.
    lanes = ups[: n // 256 * 256].view(-1, 256).mean(0)
    assert (lanes - chance).abs().max() < 6 * (chance * (1 - chance) / (n // 256)) ** 0.5, what


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_many_roundings_are_unbiased_and_independent(dtype):
    """The mean and the spread of a walk from 1.0 in steps of about 1e-4."""
    change = torch.tensor(1e-4, dtype=dtype).item()
    steps, spacing = 200, AFTER_ONE[dtype]
    p = drift(dtype, 1.0, change, steps).double()
    chance = change / spacing
    variance = steps * spacing**2 * chance * (1 - chance)
    n = p.numel()
    assert abs(p.mean().item() - (1 + steps * change)) < 5 * (variance / n) ** 0.5, (dtype, p.mean())
    assert p.var().item() == pytest.approx(variance, rel=0.08), (dtype, p.var(), variance)
    together = torch.corrcoef(torch.stack([p[1:], p[:-1]]))[0, 1]
    assert abs(together) < 6 / n**0.5, (dtype, together)


def test_subnormal_numbers_are_rounded_without_bias(backend):
    tiny = 2.0**-24  # the distance of float16's subnormal numbers
    for start in (0.0, 5 * tiny, -5 * tiny):
        p = torch.nn.Parameter(torch.full((20_000,), start, dtype=torch.float16))
        opt = seeded(lambda: optim.SGD([p], lr=0.25, param_rounding="stochastic", backend=backend))  # noqa: B023
        p.grad = torch.full_like(p, -tiny)
        opt.step()
        units = (p.detach().double() - start) / tiny
        assert ((units == 0) | (units == 1)).all(), (start, units.unique())
        assert abs(units.mean().item() - 0.25) < 5 * (0.25 * 0.75 / 20_000) ** 0.5, (start, units.mean())


@pytest.mark.parametrize(("kept", "dtype", "backend"), pairs([{}, *KEPT], SIXTEEN, BACKENDS), ids=str)
def test_a_zero_gradient_changes_nothing(dtype, kept, backend):
    """Numbers that need no rounding stay, the infinite and the largest among them."""
    info = torch.finfo(dtype)
    values = torch.tensor([NAN, INF, -INF, info.max, info.min, info.tiny, info.smallest_normal / 4, 0.0, 1.0, -1.5])
    for start in (values.repeat(60), values.repeat_interleave(300), torch.arange(2000) / 7 - 100):
        p = torch.nn.Parameter(start.to(dtype))
        before = p.detach().clone()
        opt = optim.SGD([p], lr=1.0, backend=backend, **kept)
        for _ in range(3):
            p.grad = torch.zeros_like(p)
            opt.step()
            assert_same_bits(p.detach(), before, (dtype, kept))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_dtype_has_is_not_rounded(backend):
    """Every finite fp16 number; of the subnormal ones above 255, one in 512 draws moved some."""
    numbers = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)
    p = torch.nn.Parameter(torch.cat([numbers.repeat(2), -numbers.repeat(2)]))
    before = p.detach().clone()
    for seed in range(8):
        torch.manual_seed(seed)
        opt = optim.SGD([p], lr=1.0, backend=backend, param_rounding="stochastic")
        p.grad = torch.zeros_like(p)
        opt.step()
        assert_same_bits(p.detach(), before, (backend, seed))


@pytest.mark.parametrize(("kept", "dtype", "backend"), pairs(KEPT, SIXTEEN, BACKENDS), ids=str)
def test_large_numbers_do_not_become_nan(dtype, kept, backend):
    info = torch.finfo(dtype)
    for sign in (1.0, -1.0):
        p = torch.nn.Parameter(torch.full((3000,), sign * info.max, dtype=dtype))
        opt = optim.SGD([p], lr=1.0, backend=backend, **kept)
        p.grad = torch.full_like(p, -sign * info.max / 8192)  # less than half of the distance to infinity
        opt.step()
        assert not p.isnan().any() and (p * sign >= info.max).all(), (dtype, kept, sign)
        if "param_rounding" not in kept or kept["param_rounding"] == "kahan":
            assert (p == sign * info.max).all(), (dtype, kept, sign)
        p.data.fill_(sign * info.max)
        for state in opt.state.values():
            state.pop("master", None)
            state.pop("compensation", None)
        p.grad = torch.full_like(p, -sign * info.max)
        for _ in range(3):
            opt.step()
            assert (p == sign * INF).all(), (dtype, kept, sign, p.unique())
        # Below the largest number nothing overflows.
        p = torch.nn.Parameter(torch.full((3000,), sign * info.max / 2, dtype=dtype))
        opt = optim.SGD([p], lr=1.0, backend=backend, **kept)
        for step in range(3):
            p.grad = randn(p.shape, step, dtype) * (info.max / 64)
            opt.step()
            assert p.isfinite().all(), (dtype, kept, sign)


@pytest.mark.parametrize(("kept", "value", "backend"), pairs(KEPT, [NAN, INF, -INF], BACKENDS), ids=str)
def test_nonfinite_gradients_reach_their_own_element_alone(kept, value, backend):
    for dtype in SIXTEEN:
        results = []
        for bad in (True, False):
            p = torch.nn.Parameter(randn((700,), 0, dtype))
            opt = seeded(lambda: optim.SGD([p], lr=0.1, momentum=0.9, backend=backend, **kept))  # noqa: B023
            for step in range(3):
                p.grad = randn(p.shape, 1 + step, dtype)
                if bad and step == 1:
                    p.grad[300] = value
                opt.step()
            results.append(p.detach().clone())
        assert not results[0][300].isfinite(), (dtype, kept)
        others = torch.arange(700) != 300
        assert_same_bits(results[0][others], results[1][others], (dtype, kept))


@pytest.mark.parametrize(("case", "dtype", "backend"), pairs(SOME, SIXTEEN, BACKENDS), ids=str)
def test_seeds(case, dtype, backend):
    """The initial seed decides, at construction; nothing that is drawn afterwards changes anything."""

    def run(seed, disturb=False, by_hand=None):
        params = parameters([(700,), (5,)], dtype)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if disturb:
                torch.rand(17)
            opt = case.ours(params, param_rounding="stochastic", backend=backend)
            if by_hand is not None:
                opt.param_groups[0]["rounding_seed"] = by_hand
            for step in range(3):
                if disturb:
                    torch.manual_seed(step)
                take(opt, params, step)
        return opt

    first = run(3)
    assert_same(first, run(3, disturb=True), (case, dtype))
    seed = first.param_groups[0]["rounding_seed"]
    assert type(seed) is int and 0 <= seed < 2**32, seed
    others = [run(4), run(3, by_hand=seed ^ 1), run(3, by_hand=seed ^ (1 << 31))]
    assert others[0].param_groups[0]["rounding_seed"] != seed
    for other in others:
        assert any(not torch.equal(p, q) for p, q in zip(places(first), places(other), strict=True)), (case, dtype)
    torch.testing.assert_close(
        places(first)[0].double().mean(), places(others[0])[0].double().mean(), atol=0.05, rtol=0
    )
    assert "rounding_seed" not in case.ours(parameters([(3,)], dtype)).param_groups[0]


def test_the_first_element_and_every_step_draw_anew():
    """Random bits differ from step to step, and from element to element at any distance in a small tensor."""
    walks = []
    p = torch.nn.Parameter(torch.full((300,), 1.5, dtype=torch.bfloat16))
    opt = optim.SGD([p], lr=1.0, param_rounding="stochastic")
    for _ in range(64):
        p.data.fill_(1.5)
        p.grad = torch.full_like(p, 2.0**-8)
        opt.step()
        walks.append((p.detach() == 1.5).clone())
    walks = torch.stack(walks)
    assert walks.unique(dim=0).shape[0] == 64 and walks.unique(dim=1).shape[1] == 300
    assert abs(walks.double().mean().item() - 0.5) < 5 * 0.5 / (64 * 300) ** 0.5


# Masters and compensations


@needs_grad_dtype
@pytest.mark.parametrize(
    ("case", "state", "dtype", "wide_grad", "backend"),
    pairs(CASES, [dict(state_dtype=torch.float32), INT8], SIXTEEN, [False, True], BACKENDS),
    ids=str,
)
def test_masters_are_float32_parameters(case, state, dtype, wide_grad, backend):
    """The bits of an optimizer of float32 parameters, whatever dtype the gradients have."""
    params = parameters([(1,), (257,), (700,)], dtype)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    opt = seeded(lambda: case.ours(params, master_weights=True, backend=backend, **state))
    truth = seeded(lambda: case.ours(wide, backend=backend, **state))
    for p in params:
        p.grad_dtype = torch.float32 if wide_grad else dtype
    what = (case, state, dtype, wide_grad)
    for step in range(3):
        set_strained(params, step)
        for p, q in zip(params, wide, strict=True):
            q.grad = p.grad.float()
        opt.step()
        truth.step()
    for p, q in zip(params, wide, strict=True):
        assert_same_bits(opt.state[p]["master"], q.detach(), what)
        assert_same_bits(p.detach(), q.detach().to(dtype), what)
        assert {*opt.state[p]} == {*truth.state[q], "master"}
        for name, t in truth.state[q].items():
            assert_same_bits(opt.state[p][name], t, (what, name))


@pytest.mark.parametrize(("case", "dtype", "backend"), pairs(SOME, SIXTEEN, BACKENDS), ids=str)
def test_kahan_follows_float32(case, dtype, backend):
    """Closer than the 16-bit weight alone can be."""
    params = [torch.nn.Parameter(p.detach() + 2) for p in parameters([(700,)], dtype)]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    state = dict(state_dtype=torch.float32, backend=backend)
    opts = [case.ours(params, **KAHAN, **state), case.ours(twins, **state), case.ours(wide, **state)]
    for opt in opts:
        opt.param_groups[0]["lr"] = 1e-3 if case.name != "SGD" else 1e-4
    for step in range(60):
        for ps in (params, twins, wide):
            for p in ps:
                p.grad = randn(p.shape, step, dtype).to(p.dtype)
        for opt in opts:
            opt.step()
    truth = wide[0].detach().double()
    whole = params[0].detach().double() + opts[0].state[params[0]]["compensation"].double()
    kahan, nearest = ((t - truth).square().mean().sqrt().item() for t in (whole, twins[0].detach().double()))
    assert kahan < 0.2 * nearest, (case, dtype, kahan, nearest)
    # The weight is the sum, rounded.
    spacing = AFTER_ONE[dtype] * 4
    assert (params[0].detach().double() - truth).abs().max() < spacing, (case, dtype)


@pytest.mark.parametrize(("case", "kept", "state", "backend"), pairs(SOME, KEPT, STATES, BACKENDS), ids=str)
def test_checkpoints(case, kept, state, backend):
    def make(params):
        return case.ours(grouped(params, [{}, dict(weight_decay=0.05)]), backend=backend, **kept, **state)

    params = parameters([(700,), (20, 30), (7,), ()], torch.bfloat16)
    other = assert_round_trip(case, make, params, (case, kept, state))
    assert_kept(case, other, kept)
    for key in kept:
        assert other.param_groups[0][key] == kept[key]


@pytest.mark.parametrize(("case", "kept", "how"), pairs(SOME, KEPT, list(COPIES)), ids=str)
def test_copies_train_on_alone(case, kept, how):
    params = parameters([(700,), (7,)], torch.float16)
    opt = seeded(lambda: case.ours(params, **kept, **INT8))
    assert_copies_train_on_alone(opt, params, how, (case, kept))


@pytest.mark.parametrize(("case", "kept", "dtype"), pairs(SOME, KEPT, SIXTEEN), ids=str)
def test_checkpoints_of_torch_load(case, kept, dtype):
    """What they lack is made at the next step: masters from the parameters, compensations of zero, SGD's step."""
    params = parameters([(700,), (7,)], dtype)
    theirs = case.torch(params)
    train(theirs, params, 2)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in params]
    opt = case.ours(resumed, **kept)
    for step in range(2):  # it has kept something of its own, which is not what was loaded
        take(opt, resumed, step)
    for p, q in zip(params, resumed, strict=True):
        q.data.copy_(p.detach())
    opt.load_state_dict(saved(theirs.state_dict()))
    for key, value in kept.items():
        assert opt.param_groups[0][key] == value
    if "param_rounding" in kept and kept["param_rounding"] == "stochastic":
        assert "rounding_seed" in opt.param_groups[0]
    train(opt, resumed, 1, first=2)
    assert_kept(case, opt, kept)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    truth = case.ours(wide)
    truth.load_state_dict(saved(theirs.state_dict()))
    for i, q in enumerate(wide):
        q.grad = randn(q.shape, 3000 + i, dtype).float()
    truth.step()
    for p, q in zip(resumed, wide, strict=True):
        # One rounding to either side, and torch's own of the moments in 16 bits.
        # Not a number where torch's centered RMSprop left one in the checkpoint.
        tolerance = dict(rtol=2 * AFTER_ONE[dtype], atol=1e-2, equal_nan=True)
        torch.testing.assert_close(p.float(), q, **tolerance, msg=lambda m: f"{case} {kept} {dtype}: {m}")


def test_masters_are_restored_by_loading():
    """Small steps go on where they were, rather than from the rounded weight."""
    for dtype in SIXTEEN:
        for kept in (KAHAN, MASTER):
            p, opt = tiny_steps(dtype, 9, **kept)
            q = torch.nn.Parameter(p.detach().clone())
            other = optim.AdamW([q], lr=1e-4, **kept)
            other.load_state_dict(saved(opt.state_dict()))
            for x, o in ((p, opt), (q, other)):
                x.grad = torch.full_like(x, 0.5)
                for _ in range(20):
                    o.step()
            assert_same(opt, other, (dtype, kept))
            assert (p < 1).all(), (dtype, kept)


def test_a_master_may_be_loaded_into_the_weights():
    """float32 training goes on from the masters, and comes back."""
    params = parameters([(700,)], torch.bfloat16)
    opt = optim.AdamW(params, lr=0.01, state_dtype=torch.float32, master_weights=True)
    train(opt, params, 3)
    (master,) = (state["master"] for state in opt.state_dict()["state"].values())
    assert master.dtype == torch.float32 and not torch.equal(master, params[0].detach().float())
    assert_same_bits(params[0].detach(), master.to(torch.bfloat16))


@pytest.mark.parametrize(("case", "kept", "backend"), pairs(SOME, KEPT, BACKENDS), ids=str)
def test_weights_may_be_kept_otherwise_between_steps(case, kept, backend):
    """Set in a group by hand; switched off and on again, nothing of long ago comes back."""
    params = parameters([(700,), (7,)], torch.bfloat16)
    opt = case.ours(params, backend=backend, **INT8)
    group = opt.param_groups[0]

    def walk(steps):
        for _ in range(steps):
            for p in params:
                p.grad = torch.ones_like(p)
            opt.step()

    walk(2)
    before = {key: group.get(key) for key in kept}
    group.update(kept)
    walk(2)
    assert_kept(case, opt, kept)
    group["lr"] = 0.5
    group["weight_decay"] = 0.0
    for key, old in before.items():
        if old is None:
            del group[key]
        else:
            group[key] = old
    walk(20)
    away = [p.detach().clone() for p in params]
    group["lr"] = 0.0
    group.update(kept)
    walk(1)
    for p, old in zip(params, away, strict=True):
        assert (p - old).abs().max() <= 0.02 * old.abs().max(), (case, kept)


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_averages_swap_and_come_back(kept, backend):
    """swap_ema leaves weights, masters and compensations as they were, and the next step continues."""
    opts = []
    for swaps in (True, False):
        params = parameters(BLOCKS, torch.bfloat16)
        opt = seeded(lambda: optim.AdamW(params, ema_decay=0.9, backend=backend, **kept, **INT8))  # noqa: B023
        for step in range(3):
            take(opt, params, step)
            if swaps:
                before = snapshot(opt)
                with opt.swap_ema():
                    for p in params:
                        assert_same_bits(p.detach(), opt.state[p]["ema"].to(p.dtype), kept)
                assert_unchanged(opt, before, kept)
        opts.append(opt)
    assert_same(*opts, kept)
    assert all(opts[0].state[p]["ema"].dtype == torch.float32 for p in places(opts[0]))


# Changes behind the optimizer's back


def drop_kept(opt, params):
    for state in opt.state.values():
        state.pop("master", None)
        state.pop("compensation", None)


def to_float32(opt, params):
    for p in params:
        p.grad = None
        p.data = p.data.float()


@KERNELS
@pytest.mark.parametrize(
    ("case", "kept", "change"), pairs([CASES[6], CASES[9]], KEPT, [*NEUTRAL, drop_kept, to_float32]), ids=name_of
)
def test_changes_between_steps(case, kept, change):
    def make():
        return parameters([(700,), (20, 15), (3,)], torch.bfloat16)

    assert_change_is_honoured(case, make, {**kept, **INT8}, change)


DTYPE_CHANGES = [
    (before, after)
    for before in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for after in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if before != after
]
CHANGING = [
    {},
    dict(ema_decay=0.7, **INT8),
    *({**kept, "max_grad_norm": 10.0, "skip_nonfinite": True, "ema_decay": 0.9} for kept in KEPT),
]


@KERNELS
@pytest.mark.parametrize(
    ("case", "options", "change"), pairs(SOME, CHANGING, DTYPE_CHANGES), ids=lambda x: str(x) if x else "plain"
)
def test_a_model_that_changes_its_dtype(case, options, change):
    """model.to(dtype) with state there, also amid accumulation: state goes on, where torch's Adam raises."""
    before, after = change

    def act(opt, params, step):
        if step == 3:
            opt.accumulate()
        if step in (2, 3):
            torch.nn.ParameterList(params).to(after if step == 2 else before)
        old = [p.detach().clone() for p in params]
        set_grads(params, step)
        opt.step()
        for p, o in zip(params, old, strict=True):
            assert p.isfinite().all() and p.dtype == o.dtype
            assert options.get("ema_decay") is None or opt.state[p]["ema"].isfinite().all()
            assert case.name == "SGD" or p.dtype == after or (p != o).any(), (case, options, change)

    def make():
        return parameters([(700,), (5, 7)], before)

    # In double, kernels and reference agree within rounding.
    if torch.float64 not in change:
        run_both(case, make, options, steps=5, act=act)
    opts = [run_one(case, make, options, steps=5, act=act, backend=backend) for backend in (NATIVE, "reference")]
    for p, q in zip(*map(places, opts), strict=True):
        torch.testing.assert_close(p, q)
    for opt in opts:
        assert_kept(case, opt, options, change)


@pytest.mark.parametrize("options", [{}, INT8, dict(ema_decay=0.9), dict(master_weights=True)], ids=str)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_model_that_becomes_complex(case, options, backend):
    """What state there is is of real numbers: refused by name, and nothing is changed."""
    params = parameters([(300,), (5, 7)])
    opt = case.ours(params, backend=backend, **options)
    train(opt, params, 2)
    if not any(opt.state.values()):
        return
    for p in params:
        p.grad, p.data = None, p.data.to(torch.complex64)
    set_grads(params, 2)
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match=rf"{case.name}.step: group 0 parameter 0 .*torch.complex64; "):
        opt.step()
    assert_unchanged(opt, before, (case, options))


# Mixes of dtypes


@needs_grad_dtype
@KERNELS
@pytest.mark.parametrize(
    ("case", "dtype", "grad_dtype", "state_dtype"), in_turn(CODED, NARROW, NARROW, [*NARROW, torch.int8]), ids=str
)
def test_any_mix(case, dtype, grad_dtype, state_dtype):
    """float16 state is no option, but a float16 checkpoint may bring it."""
    options = INT8 if state_dtype == torch.int8 else {}

    def act(opt, params, step):
        for p in params:
            p.grad_dtype = grad_dtype
            state = opt.state.get(p, {})
            if step == 1 and not options:
                state.update({n: t.to(state_dtype) for n, t in state.items() if n in moments(case)})
        set_strained(params, step)
        assert all(p.grad.dtype == grad_dtype for p in params)
        opt.step()

    for opt in run_both(case, lambda: parameters([(1,), (300,), (0,), (256,)], dtype), options, act=act):
        for p in places(opt):
            assert p.dtype == dtype and p.grad.dtype == grad_dtype
            if p.numel():
                assert_state(case, opt, p, state_dtype, grad_dtype)


@needs_grad_dtype
@KERNELS
@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_mixes_in_one_optimizer(case, kept):
    """Rows of every dtype side by side, clipped by one norm."""
    mixes = [(p, g) for p in NARROW for g in NARROW]

    def make():
        params = [parameters([(300,)], p, seed=i)[0] for i, (p, _) in enumerate(mixes)]
        for p, (_, g) in zip(params, mixes, strict=True):
            p.grad_dtype = g
        return params

    options = {**kept, "max_grad_norm": 10.0, "skip_nonfinite": True, "ema_decay": 0.9}
    per_group = [INT8, {}, dict(state_dtype=torch.bfloat16), dict(agc=0.1)]
    run_both(case, make, options, per_group, steps=5, act=lambda o, ps, step: take(o, ps, step, options))


@needs_grad_dtype
@pytest.mark.parametrize("case", SOME, ids=str)
def test_gradients_of_another_dtype_are_not_rounded(case, backend):
    """A float32 gradient counts as it is; a 16-bit one as the float32 number that it is."""
    for dtype in NARROW:
        results = []
        for grad_dtype in (torch.float32, torch.bfloat16):
            params = parameters([(300,)], dtype)
            opt = case.ours(params, backend=backend)
            for step in range(2):
                params[0].grad_dtype = grad_dtype
                params[0].grad = randn((300,), step, torch.bfloat16).to(grad_dtype)
                opt.step()
            results.append(params[0])
        assert_same_bits(results[0].detach(), results[1].detach(), (case, dtype))
    # What bfloat16 could not say.
    p = torch.nn.Parameter(torch.zeros(300, dtype=torch.bfloat16))
    p.grad_dtype = torch.float32
    p.grad = torch.full((300,), 1 + 2.0**-12)
    optim.SGD([p], lr=2.0**12, backend=backend).step()
    assert (p == -(2.0**12)).all()  # rounded once, at the end
    q = torch.nn.Parameter(torch.full((300,), 2.0**12, dtype=torch.bfloat16))
    q.grad_dtype = torch.float32
    q.grad = torch.full((300,), 1 + 2.0**-12)
    optim.SGD([q], lr=2.0**12, backend=backend).step()
    assert (q == -1.0).all(), q[0]


@needs_grad_dtype
@pytest.mark.parametrize("case", SOME, ids=str)
def test_mixes_with_float64_are_refused(case, backend):
    for dtype, grad_dtype in [(d, torch.float64) for d in NARROW] + [(torch.float64, d) for d in NARROW]:
        params = parameters([(5,), (300,)], dtype)
        opt = case.ours(params, backend=backend)
        train(opt, params, 1)
        before = snapshot(opt)
        set_grads(params, 1)
        params[1].grad = None
        params[1].grad_dtype = grad_dtype
        params[1].grad = randn((300,), 1, grad_dtype)
        message = rf"group 0 parameter 1 \(shape \[300\]\).*{grad_dtype}.*{dtype}|{dtype}.*{grad_dtype}"
        with pytest.raises((RuntimeError, TypeError), match=message):
            opt.step()
        assert_unchanged(opt, before, (case, dtype, grad_dtype))


@needs_grad_dtype
def test_accumulation_and_scalers_take_any_gradient():
    for dtype, grad_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        opts = []
        for backend in ("auto", "reference"):
            p = parameters([(700,)], dtype)[0]
            p.grad_dtype = grad_dtype
            opt = optim.AdamW([p], backend=backend, master_weights=True, max_grad_norm=1.0, **INT8)
            for step in range(4):
                set_strained([p], step)
                opt.accumulate() if step % 2 == 0 else opt.step_and_zero_()
            opts.append(opt)
        assert_same(*opts, (dtype, grad_dtype))


# State of a chosen dtype


@pytest.mark.parametrize(
    ("case", "state_dtype", "dtype", "backend"),
    pairs(STATEFUL, [torch.float32, torch.bfloat16], NARROW, BACKENDS),
    ids=str,
)
def test_state_dtype(case, state_dtype, dtype, backend):
    """Of every parameter, small ones too; kept through checkpoints, and what is loaded becomes it."""
    params = parameters([(5000,), (3,), ()], dtype)
    opt = case.ours(params, state_dtype=state_dtype, backend=backend)
    before = [p.detach().clone() for p in params]
    train(opt, params, 3)
    for p, old in zip(params, before, strict=True):
        assert_state(case, opt, p, state_dtype)
        assert opt.state[p].get("step", torch.tensor(0.0)).dtype == torch.float32
        assert (p.detach() != old).any(), (case, state_dtype, dtype)
    for other_dtype in (torch.float32, torch.bfloat16, None):
        resumed = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = case.ours(resumed, state_dtype=other_dtype, backend=backend)
        other.load_state_dict(saved(opt.state_dict()))
        for p, q in zip(params, resumed, strict=True):
            assert_state(case, other, q, other_dtype or state_dtype, "loaded")
            for name in moments(case):
                torch.testing.assert_close(
                    opt.state[p][name].float(), other.state[q][name].float(), rtol=2.0**-7, atol=0
                )
        train(other, resumed, 1, first=3)
        for q in resumed:
            assert_state(case, other, q, other_dtype or state_dtype, "trained")


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_float32_state_of_16_bit_parameters(case, backend):
    """Moments are those of a float32 parameter with these gradients; torch's would be rounded at every step."""
    options = {k: v for k, v in case.kwargs.items() if k != "weight_decay"}
    case = Case(case.name, dict(options, **({"weight_decay": 0.0} if case.name == "AdamW" else {})))
    params = parameters([(700,)], torch.bfloat16)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    opt, truth = case.ours(params, state_dtype=torch.float32, backend=backend), case.ours(wide, backend=backend)
    for step in range(5):
        set_grads(params, step)
        wide[0].grad = params[0].grad.float()
        opt.step()
        truth.step()
    for name in moments(case):
        assert_same_bits(opt.state[params[0]][name], truth.state[wide[0]][name], (case, name))


# What is refused

BAD = [
    (option, value)
    for option, values in dict(
        state_dtype=(
            [torch.float64, torch.float16, torch.int32, torch.uint8, torch.complex64] + ["int8", 8, True, int]
        ),
        min_int8_size=[-1, 1.5, "4096", NAN, None, [1], 1j],
        param_rounding=["Nearest", "", "up", 1, True, torch.bfloat16, ["nearest"], b"nearest"],
        master_weights=["yes", 1.5, "kahan", [True], torch.float32],
    ).items()
    for value in values
]


@pytest.mark.parametrize(("name", "bad", "backend"), in_turn(list(FIRST), BAD, BACKENDS), ids=str)
def test_bad_options(name, bad, backend):
    option, value = bad
    for more in ({}, INT8):
        assert_option_refused(name, {option: value}, more, backend, option)


def test_every_class_refuses_bad_options():
    """The 8-bit ones too."""
    for name in [*FIRST, *(f"{name}8bit" for name in FIRST)]:
        for bad in [dict(state_dtype=torch.float64), dict(min_int8_size=-1), dict(lr=-1.0)]:
            with pytest.raises((TypeError, ValueError), match=next(iter(bad))):
                getattr(optim, name)(parameters([(2,)]), **bad)
        for option, value in BAD:
            with pytest.raises((TypeError, ValueError), match=option):
                getattr(optim, name)(parameters([(2,)]), **{option: value})


@pytest.mark.parametrize(("name", "rounding", "backend"), pairs(list(FIRST), ["stochastic", "kahan"], BACKENDS))
def test_masters_need_no_other_rounding(name, rounding, backend):
    both = dict(master_weights=True, param_rounding=rounding)
    assert_option_refused(name, both, {}, backend, "master_weights.*param_rounding")
    make = getattr(optim, name)
    make(parameters([(2,)]), master_weights=False, param_rounding=rounding)
    make(parameters([(2,)]), master_weights=True, param_rounding="nearest")


BROKEN = dict(
    shape=lambda t: t.flatten()[:-1].clone(),
    device=lambda t: t.to("meta"),
    integers=lambda t: t.to(torch.int32),
    complex=lambda t: t.to(torch.complex64),
    list=lambda t: t.tolist(),
)


@pytest.mark.parametrize(("kept", "bad", "backend"), pairs(KEPT[1:], list(BROKEN), BACKENDS), ids=str)
def test_broken_masters_are_refused(kept, bad, backend):
    params = parameters([(300,), (20, 30)], torch.bfloat16)
    opt = optim.AdamW([("first", params[0]), ("second", params[1])], backend=backend, **kept)
    train(opt, params, 2)
    (name,) = extras(kept, params[0])

    def break_it(state):
        state[name] = BROKEN[bad](state[name])

    assert_broken_state_is_refused(opt, params, break_it, ".*" + name, (kept, bad))


@KERNELS
@pytest.mark.parametrize("kept", KEPT[1:], ids=str)
def test_masters_that_share_memory_are_refused(kept):
    params = parameters([(300,), (300,)], torch.bfloat16)
    opt = optim.AdamW(params, backend=NATIVE, **kept)
    train(opt, params, 2)
    assert_shared_memory_is_refused(opt, params, *extras(kept, params[0]))


def test_a_decoded_checkpoint_keeps_its_masters():
    """Codes become numbers on loading, and masters stay."""
    params = parameters([(700,)], torch.bfloat16)
    opt = optim.AdamW(params, master_weights=True, **INT8)
    train(opt, params, 2)
    other, (q,) = plain(ADAMW, opt, master_weights=True)
    assert_same_bits(other.state[q]["master"], opt.state[params[0]]["master"])
    assert_same_bits(other.state[q]["exp_avg"], decoded(ADAMW, opt)[0]["exp_avg"])
    train(other, [q], 1, first=2)
    train(opt, params, 1, first=2)
    assert_same_bits(q.detach(), params[0].detach())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.skipif(NATIVE != "cpu", reason="one device is enough: the reference serves them")
def test_dtensors():
    """Steps of a DTensor are those of the tensor; what depends on an element's place is refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for options, like in (
            (dict(state_dtype=torch.int8, min_int8_size=1), dict(state_dtype=torch.float32)),
            (dict(param_rounding="kahan"), dict(param_rounding="kahan")),
            (dict(master_weights=True), dict(master_weights=True)),
            (dict(param_rounding="stochastic"), {}),
        ):
            whole = randn((30, 7), 0, torch.bfloat16)
            p = torch.nn.Parameter(distribute_tensor(whole.clone(), mesh, [Shard(0)]))
            q = torch.nn.Parameter(whole.clone())
            opts = [optim.AdamW([p], lr=0.01, **options), optim.AdamW([q], lr=0.01, **like)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for step in range(3):
                    q.grad = randn((30, 7), step + 1, torch.bfloat16)
                    p.grad = distribute_tensor(q.grad, mesh, [Shard(0)])
                    if options.get("param_rounding") == "stochastic":
                        with pytest.raises(RuntimeError, match="group 0 parameter 0 .*param_rounding is 'stochastic'"):
                            opts[0].step()
                        break
                    for opt in opts:
                        opt.step()
                else:
                    torch.testing.assert_close(p.full_tensor().detach(), q.detach(), rtol=0, atol=0, msg=str(options))
    finally:
        torch.distributed.destroy_process_group()
