"""Optimizers for training generative models with PyTorch: ``torch.optim``'s classes on native kernels.

Change one line, ``from genopt_ext import optim`` instead of ``from torch import optim``.
"""

from . import optim as optim

__version__ = "0.1.0"
__all__ = ["__version__", "optim"]
