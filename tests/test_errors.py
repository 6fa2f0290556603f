"""Refused calls: the exception type, the sentence, and that nothing was changed."""

from __future__ import annotations

import math
import warnings
from functools import partial

import pytest
import torch
from cases import (
    EMULATED,
    INF,
    INT8,
    NAN,
    NATIVE,
    NUMBERS,
    STATEFUL,
    assert_option_refused,
    assert_same_bits,
    assert_same_state,
    made,
    parameters,
    randn,
    refused,
    set_grads,
    train,
    trained,
)
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from genopt_ext import _backend, optim

OURS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in optim.TORCHS}


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_error_that_torch_raises(name):
    rows = OURS[name].optim_error_inputs_func(device="cpu", dtype=torch.float32)
    assert len(rows) >= 6
    for row in rows:
        given = row.optimizer_error_input
        params = given.params if given.params is not None else parameters([(2, 2)])
        assert row.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(row.error_type, match=row.error_regex):
                getattr(optim, name)(params, **given.kwargs)


RANGES = {name: getattr(optim, name).rule.ranges for name in optim.OURS}
INITIAL = "initial_accumulator_value"
# Not those which only say with what a state begins.
OPTIONS = [
    (n, option)
    for n, ranges in RANGES.items()
    for option in ranges
    if not ranges[option].each and option not in (getattr(optim, n).rule.initial or {}).values()
]


BAD = (NAN, INF, -INF, "0.1", None, [0.1], torch.tensor([0.1, 0.1]), torch.tensor(NAN, device="cpu"), 1j)


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_options_that_are_no_finite_number(name, option, backend):
    allowed = RANGES[name][option]
    for value in BAD:
        infinite = isinstance(value, float) and math.isinf(value) and not allowed.finite
        if not (value is None and allowed.is_optional) and not infinite:
            assert_option_refused(name, {option: value}, option, backend)


def test_options_of_a_group_without_gradients_do_not_matter(backend):
    """As torch, whose schedulers' tests rely on it."""
    idle, p = parameters([(2,), (3,)])
    opt = optim.Adam([{"params": [idle]}, {"params": [p]}], lr=0.1, backend=backend)
    for betas in ((22.0, 0.9), (NAN, 0.9)):
        opt.param_groups[0]["betas"] = betas
        before = p.detach().clone()
        p.grad = torch.ones(3)
        opt.step()
        torch.testing.assert_close(p.detach(), before - 0.1)
    idle.grad = torch.ones(2)
    refused(opt, "group 0: Invalid beta parameter", ValueError)


BETAS = [(NAN, 0.9), (0.9, 1.0), (0.9, "x"), (0.9,), 0.9, (-0.1, 0.9), (0.9, INF)]


@pytest.mark.parametrize(
    ("name", "given", "error", "message"),
    [
        # Which steps do not read.
        *(("Adagrad", {INITIAL: value}, (TypeError, ValueError), INITIAL) for value in BAD),
        *(("Rprop", dict(lr=value), (TypeError, ValueError), "lr") for value in BAD),
        *(("Rprop", dict(etas=etas), ValueError, "Invalid eta values") for etas in ((0, 1.2), (0.5, 1.0), (1.2, 0.5))),
        ("Rprop", dict(step_sizes=(1e-6, INF)), ValueError, "Invalid step sizes: 1e-06, inf"),
        ("Adadelta", dict(rho=1.1), ValueError, "rho must be a finite number >= 0 and <= 1"),
        *(("Adam", dict(betas=betas), (TypeError, ValueError), "beta") for betas in BETAS),
        ("AdamW", dict(beta=0.9), TypeError, "unexpected keyword argument 'beta'"),
        ("AdamW", dict(maximize="yes"), TypeError, "maximize must be True or False"),
        ("SGD", dict(nesterov=True), ValueError, "Nesterov momentum requires a momentum and zero dampening"),
        ("SGD", dict(backend="gpu"), ValueError, "backend must be one of auto, cpu, cuda, reference, got 'gpu'"),
        ("SGD", dict(backend="cuda"), RuntimeError, "backend is 'cuda', but the CUDA kernels are not built: "),
    ],
    ids=str,
)
def test_other_arguments(name, given, error, message):
    if given.get("backend") == "cuda" and _backend.native.has_cuda:
        pytest.skip("the kernels are built")
    with pytest.raises(error, match=message):
        getattr(optim, name)(parameters([(2,)]), **given)


@pytest.mark.parametrize("case", STATEFUL, ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_refused_steps_change_nothing(case, backend, trained):
    params = parameters([(6, 4), (5,)])
    opt = case.ours([("first", params[0]), ("second", params[1])], backend=backend)
    if trained:
        train(opt, params, 2)
    where = rf"{case.name}.step: group 0 parameter 1 \('second', shape \[5\]\): "
    set_grads(params, 5)
    good = params[1].grad
    params[1].grad = good.to_sparse()
    # Where torch serves them, these cases have a decay that it does not.
    refused(opt, where + "(.*does not support sparse gradients.*use torch.optim.S?|weight_decay option is not)")
    params[1].grad = None
    if hasattr(params[1], "grad_dtype"):
        params[1].grad_dtype = None
        params[1].grad = good.double()
        refused(opt, where + "gradient is torch.float64, parameter is torch.float32; cast the gradient")
        params[1].grad = None
    params[1].grad = good
    params[1].data = randn((3,), 1)
    refused(opt, r"shape \[3\]\): gradient has shape \[5\], parameter \[3\]")
    params[1].data = randn((5,), 1)
    state = opt.state[params[1]]
    if trained and "step" in state:
        name = next(name for name in state if name not in NUMBERS)
        kept, step = state.pop(name), state["step"]
        refused(opt, where + f"its state has .* but no '{name}'")
        state[name], state["step"] = kept, torch.zeros(2)
        refused(opt, where + "state 'step' is")
        state["step"] = step
    opt.step()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex32], ids=str)
@pytest.mark.parametrize("name", optim.OURS)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_a_gradient_of_a_parameter_that_takes_no_step(name, dtype, backend):
    params = [torch.nn.Parameter(randn((5,), 0)), torch.zeros(3, dtype=dtype)]
    opt = made(name, params, backend=backend)
    params[0].grad = randn((5,), 1)
    opt.step()
    params[1].grad = torch.ones(3, dtype=dtype)
    refused(opt, rf"{name}.step: group 0 parameter 1 .*: parameter is {dtype} and has a gradient; clear it, or")


def test_shared_memory_is_refused():
    base = randn((40,), 0)
    halves = [base[:20], base[20:]]
    interleaved = [base[::2], base[1::2]]
    for good in (halves, interleaved):
        for t in good:
            t.grad = torch.ones_like(t)
        optim.SGD(good, lr=0.1).step()
    for bad in ([base[:21], base[20:]], [base[::2], base[2:3]], [base, base.view(4, 10)]):
        for t in bad:
            t.grad = torch.ones_like(t)
        refused(optim.AdamW(bad, backend=NATIVE), "group 0 parameter 0.* shares memory with group 0 parameter 1")
    expanded = torch.zeros(1).expand(5)
    expanded.grad = torch.ones(5)
    refused(optim.SGD([expanded], backend=NATIVE), "share memory with one another")
    # A view that is in the optimizer but has no gradient does no harm, until it has one.
    pair = [base[:21], base[20:]]
    opt = optim.SGD(pair, lr=0.1, backend=NATIVE)
    pair[0].grad = torch.ones(21)
    opt.step()
    pair[1].grad = torch.ones(20)
    refused(opt, "shares memory")
    pair[0].grad = None
    opt.step()


@pytest.mark.parametrize("first", (0, 1, 2))
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, dict(ema_decay=0.9, master_weights=True)) for name in ("exp_avg", "step", "ema", "master")),
        *((name, INT8) for name in ("exp_avg_codes", "exp_avg_scales")),
        ("compensation", dict(param_rounding="kahan")),
    ],
    ids=str,
)
def test_state_that_shares_memory_is_refused(name, options, first):
    """Also what comes to share it later, and wherever its parameter stands."""
    params = parameters([(300,)] * 4, torch.bfloat16)
    opt = trained(partial(optim.AdamW, backend=NATIVE, **options), params, 2)
    opt.state[params[first]][name] = opt.state[params[first + 1]][name]
    either = f"group 0 parameter [{first}{first + 1}]"
    refused(opt, f"{either} .* shares memory with {either} ")


def test_a_parameter_that_comes_to_share_memory_is_refused():
    params = parameters([(5,)] * 3)
    opt = trained(partial(optim.AdamW, backend=NATIVE), params, 2)
    params[0].data = params[1].data
    refused(opt, "group 0 parameter [01] .* shares memory with group 0 parameter [01] ")


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize(
    "option, kwargs",
    {
        "max_grad_norm": dict(max_grad_norm=1.0),
        "a clip by norm": dict(max_grad_norm=1.0),
        "skip_nonfinite": dict(skip_nonfinite=True),
        "ema_decay": dict(ema_decay=0.9),
        "accumulate": {},
    }.items(),
)
def test_the_same_parameter_twice_beside_what_needs_it_once(option, kwargs, backend):
    p = parameters([(5,)])[0]
    of_group = kwargs if option == "a clip by norm" else {}
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = optim.SGD(
            [dict(params=[p, p], **of_group)], lr=0.1, momentum=0.9, backend=backend, **({} if of_group else kwargs)
        )
    p.grad = torch.ones(5)
    call = "step" if kwargs else option
    refused(opt, f"is the same parameter as group 0 parameter 1.*{option}.*list each parameter once", call=call)
    assert_same_bits(p.grad, torch.ones(5))


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_the_same_parameter_twice_whose_average_alone_moves(backend):
    p, other = parameters([(5,), (5,)])
    opt = optim.SGD([dict(params=[p]), dict(params=[other])], lr=0.1, ema_decay=0.9, backend=backend)
    opt.param_groups[1]["params"][0] = p  # by hand, which torch does not see
    refused(opt, "is the same parameter as group 1 parameter 0.*ema_decay.*list each parameter once")
    opt.param_groups[1]["ema_decay"] = None
    opt.step()  # there is one average, and nothing else to do
    assert set(opt.state[p]) == {"ema"}


def test_inference_tensors():
    with torch.inference_mode():
        p = torch.zeros(3)
    p_grad = torch.ones(3)
    opt = optim.SGD([p])
    with torch.inference_mode():
        p.grad = p_grad
    refused(opt, "inference tensor")


def inference_tensor():
    with torch.inference_mode():
        return torch.ones(5)


# What can not be stepped, and what the message says of it; where it may stand.
UNUSUAL = {
    "inference": (inference_tensor, "is an inference tensor", ("state", "zeroed gradient")),
    "mkldnn": (lambda: torch.ones(5).to_mkldnn(), "is torch._mkldnn, expected torch.strided", ("state",)),
    "sparse": (lambda: torch.ones(5).to_sparse(), "is torch.sparse_coo, expected torch.strided", ("state",)),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(1)] * 5), "is nested", ("state",)),
    "expanded": (lambda: torch.ones(1).expand(5), "share memory with one another", ("state",)),
    "zero tensor": (lambda: torch._efficientzerotensor(5), "is a zero tensor", ("state", "gradient")),
    "meta": (lambda: torch.ones(5, device="meta"), "is on meta, parameter on cpu", ("state",)),
    "int32": (lambda: torch.ones(5, dtype=torch.int32), "is torch.int32, parameter is torch.float32", ("state", "ema")),
    "fp8": (lambda: torch.ones(5).to(torch.float8_e4m3fn), "is torch.float8_e4m3fn, parameter", ("state", "ema")),
    "complex": (lambda: torch.ones(5, dtype=torch.complex64), "is torch.complex64, parameter", ("state", "gradient")),
    "shape": (lambda: torch.ones(1), r"has shape \[1\], expected \[5\]", ("state", "ema")),
    "no tensor": (lambda: [1.0], "has list, expected", ("state", "ema")),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="makes tensors on the CPU")
@pytest.mark.parametrize(("kind", "where"), [(kind, where) for kind, row in UNUSUAL.items() for where in row[2]])
def test_unusual_tensors(kind, where, backend):
    make, match, _ = UNUSUAL[kind]
    for case in STATEFUL:
        if kind == "sparse" and case.name in ("SGD", "Adagrad"):
            continue  # what sparse gradients leave: see test_by_torch.py
        params = parameters([(5,), (5,), (5,)])
        opt = case.ours(params, backend=backend, ema_decay=0.9)
        train(opt, params, 1)
        set_grads(params, 1)
        if "gradient" in where:
            if hasattr(params[1], "grad_dtype"):
                params[1].grad_dtype = None
            params[1].grad = make()
        elif where == "ema":
            opt.state[params[1]]["ema"] = make()
        else:
            name = next(name for name in opt.state[params[1]] if name not in (*NUMBERS, "ema"))
            opt.state[params[1]][name] = make()
        for only_averages in (False, True) if where == "ema" else (False,):
            if only_averages:
                params[1].grad = None
            others = [params[0].detach().clone(), params[2].detach().clone()]
            step = opt.step_and_zero_ if where == "zeroed gradient" else opt.step
            said = rf"{case.name}.step: group 0 parameter 1 \(shape \[5\]\): .*{match}"
            with pytest.raises(RuntimeError, match=said):
                step()
            assert_same_bits([params[0].detach(), params[2].detach()], others)


@pytest.mark.parametrize("case", STATEFUL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.narrow_state
def test_step_counters_that_can_not_be(case, dtype, backend):
    if EMULATED and backend == "auto":
        pytest.skip("a counter on a GPU is not read")
    params = parameters([(5,), (5,)])
    opt = case.ours(params, backend=backend, state_dtype=torch.bfloat16)  # SGD counts steps too then
    train(opt, params, 1)
    if "step" not in opt.state[params[1]]:
        return
    set_grads(params, 1)
    for value in (NAN, INF, -INF, -1.0, 1e30, 2.5, 2.0**54):
        opt.state[params[1]]["step"] = torch.tensor(value, dtype=dtype, device="cpu")
        refused(opt, r"group 0 parameter 1 .*state 'step' is .*expected a whole number from 0 to 2\*\*53")
    for value in (0.0, 1.0, 2.0**24, 2.0**53):
        opt.state[params[1]]["step"] = torch.tensor(value, dtype=dtype, device="cpu")
        opt.step()
        assert torch.isfinite(params[1]).all()


@pytest.mark.parametrize("name", ["found_inf", "grad_scale"])
def test_scales_that_are_no_number(name, backend):
    params = parameters([(5,)])
    opt = optim.SGD(params, lr=0.1, fused=True, backend=backend)
    set_grads(params, 0)
    for value in (
        torch.zeros(0),
        torch.ones(1).expand(5),
        torch.ones(2),
        torch.ones(1, device="meta"),
        torch.ones((), dtype=torch.complex64),
        torch.ones(1).to_sparse(),
    ):
        setattr(opt, name, value)
        refused(opt, f"SGD.step: {name} must be a number or a real tensor of one element, got shape")
    before = params[0].detach().clone()
    for value in (1, True, 1.0, torch.ones(1, dtype=torch.int64), torch.ones((), dtype=torch.bool)):
        setattr(opt, name, value)
        opt.step()
        assert torch.equal(params[0], before) == (name == "found_inf")  # a scale of 1


def test_accumulate_takes_all_gradients_or_none(backend):
    params = parameters([(5,), (4,)])
    opt = optim.SGD(params, lr=0.1, backend=backend)
    set_grads(params, 0)
    opt.accumulate()
    sums = [opt.accumulator.sums[p].clone() for p in params]
    set_grads(params, 1)
    kept = params[1].grad
    params[1].data = torch.zeros(2, 2)
    params[1].grad = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="accumulate: .* in an earlier micro-batch"):
        opt.accumulate()
    params[1].data = torch.zeros(4)
    params[1].grad = torch._efficientzerotensor(4) if torch.get_default_device().type == "cpu" else kept[:3]
    with pytest.raises(RuntimeError, match="accumulate: group 0 parameter 1 .*gradient is"):
        opt.accumulate()
    assert_same_bits([opt.accumulator.sums[p] for p in params], sums)
    assert params[0].grad is not None and opt.accumulator.micro_batches == 1
    params[1].grad = kept
    opt.accumulate()
    opt.step()


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_state_made_in_inference_mode_is_stepped_outside_of_it(case, backend):
    results = []
    for inside in (True, False):
        params = parameters([(5,), (4,)])
        opt = case.ours(params, backend=backend, ema_decay=0.9, max_grad_norm=1.0)
        with torch.inference_mode(inside):
            train(opt, params, 1)
            set_grads(params, 1)
            opt.step_and_zero_()
            set_grads(params, 2)
            opt.accumulate()
            opt.step()
        train(opt, params, 1, first=3)
        results.append(opt)
    assert_same_state(*results, case)
    assert not any(t.is_inference() for state in results[0].state.values() for t in state.values())


def test_an_explicit_backend_makes_no_state_where_it_has_no_kernels():
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(5, device="meta"))
    opt = optim.Adam([p, q], backend=NATIVE)
    p.grad = torch.ones(3)
    opt.step()
    q.grad = torch.ones(5, device="meta")
    opt.param_groups[0]["state_dtype"] = torch.bfloat16
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=f"backend is '{NATIVE}', but there are no kernels for meta .*use 'auto'"):
        opt.step()
    assert_same_bits(p.detach(), before)
    assert not opt.state.get(q)
    assert opt.state[p]["exp_avg"].dtype == torch.float32


def test_cautious(backend):
    for name in ("Adam", "AdamW", "Lion", "Muon"):
        assert_option_refused(name, {"cautious": "both"}, "cautious", backend)
    params = parameters([(4, 4)])
    for cautious in ("weight_decay", "update"):
        with pytest.raises(ValueError, match="decoupled_weight_decay=True"):
            optim.Adam(params, weight_decay=0.1, cautious=cautious, backend=backend)
    opt = optim.Adam(params, weight_decay=0.1, decoupled_weight_decay=True, cautious="weight_decay", backend=backend)
    train(opt, params, 1)
    opt.param_groups[0]["cautious"] = "updates"
    set_grads(params, 1)
    refused(opt, "Invalid cautious: 'updates'", ValueError)
    opt.param_groups[0].update(cautious="update", decoupled_weight_decay=False)
    refused(opt, "use it with decoupled_weight_decay=True", ValueError)
