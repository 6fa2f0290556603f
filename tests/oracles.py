"""What tests compare ours with: torch.optim, and what it lacks, in its style and in the parameter's own dtype."""

from __future__ import annotations

import math
from typing import Any

import torch


def __getattr__(name: str) -> Any:
    return getattr(torch.optim, name)


class _Oracle(torch.optim.Optimizer):
    """A class that torch lacks; a complex number is two real ones."""

    def __init__(
        self,
        params: Any,
        own: dict[str, Any],
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, dict(own, maximize=maximize, foreach=foreach, capturable=capturable, fused=fused))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", self.defaults["maximize"])
        for entries in self.state.values():
            if "step" in entries:
                entries["step"] = torch.as_tensor(entries["step"], dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    self.begin(state, group, p)
                weight, g = p, -p.grad if group["maximize"] else p.grad
                tensors = {name: t for name, t in state.items() if isinstance(t, torch.Tensor)}
                if p.is_complex():
                    weight, g = torch.view_as_real(p), torch.view_as_real(g)
                    tensors = {name: torch.view_as_real(t) if t.is_complex() else t for name, t in tensors.items()}
                self.step_one(group, weight, g, tensors)
        return loss


class CautiousAdamW(_Oracle):
    """AdamW with the decay of arXiv 2510.12402."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        cautious: str | None = None,
        **flags: Any,
    ) -> None:
        own = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, cautious=cautious)
        own |= dict(amsgrad=False, differentiable=False, decoupled_weight_decay=True)
        super().__init__(params, own, **flags)

    def begin(self, state: dict[str, Any], group: dict[str, Any], p: Any) -> None:
        state["step"] = torch.zeros((), dtype=torch.float32)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def step_one(self, group: dict[str, Any], weight: Any, g: Any, state: dict[str, Any]) -> None:
        lr, (beta1, beta2) = float(group["lr"]), map(float, group["betas"])
        state["step"] += 1
        t = state["step"].item()
        state["exp_avg"].mul_(beta1).add_(g * (1 - beta1))
        state["exp_avg_sq"].mul_(beta2).add_(g * g * (1 - beta2))
        denominator = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"]
        _decay_and_step(weight, lr * state["exp_avg"] / (1 - beta1**t) / denominator, lr * group["weight_decay"])


def _decay_and_step(weight: Any, update: Any, decay: float) -> None:
    weight.copy_(torch.where(update * weight < 0, weight, weight * (1 - decay))).sub_(update)


class Lion(_Oracle):
    """Algorithm 2 of arXiv 2302.06675."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        cautious: str | None = None,
        **flags: Any,
    ) -> None:
        own = dict(lr=lr, betas=betas, weight_decay=weight_decay)
        super().__init__(params, own if cautious is None else dict(own, cautious=cautious), **flags)

    def begin(self, state: dict[str, Any], group: dict[str, Any], p: Any) -> None:
        state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def step_one(self, group: dict[str, Any], weight: Any, g: Any, state: dict[str, Any]) -> None:
        lr, (beta1, beta2), m = float(group["lr"]), map(float, group["betas"]), state["exp_avg"]
        update = m * beta1 + g * (1 - beta1)
        step = torch.where(update.isnan(), update, update.sign())
        if "cautious" in group:
            _decay_and_step(weight, lr * step, lr * group["weight_decay"])
        else:
            weight.mul_(1 - lr * group["weight_decay"]).sub_(lr * step)
        m.mul_(beta2).add_(g * (1 - beta2))


class AdEMAMix(_Oracle):
    """Algorithm 1 of arXiv 2409.03137, its schedules in appendix A.1."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: int | None = None,
        alpha_warmup: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0,
        **flags: Any,
    ) -> None:
        warmups = dict(beta3_warmup=beta3_warmup, alpha_warmup=alpha_warmup)
        super().__init__(
            params, dict(lr=lr, betas=betas, alpha=alpha, eps=eps, weight_decay=weight_decay, **warmups), **flags
        )

    def begin(self, state: dict[str, Any], group: dict[str, Any], p: Any) -> None:
        state["step"] = torch.zeros((), dtype=torch.float32)
        names = ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")[group["betas"][0] == 0 :]
        state.update({name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in names})

    def step_one(self, group: dict[str, Any], weight: Any, g: Any, state: dict[str, Any]) -> None:
        lr, (beta1, beta2, beta3), alpha = float(group["lr"]), map(float, group["betas"]), group["alpha"]
        state["step"] += 1
        t = state["step"].item()
        if group["alpha_warmup"] is not None:
            alpha *= min(t / group["alpha_warmup"], 1)
        if group["beta3_warmup"] is not None and t < group["beta3_warmup"]:
            part = t / group["beta3_warmup"]
            first, last = (math.log(0.5) / math.log(beta + 1e-8) for beta in (beta1, beta3))
            beta3 = 0.5 ** (1 / ((1 - part) * first + part * last))
        if beta1 != 0:
            state["exp_avg_fast"].mul_(beta1).add_(g * (1 - beta1))
        state["exp_avg_slow"].mul_(beta3).add_(g * (1 - beta3))
        state["exp_avg_sq"].mul_(beta2).add_(g * g * (1 - beta2))
        fast = state.get("exp_avg_fast", g) / (1 - beta1**t)
        denominator = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"]
        update = (fast + alpha * state["exp_avg_slow"]) / denominator + group["weight_decay"] * weight
        weight.sub_(lr * update)


class ADOPT(_Oracle):
    """Algorithm 2 of arXiv 2411.02853."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0,
        decouple: bool = False,
        clip_exponent: float | None = 0.25,
        **flags: Any,
    ) -> None:
        own = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decouple=decouple)
        super().__init__(params, dict(own, clip_exponent=clip_exponent), **flags)

    def begin(self, state: dict[str, Any], group: dict[str, Any], p: Any) -> None:
        state["step"] = torch.zeros((), dtype=torch.float32)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def step_one(self, group: dict[str, Any], weight: Any, g: Any, state: dict[str, Any]) -> None:
        lr, (beta1, beta2), decay = float(group["lr"]), map(float, group["betas"]), group["weight_decay"]
        state["step"] += 1
        if not group["decouple"]:
            g = g + decay * weight
        if state["step"] == 1:
            state["exp_avg_sq"].copy_(g * g)
            return
        if group["decouple"]:
            weight.mul_(1 - lr * decay)
        normed = g / state["exp_avg_sq"].sqrt().clamp(min=group["eps"])
        if group["clip_exponent"] is not None:
            limit = (state["step"].item() - 1) ** group["clip_exponent"]
            normed = normed.clamp(-limit, limit)
        state["exp_avg"].mul_(beta1).add_(normed * (1 - beta1))
        weight.sub_(lr * state["exp_avg"])
        state["exp_avg_sq"].mul_(beta2).add_(g * g * (1 - beta2))


class Adan(_Oracle):
    """Algorithm 1 of arXiv 2208.06677; ``no_prox``: with AdamW's decay."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0,
        no_prox: bool = False,
        **flags: Any,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, no_prox=no_prox), **flags)

    def begin(self, state: dict[str, Any], group: dict[str, Any], p: Any) -> None:
        state["step"] = torch.zeros((), dtype=torch.float32)
        for name in ("exp_avg", "exp_avg_sq", "exp_avg_diff"):
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["neg_pre_grad"] = p.grad.to(p.dtype) * (1 if group["maximize"] else -1)

    def step_one(self, group: dict[str, Any], weight: Any, g: Any, state: dict[str, Any]) -> None:
        lr, (beta1, beta2, beta3) = float(group["lr"]), map(float, group["betas"])
        state["step"] += 1
        t, decay = state["step"].item(), 1 - lr * group["weight_decay"]
        group["step"] = int(t)
        difference = g + state["neg_pre_grad"]
        ahead = g + beta2 * difference
        state["exp_avg"].mul_(beta1).add_(g * (1 - beta1))
        state["exp_avg_diff"].mul_(beta2).add_(difference * (1 - beta2))
        state["exp_avg_sq"].mul_(beta3).add_(ahead * ahead * (1 - beta3))
        state["neg_pre_grad"].copy_(-g)
        m, d = state["exp_avg"] / (1 - beta1**t), state["exp_avg_diff"] / (1 - beta2**t)
        update = lr * (m + beta2 * d) / ((state["exp_avg_sq"] / (1 - beta3**t)).sqrt() + group["eps"])
        if group["no_prox"]:
            weight.mul_(decay).sub_(update)
        else:
            weight.sub_(update).div_(1 + lr * group["weight_decay"])
