"""Weights of 16 bits: stochastic rounding, Kahan's compensation, float32 masters; and gradients of other dtypes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import (
    BACKENDS,
    CASES,
    FIRST,
    INF,
    INT8,
    NAN,
    NARROW,
    NATIVE,
    SIXTEEN,
    assert_same_bits,
    made,
    pairs,
    parameters,
    places,
    randn,
    refused,
    set_grads,
    trained,
)
from low_precision import (
    KEPT,
    SOME,
    STATES,
    assert_same,
    needs_grad_dtype,
    run_one,
    seeded,
    set_strained,
    stepped,
    take,
)

from genopt_ext import optim

STOCHASTIC, KAHAN, MASTER = KEPT


def full(value, dtype=torch.float32, size=2048):
    return torch.nn.Parameter(torch.full((size,), value, dtype=dtype))


def tiny_steps(dtype, **options):
    """A weight of 1.0 after 300 steps of 1e-4 downwards, and its state."""
    opt = seeded(lambda: optim.AdamW([full(1.0, dtype)], lr=1e-4, **options))
    p = stepped(opt, *[0.5] * 300)
    return p, opt.state[p]


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_300_small_steps(dtype, state):
    truth = tiny_steps(torch.float32)[0][0].item()
    assert 0.968 < truth < 0.971
    spacing = torch.finfo(dtype).eps / 2  # below 1
    slack = 2e-5 if state.get("state_dtype") == torch.float32 else 2e-3  # moments of 16 or 8 bits are not exact
    nearest, _ = tiny_steps(dtype, **state)
    assert (nearest == 1.0).all()
    p, kept = tiny_steps(dtype, **KAHAN, **state)
    assert (p - truth).abs().max() <= spacing + slack
    assert (p.double() + kept["compensation"].double() - truth).abs().max() <= 1.5e-3 + slack
    p, kept = tiny_steps(dtype, **MASTER, **state)
    assert (kept["master"] - truth).abs().max() <= slack
    assert_same_bits(p.detach(), kept["master"].to(dtype))
    p, _ = tiny_steps(dtype, **STOCHASTIC, **state)
    chance = 1e-4 / spacing
    sigma = spacing * (300 * chance * (1 - chance) / p.numel()) ** 0.5
    assert abs(p.double().mean().item() - truth) <= 5 * sigma + slack
    assert p.unique().numel() > 4


@pytest.mark.parametrize(("name", "kept", "dtype"), pairs(list(FIRST), KEPT, SIXTEEN), ids=str)
def test_small_steps_of_every_class(name, kept, dtype):
    ends = []
    lr = 1e-2 if name == "Adadelta" else 1e-4
    more = dict(d0=1.0, growth_rate=1.0) if name == "Prodigy" else {}
    for run, options in ((torch.float32, {}), (dtype, kept)):
        opt = seeded(lambda: made(name, [full(1.0, run)], lr=lr, **more, **options))  # noqa: B023
        p = stepped(opt, *[1.0] * 100)
        whole = opt.state[p].get("master", p).double() + opt.state[p].get("compensation", torch.zeros(())).double()
        ends.append(whole.mean().item())
    moved = 1 - ends[0]
    assert moved > 5e-4
    # 16-bit moments are not exact either; the stochastic mean has its spread
    assert ends[1] == pytest.approx(ends[0], abs=0.1 * moved + 1e-3)


# Stochastic rounding


def drift(dtype, start, change, steps=1, **more):
    """SGD whose every step adds ``change``, which has to be exact in the dtype."""
    assert torch.tensor(change, dtype=dtype).item() == change
    opt = seeded(lambda: optim.SGD([full(start, dtype, 50_000)], lr=1.0, **STOCHASTIC, **more))
    return stepped(opt, *[-change] * steps).detach().double()


@pytest.mark.parametrize(
    ("part", "start", "dtype", "backend"),
    pairs([2.0**-6, 0.25, 0.5, 0.875, -0.25], [1.0, -1.0], SIXTEEN, BACKENDS),
    ids=str,
)
def test_one_rounding_is_unbiased(dtype, start, part, backend):
    """Only the two neighbours, each as often as it is near; neighbours in memory independent of one another."""
    spacing = torch.finfo(dtype).eps
    start *= 1.5  # away from the power of two, where the distance changes
    p = drift(dtype, start, part * spacing, backend=backend)
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
    steps, spacing = 200, torch.finfo(dtype).eps
    p = drift(dtype, 1.0, change, steps)
    chance = change / spacing
    variance = steps * spacing**2 * chance * (1 - chance)
    n = p.numel()
    assert abs(p.mean().item() - (1 + steps * change)) < 5 * (variance / n) ** 0.5, (dtype, p.mean())
    assert p.var().item() == pytest.approx(variance, rel=0.08), (dtype, p.var(), variance)
    together = torch.corrcoef(torch.stack([p[1:], p[:-1]]))[0, 1]
    assert abs(together) < 6 / n**0.5, (dtype, together)


@pytest.mark.parametrize("start", [0, 5, -5])
def test_subnormal_numbers_are_rounded_without_bias(start, backend):
    tiny = 2.0**-24  # the distance of float16's subnormal numbers
    p = full(start * tiny, torch.float16, 20_000)
    stepped(seeded(lambda: optim.SGD([p], lr=0.25, backend=backend, **STOCHASTIC)), -tiny)
    units = p.detach().double() / tiny - start
    assert ((units == 0) | (units == 1)).all(), units.unique()
    assert abs(units.mean().item() - 0.25) < 5 * (0.25 * 0.75 / 20_000) ** 0.5, units.mean()


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
            assert_same_bits(stepped(opt, 0.0).detach(), before)


def test_what_a_dtype_has_is_not_rounded(backend):
    """Every finite fp16 number; of the subnormal ones above 255, one in 512 draws moved some."""
    numbers = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)
    p = torch.nn.Parameter(torch.cat([numbers.repeat(2), -numbers.repeat(2)]))
    before = p.detach().clone()
    for seed in range(8):
        opt = seeded(lambda: optim.SGD([p], lr=1.0, backend=backend, **STOCHASTIC), seed)
        assert_same_bits(stepped(opt, 0.0).detach(), before, seed)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("kept", "dtype", "backend"), pairs(KEPT, SIXTEEN, BACKENDS), ids=str)
def test_large_numbers_do_not_become_nan(dtype, kept, backend, sign):
    largest = torch.finfo(dtype).max

    def make(value):
        return optim.SGD([full(sign * value, dtype, 3000)], lr=1.0, backend=backend, **kept)

    p = stepped(make(largest), -sign * largest / 8192)  # less than half of the distance to infinity
    assert not p.isnan().any() and (p * sign >= largest).all()
    assert kept == STOCHASTIC or (p == sign * largest).all()
    opt = make(largest)
    for _ in range(3):
        assert (stepped(opt, -sign * largest) == sign * INF).all()
    # Below the largest number nothing overflows.
    opt = make(largest / 2)
    for step in range(3):
        assert stepped(opt, randn((3000,), step, dtype) * (largest / 64)).isfinite().all()


@pytest.mark.parametrize(
    ("kept", "value", "dtype", "backend"), pairs(KEPT, [NAN, INF, -INF], SIXTEEN, BACKENDS), ids=str
)
def test_nonfinite_gradients_reach_their_own_element_alone(kept, value, dtype, backend):
    results = []
    for bad in (True, False):
        p = torch.nn.Parameter(randn((700,), 0, dtype))
        opt = seeded(lambda: optim.SGD([p], lr=0.1, momentum=0.9, backend=backend, **kept))  # noqa: B023
        grads = [randn(p.shape, 1 + step, dtype) for step in range(3)]
        if bad:
            grads[1][300] = value
        results.append(stepped(opt, *grads).detach())
    assert not results[0][300].isfinite()
    others = torch.arange(700) != 300
    assert_same_bits(results[0][others], results[1][others])


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
    means = (places(opt)[0].double().mean() for opt in (first, others[0]))
    torch.testing.assert_close(*means, atol=0.05, rtol=0)
    assert "rounding_seed" not in case.ours(parameters([(3,)], dtype)).param_groups[0]


def test_the_first_element_and_every_step_draw_anew():
    """Random bits differ from step to step, and from element to element at any distance in a small tensor."""
    walks = []
    p = full(1.5, torch.bfloat16, 300)
    opt = optim.SGD([p], lr=1.0, **STOCHASTIC)
    for _ in range(64):
        p.data.fill_(1.5)
        walks.append(stepped(opt, 2.0**-8) == 1.5)
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


def test_masters_of_another_dtype_become_float32(backend):
    opt = trained(partial(optim.AdamW, master_weights=True, backend=backend), parameters([(5000,)], torch.bfloat16), 1)
    (state,) = opt.state.values()
    state["master"] = state["master"].bfloat16()
    opt.step()
    assert state["master"].dtype == torch.float32


@pytest.mark.parametrize(("case", "dtype", "backend"), pairs(SOME, SIXTEEN, BACKENDS), ids=str)
def test_kahan_follows_float32(case, dtype, backend):
    """Closer than the 16-bit weight alone can be."""
    start = randn((700,), 0, dtype) + 2
    opts = [
        case.ours([torch.nn.Parameter(start.to(run).clone())], backend=backend, state_dtype=torch.float32, **more)
        for run, more in ((dtype, KAHAN), (dtype, {}), (torch.float32, {}))
    ]
    for opt in opts:
        opt.param_groups[0]["lr"] = 1e-3 if case.name != "SGD" else 1e-4
        (p,) = places(opt)
        stepped(opt, *(randn(p.shape, step, dtype).to(p.dtype) for step in range(60)))
    weight, nearest, truth = (places(opt)[0].detach().double() for opt in opts)
    whole = weight + opts[0].state[places(opts[0])[0]]["compensation"].double()
    kahan, nearest = ((t - truth).square().mean().sqrt().item() for t in (whole, nearest))
    assert kahan < 0.2 * nearest
    # The weight is the sum, rounded.
    assert (weight - truth).abs().max() < torch.finfo(dtype).eps * 4


# Gradients of another dtype


@needs_grad_dtype
@pytest.mark.parametrize(("case", "dtype", "backend"), pairs(SOME, NARROW, BACKENDS), ids=str)
def test_gradients_of_another_dtype_are_not_rounded(case, dtype, backend):
    """A 16-bit gradient counts as the float32 number that it is."""

    def act(opt, params, step, grad_dtype):
        params[0].grad_dtype = grad_dtype
        params[0].grad = randn((300,), step, torch.bfloat16).to(grad_dtype)
        opt.step()

    acts = (partial(act, grad_dtype=grad_dtype) for grad_dtype in (torch.float32, torch.bfloat16))
    opts = (run_one(case, lambda: parameters([(300,)], dtype), act=act, backend=backend) for act in acts)
    assert_same_bits(*map(places, opts))


@needs_grad_dtype
@pytest.mark.parametrize(("start", "end"), [(0.0, -(2.0**12)), (2.0**12, -1.0)])
def test_float32_gradients_count_as_they_are(start, end, backend):
    """What bfloat16 could not say; rounded once, at the end."""
    p = full(start, torch.bfloat16)
    p.grad_dtype = torch.float32
    p.grad = torch.full(p.shape, 1 + 2.0**-12)
    optim.SGD([p], lr=2.0**12, backend=backend).step()
    assert (p == end).all()


@needs_grad_dtype
@pytest.mark.parametrize(
    ("case", "dtypes", "backend"),
    pairs(SOME, [*((d, torch.float64) for d in NARROW), *((torch.float64, d) for d in NARROW)], BACKENDS),
    ids=str,
)
def test_mixes_with_float64_are_refused(case, dtypes, backend):
    dtype, grad_dtype = dtypes
    params = parameters([(5,), (300,)], dtype)
    opt = trained(partial(case.ours, backend=backend), params, 1)
    set_grads(params, 1)
    params[1].grad = None
    params[1].grad_dtype = grad_dtype
    params[1].grad = randn((300,), 1, grad_dtype)
    message = rf"group 0 parameter 1 \(shape \[300\]\).*{grad_dtype}.*{dtype}|{dtype}.*{grad_dtype}"
    refused(opt, message, (RuntimeError, TypeError))


@pytest.fixture
def mesh():
    """Of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.skipif(NATIVE != "cpu", reason="one device is enough: the reference serves them")
@pytest.mark.parametrize(
    ("options", "like"), [(INT8, STATES[1]), (KAHAN, KAHAN), (MASTER, MASTER), (STOCHASTIC, STOCHASTIC)]
)
def test_dtensors(options, like, mesh):
    """Steps of a DTensor are those of the tensor, but that 8-bit state is float32."""
    from torch.distributed.tensor import Shard, distribute_tensor

    (q,) = parameters([(30, 7)], torch.bfloat16)
    p = torch.nn.Parameter(distribute_tensor(q.detach().clone(), mesh, [Shard(0)]))
    opts = [optim.AdamW([p], lr=0.01, **options), optim.AdamW([q], lr=0.01, **like)]
    for opt in opts:
        opt.param_groups[0]["rounding_seed"] = 5
    for step in range(3):
        q.grad = randn((30, 7), step + 1, torch.bfloat16)
        p.grad = distribute_tensor(q.grad, mesh, [Shard(0)])
        for opt in opts:
            opt.step()
    assert_same_bits(p.full_tensor().detach(), q.detach(), options)
