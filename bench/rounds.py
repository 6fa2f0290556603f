"""What a round of each kind of case does: a step with what surrounds it, clipping, quantizing, checkpoints, training.

``make`` makes a subject ready to run such rounds.
"""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import genopt_ext
from genopt_ext import quant

from .cases import BLOCK, Case
from .method import OURS, Run
from .packages import package
from .subjects import SUBJECTS, Params, Subject, compiled
from .training import LR, Training


@dataclass
class Made:
    """A subject in a case, ready to run."""

    run: Run
    optimizer: torch.optim.Optimizer | None = None
    params: Params | None = None
    training: Training | None = None


@lru_cache(maxsize=1)
def values(shapes: Any, dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Weights, as large as they are in models, and gradients: the same for all subjects."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(size: float) -> list[Tensor]:
        return [(size * torch.randn(shape, generator=generator, device=device)).to(dtype) for shape in shapes]

    return draw(0.02), draw(1.0)


def forget() -> None:
    """Frees what the subjects of a case share."""
    values.cache_clear()


def parameters(case: Case, device: str = "cpu", shapes: Any = None) -> Params:
    """Parameters with gradients."""
    params = []
    weights, grads = values(shapes or case.shapes, case.dtype, device)
    for weight, grad in zip(weights, grads, strict=True):
        p = torch.nn.Parameter(copied(weight, case.offset))
        if case.gradients:
            p.grad = copied(grad, case.offset)
        params.append(p)
    return params


def copied(source: Tensor, offset: int) -> Tensor:
    """A copy that begins so many elements behind its allocation."""
    room = torch.empty(source.numel() + offset, dtype=source.dtype, device=source.device)
    return room[offset:].view(source.shape).copy_(source)


def around(case: Case, opt: torch.optim.Optimizer, params: Params, own: bool) -> Run:
    """The step with what a training loop does around it. ``own``: ours does it within the step."""
    device = params[0].device.type
    scaler = None
    if case.amp:
        scaler = (genopt_ext if own else torch.amp).GradScaler(device, init_scale=1.0)
        scaler.scale(torch.zeros((), device=device))  # makes the scale
    if scaler is None and (own or (case.clip is None and case.ema is None)):
        return opt.step
    averages = [p.detach().clone() for p in params] if case.ema is not None and not own else []

    def run() -> None:
        if case.clip is not None and not own:
            if scaler is not None:
                scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(params, case.clip)
        if scaler is None:
            opt.step()
        else:
            scaler.step(opt)
            scaler.update()
        if averages:  # as AveragedModel's get_ema_multi_avg_fn
            with torch.no_grad():
                torch._foreach_lerp_(averages, params, 1.0 - case.ema)

    return run


def stepping(subject: Subject, case: Case, device: str) -> Made | None:
    params = parameters(case, device)
    opt = subject.make(case, params)
    if opt is None:
        return None
    run = around(case, opt, params, subject.name.startswith(OURS))
    if subject.make is compiled:
        run = torch.compile(run)
    if case.graph and device.startswith("cuda"):
        run = replaying(run)
    return Made(run, opt, params)


def replaying(run: Run) -> Run:
    """The first call is a step, which makes the state, and captures one; each later call replays that."""
    graphs: list[torch.cuda.CUDAGraph] = []

    def step() -> None:
        if graphs:
            graphs[0].replay()
            return
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graphs.append(graph)

    return step


def clipping(subject: Subject, case: Case, device: str) -> Made | None:
    """With a bound that no norm reaches, so that nothing is written."""
    clips: dict[str, Any] = {OURS: genopt_ext.clip_grad_norm_, "torch foreach": torch.nn.utils.clip_grad_norm_}
    if subject.name not in clips:
        return None
    params, clip = parameters(case, device), clips[subject.name]
    return Made(lambda: clip(params, 1e9))


def quantizing(subject: Subject, case: Case, device: str) -> Made | None:
    """int8 in blocks of 256 into tensors that are there, where the subject can; and back."""
    forth = case.kind == "quantize"
    x = torch.randn(case.elements, generator=torch.Generator(device).manual_seed(0), device=device)
    if subject.name == OURS:
        q = quant.quantize(x, scheme="block", block_size=BLOCK)
        if forth:
            return Made(lambda: quant.quantize(x, scheme="block", block_size=BLOCK, nonfinite="propagate", out=q))
        return Made(lambda: quant.dequantize(q, out=x))
    if subject.name == "bitsandbytes":
        functional = package("bitsandbytes.functional")
        codes, state = functional.quantize_blockwise(x, blocksize=BLOCK)
        if forth:
            absmax, code = state.absmax, state.code
            return Made(lambda: functional.quantize_blockwise(x, code=code, absmax=absmax, out=codes, blocksize=BLOCK))
        return Made(lambda: functional.dequantize_blockwise(codes, quant_state=state, out=x, blocksize=BLOCK))
    if subject.name == "torch compiled":
        n = case.elements // BLOCK * BLOCK
        blocks = x[:n].view(-1, BLOCK)
        scale = blocks.abs().amax(1) / 127
        codes = torch.empty(blocks.shape, dtype=torch.int8, device=device)

        def quantize() -> None:
            new = blocks.abs().amax(1) / 127
            codes.copy_((blocks / new[:, None]).round().clamp(-127, 127).to(torch.int8))
            scale.copy_(new)

        def dequantize() -> None:
            blocks.copy_(codes * scale[:, None])

        return Made(torch.compile(quantize if forth else dequantize))
    if subject.name == "torch per tensor" and device == "cpu":  # one scale for all, the only one torch has natively
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated
            theirs = torch.quantize_per_tensor(x, 0.05, 0, torch.qint8)
        return Made((lambda: torch.quantize_per_tensor(x, 0.05, 0, torch.qint8)) if forth else theirs.dequantize)
    return None


def saving(subject: Subject, case: Case, device: str) -> Made | None:
    """``state_dict`` and ``torch.save`` into memory, or the way back."""
    params = parameters(case, device)
    opt = subject.make(case, params)
    if opt is None:
        return None
    opt.step()
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)

    def save() -> None:
        torch.save(opt.state_dict(), io.BytesIO())

    def load() -> None:
        file.seek(0)
        opt.load_state_dict(torch.load(file, weights_only=True))

    return Made(save if case.kind == "save" else load, opt, params)


def training(subject: Subject, case: Case, device: str) -> Made | None:
    made = Training(device)
    made.optimizer = subject.make(case, made.params)
    if made.optimizer is None:
        return None
    for group in made.optimizer.param_groups:
        group["lr"] = LR
    return Made(made.run, made.optimizer, made.params, made)


KINDS: dict[str, Callable[[Subject, Case, str], Made | None]] = {
    "step": stepping,
    "clip": clipping,
    "quantize": quantizing,
    "dequantize": quantizing,
    "save": saving,
    "load": saving,
    "training": training,
}


def make(name: str, case: Case, device: str) -> Made | None:
    """None: not a subject of the case.

    Raises:
        Absent: it would be one, but can not run here.
    """
    subject = SUBJECTS[name]
    return KINDS[case.kind](subject, case, device) if case.kind in subject.kinds else None


def rotating(runs: list[Run]) -> Run:
    """Each call is the next one's turn."""
    if len(runs) == 1:
        return runs[0]
    following = itertools.cycle(runs).__next__
    return lambda: following()()
