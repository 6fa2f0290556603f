"""Small generative models for experiments with training: the demo's GPT, a VAE and a GAN on scikit-learn's digits.

A task trains with whatever optimizer it is handed and returns its losses. One seed fixes initial weights, batches and
every sample of noise, so that two optimizers differ in nothing but their arithmetic.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.train_gpt import GPT, batches, load_text, loss_of
from genopt_ext.optim.schedule_free import ScheduleFree

Make = Callable[..., torch.optim.Optimizer]
Observe = Callable[[int, nn.Module], None]  # called with the step and the model when gradients are there


@dataclass
class Training:
    """Losses by step, and the loss that counts (see each task), averaged over its evaluations at the end."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)

    @property
    def final(self) -> float:
        return statistics.fmean(self.evaluations)


def evaluated_at(step: int, steps: int) -> bool:
    """The last tenth of the training is evaluated at up to 10 steps: one evaluation alone is noisier."""
    left = steps - 1 - step
    return left < max(1, steps // 10) and left % max(1, steps // 100) == 0


def digits() -> tuple[Tensor, Tensor]:
    """Training images and held-out images, 1,437 and 360 rows of 64 grey values from 0 to 1."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[360:]], images[order[:360]]


def cosine(opt: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Warms up over a twentieth of the steps, then falls to a hundredth along a cosine."""

    def factor(step: int) -> float:
        warm = max(1, steps // 20)
        if step < warm:
            return (step + 1) / warm
        return 0.505 + 0.495 * float(torch.cos(torch.tensor(torch.pi * (step - warm) / max(1, steps - warm))))

    return torch.optim.lr_scheduler.LambdaLR(opt, factor)


def schedule_of(opt: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """``cosine``; classes without a schedule warm up over as many steps where they can, and begin to train."""
    if not isinstance(opt, ScheduleFree):
        return cosine(opt, steps)
    for group in opt.param_groups:
        if "warmup_steps" in group:
            group["warmup_steps"] = max(1, steps // 20)
    opt.train()
    return torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)


def evaluating(opt: torch.optim.Optimizer) -> contextlib.AbstractContextManager[None]:
    """Within it the model has the weights that training is for."""
    return opt.evaluating() if isinstance(opt, ScheduleFree) else contextlib.nullcontext()


class GPTTask:
    """Predicts the next character of Python's manual. What counts: cross entropy on held-out text."""

    name = "GPT"
    lr = {"AdamW": 3e-3, "RMSprop": 1e-3, "Adagrad": 2e-2}
    steps = 400

    def __init__(self, context: int = 64, batch: int = 8, width: int = 96, layers: int = 2) -> None:
        self.args = argparse.Namespace(context=context, batch=batch, width=width, layers=layers)
        self.ids, self.symbols = load_text()

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return GPT(self.symbols, self.args.context, self.args.width, self.args.layers)

    def train(
        self, make: Make, lr: float, seed: int, steps: int, observe: Observe | None = None, named: bool = False
    ) -> Training:
        """``named``: whether ``make`` is given the parameters' names, by which Muon tells embeddings and heads."""
        model, split = self.build(seed), int(0.95 * len(self.ids))
        opt = make(model.named_parameters() if named else model.parameters(), lr=lr)
        schedule, result = schedule_of(opt, steps), Training()
        held_out = torch.cat(batches(self.ids[split:], self.args, 16, seed=12345))
        for step, batch in enumerate(batches(self.ids[:split], self.args, steps, seed=seed)):
            opt.zero_grad()
            loss = loss_of(model, batch)  # type: ignore[arg-type]
            loss.backward()
            if observe:
                observe(step, model)
            opt.step()
            schedule.step()
            result.losses.append(loss.item())
            if evaluated_at(step, steps):
                with torch.no_grad(), evaluating(opt):
                    result.evaluations.append(loss_of(model, held_out).item())  # type: ignore[arg-type]
        return result


class VAE(nn.Module):
    """An MLP as encoder and one as decoder; pixels are Bernoulli probabilities."""

    def __init__(self, hidden: int, latent: int) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Linear(64, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 2 * latent)
        )
        self.decode = nn.Sequential(
            nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 64)
        )

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """The negative evidence lower bound, nats an image."""
        mean, logvar = self.encode(x).chunk(2, dim=1)
        logits = self.decode(mean + noise * (0.5 * logvar).exp())
        reconstruction = functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1)
        return (reconstruction + divergence).mean()


class VAETask:
    """A variational autoencoder of digits. What counts: the negative evidence lower bound of held-out digits."""

    name = "VAE"
    lr = {"AdamW": 1e-3, "RMSprop": 5e-4, "Adagrad": 1e-2}
    steps = 1000

    def __init__(self, hidden: int = 256, latent: int = 8, batch: int = 64) -> None:
        self.hidden, self.latent, self.batch = hidden, latent, batch
        self.images, self.held_out = digits()

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return VAE(self.hidden, self.latent)

    def train(self, make: Make, lr: float, seed: int, steps: int, observe: Observe | None = None) -> Training:
        model = self.build(seed)
        opt = make(model.parameters(), lr=lr)
        schedule, result = cosine(opt, steps), Training()
        generator = torch.Generator().manual_seed(seed)
        fixed = torch.randn(8 * len(self.held_out), self.latent, generator=torch.Generator().manual_seed(12345))
        for step in range(steps):
            x = self.images[torch.randint(len(self.images), (self.batch,), generator=generator)]
            noise = torch.randn(self.batch, self.latent, generator=generator)
            opt.zero_grad()
            loss = model(x, noise)
            loss.backward()
            if observe:
                observe(step, model)
            opt.step()
            schedule.step()
            result.losses.append(loss.item())
            if evaluated_at(step, steps):
                with torch.no_grad():
                    result.evaluations.append(model(self.held_out.repeat(8, 1), fixed).item())
        return result


class GANTask:
    """A GAN of digits, with R1 regularization. What counts: both networks' losses over the last half, see `train`."""

    name = "GAN"
    lr = {"AdamW": 1e-3, "RMSprop": 5e-4, "Adagrad": 1e-2}
    steps = 1000

    def __init__(self, hidden: int = 128, latent: int = 16, batch: int = 64) -> None:
        self.hidden, self.latent, self.batch = hidden, latent, batch
        self.images, _ = digits()

    def build(self, seed: int) -> nn.ModuleDict:
        torch.manual_seed(seed)
        h = self.hidden
        generator = nn.Sequential(
            nn.Linear(self.latent, h), nn.SiLU(), nn.Linear(h, h), nn.SiLU(), nn.Linear(h, 64), nn.Sigmoid()
        )
        critic = nn.Sequential(nn.Linear(64, h), nn.SiLU(), nn.Linear(h, h), nn.SiLU(), nn.Linear(h, 1))
        return nn.ModuleDict({"generator": generator, "critic": critic})

    def train(self, make: Make, lr: float, seed: int, steps: int, observe: Observe | None = None) -> Training:
        model = self.build(seed)
        make_images, judge = model["generator"], model["critic"]
        opts = [make(net.parameters(), lr=lr) for net in (judge, make_images)]
        schedules, result = [cosine(opt, steps) for opt in opts], Training()
        random = torch.Generator().manual_seed(seed)
        for step in range(steps):
            real = self.images[torch.randint(len(self.images), (self.batch,), generator=random)].requires_grad_()
            noise = torch.randn(2, self.batch, self.latent, generator=random)
            model.zero_grad()
            scores = judge(real)
            (slope,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
            fake = make_images(noise[0]).detach()
            loss = functional.softplus(-scores).mean() + functional.softplus(judge(fake)).mean()
            (loss + 0.5 * slope.square().sum(1).mean()).backward()
            critic_gradients = [p.grad for p in judge.parameters()]
            opts[0].step()
            judge.requires_grad_(False)
            fooled = functional.softplus(-judge(make_images(noise[1]))).mean()
            fooled.backward()
            judge.requires_grad_(True)
            assert all(p.grad is g for p, g in zip(judge.parameters(), critic_gradients, strict=True))
            if observe:
                observe(step, model)
            opts[1].step()
            for schedule in schedules:
                schedule.step()
            result.losses.append(loss.item() + fooled.item())
            if step >= steps // 2:
                result.evaluations.append(result.losses[-1])
        return result


TASKS = {task.name: task for task in (GPTTask, VAETask, GANTask)}
