"""Which tensors share memory: ``csrc/overlap.cpp`` in Python, for the reference.

Tensors are compared by their dimensions: two elements share a byte where a sum of strides, each times a bounded whole
number, comes to less than an element.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import tracing

_WORK = 10_000  # steps of one search; where they do not suffice, tensors count as sharing memory

# A whole number from the second to the third, times a stride in bytes above 0.
_Term = tuple[int, int, int]


def has_memory(t: Tensor) -> bool:
    """Whether a tensor's elements are where its address and strides say."""
    plain = type(t) in tracing.PLAIN and t.layout == torch.strided and not (t.is_meta or t.is_nested)
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(t)


def is_backed(t: Tensor) -> bool:
    """Whether a tensor's storage, where it has one, holds all of its elements: it may have been resized since."""
    if not has_memory(t) or t.numel() == 0:
        return True
    last = t.numel() - 1
    if not t.is_contiguous():
        last = sum(stride * (size - 1) for size, stride in zip(t.shape, t.stride(), strict=True))
    return (t.storage_offset() + last + 1) * t.element_size() <= t.untyped_storage().nbytes()


def can_meet(t: Tensor) -> bool:
    """Whether other tensors may share a tensor's memory: it is where its address says, and there."""
    return has_memory(t) and is_backed(t)


def _ends(t: Tensor) -> tuple[int, int]:
    """The bytes that a tensor's elements lie in, as addresses: [first, last)."""
    reach = [stride * (size - 1) for size, stride in zip(t.shape, t.stride(), strict=True)]
    low, high = sum(x for x in reach if x < 0), sum(x for x in reach if x > 0)
    size = t.element_size()
    return t.data_ptr() + low * size, t.data_ptr() + (high + 1) * size


def _terms(t: Tensor, sign: int) -> list[_Term]:
    found = []
    for size, stride in zip(t.shape, t.stride(), strict=True):
        if size > 1 and stride != 0:
            most = size - 1
            found.append((abs(stride) * t.element_size(), *((-most, 0) if stride * sign < 0 else (0, most))))
    return found


def _merged(terms: list[_Term]) -> list[_Term]:
    by_stride: dict[int, tuple[int, int]] = {}
    for stride, least, most in terms:
        a, b = by_stride.get(stride, (0, 0))
        by_stride[stride] = a + least, b + most
    return [(stride, *by_stride[stride]) for stride in sorted(by_stride, reverse=True)]


def _reaches(terms: list[_Term], low: int, high: int, moves: bool) -> bool:
    """Whether the terms can come to a sum in [low, high], not all of them 0 if ``moves``."""
    below = [(0, 0)]  # what the terms from each on can come to
    for stride, least, most in reversed(terms):
        below.append((below[-1][0] + stride * least, below[-1][1] + stride * most))
    below.reverse()
    waiting = [(0, low, high, False)]
    for _ in range(_WORK):
        if not waiting:
            return False
        i, low, high, moved = waiting.pop()
        if high < below[i][0] or low > below[i][1]:
            continue
        if i == len(terms):
            if moved or not moves:
                return True
            continue
        stride, least, most = terms[i]
        first = max(least, -((below[i + 1][1] - low) // stride))
        last = min(most, (high - below[i + 1][0]) // stride)
        waiting += [(i + 1, low - n * stride, high - n * stride, moved or n != 0) for n in range(first, last + 1)]
    return True


def revisits(t: Tensor) -> bool:
    """Whether two elements of a strided tensor share a byte, as after ``expand()``."""
    if t.numel() == 0 or t.is_contiguous():
        return False
    low, high = _ends(t)
    zero = any(stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride(), strict=True))
    if zero or t.numel() > (high - low) // t.element_size():
        return True
    terms = [(stride, least - most, most - least) for stride, least, most in _terms(t, 1)]
    merged = _merged(terms)
    return len(merged) < len(terms) or _reaches(merged, 1 - t.element_size(), t.element_size() - 1, True)


def refuse_unwritable(where: str, grads: Sequence[Tensor]) -> None:
    """Raises RuntimeError where a gradient that is to be changed in place can not be, or shares memory with itself."""
    for i, g in enumerate(grads):
        what = f"{where}: gradient {i} (shape {list(g.shape)})"
        fix = "so they can not be changed in place; give it memory of its own: p.grad = p.grad.clone()"
        if has_memory(g) and revisits(g):
            raise RuntimeError(f"{what}: its elements share memory with one another (as after expand()), {fix}")
        if g._is_zerotensor():
            raise RuntimeError(f"{what}: its elements have no memory, as it is a zero tensor, {fix}")
        if g.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(f"{what}: its elements were made in torch.inference_mode(), {fix}")


def share(a: Tensor, b: Tensor) -> bool:
    """Whether two strided tensors of which none is empty share a byte."""
    apart = b.data_ptr() - a.data_ptr()
    terms = _merged(_terms(a, 1) + _terms(b, -1))
    return _reaches(terms, apart - a.element_size() + 1, apart + b.element_size() - 1, False)


def pairs(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Each pair of strided tensors that share memory, by their places in the list, and those that :func:`revisits`."""
    spans = sorted((*_ends(t), i) for i, t in enumerate(tensors) if t.numel() > 0)
    for n, (_, high, i) in enumerate(spans):
        if revisits(tensors[i]):
            yield i, i
        for m in range(n + 1, len(spans)):
            low, _, j = spans[m]
            if low >= high:
                break
            if tensors[i].device == tensors[j].device and share(tensors[i], tensors[j]):
                yield min(i, j), max(i, j)
