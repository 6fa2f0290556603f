"""The same bits from kernels and reference: dtypes, sizes, threads, instruction sets, layouts, non-finite values."""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from cases import (
    CASES,
    DEVICE,
    DTYPES,
    NATIVE,
    NON_FINITE,
    SIZES,
    Case,
    assert_same_bits,
    assert_same_state,
    layouts,
    pairs,
    parameters,
    randn,
    set_grads,
    strided,
    train,
)
from hypothesis import given, settings

from genopt_ext import _backend, optim

CAPABILITIES = [] if _backend.native is None else _backend.native.cpu_capabilities()

pytestmark = pytest.mark.skipif(_backend.native is None, reason="compares the kernels with the reference")


def run_both(case: Case, make_params, steps: int = 3, skip=lambda step, i: False, same=assert_same_state):
    optimizers = []
    for backend in (NATIVE, "reference"):
        params = make_params()
        before = [p.detach().clone() for p in params]
        opt = case.ours(params, backend=backend)
        for step in range(steps):
            set_grads(params, step, lambda i, step=step: skip(step, i))
            opt.step()
        optimizers.append(opt)
    same(*optimizers, case)
    return optimizers[0], params, before


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64] + [torch.complex64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_reference(case, dtype):
    shapes = [(n,) for n in SIZES] + [(), (3, 5, 7), (1, 64)]
    # Of Lion's, an even number may lead back to where it began.
    _, params, before = run_both(case, lambda: parameters(shapes, dtype), steps=5)
    for p, old in zip(params, before, strict=True):
        # lr * update may be below one rounding of a 16-bit parameter; elsewhere every element moves.
        if dtype in (torch.float32, torch.complex64):
            assert (p.detach() != old).all(), case


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_agrees_with_reference(case, dtype):
    """Not bit for bit: torch's float64 square root is not always exactly rounded."""

    def close(a, b, what):
        for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13, msg=lambda text: f"{what}: {text}")

    run_both(case, lambda: parameters([(n,) for n in SIZES], dtype), same=close)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_elements_do_not_depend_on_where_they_stand(case):
    """Equal elements stay equal in every lane, tile and tail."""
    p = torch.nn.Parameter(torch.full((1031,), 0.5))
    opt = case.ours([p])
    for value in (0.3, -0.7, 0.1):
        p.grad = torch.full_like(p, value)
        opt.step()
    assert (p == p[0]).all(), case


CPU_KERNELS = pytest.mark.skipif(NATIVE != "cpu", reason="CPU kernels")


@pytest.fixture(scope="module")
def digests_of_reference(fresh):
    return digests_in(fresh, GENOPT_BACKEND="reference")


def digests_in(fresh, **env):
    out = fresh("import json, digests; print(json.dumps(digests.digests()))", **env)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


@CPU_KERNELS
@pytest.mark.parametrize(
    ("capability", "tuning"), [*((c, "prefetch=2") for c in CAPABILITIES), (CAPABILITIES[0], "prefetch=0")]
)
def test_same_bits_on_every_instruction_set(capability, tuning, fresh, digests_of_reference):
    found = digests_in(fresh, GENOPT_CPU_CAPABILITY=capability, GENOPT_CPU_TUNING=tuning)
    assert found.keys() == digests_of_reference.keys()
    assert [name for name, digest in found.items() if digest != digests_of_reference[name]] == []


@CPU_KERNELS
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_same_bits_with_1_to_64_threads(dtype):
    """Of rows that begin and end within a thread's part, and steps that measure, clip, average and zero."""
    opts, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 64):
            torch.set_num_threads(threads)
            params = parameters([(300_001,), (64,), (700, 700), (5,)], dtype)
            opt = CASES[6].ours(params, max_grad_norm=1.0, ema_decay=0.9, backend=NATIVE)
            set_grads(params, 0)
            opt.step()
            opt.step_and_zero_()
            opts.append(opt)
    finally:
        torch.set_num_threads(before)
    for opt in opts[1:]:
        assert_same_state(opts[0], opt)
        assert_same_bits(opts[0].grad_norm, opt.grad_norm)


@pytest.mark.parametrize(
    ("case", "layout", "dtype"),
    pairs(
        [CASES[2], CASES[10], CASES[14], CASES[16]], list(layouts()), [torch.float32, torch.bfloat16, torch.complex64]
    ),
    ids=str,
)
def test_layouts(case, layout, dtype):
    results = []
    for backend in (NATIVE, "reference"):
        t = layouts(dtype)[layout]
        storage = t._base.clone() if t._base is not None else None
        p = torch.nn.Parameter(t)
        opt = case.ours([p], backend=backend)
        for step in range(3):
            grad = randn(p.shape, step, dtype)
            p.grad = grad if step else torch.empty_strided(p.shape, p.stride(), dtype=dtype).copy_(grad)
            opt.step()
        assert p.stride() == layouts(dtype)[layout].stride()
        results.append((opt, t, storage))
    assert_same_state(results[0][0], results[1][0], (case, layout))
    contiguous = torch.nn.Parameter(layouts(dtype)[layout].contiguous())
    opt = case.ours([contiguous], backend=NATIVE)
    for step in range(3):
        contiguous.grad = randn(contiguous.shape, step, dtype)
        opt.step()
    assert_same_bits(results[0][1].detach(), contiguous.detach(), (case, layout))
    # Nothing beside the view was written.
    _, ours, before = results[0]
    if before is not None:
        ours.zero_()
        before.as_strided(ours.shape, ours.stride(), ours.storage_offset()).zero_()
        assert_same_bits(ours._base, before, (case, layout))


@pytest.mark.skipif(NATIVE != "cpu", reason="a GPU can not access such memory")
def test_misaligned_memory():
    """A tensor whose memory does not even start at a multiple of its element size."""
    raw = bytearray(4 * 1000 + 1)
    results = []
    for backend in (NATIVE, "reference"):
        p = torch.frombuffer(bytearray(raw), dtype=torch.float32, offset=1, count=1000)
        p.copy_(randn((1000,), 0))
        opt = CASES[0].ours([p], backend=backend)
        train(opt, [p])
        results.append(p)
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_non_finite_and_denormal_values(case, dtype):
    values = torch.tensor(NON_FINITE)
    results = []
    for backend in (NATIVE, "reference"):
        p = torch.nn.Parameter(values.repeat(40).to(dtype))
        opt = case.ours([p], backend=backend)
        for step in range(3):
            p.grad = values.repeat_interleave(40).roll(step).to(dtype)
            opt.step()
        results.append(opt)
    assert_same_state(*results, case)


def test_huge_gradient_does_not_freeze_a_parameter():
    p = torch.nn.Parameter(torch.zeros(3))
    opt = CASES[0].ours([p])
    p.grad = torch.full((3,), 1e20)  # its square overflows
    opt.step()
    assert torch.isfinite(opt.state[p]["exp_avg_sq"]).all() and torch.isfinite(p).all()


def test_centered_rmsprop_of_a_constant_gradient_is_finite():
    p = torch.nn.Parameter(torch.zeros(1000))
    opt = Case("RMSprop", dict(centered=True, alpha=0.5)).ours([p])
    grad = randn((1000,), 0)
    for _ in range(200):
        p.grad = grad
        opt.step()
    assert torch.isfinite(p).all()


def test_denormals_do_not_depend_on_the_thread():
    """The caller's flush-to-zero mode holds on every thread for as long as the step runs."""
    p = torch.nn.Parameter(torch.zeros(1 << 18))
    opt = Case("SGD", dict(lr=1.0)).ours([p])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for flush in (False, True, False, True):  # first without: threads begin in the mode of the one that makes them
            if not torch.set_flush_denormal(flush):
                pytest.skip("this processor can not flush denormals")
            p.data.zero_()
            p.grad = torch.full_like(p, -1e-40)
            opt.step()
            torch.set_flush_denormal(False)
            assert (p == (0.0 if flush else p.grad[0].neg())).all(), flush
            assert (
                (p.grad * 0.5).view(torch.int32) == p.grad[:1].mul(0.5).view(torch.int32)
            ).all()  # by torch's threads
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


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


@pytest.mark.skipif(NATIVE != "cpu", reason="CPU kernels")
def test_a_forks_child_goes_on_without_its_parents_threads(fresh):
    out = fresh(AFTER_FORK)
    assert out.returncode == 0, out.stderr


@st.composite
def fuzzed(draw):
    case = draw(st.sampled_from(CASES))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    tensors = []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 9), max_size=4))
        pads = [draw(st.integers(0, 2)) for _ in shape]
        steps = [draw(st.integers(1, 3)) for _ in shape]
        order = draw(st.permutations(range(len(shape))))
        grad_order = draw(st.permutations(range(len(shape))))
        tensors.append((tuple(shape), tuple(pads), tuple(steps), tuple(order), tuple(grad_order)))
    nones = draw(st.lists(st.booleans(), min_size=12, max_size=12))
    return case, dtype, tensors, nones


@settings(max_examples=60, deadline=None)
@given(fuzzed())
def test_fuzz(drawn):
    case, dtype, tensors, nones = drawn
    results = []
    for backend in (NATIVE, "reference"):
        params = [
            torch.nn.Parameter(strided(randn(shape, i, dtype), pads, steps, order))
            for i, (shape, pads, steps, order, _) in enumerate(tensors)
        ]
        opt = case.ours(params, backend=backend)
        for step in range(3):
            for i, (p, (_, pads, steps, _, order)) in enumerate(zip(params, tensors, strict=True)):
                grad = randn(p.shape, 100 * step + i, dtype)
                p.grad = None if nones[3 * i + step] else strided(grad, pads, steps, order)
            opt.step()
        results.append(opt)
    assert_same_state(*results, drawn)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_less_accurate_than_torch(case):
    """Root mean square error against torch in float64 over 150 steps, for large, small and zero parameters."""
    if case.name == "RMSprop" and case.kwargs.get("centered"):
        steps = 20  # the variance of few gradients is near zero for some elements, where errors have no bound
    else:
        steps = 150
    for scale in (1.0, 0.01, 0.0):
        start = randn((20_000,), 0) * scale
        errors = []
        runs = [torch.nn.Parameter(start.to(d).clone()) for d in (torch.float64, torch.float32, torch.float32)]
        opts = [case.torch([runs[0]]), case.torch([runs[1]]), case.ours([runs[2]])]
        for step in range(steps):
            grad = randn(start.shape, step + 1)
            for p, opt in zip(runs, opts, strict=True):
                p.grad = grad.to(p.dtype)
                opt.step()
        truth = runs[0].detach()
        errors = [(p.detach().double() - truth).square().mean().sqrt().item() for p in runs[1:]]
        # Where both round alike the two errors are samples of one distribution: 1 % covers the sampling. On a GPU
        # torch fuses some multiplications and additions, which spares it a rounding.
        allowance = 1.03 if DEVICE == "cuda" else 1.01
        assert errors[1] <= errors[0] * allowance, (case, scale, errors)


@pytest.mark.parametrize("backend", (NATIVE, "reference"))
def test_update_and_parameter_are_rounded_together_once(backend):
    """Just below the middle between two numbers, where double, rounded to float, would end above."""
    p = torch.nn.Parameter(torch.full((300,), 1 + 2**-23, device=DEVICE))
    p.grad = torch.full_like(p, -(1 - 2**-23))
    optim.SGD([p], lr=2**-24 * (1 + 2**-23), backend=backend).step()
    assert (p == 1 + 2**-23).all()


@pytest.mark.parametrize("nesterov", (False, True))
@pytest.mark.parametrize("momentum", (0.9, 0.5, 0.3))  # which float32 rounds down, not at all, and up
def test_infinite_momentum_stays_infinite(momentum, nesterov):
    results = []
    for make in (torch.optim.SGD, partial(optim.SGD, backend=NATIVE), partial(optim.SGD, backend="reference")):
        p = torch.nn.Parameter(torch.ones(300, device=DEVICE))
        opt = make([p], lr=0.1, momentum=momentum, nesterov=nesterov)
        for grad in (torch.inf, 1.0, -1.0):
            p.grad = torch.full_like(p, grad)
            opt.step()
        results.append((p.detach(), opt.state[p]["momentum_buffer"]))
    for result in results[1:]:
        for ours, theirs in zip(result, results[0], strict=True):
            assert_same_bits(ours, theirs)


@pytest.mark.parametrize(
    ("case", "option"),
    [(CASES[0], dict(amsgrad=True)), (Case("SGD", dict(lr=0.1)), dict(momentum=0.9)),
     (CASES[11], dict(centered=True)), (CASES[11], dict(momentum=0.5))],
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
        states = [[sorted(opt.state[p]) for group in opt.param_groups for p in group["params"]] for opt in results]
        if case.name != "SGD":  # torch makes an empty buffer there
            assert states[0] == states[2]
        for p, q in zip(*([p for g in opt.param_groups for p in g["params"]] for opt in results[1:]), strict=True):
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize("case", [Case("Adam", dict(betas=(0.5, 0.5))), Case("RMSprop", dict(alpha=0.5))], ids=str)
def test_averages_half_way(case):
    """Where the end that is interpolated from changes."""
    run_both(case, lambda: parameters([(300,), (5,)]))


def test_many_groups_and_sizes_share_tiles():
    """Rows of all sizes, groups with their own options, gradients that come and go."""
    sizes = [(1 + 37 * i % 700,) for i in range(60)]
    results = []
    for backend in (NATIVE, "reference"):
        params = parameters(sizes)
        groups = [dict(params=params[a:b], lr=0.001 * (a + 1)) for a, b in pairwise([0, 1, 10, 11, 40, 60])]
        opt = CASES[6].ours(groups, backend=backend)
        for step in range(5):
            set_grads(params, step, lambda i, step=step: (i + step) % 3 == 0)
            opt.step()
        results.append(opt)
    assert_same_state(*results)
