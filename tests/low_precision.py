"""What the tests of narrow state and of 16-bit weights share: gradients that strain a map, the layout of the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import (
    COPIES,
    INT8,
    NARROW,
    NATIVE,
    NUMBERS,
    SIXTEEN,
    STATEFUL,
    STORED,
    Case,
    assert_same_bits,
    assert_same_state,
    assert_unchanged,
    come_and_go,
    copies_of,
    grouped,
    places,
    randn,
    saved,
    snapshot,
    train,
)
from torch import Tensor

from genopt_ext import optim

needs_grad_dtype = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
ADAMW = Case("AdamW")
SGD = Case("SGD", dict(lr=0.1, momentum=0.9))
# Every class, with a state that has codes.
WITHOUT_CODES = ("SGDScheduleFree", "Adafactor")
CODED = [ADAMW, SGD]
CODED += [case for case in STATEFUL if case.kwargs and case.name not in ("AdamW", "SGD", *WITHOUT_CODES)]
# SGD without momentum has no state of its own.
SOME = [*STATEFUL, Case("SGD", dict(lr=0.1))]
# Smaller than SIZES, with three blocks and a tail among them.
BLOCKS = [*((n,) for n in (1, 255, 256, 257, 700)), (3, 320), (2, 4, 48)]

TILE = 256
STATE_DTYPES = (None, torch.float32, torch.bfloat16, torch.int8)
WIDER = [dict(state_dtype=torch.float32), dict(state_dtype=torch.bfloat16)]
RULES = [getattr(optim, name).rule for name in optim.OURS]
WEIGHTS = {name for rule in RULES for name in rule.weights | rule.precise}  # which are no moments
SQUARES = sorted({name for rule in RULES for name in rule.squares} - WEIGHTS)  # never negative
SIGNED = sorted({name for rule in RULES for name in rule.states} - {*SQUARES, *WEIGHTS})

# An error that the map may have, whichever it is, as a part of the largest element in a block.
MAP_ERROR = 0.1

# How weights of 16 bits may be kept.
KEPT = [dict(param_rounding="stochastic"), dict(param_rounding="kahan"), dict(master_weights=True)]
STATES = [{}, *WIDER, INT8]
# Codes, or narrow state, with each way to keep a weight.
MIXED = [STORED[name] for name in ("stochastic, int8", "kahan, bfloat16 state", "masters, int8")]

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


def seeded(make: Callable[[], Any], seed: int = 7) -> Any:
    """``make()`` where torch's initial seed is ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


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
    skips = wide.get("skip_nonfinite") and step % 3 == 0  # the first one too
    before = snapshot(opt) if skips else None
    if skips:
        spoil(params, float("nan") if step else float("inf"))
    if step == 2:
        opt.accumulate()
        set_strained(params, 50)
        opt.accumulate()
        set_strained(params, 51, come_and_go(step))
    opt.step_and_zero_() if step % 2 else opt.step()
    if before is not None:
        assert_unchanged(opt, before, (wide, step), may_begin=True)
    if any("ema" in opt.state.get(p, {}) for p in params):
        kept = [p.detach().clone() for p in params]
        with opt.swap_ema():
            pass
        for p, old in zip(params, kept, strict=True):
            assert_same_bits(p.detach(), old, "after swap_ema")


def walk(opt: Any, params: list[Any], step: int) -> None:
    """A step with ordinary gradients."""
    train(opt, params, 1, first=step)


def stepped(opt: Any, *grads: Any) -> Any:
    """The one parameter of ``opt`` after a step with each of the gradients; a number stands for all elements."""
    (p,) = places(opt)
    for grad in grads:
        p.grad = grad.clone() if isinstance(grad, Tensor) else torch.full_like(p, grad)
        opt.step()
    return p


def run_one(
    case: Case,
    make_params: Callable[[], list[Any]],
    options: dict[str, Any] | None = None,
    per_group: Sequence[dict[str, Any]] = ({},),
    steps: int = 3,
    act: Callable[[Any, list[Any], int], None] = take,
    backend: str = NATIVE,
) -> Any:
    params = make_params()
    opt = seeded(lambda: case.ours(grouped(params, per_group), backend=backend, **(options or {})))
    for step in range(steps):
        act(opt, params, step)
    return opt


def run_both(case: Case, make_params: Callable[[], list[Any]], *args: Any, same: Any = None, **more: Any) -> list[Any]:
    """The kernels' and the reference's optimizer after the same steps of ``run_one``, found to have the same bits."""
    opts = [run_one(case, make_params, *args, **more, backend=backend) for backend in (NATIVE, "reference")]
    (same or assert_same)(*opts, (case, args, more))
    return opts


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
    """The names of the states, by torch, but for those that are weights."""
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    opt = case.torch([p])
    opt.step()
    return [name for name, t in opt.state[p].items() if name not in NUMBERS | WEIGHTS and t is not None]


def asked_dtype(group: dict[str, Any], p: Tensor) -> torch.dtype:
    """Of the moments of ``p``, by its group's options."""
    asked = group.get("state_dtype")
    if asked is None or p.dtype not in NARROW:
        return p.dtype
    return torch.float32 if asked == torch.int8 and p.numel() < group.get("min_int8_size", 4096) else asked


def extras(group: dict[str, Any], p: Tensor) -> dict[str, torch.dtype]:
    """What the group's options have the state hold beside the moments."""
    found = {}
    if p.dtype in SIXTEEN and group.get("param_rounding") == "kahan":
        found["compensation"] = p.dtype
    if p.dtype in SIXTEEN and group.get("master_weights"):
        found["master"] = torch.float32
    if group.get("ema_decay") is not None:
        found["ema"] = torch.float32 if p.dtype in SIXTEEN else p.dtype
    return found


def assert_state(case: Case, opt: Any, p: Tensor, what: object = "", dtype: torch.dtype | None = None) -> None:
    """``p`` has exactly the state that its group asks for: codes and scales, or moments, and what is kept beside them;
    ``dtype``: that of moments where it is another."""
    (group,) = (group for group in opt.param_groups if any(p is q for q in group["params"]))
    state, dtype = opt.state[p], dtype or asked_dtype(group, p)
    what = (case, tuple(p.shape), p.dtype, dtype, what, list(state))
    expected = extras(group, p)
    rule = type(opt).rule
    wide = [name for name in rule.state_names(group, p) if name in WEIGHTS]
    expected |= dict.fromkeys(wide, torch.float32 if p.dtype in SIXTEEN else p.dtype)
    if dtype != torch.int8:
        expected |= dict.fromkeys(moments(case), dtype)
    else:
        for name in moments(case):
            expected[f"{name}_codes"] = torch.uint8 if name in SQUARES else torch.int8
            expected[f"{name}_scales"] = torch.float32
    assert set(state) - NUMBERS == set(expected), what
    for name, kind in expected.items():
        t, of_scales = state[name], name.endswith("_scales")
        assert t.dtype == kind and t.device == p.device, (what, name, t.dtype)
        assert t.shape == (scales_shape(p) if of_scales else rule.state_shape(name, p)), (what, name)
        if name.endswith("_codes") or name in ("compensation", "master"):
            assert strides(t) == strides(torch.empty_like(p)), (what, name)
    if "master" in state:
        assert_same_bits(p.detach(), state["master"].to(p.dtype), what)


def assert_states(case: Case, opt: Any, what: object = "") -> None:
    for p in places(opt):
        assert_state(case, opt, p, what)


def copied(case: Case, opt: Any, **options: Any) -> tuple[Any, list[Any]]:
    """A new optimizer, of another seed, of copies of the other's parameters, and these."""
    copies = [copies_of(group["params"]) for group in opt.param_groups]
    other = seeded(lambda: case.ours([{"params": row} for row in copies], **options), 8)
    return other, [p for row in copies for p in row]


def plain(case: Case, opt: Any, **options: Any) -> tuple[Any, list[Any]]:
    """An optimizer with float32 state that has loaded the other's, and its parameters, copies of the other's."""
    other, params = copied(case, opt, **options)
    other.load_state_dict(opt.state_dict())
    return other, params


def decoded(case: Case, opt: Any) -> list[dict[str, Tensor]]:
    """Each parameter's moments in float32."""
    other, params = plain(case, opt)
    return [{n: t.float() for n, t in other.state.get(p, {}).items() if n in [*SIGNED, *SQUARES]} for p in params]


def in_memory(t: Tensor) -> Tensor:
    """The elements in the order in which they lie."""
    order = sorted(range(t.dim()), key=lambda d: (-t.stride(d), d))
    return t.permute(order).reshape(-1)


def of_slice(t: Tensor) -> int | None:
    """How many elements share a scale, where the slices of ``t`` lie one after another and are made of such blocks."""
    if t.dim() < 2 or t.stride(0) != max(t.stride()) or 0 in t.shape:
        return None
    length = t[0].numel()
    return max((block for block in range(64, 257, 16) if length % block == 0), default=None)


def scales_shape(p: Tensor) -> tuple[int, ...]:
    if block := of_slice(p):
        return len(p), p[0].numel() // block
    return (-(-p.numel() // TILE),)


def blocks(t: Tensor) -> list[Tensor]:
    return list(in_memory(t.detach()).split(of_slice(t) or TILE))


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


# Bodies of tests that several files have


def assert_round_trip(make: Callable[[list[Any]], Any], params: list[Any], what: object = "") -> Any:
    """Saved, loaded into a new optimizer, and on: as if nothing had happened, random bits included. The new one."""
    resumed = copies_of(params)
    opt, other = seeded(lambda: make(params)), seeded(lambda: make(resumed), 8)
    for step in range(3):
        take(opt, params, step)
    for p, q in zip(params, resumed, strict=True):
        q.data.copy_(p.detach())
    other.load_state_dict(saved(opt.state_dict()))
    assert_same(opt, other, what)
    for step in range(3, 6):
        take(opt, params, step)
        take(other, resumed, step)
    assert_same(opt, other, what)
    opt.load_state_dict(opt.state_dict())  # its own state, in place
    assert_same(opt, other, what)
    for o, ps in ((opt, params), (other, resumed)):
        take(o, ps, 6)
    assert_same(opt, other, what)
    return other


def assert_copies_train_on_alone(opt: Any, how: str, what: object = "") -> None:
    for step in range(2):
        take(opt, places(opt), step)
    twin = COPIES[how](opt)
    assert type(twin) is type(opt), (what, how)
    before = snapshot(twin)
    for step in (2, 3):
        take(opt, places(opt), step)
    assert_unchanged(twin, before, (what, how))
    for step in (2, 3):
        take(twin, places(twin), step)
    assert_same(opt, twin, (what, how))


# What a user may do between two steps without changing a number


def other_storage(opt: Any, params: list[Any]) -> None:
    for state in opt.state.values():
        for name, t in state.items():
            if name not in NUMBERS:
                old, t.data = t.data, t.data.clone()
                old.fill_(77)  # what a stale pointer would find


def rename_keys(opt: Any, params: list[Any]) -> None:
    for p in params:
        opt.state[p] = {("_" + name)[1:]: t.clone() for name, t in reversed(list(opt.state[p].items()))}


def load_own(opt: Any, params: list[Any]) -> None:
    opt.load_state_dict(opt.state_dict())
