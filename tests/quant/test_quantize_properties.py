"""Properties of quantize hold for any matrix; hypothesis searches for counterexamples."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from lowprec.formats.element import E2M1, FORMATS, INT4, INT8
from lowprec.formats.scaling import ALL, RULES, BlockScaling
from lowprec.quant import OperandSpec, quantize
from lowprec.testing import gaussian
from lowprec.testing.tolerances import FP32_ROUNDINGS, error_bound

quick = settings(deadline=None, max_examples=60, derandomize=True, database=None)

FLOATS = [fmt for fmt in FORMATS.values() if fmt.saturates and not fmt.is_integer]
elements = st.sampled_from(FLOATS)
rules = st.sampled_from(["floor", "ceil", "even", "rceil"])
blocks = st.sampled_from([(1, 4), (3, 2), (1, ALL), (ALL, ALL)])


def matrices(smallest: float = 0.0, largest: float = float(np.finfo(np.float32).max)) -> st.SearchStrategy[Tensor]:
    """Return a strategy of fp32 matrices [1..5, 1..9] with magnitudes in [smallest, largest] or zero."""
    magnitude = st.just(0.0) | st.floats(smallest, largest, width=32)
    signed = st.builds(lambda m, negative: -m if negative else m, magnitude, st.booleans())
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)
    return hnp.arrays(np.float32, shapes, elements=signed).map(torch.from_numpy)


def spec(element, block, rounding="nearest", **scaling) -> OperandSpec:
    return OperandSpec(element=element, scaling=BlockScaling(block=block, **scaling), rounding=rounding)


roundings = st.sampled_from(["nearest", "toward_zero"])


@quick
@given(matrices(), elements, blocks, st.sampled_from(["floor", "even"]))
def test_power_of_two_scales_are_idempotent_in_codes(x, element, block, rule):
    """Under floor and even, the largest code keeps amax's exponent, so the second scale equals the first."""
    once = quantize(x, spec(element, block, scale_format="e8m0", rule=rule))
    value = once.dequantize()
    assume(value.isfinite().all())  # the largest fp32 numbers round up to 2^128
    again = quantize(value, once.spec)
    assert once.scale is not None
    assert again.scale is not None
    assert torch.equal(again.scale, once.scale)
    assert torch.equal(again.values.float(), once.values.float())


@quick
@given(matrices(), elements, blocks, rules)
def test_power_of_two_scales_are_idempotent_in_values(x, element, block, rule):
    """Under ceil and rceil, the largest code may round down until half the scale would do: the codes change, the numbers do not."""
    value = quantize(x, spec(element, block, scale_format="e8m0", rule=rule)).dequantize()
    assume(value.isfinite().all())
    assert torch.equal(quantize(value, spec(element, block, scale_format="e8m0", rule=rule)).dequantize(), value)


@quick
@given(matrices(), elements, blocks, st.sampled_from(["fp32", "e8m0"]), roundings)
def test_symmetric_floats_are_odd(x, element, block, scale_format, rounding):
    """quantize(-x) = -quantize(x), the sign of zero included, because the two signs of a float format have the same values."""
    a, b = (quantize(t, spec(element, block, rounding, scale_format=scale_format)) for t in (x, -x))
    assert a.scale is not None
    assert b.scale is not None
    assert torch.equal(a.scale, b.scale)
    assert torch.equal(a.values.view(torch.int32), (-b.values).view(torch.int32))


@quick
@given(matrices(), blocks, st.booleans(), roundings)
def test_nvfp4_is_odd(x, block, four_over_six, rounding):
    a, b = (quantize(t, spec(E2M1, block, rounding, scale_format="e4m3", four_over_six=four_over_six)) for t in (x, -x))
    assert torch.equal(a.values.view(torch.int32), (-b.values).view(torch.int32))
    assert torch.equal(a.dequantize(), -b.dequantize())


@quick
@given(matrices(2.0**-20, 2.0**20), elements, blocks, st.sampled_from(["fp32", "floor", "ceil", "rceil"]), roundings, st.integers(-40, 40))
def test_powers_of_two_pass_through_to_the_scale(x, element, block, scale, rounding, k):
    """quantize(2^k x) has x's codes and 2^k times its scales, as long as both stay in fp32's normal range."""
    assume((x != 0).any())
    scaling = {} if scale == "fp32" else {"scale_format": "e8m0", "rule": scale}
    blocked = quantize(x, spec(element, block, rounding, **scaling))
    shifted = quantize(x * 2.0**k, blocked.spec)
    assert blocked.scale is not None
    assert shifted.scale is not None
    assert torch.equal(shifted.values, blocked.values)
    nonzero = blocked.dequantize() != 0
    assert torch.equal(shifted.dequantize()[nonzero], blocked.dequantize()[nonzero] * 2.0**k)


@quick
@given(matrices(2.0**-20, 2.0**20), blocks, st.booleans(), roundings, st.integers(-30, 40))
def test_powers_of_two_pass_through_to_nvfp4s_tensor_scale(x, block, four_over_six, rounding, k):
    """Codes and block scales stay the same for every power: the fp32 tensor scale takes it."""
    assume((x != 0).any())
    q = quantize(x, spec(E2M1, block, rounding, scale_format="e4m3", four_over_six=four_over_six))
    shifted = quantize(x * 2.0**k, q.spec)
    assert q.scale is not None
    assert shifted.scale is not None
    assert torch.equal(shifted.values, q.values)
    assert torch.equal(shifted.scale, q.scale)
    assert torch.equal(shifted.dequantize(), q.dequantize() * 2.0**k)


@quick
@given(matrices(2.0**-20, 2.0**20), blocks)
def test_nvfp4_is_within_a_quarter_of_each_number(x, block):
    """The error of each number is at most a quarter of it, plus what a small block adds.

    e2m1 steps by at most half of a number, and by half a step around zero. Its scale, rounded to 4 bits, may be 1/16 too small, or half an
    e4m3 subnormal step too small where the block is small beside the matrix, and then the block's largest magnitude is cut.
    """
    q = quantize(x, spec(E2M1, block, scale_format="e4m3"))
    assert q.scale is not None
    assert q.tensor_scale is not None
    rows, cols = (min(n, b) if b != ALL else n for n, b in zip(x.shape, block, strict=True))
    step = (q.scale.double() * q.tensor_scale.double()).repeat_interleave(rows, 0).repeat_interleave(cols, 1)[: x.shape[0], : x.shape[1]]
    amax = x.double().abs().max()
    bound = torch.maximum(x.double().abs() / 4, step / 4)
    cut = torch.maximum(x.double().abs() / 16, 6 * 2.0**-10 * amax / (6 * 448))
    assert ((q.dequantize().double() - x.double()).abs() <= torch.maximum(bound, cut) * (1 + 1e-5)).all()


@quick
@given(matrices(2.0**-60, 2.0**100), elements, blocks, st.sampled_from(["fp32", "ceil", "rceil"]))
def test_toward_zero_never_grows_and_loses_less_than_a_step(x, element, block, scale):
    scaling = {} if scale == "fp32" else {"scale_format": "e8m0", "rule": scale}
    q = quantize(x, spec(element, (ALL, ALL), "toward_zero", **scaling))
    value, x = q.dequantize().double(), x.double()
    assert q.scale is not None
    assert (value.abs() <= x.abs() * (1 + FP32_ROUNDINGS)).all()
    assert ((value == 0) | (value.sign() == x.sign())).all()
    step = torch.maximum(x.abs() * 2.0**-element.mantissa_bits, q.scale.double() * element.min_normal * 2.0**-element.mantissa_bits)
    assert ((x - value).abs() <= step * (1 + 1e-6) + FP32_ROUNDINGS * x.abs()).all()


@quick
@given(matrices(2.0**-60, 2.0**100), elements, rules, st.integers(0, 2**31 - 1))
def test_stochastic_rounding_lies_between_its_neighbours(x, element, rule, seed):
    """The result is the neighbour toward zero or the next value away from zero; rounding to nearest gives one of the two as well."""
    scaling = {"scale_format": "e8m0", "rule": rule}
    low, near = (quantize(x, spec(element, (1, ALL), rounding, **scaling)).values.abs() for rounding in ("toward_zero", "nearest"))
    key = torch.tensor([seed, 1])
    q = quantize(x, spec(element, (1, ALL), "stochastic", **scaling), key=key)
    again = quantize(x, q.spec, key=key)
    assert torch.equal(q.data, again.data)
    drawn = q.values.abs()
    assert (drawn >= low).all()
    exponent = torch.where(low == 0, -1000.0, torch.frexp(low)[1] - 1)
    grid = (2.0**exponent).clamp(min=element.min_normal) * 2.0**-element.mantissa_bits
    assert ((drawn == low) | (drawn == low + grid)).all()
    assert ((near == low) | (near == low + grid)).all()


@pytest.mark.parametrize("rounding", ["stochastic", "toward_zero"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_are_rounded_as_the_spec_says_with_and_without_a_zero_point(symmetric, rounding):
    x = gaussian(20, 64, 0)
    nearest = quantize(x, spec(INT8, (1, ALL), symmetric=symmetric))
    q = quantize(x, spec(INT8, (1, ALL), rounding, symmetric=symmetric), key=torch.tensor([1, 2]))
    assert 0.2 < (q.values != nearest.values).float().mean() < 0.8


@quick
@given(matrices(2.0**-60, 2.0**60), elements, st.integers(0, 1000))
def test_stochastic_rounding_is_idempotent(x, element, seed):
    """A value of the format does not move, and under floor the second scale equals the first."""
    floor = {"scale_format": "e8m0", "rule": "floor"}
    # floor cuts above the largest value, so the first rounding changes amax's exponent only when it crosses that value
    once = quantize(x, spec(element, (1, ALL), "toward_zero", **floor)).dequantize()
    again = quantize(once, spec(element, (1, ALL), "stochastic", **floor), key=torch.tensor([seed, seed]))
    assert torch.equal(again.dequantize(), once)


@quick
@given(matrices(2.0**-60, 2.0**100), elements, st.sampled_from(["fp32", "e8m0"]))
def test_error_of_floats_is_half_an_ulp_of_each_value(x, element, scale_format):
    """For every number, not only amax: |x - x_hat| <= 2^-(p + 1) |x|, or half the subnormal step times the scale where that is more."""
    q = quantize(x, spec(element, (ALL, ALL), scale_format=scale_format))
    assert q.scale is not None
    x, scale = x.double(), q.scale.double().item()
    subnormal_step = element.min_normal * 2.0**-element.mantissa_bits
    bound = torch.maximum(x.abs() * 2.0 ** -(element.mantissa_bits + 1), torch.tensor(scale * subnormal_step / 2))
    assert ((q.dequantize().double() - x).abs() <= bound + FP32_ROUNDINGS * x.abs()).all()


@quick
@given(matrices(2.0**-60, 2.0**100), st.sampled_from([(f, s) for f in FLOATS for s in ("fp32", "floor", "ceil", "even", "rceil")]))
def test_error_at_amax_is_bounded_per_format(x, choice):
    element, rule = choice
    scaling = {} if rule == "fp32" else {"scale_format": "e8m0", "rule": rule}
    q = quantize(x, spec(element, (ALL, ALL), **scaling))
    assert q.scale is not None
    error = (q.dequantize().double() - x.double()).abs()
    assert (error <= error_bound(element, rule) * q.scale.double() + FP32_ROUNDINGS * x.double().abs()).all()


@quick
@given(matrices(2.0**-60, 2.0**100), st.sampled_from([INT8, INT4]), st.booleans())
def test_error_of_integers(x, element, symmetric):
    """The error is half a step. In symmetric formats +amax lies 7.5 (127.5) steps up and is cut to 7 (127), still half a step away."""
    q = quantize(x, spec(element, (1, ALL), symmetric=symmetric))
    assert q.scale is not None
    # asymmetric: (x / s + zp) - zp is x / s, at most 255 steps, with one fp32 rounding of each
    slack = FP32_ROUNDINGS * (x.double().abs() + q.scale.double() * 256)
    assert ((q.dequantize().double() - x.double()).abs() <= q.scale.double() / 2 + slack).all()


@quick
@given(matrices(), st.sampled_from([INT8, INT4]), st.booleans())
def test_zero_is_exact(x, element, symmetric):
    q = quantize(x, spec(element, (1, ALL), symmetric=symmetric))
    assert (q.dequantize()[x == 0] == 0).all()


@quick
@given(matrices(2.0**-20, 2.0**20), elements, st.sampled_from(RULES), roundings)
def test_order_is_kept(x, element, rule, rounding):
    """Within a block, a larger value never gets a smaller code."""
    q = quantize(x, spec(element, (ALL, ALL), rounding, scale_format="e8m0", rule=rule))
    order = x.flatten().argsort()
    assert (q.values.flatten()[order].diff() >= 0).all()


@quick
@given(matrices(2.0**-20, 2.0**20), st.booleans(), roundings)
def test_nvfp4_keeps_the_order_within_a_block(x, four_over_six, rounding):
    q = quantize(x, spec(E2M1, (ALL, ALL), rounding, scale_format="e4m3", four_over_six=four_over_six))
    order = x.flatten().argsort()
    assert (q.values.flatten()[order].diff() >= 0).all()


@pytest.mark.parametrize("element", FLOATS, ids=str)
def test_the_bounds_at_amax_are_tight(element):
    """Each bound is reached, so a smaller bound would be false."""
    top = element.max
    ulp = 2.0 ** (element.emax - element.mantissa_bits)
    x = torch.tensor([[top, top - ulp / 2]])  # scale 1; halfway between the two largest codes
    q = quantize(x, spec(element, (ALL, ALL), scale_format="e8m0"))
    error = (q.dequantize() - x).abs().max().item()
    assert error == error_bound(element, "rceil") == error_bound(element, "fp32")
    beyond = 2.0 ** (element.emax + 1) * (1 - 2.0**-24)  # the largest value for which floor does not take the next scale
    q = quantize(torch.tensor([[beyond]]), spec(element, (ALL, ALL), scale_format="e8m0", rule="floor"))
    assert (q.dequantize() - beyond).abs().item() == pytest.approx(error_bound(element, "floor"), abs=2.0**-23 * beyond)
