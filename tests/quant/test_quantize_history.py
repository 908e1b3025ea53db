"""Delayed scaling and the prescale give scales that do not come from the current block's amax alone."""

import pytest
import torch

from lowprec.formats.element import E2M1, E4M3, E5M2
from lowprec.formats.random import uniform
from lowprec.formats.scaling import ALL, BlockScaling
from lowprec.quant import OperandSpec, quantize
from lowprec.testing import gaussian, heavy_tailed, neighbours

LENGTH = 4
DELAYED = OperandSpec(element=E4M3, scaling=BlockScaling(block=(ALL, ALL), history=LENGTH))
CURRENT = OperandSpec(element=E4M3, scaling=BlockScaling(block=(ALL, ALL)))


def of_amax(amax: float, seed: int = 0) -> torch.Tensor:
    x = gaussian(6, 10, seed).clamp(-2, 2) * amax / 4
    x[3, 4] = -amax
    return x


def scale_of(q) -> float:
    assert q.scale is not None
    return q.scale.item()


def test_an_empty_history_uses_the_current_amax_and_records_it():
    history, x = torch.zeros(LENGTH), of_amax(3.0)
    q = quantize(x, DELAYED, history=history)
    expected = quantize(x, CURRENT)
    assert scale_of(q) == scale_of(expected)
    assert torch.equal(q.values, expected.values)
    assert history.tolist() == [0, 0, 0, 3.0]


def test_without_a_history_the_current_amax_serves():
    x = of_amax(3.0)
    assert torch.equal(quantize(x, DELAYED).dequantize(), quantize(x, CURRENT).dequantize())


def test_the_history_rolls_oldest_first_and_its_largest_sets_the_scale():
    history, seen = torch.zeros(LENGTH), []
    for amax in (2.0, 8.0, 1.0, 4.0, 0.5, 0.25, 16.0, 3.0):
        before = list(seen)
        q = quantize(of_amax(amax), DELAYED, history=history)
        seen = [*seen, amax][-LENGTH:]
        assert history.tolist() == [0.0] * (LENGTH - len(seen)) + seen
        largest = max(before) if before else amax  # the current amax is not among those that set its scale
        assert scale_of(q) == torch.tensor(largest / 448).item()


def test_what_lies_beyond_the_history_saturates():
    history = torch.tensor([0.0, 0.0, 0.0, 1.0])
    x = torch.tensor([[4.0, -4.0, 1.0, 0.5]])
    q = quantize(x, DELAYED, history=history, saturation=True)
    assert q.values.tolist() == [[448.0, -448.0, 448.0, 224.0]]
    assert q.saturated is not None
    assert q.saturated.tolist() == [[True, True, False, False]]
    torch.testing.assert_close(q.dequantize(), torch.tensor([[1.0, -1.0, 1.0, 0.5]]), rtol=1e-6, atol=0)
    assert history.tolist() == [0, 0, 1.0, 4.0]
    assert scale_of(quantize(x, DELAYED, history=history)) == torch.tensor(4 / 448).item()  # the next call fits


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("recorded", [[0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 5.0, 1.0]], ids=["empty", "filled"])
def test_an_amax_that_is_not_finite_makes_nan_and_is_not_recorded(bad, recorded):
    history, x = torch.tensor(recorded), of_amax(3.0)
    x[0, 0] = bad
    q = quantize(x, DELAYED, history=history)
    assert q.dequantize().isnan().all()
    assert history.isfinite().all()
    assert history[:-1].tolist() == recorded[1:]
    assert history[-1].item() == max(recorded)  # as if the largest amax had come again: it keeps the next scale
    after = quantize(of_amax(3.0), DELAYED, history=history)
    assert scale_of(after) == torch.tensor((max(recorded) or 3.0) / 448).item()


def test_a_matrix_of_zeros_is_recorded_and_keeps_the_scale():
    history = torch.tensor([0.0, 0.0, 2.0, 1.0])
    q = quantize(torch.zeros(3, 5), DELAYED, history=history)
    assert scale_of(q) == torch.tensor(2 / 448).item()
    assert (q.dequantize() == 0).all()
    assert history.tolist() == [0.0, 2.0, 1.0, 0.0]


def test_an_empty_matrix_leaves_the_history():
    history = torch.tensor([0.0, 0.0, 2.0, 1.0])
    assert quantize(torch.empty(0, 5), DELAYED, history=history).dequantize().shape == (0, 5)
    assert history.tolist() == [0.0, 0.0, 2.0, 1.0]


def test_a_history_of_one_is_the_amax_of_the_call_before():
    spec = OperandSpec(element=E5M2, scaling=BlockScaling(block=(ALL, ALL), history=1))
    history = torch.zeros(1)
    scales = [scale_of(quantize(of_amax(a), spec, history=history)) for a in (2.0, 8.0, 1.0)]
    assert scales == [torch.tensor(a / 57344).item() for a in (2.0, 2.0, 8.0)]
    assert history.tolist() == [1.0]


def test_the_history_takes_a_transposed_matrix_and_narrow_inputs():
    x = of_amax(3.0)
    for view in (x.t(), x.to(torch.bfloat16), x[::1]):
        history = torch.tensor([0.0, 0.0, 0.0, 7.0])
        assert scale_of(quantize(view, DELAYED, history=history)) == torch.tensor(7 / 448).item()
        assert history.tolist() == [0, 0, 7.0, 3.0]


PRESCALE = 0.75


def prescaled(rounding="stochastic", prescale=PRESCALE, element=E2M1, rule="floor") -> OperandSpec:
    scaling = BlockScaling(block=(1, 32), scale_format="e8m0", rule=rule, prescale=prescale)
    return OperandSpec(element=element, scaling=scaling, rounding=rounding)


def cut_by_floor() -> torch.Tensor:
    """Return blocks whose amax is just below a power of two: floor leaves it at nearly 8 = 4/3 of e2m1's largest value."""
    x = gaussian(16, 64, 1).clamp(-0.9, 0.9)
    x[:, ::32] = torch.linspace(1.5, 2 - 2.0**-20, 16)[:, None]
    x[:, 16::32] = -torch.linspace(1.5, 2 - 2.0**-20, 16)[:, None]
    return x * 2.0 ** (torch.arange(16) - 8)[:, None]


def test_the_prescale_keeps_everything_inside_the_range():
    x, key = cut_by_floor(), torch.tensor([1, 2])
    assert quantize(x, prescaled(prescale=1.0), key=key, saturation=True).saturated.any()  # pyright: ignore[reportOptionalMemberAccess]
    q = quantize(x, prescaled(), key=key, saturation=True)
    assert not q.saturated.any()  # pyright: ignore[reportOptionalMemberAccess]
    bits = torch.randint(0, 2**31 - 2**24, (500, 64), generator=torch.Generator().manual_seed(0))
    anything = bits.to(torch.int32).view(torch.float32)
    anything = anything[:, :64].clamp(min=2.0**-100, max=2.0**120)
    q = quantize(anything, prescaled("nearest"), saturation=True)
    assert not q.saturated.any()  # pyright: ignore[reportOptionalMemberAccess]
    assert q.scale is not None
    scaled = anything.double() * PRESCALE / q.scale.repeat_interleave(32, 1).double()
    assert scaled.max() <= 6


def test_the_prescale_is_divided_out_again():
    x, key = cut_by_floor(), torch.tensor([3, 4])
    q = quantize(x, prescaled(), key=key)
    assert q.tensor_scale is not None
    assert q.scale is not None
    assert q.tensor_scale.item() == torch.tensor(4 / 3, dtype=torch.float64).float().item()
    scale = q.scale.repeat_interleave(32, 1)
    assert torch.equal(q.dequantize(), q.values * scale * q.tensor_scale)
    plain = quantize(x, prescaled("nearest", 1.0))
    assert plain.scale is not None
    assert torch.equal(q.scale, plain.scale)  # the scale is that of x itself
    toward, away, _ = neighbours((x.double() * PRESCALE / scale.double()).numpy(), E2M1)
    assert ((q.values == torch.from_numpy(toward)) | (q.values == torch.from_numpy(away))).all()


def mean_error(spec: OperandSpec, x: torch.Tensor, draws: int) -> torch.Tensor:
    """Return the error of the mean of many draws for each element, in standard deviations."""
    drawn = [quantize(x, spec, key=torch.tensor([n * 7919, n])) for n in range(draws)]
    assert spec.scaling is not None
    scale = drawn[0].scale.repeat_interleave(32, 1).double() / spec.scaling.prescale  # pyright: ignore[reportOptionalMemberAccess]
    scaled = x.double() / scale
    toward, away, _ = (torch.from_numpy(part) for part in neighbours(scaled.numpy(), spec.element))
    share = ((scaled - toward) / (away - toward).masked_fill(away == toward, 1)).clamp(0, 1)
    # Rare events have no normal distribution: their standard deviation is taken as that of at least ten events.
    sigma = (away - toward).abs() * scale * ((share * (1 - share)).clamp(min=10 / draws) / draws).sqrt()
    mean = torch.stack([q.dequantize() for q in drawn]).double().mean(0)
    return (mean - x) / sigma.clamp(min=1e-6 * x.abs())


@pytest.mark.parametrize("element", [E2M1, E4M3], ids=str)
def test_stochastic_rounding_with_the_prescale_is_unbiased_and_without_it_is_not(element):
    x, draws = cut_by_floor(), 1500
    z = mean_error(prescaled(element=element), x, draws)
    assert z.abs().max() < 5
    assert abs(z.mean()) < 5 / z.numel() ** 0.5
    assert 0.7 < z.std() < 1.2
    biased = mean_error(prescaled(prescale=1.0, element=element), x, draws) * x.sign()
    assert biased[9:, ::16].max() < -20  # from 1.75 on, both formats cut, so every value comes out too small


def test_the_same_key_or_generator_gives_the_same_draws():
    x = heavy_tailed(20, 70, 2)
    key = torch.tensor([5, 6])
    first = quantize(x, prescaled(), key=key)
    assert torch.equal(quantize(x, prescaled(), key=key).data, first.data)
    assert not torch.equal(quantize(x, prescaled(), key=key + 1).data, first.data)
    transposed = quantize(x.t().contiguous().t(), prescaled(), key=key)
    assert torch.equal(transposed.values, first.values)
    drawn = [quantize(x, prescaled(), generator=torch.Generator().manual_seed(seed)).data for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    with pytest.raises(ValueError, match="stochastic rounding needs a generator or a key"):
        quantize(x, prescaled())


def test_each_element_is_rounded_by_its_own_places_draw():
    """An element rounds away from zero exactly if the draw of its row and column is below the share; blocks and padding shift no draw."""
    x, key = heavy_tailed(33, 70, 3), torch.tensor([7, 8])
    q = quantize(x, prescaled(prescale=1.0), key=key)
    assert q.scale is not None
    scaled = (x.double() / q.scale.repeat_interleave(32, 1)[:, :70].double()).clamp(-6, 6)
    toward, away, _ = (torch.from_numpy(part) for part in neighbours(scaled.numpy(), E2M1))
    share = (scaled - toward) / (away - toward).masked_fill(away == toward, 1)
    noise = uniform(key, (33, 70)).double()
    assert torch.equal(q.values.double(), torch.where(noise < share, away, toward))


def test_quest_masks_what_reaches_the_largest_value():
    """Under `quest` an element that becomes the largest code exactly is masked like one beyond it; under `floor` it is not."""
    x = torch.zeros(1, 32)
    x[0, :9] = torch.tensor([6.0, 6.0, 6.0, 6.0, -6.0, -6.0, -6.0, -6.0, 5.5])
    for rule, masked in (("quest", x.abs() == 6), ("floor", x > 6)):
        q = quantize(x, OperandSpec.parse(f"e2m1[1x32 e8m0:{rule}]"), saturation=True)
        assert q.scale is not None
        assert q.saturated is not None
        assert q.scale.item() == 1.0
        assert torch.equal(q.saturated, masked)


def test_a_prescale_survives_transposing_and_storing():
    x, key = heavy_tailed(40, 64, 4), torch.tensor([9, 1])
    q = quantize(x, prescaled(), key=key)
    decoded = quantize(x, prescaled(), key=key, decoded=True)
    assert torch.equal(q.dequantize(), decoded.dequantize())
    assert torch.equal(decoded.stored().dequantize(), q.dequantize())
    assert torch.equal(q.t().dequantize(), q.dequantize().t())
