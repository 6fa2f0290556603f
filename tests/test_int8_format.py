"""The format of 8-bit state, byte by byte: a contract with checkpoints. A change here is a new format number."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, assert_same_bits

from genopt_ext import optim
from genopt_ext.reference import codecs

SIGNED = [-127, -112, -31, -1, 0, 1, 2, 30, 31, 32, 96, 111, 112, 126, 127]
UNSIGNED = [0, 1, 2, 62, 63, 64, 191, 240, 254, 255]
# For the scale 1.25: 16 codes an octave for the uppermost 6 or 12 octaves, 4 below.
SIGNED_VALUES = [-1.25, -0.65625, -0.01953125, -0.0001068115234375, 0.0, 0.0001068115234375, 0.0001220703125]
SIGNED_VALUES += [0.015625, 0.01953125, 0.0205078125, 0.328125, 0.625, 0.65625, 1.1875, 1.25]
UNSIGNED_VALUES = [0.0, 6.51925802230835e-09, 7.450580596923828e-09, 0.000244140625, 0.00030517578125]
UNSIGNED_VALUES += [0.0003204345703125, 0.078125, 0.65625, 1.1875, 1.25]


@pytest.mark.parametrize(
    "codes, values, dtype",
    [(SIGNED, SIGNED_VALUES, torch.int8), (UNSIGNED, UNSIGNED_VALUES, torch.uint8)],
    ids=["signed", "unsigned"],
)
def test_golden_values(codes, values, dtype):
    found = codecs.decode(torch.tensor(codes, dtype=dtype), torch.tensor([1.25]))
    assert_same_bits(found, torch.tensor(values), codes)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_one_number(signed):
    """Codes rise with their values; what was read is written as the same code, whichever way it is rounded."""
    codes = torch.arange(-127, 128).to(torch.int8) if signed else torch.arange(256).to(torch.uint8)
    for scale in (1.0, 1.25, 1.5, 1.75, 2.0**-112 if signed else 2.0**-98, 1.75 * 2.0**126):
        values = codecs.decode(codes, torch.tensor([scale]))
        assert (values.diff() > 0).all() and values[-1] == scale, scale
        for turn in (0, 1, 1 << 31, (1 << 32) - 1):
            again, scales = codecs.encode(values, signed, torch.full((len(codes),), turn))
            assert torch.equal(again, codes) and scales.tolist() == [scale], (scale, turn)


def test_golden_state():
    """A step's codes and scales, as the first version has written them: nothing changes where blocks know no slices."""
    p = torch.nn.Parameter(torch.zeros(260, device=DEVICE))
    opt = optim.AdamW8bit([p], min_int8_size=1)
    for step in range(3):
        p.grad = torch.linspace(-1, 2, 260).to(DEVICE) * (step + 1)
        opt.step()
    state = {name: t.cpu() for name, t in opt.state[p].items()}
    assert list(state) == ["step", "exp_avg_codes", "exp_avg_scales", "exp_avg_sq_codes", "exp_avg_sq_scales"]
    at = [0, 1, 60, 85, 86, 87, 128, 200, 255, 256, 259]
    assert state["exp_avg_codes"].dtype == torch.int8 and state["exp_avg_sq_codes"].dtype == torch.uint8
    assert state["exp_avg_codes"][at].tolist() == GOLDEN["exp_avg_codes"]
    assert state["exp_avg_sq_codes"][at].tolist() == GOLDEN["exp_avg_sq_codes"]
    assert state["exp_avg_scales"].tolist() == GOLDEN["exp_avg_scales"]
    assert state["exp_avg_sq_scales"].tolist() == GOLDEN["exp_avg_sq_scales"]
    assert opt.state_dict()["param_groups"][0]["int8_format"] == 2


GOLDEN = {
    "exp_avg_codes": [-109, -109, -81, -26, -19, 23, 93, 115, 124, 125, 125],
    "exp_avg_scales": [1.25, 1.25],
    "exp_avg_sq_codes": [224, 223, 168, 55, 39, 47, 190, 236, 254, 251, 252],
    "exp_avg_sq_scales": [0.0546875, 0.0625],
}


def stepped(shape, at=0):
    """An optimizer of a parameter, after three steps."""
    p = torch.nn.Parameter(torch.zeros(shape, device=DEVICE))
    opt = optim.AdamW8bit([p], min_int8_size=1)
    for step in range(at, at + 3):
        p.grad = torch.linspace(-1, 2, p.numel()).view(shape).to(DEVICE) * (step + 1)
        opt.step()
    return p, opt


def test_golden_slices():
    """Blocks make slices along the first dimension, as the second version writes them."""
    p, opt = stepped((2, 320))
    state = {name: t.cpu() for name, t in opt.state[p].items()}
    at = [0, 1, 106, 107, 159, 160, 319, 320, 479, 480, 639]
    for name in ("exp_avg", "exp_avg_sq"):
        assert state[f"{name}_codes"].shape == (2, 320)
        assert state[f"{name}_codes"].flatten()[at].tolist() == GOLDEN_SLICES[f"{name}_codes"]
        assert state[f"{name}_scales"].tolist() == GOLDEN_SLICES[f"{name}_scales"]


@pytest.mark.parametrize(
    ("shape", "scales"),
    [((5, 64), (5, 1)), ((3, 1600), (3, 10)), ((2, 3, 96), (2, 2)), ((4, 256), (4, 1)), ((2, 4352), (2, 17))]
    + [((5, 63), (2,)), ((2, 272), (3,)), ((300, 2), (3,)), ((512,), (2,)), ((), (1,))],
)
def test_which_blocks_make_slices(shape, scales):
    p, opt = stepped(shape)
    assert opt.state[p]["exp_avg_scales"].shape == scales


@pytest.mark.parametrize("shape", [(2, 512), (3, 320), (700,), (300, 2)], ids=str)
def test_format_1_loads(shape, backend):
    """Blocks of 256, wherever slices begin, are stored anew: exactly where 256 is what makes a slice."""
    p, opt = stepped(shape)
    saved = opt.state_dict()
    saved["param_groups"][0]["int8_format"] = 1
    (state,) = saved["state"].values()
    values = {}
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        flat = codecs.read(opt.state[p], name).flatten()
        codes, scales = codecs.encode(flat, signed)
        state[f"{name}_codes"], state[f"{name}_scales"] = codes.view(shape), scales
        values[name] = codecs.decode(codes, scales).view(shape)
    q = torch.nn.Parameter(p.detach().clone())
    other = optim.AdamW8bit([q], min_int8_size=1, backend=backend)
    other.load_state_dict(saved)
    assert other.state_dict()["param_groups"][0]["int8_format"] == 2
    for name, t in values.items():
        found, scales = codecs.read(other.state[q], name), other.state[q][f"{name}_scales"]
        assert scales.shape == codecs.scales_shapes(q)[0]
        if shape == (3, 320):  # a block has elements of two
            torch.testing.assert_close(found, t, rtol=0.13, atol=1e-6)
        else:
            assert_same_bits(found, t, name)
    q.grad = torch.ones_like(q)
    other.step()


@pytest.mark.parametrize("turns", [False, True])
def test_a_checkpoint_of_other_strides_loads(turns, backend):
    p, opt = stepped((64, 80))
    q = torch.nn.Parameter(p.detach().clone())
    other = optim.AdamW8bit([q], min_int8_size=1, backend=backend)
    q.data = q.data.t().contiguous().t()
    state, expected = opt.state_dict(), codecs.read(opt.state[p], "exp_avg")
    for _ in range(1 + turns):  # there, and back
        other.load_state_dict(state)
        assert other.state[q]["exp_avg_scales"].shape == codecs.scales_shapes(q)[0]
        torch.testing.assert_close(codecs.read(other.state[q], "exp_avg"), expected, rtol=0.07, atol=4e-3)
        q.grad = torch.ones_like(q)
        state = other.state_dict()
        q.data = q.data.contiguous()


GOLDEN_SLICES = {
    "exp_avg_codes": [-125, -125, -109, -109, -93, -109, 125, 105, 126, 114, 126],
    "exp_avg_scales": [[0.625, 0.3125], [0.75, 1.25]],
    "exp_avg_sq_codes": [252, 252, 220, 220, 188, 219, 251, 212, 254, 229, 252],
    "exp_avg_sq_scales": [[0.015625, 0.00390625], [0.0234375, 0.0625]],
}
