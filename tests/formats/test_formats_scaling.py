"""Scales from amax are tested against exact rational arithmetic (`lowprec.testing.oracles`) and numbers worked out by hand."""

import numpy as np
import pytest
import torch

from lowprec.formats.element import E2M1, E4M3, FORMATS, INT4, INT8, ElementFormat
from lowprec.formats.scaling import ALL, SMALLEST_FP32_SCALE, BlockScaling, asymmetric_scale, power_of_two_scale, scale_from_amax
from lowprec.quant import OperandSpec, quantize
from lowprec.testing import e8m0_scale, heavy_tailed
from lowprec.testing.cases import LARGEST_FP32, SMALLEST_NORMAL, SMALLEST_SUBNORMAL

FLOATS = [fmt for fmt in FORMATS.values() if fmt.saturates and not fmt.is_integer]
RULES = ("floor", "ceil", "even", "rceil")
EXPONENTS = (*range(-149, -110), *range(-30, 31), *range(100, 128))


def with_neighbours(values: list[float]) -> torch.Tensor:
    """Return positive, finite fp32 values and the fp32 numbers on both sides of each."""
    x = torch.tensor(values, dtype=torch.float64).to(torch.float32)
    x = torch.cat([x, torch.nextafter(x, torch.tensor(0.0)), torch.nextafter(x, torch.tensor(torch.inf))])
    return x[(x > 0) & x.isfinite()].unique()


def amaxes(fmt: ElementFormat) -> torch.Tensor:
    """Return the amaxes where a rule changes its answer: 2^k, max * 2^k and the mantissa where rounding carries, with their neighbours."""
    mantissas = (1.0, fmt.max / 2.0**fmt.emax, 2 - 2.0 ** -(fmt.mantissa_bits + 1), 1.5)
    special = [SMALLEST_SUBNORMAL, SMALLEST_NORMAL, 3 * SMALLEST_SUBNORMAL, LARGEST_FP32]
    return with_neighbours(special + [m * 2.0**k for k in EXPONENTS for m in mantissas])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fmt", [*FLOATS, INT8, INT4], ids=str)
def test_power_of_two_scales_follow_their_definition(fmt, rule):
    if fmt.is_integer and rule == "even":
        return  # OperandSpec refuses this pair
    scaling = BlockScaling(block=(1, 32), scale_format="e8m0", rule=rule)
    random = torch.rand(500, generator=torch.Generator().manual_seed(0)) * 1000
    amax = torch.cat([amaxes(fmt), random, torch.zeros(1)])
    assert len(amax) > 1000
    expected = torch.tensor([e8m0_scale(a, fmt, rule) for a in amax.tolist()], dtype=torch.float64).to(torch.float32)
    got = scale_from_amax(amax, fmt, scaling)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_the_worked_example_of_each_rule():
    """The blocks are e2m1 (max 6, emax 2), with amax from 4 to 7."""
    amax = torch.tensor([4.0, 5.0, 6.0, 6.5, 7.0])
    expected = {
        "floor": [1, 1, 1, 1, 1],  # 2^(2 - 2); 6.5 and 7 will saturate at 6
        "ceil": [1, 2, 2, 2, 2],  # anything above 4 takes the next one
        "even": [1, 1, 1, 1, 2],  # 7 rounds to 8 in two significant bits, 6.5 to 6
        "rceil": [1, 1, 1, 2, 2],  # anything above 6 takes the next one
    }
    for rule in RULES:
        assert scale_from_amax(amax, E2M1, BlockScaling(block=(1, 32), scale_format="e8m0", rule=rule)).tolist() == expected[rule]


@pytest.mark.parametrize("fmt", FLOATS, ids=str)
def test_rceil_never_saturates_and_wastes_less_than_a_binade(fmt):
    amax = amaxes(fmt)
    amax = amax[amax > 2.0**-100]  # the smallest scale is not tight
    scaled = amax.double() / scale_from_amax(amax, fmt, BlockScaling(block=(1, 32), scale_format="e8m0")).double()
    assert (scaled <= fmt.max).all()
    assert (scaled > fmt.max / 2).all()


@pytest.mark.parametrize("fmt", [*FLOATS, INT8, INT4], ids=str)
def test_fp32_scale_is_the_rounded_quotient(fmt):
    """float64 divides two fp32 numbers to more than twice fp32's precision, so rounding its quotient to fp32 is exact division."""
    steps = {INT8: 127.5, INT4: 7.5}[fmt] if fmt.is_integer else fmt.max
    amax = torch.cat([amaxes(fmt), torch.zeros(1)])
    expected = (amax.double() / steps).to(torch.float32).clamp(min=SMALLEST_FP32_SCALE)
    got = scale_from_amax(amax, fmt, BlockScaling(block=(1, ALL)))
    assert torch.equal(got, expected)
    assert got.reciprocal().isfinite().all()


QUEST = BlockScaling(block=(1, 32), scale_format="e8m0", rule="quest")


@pytest.mark.parametrize("fmt", FLOATS, ids=str)
def test_quests_scale_is_the_float64_formulas(fmt):
    """The scale is 2^floor(log2(c std / max + 1e-8)); a value within fp32's rounding of a power of two may go either way."""
    std = torch.cat([2.0 ** (torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 60 - 40), amaxes(fmt), torch.zeros(1)])
    std = std[std < 1e30]
    exact = (std.double() * 2.92247856 / fmt.max + 1e-8).log2()
    clear = (exact - exact.round()).abs() > 1e-6
    assert clear.sum() > 4000
    got = power_of_two_scale(std, fmt, "quest")
    assert torch.equal(got[clear].double(), 2.0 ** exact[clear].floor())
    near = ~clear
    assert ((got[near].double().log2() - exact[near]).abs() < 1 + 1e-6).all()
    assert power_of_two_scale(torch.zeros(1), fmt, "quest").item() == 2.0**-27  # only the term 1e-8 remains


def test_quests_scale_by_hand():
    """For e2m1, c / 6 = 0.487, so a standard deviation of 1 gets scale 1/4, and one of 2.06 gets 1."""
    std = torch.tensor([1.0, 2.05, 2.06, 4.2, torch.nan])
    got = power_of_two_scale(std, E2M1, "quest")
    assert got[:4].tolist() == [0.25, 0.5, 1.0, 2.0]
    assert got[4].isnan()


@pytest.mark.parametrize("fmt", [E2M1, E4M3], ids=str)
def test_quest_takes_each_blocks_deviation_about_its_mean(fmt):
    x = heavy_tailed(40, 128, seed=0) * torch.logspace(-3, 3, 40)[:, None] + 5
    q = quantize(x, OperandSpec(element=fmt, scaling=QUEST))
    std = x.double().unflatten(1, (4, 32)).var(2, correction=0).sqrt()
    exact = (std * 2.92247856 / fmt.max + 1e-8).log2()
    clear = (exact - exact.round()).abs() > 1e-4
    assert clear.float().mean() > 0.9
    assert q.scale is not None
    assert torch.equal(q.scale[clear].double(), 2.0 ** exact[clear].floor())


@pytest.mark.parametrize("magnitude", [1e17, 1e19, 3e19, 1e30, 1e38])
def test_quest_of_a_large_finite_block_is_finite(magnitude):
    """The square of a deviation leaves fp32's range long before the deviation does."""
    x = torch.tensor([[1.0, -1.0] * 16]) * magnitude
    q = quantize(x, OperandSpec(element=E2M1, scaling=QUEST))
    expected = 2.0 ** np.floor(np.log2(magnitude * 2.92247856 / 6))
    assert q.scale is not None
    assert q.scale.item() == expected
    assert q.dequantize().isfinite().all()


def test_quest_saturates_and_says_where():
    """Its mask holds every element that reaches the largest value, not only those that round beyond it."""
    x = torch.zeros(1, 32)
    x[0, ::2], x[0, 1::2] = 2.06, -2.06  # their standard deviation gives scale 1
    q = quantize(x, OperandSpec(element=E2M1, scaling=QUEST), saturation=True)
    assert q.scale is not None
    assert q.scale.item() == 1.0
    assert not q.saturated.any()  # pyright: ignore[reportOptionalMemberAccess]
    spike = torch.zeros(1, 32)
    spike[0, :5] = torch.tensor([9.0, -9.0, 5.9, 6.0, -6.5])  # 6.5 rounds to 6: inside the range, but masked
    q = quantize(spike, OperandSpec(element=E2M1, scaling=QUEST), saturation=True)
    assert q.scale is not None
    assert q.scale.item() == 1.0
    assert q.saturated is not None
    assert q.saturated[0].nonzero().flatten().tolist() == [0, 1, 3, 4]
    assert q.values[0, :5].tolist() == [6.0, -6.0, 6.0, 6.0, -6.0]


@pytest.mark.parametrize(
    "scaling", [BlockScaling(block=(1, 32)), *(BlockScaling(block=(1, 32), scale_format="e8m0", rule=r) for r in RULES)], ids=str
)
@pytest.mark.parametrize("fmt", [*FLOATS, INT8, INT4], ids=str)
def test_nan_and_infinite_amax_give_nan(fmt, scaling):
    scale = scale_from_amax(torch.tensor([torch.nan, torch.inf, 1.0]), fmt, scaling)
    assert scale.isnan().tolist() == [True, True, False]


def test_amax_of_any_shape_and_stride():
    amax, scaling = amaxes(E4M3)[:60].view(6, 10), BlockScaling(block=(1, 32), scale_format="e8m0")
    assert torch.equal(scale_from_amax(amax.t(), E4M3, scaling), scale_from_amax(amax, E4M3, scaling).t())
    assert scale_from_amax(amax[:0], E4M3, scaling).shape == (0, 10)


@pytest.mark.parametrize(
    "low, high, scale, zero_point",
    [
        (0.0, 255.0, 1.0, -128.0),
        (-255.0, 0.0, 1.0, 127.0),
        (-128.0, 127.0, 1.0, 0.0),
        (5.0, 255.0, 1.0, -128.0),  # the range always includes zero, so that zero (padding, ReLU) is exact
        (-255.0, -7.0, 1.0, 127.0),
        (-2.5, 252.5, 1.0, -126.0),  # round(-2.5) = -2, half to even
        (0.0, 0.0, SMALLEST_FP32_SCALE, -128.0),
    ],
)
def test_asymmetric_scale_by_hand(low, high, scale, zero_point):
    got = asymmetric_scale(torch.tensor([low]), torch.tensor([high]), INT8)
    assert (got[0].item(), got[1].item()) == (scale, zero_point)


@pytest.mark.parametrize("low, high", [(torch.nan, 1.0), (0.0, torch.inf), (-torch.inf, 0.0), (-torch.inf, torch.inf)])
def test_asymmetric_scale_of_non_finite_blocks_is_nan(low, high):
    assert asymmetric_scale(torch.tensor([low]), torch.tensor([high]), INT8)[0].isnan().all()


def test_asymmetric_scale_of_a_finite_block_is_finite():
    """high - low overflows fp32 although (high - low) / 255 does not: an ordinary number must not become NaN because of that."""
    scale, _ = asymmetric_scale(torch.tensor([-3e38]), torch.tensor([3e38]), INT8)
    torch.testing.assert_close(scale, torch.tensor([6e38 / 255]), rtol=1e-6, atol=0.0)


def test_wrong_scalings_are_refused():
    with pytest.raises(ValueError, match="block extents are positive"):
        BlockScaling(block=(0, 32))
    with pytest.raises(ValueError, match="block extents are positive"):
        BlockScaling(block=(1, -2))
    with pytest.raises(ValueError, match="a zero point goes with an fp32 scale"):
        BlockScaling(block=(1, 32), scale_format="e8m0", symmetric=False)
    for prescale in (0.0, -0.75, 1.5):
        with pytest.raises(ValueError, match="a prescale lies between 0 and 1"):
            BlockScaling(block=(1, 32), scale_format="e8m0", prescale=prescale)
    with pytest.raises(ValueError, match="a prescale lies between 0 and 1 and goes with an e8m0 scale"):
        BlockScaling(block=(1, 32), prescale=0.75)
    for wrong in ({"block": (1, ALL)}, {"scale_format": "e8m0"}, {"symmetric": False}, {"history": -1}):
        with pytest.raises(ValueError, match="delayed scaling keeps the amax of a whole tensor"):
            BlockScaling(**{"block": (ALL, ALL), "history": 4} | wrong)
    with pytest.raises(ValueError, match="four over six chooses between two e4m3 scales"):
        BlockScaling(block=(1, 16), four_over_six=True)
    with pytest.raises(ValueError, match="by mse or by mae, not by 'max'"):
        BlockScaling(block=(1, 16), scale_format="e4m3", four_over_six=True, four_over_six_error="max")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="goes with four over six"):
        BlockScaling(block=(1, 16), scale_format="e4m3", four_over_six_error="mae")


def test_names():
    names = [
        str(BlockScaling(block=(ALL, ALL))),
        str(BlockScaling(block=(1, ALL), symmetric=False)),
        str(BlockScaling(block=(128, 128))),
        str(BlockScaling(block=(ALL, 1))),
        str(BlockScaling(block=(1, 32), scale_format="e8m0", rule="floor")),
    ]
    assert names == ["tensor fp32", "row fp32 asymmetric", "128x128 fp32", "allx1 fp32", "1x32 e8m0:floor"]
