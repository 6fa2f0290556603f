"""That a step sees whatever was done since the last one: rows that are compared with what they were when they were read
(``csrc/torch/witness.h``) are stepped, and refused, as by a stepper that has read nothing before."""

from __future__ import annotations

import copy
import os
import random
import re

import hypothesis.strategies as st
import pytest
import torch
from cases import DEVICE, EMULATED, NATIVE, STATEFUL, is_refused, randn
from hypothesis import example, given, settings

import genopt_ext
from genopt_ext import _backend
from genopt_ext.overlap import can_meet, is_backed

pytestmark = pytest.mark.skipif(NATIVE != "cpu" or DEVICE != "cpu" or EMULATED, reason="frees memory on the CPU")

ADAGRAD = next(case for case in STATEFUL if "initial_accumulator_value" in case.kwargs)
EXAMPLES = os.environ.get("GENOPT_WITNESS_EXAMPLES")  # random sequences, for a longer search

SHAPES = [(3,), (2, 8), (2, 8), (), (4, 4), (300,), (2, 3, 4, 4)]

# How rows are kept: dtype and options.
KEPT = {
    "fp32": (torch.float32, {}),
    "ema": (torch.float32, dict(ema_decay=0.9)),
    "int8": (torch.float32, dict(state_dtype=torch.int8, min_int8_size=0)),
    "kahan": (torch.bfloat16, dict(param_rounding="kahan")),
    "master": (torch.bfloat16, dict(master_weights=True)),
}

# Actions that read all of a tensor.
READING = {
    "replace_entry",
    "replace_state",
    "change_in_place",
    "change_data",
    "change_gradient",
    "load",
    "clip",
    "accumulate",
    "zero_grad",
    "change_gradient_dtype",
    "lazy_clone",
}

RESIZING = {"resize_storage", "resize_and_back"}


class World:
    """An optimizer, and what is done to it, by one seed; ``forgets``: before each step, what was read; ``more``:
    small parameters beside the others."""

    def __init__(self, case, kept, forgets, more=0):
        dtype, options = KEPT[kept]
        shapes = SHAPES + [(2,)] * more
        params = [torch.nn.Parameter(randn(shape, i, dtype)) for i, shape in enumerate(shapes)]
        self.opt = case.ours([{"params": params[:4]}, {"params": params[4:], "lr": 1e-2}], **options)
        self.spare = [torch.nn.Parameter(randn(shape, 9 + i, dtype)) for i, shape in enumerate(SHAPES)]
        self.forgets, self.outcome, self.steps = forgets, [], 0
        self.kept = None
        self.backward()

    @property
    def params(self):
        return [p for group in self.opt.param_groups for p in group["params"] if isinstance(p, torch.Tensor)]

    def backward(self, some=lambda i: True):
        self.steps += 1
        for i, p in enumerate(self.params):
            if some(i) and p.is_floating_point() and not p.is_sparse:
                p.grad = randn(p.shape, 100 * self.steps + i).to(p.dtype)

    def act(self, name, seed):
        draw = random.Random(seed)
        freed = [t for p in [*self.params, *self.spare] for t in (p, p.grad, *self.tensors(p)) if t is not None]
        if name in READING and not all(map(is_backed, freed)):
            return  # torch itself would read what is not there
        if name in RESIZING and self.kept is not None:
            return  # of memory that is shared until it is written, torch leaves what it likes
        try:
            self.outcome.append(ACTIONS[name](self, draw))
        except (RuntimeError, TypeError, ValueError, KeyError, NotImplementedError, IndexError, AttributeError) as e:
            text = str(e)
            if isinstance(e, KeyError):
                text = ""  # torch's names an address
            if re.search(r"shares? memory|overlaps=\[\(", text):
                text = "share memory"  # which of two is named first goes by addresses
            self.outcome.append(f"{type(e).__name__}: {text}")

    def step(self, take=lambda opt: opt.step()):
        stepper = self.opt.stepper
        if self.forgets and stepper.plan is not None:
            stepper.plan = _backend.native.Stepper(stepper.rule.name, stepper.resolved)
        take(self.opt)

    def entry(self, draw):
        """A parameter's state, and the name of one of its tensors."""
        state = self.opt.state[draw.choice(self.params)]
        return state, draw.choice([name for name, t in state.items() if isinstance(t, torch.Tensor)])

    def tensor(self, draw):
        """Any of the tensors that a step reads."""
        p = draw.choice(self.params)
        return draw.choice([p, *([p.grad] if p.grad is not None else []), *self.tensors(p)])

    def tensors(self, p):
        state = self.opt.state.get(p)
        return [t for t in state.values() if isinstance(t, torch.Tensor)] if isinstance(state, dict) else []


def replace_entry(world, draw):
    state, name = world.entry(draw)
    state[name] = draw.choice(
        [
            lambda t: t.clone(),
            lambda t: t.double(),
            lambda t: t.to(torch.int32),
            lambda t: t[..., :1],
            lambda t: t.clone().T,
            lambda t: t.expand(2, *t.shape),
            lambda t: torch.nn.Buffer(t.clone()),
            lambda t: None,
            lambda t: 1.0,
        ]
    )(state[name])


def drop_entry(world, draw):
    state, name = world.entry(draw)
    del state[name]


def exchange_entries(world, draw):
    (a, x), (b, y) = world.entry(draw), world.entry(draw)
    a[x], b[y] = b[y], a[x]


def share_entry(world, draw):
    (a, x), (b, y) = world.entry(draw), world.entry(draw)
    a[x] = b[y].view(b[y].shape)


def replace_state(world, draw):
    p = draw.choice(world.params)
    state = world.opt.state[p]
    world.opt.state[p] = draw.choice([dict, type("Sub", (dict,), {}), lambda s: {}, copy.deepcopy, lambda s: [1]])(
        state
    )


def drop_state(world, draw):
    del world.opt.state[draw.choice(world.params)]


def exchange_states(world, draw):
    p, q = draw.choice(world.params), draw.choice(world.params)
    world.opt.state[p], world.opt.state[q] = world.opt.state[q], world.opt.state[p]


def change_in_place(world, draw):
    t = world.tensor(draw).detach()
    draw.choice(
        [
            lambda: t.mul_(0.5),
            lambda: t.fill_(float("nan")),
            lambda: t.transpose_(-1, -2),
            lambda: t.unsqueeze_(0),
            lambda: t.squeeze_(),
            lambda: t.resize_(t.numel()),
            lambda: t.set_(t.clone()),
        ]
    )()


def change_data(world, draw):
    t = world.tensor(draw)
    t.data = draw.choice(
        [
            lambda: t.data.clone(),
            lambda: t.data.double(),
            lambda: t.data.T,
            lambda: t.data.clone().T.contiguous().T,
            lambda: t.data.reshape(-1),
            lambda: t.data[:1],
            lambda: t.data.new_empty(0),
            lambda: t.data.view({4: torch.int32, 2: torch.int16, 1: torch.bool}[t.element_size()]),
        ]
    )()


def resize_storage(world, draw):
    storage = world.tensor(draw).untyped_storage()
    storage.resize_(int(storage.nbytes() * draw.choice([0, 0.5, 1, 2])))
    storage.fill_(0)


def resize_and_back(world, draw):
    """Mostly to the same address."""
    storage = world.tensor(draw).untyped_storage()
    bytes = storage.nbytes()
    storage.resize_(0)
    storage.resize_(bytes)
    storage.fill_(0)


def swap_tensors(world, draw):
    p, q = draw.choice(world.params), draw.choice(world.spare)
    torch.utils.swap_tensors(p, q)


def replace_parameter(world, draw):
    group = draw.choice(world.opt.param_groups)
    at = draw.randrange(len(group["params"]))
    group["params"][at] = draw.choice([draw.choice(world.spare), torch.nn.Parameter(randn((2, 8), 5)), "p"])


def reorder_parameters(world, draw):
    draw.shuffle(draw.choice(world.opt.param_groups)["params"])


def replace_list(world, draw):
    group = draw.choice(world.opt.param_groups)
    group["params"] = list(group["params"])[: draw.choice([1, 2, 9])]


def reorder_groups(world, draw):
    world.opt.param_groups.reverse()


def add_group(world, draw):
    world.opt.add_param_group({"params": [torch.nn.Parameter(randn((2, 8), 6))]})


def reorder_state(world, draw):
    items = list(world.opt.state.items())
    draw.shuffle(items)
    world.opt.state.clear()
    world.opt.state.update(items)


def change_gradient(world, draw):
    p = draw.choice(world.params)
    g = p.grad if p.grad is not None else torch.ones_like(p)
    p.grad = draw.choice(
        [
            lambda: None,
            lambda: g.clone(),
            lambda: torch.ones(()).to(g).expand_as(g),
            lambda: g.T.contiguous().T,
            lambda: torch.stack([g, g], -1)[..., 0],
            lambda: g.to_sparse(),
            lambda: p.detach(),
            lambda: draw.choice(world.tensors(p)),
            lambda: draw.choice(world.params).grad,
            lambda: torch._efficientzerotensor(g.shape, dtype=g.dtype),
            lambda: torch.zeros_like(g, dtype=torch.complex64),
        ]
    )()


def change_gradient_dtype(world, draw):
    p = draw.choice(world.params)
    p.grad_dtype = None
    p.grad = p.grad.to(draw.choice([torch.float32, torch.bfloat16, torch.float64]))


def lazy_clone(world, draw):
    world.kept = torch._lazy_clone(world.tensor(draw).detach())


def change_option(world, draw):
    group = draw.choice(world.opt.param_groups)
    name, value = draw.choice(
        [
            ("lr", 0.5),
            ("lr", torch.tensor(0.25)),
            ("ema_decay", 0.5),
            ("ema_decay", None),
            ("state_dtype", torch.bfloat16),
            ("state_dtype", None),
            ("param_rounding", "nearest"),
            ("master_weights", True),
            ("master_weights", False),
            ("max_grad_norm", 0.5),
            ("capturable", True),
            ("capturable", False),
            ("momentum", 0.0),
            ("amsgrad", True),
            ("amsgrad", False),
        ]
    )
    if name in group:
        group[name] = value


def load(world, draw):
    world.opt.load_state_dict(world.opt.state_dict())


def require_no_grad(world, draw):
    draw.choice(world.params).requires_grad_(draw.random() < 0.5)


def in_inference_mode(world, draw):
    with torch.inference_mode():
        world.step()


ACTIONS = {
    f.__name__: f
    for f in (
        replace_entry, drop_entry, exchange_entries, share_entry, replace_state, drop_state, exchange_states,
        change_in_place, change_data, resize_storage, resize_and_back, swap_tensors, replace_parameter,
        reorder_parameters, replace_list, reorder_groups, add_group, reorder_state, change_gradient,
        change_gradient_dtype, lazy_clone, change_option, load, require_no_grad, in_inference_mode,
    )
} | {
    "backward": lambda world, draw: world.backward(lambda i: draw.random() < 0.8),
    "zero_grad": lambda world, draw: world.opt.zero_grad(set_to_none=draw.random() < 0.5),
    "step": lambda world, draw: world.step(),
    "step_and_zero_": lambda world, draw: world.step(lambda opt: opt.step_and_zero_()),
    "accumulate": lambda world, draw: world.opt.accumulate(),
    "clip": lambda world, draw: str(genopt_ext.clip_grad_norm_(world.params, 0.5)),
}  # fmt: skip


def bytes_of(t):
    return t.detach().resolve_conj().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def assert_same_world(a, b):
    for p, q in zip([*a.params, *a.spare], [*b.params, *b.spare], strict=True):
        of_both = (p, p.grad, *a.tensors(p)), (q, q.grad, *b.tensors(q))
        for x, y in zip(*of_both, strict=True):
            assert (x is None) == (y is None)
            if x is not None and can_meet(x):
                assert (x.dtype, x.shape, x._version) == (y.dtype, y.shape, y._version)
                assert torch.equal(bytes_of(x), bytes_of(y))
    assert a.kept is None or torch.equal(bytes_of(a.kept), bytes_of(b.kept))


def assert_alike(case, kept, actions, more=0):
    if is_refused({"case": case, "options": KEPT[kept][1]}):
        return
    told, forgetful = (World(case, kept, forgets, more) for forgets in (False, True))
    for name, seed in [("step", 0), ("step", 0), *(each for action in actions for each in (action, ("step", 0)))]:
        told.act(name, seed)
        forgetful.act(name, seed)
        assert told.outcome == forgetful.outcome
    assert_same_world(told, forgetful)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(ACTIONS))
def test_each_action_alone(name):
    kept = sorted(KEPT)
    for seed in range(40):
        assert_alike(STATEFUL[seed % len(STATEFUL)], kept[seed % len(kept)], [(name, seed), ("backward", seed)])


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None, max_examples=int(EXAMPLES or 300), derandomize=not EXAMPLES)
@given(
    st.sampled_from(STATEFUL),
    st.sampled_from(sorted(KEPT)),
    st.lists(st.tuples(st.sampled_from(sorted(ACTIONS)), st.integers(0, 2**16)), min_size=1, max_size=6),
)
# A tensor that came to where another row's had been while that row was refused, and then both.
@example(ADAGRAD, "ema", [("exchange_entries", 137), ("share_entry", 137)])
def test_whatever_was_done_between_two_steps(case, kept, actions):
    assert_alike(case, kept, actions)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kept", sorted(KEPT))
def test_rows_that_several_threads_compare(kept, two_threads):
    draw = random.Random(kept)
    actions = [(name, draw.random()) for name in draw.sample(sorted(ACTIONS), 12)]
    assert_alike(draw.choice(STATEFUL), kept, actions, more=2500)


def test_several_threads_bump_all_versions(two_threads):
    world = World(ADAGRAD, "fp32", forgets=False, more=2500)
    for _ in range(3):
        before = [t._version for p in world.params for t in (p, *world.tensors(p))]
        world.step()
        after = [t._version for p in world.params for t in (p, *world.tensors(p))]
        assert all(a > b for a, b in zip(after, before, strict=True))
