"""What torch's tracers see of an optimizer: Dynamo one opaque call, dispatch modes plain torch operations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch._compile import _disable_dynamo

F = TypeVar("F", bound=Callable[..., Any])


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
