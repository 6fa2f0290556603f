"""Whole training steps of the demo's model, and what its losses are."""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from examples.train_gpt import GPT, batches, load_text, loss_of

SETTINGS = argparse.Namespace(context=64, batch=8, width=64, layers=2)
LR = 3e-3


def small_gpt(symbols: int) -> GPT:
    return GPT(symbols, SETTINGS.context, SETTINGS.width, SETTINGS.layers)


class Training:
    """``run`` is one training step, and keeps its loss in ``losses``; without an optimizer, forward and backward."""

    def __init__(self, device: str) -> None:
        ids, symbols = load_text()
        torch.manual_seed(0)
        self.model = small_gpt(symbols).to(device)
        self.params = list(self.model.parameters())
        self.batches: list[Tensor] = [batch.to(device) for batch in batches(ids, SETTINGS, 400, seed=0)]
        self.optimizer: torch.optim.Optimizer | None = None
        self.kept: list[Tensor] = []
        self.spent: list[float] = []

    def run(self) -> None:
        loss = loss_of(self.model, self.batches[len(self.kept) % len(self.batches)])
        self.model.zero_grad()
        loss.backward()
        if self.optimizer is not None:
            start = time.perf_counter()
            self.optimizer.step()
            self.spent.append(time.perf_counter() - start)
        self.kept.append(loss.detach())  # a number only when all is over: that would wait for the device

    @property
    def optimizer_seconds(self) -> float | None:
        """Of one step; None on a GPU, where the call returns before the step is done."""
        on_cpu = self.params[0].device.type == "cpu" and self.spent
        return statistics.median(self.spent) if on_cpu else None

    @property
    def losses(self) -> list[float]:
        return [float(loss) for loss in self.kept]
