"""What torch's own code steps beside the kernels: sparse gradients of SGD and Adagrad, differentiable groups."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import (
    BACKENDS,
    CASES,
    DEVICE,
    FIRST,
    Case,
    assert_same_bits,
    assert_same_state,
    in_training,
    parameters,
    randn,
    refused,
)
from torch.autograd import gradcheck

import genopt_ext
from genopt_ext import optim

# Of torch's own Adagrad too.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

SPARSE = [
    Case("SGD", dict(lr=0.1)),
    Case("SGD", dict(lr=torch.tensor(0.1), maximize=True)),
    Case("SGD", dict(lr=0.1, momentum=0.9, dampening=0.5)),
    Case("SGD", dict(lr=0.1, momentum=0.9, nesterov=True)),
    Case("Adagrad", dict(lr=0.1)),
    Case("Adagrad", dict(lr=0.1, lr_decay=0.5, maximize=True, initial_accumulator_value=0.1)),
]


def sparse_grad(shape, seed):
    """Uncoalesced, with rows missing."""
    rows = torch.tensor([[3, 1, 3]], device=DEVICE)
    return torch.sparse_coo_tensor(rows, randn((3, *shape[1:]), seed), shape, check_invariants=True)


def set_kinds(params, kinds, step):
    """Gradients, sparse for "s", dense of the same values for "d", None for "-"; of each parameter in its turn."""
    for i, (p, kind) in enumerate(zip(params, kinds, strict=True)):
        g = sparse_grad(p.shape, 100 * step + i)
        p.grad = None if kind == "-" else g if kind == "s" else g.to_dense()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sequence", ["sss", "dssd", "sds", "d-s"])
@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_sparse_gradients_are_torchs(case, sequence, backend):
    ps, qs, rs = (parameters([(5, 3), (6, 2)]) for _ in range(3))
    ours, torchs, kernels = case.ours(ps, backend=backend), case.torch(qs), case.ours(rs, backend=backend)
    for step, kind in enumerate(sequence):
        # torch's SGD has no sum of a sparse buffer and a dense gradient, nor Nesterov's of a dense one and a sparse.
        mixes = case.kwargs.get("momentum") and "s" in sequence and "d" in sequence
        if mixes and case.kwargs.get("nesterov") and sequence[0] == "d":
            return
        set_kinds(ps, (kind, "d"), step)
        set_kinds(qs, ("d" if mixes and kind == "s" else kind, "d"), step)
        set_kinds(rs, ("-", "d"), step)
        if kind == "s" and case.kwargs.get("nesterov") and "d" in sequence[:step]:
            refused(ours, "gradient is sparse and its momentum is dense")
            return
        ours.step(), torchs.step(), kernels.step()
        exact = set(sequence) == {"s"}
        torch.testing.assert_close(ps[0], qs[0], **(dict(rtol=0, atol=0) if exact else {}), msg=f"{case} {step}")
        assert_same_bits(ps[1].detach(), rs[1].detach(), "the others are stepped as ever")
    for name, t in torchs.state[qs[0]].items():
        there = ours.state[ps[0]][name]
        torch.testing.assert_close(there.to_dense(), t.to_dense(), msg=f"{case} {name}")


@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_a_skipped_first_step_leaves_the_buffer_unset(case):
    ps, qs = parameters([(5, 3)]), parameters([(5, 3)])
    ours, torchs = case.ours(ps), case.torch(qs)
    set_kinds(ps, "d", 0)
    ours.found_inf = torch.ones((), device=DEVICE)
    ours.step()
    del ours.found_inf
    for step in range(2):
        set_kinds(ps, "s", step), set_kinds(qs, "s", step)
        ours.step(), torchs.step()
    assert_same_state(ours, torchs, case)


@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_an_embedding_trains_with_a_linear_layer(case):
    """One step serves both; checkpoints go both ways, copies go on alike."""

    def make(module):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Embedding(9, 4, sparse=True), torch.nn.Linear(4, 2)).to(DEVICE)
        return net, getattr(module, case.name)(net.parameters(), **case.kwargs)

    def train(net, opt, first, steps=2):
        for step in range(first, first + steps):
            opt.zero_grad()
            net(torch.tensor([1, 5, step, 1], device=DEVICE)).square().sum().backward()
            opt.step()

    (ours, opt), (torchs, other) = make(optim), make(torch.optim)
    train(ours, opt, 0), train(torchs, other, 0)
    back, forth = copy.deepcopy(opt.state_dict()), copy.deepcopy(other.state_dict())
    opt.load_state_dict(forth), other.load_state_dict(back)
    clone = copy.deepcopy((ours, opt))
    pickled = pickle.loads(pickle.dumps((ours, opt)))
    train(ours, opt, 2), train(torchs, other, 2), train(*clone, 2), train(*pickled, 2)
    for p, q, r, s in zip(*(net.parameters() for net in (ours, torchs, clone[0], pickled[0])), strict=True):
        torch.testing.assert_close(p, q)
        assert_same_bits(p.detach(), r.detach())
        assert_same_bits(p.detach(), s.detach())


def test_an_average_goes_with_sparse_gradients():
    p = parameters([(5, 3)])[0]
    opt = optim.SGD([p], lr=0.1, ema_decay=0.9)
    averaged = torch.optim.swa_utils.AveragedModel(
        torch.nn.ParameterList([p]), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    for step in range(3):
        set_kinds([p], "s", step)
        opt.step()
        averaged.update_parameters(torch.nn.ParameterList([p]))
    torch.testing.assert_close(opt.state[p]["ema"], next(averaged.parameters()).detach())


@pytest.mark.parametrize("case", [SPARSE[2], SPARSE[4]], ids=str)
def test_torchs_scaler_unscales_sparse_gradients(case):
    results = []
    for make in (case.ours, case.torch):
        p = parameters([(5, 3)])[0]
        opt, scaler = make([p]), torch.amp.GradScaler(DEVICE, init_scale=8.0, growth_interval=1)
        for step in range(4):
            g = sparse_grad(p.shape, step) * scaler.scale(torch.ones((), device=DEVICE)).item()
            p.grad = g * torch.inf if step == 1 else g
            scaler.step(opt)
            scaler.update()
        results.append(opt)
    assert_same_state(*results)


def test_sparse_gradients_in_backward_and_accumulated():
    x = torch.tensor([1, 1, 3], device=DEVICE)
    nets = [torch.nn.Embedding(5, 2, sparse=sparse, device=DEVICE) for sparse in (True, True, True)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    plain, in_backward, accumulating = (optim.SGD(net.parameters(), lr=0.1) for net in nets)
    genopt_ext.step_in_backward(in_backward)
    for _ in range(2):
        for net in nets:
            net(x).square().sum().backward()
        plain.step()
        accumulating.accumulate(), accumulating.step()
        plain.zero_grad()
    torch.testing.assert_close(nets[0].weight, nets[1].weight)
    torch.testing.assert_close(nets[0].weight, nets[2].weight)
    assert nets[1].weight.grad is None


OPTIONS = {
    "max_grad_norm": dict(max_grad_norm=1.0),
    "a clip by norm in another group": {},
    "clip_per_param": dict(clip_per_param=1.0),
    "agc": dict(agc=0.1),
    "clip_grad_value": dict(clip_grad_value=0.1),
    "skip_nonfinite": dict(skip_nonfinite=True),
    "state_dtype": dict(state_dtype=torch.bfloat16),
    "master_weights": dict(master_weights=True),
    "param_rounding": dict(param_rounding="kahan"),
    "backend is 'cpu'": dict(backend="cpu"),
    "weight_decay": dict(weight_decay=0.1),
}


@pytest.mark.parametrize("kind", ["sparse", "differentiable"])
@pytest.mark.parametrize("option", list(OPTIONS))
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_options_that_can_not_apply_are_refused(name, option, kind):
    if option == "weight_decay" and kind == "differentiable":
        return
    half = option in ("master_weights", "param_rounding")
    ps = parameters([(5, 3), (6, 2)], torch.bfloat16 if half else torch.float32)
    groups = [dict(params=[p.requires_grad_(kind == "sparse")], differentiable=kind != "sparse") for p in ps[:1]]
    groups.append(dict(params=ps[1:], **(dict(max_grad_norm=1.0) if "another" in option else {})))
    opt = getattr(optim, name)(groups, **OPTIONS[option])
    ps[0].grad = sparse_grad((5, 3), 0).to(ps[0].dtype)
    ps[0].grad = ps[0].grad if kind == "sparse" else ps[0].grad.to_dense()
    ps[1].grad = randn((6, 2), 1, ps[1].dtype)
    refused(opt, option)


@pytest.mark.parametrize("kind", ["sparse", "differentiable"])
def test_calls_that_can_not_apply_are_refused(kind):
    p = parameters([(5, 3)])[0].requires_grad_(kind == "sparse")
    opt = optim.SGD([p], lr=0.1, differentiable=kind != "sparse", fused=kind == "sparse" or None)
    p.grad = sparse_grad(p.shape, 0) if kind == "sparse" else randn(p.shape, 0)
    scaler = genopt_ext.GradScaler(DEVICE, init_scale=2.0)
    scaler.scale(torch.ones((), device=DEVICE))
    calls = {"step_and_zero_": opt.step_and_zero_, "genopt_ext.GradScaler": lambda: scaler.step(opt)}
    if kind == "sparse":
        torchs = torch.amp.GradScaler(DEVICE, init_scale=2.0)
        torchs.scale(torch.ones((), device=DEVICE))
        calls["fused=True"] = lambda: torchs.step(opt)
    else:
        calls["accumulate.*differentiable"] = opt.accumulate
    for match, call in calls.items():
        refused(opt, match, call=call)
    assert not opt.state
    if kind == "differentiable":
        with pytest.raises(ValueError, match="step_in_backward.*differentiable"):
            genopt_ext.step_in_backward(opt)


@pytest.mark.parametrize("case", [case for case in FIRST.values() if case.name not in ("SGD", "Adagrad")], ids=str)
def test_other_rules_refuse_sparse_gradients_as_torch(case):
    p = parameters([(5, 3)])[0]
    p.grad = sparse_grad(p.shape, 0)
    refused(case.ours([p]), "does not support sparse gradients")


# Differentiable steps


def through_steps(make, p, grads, lr=0.1, state=None, **more):
    """The parameter and its states after steps that autograd records."""
    p = p.clone()
    opt = make([p], lr=lr, differentiable=True, **more)
    opt.state[p].update({name: t.clone() for name, t in (state or {}).items()})
    for g in grads:
        p.grad = g
        opt.step()
    states = [t for t in opt.state[p].values() if isinstance(t, torch.Tensor) and t.requires_grad]
    return (p, *states)


def make(module, case):
    kwargs = {name: value for name, value in case.kwargs.items() if name != "lr"}
    return lambda params, **more: getattr(module, case.name)(params, **{**kwargs, **more})


def same_outcome(ours, torchs, what):
    """What both calls return, or what torch says against it."""
    outcomes = []
    for call in (ours, torchs):
        try:
            outcomes.append(list(call()))
        except (RuntimeError, TypeError) as error:
            outcomes.append([str(error)])
    for x, y in zip(*outcomes, strict=True):
        same = torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y
        assert same, (what, x, y)
    return outcomes[0]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in optim.TORCHS and "cautious" not in case.kwargs], ids=str
)
def test_gradients_flow_through_steps_as_through_torchs(case, backend, steps):
    p, *grads = (randn((4, 3), i, torch.float64).requires_grad_() for i in range(1 + steps))

    def flow(module, **more):
        outputs = through_steps(make(module, case), p, grads, **more)
        yield from outputs
        yield from torch.autograd.grad(sum(t.square().sum() for t in outputs), (p, *grads), allow_unused=True)

    results = same_outcome(lambda: flow(optim, backend=backend), lambda: flow(torch.optim), case)
    assert steps == 2 or len(results) >= 3


@pytest.mark.parametrize("name", optim.TORCHS)
def test_gradcheck(name):
    p, g, buffer = (randn((3,), i, torch.float64).requires_grad_() for i in range(3))

    def call(p, g, buffer):
        return through_steps(make(optim, FIRST[name]), p, [g], state=name == "SGD" and {"momentum_buffer": buffer})

    assert gradcheck(call, (p, g, buffer))


@pytest.mark.parametrize("name", [name for name in optim.TORCHS if name != "Rprop"])  # there it is a state's beginning
def test_gradients_flow_to_the_learning_rate(name):
    p, g = (randn((3,), i, torch.float64) for i in range(2))

    def flow(module):
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True, device=DEVICE)
        out = through_steps(make(module, FIRST[name]), p, [g], lr)[0]
        yield from (out.detach(), *torch.autograd.grad(out.sum(), lr))

    results = same_outcome(lambda: flow(optim), lambda: flow(torch.optim), name)
    refused = ("RMSprop", "Adagrad", "Adadelta", "Adamax", "ASGD")
    assert name in refused or len(results) == 2, "torch's for-loop lets it flow"


def test_a_differentiable_group_beside_an_ordinary_one():
    """Kernels step the ordinary group, whose parameters autograd goes on to know nothing of."""
    ps = [parameters([(4, 3), (5,)]) for _ in range(2)]
    clones = [p[0].clone() for p in ps]
    groups = [dict(params=[clones[0]]), dict(params=[ps[0][1]], differentiable=False)]
    both = optim.AdamW(groups, ema_decay=0.9, differentiable=True)
    one, other = torch.optim.AdamW([clones[1]], differentiable=True), optim.AdamW([ps[1][1]], ema_decay=0.9)
    for step in range(2):
        for c, p in zip(clones, ps, strict=True):
            c.grad, p[1].grad = randn((4, 3), step), randn((5,), step)
        both.step(), one.step(), other.step()
    assert_same_bits(clones[0].detach(), clones[1].detach())
    assert_same_bits(ps[0][1].detach(), ps[1][1].detach())
    for c in clones:
        c.sum().backward()
    assert_same_bits(ps[0][0].grad, ps[1][0].grad)
    assert not ps[0][1].grad_fn and not both.state[clones[0]]["ema"].requires_grad


@pytest.mark.parametrize("name", optim.TORCHS)
def test_differentiable_steps_keep_the_rest(name):
    """zero_grad, checkpoints both ways, copies."""
    p, q = (randn((3,), 0) for _ in range(2))
    ours = make(optim, FIRST[name])([p], differentiable=True)
    torchs = make(torch.optim, FIRST[name])([q], differentiable=True)
    for step in range(4):
        if step == 2:
            ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
            torchs.load_state_dict(copy.deepcopy(ours.state_dict()))
            (p, ours), (q, torchs) = copy.deepcopy((p, ours)), copy.deepcopy((q, torchs))
        p.grad, q.grad = randn((3,), step), randn((3,), step)
        ours.step(), torchs.step()
        ours.zero_grad()
        assert p.grad is None
    assert_same_state(ours, torchs, name)


@pytest.mark.parametrize("name", [name for name in optim.OURS if name not in optim.TORCHS])
def test_classes_that_torch_has_not_refuse_differentiable(name, backend):
    """By name: as an argument, and in a group before anything is stepped."""
    params = parameters([(4, 3), (5,)])
    make_ = getattr(optim, name)
    with pytest.raises(TypeError, match="unexpected keyword argument 'differentiable'"):
        make_(params, differentiable=True)
    groups = [{"params": params[:1]}, {"params": params[1:], "differentiable": True}]
    opt = in_training(make_(groups, backend=backend))
    params[0].grad, params[1].grad = randn((4, 3), 1), randn((5,), 1)
    fix = f"torch's own code steps differentiable=True, and there is none of {name}; use differentiable=False"
    refused(opt, f"{name}.step: group 1 parameter 0 .*: {fix}")
    assert not opt.state


def test_a_leaf_that_requires_grad_is_refused_before_anything():
    p = parameters([(3,)])[0]
    opt = optim.AdamW([p], differentiable=True)
    p.grad = randn((3,), 1)
    refused(opt, "a leaf Variable that requires grad is being used in an in-place operation")
    assert not opt.state


@pytest.mark.parametrize("what", ["another sparse_dim", "a sum of another sparse_dim", "a state that requires grad"])
def test_what_torchs_code_would_fail_at_is_refused_before_others_step(what):
    p = torch.nn.Parameter(torch.ones(3, 2))
    q = torch.ones(3, 2, requires_grad=True) * 1 if what.startswith("a state") else torch.nn.Parameter(torch.ones(3, 2))
    own = dict(momentum=0.9) if what.startswith("another") else {}
    make = optim.Adagrad if what.startswith("a sum") else optim.SGD if own else optim.Adam
    is_differentiable = what.startswith("a state")
    groups = [{"params": [p], "differentiable": False}, {"params": [q]}]
    opt = make(groups, lr=0.1, differentiable=is_differentiable, **own)
    p.grad = torch.ones(3, 2)
    q.grad = torch.ones(3, 2) if what.startswith("a state") else torch.ones(3, 2).to_sparse(1)
    opt.step()
    if what.startswith("another"):
        q.grad = torch.ones(3, 2).to_sparse(2)
    elif what.startswith("a sum"):
        opt.state[q]["sum"] = torch.ones(3, 2).to_sparse(2)
    else:
        opt.state[q]["exp_avg"] = torch.zeros(3, 2, requires_grad=True)
    refused(opt, "group 1 parameter 0 .*(sparse dimensions|requires grad)")
