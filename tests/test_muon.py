"""Muon: its numbers against the polar factor and torch's class, what goes where, and what is refused."""

import contextlib
import copy
import inspect
import logging
import math

import pytest
import torch
from cases import (
    COPIES,
    DEVICE,
    INF,
    KERNELS,
    NAN,
    NARROW,
    assert_same_bits,
    assert_same_state,
    assert_unchanged,
    copies_of,
    parameters,
    randn,
    refused,
    saved,
    set_grads,
    snapshot,
    train,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import genopt_ext
from genopt_ext import optim
from genopt_ext.optim import muon_matrices, orthogonal, routing
from genopt_ext.optim.orthogonal import POLAR_EXPRESS, coefficients_of, orthogonalized

pytestmark = pytest.mark.filterwarnings("ignore:genopt_ext. Muon. without names:UserWarning")

NS = (3.4445, -4.7750, 2.0315)
# A product of bfloat16 numbers is right to some units of 2**-8, and an iteration has three.
ROUNDING = 0.03
SHAPES = [(16, 16), (24, 40), (40, 24), (130, 140)]


def names(params):
    return [(f"layers.{i}.weight", p) for i, p in enumerate(params)]


def muon(params, **more):
    return optim.Muon(names(params), **more)


def with_singular_values(rows, columns, values, seed=0):
    u = torch.linalg.qr(randn((rows, len(values)), seed, torch.float64))[0]
    v = torch.linalg.qr(randn((columns, len(values)), seed + 1, torch.float64))[0]
    return u @ torch.diag(torch.as_tensor(values, dtype=torch.float64, device=DEVICE)) @ v.T


def bounds(coefficients, least):
    """Of singular values that were at least ``least`` of the Frobenius norm."""
    s = torch.logspace(math.log10(least), 0, 100_000, dtype=torch.float64)
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return s.min().item(), s.max().item()


def update_of(g, **more):
    """The orthogonal matrix by which ``g`` moves a weight of 0."""
    p = torch.nn.Parameter(torch.zeros_like(g))
    opt = muon([p], lr=1.0, momentum=0.0, weight_decay=0.0, adjust_lr_fn="original", **more)
    p.grad = g.clone()
    opt.step()
    return -p.detach() / max(1, math.sqrt(g.shape[0] / g.shape[1]))


# The products


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("given", [NS, "polar_express"], ids=str)
def test_update_is_the_polar_factor_but_for_singular_values(shape, given, backend):
    """Those are where the coefficients take them; singular vectors are the polar factor's."""
    g = with_singular_values(*shape, torch.linspace(0.2, 1, min(shape)))
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    made = update_of(g.float(), ns_coefficients=given, backend=backend).double()
    expected = s / s.norm()
    for a, b, c in coefficients_of(given, 5):
        expected = a * expected + b * expected**3 + c * expected**5
    torch.testing.assert_close(made, u @ torch.diag(expected) @ vh, rtol=0, atol=ROUNDING)
    least, most = bounds(coefficients_of(given, 5), (s / s.norm()).min().item())
    values = torch.linalg.svdvals(made)
    assert values.min() > least - ROUNDING and values.max() < most + ROUNDING


def test_polar_express_comes_nearer_to_the_polar_factor():
    """And 8 iterations to what bfloat16 can tell."""
    g = with_singular_values(32, 48, torch.logspace(-2.5, 0, 32))
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    errors = [
        (update_of(g.float(), ns_coefficients=given, ns_steps=steps).double() - u @ vh).norm() / math.sqrt(32)
        for given, steps in ((NS, 5), ("polar_express", 5), ("polar_express", 8))
    ]
    assert errors[0] > 1.5 * errors[1] and errors[1] > errors[2] and errors[2] < 2 * ROUNDING, errors


def test_polar_express_coefficients_are_the_best_ones():
    """Each polynomial is off from 1 by as much, and in turns, at four points: no other of its degree is nearer."""
    least, most = 1e-3, 1.0
    for a, b, c in POLAR_EXPRESS[:6]:
        a, b, c = 1.01 * a, 1.01**3 * b, 1.01**5 * c  # without what is to spare

        def value(s, a=a, b=b, c=c):
            return a * s + b * s**3 + c * s**5

        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = [math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1)]
        off = [value(s) - 1 for s in (least, *inner, most)]
        assert off[0] < 0 < off[1] and off[2] < 0 < off[3]
        assert off == pytest.approx([off[0], -off[0], off[0], -off[0]], rel=1e-4, abs=1e-6)
        least, most = 1 + off[0], 1 - off[0]
    assert bounds(POLAR_EXPRESS, 1e-3) == pytest.approx((1, 1), abs=0.01)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_all_and_of_each_agree(shape, monkeypatch):
    x = randn((3, *shape), 0).bfloat16()
    batched = orthogonalized(x.clone(), coefficients_of(NS, 5), 1e-7)
    monkeypatch.setattr(orthogonal, "AT_ONCE", 0)
    each = orthogonalized(x.clone(), coefficients_of(NS, 5), 1e-7)
    torch.testing.assert_close(batched, each, rtol=0, atol=ROUNDING)


# Against torch.optim.Muon


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, dict(nesterov=False, weight_decay=0.0), dict(adjust_lr_fn="match_rms_adamw", eps=1e-3)], ids=str
)
def test_one_matrix_is_stepped_as_torch_does(shape, options, backend):
    """But for the last bit of bfloat16 in an update, of which a step has some ``lr``."""
    (p,), (q,) = parameters([shape], seed=3), parameters([shape], seed=3)
    opt, theirs = muon([p], lr=0.1, **options, backend=backend), torch.optim.Muon([q], lr=0.1, **options)
    train(opt, [p])
    train(theirs, [q])
    torch.testing.assert_close(opt.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])
    size = (q.detach() - parameters([shape], seed=3)[0]).abs().max().item()
    torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=ROUNDING * size)
    assert (p != parameters([shape], seed=3)[0]).float().mean() > 0.99  # an update may be 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_stepped_as_torch_does(dtype, backend):
    (p,), (q,) = parameters([(24, 40)], dtype), parameters([(24, 40)], dtype)
    opt, theirs = muon([p], lr=0.1, backend=backend), torch.optim.Muon([q], lr=0.1)
    train(opt, [p])
    train(theirs, [q])
    assert opt.state[p]["momentum_buffer"].dtype == dtype
    # Ours rounds a bfloat16 parameter once in a step, torch twice.
    torch.testing.assert_close(p.double(), q.double(), rtol=2**-6, atol=0.06 if dtype == torch.bfloat16 else 0.003)


def test_constructor_has_torchs_arguments():
    own, theirs = (list(inspect.signature(c).parameters.values()) for c in (optim.Muon, torch.optim.Muon))
    assert [(p.name, p.default) for p in own[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in own[len(theirs) :])
    assert issubclass(optim.Muon, torch.optim.Muon)


def test_checkpoints_go_both_ways():
    ours, theirs = parameters([(16, 24), (24, 16)]), parameters([(16, 24), (24, 16)])
    opt, other = muon(ours, lr=0.05), torch.optim.Muon(names(theirs), lr=0.1)
    train(other, theirs)
    opt.load_state_dict(saved(other.state_dict()))
    assert opt.param_groups[0]["lr"] == 0.1 and opt.param_groups[0]["algorithm"] == "muon"
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    train(opt, ours, 2, first=3)
    train(other, theirs, 2, first=3)
    again = torch.optim.Muon(names(theirs))
    again.load_state_dict(saved(opt.state_dict()))
    assert again.param_groups[0]["lr"] == 0.1
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=ROUNDING * 0.1)
        torch.testing.assert_close(again.state[q]["momentum_buffer"], opt.state[p]["momentum_buffer"])
    train(again, theirs, 1, first=5)


@pytest.mark.parametrize("options", [{}, dict(normuon=True), dict(state_dtype=torch.int8, min_int8_size=1)], ids=str)
def test_checkpoints_and_copies_go_on_as_if_nothing_had_been(options):
    model = mixed()
    opt = optim.Muon(model.named_parameters(), lr=0.05, stacked=False, **options)
    train(opt, list(model.parameters()))
    twin = copy.deepcopy(model)
    other = optim.Muon(twin.named_parameters(), stacked=False, **options)
    other.load_state_dict(saved(opt.state_dict()))
    train(opt, list(model.parameters()), first=3)
    train(other, list(twin.parameters()), first=3)
    assert_same_state(opt, other)
    for copied in COPIES.values():
        assert copied(opt).routing() == opt.routing()


def test_checkpoints_of_another_routing_are_refused():
    params = parameters([(4, 4)])
    opt, other = muon(params), optim.Muon([dict(params=names(params), algorithm="adamw")])
    with pytest.raises(ValueError, match="group 0 was stepped by 'adamw', and is by 'muon'"):
        opt.load_state_dict(other.state_dict())


# Shapes, blocks and scalings


@pytest.mark.parametrize(("shape", "scale"), [((64, 16), 2.0), ((16, 64), 1.0)], ids=str)
def test_scalings(shape, scale):
    def moved(scaling):
        p = torch.nn.Parameter(torch.zeros(shape))
        opt = muon([p], lr=1.0, momentum=0.0, adjust_lr_fn=scaling)
        p.grad = randn(shape, 0)
        opt.step()
        return p.detach()

    plain = moved("original") / scale
    assert_same_bits(moved(None), moved("original"))
    torch.testing.assert_close(moved("match_rms_adamw"), plain * 0.2 * 8, rtol=1e-6, atol=0)
    assert moved("match_rms_adamw").square().mean().sqrt() == pytest.approx(0.2, rel=0.25)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_convolutions_are_flattened(memory, backend):
    p, q = (torch.nn.Parameter(randn(shape, 0)) for shape in ((8, 4, 3, 3), (8, 36)))
    with torch.no_grad():
        q.copy_(p.flatten(1))
        p.data = p.data.to(memory_format=memory)
    opt, flat = muon([p], lr=0.1, backend=backend), muon([q], lr=0.1, backend=backend)
    for step in range(3):
        p.grad = randn(p.shape, step).to(memory_format=memory)
        q.grad = p.grad.flatten(1).contiguous()
        opt.step()
        flat.step()
    assert_same_bits(p.detach().flatten(1), q.detach())
    assert opt.routing()["layers.0.weight"].why == "flattened to [8, 36]"
    assert opt.state[p]["momentum_buffer"].is_contiguous(memory_format=memory)


@pytest.mark.parametrize(
    "options", [dict(split_sizes=(8, 8, 8)), dict(num_heads=3), dict(split_sizes=(16, 8))], ids=str
)
@pytest.mark.parametrize("scaling", ["original", "match_rms_adamw"])
def test_blocks_are_matrices_of_their_own(options, scaling, backend):
    sizes = options.get("split_sizes", (8, 8, 8))
    whole = parameters([(24, 10), (24, 10)])
    parts = [torch.nn.Parameter(part.clone()) for p in whole for part in p.detach().split(sizes)]
    common = dict(lr=0.1, adjust_lr_fn=scaling, backend=backend)
    opt, apart = muon(whole, **options, **common), muon(parts, **common)
    for step in range(3):
        set_grads(whole, step)
        grads = [part for p in whole for part in p.grad.split(sizes)]
        for part, g in zip(parts, grads, strict=True):
            part.grad = g.clone()
        opt.step()
        apart.step()
    # A scaling that two blocks do not share is one more rounding of bfloat16.
    torch.testing.assert_close(torch.cat([p.detach() for p in whole]), torch.cat(parts).detach(), rtol=0, atol=2e-3)


def transposed(t):
    """The same numbers, with memory of columns below one another."""
    return t.mT.contiguous().mT


@pytest.mark.parametrize("shape", [(3, 24, 10), (2, 3, 10, 24), (1, 16, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("memory", [torch.Tensor.contiguous, transposed])
def test_matrices_of_a_stack_are_made_orthogonal_each_on_its_own(shape, dtype, memory, backend):
    """Each against the polar factor of its own gradient."""
    *count, rows, columns = shape
    n = math.prod(count)
    least = min(rows, columns)
    each = [with_singular_values(rows, columns, torch.linspace(0.3, 1, least) * 10.0**i, seed=i) for i in range(n)]
    g = memory(torch.stack(each).reshape(shape).to(dtype))
    p = torch.nn.Parameter(memory(torch.zeros_like(g)))
    options = dict(lr=1.0, momentum=0.0, weight_decay=0.0, ns_coefficients="polar_express", ns_steps=8)
    opt = muon([p], **options, stacked=True, backend=backend)
    p.grad = g
    opt.step()
    assert opt.routing()["layers.0.weight"].why == f"{n} matrices of [{rows}, {columns}]"
    for made, of in zip(p.detach().reshape(n, rows, columns), each, strict=True):
        u, _, vh = torch.linalg.svd(of, full_matrices=False)
        polar = u @ vh * max(1, math.sqrt(rows / columns))
        torch.testing.assert_close(-made.double(), polar, rtol=0, atol=2 * ROUNDING)


@pytest.mark.parametrize("memory", [torch.Tensor.contiguous, transposed])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(adjust_lr_fn="match_rms_adamw", normuon=True),
        dict(split_sizes=(16, 8), normuon=True),
        dict(num_heads=2, adjust_lr_fn="match_rms_adamw"),
    ],
    ids=str,
)
def test_a_stack_is_stepped_as_its_matrices_are(options, memory, backend):
    """Scalings, and where they are cut, are each matrix' own."""
    whole = [torch.nn.Parameter(memory(randn((3, 24, 10), seed))) for seed in (0, 1)]
    each = [torch.nn.Parameter(matrix.clone()) for p in whole for matrix in p.detach()]
    common = dict(lr=0.1, **options, backend=backend)
    opt, apart = muon(whole, stacked=True, **common), muon(each, **common)
    for step in range(3):
        set_grads(whole, step)
        for q, g in zip(each, (matrix for p in whole for matrix in p.grad), strict=True):
            q.grad = g.clone()
        opt.step()
        apart.step()
    torch.testing.assert_close(torch.cat([p.detach() for p in whole]), torch.stack(each).detach(), rtol=0, atol=2e-3)


def test_what_may_be_a_stack_or_a_convolution_is_asked_for(backend):
    """Of three dimensions; more are a convolution, and two are one matrix, whatever is said."""
    expected = r"'layers.0.weight' of shape \[4, 6, 8\] may be 4 matrices of \[6, 8\].*one of \[4, 48\].*stacked=True"
    with pytest.raises(ValueError, match=expected):
        muon(parameters([(4, 6, 8)]))
    params = parameters([(4, 6, 8), (6, 8), (2, 4, 6, 8)])
    groups = [
        dict(params=names(params)[:1], stacked=True),
        dict(params=names(params)[1:2], stacked=True),
        dict(params=names(params)[2:]),
    ]
    opt = optim.Muon(groups, backend=backend)
    assert [route.why for route in opt.routing().values()] == [
        "4 matrices of [6, 8]",
        "a matrix",
        "flattened to [2, 192]",
    ]
    train(opt, params)
    twin = optim.Muon([dict(group) for group in groups], stacked=None)
    twin.load_state_dict(saved(opt.state_dict()))
    assert [group["stacked"] for group in twin.param_groups] == [True, True, None]
    opt.param_groups[0]["stacked"] = None
    set_grads(params, 3)
    refused(opt, "layers.0.weight.*stacked=True", ValueError)
    opt.param_groups[0]["stacked"] = False
    opt.step()


@pytest.mark.parametrize("shape", [(0, 6, 8), (4, 0, 8), (4, 6, 0)], ids=str)
def test_empty_stacks(shape, backend):
    params = parameters([shape, (6, 8)])
    opt = muon(params, stacked=True, normuon=True, backend=backend)
    train(opt, params, 2)
    assert opt.state[params[0]]["momentum_buffer"].shape == shape


@pytest.mark.parametrize("options", [dict(split_sizes=(8, 16)), dict(num_heads=2), {}], ids=str)
def test_normuon_keeps_the_norm_of_each_matrix(options, backend):
    """Those of one parameter move as far as without, each."""
    sizes = options.get("split_sizes", (24 // options.get("num_heads", 1),) * options.get("num_heads", 1))
    ends = []
    for normuon in (False, True):
        (p,) = parameters([(24, 40)])
        opt = muon([p], lr=1.0, weight_decay=0.0, normuon=normuon, **options, backend=backend)
        before = p.detach().clone()
        train(opt, [p], 1)
        ends.append([part.norm().item() for part in (p.detach() - before).split(sizes)])
    assert ends[0] == pytest.approx(ends[1], rel=0.01)


def test_mean_squares_of_other_rows_are_refused(backend):
    params = parameters([(4, 6, 8), (5,)])
    opt = muon(params, stacked=True, normuon=True, backend=backend)
    train(opt, params)
    assert opt.state[params[0]]["row_square_avg"].shape == (24,)
    set_grads(params, 3)
    right = opt.state[params[0]]["row_square_avg"]
    for wrong in (right[1:], right.double(), right.to("meta"), 1.0):
        opt.state[params[0]]["row_square_avg"] = wrong
        refused(opt, r"'layers.0.weight', shape .*state 'row_square_avg' is .*expected torch.float32 of shape .24.")
    opt.state[params[0]]["row_square_avg"] = right
    opt.param_groups[0]["stacked"] = False
    refused(opt, r"expected torch.float32 of shape .4.")


def test_normuon_evens_rows_out(backend):
    """Each row then moves as far as any other, and the whole as far as without."""
    g = randn((16, 64), 0)
    g[3] *= 1e-3  # a row that orthogonality alone keeps small
    g[4:8] = g[8:12] + 0.1 * g[4:8]
    plain, evened = (update_of(g, normuon=on, backend=backend) for on in (False, True))
    spread = [u.norm(dim=1).max() / u.norm(dim=1).min() for u in (plain, evened)]
    assert spread[0] > 1.1 and spread[1] < 1.02
    assert plain.norm().item() == pytest.approx(evened.norm().item(), rel=0.01)


# Routing


def mixed():
    torch.manual_seed(0)
    block = torch.nn.ModuleDict(
        dict(attn=torch.nn.Linear(16, 48), conv=torch.nn.Conv1d(16, 8, 3), norm=torch.nn.LayerNorm(16))
    )
    model = torch.nn.ModuleDict(
        dict(
            wte=torch.nn.Embedding(30, 16),
            layers=torch.nn.ModuleList([block, copy.deepcopy(block)]),
            lm_head=torch.nn.Linear(16, 30, bias=False),
        )
    )
    return model.to(DEVICE)


def test_routing(caplog):
    model = mixed()
    with caplog.at_level(logging.WARNING, logger="genopt_ext.optim.muon"):
        opt = optim.Muon(model.named_parameters(), lr=0.02, adamw_lr=1e-3, adamw_betas=(0.8, 0.95), stacked=False)
    assert len(caplog.records) == 1 and "AdamW, named as an embedding: wte.weight" in caplog.text
    found = opt.routing()
    assert set(found) == {name for name, _ in model.named_parameters()}
    by_muon = {name for name, route in found.items() if route.algorithm == "muon"}
    assert by_muon == {f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("attn", "conv")}
    assert found["wte.weight"].why == "named as an embedding" and found["lm_head.weight"].why == "named as a head"
    assert found["layers.0.norm.weight"] == ("adamw", "1 dimension")
    of_muon, of_adamw = opt.param_groups
    assert of_muon["lr"] == 0.02 and of_adamw["lr"] == 1e-3 and of_adamw["betas"] == (0.8, 0.95)
    assert "momentum" not in of_adamw and "betas" not in of_muon
    with pytest.raises(TypeError):
        found["x"] = None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transformer.wte.weight", "embedding"),
        ("model.embed_tokens.weight", "embedding"),
        ("pos_embedding", "embedding"),
        ("tok.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("output.weight", "head"),
        ("_orig_mod.head.weight", "head"),
        ("encoder.layer.0.attention.output.dense.weight", None),
        ("layers.1.attention.output.weight", None),
        ("heads_mix.0.weight", None),
        ("stoke.weight", None),
        ("self_attn.in_proj_weight", None),
    ],
)
def test_names_of_embeddings_and_heads(name, expected):
    found = "embedding" if routing.is_embedding(name) else "head" if routing.is_head(name) else None
    assert found == expected


def test_routing_can_be_said():
    model = mixed()
    opt = optim.Muon(model.named_parameters(), adamw=lambda name, p: "attn" in name, stacked=False)
    by_muon = [name for name, route in opt.routing().items() if route.algorithm == "muon"]
    assert by_muon == ["wte.weight", "layers.0.conv.weight", "layers.1.conv.weight", "lm_head.weight"]
    groups = [
        dict(params=[("wte.weight", model["wte"].weight)], algorithm="muon", lr=0.5),
        dict(params=[("lm_head.weight", model["lm_head"].weight)], algorithm="adamw", betas=(0.5, 0.5)),
    ]
    opt = optim.Muon(groups)
    assert {name: route.algorithm for name, route in opt.routing().items()} == {
        "wte.weight": "muon",
        "lm_head.weight": "adamw",
    }
    opt.add_param_group(dict(params=list(model["layers"].named_parameters(prefix="layers")), stacked=False))
    assert [group["algorithm"] for group in opt.param_groups] == ["muon", "adamw", "muon", "adamw"]


def test_without_names_only_dimensions_tell(monkeypatch):
    monkeypatch.setattr(genopt_ext._backend, "_told", set())
    model = mixed()
    with pytest.warns(UserWarning, match="embeddings and heads can not be told apart") as told:
        opt = optim.Muon(model.parameters(), stacked=False)
    assert len(told) == 1
    assert {route.algorithm for name, route in opt.routing().items() if name.startswith("group 0")} == {"muon"}
    assert len(opt.param_groups[0]["params"]) == 6


@pytest.mark.parametrize("cautious", [None, "update"])
def test_adamws_groups_are_stepped_as_adamw_does(cautious, backend):
    model = mixed()
    twin = copy.deepcopy(model)
    options = dict(adamw_lr=0.01, adamw_weight_decay=0.1, stacked=False, cautious=cautious, backend=backend)
    opt = optim.Muon(model.named_parameters(), **options)
    own = opt.param_groups[1]["param_names"]
    other = optim.AdamW(
        [dict(twin.named_parameters())[name] for name in own], lr=0.01, weight_decay=0.1, cautious=cautious
    )
    for step in range(3):
        set_grads(list(model.parameters()), step)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        opt.step()
        other.step()
    for name in own:
        assert_same_bits(dict(model.named_parameters())[name].detach(), dict(twin.named_parameters())[name].detach())


# Refusals


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(lr=-1.0), "Invalid learning rate"),
        (dict(momentum=-1.0), "Invalid momentum"),
        (dict(weight_decay=NAN), "Invalid weight decay"),
        (dict(ns_steps=100), "ns_steps must be a finite number"),
        (dict(ns_steps=2.5), "ns_steps must be an integer"),
        (dict(ns_coefficients=(1.0, 2.0)), "exactly 3 values"),
        (dict(adjust_lr_fn="rms"), "Adjust learning rate function rms is not supported"),
        (dict(num_heads=3), "4 rows, which num_heads=3 does not divide"),
        (dict(split_sizes=(3, 3)), r"4 rows, which split_sizes=\(3, 3\) do not add up to"),
        (dict(split_sizes=(2, 2), num_heads=2), "give only one of them"),
        (dict(stacked=2), "stacked must be True, False or None"),
        (dict(agc=0.1), "agc is not served by Muon"),
        (dict(clip_per_param=1.0), "clip_per_param is not served by Muon"),
        (dict(state_dtype=torch.float16), "Invalid state_dtype"),
        (dict(normuon_beta2=1.0), "normuon_beta2"),
        (dict(fused=True), "unexpected keyword argument 'fused'"),
    ],
    ids=str,
)
def test_options_are_refused(options, match):
    with pytest.raises((TypeError, ValueError), match=match):
        muon(parameters([(4, 4)]), **options)


@pytest.mark.parametrize(
    ("group", "match"),
    [
        (dict(params=[("a", torch.zeros(4))], algorithm="muon"), "'a' of shape .4. has 1 dimension, and Muon needs"),
        (dict(params=[("a", torch.zeros(4, 4))], algorithm="sgd"), "Invalid algorithm: 'sgd'"),
        (dict(params=[("a", torch.zeros(4, 4))], algorithm="adamw", momentum=0.9), "momentum is no option of"),
        (dict(params=[("a", torch.zeros(4, 4))], betas=(0.9, 0.9)), "betas is no option of algorithm='muon'"),
        (dict(params=[("a", torch.zeros(4, 4, dtype=torch.cfloat))], algorithm="muon"), "needs real matrices"),
        (dict(params=[("a", torch.zeros(2, 4, 3))]), "may be 2 matrices of .4, 3., as of experts, or a convolution"),
        (dict(params=[("a", torch.zeros(2, 4, 3))], stacked=True, num_heads=3), "4 rows, which num_heads=3 does not"),
        (dict(params=[("a", torch.zeros(4, 3))], stacked=True, algorithm="adamw"), "stacked is no option of"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_groups_are_refused(group, match):
    opt = muon(parameters([(4, 4)]))
    for p in (p for _, p in group["params"]):
        p.requires_grad_()
    before = dict(opt.routing())
    with pytest.raises(ValueError, match=match):
        opt.add_param_group(group)
    assert len(opt.param_groups) == 1 and opt.routing() == before


def test_flattened_and_sharded_parameters_are_refused():
    flat = torch.nn.Parameter(torch.zeros(64))
    flat._fsdp_flattened = True
    with pytest.raises(ValueError, match="flattens and cuts it, and Muon needs whole matrices"):
        optim.Muon([("flat", flat)])

    class Sharded(torch.Tensor):
        pass

    part = torch.nn.Parameter(torch.zeros(4, 4).as_subclass(Sharded))
    with pytest.raises(ValueError, match="of which a process may hold a part"):
        optim.Muon([("part", part)])
    optim.Muon([dict(params=[("part", part)], algorithm="adamw")])


def test_step_in_backward_is_refused():
    with pytest.raises(TypeError, match="Muon steps matrices of one shape together"):
        genopt_ext.step_in_backward(muon(parameters([(4, 4)])))


def test_a_refused_step_changes_nothing(backend):
    """Whichever of the two algorithms refuses."""
    params = parameters([(4, 4), (6, 4), (5,)])
    opt = muon(params, backend=backend)
    train(opt, params)
    for p, wrong in ((params[1], torch.zeros(6, 4).to_sparse()), (params[2], torch.zeros(5).to_sparse())):
        set_grads(params, 3)
        p.grad = wrong.to(DEVICE)
        refused(opt, r"does not support sparse gradients|sparse")
    set_grads(params, 3)
    for name, place in (("momentum_buffer", 0), ("exp_avg", 2)):
        right = opt.state[params[place]][name]
        opt.state[params[place]][name] = torch.zeros(3)
        refused(opt, f"'layers.{place}.weight', shape .*state '{name}' has shape .3.")
        opt.state[params[place]][name] = right
    opt.param_groups[0]["momentum"] = -1.0
    refused(opt, "group 0: Invalid momentum", ValueError)


def test_what_torch_refuses_is_refused_in_its_words():
    for wrong, match in (
        ([[1]], "can only optimize Tensors"),
        ([], "empty parameter list"),
        ({1}, "ordered collections|Tensors|order"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            optim.Muon(wrong)
    (p,) = parameters([(4, 4)])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = muon([p, p])
    p.grad = torch.ones_like(p)
    refused(opt, "listed twice")


# Around the step


@KERNELS
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(state_dtype=torch.int8, min_int8_size=1),
        dict(param_rounding="stochastic", state_dtype=torch.bfloat16),
        dict(master_weights=True, ema_decay=0.9),
        dict(param_rounding="kahan", max_grad_norm=1.0, clip_grad_value=0.5, normuon=True),
        dict(cautious="update", max_grad_norm=1.0),
    ],
    ids=str,
)
def test_reference_and_kernels_give_the_same_bits(dtype, options):
    ends = []
    for backend in ("auto", "reference"):
        torch.manual_seed(1)
        params = parameters([(16, 24), (16, 24), (30, 7), (300,)], dtype)
        opt = muon(params, lr=0.1, backend=backend, **options)
        train(opt, params)
        ends.append(opt)
    assert_same_state(*ends)


@pytest.mark.parametrize("options", [dict(param_rounding="stochastic"), dict(master_weights=True)], ids=str)
def test_small_updates_of_bfloat16_are_not_lost(options, backend):
    """To the nearest number they would be, each time."""
    ends = {}
    for way, given in (("exact", {}), ("nearest", {}), ("kept", options)):
        p = torch.nn.Parameter(torch.ones(32, 32, dtype=torch.float32 if way == "exact" else torch.bfloat16))
        opt = muon([p], lr=1e-3, weight_decay=0.0, backend=backend, **given)
        for _ in range(20):
            p.grad = randn(p.shape, 0, p.dtype)
            opt.step()
        ends[way] = p.detach().float()
    assert (ends["nearest"] == 1).float().mean() > 0.9
    error = (ends["kept"] - ends["exact"]).mean().abs()
    assert error < 5e-4 and ((ends["kept"] != 1).float().mean() > 0.2)


def test_storage_chosen_between_steps_is_kept(backend):
    params = parameters([(16, 24), (16, 24)], torch.bfloat16)
    opt = muon(params, backend=backend)
    train(opt, params, 2)
    opt.param_groups[0]["master_weights"] = True
    train(opt, params, 1, first=2)
    masters = [opt.state[p]["master"] for p in params]
    train(opt, params, 1, first=3)
    assert all(opt.state[p]["master"] is master for p, master in zip(params, masters, strict=True))
    opt.param_groups[0]["master_weights"] = False
    opt.param_groups[0]["state_dtype"] = torch.float32
    train(opt, params, 1, first=4)
    assert opt.state[params[0]].keys() == {"momentum_buffer"}
    assert opt.state[params[0]]["momentum_buffer"].dtype == torch.float32


def test_what_changes_between_steps_is_seen(backend):
    """Parameters that have lost their gradient, changed their memory or their options."""
    ends = []
    for again in (False, True):
        params = parameters([(6, 8), (6, 8), (8, 8)])
        opt = muon(params, lr=0.1, backend=backend)
        for step in range(5):
            set_grads(params, step, lambda i, step=step: (i + step) % 3 == 0)
            if step == 2:
                params[2].data = params[2].data.t().contiguous().t()
                opt.param_groups[0]["nesterov"] = False
            if step == 3:
                opt.param_groups[0].update(ns_steps=3, num_heads=2)
            if again:  # as if there had been no step before
                opt.__dict__.pop("stepper", None)
            opt.step()
        ends.append([p.detach() for p in params])
    assert_same_bits(*ends)


@pytest.mark.parametrize("scaler", [torch.amp.GradScaler, genopt_ext.GradScaler])
def test_grad_scaler_skips_both(scaler, backend):
    for wrong in range(3):
        params = parameters([(6, 8), (5,), (6, 8)])
        opt = muon(params, backend=backend, normuon=True)
        scale = scaler(DEVICE, init_scale=4.0)
        scale.scale(torch.zeros((), device=DEVICE))
        train(opt, params)
        before = snapshot(opt)
        set_grads(params, 3)
        params[wrong].grad[0] = INF
        scale.step(opt)
        scale.update()
        assert scale.get_scale() == 2.0
        assert_unchanged(opt, before)


@pytest.mark.parametrize("wrong", range(3))
def test_skip_nonfinite_skips_both(wrong, backend):
    params = parameters([(6, 8), (5,), (6, 8)])
    opt = muon(params, skip_nonfinite=True, normuon=True, backend=backend)
    for first in (True, False):  # at the very first step too
        before = snapshot(opt)
        set_grads(params, 0)
        params[wrong].grad.view(-1)[1] = NAN
        opt.step()
        if first:
            assert_unchanged(opt, before, may_begin=True)
            assert not any(t.any() for state in opt.state.values() for t in state.values())
        else:
            assert_unchanged(opt, before)
        train(opt, params, 1)
    assert opt.skipped_steps == 2


@pytest.mark.parametrize("bound", [0.5, 1e6])
def test_max_grad_norm_is_clipping_first(bound, backend):
    ours, theirs = parameters([(6, 8), (5,), (8, 6)]), parameters([(6, 8), (5,), (8, 6)])
    opt, other = muon(ours, max_grad_norm=bound, backend=backend), muon(theirs, backend=backend)
    for step in range(3):
        set_grads(ours, step)
        set_grads(theirs, step)
        opt.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, bound)
        other.step()
        torch.testing.assert_close(opt.grad_norm, norm)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-3 * 2e-2)


def test_groups_are_clipped_by_norms_of_their_own(backend):
    ours, theirs = (parameters([(6, 8), (8, 6), (5,)]) for _ in range(2))

    def made(params, *bounds):
        of = zip(names(params), bounds, strict=True)
        return optim.Muon([dict(params=[named], max_grad_norm=bound) for named, bound in of], backend=backend)

    opt, other = made(ours, 0.5, None, 0.25), made(theirs, None, None, None)
    for step in range(3):
        set_grads(ours, step)
        set_grads(theirs, step)
        opt.step()
        for p, bound in ((theirs[0], 0.5), (theirs[2], 0.25)):
            torch.nn.utils.clip_grad_norm_([p], bound)
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-3 * 2e-2)


def test_scaler_leaves_gradients_unscaled(backend):
    ours, theirs = parameters([(6, 8), (5,)]), parameters([(6, 8), (5,)])
    opt, other = muon(ours, backend=backend), muon(theirs, backend=backend)
    scaler = genopt_ext.GradScaler(DEVICE, init_scale=4.0, unscale_grads=True)
    scaler.scale(torch.zeros((), device=DEVICE))
    set_grads(ours, 0)
    set_grads(theirs, 0)
    for p in ours:
        p.grad *= 4
    scaler.step(opt)
    other.step()
    assert_same_bits([p.detach() for p in ours], [q.detach() for q in theirs])
    assert_same_bits([p.grad for p in ours], [q.grad for q in theirs])


def test_accumulate_takes_the_mean(backend):
    ours, theirs = parameters([(6, 8), (5,)]), parameters([(6, 8), (5,)])
    opt, other = muon(ours, backend=backend), muon(theirs, backend=backend)
    for step in (0, 1):
        set_grads(ours, step)
        sums = [p.grad.clone() if step == 0 else q.grad + p.grad for p, q in zip(ours, theirs, strict=True)]
        for q, g in zip(theirs, sums, strict=True):
            q.grad = g
        opt.accumulate()
    opt.step()
    for q in theirs:
        q.grad /= 2
    other.step()
    assert_same_bits([p.detach() for p in ours], [q.detach() for q in theirs])


def test_gradients_are_zeroed(backend):
    params = parameters([(6, 8), (5,)])
    opt = muon(params, backend=backend)
    set_grads(params, 0)
    opt.step_and_zero_()
    assert all((p.grad == 0).all() for p in params)


def test_averages_move_without_gradients(backend):
    params = parameters([(6, 8), (5,)])
    opt = muon(params, ema_decay=0.5, backend=backend)
    train(opt, params, 1)
    before = [opt.state[p]["ema"].clone() for p in params]
    with torch.no_grad():
        for p in params:
            p.add_(1)
            p.grad = None
    opt.step()
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(opt.state[p]["ema"], old + 0.5)
    with opt.swap_ema():
        assert_same_bits(params[0].detach(), opt.state[params[0]]["ema"])


def test_missing_gradients_and_empty_groups(backend):
    params = parameters([(6, 8), (6, 8), (0, 8), (5,)])
    opt = optim.Muon([dict(params=params), dict(params=[])], max_grad_norm=1.0, backend=backend)
    opt.step()  # no gradient at all
    assert opt.grad_norm == 0 and not any(opt.state.values())
    params[0].grad = torch.ones_like(params[0])
    params[2].grad = torch.ones_like(params[2])
    before = params[1].detach().clone()
    opt.step()
    assert_same_bits(params[1].detach(), before)
    assert params[1] not in opt.state and params[0] in opt.state


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=str)
def test_schedules_and_two_optimizers(lr, backend):
    """One optimizer's matrices are none of another's; a learning rate may be a tensor."""
    ends = []
    for other in (False, True):
        params, more = parameters([(6, 8), (5,)]), parameters([(6, 8)], seed=7)
        opt = muon(params, lr=lr if isinstance(lr, float) else lr.clone(), backend=backend)
        schedule = optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
        second = muon(more, lr=1.0, backend=backend)
        for step in range(3):
            set_grads(params, step)
            opt.step()
            schedule.step()
            if other:
                train(second, more, 1)
        assert float(opt.param_groups[0]["lr"]) == pytest.approx(0.1 / 8)
        ends.append([p.detach() for p in params])
    assert_same_bits(*ends)


@pytest.mark.parametrize("kind", ["meta", "fake", "compiled", "inference"])
def test_steps_without_numbers_and_in_other_modes(kind):
    """On meta, under FakeTensorMode, as one opaque call to Dynamo, and in inference mode and outside of it."""
    with FakeTensorMode() if kind == "fake" else contextlib.nullcontext():
        device = "meta" if kind == "meta" else DEVICE
        params = [torch.nn.Parameter(torch.ones(shape, device=device)) for shape in ((6, 8), (5,))]
        opt = muon(params, max_grad_norm=1.0, skip_nonfinite=True, normuon=True)
        for p in params:
            p.grad = torch.ones_like(p)
        step = torch.compile(opt.step, backend="eager") if kind == "compiled" else opt.step
        with torch.inference_mode() if kind == "inference" else contextlib.nullcontext():
            step()
        step()
        assert opt.state[params[0]]["momentum_buffer"].shape == (6, 8)
        if kind in ("compiled", "inference"):
            assert (params[0] != 1).all() and opt.state[params[1]]["step"] == 2


def test_many_matrices_are_stepped_some_at_a_time(monkeypatch, backend):
    ends = []
    for elements in (1 << 24, 100):
        monkeypatch.setattr(muon_matrices, "ELEMENTS", elements)
        params = copies_of(parameters([(6, 8)] * 5 + [(9, 8)] * 2 + [(5,)]))
        train(muon(params, max_grad_norm=1.0, backend=backend), params)
        ends.append(params)
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=ROUNDING * 1e-3)


def test_cautious_decay_spares_what_the_update_moves_away_from_zero(backend):
    """Of matrices, and of what AdamW steps inside."""
    ends = {}
    for cautious in (None, "weight_decay"):
        params = parameters([(16, 24), (24,)])
        opt = muon(params, weight_decay=0.5, lr=0.1, cautious=cautious, backend=backend)
        start = [p.detach().clone() for p in params]
        train(opt, params, 1)
        ends[cautious] = [p.detach() for p in params]
    for p, plain, spared in zip(start, *ends.values(), strict=True):
        update = p - (plain + 0.1 * 0.5 * p)
        expected = torch.where(update * p < 0, p - update, plain)
        torch.testing.assert_close(spared, expected, rtol=1e-5, atol=1e-6)
        assert (spared != plain).any() and (spared == plain).any()


CAUTIOUS = [
    ((16, 24), {}),
    ((24, 10), dict(split_sizes=(16, 8), normuon=True, adjust_lr_fn="match_rms_adamw")),
    ((3, 24, 10), dict(stacked=True, num_heads=2)),
    ((8, 4, 3, 3), dict(nesterov=False)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "options"), CAUTIOUS, ids=str)
def test_cautious_updates_have_the_gradients_sign(shape, options, dtype, backend):
    """Of each matrix, the share of elements that agree divides those."""
    options = dict(options, lr=0.1, weight_decay=0.0, backend=backend)
    params, plain = parameters([shape] * 2, dtype), parameters([shape] * 2, dtype)
    opt, other = muon(params, cautious="update", **options), muon(plain, **options)
    for step in range(3):
        set_grads(params, step)
        set_grads(plain, step)
        before = [[p.detach().clone() for p in of] for of in (params, plain)]
        opt.step()
        other.step()
        for p, q, *old in zip(params, plain, *before, strict=True):
            update, whole = old[0] - p.detach(), old[1] - q.detach()
            group = opt.param_groups[0]
            rows = routing.matrix_blocks(p, group)
            _, _, columns = routing.matrices(p, group)
            parts = (t.reshape(sum(rows), columns).split(rows) for t in (update, whole, p.grad))
            for made, of, g in zip(*parts, strict=True):
                agrees = of * g > 0
                assert 0.1 < agrees.double().mean() < 0.99 or step == 0
                expected = of * agrees / agrees.double().mean()
                torch.testing.assert_close(made, expected.to(dtype), rtol=2**-7, atol=1e-6)


def test_the_share_that_agrees_counts_as_a_thousandth_at_least(backend):
    ends = {}
    g = randn((64, 64), 0)
    for agreeing in (None, 0, 1):
        p = torch.nn.Parameter(torch.zeros(64, 64))
        opt = muon([p], lr=1.0, weight_decay=0.0, cautious=None if agreeing is None else "update", backend=backend)
        p.grad = g.clone()
        opt.step()
        before = p.detach().clone()
        sign = ends[None].sign() if agreeing is not None else torch.zeros_like(g)
        p.grad = 1e-30 * sign  # too small to change the update
        if agreeing:
            p.grad[3, 5] *= -1
        opt.step()
        ends[agreeing] = p.detach() - before
    assert ends[None][3, 5] != 0 and (ends[0] == 0).all()
    assert (ends[1] != 0).sum() == 1
    assert ends[1][3, 5].item() == pytest.approx(1000 * ends[None][3, 5].item(), rel=2**-7)


@pytest.mark.parametrize("way", ["zeroed", "accumulated", "scaled", "missing"])
def test_cautious_updates_see_gradients_before_they_are_left(way, backend):
    """Zeroed ones too, and where another parameter has none."""
    ends = []
    for again in (False, True):
        params = parameters([(6, 8), (6, 8), (8, 6)])
        opt = muon(params, lr=0.1, cautious="update", normuon=True, backend=backend)
        scaler = genopt_ext.GradScaler(DEVICE, init_scale=4.0, unscale_grads=True)
        scaler.scale(torch.zeros((), device=DEVICE))
        for step in range(3):
            set_grads(params, step, (lambda i: i == 1) if way == "missing" else lambda i: False)
            if not again or way == "missing":
                opt.step()
            elif way == "zeroed":
                opt.step_and_zero_()
                assert all((p.grad == 0).all() for p in params)
            elif way == "accumulated":
                opt.accumulate()
                opt.step()
            else:
                before = [p.grad.clone() for p in params]
                for p in params:
                    p.grad *= 4
                scaler.step(opt)
                scaler.update()
                assert_same_bits([p.grad for p in params], before)
        ends.append([p.detach() for p in params])
    assert_same_bits(*ends)


def test_cautious_updates_are_nan_where_others_are(backend):
    (p,) = parameters([(6, 8)])
    opt = muon([p], cautious="update", backend=backend)
    p.grad = randn((6, 8), 0)
    p.grad[2, 3] = NAN
    opt.step()
    assert p.isnan().all()


def test_init_state():
    """Of both algorithms, before the first step."""
    params = [torch.nn.Parameter(randn(shape, i)) for i, shape in enumerate([(4, 3), (5,)])]
    opt = optim.Muon([("hidden", params[0]), ("bias", params[1])], normuon=True)
    before = [p.detach().clone() for p in params]
    opt.init_state()
    assert_same_bits([p.detach() for p in params], before)
    assert set(opt.state[params[0]]) == {"momentum_buffer", "row_square_avg"}
    assert set(opt.state[params[1]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert opt.state[params[1]]["step"] == 0
