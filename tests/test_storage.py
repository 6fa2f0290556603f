"""However weights and state are stored: what a state holds, checkpoints, copies, changes between steps, refusals."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import (
    BACKENDS,
    COPIES,
    DEVICE,
    FIRST,
    INF,
    INT8,
    KERNELS,
    NAN,
    NARROW,
    NUMBERS,
    SHAPES,
    SIXTEEN,
    STATEFUL,
    STORED,
    Case,
    assert_option_refused,
    assert_same_bits,
    assert_same_state,
    assert_unchanged,
    copies_of,
    grouped,
    in_turn,
    pairs,
    parameters,
    places,
    randn,
    refused,
    saved,
    set_grads,
    snapshot,
    stored,
    train,
    trained,
)
from low_precision import (
    ADAMW,
    BLOCKS,
    CODED,
    KEPT,
    MAP_ERROR,
    MIXED,
    SOME,
    STATE_DTYPES,
    STATES,
    assert_copies_train_on_alone,
    assert_decoded_like,
    assert_round_trip,
    assert_same,
    assert_state,
    assert_states,
    copied,
    decoded,
    extras,
    moments,
    name_of,
    plain,
    run_both,
    run_one,
    seeded,
    take,
    walk,
)

import genopt_ext
from genopt_ext import optim

# What is stored


@pytest.mark.parametrize(("case", "dtype", "backend"), pairs(STATEFUL, NARROW, BACKENDS), ids=str)
@pytest.mark.narrow_state
def test_min_int8_size(case, dtype, backend):
    """Smaller parameters have float32 state, those of 16 bits too."""
    for least, sizes in ((None, (4095, 4096)), (300, (299, 300)), (1, (1, 2)), (10**9, (4096, 5000))):
        params = parameters([(n,) for n in sizes], dtype)
        more = {} if least is None else dict(min_int8_size=least)
        opt = case.ours(params, state_dtype=torch.int8, backend=backend, **more)
        train(opt, params, 2)
        limit = 4096 if least is None else least
        for p in params:
            assert_state(case, opt, p, least, torch.int8 if p.numel() >= limit else torch.float32)


@pytest.mark.parametrize(
    ("case", "state_dtype", "dtype", "backend"),
    pairs(STATEFUL, STATE_DTYPES[1:], [torch.float64, torch.complex64, torch.complex128], BACKENDS),
    ids=str,
)
def test_float64_and_complex_keep_their_state(case, state_dtype, dtype, backend):
    make = partial(parameters, [(5000,), (3,)], dtype)
    options = dict(state_dtype=state_dtype, min_int8_size=1)
    opts = [run_one(case, make, given, act=walk, backend=backend) for given in (options, {})]
    for p in places(opts[0]):
        assert_state(case, opts[0], p, state_dtype, dtype)
    assert_same_state(*opts, (case, state_dtype))


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_float32_state_of_16_bit_parameters(case, backend):
    """Moments are those of a float32 parameter with these gradients; torch's would be rounded at every step."""
    options = {k: v for k, v in case.kwargs.items() if k != "weight_decay"}
    case = Case(case.name, dict(options, **({"weight_decay": 0.0} if case.name == "AdamW" else {})))
    (p,) = parameters([(700,)], torch.bfloat16)
    wide = torch.nn.Parameter(p.detach().float())
    opt, truth = case.ours([p], state_dtype=torch.float32, backend=backend), case.ours([wide], backend=backend)
    for step in range(5):
        set_grads([p], step)
        wide.grad = p.grad.float()
        opt.step()
        truth.step()
    for name in moments(case):
        if name != "ax":  # an average of the weights themselves
            assert_same_bits(opt.state[p][name], truth.state[wide][name], (case, name))


@pytest.mark.parametrize("storage", [STORED["plain"], STORED["int8"], *MIXED], ids=str)
def test_version_counters_are_bumped(storage, backend):
    p = parameters([(300,)], storage.dtypes[-2])[0]
    opt = optim.AdamW([p], ema_decay=0.9, backend=backend, **storage.options)
    train(opt, [p], 1)
    written = [p, *opt.state[p].values()]
    before = [t._version for t in written]
    loss = (p * p).sum()
    train(opt, [p], 1)
    assert all(t._version > old for t, old in zip(written, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("case", "backend", "storage", "dtype"), stored(SOME, BACKENDS, storages=MIXED), ids=str)
def test_float32_parameters_are_not_affected(case, backend, storage, dtype):
    """By how weights of 16 bits are kept, which stand beside them."""

    def make():
        return parameters(BLOCKS) + parameters([(300,)], dtype)

    state = {"state_dtype": storage.options["state_dtype"], "min_int8_size": 1}
    opts = [run_one(case, make, options, backend=backend) for options in (storage.options, state)]
    assert_states(case, opts[0])
    for p, q in list(zip(*map(places, opts), strict=True))[:-1]:
        assert_same_bits(p.detach(), q.detach(), (case, storage))
        assert {*opts[0].state[p]} - NUMBERS == {*opts[1].state[q]} - NUMBERS, (case, storage)


@KERNELS
@pytest.mark.parametrize(
    ("case", "make_scaler", "storage", "dtype"),
    stored(CODED, [genopt_ext.GradScaler, torch.amp.GradScaler], storages=[STORED["int8"], *MIXED]),
    ids=name_of,
)
def test_grad_scalers(case, make_scaler, storage, dtype):
    """With ``fused=True``, of five steps the first meets an infinity and the third NaN. What was skipped left nothing:
    the other steps alone, without a scaler, give the same, what is kept beside weights and random bits included."""
    scalers, scale = {}, 1024.0 if dtype == torch.float32 else 64.0

    def act(opt, params, step):
        if opt not in scalers:
            scalers[opt] = make_scaler(DEVICE, init_scale=scale, growth_interval=2)
            scalers[opt].scale(torch.zeros(()))
        before = snapshot(opt)
        for i, p in enumerate(params):
            p.grad = (randn(p.shape, 10 * step + i) * scalers[opt].get_scale()).to(dtype)
        if step in (0, 2):
            params[2].grad[3] = NAN if step else INF
        scalers[opt].step(opt)
        scalers[opt].update()
        if step == 2:
            assert_unchanged(opt, before, (case, storage))

    options = {**storage.options, "max_grad_norm": 3.0}
    opts = run_both(case, lambda: parameters(BLOCKS, dtype), {**options, "fused": True}, steps=5, act=act)
    params = parameters(BLOCKS, dtype)
    alone = seeded(lambda: case.ours(params, **options))
    for step in (1, 3, 4):
        for i, p in enumerate(params):
            p.grad = randn(p.shape, 10 * step + i, dtype)
        alone.step()
    tolerance = {} if dtype == torch.float16 else dict(rtol=0, atol=0)  # scaled subnormals have more digits
    torch.testing.assert_close(places(opts[0]), params, **tolerance)


# Checkpoints


@pytest.mark.parametrize(
    ("case", "kept", "state", "dtype", "backend"), pairs(SOME, [{}, *KEPT], STATES, NARROW, BACKENDS), ids=str
)
@pytest.mark.narrow_state
def test_round_trip(case, kept, state, dtype, backend):
    per_group = [{}, dict(weight_decay=0.05), dict(state_dtype=torch.int8, min_int8_size=300)]
    params = parameters([(700,), (20, 30), (7,), (257,), (20, 15), (300,), ()], dtype)
    what = (case, kept, state, dtype)
    options = dict(backend=backend, **kept, **state)
    other = assert_round_trip(lambda ps: case.ours(grouped(ps, per_group), **options), params, what)
    assert_states(case, other, what)
    assert {key: other.param_groups[0][key] for key in kept} == kept


@pytest.mark.parametrize(
    ("case", "how", "storage", "dtype"),
    stored(SOME, list(COPIES), storages=[STORED["plain"], STORED["int8"], *MIXED]),
    ids=str,
)
def test_copies_train_on_alone(case, how, storage, dtype):
    opt = seeded(lambda: case.ours(parameters([(5000,), *SHAPES], dtype), **storage.options))
    assert_copies_train_on_alone(opt, how, (case, storage))


@pytest.mark.parametrize(("saved_as", "options"), [({}, {}), *((INT8, options) for options in STATES[1:])], ids=str)
def test_optimizers_loaded_from_one_state_dict_share_nothing(saved_as, options):
    def memory(opt):
        return {t.untyped_storage().data_ptr() for s in opt.state.values() for t in s.values() if t.numel()}

    params = parameters([(700,), (300,)])
    opt = trained(partial(optim.AdamW, **saved_as), params, 2)
    state_dict = opt.state_dict()
    twins = [copied(ADAMW, opt, **options) for _ in range(2)]
    for twin, _ in twins:
        twin.load_state_dict(state_dict)
    everything = [memory(o) for o in (opt, twins[0][0], twins[1][0])]
    assert len(set.union(*everything)) == sum(map(len, everything))
    kept = snapshot(twins[0][0])
    train(opt, params, 1, first=2)
    train(*twins[1], 1, first=2)
    assert_unchanged(twins[0][0], kept)


@pytest.mark.parametrize(("case", "kept", "dtype"), pairs(SOME, KEPT, SIXTEEN), ids=str)
def test_checkpoints_of_torch_load(case, kept, dtype):
    """What they lack is made at the next step: masters from the parameters, compensations of zero, SGD's step."""
    params = parameters([(700,), (7,)], dtype)
    theirs = case.torch(params)
    train(theirs, params, 2)
    opt, resumed = copied(case, theirs, **kept)
    for step in range(2):  # it has kept something of its own, which is not what was loaded
        take(opt, resumed, step)
    for p, q in zip(params, resumed, strict=True):
        q.data.copy_(p.detach())
    opt.load_state_dict(saved(theirs.state_dict()))
    group = opt.param_groups[0]
    assert {key: group[key] for key in kept} == kept
    assert ("rounding_seed" in group) == (kept.get("param_rounding") == "stochastic")
    train(opt, resumed, 1, first=2)
    assert_states(case, opt, kept)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    truth = case.ours(wide)
    truth.load_state_dict(saved(theirs.state_dict()))
    for i, q in enumerate(wide):
        q.grad = randn(q.shape, 3000 + i, dtype).float()
    truth.step()
    for p, q in zip(resumed, wide, strict=True):
        # One rounding to either side, and torch's own of the moments in 16 bits.
        # Not a number where torch's centered RMSprop left one in the checkpoint.
        tolerance = dict(rtol=2 * torch.finfo(dtype).eps, atol=1e-2, equal_nan=True)
        torch.testing.assert_close(p.float(), q, **tolerance, msg=lambda m: f"{case} {kept} {dtype}: {m}")


@pytest.mark.parametrize(
    ("case", "first", "second", "dtype", "backend"),
    pairs(STATEFUL, [*STATE_DTYPES, "torch"], STATE_DTYPES, NARROW, BACKENDS),
    ids=str,
)
def test_what_is_loaded_becomes_what_was_asked_for(case, first, second, dtype, backend):
    """At construction, whatever was saved, by torch too; without a request it stays, as codes are no numbers."""
    params = parameters([(5000,), (30, 40), (100,), ()], dtype)
    opt = case.torch(params) if first == "torch" else case.ours(params, state_dtype=first, min_int8_size=200)
    train(opt, params, 3)
    asked = {} if second is None else dict(state_dtype=second, min_int8_size=300)
    other, resumed = copied(case, opt, backend=backend, **asked)
    other.load_state_dict(saved(opt.state_dict()))
    group = other.param_groups[0]
    assert {key: group[key] for key in asked} == asked and group.get("state_dtype") == second
    assert ("int8_format" in other.state_dict()["param_groups"][0]) == (second == torch.int8)
    was = {torch.int8: torch.float32, "torch": dtype, None: dtype}.get(first, first)

    def assert_asked_for(what):
        for q in resumed:
            assert_state(case, other, q, (first, what), was if second is None else None)

    assert_asked_for("loaded")
    before = opt if first != "torch" else plain(case, opt)[0]
    coded = torch.int8 in (first, second)
    for mine, truth in zip(decoded(case, other), decoded(case, before), strict=True):
        assert_decoded_like(mine, truth, (first, second), MAP_ERROR if coded else 2.0**-7)
        if second in (first, None) and not coded:
            assert_same_bits(mine, truth)
    assert all(state.get("step", 3) == 3 for state in other.state.values())
    train(opt, params, 1, first=3)
    train(other, resumed, 1, first=3)
    assert_asked_for("trained")
    torch.testing.assert_close(params, resumed, rtol=0.05, atol=0.05)


def test_loading_leaves_groups_as_constructed():
    params = parameters([(700,), (300,)])
    per_group = [dict(INT8), dict(state_dtype=torch.bfloat16)]
    opt = trained(lambda params: optim.AdamW(grouped(params, per_group)), params, 2)
    other = optim.AdamW(grouped(copies_of(params), per_group[::-1]))
    other.load_state_dict(saved(opt.state_dict()))
    assert [group["state_dtype"] for group in other.param_groups] == [torch.bfloat16, torch.int8]
    assert [group.get("int8_format") for group in other.state_dict()["param_groups"]] == [None, 2]
    assert_states(ADAMW, other)


def test_a_decoded_checkpoint_keeps_its_masters():
    """Codes become numbers on loading, and masters stay."""
    params = parameters([(700,)], torch.bfloat16)
    opt = trained(partial(optim.AdamW, master_weights=True, **INT8), params, 2)
    other, (q,) = plain(ADAMW, opt, master_weights=True)
    assert_same_bits(other.state[q]["master"], opt.state[params[0]]["master"])
    assert_same_bits(other.state[q]["exp_avg"], decoded(ADAMW, opt)[0]["exp_avg"])
    train(other, [q], 1, first=2)
    train(opt, params, 1, first=2)
    assert_same_bits(q.detach(), params[0].detach())


# Changes between steps; test_state.py has others


@KERNELS
@pytest.mark.parametrize(
    ("case", "first", "second", "dtype"), pairs(STATEFUL, STATE_DTYPES, STATE_DTYPES, NARROW[:2]), ids=str
)
def test_a_group_may_change_its_state_dtype(case, first, second, dtype):
    make = partial(parameters, [(700,), (5,)], dtype)

    def act(opt, params, step):
        if step == 2:
            opt.param_groups[0]["state_dtype"] = second
        walk(opt, params, step)

    opts = run_both(case, make, dict(min_int8_size=300, state_dtype=first), act=act)
    wide = run_one(case, make, dict(state_dtype=torch.float32), act=walk)
    was = torch.float32 if first == torch.int8 else first or dtype
    for opt in opts:
        for p, q in zip(places(opt), places(wide), strict=True):
            assert_state(case, opt, p, (first, second), was if second is None else None)
            torch.testing.assert_close(p, q, rtol=0.1, atol=0.1, msg=lambda m: f"{case} {first} {second}: {m}")


STOPPED_BY_LR = [case for case in SOME if case.name != "Rprop"]


@pytest.mark.parametrize(("case", "kept", "backend"), pairs(STOPPED_BY_LR, KEPT, BACKENDS), ids=str)
@pytest.mark.narrow_state
def test_weights_may_be_kept_otherwise_between_steps(case, kept, backend):
    """Set in a group by hand; switched off and on again, nothing of long ago comes back."""
    params = parameters([(700,), (7,)], torch.bfloat16)
    opt = case.ours(params, backend=backend, **INT8)
    group = opt.param_groups[0]

    def walk(steps, **options):
        group.update(options)
        for _ in range(steps):
            for p in params:
                p.grad = torch.ones_like(p)
            opt.step()

    walk(2)
    before = dict(group)
    walk(2, **kept)
    assert_states(case, opt, kept)
    for key in kept:
        del group[key]
    walk(20, **{**before, "lr": 0.5, "weight_decay": 0.0})
    away = [p.detach().clone() for p in params]
    walk(1, **kept, lr=0.0)
    if "eta" in type(opt).rule.running or type(opt).rule.weights:  # what its next step moves by is decided before
        return
    for p, old in zip(params, away, strict=True):
        assert (p - old).abs().max() <= 0.02 * old.abs().max(), (case, kept)


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHANGING = [
    {},
    dict(ema_decay=0.7, **INT8),
    *({**kept, "max_grad_norm": 10.0, "skip_nonfinite": True, "ema_decay": 0.9} for kept in KEPT),
]


@KERNELS
@pytest.mark.parametrize(
    ("case", "options", "change"),
    pairs(SOME, CHANGING, [(a, b) for a in FLOATS for b in FLOATS if a != b]),
    ids=lambda x: str(x) if x else "plain",
)
def test_a_model_that_changes_its_dtype(case, options, change):
    """model.to(dtype) with state there, also amid accumulation: state goes on, where torch's Adam raises."""
    before, after = change

    def act(opt, params, step):
        if step == 3:
            opt.accumulate()
        if step in (2, 3):
            torch.nn.ParameterList(params).to(after if step == 2 else before)
        old = [p.detach().clone() for p in params]
        walk(opt, params, step)
        for p, o in zip(params, old, strict=True):
            assert p.isfinite().all() and p.dtype == o.dtype
            assert options.get("ema_decay") is None or opt.state[p]["ema"].isfinite().all()
            stays = case.name == "SGD" or step < case.still
            assert stays or p.dtype == after or (p != o).any(), (case, options, change)

    def close(a, b, what):
        torch.testing.assert_close(places(a), places(b))

    # In double, kernels and reference agree within rounding.
    same = close if torch.float64 in change else assert_same
    for opt in run_both(case, lambda: parameters([(700,), (5, 7)], before), options, steps=5, act=act, same=same):
        for p in places(opt):
            kept = {name: t.dtype for name, t in opt.state[p].items() if name in ("master", "compensation", "ema")}
            assert kept == extras(opt.param_groups[0], p), (case, options, change)
            assert_same_bits(p.detach(), opt.state[p].get("master", p.detach()).to(p.dtype))


@pytest.mark.parametrize(
    ("case", "options", "backend"),
    pairs(CODED, [{}, INT8, dict(ema_decay=0.9), dict(master_weights=True)], BACKENDS),
    ids=str,
)
def test_a_model_that_becomes_complex(case, options, backend):
    """What state there is is of real numbers: refused by name, and nothing is changed."""
    params = parameters([(300,), (5, 7)])
    opt = case.ours(params, backend=backend, **options)
    train(opt, params, 2)
    for p in params:
        p.grad, p.data = None, p.data.to(torch.complex64)
    set_grads(params, 2)
    refused(opt, rf"{case.name}.step: group 0 parameter 0 .*torch.complex64; ")


# What is refused

BAD = [
    *((dict(state_dtype=value), "state_dtype") for value in (torch.float64, torch.float16, torch.int32, torch.uint8)),
    *((dict(state_dtype=value), "state_dtype") for value in (torch.complex64, "int8", 8, True, int)),
    *((dict(min_int8_size=value), "min_int8_size") for value in (-1, 1.5, "4096", NAN, None, [1], 1j)),
    *((dict(param_rounding=value), "param_rounding") for value in ("Nearest", "", "up", 1, True, torch.bfloat16)),
    *((dict(param_rounding=value), "param_rounding") for value in (["nearest"], b"nearest")),
    *((dict(master_weights=value), "master_weights") for value in ("yes", 1.5, "kahan", [True], torch.float32)),
    *(
        (dict(master_weights=True, param_rounding=rounding), "master_weights.*param_rounding")
        for rounding in ("stochastic", "kahan")
    ),
]
EVERY = [*FIRST, *optim.EIGHT_BIT]


@pytest.mark.parametrize(("name", "bad", "backend"), in_turn(list(FIRST), BAD, BACKENDS), ids=str)
@pytest.mark.narrow_state
def test_bad_options(name, bad, backend):
    """By every constructor, and where groups and steps find them."""
    given, match = bad
    for each in EVERY:
        with pytest.raises((TypeError, ValueError), match=match):
            getattr(optim, each)(parameters([(2,)]), **given)
    for more in ({}, INT8):
        assert_option_refused(name, given, match, backend, **more)


@pytest.mark.parametrize("name", EVERY)
def test_options_that_every_class_checks(name):
    with pytest.raises(ValueError, match="lr"):
        getattr(optim, name)(parameters([(2,)]), lr=-1.0)
    for rounding in ("stochastic", "kahan"):
        getattr(optim, name)(parameters([(2,)]), master_weights=False, param_rounding=rounding)
    getattr(optim, name)(parameters([(2,)]), master_weights=True, param_rounding="nearest")


# What replaces codes, scales or what is kept beside them; None: nothing.
BROKEN = {
    "codes of another dtype": ("codes", lambda t: t.to(torch.int16)),
    "codes of the other sign": ("codes", lambda t: t.view(torch.uint8 if t.dtype == torch.int8 else torch.int8)),
    "codes as numbers": ("codes", lambda t: t.float()),
    "codes of another shape": ("codes", lambda t: t.flatten()[:-1].clone()),
    "codes elsewhere": ("codes", lambda t: t.to("meta")),
    "codes are no tensor": ("codes", lambda t: t.tolist()),
    "codes are missing": ("codes", None),
    "scales of another dtype": ("scales", lambda t: t.double()),
    "half scales": ("scales", lambda t: t.half()),
    "too few scales": ("scales", lambda t: t[:-1].clone()),
    "too many scales": ("scales", lambda t: torch.cat([t, t])),
    "scales of another shape": ("scales", lambda t: t[None]),
    "scales elsewhere": ("scales", lambda t: t.to("meta")),
    "scales are missing": ("scales", None),
    "kept in another shape": ("kept", lambda t: t.flatten()[:-1].clone()),
    "kept elsewhere": ("kept", lambda t: t.to("meta")),
    "kept in integers": ("kept", lambda t: t.to(torch.int32)),
    "kept in complex numbers": ("kept", lambda t: t.to(torch.complex64)),
    "kept in a list": ("kept", lambda t: t.tolist()),
}


@pytest.mark.parametrize(("case", "how"), in_turn(CODED, pairs(list(BROKEN), KEPT[1:], BACKENDS)), ids=str)
def test_broken_state_is_refused(case, how):
    kind, kept, backend = how
    params = parameters([(300,), (20, 30)], torch.bfloat16)
    opt = case.ours([("first", params[0]), ("second", params[1])], backend=backend, **kept, **INT8)
    train(opt, params, 2)
    part, replace = BROKEN[kind]
    state = opt.state[params[1]]
    names = [*extras(kept, params[1])] if part == "kept" else [f"{name}_{part}" for name in moments(case)]
    for name in names:
        good = dict(state)
        if replace is None:
            del state[name]
        else:
            state[name] = replace(state[name])
        set_grads(params, 5)
        match = r"group 0 parameter 1 \('second'" + (f".*{name}" if part == "kept" else "")
        for _ in range(2):  # with the plan of before, and with what a refusal leaves
            refused(opt, match, (RuntimeError, TypeError, ValueError))
        state.clear()
        state.update(good)
        opt.step()


@pytest.mark.parametrize(
    ("kind", "options"),
    pairs(
        ["too few scales", "scales are missing", "codes are missing", "codes of another shape", "codes as numbers"],
        [INT8, {}],
    ),
    ids=str,
)
def test_a_checkpoint_with_broken_codes_is_refused(kind, options):
    opt = trained(partial(optim.AdamW, **INT8), parameters([(5,), (700,)]), 2)
    bad = saved(opt.state_dict())
    part, replace = BROKEN[kind]
    whole = bad["state"][1].pop(f"exp_avg_{part}")
    if replace is not None:
        bad["state"][1][f"exp_avg_{part}"] = replace(whole)
    other, resumed = copied(ADAMW, opt, **options)
    set_grads(resumed, 2)
    refused(other, "exp_avg", ValueError, lambda: other.load_state_dict(bad))


@pytest.mark.parametrize("shape", [(64, 128), (64, 64)], ids=str)
@pytest.mark.parametrize("ours", [dict(state_dtype=torch.int8), dict()], ids=str)
def test_moments_of_another_shape_are_refused(shape, ours, backend):
    """Also where the number of elements is the same; and loading does not fail half way."""
    p, q = torch.nn.Parameter(randn(shape, 0)), torch.nn.Parameter(randn((128, 64), 1))
    saved_in = optim.AdamW([p], **(dict() if ours else dict(state_dtype=torch.int8)))
    take(saved_in, [p], 0)
    opt = optim.AdamW([q], lr=0.1, backend=backend, **ours)
    with pytest.raises(ValueError, match="group 0 parameter 0 .*exp_avg.*shape"):
        opt.load_state_dict(saved_in.state_dict())
    assert not opt.state
    opt.state[q] = saved_in.state[p]
    q.grad = torch.ones_like(q)
    refused(opt, "group 0 parameter 0 .*exp_avg.*shape")
