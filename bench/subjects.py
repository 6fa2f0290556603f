"""Who takes part: ours, torch's own implementations, and other packages where they are installed.

A subject makes an optimizer for a case. One that has no such optimizer is no subject of the case; one that would have
but is not installed, or does not run here, is absent and says why.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from genopt_ext import optim

from .cases import BLOCK, Case, short
from .method import OURS
from .packages import Absent, eight_bit, package

Params = list[torch.nn.Parameter]
Make = Callable[[Case, Params], "torch.optim.Optimizer | None"]
MANY = 5000  # tensors, from which on a loop in Python is too slow to wait for
OWN_CODES = "its own codes"
SHAPES = 4  # from so many shapes on, what compiles each one takes minutes


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


def nothing(case: Case, params: Params) -> None:
    """Of those that only quantize."""


def torch_class(case: Case) -> type[torch.optim.Optimizer] | None:
    return getattr(torch.optim, case.optimizer, None)


def ours(case: Case, params: Params, **more: Any) -> torch.optim.Optimizer:
    made = getattr(optim, case.optimizer)(params, **case.kwargs, **(case.ours | more))
    if hasattr(made, "train"):  # it begins in evaluation
        made.train()
    return made


def ours_int8(case: Case, params: Params) -> torch.optim.Optimizer:
    return ours(case, params, state_dtype=torch.int8)


def ours_reference(case: Case, params: Params) -> torch.optim.Optimizer:
    return ours(case, params, backend="reference")


def torchs(**variant: Any) -> Make:
    def make(case: Case, params: Params) -> torch.optim.Optimizer | None:
        fused, theirs = variant.get("fused"), torch_class(case)
        if theirs is None or (fused and "fused" not in inspect.signature(theirs).parameters):
            return None
        # Where torch has nothing that stores as the case asks, its best stands for what its users get instead.
        if differs(case) and not (fused or (variant.get("foreach") and case.optimizer == "RMSprop")):
            return None
        if variant.get("foreach") is False and len(params) > MANY:
            raise Absent(f"too slow with {len(params)} tensors")
        try:
            options = variant | ({"capturable": True} if case.graph and params[0].is_cuda else {})
            return theirs(params, **{name: x for name, x in case.kwargs.items() if name != "cautious"}, **options)
        except (RuntimeError, TypeError) as error:  # not every torch has fused Adagrad on CUDA
            raise Absent(str(error).splitlines()[0]) from None

    return make


def compiled(case: Case, params: Params) -> torch.optim.Optimizer | None:
    theirs = torch_class(case)
    if differs(case) or theirs is None or theirs is torch.optim.Rprop:  # which takes a number alone
        return None
    if len(params) > SHAPES:
        raise Absent(f"compiling a step of {len(params)} tensors takes minutes")
    # A number would be compiled in, and compiled again when a schedule changes it.
    lr = torch.tensor(inspect.signature(theirs).parameters["lr"].default, device=params[0].device)
    return theirs(params, lr=lr, foreach=False, **case.kwargs)


def differs(case: Case) -> str:
    """How torch's step differs from what the case asks for; empty where it does not."""
    if "cautious" in case.kwargs:
        return "not cautious"
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
    return eight_bit("bitsandbytes.optim", case.optimizer)(params, **case.kwargs, min_8bit_size=1)


def torchao(case: Case, params: Params) -> torch.optim.Optimizer | None:
    if case.state != torch.int8 or case.optimizer not in ("Adam", "AdamW"):
        return None
    make = eight_bit("torchao.optim", case.optimizer)
    if any(p.numel() < 4096 or p.numel() % BLOCK for p in params):
        raise Absent("keeps fp32 state where a tensor has less than 4096 elements, or no multiple of 256")
    if len({p.shape for p in params}) > SHAPES:
        raise Absent("compiles for every shape, which takes minutes")
    return make(params, **case.kwargs)


def optimi(case: Case, params: Params) -> torch.optim.Optimizer | None:
    """Its moments have the parameter's dtype; compensated it is in bf16 unless told."""
    if case.optimizer not in ("Adam", "AdamW", "SGD") or case.state is not None or case.master:
        return None
    if case.rounding == "stochastic" or "cautious" in case.kwargs:
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
    if case.rounding != "nearest" or params[0].device.type != "cpu" or "cautious" in case.kwargs:
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


_CHECKPOINT, _TRAINING = ("save", "load"), ("training",)
CODES = ("quantize", "dequantize")
_ALL = ("step", *_CHECKPOINT, *_TRAINING)
SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject(OURS, ours, "ours, with the state that the case asks for", kinds=(*_ALL, "clip", *CODES)),
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
        Subject("torch per tensor", nothing, "torch.quantize_per_tensor and dequantize", kinds=CODES),
        Subject("torch compiled", compiled, "torch.compile of torch's loop", kinds=("step", *CODES)),
        Subject("bitsandbytes", bitsandbytes, "8-bit classes", package="bitsandbytes.optim", kinds=("step", *CODES)),
        Subject("torchao", torchao, "8-bit classes", package="torchao.optim"),
        Subject("optimi", optimi, "Adam, AdamW, SGD; compensated bf16", package="optimi"),
        Subject("flashoptim", flashoptim, "8-bit state or master weights, CUDA alone", package="flashoptim"),
        Subject("DeepSpeed CPUAdam", deepspeed, "Adam, AdamW on a CPU", package="deepspeed.ops.adam"),
    )
}


def other(name: str, case: Case) -> str:
    """In which way the subject's arithmetic is not the case's; empty where it is the same."""
    if name == OURS + " int8":
        return "int8 moments"
    if name in ("bitsandbytes", "torchao", "flashoptim") and (case.kind in CODES or case.state == torch.int8):
        return OWN_CODES
    if case.kind in CODES:
        return "one scale for all" if name == "torch per tensor" else ""
    return differs(case) if case.kind in ("step", *_CHECKPOINT) and name.startswith("torch ") else ""
