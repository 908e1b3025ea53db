"""Properties of quantize that hold for any matrix, searched for counterexamples."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from lowprec.formats.element import E2M1, E2M3, E3M2, E4M3, E5M2, INT4, INT8
from lowprec.formats.scaling import ALL, BlockScaling
from lowprec.quant import OperandSpec, quantize
from lowprec.testing.tolerances import FP32_ROUNDINGS, error_bound

quick = settings(deadline=None, max_examples=60, derandomize=True, database=None)

FLOATS = (E4M3, E5M2, E3M2, E2M3, E2M1)
elements = st.sampled_from(FLOATS)
rules = st.sampled_from(["floor", "ceil", "even", "rceil"])
blocks = st.sampled_from([(1, 4), (3, 2), (1, ALL), (ALL, ALL)])


def matrices(smallest: float = 0.0, largest: float = float(np.finfo(np.float32).max)) -> st.SearchStrategy[Tensor]:
    """fp32 [1..5, 1..9]; magnitudes in [smallest, largest] or zero."""
    magnitude = st.just(0.0) | st.floats(smallest, largest, width=32)
    signed = st.builds(lambda m, negative: -m if negative else m, magnitude, st.booleans())
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)
    return hnp.arrays(np.float32, shapes, elements=signed).map(torch.from_numpy)


def spec(element, block, **scaling) -> OperandSpec:
    return OperandSpec(element=element, scaling=BlockScaling(block=block, **scaling))


@quick
@given(matrices(), elements, blocks, st.sampled_from(["floor", "even"]))
def test_power_of_two_scales_are_idempotent_in_codes(x, element, block, rule):
    """Under floor and even, the largest code keeps amax's exponent, so the second scale is the first."""
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
    """Under ceil and rceil the largest code may round down to where half the scale would do: other codes, the same numbers."""
    value = quantize(x, spec(element, block, scale_format="e8m0", rule=rule)).dequantize()
    assume(value.isfinite().all())
    assert torch.equal(quantize(value, spec(element, block, scale_format="e8m0", rule=rule)).dequantize(), value)


@quick
@given(matrices(), elements, blocks, st.sampled_from(["fp32", "e8m0"]))
def test_symmetric_floats_are_odd(x, element, block, scale_format):
    """quantize(-x) = -quantize(x), the sign of zero included: no float format has one more value on one side."""
    a, b = (quantize(t, spec(element, block, scale_format=scale_format)) for t in (x, -x))
    assert a.scale is not None
    assert b.scale is not None
    assert torch.equal(a.scale, b.scale)
    assert torch.equal(a.values.float().view(torch.int32), (-b.values.float()).view(torch.int32))


@quick
@given(matrices(2.0**-20, 2.0**20), elements, blocks, st.sampled_from(["fp32", "e8m0"]), st.integers(-40, 40))
def test_powers_of_two_pass_through_to_the_scale(x, element, block, scale_format, k):
    """quantize(2^k x) has x's codes and 2^k times its scales, while neither leaves fp32's normal range."""
    assume((x != 0).any())
    blocked = quantize(x, spec(element, block, scale_format=scale_format))
    shifted = quantize(x * 2.0**k, blocked.spec)
    assert blocked.scale is not None
    assert shifted.scale is not None
    assert torch.equal(shifted.values.float(), blocked.values.float())
    nonzero = blocked.dequantize() != 0
    assert torch.equal(shifted.dequantize()[nonzero], blocked.dequantize()[nonzero] * 2.0**k)


@quick
@given(matrices(2.0**-60, 2.0**100), elements, st.sampled_from(["fp32", "e8m0"]))
def test_error_of_floats_is_half_an_ulp_of_each_value(x, element, scale_format):
    """Not only of amax: |x - x_hat| <= 2^-(p + 1) |x|, and half the subnormal step times the scale where that is more."""
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
    """Half a step; symmetric +amax lies 7.5 (127.5) steps up, is cut to 7 (127) and still half a step away."""
    q = quantize(x, spec(element, (1, ALL), symmetric=symmetric))
    assert q.scale is not None
    # asymmetric: (x / s + zp) - zp is x / s, at most 255 steps, with an fp32 rounding of each
    slack = FP32_ROUNDINGS * (x.double().abs() + q.scale.double() * 256)
    assert ((q.dequantize().double() - x.double()).abs() <= q.scale.double() / 2 + slack).all()


@quick
@given(matrices(), st.sampled_from([INT8, INT4]), st.booleans())
def test_zero_is_exact(x, element, symmetric):
    q = quantize(x, spec(element, (1, ALL), symmetric=symmetric))
    assert (q.dequantize()[x == 0] == 0).all()


@quick
@given(matrices(2.0**-20, 2.0**20), elements, rules)
def test_order_is_kept(x, element, rule):
    """Within a block, a larger value never gets a smaller code."""
    q = quantize(x, spec(element, (ALL, ALL), scale_format="e8m0", rule=rule))
    order = x.flatten().argsort()
    assert (q.values.float().flatten()[order].diff() >= 0).all()


@pytest.mark.parametrize("element", FLOATS, ids=str)
def test_the_bounds_at_amax_are_tight(element):
    """Each bound is reached: a smaller one would be false."""
    top = element.max
    ulp = 2.0 ** (element.emax - element.mantissa_bits)
    x = torch.tensor([[top, top - ulp / 2]])  # scale 1; halfway between the two largest codes
    q = quantize(x, spec(element, (ALL, ALL), scale_format="e8m0"))
    error = (q.dequantize() - x).abs().max().item()
    assert error == error_bound(element, "rceil") == error_bound(element, "fp32")
    beyond = 2.0 ** (element.emax + 1) * (1 - 2.0**-24)  # the largest value that floor does not give the next scale
    q = quantize(torch.tensor([[beyond]]), spec(element, (ALL, ALL), scale_format="e8m0", rule="floor"))
    assert (q.dequantize() - beyond).abs().item() == pytest.approx(error_bound(element, "floor"), rel=1e-6)
