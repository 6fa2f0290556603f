"""Whether what is timed is right: our kernels against the reference's bits, all subjects against torch in fp32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import genopt_ext
from genopt_ext import quant

from .cases import BLOCK, Case
from .rounds import Made, around, forget, parameters, values
from .subjects import CODES, MANY, ours, ours_reference, torch_class


def check(case: Case, device: str) -> None:
    """Our kernels give the reference's bits on a small copy of the case.

    Raises:
        AssertionError: they do not.
    """
    shapes = tuple((min(math.prod(shape), 5000),) for shape in case.shapes[:50])
    if case.kind in CODES:
        x = torch.randn(min(case.elements, 5000), generator=torch.Generator().manual_seed(0)).to(device)
        q = quant.quantize(x, scheme="block", block_size=BLOCK)
        error = (quant.dequantize(q) - x).abs().view(-1)
        if not (error <= q.scale.repeat_interleave(BLOCK)[: len(error)] * 0.5001).all():
            raise AssertionError(f"{case.name}: an error of more than half a scale")
    elif case.kind == "clip":
        params = parameters(case, device, shapes)
        norm = genopt_ext.get_total_norm([p.grad.double() for p in params if p.grad is not None])
        torch.testing.assert_close(genopt_ext.clip_grad_norm_(params, 1.0).double(), norm, rtol=1e-6, atol=0)
    else:
        results = []
        for backend in ("auto", "reference"):
            params = parameters(case, device, shapes)
            run = around(case, ours(case, params, backend=backend), params, True)
            run()
            run()
            results.append(params)
        for p, q in zip(*results, strict=True):
            if not torch.equal(p, q):
                raise AssertionError(f"{case.name}: kernels and reference differ")
    forget()


def expected(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Where the parameters begin, and by how much two steps in fp32 move them: torch's, or of our reference without."""
    wide = [p.float() for p in values(case.shapes, case.dtype, device)[0]]
    params = [torch.nn.Parameter(p.clone()) for p in wide]
    for p, grad in zip(params, values(case.shapes, case.dtype, device)[1], strict=True):
        p.grad = grad.float()
    foreach = len(params) > MANY
    theirs = None if "cautious" in case.kwargs else torch_class(case)
    opt = theirs(params, foreach=foreach, **case.kwargs) if theirs else ours_reference(case, params)
    for _ in range(2):
        if case.clip is not None:
            torch.nn.utils.clip_grad_norm_(params, case.clip)
        opt.step()
    begin = torch.cat([p.view(-1) for p in wide])
    return begin, torch.cat([p.detach().view(-1) for p in params]) - begin


def wrong_by(made: Made, begin: Tensor, moved: Tensor) -> float:
    """The error of two steps, of what they should have moved."""
    assert made.params is not None
    now = torch.cat([p.detach().float().view(-1) for p in made.params])
    return float((now - begin - moved).norm() / moved.norm())


def tolerance(case: Case) -> float:
    """Error of two steps, of what they move: state in 8 bits, weights of 16 bits, and what only rounds elsewhere."""
    if torch.int8 in (case.state, case.dtype):
        return 0.3
    return 0.01 if case.dtype == torch.float32 and case.state is None else 0.2
