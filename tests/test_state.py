"""State: what may change between two steps is honoured at the next one, and checkpoints interchange with torch."""

from __future__ import annotations

import copy
import gc
import os
import threading
import weakref
from functools import partial
from itertools import product

import pytest
import torch
from cases import (
    CASES,
    EMULATED,
    INT8,
    KERNELS,
    NATIVE,
    NUMBERS,
    SHAPES,
    STATEFUL,
    STORED,
    WAYS,
    assert_same_bits,
    assert_same_state,
    copies_of,
    in_threads,
    in_turn,
    parameters,
    places,
    randn,
    refused,
    saved,
    set_grads,
    stored,
    train,
    trained,
)
from low_precision import (
    ADAMW,
    CODED,
    MIXED,
    WEIGHTS,
    assert_same,
    load_own,
    name_of,
    other_storage,
    rename_keys,
    run_both,
    run_one,
    take,
)

from genopt_ext import optim

# What changes no number


@pytest.mark.parametrize(("case", "way"), in_turn(STATEFUL, WAYS))
def test_init_state(case, way, backend):
    """It makes what the first step would, changes no weight, and training goes on as without it."""
    storage, dtype = way
    opts = [case.ours(parameters(SHAPES, dtype), backend=backend, ema_decay=0.9, **storage.options) for _ in range(2)]
    params = [opt.param_groups[0]["params"] for opt in opts]
    for opt in opts:
        opt.param_groups[0]["rounding_seed"] = 3
    before = [p.detach().clone() for p in params[0]]
    opts[0].init_state()
    assert_same_bits([p.detach() for p in params[0]], before)
    assert all(p.grad is None for p in params[0])
    made = {i: set(opts[0].state[p]) for i, p in enumerate(params[0])}
    assert all(state["step"] == 0 for state in opts[0].state.values() if "step" in state)
    first = copy.deepcopy(opts[0].state_dict()["state"])
    opts[0].init_state()
    assert_same_bits(opts[0].state_dict()["state"], first)
    for opt, ps in zip(opts, params, strict=True):
        train(opt, ps)
    assert made == {i: set(opts[1].state[p]) for i, p in enumerate(params[1])}
    assert_same_state(*opts)
    assert_same_bits([p.detach() for p in params[0]], [p.detach() for p in params[1]])


def test_init_state_refused():
    """A parameter that can not be stepped leaves all as they were; one without requires_grad has no state."""
    p, q = parameters([(3,), (4,)])
    opt = optim.AdamW([p, q.requires_grad_(False)])
    opt.init_state()
    assert set(opt.state) == {p}
    opt = optim.AdamW([torch.nn.Parameter(randn((3,), 0)), torch.nn.Parameter(torch.zeros(2).to_sparse())])
    with pytest.raises(RuntimeError, match="parameter 1"):
        opt.init_state()
    assert not opt.state


def clone_state(opt, params):
    for state in opt.state.values():
        for name, t in state.items():
            state[name] = t.clone()
            if name not in NUMBERS:
                t.fill_(77)  # what a stale pointer would find


def odd_offset(opt, params):
    for state in opt.state.values():
        for name, t in state.items():
            if name not in NUMBERS and t.dim() == 1:
                state[name] = torch.cat([t[:1], t])[1:]


def other_data(opt, params, factor=1):
    for p in params:
        old, p.data = p.data, p.data.clone() * factor
        old.fill_(77)


def reorder_state(opt, params):
    entries = list(opt.state.items())
    opt.state.clear()
    opt.state.update(reversed(entries))


def add_state_again(opt, params):
    """Of every other parameter, at the end of ``state``, which is then as long as before."""
    for p in params[::2]:
        if p in opt.state:
            opt.state[p] = opt.state.pop(p)


NEUTRAL = [clone_state, other_storage, odd_offset, rename_keys, load_own, other_data, reorder_state, add_state_again]

# However a state is stored


def twice_the_data(opt, params):
    other_data(opt, params, 2)


def swap_states(opt, params):
    """Of pairs of one shape."""
    for p, q in zip(params, params[1:], strict=False):
        if p.shape == q.shape and p in opt.state:
            opt.state[p], opt.state[q] = opt.state[q], opt.state[p]


def reorder_params(opt, params):
    opt.param_groups[0]["params"].reverse()


def other_strides(opt, params):
    params[4].data = params[4].data.transpose(0, 2).contiguous().transpose(0, 2)


def swap_tensors(opt, params):
    if opt.state.get(params[1]):
        params[1].grad = None
        torch.utils.swap_tensors(params[1], torch.nn.Parameter(params[1].detach().clone() * 3))


def add_group(opt, params):
    extra = parameters([(300,)], seed=9)
    lr = 0.5 if opt.together is None else opt.param_groups[0]["lr"]
    opt.add_param_group({"params": extra, "lr": lr, "min_int8_size": 300})
    params += extra


def change_options(opt, params):
    for group in opt.param_groups:
        group["lr"] *= 0.1
        group["weight_decay"] = 0.3


ANY = [*NEUTRAL, twice_the_data, swap_states, reorder_params, other_strides, swap_tensors, add_group, change_options]

# Of float32 parameters and state


def replace_state(opt, params):
    for state in opt.state.values():
        for name, t in state.items():
            state[name] = t.clone() * 0.5 if name not in NUMBERS else torch.tensor(7.0)


def resize_data(opt, params):
    params[0].data = randn((411,), 5)
    for name in opt.state.get(params[0], {}):
        if name not in NUMBERS:
            opt.state[params[0]][name] = torch.zeros(411)


def drop_state(opt, params):
    opt.state.clear()
    if isinstance(opt, torch.optim.Adagrad):
        for p in params:
            opt.state[p] = {"step": torch.tensor(0.0), "sum": torch.zeros_like(p)}


PLAIN = [*ANY, replace_state, resize_data, drop_state]

# Of narrow state, and of 16-bit weights


def raise_min_size(opt, params):
    opt.param_groups[0]["min_int8_size"] = 400


def drop_one(opt, params):
    if not isinstance(opt, torch.optim.Adagrad):
        opt.state.pop(params[0])


def drop_kept(opt, params):
    for state in opt.state.values():
        state.pop("master", None)
        state.pop("compensation", None)


def plain_by_hand(opt, params):
    """Moments that a user put back as numbers."""
    state = opt.state[params[0]]
    for name in [n for n in state if n.endswith("_codes")]:
        whole = name.removesuffix("_codes")
        codes = state.pop(name)
        del state[f"{whole}_scales"]
        state[whole] = torch.full(codes.shape, 0.5)


NARROWED = [*ANY, raise_min_size, drop_one, drop_kept, plain_by_hand]


def assert_both_follow(case, change, shapes, storage=STORED["plain"], dtype=torch.float32, steps=4):
    """Kernels and reference are alike after a change before the third step."""
    make = partial(parameters, shapes, dtype)

    def act(opt, params, step):
        if step == 2:
            change(opt, params)
        take(opt, params, step)

    opt, _ = run_both(case, make, storage.options, steps=steps, act=act)
    if change in NEUTRAL:
        assert_same(opt, run_one(case, make, storage.options, steps=steps), (case, storage, change))


def has_kernels(case, change, way):
    """The matrices of a parameter that is not contiguous are the reference's."""
    return (case.name, change) != ("Adafactor", other_strides)


@KERNELS
@pytest.mark.parametrize(
    ("case", "change", "way"),
    [
        *(row for row in product(STATEFUL, PLAIN, [(STORED["plain"], torch.float32)]) if has_kernels(*row)),
        *in_turn(CODED, NARROWED, [(STORED["int8"], torch.float32), *stored(storages=MIXED)]),
    ],
    ids=name_of,
)
def test_changes_between_steps(case, change, way):
    assert_both_follow(case, change, [*SHAPES, (700,), (700,)], *way)


# Enough for several threads.
MANY = [*SHAPES, *[(3,)] * 560]


@KERNELS
@pytest.mark.parametrize("change", PLAIN, ids=name_of)
def test_changes_between_steps_of_many(change, two_threads):
    assert_both_follow(ADAMW, change, MANY, steps=3)


class NamedParameter(torch.nn.Parameter):
    pass


class Name(str):
    """A key that is no plain string."""


def test_many_of_unusual_kinds(two_threads):
    """Subclasses, lazy copies, other strides, keys that are no plain strings, entries of others, no gradients."""
    results, sources = [], []
    for backend in ("auto", "reference"):
        params = parameters(MANY)
        for i in range(20, 560, 7):
            params[i] = NamedParameter(params[i].detach())
            params[i + 1].data = randn((3, 2), i)[:, 1]
        opt = trained(partial(optim.AdamW, backend=backend), params, 1)
        for i in range(22, 560, 7):
            opt.state[params[i]] = {Name(name): t for name, t in opt.state[params[i]].items()}
            opt.state[params[i + 1]] = {**opt.state[params[i + 1]], "note": torch.ones(2)}
        source = [opt.state[params[i]]["exp_avg"] for i in range(24, 560, 7)]
        for i, t in zip(range(24, 560, 7), source, strict=True):
            opt.state[params[i]]["exp_avg"] = torch._lazy_clone(t)
        sources.append((source, [t.clone() for t in source]))
        set_grads(params, 1, lambda i: i % 7 == 4)
        versions = [p._version for p in params]
        opt.step()
        assert [p._version > v for p, v in zip(params, versions, strict=True)] == [p.grad is not None for p in params]
        results.append(opt)
    assert_same_state(*results)
    for source, before in sources:  # which lazy copies must have left alone
        for t, old in zip(source, before, strict=True):
            assert_same_bits(t, old)


@pytest.mark.parametrize("bad", [3, 300, 560])
def test_one_bad_row_among_many_changes_nothing(bad, two_threads):
    opt = trained(optim.AdamW, parameters(MANY), 1)
    set_grads(places(opt), 1)
    for p in places(opt)[bad : bad + 2]:
        opt.state[p]["exp_avg"] = torch.zeros(1)
    refused(opt, rf"group 0 parameter {bad} .*state 'exp_avg' has shape \[1\]")


@pytest.mark.parametrize(
    ("shapes", "options"),
    [([(1 << 20,), (1000,)], {}), (MANY, {}), ([(1 << 17,), (1000,)], INT8)],
    ids=["large", "many", "int8"],
)
def test_two_optimizers_in_two_threads(shapes, options, two_threads):
    """Each gives what it gives alone."""
    cases = [CASES[0], CASES[14]]
    alone, together = ([case.ours(parameters(shapes), **options) for case in cases] for _ in range(2))
    for opt in alone:
        train(opt, places(opt))
    in_threads(*(partial(train, opt, places(opt)) for opt in together))
    for a, b in zip(alone, together, strict=True):
        assert_same_state(a, b)


@pytest.mark.parametrize("how", ("not finite", "found_inf", "no gradient"))
def test_counters_of_either_precision_count_the_steps_taken(how, backend):
    params = [p for dtype in (torch.float32, torch.float64, torch.bfloat16) for p in parameters([(5,), (300,)], dtype)]
    opt = optim.Adam(params, skip_nonfinite=True, ema_decay=0.9, fused=True, backend=backend)
    train(opt, params, 1)
    for p in params[::2]:
        opt.state[p]["step"] = opt.state[p]["step"].double()
    for step in range(2):
        set_grads(params, step, lambda i: how == "no gradient" and i != 0)
        if how == "not finite":
            params[0].grad[0] = torch.inf
        elif how == "found_inf":
            opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(1.0)
        opt.step()
        opt.grad_scale = opt.found_inf = None
    train(opt, params, 1)
    counters = [opt.state[p]["step"] for p in params]
    assert [t.item() for t in counters] == [4 if how == "no gradient" else 2, *[2] * 5]
    assert [t.dtype for t in counters] == [torch.float64, torch.float32] * 3


def test_a_freed_gradient_or_parameter_is_not_kept_alive():
    opt = trained(optim.AdamW, parameters([(5,)]), 1)
    (p,) = places(opt)
    grad, alive = weakref.ref(p.grad), weakref.ref(opt)
    p.grad = None
    assert grad() is None
    del opt
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_checkpoints_interchange_with_torch(case, dtype):
    """Train 3 steps with one, save, load into the other, train on: as if nothing had happened."""
    for first, second in ((case.torch, case.ours), (case.ours, case.torch)):
        opt = trained(first, parameters(SHAPES, dtype))
        params = places(opt)
        resumed = copies_of(params)
        other = second(resumed)
        other.load_state_dict(saved(opt.state_dict()))
        assert other.state_dict().keys() == opt.state_dict().keys()
        narrowed = dtype != torch.float32 and bool(case.ours(parameters([(1,)])).rule.precise)  # by torch
        if second == case.torch and not narrowed:  # which stores them in the parameter's dtype
            for old, new in zip(opt.state.values(), other.state.values(), strict=True):
                new.update({name: old[name].clone() for name in (NUMBERS | WEIGHTS) & old.keys()})
        if not narrowed:
            assert_same_state(opt, other, case)
        train(opt, params, 2, first=3)
        train(other, resumed, 2, first=3)
        tolerance = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=3e-2, atol=3e-2)
        torch.testing.assert_close(params, resumed, **tolerance)


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_state_dict_is_torchs_key_for_key(case):
    ours, theirs = (trained(make, parameters(SHAPES)).state_dict() for make in (case.ours, case.torch))
    assert [set(g) for g in ours["param_groups"]] == [set(g) for g in theirs["param_groups"]]
    entries = [
        {key: [(name, t.shape, t.dtype, t.stride()) for name, t in state.items()] for key, state in d["state"].items()}
        for d in (ours, theirs)
    ]
    assert entries[0] == entries[1]


def test_hooks_see_what_a_load_leaves():
    """In the dtype that was saved, and as copies; also what belongs to no parameter, and nested entries."""
    params = parameters([(4,), (5,)], torch.bfloat16)
    opt = trained(partial(optim.AdamW, state_dtype=torch.float32), params, 2)
    saved = opt.state_dict()
    saved["state"]["elsewhere"] = {"kept": torch.ones(1)}
    saved["state"][0]["nested"] = [torch.ones(2), {"deep": (torch.ones(3), "text")}]
    seen = []
    opt.register_load_state_dict_post_hook(lambda o: seen.append(dict(o.state)))
    opt.load_state_dict(saved)
    assert seen[0].keys() == opt.state.keys() and len(seen[0]) == 3
    assert seen[0]["elsewhere"] is saved["state"]["elsewhere"]
    assert seen[0][params[1]]["exp_avg"].dtype == torch.float32
    first, deep = seen[0][params[0]]["nested"]
    assert first is not saved["state"][0]["nested"][0] and deep["deep"][1] == "text"
    for name, t in saved["state"][1].items():
        assert_same_bits(seen[0][params[1]][name], t)
        assert seen[0][params[1]][name].data_ptr() != t.data_ptr()


def test_groups_and_loads_look_at_each_parameter_a_few_times(monkeypatch):
    """torch's own look at all earlier parameters for each group, and at all groups for each tensor that is loaded."""
    looks = []
    monkeypatch.setattr(torch.Tensor, "__hash__", lambda t: looks.append(1) or id(t))

    class Ids(list):
        def __contains__(self, key):
            looks.append(1)
            return super().__contains__(key)

        def __deepcopy__(self, memo):
            return list(self)

    counts = []
    for groups in (20, 80):
        opt = optim.AdamW([{"params": parameters([(2,)] * 5)} for _ in range(groups)])
        for group in opt.param_groups:
            set_grads(group["params"], 0)
        opt.step()
        saved = opt.state_dict()
        for group in saved["param_groups"]:
            group["params"] = Ids(group["params"])
        opt.load_state_dict(saved)
        counts.append(len(looks))
        looks.clear()
    assert 0 < counts[1] < 5 * counts[0]


def test_one_optimizer_in_two_threads_counts_every_step_that_was_taken():
    """It is refused or serial, never torn."""
    opt = trained(optim.Adam, parameters([(1 << 21,)]), 1)
    taken = []

    def work():
        for _ in range(10):
            try:
                opt.step()
                taken.append(1)
            except RuntimeError as error:
                assert "already running in another thread" in str(error)

    in_threads(work, work)
    assert opt.state[places(opt)[0]]["step"].item() == 1 + len(taken)


def test_many_parameters():
    """21,000 parameters (TransformerEngine#3418), some without gradient."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(21_000)]
    for p in params[::2]:
        p.grad = torch.ones(3)
    optim.SGD(params, lr=0.5).step()
    assert all((p == (1.0 if i % 2 else 0.5)).all() for i, p in enumerate(params))


def test_more_than_2_to_the_31_elements():
    """64-bit offsets: a view with gaps, so that few pages are touched."""
    n = 2**31 + 1000
    try:
        storage = torch.empty(n, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no memory for 4 GB")
    # Two rows, more than 2^31 elements apart.
    p = storage.as_strided((2, 300), (n - 300, 1))
    p.copy_(torch.ones(2, 300))
    p.grad = torch.ones(2, 300, dtype=torch.bfloat16)
    optim.SGD([p], lr=0.5).step()
    assert (p == 0.5).all()


def test_a_subclass_sees_plain_state_when_it_is_loaded():
    class Noted(optim.AdamW):
        def __setstate__(self, state):
            for entries in state["state"].values():
                entries.setdefault("note", 1.0)
            super().__setstate__(state)

    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    opt = Noted([p])
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert opt.state[p]["note"] == 1.0 and "__setstate__" not in vars(opt)
    opt.step()


@pytest.mark.parametrize(
    "change", (lambda group, p: group["params"].append(p), lambda group, p: group.update(params=[p]))
)
def test_a_group_changed_by_hand_is_looked_at_again(change):
    a, b, c = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    opt = optim.AdamW([{"params": [a]}, {"params": [b]}])
    change(opt.param_groups[0], c)
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [c]})


def test_an_interrupt_leaves_whole_steps(succeeds):
    """SIGINT in a long step, which lets other threads work, is told after it."""
    code = """
import os, signal, threading, torch
from genopt_ext import optim
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
p = torch.nn.Parameter(torch.ones(1 << 22))
p.grad = torch.full_like(p, 0.5)
opt = optim.AdamW([p])
opt.step()
interrupted = 0
for delay in (0.02, 0.03, 0.05):
    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        while True:
            opt.step()
    except KeyboardInterrupt:
        interrupted += 1
opt.step()
q = torch.nn.Parameter(torch.ones(1))
q.grad = torch.full_like(q, 0.5)
twin = optim.AdamW([q])
for _ in range(int(opt.state[p]["step"])):
    twin.step()
assert interrupted == 3
for a, b in ((p, q), *((opt.state[p][name], twin.state[q][name]) for name in ("exp_avg", "exp_avg_sq"))):
    assert (a == b).all()
"""
    succeeds(code)


def during_a_long_step(opt, params, act):
    """Calls ``act`` while another thread steps without the interpreter's lock, if it can be in time."""
    counter = opt.state[params[0]]["step"]
    before = counter.item()
    thread = threading.Thread(target=opt.step)
    thread.start()
    while counter.item() == before and thread.is_alive():
        pass
    act()
    thread.join()


def load(opt, params):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def clear(opt, params):
    opt.state.clear()
    opt.zero_grad()


def delete(opt, params):
    opt.param_groups.clear()
    opt.state.clear()
    for p in params:
        p.grad = None
        p.data = torch.zeros(0)


@pytest.mark.parametrize("act", (load, clear, delete))
def test_what_a_running_step_works_on_may_be_taken_away(act):
    """It holds its tensors; memory that is let go is used by others at once."""
    results = []
    for is_disturbed in (False, True):
        params = parameters([(1 << 21,)])
        opt = trained(partial(optim.AdamW, lr=0.1), params, 1)
        weights = params[0].detach().view_as(params[0])
        moments = opt.state[params[0]]["exp_avg"].view(-1) if act is delete else None
        set_grads(params, 1)

        def disturb(opt=opt, params=params):
            act(opt, params)
            gc.collect()
            for _ in range(4):
                torch.full((1 << 21,), torch.nan)

        if is_disturbed:
            during_a_long_step(opt, params, disturb)
        else:
            opt.step()
        results.append([weights, moments])
    for a, b in zip(*results, strict=True):
        assert a is None or (assert_same_bits(a, b) is None)


@pytest.mark.skipif(NATIVE != "cpu", reason="a step on a GPU is over once it is launched")
def test_a_second_thread_is_refused_while_the_first_steps():
    opt = trained(optim.AdamW, parameters([(1 << 22,)]), 1)
    told = []

    def step_too():
        try:
            opt.step()
        except RuntimeError as error:
            told.append(str(error))

    for _ in range(50):  # until it comes in time
        during_a_long_step(opt, places(opt), step_too)
        if told:
            break
    assert "step() of this optimizer is already running in another thread" in told[0]


def test_another_process_goes_on_where_this_one_was(tmp_path, succeeds):
    """As with spawned workers: model and optimizer travel as bytes."""
    opt = trained(partial(optim.AdamW, ema_decay=0.9), parameters(SHAPES))
    params = places(opt)
    torch.save((opt, params), tmp_path / "opt")
    code = f"""
import torch
from cases import train
opt, params = torch.load({str(tmp_path / "opt")!r}, weights_only=False)
assert all(p is q for p, q in zip(params, opt.param_groups[0]["params"], strict=True))
train(opt, params, 2, first=3)
torch.save((opt.state_dict(), params), {str(tmp_path / "end")!r})
"""
    succeeds(code)
    train(opt, params, 2, first=3)
    state_dict, their_params = torch.load(tmp_path / "end", weights_only=False)
    twin = optim.AdamW(their_params, ema_decay=0.9)
    twin.load_state_dict(state_dict)
    assert_same_state(opt, twin)


def test_dataloader_workers(succeeds):
    """Forked after steps on several threads, and while others go on."""
    code = """
import torch
from genopt_ext import optim
from torch.utils.data import DataLoader, TensorDataset
torch.set_num_threads(2)
results = []
for workers in (0, 2):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 3000), torch.nn.Linear(3000, 64), torch.nn.Linear(64, 1))
    opt = optim.AdamW(model.parameters(), max_grad_norm=1.0)
    data = TensorDataset(torch.randn(64, 16))
    model(data[0][0]).sum().backward()
    opt.step()
    for (x,) in DataLoader(data, batch_size=16, num_workers=workers):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
    results.append([p.detach() for p in model.parameters()])
for p, q in zip(*results):
    assert torch.equal(p, q)
"""
    succeeds(code)


@pytest.mark.parametrize("options", [{}, INT8, dict(master_weights=True)], ids=str)
def test_safetensors(options, tmp_path):
    """Every tensor of a checkpoint, codes and scales included, is one that it takes."""
    safetensors = pytest.importorskip("safetensors.torch")
    make = partial(optim.AdamW, ema_decay=0.9, **options)
    opt = trained(make, parameters(SHAPES, torch.bfloat16))
    whole = opt.state_dict()
    # It refuses tensors that share memory, as step counters do, or have strides of their own.
    tensors = {
        f"{i}.{name}": t.clone(memory_format=torch.contiguous_format)
        for i, state in whole["state"].items()
        for name, t in state.items()
    }
    safetensors.save_file(tensors, tmp_path / "state")
    state = {i: {} for i in whole["state"]}
    for key, t in safetensors.load_file(tmp_path / "state").items():
        i, name = key.split(".")
        state[int(i)][name] = t
    twin = make(copies_of(places(opt)))
    twin.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
    assert_same_state(opt, twin, options)


KINDS = [
    {},
    dict(max_grad_norm=1.0, skip_nonfinite=True),
    dict(clip_per_param=0.5, ema_decay=0.9),
    dict(agc=0.1, clip_grad_value=0.5),
    dict(state_dtype=torch.int8),
    dict(state_dtype=torch.bfloat16, param_rounding="stochastic"),
    dict(param_rounding="kahan"),
    dict(master_weights=True),
]
GROWTH = """
import gc, os
import torch
from cases import parameters, set_grads
from test_state import KINDS
from genopt_ext import optim

def size():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"), len(gc.get_objects())

def step(i):
    for p, grad in zip(params, grads):
        p.grad = grad.clone()
    if i % 4 == 0:
        opt.accumulate()
        params[0].grad = grads[0].clone()
    opt.step_and_zero_() if i % 4 == 1 else opt.step(lambda: 1.0) if i % 4 == 2 else opt.step()
    if opt.param_groups[0].get("ema_decay"):
        with opt.swap_ema():
            pass

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # what torch has made is not looked at again
for options in KINDS:
    params = [*parameters([(10_000,), (3, 5)]), *parameters([(5000,)], torch.bfloat16)]
    params.append(torch.nn.Parameter(torch.ones(90, 70).t()))
    set_grads(params, 0)
    grads = [p.grad for p in params]
    opt = optim.AdamW(params, backend={backend!r}, **options)
    sizes = []
    for i in range(4 * {steps}):
        if i % {steps} == 0:
            sizes.append(size())
        step(i)
    # A cache is filled once.
    grown, objects = (min(b - a for a, b in zip(each[1:], each[2:])) for each in zip(*sizes))
    assert grown < 20_000 * {steps} and objects < {steps}, (options, sizes)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="asks Linux for the memory in use")
@pytest.mark.skipif(EMULATED, reason="AddressSanitizer keeps what is let go")
def test_many_steps_of_every_kind_take_no_more_memory(backend, succeeds):
    """A tensor or a list left behind at each step would be an object, and a tensor 40 KB."""
    succeeds(GROWTH.format(backend=backend, steps=16))
