"""That kernels and reference find the same problems in a row: ``csrc/torch/rows.h`` and its twin in Python."""

from __future__ import annotations

import copy
import random
from itertools import product

import pytest
import torch
from cases import DEVICE, EMULATED, STATEFUL, is_refused, parameters, set_grads, train

from genopt_ext import _backend
from genopt_ext.optim import problems
from genopt_ext.optim.step import Inputs, Step, places_of

pytestmark = pytest.mark.skipif(DEVICE != "cpu" or EMULATED, reason="makes tensors on the CPU")

KEPT = {
    "fp32": (torch.float32, {}),
    "int8": (torch.float32, dict(state_dtype=torch.int8, min_int8_size=0, ema_decay=0.9)),
    "bf16": (torch.bfloat16, dict(state_dtype=torch.bfloat16, param_rounding="kahan")),
    "master": (torch.float16, dict(master_weights=True, ema_decay=0.9)),
    "fp64": (torch.float64, dict(state_dtype=torch.int8, ema_decay=0.9)),
    "complex": (torch.complex64, {}),
}


def inference_like(t):
    with torch.inference_mode():
        return torch.ones_like(t)


def freed(t):
    t = t.clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)
    return t


# What may be done to an entry of a state dict, or to a gradient.
FAULTS = {
    "missing": None,
    "None": lambda t: None,
    "not a tensor": lambda t: [1.0],
    "shape": lambda t: t.new_ones(3, 2),
    "longer": lambda t: t.new_ones(t.numel() + 1),
    "int64": lambda t: t.to(torch.int64) if not t.is_complex() else torch.ones(t.shape, dtype=torch.int64),
    "float64": lambda t: t.to(torch.float64) if not t.is_complex() else t.real.double(),
    "bfloat16": lambda t: t.to(torch.bfloat16) if not t.is_complex() else t.real.bfloat16(),
    "int8": lambda t: torch.ones(t.shape, dtype=torch.int8),
    "complex": lambda t: t.to(torch.complex64),
    "inference": inference_like,
    "freed": freed,
    "sparse": lambda t: t.detach().to_sparse(),
    "meta": lambda t: t.to("meta"),
    "zero tensor": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "half": lambda t: t + 0.5 if t.is_floating_point() else t,
    "negative": lambda t: t - 5 if t.is_floating_point() else t,
    "subclass": torch.nn.Buffer,
}


def spoil(draw, opt, p):
    """One fault of a row, said in words."""
    state = opt.state[p] if isinstance(opt.state[p], dict) else {}
    names = ["momentum_buffer", "exp_avg", "exp_avg_codes", "exp_avg_scales", "ema", "master", "compensation", "step"]
    what = draw.choice(["gradient", "no gradient", "whole", *state, *state, draw.choice(names)])
    kind = draw.choice(sorted(FAULTS))
    if what == "whole":
        opt.state[p] = draw.choice([{}, None, [1.0], {"step": state.get("step")}])
    elif what == "no gradient":
        p.grad = None
    elif what == "gradient":
        if p.grad is not None and FAULTS[kind] is not None and hasattr(p, "grad_dtype"):
            p.grad_dtype = None
            try:
                p.grad = FAULTS[kind](p.grad)
            except (RuntimeError, TypeError):
                return "nothing"  # torch itself refuses it
    else:
        t = state.get(what)
        if FAULTS[kind] is None:
            state.pop(what, None)
        else:
            try:
                state[what] = FAULTS[kind](t if isinstance(t, torch.Tensor) and not t.is_sparse else torch.ones(5))
            except (NotImplementedError, RuntimeError, TypeError):
                return "nothing"
    return f"{what}: {kind}"


def is_served(case, kept):
    dtype, storage = KEPT[kept]
    return not is_refused(dict(case=case, dtype=dtype, storage=storage))


@pytest.mark.parametrize(("case", "kept"), [row for row in product(STATEFUL, KEPT) if is_served(*row)], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_kernels_and_reference_find_the_same_problems(case, kept):
    dtype, storage = KEPT[kept]
    draw = random.Random(f"{case} {kept}")
    params = parameters([(5,), (2, 3)], dtype)
    opt = case.ours(params, **storage)
    train(opt, params, 2)
    set_grads(params, 3)
    gradients = [p.grad for p in params]
    rule, seen = opt.rule, set()
    for _ in range(150):
        trial = copy.deepcopy(opt)
        params = trial.param_groups[0]["params"]
        for p, t in zip(params, gradients, strict=True):
            p.grad = t.clone()
        said = [spoil(draw, trial, params[0]) for _ in range(draw.choice([1, 1, 2, 3]))]
        if draw.random() < 0.1:
            trial.param_groups[0]["capturable"] = True
        inputs = Inputs(gradients=draw.choice([None, "zeroed"]))
        groups, state = trial.param_groups, dict(trial.state)
        step = Step(case.name, rule, "auto", "auto", groups, state, inputs, places_of(groups))
        told = {"gradients": inputs.gradients}
        if rule.shared:
            told["shared"] = [torch.ones(len(rule.shared), dtype=torch.float64, device="cpu")]
        refused = _backend.native.Stepper(rule.name, "auto").step(groups, state, (), **told) or {}
        native = refused.get("rows", {}).get(0, [])
        if native and native[0][1] in problems.OF_KERNELS:
            seen.add(native[0][1])
            continue
        place = step.places[0]
        ours = list(problems.find(step.row(place))) if step.takes_part(place) else []
        assert sorted(native) == sorted(ours), (said, native, ours)
        lacking = [[name for name, reason in found if reason == "missing"] for found in (native, ours)]
        assert lacking[0] == lacking[1], said  # the order in which they are made
        seen.update(reason for _, reason in native)
    assert {"shape", "dtype", "incomplete"} & seen and len(seen) >= 4, seen
