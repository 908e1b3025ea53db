"""The plain Triton kernels agree with the reference when Triton's interpreter runs them. `test_interpreter.py` runs this file.

Quantising is compared bit for bit. The interpreter differs from a GPU in three ways, and the comparisons allow for them:

* fp32 -> fp8: e4m3's NaN becomes 384. Codes are compared outside blocks whose scale is NaN; dequantised values are compared everywhere.
* fp32 -> bf16: the value is cut, not rounded (`cut`). No test covers bf16 subnormals, which are read and written wrongly, or products of
  bf16 numbers, which are multiplied as integers.
* Division by zero: numpy warns, a GPU does not.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from lowprec.formats.element import FORMATS
from lowprec.formats.random import uniform
from lowprec.gemm import BACKENDS, Accumulation
from lowprec.gemm.triton_mm import block_scaled_mm
from lowprec.nn import swiglu, swiglu_kernel
from lowprec.quant import OperandSpec, QTensor, fake_quantize, quantize, triton_quantize
from lowprec.quant.triton_quantize import Directions, directions, fake_quantize_fused, quantize_both
from lowprec.quant.triton_whole import quantize_whole
from lowprec.testing import EDGE_BLOCKS, ODD_SHAPES, gaussian, heavy_tailed

if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1: see test_interpreter.py", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what} encountered in:RuntimeWarning:triton.runtime.interpreter")
    for what in ("divide by zero", "invalid value", "overflow")
]

ELEMENTS = [fmt.name for fmt in FORMATS.values() if fmt.saturates and not fmt.is_integer and fmt.bits <= 8]
RULES = ("floor", "ceil", "even", "rceil")
SCALES = (*(f"e8m0:{rule}" for rule in RULES), "fp32")
NVFP4 = "e2m1[1x16 e4m3]"
KEY = torch.tensor([123, -456])
MAGNITUDES = (1e-40, 1e-38, 1e-30, 1e30, 3e38)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"rows": lambda x: x.contiguous(), "columns": lambda x: x.t().contiguous().t()}
"""The two memory orders of a matrix: its blocks lie along the rows of memory, or go down its columns."""
both_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def words(value: object) -> str | None:
    return value.replace(" ", "_") if isinstance(value, str) else None


# Matrices


def wide(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Return values over some fifteen binades, with zeros, including a whole block of zeros."""
    x = heavy_tailed(rows, cols, seed) * torch.exp(3 * gaussian(rows, cols, seed + 1))
    x[rows // 2 :, ::7] = 0.0
    x[:1, :40] = 0.0
    return x


def with_magnitude(magnitude: float, rows: int, cols: int, seed: int = 0) -> Tensor:
    """Return Gaussian values, scaled so that the largest magnitude is `magnitude`."""
    x = gaussian(rows, cols, seed)
    return x / x.abs().max() * magnitude


def edges(rows: int, cols: int, *, finite: bool = False) -> Tensor:
    """Return a matrix with the named edge cases at the top left, rows of all magnitudes below them, ordinary values beside them."""
    x = wide(rows, cols, seed=5)
    cases = torch.cat([case.row for case in EDGE_BLOCKS if case.finite or not finite])
    x[: len(cases), : cases.shape[1]] = cases
    for row, magnitude in enumerate(MAGNITUDES, start=len(cases)):
        x[row] = with_magnitude(magnitude, 1, cols, row)
    return x


# Comparisons


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Assert that two tensors have the same bits, including the sign of zero; NaN only needs to meet NaN."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    a, b = got.float().contiguous(), expected.float().contiguous()
    places = ((a.view(torch.int32) != b.view(torch.int32)) & ~(a.isnan() & b.isnan())).nonzero().tolist()
    where = [f"{a[i, j].item()!r} for {b[i, j].item()!r} at {i}, {j}" for i, j in places[:3]]
    assert not places, f"{len(places)} of {a.numel()} differ: {'; '.join(where)}"


def cut(x: Tensor) -> Tensor:
    """Return x converted from fp32 to bf16 by rounding toward zero."""
    return (x.contiguous().view(torch.int32) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


# fake_quantize_blocks


def fused(x: Tensor, text: str, **options) -> Tensor:
    spec = OperandSpec.parse(text)
    assert spec.one_pass
    return fake_quantize_fused(x, spec, **options)


def assert_emulates(x: Tensor, text: str, key: Tensor | None = None) -> None:
    assert_same(fused(x, text, key=key), fake_quantize(x, OperandSpec.parse(text), key=key))


@both_layouts
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("element", ELEMENTS)
def test_emulation_of_every_element_scale_and_block(element, scale, block, layout):
    assert_emulates(layout(edges(33, 130)), f"{element}[1x{block} {scale}]")


@both_layouts
@pytest.mark.parametrize("magnitude", [1.0, *MAGNITUDES])
def test_emulation_of_two_level_scales(magnitude, layout):
    x = wide(33, 130)
    x = x / x.abs().max() * magnitude
    assert magnitude < 1e-37 or fake_quantize(x, OperandSpec.parse(NVFP4)).count_nonzero() > 100
    assert_emulates(layout(x), NVFP4)


@both_layouts
def test_emulation_of_two_level_scales_at_the_edges(layout):
    assert_emulates(layout(edges(33, 130, finite=True)), NVFP4)
    assert_emulates(layout(torch.zeros(17, 40)), NVFP4)
    for bad in (torch.nan, torch.inf):
        x = wide(17, 40)
        x[3, 9] = bad
        assert_emulates(layout(x), NVFP4)
        assert fused(layout(x), NVFP4).isnan().all()


@both_layouts
@pytest.mark.parametrize("rule", RULES)
def test_emulation_with_a_prescale(rule, layout):
    assert_emulates(layout(edges(33, 130)), f"e2m1[1x32 e8m0:{rule} prescale:0.75]")


STOCHASTIC = (
    *(f"{element}[1x32 e8m0:floor stochastic]" for element in ELEMENTS),
    "e2m1[1x32 e8m0:floor prescale:0.75 stochastic]",
    "e4m3[1x128 fp32 stochastic]",
    "e2m1[1x16 e4m3 stochastic]",
)


@both_layouts
@pytest.mark.parametrize("text", STOCHASTIC, ids=words)
def test_emulation_of_stochastic_rounding(text, layout):
    x = layout(edges(33, 130, finite="x16" in text))
    assert_emulates(x, text, KEY)
    assert not torch.equal(fused(x, text, key=KEY + 1).nan_to_num(), fake_quantize(x, OperandSpec.parse(text), key=KEY).nan_to_num())


@both_layouts
def test_a_draw_that_equals_the_fraction_rounds_down(layout):
    """The matrix is u / 2 under scale 1, for which e2m1 has steps of 1/2, so each fraction is the draw itself."""
    x = uniform(KEY, (20, 64)) / 2
    x[:, ::32] = 4.0
    expected = torch.where(x == 4.0, 4.0, 0.0)
    assert_same(fused(layout(x), "e2m1[1x32 e8m0:floor stochastic]", key=KEY), layout(expected))


@both_layouts
@pytest.mark.parametrize("text", ["e2m1[1x32 e8m0:floor]", NVFP4, "e4m3[1x128 fp32]", "e2m3[1x32 e8m0:even stochastic]"], ids=words)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (33, 31), (127, 129), (1, 300), (300, 2)], ids=str)
def test_emulation_of_odd_shapes(shape, text, layout):
    assert_emulates(layout(wide(*shape)), text, KEY if "stochastic" in text else None)


@both_layouts
@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("rounding", ["", " stochastic"])
@pytest.mark.parametrize("shape", [(32, 128), (32, 256), (128, 128)], ids=str)
def test_emulation_of_whole_tiles(shape, rounding, block, layout):
    """A matrix of whole blocks needs no mask and takes another path: it is read as if it were 256 wide."""
    assert_emulates(layout(edges(*shape)), f"e4m3[1x{block} fp32{rounding}]", KEY if rounding else None)


@pytest.mark.parametrize("text", ["e4m3[1x32 e8m0:rceil]", NVFP4, "e2m1[1x16 e8m0:floor stochastic]"], ids=words)
def test_emulation_of_views(text):
    key = KEY if "stochastic" in text else None
    x = wide(40, 600)
    for view in (x[:32, :256], x[3:37, 5:305], x[:, ::2], x[:32, :512:2], x.t()[7:300, 1:34], x[:1].expand(20, -1)):
        assert_emulates(view, text, key)


@both_layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("text", ["e2m1[1x32 e8m0:floor]", "e4m3[1x128 fp32]", NVFP4], ids=words)
def test_emulation_of_narrow_inputs(text, dtype, layout):
    x = wide(33, 130)
    assert_emulates(layout(x.to(dtype)), text)
    if dtype == torch.bfloat16:
        assert_emulates(layout((x * 1e30).to(dtype)), text)
        assert_emulates(layout((x * 1e-30).to(dtype)), text)
    if text != NVFP4:
        x[2, 5], x[3, 129] = torch.nan, -torch.inf
        assert_emulates(layout(x.to(dtype)), text)


@both_layouts
def test_results_lie_in_memory_as_the_input_does(layout):
    x = layout(wide(33, 130))
    assert fused(x, NVFP4).stride() == x.stride()


@both_layouts
@pytest.mark.parametrize("element", ELEMENTS)
def test_mx_fits_bf16_results(element, layout):
    x = wide(33, 130)
    x[2, 5] = torch.nan
    expected = fake_quantize(layout(x), OperandSpec.parse(f"{element}[1x32 e8m0:rceil]"))
    got = fused(layout(x), f"{element}[1x32 e8m0:rceil]", dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert_same(got.float(), expected)


@both_layouts
@pytest.mark.parametrize("text", ["e4m3[1x128 fp32]", NVFP4], ids=words)
def test_emulation_to_bf16_converts_the_fp32_result(text, layout):
    x = layout(wide(33, 130))
    expected = fake_quantize(x, OperandSpec.parse(text))
    assert (expected != expected.bfloat16()).any()
    assert_same(fused(x, text, dtype=torch.bfloat16), cut(expected))
    assert_same(fused(x, text, dtype=torch.float16), expected.half())


# quantize_tiles


@pytest.fixture
def plain_triton(monkeypatch):
    """Select the plain kernel, and give it memory for its results that is not zero."""
    fresh = triton_quantize._empty_results

    def used(*args) -> list[Tensor]:
        results = fresh(*args)
        for result in results:
            result.view(torch.uint8).fill_(77)
        return results

    monkeypatch.setattr(triton_quantize, "_gluon_works", lambda device: False)
    monkeypatch.setattr(triton_quantize, "_empty_results", used)


on_plain_triton = pytest.mark.usefixtures("plain_triton")

KINDS = ((1, 1), (2, 2), (1, 2), (2, 1), (1, 0), (0, 1), (2, 0), (0, 2))
every_kind = pytest.mark.parametrize("kinds", KINDS, ids=str)
TILE_SPECS = (("e4m3", "fp32"), ("e4m3", "e8m0"), ("e5m2", "fp32"), ("e5m2", "e8m0"))
every_tile_spec = pytest.mark.parametrize("element, scale", TILE_SPECS)


def both(element: str, scale: str, kinds: tuple[int, int]) -> Directions:
    """Return what to make of a matrix and of its transpose. Kinds: 0 nothing, 1 blocks of 1x128, 2 of 128x128."""
    specs = (None if kind == 0 else OperandSpec.parse(f"{element}[{(1, 128)[kind - 1]}x128 {scale}]") for kind in kinds)
    wanted = directions(*specs)
    assert isinstance(wanted, Directions)
    return wanted


def dead(q: QTensor) -> Tensor:
    """Return the mask of the elements whose block has the scale NaN."""
    assert q.scale is not None
    rows, cols = q.block
    return q.scale.isnan().repeat_interleave(rows, 0).repeat_interleave(cols, 1)[: q.shape[0], : q.shape[1]]


def assert_same_codes(q: QTensor | None, x: Tensor, spec: OperandSpec | None) -> None:
    """Assert that codes, scales and values equal the reference's. Codes under a scale NaN are NaN, or 384, the interpreter's e4m3 NaN."""
    assert (q is None) == (spec is None)
    if q is None or spec is None:
        return
    expected = quantize(x, spec)
    assert q.shape == x.shape
    assert q.data.dtype == expected.data.dtype
    assert q.scale is not None
    assert expected.scale is not None
    assert_same(q.scale, expected.scale)
    nowhere = dead(expected)
    assert_same(q.values.masked_fill(nowhere, 0.0), expected.values.masked_fill(nowhere, 0.0))
    assert (q.data.float()[nowhere].abs().nan_to_num(384.0) == 384.0).all()
    assert_same(q.dequantize(), expected.dequantize())


def assert_both(x: Tensor, wanted: Directions, gate: Tensor | None = None, product: Tensor | None = None) -> None:
    a, b = quantize_both(x, wanted, times_silu_of=gate)
    product = x if product is None else product
    assert_same_codes(a, product, wanted.along_rows)
    assert_same_codes(b, product.t(), wanted.along_cols)


@on_plain_triton
@every_kind
@every_tile_spec
def test_both_directions(element, scale, kinds):
    assert_both(edges(150, 200), both(element, scale, kinds))
    assert_both(wide(40, 200), both(element, scale, kinds))


@on_plain_triton
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_both_directions_by_every_rule(element, rule):
    assert_both(edges(150, 200, finite=True), both(element, f"e8m0:{rule}", (1, 2)))


@on_plain_triton
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@every_tile_spec
def test_both_directions_of_every_magnitude(element, scale, magnitude):
    assert_both(with_magnitude(magnitude, 130, 140), both(element, scale, (2, 1)))


@on_plain_triton
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (128, 128), (127, 129), (256, 16), (1, 300), (300, 1)], ids=str)
@pytest.mark.parametrize("kinds", [(1, 1), (2, 2)], ids=str)
def test_both_directions_of_odd_shapes(kinds, shape):
    assert_both(wide(*shape), both("e4m3", "fp32", kinds))
    assert_both(torch.zeros(shape), both("e5m2", "e8m0", kinds))


@on_plain_triton
@pytest.mark.parametrize("kinds", [(1, 1), (1, 2), (0, 2)], ids=str)
def test_both_directions_of_views(kinds):
    x = wide(140, 300)
    for view in (x.t(), x[3:, 5:], x[:, ::2], x[:1].expand(130, -1)):
        assert_both(view, both("e4m3", "e8m0", kinds))


@on_plain_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_both_directions_of_narrow_inputs(dtype):
    x = wide(150, 200).to(dtype)
    x[3, 7], x[140, 190] = torch.nan, torch.inf
    assert_both(x, both("e4m3", "fp32", (1, 2)))
    assert_both(x, both("e5m2", "e8m0", (2, 1)))


@on_plain_triton
@pytest.mark.parametrize("kinds", [(1, 1), (2, 2), (1, 2), (2, 1)], ids=str)
def test_codes_are_padded_with_zeros(kinds):
    """Rows end in zeros up to 16 bytes, as tensor maps require, unless the last block has the scale NaN."""
    x = wide(150, 200)
    x[3, 199], x[149, 7] = torch.nan, torch.inf
    for q, width, padded in zip(quantize_both(x, both("e4m3", "fp32", kinds)), (200, 150), (208, 160), strict=True):
        assert q is not None
        assert q.data.stride() == (padded, 1)
        codes = q.data.as_strided((q.shape[0], padded), (padded, 1)).view(torch.uint8)
        last_is_dead = dead(q)[:, -1]
        assert 0 < last_is_dead.sum() < len(codes)
        assert not codes[~last_is_dead, width:].any()


@on_plain_triton
def test_scales_of_tiles_lie_as_gemms_read_them():
    a, b = quantize_both(wide(150, 201), both("e4m3", "fp32", (1, 1)))
    for q, padded in ((a, 152), (b, 204)):
        assert q is not None
        assert q.scale is not None
        assert q.scale.stride() == (1, padded)


@on_plain_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kinds", [(1, 1), (2, 2), (1, 0), (0, 2)], ids=str)
def test_silu_of_one_times_the_other(kinds, dtype):
    """silu is computed by the kernel's fp32 operations with numpy's exponential, and rounded to the dtype before it is multiplied."""
    gate, up = (3 * gaussian(150, 200, 1)).to(dtype), wide(150, 200).clamp(-100, 100).to(dtype)
    gate[0, :3], gate[5, 9], up[140, 100] = torch.tensor([-200.0, 300.0, 0.0]), torch.nan, torch.inf
    wide_gate = gate.float().numpy()
    with np.errstate(over="ignore"):
        product = torch.from_numpy(wide_gate / (1 + np.exp(-wide_gate))).to(dtype) * up
    torch.testing.assert_close(product, F.silu(gate) * up, equal_nan=True)
    assert_both(up, both("e4m3", "fp32", kinds), gate, product)


# block_scaled_gemm


def operands(m: int, n: int, k: int, b_block: int, element: str = "e4m3", scale: str = "fp32") -> tuple[QTensor, QTensor]:
    a, b = OperandSpec.parse(f"{element}[1x128 {scale}]"), OperandSpec.parse(f"{element}[{b_block}x128 {scale}]")
    return quantize(heavy_tailed(m, k, m), a), quantize(gaussian(n, k, n + 1), b)


def multiply(a: QTensor, b: QTensor, promote_every: int = 128, dtype: torch.dtype = torch.float32, **added) -> Tensor:
    assert a.scale is not None
    assert b.scale is not None
    return block_scaled_mm(a.data, a.scale, b.data, b.scale, b.block[0], promote_every, dtype, **added)


def assert_product(c: Tensor, a: QTensor, b: QTensor) -> None:
    expected = BACKENDS["reference"].mm(a, b, torch.float32)
    assert c.dtype == torch.float32
    assert c.shape == expected.shape
    assert (c - expected).double().norm() < 1e-6 * expected.double().norm()


both_scales_of_b = pytest.mark.parametrize("b_block", [1, 128])


@both_scales_of_b
@pytest.mark.parametrize("promote_every", [32, 64, 128])
@pytest.mark.parametrize("shape", [*ODD_SHAPES[:3], (40, 130, 300)], ids=str)
def test_products_of_odd_shapes(shape, promote_every, b_block):
    a, b = operands(*shape, b_block)
    assert_product(multiply(a, b, promote_every), a, b)


@both_scales_of_b
@every_tile_spec
def test_products_of_every_element_and_scale(element, scale, b_block):
    a, b = operands(33, 140, 260, b_block, element, scale)
    assert_product(multiply(a, b), a, b)


@both_scales_of_b
def test_results_in_16_bits_are_the_fp32_ones_converted(b_block):
    a, b = operands(33, 140, 260, b_block)
    wanted = multiply(a, b)
    assert_same(multiply(a, b, dtype=torch.bfloat16), cut(wanted))
    assert_same(multiply(a, b, dtype=torch.float16), wanted.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_is_added_in_fp32(dtype):
    a, b = operands(33, 50, 200, 1)
    plain, bias = multiply(a, b), gaussian(1, 50, 9)[0].to(dtype)
    assert_same(multiply(a, b, bias=bias), plain + bias)
    assert_same(multiply(a, b, dtype=torch.bfloat16, bias=bias), cut(plain + bias))


@pytest.mark.parametrize("promote_every", [32, 128])
def test_results_are_added_in_place(promote_every):
    a, b = operands(33, 50, 200, 128)
    plain, there, bias = multiply(a, b, promote_every), gaussian(33, 50, 9), gaussian(1, 50, 10)[0]
    sums = there.clone()
    assert multiply(a, b, promote_every, add_to=sums) is sums
    assert_same(sums, plain + there)
    assert_same(multiply(a, b, promote_every, bias=bias, add_to=there.clone()), plain + bias + there)
    narrow = there.bfloat16()
    assert_same(multiply(a, b, promote_every, torch.bfloat16, add_to=narrow.clone()), cut(plain + narrow))
    padded = torch.full((33, 64), 5.0)
    multiply(a, b, promote_every, add_to=padded[:, :50])
    assert_same(padded[:, :50], plain + 5.0)
    assert (padded[:, 50:] == 5.0).all()


@both_scales_of_b
def test_bad_blocks_spoil_their_rows_only(b_block):
    x, w = gaussian(40, 200, 0), gaussian(140, 200, 1)
    x[3, 150], w[135, 7] = torch.nan, torch.inf
    a, b = quantize(x, OperandSpec.parse("e4m3[1x128 fp32]")), quantize(w, OperandSpec.parse(f"e4m3[{b_block}x128 fp32]"))
    c, bad = multiply(a, b, 32), torch.zeros(40, 140, dtype=torch.bool)
    bad[3] = bad[:, 135 if b_block == 1 else slice(128, 140)] = True
    assert torch.equal(c.isnan(), bad)


@both_scales_of_b
def test_zeros_and_empty_products(b_block):
    for m, n, k in ((0, 5, 40), (3, 0, 40), (3, 5, 0), (3, 5, 40)):
        a, b = OperandSpec.parse("e4m3[1x128 fp32]"), OperandSpec.parse(f"e4m3[{b_block}x128 fp32]")
        assert torch.equal(multiply(quantize(torch.zeros(m, k), a), quantize(torch.ones(n, k), b)), torch.zeros(m, n))


@on_plain_triton
@both_scales_of_b
@pytest.mark.parametrize("scale", ["fp32", "e8m0"])
def test_the_backend_multiplies_what_the_quantiser_makes(scale, b_block):
    """Codes have padded rows, in which a dead block leaves NaNs beyond its end, and scales have the order of memory."""
    x, w = heavy_tailed(33, 201, 0), gaussian(140, 201, 1)
    x[3, 200] = torch.nan
    wanted_a, wanted_b = both("e4m3", scale, (1, 0)), both("e4m3", scale, (1 if b_block == 1 else 2, 0))
    a, b = quantize_both(x, wanted_a)[0], quantize_both(w, wanted_b)[0]
    assert a is not None
    assert b is not None
    sums = Accumulation(promote_every=64)
    c = BACKENDS["triton"].mm(a, b, torch.float32, sums)
    assert_same(c, BACKENDS["triton"].mm(quantize(x, a.spec), quantize(w, b.spec), torch.float32, sums))
    assert torch.equal(c.isnan().any(1), torch.arange(33) == 3)


# One scale per tensor or per row


@pytest.mark.parametrize("specs", [("tensor", "tensor"), ("row", "row"), ("row", "tensor"), ("row", None), (None, "tensor")], ids=str)
@pytest.mark.parametrize("elements", [("e4m3", "e4m3"), ("e5m2", "e4m3")], ids=str)
@both_layouts
def test_whole_scales_are_the_references(specs, elements, layout):
    a, b = (None if kind is None else OperandSpec.parse(f"{element}[{kind} fp32]") for element, kind in zip(elements, specs, strict=True))
    for rows, cols in ((33, 130), (64, 64), (1, 70), (70, 1)):
        x = layout(wide(rows, cols))
        for ours, spec, plain in zip(quantize_whole(x, a, b), (a, b), (x, x.t()), strict=True):
            assert_same_codes(ours, plain, spec)


def test_nan_in_a_row_kills_that_row_alone():
    x, row = gaussian(40, 70, 0), OperandSpec.parse("e4m3[row fp32]")
    x[3, 5], x[7, 1] = torch.nan, torch.inf
    q, q_t = quantize_whole(x, row, row)
    assert_same_codes(q, x, row)
    assert_same_codes(q_t, x.t(), row)
    assert q is not None
    assert q.dequantize().isnan().all(1).nonzero().flatten().tolist() == [3, 7]


def test_delayed_scales_go_by_the_history():
    spec = OperandSpec.parse("e4m3[tensor fp32 delayed:3]")
    ours, reference = torch.zeros(3), torch.zeros(3)
    for step in range(5):
        x = gaussian(33, 70, step) * (step + 1)
        q, _ = quantize_whole(x, spec, None, (ours, None))
        expected = quantize(x, spec, history=reference)
        assert q is not None
        assert_same(q.dequantize(), expected.dequantize())
        assert torch.equal(ours, reference)


def test_the_backward_of_swiglu():
    dh, gate, up = (gaussian(7, 333, seed) for seed in range(3))
    for ours, expected in zip(swiglu_kernel.backward(dh, gate, up), swiglu.swiglu_backward(dh, gate, up), strict=True):
        assert (ours - expected).abs().max() < 1e-5


@on_plain_triton
def test_gate_and_up_may_have_different_strides():
    whole = gaussian(40, 2 * 136, 0)
    gate, up = whole[:, :136], whole[:, 136:].clone()
    wanted = both("e4m3", "fp32", (1, 1))
    expected = quantize_both(up, wanted, times_silu_of=gate.clone())
    for ours, theirs in zip(quantize_both(up, wanted, times_silu_of=gate), expected, strict=True):
        assert ours is not None
        assert theirs is not None
        assert_same(ours.dequantize(), theirs.dequantize())
