"""The table that tests iterate over: every optimizer with every option that changes its arithmetic.

A new optimizer adds its entries here; test_api.py checks that none is missing.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, cycle, product
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor

from genopt_ext import _backend, optim

# conftest.py says what these are for.
DEVICE = os.environ.get("GENOPT_TEST_DEVICE", "cpu")
EMULATED = bool(os.environ.get("GENOPT_TEST_CUDA_ON_CPU"))  # under sanitizers, and all memory passes for a GPU's
NATIVE = "cuda" if DEVICE == "cuda" or EMULATED else "cpu"  # the backend under test

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NARROW = (torch.float32, torch.bfloat16, torch.float16)
SIXTEEN = (torch.bfloat16, torch.float16)
SIZES = (0, 1, 7, 255, 256, 257, 4096 + 3)
SHAPES = [(300,), (7, 5), (), (0,), (2, 3, 40)]
NAN, INF = float("nan"), float("inf")
NON_FINITE = [NAN, INF, -INF, 3e38, -3e38, 1e20, 1e-40, -1e-45, 0.0, -0.0]
COPIES = dict(deepcopy=copy.deepcopy, pickle=lambda x: pickle.loads(pickle.dumps(x)))
KERNELS = pytest.mark.skipif(_backend.native is None, reason="compares the kernels with the reference")
# For tests that hold for kernels and reference alike. The reference is the same whatever the kernels.
BACKENDS = ("auto",) if EMULATED else ("auto", "reference")


def pairs(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of a table such that any two entries of two axes meet in one of them.

    For axes of which no three depend on one another: a rule, how a state is stored and who steps are such.
    """
    meetings = {row: set(combinations(enumerate(row), 2)) for row in product(*(range(len(axis)) for axis in axes))}
    to_meet = set[Any]().union(*meetings.values())
    rows = []
    while to_meet:
        row = max(meetings, key=lambda row: len(meetings[row] & to_meet))
        to_meet -= meetings[row]
        rows.append(tuple(axis[i] for axis, i in zip(axes, row, strict=True)))
    return rows


def in_turn(cases: Sequence[Any], *axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """All rows of the axes, each with the next of the cases."""
    return [(cases[i % len(cases)], *row) for i, row in enumerate(product(*axes))]


def in_training(opt: Any) -> Any:
    """``opt``, ready to step: classes without a schedule begin in evaluation."""
    if hasattr(opt, "train"):
        opt.train()
    return opt


def made(name: str, params: Any, **options: Any) -> Any:
    """An optimizer that is ready to step."""
    return in_training(getattr(optim, name)(params, **options))


@dataclass(frozen=True)
class Case:
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    stateful: bool = field(default=False, compare=False)  # see STATEFUL

    @property
    def still(self) -> int:
        """How many steps at the beginning move no weights."""
        silent = self.name == "RAdamScheduleFree" and self.kwargs.get("silent_sgd_phase", True)
        return 1 if self.name == "ADOPT" else 4 if silent else 0

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.kwargs.items())])

    def ours(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        return made(self.name, params, **self.kwargs, **more)

    def torch(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        """torch's for-loop, or its like for a class that torch has not."""
        name = "CautiousAdamW" if self.name == "AdamW" and "cautious" in self.kwargs else self.name
        return getattr(oracles, name)(params, **self.kwargs, foreach=False, **more)


CASES = [
    Case("Adam", stateful=True),
    Case("Adam", dict(lr=0.01, weight_decay=0.1, maximize=True)),
    Case("Adam", dict(amsgrad=True, weight_decay=0.1, betas=(0.8, 0.95)), stateful=True),
    Case("Adam", dict(betas=(0.0, 0.3), eps=1e-3)),
    Case("Adam", dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)),
    Case("AdamW"),
    Case("AdamW", dict(lr=0.01, weight_decay=0.1, cautious="update")),
    Case("AdamW", dict(lr=0.01, weight_decay=0.1, amsgrad=True, maximize=True), stateful=True),
    Case("SGD", dict(lr=0.1)),
    Case("SGD", dict(lr=0.1, momentum=0.9)),
    Case("SGD", dict(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1), stateful=True),
    Case("SGD", dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, maximize=True)),
    Case("RMSprop"),
    Case("RMSprop", dict(weight_decay=0.1, momentum=0.9)),
    Case("RMSprop", dict(centered=True, alpha=0.9)),
    Case("RMSprop", dict(centered=True, momentum=0.5, weight_decay=0.1, maximize=True), stateful=True),
    Case("Adagrad"),
    Case(
        "Adagrad",
        dict(lr=0.1, lr_decay=0.5, weight_decay=0.1, initial_accumulator_value=0.1, maximize=True),
        stateful=True,
    ),
    Case("Adamax", stateful=True),
    Case("Adamax", dict(lr=0.01, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1, maximize=True)),
    Case("Adadelta"),
    Case("Adadelta", dict(lr=0.5, rho=0.8, eps=1e-4, weight_decay=0.1, maximize=True), stateful=True),
    Case("RAdam", dict(lr=0.01, betas=(0.9, 0.5), weight_decay=0.1), stateful=True),
    Case("RAdam", dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True, maximize=True)),
    Case("Rprop"),
    Case("Rprop", dict(lr=0.1, etas=(0.3, 1.5), step_sizes=(1e-3, 0.2), maximize=True), stateful=True),
    Case("AdEMAMix"),
    Case("AdEMAMix", dict(betas=(0.0, 0.9, 0.99), alpha=3.0, alpha_warmup=2, weight_decay=0.1), stateful=True),
    Case("AdEMAMix", dict(lr=0.01, beta3_warmup=50, alpha_warmup=5, eps=1e-4, maximize=True), stateful=True),
    Case("NAdam", stateful=True),
    Case("NAdam", dict(lr=0.01, betas=(0.5, 0.9), weight_decay=0.1, momentum_decay=0.1, maximize=True)),
    Case("NAdam", dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)),
    Case("ASGD"),
    Case("ASGD", dict(lr=0.1, lambd=0.1, alpha=0.5, t0=2, weight_decay=0.1, maximize=True), stateful=True),
    Case("ADOPT", dict(lr=0.01, weight_decay=0.1), stateful=True),
    Case("ADOPT", dict(lr=0.01, betas=(0.5, 0.9), weight_decay=0.1, decouple=True, clip_exponent=None, maximize=True)),
    Case("Adan"),
    Case("Adan", dict(lr=0.01, betas=(0.9, 0.8, 0.95), weight_decay=0.1, maximize=True), stateful=True),
    Case("Adan", dict(lr=0.01, weight_decay=0.1, no_prox=True)),
    Case("LARS", dict(lr=1.0, momentum=0.9, weight_decay=0.1), stateful=True),
    Case("LARS", dict(lr=0.3, trust_coeff=0.1, always_adapt=True, maximize=True)),
    Case("LARS", dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, trust_coeff=0.1, trust_clip=True)),
    Case("LAMB", stateful=True),
    Case("LAMB", dict(lr=0.01, bias_correction=False, grad_averaging=False, betas=(0.5, 0.9), maximize=True)),
    Case("LAMB", dict(lr=0.01, weight_decay=0.1, decoupled_decay=True, trust_clip=True)),
    Case("LAMB", dict(lr=0.01, weight_decay=0.0)),
    Case("StableAdamW", dict(lr=0.01), stateful=True),
    Case("StableAdamW", dict(lr=0.01, betas=(0.5, 0.99), eps=1e-3, weight_decay=0.1, maximize=True)),
    Case("AdamWScheduleFree", stateful=True),
    Case(
        "AdamWScheduleFree",
        dict(lr=0.01, betas=(0.8, 0.9), weight_decay=0.1, warmup_steps=3, r=0.5, weight_lr_power=1.5, maximize=True),
    ),
    Case("SGDScheduleFree", dict(lr=0.1)),
    Case(
        "SGDScheduleFree",
        dict(lr=0.1, momentum=0.8, weight_decay=0.1, warmup_steps=3, r=0.5, weight_lr_power=1.5, maximize=True),
        stateful=True,
    ),
    Case("RAdamScheduleFree", dict(lr=0.5, r=0.5, weight_lr_power=1.5)),
    Case(
        "RAdamScheduleFree",
        dict(lr=0.01, betas=(0.8, 0.9), weight_decay=0.1, silent_sgd_phase=False, maximize=True),
        stateful=True,
    ),
    Case("Prodigy", dict(d0=0.01), stateful=True),
    Case(
        "Prodigy",
        dict(lr=0.5, betas=(0.0, 0.95), beta3=0.9, weight_decay=0.1, use_bias_correction=True, d0=0.1, maximize=True),
        stateful=True,
    ),
    Case("Prodigy", dict(d0=0.01, weight_decay=0.1, decouple=False, d_coef=2.0, growth_rate=1.5, eps=1e-4)),
    Case("Prodigy", dict(d0=0.01, weight_decay=0.1, safeguard_warmup=True, betas=(0.5, 0.9), use_bias_correction=True)),
    Case("Adafactor", stateful=True),
    Case(
        "Adafactor",
        dict(lr=0.5, beta2_decay=-0.5, eps=(1e-3, 0.1), d=2.0, weight_decay=0.1, maximize=True),
    ),
    Case("Lion"),
    Case("Lion", dict(lr=0.013, weight_decay=0.1, cautious="weight_decay")),
    Case("Lion", dict(lr=0.013, weight_decay=0.1, cautious="update", maximize=True)),
    Case("Lion", dict(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, maximize=True), stateful=True),
]
FIRST = {case.name: case for case in CASES}
# Classes that step a parameter without the others.
ALONE = [name for name in FIRST if getattr(optim, name).together is None]
NUMBERS = frozenset(
    {"step", *(name for each in optim.OURS for name in getattr(optim, each).rule.running)}
)  # of a state


@dataclass(frozen=True)
class Storage:
    """How weights and state are stored: an optimizer's options, and the dtypes of parameters that they are for."""

    name: str
    options: dict[str, Any]
    dtypes: tuple[torch.dtype, ...]

    def __str__(self) -> str:
        return self.name


INT8 = dict(state_dtype=torch.int8, min_int8_size=1)
STORAGE = [
    Storage("plain", {}, (*DTYPES, torch.complex64)),
    Storage("int8", INT8, NARROW),
    Storage("float32 state", dict(state_dtype=torch.float32), SIXTEEN),
    Storage("bfloat16 state", dict(state_dtype=torch.bfloat16), NARROW),
    Storage("stochastic", dict(param_rounding="stochastic"), SIXTEEN),
    Storage("kahan", dict(param_rounding="kahan"), SIXTEEN),
    Storage("masters", dict(master_weights=True), SIXTEEN),
    Storage("stochastic, int8", dict(param_rounding="stochastic", **INT8), SIXTEEN),
    Storage("kahan, bfloat16 state", dict(param_rounding="kahan", state_dtype=torch.bfloat16), SIXTEEN),
    Storage("masters, int8", dict(master_weights=True, **INT8), SIXTEEN),
]
STORED = {storage.name: storage for storage in STORAGE}
# Each way with each of its dtypes.
WAYS = [(storage, dtype) for storage in STORAGE for dtype in storage.dtypes]


def stored(*axes: Sequence[Any], storages: Sequence[Storage] = tuple(STORAGE)) -> list[tuple[Any, ...]]:
    """``pairs`` of the axes and of the storages, each of these with the next of its dtypes."""
    dtypes = {storage.name: cycle(storage.dtypes) for storage in storages}
    return [(*row, next(dtypes[row[-1].name])) for row in pairs(*axes, storages)]


def is_refused(given: dict[str, Any], is_narrow_test: bool = False) -> bool:
    """Whether a test's parameters have a class with what it refuses, as test_adafactor.py finds.

    Args:
        given: the parameters.
        is_narrow_test: the test asks for narrow state whatever they are: marked ``narrow_state``.
    """
    values = [x for value in given.values() for x in (value if isinstance(value, tuple) else [value])]
    names = {x.name if isinstance(x, Case) else x for x in values if isinstance(x, (Case, str))}
    rules = [getattr(optim, name).rule for name in names & set(optim.OURS)]
    narrow = (torch.int8, torch.bfloat16)

    def is_narrow(x: Any) -> bool:
        options = x.options if isinstance(x, Storage) else x
        return isinstance(options, dict) and options.get("state_dtype") in narrow

    asks = is_narrow_test or any(map(is_narrow, values))
    asks = asks or any(given.get(name) in narrow for name in ("state_dtype", "first", "second", "asked", "wanted"))
    is_complex = any(isinstance(x, torch.dtype) and x.is_complex for x in values)
    return any((rule.precise and asks) or (rule.is_real and is_complex) for rule in rules)


# One case per class and set of states, for tests about state rather than arithmetic.
STATEFUL = [case for case in CASES if case.stateful]


def by_states(cases: Sequence[Case]) -> list[list[Case]]:
    """The cases of each rule and set of states together."""
    together: dict[tuple[str, ...], list[Case]] = {}
    for case in cases:
        opt = case.ours([torch.zeros(1)])
        rule = type(opt).rule
        together.setdefault((rule.name, *rule.state_names(opt.param_groups[0])), []).append(case)
    return list(together.values())


def in_threads(*calls: Callable[[], object]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def randn(shape: Any, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    # bf16 and fp16 numbers are drawn in fp32: torch draws others for them.
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=wide, device="cpu").to(DEVICE, dtype)


class Odd(Tensor):
    """A tensor subclass with a dispatch of its own, which the reference serves."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrap(x):
            return x.inner if isinstance(x, Odd) else x

        args_, kwargs_ = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
        out = func(*args_, **kwargs_)
        in_place = func._schema.name.endswith("_")
        return args[0] if in_place else torch.utils._pytree.tree_map_only(torch.Tensor, Odd, out)


def layouts(dtype=torch.float32):
    """Parameters in every kind of layout, each of at least two tiles where it can be."""
    base = randn((40, 30, 20), 1, dtype)
    return {
        "transposed": base.clone().transpose(0, 2),
        "channels_last": randn((4, 6, 5, 7), 2, dtype).to(memory_format=torch.channels_last),
        "every other": base.clone()[:, ::2, 1:],
        "rows": base.clone()[3:30],
        "odd offset": randn((1030,), 3, dtype)[1:],
        "one column": base.clone()[:, 5, 7],
        "flipped sizes": base.clone().permute(2, 0, 1)[1:],
        "size one": randn((1, 300, 1), 4, dtype).transpose(0, 1),
        "scalar of a view": base.clone()[1, 2, 3],
    }


def strided(values, pads, steps, order):
    """``values`` in memory with gaps, in dimension order ``order``."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    sizes = [values.shape[d] * steps[d] + pads[d] for d in order]
    room = torch.full(sizes, 7.0, dtype=values.dtype)
    view = room[tuple(slice(pads[d], pads[d] + values.shape[d] * steps[d], steps[d]) for d in order)]
    return view.permute(inverse).copy_(values) if order else values.clone()


def parameters(shapes: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(randn(shape, seed + i, dtype)) for i, shape in enumerate(shapes)]


def copies_of(params: Any) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def grouped(params: list[Any], per_group: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One group for each entry, each with every so many parameters."""
    return [{"params": params[i :: len(per_group)], **own} for i, own in enumerate(per_group)]


def set_grads(params: list[Any], step: int, skip: Callable[[int], bool] = lambda i: False) -> None:
    """The same gradients for the same step and shapes; None where ``skip`` says so."""
    for i, p in enumerate(params):
        p.grad = None if skip(i) else randn(p.shape, 1000 * (step + 1) + i, p.dtype)


def come_and_go(step: int) -> Callable[[int], bool]:
    return lambda i: (i + step) % 4 == 3


def train(opt: torch.optim.Optimizer, params: list[Any], steps: int = 3, first: int = 0) -> list[Any]:
    for step in range(first, first + steps):
        set_grads(params, step)
        opt.step()
    return params


def trained(make: Callable[[list[Any]], Any], params: list[Any], steps: int = 3) -> Any:
    """The optimizer ``make(params)`` after some steps."""
    opt = make(params)
    train(opt, params, steps)
    return opt


def assert_same_bits(a: Any, b: Any, what: object = "") -> None:
    """Equal values, NaN at the same places; the case is in the message."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


def assert_same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer, what: object = "") -> None:
    """The two optimizers' parameters and states agree bit for bit."""
    sa, sb = a.state_dict()["state"], b.state_dict()["state"]
    assert sa.keys() == sb.keys(), what
    for group_a, group_b in zip(a.param_groups, b.param_groups, strict=True):
        for p, q in zip(group_a["params"], group_b["params"], strict=True):
            assert_same_bits(p.detach(), q.detach(), what)
    for key in sa:
        assert sa[key].keys() == sb[key].keys(), what
        for name in sa[key]:
            assert_same_bits(sa[key][name], sb[key][name], f"{what} state {key} {name}")


def places(opt: torch.optim.Optimizer) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]


def saved(x: Any, weights_only: bool = True) -> Any:
    """Through a file."""
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def snapshot(opt: Any) -> tuple[list[Tensor], list[dict[str, Any]]]:
    def copied(t: Any) -> Any:
        return t.clone() if isinstance(t, Tensor) else t

    keep = [{n: copied(t) for n, t in opt.state.get(p, {}).items()} for p in places(opt)]
    return [p.detach().clone() for p in places(opt)], keep


def assert_unchanged(
    opt: Any, before: tuple[list[Tensor], list[dict[str, Any]]], what: object = "", may_begin: bool = False
) -> None:
    """``may_begin``: state may have been made that was not there, of no step yet."""
    for p, old, state in zip(places(opt), *before, strict=True):
        assert_same_bits(p.detach(), old, what)
        now = opt.state.get(p, {})
        if may_begin:
            assert now.get("step", 0) == state.get("step", 0), what
        else:
            assert now.keys() == state.keys(), (what, list(now), list(state))
        for name, t in state.items():
            if isinstance(t, Tensor) and t.device.type != "meta":
                assert now[name].dtype == t.dtype, (what, name)
                assert_same_bits(now[name], t, (what, name))


def version_of(grad: Tensor | None) -> int | None:
    return None if grad is None or grad.is_inference() else grad._version


def gradients_of(params: Any) -> list[Any]:
    """Each, what it holds, and its version; None where there is none."""
    return [None if p.grad is None else (p.grad, p.grad.clone(), version_of(p.grad)) for p in params]


def assert_gradients_kept(params: Any, before: list[Any], what: object = "", version: bool = True) -> None:
    for p, old in zip(params, before, strict=True):
        if old is None:
            assert p.grad is None, what
            continue
        assert p.grad is old[0] and (not version or version_of(p.grad) == old[2]), what
        assert_same_bits(p.grad, old[1], what)


def refused(opt: Any, match: str, error: Any = RuntimeError, call: str | Callable[[], object] = "step") -> None:
    """The call is refused, and changes no parameter, gradient or state."""
    before = snapshot(opt)
    gradients = [(p.grad, version_of(p.grad)) for p in places(opt)]
    with pytest.raises(error, match=match):
        getattr(opt, call)() if isinstance(call, str) else call()
    assert_unchanged(opt, before, match)
    for p, (grad, version) in zip(places(opt), gradients, strict=True):
        assert p.grad is grad and version_of(grad) == version, match


def assert_option_refused(name: str, given: dict[str, Any], match: str, backend: str, **more: Any) -> None:
    """By constructors, in groups and, set by hand, before each of two steps; nothing is changed then."""
    make = getattr(optim, name)
    errors = (TypeError, ValueError)
    with pytest.raises(errors, match=match):
        make(parameters([(2,)]), **{**more, **given})
    with pytest.raises(errors, match=f"group 0.*{match}"):
        make([{"params": parameters([(2,)]), **more, **given}])
    params = parameters([(7,), (300,)], torch.bfloat16)
    opt = in_training(make(params, backend=backend, **more))
    with pytest.raises(errors, match=f"group 1.*{match}"):
        opt.add_param_group({"params": parameters([(2,)]), **given})
    assert len(opt.param_groups) == 1
    group = opt.param_groups[0]
    for step in range(2):
        set_grads(params, step)
        kept = dict(group)
        group.update(given)
        refused(opt, f"group 0.*{match}", errors)
        group.clear()
        group.update(kept)
        opt.step()
