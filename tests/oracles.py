"""What tests compare ours with: torch.optim, and what it lacks, in its style and in the parameter's own dtype."""

from __future__ import annotations

from typing import Any

import torch


def __getattr__(name: str) -> Any:
    return getattr(torch.optim, name)


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv 2302.06675; a complex number is two real ones."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
    ) -> None:
        flags = dict(maximize=maximize, foreach=foreach, capturable=capturable, fused=fused)
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, **flags))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", self.defaults["maximize"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, (beta1, beta2) = float(group["lr"]), map(float, group["betas"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                weight, g, m = (torch.view_as_real(t) if t.is_complex() else t for t in (p, p.grad, state["exp_avg"]))
                g = -g if group["maximize"] else g
                update = m * beta1 + g * (1 - beta1)
                weight.mul_(1 - lr * group["weight_decay"])
                weight.sub_(lr * torch.where(update.isnan(), update, update.sign()))
                m.mul_(beta2).add_(g * (1 - beta2))
        return loss
