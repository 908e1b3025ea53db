"""QTensor keeps its stated invariants, transposes as documented, and counts its bytes."""

import math

import pytest
import torch

from lowprec.formats.element import BF16, E2M1, E3M2, E4M3, E5M2, E5M6, INT4, INT8
from lowprec.formats.rounding import round_to_format
from lowprec.formats.scaling import ALL, BlockScaling
from lowprec.quant import OperandSpec, QTensor, quantize
from lowprec.quant.qtensor import from_blocks, to_blocks
from lowprec.testing import EDGE_BLOCKS, gaussian, heavy_tailed

SPECS = [
    OperandSpec(element=E4M3, scaling=BlockScaling(block=(1, 128))),
    OperandSpec(element=E4M3, scaling=BlockScaling(block=(128, 128))),
    OperandSpec(element=E5M2, scaling=BlockScaling(block=(ALL, ALL))),
    OperandSpec(element=E4M3, scaling=BlockScaling(block=(1, 32), scale_format="e8m0")),
    OperandSpec(element=E3M2, scaling=BlockScaling(block=(1, 32), scale_format="e8m0", rule="ceil")),
    OperandSpec(element=E2M1, scaling=BlockScaling(block=(1, 32), scale_format="e8m0", rule="floor")),
    OperandSpec(element=INT8, scaling=BlockScaling(block=(1, ALL), symmetric=False)),
    OperandSpec(element=INT4, scaling=BlockScaling(block=(1, 32))),
    OperandSpec(element=E5M6, scaling=BlockScaling(block=(1, 128), scale_format="e8m0")),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


def matrix() -> torch.Tensor:
    """Return [R, K] with every edge case, then ordinary rows; neither size is a multiple of a block."""
    edges = torch.cat([case.row for case in EDGE_BLOCKS])
    return torch.cat([torch.cat([edges, gaussian(len(edges), 70, 0)], dim=1), heavy_tailed(30, 198, seed=1)])


def expanded(part: torch.Tensor, q: QTensor) -> torch.Tensor:
    """Return the scale or zero point of each element."""
    (rows, cols), (r, c) = q.shape, q.block
    return part.repeat_interleave(r, 0)[:rows].repeat_interleave(c, 1)[:, :cols]


@every_spec
@pytest.mark.parametrize("decoded", [False, True])
def test_invariants(spec, decoded):
    x = matrix()
    q = quantize(x, spec, decoded=decoded, saturation=True)
    rows, cols = x.shape
    assert q.scale is not None
    assert spec.scaling is not None
    r, c = (n if extent == ALL else extent for n, extent in zip(x.shape, spec.scaling.block, strict=True))
    assert q.block == (r, c)

    # values: in the element format, in its storage dtype or fp32; codes that share bytes are packed
    assert q.data.dtype == (torch.float32 if decoded else spec.element.storage)
    assert q.decoded == decoded
    assert q.values.dtype == torch.float32
    assert q.shape == q.values.shape == x.shape
    group = math.lcm(spec.element.bits, 8)  # bits of the smallest group of codes that fills whole bytes
    width = -(-cols * spec.element.bits // group) * group // 8 if spec.element.packed and not decoded else cols
    assert q.data.shape == (rows, width)
    alive = ~expanded(q.scale, q).isnan()
    values = q.values.float()[alive]
    assert torch.equal(values, round_to_format(values, spec.element))
    assert ((values >= spec.element.min) & (values <= spec.element.max)).all()

    # scale: one per block, positive or NaN
    assert q.scale.dtype == torch.float32
    assert q.scale_data is not None
    stored_dtype = {"fp32": torch.float32, "e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}[spec.scaling.scale_format]
    assert q.scale_data.dtype == (torch.float32 if decoded else stored_dtype)
    assert q.scale.shape == q.scale_data.shape == (-(-rows // r), -(-cols // c))
    scales = q.scale[~q.scale.isnan()]
    assert (scales > 0).all()
    assert scales.isfinite().all()
    if spec.scaling.scale_format == "e8m0":
        assert (torch.frexp(scales)[0] == 0.5).all()

    # NaN marks exactly the blocks that held NaN or infinity
    blocks = to_blocks(x, (r, c))
    assert torch.equal(q.scale.isnan(), ~blocks.isfinite().all(3).all(1))

    if spec.scaling.symmetric:
        assert q.zero_point is None
    else:
        assert q.zero_point is not None
        assert q.zero_point.shape == q.scale.shape
        assert q.zero_point.dtype == (torch.float32 if decoded else torch.int8)
        zeros = q.zero_point[~q.scale.isnan()].float()
        assert torch.equal(zeros, zeros.round().clamp(spec.element.min, spec.element.max))

    assert q.saturated is not None
    assert (q.saturated.dtype, q.saturated.shape) == (torch.bool, x.shape)
    assert quantize(x, spec).saturated is None


@every_spec
def test_dequantize_is_values_less_zero_point_times_scale(spec):
    q = quantize(matrix(), spec)
    assert q.scale is not None
    zero_point = 0.0 if q.zero_point is None else expanded(q.zero_point, q)
    expected = (q.values.float() - zero_point) * expanded(q.scale, q)
    torch.testing.assert_close(q.dequantize(), expected, rtol=0, atol=0, equal_nan=True)
    for dtype in (torch.bfloat16, torch.float16):
        torch.testing.assert_close(q.dequantize(dtype), expected.to(dtype), rtol=0, atol=0, equal_nan=True)


@every_spec
@pytest.mark.parametrize("decoded", [False, True])
def test_transpose_is_a_view_of_the_transposed_matrix_or_a_decoded_copy_of_packed_codes(spec, decoded):
    q = quantize(matrix(), spec, decoded=decoded, saturation=True)
    t = q.t()
    assert t.shape == (q.shape[1], q.shape[0])
    assert t.block == (q.block[1], q.block[0])
    copied = spec.element.packed and not decoded
    assert (t.data.data_ptr() == q.data.data_ptr()) == (not copied)
    assert t.decoded == (decoded or copied)
    torch.testing.assert_close(t.dequantize(), q.dequantize().t(), rtol=0, atol=0, equal_nan=True)
    assert t.saturated is not None
    assert q.saturated is not None
    assert torch.equal(t.saturated, q.saturated.t())
    assert t.t().spec == q.spec


def test_transpose_equals_quantising_the_transpose_with_transposed_blocks():
    x = heavy_tailed(140, 200, seed=2)
    down = OperandSpec(element=E4M3, scaling=BlockScaling(block=(128, 1)))
    across = OperandSpec(element=E4M3, scaling=BlockScaling(block=(1, 128)))
    q, t = quantize(x, down), quantize(x.t(), across).t()
    assert q.spec == t.spec
    assert torch.equal(q.values.float(), t.values.float())
    assert q.scale is not None
    assert t.scale is not None
    assert torch.equal(q.scale, t.scale)


def test_transpose_without_scaling():
    q = quantize(heavy_tailed(3, 5, seed=3), OperandSpec(element=BF16))
    assert q.t().spec == q.spec
    assert torch.equal(q.t().dequantize(), q.dequantize().t())


def test_nbytes_by_hand():
    """A [256, 384] matrix has the bytes of its codes, scales and zero points."""
    x, count = gaussian(256, 384, 0), 256 * 384
    expected = {
        SPECS[0]: count + 256 * 3 * 4,  # 1x128 tiles of fp8, fp32 scales
        SPECS[1]: count + 2 * 3 * 4,
        SPECS[2]: count + 4,
        SPECS[6]: count + 256 * (4 + 1),  # an fp32 scale and an int8 zero point for each row
    }
    for spec, nbytes in expected.items():
        assert quantize(x, spec).nbytes == nbytes
    assert quantize(x, SPECS[0], saturation=True).nbytes == expected[SPECS[0]]  # nbytes does not count the mask
    assert quantize(x, OperandSpec(element=BF16)).nbytes == 2 * count


@pytest.mark.parametrize("shape, block", [((4, 6), (2, 3)), ((5, 7), (2, 3)), ((1, 1), (128, 128)), ((3, 8), (1, 8)), ((0, 4), (1, 2))])
def test_blocks_are_a_partition(shape, block):
    x = torch.arange(1.0, shape[0] * shape[1] + 1).view(shape)
    blocks = to_blocks(x, block)
    assert blocks.shape == (-(-shape[0] // block[0]), block[0], -(-shape[1] // block[1]), block[1])
    assert blocks.sum() == x.sum()  # the padding is zero
    assert torch.equal(from_blocks(blocks, x.shape), x)
    for i in range(blocks.shape[0]):
        for j in range(blocks.shape[2]):
            part = x[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            assert torch.equal(blocks[i, : part.shape[0], j, : part.shape[1]], part)


def test_every_e4m3_code_decodes_as_torch_casts_it():
    """CPUs decode e4m3 by a fast path. Its NaN, 0x7F, is the documented exception, since only a block with a NaN scale can hold it."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    q = QTensor(data=codes, scale_data=torch.ones(2, 1), spec=SPECS[0], shape=codes.shape)
    expected = codes.float()
    finite = ~expected.isnan()
    assert finite.sum() == 254
    assert torch.equal(q.dequantize()[finite].view(torch.int32), expected[finite].view(torch.int32))
    dead = QTensor(data=codes, scale_data=torch.full((2, 1), torch.nan), spec=SPECS[0], shape=codes.shape)
    assert dead.dequantize().isnan().all()
