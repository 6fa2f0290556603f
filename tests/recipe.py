"""What a step on the gradient path is, in torch's own operations on float64 copies: the oracle of its tests."""

from __future__ import annotations

from typing import Any

import torch
from cases import Case
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

KINDS = ("max_grad_norm", "clip_per_param", "agc")  # one of them in one place
OPTIONS = (*KINDS, "clip_grad_value", "ema_decay")  # of the whole optimizer or of one group
SCALES = (1.0, 30.0, 0.01, 4.0)  # of gradients step by step: Adam does not see a factor that stays


def double(t: Tensor) -> Tensor:
    return t.detach().to(torch.complex128 if t.is_complex() else torch.float64, copy=True)


class Recipe:
    """Takes the steps of ``case.ours(groups, **wide)``, given the gradients that those parameters have."""

    def __init__(self, case: Case, groups: list[dict[str, Any]], **wide: Any) -> None:
        self.wide = wide
        self.theirs = [list(g["params"]) for g in groups]
        self.own = [{k: v for k, v in g.items() if k in OPTIONS} for g in groups]
        self.params = [[torch.nn.Parameter(double(p)) for p in row] for row in self.theirs]
        rest = [{k: v for k, v in g.items() if k not in OPTIONS} for g in groups]
        self.opt = case.torch([{**g, "params": row} for g, row in zip(rest, self.params, strict=True)])
        self.averages: list[Any] = [None] * len(groups)
        self.sums: dict[Tensor, Tensor] = {}
        self.calls = 0
        self.skipped = 0
        self.grad_norm: Tensor | None = None

    def pairs(self):
        return [pair for rows in zip(self.theirs, self.params, strict=True) for pair in zip(*rows, strict=True)]

    def option(self, i: int, name: str) -> Any:
        return self.own[i].get(name, self.wide.get(name))

    def accumulate(self) -> None:
        """To be called before the optimizer's own."""
        self.calls += 1
        for p, q in self.pairs():
            if p.grad is not None:
                self.sums[q] = self.sums.get(q, 0) + double(p.grad)

    def step(self, scale: float = 1.0, found_inf: float = 0.0) -> None:
        """To be called before the optimizer's own."""
        if self.calls and any(p.grad is not None for p, _ in self.pairs()):
            self.accumulate()
        for p, q in self.pairs():
            if self.calls:
                q.grad = self.sums[q] / self.calls if q in self.sums else None
            else:
                q.grad = None if p.grad is None else double(p.grad)
            if q.grad is not None:
                q.grad /= scale
        self.sums, self.calls = {}, 0
        grads = [q.grad for _, q in self.pairs() if q.grad is not None]
        self.grad_norm = get_total_norm([g for g in grads if g.numel()], foreach=False)
        if self.wide.get("skip_nonfinite") and not all(torch.isfinite(g).all() for g in grads):
            self.skipped += 1
            return
        if found_inf:  # and NaN
            return
        self.clip()
        self.opt.step()
        self.average()

    def clip(self) -> None:
        together = []
        for i, row in enumerate(self.params):
            place = self.own[i] if any(k in self.own[i] for k in KINDS) else self.wide
            having = [q for q in row if q.grad is not None and q.numel()]
            if place.get("max_grad_norm") is not None:
                if place is self.wide:
                    together += having
                elif having:
                    clip_grad_norm_(having, place["max_grad_norm"], foreach=False)
            for q in having:
                if place.get("clip_per_param") is not None:
                    clip_grad_norm_([q], place["clip_per_param"], foreach=False)
                if place.get("agc") is not None and q.grad.norm() > 0:
                    limit = place["agc"] * max(q.detach().norm().item(), 1e-3)
                    q.grad *= min(1.0, limit / q.grad.norm().item())
        if together:
            clip_grad_norm_(together, self.wide["max_grad_norm"], foreach=False)
        for i, row in enumerate(self.params):
            value = self.option(i, "clip_grad_value")
            having = [q for q in row if q.grad is not None]
            if value is not None and having:
                clip_grad_value_(having, value, foreach=False)

    def average(self) -> None:
        for i, row in enumerate(self.params):
            decay = self.option(i, "ema_decay")
            if decay is None:
                continue
            model = torch.nn.ParameterList(row)
            if self.averages[i] is None:
                self.averages[i] = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
            self.averages[i].multi_avg_fn = get_ema_multi_avg_fn(decay)
            self.averages[i].update_parameters(model)

    def assert_followed_by(self, opt: torch.optim.Optimizer, what: object = "", tolerance: float = 2e-5) -> None:
        """``opt`` has these parameters, states, averages and counts, but for rounding."""

        def close(a: Tensor, b: Tensor, name: str) -> None:
            largest = b.abs().max().item() if b.numel() else 0.0
            torch.testing.assert_close(
                double(a),
                double(b),
                rtol=tolerance,
                atol=tolerance * max(0.1, largest),
                equal_nan=True,
                msg=lambda text: f"{what}: {name}: {text}",
            )

        for p, q in self.pairs():
            close(p, q, "parameter")
            for name, t in self.opt.state.get(q, {}).items():
                close(opt.state[p][name], t, name)
        for row, average in zip(self.theirs, self.averages, strict=True):
            if average is not None:
                for p, q in zip(row, average.module, strict=True):
                    # A parameter that never had a gradient is its own average.
                    close(opt.state.get(p, {}).get("ema", p), q, "ema")
        if self.wide.get("max_grad_norm") is not None:
            close(opt.grad_norm, self.grad_norm, "grad_norm")
        if self.wide.get("skip_nonfinite"):
            assert int(opt.skipped_steps) == self.skipped, what
