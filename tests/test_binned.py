"""Sums that no order and no division changes: of kernels, of the reference, and of processes."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from cases import INF, NAN, NATIVE, assert_same_bits, randn
from hypothesis import given, settings

from genopt_ext import binned, clip, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def exactly(x, norm):
    """The sum, rounded once; what overflows a float64 is infinite."""
    numbers = [n * n if norm == 2 else abs(n) for n in x.double().tolist()]
    return INF if INF in numbers else math.fsum(numbers)


def words_of(x, norm):
    """Of kernels, and of the reference."""
    found = reference.measure(x, norm)
    if NATIVE != "reference":
        assert_same_bits(clip.measure_rows([x], [x], norm)[0], found)
    return found


@st.composite
def numbers(draw):
    """Of magnitudes that differ little or much, over tiles and spans, with zeros and what is not finite."""
    dtype = draw(st.sampled_from(DTYPES))
    n = draw(st.sampled_from([0, 1, 2, 15, 16, 17, 255, 257, 600, 8191, 8193, 20_000]))
    seed = draw(st.integers(0, 2**20))
    width, middle = draw(st.sampled_from([0.0, 1.0, 10.0, 60.0])), draw(st.integers(-150, 120))
    if dtype == torch.float64:
        middle *= 6
    x = (randn((n,), seed, torch.float64) * torch.exp2(width * randn((n,), seed + 1, torch.float64) + middle)).to(dtype)
    holes = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < draw(st.sampled_from([0.0, 0.1, 0.99]))
    x[holes] = 0.0
    if not draw(st.booleans()):
        x = torch.where(x.isfinite(), x, 1.0)
    if n and draw(st.integers(0, 9)) == 0:
        x[seed % n] = draw(st.sampled_from([INF, -INF, NAN]))
    return x


@settings(max_examples=250, deadline=None, derandomize=True)
@given(numbers(), st.sampled_from([1.0, 2.0]), st.integers(0, 2**20), st.integers(1, 5))
def test_no_order_and_no_division_counts(x, norm, seed, processes):
    words = words_of(x, norm)
    value = binned.value(words)
    if x.isnan().any():
        assert value.isnan()
    else:
        expected = exactly(x, norm)
        largest = max((n * n if norm == 2 else abs(n) for n in x.double().tolist()), default=0.0)
        error = len(x) * math.ldexp(largest, -48) + math.ldexp(expected, -51)
        assert value == expected or abs(value - expected) <= error
    generator = torch.Generator().manual_seed(seed)
    shuffled = x[torch.randperm(len(x), generator=generator)]
    assert_same_bits(words_of(shuffled, norm), words)
    cuts = sorted(torch.randint(len(x) + 1, (processes - 1,), generator=generator).tolist())
    parts = torch.stack([words_of(part, norm) for part in torch.tensor_split(shuffled, cuts)])
    for is_narrow in {False, x.dtype != torch.float64}:
        together = binned.gathered(binned.spread(parts, is_narrow).sum(0), is_narrow)
        assert_same_bits(binned.value(together), value, is_narrow)


@pytest.mark.parametrize("norm", [1.0, 2.0])
def test_whoever_has_the_largest_number(norm):
    """Whatever is in the tiles before it: another bin, one bin less or none, at and beside a bin's end."""
    for exponent in (*range(-149, 128, 6), -100, 99):
        for mantissa in (1.0, 1.5, 2.0 - 2.0**-23):
            largest = math.ldexp(mantissa, exponent)
            for factor in (0.0, 2.0**-25, 2.0**-24, 2.0**-12, 1.0):
                for place in (0, 300, 8191, 9000):
                    x = torch.full((9001,), largest * factor)
                    x[place] = largest
                    words = words_of(x, norm)
                    n = 1 if factor == 0 else 9001
                    assert abs(binned.value(words) / exactly(x, norm) - 1) <= n * 2.0**-48
                    parts = torch.stack([words_of(part, norm) for part in (x[:299], x[299:8191], x[8191:])])
                    together = binned.gathered(binned.spread(parts, True).sum(0), True)
                    assert_same_bits(binned.value(together), binned.value(words))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_number_is_told_exactly(dtype):
    for n in range(200):
        x = randn((1,), n, dtype) * 2.0 ** (n - 100)
        if dtype != torch.float64 and x.isfinite() and x != 0:
            assert binned.value(words_of(x, 2.0)) == x.double().square()
        assert binned.value(words_of(x, 1.0)) == x.double().abs() or dtype == torch.float64


@pytest.mark.parametrize("shape", [(300,), (20, 30)])
def test_the_largest(shape):
    for special in (0.0, INF, -INF, NAN):
        x = randn(shape, 1)
        x.view(-1)[77] = special
        found = binned.largest(words_of(x, INF))
        assert_same_bits(found, x.double().abs().max())


def test_nan_is_more_than_infinity():
    for norm in (1.0, 2.0):
        for first, second in ((INF, NAN), (NAN, INF), (-INF, NAN), (INF, 1.0), (-INF, INF)):
            for place in (4, 700, 8500):
                x = torch.zeros(9000)
                x[3], x[place] = first, second
                value = binned.value(words_of(x, norm))
                assert value.isnan() if math.isnan(first) or math.isnan(second) else value == INF


@pytest.mark.parametrize("largest", [1.7e308, 2.0**1016, 2.0**1007, 1e150, 1e-153, 2.3e-308, 1e-310, 5e-324, 0.0])
def test_extremes_of_doubles(largest):
    for norm in (1.0, 2.0):
        x = torch.zeros(600, dtype=torch.float64)
        x[::7] = largest * 2.0**-30
        x[500] = largest
        value = binned.value(words_of(x, norm))
        expected = exactly(x, norm)
        # Below 2^-1070 lies the finest grid.
        assert value == expected or abs(value - expected) <= math.ldexp(expected, -40) + 600 * 2.0**-1070
