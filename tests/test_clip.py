"""The drop-ins for torch.nn.utils' clipping: torch's results on float64 copies, and what torch leaves open."""

from __future__ import annotations

import inspect
import math
import warnings
from itertools import product

import hypothesis.strategies as st
import pytest
import torch
from cases import DEVICE, INF, NAN, NATIVE, SIZES, assert_gradients_kept, assert_same_bits, gradients_of, randn
from hypothesis import given, settings
from recipe import double
from torch.nn import utils as theirs

import genopt_ext

NORMS = (2.0, 1, INF, "inf", 0.5, 3.0)
UNUSUAL_NORMS = (0, -0.0, -0.1, -1, -2.0, -3, -INF, "-inf", "2", NAN, "nan", -40.5, torch.tensor(-2.0))
REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# One rounding to the dtype, and a few of the factor; the smallest fp16 is 6e-8.
CLOSE = {
    torch.float32: dict(rtol=1e-6, atol=0),
    torch.complex64: dict(rtol=2e-6, atol=1e-7),
    torch.float64: dict(rtol=1e-12, atol=0),
    torch.complex128: dict(rtol=1e-12, atol=0),
    torch.bfloat16: dict(rtol=2**-8, atol=0),
    torch.float16: dict(rtol=2**-10, atol=6e-8),
}


def leaves(grads):
    """Parameters that have ``grads``, of which some may be None."""
    params = []
    for g in grads:
        p = torch.nn.Parameter(torch.zeros(2) if g is None else torch.zeros(g.shape, dtype=g.dtype))
        p.grad = g
        params.append(p)
    return params


def drawn(shapes, dtype=torch.float32, seed=0):
    return [randn(shape, seed + i, dtype) for i, shape in enumerate(shapes)]


def exact(params):
    """float64 copies for torch; it refuses an infinity norm of nothing, so without empty ones."""
    return leaves([None if p.grad is None or not p.grad.numel() else double(p.grad) for p in params])


def assert_close_grads(params, expected, what=""):
    mixed = len({p.grad.dtype for p in params if p.grad is not None}) > 1
    for i, (p, q) in enumerate(zip(params, expected, strict=True)):
        if p.grad is None or not p.grad.numel():
            continue
        close = {**CLOSE[p.grad.dtype], "equal_nan": True}
        if mixed:  # the norm, and so the factor, may be fp32
            close["rtol"] = max(close["rtol"], 1e-6)
        torch.testing.assert_close(double(p.grad), q.grad, **close, msg=lambda text, i=i: f"{what} {i}: {text}")


def relative_error(norm, truth):
    return abs(norm.double().item() - truth.item()) / truth.item()


def assert_untouched(params, before):
    # On a GPU nobody waits to hear whether something was clipped.
    assert_gradients_kept(params, before, version=NATIVE != "cuda")


def assert_clips_as_torch(grads, max_norm, norm_type=2.0, what="", clip=genopt_ext.clip_grad_norm_, **more):
    """The norm and the gradients that torch gives for float64 copies; the parameters that have them."""
    params = leaves(grads)
    expected = exact(params)
    truth = theirs.clip_grad_norm_(expected, float(max_norm), norm_type, foreach=False)
    norm = clip(params, max_norm, norm_type, **more)
    assert norm.dim() == 0
    torch.testing.assert_close(norm.double(), truth.double(), rtol=1e-6, atol=0, equal_nan=True, msg=str(what))
    assert_close_grads(params, expected, what)
    return params


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_"])
def test_signatures_are_torchs(name):
    ours = inspect.signature(getattr(genopt_ext, name)).parameters.values()
    torchs = inspect.signature(getattr(theirs, name)).parameters.values()
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in torchs]
    assert name in genopt_ext.__all__


@pytest.mark.parametrize("dtype", [*REAL, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("norm_type", NORMS)
def test_norm_and_clip(norm_type, dtype):
    shapes = [(n,) for n in SIZES] + [(), (3, 5, 7), (3, 0)]
    allowed = 1e-12 if dtype in (torch.float64, torch.complex128) else 1e-6
    for factor in (0.3, 3.0):
        params = leaves(drawn(shapes, dtype))
        before = gradients_of(params)
        expected = exact(params)
        truth = theirs.get_total_norm([q.grad for q in expected if q.grad is not None], norm_type, foreach=False)
        norm = genopt_ext.get_total_norm([p.grad for p in params], norm_type)
        assert relative_error(norm, truth) < allowed, (norm_type, dtype)
        assert (norm.dim(), norm.device.type, norm.requires_grad) == (0, DEVICE, False) and not norm.is_complex()
        assert_untouched(params, before)
        max_norm = truth.item() * factor
        assert relative_error(genopt_ext.clip_grad_norm_(params, max_norm, norm_type), truth) < allowed
        theirs.clip_grad_norm_(expected, max_norm, norm_type, foreach=False)
        assert_close_grads(params, expected, (norm_type, dtype, factor))
        if factor > 1:
            assert_untouched(params, before)
        elif NATIVE == "cpu":
            assert all(p.grad._version > old[2] for p, old in zip(params, before, strict=True) if p.grad.numel())


@pytest.mark.parametrize("norm_type", UNUSUAL_NORMS, ids=repr)
def test_unusual_orders_as_torch(norm_type):
    """Not one that torch takes is refused, down to what each makes of zeros, NaN and infinity."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
    for dtype, special in product(dtypes, (None, 0.0, NAN, INF)):
        if dtype.is_complex and (special not in (None, 0.0) or float(norm_type) == 0):
            continue  # torch's product of infinity and a factor is NaN there, and its order 0 drops what is imaginary
        grads = drawn([(300,), (), (2, 3)], dtype)
        grads[1].fill_(0.5)
        if special is not None:
            grads[0][3] = grads[2][0] = special
        norm = genopt_ext.get_total_norm(grads, norm_type)
        truth = theirs.get_total_norm([double(g) for g in grads], norm_type, foreach=False)
        torch.testing.assert_close(norm.double(), truth, rtol=1e-6, atol=0, equal_nan=True)
        assert_clips_as_torch(grads, 0.01, norm_type, (dtype, special))


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("foreach", [None, True, False])
def test_mixed_dtypes_none_and_empty(norm_type, foreach):
    grads = [None, *(randn((300 + i,), i, d) for i, d in enumerate((*REAL, torch.complex64))), None, randn((0,), 9)]
    assert_clips_as_torch(grads, 5.0, norm_type, foreach=foreach)


def in_two_calls(params, max_norm, norm_type):
    norm = genopt_ext.get_total_norm([p.grad for p in params], norm_type, True, None)
    genopt_ext.clip_grads_with_norm_(params, max_norm, norm, None)
    return norm


@pytest.mark.parametrize(
    "clip",
    [
        lambda p, bound, order: genopt_ext.clip_grad_norm_(p, bound, order, True, None),
        lambda p, bound, order: genopt_ext.clip_grad_norm_(
            parameters=p, max_norm=bound, norm_type=order, error_if_nonfinite=True, foreach=None
        ),
        in_two_calls,
    ],
)
def test_positional_and_named_arguments(clip):
    assert_clips_as_torch(drawn([(300,), (7,)]), 0.5, 1.0, clip=clip)


# Of three parameters, or the first of one alone.
CONTAINERS = {
    "list": list,
    "tuple": tuple,
    "generator": lambda params: (p for p in params),
    "dict": lambda params: dict(enumerate(params)).values(),
    "ParameterList": torch.nn.ParameterList,
    "model": lambda params: torch.nn.ParameterList(params).parameters(),
    "one tensor": lambda params: params[0],
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_containers(container):
    is_one = container is CONTAINERS["one tensor"]
    params = leaves(drawn([(300,)] if is_one else [(300,), (7,), (2, 3)]))

    def truth():
        return theirs.get_total_norm([p.grad.double() for p in params])

    before = truth()
    grads = params[0].grad if is_one else (p.grad for p in params)
    assert relative_error(genopt_ext.get_total_norm(grads), before) < 1e-6
    assert relative_error(genopt_ext.clip_grad_norm_(container(params), 1.0), before) < 1e-6
    torch.testing.assert_close(truth().item(), 1.0, rtol=1e-5, atol=0)
    assert genopt_ext.clip_grads_with_norm_(container(params), 0.5, torch.tensor(1.0)) is None
    torch.testing.assert_close(truth().item(), 0.5, rtol=1e-5, atol=0)
    assert genopt_ext.clip_grad_value_(container(params), 1e-3) is None
    assert max(p.grad.abs().max() for p in params) == torch.tensor(1e-3)


@pytest.mark.parametrize("nothing", [lambda: [], lambda: leaves([None, None]), lambda: (p for p in ())])
def test_nothing_to_clip(nothing):
    for norm_type in (2.0, INF):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of an empty generator
            norm = genopt_ext.clip_grad_norm_(nothing(), 1.0, norm_type, error_if_nonfinite=True)
        assert isinstance(norm, torch.Tensor) and norm.shape == () and norm.item() == 0.0
    genopt_ext.clip_grad_value_(nothing(), 1.0)
    genopt_ext.clip_grads_with_norm_(nothing(), 1.0, torch.tensor(5.0))
    assert genopt_ext.get_total_norm([]).item() == 0.0
    empty = leaves([randn((0,), 0), randn((3, 0), 0)])
    for norm_type in (2.0, INF, 0.5, 0, -1, -INF):
        assert genopt_ext.clip_grad_norm_(empty, 1.0, norm_type, error_if_nonfinite=True).item() == 0.0
    genopt_ext.clip_grad_value_(empty, 1.0)


def test_zero_gradients_stay_zero():
    params = leaves([torch.zeros(300), torch.zeros(5)])
    for max_norm in (0.0, 1.0):
        assert genopt_ext.clip_grad_norm_(params, max_norm, error_if_nonfinite=True).item() == 0.0
        assert all((p.grad == 0).all() for p in params)


@pytest.mark.parametrize("max_norm", [0, 0.0, INF, torch.tensor(0.5), torch.tensor([0.5]), True], ids=repr)
def test_unusual_max_norms(max_norm):
    assert_clips_as_torch(drawn([(300,), (7,)]), max_norm)


def grad_layouts(dtype):
    base = randn((40, 30, 20), 1, dtype)
    return {
        "transposed": base.transpose(0, 2),
        "every other": base[:, ::2, 1:],
        "odd offset": randn((1030,), 3, dtype)[1:],
        "one column": base[:, 5, 7],
        "channels last": randn((4, 6, 5, 7), 2, dtype).to(memory_format=torch.channels_last),
        "scalar of a view": base[1, 2, 3],
        "conjugate": base[3:].conj(),
        "negative": torch._neg_view(base[3:]),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("layout", grad_layouts(torch.float32))
def test_strided_gradients(layout, dtype):
    clips = [
        lambda utils, params: utils.clip_grad_norm_(params, 0.5),
        lambda utils, params: utils.clip_grad_norm_(params, 0.5, INF),
        lambda utils, params: utils.clip_grad_value_(params, 0.5),
    ]
    for clip in clips[:2] if dtype.is_complex else clips:
        grad = grad_layouts(dtype)[layout]
        whole = grad if grad._base is None else grad._base
        outside = whole.clone()
        params = leaves([grad, randn((5,), 0, dtype)])
        expected = exact(params)
        clip(theirs, expected)
        clip(genopt_ext, params)
        assert_close_grads(params, expected, layout)
        assert params[0].grad is grad and grad.stride() == grad_layouts(dtype)[layout].stride()
        if grad._base is not None:  # nothing beside the view was written
            for t in (whole, outside):
                t.as_strided(grad.shape, grad.stride(), grad.storage_offset()).zero_()
            assert_same_bits(whole, outside, layout)


def test_expanded_gradients_have_a_norm():
    grad = torch.full((1,), 0.5).expand(1000)
    torch.testing.assert_close(genopt_ext.get_total_norm([grad]).item(), 0.5 * math.sqrt(1000))


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, INF])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float16, 60000.0), (torch.float32, 1e30), (torch.bfloat16, 1e30), (torch.float32, 1e-25)],
    ids=str,
)
def test_large_and_small_finite_gradients(dtype, value, norm_type):
    """Squares that overflow or underflow in fp32, norms that overflow in fp16."""
    grads = [torch.full((4099,), value, dtype=dtype), torch.full((7,), -value, dtype=dtype)]
    params = assert_clips_as_torch(grads, 1.0, norm_type, error_if_nonfinite=True)
    assert (params[0].grad != 0).all()


@pytest.mark.parametrize("norm_type", [INF, 2.0, 1.0])
@pytest.mark.parametrize("dtype", [*REAL, torch.complex64], ids=str)
def test_nan_is_never_lost(dtype, norm_type):
    """Wherever it stands, and whatever is larger before and after it (pytorch#53843)."""
    for size in (1, 7, 256, 4099):
        for where in {0, 1, 3, 7, 8, 255, size // 2, size - 1}:
            if where >= size:
                continue
            bad = randn((size,), 0, dtype)
            bad[where] = NAN
            large = [torch.full((300,), 1e4, dtype=dtype), torch.full((300,), INF, dtype=dtype)]
            for grads in ([bad], [bad, *large], [*large, bad], [large[0], bad, large[1]]):
                assert genopt_ext.get_total_norm(grads, norm_type).isnan(), (size, where)


@pytest.mark.parametrize("norm_type", [2.0, INF, 1.0])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nonfinite_gradients_as_torch(dtype, value, norm_type):
    grads = drawn([(300,), (7,), (1000,)], dtype)
    grads[1][3] = value
    assert_clips_as_torch(grads, 1.0, norm_type)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("norm_type", [2.0, INF, 3.0])
def test_error_if_nonfinite(norm_type, value):
    grads = drawn([(300,), (7,), (5,), (1000,), (3,), (4,)])
    grads[1] = None
    grads[3][999] = value
    grads[5][0] = value
    params = leaves(grads)
    before = gradients_of(params)
    with pytest.raises(RuntimeError, match=r"parameter 3\b"):
        genopt_ext.clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True)
    assert_untouched(params, before)
    with pytest.raises(RuntimeError, match=r"\b2\b"):
        genopt_ext.get_total_norm([g for g in grads if g is not None], norm_type, error_if_nonfinite=True)
    grads[3][999] = grads[5][0] = 1.0
    assert genopt_ext.clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True).isfinite()


LIMITS = [-1.0, NAN, "one", 1j, None, [1.0], torch.tensor([1.0, 1.0]), torch.tensor(NAN)]
REFUSED = {
    "max_norm": (LIMITS, lambda params, bad: genopt_ext.clip_grad_norm_(params, bad)),
    "max_norm of a given norm": (LIMITS, lambda ps, bad: genopt_ext.clip_grads_with_norm_(ps, bad, torch.tensor(9.0))),
    "max_norm of nothing": (LIMITS, lambda params, bad: genopt_ext.clip_grad_norm_([], bad)),
    "clip_value": (LIMITS, genopt_ext.clip_grad_value_),
    "norm_type": (["two", None, 1j, [2.0]], lambda params, bad: genopt_ext.clip_grad_norm_(params, 1.0, bad)),
    "norm_type of a norm": (["two", None, 1j, [2.0]], lambda ps, bad: genopt_ext.get_total_norm([ps[0].grad], bad)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_arguments(what):
    params = leaves(drawn([(300,), (7,)]))
    before = gradients_of(params)
    values, call = REFUSED[what]
    for bad in values:
        with pytest.raises((TypeError, ValueError), match=what.split()[0]):
            call(params, bad)
    assert_untouched(params, before)


@pytest.mark.parametrize("norm_type", [2.0, INF, 1.0, 3.0])
def test_same_bits_for_every_thread_count_and_run(norm_type, set_threads):
    results = []
    for n in (1, 2, 3, 2, 1):
        set_threads(n)
        params = leaves(drawn([(200_003,), (300, 7), *[(64,)] * 40, ()]))
        norm = genopt_ext.clip_grad_norm_(params, 1.0, norm_type)
        results.append([norm, *(p.grad for p in params)])
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("norm_type", [2.0, INF, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_from_the_reference(dtype, norm_type, monkeypatch):
    """Of more rows, and of a row of more spans, than a warp has lanes too."""
    results = []
    for backend, error_if_nonfinite in (("auto", False), ("auto", True), ("reference", False)):
        monkeypatch.setenv("GENOPT_BACKEND", backend)
        params = leaves(drawn([(n,) for n in SIZES] + [(3, 5, 7), (300_000,)] + [(9,)] * 70, dtype))
        norm = genopt_ext.clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite)
        results.append([norm, *(p.grad for p in params)])
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_values(dtype):
    """Exactly torch's: a limit is rounded to the gradient's dtype, and NaN stays."""
    for limit in (0.3, 0.0, 1e-4, 2, torch.tensor(0.5), INF):
        params = leaves([*drawn([(n,) for n in SIZES], dtype), None, randn((3, 5, 7), 50, dtype)])
        params[6].grad[:5] = torch.tensor([NAN, INF, -INF, 0.0, -0.0])
        expected = exact(params)
        theirs.clip_grad_value_(expected, float(limit), foreach=False)
        assert genopt_ext.clip_grad_value_(params, limit) is None
        for p, q in zip(params, expected, strict=True):
            if p.grad is not None and p.grad.numel():
                assert_same_bits(p.grad, q.grad.to(dtype), (dtype, limit))


def test_values_within_the_limit_are_not_written():
    params = leaves(drawn([(300,), (7,), (2, 3)]))
    before = gradients_of(params)
    genopt_ext.clip_grad_value_(params, 100.0)
    assert_untouched(params, before)
    params[2].grad[1, 2] = -200.0
    version = params[2].grad._version
    genopt_ext.clip_grad_value_(params, 100.0)
    assert params[2].grad[1, 2] == -100.0 and params[2].grad._version > version


def test_complex_values_are_refused():
    params = leaves([randn((5,), 0), randn((5,), 1, torch.complex64)])
    before = gradients_of(params)
    with pytest.raises((TypeError, ValueError, RuntimeError), match="(?i)complex"):
        genopt_ext.clip_grad_value_(params, 1e-3)
    assert_untouched(params[1:], before[1:])


@pytest.mark.parametrize("dtype", [*REAL, torch.complex64], ids=str)
def test_clipping_with_a_given_norm(dtype):
    for total, max_norm in ((10.0, 1.0), (1.0, 10.0), (INF, 1.0), (NAN, 1.0), (10.0, 0.0)):
        params = leaves([*drawn([(300,), (7,)], dtype), None])
        before = gradients_of(params)
        expected = exact(params)
        theirs.clip_grads_with_norm_(expected, max_norm, torch.tensor(total, dtype=torch.float64), foreach=False)
        genopt_ext.clip_grads_with_norm_(params, max_norm, torch.tensor(total))
        assert_close_grads(params, expected, (total, max_norm))
        if total < max_norm:
            assert_untouched(params, before)


def test_a_norm_is_no_part_of_a_graph():
    grad = randn((5,), 0).requires_grad_()
    assert not genopt_ext.get_total_norm([grad * 2]).requires_grad
    p = leaves([grad * 2])[0]
    loss = (p.grad * p.grad).sum()
    assert not genopt_ext.clip_grad_norm_([p], 0.1).requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_many_small_gradients():
    params = leaves(torch.ones(5000, 3).unbind())
    assert relative_error(genopt_ext.clip_grad_norm_(params, 1.0), torch.tensor(15000.0).double().sqrt()) < 1e-6
    whole = torch.stack([p.grad for p in params])
    torch.testing.assert_close(whole, torch.full_like(whole, 1 / math.sqrt(15000)))


@st.composite
def gradient(draw):
    if draw(st.integers(0, 5)) == 0:
        return None
    dtype = draw(st.sampled_from([*REAL, torch.complex64]))
    shape = draw(st.lists(st.integers(0, 9), max_size=3))
    scale = draw(st.sampled_from([1.0, 1e-3, 100.0]))
    room = randn([2 * n + 1 for n in shape], draw(st.integers(0, 99)), dtype) * scale
    view = room[
        tuple(slice(i := draw(st.integers(0, 1)), i + n * s, s) for n in shape for s in [draw(st.integers(1, 2))])
    ]
    return view.permute(draw(st.permutations(range(len(shape)))))


@settings(max_examples=120, deadline=None)
@given(
    st.lists(gradient(), max_size=6),
    st.sampled_from(NORMS),
    st.sampled_from([0.0, 0.01, 1.0, 30.0, 1e6]),
    st.booleans(),
)
def test_fuzzed(grads, norm_type, max_norm, by_value):
    if not by_value:
        assert_clips_as_torch(grads, max_norm, norm_type)
        again = genopt_ext.get_total_norm([g for g in grads if g is not None], norm_type)
        after = theirs.get_total_norm([double(g) for g in grads if g is not None and g.numel()], norm_type)
        torch.testing.assert_close(again.double(), after.double(), rtol=1e-6, atol=0)
    elif not any(g is not None and g.is_complex() for g in grads):
        params = leaves(grads)
        expected = exact(params)
        genopt_ext.clip_grad_value_(params, max_norm)
        if any(q.grad is not None for q in expected):  # torch's fails where there is nothing
            theirs.clip_grad_value_(expected, max_norm, foreach=False)
        assert_close_grads(params, expected)


@pytest.mark.parametrize("kind", ["inference", "zero"])
@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_"])
def test_a_gradient_that_can_not_be_written_is_refused_before_others_are(name, kind):
    with torch.inference_mode():
        inference = torch.full((4,), 5.0)
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    params[0].grad = torch.full((4,), 5.0)
    params[1].grad = inference if kind == "inference" else torch._efficientzerotensor(4)
    bound = (1.0, torch.tensor(9.0)) if name == "clip_grads_with_norm_" else (1.0,)
    with pytest.raises(RuntimeError, match=f"{name}: gradient 1 .*can not be changed in place"):
        getattr(genopt_ext, name)(params, *bound)
    assert_same_bits(params[0].grad, torch.full((4,), 5.0))
