"""Refused calls: the exception type, the sentence, and that nothing was changed."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cases import INF, NAN, NATIVE, STATEFUL, assert_same_bits, parameters, randn, set_grads, train
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from genopt_ext import _backend, optim

OURS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in optim.OURS}


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


NUMBERS = {
    "Adam": ["lr", "eps", "weight_decay"],
    "AdamW": ["lr", "eps", "weight_decay"],
    "SGD": ["lr", "momentum", "dampening", "weight_decay"],
    "RMSprop": ["lr", "alpha", "eps", "weight_decay", "momentum"],
    "Adagrad": ["lr", "lr_decay", "eps", "weight_decay", "initial_accumulator_value"],
}


@pytest.mark.parametrize(("name", "option"), [(n, o) for n, options in NUMBERS.items() for o in options])
def test_options_that_are_no_finite_number(name, option):
    make = getattr(optim, name)
    for value in (NAN, INF, -INF, "0.1", None, [0.1], torch.tensor([0.1, 0.1]), torch.tensor(NAN, device="cpu"), 1j):
        with pytest.raises((TypeError, ValueError), match=option):
            make(parameters([(2,)]), **{option: value})
        # In a group, at construction, when added, and when set between steps.
        with pytest.raises((TypeError, ValueError), match=f"group 0.*{option}"):
            make([{"params": parameters([(2,)]), option: value}])
        params = parameters([(2,)])
        opt = make(params)
        with pytest.raises((TypeError, ValueError), match=f"group 1.*{option}"):
            opt.add_param_group({"params": parameters([(2,)]), option: value})
        assert len(opt.param_groups) == 1
        if option == "initial_accumulator_value":
            continue
        for backend in ("auto", "reference"):
            opt = make(params, backend=backend)
            opt.param_groups[0][option] = value
            set_grads(params, 0)
            before = params[0].detach().clone()
            with pytest.raises((TypeError, ValueError), match=f"group 0.*{option}"):
                opt.step()
            assert_same_bits(params[0].detach(), before)


@pytest.mark.parametrize("betas", [(NAN, 0.9), (0.9, 1.0), (0.9, "x"), (0.9,), 0.9, (-0.1, 0.9), (0.9, INF)], ids=str)
def test_betas(betas):
    with pytest.raises((TypeError, ValueError), match="beta"):
        optim.Adam(parameters([(2,)]), betas=betas)


def test_other_arguments():
    with pytest.raises(TypeError, match="floating-point or complex, got torch.int64"):
        optim.AdamW([torch.zeros(3, dtype=torch.int64)])
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta'"):
        optim.AdamW(parameters([(2,)]), beta=0.9)
    with pytest.raises(TypeError, match="maximize must be True or False"):
        optim.AdamW(parameters([(2,)]), maximize="yes")
    with pytest.raises(ValueError, match="Nesterov momentum requires a momentum and zero dampening"):
        optim.SGD(parameters([(2,)]), nesterov=True)
    with pytest.raises(ValueError, match="backend must be one of auto, cpu, cuda, reference, got 'gpu'"):
        optim.SGD(parameters([(2,)]), backend="gpu")
    if not _backend.native.has_cuda:
        with pytest.raises(RuntimeError, match="backend is 'cuda', but the CUDA kernels are not built: "):
            optim.SGD(parameters([(2,)]), backend="cuda")
    for name in optim.OURS:
        with pytest.raises(ValueError, match=f"differentiable=True.*use torch.optim.{name}"):
            getattr(optim, name)(parameters([(2,)]), differentiable=True)


def refused(opt, params, match, error=RuntimeError):
    """The step is refused, and changes no parameter, gradient or state."""
    saved = [p.detach().clone() for p in params if not p.is_sparse]
    state = copy.deepcopy(opt.state_dict()["state"])
    with pytest.raises(error, match=match):
        opt.step()
    for p, old in zip([p for p in params if not p.is_sparse], saved, strict=True):
        assert_same_bits(p.detach(), old)
    now = opt.state_dict()["state"]
    assert now.keys() == state.keys()
    for key in state:
        assert now[key].keys() == state[key].keys()
        for name, t in state[key].items():
            if isinstance(t, torch.Tensor):
                assert_same_bits(now[key][name], t)


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
    refused(opt, params, where + ".*does not support sparse gradients.*use torch.optim.S?")
    params[1].grad = None
    if hasattr(params[1], "grad_dtype"):
        params[1].grad_dtype = None
        params[1].grad = good.double()
        refused(opt, params, where + "gradient is torch.float64, parameter is torch.float32; cast the gradient")
        params[1].grad = None
    params[1].grad = good
    params[1].data = randn((3,), 1)
    refused(opt, params, r"shape \[3\]\): gradient has shape \[5\], parameter \[3\]")
    params[1].data = randn((5,), 1)
    names = [n for n in opt.state.get(params[1], {}) if n != "step"]
    if not trained or not names:
        return
    state, name = opt.state[params[1]], names[0]
    kept = state[name]
    state[name] = torch.zeros(3)
    refused(opt, params, where + rf"state '{name}' has shape \[3\], expected \[5\]")
    state[name] = torch.zeros(5, dtype=torch.int64)
    refused(opt, params, where + f"state '{name}' is torch.int64")
    if "step" in state:
        del state[name]
        refused(opt, params, where + f"its state has .* but no '{name}'")
        state[name], step = kept, state["step"]
        state["step"] = torch.zeros(2)
        refused(opt, params, where + "state 'step' is")
        state["step"] = step
    state[name] = kept
    opt.step()


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
        refused(optim.AdamW(bad, backend=NATIVE), bad, "group 0 parameter 0.* shares memory with group 0 parameter 1")
    expanded = torch.zeros(1).expand(5)
    expanded.grad = torch.ones(5)
    refused(optim.SGD([expanded], backend=NATIVE), [expanded], "share memory with one another")
    # A view that is in the optimizer but has no gradient does no harm, until it has one.
    pair = [base[:21], base[20:]]
    opt = optim.SGD(pair, lr=0.1, backend=NATIVE)
    pair[0].grad = torch.ones(21)
    opt.step()
    pair[1].grad = torch.ones(20)
    refused(opt, pair, "shares memory")
    pair[0].grad = None
    opt.step()


@pytest.mark.parametrize("first", (0, 1, 2))
@pytest.mark.parametrize("name", ("exp_avg", "step", "ema", "master"))
def test_state_that_shares_memory_is_refused(name, first):
    """Also what comes to share it later, and wherever its parameter stands."""
    params = parameters([(5,)] * 4, torch.bfloat16)
    opt = optim.AdamW(params, ema_decay=0.9, master_weights=True, backend=NATIVE)
    train(opt, params, 2)
    opt.state[params[first]][name] = opt.state[params[first + 1]][name]
    either = f"group 0 parameter [{first}{first + 1}]"
    refused(opt, params, f"{either} .* shares memory with {either} ")


def test_a_parameter_that_comes_to_share_memory_is_refused():
    params = parameters([(5,)] * 3)
    opt = optim.AdamW(params, backend=NATIVE)
    train(opt, params, 2)
    params[0].data = params[1].data
    refused(opt, params, "group 0 parameter [01] .* shares memory with group 0 parameter [01] ")


def test_the_same_parameter_twice():
    p = parameters([(5,)])[0]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = optim.SGD([p, p], backend=NATIVE)
    p.grad = torch.ones(5)
    refused(opt, [p], "is the same parameter as group 0 parameter 1.*list each parameter once")


def test_inference_tensors():
    with torch.inference_mode():
        p = torch.zeros(3)
    p_grad = torch.ones(3)
    opt = optim.SGD([p])
    with torch.inference_mode():
        p.grad = p_grad
    refused(opt, [p], "inference tensor")


def test_gpu_gradients_and_meta_parameters():
    p = torch.nn.Parameter(torch.zeros(3, device="meta"))
    p.grad = torch.zeros(3, device="meta")
    with pytest.raises(RuntimeError, match=f"backend is '{NATIVE}', but there are no kernels for meta"):
        optim.SGD([p], backend=NATIVE).step()
