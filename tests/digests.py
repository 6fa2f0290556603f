"""What kernels give, as one number a case: the same from each instruction set, and from the reference.

A process chooses its instruction set once, so these run in processes of their own: test_bits.py.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from cases import (
    CASES,
    INF,
    INT8,
    NON_FINITE,
    SIXTEEN,
    SIZES,
    Case,
    by_states,
    come_and_go,
    in_turn,
    is_refused,
    layouts,
    parameters,
    randn,
)
from low_precision import KEPT, WIDER, gradient
from torch import Tensor

import genopt_ext
from genopt_ext import _backend, binned, quant, reference

Digests = Iterator[tuple[str, Callable[[], list[Tensor]]]]

# How states and parameters are stored, and what a step does around its rule.
STORED: list[tuple[dict[str, Any], torch.dtype]] = [
    *(({}, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *((state, torch.float32) for state in (INT8, WIDER[1])),
    (INT8, torch.bfloat16),
    *(({**kept, **state}, dtype) for kept, dtype, state in product(KEPT, SIXTEEN, (INT8, *WIDER))),
]
PLAIN = 6  # of these, which every case takes; and every other one of the rest
# Every rule with each of its sets of states, by the case with the most options.
RULES = [max(cases, key=lambda case: len(case.kwargs)) for cases in by_states(CASES)]
AROUND = [dict(max_grad_norm=1.0, ema_decay=0.7), {}, dict(clip_per_param=0.5), dict(agc=0.1, clip_grad_value=0.3)]


def digest(tensors: list[Tensor]) -> str:
    """Of the bits; there is one NaN and one zero, whichever it is."""
    total = hashlib.sha256()
    for t in tensors:
        t = torch.where(t.isnan(), torch.nan, t + 0.0) if t.is_floating_point() else t
        total.update(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


@functools.cache
def grads(dtype: torch.dtype, step: int) -> list[Tensor]:
    return [gradient(p, step, i) for i, p in enumerate(start(dtype))]


def start(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    return [*parameters([(700,), (5,)], dtype), torch.nn.Parameter(layouts(dtype)["channels_last"])]


def stepped(case: Case, stored: dict[str, Any], dtype: torch.dtype, around: dict[str, Any]) -> list[Tensor]:
    """Finite numbers, and then others, where no norm spreads them."""
    params = start(dtype)
    params.append(torch.nn.Parameter(torch.tensor(NON_FINITE).repeat(30).to(dtype)))
    torch.manual_seed(7)
    opt = case.ours(params, **stored, **around)
    for step in range(3):
        for i, (p, grad) in enumerate(zip(params, grads(dtype, step), strict=False)):
            p.grad = None if come_and_go(step)(i) else grad.clone()
        if opt.max_grad_norm is None:
            params[3].grad = torch.tensor(NON_FINITE).repeat_interleave(30).roll(step).to(dtype)
        opt.step_and_zero_() if step == 1 else opt.step()
    tensors = [*params, *(t for state in opt.state.values() for t in state.values())]
    return tensors if opt.grad_norm is None else [*tensors, opt.grad_norm]


def steps() -> Digests:
    for (i, case), (k, (stored, dtype)) in product(enumerate(RULES), enumerate(STORED)):
        if (k >= PLAIN and (i + k) % 2) or is_refused({"case": case, "options": stored}):
            continue
        around = AROUND[(i + k // 2) % len(AROUND)]
        yield f"{case} {stored} {dtype} {around}", functools.partial(stepped, case, stored, dtype, around)


def norm_of(tensors: list[Tensor], norm: float) -> Tensor:
    tensors = [*tensors, torch.ones(1, dtype=torch.float64)]  # which asks for the norm in double
    if _backend.resolve("auto") != "reference":
        return genopt_ext.get_total_norm(tensors, norm)
    # The reference's sums, without torch's square root of them, which is not always exactly rounded.
    words = torch.stack([reference.measure(t, norm) for t in tensors])
    total = binned.largest(words).max() if norm == INF else reference.join(binned.value(words))
    return torch.tensor(math.sqrt(total) if norm == 2 else total.item(), dtype=torch.float64)


def norms() -> Digests:
    """Of tensors within a span, of several spans, of more than 32 of them, and of all together."""

    def run(norm: float, dtype: torch.dtype) -> list[Tensor]:
        tensors = [randn((n,), n, dtype) for n in (*SIZES, 256 * 32 + 1, 256 * 32 * 34 + 7)]
        others = [torch.tensor([1.0, x] * 300) for x in NON_FINITE]
        return [norm_of(each, norm) for each in (*([t] for t in (*tensors, *others)), tensors)]

    for norm, dtype in product((2.0, 1.0, INF), (torch.float32, torch.float64, *SIXTEEN)):
        yield f"norm {norm} {dtype}", functools.partial(run, norm, dtype)


def quantized() -> Digests:
    """Large enough for 8 threads to write past the caches, to the begin of a line and elsewhere."""

    def run(form: dict[str, Any], dtype: torch.dtype, offset: int) -> list[Tensor]:
        n = (4 << 20) * 8 // form["bits"] + 1000
        x = randn((1 << 12,), 0).repeat(-(-n // (1 << 12)))[:n].to(dtype)
        codes = torch.full((n + 200,), 77, dtype=torch.int8 if form["bits"] == 8 else torch.uint8)
        scale = torch.empty(-(-n // 64) if form["scheme"] == "block" else ())
        q = quant.quantize(x, out=(codes[offset : offset + -(-n * form["bits"] // 8)], scale), **form)
        back = torch.full((n + 200,), 77, dtype=dtype)
        quant.dequantize(q, out=back[offset : offset + n])
        return [codes, scale, back]

    forms = [dict(bits=8, scheme="block", block_size=64), dict(bits=4, scheme="tensor"), dict(bits=8, scheme="tensor")]
    for dtype, form, offset in in_turn((torch.float32, torch.bfloat16), forms, (0, 1)):
        yield f"quantize {form} {dtype} {offset}", functools.partial(run, form, dtype, offset)


def digests(threads: int = 8) -> dict[str, str]:
    torch.set_num_threads(threads)
    return {name: digest(run()) for part in (steps, norms, quantized) for name, run in part()}
