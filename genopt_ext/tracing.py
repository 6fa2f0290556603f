"""What torch's tracers see of an optimizer: Dynamo one opaque call, dispatch modes plain torch operations.

While a mode records operations (``make_fx``) or imitates them (``FakeTensorMode``), and on the ``meta`` device, no
number can be read from a tensor: the reference then computes with 0-dim tensors where it has floats otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

F = TypeVar("F", bound=Callable[..., Any])

PLAIN = (Tensor, torch.nn.Parameter)  # types without a dispatch of their own

Number = float | Tensor  # a tensor is 0-dim, and where it is not known yet, of float64


def opaque(function: F) -> F:
    """``function``, into which Dynamo does not look: one graph break, and no guards on what it reads.

    Outside of :func:`torch.compile` it costs some 100 ns, a fifth of ``torch.compiler.disable``.
    """
    hidden = _disable_dynamo(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Named through torch: Dynamo passes over a frame that names nothing of torch, and would look into the next.
        return (hidden if torch.compiler.is_dynamo_compiling() else function)(*args, **kwargs)

    return cast(F, call)


def _is_traced() -> bool:
    keys = torch._C._TorchDispatchModeKey
    if torch._C._len_torch_dispatch_stack() > 0:  # mostly there is no mode, and each look-up takes time
        for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL):
            if torch._C._get_dispatch_mode(key) is not None:
                return True
    for key in (keys.PROXY, keys.FUNCTIONAL):
        if torch._ops._get_dispatch_mode_pre_dispatch(key) is not None:
            return True
    return False


def _is_imitation(t: Tensor) -> bool:
    return isinstance(t, (FakeTensor, FunctionalTensor))


def has_number(t: Tensor) -> bool:
    """Whether the number in a 0-dim tensor is there to be read, as ever but under the modes."""
    return not (t.is_meta or _is_imitation(t) or _is_traced())


def number(t: Tensor) -> Number:
    """The number in ``t``, or ``t`` in float64."""
    return t.item() if has_number(t) else t.detach().double()


def is_subclass(t: Tensor) -> bool:
    """Whether a tensor has, or may have, a dispatch of its own, as DTensor."""
    return type(t) not in PLAIN and not _is_imitation(t)
