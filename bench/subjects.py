"""Who takes part: ours, torch's own implementations, and other packages where they are installed.

A subject makes an optimizer for a case. One that has no such optimizer is no subject of the case; one that would have
but is not installed, or does not run here, is absent and says why.
"""

from __future__ import annotations

import importlib
import io
import itertools
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import genopt_ext
from genopt_ext import optim, quant

from .cases import BLOCK, Case, short
from .method import OURS, Run
from .training import LR, Training

Params = list[torch.nn.Parameter]
Make = Callable[[Case, Params], "torch.optim.Optimizer | None"]
MANY = 5000  # tensors, from which on a loop in Python is too slow to wait for
OWN_CODES = "its own codes"
SHAPES = 4  # from so many shapes on, what compiles each one takes minutes


class Absent(Exception):
    """Why a subject can not take part."""


@dataclass(frozen=True)
class Subject:
    """``make`` returns None where the subject has no such optimizer."""

    name: str
    make: Make
    about: str
    default: bool = True
    package: str = ""
    kinds: tuple[str, ...] = ("step",)

    def why_absent(self) -> str:
        """Empty where the package can be imported."""
        try:
            package(self.package or "torch")
        except Absent as absent:
            return str(absent)
        return ""


@dataclass
class Made:
    """A subject in a case, ready to run."""

    run: Run
    optimizer: torch.optim.Optimizer | None = None
    params: Params | None = None
    training: Training | None = None


@lru_cache(maxsize=16)
def package(name: str) -> Any:
    """The module.

    Raises:
        Absent: it can not be imported.
    """
    logging.getLogger("torchao").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception as error:  # what a package's own import raises is its own
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        missing = f"No module named '{name.split('.')[0]}'" == text
        raise Absent("not installed" if missing else f"can not be imported: {text}") from None


def storage(value: Tensor) -> list[Tensor]:
    """The plain tensors that a state tensor is made of: torchao's are subclasses."""
    if hasattr(value, "__tensor_flatten__"):
        return [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    return [value]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the optimizer's state; what parameters share (a code book) counts once."""
    tensors = [
        t for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.numel() for t in storage(v)
    ]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


# --- optimizers ---------------------------------------------------------------------------------------------------


def nothing(case: Case, params: Params) -> None:
    """Of those that only quantize."""


def ours(case: Case, params: Params, **more: Any) -> torch.optim.Optimizer:
    return getattr(optim, case.optimizer)(params, **case.kwargs, **(case.ours | more))


def ours_int8(case: Case, params: Params) -> torch.optim.Optimizer:
    return ours(case, params, state_dtype=torch.int8)


def ours_reference(case: Case, params: Params) -> torch.optim.Optimizer:
    return ours(case, params, backend="reference")


def torchs(**variant: Any) -> Make:
    def make(case: Case, params: Params) -> torch.optim.Optimizer | None:
        fused = variant.get("fused")
        # Where torch has nothing that stores as the case asks, its best stands for what its users get instead.
        if differs(case) and not (fused or (variant.get("foreach") and case.optimizer == "RMSprop")):
            return None
        if fused and case.optimizer == "RMSprop":
            return None
        if variant.get("foreach") is False and len(params) > MANY:
            raise Absent(f"too slow with {len(params)} tensors")
        try:
            return getattr(torch.optim, case.optimizer)(params, **case.kwargs, **variant)
        except (RuntimeError, TypeError) as error:  # not every torch has fused Adagrad on CUDA
            raise Absent(str(error).splitlines()[0]) from None

    return make


def compiled(case: Case, params: Params) -> torch.optim.Optimizer | None:
    if differs(case):
        return None
    if len(params) > SHAPES:
        raise Absent(f"compiling a step of {len(params)} tensors takes minutes")
    # A number would be compiled in, and compiled again when a schedule changes it.
    lr = torch.tensor(1e-2 if case.optimizer in ("RMSprop", "Adagrad") else 1e-3, device=params[0].device)
    return getattr(torch.optim, case.optimizer)(params, lr=lr, foreach=False, **case.kwargs)


def differs(case: Case) -> str:
    """How torch's state differs from what the case asks for; empty where it does not."""
    if case.rounding == "kahan":
        return "no compensation"
    if case.master:
        return "no master weights"
    if case.state not in (None, case.dtype):
        return f"{short(case.dtype)} moments"
    return "rounds to nearest" if case.rounding != "nearest" else ""


def bitsandbytes(case: Case, params: Params) -> torch.optim.Optimizer | None:
    if case.state != torch.int8:
        return None
    make = getattr(package("bitsandbytes.optim"), case.optimizer + "8bit")
    return make(params, **case.kwargs, min_8bit_size=1)


def torchao(case: Case, params: Params) -> torch.optim.Optimizer | None:
    if case.state != torch.int8 or case.optimizer not in ("Adam", "AdamW"):
        return None
    make = getattr(package("torchao.optim"), case.optimizer + "8bit")
    if any(p.numel() < 4096 or p.numel() % BLOCK for p in params):
        raise Absent("keeps fp32 state where a tensor has less than 4096 elements, or no multiple of 256")
    if len({p.shape for p in params}) > SHAPES:
        raise Absent("compiles for every shape, which takes minutes")
    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")
    return make(params, **case.kwargs)


def optimi(case: Case, params: Params) -> torch.optim.Optimizer | None:
    """Its moments have the parameter's dtype; compensated it is in bf16 unless told."""
    if case.optimizer not in ("Adam", "AdamW", "SGD") or case.state is not None or case.master:
        return None
    if case.rounding == "stochastic":
        return None
    options: dict[str, Any] = {"torch_init": True} if case.optimizer == "SGD" else {"betas": (0.9, 0.999), "eps": 1e-8}
    if case.optimizer == "AdamW":
        options["weight_decay"] = 1e-2
    kahan = case.rounding == "kahan"
    return getattr(package("optimi"), case.optimizer)(params, lr=1e-3, kahan_sum=kahan, **options, **case.kwargs)


def flashoptim(case: Case, params: Params) -> torch.optim.Optimizer | None:
    """8-bit state, or fp32 state beside master weights."""
    if case.optimizer not in ("Adam", "AdamW") or not (case.state == torch.int8 or case.master):
        return None
    make = getattr(package("flashoptim"), "Flash" + case.optimizer)
    try:
        master = 32 if case.master else None
        return make(params, quantize=case.state == torch.int8, master_weight_bits=master, **case.kwargs)
    except NotImplementedError as error:
        raise Absent(str(error)) from None


def deepspeed(case: Case, params: Params) -> torch.optim.Optimizer | None:
    """Compiles itself when it is first used, which takes a minute."""
    if case.optimizer not in ("Adam", "AdamW") or case.state not in (None, torch.float32) or case.master:
        return None
    if case.rounding != "nearest" or params[0].device.type != "cpu":
        return None
    module = package("deepspeed.ops.adam")
    try:
        return module.DeepSpeedCPUAdam(
            params,
            weight_decay=1e-2 if case.optimizer == "AdamW" else 0.0,
            adamw_mode=case.optimizer == "AdamW",
            fp32_optimizer_states=torch.float32 in (case.state, case.dtype),
            **case.kwargs,
        )
    except Exception as error:  # whatever its compiler says
        raise Absent(f"does not build here: {str(error).splitlines()[0]}") from None


# --- what a round does --------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _values(shapes: Any, dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Weights, as large as they are in models, and gradients: the same for all subjects."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(size: float) -> list[Tensor]:
        return [(size * torch.randn(shape, generator=generator, device=device)).to(dtype) for shape in shapes]

    return draw(0.02), draw(1.0)


def forget() -> None:
    """Frees what the subjects of a case share."""
    _values.cache_clear()


def parameters(case: Case, device: str = "cpu", shapes: Any = None) -> Params:
    """Parameters with gradients."""
    params = []
    weights, grads = _values(shapes or case.shapes, case.dtype, device)
    for weight, grad in zip(weights, grads, strict=True):
        p = torch.nn.Parameter(weight.clone())
        p.grad = grad.clone()
        params.append(p)
    return params


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
    return Made(run, opt, params)


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

_CHECKPOINT, _TRAINING = ("save", "load"), ("training",)
_CODES = ("quantize", "dequantize")
_ALL = ("step", *_CHECKPOINT, *_TRAINING)
SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject(OURS, ours, "ours, with the state that the case asks for", kinds=(*_ALL, "clip", *_CODES)),
        Subject(OURS + " int8", ours_int8, "ours, moments in 8 bits", kinds=(*_CHECKPOINT, *_TRAINING)),
        Subject(OURS + " reference", ours_reference, "our plain-torch reference; only on demand", default=False),
        Subject("torch fused", torchs(fused=True), "torch.optim, fused=True", kinds=_ALL),
        Subject(
            "torch foreach",
            torchs(foreach=True),
            "torch.optim, foreach=True; torch's own",
            kinds=("step", *_TRAINING, "clip"),
        ),
        Subject("torch for-loop", torchs(foreach=False), "torch.optim, a loop over tensors"),
        Subject("torch per tensor", nothing, "torch.quantize_per_tensor and dequantize", kinds=_CODES),
        Subject("torch compiled", compiled, "torch.compile of torch's loop", kinds=("step", *_CODES)),
        Subject("bitsandbytes", bitsandbytes, "8-bit classes", package="bitsandbytes.optim", kinds=("step", *_CODES)),
        Subject("torchao", torchao, "8-bit classes", package="torchao.optim"),
        Subject("optimi", optimi, "Adam, AdamW, SGD; compensated bf16", package="optimi"),
        Subject("flashoptim", flashoptim, "8-bit state or master weights, CUDA alone", package="flashoptim"),
        Subject("DeepSpeed CPUAdam", deepspeed, "Adam, AdamW on a CPU", package="deepspeed.ops.adam"),
    )
}


def make(name: str, case: Case, device: str) -> Made | None:
    """None: not a subject of the case.

    Raises:
        Absent: it would be one, but can not run here.
    """
    subject = SUBJECTS[name]
    return KINDS[case.kind](subject, case, device) if case.kind in subject.kinds else None


def other(name: str, case: Case) -> str:
    """In which way the subject's arithmetic is not the case's; empty where it is the same."""
    if name == OURS + " int8":
        return "int8 moments"
    if name in ("bitsandbytes", "torchao", "flashoptim") and (case.kind in _CODES or case.state == torch.int8):
        return OWN_CODES
    if case.kind in _CODES:
        return "one scale for all" if name == "torch per tensor" else ""
    return differs(case) if case.kind in ("step", *_CHECKPOINT) and name.startswith("torch ") else ""


def rotating(runs: list[Run]) -> Run:
    """Each call is the next one's turn."""
    if len(runs) == 1:
        return runs[0]
    following = itertools.cycle(runs).__next__
    return lambda: following()()


def check(case: Case, device: str) -> None:
    """Our kernels give the reference's bits on a small copy of the case.

    Raises:
        AssertionError: they do not.
    """
    shapes = tuple((min(math.prod(shape), 5000),) for shape in case.shapes[:50])
    if case.kind in _CODES:
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
    """Where the parameters begin, and by how much torch's loop in fp32 moves them in two steps."""
    wide = [p.float() for p in _values(case.shapes, case.dtype, device)[0]]
    params = [torch.nn.Parameter(p.clone()) for p in wide]
    for p, grad in zip(params, _values(case.shapes, case.dtype, device)[1], strict=True):
        p.grad = grad.float()
    foreach = len(params) > MANY
    opt = getattr(torch.optim, case.optimizer)(params, foreach=foreach, **case.kwargs)
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
