"""quantize agrees with an independent implementation (`lowprec.testing.oracles`) bit for bit: codes, scales and zero points."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lowprec.formats.element import BF16, E2M1, E2M3, E3M2, E4M3, E5M2, E5M6, FP16, FP32, INT4, INT8
from lowprec.formats.scaling import ALL, SMALLEST_FP32_SCALE, BlockScaling
from lowprec.quant import OperandSpec, QTensor, quantize
from lowprec.testing import DISTRIBUTIONS, EDGE_BLOCKS, gaussian, heavy_tailed, quantize_by_numpy
from lowprec.testing.cases import PRODUCT_ABOVE_MAX


def scaled(element, block, **scaling) -> OperandSpec:
    return OperandSpec(element=element, scaling=BlockScaling(block=block, **scaling))


SPECS = {
    "fp8_tile": scaled(E4M3, (1, 128)),
    "fp8_block": scaled(E4M3, (128, 128)),
    "fp8_tile_ue8m0": scaled(E4M3, (1, 128), scale_format="e8m0"),
    "fp8_block_ue8m0": scaled(E4M3, (128, 128), scale_format="e8m0"),
    "fp8_tensor": scaled(E5M2, (ALL, ALL)),
    "fp8_row": scaled(E4M3, (1, ALL)),
    "mxfp8": scaled(E4M3, (1, 32), scale_format="e8m0"),
    "mxfp8_e5m2_ceil": scaled(E5M2, (1, 32), scale_format="e8m0", rule="ceil"),
    "mxfp6": scaled(E3M2, (1, 32), scale_format="e8m0", rule="even"),
    "mxfp6_e2m3": scaled(E2M3, (1, 32), scale_format="e8m0", rule="floor"),
    "e5m6_tile": scaled(E5M6, (1, 128), scale_format="e8m0"),
    "mxfp4": scaled(E2M1, (1, 32), scale_format="e8m0", rule="floor"),
    "int8_row": scaled(INT8, (1, ALL), symmetric=False),
    "int8_group": scaled(INT8, (1, 32), symmetric=False),
    "int4_group": scaled(INT4, (1, 32)),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def assert_same_codes(got: Tensor, expected: Tensor) -> None:
    """Assert that two tensors are equal down to the sign of zero."""
    assert got.shape == expected.shape
    assert torch.equal(got.float().view(torch.int32), expected.float().view(torch.int32))


def assert_agrees(q: QTensor, x: Tensor) -> None:
    codes, scale, zero_point = quantize_by_numpy(x, q.spec)
    assert q.scale is not None
    torch.testing.assert_close(q.scale, scale, rtol=0, atol=0, equal_nan=True)
    alive = ~codes.isnan()
    if q.spec.element.is_integer:
        codes = codes + 0.0  # integers have no -0
    assert_same_codes(q.values.float()[alive], codes[alive])
    assert q.dequantize()[~alive].isnan().all()
    if zero_point is None:
        assert q.zero_point is None
    else:
        assert q.zero_point is not None
        alive = ~scale.isnan()  # a dead block's zero point is arbitrary: int8 has no NaN
        assert torch.equal(q.zero_point.float()[alive], zero_point[alive])


def assert_same(a: QTensor, b: QTensor) -> None:
    """Assert that codes, scales, zero points and masks are the same, whatever their strides."""
    assert a.spec == b.spec
    assert a.data.dtype == b.data.dtype
    assert a.decoded == b.decoded
    parts = (a.values, b.values), (a.scale_data, b.scale_data), (a.zero_point, b.zero_point), (a.saturated, b.saturated)
    for part, other in parts:
        assert (part is None) == (other is None)
        if part is not None and other is not None:
            assert part.dtype == other.dtype
            torch.testing.assert_close(part.float(), other.float(), rtol=0, atol=0, equal_nan=True)


@every_spec
@pytest.mark.parametrize("magnitude", [1.0, 1e-38, 1e36], ids=["ordinary", "tiny", "huge"])
@pytest.mark.parametrize("make", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_random_matrices(make, magnitude, spec):
    x = make(131, 257, 0) * magnitude  # sizes are no multiple of 32 or 128; there are more than two blocks along K
    assert_agrees(quantize(x, spec), x)


@every_spec
@pytest.mark.parametrize("case", EDGE_BLOCKS, ids=str)
def test_edge_cases(case, spec):
    x = torch.cat([gaussian(1, 128, 1), case.row, gaussian(1, 128, 2)])
    q = quantize(x, spec)
    assert_agrees(q, x)
    assert q.scale is not None
    block = q.block
    bad = q.scale[1 // block[0], 0].isnan().item()
    assert bad is not case.finite
    if bad:
        assert q.dequantize()[1, : min(block[1], 128)].isnan().all()


def test_the_edge_cases_are_what_their_names_say():
    amax = torch.tensor(PRODUCT_ABOVE_MAX)
    assert amax * (1 / (amax / 448)) == torch.nextafter(torch.tensor(448.0), torch.tensor(torch.inf))
    tiny = next(case for case in EDGE_BLOCKS if case.name == "smallest_scale")
    q = quantize(tiny.row, SPECS["fp8_tile"])
    assert q.scale is not None
    assert q.scale.item() == SMALLEST_FP32_SCALE
    assert q.values[0, 0].float() == 448.0


@pytest.mark.parametrize("name", ["fp8_tile", "mxfp4", "int4_group"])
def test_a_bad_value_spoils_its_own_block_only(name):
    x = gaussian(4, 256, 0)
    clean = quantize(x, SPECS[name]).dequantize()
    x[2, 130] = torch.inf
    dirty, width = quantize(x, SPECS[name]).dequantize(), SPECS[name].scaling.block[1]  # pyright: ignore[reportOptionalMemberAccess]
    inside = torch.zeros(4, 256, dtype=torch.bool)
    inside[2, 128 : 128 + width] = True
    assert dirty[inside].isnan().all()
    assert torch.equal(dirty[~inside], clean[~inside])


@every_spec
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (33, 31), (127, 129), (5, 300)])
def test_padding_is_exact(shape, spec):
    """Quantising equals quantising the zero-padded matrix and cutting it: the padding changes no scale."""
    x = heavy_tailed(*shape, seed=3)
    q = quantize(x, spec, saturation=True)
    whole_rows, whole_cols = (-(-shape[0] // 128) * 128, -(-shape[1] // 128) * 128)
    assert spec.scaling is not None
    # a block as long as an axis needs no padding along that axis: padding would belong to the block itself
    rows = shape[0] if spec.scaling.block[0] == ALL else whole_rows
    cols = shape[1] if spec.scaling.block[1] == ALL else whole_cols
    padded = quantize(torch.nn.functional.pad(x, (0, cols - shape[1], 0, rows - shape[0])), spec, saturation=True)
    assert q.scale is not None
    assert padded.scale is not None
    assert_same_codes(q.values, padded.values[: shape[0], : shape[1]])
    assert torch.equal(q.scale, padded.scale[: q.scale.shape[0], : q.scale.shape[1]])


@every_spec
@pytest.mark.parametrize("shape", [(0, 128), (4, 0), (0, 0), (0, 5)])
def test_empty_matrices(shape, spec):
    q = quantize(torch.empty(shape), spec, saturation=True)
    assert q.shape == q.dequantize().shape == shape
    assert q.scale is not None
    assert q.scale.numel() == 0
    assert q.t().dequantize().shape == shape[::-1]


@every_spec
def test_strides_do_not_matter(spec):
    x = heavy_tailed(70, 140, seed=4)
    expected = quantize(x, spec, saturation=True)
    transposed = x.t().contiguous().t()
    assert transposed.stride() == (1, 70)
    every_other = torch.stack([x, -x], dim=-1).flatten(1)[:, ::2]
    inner = torch.nn.functional.pad(x, (3, 5, 2, 1))[2:-1, 3:-5]
    for view in (transposed, every_other, inner):
        assert torch.equal(view, x)
        assert_same(quantize(view, spec, saturation=True), expected)
    row = heavy_tailed(1, 140, seed=5).expand(70, -1)  # stride 0
    assert_same(quantize(row, spec), quantize(row.contiguous(), spec))


@every_spec
def test_a_transposed_matrix_is_quantised_without_a_copy(spec):
    """The codes have x's memory order, so that neither x^T nor its codes need a strided pass."""
    q = quantize(torch.randn(140, 70, generator=torch.Generator().manual_seed(0)).t(), spec)
    assert q.data.stride(0) == 1
    assert q.values.stride(0) == 1


@every_spec
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_equal_their_fp32_values(dtype, spec):
    x = heavy_tailed(40, 150, seed=6).to(dtype)
    assert_same(quantize(x, spec), quantize(x.float(), spec))


@every_spec
def test_decoded_holds_the_same_values(spec):
    x = torch.cat([heavy_tailed(40, 150, seed=7), gaussian(40, 150, seed=8) * 1e-38])
    x[5, 7], x[50, 100] = torch.nan, torch.inf
    stored, decoded = quantize(x, spec), quantize(x, spec, decoded=True)
    assert stored.data.dtype == spec.element.storage
    assert decoded.data.dtype == torch.float32
    assert (stored.decoded, decoded.decoded) == (False, True)
    assert_same(decoded.stored(), stored)
    got, expected = decoded.dequantize(), stored.dequantize()
    assert 0 < expected.isnan().sum() < expected.numel() or spec is SPECS["fp8_tensor"]
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fmt", [FP32, BF16, FP16], ids=str)
def test_without_scaling_quantise_casts(fmt):
    x = torch.cat([heavy_tailed(7, 9, seed=9), torch.tensor([[torch.nan, torch.inf, -torch.inf, 1e38, 1e5, 1e-40, 0.0, -0.0, 1.0]])])
    for decoded in (False, True):
        q = quantize(x, OperandSpec(element=fmt), decoded=decoded)
        assert (q.scale, q.zero_point, q.saturated) == (None, None, None)
        assert q.data.dtype == (torch.float32 if decoded else fmt.storage)
        torch.testing.assert_close(q.dequantize(), x.to(fmt.storage).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["int8_row", "int8_group", "int4_group", "mxfp4", "fp8_tile"])
def test_saturated_marks_what_the_clamp_cut(name):
    """The mask is compared with the unclamped integer or grid value, computed in numpy."""
    spec, x = SPECS[name], heavy_tailed(64, 96, seed=10)
    q = quantize(x, spec, saturation=True)
    assert q.saturated is not None
    assert q.saturated.dtype == torch.bool
    assert spec.scaling is not None
    assert q.scale is not None
    fmt, width = spec.element, q.block[1]
    one = np.float32(1.0)
    reciprocal = np.repeat(one / q.scale.numpy(), width, axis=1)[:, :96]
    scaled_x = x.numpy() * reciprocal
    if fmt.is_integer:
        zero = 0.0 if q.zero_point is None else np.repeat(q.zero_point.numpy(), width, axis=1)[:, :96]
        code = np.rint(scaled_x) + zero
        expected = (code < fmt.min) | (code > fmt.max)
    else:
        expected = np.abs(scaled_x) >= {"e2m1": 7.0, "e4m3": 464.0 + 1e-4}[fmt.name]  # e2m1: 7 rounds to 8, beyond 6
    assert torch.equal(q.saturated, torch.from_numpy(expected))
    assert q.saturated.any().item() == (name in ("int4_group", "mxfp4"))


def test_int8_saturates_where_both_ends_round_up():
    """low = -1.5 and high = 253.5 under scale 1: the zero point is -128 - round(-1.5) = -126, and round(253.5) - 126 = 128 is cut."""
    q = quantize(torch.tensor([[-1.5, 0.0, 10.0, 253.5]]), SPECS["int8_row"], saturation=True)
    assert q.zero_point is not None
    assert q.saturated is not None
    assert q.zero_point.item() == -126.0
    assert q.values.tolist() == [[-128, -126, -116, 127]]
    assert q.saturated.tolist() == [[False, False, False, True]]
    assert q.dequantize().tolist() == [[-2.0, 0.0, 10.0, 253.0]]


def test_int4_cuts_its_largest_positive_value():
    """The scale is amax / 7.5, so +amax becomes 7.5, rounds to the even 8 and is cut to 7; -amax becomes -8 and is not cut."""
    x = torch.zeros(2, 32)
    x[0, 3], x[1, 3] = 7.5, -7.5
    q = quantize(x, SPECS["int4_group"], saturation=True)
    assert q.scale is not None
    assert q.saturated is not None
    assert q.scale.tolist() == [[1.0], [1.0]]
    assert q.values[:, 3].tolist() == [7, -8]
    assert q.saturated[:, 3].tolist() == [True, False]
    assert q.saturated.sum() == 1


def test_int4_cuts_plus_amax_for_most_mantissas():
    """fp32(amax * fp32(1 / fp32(amax / 7.5))) is 7.5 or more, so it is cut, for 79% of the mantissas; it is never below 7.4999990."""
    amax = 1 + torch.arange(2**14) * 2.0**-14
    x = torch.zeros(2**14, 32)
    x[:, 0] = amax
    saturated = quantize(x, SPECS["int4_group"], saturation=True).saturated
    assert saturated is not None
    product = amax * (1 / (amax / 7.5))
    assert torch.equal(saturated[:, 0], product >= 7.5)
    assert product.min() > 7.499999
    assert 0.78 < saturated[:, 0].float().mean() < 0.81


@pytest.mark.parametrize("x", [torch.zeros(3), torch.zeros(1, 2, 3), torch.zeros(2, 2, dtype=torch.int32)], ids=["1d", "3d", "int"])
def test_wrong_inputs_are_refused(x):
    with pytest.raises(ValueError, match=r"quantize takes a floating-point matrix \[R, K\]"):
        quantize(x, SPECS["fp8_tile"])


def test_specs_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="e4m3 needs a scaling"):
        OperandSpec(element=E4M3)
    with pytest.raises(ValueError, match="a zero point goes with an integer format"):
        scaled(E4M3, (1, 32), symmetric=False)
    assert str(SPECS["mxfp4"]) == "e2m1[1x32 e8m0:floor]"
    assert str(OperandSpec(element=BF16)) == "bf16"
