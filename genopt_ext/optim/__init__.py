"""``torch.optim`` with native kernels: five classes are ours, every other name passes through to torch."""

import sys as _sys
from typing import Any

import torch.optim as _torch_optim
from torch.optim import *  # noqa: F403

from .adagrad import Adagrad as Adagrad
from .adam import Adam as Adam
from .adam import AdamW as AdamW
from .rmsprop import RMSprop as RMSprop
from .sgd import SGD as SGD

OURS = ("Adagrad", "Adam", "AdamW", "RMSprop", "SGD")
__all__ = sorted({*getattr(_torch_optim, "__all__", ()), *OURS})  # noqa: PLE0605

# So that `from genopt_ext.optim.lr_scheduler import StepLR` works as it does with torch.
for _name in ("lr_scheduler", "swa_utils"):
    _sys.modules[f"{__name__}.{_name}"] = getattr(_torch_optim, _name)


def __getattr__(name: str) -> Any:
    return getattr(_torch_optim, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch_optim)})
