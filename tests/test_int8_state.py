"""8-bit optimizer state: what holds for any map of numbers to codes, the classes, and checkpoints of codes."""

from __future__ import annotations

import inspect
from functools import partial

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
    NUMBERS,
    STATEFUL,
    Case,
    assert_same_bits,
    copies_of,
    grouped,
    in_training,
    made,
    pairs,
    parameters,
    places,
    randn,
    refused,
    saved,
    set_grads,
    train,
    trained,
)
from low_precision import (
    ADAMW,
    BLOCKS,
    CODED,
    SGD,
    SIGNED,
    SQUARES,
    TILE,
    WEIGHTS,
    WITHOUT_CODES,
    assert_decoded_like,
    assert_same,
    assert_state,
    assert_states,
    blocks,
    copied,
    decoded,
    gradient,
    moments,
    plain,
    stepped,
    take,
)

from genopt_ext import optim
from genopt_ext.reference.rules import TOTALED


def zeros(n=3 * TILE):
    return torch.nn.Parameter(torch.zeros(n))


def test_moments_are_known():
    """The names that tell signs from squares are all that torch has."""
    assert {name for case in CASES for name in moments(case)} == {*SIGNED, *SQUARES}


# What is stored


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_bytes_per_parameter(memory_format):
    """In the tensors, in the memory behind them, and in a file; with codes in the parameter's memory format."""
    p = torch.nn.Parameter(randn((64, 64, 16, 16), 0).to(memory_format=memory_format))
    opt = optim.AdamW8bit([p], lr=1e-3)
    stepped(opt, randn(p.shape, 1))
    state = opt.state[p].values()
    assert sum(t.numel() * t.element_size() for t in state) <= 2.05 * p.numel()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state}
    assert sum(storages.values()) <= 2.05 * p.numel()
    assert_states(ADAMW, opt)


@pytest.mark.parametrize(("name", "how"), pairs([name for name in FIRST if name not in WITHOUT_CODES], list(COPIES)))
def test_classes(name, how):
    base, narrow = getattr(optim, name), getattr(optim, f"{name}8bit")
    assert narrow.__name__ == f"{name}8bit" and f"{name}8bit" in dir(optim)
    ours, theirs = (inspect.signature(c).parameters for c in (narrow, base))
    assert [(p.name, p.kind) for p in ours.values()] == [(p.name, p.kind) for p in theirs.values()]
    assert all(p.default == theirs[k].default for k, p in ours.items() if k != "state_dtype")
    case = Case(name, dict(momentum=0.9) if name == "SGD" else {})
    makes = (partial(made, f"{name}8bit", **case.kwargs), partial(made, name, **case.kwargs, state_dtype=torch.int8))
    opts = [trained(make, parameters([(5000,), (300,)]), 2) for make in makes]
    assert_same(*opts, name)
    for p, dtype in zip(places(opts[0]), (torch.int8, torch.float32), strict=True):
        assert_state(case, opts[0], p, "", dtype)
    twin = COPIES[how](opts[0])
    assert type(twin) is narrow
    assert_same(twin, opts[0])
    # What is asked for goes first, of all groups and of one.
    params = parameters([(5000,), (5000,)])
    groups = grouped(params, [{}, dict(state_dtype=torch.bfloat16)])
    opt = in_training(narrow(groups, **case.kwargs, state_dtype=torch.float32))
    train(opt, params, 1)
    for p, dtype in zip(params, (torch.float32, torch.bfloat16), strict=True):
        assert_state(case, opt, p, "", dtype)


@pytest.mark.parametrize("k", (0, 255, 256, -1))
@pytest.mark.parametrize("layout", ("contiguous", "slices", "transposed", "channels_last"))
def test_a_scale_belongs_to_a_block_in_memory(layout, k, backend):
    """A large gradient leaves its mark on its own block and on no other, in the order of memory."""
    start = {
        "contiguous": randn((1030,), 0),
        "slices": randn((5, 2, 160), 4),
        "transposed": randn((40, 30), 1).t(),
        "channels_last": randn((2, 6, 10, 10), 2).to(memory_format=torch.channels_last),
    }[layout]
    grad = torch.empty_like(start).copy_(randn(start.shape, 3).abs() + 0.1)
    states = []
    for large in (False, True):
        if large:
            grad.as_strided((grad.numel(),), (1,))[k] = 1e4
        opt = optim.AdamW([torch.nn.Parameter(start.clone())], backend=backend, **INT8)
        states.append((opt.state[stepped(opt, grad)], decoded(ADAMW, opt)[0]))
    hit = k % start.numel() // (160 if layout == "slices" else TILE)
    for name in ("exp_avg", "exp_avg_sq"):
        small, big = (state[f"{name}_scales"] for state, _ in states)
        assert (small != big).flatten().nonzero().flatten().tolist() == [hit]
        for b, (x, y) in enumerate(zip(*(blocks(numbers[name]) for _, numbers in states), strict=True)):
            if b != hit:
                assert_same_bits(x, y, (name, b))


# What holds for any map


@pytest.mark.parametrize(("case", "dtype", "backend"), pairs(CASES, NARROW, BACKENDS), ids=str)
@pytest.mark.narrow_state
def test_each_step_is_that_of_the_decoded_state(case, dtype, backend):
    """Load, rule, store: from what the codes say, the step is float32's to the bit; then each moment is rounded."""
    params = parameters(BLOCKS, dtype)
    opt = case.ours(params, backend=backend, **INT8)
    begun = case.name == "Rprop"  # whose step sizes begin in codes, some per cent off
    if begun:
        take(opt, params, 0)
    for step in range(begun, 4):
        wide, copies = plain(case, opt, backend=backend, state_dtype=torch.float32)
        for o, ps in ((opt, params), (wide, copies)):
            take(o, ps, step)
        for mine, p, q in zip(decoded(case, opt), params, copies, strict=True):
            assert_same_bits(p.detach(), q.detach(), (case, dtype, step))
            truth = {name: t for name, t in wide.state[q].items() if name not in NUMBERS}
            for name in WEIGHTS & truth.keys():
                assert_same_bits(opt.state[p][name], truth.pop(name), (case, dtype, step, name))
            assert_decoded_like(mine, truth, (case, dtype, step))
            if "step" in wide.state[q]:
                assert opt.state[p]["step"] == wide.state[q]["step"] == step + 1


@pytest.mark.parametrize("case", CODED, ids=str)
def test_zero_blocks_are_zeros(case, backend):
    opt = case.ours([torch.nn.Parameter(torch.ones(3 * TILE + 5))], backend=backend, **INT8)
    alive = slice(TILE, 2 * TILE)
    grads = torch.zeros(3, 3 * TILE + 5)
    grads[:, alive] = randn((3, TILE), 0)
    p = stepped(opt, *grads)
    for name, t in decoded(case, opt)[0].items():
        start = abs(opt.rule.initial_value(opt.param_groups[0], p, name))
        scales = opt.state[p][f"{name}_scales"]
        if not case.kwargs.get("weight_decay"):
            t[alive] = start
            torch.testing.assert_close(t, torch.full_like(t, start), rtol=0.02, atol=0)
            assert start or (scales[[0, 2, 3]] == 0).all(), name
        assert scales.isfinite().all(), name


@pytest.mark.parametrize("first", (0.0, -0.0))
@pytest.mark.parametrize("size", (5, TILE, 1000))
@pytest.mark.parametrize("last", (True, False))  # False: a whole block that begins with zeros
def test_dampening_knows_a_zero_from_a_beginning(first, size, last, backend):
    """Only the first step takes the whole gradient; a momentum of zero is a momentum."""
    kwargs = dict(lr=1.0, momentum=0.5, dampening=0.5)
    opt = optim.SGD([zeros(size)], skip_nonfinite=True, backend=backend, **kwargs, **INT8)
    start = torch.full((size,), first)
    if last:
        start[-1] = 4.0
    stepped(opt, INF)  # a step that is skipped is no beginning
    assert_same_bits(stepped(opt, start).detach(), 0.0 - start)
    truth = stepped(torch.optim.SGD([zeros(size)], foreach=False, **kwargs), start, 1.0)
    torch.testing.assert_close(stepped(opt, 1.0), truth)


def test_a_momentum_that_waits_goes_on_to_wait(backend):
    """Loaded or converted: only the first gradient enters it undampened."""
    kwargs = dict(lr=1.0, momentum=0.9, dampening=0.5, backend=backend)
    first = optim.SGD([zeros(4096)], skip_nonfinite=True, **kwargs)
    stepped(first, INF)
    second = optim.SGD8bit([zeros(4096)], **kwargs)
    second.load_state_dict(first.state_dict())
    first.param_groups[0]["state_dtype"] = torch.int8
    for opt in (first, second):
        assert (stepped(opt, 1.0) == -1).all()


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
    opts = [case.ours([zeros()], backend=backend, **options) for options in (INT8, {})]
    for o in opts:  # the decay of weights would hide small gradients
        o.param_groups[0]["weight_decay"] = 0.0
    powers = torch.linspace(*exponents, 3 * TILE)
    powers = powers[torch.randperm(3 * TILE, generator=torch.Generator("cpu").manual_seed(1))]
    grad = torch.pow(10.0, powers.double()).float() * randn((3 * TILE,), 4).sign()
    for step in range(12):
        p, twin = (stepped(o, 0.0 if step else grad) for o in opts)
        (mine,) = decoded(case, opts[0])
        for name, t in mine.items():
            assert t.isfinite().all(), (step, name)
            if name in SQUARES:
                assert (t >= 0).all(), (step, name)
                assert step or (t[opts[1].state[twin][name] > 0] > 0).all(), name
        assert p.isfinite().all(), step
    if exponents[1] > -19:  # also after many steps without a gradient
        assert all((mine[name][grad.abs() > 1e-15] > 0).all() for name in mine if name in SQUARES)


@pytest.mark.parametrize(
    ("case", "size", "backend"),
    pairs(CODED, [1e-45, 1e-42, 1e-38, 1e-30, 1e30, 3e38, 3.4028234663852886e38], BACKENDS),
    ids=str,
)
def test_denormal_and_huge_gradients_give_finite_codes(case, size, backend):
    """Wherever float32 state would be finite; squares that overflow are so in every dtype."""
    opt = case.ours([zeros(700)], backend=backend, **INT8)
    opt.param_groups[0]["lr"] = 1e-3
    for step in range(3):
        wide, _ = plain(case, opt, backend=backend, state_dtype=torch.float32)
        grad = (randn((700,), step).clamp(-1, 1) * size).float()
        grad[5] = size
        p, q = (stepped(o, grad) for o in (opt, wide))
        assert_same_bits(p.detach(), q.detach(), step)
        for name, t in decoded(case, opt)[0].items():
            scales = opt.state[p][f"{name}_scales"]
            for k, (x, truth) in enumerate(zip(blocks(t), blocks(wide.state[q][name]), strict=True)):
                finite = bool(truth.isfinite().all())
                assert finite or step > 0 or name in SQUARES, (step, name, k)
                assert not finite or (x.isfinite().all() and scales[k].isfinite()), (step, name, k)


@pytest.mark.parametrize(("case", "value", "backend"), pairs(CODED, [NAN, INF, -INF], BACKENDS), ids=str)
def test_nonfinite_gradients_do_not_vanish(case, value, backend):
    """Where float32 state would hold NaN or infinity, so does the block; the other blocks are as if there was none."""
    clean_grads = [randn((700,), step) for step in range(2)]
    bad_grads = [clean_grads[0], clean_grads[1].clone()]
    bad_grads[1][300] = value
    opts = [
        case.ours(parameters([(700,)]), backend=backend, state_dtype=dtype, min_int8_size=1)
        for dtype in (torch.int8, torch.float32, torch.int8)
    ]
    p, wide, clean = (stepped(o, *grads) for o, grads in zip(opts, (bad_grads, bad_grads, clean_grads), strict=True))
    mine, others = decoded(case, opts[0])[0], decoded(case, opts[2])[0]
    for name, t in mine.items():
        if not opts[1].state[wide][name][300].isfinite():
            assert not blocks(t)[1].isfinite().all(), name
    assert p[300].isfinite() == wide[300].isfinite()
    if type(opts[0]).rule.name in TOTALED:
        return  # the whole tensor feels it
    for k in (0, 2):
        for a, b in ((p, clean), *((mine[name], others[name]) for name in mine)):
            assert_same_bits(blocks(a)[k], blocks(b)[k], k)


def test_signed_moments_keep_their_order(backend):
    """A larger momentum does not decode to one smaller by more than a code, and the signs are treated alike."""
    grad = gradient(zeros(4 * TILE), 0)
    ours = []
    for g in (grad, -grad):
        opt = SGD.ours([zeros(4 * TILE)], backend=backend, **INT8)
        stepped(opt, g)
        ours.append(decoded(SGD, opt)[0]["momentum_buffer"])
    for k, (x, g) in enumerate(zip(blocks(ours[0]), blocks(grad), strict=True)):
        ordered = x[g.argsort()]
        # Neighbours may be rounded in different directions, by a code of 4 to 25 %.
        assert (ordered[1:] - ordered[:-1] >= -0.3 * ordered[:-1].abs() - 1e-3 * ordered.abs().max()).all(), k
        assert len(x.unique()) > 20, k
        torch.testing.assert_close(x.abs().max(), g.abs().max(), rtol=0.07, atol=0)
    torch.testing.assert_close(ours[1], -ours[0], rtol=0.05, atol=0)


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.narrow_state
def test_least_squares(name):
    """Trains about as well as with float32 state."""
    torch.manual_seed(0)
    x, truth = randn((256, 64), 0), randn((64, 80), 1)
    x = x * torch.linspace(0.2, 2.0, 64)  # directions of different curvature
    y = x @ truth
    others = dict(
        SGD=dict(lr=0.05, momentum=0.9),
        Adagrad=dict(lr=0.5),
        Adadelta=dict(lr=3.0, rho=0.99),
        ASGD=dict(lr=0.5),
        LARS=dict(lr=0.05, momentum=0.9),
        AdamWScheduleFree=dict(lr=0.3),
        RAdamScheduleFree=dict(lr=0.3),
        SGDScheduleFree=dict(lr=3.0),
    )
    options = others.get(name, dict(lr=0.03))
    losses = []
    for state_dtype in (torch.float32, torch.int8, torch.bfloat16):
        w = torch.nn.Parameter(torch.zeros(64, 80))
        opt = made(name, [w], **options, state_dtype=state_dtype)
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
    opt = optim.Adagrad([zeros(16 * TILE)], lr=1e-3, state_dtype=torch.int8)
    large = torch.arange(16 * TILE) % TILE == 7
    means = [0]
    for steps in (50, 50, 100):
        start = torch.where(large, 30.0, 1.0) if len(means) == 1 else 1.0
        stepped(opt, start, *[1.0] * (steps - 1))
        total = decoded(Case("Adagrad"), opt)[0]["sum"]
        means.append(total[~large].mean().item())
    assert means[1:] == pytest.approx([50, 100, 200], rel=0.3)
    assert means == sorted(set(means))
    assert total[large].mean().item() == pytest.approx(1099, rel=0.1)


def test_adagrad_sum_of_random_gradients():
    opt = optim.Adagrad([zeros(4 * TILE)], lr=1e-3, **INT8)
    grads = randn((200, 4 * TILE), 0) * torch.linspace(0.1, 1.0, 4 * TILE)
    stepped(opt, *grads)
    ratio = decoded(Case("Adagrad"), opt)[0]["sum"] / grads.square().sum(0)
    assert 0.8 < ratio.mean() < 1.25 and ratio.min() > 0.2 and ratio.max() < 4, (ratio.mean(), ratio.min(), ratio.max())


@pytest.mark.parametrize("factor", [0.1, 10.0])
@pytest.mark.parametrize("everywhere", [True, False])
def test_second_moment_follows_a_change_of_scale(everywhere, factor):
    """Also where one step's change is less than the distance of two codes, as others in the block hold the scale."""
    n = 2 * TILE
    opt = optim.AdamW([zeros(n)], lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, **INT8)
    changes = torch.full((n,), True) if everywhere else torch.arange(n) % 2 == 0
    grad = randn((n,), 0).sign() * torch.linspace(0.5, 1.5, n)
    for g, steps in ((grad, 300), (torch.where(changes, grad * factor, grad), 3000 if factor < 1 else 600)):
        stepped(opt, *[g] * steps)
        ratios = decoded(ADAMW, opt)[0]["exp_avg_sq"] / g.square()
        for which in (changes, ~changes):
            assert not which.any() or 0.5 < ratios[which].mean() < 2.0, steps


# Checkpoints


@pytest.mark.parametrize("case", STATEFUL, ids=str)
@pytest.mark.narrow_state
def test_codes_load_into_float32_and_on_into_torch(case):
    opt = trained(partial(case.ours, **INT8), parameters([(700,), (30, 40)]))
    other, resumed = plain(case, opt)
    copies = copies_of(resumed)
    theirs = case.torch(copies)
    theirs.load_state_dict(saved(other.state_dict()))
    train(other, resumed, 1, first=3)
    train(theirs, copies, 1, first=3)
    torch.testing.assert_close(resumed, copies)


@pytest.mark.parametrize("case", CODED, ids=str)
def test_torch_does_not_take_codes_for_numbers(case):
    opt = trained(partial(case.ours, **INT8), parameters([(700,)]), 2)
    resumed, fresh = copies_of(places(opt) * 2)
    theirs = case.torch([resumed])
    try:
        theirs.load_state_dict(opt.state_dict())
        train(theirs, [resumed], 1, first=2)
    except (KeyError, ValueError, RuntimeError):
        return
    # torch's SGD makes a buffer where it finds none: that can not be refused from here, but codes are no momentum.
    assert case.name == "SGD"
    train(case.torch([fresh]), [fresh], 1, first=2)
    assert_same_bits(resumed, fresh)


@pytest.mark.parametrize("options", (INT8, {}), ids=str)
@pytest.mark.parametrize("version", (0, 3, 99, "1", None))
def test_another_format_is_refused(version, options):
    opt = trained(partial(optim.AdamW, **INT8), parameters([(700,), (5,)]), 2)
    bad = saved(opt.state_dict())
    bad["param_groups"][0]["int8_format"] = version
    bad["state"][0]["exp_avg_codes"] += 1
    other, resumed = copied(ADAMW, opt, **options)
    train(other, resumed, 1)
    refused(other, "int8_format", ValueError, lambda: other.load_state_dict(bad))
    train(other, resumed, 1, first=1)


# What may change between two steps


# Not Rprop, where a sign that codes have lost makes another step size.
MOVED = [case for case in CODED if case.name != "Rprop"]


@pytest.mark.parametrize(
    ("case", "first", "backend"), pairs(MOVED, [torch.contiguous_format, torch.channels_last], BACKENDS), ids=str
)
def test_another_memory_format_between_steps(case, first, backend):
    """Codes follow their elements, not their places."""
    second = torch.channels_last if first == torch.contiguous_format else torch.contiguous_format
    p = torch.nn.Parameter(randn((4, 6, 5, 7), 0).to(memory_format=first))
    opt = case.ours([p], backend=backend, **INT8)
    for step in range(2):
        take(opt, [p], step)
    wide, (q,) = plain(case, opt, backend=backend, state_dtype=torch.float32)
    p.grad = None
    p.data = p.data.contiguous(memory_format=second)
    for o, x in ((opt, p), (wide, q)):
        take(o, [x], 2)
    moved = (p.detach() - q.detach()).abs().median()
    assert moved <= 0.2 * opt.param_groups[0]["lr"], moved
    (mine,) = decoded(case, opt)
    # A checkpoint of it, for a model in the other format.
    other = torch.nn.Parameter(p.detach().contiguous(memory_format=first))
    resumed = case.ours([other], backend=backend, **INT8)
    resumed.load_state_dict(saved(opt.state_dict()))
    (again,) = decoded(case, resumed)
    for name, t in mine.items():  # twice through the map, and blocks of two kinds
        truth = wide.state[q][name]
        # A centered variance is a small difference of moments, Adadelta feeds its updates back, and ADOPT averages what
        # it has divided by a moment.
        centered = case.kwargs.get("centered") and name == "momentum_buffer"
        fed_back = name == "acc_delta" or centered or (case.name == "ADOPT" and name == "exp_avg")
        bound = 0.5 if fed_back else 2 * 0.1
        assert (t - truth).abs().max() <= bound * truth.abs().max(), name
        for like in (truth, again[name]):
            agrees = torch.corrcoef(torch.stack([t.flatten(), like.flatten()]))[0, 1]
            assert agrees > 0.98, (name, agrees)
    for o, x in ((resumed, other), (opt, p)):
        take(o, [x], 3)
        assert_states(case, o)


@pytest.mark.parametrize("part", ("scales", "codes"))
def test_codes_and_scales_of_other_strides(part, backend):
    """Right, or refused and nothing changed."""
    p = torch.nn.Parameter(randn((40, 30), 0))
    opt = trained(partial(optim.AdamW, backend=backend, **INT8), [p], 2)
    start = p.detach().clone()
    wide, (q,) = plain(ADAMW, opt)
    state = opt.state[p]
    if part == "scales":
        state["exp_avg_scales"] = torch.stack([state["exp_avg_scales"]] * 2, dim=1)[:, 0]
    else:
        state["exp_avg_codes"] = state["exp_avg_codes"].t().contiguous().t()
    set_grads([p, q], 2)
    q.grad = p.grad
    try:
        opt.step()
    except RuntimeError as error:
        assert "group 0 parameter 0" in str(error)
        assert_same_bits(p.detach(), start)
        return
    wide.step()
    if part == "scales":
        assert_same_bits(p.detach(), q.detach())
