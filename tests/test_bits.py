"""The same bits from kernels and reference: dtypes, sizes, threads, instruction sets, layouts, non-finite values."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import product

import hypothesis.strategies as st
import pytest
import torch
from cases import (
    CASES,
    DEVICE,
    FIRST,
    INT8,
    KERNELS,
    NAN,
    NARROW,
    NATIVE,
    NON_FINITE,
    SIZES,
    STATEFUL,
    STORAGE,
    STORED,
    Case,
    assert_same_bits,
    assert_same_state,
    grouped,
    in_turn,
    layouts,
    pairs,
    parameters,
    places,
    randn,
    saved,
    set_grads,
    stored,
    strided,
    train,
)
from hypothesis import given, settings
from low_precision import (
    ADAMW,
    BLOCKS,
    CODED,
    KEPT,
    MIXED,
    SOME,
    STATE_DTYPES,
    TILE,
    WIDE,
    assert_same,
    assert_state,
    assert_states,
    moments,
    needs_grad_dtype,
    run_both,
    run_one,
    seeded,
    set_strained,
    stepped,
    take,
    walk,
)

from genopt_ext import _backend, optim

CAPABILITIES = [] if _backend.native is None else _backend.native.cpu_capabilities()

pytestmark = KERNELS

# Not float64: torch's square root of it is not always exactly rounded.
EXACT = [replace(storage, dtypes=[d for d in storage.dtypes if d != torch.float64]) for storage in STORAGE]
PLAIN, NARROWED = EXACT[0], EXACT[1:]


@pytest.mark.parametrize(
    ("case", "storage", "dtype"), [*product(CASES, [PLAIN], PLAIN.dtypes), *stored(CASES, storages=NARROWED)], ids=str
)
def test_kernels_equal_reference(case, storage, dtype):
    """For each loop of a CPU, which rule, what is kept, dtype and state choose together, see digests.py."""
    shapes = [(n,) for n in SIZES] + [(), (3, 5, 7), (1, 64)]

    def act(opt, params, step):
        old = [p.detach().clone() for p in params]
        (take if step % 2 else walk)(opt, params, step)
        # lr * update may be below one rounding of a 16-bit parameter; elsewhere every element moves.
        if step == case.still and dtype in (torch.float32, torch.complex64):
            assert all((p.detach() != before).all() for p, before in zip(params, old, strict=True)), case

    for opt in run_both(case, lambda: parameters(shapes, dtype), storage.options, steps=5, act=act):
        assert_states(case, opt)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_agrees_with_reference(case, dtype):
    def close(a, b, what):
        torch.testing.assert_close(places(a), places(b), rtol=1e-13, atol=1e-13, msg=lambda text: f"{what}: {text}")

    run_both(case, lambda: parameters([(n,) for n in SIZES], dtype), act=walk, same=close)


@pytest.mark.parametrize(
    ("case", "wide", "storage", "dtype"), stored(STATEFUL, WIDE, storages=[STORED["int8"], *MIXED]), ids=str
)
def test_same_bits_on_the_gradient_path(case, wide, storage, dtype):
    """Also when the very first step is skipped."""
    shapes = [*BLOCKS, (20, 30), (0,)]
    options = {**storage.options, **wide}
    run_both(case, lambda: parameters(shapes, dtype), options, steps=5, act=partial(take, wide=wide))


@pytest.mark.parametrize("storage", [STORED[name] for name in ("stochastic", "int8", "bfloat16 state")], ids=str)
def test_late_steps(storage):
    """What is drawn at a step is drawn from all of its digits."""

    def act(opt, params, step):
        for p in params if step else ():
            opt.state[p]["step"].fill_(float([0, 255, 511, 65_535, 2**24 - 2][step]))
        take(opt, params, step)

    run_both(ADAMW, lambda: parameters(BLOCKS, torch.bfloat16), storage.options, steps=5, act=act)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_elements_do_not_depend_on_where_they_stand(case):

    p = stepped(case.ours([torch.nn.Parameter(torch.full((1031,), 0.5))]), 0.3, -0.7, 0.1)
    assert (p == p[0]).all(), case


CPU_KERNELS = pytest.mark.skipif(NATIVE != "cpu", reason="CPU kernels")


@pytest.fixture(scope="module")
def digests_of_reference(succeeds):
    return digests_in(succeeds, GENOPT_BACKEND="reference")


def digests_in(succeeds, **env):
    return json.loads(succeeds("import json, digests; print(json.dumps(digests.digests()))", **env))


@CPU_KERNELS
@pytest.mark.parametrize(
    ("capability", "tuning"),
    [*((c, "prefetch=2,norm=8") for c in CAPABILITIES), (CAPABILITIES[0], "prefetch=0,norm=0")],
)
def test_same_bits_on_every_instruction_set(capability, tuning, succeeds, digests_of_reference):
    found = digests_in(succeeds, GENOPT_CPU_CAPABILITY=capability, GENOPT_CPU_TUNING=tuning)
    assert found.keys() == digests_of_reference.keys()
    assert [name for name, digest in found.items() if digest != digests_of_reference[name]] == []


@CPU_KERNELS
@pytest.mark.parametrize(
    ("storage", "dtype"),
    [*((PLAIN, d) for d in (torch.float32, torch.float64, torch.bfloat16)), *stored(storages=[STORED["int8"], *MIXED])],
    ids=str,
)
def test_same_bits_with_1_to_64_threads(storage, dtype, set_threads):
    """And run after run; of rows that begin and end within a thread's part, and steps that measure, clip, average and
    zero."""
    opts = []
    for threads in (1, 2, 5, 64, 2):
        set_threads(threads)
        params = parameters([(300_001,), (64,), (700, 700), (5,), *[(64,)] * 20], dtype)
        groups = grouped(params, [{}, dict(agc=0.1)])
        options = dict(max_grad_norm=1.0, ema_decay=0.9, backend=NATIVE, **storage.options)
        opts.append(seeded(lambda: CASES[6].ours(groups, **options)))  # noqa: B023
        set_grads(params, 0)
        opts[-1].step()
        opts[-1].step_and_zero_()
    for opt in opts[1:]:
        assert_same(opts[0], opt)


@pytest.mark.parametrize(
    ("case", "layout", "storage", "dtype"),
    stored([CASES[2], CASES[10], CASES[14], CASES[16]], list(layouts()), storages=EXACT),
    ids=str,
)
def test_layouts(case, layout, storage, dtype):
    """Gradients of other strides, expanded ones too; nothing beside a view is written."""
    made = []

    def make():
        t = layouts(dtype)[layout]
        made.append((t, t._base.clone() if t._base is not None else None))
        return [torch.nn.Parameter(t)]

    def act(opt, params, step):
        (p,) = params
        grad = randn((1,) * p.dim() if step == 2 else p.shape, step, dtype)
        p.grad = grad.expand(p.shape)
        if step == 1:
            p.grad = torch.empty_strided(p.shape, p.stride(), dtype=dtype).copy_(grad)
        opt.step()

    opts = run_both(case, make, storage.options, act=act)
    for opt, (ours, before) in zip(opts, made, strict=True):
        assert_states(case, opt, layout)
        assert places(opt)[0].stride() == layouts(dtype)[layout].stride()
        if before is not None:
            after = ours._base.clone()
            for t in (before, after):
                t.as_strided(ours.shape, ours.stride(), ours.storage_offset()).zero_()
            assert_same_bits(after, before, (case, layout, storage))
    if storage.name in ("plain", "float32 state", "kahan", "masters"):  # codes and random bits go by places in memory
        made_dense = [torch.nn.Parameter(layouts(dtype)[layout].contiguous())]
        contiguous = run_one(case, lambda: made_dense, storage.options, act=act)
        assert_same_bits(places(opts[0]), places(contiguous), (case, layout, storage))


@pytest.mark.skipif(NATIVE != "cpu", reason="a GPU can not access such memory")
def test_misaligned_memory():
    """A tensor whose memory does not even start at a multiple of its element size."""

    def make():
        odd = torch.frombuffer(bytearray(4 * 1000 + 1), dtype=torch.float32, offset=1, count=1000)
        return [odd.copy_(randn((1000,), 0))]

    run_both(CASES[0], make)


@pytest.mark.parametrize(
    ("case", "storage", "dtype"),
    stored(
        CASES, storages=[replace(storage, dtypes=[d for d in storage.dtypes if d in NARROW]) for storage in STORAGE]
    ),
    ids=str,
)
def test_non_finite_and_extreme_values(case, storage, dtype):
    """In blocks of their own, in one with others, as weights too, and with absurd learning rates."""
    values = torch.tensor([*NON_FINITE, 65504.0, -65504.0, 3.3895e38, 6e-8, -6e-8, 6e-5])
    finite = values[values.isfinite()]
    spread = [values.repeat_interleave(40), values.repeat(60), finite.repeat_interleave(TILE)]

    def act(opt, params, step):
        for p, grad in zip(params, [spread[0], *spread], strict=True):
            p.grad = grad.roll(step).to(dtype)
        for group in opt.param_groups if step > 1 else ():
            group["lr"] = (0.1, 1e30, 3e38, 0.0)[step - 2]
        opt.step()

    def make():
        return [torch.nn.Parameter(values.repeat(40).to(dtype)), *parameters([t.shape for t in spread], dtype)]

    run_both(case, make, storage.options, steps=6, act=act)


def test_huge_gradient_does_not_freeze_a_parameter():
    opt = CASES[0].ours([torch.nn.Parameter(torch.zeros(3))])
    p = stepped(opt, 1e20)  # its square overflows
    assert torch.isfinite(opt.state[p]["exp_avg_sq"]).all() and torch.isfinite(p).all()


def test_centered_rmsprop_of_a_constant_gradient_is_finite():
    opt = Case("RMSprop", dict(centered=True, alpha=0.5)).ours([torch.nn.Parameter(torch.zeros(1000))])
    assert torch.isfinite(stepped(opt, *[randn((1000,), 0)] * 200)).all()


@CPU_KERNELS
def test_denormals_do_not_depend_on_the_thread(set_threads):
    """The caller's flush-to-zero mode holds on every thread for as long as the step runs."""
    p = torch.nn.Parameter(torch.zeros(1 << 18))
    opt = Case("SGD", dict(lr=1.0)).ours([p])
    set_threads(4)
    for flush in (False, True, False, True):  # first without: threads begin in the mode of the one that makes them
        p.data.zero_()
        p.grad = torch.full_like(p, -1e-40)  # while none are flushed
        assert p.grad.any()
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor can not flush denormals")
        try:
            opt.step()
        finally:
            torch.set_flush_denormal(False)
        assert (p == (0.0 if flush else p.grad[0].neg())).all(), flush
        # By torch's threads:
        assert_same_bits((p.grad * 0.5).view(torch.int32), p.grad[:1].mul(0.5).view(torch.int32).expand(1 << 18))


AFTER_FORK = """
import os, signal, torch
from genopt_ext import optim, quant
torch.set_num_threads(2)
n = 1 << 18
grad = torch.linspace(-1, 1, n)
params = [torch.zeros(n) for _ in range(2)]
codes = [torch.zeros(n, dtype=torch.int8) for _ in range(2)]
scales = [torch.zeros(()) for _ in range(2)]
params[1].share_memory_()
codes[1].share_memory_()
optimizers = [optim.AdamW([p], lr=0.1, backend="cpu") for p in params]
def step_and_quantize(i):
    optimizers[i].step()
    quant.quantize(params[i], out=(codes[i], scales[i]))
for i, p in enumerate(params):
    p.grad = grad
    step_and_quantize(i)
child = os.fork()
if not child:
    signal.alarm(10)
    step_and_quantize(1)
    os._exit(0)
step_and_quantize(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
for one, other in (params, codes):
    assert one.any() and torch.equal(one, other)
"""


@CPU_KERNELS
def test_a_forks_child_goes_on_without_its_parents_threads(succeeds):
    succeeds(AFTER_FORK)


@st.composite
def fuzzed(draw):
    tensors = []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 9), max_size=4) | st.lists(st.integers(0, 20), max_size=3))
        pads = [draw(st.integers(0, 2)) for _ in shape]
        steps = [draw(st.integers(1, 3)) for _ in shape]
        tensors.append((shape, pads, steps, *(draw(st.permutations(range(len(shape)))) for _ in range(2))))
    own = st.fixed_dictionaries(
        dict(state_dtype=st.sampled_from(STATE_DTYPES), min_int8_size=st.sampled_from([1, 50, 300])),
        optional=dict(
            clip_grad_value=st.sampled_from([0.01, 1.0]),
            agc=st.sampled_from([0.1, 1.0]),
            ema_decay=st.sampled_from([0.0, 0.9]),
        ),
    )
    per_group = draw(st.lists(own, min_size=1, max_size=3))
    kept = draw(st.sampled_from([{}, *KEPT]))
    wide = draw(st.sampled_from([{}, dict(max_grad_norm=1.0), dict(skip_nonfinite=True)]))
    actions = draw(st.lists(st.sampled_from(["step", "nan", "zero", "none", "load", "int8"]), min_size=1, max_size=5))
    absent = draw(st.sets(st.tuples(st.integers(0, 4), st.integers(0, 6))))  # steps and parameters
    case, dtype = draw(st.sampled_from(CASES)), draw(st.sampled_from(NARROW))
    return case, dtype, tensors, per_group, {**kept, **wide}, actions, absent


@settings(max_examples=80, deadline=None, derandomize=True)
@given(fuzzed())
def test_fuzz(drawn):
    case, dtype, tensors, per_group, options, actions, absent = drawn

    def make():
        numbers = (randn(shape, i, dtype) for i, (shape, *_) in enumerate(tensors))
        rows = [torch.nn.Parameter(strided(t, *how[1:4])) for t, how in zip(numbers, tensors, strict=True)]
        return rows + parameters([(257,)] * len(per_group), dtype, seed=20)  # a group is not empty

    def act(opt, params, step):
        action = actions[step]
        set_strained(params, step, lambda i: action == "none" or (step, i) in absent)
        for p, (_, pads, steps, _, order) in zip(params, tensors, strict=False):
            p.grad = None if p.grad is None else strided(p.grad, pads, steps, order)
        if action == "nan" and options.get("skip_nonfinite"):
            params[-1].grad = torch.full_like(params[-1], NAN)
        if action == "int8":
            opt.param_groups[0]["state_dtype"] = torch.int8
        if action == "load":
            opt.load_state_dict(saved(opt.state_dict()))
        opt.step_and_zero_() if action == "zero" else opt.step()

    run_both(case, make, options, per_group, steps=len(actions), act=act)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_less_accurate_than_torch(case):
    """Root mean square error against torch in float64 over 150 steps, for large, small and zero parameters."""
    # The variance of few gradients is near zero for some elements, where errors have no bound.
    steps = 20 if case.kwargs.get("centered") else 150
    for scale in (1.0, 0.01, 0.0):
        runs = []
        for make, dtype in ((case.torch, torch.float64), (case.torch, torch.float32), (case.ours, torch.float32)):
            opt = make([torch.nn.Parameter((randn((20_000,), 0) * scale).to(dtype))])
            grads = (randn((20_000,), step + 1).to(dtype) for step in range(steps))
            runs.append(stepped(opt, *grads).detach().double())
        errors = [(run - runs[0]).square().mean().sqrt().item() for run in runs[1:]]
        # Where both round alike the two errors are samples of one distribution: 1 % covers the sampling. On a GPU
        # torch fuses some multiplications and additions, which spares it a rounding.
        allowance = 1.03 if DEVICE == "cuda" else 1.01
        assert errors[1] <= errors[0] * allowance, (case, scale, errors)


@pytest.mark.parametrize("backend", (NATIVE, "reference"))
def test_update_and_parameter_are_rounded_together_once(backend):
    """Just below the middle between two numbers, where double, rounded to float, would end above."""
    p = torch.nn.Parameter(torch.full((300,), 1 + 2**-23, device=DEVICE))
    opt = optim.SGD([p], lr=2**-24 * (1 + 2**-23), backend=backend)
    assert (stepped(opt, -(1 - 2**-23)) == 1 + 2**-23).all()


@pytest.mark.parametrize("nesterov", (False, True))
@pytest.mark.parametrize("momentum", (0.9, 0.5, 0.3))  # which float32 rounds down, not at all, and up
def test_infinite_momentum_stays_infinite(momentum, nesterov):
    results = []
    for make in (torch.optim.SGD, partial(optim.SGD, backend=NATIVE), partial(optim.SGD, backend="reference")):
        p = torch.nn.Parameter(torch.ones(300, device=DEVICE))
        opt = make([p], lr=0.1, momentum=momentum, nesterov=nesterov)
        stepped(opt, torch.inf, 1.0, -1.0)
        results.append((p.detach(), opt.state[p]["momentum_buffer"]))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize(
    ("case", "option"),
    [(CASES[0], dict(amsgrad=True)), (Case("SGD", dict(lr=0.1)), dict(momentum=0.9)),
     (CASES[12], dict(centered=True)), (CASES[12], dict(momentum=0.5))],
    ids=str,
)  # fmt: skip
def test_groups_with_states_of_their_own(case, option):
    for order in (1, -1):
        results = []
        for make in (partial(case.ours, backend=NATIVE), partial(case.ours, backend="reference"), case.torch):
            params = parameters([(300,), (5,), (7, 40), ()])
            groups = [{"params": params[:2], **option}, {"params": params[2:]}]
            results.append(make(groups[::order]))
            train(results[-1], params)
        assert_same_state(*results[:2], (case, option))
        states = [[sorted(opt.state[p]) for p in places(opt)] for opt in results]
        if case.name != "SGD":  # torch makes an empty buffer there
            assert states[0] == states[2]
        torch.testing.assert_close(places(results[1]), places(results[2]))


@pytest.mark.parametrize("case", [Case("Adam", dict(betas=(0.5, 0.5))), Case("RMSprop", dict(alpha=0.5))], ids=str)
def test_averages_half_way(case):
    """Where the end that is interpolated from changes."""
    run_both(case, lambda: parameters([(300,), (5,)]))


def test_many_groups_and_sizes_share_tiles():
    def act(opt, params, step):
        set_grads(params, step, lambda i: (i + step) % 4 == 0)
        opt.step()

    per_group = [dict(lr=0.001 * (a + 1)) for a in (0, 1, 10, 11, 40)]
    run_both(CASES[6], lambda: parameters([(1 + 37 * i % 700,) for i in range(60)]), {}, per_group, steps=5, act=act)


# Mixes of dtypes


@needs_grad_dtype
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
        for p in filter(torch.numel, places(opt)):
            assert p.dtype == dtype and p.grad.dtype == grad_dtype
            assert_state(case, opt, p, grad_dtype, state_dtype)


@needs_grad_dtype
@pytest.mark.parametrize(("case", "kept"), pairs(SOME, [{}, *KEPT]), ids=str)
@pytest.mark.narrow_state
def test_mixes_in_one_optimizer(case, kept):
    """Rows of every dtype side by side in groups of their own, clipped by one norm."""
    mixes = in_turn([(7,), (300,), (4099,), (300,), (5, 9)], NARROW, NARROW, range(2))

    def make():
        params = [parameters([shape], p, seed=i)[0] for i, (shape, p, *_) in enumerate(mixes)]
        for p, (_, _, grad_dtype, _) in zip(params, mixes, strict=True):
            p.grad_dtype = grad_dtype
        return params

    options = {**kept, "max_grad_norm": 10.0, "skip_nonfinite": True}
    per_group = [
        INT8,
        {},
        dict(state_dtype=torch.int8, min_int8_size=300, clip_per_param=2.0),
        dict(state_dtype=torch.bfloat16, agc=0.1),
        dict(state_dtype=torch.float32),
        dict(state_dtype=torch.int8, ema_decay=0.5),
        dict(ema_decay=0.9),
    ]
    for opt in run_both(case, make, options, per_group, steps=5, act=partial(take, wide=options)):
        assert_states(case, opt)


@needs_grad_dtype
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_accumulation_and_scalers_take_any_gradient(dtype, grad_dtype):
    def act(opt, params, step):
        params[0].grad_dtype = grad_dtype
        set_strained(params, step)
        opt.accumulate() if step % 2 == 0 else opt.step_and_zero_()

    options = dict(master_weights=True, max_grad_norm=1.0, **INT8)
    run_both(FIRST["AdamW"], lambda: parameters([(700,)], dtype), options, steps=4, act=act)


@pytest.mark.parametrize("more", [{}, *KEPT], ids=str)
@pytest.mark.parametrize(("case", "when"), [(FIRST["SGD"], 0), (FIRST["AdamW"], 1)], ids=str)
def test_options_set_by_hand_make_what_they_ask_for(case, when, more):
    """Several at once, of rows that are converted and of rows that are not: as the reference does."""

    def act(opt, params, step):
        if step == when:
            opt.param_groups[0].update(state_dtype=torch.int8, **more)
        take(opt, params, step)

    run_both(case, lambda: parameters([(5000,), (100,)], torch.bfloat16), act=act)


@pytest.mark.parametrize("n", (7, 257, 260, 300, 4099))
def test_padding_is_no_part_of_a_tile(n):
    """What rules make of padding, 0 / 0 where eps is 0, must not reach the scale."""

    def act(opt, params, step):
        params[0].grad = randn((n,), 1 + step) + 3.0
        opt.step()

    case = Case("RMSprop", dict(lr=0.01, momentum=0.9, eps=0.0))
    for opt in run_both(case, lambda: parameters([(n,)]), dict(state_dtype=torch.int8, min_int8_size=0), act=act):
        assert places(opt)[0].isfinite().all()
