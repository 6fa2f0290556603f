"""``torch.optim`` with native kernels: the elementwise classes are ours, every other name passes through to torch."""

import sys as _sys
from typing import Any

import torch.optim as _torch_optim
from torch.optim import *  # noqa: F403

from .adadelta import Adadelta as Adadelta
from .adadelta import Adadelta8bit as Adadelta8bit
from .adafactor import Adafactor as Adafactor
from .adagrad import Adagrad as Adagrad
from .adagrad import Adagrad8bit as Adagrad8bit
from .adam import Adam as Adam
from .adam import Adam8bit as Adam8bit
from .adam import AdamW as AdamW
from .adam import AdamW8bit as AdamW8bit
from .adamax import Adamax as Adamax
from .adamax import Adamax8bit as Adamax8bit
from .adamw_schedule_free import AdamWScheduleFree as AdamWScheduleFree
from .adamw_schedule_free import AdamWScheduleFree8bit as AdamWScheduleFree8bit
from .adan import Adan as Adan
from .adan import Adan8bit as Adan8bit
from .ademamix import AdEMAMix as AdEMAMix
from .ademamix import AdEMAMix8bit as AdEMAMix8bit
from .adopt import ADOPT as ADOPT
from .adopt import ADOPT8bit as ADOPT8bit
from .asgd import ASGD as ASGD
from .asgd import ASGD8bit as ASGD8bit
from .lamb import LAMB as LAMB
from .lamb import LAMB8bit as LAMB8bit
from .lars import LARS as LARS
from .lars import LARS8bit as LARS8bit
from .lion import Lion as Lion
from .lion import Lion8bit as Lion8bit
from .muon import Muon as Muon
from .nadam import NAdam as NAdam
from .nadam import NAdam8bit as NAdam8bit
from .prodigy import Prodigy as Prodigy
from .prodigy import Prodigy8bit as Prodigy8bit
from .radam import RAdam as RAdam
from .radam import RAdam8bit as RAdam8bit
from .radam_schedule_free import RAdamScheduleFree as RAdamScheduleFree
from .radam_schedule_free import RAdamScheduleFree8bit as RAdamScheduleFree8bit
from .rmsprop import RMSprop as RMSprop
from .rmsprop import RMSprop8bit as RMSprop8bit
from .rprop import Rprop as Rprop
from .rprop import Rprop8bit as Rprop8bit
from .sgd import SGD as SGD
from .sgd import SGD8bit as SGD8bit
from .sgd_schedule_free import SGDScheduleFree as SGDScheduleFree
from .stable_adamw import StableAdamW as StableAdamW
from .stable_adamw import StableAdamW8bit as StableAdamW8bit

# The elementwise ones: Muon is two rules, and products between them.
_classes = {
    name: each
    for name, each in list(globals().items())
    if isinstance(each, type) and hasattr(each, "rule") and each is not Muon
}
EIGHT_BIT = tuple(name for name in _classes if name.endswith("8bit"))  # the others with state_dtype=torch.int8
OURS = tuple(name for name in _classes if name not in EIGHT_BIT)
TORCHS = tuple(name for name in OURS if _classes[name].rule.torch_class is not None)  # of these, which torch has too
__all__ = sorted({*getattr(_torch_optim, "__all__", ()), *_classes, "Muon"})  # noqa: PLE0605

# So that `from genopt_ext.optim.lr_scheduler import StepLR` works as it does with torch.
for _name in ("lr_scheduler", "swa_utils"):
    _sys.modules[f"{__name__}.{_name}"] = getattr(_torch_optim, _name)


def __getattr__(name: str) -> Any:
    return getattr(_torch_optim, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch_optim)})
