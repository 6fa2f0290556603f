"""fake_quantize against torch's and quantize; quantize_module_ on small models, and all that modules go through."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from cases import COPIES, DTYPES, INF, NAN, assert_same_bits, randn, saved
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from genopt_ext import quant
from genopt_ext.quant.layers import QuantizedLinear, QuantizedWeight

FAKE = torch.ops.genopt_ext.fake_quantize_cachemask.default


def forward_and_gradient(f, x):
    x = x.detach().clone().requires_grad_()
    y = f(x)
    y.backward(randn(y.shape, 9).to(y.dtype))
    return y.detach(), x.grad


# fake_quantize


def assert_same_as(ours, theirs, x, kept=None):
    """Bits of what comes out, and of its gradient; ``kept``: the dtype in which what comes out agrees."""
    (y, grad), (other, other_grad) = (forward_and_gradient(f, x) for f in (ours, theirs))
    assert_same_bits(y.to(kept or x.dtype), other.to(kept or x.dtype))
    assert_same_bits(grad, other_grad)


@pytest.mark.parametrize("point", (0, 5))
@pytest.mark.parametrize(("low", "high"), [(-128, 127), (0, 255), (-8, 7)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_equals_torch_per_tensor(dtype, low, high, point):
    # For float64 torch rounds the product to float32 here, though not per channel.
    kept = torch.float32 if dtype == torch.float64 else dtype
    for shape, scale in itertools.product([(4099,), (), (0, 3), (7, 5)], (0.013, 0.5, 1 / 3, 1e-6)):
        assert_same_as(
            lambda x: quant.fake_quantize(x, scale, point, quant_min=low, quant_max=high),  # noqa: B023
            lambda x: torch.fake_quantize_per_tensor_affine(x, scale, point, low, high),  # noqa: B023
            randn(shape, 1).to(dtype),
            kept,
        )


@pytest.mark.parametrize(("shape", "axis"), [((30, 70), 0), ((30, 70), 1), ((3, 5, 7), 1), ((9,), 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", (8, 4))
def test_fake_equals_torch_per_channel(dtype, bits, shape, axis):
    scale = randn((shape[axis],), 2).abs() * 0.01 + 0.001
    point = torch.arange(shape[axis], dtype=torch.int32) % 15 - 7
    highest = 2 ** (bits - 1) - 1
    assert_same_as(
        lambda x: quant.fake_quantize(x, scale, point, bits=bits, scheme="channel", axis=axis - x.dim()),
        lambda x: torch.fake_quantize_per_channel_affine(x, scale, point, axis, -highest - 1, highest),
        randn(shape, 1).to(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.parametrize("units", ({}, dict(scheme="channel", axis=-1), dict(scheme="block", block_size=32)), ids=str)
def test_fake_is_there_and_back(units, bits, symmetric, dtype):
    x = randn((30, 41), 3).to(dtype)
    q = quant.quantize(x, bits=bits, symmetric=symmetric, **units)
    y, grad = forward_and_gradient(lambda x: quant.fake_quantize(x, bits=bits, symmetric=symmetric, **units), x)
    assert_same_bits(y, quant.dequantize(q))
    assert_same_bits(grad, randn(y.shape, 9).to(dtype))
    # float64 has the inverse scale in double there and, as in torch, in float32 here.
    again = quant.fake_quantize(x, q.scale, q.zero_point, bits=bits, **units)
    if dtype != torch.float64:
        assert_same_bits(again, y)
    else:
        assert (again - y).abs().max() <= q.scale.max() * 1.001 and (again != y).float().mean() < 1e-3


def test_fake_gradient_stops_where_clamped():
    x = torch.tensor([-13.0, -12.74, 0.0, 12.74, 12.76, 1e30, -1e30])
    y, grad = forward_and_gradient(lambda x: quant.fake_quantize(x, 0.1), x)
    assert_same_bits(grad != 0, torch.tensor([False, True, True, True, False, False, False]))
    assert y.abs().max() == torch.tensor(127.0) * 0.1
    weight = torch.tensor([0.1], requires_grad=True)
    quant.fake_quantize(x, weight)  # scales get no gradient
    assert not quant.fake_quantize(x, weight).requires_grad


def test_fake_layouts():
    base = randn((8, 6, 5, 4), 0)
    for x in (
        base.to(memory_format=torch.channels_last),
        base.transpose(0, 2),
        base[:, ::2],
        base[:1].expand(3, 6, 5, 4),
    ):
        for how in ({"scale": 0.02}, {"scale": torch.full((x.shape[1],), 0.02), "scheme": "channel", "axis": 1}, {}):
            assert_same_bits(quant.fake_quantize(x, **how), quant.fake_quantize(x.contiguous(), **how))
    assert quant.fake_quantize(base.to(memory_format=torch.channels_last), 0.1).stride() == (120, 1, 24, 6)


@pytest.mark.parametrize("value", (NAN, INF, -INF))
def test_fake_nonfinite(value):
    x = torch.tensor([1.0, value])
    for scale in (None, 0.1):
        with pytest.raises(ValueError, match="NaN or infinite"):
            quant.fake_quantize(x, scale)
    assert quant.fake_quantize(x, nonfinite="propagate").isnan().all()
    y, grad = forward_and_gradient(lambda x: quant.fake_quantize(x, 0.1, nonfinite="propagate"), x)
    torch.testing.assert_close(y, x.clamp(-127 * 0.1, 127 * 0.1), equal_nan=True)
    assert grad[1] == 0


@pytest.mark.parametrize("bad", (0.0, -1.0, NAN, INF, 1e-40))
def test_fake_scales_that_are_none(bad):
    scale = torch.tensor([0.1, bad])
    with pytest.raises(ValueError, match="every scale must be finite and at least"):
        quant.fake_quantize(torch.ones(2), scale, scheme="channel")
    y = quant.fake_quantize(torch.ones(2), scale, scheme="channel", nonfinite="propagate")
    assert y[0] == 1 and y[1].isnan()


def test_fake_of_large_scales_is_finite():
    assert quant.fake_quantize(torch.tensor([6e4]).half(), 1e4, quant_min=-10, quant_max=10).isfinite().all()


X = torch.ones(4, 6)
REFUSED = [
    (TypeError, "x must be a tensor, got list", dict(x=[1.0])),
    (TypeError, "float32, bfloat16, float16 and float64, got torch.int64", dict(x=torch.ones(3, dtype=torch.int64))),
    (TypeError, "got torch.complex64", dict(x=torch.ones(3, dtype=torch.complex64), scale=0.1)),
    (TypeError, "x must be dense", dict(x=X.to_sparse(), scale=0.1)),
    (TypeError, "scale must be float32, got torch.float64", dict(scale=torch.ones((), dtype=torch.float64))),
    (TypeError, "scale must be a number, a tensor or None, got str", dict(scale="1")),
    (ValueError, "scale must be finite and at least 1.2e-38, got -0.1", dict(scale=-0.1)),
    (ValueError, "scale must be finite", dict(scale=NAN)),
    (ValueError, r"scale must have 1 element in .* 'tensor' and x", dict(scale=torch.ones(2))),
    (
        ValueError,
        r"scale must have 6 elements .* 'channel' of axis 1",
        dict(scale=torch.ones(4), scheme="channel", axis=1),
    ),
    (ValueError, "32-element blocks", dict(scale=torch.ones(4), scheme="block", block_size=32)),
    (ValueError, "zero_point must have 4", dict(scale=torch.ones(4), zero_point=torch.ones(3).int(), scheme="channel")),
    (ValueError, "scale is on meta and x on cpu", dict(scale=torch.ones((), device="meta"))),
    (TypeError, "zero_point must be of integers", dict(scale=0.1, zero_point=torch.ones(()))),
    (TypeError, "zero_point must be an integer", dict(scale=0.1, zero_point=1.5)),
    (ValueError, "zero_point must be from -128 to 127, got 128", dict(scale=0.1, zero_point=128)),
    (ValueError, "zero_point must be from -128 to 127, got 300", dict(scale=0.1, zero_point=torch.tensor(300))),
    (ValueError, "0 is not from 1 to 255", dict(scale=0.1, quant_min=1, quant_max=255)),
    (ValueError, "quant_min must be below quant_max", dict(scale=0.1, quant_min=3, quant_max=3)),
    (TypeError, "quant_min must be an integer or None, got 0.5", dict(scale=0.1, quant_min=0.5)),
    (ValueError, "quant_max goes with scale only", dict(quant_max=15)),
    (ValueError, "zero_point goes with scale only", dict(zero_point=1)),
    (ValueError, "symmetric=False with a scale expects a zero_point", dict(scale=0.1, symmetric=False)),
    (TypeError, "symmetric must be True or False", dict(symmetric=2)),
    (ValueError, "axis 2 is not one of", dict(scale=torch.ones(4), scheme="channel", axis=2)),
    (ValueError, "bits must be one of 8, 4, got 2", dict(bits=2)),
    (ValueError, "block_size must be a power of two", dict(scheme="block", block_size=48)),
    (ValueError, "nonfinite must be one of", dict(nonfinite="ignore")),
]


@pytest.mark.parametrize("kind, message, how", REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_fake_refuses(kind, message, how):
    with pytest.raises(kind, match=f"fake_quantize: .*{message}|quantize: .*{message}"):
        quant.fake_quantize(**{"x": X, **how})


# torch 2.14: opcheck reads .grad of a clone.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_fake_opcheck():
    dense, transposed = randn((6, 40), 0), randn((40, 6), 0).t()
    holes, expanded = randn((6, 80), 0)[:, ::2], randn((1, 40), 0).expand(6, 40)
    layout_alone = dict(test_utils=("test_schema", "test_faketensor"))
    for x, scheme, units, point, how in (
        (dense, "block", 8, torch.ones(8, dtype=torch.int32), {}),
        (transposed, "channel", 6, None, layout_alone),
        (holes, "tensor", 1, None, layout_alone),
        (expanded, "block", 8, None, layout_alone),
    ):
        range_of_codes = (0, 32, point is None, -128, 127, "error")
        scale = torch.full((units,), 0.03)
        torch.library.opcheck(FAKE, (x.detach().requires_grad_(), scale, point, 8, scheme, *range_of_codes), **how)
    x = transposed.detach().requires_grad_()
    torch.library.opcheck(FAKE, (x, None, None, 4, "channel", 0, 0, False, -8, 7, "propagate"))


@pytest.mark.parametrize("dynamic", (False, True))
def test_fake_compiles(dynamic):
    torch.compiler.reset()

    def run(x, scale):
        w = quant.fake_quantize(x, bits=4, scheme="block", block_size=32)
        return quant.fake_quantize(w * 2, scale, scheme="channel", axis=1) + quant.fake_quantize(x, 0.1, 3)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (6, 11):
        x, scale = randn((rows, 40), 0), torch.full((40,), 0.01)
        assert_same_as(lambda x: compiled(x, scale), lambda x: run(x, scale), x)  # noqa: B023


def test_fake_trains():
    torch.manual_seed(0)
    x, target = randn((64, 16), 0), randn((8, 16), 1)
    w = nn.Parameter(torch.zeros(8, 16))
    optimizer = torch.optim.Adam([w], lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (F.linear(x, quant.fake_quantize(w, bits=4, scheme="channel")) - F.linear(x, target)).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.02 * F.linear(x, target).square().mean()


# quantize_module_


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norm(x))))


class GPT(nn.Module):
    def __init__(self, tied=True, width=32):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(100, width), nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 100, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, index):
        x = self.tokens(index) + self.positions(torch.arange(index.shape[1], device=index.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Convs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, groups=4, padding="same", padding_mode="reflect"),
            nn.ConvTranspose2d(16, 8, 4, 2),
            nn.ConvTranspose2d(8, 8, 3, groups=2, output_padding=0),
        )

    def forward(self, x):
        return self.net(x)


INDEX = torch.arange(24).reshape(2, 12) * 7 % 100
IMAGES = randn((2, 3, 8, 8), 5)
HOW = [
    dict(bits=bits, scheme=scheme, block_size=32, symmetric=symmetric)
    for bits, scheme, symmetric in itertools.product((8, 4), ("tensor", "channel", "block"), (True, False))
]


def gpt(seed=0, tied=True):
    torch.manual_seed(seed)
    return GPT(tied).eval()


def convs(seed=0):
    torch.manual_seed(seed)
    return Convs().eval()


MODELS = pytest.mark.parametrize(("make", "x"), ((gpt, INDEX), (convs, IMAGES)), ids=("gpt", "convs"))


def quantized(model, **how):
    quant.quantize_module_(model, **how)
    return model


@pytest.mark.parametrize("how", HOW, ids=str)
@MODELS
def test_module_computes_with_dequantized_weights(how, make, x):
    model, expected = make(), make()
    report = quant.quantize_module_(model, **how)
    assert report.layers and report.bytes_after < report.bytes_before
    for name in report.layers:
        old, new = expected.get_submodule(name), model.get_submodule(name)
        assert type(new).__name__.startswith("Quantized") and isinstance(new, type(old))
        if report.layers[name].tied_to:  # overwritten below already
            assert_same_bits(new.weight, old.weight, name)
            continue
        q = quant.quantize(old.weight, **how, axis=new.quantized_weight.axis)
        assert_same_bits(new.weight, quant.dequantize(q), name)
        assert (new.weight - old.weight).abs().max() <= 0.5001 * q.scale.max().item()
        assert "weight" not in dict(new.named_parameters(recurse=False))
        old.weight.data.copy_(new.weight)
    with torch.no_grad():
        y, whole = model(x), make()(x)
        assert_same_bits(y, expected(x))
        assert (y - whole).abs().max() <= whole.abs().max() * (0.05 if how["bits"] == 8 else 0.7)


@pytest.mark.parametrize("width", (64, 33, 48))
@pytest.mark.parametrize("how", HOW, ids=str)
def test_embeddings_look_rows_up(how, width):
    index = torch.tensor([[3, 0, 9], [9, 9, 1]])
    layer = quantized(nn.Embedding(10, width, padding_idx=0), **how)
    for i in (index, index[:0], index[0, 0]):
        assert_same_bits(layer(i), layer.weight[i])
    with pytest.raises(IndexError):
        layer(torch.tensor([10]))
    bag = quantized(nn.EmbeddingBag(10, width), **how)
    assert_same_bits(bag(index), F.embedding_bag(index, bag.weight))


@pytest.mark.parametrize(
    ("make", "axis"),
    [
        (lambda: nn.Conv1d(8, 6, 5), 0),
        (lambda: nn.Conv3d(8, 6, 3), 0),
        (lambda: nn.ConvTranspose1d(8, 6, 5), 1),
        (lambda: nn.ConvTranspose3d(8, 6, 3), 1),
        (lambda: nn.ConvTranspose2d(8, 6, 5, groups=2), 0),
    ],
)
def test_axes(make, axis):
    layer = make()
    shape = layer.weight.shape
    weight = quantized(layer).quantized_weight
    assert weight.axis == axis and weight.scale.shape == shape[axis : axis + 1]
    layer(randn((1, 8) + (6,) * (len(shape) - 2), 0))


@pytest.mark.parametrize("how", (HOW[2], HOW[-1]), ids=str)
@MODELS
def test_state_dict_goes_round(how, make, x):
    model, other, third = (quantized(make(seed), **how) for seed in range(3))
    expected = model(x)
    state = saved(model.state_dict())
    assert not any(key.endswith("like") for key in state)
    other.load_state_dict(state)
    third.load_state_dict(state, assign=True)
    for copied in (other, third, saved(model, weights_only=False), *(copied(model) for copied in COPIES.values())):
        assert_same_bits(copied(x), expected)
        if make is gpt:
            assert copied.tokens.quantized_weight is copied.head.quantized_weight


def test_keys():
    model = quantized(nn.Sequential(nn.Linear(64, 8)), symmetric=False)
    assert list(model.state_dict()) == [
        "0.bias",
        *(f"0.quantized_weight.{x}" for x in ("codes", "scale", "zero_point")),
    ]


def test_loading_refuses_other_forms():
    def linear(**how):
        return quantized(nn.Linear(64, 64), **how)

    forms = [*HOW[::2], dict(symmetric=False)]
    for one, other in itertools.permutations(forms, 2):
        with pytest.raises(RuntimeError, match="quantized_weight"):
            linear(**one).load_state_dict(linear(**other).state_dict())
    state = {key: t.half() if t.is_floating_point() else t for key, t in linear().state_dict().items()}
    with pytest.raises(RuntimeError, match="scale must be torch.float32 .* got torch.float16"):
        linear().load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Missing key.*quantized_weight.codes(.|\n)*Unexpected key.*"weight"'):
        linear().load_state_dict(nn.Linear(64, 64).state_dict())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64), ids=str)
def test_casting_keeps_codes_and_scales(dtype):
    model = quantized(gpt(), bits=4, symmetric=False)
    before = {key: t.clone() for key, t in model.state_dict().items() if "quantized_weight" in key}
    expected = model.head.weight
    for cast in (model.to(dtype), model.to("cpu", dtype), model.type(dtype)):
        assert cast.head.weight.dtype == cast.tokens(INDEX).dtype == cast(INDEX).dtype == dtype
        assert_same_bits(cast.head.weight, expected.double().to(dtype)) if dtype != torch.float64 else None
        for key, t in before.items():
            assert_same_bits(cast.state_dict()[key], t)
        assert cast.tokens.quantized_weight is cast.head.quantized_weight
    assert_same_bits(model.float().head.weight, expected)


def test_moves():
    model = quantized(convs())
    expected = model(IMAGES)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(IMAGES), expected)
    state = model.state_dict()
    empty = copy.deepcopy(model).to("meta")
    assert empty(IMAGES.to("meta")).is_meta
    back = empty.to_empty(device="cpu")
    back.load_state_dict(state)
    assert_same_bits(back(IMAGES), model(IMAGES))


@MODELS
def test_module_compiles(make, x):
    torch.compiler.reset()
    model = quantized(make(), bits=4, scheme="block", block_size=32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_gradients_pass_through_to_the_rest():
    model = quantized(gpt().train())
    model(INDEX).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert "blocks.0.up.bias" in dict(model.named_parameters())
    with pytest.raises(KeyError, match="weight"):
        model.head.weight = nn.Parameter(torch.zeros(100, 32))


def test_tied_weights():
    model = gpt()
    report = quant.quantize_module_(model)
    assert report.layers["head"].tied_to == "tokens" and report.layers["head"].bytes_after == 0
    assert model.tokens.quantized_weight is model.head.quantized_weight
    model = gpt()
    report = quant.quantize_module_(model, skip=["head"])
    assert report.skipped == {
        "head": "matches 'head' in skip",
        "tokens": "its weight is tied to that of head, which stays",
    }
    assert model.head.weight is model.tokens.weight
    model = nn.Sequential(layer := nn.Linear(64, 64), nn.ReLU(), layer)
    assert len(quant.quantize_module_(model).layers) == 1 and model[0] is model[2]


def test_skipping():
    def skipped(skip):
        return list(quant.quantize_module_(gpt(tied=False), skip=skip).skipped)

    attention = ["blocks.0.attention.out_proj", "blocks.1.attention.out_proj"]
    assert skipped(["*.attention.*"]) == attention == skipped(["*.attention"])
    assert skipped(["blocks.0", "head"]) == [attention[0], "blocks.0.up", "blocks.0.down", "head"]
    assert skipped(lambda name, module: isinstance(module, nn.Embedding)) == ["tokens", "positions"]


def assert_whole(model):
    assert not any(isinstance(m, QuantizedWeight) for m in model.modules())


class Mine(nn.Linear):
    pass


STAY = {
    "parametrized": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(64, 64)), "has parametrizations"),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(64, 64), "weight", 0.5), "not a parameter of its own"),
    "mine": (lambda: Mine(64, 64), "is a Mine, a subclass"),
    "renormed": (lambda: nn.Embedding(64, 64, max_norm=1.0), "max_norm changes"),
    "complex": (lambda: nn.Linear(64, 64, dtype=torch.complex64), "torch.complex64"),
    "lazy": (lambda: nn.LazyLinear(64), "LazyLinear"),
    "small": (lambda: nn.Conv1d(64, 64, 1, groups=64, dtype=torch.bfloat16), "128 bytes now, 320 then"),
    "empty": (lambda: nn.Embedding(0, 8), "not be smaller"),
}


def test_layers_that_stay():
    model = nn.ModuleDict({name: make() for name, (make, _) in STAY.items()} | {"good": nn.Linear(64, 64)})
    report = quant.quantize_module_(model)
    assert list(report.layers) == ["good"]
    for name, (_, why) in STAY.items():
        assert why in report.skipped[name]
        assert f"skipped {name}: " in str(report)
    again = quant.quantize_module_(model)
    assert not again.layers and again.skipped["good"] == "already quantized"
    assert again.bytes_before == again.bytes_after == report.bytes_after


def test_report():
    model = gpt()
    before = sum(p.nbytes for p in model.parameters())
    report = quant.quantize_module_(model)
    assert report.bytes_before == before
    assert report.bytes_after == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    change = sum(layer.bytes_before - layer.bytes_after for layer in report.layers.values())
    assert before - report.bytes_after == change
    layer = report.layers["tokens"]
    assert (layer.kind, layer.shape, layer.bytes_before, layer.bytes_after) == ("Embedding", (100, 32), 12800, 3600)
    text = str(report).splitlines()
    assert text[0].split() == ["layer", "kind", "bytes", "before", "after"]
    assert text[1].split() == ["tokens", "Embedding", "12,800", "3,600"]
    assert text[-2].split() == ["head", "Linear", "tied", "to", "tokens"]
    assert text[-1].split() == ["all", "of", "the", "model", f"{before:,}", f"{report.bytes_after:,}"]
    lone = nn.Linear(64, 64)
    assert "(model)" in str(quant.quantize_module_(lone)) and isinstance(lone, QuantizedLinear)
    assert "QuantizedWeight(shape=[64, 64], bits=8, scheme='channel', axis=0, symmetric=True)" in repr(lone)


def with_nan():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight.data[3, 5] = NAN
    return model


@pytest.mark.parametrize(
    ("model", "how", "kind", "message"),
    [
        (with_nan(), {}, ValueError, "the weight of 1: quantize: x .* NaN or infinite"),
        (nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, device="meta")), {}, ValueError, "1 is on the meta"),
        (torch.ones(3), {}, TypeError, "model must be a torch.nn.Module, got Tensor"),
        (gpt(), dict(bits=2), ValueError, "quantize_module_: bits must be one of 8, 4"),
        (gpt(), dict(scheme="row"), ValueError, "scheme must be one of"),
        (gpt(), dict(scheme="block", block_size=48), ValueError, "block_size must be a power of two"),
        (gpt(), dict(symmetric=1), TypeError, "symmetric must be True or False"),
        (gpt(), dict(nonfinite=None), ValueError, "nonfinite must be one of"),
        (gpt(), dict(skip=["blocks.0", "haed"]), ValueError, r"skip has 'haed', which matches no layer .* and 1 more"),
        (gpt(), dict(skip=["haed"]), ValueError, r"which matches no layer .* tokens, positions, "),
        (gpt(), dict(skip=["blocks.0.norm"]), ValueError, "matches no layer"),
        (gpt(), dict(skip="head"), TypeError, "must be a sequence of names and patterns, or a function"),
        (gpt(), dict(skip=[3]), TypeError, "must be a sequence of names"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_module_refusals(model, how, kind, message):
    with pytest.raises(kind, match=message):
        quant.quantize_module_(model, **how)
    if isinstance(model, nn.Module):
        assert_whole(model)


def test_nan_may_be_quantized():
    assert quantized(with_nan(), nonfinite="propagate")[1].weight.isnan().sum() == 64
