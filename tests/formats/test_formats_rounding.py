"""round_to_format is tested against other implementations of the formats (ml_dtypes, torch's casts) and against exact arithmetic."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from lowprec.formats.element import BF16, E2M1, E2M3, E3M2, E4M3, E5M2, FORMATS, FP16, FP32, INT4, INT8
from lowprec.formats.rounding import exceeds_range, round_to_format
from lowprec.quant.qtensor import from_storage, to_storage
from lowprec.testing import non_negative_values, round_by_ml_dtypes, round_by_search

ML_DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
}
NARROW = ("e4m3", "e5m2", "e2m1", "e3m2", "e2m3")

# Each row: the first magnitude that may leave the range, and whether it does. The magnitude is the midpoint of the largest value and the
# next value of the unbounded grid; a tie goes to the even of the two.
FIRST_BEYOND = {
    "e4m3": (464.0, False),  # 448 = 14 * 32 is even, so 464 comes back to it
    "e5m2": (61440.0, True),  # 57344 = 7 * 8192 is odd, so 61440 goes to 8 * 8192
    "e2m1": (7.0, True),  # 6 = 3 * 2 is odd
    "e3m2": (30.0, True),  # 28 = 7 * 4 is odd
    "e2m3": (7.75, True),  # 7.5 = 15 * 0.5 is odd
    "fp16": (65520.0, True),  # 65504 = 2047 * 32 is odd
    "bf16": (2.0**127 * (2 - 2.0**-8), True),  # the largest value is 255 * 2^120, which is odd
}


def all_bf16() -> torch.Tensor:
    """Return all 65,536 bf16 bit patterns as fp32."""
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def random_bits(count: int = 2**16) -> torch.Tensor:
    """Return fp32 values of random bits: every exponent and sign, subnormals, NaN and infinities."""
    return torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(0)).to(torch.int32).view(torch.float32)


def values_by_code(name: str) -> np.ndarray:
    """Return the finite values >= 0 of a format in ascending order, decoded from its codes; fp64."""
    dtype = np.dtype(ML_DTYPES[name])
    bits = FORMATS[name].bits
    codes = np.arange(2 ** (bits - 1), dtype=np.uint16 if dtype.itemsize == 2 else np.uint8)  # the sign bit is clear
    with np.errstate(invalid="ignore"):  # some codes are signalling NaNs
        values = codes.view(dtype).astype(np.float64)
    return values[np.isfinite(values)]


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that two tensors are equal down to the sign of zero; any NaN equals any NaN."""
    assert got.dtype == expected.dtype == torch.float32
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(0.0).view(torch.int32), expected.nan_to_num(0.0).view(torch.int32))


def cast_by_ml_dtypes(x: torch.Tensor, name: str) -> torch.Tensor:
    numbers = x.masked_fill(x.isnan(), 0.0)  # the four- and six-bit formats have no NaN
    return torch.where(x.isnan(), x, torch.from_numpy(round_by_ml_dtypes(numbers.numpy(), FORMATS[name])))


@pytest.mark.parametrize("name", NARROW)
def test_every_bf16_value_rounds_as_ml_dtypes_does(name):
    x = all_bf16()
    assert_same_bits(round_to_format(x, FORMATS[name]), cast_by_ml_dtypes(x, name))


@pytest.mark.parametrize("name", NARROW)
def test_random_fp32_values_round_as_ml_dtypes_does(name):
    x = random_bits()  # bf16 inputs alone would leave the lower 16 mantissa bits untested
    assert_same_bits(round_to_format(x, FORMATS[name]), cast_by_ml_dtypes(x, name))


@pytest.mark.parametrize("fmt, dtype", [(FP16, torch.float16), (BF16, torch.bfloat16), (FP32, torch.float32)])
def test_ieee_formats_round_as_torch_casts_and_overflow_to_infinity(fmt, dtype):
    x = torch.cat([all_bf16(), random_bits(), torch.tensor([65519.99, 65520.0, -65520.0, FIRST_BEYOND["bf16"][0], 3.4e38])])
    assert_same_bits(round_to_format(x, fmt), x.to(dtype).float())
    first, _ = FIRST_BEYOND.get(fmt.name, (torch.inf, True))
    assert round_to_format(torch.tensor([first, -first]), fmt).tolist() == [torch.inf, -torch.inf]


@pytest.mark.parametrize("fmt", [INT8, INT4], ids=str)
def test_integers_round_half_to_even_and_saturate(fmt):
    x = torch.arange(-140, 140, 0.25)
    expected = [min(max(float(round(Fraction(v))), fmt.min), fmt.max) for v in x.tolist()]  # Fraction rounds half to even, exactly
    assert torch.equal(round_to_format(x, fmt), torch.tensor(expected))
    assert round_to_format(torch.tensor([torch.inf, -torch.inf]), fmt).tolist() == [fmt.max, fmt.min]
    assert round_to_format(torch.tensor([torch.nan]), fmt).isnan().all()


@pytest.mark.parametrize("name", ML_DTYPES)
def test_midpoints_and_their_neighbours(name):
    """A number below the midpoint of neighbouring values lo < hi gives lo, one above it hi, and the midpoint the one with an even code."""
    values = values_by_code(name)
    assert np.array_equal(values, non_negative_values(FORMATS[name]))  # so the search in the tests below uses the right list
    assert len(values) == 2 ** (FORMATS[name].bits - 1) - {"e4m3": 1, "e5m2": 4, "fp16": 1024, "bf16": 128}.get(name, 0)
    lo, hi = values[:-1], values[1:]
    mid = ((lo + hi) / 2).astype(np.float32)
    assert np.array_equal(mid.astype(np.float64), (lo + hi) / 2)  # fp32 holds every midpoint exactly
    even = np.where(np.arange(len(lo)) % 2 == 0, lo, hi)
    for x, expected in ((mid, even), (np.nextafter(mid, np.float32(0)), lo), (np.nextafter(mid, np.float32(np.inf)), hi), (hi, hi)):
        for sign in (1, -1):
            got = round_to_format(torch.from_numpy(np.float32(sign) * x.astype(np.float32)), FORMATS[name])
            assert_same_bits(got, torch.from_numpy((sign * expected).astype(np.float32)))


@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS.values() if fmt != FP32], ids=str)
def test_every_bf16_value_and_every_midpoint_round_as_a_search_through_the_format_says(fmt, rounding):
    """The search uses no arithmetic of formats: it finds the two values around a number and which of them is nearer."""
    values = non_negative_values(fmt)
    with np.errstate(over="ignore"):
        middle = ((values[:-1] + values[1:]) / 2).astype(np.float32)
        last = np.float32(values[-1] + (values[-1] - values[-2]) / 2)  # the magnitude at which rounding would leave the range
    zero, inf = np.float32(0), np.float32(np.inf)
    points = np.concatenate([middle, values.astype(np.float32), [last]])
    points = np.concatenate([points, np.nextafter(points, zero), np.nextafter(points, inf)]).astype(np.float32)
    x = torch.cat([all_bf16(), random_bits(), torch.from_numpy(points), torch.from_numpy(-points)])
    x = x[~x.isnan()]
    got, expected = round_to_format(x, fmt, rounding), torch.from_numpy(round_by_search(x.numpy(), fmt, rounding))
    assert_same_bits(got, expected)
    assert round_to_format(torch.tensor([torch.nan]), fmt, rounding).isnan().all()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_every_value_of_a_format_is_a_fixed_point(fmt):
    x = all_bf16() if fmt.name not in ML_DTYPES else torch.from_numpy(values_by_code(fmt.name).astype(np.float32))
    once = round_to_format(torch.cat([x, -x]), fmt)
    assert_same_bits(round_to_format(once, fmt), once)
    if fmt.name in ML_DTYPES:
        assert_same_bits(once, torch.cat([x, -x]))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_inplace_gives_the_same_and_the_default_keeps_its_input(fmt):
    x = random_bits(4096)
    before = x.clone()
    expected = round_to_format(x, fmt)
    assert_same_bits(x, before)
    assert_same_bits(round_to_format(x.clone(), fmt, inplace=True), expected)


@pytest.mark.parametrize("fmt", [E4M3, E2M1, INT8, BF16], ids=str)
def test_strides_do_not_matter(fmt):
    x = random_bits(4096).view(64, 64)
    assert_same_bits(round_to_format(x.t(), fmt), round_to_format(x.t().contiguous(), fmt))
    assert_same_bits(round_to_format(x[::3, 1::2], fmt), round_to_format(x[::3, 1::2].contiguous(), fmt))
    assert round_to_format(x[:0], fmt).shape == (0, 64)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_storage_holds_every_value(fmt):
    values = round_to_format(all_bf16(), fmt)
    values = values[values.isfinite()][None]
    assert to_storage(values, fmt).dtype == fmt.storage
    got = from_storage(to_storage(values, fmt), fmt, values.shape[1])
    assert_same_bits(got, values if not fmt.is_integer else values + 0.0)  # integers have no -0


@pytest.mark.parametrize("fmt, expected", [(E4M3, 8), (E5M2, 15), (E3M2, 4), (E2M3, 2), (E2M1, 2), (FP16, 15), (BF16, 127)], ids=str)
def test_fields_agree_with_ml_dtypes(fmt, expected):
    info = ml_dtypes.finfo(ML_DTYPES[fmt.name])
    assert (fmt.max, fmt.min, fmt.min_normal) == (float(info.max), float(info.min), float(info.smallest_normal))
    assert (fmt.exponent_bits, fmt.mantissa_bits, fmt.bits) == (info.nexp, info.nmant, info.bits)
    assert fmt.emax == expected


@pytest.mark.parametrize("name", FIRST_BEYOND)
def test_exceeds_range_of_floats(name):
    fmt, (edge, itself) = FORMATS[name], FIRST_BEYOND[name]
    edge = torch.tensor(edge)
    below, above = torch.nextafter(edge, torch.tensor(0.0)), torch.nextafter(edge, torch.tensor(torch.inf))
    x = torch.stack([edge, below, above, torch.tensor(fmt.max), torch.tensor(torch.inf), torch.tensor(0.0)])
    expected = torch.tensor([itself, False, True, False, True, False])
    assert torch.equal(exceeds_range(x, fmt), expected)
    assert torch.equal(exceeds_range(-x, fmt), expected)


def test_exceeds_range_of_fp32_is_infinity_alone():
    x = torch.tensor([3.4e38, torch.finfo(torch.float32).max, 1.0, torch.inf, -torch.inf])
    assert exceeds_range(x, FP32).tolist() == [False, False, False, True, True]


def test_exceeds_range_of_integers_includes_both_ends():
    # 7.5 rounds to the even 8 and is cut; -8.5 rounds to the even -8 and is not.
    x = torch.tensor([7.0, 7.4999995, 7.5, 8.0, torch.inf, -8.0, -8.5, -8.500001, -torch.inf])
    assert exceeds_range(x, INT4).tolist() == [False, False, True, True, True, False, False, True, True]
    x = torch.tensor([127.0, 127.49999, 127.5, -128.0, -128.5, -128.50002, torch.inf])
    assert exceeds_range(x, INT8).tolist() == [False, False, True, False, False, True, True]


@pytest.mark.parametrize("name", NARROW)
def test_exceeds_range_agrees_with_the_clamp(name):
    """Rounding with and without the clamp agree where exceeds_range is false, so the straight-through gradient may pass there."""
    fmt, x = FORMATS[name], all_bf16()
    x = x[~x.isnan()]
    beyond = exceeds_range(x, fmt)
    assert torch.equal(beyond, x.abs() > FIRST_BEYOND[name][0] if not FIRST_BEYOND[name][1] else x.abs() >= FIRST_BEYOND[name][0])
    assert (round_to_format(x, fmt).abs()[beyond] == fmt.max).all()


# Inductor removes a conversion down and up again ("pointless_convert"), which would leave values unrounded. It may also fuse the addition
# and the subtraction of the magic number. Either would show as a difference from eager code here.
@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("fmt", [BF16, FP16, E4M3, E2M1], ids=str)
def test_compiled_equals_eager(fmt):
    torch._dynamo.reset()
    edges = torch.tensor([0.0, -0.0, 464.0, 7.0, 2.5, 65519.99, 65520.0, -65520.0, FIRST_BEYOND["bf16"][0], 2.0**-24, 2.0**-25])
    x = torch.cat([random_bits(8192), all_bf16()[::7], edges])
    compiled = torch.compile(lambda t: round_to_format(t, fmt), fullgraph=True)
    assert_same_bits(compiled(x), round_to_format(x, fmt))
