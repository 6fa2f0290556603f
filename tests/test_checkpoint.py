"""Checkpoints: what is no checkpoint of these parameters is refused whole; what torch loads and trains with loads."""

from __future__ import annotations

import copy
import re
import warnings
from collections import OrderedDict
from functools import partial

import checkpoints
import oracles
import pytest
import torch
from cases import (
    CASES,
    COPIES,
    DEVICE,
    FIRST,
    INF,
    NAN,
    STATEFUL,
    assert_same_bits,
    assert_same_state,
    copies_of,
    in_training,
    parameters,
    places,
    train,
    trained,
)
from cases import saved as through_a_file
from hypothesis import given, settings
from hypothesis import strategies as st

from genopt_ext import optim

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="what is looked at is the same on every device")


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.sampled_from(checkpoints.KINDS), st.integers(0, 2**32), st.sampled_from(["auto", "reference"]))
def test_broken_checkpoints_change_nothing(kind, seed, backend):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoints.check(kind, seed, backend)


def entry(key, value):
    return lambda saved: saved["state"][1].update({key: value})


def group(**options):
    return lambda saved: saved["param_groups"][0].update(options)


def without(*keys):
    def change(saved):
        for key in keys[:-1]:
            saved = saved[key]
        del saved[keys[-1]]

    return change


def string_ids(saved):
    saved["param_groups"][0]["params"] = [str(key) for key in saved["param_groups"][0]["params"]]


P1 = r"AdamW.load_state_dict: group 0 parameter 1 \(shape \[5\]\): "
BROKEN = {
    "an entry of nobody's": (
        lambda saved: saved.update(state={7: {"step": "x"}, **saved["state"], 1: None}),
        P1 + "its state is NoneType",
    ),
    "a moment lacks": (without("state", 1, "exp_avg"), P1 + "its state has .* but no 'exp_avg'"),
    **{
        f"step {value}": (entry("step", value), P1 + f"state 'step' is {re.escape(repr(value))}, expected a number")
        for value in ("x", [1], {})
    },
    **{
        f"step {value}": (entry("step", torch.tensor(value)), P1 + "state 'step' is .*, expected a whole number from 0")
        for value in (NAN, INF, -INF, -1.0, 1e30, 2.5)
    },
    "step number": (entry("step", -1), P1 + "state 'step' is -1.0, expected a whole number"),
    "step of two": (
        entry("step", torch.ones(2)),
        P1 + r"state 'step' is torch.float32 of shape \[2\], expected a number",
    ),
    "shape": (entry("exp_avg", torch.ones(4)), P1 + r"state 'exp_avg' has shape \[4\], expected \[5\]"),
    "no tensor": (entry("exp_avg", 1.0), P1 + r"state 'exp_avg' has float, expected \[5\]"),
    "fp8": (entry("exp_avg", torch.ones(5).to(torch.float8_e4m3fn)), P1 + "state 'exp_avg' is torch.float8_e4m3fn"),
    "complex": (entry("exp_avg", torch.ones(5, dtype=torch.complex64)), P1 + "state 'exp_avg' is torch.complex64"),
    "sparse": (entry("exp_avg", torch.ones(5).to_sparse()), P1 + "state 'exp_avg' is torch.sparse_coo"),
    "meta": (entry("exp_avg", torch.ones(5, device="meta")), P1 + "state 'exp_avg' is on meta"),
    "entry": (lambda saved: saved["state"].update({1: [1, 2]}), P1 + "its state is list, expected dict"),
    "codes": (
        lambda saved: saved["state"][1].update(
            exp_avg_codes=torch.zeros(5, dtype=torch.int8), exp_avg_scales=torch.zeros(2), exp_avg=None
        ),
        P1 + r"state 'exp_avg_scales' is torch.float32 of shape \[2\], expected torch.float32 of \[1\]",
    ),
    "bitsandbytes": (
        lambda saved: saved["state"].update({1: dict(step=3, state1=torch.zeros(5), state2=torch.zeros(5))}),
        P1 + r"its state has \['state1', 'state2', 'step'\], as bitsandbytes saves it",
    ),
    "bitsandbytes, wrapped": (
        lambda saved: saved["state"].update({1: dict(__bnb_optimizer_quant_state__={}, step=3)}),
        P1 + "its state has .*, as bitsandbytes saves it",
    ),
    "betas": (group(betas=None), "AdamW.load_state_dict: group 0: .*betas must be 2 numbers"),
    "lr": (group(lr=-1.0), "AdamW.load_state_dict: group 0: Invalid learning rate: -1.0"),
    "no lr": (without("param_groups", 0, "lr"), "group 0 has no 'lr'; add it, as lr=0.1"),
    "flag": (group(amsgrad="x"), "group 0: .*amsgrad must be True or False"),
    "params": (group(params=3), "group 0 is no dict with a list of 'params'"),
    "unhashable params": (group(params=[[], {}]), "group 0: params: TypeError: unhashable"),
    "params of another kind": (string_ids, "state has the key 0, and the groups' params '0'"),
    "a param twice": (group(params=[0, 0]), "group 0: params has 0 twice"),
    "names": (group(param_names=["a"]), r"group 0: param_names is \['a'\], expected 2 names"),
    "huge": (entry("exp_avg", torch.ones(1).expand(2**40)), P1 + r"state 'exp_avg' has shape \[1099511627776\]"),
    "fewer params": (
        group(params=[0]),
        "parameter group that doesn't match the size of optimizer's group: group 0 has 1",
    ),
    "fewer groups": (
        lambda saved: saved["param_groups"].clear(),
        "loaded state dict has a different number of parameter groups: 0, expected 1",
    ),
    "no group": (lambda saved: saved["param_groups"].__setitem__(0, None), "group 0 is no dict"),
    "no groups": (without("param_groups"), "'param_groups' is NoneType, expected list"),
    "no state": (without("state"), "'state' is NoneType, expected dict"),
}


def assert_refused(opt, saved, match, error=ValueError):
    before = checkpoints.seen(opt)
    with pytest.raises(error, match=match):
        opt.load_state_dict(saved)
    checkpoints.assert_unchanged(opt, before, match)


@pytest.mark.parametrize("what", BROKEN)
def test_refused_checkpoints(what, backend):
    """One type of error, which names the entry."""
    change, match = BROKEN[what]
    opt = trained(partial(optim.AdamW, lr=0.1, backend=backend), parameters([(3,), (5,)]), 2)
    saved = copy.deepcopy(opt.state_dict())
    change(saved)
    assert_refused(opt, saved, match)


@pytest.mark.parametrize("saved", [None, [], "x", 3], ids=str)
def test_what_is_no_dict(saved):
    assert_refused(optim.SGD(parameters([(3,)])), saved, "SGD.load_state_dict: the checkpoint is .*, expected dict")


def test_a_refused_checkpoint_leaves_what_was_accumulated(backend):
    p = parameters([(3,)])[0]
    opt = optim.SGD([p], lr=1.0, backend=backend)
    p.grad = torch.ones(3)
    opt.accumulate()
    before = p.detach().clone()
    with pytest.raises(ValueError, match="group 0 has no"):
        opt.load_state_dict({"state": {}, "param_groups": [{"params": [0]}]})
    opt.step()
    assert_same_bits(p.detach(), before - 1)


# What torch's classes load and go on with

NEWER = "amsgrad maximize foreach differentiable fused capturable decoupled_weight_decay".split()

CHANGES = {
    "as saved": lambda saved: None,
    "more in a group": group(note="mine"),
    "more in an entry": lambda saved: [e.update(mine={"a": [torch.ones(2)]}) for e in saved["state"].values()],
    "nobody's entry": lambda saved: saved.update(state={7: {"step": torch.tensor(1.0)}, **saved["state"]}),
    "an entry of the user's own": lambda saved: saved["state"].update(mine={"step": torch.tensor(1.0)}),
    "one parameter without state": without("state", 1),
    "an OrderedDict": lambda saved: saved.update(state=OrderedDict(saved["state"])),
    "float64 state": lambda saved: [
        e.update({k: t.double() for k, t in e.items() if isinstance(t, torch.Tensor)}) for e in saved["state"].values()
    ],
    "steps as numbers": lambda saved: [e.update(step=3) for e in saved["state"].values() if "step" in e],
    "older": lambda saved: [g.pop(name, None) for g in saved["param_groups"] for name in NEWER],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_what_torch_loads_and_trains_with(case, change):
    first = trained(case.torch, parameters([(3,), (5,)]))
    runs = []
    for make in (case.ours, case.torch):
        saved = copy.deepcopy(first.state_dict())
        CHANGES[change](saved)
        params = copies_of(places(first))
        opt = make(params)
        opt.load_state_dict(saved)
        if case.name == "Adafactor" and make == case.torch:  # torch's loads what it then fails to step by
            opt.param_groups[0].setdefault("maximize", False)
        assert ("mine" in opt.state) == (change == "an entry of the user's own")
        train(opt, params, 2, first=3)
        runs.append([p.detach() for p in params])
    torch.testing.assert_close(runs[0], runs[1])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_entries_of_the_users_own_do_not_matter(backend):
    params = parameters([(3,)])
    opt = trained(partial(optim.AdamW, backend=backend), params, 1)
    opt.state[params[0]].update(mine=torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), other=object())
    train(opt, params, 1)
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    train(opt, params, 1)
    assert set(opt.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq", "mine", "other"}


def test_a_subclass_that_refuses_changes_nothing(backend):
    class Picky(optim.AdamW):
        def __setstate__(self, state):
            super().__setstate__(state)
            if not state["state"]:
                raise LookupError("nothing there")

    opt = trained(partial(Picky, backend=backend), parameters([(3,), (5,)]), 1)
    assert_refused(opt, {**opt.state_dict(), "state": {}}, "nothing there", LookupError)


def test_negative_zeros_of_torchs_momentum_have_been_set(backend):
    """Only a buffer of nothing else waits for its first gradient."""
    results = []
    for make in (torch.optim.SGD, partial(optim.SGD, backend=backend)):
        p = torch.nn.Parameter(torch.zeros(3))
        opt = make([p], lr=1.0, momentum=0.9, dampening=0.5)
        opt.load_state_dict({**opt.state_dict(), "state": {0: {"momentum_buffer": torch.tensor([-0.0, 0.0, 1.0])}}})
        p.grad = torch.ones(3)
        opt.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


def test_a_step_that_was_saved_as_a_half_counts_on(backend):
    params = parameters([(3,)])
    opt = trained(partial(optim.AdamW, backend=backend), params, 1)
    saved = opt.state_dict()
    saved["state"][0]["step"] = torch.tensor(2048.0, dtype=torch.float16)
    opt.load_state_dict(saved)
    train(opt, params, 1)
    assert opt.state[params[0]]["step"] == 2049


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_hooks_and_setstate_run_as_torchs(case):
    runs = []
    for module in (optim, oracles):
        calls = []

        class Mine(getattr(module, case.name)):
            def __setstate__(self, state, calls=calls):
                calls.append(("setstate", sorted(state), len(state["state"])))
                super().__setstate__(state)

        params = parameters([(3,), (5,)])
        opt = in_training(Mine(params, **case.kwargs))
        train(opt, params, 1)

        def before(opt, saved, calls=calls):
            calls.append(("before", sorted(saved), len(opt.state)))
            saved["param_groups"][0]["lr"] = 0.5  # of the user's own, as with torch's

        def replaced(opt, saved, calls=calls):
            calls.append(("replaced", saved["param_groups"][0]["lr"]))
            return {**saved, "state": {}}

        opt.register_load_state_dict_pre_hook(before)
        opt.register_load_state_dict_pre_hook(replaced)
        opt.register_load_state_dict_post_hook(
            lambda opt, calls=calls: calls.append(("after", opt.param_groups[0]["lr"]))
        )
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        runs.append(calls)
    assert runs[0] == runs[1] and len(runs[0]) == 4


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", [name for name in FIRST if name != "Adagrad"])  # whose state is there from the start
def test_a_parameter_of_which_only_the_average_is_kept(name, how, backend):
    """It has no step: neither loading nor a copy asks for one."""
    params = parameters([(3,), (5,)])
    opt = FIRST[name].ours(params, ema_decay=0.9, backend=backend)
    params[0].grad = torch.ones(3)
    opt.step()
    assert list(opt.state[params[1]]) == ["ema"]
    other = FIRST[name].ours([p.detach().clone() for p in params], ema_decay=0.9, backend=backend)
    other.load_state_dict(opt.state_dict())
    assert_same_state(opt, other)
    copied = COPIES[how](opt)
    assert_same_state(opt, copied)
    train(copied, places(copied), 1)


@pytest.mark.parametrize("kwargs", [{}, dict(ema_decay=0.9), dict(state_dtype=torch.int8, min_int8_size=0)], ids=str)
@pytest.mark.parametrize("name", list(FIRST))
def test_loading_in_inference_mode(name, kwargs, backend):
    """As a server does that goes on training: what is made there can be stepped outside, and has no graph."""
    params = parameters([(3,), (5,)])
    opt = trained(partial(FIRST[name].ours, backend=backend, **kwargs), params, 2)
    with torch.inference_mode():
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    tensors = [t for entry in opt.state.values() for t in entry.values()]
    assert not any(t.is_inference() or t.requires_grad for t in tensors)
    train(opt, params, 2)


# Numbers, strings and tensors alone


@pytest.mark.parametrize("case", STATEFUL, ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, None], ids=str)
@pytest.mark.narrow_state
def test_groups_hold_no_dtypes(case, dtype, backend):
    make = partial(case.ours, state_dtype=dtype, min_int8_size=256, backend=backend)
    opt = trained(make, parameters([(300,), (5,)]), 2)
    saved = opt.state_dict()
    plain = (bool, int, float, str, list, tuple, type(None), torch.Tensor)
    assert all(isinstance(value, plain) for g in saved["param_groups"] for value in g.values()), saved["param_groups"]
    assert saved["param_groups"][0].get("state_dtype") == (None if dtype is None else str(dtype).removeprefix("torch."))
    assert opt.param_groups[0].get("state_dtype") == dtype  # the group itself keeps it
    older = {**saved, "param_groups": [{**saved["param_groups"][0], "state_dtype": dtype}]}
    for there in (through_a_file(saved), older):
        other = make(copies_of(places(opt)))
        other.load_state_dict(there)
        assert other.param_groups[0].get("state_dtype") == dtype
        assert_same_state(opt, other)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize(
    "name, options", [("AdamW", {}), ("AdamW8bit", {}), ("SGD8bit", dict(momentum=0.9)), ("Prodigy", {})]
)
def test_distributed_checkpoints(name, options, tmp_path, succeeds):
    """Saved at once, in the background and offloaded, by torch's own functions, in a world of one process."""
    succeeds(f"import sharded; sharded.alone({name!r}, {str(tmp_path)!r}, **{options})")


# Others' state


class Packed(torch.Tensor):
    """As torchao's OptimState8bit: a wrapper that knows how to become float32."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.values = values

    def dequantize(self):
        return self.values * 2

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} is not served")


@pytest.mark.parametrize("kwargs", [{}, dict(state_dtype=torch.int8, min_int8_size=0)], ids=str)
def test_state_that_knows_how_to_become_numbers(kwargs, backend):
    params = parameters([(300,)])
    opt = optim.AdamW(params, backend=backend, **kwargs)
    packed = dict(step=torch.tensor(3.0), exp_avg=Packed(torch.full((300,), 0.5)), exp_avg_sq=Packed(torch.ones(300)))
    opt.load_state_dict({"state": {0: packed}, "param_groups": torch.optim.AdamW(params).state_dict()["param_groups"]})
    state = opt.state_dict()["state"][0]
    if kwargs:
        assert set(state) == {"step", "exp_avg_codes", "exp_avg_scales", "exp_avg_sq_codes", "exp_avg_sq_scales"}
    else:
        assert_same_bits((state["exp_avg"], state["exp_avg_sq"]), (torch.ones(300), torch.full((300,), 2.0)))
    train(opt, params, 1)


def test_no_group_of_a_case_lacks_what_its_class_asks_for():
    for case in CASES:
        opt = case.ours(parameters([(3,)]))
        opt.load_state_dict(case.torch(parameters([(3,)])).state_dict())
