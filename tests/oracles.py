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
        begin = {p for group in self.param_groups for p in group["params"] if not self.state.get(p)}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                self.begins = p in begin  # however often it is listed, as torch's SGD has it
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
    """AdamW with the decay of arXiv 2510.12402, or the update of arXiv 2411.16085."""

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
        update = lr * state["exp_avg"] / (1 - beta1**t) / denominator
        _decay_and_step(weight, update, g, lr * group["weight_decay"], group["cautious"])


def _decay_and_step(weight: Any, update: Any, g: Any, decay: float, cautious: str) -> None:
    if cautious == "update":
        mask = (update * g > 0).to(update.dtype)
        weight.mul_(1 - decay).sub_(update * mask / max(mask.mean().item(), 1e-3) if mask.numel() else update)
    else:
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
            _decay_and_step(weight, lr * step, g, lr * group["weight_decay"], group["cautious"])
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


class _ScheduleFree(_Oracle):
    """Algorithm 1 of arXiv 2405.15682, by way of y alone; always in training."""

    def __init__(self, params: Any, own: dict[str, Any], **flags: Any) -> None:
        counted = dict(k=0, weight_sum=0.0, lr_max=-1.0, scheduled_lr=0.0)
        super().__init__(params, {**own, **counted, "train_mode": True}, **flags)

    def begin(self, state: dict[str, Any], group: dict[str, Any], p: Any) -> None:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["weight_sum"] = torch.zeros((), dtype=torch.float64)
        state["lr_max"] = torch.full((), -1.0, dtype=torch.float64)
        wide = torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype
        state["z"] = p.detach().to(wide, copy=True, memory_format=torch.preserve_format)
        if "betas" in group:
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def step_one(self, group: dict[str, Any], weight: Any, g: Any, state: dict[str, Any]) -> None:
        state["step"] += 1
        t, lr, beta = state["step"].item(), float(group["lr"]), float(group.get("momentum") or group["betas"][0])
        if t <= group.get("warmup_steps", 0):
            lr *= t / group["warmup_steps"]
        lr, update = self.scaled(group, lr, g, state, t)
        update = update + group["weight_decay"] * weight
        highest = max(lr, state["lr_max"].item())
        share = t ** group["r"] * highest ** group["weight_lr_power"]
        total = state["weight_sum"].item() + share
        group.update(k=int(t), weight_sum=total, lr_max=highest, scheduled_lr=lr)
        state["lr_max"].fill_(highest)
        state["weight_sum"].fill_(total)
        part = share / total if total else 0.0
        weight.copy_(weight * (1 - part) + state["z"] * part).sub_(lr * (1 - beta * (1 - part)) * update)
        state["z"].sub_(lr * update)

    def scaled(self, group: dict[str, Any], lr: float, g: Any, state: dict[str, Any], t: float) -> tuple[float, Any]:
        beta2 = float(group["betas"][1])
        state["exp_avg_sq"].mul_(beta2).add_(g * g * (1 - beta2))
        return lr, g / ((state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"])


class AdamWScheduleFree(_ScheduleFree):
    def __init__(
        self,
        params: Any,
        lr: Any = 0.0025,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **flags: Any,
    ) -> None:
        own = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, warmup_steps=warmup_steps, r=r)
        super().__init__(params, dict(own, weight_lr_power=weight_lr_power), **flags)


class SGDScheduleFree(_ScheduleFree):
    def __init__(
        self,
        params: Any,
        lr: Any = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **flags: Any,
    ) -> None:
        own = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, warmup_steps=warmup_steps, r=r)
        super().__init__(params, dict(own, weight_lr_power=weight_lr_power), **flags)

    def scaled(self, group: dict[str, Any], lr: float, g: Any, state: dict[str, Any], t: float) -> tuple[float, Any]:
        return lr, g


class RAdamScheduleFree(_ScheduleFree):
    def __init__(
        self,
        params: Any,
        lr: Any = 0.0025,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        silent_sgd_phase: bool = True,
        **flags: Any,
    ) -> None:
        own = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, r=r, weight_lr_power=weight_lr_power)
        super().__init__(params, dict(own, silent_sgd_phase=silent_sgd_phase), **flags)

    def scaled(self, group: dict[str, Any], lr: float, g: Any, state: dict[str, Any], t: float) -> tuple[float, Any]:
        beta2 = float(group["betas"][1])
        _, normalized = super().scaled(group, lr, g, state, t)
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * t * beta2**t / (1 - beta2**t)
        if length <= 4:
            return 0.0 if group["silent_sgd_phase"] else lr, g
        ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        return lr * math.sqrt(ratio), normalized


def _norms(*tensors: Any) -> list[float]:
    return [t.double().norm().item() for t in tensors]


class LARS(_Oracle):
    """As timm's class has it."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1.0,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        trust_coeff: float = 0.001,
        eps: float = 1e-8,
        trust_clip: bool = False,
        always_adapt: bool = False,
        **flags: Any,
    ) -> None:
        own = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov)
        own |= dict(trust_coeff=trust_coeff, eps=eps, trust_clip=trust_clip, always_adapt=always_adapt)
        super().__init__(params, own, **flags)

    def begin(self, state: dict[str, Any], group: dict[str, Any], p: Any) -> None:
        if group["momentum"]:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def step_one(self, group: dict[str, Any], weight: Any, g: Any, state: dict[str, Any]) -> None:
        lr, decay, ratio = float(group["lr"]), group["weight_decay"], 1.0
        w_norm, g_norm = _norms(weight, g)
        if (decay or group["always_adapt"]) and w_norm and g_norm:
            ratio = group["trust_coeff"] * w_norm / (g_norm + w_norm * decay + group["eps"])
        if (decay or group["always_adapt"]) and group["trust_clip"]:
            ratio = min(ratio / lr, 1.0)
        g = (g + decay * weight) * ratio
        if group["momentum"]:
            b = state["momentum_buffer"]
            b.copy_(g if self.begins else group["momentum"] * b + (1 - group["dampening"]) * g)
            g = g + group["momentum"] * b if group["nesterov"] else b
        weight.sub_(lr * g)


class LAMB(_Oracle):
    """As timm's class has it."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        bias_correction: bool = True,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        grad_averaging: bool = True,
        *,
        trust_clip: bool = False,
        always_adapt: bool = False,
        decoupled_decay: bool = False,
        **flags: Any,
    ) -> None:
        own = dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay)
        own |= dict(grad_averaging=grad_averaging, trust_clip=trust_clip)
        super().__init__(params, own | dict(always_adapt=always_adapt, decoupled_decay=decoupled_decay), **flags)

    def begin(self, state: dict[str, Any], group: dict[str, Any], p: Any) -> None:
        state["step"] = torch.zeros((), dtype=torch.float32)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def step_one(self, group: dict[str, Any], weight: Any, g: Any, state: dict[str, Any]) -> None:
        lr, (beta1, beta2), decay = float(group["lr"]), map(float, group["betas"]), group["weight_decay"]
        state["step"] += 1
        t = state["step"].item()
        group["step"] = int(t)
        state["exp_avg"].mul_(beta1).add_(g * (1 - beta1 if group["grad_averaging"] else 1.0))
        state["exp_avg_sq"].mul_(beta2).add_(g * g * (1 - beta2))
        corrections = [1 - beta1**t, 1 - beta2**t] if group["bias_correction"] else [1.0, 1.0]
        update = (state["exp_avg"] / corrections[0]) / ((state["exp_avg_sq"] / corrections[1]).sqrt() + group["eps"])
        if group["decoupled_decay"]:
            weight.mul_(1 - lr * decay)
        else:
            update = update + decay * weight
        if decay or group["always_adapt"]:
            w_norm, u_norm = _norms(weight, update)
            ratio = w_norm / u_norm if w_norm and u_norm else 1.0
            update = update * (min(ratio, 1.0) if group["trust_clip"] else ratio)
        weight.sub_(lr * update)


class Adafactor(torch.optim.Adafactor):
    """torch's, which fails at a parameter without elements."""

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        super()._init_group(group, *lists)
        for i in reversed(range(len(lists[0]))):
            if lists[0][i].numel() == 0:
                lists[-1][i].add_(1)
                for each in lists:
                    del each[i]
        return False


class StableAdamW(_Oracle):
    """Algorithm 2 of arXiv 2304.13013, as optimi's class has it."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        **flags: Any,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), **flags)

    def begin(self, state: dict[str, Any], group: dict[str, Any], p: Any) -> None:
        state["step"] = torch.zeros((), dtype=torch.float32)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def step_one(self, group: dict[str, Any], weight: Any, g: Any, state: dict[str, Any]) -> None:
        lr, (beta1, beta2) = float(group["lr"]), map(float, group["betas"])
        state["step"] += 1
        t = state["step"].item()
        for name, beta, x in (("exp_avg", beta1, g), ("exp_avg_sq", beta2, g * g)):
            rest = (1 - beta) / (1 - beta**t)
            state[name].mul_(1 - rest).add_(x * rest)
        m, v, eps = state["exp_avg"], state["exp_avg_sq"], group["eps"]
        if g.numel():
            lr /= max(1.0, (g.double() ** 2 / v.double().clamp(min=eps**2)).mean().sqrt().item())
        weight.mul_(1 - lr * group["weight_decay"]).sub_(lr * m / (v.sqrt() + eps))


class Prodigy(_Oracle):
    """Algorithm 4 of arXiv 2306.06101 and its D of equation 2, as the authors' package has them."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1.0,
        betas: Any = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        fsdp_in_use: bool = False,
        slice_p: int = 1,
        **flags: Any,
    ) -> None:
        own = dict(lr=lr, betas=betas, beta3=beta3, eps=eps, weight_decay=weight_decay, decouple=decouple, d0=d0)
        own |= dict(use_bias_correction=use_bias_correction, safeguard_warmup=safeguard_warmup, d_coef=d_coef)
        own |= dict(growth_rate=growth_rate, fsdp_in_use=fsdp_in_use, slice_p=slice_p)
        super().__init__(params, own | dict(d=d0, d_max=d0, d_numerator=0.0, k=0), **flags)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for p, entries in self.state.items():
            entries.update({name: entries[name].view(p.shape) for name in {"s", "p0"} & entries.keys()})

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        for key, entries in saved["state"].items():
            flat = {name: entries[name].flatten() for name in {"s", "p0"} & entries.keys()}
            saved["state"][key] = {**entries, **flat}
        return saved

    def begin(self, state: dict[str, Any], group: dict[str, Any], p: Any) -> None:
        state["step"] = torch.zeros((), dtype=torch.float32)
        wide = torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype
        state["s"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["p0"] = p.detach().to(wide, copy=True, memory_format=torch.preserve_format)
        for name in ("exp_avg_sq", "exp_avg") if group["betas"][0] else ("exp_avg_sq",):
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = self.param_groups[0]
        beta1, beta2 = map(float, first["betas"])
        beta3 = math.sqrt(beta2) if first["beta3"] is None else first["beta3"]
        d, k, numerator, denominator = first["d"], first["k"] + 1, beta3 * first["d_numerator"], 0.0
        correction = math.sqrt(1 - beta2**k) / (1 - beta1**k) if first["use_bias_correction"] else 1.0
        rows = []
        for group in self.param_groups:
            lr = d * float(group["lr"]) * correction
            for p in group["params"]:
                if p.grad is None or lr == 0:
                    continue
                if not self.state[p]:
                    self.begin(self.state[p], group, p)
                weight, g, state = p, -p.grad if group["maximize"] else p.grad, dict(self.state[p])
                if p.is_complex():
                    weight, g = torch.view_as_real(p), torch.view_as_real(g)
                    state = {name: torch.view_as_real(t) if t.is_complex() else t for name, t in state.items()}
                if not group["decouple"]:
                    g = g + group["weight_decay"] * weight
                s, p0 = state["s"], state["p0"]
                s.mul_(beta3).add_(d / group["d0"] * (d if group["safeguard_warmup"] else lr) * g)
                numerator += d / group["d0"] * lr * (g.double() * (p0.double() - weight.double())).sum().item()
                denominator += s.double().abs().sum().item()
                state["exp_avg_sq"].mul_(beta2).add_(d * d * (1 - beta2) * g * g)
                if beta1:
                    state["exp_avg"].mul_(beta1).add_(d * (1 - beta1) * g)
                state["step"] += 1
                rows.append((group, weight, g, state, lr))
        if denominator == 0:
            return loss
        estimate = first["d_coef"] * numerator / denominator
        d = max(d, estimate) if d == first["d0"] else d
        highest = max(first["d_max"], estimate)
        d = min(highest, d * first["growth_rate"])
        for group in self.param_groups:
            group.update(d=d, d_max=highest, d_numerator=numerator, k=k)
        for group, weight, g, state, lr in rows:
            update = lr * (state["exp_avg"] if beta1 else d * g) / (state["exp_avg_sq"].sqrt() + d * group["eps"])
            weight.mul_(1 - lr * group["weight_decay"] * group["decouple"]).sub_(update)
        return loss
