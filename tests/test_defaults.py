"""Whatever torch's default dtype and default device are, steps, clipping and quantization give the same."""

from __future__ import annotations

import contextlib
from functools import partial
from itertools import product

import pytest
import torch
from cases import BACKENDS, DEVICE, FIRST, INT8, assert_same_bits, copies_of, made, pairs, saved
from low_precision import assert_same, seeded

import genopt_ext
from genopt_ext import quant

OPTIONS = [
    {},
    INT8,
    dict(INT8, param_rounding="stochastic", agc=0.1),
    dict(state_dtype=torch.bfloat16, param_rounding="kahan", ema_decay=0.9, max_grad_norm=1.0),
    dict(master_weights=True, clip_per_param=1.0, skip_nonfinite=True),
]


@contextlib.contextmanager
def other_default(name):
    """float64 numbers, or tensors that have no memory."""
    device = torch.get_default_device()
    try:
        if name == "dtype":
            torch.set_default_dtype(torch.float64)
        else:
            torch.set_default_device("meta")
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(device if DEVICE == "cuda" else None)


def assert_same_under(default, call, what):
    """Values, dtypes and devices of the tensors that ``call`` returns."""
    expected = call()
    with other_default(default):
        found = call()
    for a, b in zip(expected, found, strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device), (default, what)
        assert_same_bits(a, b, (default, what))


def full(value, dtype=torch.float32, size=700):
    return torch.full((size,), value, dtype=dtype, device=DEVICE)


def trained(name, backend, options):
    """An optimizer and one that goes on from its checkpoint."""
    more = dict(momentum=0.9) if name in ("SGD", "RMSprop") else {}
    params = [torch.nn.Parameter(full(1.0, dtype)) for dtype in (torch.float32, torch.bfloat16)]
    opt = seeded(lambda: made(name, params, backend=backend, **more, **options))
    for step in range(4):
        for p in params:
            p.grad = full(0.5, p.dtype)
        if step == 1:
            opt.accumulate()
            continue
        if step == 3:  # as GradScaler sets them
            opt.grad_scale, opt.found_inf = 3.0, 0.0
        opt.step()
    del opt.grad_scale, opt.found_inf
    resumed = copies_of(params)
    other = made(name, resumed, backend=backend, **more, **options)
    other.load_state_dict(saved(opt.state_dict()))
    for p in resumed:
        p.grad = full(-0.3, p.dtype)
    other.step()
    return opt, other


@pytest.mark.parametrize(
    ("name", "options", "default", "backend"), pairs(list(FIRST), OPTIONS, ["dtype", "device"], BACKENDS), ids=str
)
def test_steps(name, options, default, backend):
    what = (name, options, default, backend)
    expected = trained(name, backend, options)
    with other_default(default):
        found = trained(name, backend, options)
    for a, b in zip(expected, found, strict=True):
        assert_same(a, b, what)
        for state, other in zip(a.state.values(), b.state.values(), strict=True):
            for key, t in state.items():
                assert (t.dtype, t.device) == (other[key].dtype, other[key].device), (what, key)


@pytest.mark.parametrize("default", ["dtype", "device"])
def test_clipping(default):
    """Also where the first parameter has no gradient, and by norms that kernels do not serve."""

    def clipped(norm, strict):
        params = [torch.nn.Parameter(full(1.0)) for _ in range(3)]
        for p in params[1:]:
            p.grad = full(0.5)
        total = genopt_ext.clip_grad_norm_(params, 1.0, norm, error_if_nonfinite=strict)
        genopt_ext.clip_grad_value_(params, 0.01)
        return total, params[2].grad

    for norm in (1.0, 2.0, 3.0, float("inf")):
        for strict in (False, True):
            assert_same_under(default, partial(clipped, norm, strict), (norm, strict))


@pytest.mark.parametrize("default", ["dtype", "device"])
@pytest.mark.parametrize("serves", BACKENDS)
def test_quantization(serves, default, monkeypatch):
    monkeypatch.setenv("GENOPT_BACKEND", serves)
    x = torch.linspace(-1, 2, 700, dtype=torch.float32, device=DEVICE)

    def there_and_back(bits, scheme, rounding):
        generator = torch.Generator("cpu").manual_seed(3)
        how = dict(bits=bits, scheme=scheme, symmetric=False)
        q = quant.quantize(x, **how, rounding=rounding, generator=generator)
        return *q[:3], quant.dequantize(q), quant.fake_quantize(x, **how), quant.fake_quantize(x, 0.01, 3)

    for how in product((8, 4), ("tensor", "channel", "block"), ("nearest", "stochastic")):
        assert_same_under(default, partial(there_and_back, *how), how)
