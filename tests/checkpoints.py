"""Checkpoints that are broken in ways that a seed decides, and what has to hold when they are loaded.

    python tests/checkpoints.py [COUNT]

breaks many more of them than the tests do.
"""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections import Counter

import torch
from cases import DTYPES, INF, NAN, assert_same_bits, is_refused, made, parameters, set_grads

from genopt_ext import optim

SHAPES = [(5000,), (3, 2)]
HALF = dict(param_rounding="kahan", state_dtype=torch.bfloat16)
KINDS = [
    (name, options)
    for name in optim.OURS
    for options in ({}, dict(state_dtype=torch.int8), dict(ema_decay=0.9), dict(master_weights=True), dict(half=True))
    if not is_refused({"name": name, "options": HALF if "half" in options else options})
]


def make(name, options, backend):
    own = HALF if "half" in options else options
    params = parameters(SHAPES, torch.bfloat16 if "half" in options or "master_weights" in options else torch.float32)
    more = dict(momentum=0.9) if name in ("SGD", "RMSprop") else {}
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    opt = made(name, groups, lr=0.1, backend=backend, **more, **own)
    set_grads(params, 0)
    opt.step()
    set_grads(params, 1)
    return opt, params


def odd_values(like):
    """What may stand in the place of ``like``."""
    ordinary = isinstance(like, torch.Tensor) and like.layout == torch.strided and like.dtype in DTYPES
    t = like.clone() if ordinary and like.is_cpu and not like.is_nested else torch.ones(3)
    yield from (None, "x", b"x", [], {}, (), object(), float, [None], {1: 2})
    yield from (True, 0, -1, 2.5, NAN, INF, 1e30, 10**400, 1j)
    yield from (torch.tensor(NAN), torch.tensor(-1.0), torch.tensor(1e30), torch.tensor([1.0, 2.0]), torch.tensor(2))
    yield from (t.flatten()[:0], t.unsqueeze(0), t.flatten()[:-1], t.expand(2, *t.shape), t.to(torch.int32), t != 0)
    yield from (t.double(), t.half(), t.to(torch.complex64), t.float().to(torch.float8_e4m3fn), t.to("meta"))
    yield from (t.float().to_sparse(), t.float().flatten().to_mkldnn())
    yield torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)
    yield torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    yield torch._efficientzerotensor(t.shape)


def places(value, found):
    """Every (container, key) in a checkpoint."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            places(value[key], found)
    return found


def broken(saved, seed):
    """A copy of ``saved`` with one to three changes."""
    rng = random.Random(seed)
    box = [copy.deepcopy(saved)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        container, key = rng.choice(places(box, []))
        how = rng.choice(("replace", "replace", "replace", "delete", "rename", "add"))
        if how == "replace" or container is box:
            container[key] = rng.choice(list(odd_values(container[key])))
        elif how == "delete":
            del container[key]
        elif how == "rename" and isinstance(container, dict):
            new = rng.choice(("step", "exp_avg", "exp_avg_codes", "sum_scales", "state1", "lr", "x", 0, "0", 7, None))
            container[new] = container.pop(key)
        elif isinstance(container, dict):
            new = rng.choice(("step", "ema", "master", "exp_avg_codes", "extra", 5))
            container[new] = rng.choice(list(odd_values(1)))
        else:
            container.append(rng.choice(list(odd_values(1))))
    return box[0]


def seen(opt):
    """All that a load might change: what each name holds, and tensors' bits."""
    groups = [(group, list(group.items())) for group in opt.param_groups]
    state = [(key, entry, list(entry.items())) for key, entry in opt.state.items()]
    tensors = [t for entry in opt.state.values() for t in entry.values()]
    tensors += [t for group in opt.param_groups for p in group["params"] for t in (p.detach(), p.grad)]
    return groups, state, [t if t is None else t.clone() for t in tensors]


def assert_unchanged(opt, before, what):
    groups, state, bits = seen(opt)
    assert len(groups) == len(before[0]) and len(state) == len(before[1]), what
    for (now, items), (old, old_items) in zip(groups, before[0], strict=True):
        assert now is old and [k for k, _ in items] == [k for k, _ in old_items], what
        assert all(a is b for (_, a), (_, b) in zip(items, old_items, strict=True)), what
    for (key, entry, items), (old_key, old, old_items) in zip(state, before[1], strict=True):
        assert key is old_key and entry is old, what
        assert all(j == k and a is b for (j, a), (k, b) in zip(items, old_items, strict=True)), what
    assert_same_bits(bits, before[2], what)


def check(kind, seed, backend):
    """Loads a broken checkpoint: a ValueError refuses it and changes nothing, or the next step works or is refused.

    Returns what happened.
    """
    name, options = kind
    what = f"{name}, {options}, {backend}, seed {seed}"
    opt, _ = make(name, options, backend)
    saved = broken(opt.state_dict(), seed)
    before = seen(opt)
    try:
        opt.load_state_dict(saved)
    except ValueError as error:
        assert str(error).startswith(f"{name}.load_state_dict: "), f"{what}: {error}"
        assert_unchanged(opt, before, what)
        return "refused"
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    try:
        opt.step()
    except (RuntimeError, ValueError, TypeError) as error:
        assert name in str(error) and "report" not in str(error), f"{what}: {error}"
        return "refused at the step"
    return "loaded"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 10000):
        counts[check(KINDS[seed % len(KINDS)], seed, ("auto", "reference")[seed // len(KINDS) % 2])] += 1
    print(dict(counts))
