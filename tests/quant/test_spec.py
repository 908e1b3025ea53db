"""OperandSpec: every spec that can be written takes every matrix, and its notation reads back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lowprec.errors import UserError
from lowprec.formats.element import E2M1, FORMATS
from lowprec.formats.rounding import ROUNDINGS, round_to_format
from lowprec.formats.scaling import ALL, RULES, BlockScaling
from lowprec.quant import OperandSpec, quantize

quick = settings(deadline=None, max_examples=150, derandomize=True, database=None)

LARGEST = float(np.finfo(np.float32).max)
shapes = hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)
matrices = hnp.arrays(np.float32, shapes, elements=st.floats(-LARGEST, LARGEST, width=32)).map(torch.from_numpy)


@st.composite
def specs(draw) -> OperandSpec:
    """Draw any spec that can be written: element, block, scale, options and rounding, valid together."""
    element = draw(st.sampled_from(list(FORMATS.values())))
    rounding = draw(st.sampled_from(ROUNDINGS))
    if not element.saturates:
        return OperandSpec(element=element, rounding=rounding)
    extent = st.just(ALL) | st.integers(1, 300)
    fields = {"block": draw(st.tuples(extent, extent) | st.sampled_from([(ALL, ALL), (1, ALL), (1, 32), (128, 128)]))}
    formats = ["fp32", "e8m0"] + ["e4m3"] * (element == E2M1)
    fields["scale_format"] = draw(st.sampled_from(formats))
    if fields["scale_format"] == "e8m0":
        fields["rule"] = draw(st.sampled_from([rule for rule in RULES if rule != "even" or not element.is_integer]))
        fields["prescale"] = draw(st.sampled_from([1.0, 0.75, 0.5, 0.875, 0.0625]))
    elif fields["scale_format"] == "e4m3":
        fields["four_over_six"] = draw(st.booleans())
        fields["four_over_six_error"] = draw(st.sampled_from(["mse", "mae"])) if fields["four_over_six"] else "mse"
        fields["prescale"] = draw(st.sampled_from([1.0, 16 / 17, 0.5]))
    elif element.is_integer:
        fields["symmetric"] = draw(st.booleans())
    if fields["scale_format"] == "fp32" and fields["block"] == (ALL, ALL) and fields.get("symmetric", True):
        fields["history"] = draw(st.integers(0, 4096))
    return OperandSpec(element=element, scaling=BlockScaling(**fields), rounding=rounding)


@quick
@given(matrices, specs())
def test_any_spec_takes_any_matrix(x, spec):
    """Codes have the format, one per element; storing and transposing change no number, and a layout changes no code."""
    key = torch.tensor([1, 2])
    q, decoded = quantize(x, spec, key=key), quantize(x, spec, key=key, decoded=True)
    assert q.shape == q.values.shape == x.shape
    value = q.dequantize()
    assert value.shape == x.shape
    torch.testing.assert_close(decoded.dequantize(), value, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(q.t().dequantize().t(), value, rtol=0, atol=0, equal_nan=True)
    other = quantize(x.t().contiguous().t(), spec, key=key)
    quest = spec.scaling is not None and spec.scaling.rule == "quest" and spec.scaling.scale_format == "e8m0"
    if not quest:  # quest sums over a block, and may do so in another order
        assert torch.equal(other.values, q.values)
    if spec.element.saturates:
        assert ((q.values >= spec.element.min) & (q.values <= spec.element.max)).all()
    cut = (x == 0) & ~value.isnan()
    assert (value[cut] == 0).all()


@quick
@given(specs(), st.sampled_from([(0, 3), (3, 0), (0, 0)]))
def test_any_spec_takes_an_empty_matrix(spec, shape):
    for decoded in (False, True):
        q = quantize(torch.empty(shape), spec, key=torch.tensor([1, 2]), decoded=decoded)
        assert q.dequantize().shape == q.values.shape == shape
        assert q.t().dequantize().shape == shape[::-1]


@settings(quick, max_examples=500)
@given(specs())
def test_parsing_is_the_inverse_of_printing(spec):
    assert OperandSpec.parse(str(spec)) == spec
    assert OperandSpec.parse(f"  {spec}  ") == spec
    assert str(OperandSpec.parse(str(spec))) == str(spec)


@quick
@given(st.floats(2.0**-20, 1, exclude_max=True))
def test_any_prescale_can_be_written_and_read(prescale):
    written = OperandSpec(element=E2M1, scaling=BlockScaling(block=(1, 32), scale_format="e8m0", prescale=prescale))
    assert OperandSpec.parse(str(written)) == written


def test_the_rounding_may_stand_anywhere_but_once():
    assert OperandSpec.parse("e4m3[1x128 stochastic fp32]") == OperandSpec.parse("e4m3[1x128 fp32 stochastic]")
    with pytest.raises(UserError, match="two roundings"):
        OperandSpec.parse("e4m3[1x128 fp32 nearest nearest]")


@pytest.mark.parametrize("text", ["e4m3[1x128 fp32 e8m0]", "e4m3[1x128 e8m0:floor fp32]", "e4m3[1x128 e8m0:floor e8m0:ceil]"])
def test_two_scale_formats_contradict_each_other(text):
    with pytest.raises(UserError):
        OperandSpec.parse(text)


@pytest.mark.parametrize(
    "text, message",
    [
        ("e4m4", "unknown element format 'e4m4'; did you mean 'e4m3'?"),
        ("bf61", "unknown element format 'bf61'; did you mean 'bf16'?"),
        ("e4m3[1x128 fp23]", "unknown word 'fp23'; did you mean 'fp32'?"),
        ("e4m3[1x32 e8m0:rciel]", "unknown word 'e8m0:rciel'; did you mean 'e8m0:rceil'?"),
        ("e4m3[1x32 e8m0 stochastik]", "unknown word 'stochastik'; did you mean 'stochastic'?"),
        ("e4m3[1x32 e8m0 toward_zer]", "unknown word 'toward_zer'; did you mean 'toward_zero'?"),
        ("int8[row fp32 asymetric]", "unknown word 'asymetric'; did you mean 'asymmetric'?"),
        ("e2m1[1x32 e8m0 prescale:2]", "a prescale lies between 0 and 1"),
        ("e5m2[tensor fp32 delay:16]", "unknown word 'delay:16'; did you mean 'delayed:1024'?"),
        ("e2m1[1x16 e4m3 4/7]", "unknown word '4/7'; did you mean '4/6'?"),
        ("e4m3[1by128 fp32]", "'1by128' is no block: write 'tensor', 'row' or ROWSxCOLUMNS like '1x128'"),
        ("e4m3[fp32]", "'fp32' is no block"),
        ("e4m3[1x-1 fp32]", "'1x-1' is no block"),
        ("e4m3[1x128 fp32", "is no operand: write it like 'bf16' or 'e4m3[1x128 fp32]'"),
        ("", "is no operand"),
        ("e4m3", "'e4m3': e4m3 needs a scaling"),
        ("bf16[1x32 fp32]", "bf16 takes no scaling"),
        ("e4m3[row fp32 asymmetric]", "a zero point goes with an integer format"),
        ("int8[1x32 e8m0:even]", "the rule 'even' rounds amax to a float's mantissa"),
        ("e4m3[1x16 e4m3]", "goes with e2m1 elements"),
        ("e4m3[0x16 fp32]", "block extents are positive"),
        ("e4m3[row fp32 delayed:16]", "delayed scaling keeps the amax of a whole tensor"),
    ],
)
def test_text_that_is_no_spec_names_the_nearest_word(text, message):
    with pytest.raises(UserError) as error:
        OperandSpec.parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_prescale_shrinks_the_codes_under_every_rule():
    """Quest's scale comes from the standard deviation, but the codes there are those of prescale * x too."""
    x = torch.full((1, 32), 1.0)
    x[:, ::2] = -1.0
    for rule in RULES:
        plain, prescaled = (quantize(x, OperandSpec.parse(f"e2m1[1x32 e8m0:{rule}{words}]")) for words in ("", " prescale:0.75"))
        assert plain.scale is not None
        assert prescaled.scale is not None
        assert torch.equal(plain.scale, prescaled.scale)
        assert torch.equal(prescaled.values, round_to_format(x / plain.scale * 0.75, E2M1))


@pytest.mark.parametrize("block", ["1x128", "128x128"])
def test_kernels_of_fp8_take_no_prescale(block):
    """They know codes and scales, and would leave out the factor."""
    assert OperandSpec.parse(f"e4m3[{block} e8m0]").kind == block
    assert OperandSpec.parse(f"e4m3[{block} e8m0 prescale:0.75]").kind == ""
