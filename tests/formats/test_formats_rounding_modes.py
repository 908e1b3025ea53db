"""Rounding toward zero and stochastic rounding are tested against gfloat's modes, a search through each format, and statistics."""

import gfloat
import numpy as np
import pytest
import torch
from gfloat import formats as gf

from lowprec.formats.element import BF16, E2M1, E2M3, E3M2, E4M3, E5M2, E5M6, FORMATS, FP16, FP32, INT4, INT8
from lowprec.formats.random import uniform
from lowprec.formats.rounding import round_to_format
from lowprec.testing import neighbours, non_negative_values, round_by_search

GFLOAT = {
    E4M3: gf.format_info_ocp_e4m3,
    E5M2: gf.format_info_ocp_e5m2,
    E3M2: gf.format_info_ocp_e3m2,
    E2M3: gf.format_info_ocp_e2m3,
    E2M1: gf.format_info_ocp_e2m1,
    FP16: gf.format_info_binary16,
    BF16: gf.format_info_bfloat16,
}
ROUNDED = [fmt for fmt in FORMATS.values() if fmt != FP32]
KEY = torch.tensor([0x1234567, -0x7654321])
every_format = pytest.mark.parametrize("fmt", ROUNDED, ids=str)
every_format_of_gfloat = pytest.mark.parametrize("fmt", GFLOAT, ids=str)


def numbers() -> torch.Tensor:
    """Return every bf16 number, and fp32 numbers of random bits, without NaN; [1, n]."""
    bf16 = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    bits = torch.randint(-(2**31), 2**31, (2**14,), generator=torch.Generator().manual_seed(1))
    x = torch.cat([bf16, bits.to(torch.int32).view(torch.float32)])
    return x[~x.isnan()][None]


def by_gfloat(x: torch.Tensor, fmt, mode: gfloat.RoundMode) -> torch.Tensor:
    rounded = gfloat.round_ndarray(GFLOAT[fmt], x.numpy().astype(np.float64), mode, sat=fmt.saturates)
    return torch.from_numpy(rounded).float()


def stochastic(x: torch.Tensor, fmt, key: torch.Tensor = KEY) -> torch.Tensor:
    return round_to_format(x, fmt, "stochastic", noise=uniform(key, (x.shape[0], x.shape[1])))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def p_value(chi_square: float, degrees: int) -> float:
    """Return the probability that chance gives a larger chi-square."""
    return torch.special.gammaincc(torch.tensor(degrees / 2, dtype=torch.float64), torch.tensor(chi_square / 2)).item()


@every_format_of_gfloat
def test_toward_zero_equals_gfloats(fmt):
    x = numbers()
    assert same_bits(round_to_format(x, fmt, "toward_zero"), by_gfloat(x, fmt, gfloat.RoundMode.TowardZero))


@every_format
def test_toward_zero_never_grows_and_keeps_the_formats_own_values(fmt):
    x = numbers()
    x = x[x.isfinite()]
    rounded = round_to_format(x, fmt, "toward_zero")
    assert (rounded.abs() <= x.abs()).all()
    values = torch.from_numpy(non_negative_values(fmt).astype(np.float32))
    values = torch.cat([values[values <= fmt.max], -values])
    assert same_bits(round_to_format(values, fmt, "toward_zero"), values)
    assert torch.isin(rounded, values).all()


@every_format_of_gfloat
def test_stochastic_rounding_gives_one_of_gfloats_two_neighbours(fmt):
    x = numbers()
    low, high = by_gfloat(x, fmt, gfloat.RoundMode.TowardNegative), by_gfloat(x, fmt, gfloat.RoundMode.TowardPositive)
    rounded = stochastic(x, fmt)
    assert ((rounded == low) | (rounded == high)).all()
    assert torch.equal(rounded.signbit(), x.signbit())
    between = (low != high) & x.isfinite()
    for neighbour in (low, high):  # both occur
        assert (rounded == neighbour)[between].float().mean() > 0.2


@every_format
def test_stochastic_rounding_gives_one_of_the_two_values_that_a_search_finds(fmt):
    x = numbers()
    toward, away, _ = (torch.from_numpy(part) for part in neighbours(x.numpy(), fmt))
    for key in (KEY, KEY + 1000):
        rounded = stochastic(x, fmt, key).double()
        assert ((rounded == toward) | (rounded == away)).all()


@every_format
@pytest.mark.parametrize("noise", [0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
def test_a_value_of_the_format_never_moves(fmt, noise):
    values = torch.from_numpy(non_negative_values(fmt).astype(np.float32))
    values = torch.cat([values[values <= fmt.max], -values])
    assert torch.equal(round_to_format(values, fmt, "stochastic", noise=torch.full_like(values, noise)), values)


@every_format
def test_the_range_is_kept_and_nan_stays(fmt):
    x = torch.tensor([[torch.inf, -torch.inf, 1e38, -1e38, torch.nan]])
    if fmt.exponent_bits == 8:
        x[:, 2:4] *= 10  # infinity
    rounded = stochastic(x, fmt)
    high, low = (fmt.max, fmt.min) if fmt.saturates else (torch.inf, -torch.inf)
    assert rounded[0, :4].tolist() == [high, low, high, low]
    assert rounded[0, 4].isnan()


@every_format
@pytest.mark.parametrize("sign", [1, -1])
def test_the_probability_of_rounding_away_is_the_share_of_the_step(fmt, sign):
    """Chi-square is computed over the counts of 20,000 draws at each of twenty places between two neighbours; the mean is unbiased."""
    draws, shares = 20_000, np.arange(1, 21) / 21
    values = non_negative_values(fmt)
    starts = {"zero": 0, "low": 1, "top": len(values) - 2 - fmt.is_integer}
    for start in starts.values():
        low, high = values[start], values[start + 1]
        x = torch.from_numpy((low + shares * (high - low)).astype(np.float32))
        share = (x.double() - low) / (high - low)  # share of the fp32 number
        rounded = stochastic(sign * x[:, None].expand(-1, draws), fmt).double() * sign
        assert ((rounded == low) | (rounded == high)).all()
        count = (rounded == high).sum(1).double()
        chi_square = ((count - draws * share) ** 2 / (draws * share * (1 - share))).sum().item()
        assert 1e-4 < p_value(chi_square, len(shares)) < 1 - 1e-4
        error = (rounded - x.double()[:, None]).mean().item() / (high - low)
        sigma = ((share * (1 - share)).mean() / (draws * len(shares))).sqrt().item()
        assert abs(error) < 4 * sigma


@every_format
def test_the_share_is_met_exactly_by_the_number_of_draws_below_it(fmt):
    """Rounding away happens where noise < share and nowhere else: at noise = share it does not."""
    values = non_negative_values(fmt)
    low, high = values[1], values[2]
    x = torch.full((3,), float(low + (high - low) / 4))
    noise = torch.tensor([0.25 - 2.0**-16, 0.25, 0.25 + 2.0**-16])
    got = round_to_format(x, fmt, "stochastic", noise=noise)
    if fmt == BF16:  # bf16 rounds by a carry out of the dropped bits, which counts from the other end of the interval
        got = round_to_format(x, fmt, "stochastic", noise=1 - 2.0**-16 - noise)
    assert got.tolist() == [high, low, low]


@every_format
def test_the_same_key_gives_the_same_numbers_and_another_key_others(fmt):
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(2)) * min(fmt.max, 1e6) / 8
    first, again = stochastic(x, fmt), stochastic(x.clone(), fmt)
    assert same_bits(first, again)
    for other in (KEY + torch.tensor([1, 0]), KEY + torch.tensor([0, 1])):
        assert (stochastic(x, fmt, other) != first).float().mean() > 0.1


@every_format
def test_inplace_and_strides_change_nothing(fmt):
    bits = torch.randint(-(2**31), 2**31, (64, 48), generator=torch.Generator().manual_seed(3))
    x = bits.to(torch.int32).view(torch.float32).nan_to_num()
    noise = uniform(KEY, (64, 48))
    for rounding, draws in (("stochastic", noise), ("toward_zero", None)):
        expected = round_to_format(x, fmt, rounding, noise=draws)
        assert same_bits(round_to_format(x.clone(), fmt, rounding, noise=draws, inplace=True), expected)
        strided = round_to_format(x.t().contiguous().t(), fmt, rounding, noise=draws)
        assert same_bits(strided.contiguous(), expected)
    transposed = round_to_format(x.t().contiguous().t(), fmt, "stochastic", noise=uniform(KEY, (64, 48), transposed=True))
    assert same_bits(transposed.contiguous(), round_to_format(x, fmt, "stochastic", noise=noise))


def test_stochastic_rounding_without_noise_is_refused():
    with pytest.raises(ValueError, match="stochastic rounding needs random numbers"):
        round_to_format(torch.ones(2), E4M3, "stochastic")


@pytest.mark.parametrize("fmt", [E5M6, INT8, INT4], ids=str)
def test_formats_that_gfloat_lacks_round_toward_zero_as_a_search_says(fmt):
    x = numbers()
    got, expected = round_to_format(x, fmt, "toward_zero"), torch.from_numpy(round_by_search(x.numpy(), fmt, "toward_zero"))
    assert same_bits(got, expected)
