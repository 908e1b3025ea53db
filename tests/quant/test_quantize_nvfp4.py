"""NVFP4 follows its published order of operations bit for bit, restated in numpy's fp32 (`lowprec.testing.nvfp4_by_numpy`)."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lowprec.formats.element import E2M1, E4M3
from lowprec.formats.scaling import ALL, BlockScaling
from lowprec.quant import OperandSpec, quantize
from lowprec.testing import EDGE_BLOCKS, gaussian, heavy_tailed, neighbours, non_negative_values, nvfp4_by_numpy

BLOCKS = [(1, 16), (16, 16)]
every_block = pytest.mark.parametrize("block", BLOCKS, ids=["1x16", "16x16"])
every_choice = pytest.mark.parametrize("four_over_six", [False, True], ids=["six", "four_over_six"])


def spec(block, four_over_six=False, rounding="nearest", error="mse", prescale=1.0) -> OperandSpec:
    fields = {"four_over_six": four_over_six, "four_over_six_error": error, "prescale": prescale}
    scaling = BlockScaling(block=block, scale_format="e4m3", **fields)
    return OperandSpec(element=E2M1, scaling=scaling, rounding=rounding)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def assert_agrees(x: Tensor, block: tuple[int, int], four_over_six: bool, error: str = "mse") -> None:
    codes, scale, tensor_scale, value = nvfp4_by_numpy(x, block, four_over_six=four_over_six, error=error)
    for decoded in (False, True):
        q = quantize(x, spec(block, four_over_six, error=error), decoded=decoded)
        assert q.scale is not None
        assert q.tensor_scale is not None
        assert q.scale_data is not None
        assert q.scale_data.dtype == (torch.float32 if decoded else torch.float8_e4m3fn)
        assert same_bits(q.tensor_scale, tensor_scale)
        assert same_bits(q.scale, scale)
        assert same_bits(q.values, codes)
        assert same_bits(q.dequantize(), value)


def with_power(k: int) -> Tensor:
    return (heavy_tailed(48, 80, 100 + k).double() * 2.0**k).float()


MATRICES = {
    "gaussian": gaussian(64, 128, 0),
    "heavy_tailed": heavy_tailed(64, 128, 1),
    "odd": heavy_tailed(37, 53, 2),
    "row": heavy_tailed(1, 100, 3),
    "column": heavy_tailed(100, 1, 4),
    "one": torch.tensor([[-3.7]]),
    "zeros": torch.zeros(5, 40),
    "negative_zeros": -torch.zeros(5, 40),
    "zero_blocks": heavy_tailed(48, 96, 5) * (torch.arange(96) % 48 < 16) * (torch.arange(48) < 32)[:, None],
    "spread": heavy_tailed(64, 64, 6) * torch.logspace(-8, 0, 64)[:, None],  # scales from subnormal to the largest
    "below_the_scales": heavy_tailed(32, 64, 7) * torch.where(torch.arange(32) == 0, 1e6, 1e-3)[:, None],  # S rounds to zero
    "ties": torch.tensor([[6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, -6.0]]) * 448,
    "subnormal": with_power(-140),
    "smallest": with_power(-130),
    "tiny": with_power(-120),
    "small": with_power(-60),
    "large": with_power(60),
    "huge": with_power(122),
    "largest": torch.full((2, 40), torch.finfo(torch.float32).max),
}


@every_block
@every_choice
@pytest.mark.parametrize("x", MATRICES.values(), ids=MATRICES)
def test_every_bit_is_that_of_the_published_order(x, four_over_six, block):
    assert x.isfinite().all()
    assert_agrees(x, block, four_over_six)


@every_block
@every_choice
@pytest.mark.parametrize("case", [case for case in EDGE_BLOCKS if case.finite], ids=str)
def test_edge_cases(case, four_over_six, block):
    assert_agrees(case.row, block, four_over_six)
    assert_agrees(torch.cat([case.row, gaussian(3, 128, 8)]), block, four_over_six)


@every_block
@every_choice
def test_amax_of_any_mantissa(four_over_six, block):
    """The tensor scale and its inverse are rounded; 300 random mantissas test both, one matrix each."""
    for seed in range(300):
        x = gaussian(2, 20, 1000 + seed) * (1 + seed / 300)
        assert_agrees(x, block, four_over_six)


def at_the_midpoints_of_e4m3(largest: float, amax: float) -> Tensor:
    """Return blocks whose scale, before it is rounded to e4m3, is halfway between two values or a few ulps beside.

    The order of the fp32 operations decides these cases; elsewhere the rounding hides it.
    """
    values = non_negative_values(E4M3)
    values = values[values <= largest]
    middle = torch.from_numpy((values[:-1] + values[1:]) / 2 * amax / largest).float()
    rows = [middle]
    for direction in (torch.zeros(()), torch.full((), torch.inf)):
        rows += [step := torch.nextafter(middle, direction), torch.nextafter(step, direction)]
    first = torch.cat([torch.tensor([amax]), *rows]).clamp(max=amax)
    rest = torch.rand(len(first), 15, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.cat([first[:, None], first[:, None] * rest], dim=1)


@every_choice
@pytest.mark.parametrize("amax", [1.0, 1.1, 1.3, 1.7, 2.9, 1e5 / 3])
def test_scales_at_the_midpoints_of_e4m3(amax, four_over_six):
    x = at_the_midpoints_of_e4m3(256.0 if four_over_six else 448.0, amax)
    assert_agrees(x, (1, 16), four_over_six)
    assert_agrees(-x, (1, 16), four_over_six)


@every_block
@every_choice
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_one_number_that_is_not_finite_makes_the_whole_matrix_nan(bad, four_over_six, block):
    """The tensor scale comes from every element, so no block is spared."""
    x = gaussian(40, 70, 9)
    x[33, 61] = bad
    q = quantize(x, spec(block, four_over_six))
    assert q.tensor_scale is not None
    assert q.tensor_scale.isnan()
    assert q.dequantize().isnan().all()
    assert quantize(x, spec(block, four_over_six), decoded=True).dequantize().isnan().all()
    assert nvfp4_by_numpy(x, block, four_over_six=four_over_six)[3].isnan().all()


@every_block
@every_choice
def test_dequantising_multiplies_the_block_scale_first(four_over_six, block):
    """q * S is exact (2 + 4 bits), so q * S * s_dec is rounded once; q * (S * s_dec) would be rounded twice."""
    twice = 0
    for seed in range(10, 15):
        q = quantize(heavy_tailed(64, 128, seed), spec(block, four_over_six))
        assert q.scale is not None
        assert q.tensor_scale is not None
        r, c = block
        scale = q.scale.repeat_interleave(r, 0).repeat_interleave(c, 1)
        exact = (q.values.double() * scale.double() * q.tensor_scale.double()).float()
        assert torch.equal(q.dequantize(), exact)
        twice += (q.values * (scale * q.tensor_scale) != exact).sum().item()
    assert twice > 0  # otherwise this test could not fail


@every_block
@every_choice
def test_strides_do_not_matter(four_over_six, block):
    x = heavy_tailed(50, 70, 11)
    expected = quantize(x, spec(block, four_over_six))
    got = quantize(x.t().contiguous().t(), spec(block, four_over_six))
    assert torch.equal(got.data, expected.data)
    assert got.scale is not None
    assert expected.scale is not None
    assert torch.equal(got.scale, expected.scale)
    assert torch.equal(got.dequantize(), expected.dequantize())


@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (0, 0)])
@every_block
@every_choice
def test_empty_matrices(shape, four_over_six, block):
    q = quantize(torch.empty(shape), spec(block, four_over_six))
    assert q.dequantize().shape == shape
    assert q.tensor_scale is not None
    assert q.tensor_scale.item() == 1.0


def test_the_scale_replicated_over_16_rows_serves_the_transpose():
    """With 16x16 blocks, quantising the transpose gives the transposed codes, so weights are quantised once."""
    x = heavy_tailed(48, 80, 12)
    q, t = quantize(x, spec((16, 16))), quantize(x.t(), spec((16, 16)))
    assert torch.equal(q.dequantize().t(), t.dequantize())


def test_a_block_with_its_numbers_at_four_sixths_takes_four():
    """Under the scale for amax 6, 4 and 6 are codes, 5 is halfway. Under the scale for amax 4 (3/2 of it), 4.5 and 3 are codes as well."""
    easy = torch.tensor([[6.0, 3.0, 1.5, -6.0, 0.75, 2.25] + [0.0] * 10]) * 256  # codes 4, 2, 1, -4, 0.5, 1.5 under the larger scale
    equal = torch.tensor([[6.0, 3.0, 0.0, -6.0] + [0.0] * 12]) * 256  # codes under both scales: six stays
    six = torch.tensor([[6.0, 4.0, 2.0, -1.0] + [0.0] * 12]) * 256
    q = quantize(torch.cat([easy, equal, six]), spec((1, 16), four_over_six=True))
    assert q.scale is not None
    assert q.tensor_scale is not None
    assert (q.scale * q.tensor_scale).flatten().tolist() == [256 * 1.5, 256, 256]
    assert q.values[:, 0].tolist() == [4.0, 6.0, 6.0]
    assert torch.equal(q.dequantize(), torch.cat([easy, equal, six]))


@every_block
def test_four_over_six_takes_both_kinds_of_blocks(block):
    x = gaussian(256, 256, 13)
    values = quantize(x, spec(block, four_over_six=True)).values
    r, c = block
    largest = values.abs().unflatten(1, (-1, c)).unflatten(0, (-1, r)).amax((1, 3))
    assert set(largest.flatten().tolist()) == {4.0, 6.0}
    assert ((largest == 4).float().mean() > 0.2) == (r == 1)  # a larger block fills more codes, and is closer to the grid of six


def test_four_over_six_has_the_smaller_error():
    for seed, make in ((13, gaussian), (14, heavy_tailed)):
        x = make(128, 128, seed)
        with_choice, without = (quantize(x, spec((1, 16), choice)).dequantize() for choice in (True, False))
        assert (with_choice - x).square().sum() < 0.95 * (without - x).square().sum()


@every_block
@every_choice
def test_the_largest_scale_leaves_room(four_over_six, block):
    """The block that holds the matrix's amax gets the largest scale: 448, or 256 and 384 (3/2 of it) under four-over-six."""
    x = heavy_tailed(64, 64, 14)
    q = quantize(x, spec(block, four_over_six))
    assert q.scale is not None
    assert q.scale.max() in ([256, 384] if four_over_six else [448])
    assert q.scale.max() <= E4M3.max


@every_block
def test_stochastic_rounding_is_unbiased_and_keeps_to_the_neighbours(block):
    x, draws = heavy_tailed(16, 48, 15), 3000
    nearest = quantize(x, spec(block))
    generator = torch.Generator().manual_seed(0)
    values = [quantize(x, spec(block, rounding="stochastic"), generator=generator) for _ in range(draws)]
    assert nearest.scale is not None
    for q in values[:3]:  # the scales do not depend on the draw
        assert q.scale is not None
        assert torch.equal(q.scale, nearest.scale)
    r, c = block
    step = nearest.scale.repeat_interleave(r, 0).repeat_interleave(c, 1)[:16, :48].double() * nearest.tensor_scale.double()
    toward, away, _ = neighbours((x.double() / step).numpy(), E2M1)
    toward, away = torch.from_numpy(toward), torch.from_numpy(away)
    for q in values[:20]:
        assert ((q.values == toward) | (q.values == away)).float().mean() > 0.999  # fp32 rounding of x / step rarely crosses a code
    mean = torch.stack([q.dequantize() for q in values]).double().mean(0)
    share = (x.double() / step - toward) / (away - toward).masked_fill(away == toward, 1)
    sigma = ((share * (1 - share)).clamp(min=1e-3) / draws).sqrt() * (away - toward).abs() * step
    inside = (x.double() / step).abs() < 6
    z = ((mean - x) / sigma.clamp(min=1e-12))[inside]
    assert z.abs().max() < 5
    assert abs(z.mean()) < 5 / z.numel() ** 0.5
    assert 0.8 < z.std() < 1.2
    assert (nearest.dequantize() - x).abs().max() > (mean - x)[inside].abs().max() * 5  # rounding to nearest is biased


@every_block
def test_toward_zero_never_grows(block):
    x = heavy_tailed(32, 64, 16)
    q = quantize(x, spec(block, rounding="toward_zero"))
    reference = quantize(x, spec(block))
    assert reference.scale is not None
    assert q.scale is not None
    assert torch.equal(q.scale, reference.scale)
    assert (q.dequantize().abs() <= x.abs() * (1 + 2.0**-22)).all()
    assert (q.values.abs() < reference.values.abs()).any()


@every_block
def test_four_over_six_by_magnitudes(block):
    """Every bit is that of the published order, and some blocks choose another scale than by squares."""
    x = torch.cat([gaussian(48, 64, 18), heavy_tailed(48, 64, 19)])
    assert_agrees(x, block, True, "mae")
    assert_agrees(1e30 * x, block, True, "mae")
    x = gaussian(256, 256, 20)
    by_squares, by_magnitudes = (quantize(x, spec(block, True, error=error), decoded=True) for error in ("mse", "mae"))
    r, c = block
    errors = [(q.dequantize() - x).abs().unflatten(1, (-1, c)).unflatten(0, (-1, r)).sum((1, 3)) for q in (by_squares, by_magnitudes)]
    assert not torch.equal(by_squares.scale, by_magnitudes.scale)  # pyright: ignore[reportArgumentType]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()


def test_four_over_six_divides_amax_by_six_before_it_multiplies():
    """Both published codes take (amax / 6) s_enc. amax (s_enc / 6) lies on the other side of a midpoint of e4m3 for some blocks."""
    rows = torch.cat([torch.full((1, 16), 1.5), torch.rand(4096, 16, generator=torch.Generator().manual_seed(0))])
    amax = rows.abs().amax(1)
    encode = torch.tensor(1536.0) / amax.max()
    midpoints = (amax * encode / 6).to(torch.float8_e4m3fn).float()
    step = 2.0 ** (midpoints.log2().floor() - 3)
    nearby = torch.arange(-2, 3, dtype=torch.int32)  # ulps around the amax whose scale is a midpoint
    target = ((midpoints + step / 2) * 6 / encode).view(torch.int32)[:, None] + nearby
    x = torch.zeros(target.numel() + 1, 16)
    x[0, 0] = amax.max()
    x[1:, 0] = target.view(torch.float32).flatten().clamp(max=amax.max().item())
    base = x[:, 0] / 6 * encode
    published, larger = (scale.to(torch.float8_e4m3fn).float() for scale in (base, base * 1.5))
    other = (x[:, 0] * (encode * torch.tensor(1 / 6))).to(torch.float8_e4m3fn).float()
    scale = quantize(x, spec((1, 16), True)).scale
    assert scale is not None
    assert (published != other).any()
    assert ((scale[:, 0] == published) | (scale[:, 0] == larger)).all()


@every_block
def test_the_unbiased_factor(block):
    """With 16/17 the mean of stochastic rounding is x, also where a block is largest; without it, it is not."""
    x = gaussian(64, 64, 21)
    r, c = block
    magnitudes = x.abs().unflatten(1, (-1, c)).unflatten(0, (-1, r))
    largest = (magnitudes == magnitudes.amax((1, 3), keepdim=True)).flatten(2, 3).flatten(0, 1)
    changes = []
    for prescale in (1.0, 16 / 17):
        unbiased = spec(block, rounding="stochastic", prescale=prescale)
        assert OperandSpec.parse(str(unbiased)) == unbiased
        draws = [quantize(x, unbiased, key=torch.tensor([seed, 0])) for seed in range(150)]
        shift = (torch.stack([q.dequantize() for q in draws]).mean(0) - x) * x.sign()
        sigma = torch.stack([q.dequantize() for q in draws]).std(0)[largest].norm() / 150**0.5 / x.abs()[largest].sum()
        changes.append((shift[largest].sum() / x.abs()[largest].sum()).item())
        if prescale != 1.0:
            assert abs(changes[-1]) < 5 * sigma
    assert changes[0] < -0.01 / len(block)
    assert "prescale:16/17" in str(unbiased)


def test_what_nvfp4_is_not():
    with pytest.raises(ValueError, match="goes with e2m1 elements"):
        OperandSpec(element=E4M3, scaling=BlockScaling(block=(1, 16), scale_format="e4m3"))
    whole = quantize(gaussian(4, 32, 17), spec((ALL, ALL)))
    assert whole.scale is not None
    assert np.prod(whole.scale.shape) == 1
