"""What the tests of narrow state and of 16-bit weights share: gradients that strain a map, the layout of the state."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import (
    COPIES,
    DEVICE,
    INF,
    NAN,
    NATIVE,
    STATEFUL,
    Case,
    assert_same_bits,
    assert_same_state,
    layouts,
    parameters,
    randn,
    set_grads,
)
from torch import Tensor

import genopt_ext
from genopt_ext import _backend, optim

KERNELS = pytest.mark.skipif(_backend.native is None, reason="compares the kernels with the reference")
ADAMW = Case("AdamW")
SGD = Case("SGD", dict(lr=0.1, momentum=0.9))
# Every class, with a state that has codes.
CODED = [ADAMW, SGD, *(case for case in STATEFUL if case.kwargs and case.name not in ("AdamW", "SGD"))]
# SGD without momentum has no state of its own.
SOME = [*STATEFUL, Case("SGD", dict(lr=0.1))]
# Smaller than SIZES, with three blocks and a tail among them.
BLOCKS = [(n,) for n in (1, 255, 256, 257, 700)]

TILE = 256
WIDER = [dict(state_dtype=torch.float32), dict(state_dtype=torch.bfloat16)]
SIGNED = ("exp_avg", "grad_avg", "momentum_buffer")
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")

# An error that the map may have, whichever it is, as a part of the largest element in a block.
MAP_ERROR = 0.1

# How weights of 16 bits may be kept.
KEPT = [dict(param_rounding="stochastic"), dict(param_rounding="kahan"), dict(master_weights=True)]

# Of the gradient path, for each of its kinds.
WIDE = [
    dict(max_grad_norm=10.0, skip_nonfinite=True, ema_decay=0.7),
    dict(clip_per_param=5.0),
    dict(agc=0.2, clip_grad_value=0.3, ema_decay=0.9),
    dict(clip_grad_value=0.5, skip_nonfinite=True),
]


def name_of(x: Any) -> str:
    """In a test's name."""
    return getattr(x, "__name__", str(x))


def places(opt: torch.optim.Optimizer) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]


def grouped(params: list[Any], per_group: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One group for each entry, each with every so many parameters."""
    return [{"params": params[i :: len(per_group)], **own} for i, own in enumerate(per_group)]


def seeded(make: Callable[[], Any], seed: int = 7) -> Any:
    """``make()`` where torch's initial seed is ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def come_and_go(step: int) -> Callable[[int], bool]:
    return lambda i: (i + step) % 4 == 3


def gradient(p: Tensor, step: int, i: int = 0, scale: float = 1.0) -> Tensor:
    """Magnitudes over eight decades, and zeros, of the dtype that the parameter's gradients have."""
    seed = 1000 * (step + 1) + i
    spread = (3 * randn(p.shape, seed + 500_000)).clamp(-9, 9).exp()
    grad = scale * randn(p.shape, seed) * spread * (randn(p.shape, seed + 700_000) > -1)
    dtype = getattr(p, "grad_dtype", None) or p.dtype
    return grad.clamp(-3e4, 3e4).to(dtype)


def set_strained(params: list[Any], step: int, skip: Callable[[int], bool] = lambda i: False, scale: float = 1.0):
    for i, p in enumerate(params):
        p.grad = None if skip(i) else gradient(p, step, i, scale)


def spoil(params: list[Any], value: float) -> None:
    """One element of one gradient becomes ``value``."""
    p = next(p for p in reversed(params) if p.grad is not None and p.numel())
    p.grad[tuple(n // 2 for n in p.shape)] = value


def take(opt: Any, params: list[Any], step: int, wide: dict[str, Any] | None = None) -> None:
    """A step; with the gradient path's options in ``wide`` also one that is skipped, accumulates, zeroes or swaps."""
    if wide is None:
        set_strained(params, step)
        opt.step()
        return
    set_strained(params, step, come_and_go(step))
    if wide.get("skip_nonfinite") and step % 3 == 0:  # the first one too
        spoil(params, float("nan") if step else float("inf"))
    if step == 2:
        opt.accumulate()
        set_strained(params, 50)
        opt.accumulate()
        set_strained(params, 51, come_and_go(step))
    opt.step_and_zero_() if step % 2 else opt.step()
    if any("ema" in opt.state.get(p, {}) for p in params):
        kept = [p.detach().clone() for p in params]
        with opt.swap_ema():
            pass
        for p, old in zip(params, kept, strict=True):
            assert_same_bits(p.detach(), old, "after swap_ema")


def run_both(
    case: Case,
    make_params: Callable[[], list[Any]],
    options: dict[str, Any],
    per_group: Sequence[dict[str, Any]] = ({},),
    steps: int = 3,
    act: Callable[[Any, list[Any], int], None] = take,
) -> list[Any]:
    """The kernels' and the reference's optimizer after the same steps, found to have the same bits."""
    opts = [
        run_one(case, make_params, options, per_group, steps, act, backend=backend) for backend in (NATIVE, "reference")
    ]
    assert_same(*opts, (case, options, per_group))
    return opts


def run_one(
    case: Case,
    make_params: Callable[[], list[Any]],
    options: dict[str, Any],
    per_group: Sequence[dict[str, Any]] = ({},),
    steps: int = 3,
    act: Callable[[Any, list[Any], int], None] = take,
    backend: str = NATIVE,
) -> Any:
    params = make_params()
    opt = seeded(lambda: case.ours(grouped(params, per_group), backend=backend, **options))
    for step in range(steps):
        act(opt, params, step)
    return opt


def strides(t: Tensor) -> list[int]:
    """Where they mean something."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1] if t.numel() else []


def assert_same(a: Any, b: Any, what: object = "") -> None:
    """Parameters and state: bits, dtypes, strides; and what groups say of their state."""
    assert_same_state(a, b, what)
    sa, sb = a.state_dict(), b.state_dict()
    for key, state in sa["state"].items():
        for name, t in state.items():
            assert strides(t) == strides(sb["state"][key][name]), (what, key, name)
    for ga, gb in zip(sa["param_groups"], sb["param_groups"], strict=True):
        for name in ("int8_format", "rounding_seed", "state_dtype", "param_rounding"):
            assert ga.get(name) == gb.get(name), (what, name)
    if a.grad_norm is not None and b.grad_norm is not None:
        assert_same_bits(a.grad_norm, b.grad_norm, (what, "grad_norm"))
    if a.skip_nonfinite:
        assert_same_bits(a.skipped_steps, b.skipped_steps, (what, "skipped_steps"))


def moments(case: Case) -> list[str]:
    """The names of the states, by torch."""
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    opt = case.torch([p])
    opt.step()
    return [name for name, t in opt.state[p].items() if name != "step" and t is not None]


def assert_state(case: Case, opt: Any, p: Tensor, dtype: torch.dtype | None, what: object = "", extra=()) -> None:
    """``p`` has exactly the agreed state: codes and scales, or moments of ``dtype``."""
    state = opt.state[p]
    what = (case, tuple(p.shape), p.dtype, dtype, what)
    expected = set(extra)
    for name in moments(case):
        if dtype != torch.int8:
            expected.add(name)
            assert name in state and state[name].dtype == dtype, (what, name, list(state))
            assert state[name].shape == p.shape, (what, name)
            continue
        expected |= {f"{name}_codes", f"{name}_scales"}
        assert expected <= set(state), (what, name, list(state))
        codes, scales = state[f"{name}_codes"], state[f"{name}_scales"]
        assert codes.dtype == (torch.uint8 if name in SQUARES else torch.int8), (what, name, codes.dtype)
        assert codes.shape == p.shape, (what, name)
        assert strides(codes) == strides(torch.empty_like(p)), (what, name)
        assert scales.dtype == torch.float32 and scales.shape == (-(-p.numel() // TILE),), (what, name, scales.shape)
        assert codes.device == scales.device == p.device, (what, name)
    assert set(state) - {"step"} == expected, (what, list(state))


def plain(case: Case, opt: Any, **options: Any) -> tuple[Any, list[Any]]:
    """An optimizer with float32 state that has loaded the other's, and its parameters, copies of the other's."""
    copies = [[torch.nn.Parameter(p.detach().clone()) for p in group["params"]] for group in opt.param_groups]
    other = case.ours([{"params": row} for row in copies], **options)
    other.load_state_dict(opt.state_dict())
    return other, [p for row in copies for p in row]


def decoded(case: Case, opt: Any) -> list[dict[str, Tensor]]:
    """Each parameter's moments in float32."""
    other, params = plain(case, opt)
    return [{n: t for n, t in other.state.get(p, {}).items() if n in SIGNED + SQUARES} for p in params]


def in_memory(t: Tensor) -> Tensor:
    """The elements in the order in which they lie."""
    order = sorted(range(t.dim()), key=lambda d: (-t.stride(d), d))
    return t.permute(order).reshape(-1)


def blocks(t: Tensor) -> list[Tensor]:
    return list(in_memory(t.detach()).split(TILE))


def assert_decoded_like(mine: dict[str, Tensor], truth: dict[str, Tensor], what: object = "", error=MAP_ERROR) -> None:
    """Within the map's error; zeros are zeros, signs are kept, and squares that are not zero do not become it."""
    assert mine.keys() == truth.keys(), what
    for name, t in truth.items():
        assert mine[name].dtype == torch.float32, (what, name)
        for k, (a, b) in enumerate(zip(blocks(mine[name]), blocks(t), strict=True)):
            where = (what, name, "block", k)
            a, b = a.double(), b.double()
            assert a.isfinite().all(), where
            largest = b.abs().max()
            assert (a - b).abs().max() <= error * largest, (where, (a - b).abs().max(), largest)
            assert (a[b == 0] == 0).all(), where
            assert (a * b >= 0).all(), where
            if name in SQUARES:
                assert (a[b != 0] > 0).all(), where


def saved(state_dict: Any) -> Any:
    """Through a file, as ``weights_only=True`` allows."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def snapshot(opt: Any) -> tuple[list[Tensor], list[dict[str, Any]]]:
    def copied(t: Any) -> Any:
        return t.clone() if isinstance(t, Tensor) else t

    keep = [{n: copied(t) for n, t in opt.state.get(p, {}).items()} for p in places(opt)]
    return [p.detach().clone() for p in places(opt)], keep


def assert_unchanged(opt: Any, before: tuple[list[Tensor], list[dict[str, Any]]], what: object = "") -> None:
    for p, old, state in zip(places(opt), *before, strict=True):
        assert_same_bits(p.detach(), old, what)
        now = opt.state.get(p, {})
        assert now.keys() == state.keys(), (what, list(now), list(state))
        for name, t in state.items():
            if isinstance(t, Tensor) and t.device.type != "meta":
                assert now[name].dtype == t.dtype, (what, name)
                assert_same_bits(now[name], t, (what, name))


# Bodies of tests that narrow state and 16-bit weights have in common


def assert_same_in_layout(case: Case, layout: str, dtype: torch.dtype, options: dict[str, Any]) -> list[Any]:
    """Gradients of other strides, expanded ones too; nothing beside a view is written. The two optimizers."""
    made = []

    def make():
        t = layouts(dtype)[layout]
        made.append((t, t._base.clone() if t._base is not None else None))
        return [torch.nn.Parameter(t)]

    def act(opt, params, step):
        (p,) = params
        p.grad = randn(p.shape, step, dtype)
        if step == 1:
            p.grad = torch.empty_strided(p.shape, p.stride(), dtype=dtype).copy_(p.grad)
        if step == 2:
            p.grad = randn((1,) * p.dim(), step, dtype).expand(p.shape)
        opt.step()

    opts = run_both(case, make, options, act=act)
    for ours, before in made:
        if before is not None:
            after = ours._base.clone()
            for t in (before, after):
                t.as_strided(ours.shape, ours.stride(), ours.storage_offset()).zero_()
            assert_same_bits(after, before, (case, layout, options))
    return opts


def assert_same_for_threads(make: Callable[[list[Any]], Any], dtype: torch.dtype, what: object = "") -> None:
    """For every number of threads, and run after run; ``make``: an optimizer of these parameters."""
    opts = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            params = parameters([(100_003,), (300, 7), *[(64,)] * 20], dtype)
            opts.append(seeded(lambda: make(params)))  # noqa: B023
            for step in range(2):
                take(opts[-1], params, step)
    finally:
        torch.set_num_threads(threads)
    for other in opts[1:]:
        assert_same(opts[0], other, what)


def assert_same_in_backward(
    case: Case, make_params: Callable[[], list[Any]], per_group: Sequence[dict[str, Any]], **options: Any
) -> None:
    """The bits of backward and step."""
    opts = []
    for in_backward in (False, True):
        params = make_params()
        opt = seeded(lambda: case.ours(grouped(params, per_group), **options))  # noqa: B023
        if in_backward:
            genopt_ext.step_in_backward(opt)
        for step in range(3):
            torch.stack([(p * gradient(p, step, i)).sum() for i, p in enumerate(params)]).sum().backward()
            if not in_backward:
                opt.step()
                opt.zero_grad()
        opts.append(opt)
    assert_same(*opts, (case, per_group, options))


def run_scaled(case: Case, make_scaler: Any, dtype: torch.dtype, scale: float, options: dict[str, Any]) -> list[Any]:
    """Parameters after five steps with ``fused=True``, of which the first meets an infinity and the third NaN, and
    after the other three alone, without a scaler. A skipped step changes nothing."""
    scalers = {}

    def act(opt, params, step):
        if opt not in scalers:
            scalers[opt] = make_scaler(DEVICE, init_scale=scale, growth_interval=2)
            scalers[opt].scale(torch.zeros(()))
        before = snapshot(opt)
        for i, p in enumerate(params):
            p.grad = (randn(p.shape, 10 * step + i) * scalers[opt].get_scale()).to(dtype)
        bad = {0: INF, 2: NAN}.get(step)
        if bad is not None:
            params[2].grad[3] = bad
        scalers[opt].step(opt)
        scalers[opt].update()
        if bad is not None and step:
            assert_unchanged(opt, before, (case, options, step))

    opts = run_both(case, lambda: parameters(BLOCKS, dtype), {**options, "fused": True}, steps=5, act=act)
    params = parameters(BLOCKS, dtype)
    alone = seeded(lambda: case.ours(params, **options))
    for step in (1, 3, 4):
        for i, p in enumerate(params):
            p.grad = randn(p.shape, 10 * step + i, dtype)
        alone.step()
    return list(zip(places(opts[0]), params, strict=True))


def assert_copies_train_on_alone(opt: Any, params: list[Any], how: str, what: object = "") -> None:
    for step in range(2):
        take(opt, params, step)
    twin = COPIES[how](opt)
    assert type(twin) is type(opt), (what, how)
    before = snapshot(twin)
    for step in (2, 3):
        take(opt, params, step)
    assert_unchanged(twin, before, (what, how))
    for step in (2, 3):
        take(twin, places(twin), step)
    assert_same(opt, twin, (what, how))


def assert_round_trip(case: Case, make: Callable[..., Any], params: list[Any], what: object = "") -> Any:
    """Saved, loaded into a new optimizer, and on: as if nothing had happened, random bits included. The new one."""
    opt = seeded(lambda: make(params))
    for step in range(3):
        take(opt, params, step)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = seeded(lambda: make(resumed), 8)
    other.load_state_dict(saved(opt.state_dict()))
    assert_same(opt, other, what)
    for step in range(3, 6):
        take(opt, params, step)
        take(other, resumed, step)
    assert_same(opt, other, what)
    # Its own state, in place.
    opt.load_state_dict(opt.state_dict())
    assert_same(opt, other, what)
    for o, ps in ((opt, params), (other, resumed)):
        take(o, ps, 6)
    assert_same(opt, other, what)
    return other


def assert_option_refused(name: str, given: dict[str, Any], more: dict[str, Any], backend: str, match: str) -> None:
    """By constructors, in groups and, set by hand, before each of two steps; nothing is changed then."""
    make = getattr(optim, name)
    errors = (TypeError, ValueError)
    with pytest.raises(errors, match=match):
        make(parameters([(2,)]), **{**more, **given})
    with pytest.raises(errors, match=f"group 0.*{match}"):
        make([{"params": parameters([(2,)]), **more, **given}])
    params = parameters([(7,), (300,)], torch.bfloat16)
    opt = make(params, backend=backend, **more)
    with pytest.raises(errors, match=f"group 1.*{match}"):
        opt.add_param_group({"params": parameters([(2,)]), **given})
    assert len(opt.param_groups) == 1
    group = opt.param_groups[0]
    for step in range(2):
        set_grads(params, step)
        before, kept = snapshot(opt), dict(group)
        group.update(given)
        with pytest.raises(errors, match=f"group 0.*{match}"):
            opt.step()
        assert_unchanged(opt, before, (name, given, more, backend))
        group.clear()
        group.update(kept)
        opt.step()


def assert_broken_state_is_refused(
    opt: Any, params: list[Any], break_it: Callable[[dict[str, Any]], None], match: str, what: object = ""
) -> None:
    """``break_it`` is done to the state of the second parameter, which is called ``second``."""
    state = opt.state[params[1]]
    good = dict(state)
    break_it(state)
    before = snapshot(opt)
    set_grads(params, 5)
    for attempt in range(2):  # with the plan of before, and with what a refusal leaves
        with pytest.raises((RuntimeError, TypeError, ValueError), match=r"group 0 parameter 1 \('second'.*" + match):
            opt.step()
        assert_unchanged(opt, before, (what, attempt))
    state.clear()
    state.update(good)
    opt.step()


def assert_shared_memory_is_refused(opt: Any, params: list[Any], name: str) -> None:
    opt.state[params[0]][name] = opt.state[params[1]][name]
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match="shares? memory"):
        opt.step()
    assert_unchanged(opt, before, name)


# What a user may do between two steps without changing a number


def clone_state(opt, params):
    for state in opt.state.values():
        for name, t in state.items():
            state[name] = t.clone()
            if name != "step":
                t.fill_(77)  # what a stale pointer would find


def other_storage(opt, params):
    for state in opt.state.values():
        for name, t in state.items():
            if name != "step":
                old, t.data = t.data, t.data.clone()
                old.fill_(77)


def rename_keys(opt, params):
    for p in params:
        opt.state[p] = {("_" + name)[1:]: t.clone() for name, t in reversed(list(opt.state[p].items()))}


def load_own(opt, params):
    opt.load_state_dict(opt.state_dict())


def other_data(opt, params):
    for p in params:
        old, p.data = p.data, p.data.clone()
        old.fill_(77)


NEUTRAL = [clone_state, other_storage, rename_keys, load_own, other_data]


def assert_change_is_honoured(
    case: Case, make_params: Callable[[], list[Any]], options: dict[str, Any], change: Any, neutral: bool = False
) -> None:
    """``neutral``: it changes no number."""

    def act(opt, params, step):
        if step == 2:
            change(opt, params)
        take(opt, params, step)

    opt, _ = run_both(case, make_params, options, steps=4, act=act)
    if neutral or change in NEUTRAL:
        assert_same(opt, run_one(case, make_params, options, steps=4), (case, options, change))
