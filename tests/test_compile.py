"""``torch.compile`` around a step: one opaque call, no more graph breaks than around torch's, no recompilation."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, FIRST, assert_same_bits, assert_same_state, in_training, randn
from torch._dynamo.utils import counters

import genopt_ext
from genopt_ext import optim

OPTIONS = {
    "plain": {},
    "clips": dict(max_grad_norm=0.1),
    "skips": dict(skip_nonfinite=True, clip_per_param=0.1),
    "int8": dict(state_dtype=torch.int8, min_int8_size=0, ema_decay=0.9),
}
# Of torch's own: what it can not trace in its optimizers, and that it uses what it has deprecated.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "DeprecationWarning")]


def net_and_input():
    net = torch.nn.Linear(4, 3, device=DEVICE)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(randn(p.shape, i))
    return net, randn((2, 4), 9)


def kinds(net, x, opt):
    """What is compiled, and what goes before it uncompiled."""

    def backward():
        opt.zero_grad()
        loss = net(x).square().sum()
        loss.backward()
        return loss

    def train():
        backward()
        opt.step()

    return {
        "lambda": (lambda: opt.step(), backward),
        "method": (opt.step, backward),
        "training step": (train, lambda: None),
        "closure": (lambda: opt.step(backward), lambda: None),
    }


def run(module, name, kind, compiles=True, tensor_lr=False, **options):
    """The optimizer after some steps with a moving learning rate, and how often Dynamo broke and compiled by each."""
    torch.compiler.reset()
    counters.clear()
    net, x = net_and_input()
    options = {**FIRST[name].kwargs, **options, "lr": torch.tensor(0.1) if tensor_lr else 0.1}
    opt = in_training(getattr(module, name)(net.parameters(), **options))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    step, before = kinds(net, x, opt)[kind]
    step = torch.compile(step, backend="eager") if compiles else step
    counts = []
    for _ in range(4):
        before()
        step()
        scheduler.step()
        counts.append((sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]))
    return opt, counts


@pytest.mark.parametrize("kind", ["lambda", "method", "training step", "closure"])
@pytest.mark.parametrize("name", list(FIRST))
def test_breaks_no_more_than_torch(name, kind):
    known = name if name in optim.TORCHS else "AdamW"  # another's way, for a class that torch has not
    _, torchs = run(torch.optim, known, kind, foreach=False)
    opt, ours = run(optim, name, kind)
    assert ours[-1][0] <= torchs[-1][0] and ours[-1][1] <= torchs[-1][1], (ours, torchs)
    assert ours == ours[:1] * 4, ours
    assert_same_state(opt, run(optim, name, kind, compiles=False)[0], (name, kind))


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_options_add_no_break(name, options, tensor_lr):
    kwargs = dict(kind="training step", tensor_lr=tensor_lr, **OPTIONS[options])
    opt, counts = run(optim, name, **kwargs)
    assert counts == run(optim, name, "training step")[1]
    assert_same_state(opt, run(optim, name, compiles=False, **kwargs)[0], (name, options))


@pytest.mark.parametrize("call", ["step_and_zero_", "accumulate"])
def test_other_calls_are_opaque_too(call):
    torch.compiler.reset()
    counters.clear()
    p, q = torch.nn.Parameter(randn(5, 1)), torch.nn.Parameter(randn(5, 1))
    compiled, eager = optim.SGD([p], lr=0.1), optim.SGD([q], lr=0.1)
    f = torch.compile(lambda: getattr(compiled, call)(), backend="eager")
    for step in range(3):
        p.grad, q.grad = randn(5, step), randn(5, step)
        f()
        getattr(eager, call)()
    assert sum(counters["graph_break"].values()) <= 2
    compiled.step(), eager.step()
    assert_same_bits(p.detach(), q.detach())


def test_hooks_run_once_and_before_the_closure():
    torch.compiler.reset()
    net, x = net_and_input()
    opt = optim.SGD(net.parameters(), lr=0.1)
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))

    def closure():
        seen.append("closure")
        return net(x).sum()

    torch.compile(lambda: opt.step(closure), backend="eager")()
    assert seen == ["pre", "closure", "post"]


def test_clipping_is_one_call():
    torch.compiler.reset()
    counters.clear()
    p = torch.nn.Parameter(randn(5, 1))
    p.grad = randn(5, 2)
    torch.compile(lambda: genopt_ext.clip_grad_norm_([p], 0.5), backend="eager")()
    assert sum(counters["graph_break"].values()) <= 2
    torch.testing.assert_close(p.grad.norm().item(), 0.5, rtol=1e-5, atol=0)


def backward_under(mode, backward):
    """``backward`` with compiled autograd, but for ``"eager"``: on its own, its graph compiled, in a compiled step."""
    if mode == "eager":
        return backward
    if mode == "in a compiled step":
        return torch._dynamo.config.patch(compiled_autograd=True)(torch.compile(backward, backend="aot_eager"))
    compiler = {"traced": lambda graph: graph, "compiled": torch.compile(backend="eager")}[mode]
    return torch._dynamo.compiled_autograd._enable(compiler)(backward)


def deeper_net():
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(4, 4, device=DEVICE) for _ in range(3)))
    net[2].weight = net[0].weight
    return net, randn((2, 4), 9)


MODES = ["traced", "compiled", "in a compiled step"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_compiled_autograd_steps_in_backward(name, mode):
    torch.compiler.reset()
    results = []
    for each in (mode, "eager"):
        net, x = deeper_net()
        opt = getattr(optim, name)(net.parameters(), **{**FIRST[name].kwargs, "lr": 0.1}, clip_per_param=0.5)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        genopt_ext.step_in_backward(opt)
        backward = backward_under(each, lambda net=net, x=x: net(x).square().sum().backward())
        for _ in range(3):
            backward()
            scheduler.step()
            assert all(p.grad is None for p in net.parameters())
        results.append(opt)
    assert_same_state(*results, (name, mode))


@pytest.mark.parametrize("mode", MODES)
def test_compiled_autograd_passes_on_what_a_step_in_backward_refuses(mode):
    torch.compiler.reset()
    net, x = deeper_net()
    before = [p.detach().clone() for p in net.parameters()]
    opt = optim.SGD(net.parameters(), lr=0.1)
    genopt_ext.step_in_backward(opt)
    opt.max_grad_norm = 1.0
    with pytest.raises(ValueError, match="max_grad_norm is 1.0"):
        backward_under(mode, lambda: net(x).square().sum().backward())()
    assert_same_bits([p.detach() for p in net.parameters()], before)
