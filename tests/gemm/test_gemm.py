"""The choice of a backend, and the backends that run on a CPU against float64."""

import pytest
import torch

from lowprec.errors import UserError
from lowprec.formats.element import BF16, E2M1, E4M3, FP16, FP32, INT4, INT8
from lowprec.formats.scaling import ALL, BlockScaling
from lowprec.gemm import BACKENDS, select
from lowprec.quant import OperandSpec, quantize
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
        (TILE, BLOCK, "torch: takes unscaled operands only"),
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
    assert select(FP32_SPEC, FP32_SPEC, "cpu", "reference")[0] is BACKENDS["reference"]  # auto would take torch
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


@pytest.mark.parametrize("name", BACKENDS)
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
