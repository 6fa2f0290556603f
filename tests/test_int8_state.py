"""8-bit optimizer state: the kernels' bits, what holds for any map, the layout, checkpoints, and what is refused."""

from __future__ import annotations

import inspect
import threading
from functools import partial

import hypothesis.strategies as st
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
    SHAPES,
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
    strided,
    train,
)
from hypothesis import given, settings
from low_precision import (
    ADAMW,
    BLOCKS,
    CODED,
    KEPT,
    KERNELS,
    NEUTRAL,
    SGD,
    SIGNED,
    SQUARES,
    TILE,
    WIDE,
    assert_broken_state_is_refused,
    assert_change_is_honoured,
    assert_copies_train_on_alone,
    assert_decoded_like,
    assert_round_trip,
    assert_same,
    assert_same_for_threads,
    assert_same_in_backward,
    assert_same_in_layout,
    assert_shared_memory_is_refused,
    assert_state,
    assert_unchanged,
    blocks,
    decoded,
    gradient,
    grouped,
    in_memory,
    moments,
    name_of,
    plain,
    run_both,
    run_scaled,
    saved,
    seeded,
    set_strained,
    snapshot,
    take,
)

import genopt_ext
from genopt_ext import optim

# The same bits


@KERNELS
@pytest.mark.parametrize(("case", "dtype"), pairs(CASES, NARROW), ids=str)
def test_kernels_equal_reference(case, dtype):
    shapes = [(n,) for n in SIZES] + [(), (3, 5, 7)]
    for opt in run_both(case, lambda: parameters(shapes, dtype), INT8):
        for p in opt.param_groups[0]["params"]:
            if p.numel():
                assert_state(case, opt, p, torch.int8)


@KERNELS
@pytest.mark.parametrize(("case", "wide", "dtype"), pairs(STATEFUL, WIDE, NARROW), ids=str)
def test_same_bits_on_the_gradient_path(case, wide, dtype):
    """Also when the very first step is skipped."""
    run_both(
        case,
        lambda: parameters([*BLOCKS, (20, 30), (0,)], dtype),
        {**INT8, **wide},
        steps=5,
        act=lambda opt, params, step: take(opt, params, step, wide),
    )


@KERNELS
@pytest.mark.parametrize(("dtype", "case"), in_turn(NARROW, STATEFUL), ids=str)
def test_same_bits_in_groups_of_their_own(case, dtype):
    per_group = [
        INT8,
        {},
        dict(state_dtype=torch.int8, min_int8_size=300, clip_per_param=2.0),
        dict(state_dtype=torch.bfloat16),
        dict(state_dtype=torch.float32),
        dict(state_dtype=torch.int8, ema_decay=0.5),
    ]
    opts = run_both(
        case,
        lambda: parameters([s for s in ((7,), (300,), (4099,)) for _ in per_group], dtype),
        dict(max_grad_norm=100.0),
        per_group,
        steps=4,
        act=lambda opt, params, step: take(opt, params, step, {}),
    )
    for opt in opts:
        for group, own in zip(opt.param_groups, per_group, strict=True):
            for p in group["params"]:
                asked = own.get("state_dtype")
                if asked == torch.int8:
                    asked = torch.int8 if p.numel() >= own.get("min_int8_size", 4096) else torch.float32
                extra = ["ema"] if "ema_decay" in own else []
                assert_state(case, opt, p, asked or dtype, own, extra)


@KERNELS
@pytest.mark.parametrize(
    ("case", "layout", "dtype"),
    pairs([CASES[2], CASES[10], CASES[14], CASES[16]], list(layouts()), NARROW),
    ids=str,
)
def test_layouts(case, layout, dtype):
    for opt in assert_same_in_layout(case, layout, dtype, INT8):
        assert_state(case, opt, opt.param_groups[0]["params"][0], torch.int8, layout)


@KERNELS
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_non_finite_and_extreme_values(case, dtype):
    """In blocks of their own, in one with others, and with absurd learning rates."""
    values = torch.tensor(NON_FINITE)
    finite = values[values.isfinite()]

    def act(opt, params, step):
        params[0].grad = values.repeat_interleave(40).roll(step).to(dtype)
        params[1].grad = values.repeat(60).roll(step).to(dtype)
        params[2].grad = finite.repeat_interleave(TILE).roll(step).to(dtype)
        for group in opt.param_groups:
            group["lr"] = (0.1, 1e30, 3e38, 0.0)[step]
        opt.step()

    def make():
        sizes = (40 * len(values), 60 * len(values), TILE * len(finite))
        return [torch.nn.Parameter(randn((n,), i, dtype)) for i, n in enumerate(sizes)]

    run_both(case, make, INT8, steps=4, act=act)


@KERNELS
def test_same_bits_for_every_thread_count_and_run():
    def make(params):
        return optim.AdamW(grouped(params, [INT8, dict(agc=0.1)]), lr=0.01, max_grad_norm=5.0, backend=NATIVE)

    assert_same_for_threads(make, torch.float32)


@pytest.mark.parametrize("case", CODED, ids=str)
def test_step_in_backward(case):
    per_group = [INT8, dict(state_dtype=torch.int8, min_int8_size=200)]
    assert_same_in_backward(case, lambda: parameters([*SHAPES, (600,)]), per_group)


@KERNELS
@pytest.mark.parametrize("make_scaler", [genopt_ext.GradScaler, torch.amp.GradScaler])
@pytest.mark.parametrize("case", CODED, ids=str)
def test_grad_scalers(case, make_scaler):
    """What was skipped left nothing: the other steps alone give the same."""
    for p, q in run_scaled(case, make_scaler, torch.float32, 1024.0, {**INT8, "max_grad_norm": 3.0}):
        assert_same_bits(p.detach(), q.detach(), case)


# What is stored


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_min_int8_size(case, backend):
    for least, sizes in ((None, (4095, 4096)), (300, (299, 300)), (1, (1, 2)), (10**9, (4096, 5000))):
        params = parameters([(n,) for n in sizes])
        more = {} if least is None else dict(min_int8_size=least)
        opt = case.ours(params, state_dtype=torch.int8, backend=backend, **more)
        train(opt, params, 2)
        limit = 4096 if least is None else least
        for p in params:
            assert_state(case, opt, p, torch.int8 if p.numel() >= limit else torch.float32, least)


@pytest.mark.parametrize("dtype", NARROW[1:], ids=str)
def test_small_16_bit_parameters_have_float32_state(dtype, backend):
    params = parameters([(4095,), (4096,)], dtype)
    opt = optim.AdamW(params, state_dtype=torch.int8, backend=backend)
    train(opt, params, 2)
    assert_state(ADAMW, opt, params[0], torch.float32)
    assert_state(ADAMW, opt, params[1], torch.int8)


@pytest.mark.parametrize(
    ("case", "state_dtype", "dtype", "backend"),
    pairs(
        STATEFUL,
        [torch.int8, torch.bfloat16, torch.float32],
        [torch.float64, torch.complex64, torch.complex128],
        BACKENDS,
    ),
    ids=str,
)
def test_float64_and_complex_keep_their_state(case, state_dtype, dtype, backend):
    results = []
    for options in (dict(state_dtype=state_dtype, min_int8_size=1), {}):
        params = parameters([(5000,), (3,)], dtype)
        opt = case.ours(params, backend=backend, **options)
        train(opt, params, 2)
        results.append(opt)
    for p, q in zip(*(opt.param_groups[0]["params"] for opt in results), strict=True):
        assert_state(case, results[0], p, dtype)
        assert_same_bits(p.detach(), q.detach(), (case, state_dtype))
        for name, t in results[1].state[q].items():
            assert_same_bits(results[0].state[p][name], t, (case, state_dtype, name))


def test_bytes_per_parameter():
    """In the tensors, in the memory behind them, and in a file; with codes in the parameter's memory format."""
    for p in (randn((1 << 20,), 0), randn((64, 64, 16, 16), 0).to(memory_format=torch.channels_last)):
        p = torch.nn.Parameter(p)
        opt = optim.AdamW8bit([p], lr=1e-3)
        p.grad = randn(p.shape, 1)
        opt.step()
        state = opt.state[p].values()
        assert sum(t.numel() * t.element_size() for t in state) <= 2.05 * p.numel()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state}
        assert sum(storages.values()) <= 2.05 * p.numel()
        assert_state(ADAMW, opt, p, torch.int8)
        assert opt.state_dict()["param_groups"][0]["int8_format"] == 1


def test_the_format_is_told_by_groups_that_have_codes():
    params = parameters([(300,), (300,)])
    opt = optim.AdamW(grouped(params, [INT8, {}]))
    train(opt, params, 1)
    groups = opt.state_dict()["param_groups"]
    assert groups[0]["int8_format"] == 1 and "int8_format" not in groups[1]
    plain = optim.AdamW(parameters([(300,)]))
    assert set(plain.state_dict()["param_groups"][0]) == set(
        torch.optim.AdamW(parameters([(300,)])).state_dict()["param_groups"][0]
    )


@pytest.mark.parametrize("name", FIRST)
def test_classes(name):
    base, narrow = getattr(optim, name), getattr(optim, f"{name}8bit")
    assert issubclass(narrow, base)
    assert narrow.__name__ == f"{name}8bit" and f"{name}8bit" in dir(optim)
    ours, theirs = (inspect.signature(c).parameters for c in (narrow, base))
    assert [(p.name, p.kind) for p in ours.values()] == [(p.name, p.kind) for p in theirs.values()]
    assert all(p.default == theirs[k].default for k, p in ours.items() if k != "state_dtype")
    more = dict(momentum=0.9) if name == "SGD" else {}
    case = Case(name, more)
    results = []
    for make, options in ((narrow, {}), (base, dict(state_dtype=torch.int8))):
        params = parameters([(5000,), (300,)])
        opt = seeded(lambda: make(params, **more, **options))  # noqa: B023
        train(opt, params, 2)
        assert_state(case, opt, params[0], torch.int8)
        assert_state(case, opt, params[1], torch.float32)
        results.append(opt)
    assert_same(*results, name)
    params = parameters([(5000,)])
    opt = narrow(params, **more, state_dtype=torch.float32)
    train(opt, params, 1)
    assert_state(case, opt, params[0], torch.float32)
    params = parameters([(5000,)])
    opt = narrow([{"params": params, "state_dtype": torch.bfloat16}], **more)
    train(opt, params, 1)
    assert_state(case, opt, params[0], torch.bfloat16)


def test_a_scale_belongs_to_256_elements_in_memory(backend):
    """A large gradient leaves its mark on its own block and on no other, in the order of memory."""
    for t in (
        randn((1030,), 0),
        randn((40, 30), 1).t(),
        randn((2, 6, 10, 10), 2).to(memory_format=torch.channels_last),
    ):
        for k in (0, 255, 256, t.numel() - 1):
            states = []
            for large in (False, True):
                p = torch.nn.Parameter(t.clone(memory_format=torch.preserve_format))
                p.grad = randn(p.shape, 3).abs().add(0.1).clone(memory_format=torch.contiguous_format)
                p.grad = torch.empty_like(p).copy_(p.grad)
                if large:
                    in_memory(p.grad)  # a view of the gradient: its strides are the parameter's
                    p.grad.as_strided((p.numel(),), (1,))[k] = 1e4
                opt = optim.AdamW([p], backend=backend, **INT8)
                opt.step()
                states.append((opt.state[p], decoded(ADAMW, opt)[0]))
            for name in ("exp_avg", "exp_avg_sq"):
                small, big = (s[0][f"{name}_scales"] for s in states)
                differ = (small != big).nonzero().flatten().tolist()
                assert differ == [k // TILE], (tuple(t.shape), k, name, differ)
                for b, (x, y) in enumerate(zip(*(blocks(s[1][name]) for s in states), strict=True)):
                    if b != k // TILE:
                        assert_same_bits(x, y, (tuple(t.shape), k, name, b))


# What holds for any map

FROM_ZERO = [case for case in CASES if not case.kwargs.get("initial_accumulator_value")]


@pytest.mark.parametrize(("case", "dtype", "backend"), pairs(FROM_ZERO, NARROW, BACKENDS), ids=str)
def test_first_step_is_that_of_float32_state(case, dtype, backend):
    """A step uses the moments that it computed, and rounds them afterwards; nothing was rounded before the first."""
    results = []
    for options in (INT8, dict(state_dtype=torch.float32)):
        params = parameters(BLOCKS, dtype)
        opt = case.ours(params, backend=backend, **options)
        take(opt, params, 0)
        results.append(opt)
    for p, q in zip(*(opt.param_groups[0]["params"] for opt in results), strict=True):
        assert_same_bits(p.detach(), q.detach(), (case, dtype))
    if moments(case):
        for mine, state in zip(decoded(case, results[0]), results[1].state.values(), strict=True):
            truth = {name: t for name, t in state.items() if name != "step"}
            assert_decoded_like(mine, truth, (case, dtype))


@pytest.mark.parametrize(("case", "dtype", "backend"), pairs(STATEFUL, NARROW, BACKENDS), ids=str)
def test_each_step_is_that_of_the_decoded_state(case, dtype, backend):
    """Load, rule, store: from what the codes say, the step is float32's to the bit; then each moment is rounded."""
    params = parameters(BLOCKS, dtype)
    opt = case.ours(params, backend=backend, **INT8)
    for step in range(4):
        wide, copies = plain(case, opt, backend=backend, state_dtype=torch.float32)
        for o, ps in ((opt, params), (wide, copies)):
            take(o, ps, step)
        for mine, p, q in zip(decoded(case, opt), params, copies, strict=True):
            assert_same_bits(p.detach(), q.detach(), (case, dtype, step))
            truth = {name: t for name, t in wide.state[q].items() if name != "step"}
            assert_decoded_like(mine, truth, (case, dtype, step))
            if "step" in wide.state[q]:
                assert opt.state[p]["step"] == wide.state[q]["step"] == step + 1


@pytest.mark.parametrize("case", CODED, ids=str)
def test_zero_blocks_are_zeros(case, backend):
    p = torch.nn.Parameter(torch.ones(3 * TILE + 5))
    opt = case.ours([p], backend=backend, **INT8)
    alive = slice(TILE, 2 * TILE)
    for step in range(3):
        p.grad = torch.zeros_like(p)
        p.grad[alive] = randn((TILE,), step)
        opt.step()
    for name, t in decoded(case, opt)[0].items():
        start = case.kwargs.get("initial_accumulator_value", 0.0)
        if not case.kwargs.get("weight_decay"):
            t[alive] = start
            torch.testing.assert_close(t, torch.full_like(t, start), rtol=1e-6, atol=0, msg=lambda m: f"{case}: {m}")
        assert opt.state[p][f"{name}_scales"].isfinite().all(), (case, name)


def test_dampening_knows_a_zero_from_a_beginning(backend):
    """Only the first step takes the whole gradient; a momentum of zero is a momentum."""
    for first in (0.0, -0.0):
        for size in (5, TILE, 1000):
            p = torch.nn.Parameter(torch.zeros(size))
            opt = optim.SGD([p], lr=1.0, momentum=0.5, dampening=0.5, skip_nonfinite=True, backend=backend, **INT8)
            p.grad = torch.full_like(p, INF)  # a step that is skipped is no beginning
            opt.step()
            p.grad = torch.full_like(p, first)
            p.grad[-1] = 4.0
            opt.step()
            assert p[-1] == -4.0 and (p[:-1] == 0).all(), (first, size)
            p.grad = torch.full_like(p, 1.0)
            opt.step()
            truth = torch.nn.Parameter(torch.zeros(size))
            theirs = torch.optim.SGD([truth], lr=1.0, momentum=0.5, dampening=0.5, foreach=False)
            for q in (first, 1.0):
                truth.grad = torch.full_like(truth, q)
                if q == first:
                    truth.grad[-1] = 4.0
                theirs.step()
            torch.testing.assert_close(p, truth, msg=lambda m: f"{first} {size}: {m}")  # noqa: B023
        # A whole block that begins with zeros.
        p = torch.nn.Parameter(torch.zeros(TILE))
        opt = optim.SGD([p], lr=1.0, momentum=0.5, dampening=0.5, backend=backend, **INT8)
        for value in (first, 1.0):
            p.grad = torch.full_like(p, value)
            opt.step()
        assert (p == -0.5).all(), (first, p[0])


@pytest.mark.parametrize(
    ("case", "exponents", "backend"),
    pairs(
        [CASES[2], CASES[14], CASES[16], Case("RMSprop")],
        [(-18, 18), (-18, 0), (-22, -19), (-22, -22), (-3, 3)],
        BACKENDS,
    ),
    ids=str,
)
def test_squares_never_become_zero(case, exponents, backend):
    """The smallest beside the largest, in one block; and where all of them are denormal."""
    p = torch.nn.Parameter(torch.zeros(3 * TILE))
    twin = torch.nn.Parameter(torch.zeros(3 * TILE))
    low, high = exponents
    opts = [case.ours([p], backend=backend, **INT8), case.ours([twin], backend=backend)]
    for o in opts:  # the decay of weights would hide small gradients
        o.param_groups[0]["weight_decay"] = 0.0
    powers = torch.linspace(low, high, 3 * TILE)
    powers = powers[torch.randperm(3 * TILE, generator=torch.Generator("cpu").manual_seed(1))]
    grad = torch.pow(10.0, powers.double()).float() * randn((3 * TILE,), 4).sign()
    for step in range(12):
        for q in (p, twin):
            q.grad = grad if step == 0 else torch.zeros_like(grad)
        for o in opts:
            o.step()
        mine = decoded(case, opts[0])[0]
        for name, t in mine.items():
            truth = opts[1].state[twin][name]
            assert t.isfinite().all(), (case, exponents, step, name)
            if name in SQUARES:
                lost = ((truth > 0) & (t == 0)).sum().item()
                assert step > 0 or lost == 0, (case, exponents, step, name, lost)
                assert (t >= 0).all(), (case, exponents, step, name)
        assert p.isfinite().all(), (case, exponents, step)
    if high > -19:
        wide, (copied,) = plain(case, opts[0])
        squares = [n for n in moments(case) if n in SQUARES]
        for name in squares:  # also after many steps without a gradient
            assert (wide.state[copied][name][grad.abs() > 1e-15] > 0).all(), (case, exponents, name)


@pytest.mark.parametrize(
    ("case", "size", "backend"),
    pairs(CODED, [1e-45, 1e-42, 1e-38, 1e-30, 1e30, 3e38, 3.4028234663852886e38], BACKENDS),
    ids=str,
)
def test_denormal_and_huge_gradients_give_finite_codes(case, size, backend):
    """Wherever float32 state would be finite; squares that overflow are so in every dtype."""
    p = torch.nn.Parameter(torch.zeros(700))
    opt = case.ours([p], backend=backend, **INT8)
    opt.param_groups[0]["lr"] = 1e-3
    for step in range(3):
        wide, (q,) = plain(case, opt, backend=backend, state_dtype=torch.float32)
        p.grad = (randn((700,), step).clamp(-1, 1) * size).float()
        p.grad[5] = size
        q.grad = p.grad.clone()
        opt.step()
        wide.step()
        (mine,) = decoded(case, opt)
        assert_same_bits(p.detach(), q.detach(), (case, size, step))
        for name, t in mine.items():
            what = (case, size, step, name)
            for k, (x, truth) in enumerate(zip(blocks(t), blocks(wide.state[q][name]), strict=True)):
                finite = bool(truth.isfinite().all())
                assert finite or step > 0 or name in SQUARES, what
                assert not finite or (x.isfinite().all() and opt.state[p][f"{name}_scales"][k].isfinite()), (what, k)


@pytest.mark.parametrize(("case", "value", "backend"), pairs(CODED, [NAN, INF, -INF], BACKENDS), ids=str)
def test_nonfinite_gradients_do_not_vanish(case, value, backend):
    """Where float32 state would hold NaN or infinity, so does the block; the other blocks are as if there was none."""
    opts, every = [], []
    for options, bad in ((INT8, True), (dict(state_dtype=torch.float32), True), (INT8, False)):
        params = parameters([(700,)])
        opt = case.ours(params, backend=backend, **options)
        for step in range(2):
            set_grads(params, step)
            if step == 1 and bad:
                params[0].grad[300] = value
            opt.step()
        opts.append(opt)
        every.append(params[0])
    mine, clean = decoded(case, opts[0])[0], decoded(case, opts[2])[0]
    for name, truth in opts[1].state[every[1]].items():
        if name == "step":
            continue
        if not truth[300].isfinite():
            assert not blocks(mine[name])[1].isfinite().all(), (case, value, name)
        for k in (0, 2):
            assert_same_bits(blocks(mine[name])[k], blocks(clean[name])[k], (case, value, name, k))
    assert every[0][300].isfinite() == every[1][300].isfinite(), (case, value)
    for k in (0, 2):
        assert_same_bits(blocks(every[0])[k], blocks(every[2])[k], (case, value, k))


def test_signed_moments_keep_their_order(backend):
    """A larger momentum does not decode to one smaller by more than a code, and the signs are treated alike."""
    p = torch.nn.Parameter(torch.zeros(4 * TILE))
    opt = SGD.ours([p], backend=backend, **INT8)
    p.grad = gradient(p, 0)
    opt.step()
    t = decoded(SGD, opt)[0]["momentum_buffer"]
    for k, (x, g) in enumerate(zip(blocks(t), blocks(p.grad), strict=True)):
        ordered = x[g.argsort()]
        # Neighbours may be rounded in different directions, by a code of 4 to 25 %.
        assert (ordered[1:] - ordered[:-1] >= -0.3 * ordered[:-1].abs() - 1e-3 * ordered.abs().max()).all(), k
        assert len(x.unique()) > 20, k
        largest = g.abs().max()
        torch.testing.assert_close(x.abs().max(), largest, rtol=0.07, atol=0)
    q = torch.nn.Parameter(torch.zeros(4 * TILE))
    other = SGD.ours([q], backend=backend, **INT8)
    q.grad = -p.grad
    other.step()
    torch.testing.assert_close(decoded(SGD, other)[0]["momentum_buffer"], -t, rtol=0.05, atol=0)


@pytest.mark.parametrize("name", FIRST)
def test_least_squares(name):
    """Trains about as well as with float32 state."""
    torch.manual_seed(0)
    x, truth = randn((256, 64), 0), randn((64, 80), 1)
    x = x * torch.linspace(0.2, 2.0, 64)  # directions of different curvature
    y = x @ truth
    options = dict(SGD=dict(lr=0.05, momentum=0.9), Adagrad=dict(lr=0.5)).get(name, dict(lr=0.03))
    losses = []
    for state_dtype in (torch.float32, torch.int8, torch.bfloat16):
        w = torch.nn.Parameter(torch.zeros(64, 80))
        opt = getattr(optim, name)([w], **options, state_dtype=state_dtype)
        first = None
        for step in range(200):
            rows = slice(64 * (step % 4), 64 * (step % 4) + 64)
            opt.zero_grad()
            (x[rows] @ w - y[rows]).square().mean().backward()
            opt.step()
            loss = (x @ w.detach() - y).square().mean().item()
            first = first or loss
        losses.append(loss)
    assert losses[0] < 0.2 * first, (name, first, losses)
    for loss in losses[1:]:
        assert loss <= 1.25 * losses[0] + 0.005 * first, (name, first, losses)


def test_adagrad_sum_keeps_growing():
    """Beside elements that were large once, where an addition is less than the distance of two codes."""
    p = torch.nn.Parameter(torch.zeros(16 * TILE))
    opt = optim.Adagrad([p], lr=1e-3, state_dtype=torch.int8)
    large = torch.arange(16 * TILE) % TILE == 7
    means = {}
    for step in range(1, 201):
        p.grad = torch.ones_like(p)
        if step == 1:
            p.grad[large] = 30.0
        opt.step()
        if step in (50, 100, 200):
            total = decoded(Case("Adagrad"), opt)[0]["sum"]
            means[step] = total[~large].mean().item()
            assert means[step] == pytest.approx(step, rel=0.3), means
    total = decoded(Case("Adagrad"), opt)[0]["sum"]
    assert total[large].mean().item() == pytest.approx(1099, rel=0.1)
    assert means[50] < means[100] < means[200]
    # Random gradients.
    p = torch.nn.Parameter(torch.zeros(4 * TILE))
    opt = optim.Adagrad([p], lr=1e-3, **INT8)
    truth = torch.zeros_like(p)
    for step in range(200):
        p.grad = randn(p.shape, step) * torch.linspace(0.1, 1.0, 4 * TILE)
        truth += p.grad.square()
        opt.step()
    ratio = decoded(Case("Adagrad"), opt)[0]["sum"] / truth
    assert 0.8 < ratio.mean() < 1.25 and ratio.min() > 0.2 and ratio.max() < 4, (ratio.mean(), ratio.min(), ratio.max())


@pytest.mark.parametrize("factor", [0.1, 10.0])
@pytest.mark.parametrize("everywhere", [True, False])
def test_second_moment_follows_a_change_of_scale(everywhere, factor):
    """Also where one step's change is less than the distance of two codes, as others in the block hold the scale."""
    n = 2 * TILE
    p = torch.nn.Parameter(torch.zeros(n))
    opt = optim.AdamW([p], lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, **INT8)
    changes = torch.ones(n, dtype=torch.bool) if everywhere else torch.arange(n) % 2 == 0
    signs = randn((n,), 0).sign()
    p.grad = signs * torch.linspace(0.5, 1.5, n)
    for _ in range(300):
        opt.step()
    before = decoded(ADAMW, opt)[0]["exp_avg_sq"]
    p.grad[changes] *= factor
    for _ in range(3000 if factor < 1 else 600):
        opt.step()
    after = decoded(ADAMW, opt)[0]["exp_avg_sq"]
    for t, grad in ((before, signs * torch.linspace(0.5, 1.5, n)), (after, p.grad)):
        for which in (changes, ~changes):
            if which.any():
                ratio = (t[which] / grad[which].square()).mean().item()
                assert 0.5 < ratio < 2.0, (everywhere, factor, ratio)


# Checkpoints


def resume(case, opt, **options):
    """A new optimizer on copies of the parameters, and these."""
    params = [[torch.nn.Parameter(p.detach().clone()) for p in group["params"]] for group in opt.param_groups]
    other = seeded(lambda: case.ours([{"params": row} for row in params], **options), 8)
    return other, [p for row in params for p in row]


@pytest.mark.parametrize(("case", "theirs", "backend"), pairs(STATEFUL, [True, False], BACKENDS), ids=str)
def test_plain_checkpoints_load_into_codes(case, theirs, backend):
    params = parameters([(700,), (30, 40), (100,)])
    opt = (case.torch if theirs else case.ours)(params)
    train(opt, params, 3)
    other, resumed = resume(case, opt, state_dtype=torch.int8, min_int8_size=200, backend=backend)
    other.load_state_dict(saved(opt.state_dict()))
    for k, (p, q) in enumerate(zip(params, resumed, strict=True)):
        assert_state(case, other, q, torch.float32 if k == 2 else torch.int8, "loaded")
        truth = {n: t for n, t in opt.state[p].items() if n != "step" and t is not None}
        if k == 2:
            for name, t in truth.items():
                assert_same_bits(other.state[q][name], t, (case, name))
        assert_decoded_like(decoded(case, other)[k], truth, (case, theirs))
        assert "step" not in opt.state[p] or other.state[q]["step"] == 3
    group = other.param_groups[0]
    assert group["state_dtype"] == torch.int8 and group["min_int8_size"] == 200
    train(opt, params, 1, first=3)
    train(other, resumed, 1, first=3)
    for p, q in zip(params, resumed, strict=True):
        assert_state(case, other, q, torch.int8 if q.numel() >= 200 else torch.float32, "trained")
        torch.testing.assert_close(p, q, rtol=0.05, atol=0.05, msg=lambda m: f"{case} {theirs}: {m}")


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_codes_load_into_float32_and_on_into_torch(case):
    params = parameters([(700,), (30, 40)])
    opt = case.ours(params, **INT8)
    train(opt, params, 3)
    for options in ({}, dict(state_dtype=torch.float32), dict(state_dtype=torch.bfloat16)):
        other, resumed = resume(case, opt, **options)
        other.load_state_dict(saved(opt.state_dict()))
        for q in resumed:
            assert_state(case, other, q, options.get("state_dtype", torch.float32), options)
        assert "int8_format" not in other.state_dict()["param_groups"][0], options
        assert other.param_groups[0].get("state_dtype") == options.get("state_dtype"), options
        if not options:
            copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
            torchs = case.torch(copies)
            torchs.load_state_dict(saved(other.state_dict()))
        for o, ps in ((other, resumed), *([(torchs, copies)] if not options else [])):
            train(o, ps, 1, first=3)
        if not options:
            for p, q in zip(resumed, copies, strict=True):
                torch.testing.assert_close(p, q, msg=lambda m: f"{case}: {m}")


@pytest.mark.parametrize(("case", "dtype", "backend"), pairs(STATEFUL, NARROW, BACKENDS), ids=str)
def test_codes_round_trip(case, dtype, backend):
    """Bit for bit, and so do the steps after it."""
    per_group = [dict(INT8), dict(state_dtype=torch.int8, min_int8_size=300), {}]
    params = parameters([(700,), (30, 20), (7,), (257,), (300,), ()], dtype)
    assert_round_trip(case, lambda ps: case.ours(grouped(ps, per_group), backend=backend), params, (case, dtype))


def test_loading_leaves_options_as_constructed():
    params = parameters([(700,), (300,)])
    opt = optim.AdamW(params, **INT8)
    train(opt, params, 2)
    other, resumed = resume(ADAMW, opt, state_dtype=torch.int8, min_int8_size=500)
    other.load_state_dict(saved(opt.state_dict()))
    group = other.param_groups[0]
    assert (group["state_dtype"], group["min_int8_size"]) == (torch.int8, 500)
    assert_state(ADAMW, other, resumed[0], torch.int8)
    assert_state(ADAMW, other, resumed[1], torch.float32)
    assert_same_bits(other.state[resumed[0]]["exp_avg_codes"], opt.state[params[0]]["exp_avg_codes"])
    # Per group; a checkpoint with its groups the other way round in what they ask for.
    both = [dict(INT8), dict(state_dtype=torch.bfloat16)]
    opt = optim.AdamW(grouped(params, both))
    train(opt, params, 2)
    other = optim.AdamW(grouped(resumed, both[::-1]))
    other.load_state_dict(saved(opt.state_dict()))
    assert [g["state_dtype"] for g in other.param_groups] == [torch.bfloat16, torch.int8]
    assert_state(ADAMW, other, resumed[0], torch.bfloat16)
    assert_state(ADAMW, other, resumed[1], torch.int8)
    # Constructed without: plain.
    other = optim.AdamW(grouped(resumed, [{}, {}]))
    other.load_state_dict(saved(opt.state_dict()))
    assert all(g.get("state_dtype") is None for g in other.param_groups)
    assert_state(ADAMW, other, resumed[0], torch.float32)
    assert_state(ADAMW, other, resumed[1], torch.bfloat16)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", [f"{name}8bit" for name in FIRST])
def test_copies_train_on_alone(name, how):
    params = parameters([(5000,), (300,)])
    opt = getattr(optim, name)(params, **(dict(momentum=0.9) if name == "SGD8bit" else {}))
    assert_copies_train_on_alone(opt, params, how, name)


def memory(opt):
    return {t.untyped_storage().data_ptr() for s in opt.state.values() for t in s.values() if t.numel()}


def test_optimizers_loaded_from_one_state_dict_share_nothing():
    for options in (INT8, dict(state_dtype=torch.float32), dict(state_dtype=torch.bfloat16)):
        params = parameters([(700,), (300,)])
        opt = optim.AdamW(params, **INT8)
        train(opt, params, 2)
        state_dict = opt.state_dict()
        twins = [resume(ADAMW, opt, **options) for _ in range(2)]
        for twin, _ in twins:
            twin.load_state_dict(state_dict)
        everything = [memory(o) for o in (opt, twins[0][0], twins[1][0])]
        assert len(set.union(*everything)) == sum(map(len, everything)), options
        kept = snapshot(twins[0][0])
        train(opt, params, 1, first=2)
        train(*twins[1], 1, first=2)
        assert_unchanged(twins[0][0], kept, options)


@pytest.mark.parametrize("case", CODED, ids=str)
def test_torch_does_not_take_codes_for_numbers(case):
    params = parameters([(700,)])
    opt = case.ours(params, **INT8)
    train(opt, params, 2)
    resumed, fresh = (torch.nn.Parameter(params[0].detach().clone()) for _ in range(2))
    theirs = case.torch([resumed])

    def load_and_step():
        theirs.load_state_dict(opt.state_dict())
        set_grads([resumed], 2)
        theirs.step()

    if case.name != "SGD":
        with pytest.raises((KeyError, ValueError, RuntimeError)):
            load_and_step()
        return
    # torch's SGD makes a buffer where it finds none: that can not be refused from here, but codes are no momentum.
    try:
        load_and_step()
    except (KeyError, ValueError, RuntimeError):
        return
    set_grads([fresh], 2)
    case.torch([fresh]).step()
    assert_same_bits(resumed, fresh)


def test_another_format_is_refused():
    params = parameters([(700,), (5,)])
    opt = optim.AdamW(params, **INT8)
    train(opt, params, 2)
    for version in (0, 2, 99, "1", None):
        bad = saved(opt.state_dict())
        bad["param_groups"][0]["int8_format"] = version
        bad["state"][0]["exp_avg_codes"] += 1
        for options in (INT8, {}):
            other, resumed = resume(ADAMW, opt, **options)
            train(other, resumed, 1)
            before = snapshot(other)
            with pytest.raises((ValueError, TypeError), match="int8_format"):
                other.load_state_dict(bad)
            assert_unchanged(other, before, version)
            train(other, resumed, 1, first=1)


def test_a_checkpoint_with_broken_codes_is_refused():
    def break_scales(state):
        state["exp_avg_scales"] = state["exp_avg_scales"][:-1]

    def drop_scales(state):
        del state["exp_avg_scales"]

    def drop_codes(state):
        del state["exp_avg_sq_codes"]

    def break_shape(state):
        state["exp_avg_codes"] = state["exp_avg_codes"][:-1]

    def break_dtype(state):
        state["exp_avg_codes"] = state["exp_avg_codes"].float()

    params = parameters([(5,), (700,)])
    opt = optim.AdamW(params, **INT8)
    train(opt, params, 2)
    for spoil in (break_scales, drop_scales, drop_codes, break_shape, break_dtype):
        for options in (INT8, {}):
            bad = saved(opt.state_dict())
            spoil(bad["state"][1])
            other, resumed = resume(ADAMW, opt, **options)
            before = [p.detach().clone() for p in resumed]
            set_grads(resumed, 2)
            with pytest.raises((ValueError, TypeError, RuntimeError), match="exp_avg"):
                other.load_state_dict(bad)
                other.step()
            for p, old in zip(resumed, before, strict=True):
                assert_same_bits(p.detach(), old, (spoil.__name__, options))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("name", ["AdamW8bit", "SGD8bit", "RMSprop8bit"])
def test_distributed_state_dicts(name):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    more = dict(momentum=0.9) if name == "SGD8bit" else {}

    def make(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(70, 70), torch.nn.Linear(70, 5))
        return model, getattr(optim, name)(model.parameters(), lr=0.01, **more)

    with torch.random.fork_rng():
        model, opt = make(0)
        params = list(model.parameters())
        train(opt, params, 3)
        other_model, other = make(1)
        other_model.load_state_dict(model.state_dict())
        state_dict = saved(get_optimizer_state_dict(model, opt))
        assert any(key.endswith("_codes") for key in state_dict["state"]["0.weight"])
        set_optimizer_state_dict(other_model, other, state_dict)
        assert_same(opt, other, name)
        for o, ps in ((opt, params), (other, list(other_model.parameters()))):
            train(o, ps, 2, first=3)
        assert_same(opt, other, name)


# What may change between two steps

STATE_DTYPES = (None, torch.float32, torch.bfloat16, torch.int8)


@KERNELS
@pytest.mark.parametrize(
    ("case", "first", "second", "dtype"), pairs(STATEFUL, STATE_DTYPES, STATE_DTYPES, NARROW[:2]), ids=str
)
def test_a_group_may_change_its_state_dtype(case, first, second, dtype):
    def act(opt, params, step):
        if step == 2:
            opt.param_groups[0]["state_dtype"] = second
        set_grads(params, step)
        opt.step()

    options = dict(min_int8_size=300, state_dtype=first)
    opts = run_both(case, lambda: parameters([(700,), (5,)], dtype), options, act=act)
    kept = parameters([(700,), (5,)], dtype)
    train(seeded(lambda: case.ours(kept, min_int8_size=300, state_dtype=torch.float32)), kept, 3)
    stored = {None: torch.float32 if first == torch.int8 else None}.get(second, second)
    for opt in opts:
        for p, q in zip(opt.param_groups[0]["params"], kept, strict=True):
            if stored is not None:
                small = stored == torch.int8 and p.numel() < 300
                assert_state(case, opt, p, torch.float32 if small else stored, (first, second))
            torch.testing.assert_close(p, q, rtol=0.1, atol=0.1, msg=lambda m: f"{case} {first} {second}: {m}")


def set_storage(opt, params):
    for state in opt.state.values():
        for name, t in state.items():
            if name != "step":
                t.set_(t.clone())


def odd_offset(opt, params):
    for state in opt.state.values():
        for name, t in state.items():
            if name != "step" and t.dim() == 1:
                state[name] = torch.cat([t[:1], t])[1:]


def swap_codes(opt, params):
    """The codes of two parameters of one shape change places."""
    a, b = (opt.state[p] for p in params[:2])
    for name in list(a):
        a[name], b[name] = b[name], a[name]


def swap_data(opt, params):
    for p in params:
        old, p.data = p.data, p.data.clone() * 2
        old.fill_(77)


def to_bfloat16(opt, params):
    for p in params:
        p.grad = None
        p.data = p.data.bfloat16()


def swap_tensors(opt, params):
    params[0].grad = None
    torch.utils.swap_tensors(params[0], torch.nn.Parameter(params[0].detach().clone() * 3))


def raise_min_size(opt, params):
    opt.param_groups[0]["min_int8_size"] = 400


def add_group(opt, params):
    extra = parameters([(300,)], seed=9)
    opt.add_param_group({"params": extra, "lr": 0.5, "min_int8_size": 300})
    params += extra


def drop_one(opt, params):
    if not isinstance(opt, torch.optim.Adagrad):
        opt.state.pop(params[0])


def plain_by_hand(opt, params):
    """Moments that a user put back as numbers."""
    state = opt.state[params[0]]
    for name in [n for n in state if n.endswith("_codes")]:
        whole = name.removesuffix("_codes")
        codes = state.pop(name)
        del state[f"{whole}_scales"]
        state[whole] = torch.full(codes.shape, 0.5)


def change_options(opt, params):
    for group in opt.param_groups:
        group["lr"] *= 0.1
        group["weight_decay"] = 0.3


CHANGES = [
    *NEUTRAL,
    set_storage,
    odd_offset,
    swap_codes,
    swap_data,
    to_bfloat16,
    swap_tensors,
    raise_min_size,
    add_group,
    drop_one,
    plain_by_hand,
    change_options,
]


@KERNELS
@pytest.mark.parametrize(("case", "change", "_"), in_turn(CODED, CHANGES, range(2)), ids=name_of)
def test_changes_between_steps(case, change, _):
    neutral = change in (set_storage, odd_offset)
    assert_change_is_honoured(case, lambda: parameters([(700,), (700,), (20, 15), (3,)]), INT8, change, neutral)


@pytest.mark.parametrize("case", CODED, ids=str)
def test_another_memory_format_between_steps(case, backend):
    """Codes follow their elements, not their places."""
    start = randn((4, 6, 5, 7), 0)
    for first, second in (
        (torch.contiguous_format, torch.channels_last),
        (torch.channels_last, torch.contiguous_format),
    ):
        p = torch.nn.Parameter(start.to(memory_format=first))
        opt = case.ours([p], backend=backend, **INT8)
        for step in range(2):
            take(opt, [p], step)
        wide, (q,) = plain(case, opt, backend=backend, state_dtype=torch.float32)
        p.grad = None
        p.data = p.data.contiguous(memory_format=second)
        set_strained([p], 2)
        set_strained([q], 2)
        rate = opt.param_groups[0]["lr"]
        opt.step()
        wide.step()
        what = (case, first, second)
        truth = {name: t for name, t in wide.state[q].items() if name != "step"}
        (mine,) = decoded(case, opt)
        for name, t in truth.items():  # twice through the map, and blocks of two kinds
            largest = t.abs().max()
            # A centered variance is a small difference of moments.
            bound = 0.5 if case.kwargs.get("centered") and name == "momentum_buffer" else 2 * 0.1
            assert (mine[name] - t).abs().max() <= bound * largest, (what, name)
            agrees = torch.corrcoef(torch.stack([mine[name].flatten(), t.flatten()]))[0, 1]
            assert agrees > 0.98, (what, name, agrees)
        moved = (p.detach() - q.detach()).abs().median()
        assert moved <= 0.2 * rate, (what, moved)
        # A checkpoint of it, for a model in the other format.
        other = torch.nn.Parameter(p.detach().contiguous(memory_format=first))
        resumed = case.ours([other], backend=backend, **INT8)
        resumed.load_state_dict(saved(opt.state_dict()))
        for name, t in decoded(case, resumed)[0].items():
            agrees = torch.corrcoef(torch.stack([mine[name].flatten(), t.flatten()]))[0, 1]
            assert agrees > 0.98, (what, name, agrees)
        for o, x in ((resumed, other), (opt, p)):
            take(o, [x], 3)
        assert_state(case, resumed, other, torch.int8, what)
        assert_state(case, opt, p, torch.int8, what)


def test_two_optimizers_in_two_threads():
    """Each gives what it gives alone."""
    cases = [CASES[0], CASES[14]]

    def work(opt, params):
        for step in range(3):
            take(opt, params, step)

    alone = []
    for case in cases:
        params = parameters([(1 << 17,), (1000,)])
        alone.append(case.ours(params, **INT8))
        work(alone[-1], params)
    together = [parameters([(1 << 17,), (1000,)]) for _ in cases]
    opts = [case.ours(params, **INT8) for case, params in zip(cases, together, strict=True)]
    threads = [threading.Thread(target=work, args=(o, p)) for o, p in zip(opts, together, strict=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(alone, opts, strict=True):
        assert_same(a, b)


def test_version_counters_are_bumped():
    p = torch.nn.Parameter(randn((300,), 0))
    opt = optim.AdamW([p], **INT8)
    train(opt, [p], 1)
    written = [p, *opt.state[p].values()]
    before = [t._version for t in written]
    train(opt, [p], 1)
    assert all(t._version > old for t, old in zip(written, before, strict=True))


@pytest.mark.parametrize("case", CODED, ids=str)
def test_a_skipped_step_changes_no_code(case, backend):
    params = parameters(BLOCKS)
    opt = case.ours(params, skip_nonfinite=True, backend=backend, **INT8)
    take(opt, params, 0)
    before = snapshot(opt)
    set_strained(params, 1)
    params[0].grad[0] = NAN
    opt.step()
    assert_unchanged(opt, before, case)
    assert int(opt.skipped_steps) == 1


# What is refused


# What replaces codes or scales; None: nothing.
BROKEN = {
    "codes of another dtype": ("codes", lambda t: t.to(torch.int16)),
    "codes of the other sign": ("codes", lambda t: t.view(torch.uint8 if t.dtype == torch.int8 else torch.int8)),
    "codes as numbers": ("codes", lambda t: t.float()),
    "codes of another shape": ("codes", lambda t: t.flatten()[:-1].clone()),
    "codes elsewhere": ("codes", lambda t: t.to("meta")),
    "codes are no tensor": ("codes", lambda t: t.tolist()),
    "codes are missing": ("codes", None),
    "scales of another dtype": ("scales", lambda t: t.double()),
    "half scales": ("scales", lambda t: t.half()),
    "too few scales": ("scales", lambda t: t[:-1].clone()),
    "too many scales": ("scales", lambda t: torch.cat([t, t])),
    "scales of another shape": ("scales", lambda t: t[None]),
    "scales elsewhere": ("scales", lambda t: t.to("meta")),
    "scales are missing": ("scales", None),
}


@pytest.mark.parametrize(("case", "kind", "backend"), in_turn(CODED, list(BROKEN), BACKENDS), ids=str)
def test_broken_state_is_refused(case, kind, backend):
    params = parameters([(300,), (20, 30)])
    opt = case.ours([("first", params[0]), ("second", params[1])], backend=backend, **INT8)
    train(opt, params, 2)
    part, replace = BROKEN[kind]

    def break_it(state, key):
        whole = state.pop(key)
        if replace is not None:
            state[key] = replace(whole)

    for name in moments(case):
        key = f"{name}_{part}"
        assert_broken_state_is_refused(opt, params, partial(break_it, key=key), "", (case, kind, key))


@KERNELS
@pytest.mark.parametrize("part", ["codes", "scales"])
def test_codes_that_share_memory_are_refused(part):
    params = parameters([(300,), (300,)])
    opt = optim.AdamW(params, backend=NATIVE, **INT8)
    train(opt, params, 2)
    assert_shared_memory_is_refused(opt, params, f"exp_avg_{part}")


def test_codes_and_scales_of_other_strides(backend):
    """Right, or refused and nothing changed."""
    p = torch.nn.Parameter(randn((40, 30), 0))
    opt = optim.AdamW([p], backend=backend, **INT8)
    train(opt, [p], 2)
    whole = saved(opt.state_dict())
    for change in ("scales", "codes"):
        opt.load_state_dict(whole)
        start = p.detach().clone()
        wide, (q,) = plain(ADAMW, opt)
        state = opt.state[p]
        if change == "scales":
            state["exp_avg_scales"] = torch.stack([state["exp_avg_scales"]] * 2, dim=1)[:, 0]
        else:
            state["exp_avg_codes"] = state["exp_avg_codes"].t().contiguous().t()
        set_grads([p, q], 2)
        q.grad = p.grad
        try:
            opt.step()
        except RuntimeError as error:
            assert "group 0 parameter 0" in str(error), change
            assert_same_bits(p.detach(), start, change)
            continue
        wide.step()
        if change == "scales":
            assert_same_bits(p.detach(), q.detach(), change)


# All together


@st.composite
def fuzzed(draw):
    case = draw(st.sampled_from(CASES))
    dtype = draw(st.sampled_from(NARROW))
    tensors = []
    for _ in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 20), max_size=3)))
        pads = [draw(st.integers(0, 2)) for _ in shape]
        steps = [draw(st.integers(1, 2)) for _ in shape]
        tensors.append((shape, pads, steps, draw(st.permutations(range(len(shape))))))
    per_group = draw(
        st.lists(
            st.fixed_dictionaries(
                dict(state_dtype=st.sampled_from(STATE_DTYPES), min_int8_size=st.sampled_from([1, 50, 300])),
                optional=dict(
                    clip_grad_value=st.sampled_from([0.01, 1.0]),
                    agc=st.sampled_from([0.1, 1.0]),
                    ema_decay=st.sampled_from([0.0, 0.9]),
                ),
            ),
            min_size=1,
            max_size=3,
        )
    )
    kept = draw(st.sampled_from([{}, *KEPT]))
    wide = draw(st.sampled_from([{}, dict(max_grad_norm=1.0), dict(skip_nonfinite=True)]))
    actions = draw(st.lists(st.sampled_from(["step", "nan", "zero", "none", "load", "int8"]), min_size=1, max_size=5))
    return case, dtype, tensors, per_group, {**kept, **wide}, actions


@KERNELS
@settings(max_examples=40, deadline=None, derandomize=True)
@given(fuzzed())
def test_fuzz(drawn):
    case, dtype, tensors, per_group, options, actions = drawn

    def make():
        rows = [
            torch.nn.Parameter(strided(randn(shape, i, dtype), pads, steps, order))
            for i, (shape, pads, steps, order) in enumerate(tensors)
        ]
        return rows + parameters([(257,)] * len(per_group), dtype, seed=20)  # a group is not empty

    def act(opt, params, step):
        action = actions[step]
        set_strained(params, step, (lambda i: True) if action == "none" else lambda i: (i + step) % 5 == 4)
        if action == "nan" and options.get("skip_nonfinite"):
            params[-1].grad = torch.full_like(params[-1], NAN)
        if action == "int8":
            opt.param_groups[0]["state_dtype"] = torch.int8
        if action == "load":
            opt.load_state_dict(saved(opt.state_dict()))
        opt.step_and_zero_() if action == "zero" else opt.step()

    run_both(case, make, options, per_group, steps=len(actions), act=act)


def test_moments_are_known():
    """The names that tell signs from squares are all that torch has."""
    assert {name for case in CASES for name in moments(case)} == set(SIGNED + SQUARES)


# Found in review


@pytest.mark.parametrize(
    "more", [{}, dict(param_rounding="kahan"), dict(master_weights=True), dict(param_rounding="stochastic")], ids=str
)
@pytest.mark.parametrize("trained", [False, True])
def test_options_set_by_hand_make_what_they_ask_for(more, trained):
    """Several at once, of rows that are converted and of rows that are not: as the reference does."""

    def act(opt, params, step):
        if step == trained:
            opt.param_groups[0].update(state_dtype=torch.int8, **more)
        take(opt, params, step)

    case = FIRST["AdamW"] if trained else FIRST["SGD"]
    run_both(case, lambda: parameters([(5000,), (100,)], torch.bfloat16), {}, steps=3, act=act)


@pytest.mark.parametrize("shape", [(64, 128), (64, 64)], ids=str)
@pytest.mark.parametrize("ours", [dict(state_dtype=torch.int8), dict()], ids=str)
def test_moments_of_another_shape_are_refused(shape, ours, backend):
    """Also where the number of elements is the same; and loading does not fail half way."""
    p, q = torch.nn.Parameter(randn(shape, 0)), torch.nn.Parameter(randn((128, 64), 1))
    saved_in = optim.AdamW([p], **(dict() if ours else dict(state_dtype=torch.int8)))
    take(saved_in, [p], 0)
    opt = optim.AdamW([q], lr=0.1, backend=backend, **ours)
    with pytest.raises(ValueError, match="group 0 parameter 0 .*exp_avg.*shape"):
        opt.load_state_dict(saved_in.state_dict())
    assert not opt.state
    opt.state[q] = saved_in.state[p]
    before = q.detach().clone()
    q.grad = torch.ones_like(q)
    with pytest.raises(RuntimeError, match="group 0 parameter 0 .*exp_avg.*shape"):
        opt.step()
    assert torch.equal(q, before)


def test_a_momentum_that_waits_goes_on_to_wait(backend):
    """Loaded or converted: only the first gradient enters it undampened."""
    kwargs = dict(lr=1.0, momentum=0.9, dampening=0.5, backend=backend)
    p = torch.nn.Parameter(torch.zeros(64, 64))
    first = optim.SGD([p], skip_nonfinite=True, **kwargs)
    p.grad = torch.full_like(p, INF)
    first.step()
    q = torch.nn.Parameter(torch.zeros(64, 64))
    second = optim.SGD8bit([q], **kwargs)
    second.load_state_dict(first.state_dict())
    first.param_groups[0]["state_dtype"] = torch.int8
    for opt, each in ((first, p), (second, q)):
        each.grad = torch.ones_like(each)
        opt.step()
        assert (each == -1).all()


def test_masters_of_another_dtype_become_float32(backend):
    p = torch.nn.Parameter(torch.ones(5000, dtype=torch.bfloat16))
    opt = optim.AdamW([p], master_weights=True, backend=backend)
    take(opt, [p], 0)
    opt.state[p]["master"] = opt.state[p]["master"].bfloat16()
    take(opt, [p], 1)
    assert opt.state[p]["master"].dtype == torch.float32


@pytest.mark.parametrize("n", (7, 257, 260, 300, 4099))
def test_padding_is_no_part_of_a_tile(n):
    """What rules make of padding, 0 / 0 where eps is 0, must not reach the scale."""
    results = []
    for backend in ("auto", "reference"):
        p = torch.nn.Parameter(randn((n,), 0))
        opt = optim.RMSprop(
            [p], lr=0.01, momentum=0.9, eps=0.0, state_dtype=torch.int8, min_int8_size=0, backend=backend
        )
        for step in range(3):
            p.grad = randn((n,), 1 + step) + 3.0
            opt.step()
        assert p.isfinite().all(), (n, backend)
        results.append(p.detach())
    assert_same_bits(*results, n)
