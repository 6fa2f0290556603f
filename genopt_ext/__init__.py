"""Optimizers for training generative models with PyTorch: ``torch.optim``'s classes on native kernels.

Change one line, ``from genopt_ext import optim`` instead of ``from torch import optim``.
"""

from . import optim as optim
from . import quant as quant
from . import training as training
from .amp import GradScaler
from .clip import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from .in_backward import InBackward, step_in_backward

__version__ = "0.1.0"
__all__ = [
    "GradScaler",
    "InBackward",
    "__version__",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "optim",
    "quant",
    "step_in_backward",
    "training",
]
