"""step_in_backward: the same bits as backward and step, with gradients that are freed one by one."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from itertools import product

import pytest
import torch
from cases import (
    ALONE,
    CASES,
    COPIES,
    DEVICE,
    FIRST,
    NUMBERS,
    SHAPES,
    STATEFUL,
    STORED,
    assert_same_bits,
    assert_same_state,
    assert_unchanged,
    parameters,
    places,
    randn,
    saved,
    set_grads,
    snapshot,
    stored,
    train,
)
from genopt_ext.optim.lr_scheduler import ExponentialLR
from low_precision import MIXED, SOME, assert_same, seeded
from torch import nn
from torch.utils.checkpoint import checkpoint

from genopt_ext import _backend, optim, step_in_backward

EACH, BEGUN = ([case for case in cases if case.name in ALONE] for cases in (CASES, STATEFUL))


def loss(params, step):
    """Its gradients depend on the parameters and on the step, and have no zeros."""
    terms = [(p * randn(p.shape, 1000 * (step + 1) + i, p.dtype) + p * p * 0.5).sum() for i, p in enumerate(params)]
    return torch.stack([t.real if t.is_complex() else t for t in terms]).sum()


def backward_and_step(opt, steps=3, first=0):
    for step in range(first, first + steps):
        opt.zero_grad()
        loss(places(opt), step).backward()
        opt.step()


def backward(opt, steps=3, first=0):
    for step in range(first, first + steps):
        loss(places(opt), step).backward()
        assert all(p.grad is None for p in places(opt))


def both(case, dtype=torch.float32, **more):
    """Optimizers for backward and step, and one that steps in backward; the second group has options of its own."""
    opts = []
    for _ in range(2):
        params = parameters(SHAPES, dtype)
        own = dict(lr=0.02, weight_decay=0.05, state_dtype=None)
        groups = [{"params": params[:3]}, {"params": params[3:], **own}]
        opts.append(seeded(lambda: case.ours(groups, **more)))  # noqa: B023
    step_in_backward(opts[1])
    return opts


def step_both(usual, opt, steps=3, first=0, what=""):
    backward_and_step(usual, steps, first)
    backward(opt, steps, first)
    assert_same(usual, opt, what)


def checkpointed(layer, x):
    return checkpoint(lambda x: layer(x).tanh(), x, use_reentrant=False)


@pytest.mark.parametrize(
    ("case", "storage", "dtype"),
    [
        *product(EACH, [STORED["plain"]], STORED["plain"].dtypes),
        *stored([case for case in SOME if case.name in ALONE], storages=[STORED["int8"], *MIXED]),
    ],
    ids=str,
)
def test_same_bits_with_a_scheduler_and_a_checkpoint_in_the_middle(case, storage, dtype):
    usual, opt = both(case, dtype, **storage.options)
    schedulers = [ExponentialLR(usual, 0.5), ExponentialLR(opt, 0.5)]
    for step in range(4):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step_both(usual, opt, 1, step, (case, storage, dtype))
            for scheduler in schedulers:
                scheduler.step()
        if step == 1:
            opt.load_state_dict(saved(opt.state_dict()))
    assert case.still == 4 or not torch.equal(places(opt)[0], parameters(SHAPES, dtype)[0])


@pytest.mark.parametrize("case", BEGUN, ids=str)
def test_same_bits_with_the_reference(case):
    usual, opt = both(case, backend="reference")
    step_both(usual, opt, what=case)
    opt.backend = "auto"
    step_both(usual, opt, 1, 3, case)
    opt.backend = "reference"
    step_both(usual, opt, 1, 4, case)


class Subclass(torch.Tensor):
    pass


def test_a_parameter_that_kernels_do_not_serve():
    usual, opt = (
        optim.AdamW([nn.Parameter(randn((5,), 0).as_subclass(Subclass)), nn.Parameter(randn((5,), 1))])
        for _ in range(2)
    )
    step_in_backward(opt)
    step_both(usual, opt)


@pytest.mark.parametrize("case", BEGUN, ids=str)
def test_options_and_state_are_read_at_every_step(case):
    usual, opt = both(case)
    for step in range(3):
        step_both(usual, opt, 1, step, case)
        for o in (usual, opt):
            o.param_groups[step % 2].update(lr=0.03 * (step + 1), maximize=step == 1)
            for state in o.state.values():
                state.update({name: t.clone() * 0.5 for name, t in state.items() if name not in NUMBERS})


def test_step_rests_and_steps_gradients_set_by_hand():
    usual, opt = both(FIRST["AdamW"])
    calls = []
    opt.register_step_post_hook(lambda *_: calls.append(1))
    step_both(usual, opt)
    assert not calls
    opt.step()
    assert calls
    assert_same_state(usual, opt)
    train(usual, places(usual), 1)
    train(opt, places(opt), 1)
    assert_same_state(usual, opt)


def test_a_closure_steps_once():
    usual, opt = both(FIRST["Adam"])

    def closure():
        value = loss(places(opt), 0)
        value.backward()
        return value

    value = opt.step(closure)
    assert value.item() == loss(places(usual), 0).item()
    backward_and_step(usual, 1)
    assert_same_state(usual, opt)


def hooked(params):
    return any(p._post_accumulate_grad_hooks for p in params)


def test_remove():
    usual, opt = both(FIRST["AdamW"])
    handle, stepped = opt.in_backward, places(opt)
    with pytest.raises(RuntimeError, match=r"AdamW is stepped in backward already; call remove\(\)"):
        step_in_backward(opt)
    assert opt.in_backward is handle
    backward(opt, 1)
    handle.remove()
    handle.remove()
    assert opt.in_backward is None and not hooked(stepped)
    loss(stepped, 1).backward()
    assert all(p.grad is not None for p in stepped)
    opt.step()
    opt.zero_grad()
    with step_in_backward(opt) as again:
        handle.remove()
        assert opt.in_backward is again
        backward(opt, 1, 2)
    assert opt.in_backward is None
    backward_and_step(opt, 1, 3)
    backward_and_step(usual, 4)
    assert_same_state(usual, opt)


@pytest.mark.parametrize("case", BEGUN, ids=str)
def test_a_group_added_later_is_stepped_too(case):
    usual, opt = both(case)
    step_both(usual, opt, 1)
    for o in (usual, opt):
        o.add_param_group({"params": parameters([(33,), (4,)], seed=9), "lr": 0.1})
    step_both(usual, opt, 2, 1, case)
    opt.in_backward.remove()
    assert not hooked(places(opt))


def test_groups_that_move():
    params = parameters([(4,), (5,), (6,)])
    opt = optim.SGD([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)])
    step_in_backward(opt)
    before = [p.detach().clone() for p in params]
    del opt.param_groups[0]
    sum(p.sum() for p in params).backward()
    # What has left the optimizer is left alone.
    assert_same_bits(params[0].detach(), before[0])
    assert params[0].grad is not None
    for p, old, lr in zip(params[1:], before[1:], (0.2, 0.3), strict=True):
        torch.testing.assert_close(p.detach(), old - lr)
        assert p.grad is None


@pytest.mark.parametrize("forward", [lambda layer, x: layer(x).tanh(), checkpointed], ids=["plain", "checkpointed"])
def test_a_shared_parameter_is_stepped_once(forward):
    """A checkpointed layer's forward runs again within backward: it must read parameters not stepped yet."""
    results = []
    for in_backward in (False, True):
        layers = chain(3, 8)
        layers[2].weight = layers[0].weight
        opt = optim.AdamW(layers.parameters(), lr=0.1)
        if in_backward:
            step_in_backward(opt)
        for step in range(3):
            x = randn((5, 8), step)
            for layer in layers:
                x = forward(layer, x)
            x.square().sum().backward()
            if not in_backward:
                opt.step()
                opt.zero_grad()
        results.append(opt)
        assert opt.state[layers[0].weight]["step"] == 3
    assert_same_state(*results)


def test_two_backwards_are_two_steps_or_autograds_error():
    p = nn.Parameter(torch.ones(3))
    opt = optim.SGD([p], lr=0.5)
    step_in_backward(opt)
    p.sum().backward()
    p.sum().backward()
    assert (p == 0).all()
    value = (p * p).sum()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def chain(depth=12, width=64):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))


def test_at_most_one_gradient_is_alive():
    most = {}
    for in_backward in (False, True):
        model = chain()
        opt = optim.AdamW(model.parameters())
        alive, counts = set(), []

        def count(grad, alive=alive, counts=counts):
            # Of gradients that backward makes; the tensor object stands for its memory.
            alive.add(id(grad))
            weakref.finalize(grad, alive.discard, id(grad))

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: count(p.grad))
            p.register_post_accumulate_grad_hook(lambda _, counts=counts, alive=alive: counts.append(len(alive)))
        if in_backward:
            step_in_backward(opt)
        model(randn((4, 64), 0)).sum().backward()
        most[in_backward] = max(counts)
    assert most == {False: 12, True: 1}


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what torch allocates on the CPU")
def test_peak_memory_is_lower_by_the_gradients():
    depth, width = 12, 64
    peaks = []
    for in_backward in (False, True):
        model = chain(depth, width)
        opt = optim.SGD(model.parameters(), lr=0.1)
        if in_backward:
            step_in_backward(opt)
        x = randn((1, width), 0)
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            model(x).sum().backward()
            opt.step()
        now = peak = 0
        for event in profile.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        peaks.append(peak)
    one = width * width * 4
    assert peaks[0] >= depth * one
    assert peaks[1] <= peaks[0] - (depth - 2) * one


def test_nothing_is_kept_alive():
    gc.disable()
    try:
        model = chain(2)
        opt = optim.AdamW(model.parameters())
        handle = step_in_backward(opt)
        model(randn((4, 64), 0)).sum().backward()
        refs = [weakref.ref(opt), weakref.ref(model[0].weight), weakref.ref(handle)]
        del model, opt, handle
        assert [ref() for ref in refs] == [None] * 3
    finally:
        gc.enable()


def test_a_deleted_optimizer():
    model = chain(2)
    step_in_backward(optim.AdamW(model.parameters()))
    with pytest.warns(UserWarning, match="optimizer given to step_in_backward has been deleted.*keep a reference"):
        model(randn((4, 64), 0)).sum().backward()
    assert all(p.grad is not None and not p._post_accumulate_grad_hooks for p in model.parameters())
    # Another one on the same parameters takes its place without a word.
    model.zero_grad()
    step_in_backward(optim.AdamW(model.parameters()))
    opt = optim.AdamW(model.parameters())
    step_in_backward(opt)
    model(randn((4, 64), 0)).sum().backward()
    assert all(p.grad is None and len(p._post_accumulate_grad_hooks) == 1 for p in model.parameters())


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("case", BEGUN, ids=str)
def test_a_copy_has_no_hooks(case, how):
    _, opt = both(case)
    backward(opt, 1)
    twin = COPIES[how](opt)
    assert twin.in_backward is None
    step_both(twin, opt, 1, 1, case)
    step_in_backward(twin)
    twin.zero_grad()
    backward(opt, 1, 2)
    backward(twin, 1, 2)
    assert_same_state(opt, twin, case)


def test_frozen_parameters_are_left_to_step():
    params = parameters([(4,), (5,)])
    params[0].requires_grad_(False)
    opt = optim.SGD(params, lr=1.0)
    step_in_backward(opt)
    before = params[0].detach().clone()
    params[1].sum().backward()
    assert_same_bits(params[0].detach(), before)
    params[0].requires_grad_(True)
    (params[0].sum() + params[1].sum()).backward()
    assert params[0].grad is not None and params[1].grad is None
    opt.step()
    assert_same_bits(params[0].detach(), before - 1)


# Refused


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (torch.optim.AdamW, TypeError, "got torch.optim.adamw.AdamW; .*torch's recipe.*pytorch.org/tutorials"),
        (lambda _: None, TypeError, "got builtins.NoneType"),
        (lambda ps: optim.SGD([*ps, no_leaf()]), ValueError, "group 0 parameter 1 .*is no leaf but .*MulBack.*detach"),
        (lambda ps: optim.SGD([*ps, taken()]), ValueError, r"group 0 parameter 1 .*by another .*call remove\(\) there"),
        (lambda ps: optim.SGD([*ps, *ps]), ValueError, "group 0 parameter 1 .*listed twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")  # torch's own
def test_refused_before_any_hook(make, error, message):
    fine = parameters([(2,)])
    opt = make(fine)
    with pytest.raises(error, match=message):
        step_in_backward(opt)
    assert not fine[0]._post_accumulate_grad_hooks and getattr(opt, "in_backward", None) is None


def no_leaf():
    p = parameters([(2,)])[0] * 2
    p.retain_grad()
    return p


def taken():
    """A parameter that another optimizer steps, which it keeps alive."""
    p = parameters([(3,)])[0]
    p.other = optim.SGD([p], lr=0.1)
    step_in_backward(p.other)
    return p


@pytest.mark.parametrize("where", ["optimizer", "group"])
def test_a_global_norm_is_refused(where):
    params = parameters([(2,), (3,)])
    opt = optim.AdamW([{"params": [p]} for p in params])

    def set_norm(value):
        if where == "optimizer":
            opt.max_grad_norm = value
        else:
            opt.param_groups[1]["max_grad_norm"] = value

    set_norm(1.0)
    message = "AdamW: group [01]: max_grad_norm is 1.0, and a norm over all.*clip_per_param, agc, clip_grad_value"
    with pytest.raises(ValueError, match=message):
        step_in_backward(opt)
    assert opt.in_backward is None and not hooked(params)
    set_norm(None)
    step_in_backward(opt)
    set_norm(1.0)
    assert_backward_is_refused(opt, message, ValueError)
    assert not opt.state


def assert_backward_is_refused(opt, message, error=RuntimeError):
    """By the step of the last parameter, whose gradient stays."""
    last, before = places(opt)[-1], snapshot(opt)
    with pytest.raises(error, match=message):
        last.sum().backward()
    assert last.grad is not None
    assert_unchanged(opt, before, message)
    last.grad = None


def test_a_refused_group_is_not_added():
    opt = optim.SGD(parameters([(2,)]), lr=0.1)
    step_in_backward(opt)
    extra = parameters([(3,)], seed=1)
    with pytest.raises(ValueError, match="group 1: max_grad_norm is 0.5"):
        opt.add_param_group({"params": extra, "max_grad_norm": 0.5})
    assert len(opt.param_groups) == 1 and not extra[0]._post_accumulate_grad_hooks


def test_a_grad_scaler_is_refused():
    p = parameters([(3,)])[0]
    opt = optim.AdamW([p])
    handle = step_in_backward(opt)
    for in_backward in (True, False):
        scaler = torch.amp.GradScaler(DEVICE)
        scaler.scale(p.sum()).backward()
        if in_backward:
            with pytest.raises(RuntimeError, match="GradScaler can not go with it.*bfloat16"):
                scaler.step(opt)
            handle.remove()
        else:
            scaler.step(opt)


@pytest.mark.parametrize("case", [case for case in BEGUN if case.name != "Rprop"], ids=str)  # whose lr is read once
def test_an_error_leaves_the_parameter_and_its_state(case, backend):
    params = parameters([(4,), (5,)])
    opt = case.ours([{"params": [p]} for p in params], backend=backend)
    group = opt.param_groups[1]
    step_in_backward(opt)
    for started in (False, True):
        if started:
            backward(opt, 1)
        lr, group["lr"] = group["lr"], float("nan")
        assert_backward_is_refused(opt, "group 1: Invalid learning rate: nan", ValueError)
        group["lr"] = lr
    name = opt.rule.state_names(group)[0]
    opt.state[params[1]][name] = opt.state[params[1]][name][:2]
    assert_backward_is_refused(opt, rf"group 1 parameter 0 .*state '{name}' has shape \[2\]")


def test_a_sparse_gradient_is_refused_by_name():
    model = nn.Embedding(4, 3, sparse=True)
    opt = optim.AdamW(model.named_parameters())
    step_in_backward(opt)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="group 0 parameter 0 .'weight'.*does not support sparse gradients"):
            model(torch.tensor([1, 2])).sum().backward()
        assert model.weight.grad.is_sparse and not opt.state


def test_a_gradient_that_was_there_is_part_of_the_step():
    """What the docstring says of accumulation."""
    p = nn.Parameter(torch.zeros(3))
    opt = optim.SGD([p], lr=1.0)
    step_in_backward(opt)
    set_grads([p], 0)
    kept = p.grad.clone()
    p.sum().backward()
    assert_same_bits(p.detach(), -(kept + 1))


# Threads


class Waiting:
    """A thread within ``backward()``, which has stepped the last of ``params`` and comes to the first when it may."""

    def __init__(self, params):
        self.params = params
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        first, *_, last = self.params
        middle = first * 2
        middle.register_hook(self.wait)
        # Autograd takes what was made last first.
        (middle.sum() + last.sum()).backward()

    def wait(self, _):
        self.inside.set()
        assert self.go_on.wait(10)

    def __enter__(self):
        self.thread.start()
        assert self.inside.wait(10)

    def __exit__(self, *_):
        self.go_on.set()
        self.thread.join(10)
        assert not self.thread.is_alive()


def refused(params):
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="SGD: another thread is in backward.. of these parameters.*Hold one lock"):
        sum(p.sum() for p in params).backward()
    for p, old in zip(params, before, strict=True):
        assert_same_bits(p.detach(), old)
        assert p.grad is None


@pytest.fixture(params=["native", "reference", "not built"])
def threaded(request, monkeypatch):
    """(an optimizer that steps in backward, its parameters)"""
    if DEVICE != "cpu":
        pytest.skip("one thread serves all backward passes of a device")
    if request.param == "not built":
        monkeypatch.setattr(_backend, "native", None)
    params = parameters([(4,), (5,), (6,)])
    opt = optim.SGD(params, lr=1.0, backend="auto" if request.param == "native" else "reference")
    step_in_backward(opt)
    return opt, params


def test_a_second_thread_is_refused_while_one_is_in_backward(threaded):
    _, params = threaded
    before = [p.detach().clone() for p in params]
    with Waiting(params):
        torch.testing.assert_close(params[-1].detach(), before[-1] - 1)
        refused(params)
        refused(params[:2])
        refused(params)
    torch.testing.assert_close(params[0].detach(), before[0] - 2)
    with Waiting(params):
        refused(params[1:])
    sum(p.sum() for p in params).backward()
    torch.testing.assert_close(params[1].detach(), before[1] - 1)
    torch.testing.assert_close(params[2].detach(), before[2] - 3)


def test_a_second_thread_is_refused_after_hooks_of_others_came_and_groups_were_added(threaded):
    opt, params = threaded
    for p in params:
        p.register_hook(lambda _: None)  # with the first of these, torch clears those from C++
    sum(p.sum() for p in params).backward()
    opt.add_param_group({"params": parameters([(7,)], seed=1)})
    params += opt.param_groups[1]["params"]
    with Waiting(params):
        refused(params[:1])
        refused(params[1:])


def test_a_pass_that_fails_or_takes_no_step_does_not_refuse_other_threads(threaded):
    _, params = threaded
    first, *_, last = params
    handle = first.register_hook(lambda _: 1 / 0)
    failures = []

    def fail():
        torch.autograd.grad(last.sum(), last)
        try:
            (first.sum() + last.sum()).backward()
        except ZeroDivisionError as error:
            failures.append(error)

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join(10)
    assert len(failures) == 1
    handle.remove()
    sum(p.sum() for p in params).backward()
    assert all(p.grad is None for p in params)


def test_other_parameters_and_passes_within_passes_are_not_refused(threaded):
    _, params = threaded
    others = parameters([(4,), (5,)], seed=2)
    opt = optim.SGD(others, lr=1.0, backend=threaded[0].backend)
    handle = step_in_backward(opt)
    before = [p.detach().clone() for p in others]
    with Waiting(params):
        sum(p.sum() for p in others).backward()
        # After remove(), gradients are added as ever.
        handle.remove()
        with Waiting(others):
            others[0].sum().backward()
    torch.testing.assert_close([p.detach() for p in others], [p - 1 for p in before])
    torch.testing.assert_close(others[0].grad, torch.full((4,), 3.0))

    old = [p.detach().clone() for p in params]
    x = torch.ones((), requires_grad=True)
    for p in params:
        x = checkpoint(lambda x, p=p: x + p.sum(), x, use_reentrant=True)
    (x + params[0].sum()).backward()
    torch.testing.assert_close([p.detach() for p in params[1:]], [p - 1 for p in old[1:]])
    torch.testing.assert_close(params[0].detach(), old[0] - 2)


THREADS = """
import threading, torch
from genopt_ext import optim, step_in_backward
params = [torch.zeros(64, requires_grad=True) for _ in range(8)]
opt = optim.SGD(params, lr=1.0, backend="{backend}")
step_in_backward(opt)
taken = []
def work():
    for _ in range(300):
        value = sum(p.sum() for p in params)
        try:
            value.backward()
            taken.append(1)
        except RuntimeError as error:
            assert "another thread is in backward()" in str(error), error
threads = [threading.Thread(target=work) for _ in range(3)]
for t in threads:
    t.start()
for t in threads:
    t.join()
assert taken and all((p == -len(taken)).all() and p.grad is None for p in params), (len(taken), params)
"""


@pytest.mark.skipif(DEVICE != "cpu", reason="one thread serves all backward passes of a device")
def test_three_threads_take_whole_steps(succeeds, backend):
    succeeds(THREADS.format(backend=backend))
