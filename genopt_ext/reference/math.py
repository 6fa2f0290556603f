"""The scalar operations that rules share, spelled in torch operations: ``csrc/math/numbers.h``.

Only operations that torch computes exactly rounded are used, on scalars rounded to the compute dtype
beforehand: no ``alpha=``, ``addcmul`` or ``lerp``, which contract on some machines. Numbers such as the learning rate
are floats, or 0-dim tensors while torch traces the step (see ``tracing.py``).
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from .. import tracing
from ..tracing import Number


def compute_dtype(param: Tensor) -> torch.dtype:
    """What the rules compute in: float64 for float64 parameters, else float32."""
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32


def real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def rounded(x: Number, like: Tensor) -> Number:
    """``x`` in the precision of ``like``."""
    if isinstance(x, Tensor):
        return x.to(like.dtype)
    return ctypes.c_float(x).value if like.dtype == torch.float32 else x


def may_count(x: Number) -> bool:
    return isinstance(x, Tensor) or x != 0


def lerp(start: Tensor, end: Tensor, weight: Number) -> Tensor:
    difference = end - start
    if isinstance(weight, Tensor):
        return torch.where(weight < 0.5, start + difference * weight, end - difference * (1.0 - weight))
    return start + difference * weight if weight < 0.5 else end - difference * (1.0 - weight)


def finite(x: Tensor) -> Tensor:
    return x.clamp(max=torch.finfo(x.dtype).max)


def average_square(average: Tensor, g: Tensor, weight: Number) -> Tensor:
    return lerp(finite(average), finite(g * g), weight)


def is_unset(x: Tensor) -> Tensor:
    """Where a state waits for its first value: -0.0, see ``csrc/math/numbers.h``."""
    return (x == 0) & (x.real if x.is_complex() else x).signbit()


def is_all_unset(x: Tensor) -> bool:
    """Whether the whole state waits for its first value; waits for the device."""
    return not x.is_sparse and tracing.has_number(x) and bool(is_unset(x).all())


def sqrt(x: Tensor) -> Tensor:
    # torch.sqrt of float32 is not always exactly rounded on CPU; through float64 it is.
    return x.double().sqrt().to(x.dtype)


def multiply_add(a: Number, x: Tensor, b: Tensor) -> Tensor:
    """``a x + b``, rounded once in float32; in float64 after each operation."""
    if x.dtype != torch.float32:
        return x * a + b
    product, b = x.double() * a, b.double()  # the product is exact
    total = product + b
    back = total - product
    error = (product - (total - back)) + (b - back)
    # Rounded to odd first, a number of twice the bits is rounded as if it had been exact.
    bits = total.view(torch.int64)
    odd = (bits - (error.signbit() != total.signbit()).long()) | 1
    return torch.where((error != 0) & error.isfinite(), odd.view(torch.float64), total).float()


def scaled_add(factor: Number, x: Tensor, b: Tensor) -> Tensor:
    """``factor x + b``, the factor in two parts."""
    most = rounded(factor, x)
    limit = torch.finfo(x.dtype).max
    return multiply_add(most, x, multiply_add(rounded(factor - most, x), x.clamp(-limit, limit), b))


def logarithm(x: Number) -> Number:
    """Of a positive, normal number."""
    if isinstance(x, Tensor):
        return x.log()
    fraction, exponent = math.frexp(x)
    fraction, exponent = 2.0 * fraction, exponent - 1
    if fraction > 1.4142135623730951:
        fraction, exponent = 0.5 * fraction, exponent + 1
    f = (fraction - 1.0) / (fraction + 1.0)
    series = 0.0
    for k in range(25, 0, -2):
        series = series * (f * f) + 1.0 / k
    return exponent * 0.6931471805599453 + 2.0 * f * series


def exponential(x: Number) -> Number:
    if isinstance(x, Tensor):
        return x.exp()
    if not x > -708.0:
        return x if x != x else 0.0
    if x > 709.0:
        return math.inf
    exponent = int(x * 1.4426950408889634 + (-0.5 if x < 0.0 else 0.5))
    rest = (x - exponent * 0.693147180369123816490) - exponent * 1.90821492927058770002e-10
    series = 1.0
    for k in range(14, 0, -1):
        series = series * (rest * (1.0 / k)) + 1.0
    return math.ldexp(series, exponent)


def power(base: Number, n: Number) -> Number:
    if isinstance(base, Tensor) or isinstance(n, Tensor):
        power: Tensor = base**n
        return power
    result, k = 1.0, int(max(n, 0.0))
    while k:
        if k & 1:
            result *= base
        base *= base
        k >>= 1
    return result


def real_power(base: Number, exponent: Number) -> Number:
    """Of a base that is not negative."""
    if isinstance(base, Tensor) or isinstance(exponent, Tensor):
        return torch.as_tensor(base) ** exponent
    if 0.0 <= exponent < 65536.0 and int(exponent) == exponent:
        return power(base, exponent)
    if not base >= 2.2250738585072014e-308:
        return 0.0 if exponent > 0.0 else math.inf
    return exponential(exponent * logarithm(base))


def root(x: Number) -> Number:
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)
