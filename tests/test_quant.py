"""Quantization: kernels and reference bit for bit, both against float64; policies, refusals, torch's machinery."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

import cases
import hypothesis.strategies as st
import pytest
import torch
from cases import BACKENDS, COPIES, DEVICE, DTYPES, INF, KERNELS, NAN, NATIVE, SIZES, assert_same_bits, randn, saved
from hypothesis import given, settings

from genopt_ext import _backend, quant
from genopt_ext.quant import ops
from genopt_ext.reference import quantize as reference


@dataclass(frozen=True)
class Case:
    bits: int
    scheme: str
    axis: int
    block_size: int
    symmetric: bool
    rounding: str = "nearest"

    def __str__(self) -> str:
        how = {"tensor": "", "channel": self.axis, "block": self.block_size}[self.scheme]
        return f"{self.bits}-{self.scheme}{how}-{'symmetric' if self.symmetric else 'asymmetric'}-{self.rounding}"

    @property
    def kwargs(self) -> dict[str, Any]:
        return asdict(self)

    def fits(self, shape: Any) -> bool:
        return self.scheme != "channel" or -len(shape) <= self.axis < len(shape)


UNITS = [("tensor", 0, 256), ("channel", 0, 256), ("channel", -1, 256)] + [("block", 0, b) for b in (32, 64, 256, 4096)]
CASES = [
    Case(bits, *units, symmetric, rounding)
    for bits, units, symmetric, rounding in itertools.product((8, 4), UNITS, (True, False), ("nearest", "stochastic"))
]
NEAREST = [case for case in CASES if case.rounding == "nearest"]
SHAPES = [(n,) for n in SIZES] + [(), (3, 5, 7), (2, 40, 3), (30, 70), (70, 300), (0, 3), (3, 0)]


def numbers(shape, seed=0, dtype=torch.float32):
    """Units of different sizes, mostly positive."""
    x = randn(shape, seed, torch.float64) + 0.5
    if shape:
        x *= torch.exp2(randn(shape[:1], seed + 1, torch.float64)).reshape(-1, *[1] * (len(shape) - 1))
    return x.to(dtype)


def quantize(x, case, seed=7, **more):
    generator = torch.Generator("cpu").manual_seed(seed) if case.rounding == "stochastic" else None
    return quant.quantize(x, **case.kwargs, generator=generator, **more)


def by_reference(call, *args, **more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENOPT_BACKEND", "reference")
        return call(*args, **more)


def unit_of_elements(q):
    index = torch.arange(q.shape.numel(), device=q.codes.device)
    return index // q.form.run(q.shape) % max(1, q.form.units(q.shape))


def scale_of_elements(q):
    return q.scale.double().reshape(-1)[unit_of_elements(q)].reshape(q.shape)


def unpacked(q):
    return q.codes if q.bits == 8 else reference._unpack(q.codes, q.shape.numel()).reshape(q.shape)


def assert_as_reference(x, case, what="", seed=7, **more):
    """What kernels and reference quantize ``x`` to."""
    q = quantize(x, case, seed, **more)
    assert_same_bits(q[:3], by_reference(quantize, x, case, seed, **more)[:3], what or case)
    return q


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_reference(case, dtype):
    for shape in filter(case.fits, SHAPES):
        what = case, dtype, shape
        x = numbers(shape, dtype=dtype)
        q = assert_as_reference(x, case, what)
        assert (q.codes.dtype, q.codes.is_contiguous(), q.shape, q.dtype) == (
            (torch.int8 if case.bits == 8 else torch.uint8), True, x.shape, dtype,
        ), what  # fmt: skip
        for out in {dtype, torch.float32, torch.float64}:
            back = quant.dequantize(q, out)
            assert (back.dtype, back.shape, back.is_contiguous()) == (out, x.shape, True), what
            assert_same_bits(back, by_reference(quant.dequantize, q, out), what)


@pytest.mark.parametrize("serves", BACKENDS)
@pytest.mark.parametrize("case", NEAREST, ids=str)
def test_given_tensors_get_the_same(case, serves, monkeypatch):
    """In two passes, as out= is not written before all numbers have been seen, or in one."""
    monkeypatch.setenv("GENOPT_BACKEND", serves)
    for shape, nonfinite in itertools.product(
        filter(case.fits, [(300,), (3, 5, 7), (0,), (70, 300)]), ("error", "propagate")
    ):
        x = numbers(shape)
        q = quantize(x, case)
        out = [None if t is None else torch.full_like(t, 1) for t in q[:3]]
        before = [None if t is None else t._version for t in out]
        result = quantize(x, case, nonfinite=nonfinite, out=[t for t in out if t is not None])
        assert all(a is b for a, b in zip(result[:3], out, strict=True)) and result[3:] == q[3:]
        assert_same_bits(out, q[:3], case)
        assert all(t is None or t._version > old for t, old in zip(out, before, strict=True))
        assert quantize(x, case, out=result).codes is result.codes
        back = torch.empty(shape, dtype=torch.bfloat16)
        assert quant.dequantize(q, out=back) is back and back._version
        assert_same_bits(back, quant.dequantize(q, torch.bfloat16))


def layouts(dtype=torch.float32):
    return {**cases.layouts(dtype), "expanded": randn((1, 50), 4, dtype).expand(30, 50)}


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(name, dtype):
    x = layouts(dtype)[name]
    for case in (
        Case(8, "block", 0, 64, False, "stochastic"),
        Case(4, "tensor", 0, 0, True),
        Case(8, "channel", -1, 0, True),
    ):
        if case.fits(x.shape):
            assert_same_bits(assert_as_reference(x, case)[:3], quantize(x.contiguous(), case)[:3], (name, case))


def test_out_at_odd_addresses():
    x = randn(3000, 0)
    for bits, offset in itertools.product((8, 4), (1, 3, 8, 64)):
        q = quant.quantize(x, bits=bits, scheme="block", block_size=32)
        codes, scale = torch.empty(5000, dtype=q.codes.dtype), torch.empty(200)
        out = codes[offset : offset + len(q.codes)], scale[1 : 1 + len(q.scale)]
        assert_same_bits(quant.quantize(x, bits=bits, scheme="block", block_size=32, out=out)[:2], q[:2])
        back = torch.empty(4000)[offset : offset + 3000]
        assert_same_bits(quant.dequantize(quant.QuantizedTensor(*out, *q[2:]), out=back), quant.dequantize(q))


DIGEST = """
import sys, torch
from test_quant import CASES, quantize
from genopt_ext import _C, quant
x = torch.randn((3, 70001), generator=torch.Generator().manual_seed(0))
large = torch.randn(4_300_000, generator=torch.Generator().manual_seed(0))  # by 8 threads written past the caches
found = set()
for threads in (1, 2, 8):
    torch.set_num_threads(threads)
    bits = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for case in CASES[:: 1 if dtype == torch.float32 and threads == 2 else 5]:
            q = quantize(x.to(dtype), case)
            bits += [t.flatten()[::31].double() for t in (quant.dequantize(q), *q[:3]) if t is not None]
    q = quant.quantize(large, scheme="block")
    bits += [quant.dequantize(q)[::97].double(), q.codes[::31].double()]
    total = torch.cat(bits)
    if threads == 2: found.add(("all", torch.hash_tensor(total).item()))
    else: found.add(("some", torch.hash_tensor(total).item()))
print(_C.cpu_capability(), sorted(found))
"""


@pytest.mark.skipif(NATIVE != "cpu" or not hasattr(torch, "hash_tensor"), reason="CPU kernels; hash_tensor")
def test_same_bits_on_every_instruction_set_and_thread_count(succeeds):
    digests = {}
    for capability in _backend.native.cpu_capabilities():
        used, digests[capability] = succeeds(DIGEST, GENOPT_CPU_CAPABILITY=capability).strip().split(" ", 1)
        assert used == capability
    assert len(set(digests.values())) == 1 and digests[capability].count("some") == 1, digests


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_half_a_scale(case, dtype):
    """Of a scale, if stochastic; y = x * (1 / scale) is off by two roundings of numbers up to 255."""
    allowed = (0.5 if case.rounding == "nearest" else 1.0) + 255 * 2**-23
    for shape in filter(case.fits, SHAPES):
        x = numbers(shape, 3, dtype)
        q = quantize(x, case)
        error = (quant.dequantize(q, torch.float64) - x.double()).abs()
        assert (error <= scale_of_elements(q) * allowed).all(), (case, dtype, shape)
        codes = unpacked(q)
        highest = 2 ** (case.bits - 1) - 1
        if codes.numel():
            assert codes.max() <= highest and codes.min() >= -highest - (not case.symmetric)
            if case.rounding == "nearest" and case.symmetric and x.abs().max() > 0:
                assert codes.abs().max() == highest, "the range is not used"


def test_ties_go_to_even_codes():
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5])
    assert quant.quantize(x).codes.tolist() == [127, 0, 2, 2, 0, -2, -2, 126, -126]


def test_packing():
    """A contract with saved files: the first of two codes in the low half, two's complement, padded with 0."""
    q = quant.quantize(torch.tensor([7.0, -7.0, 1.0, 0.0, -1.0, -2.0, 3.0]), bits=4)
    assert q.scale.item() == 1.0
    assert bytes(q.codes.tolist()) == bytes([0x97, 0x01, 0xEF, 0x03])
    # Asymmetric: -8 to 7, the padding is 0 whatever the zero point.
    q = quant.quantize(torch.tensor([15.0, 0.0, 4.0]), bits=4, symmetric=False)
    assert (q.scale.item(), q.zero_point.item()) == (1.0, -8)
    assert bytes(q.codes.tolist()) == bytes([0x87, 0x0C])
    q = quant.quantize(torch.tensor([-255.0, 0.0, -128.0]), symmetric=False)
    assert (q.scale.item(), q.zero_point.item(), q.codes.tolist()) == (1.0, 127, [-128, 127, -1])


def test_random_numbers_are_these():
    """Written down, as runs are to be repeated with later versions."""
    index = torch.tensor([0, 1, 2, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 3], device="cpu")
    found = [
        (reference.random_numbers(torch.tensor(seed), index) * 2**24).int().tolist() for seed in (0, -1, 2**40 + 5)
    ]

    def mix(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    def bits(seed, i):
        key = mix(mix(mix(seed % 2**32) ^ (seed >> 32) % 2**32) ^ i >> 32)
        return mix(i % 2**32 * 0x9E3779B1 % 2**32 ^ key) >> 8

    assert found == [[bits(seed, i) for i in index.tolist()] for seed in (0, -1, 2**40 + 5)]
    assert found[2] == GOLDEN_BITS


GOLDEN_BITS = [13348491, 11504128, 3199624, 8282087, 10020719, 8786162, 10475891]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_stochastic_rounding_is_unbiased(bits, symmetric):
    highest = 2 ** (bits - 1) - 1
    for value in (0.3, -0.71, 2.5, 0.015625):
        x = torch.full((1 << 16,), value, dtype=torch.float64)
        x[0], x[1] = highest, -highest - (not symmetric)
        q = quant.quantize(
            x, bits=bits, symmetric=symmetric, rounding="stochastic", generator=torch.Generator("cpu").manual_seed(1)
        )
        back = quant.dequantize(q)[2:] / q.scale.double() * 1.0
        assert q.scale.item() == 1.0
        p = value - math.floor(value)
        assert set(back.tolist()) <= {math.floor(value), math.floor(value) + 1}
        sigma = math.sqrt(p * (1 - p) / len(back))
        assert abs(back.mean().item() - value) < 4 * sigma, (bits, symmetric, value)
        up = (back > value).float()
        neighbours = ((up[1:] - p) * (up[:-1] - p)).mean().item() / (p * (1 - p))
        assert abs(neighbours) < 4 / math.sqrt(len(back)), "neighbours are not independent"


def test_stochastic_rounding_leaves_exact_numbers():
    x = torch.arange(-127.0, 128.0)
    for seed in range(20):
        generator = torch.Generator("cpu").manual_seed(seed)
        assert torch.equal(quant.quantize(x, rounding="stochastic", generator=generator).codes.float(), x)


def test_generators():
    x = randn(1000, 0)

    def drawn(generator=None):
        return quant.quantize(x, rounding="stochastic", generator=generator).codes

    one = torch.Generator("cpu").manual_seed(3)
    first, second = drawn(one), drawn(one)
    assert not torch.equal(first, second)
    one.manual_seed(3)
    assert torch.equal(drawn(one), first)
    torch.manual_seed(3)
    assert torch.equal(drawn(), first)
    before = torch.get_rng_state()
    quant.quantize(x)
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn without need"
    if DEVICE == "cuda":
        there = torch.Generator("cuda").manual_seed(3)
        assert not torch.equal(drawn(there), drawn(there))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NEAREST, ids=str)
def test_extreme_ranges(case, dtype):
    """No infinity and no NaN of our own making, and no code that wraps."""
    info = torch.finfo(dtype)
    limit = min(info.max, 7 * 3e38)  # of what a float32 scale can reach
    denormal = info.tiny * torch.finfo(dtype).eps
    for high, low in itertools.product((limit, 1.0, info.tiny, denormal, 0.0), repeat=2):
        x = torch.tensor([high, -low, 0.0, high / 2, -low / 3] * 20, dtype=torch.float64).to(dtype)
        if not case.fits(x.shape):
            continue
        q = assert_as_reference(x, case)
        assert q.scale.isfinite().all() and (q.scale >= torch.finfo(torch.float32).tiny).all(), (case, high, low)
        back = quant.dequantize(q)
        assert back.isfinite().all(), (case, dtype, high, low)
        assert (back[x == 0] == 0).all(), "zero is exact"
        assert ((back == 0) | (back.sign() == x.sign())).all(), "wrapped"


@pytest.mark.parametrize("case", [c for c in NEAREST if c.scheme == "block"], ids=str)
def test_zero_blocks_are_exact(case):
    x = numbers((3 * 4096,))
    x[4096:8192] = 0
    x[4096] = -0.0
    q = quantize(x, case)
    back = quant.dequantize(q)
    assert (back[4096:8192] == 0).all() and (back[:4096] != 0).any()


@pytest.mark.parametrize("value", [NAN, INF, -INF, -NAN])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nonfinite(case, value, monkeypatch):
    x = numbers((5, 300), 1)
    mended = x.clone()
    x[2, 177], mended[2, 177] = value, 0.0
    out = [t for t in quantize(mended, case)[:3] if t is not None]
    for t in out:
        t.fill_(5)
    for target in (None, out):
        with pytest.raises(
            ValueError, match=r"quantize: x \(shape \[5, 300\]\) has 1 elements .* first at 777 \((nan|-?inf)\)"
        ):
            quantize(x, case, out=target)
    assert all((t == 5).all() for t in out), "written before the refusal"

    q, expected = assert_as_reference(x, case, nonfinite="propagate"), quantize(mended, case)
    hit = torch.zeros(max(1, q.scale.numel()), dtype=torch.bool)
    hit[unit_of_elements(q)[777]] = True
    assert torch.equal(q.scale.reshape(-1).isnan(), hit)
    hit = hit[unit_of_elements(q)].reshape(x.shape)
    back = quant.dequantize(q)
    assert back[hit].isnan().all() and (unpacked(q)[hit] == 0).all()
    assert_same_bits(back[~hit], quant.dequantize(expected)[~hit])


def test_float64_beyond_float32_scales():
    x = torch.tensor([1.0, 1e300], dtype=torch.float64)
    with pytest.raises(ValueError, match="numbers too large for a scale in float32"):
        quant.quantize(x)
    assert quant.quantize(x, nonfinite="propagate").scale.isnan()


@pytest.mark.parametrize("case", [CASES[0], Case(4, "channel", -1, 0, False), Case(8, "block", 0, 32, True)], ids=str)
def test_saves_and_loads(case):
    q = quantize(numbers((30, 70), dtype=torch.bfloat16), case)
    for other in (saved({"weight": q})["weight"], *(copied(q) for copied in COPIES.values()), q.to(DEVICE)):
        assert type(other) is quant.QuantizedTensor and other[3:] == q[3:]
        assert_same_bits(quant.dequantize(other), quant.dequantize(q))


def test_quantized_tensor_tells_about_itself():
    q = quant.quantize(randn((30, 70), 0), bits=4, scheme="block", block_size=64, symmetric=False)
    assert q.nbytes == 30 * 70 / 2 + 33 * 5 and not q.symmetric and (q.axis, q.block_size) == (None, 64)
    expected = "shape=[30, 70], dtype=torch.float32, bits=4, scheme='block', block_size=64, symmetric=False, device="
    assert expected in repr(q)
    moved = q.to("meta")
    assert {t.device.type for t in moved[:3]} == {"meta"} and moved[3:] == q[3:]
    assert quant.dequantize(moved).device.type == "meta"
    assert quant.quantize(torch.empty(5, device="meta")).codes.device.type == "meta"


def test_gradients_stop():
    x = randn(300, 0).requires_grad_()
    q = quant.quantize(x)
    assert not q.scale.requires_grad and not quant.dequantize(q).requires_grad


X = torch.zeros(4, 6, device="cpu")
Q8 = quant.quantize(X.clone(), scheme="channel", axis=1)
Q4 = quant.quantize(X.clone(), bits=4, scheme="block", block_size=32, symmetric=False)
SPARSE = torch.ones(3, device="cpu").to_sparse()
META, NUMBER = torch.zeros(4, 6, dtype=torch.int8, device="meta"), torch.zeros((), device="cpu")
QUANTIZE = [
    (TypeError, "x must be a tensor, got list", dict(x=[1.0])),
    (TypeError, "the dtype of x must be one of .*, got torch.int32", dict(x=X.int())),
    (TypeError, "got torch.complex64; convert it first", dict(x=X + 1j)),
    (TypeError, "got torch.bool", dict(x=X.bool())),
    (TypeError, "x must be dense or strided, got torch.sparse_coo", dict(x=SPARSE)),
    (ValueError, "bits must be one of 8, 4, got 5", dict(bits=5)),
    (ValueError, "bits must be one of 8, 4, got '8'", dict(bits="8")),
    (ValueError, "scheme must be one of 'tensor', 'channel', 'block', got 'row'", dict(scheme="row")),
    (ValueError, r"axis 2 is not one .* \[4, 6\] \(from -2 to 1\)", dict(scheme="channel", axis=2)),
    (TypeError, "axis must be an integer, got 0.5", dict(scheme="channel", axis=0.5)),
    (ValueError, "axis 0 .* no dimensions", dict(x=X[0, 0], scheme="channel")),
    (ValueError, "block_size must be a power of two from 32 to", dict(scheme="block", block_size=100)),
    (ValueError, "from 32 to 4096, got 16", dict(scheme="block", block_size=16)),
    (ValueError, "from 32 to 4096, got 8192", dict(scheme="block", block_size=8192)),
    (ValueError, "got -256", dict(scheme="block", block_size=-256)),
    (TypeError, "block_size must be an integer, got 64.0", dict(scheme="block", block_size=64.0)),
    (TypeError, "symmetric must be True or False, got 1", dict(symmetric=1)),
    (ValueError, "rounding must be one of 'nearest', 'stochastic', got 'up'", dict(rounding="up")),
    (ValueError, "nonfinite must be one of 'error', 'propagate', got", dict(nonfinite="ignore")),
    (TypeError, "generator must be a torch.Generator or None, got int", dict(generator=3)),
    (TypeError, "out must be a sequence of tensors, got Tensor", dict(out=X)),
    (ValueError, "out must be codes and scale, 2 tensors, got 1", dict(out=(X,))),
    (ValueError, "codes, scale and zero_point, 3 tensors, got 2", dict(symmetric=False, out=Q8[:2])),
    (TypeError, "out: codes must be torch.int8, got torch.float32", dict(out=(X, Q8.scale))),
    (ValueError, r"out: scale must have shape \[\], got \[6\]", dict(out=Q8)),
    (ValueError, r"codes must have shape \[4, 6\], got \[6, 4\]", dict(out=(Q8.codes.t(), NUMBER))),
    (ValueError, r"codes must be contiguous, got strides \(1, 6\)", dict(x=X.t(), out=(Q8.codes.t(), NUMBER))),
    (ValueError, "codes is on meta and x on cpu; move one", dict(out=(META, NUMBER))),
    (ValueError, "share memory", dict(out=(Q8.codes, X[0, 0]))),
    (
        ValueError,
        "share memory; pass tensors with memory of their own",
        dict(out=(X.view(-1).view(torch.int8)[:24].view(4, 6), NUMBER)),
    ),
]
DEQUANTIZE = [
    (TypeError, "q must be a QuantizedTensor, got Tensor", dict(q=X)),
    (TypeError, "dtype must be one of .*, got torch.int32", dict(dtype=torch.int32)),
    (ValueError, r"scale must have shape \[6\], got \[5\]", dict(q=Q8._replace(scale=Q8.scale[:5]))),
    (TypeError, "scale must be torch.float32, got torch.float64", dict(q=Q8._replace(scale=Q8.scale.double()))),
    (ValueError, "scale is on meta and codes on cpu", dict(q=Q8._replace(scale=Q8.scale.to("meta")))),
    (TypeError, "scale must be a tensor, got float", dict(q=Q8._replace(scale=1.0))),
    (TypeError, "codes must be a tensor, got NoneType", dict(q=Q8._replace(codes=None))),
    (ValueError, r"codes must have shape \[6, 4\]", dict(q=Q8._replace(shape=torch.Size([6, 4])))),
    (TypeError, "codes must be torch.uint8, got torch.int8", dict(q=Q8._replace(bits=4))),
    (TypeError, "zero_point must be torch.int8, got torch.float32", dict(q=Q4._replace(zero_point=Q4.scale))),
    (ValueError, "block_size must be a power of two", dict(q=Q4._replace(block_size=31))),
    (ValueError, r"out must have shape \[4, 6\], got \[6, 4\]", dict(out=X.t())),
    (TypeError, "dtype must be one of .*, got torch.int32", dict(out=X.int())),
    (TypeError, "out is torch.float32 and dtype torch.float64", dict(dtype=torch.float64, out=X)),
    (TypeError, "out must be a tensor, got int", dict(out=3)),
]


@pytest.mark.parametrize(
    ("call", "error", "message", "given"),
    [*((quant.quantize, *row) for row in QUANTIZE), *((quant.dequantize, *row) for row in DEQUANTIZE)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refusals(call, error, message, given):
    good = dict(x=X) if call is quant.quantize else dict(q=Q8)
    with pytest.raises(error, match=f"{call.__name__}: .*{message}"):
        call(**{**good, **given})


def test_a_seed_is_one_number():
    with pytest.raises(TypeError, match="seed must be one int64"):
        torch.ops.genopt_ext.quantize(X, 8, "tensor", 0, 0, True, "error", X)


@pytest.mark.parametrize(
    "case", [CASES[0], CASES[3], Case(4, "channel", -1, 0, False), Case(8, "block", 0, 32, True)], ids=str
)
def test_opcheck(case):
    x = numbers((5, 70))
    seed = torch.tensor(7) if case.rounding == "stochastic" else None
    q, transposed = quantize(x, case), quantize(x.t(), case)
    form = *q.form, "error", seed
    torch.library.opcheck(ops.quantize, (x, *form))
    torch.library.opcheck(ops.quantize, (x.t(), *transposed.form, "propagate", seed))
    torch.library.opcheck(ops.quantize_out, (x, *q[:3], *form))
    how = q.bits, q.scheme, q.axis or 0, q.block_size or 0
    torch.library.opcheck(ops.dequantize, (*q[:3], list(q.shape), torch.float16, *how))
    torch.library.opcheck(ops.dequantize_out, (*q[:3], list(q.shape), torch.empty_like(x), *how))


def round_trip(x, case):
    q = quant.quantize(x * 2, **case.kwargs)
    return quant.dequantize(q) + 1, q


@pytest.mark.parametrize(
    "case", [CASES[0], CASES[2], Case(4, "channel", 1, 0, False), Case(8, "block", 0, 32, True)], ids=str
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(case, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(lambda x: round_trip(x, case), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 9):
        x = numbers((rows, 70))
        back, q = compiled(x)
        expected, eager = round_trip(x, case)
        assert_same_bits(q[:3], eager[:3], case)
        assert type(q) is quant.QuantizedTensor and q[3:] == eager[3:]
        assert_same_bits(back, expected)
    x[0, 0] = NAN
    with pytest.raises(ValueError, match="quantize: x .* has 1 elements that are NaN"):
        compiled(x)


def test_compiles_stochastic_and_out():
    case = Case(8, "block", 0, 32, True, "stochastic")

    def run(x, codes, scale):
        return quant.dequantize(quant.quantize(x, **case.kwargs, out=(codes, scale)))

    x = numbers((5, 70))
    q = quantize(x, case)
    torch.manual_seed(7)
    back = torch.compile(run, fullgraph=True, backend="aot_eager")(x, *(torch.zeros_like(t) for t in q[:2]))
    assert_same_bits(back, quant.dequantize(q))


@pytest.mark.filterwarnings("ignore")
def test_compiles_with_inductor():
    case = Case(8, "block", 0, 32, True)
    x = numbers((5, 70))
    assert_same_bits(torch.compile(lambda x: round_trip(x, case)[0], fullgraph=True)(x), round_trip(x, case)[0])


@KERNELS
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 40), max_size=4),
    case=st.sampled_from(CASES),
    axis=st.integers(-4, 3),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-140, 120),
    hole=st.sampled_from([0.0, NAN, INF, -0.0]),
    seed=st.integers(0, 2**30),
)
def test_anything(shape, case, axis, dtype, exponent, hole, seed):
    case = Case(**{**case.kwargs, "axis": axis})
    if not case.fits(shape):
        return
    x = (randn(shape, seed, torch.float64) * 2.0**exponent).to(dtype)
    if x.numel():
        x.view(-1)[seed % x.numel()] = hole
    q = assert_as_reference(x, case, seed=seed, nonfinite="propagate")
    assert_same_bits(quant.dequantize(q), by_reference(quant.dequantize, q), case)
