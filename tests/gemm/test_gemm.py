"""The choice of a GEMM backend; the backends that run on a CPU are compared with float64."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from lowprec.errors import UserError
from lowprec.formats.element import BF16, E2M1, E4M3, FP16, FP32, INT4, INT8
from lowprec.formats.rounding import round_to_format
from lowprec.formats.scaling import ALL, BlockScaling
from lowprec.gemm import BACKENDS, Accumulation, LayerShape, Size, select
from lowprec.gemm.cost import bf16_cost
from lowprec.gemm.reference import ReferenceBackend
from lowprec.nn.gemms import gemm_size
from lowprec.quant import OperandSpec, fake_quantize, quantize
from lowprec.testing import ODD_SHAPES, fp32_accumulation_bound, gaussian, heavy_tailed

BF16_SPEC, FP16_SPEC, FP32_SPEC = (OperandSpec(element=fmt) for fmt in (BF16, FP16, FP32))
TILE = OperandSpec(element=E4M3, scaling=BlockScaling(block=(1, 128)))
BLOCK = OperandSpec(element=E4M3, scaling=BlockScaling(block=(128, 128)))
MXFP4 = OperandSpec(element=E2M1, scaling=BlockScaling(block=(1, 32), scale_format="e8m0", rule="floor"))
INT8_ROW = OperandSpec(element=INT8, scaling=BlockScaling(block=(1, ALL), symmetric=False))
INT4_GROUP = OperandSpec(element=INT4, scaling=BlockScaling(block=(1, 32)))
PAIRS = [(TILE, BLOCK), (TILE, TILE), (MXFP4, MXFP4), (INT8_ROW, INT4_GROUP), (BF16_SPEC, BF16_SPEC), (None, INT4_GROUP), (None, None)]


def ids(value) -> str:
    return str(value).replace(" ", "_")


@pytest.mark.parametrize(
    "a, b, device, name, native, reason",
    [
        (FP32_SPEC, FP32_SPEC, "cpu", "torch", True, "torch.mm in fp32"),
        (None, None, "cpu", "torch", True, "torch.mm on the operands as they arrive"),
        (BF16_SPEC, BF16_SPEC, "cuda", "torch", True, "torch.mm in bf16"),
        (FP16_SPEC, FP16_SPEC, "cuda", "torch", True, "torch.mm in fp16"),
    ],
    ids=ids,
)
def test_auto_takes_torch_for_unscaled_operands(a, b, device, name, native, reason):
    backend, support = select(a, b, device)
    assert (backend.name, support.ok, support.native, support.reason) == (name, True, native, reason)


@pytest.mark.parametrize(
    "a, b, why",
    [
        (TILE, BLOCK, "hopper: needs a Hopper GPU, not cpu; scaled_mm, triton: needs a GPU with FP8, not cpu"),
        (None, INT4_GROUP, "torch: takes unscaled operands only"),
        (BF16_SPEC, FP32_SPEC, "torch: takes two operands of one dtype"),
        (BF16_SPEC, None, "torch: takes two operands of one dtype"),
        (BF16_SPEC, BF16_SPEC, "torch: bf16 matrix products are slow on a CPU without hardware for them"),
    ],
    ids=ids,
)
def test_an_emulated_product_says_why_no_faster_backend_took_it(a, b, why):
    backend, support = select(a, b, "cpu")
    assert (backend.name, support.ok, support.native) == ("reference", True, False)
    assert support.reason.startswith("dequantised and multiplied in fp32; ")
    assert why in support.reason


def test_a_backend_that_is_asked_for_by_name():
    assert select(TILE, BLOCK, "cpu", "reference")[0] is BACKENDS["reference"]
    assert select(FP32_SPEC, FP32_SPEC, "cpu", "reference")[0] is BACKENDS["reference"]  # auto would choose torch
    assert select(FP32_SPEC, FP32_SPEC, "cpu", "torch")[0] is BACKENDS["torch"]


def test_a_backend_that_refuses_is_an_error_with_its_reason():
    with pytest.raises(UserError) as error:
        select(TILE, BLOCK, "cuda", "torch")
    assert str(error.value) == (
        "precision.backend: 'torch' can't multiply e4m3[1x128 fp32] by e4m3[128x128 fp32] on cuda: takes unscaled operands only"
    )


def test_an_unknown_backend_is_an_error_with_the_nearest_name():
    with pytest.raises(UserError, match=r"precision.backend: unknown backend 'referense'; did you mean 'reference'\?"):
        select(TILE, BLOCK, "cpu", "referense")
    with pytest.raises(UserError, match=r"unknown backend 'xyz'; known: .*auto.*reference.*torch"):
        select(TILE, BLOCK, "cpu", "xyz")


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("a, b", PAIRS, ids=ids)
def test_reference_equals_the_product_of_dequantised_operands_in_float64(a, b, out_dtype):
    for m, n, k in [*ODD_SHAPES, (64, 48, 300)]:
        x, w = heavy_tailed(m, k, seed=m), gaussian(n, k, seed=n)
        qx, qw = (quantize(t, s) if s else t for t, s in ((x, a), (w, b)))
        xd, wd = (t if isinstance(t, torch.Tensor) else t.dequantize() for t in (qx, qw))
        y = BACKENDS["reference"].mm(qx, qw, out_dtype)
        assert y.dtype == out_dtype
        error = (y.double() - xd.double() @ wd.double().t()).abs()
        assert (error <= fp32_accumulation_bound(xd, wd, out_dtype)).all()


@pytest.mark.parametrize("a, b", [(TILE, BLOCK), (MXFP4, MXFP4), (INT8_ROW, INT4_GROUP)], ids=ids)
def test_reference_takes_decoded_and_transposed_operands(a, b):
    x, w = gaussian(40, 96, 0), gaussian(24, 96, 1)
    expected = BACKENDS["reference"].mm(quantize(x, a), quantize(w, b), torch.float32)
    decoded = BACKENDS["reference"].mm(quantize(x, a, decoded=True), quantize(w, b, decoded=True), torch.float32)
    assert torch.equal(decoded, expected)
    there_and_back = BACKENDS["reference"].mm(quantize(x, a).t().t(), quantize(w.t().contiguous().t(), b), torch.float32)
    bound = 2 * fp32_accumulation_bound(quantize(x, a).dequantize(), quantize(w, b).dequantize())
    assert ((there_and_back - expected).abs() <= bound).all()


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_empty_products(name):
    mm = BACKENDS[name].mm
    assert mm(torch.empty(0, 8), torch.empty(5, 8), torch.float32).shape == (0, 5)
    assert torch.equal(mm(torch.empty(3, 0), torch.empty(5, 0), torch.bfloat16), torch.zeros(3, 5, dtype=torch.bfloat16))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_torch_promotes_plain_operands_of_mixed_dtypes(dtypes, out_dtype):
    x, w = gaussian(9, 50, 0).to(dtypes[0]), gaussian(7, 50, 1).to(dtypes[1])
    y = BACKENDS["torch"].mm(x, w, out_dtype)
    assert y.dtype == out_dtype
    assert ((y.double() - x.double() @ w.double().t()).abs() <= fp32_accumulation_bound(x, w, out_dtype)).all()


def test_torch_multiplies_cast_operands():
    x, w = gaussian(9, 50, 0), gaussian(7, 50, 1)
    y = BACKENDS["torch"].mm(quantize(x, FP32_SPEC), quantize(w, FP32_SPEC), torch.float32)
    assert ((y.double() - x.double() @ w.double().t()).abs() <= fp32_accumulation_bound(x, w)).all()


def test_every_backend_answers_with_a_reason():
    for backend in BACKENDS.values():
        for a, b in PAIRS:
            for device in ("cpu", "cuda"):
                assert backend.supports(a, b, device).reason


def test_backends_state_a_cost_or_make_no_statement():
    """Costs are worked out by hand for M = N = K = 4096: 2 * 4096^3 = 137.4e9 operations a product, 3 * 4096^2 = 50.3e6 elements."""
    layer = LayerShape(M=4096, N=4096, K=4096, fprop_kind="1x128", wgrad_kind="1x128")
    costs = {name: backend.cost(layer) for name, backend in BACKENDS.items()}
    stated = {name: cost for name, cost in costs.items() if cost is not None}
    assert set(stated) == {"hopper", "scaled_mm"}
    for cost in stated.values():
        assert cost.device == pytest.approx(2 * 137.4e9 / 1080e12 + 137.4e9 / 930e12 + 4 * 50.3e6 / 2.6e12 + 6 * 6e-6, rel=1e-3)
        assert cost.host == 0.65e-3
    assert bf16_cost(layer).device == pytest.approx(3 * 137.4e9 / 700e12 + 3 * 6e-6, rel=1e-3)


# Narrow accumulators


def cut_to(value: Fraction, unit: Fraction) -> Fraction:
    """Return `value`, rounded towards zero to a multiple of `unit`."""
    whole = abs(value) // unit
    return whole * unit * (1 if value >= 0 else -1)


def narrow_dot(a: list[float], b: list[float], bits: int, promote_every: int) -> float:
    """Return a dot product by the definition, in exact rationals: 32 products and the accumulator are aligned to the largest exponent,
    cut and added."""
    total = Fraction(0)
    for start in range(0, len(a), promote_every):
        accumulator = Fraction(0)
        part = list(zip(a[start : start + promote_every], b[start : start + promote_every], strict=True))
        for step in range(0, len(part), 32):
            terms = [accumulator, *(Fraction(x) * Fraction(y) for x, y in part[step : step + 32])]
            largest = max(abs(term) for term in terms)
            if largest:
                exponent = math.frexp(float(largest))[1] - 1
                unit = Fraction(2) ** (exponent - bits + 1)
                accumulator = sum(cut_to(term, unit) for term in terms)
        total = Fraction(float(np.float32(float(total + accumulator))))
    return float(total)


@pytest.mark.parametrize("bits", [8, 14])
@pytest.mark.parametrize("promote_every", [None, 128, 50])
def test_narrow_sums_are_those_of_the_definition(bits, promote_every):
    k = 200
    a, b = (round_to_format(gaussian(3, k, seed), E4M3) for seed in (0, 1))
    got = ReferenceBackend().mm(a, b, torch.float32, Accumulation(bits=bits, promote_every=promote_every))
    expected = [[narrow_dot(x, y, bits, promote_every or k) for y in b.tolist()] for x in a.tolist()]
    assert got.tolist() == expected
    assert not torch.equal(got, a @ b.t())


def test_promotion_restores_what_fourteen_bits_lose():
    """The sums have K = 4096 (arXiv 2412.19437, 3.3.2: nearly 2% at the most). Promotion every 128 keeps the error of a sum of 128."""
    a, b = (round_to_format(gaussian(24, 4096, seed), E4M3) for seed in (0, 1))
    exact = a.double() @ b.double().t()

    def error(**sums) -> float:
        got = ReferenceBackend().mm(a, b, torch.float32, Accumulation(**sums)).double()
        return ((got - exact).abs().max() / exact.square().mean().sqrt()).item()

    assert 0.003 < error(bits=14) < 0.03
    assert error(bits=14, promote_every=128) < error(bits=14) / 5
    assert error() < 1e-5


def test_zeros_and_bad_numbers_pass_through_a_narrow_accumulator():
    sums = Accumulation(bits=14)
    assert torch.equal(ReferenceBackend().mm(torch.zeros(2, 40), torch.zeros(3, 40), torch.float32, sums), torch.zeros(2, 3))
    bad = torch.ones(2, 40)
    bad[0, 5], bad[1, 3] = torch.nan, torch.inf
    assert not ReferenceBackend().mm(bad, torch.ones(3, 40), torch.float32, sums).isfinite().any()
    assert ReferenceBackend().mm(torch.ones(0, 40), torch.ones(3, 40), torch.float32, sums).shape == (0, 3)


def test_no_other_backend_takes_a_narrow_accumulator():
    bf16 = OperandSpec(element=BF16)
    backend, _ = select(bf16, bf16, "cuda", sums=Accumulation(bits=14))
    assert backend.name == "reference"
    with pytest.raises(UserError, match="sums in fp32"):
        select(bf16, bf16, "cuda", "torch", Accumulation(bits=14))


@pytest.mark.parametrize(
    "text", ["e2m1[1x32 e8m0:floor]", "e2m3[1x32 e8m0:floor]", "e3m2[1x32 e8m0]", "e4m3[1x32 e8m0]", "e4m3[1x128 e8m0]"]
)
@pytest.mark.parametrize("as_values", [False, True])
def test_power_of_two_scales_are_emulated_exactly_in_bf16(text, as_values):
    spec = OperandSpec.parse(text)
    assert BACKENDS["bf16_exact"].supports(spec, spec, "cuda").ok
    assert not BACKENDS["bf16_exact"].supports(spec, spec, "cuda").native
    assert not BACKENDS["bf16_exact"].supports(spec, spec, "cpu").ok
    x, w = gaussian(33, 100, 0) * 1e-3, gaussian(17, 100, 1) * 1e3
    qx, qw = quantize(x, spec), quantize(w, spec)
    if as_values:
        operands = fake_quantize(x, spec, dtype=torch.bfloat16), fake_quantize(w, spec, dtype=torch.bfloat16)
        assert torch.equal(operands[0].float(), qx.dequantize())
    else:
        operands = qx, qw
    bound = 2 * fp32_accumulation_bound(qx.dequantize(), qw.dequantize())
    assert ((BACKENDS["bf16_exact"].mm(*operands, torch.float32) - BACKENDS["reference"].mm(qx, qw, torch.float32)).abs() <= bound).all()


@pytest.mark.parametrize("text", ["e4m3[1x128 fp32]", "e2m1[1x16 e4m3]", "e2m1[1x32 e8m0:floor prescale:0.75]", "int8[row fp32]", "bf16"])
def test_other_values_are_no_bf16_numbers(text):
    spec = OperandSpec.parse(text)
    assert not BACKENDS["bf16_exact"].supports(spec, spec, "cuda").ok
    assert select(spec, spec, "cuda")[0].name != "bf16_exact"


def test_our_kernel_comes_before_cublaslt_where_it_was_faster():
    tile, block = OperandSpec.parse("e4m3[1x128 fp32]"), OperandSpec.parse("e4m3[128x128 fp32]")

    def first(b: OperandSpec, weights: int, wide: bool) -> bool:
        size = Size(weights=weights, wide=wide)
        return BACKENDS["hopper"].rank(tile, b, size) < BACKENDS["scaled_mm"].rank(tile, b, size)

    assert first(tile, 2**27, False)
    assert first(block, 2**24, False)
    assert first(block, 2**27, True)
    assert not first(block, 2**27, False)
    assert [gemm_size(gemm, 28672, 4096).wide for gemm in ("fprop", "dgrad", "wgrad")] == [True, False, False]
    assert gemm_size("dgrad", 4096, 14336).wide
