"""Memory that tensors share: what a step would change while it reads or writes it, it refuses, and changes nothing."""

from __future__ import annotations

import time

import pytest
import torch
from cases import CASES, DEVICE, STATEFUL, Case, assert_same_bits, assert_same_state, parameters, randn, refused
from hypothesis import given, settings
from hypothesis import strategies as st

import genopt_ext
from genopt_ext import optim, overlap

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="addresses are compared in the same way on every device")
SGD = Case("SGD", dict(lr=0.1, momentum=0.9))


def stepped(case, backend, n=2, **options):
    params = parameters([(6, 6)] * n)
    opt = case.ours(params, backend=backend, **options)
    for p in params:
        p.grad = randn(p.shape, 5)
    opt.step()
    return params, opt


def same_memory_transposed(p):
    return p.data.t()


def shifted(p):
    base = torch.zeros(37)
    base[:36] = p.data.flatten()
    p.data = base[:36].view(6, 6)
    return base[1:].view(6, 6)


def reversed_rows(p):
    base = p.data.clone().repeat(2, 1)
    p.data = base[:6]
    return base[3:9]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("make", [same_memory_transposed, shifted, reversed_rows])
def test_a_gradient_in_its_parameters_memory_is_refused(case, make, backend):
    params, opt = stepped(case, backend)
    params[1].grad = make(params[1])
    refused(opt, "group 0 parameter 1 .*: its gradient shares memory with its own parameter or state")
    params[1].grad = params[1].grad.clone()
    opt.step()


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_a_gradient_that_is_the_parameter_is_read_before_it_is_written(case, backend):
    params, opt = stepped(case, backend)
    twins, other = stepped(case, backend)
    for p, q in zip(params, twins, strict=True):
        p.grad, q.grad = p.data, q.data.clone()
    opt.step()
    other.step()
    assert_same_state(opt, other, case)
    refused(opt, "its gradient shares memory with its own parameter", call="step_and_zero_")


def test_a_gradient_in_the_momentum_buffer(backend):
    params, opt = stepped(SGD, backend)
    buffer = opt.state[params[1]]["momentum_buffer"]
    params[1].grad = buffer
    refused(opt, "its gradient shares memory with its own parameter or state", call="step_and_zero_")
    params[1].grad = buffer.t()
    refused(opt, "its gradient shares memory with its own parameter or state")


def test_a_gradient_in_anothers_memory(backend):
    params, opt = stepped(SGD, backend, n=3)
    others = "group 0 parameter 1 .*: its gradient shares memory with the parameter or state of group 0 parameter "
    params[1].grad = params[0].data
    refused(opt, others + "0")
    params[1].grad = opt.state[params[2]]["momentum_buffer"][:6]
    refused(opt, others + "2")
    # What is not stepped does not change, but would be zeroed.
    params[1].grad, params[0].grad = params[0].data, None
    opt.step()
    refused(opt, others + "0", call="step_and_zero_")
    params[0].grad = randn((6, 6), 1)
    refused(opt, "its gradient shares memory")


def test_gradients_are_looked_at_again_when_they_move(backend):
    # The gradient's storage is held by others all along, as with buckets of DistributedDataParallel.
    params, opt = stepped(SGD, backend)
    bucket = torch.ones(72)
    params[0].grad, params[1].grad = bucket[:36].view(6, 6), bucket[36:].view(6, 6)
    opt.step()
    params[1].grad = params[1].data.t()
    refused(opt, "its gradient shares memory")
    params[1].grad = bucket[36:].view(6, 6)
    opt.step()
    params[1].data = bucket[30:66].view(6, 6)  # the parameter moves into the gradients
    refused(opt, "its gradient shares memory")
    params[1].data = params[1].data.clone()
    opt.step()
    # The same object is a gradient and another's parameter: no storage is shared, the tensor is.
    p, q = torch.zeros(4), torch.zeros(4)
    for opt in (optim.SGD([p, q], lr=0.1, backend=backend), optim.SGD([q, p], lr=0.1, backend=backend)):
        p.grad, q.grad = q, torch.ones(4)
        refused(opt, "its gradient shares memory with the parameter or state of")


def test_gradients_may_share_memory_with_gradients(backend):
    params, opt = stepped(SGD, backend)
    params[0].grad = params[1].grad = randn((6, 6), 3)
    opt.step()
    numpy = pytest.importorskip("numpy")
    array = numpy.zeros(8, dtype=numpy.float32)
    p, g = torch.from_numpy(array), torch.from_numpy(array[::-1].copy())
    p.grad = g
    opt = optim.SGD([p], lr=0.1, backend=backend)
    opt.step()
    p.grad = torch.from_numpy(array).view(2, 4).t().reshape(-1)[:0].new_zeros(8)
    opt.step()
    # Two storages on one memory: only addresses tell.
    p.grad = torch.from_numpy(array[:])
    opt.step()
    other = torch.from_numpy(array[1:])
    p.data = torch.from_numpy(array[:-1])
    p.grad = other
    refused(opt, "its gradient shares memory with its own parameter")


def test_an_average_in_anothers_memory(backend):
    params, opt = stepped(SGD, backend, ema_decay=0.9)
    params[1].grad = None
    opt.state[params[1]]["ema"] = params[0].data
    refused(opt, "shares memory with group 0 parameter 1")


ENORMOUS = 2**36


def test_memory_checks_look_at_dimensions_not_at_elements(backend):
    start = time.perf_counter()
    p = torch.zeros(1).expand(ENORMOUS)
    p.grad = torch.zeros(1).expand(ENORMOUS)
    window = torch.as_strided(torch.zeros(2**20), (2**19, 2**19), (1, 1))
    window.grad = torch.zeros(1, 1).expand(2**19, 2**19)
    for large in (p, window):  # too large for a copy, by which to see that nothing changed
        with pytest.raises(RuntimeError, match="share memory with one another"):
            optim.SGD([large], backend=backend).step()
    # Columns of one matrix, and every other element, share nothing.
    base = torch.zeros(400, 20)
    views = [base[:, :7], base[:, 7:13], base[::2, 13:], base[1::2, 13:]]
    for v in views:
        v.grad = torch.ones_like(v)
    optim.SGD(views, lr=0.1, backend=backend).step()
    assert (base == -0.1).all()
    assert time.perf_counter() - start < 60  # element by element it takes an hour


@pytest.mark.parametrize(
    ("clip", "more", "n"),
    [
        ("clip_grad_norm_", {}, ENORMOUS),
        ("clip_grad_norm_", dict(error_if_nonfinite=True), 300),  # which reads every element
        ("clip_grad_value_", {}, ENORMOUS),
        ("clip_grads_with_norm_", dict(total_norm=torch.tensor(9.0)), ENORMOUS),
    ],
)
def test_expanded_gradients_are_not_clipped(clip, more, n):
    params = [torch.zeros(3), torch.zeros(1).expand(n)]
    params[0].grad, params[1].grad = torch.full((3,), 5.0), torch.ones(1).expand(n)
    with pytest.raises(RuntimeError, match=f"{clip}: gradient 1 .*share memory with one another.*clone"):
        getattr(genopt_ext, clip)(params, 1.0, **more)
    assert (params[0].grad == 5).all()


# The reference's check against counting bytes, and the kernels' check against the reference's.

DTYPES = (torch.int8, torch.float16, torch.float32, torch.float64)
views = st.lists(
    st.tuples(
        st.sampled_from(DTYPES),
        st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=3),
        st.integers(0, 60),
    ),
    min_size=1,
    max_size=4,
)


def bytes_of(t):
    places = [t.data_ptr()]
    for size, stride in zip(t.shape, t.stride(), strict=True):
        places = [at + i * stride * t.element_size() for at in places for i in range(size)]
    return [at + byte for at in places for byte in range(t.element_size())]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(views)
def test_pairs_are_those_that_share_a_byte(drawn):
    base = torch.zeros(1000)
    tensors = [
        torch.as_strided(base.view(dtype), [d[0] for d in dims], [d[1] for d in dims], offset)
        for dtype, dims, offset in drawn
    ]
    touched = [bytes_of(t) for t in tensors]
    wanted = {(i, i) for i, b in enumerate(touched) if len(set(b)) < len(b)}
    wanted |= {(i, j) for j in range(len(tensors)) for i in range(j) if set(touched[i]) & set(touched[j])}
    assert set(overlap.pairs(tensors)) == wanted


@settings(max_examples=150, deadline=None, derandomize=True)
@given(views, st.integers(0, 15))
def test_kernels_and_reference_refuse_the_same(drawn, zeroing):
    base = torch.zeros(1000)
    tensors = [torch.as_strided(base, [d[0] for d in dims], [d[1] for d in dims], offset) for _, dims, offset in drawn]
    outcomes = []
    for backend in ("auto", "reference"):
        params = tensors[: (len(tensors) + 1) // 2]
        for i, p in enumerate(params):
            j = i + len(params)
            p.grad = tensors[j] if j < len(tensors) and tensors[j].shape == p.shape else torch.zeros_like(p)
        opt = optim.SGD(params, lr=0.5, backend=backend)
        try:
            opt.step_and_zero_() if zeroing % 2 else opt.step()
            outcomes.append("")
        except RuntimeError as error:
            outcomes.append("share" if "share" in str(error) else str(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("writes", [False, True])
def test_memory_is_looked_at_again_when_only_the_dtype_changes(writes):
    """The same addresses and sizes, where float32 elements meet and bfloat16 ones did not."""
    memory, more = torch.zeros(64), torch.zeros(64)
    a, b = (torch.nn.Parameter(memory.view(torch.bfloat16)[i : i + 8]) for i in (0, 8))
    opt = optim.SGD([a, b], lr=1.0)
    for dtype in (torch.bfloat16, torch.float32):
        halves = more.view(dtype)
        a.grad = b.grad = None
        if writes:  # gradients that are unscaled once
            a.data, b.data = torch.zeros(8, dtype=dtype), torch.zeros(8, dtype=dtype)
            starts = (0, 8) if dtype == torch.bfloat16 else (0, 4)
            a.grad, b.grad = (halves[i : i + 8].fill_(2.0) for i in starts)
            more.view(dtype).fill_(2.0)
            opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
            opt.step()
            assert_same_bits((a.detach(), b.detach()), (torch.full((8,), -1.0, dtype=dtype),) * 2)
            continue
        if dtype == torch.float32:
            a.data, b.data = memory[0:8], memory[4:12]
        a.grad, b.grad = torch.ones(8, dtype=dtype), torch.ones(8, dtype=dtype)
        if dtype == torch.float32:
            refused(opt, "shares memory with group 0 parameter 1")
        else:
            opt.step()
