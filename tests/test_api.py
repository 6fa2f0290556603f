"""What a script that used torch.optim expects: signatures, names, hooks, closures, schedulers, AMP, torch.compile."""

from __future__ import annotations

import copy
import inspect
import os
import pydoc
import re
import subprocess
import sys
import warnings
from functools import partial

import oracles
import pytest
import torch
from cases import (
    ALONE,
    CASES,
    FIRST,
    NUMBERS,
    STATEFUL,
    Case,
    Odd,
    assert_same_bits,
    assert_same_state,
    made,
    pairs,
    parameters,
    places,
    randn,
    refused,
    set_grads,
    train,
    trained,
)
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.testing._internal.common_optimizers import optim_db

import genopt_ext
from genopt_ext import _backend, optim, reference, step_in_backward
from genopt_ext.optim.options import StepOptions

OURS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in optim.TORCHS}


@pytest.mark.parametrize("name", optim.TORCHS)
def test_signatures_are_torchs(name):
    ours = inspect.signature(getattr(optim, name)).parameters
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values() if p.name in theirs] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
    # What is ours alone is given by keyword: backend=, and StepOptions.
    assert all(p.kind is p.KEYWORD_ONLY for p in ours.values() if p.name not in theirs)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_norm'"):
        getattr(optim, name)(parameters([(1,)]), max_norm=1.0)


def test_signature_of_lion():
    """Its authors' and lion-pytorch's; what is ours, and torch's flags, are given by keyword."""
    parameters_ = list(inspect.signature(optim.Lion).parameters.values())
    theirs = dict(params=inspect.Parameter.empty, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0)
    assert {p.name: p.default for p in parameters_[:4]} == theirs
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters_[4:])
    with pytest.raises(TypeError, match="unexpected keyword argument 'use_triton'"):
        optim.Lion(parameters([(1,)]), use_triton=True)


def test_every_other_name_is_torchs():
    for name in dir(torch.optim):
        if not name.startswith("__"):
            own = name in (*optim.OURS, "Muon", "adam", "sgd", "rmsprop", "adagrad", "optimizer")
            assert own or getattr(optim, name) is getattr(torch.optim, name), name
    assert set(torch.optim.__all__) <= set(optim.__all__)
    from genopt_ext.optim.lr_scheduler import StepLR

    from genopt_ext.optim import lr_scheduler, swa_utils

    assert lr_scheduler is torch.optim.lr_scheduler and swa_utils is torch.optim.swa_utils
    assert StepLR is torch.optim.lr_scheduler.StepLR
    with pytest.raises(AttributeError):
        _ = optim.no_such_name


def moments(cls):
    """The states of a class that codes are for."""
    return cls.rule.states.keys() - cls.rule.weights - cls.rule.precise


def test_classes_are_torchs_subclasses():
    for name in optim.OURS:
        own, theirs = getattr(optim, name), getattr(torch.optim, name, torch.optim.Optimizer)
        assert issubclass(own, theirs)
        assert not moments(own) or issubclass(getattr(optim, f"{name}8bit"), own)
    assert issubclass(optim.AdamW, optim.Adam)


def test_signatures_spell_out_the_step_options():
    """As ``help`` shows them, with the defaults that they have; 8-bit classes inherit their constructor."""
    for name in (*optim.OURS, *optim.EIGHT_BIT):
        cls = getattr(optim, name)
        parameters_ = inspect.signature(cls).parameters
        assert not any(each.kind is each.VAR_KEYWORD for each in parameters_.values())
        given = {option: parameters_[option].default for option in StepOptions.__annotations__}
        explicit, implicit = cls(parameters([(1,)]), **given).defaults, cls(parameters([(1,)])).defaults
        assert explicit == {"min_int8_size": 4096, **implicit}
        assert given["param_rounding"] == "nearest" and "max_grad_norm" in pydoc.render_doc(cls)


def test_every_rule_has_its_parts():
    """A rule has a reference, a class and entries in the table; Python and C++ agree on states and options."""
    classes = {getattr(optim, name) for name in optim.OURS}
    phases = {"muon_momentum", "muon_update"}  # of Muon, which is no elementwise class: test_muon.py
    assert {c.rule.name for c in classes} == set(reference.RULES) - phases
    assert {case.name for case in CASES} == {case.name for case in STATEFUL} == set(optim.OURS)
    assert set(optim.EIGHT_BIT) == {f"{name}8bit" for name in optim.OURS if moments(getattr(optim, name))}
    if _backend.native is None:
        return
    rules = _backend.native.rules()
    assert set(rules) == set(reference.RULES)
    for cls in classes:
        counts_steps, states, running, options = rules[cls.rule.name]
        assert counts_steps == cls.rule.counts_steps and list(cls.rule.running) == running
        group = cls(parameters([(1,)])).param_groups[0]
        everything = {**group, "amsgrad": True, "centered": True, "momentum": 0.9}
        assert cls.rule.state_names(everything) == list(cls.rule.states) and set(cls.rule.states) == set(states)
        assert {key for key, _ in options} <= {*group, *cls.own_options}
        assert len(cls.rule.options(group)) == len(options)


@pytest.mark.parametrize("name", sorted(OURS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_parity_with_torch_on_its_own_inputs(name, dtype):
    """optim_db's inputs, with the class swapped, over several steps and shapes."""
    for given in OURS[name].optim_inputs_func(device="cpu"):
        runs = []
        for module, more in ((optim, {}), (torch.optim, {"foreach": False})):
            params = parameters([(10, 10), (7,), (), (300,), (0,)], dtype)
            opt = getattr(module, name)(params, **given.kwargs, **more)
            runs.append(train(opt, params, 6))
        torch.testing.assert_close(*runs, msg=lambda text, given=given: f"{given}: {text}")


@pytest.mark.parametrize("name", sorted(OURS))
def test_tensor_options(name):
    """1-element tensors stand for numbers, read at every step."""
    as_tensors = {"lr": torch.tensor([0.5], dtype=torch.float64)}
    as_numbers = {"lr": 0.5}
    if "Adam" in name:
        as_tensors["betas"] = (torch.tensor([[0.75]]), torch.tensor(0.5))
        as_numbers["betas"] = (0.75, 0.5)
    runs = []
    for options in (as_tensors, as_numbers):
        params = parameters([(40,)])
        opt = getattr(optim, name)(params, **options)
        train(opt, params, 2)
        opt.param_groups[0]["lr"] *= 0.5
        runs.append(train(opt, params, 2, first=2))
    assert_same_bits(runs[0][0].detach(), runs[1][0].detach())


@pytest.mark.parametrize("flags", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}], ids=str)
@pytest.mark.parametrize("name", sorted(OURS))
def test_torchs_flags_change_no_numbers(name, flags):
    make = getattr(optim, name)
    assert_same_state(*(trained(partial(make, **options), parameters([(40,)])) for options in (flags, {})))


def test_closure_and_hooks():
    p = parameters([(4,)])[0]
    opt = optim.AdamW([p])
    calls = []
    opt.register_step_pre_hook(lambda o, args, kwargs: calls.append("pre"))
    opt.register_step_post_hook(lambda o, args, kwargs: calls.append("post"))
    opt.register_state_dict_post_hook(lambda o, d: calls.append("state_dict"))
    opt.register_load_state_dict_pre_hook(lambda o, d: calls.append("before load"))
    opt.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    both = register_optimizer_step_post_hook(lambda o, args, kwargs: calls.append("global"))

    def closure():
        assert torch.is_grad_enabled()
        opt.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
    both.remove()
    assert loss.item() > 0 and calls == ["pre", "post", "global"]
    opt.load_state_dict(opt.state_dict())
    assert calls[3:] == ["state_dict", "before load", "loaded"]


def test_hooks_change_arguments_and_may_come_late():
    """As torch's: a hook's arguments count, and a closure's hook runs after its own step."""
    runs = []
    for module in (torch.optim, optim):
        p = parameters([(4,)])[0]
        opt = module.SGD([p], lr=0.5)
        set_grads([p], 0)
        calls = []

        def closure(opt=opt, calls=calls):
            calls.append("closure")
            opt.register_step_post_hook(lambda o, args, kwargs: calls.append(("post", args[1:], kwargs)))
            return 3.0

        hook = opt.register_step_pre_hook(lambda o, args, kwargs, closure=closure: ((o, closure), kwargs))
        calls.append(opt.step())
        hook.remove()
        calls.append(opt.step(closure=lambda: 4.0))
        calls.append(opt.step())
        runs.append([str(call).split(" at ")[0] for call in calls] + p.tolist())
    assert runs[0] == runs[1]


def test_a_profiler_sees_each_step_once():
    p = parameters([(4,)])[0]
    opt = optim.AdamW([p])
    set_grads([p], 0)
    opt.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
        opt.step()
    opt.step()
    assert [e.count for e in profile.key_averages() if e.key == "Optimizer.step#AdamW.step"] == [2]
    assert opt.state[p]["step"].item() == 4


def test_parameters_in_two_groups_are_refused():
    """Also where groups were changed by hand since the last one came."""
    a, b, c = parameters([(4,)] * 3)
    opt = optim.SGD([a], lr=0.1)
    opt.add_param_group({"params": [b]})
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        opt.add_param_group({"params": [c, a]})
    assert len(opt.param_groups) == 2
    with pytest.raises(ValueError, match="with/without names"):
        opt.add_param_group({"params": [("c", c)]})
    opt.param_groups[0]["params"] = [c]
    opt.add_param_group({"params": [a]})
    opt.param_groups = opt.param_groups[:1]
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        opt.add_param_group({"params": [c]})
    opt.add_param_group({"params": [b]})
    assert [group["params"] for group in opt.param_groups] == [[c], [b]]


def test_zero_grad_and_frozen_parameters():
    params = parameters([(4,), (5,)])
    opt = optim.SGD(params, lr=0.1)
    set_grads(params, 0)
    opt.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in params)
    opt.zero_grad()
    assert all(p.grad is None for p in params)
    opt.step()
    params[0].requires_grad_(False)
    before = params[0].detach().clone()
    (params[1] * params[0].sum()).sum().backward()
    opt.step()
    assert_same_bits(params[0].detach(), before)
    params[0].requires_grad_(True)
    (params[1].detach() * params[0].sum()).sum().backward()
    opt.step()
    assert (params[0] != before).all()


FROZEN_DTYPES = (torch.uint8, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn)
FROZEN_OPTIONS = (
    {},
    dict(ema_decay=0.9),
    dict(max_grad_norm=0.1, skip_nonfinite=True),
    dict(clip_per_param=0.1, state_dtype=torch.int8, min_int8_size=1),
    dict(master_weights=True, state_dtype=torch.bfloat16, ema_decay=0.9),
)


@pytest.mark.parametrize(
    ("name", "options"), pairs([*optim.OURS, "Adagrad8bit"], FROZEN_OPTIONS), ids=lambda x: str(x or "plain")
)
def test_frozen_quantized_weights_change_nothing(name, options, backend):
    """What model.parameters() gives under QLoRA: without a gradient a parameter may have any dtype, as in torch."""

    def run(frozen):
        params = parameters([(300,), (5, 7)], torch.bfloat16 if "master_weights" in options else torch.float32)
        opt = made(name, [*frozen[:3], *params], lr=0.01, backend=backend, **options)
        opt.add_param_group({"params": [*frozen[3:], *(last := parameters([(3,)]))]})
        train(opt, params, 2)
        set_grads(params + last, 2)
        opt.accumulate()
        set_grads(params + last, 3)
        opt.step_and_zero_()
        genopt_ext.clip_grad_norm_([*frozen, *params], 0.1)
        opt.load_state_dict(opt.state_dict())
        opt = copy.deepcopy(opt)
        trained = [p for p in places(opt) if p.requires_grad]
        train(opt, trained, 1, first=4)
        if "max_grad_norm" not in options and name in ALONE:
            opt.zero_grad()
            step_in_backward(opt)
            sum((p.float() * p).sum() for p in trained).backward()
        assert not any("ema" in opt.state.get(p, {}) for p in places(opt) if not p.requires_grad)
        return trained

    frozen = [torch.nn.Parameter(torch.arange(6).to(dtype), requires_grad=False) for dtype in FROZEN_DTYPES]
    before = [t.clone() for t in frozen]
    for p, q in zip(run([]), run(frozen), strict=True):
        assert_same_bits(p.detach(), q.detach())
    for t, old in zip(frozen, before, strict=True):
        assert_same_bits(t.view(torch.uint8), old.view(torch.uint8))


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_schedulers_and_averages(case):
    """As in torch's recipe for an average of weights: its schedule after another one, its batch norm."""
    runs = []
    for make in (case.ours, case.torch):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 6, bias=False), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3))
        opt = make(model.parameters())
        schedulers = [
            optim.lr_scheduler.OneCycleLR(opt, 0.01, total_steps=10, cycle_momentum=False),
            optim.swa_utils.SWALR(opt, 0.05, anneal_epochs=2),
        ]
        average = optim.swa_utils.AveragedModel(model)
        data = [randn((8, 20), step) for step in range(5)]
        for x in data:
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
            average.update_parameters(model)
            for scheduler in schedulers:
                scheduler.step()
        optim.swa_utils.update_bn(data, average)
        rate = torch.tensor(opt.param_groups[0]["lr"])
        runs.append([*model.parameters(), *average.parameters(), *average.buffers(), rate])
    # Centered RMSprop divides by a small difference of two averages.
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-4)


SCHEDULERS = {
    "LambdaLR": lambda s, opt: s.LambdaLR(opt, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda s, opt: s.MultiplicativeLR(opt, lambda epoch: 0.9),
    "StepLR": lambda s, opt: s.StepLR(opt, 2),
    "MultiStepLR": lambda s, opt: s.MultiStepLR(opt, [1, 3]),
    "ConstantLR": lambda s, opt: s.ConstantLR(opt, total_iters=3),
    "LinearLR": lambda s, opt: s.LinearLR(opt, total_iters=3),
    "ExponentialLR": lambda s, opt: s.ExponentialLR(opt, 0.9),
    "PolynomialLR": lambda s, opt: s.PolynomialLR(opt, 5),
    "CosineAnnealingLR": lambda s, opt: s.CosineAnnealingLR(opt, 4),
    "CosineAnnealingWarmRestarts": lambda s, opt: s.CosineAnnealingWarmRestarts(opt, 2),
    "CyclicLR": lambda s, opt: s.CyclicLR(opt, 0.01, 0.1, step_size_up=2, cycle_momentum="momentum" in opt.defaults),
    "OneCycleLR": lambda s, opt: s.OneCycleLR(opt, 0.1, total_steps=9, cycle_momentum="alpha" not in opt.defaults),
    "ReduceLROnPlateau": lambda s, opt: s.ReduceLROnPlateau(opt, patience=0),
    "ChainedScheduler": lambda s, opt: s.ChainedScheduler([s.ConstantLR(opt), s.ExponentialLR(opt, 0.9)]),
    "SequentialLR": lambda s, opt: s.SequentialLR(opt, [s.ConstantLR(opt), s.ExponentialLR(opt, 0.9)], [2]),
    "SWALR": lambda s, opt: optim.swa_utils.SWALR(opt, 0.5, anneal_epochs=3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(name):
    """The options that it sets, betas and momentum included, are those of the very next step."""
    for case in (FIRST["AdamW"], Case("SGD", dict(lr=0.1, momentum=0.9)), CASES[12]):
        if name == "OneCycleLR" and case.name == "RMSprop":
            continue  # it cycles a momentum where there is one, and asks for it
        runs = []
        for make in (case.ours, case.torch):
            params = parameters([(300,), (5,)])
            opt = make([{"params": params[:1]}, {"params": params[1:], "lr": 0.3}])
            scheduler = SCHEDULERS[name](optim.lr_scheduler, opt)
            options = []
            for step in range(8):
                train(opt, params, 1, first=step)
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
                options += [{k: v for k, v in g.items() if k in ("lr", "betas", "momentum")} for g in opt.param_groups]
            runs.append((params, options))
        assert runs[0][1] == runs[1][1]
        torch.testing.assert_close(runs[0][0], runs[1][0])


def test_lazily_conjugated_gradients():
    runs = []
    for grad in (randn((9,), 1, torch.complex64).conj(), randn((9,), 1, torch.complex64).conj().resolve_conj()):
        p = parameters([(9,)], torch.complex64)[0]
        p.grad = grad
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optim.AdamW([p]).step()
        runs.append(p.detach())
    assert_same_bits(*runs)


@pytest.mark.skipif(_backend.native is None, reason="all is served by the reference then")
def test_subclasses_are_served_by_the_reference_with_one_warning():
    p, q = Odd(torch.ones(5)), torch.ones(5)
    plain = torch.nn.Parameter(torch.ones(3))
    p.grad, q.grad, plain.grad = Odd(torch.full((5,), 0.5)), torch.full((5,), 0.5), torch.ones(3)
    opt = optim.AdamW([p, plain])
    _backend._told.clear()
    with pytest.warns(UserWarning, match="no kernels for Odd parameters.*reference"):
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
    other = optim.AdamW([q])
    for _ in range(2):
        other.step()
    assert_same_bits(p.inner, q)
    assert opt.state[plain]["step"].item() == 2


@pytest.mark.parametrize(("make", "states"), [(optim.AdamW8bit, 2), (partial(optim.SGD8bit, momentum=0.9), 1)])
def test_8_bit_state_of_subclasses_is_kept_in_float32_and_said_to_be(make, states, backend):
    p, small = Odd(torch.ones(4096)), Odd(torch.ones(5))
    p.grad, small.grad = Odd(torch.ones(4096)), Odd(torch.ones(5))
    told = f"8-bit state is kept in float32 here.*Odd.*: {4 * states} bytes a parameter instead of {states};"
    opts = [make(ps, lr=0.1, backend=backend) for ps in ([small], [p], [p])]
    _backend._told.clear()
    for opt, warns in zip(opts, (0, 1, 0), strict=True):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            opt.step()
        assert sum(bool(re.search(told, str(w.message))) for w in heard) == warns
    kept = [t for key, t in opts[1].state[p].items() if key not in NUMBERS]
    assert [(t.dtype, t.shape) for t in kept] == [(torch.float32, p.shape)] * states
    _backend._told.clear()
    with pytest.warns(UserWarning, match=told):
        opts[2].load_state_dict(opts[1].state_dict())
    opt = make([p], state_dtype=torch.bfloat16, backend=backend)  # which the sentence recommends
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step()
    assert [t.dtype for key, t in opt.state[p].items() if key not in NUMBERS] == [torch.bfloat16] * states


STEP = """
import torch, warnings
from genopt_ext import optim
p = torch.nn.Parameter(torch.ones(5)); p.grad = torch.ones(5)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(2):
        optim.AdamW([p]).step()
print(len(told), *(w.message for w in told))
"""


def test_without_the_extension_the_reference_serves_with_one_warning(fresh, succeeds):
    block = "import sys; sys.modules['genopt_ext._C'] = None; sys.modules['genopt_ext._build_info'] = None\n"
    told = r"1 genopt_ext: the native extension is not built; run `pip install .*reference is used"
    assert re.match(told, succeeds(block + STEP))
    out = fresh(block + STEP.replace("AdamW([p])", "AdamW([p], backend='cpu')"))
    assert "RuntimeError: backend is 'cpu', but the native extension is not built; run `pip install" in out.stderr


@pytest.mark.skipif(_backend.native is None, reason="needs the extension")
def test_another_torch_is_told_in_one_sentence(fresh):
    other = "import sys, types; sys.modules['genopt_ext._build_info'] = types.SimpleNamespace(TORCH='2.2.0')\n"
    out = fresh(other + STEP)
    assert out.returncode == 0, out.stderr
    sentence = "the native extension was built with torch 2.2.0 and runs with torch"
    assert sentence in out.stderr and "pip install" in out.stderr


@pytest.mark.skipif(_backend.native is None, reason="needs the extension")
def test_environment_variables(fresh):
    assert "GENOPT_BACKEND must be one of" in fresh(STEP, GENOPT_BACKEND="gpu").stderr
    assert (
        "GENOPT_CPU_CAPABILITY is 'avx1024', but this processor" in fresh(STEP, GENOPT_CPU_CAPABILITY="avx1024").stderr
    )
    code = STEP + "import genopt_ext._backend as b; print(b.resolve('auto'), b.resolve('cpu'))"
    assert fresh(code, GENOPT_BACKEND="reference").stdout.split()[-2:] == ["reference", "cpu"]
    code = STEP + "from genopt_ext import _C; print(_C.cpu_capability(), _C.cpu_tuning())"
    out = fresh(code, GENOPT_CPU_CAPABILITY="default", GENOPT_CPU_TUNING="prefetch=5,norm=3")
    assert out.stdout.split()[-2:] == ["default", "prefetch=5,norm=3"]
    for tuning in ("prefetch", "prefetch=-1", "prefetch=2x", "prefetch=1000", "stores=1", "prefetch=1,norm=", "norm=1"):
        assert f"GENOPT_CPU_TUNING is '{tuning}', expected prefetch=N" in fresh(STEP, GENOPT_CPU_TUNING=tuning).stderr


def test_env_report(succeeds):
    report = "import runpy; runpy.run_module('genopt_ext.env', run_name='__main__')"
    said = succeeds(report)
    for line in ("genopt_ext", "torch", "built with", "cpu", "cuda"):
        assert re.search(rf"^{line}\b.*: \S", said, re.MULTILINE), said
    if _backend.native is not None:
        assert "prefetch=7,norm=0 (set by" in succeeds(report, GENOPT_CPU_TUNING="prefetch=7,norm=0")
    assert "GENOPT_CPU_CAPABILITY is 'none'" in succeeds(report, GENOPT_CPU_CAPABILITY="none")


def test_importing_costs_no_compiler_stack():
    code = "import sys, genopt_ext; print('torch._dynamo' in sys.modules)"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    out = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert out.stdout.strip() == "False", out


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ALONE], ids=str)
def test_a_parameter_listed_twice_is_stepped_twice_as_by_torchs_loop(case, backend):
    runs = []
    for make in (lambda ps: case.ours(ps, backend=backend), case.torch):
        p, q = parameters([(5,), (3, 2)])
        with pytest.warns(UserWarning, match="duplicate parameters"):
            opt = make([p, q, p, p])
        train(opt, [p, q])
        runs.append((p.detach(), q.detach(), opt.state[p]))
    (*ours, state), (*torchs, their_state) = runs
    torch.testing.assert_close(ours, torchs)
    torch.testing.assert_close({name: state[name] for name in their_state}, dict(their_state))


@pytest.mark.parametrize("left", [0.0, 1.0])
def test_gradients_of_a_parameter_listed_twice_are_written_after_its_last_turn(left, backend):
    p = parameters([(5,)])[0]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = optim.SGD([p, p], lr=0.5, backend=backend)
    before = p.detach().clone()
    if left == 0:
        p.grad = torch.ones(5)
        opt.step_and_zero_()
    else:
        p.grad, opt.grad_scale, opt.found_inf = torch.full((5,), 4.0), torch.tensor(4.0), torch.tensor(0.0)
        opt.step()
    assert_same_bits(p.detach(), before - 0.5 - 0.5)
    assert_same_bits(p.grad, torch.full((5,), left))


@pytest.mark.parametrize("kind", ["another parameter's view", "its own elements"])
def test_other_overlaps_are_refused_beside_a_parameter_listed_twice(kind):
    p = parameters([(6,)])[0]
    other = torch.nn.Parameter(p.detach()[:3] if kind == "another parameter's view" else torch.ones(1).expand(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = optim.SGD([p, other, p], lr=0.1)
    p.grad, other.grad = torch.ones(6), torch.ones(3)
    refused(opt, "share")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # by torch.distributed.optim's import
@pytest.mark.parametrize("name", ALONE)
def test_apply_optimizer_in_backward_with_shared_parameters(name):
    """torch's own, which makes an optimizer for each of them, and compares with one that lists them twice."""
    from torch.distributed.optim import _apply_optimizer_in_backward

    results = []
    for make in (partial(made, name), getattr(oracles, name)):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        net[0].weight = net[1].weight
        hooked = copy.deepcopy(net)
        _apply_optimizer_in_backward(make, [m.weight for m in hooked], dict(lr=0.1))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            plain = make([m.weight for m in net], lr=0.1)
        x = torch.ones(2, 4)
        for _ in range(3):
            net(x).square().sum().backward(), hooked(x).square().sum().backward()
            plain.step()
            net.zero_grad(), hooked.zero_grad()
        results.append((net[0].weight.detach(), hooked[0].weight.detach()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    if name == "SGD":
        torch.testing.assert_close(*results[0])


@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - {"ReduceLROnPlateau", "ChainedScheduler", "SequentialLR"}))
def test_schedulers_keep_a_tensors_base_learning_rate(name):
    """It is no alias of what the schedule, or the user, changes; momentum cycles as a tensor."""
    seen = []
    for module in (optim, torch.optim):
        p = parameters([(3,)])[0]
        lr, momentum = torch.tensor(0.1), torch.tensor(0.9)
        opt = module.SGD([p], lr=lr, momentum=momentum)
        schedule = SCHEDULERS[name](module.lr_scheduler, opt)
        rates = []
        for step in range(3):
            p.grad = randn((3,), step)
            opt.step()
            schedule.step()
            group = opt.param_groups[0]
            rates += [group["lr"], group["momentum"], group["initial_lr"], *schedule.base_lrs, *schedule.get_last_lr()]
            assert group["lr"] is lr and not any(rate is lr for rate in (*schedule.base_lrs, *schedule.get_last_lr()))
            lr.mul_(0.5)
        seen.append(([float(rate) for rate in rates], p.detach()))
    assert seen[0][0] == seen[1][0]
    torch.testing.assert_close(seen[0][1], seen[1][1])
