"""Codes and their packing are tested against the bytes of ml_dtypes, bit strings in plain Python, and byte counts worked out by hand."""

import ml_dtypes
import numpy as np
import pytest
import torch

from lowprec.formats.element import BF16, E2M1, E2M3, E3M2, E4M3, E5M2, E5M6, FORMATS, FP16, FP32, INT4, INT8
from lowprec.formats.encoding import decode, decode_scale, encode, encode_scale
from lowprec.formats.packing import pack, unpack
from lowprec.quant import OperandSpec, quantize
from lowprec.quant.qtensor import from_storage, to_storage
from lowprec.testing import gaussian

NARROW = [fmt for fmt in FORMATS.values() if fmt.bits <= 12]
ML_DTYPES = {
    E4M3: ml_dtypes.float8_e4m3fn,
    E5M2: ml_dtypes.float8_e5m2,
    E3M2: ml_dtypes.float6_e3m2fn,
    E2M3: ml_dtypes.float6_e2m3fn,
    E2M1: ml_dtypes.float4_e2m1fn,
}
PACKED = {4: E2M1, 6: E3M2, 12: E5M6}


def value_of(code: int, fmt) -> float | None:
    """Return the value of a code by the definition of its fields; None if the code is no finite value."""
    if fmt.is_integer:
        return float(code - 2**fmt.bits if code >= 2 ** (fmt.bits - 1) else code)
    sign = -1.0 if code >> (fmt.bits - 1) else 1.0
    exponent, mantissa = (code >> fmt.mantissa_bits) & (2**fmt.exponent_bits - 1), code & (2**fmt.mantissa_bits - 1)
    share = mantissa / 2**fmt.mantissa_bits
    value = 2.0 ** (1 - fmt.bias) * share if exponent == 0 else 2.0 ** (exponent - fmt.bias) * (1 + share)
    return sign * value if value <= fmt.max else None


def finite_codes(fmt) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of all finite values, int16, and their values, fp32."""
    values = [value_of(code, fmt) for code in range(2**fmt.bits)]
    codes = [code for code, value in enumerate(values) if value is not None]
    return torch.tensor(codes, dtype=torch.int16), torch.tensor([values[code] for code in codes], dtype=torch.float32)


def bytes_of(codes: list[int], bits: int) -> list[int]:
    """Return the bytes of a row of codes: one string of bits, the lowest first, cut into bytes; zeros fill the last group."""
    group = {4: 2, 6: 4, 12: 2}[bits]
    codes = codes + [0] * (-len(codes) % group)
    string = "".join(format(code, f"0{bits}b")[::-1] for code in codes)
    return [int(string[i : i + 8][::-1], 2) for i in range(0, len(string), 8)]


def random_codes(rows: int, cols: int, bits: int) -> torch.Tensor:
    return torch.randint(2**bits, (rows, cols), generator=torch.Generator().manual_seed(bits), dtype=torch.int16)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("fmt", NARROW, ids=str)
def test_every_code_decodes_to_its_definition_and_encodes_back(fmt):
    codes, values = finite_codes(fmt)
    unused = {E4M3: 2, E5M2: 8, E5M6: 128}.get(fmt, 0)  # codes of NaN and infinity
    assert len(codes) == 2**fmt.bits - unused
    assert same_bits(decode(codes, fmt), values)  # the sign of zero is compared as well
    assert torch.equal(encode(values, fmt), codes)
    assert encode(values, fmt).dtype == torch.int16
    assert decode(codes, fmt).dtype == torch.float32


@pytest.mark.parametrize("fmt", ML_DTYPES, ids=str)
def test_codes_are_the_bytes_of_ml_dtypes(fmt):
    _, values = finite_codes(fmt)
    expected = values.numpy().astype(ML_DTYPES[fmt]).view(np.uint8)
    mask = 2**fmt.bits - 1
    assert (encode(values, fmt).numpy() == (expected & mask)).all()


@pytest.mark.parametrize("fmt", NARROW, ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_decoding_takes_any_integer_dtype_and_ignores_what_lies_above_the_code(fmt, dtype):
    codes, values = finite_codes(fmt)
    if fmt.bits > 8 and dtype == torch.uint8:
        return
    free = torch.iinfo(dtype).bits - fmt.bits - (dtype != torch.uint8)
    above = ((1 << max(free, 0)) - 1) << fmt.bits
    assert same_bits(decode(codes.to(dtype) | above, fmt), values)


@pytest.mark.parametrize("fmt", NARROW, ids=str)
def test_any_shape_and_stride_of_codes(fmt):
    _, values = finite_codes(fmt)
    grid = values[:16].view(2, 8)
    assert torch.equal(encode(grid.t(), fmt), encode(grid, fmt).t())
    assert same_bits(decode(encode(grid.t(), fmt), fmt).contiguous(), grid.t().contiguous())
    assert encode(grid[:0], fmt).shape == decode(encode(grid[:0], fmt), fmt).shape == (0, 8)


@pytest.mark.parametrize("bits", PACKED)
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 64, 127])
def test_packed_rows_are_the_bit_string(bits, length):
    codes = random_codes(3, length, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    expected = [bytes_of(row, bits) for row in codes.tolist()]
    assert packed.shape == (3, len(expected[0]))
    assert packed.tolist() == expected
    got = unpack(packed, bits, length)
    assert got.dtype == torch.int16
    assert torch.equal(got, codes)


@pytest.mark.parametrize("bits", PACKED)
def test_the_largest_code_stays_within_its_bits(bits):
    """A carry or a sign would show in the neighbour of a code of ones, because the codes beside it are zero."""
    top = 2**bits - 1
    codes = torch.tensor([[top, 0, top, 0, 0, top, top, top], [0, top, 0, top, top, 0, 0, 0]], dtype=torch.int16)
    assert pack(codes, bits).tolist() == [bytes_of(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack(pack(codes, bits), bits, 8), codes)


@pytest.mark.parametrize("bits", PACKED)
@pytest.mark.parametrize("shape", [(5, 9), (8, 8), (1, 7), (7, 1)])
def test_packing_follows_the_memory_order_and_gives_equal_bytes(bits, shape):
    codes = random_codes(*shape, bits)
    transposed = codes.t().contiguous().t()
    packed = pack(transposed, bits)
    assert torch.equal(packed, pack(codes, bits))
    assert torch.equal(unpack(packed, bits, shape[1]), codes)
    if min(shape) > 1:
        assert packed.stride(0) == 1
        assert unpack(packed, bits, shape[1]).stride(0) == 1


def test_the_even_column_is_the_low_nibble():
    values = torch.tensor([[0.5, -6.0, 1.0]])
    assert encode(values, E2M1).tolist() == [[0x1, 0xF, 0x2]]
    assert to_storage(values, E2M1).tolist() == [[0xF1, 0x02]]
    assert to_storage(torch.tensor([[7.0, -8.0, -1.0]]), INT4).tolist() == [[0x87, 0x0F]]


@pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=str)
def test_storage_round_trip_of_every_value(fmt):
    if fmt in (FP32, BF16, FP16):
        values = torch.tensor([[0.0, -0.0, 1.0, fmt.max, fmt.min, fmt.min_normal, torch.inf, -torch.inf]])
    else:
        values = finite_codes(fmt)[1][None]
    for x in (values, values.t().contiguous().t(), values[:, :-1], values.view(-1, values.shape[1] // 2)):
        stored = to_storage(x, fmt)
        assert stored.dtype == fmt.storage
        assert same_bits(from_storage(stored, fmt, x.shape[1]).contiguous(), x.contiguous())


def test_e8m0_bytes_are_those_of_ml_dtypes():
    scales = torch.tensor([2.0**e for e in range(-127, 128)] + [torch.nan], dtype=torch.float64).to(torch.float32)
    codes = encode_scale(scales)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [*range(255), 255]
    assert (codes.numpy() == scales.numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)).all()
    decoded = decode_scale(codes)
    assert same_bits(decoded[:-1], scales[:-1])
    assert decoded[-1].isnan()
    back = codes.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert (back[:-1] == decoded[:-1].numpy()).all()
    assert torch.equal(encode_scale(decoded.view(16, 16).t()), codes.view(16, 16).t())


# A [70, 100] matrix: odd numbers of blocks, bytes and groups along both axes.
@pytest.mark.parametrize("bits", [5, 7, 9, 10, 11])
def test_widths_whose_groups_do_not_fit_are_refused(bits):
    with pytest.raises(ValueError, match=f"codes of {bits} bits can't be packed"):
        pack(torch.zeros(2, 8, dtype=torch.int16), bits)


NBYTES = {
    "e4m3[1x128 fp32]": 70 * 100 + 70 * 4,
    "e4m3[128x128 fp32]": 70 * 100 + 4,
    "e4m3[1x128 e8m0]": 70 * 100 + 70,
    "e4m3[128x128 e8m0]": 70 * 100 + 1,
    "e5m2[tensor fp32]": 70 * 100 + 4,
    "e4m3[row fp32]": 70 * 100 + 70 * 4,
    "e5m2[tensor fp32 delayed:1024]": 70 * 100 + 4,
    "e4m3[1x32 e8m0]": 70 * 100 + 70 * 4,  # 4 blocks a row, the last of 4 columns
    "e3m2[1x32 e8m0:even]": 70 * 75 + 70 * 4,  # 100 codes are 25 groups of 3 bytes
    "e2m3[1x32 e8m0:ceil]": 70 * 75 + 70 * 4,
    "e2m1[1x32 e8m0:floor]": 70 * 50 + 70 * 4,
    "e2m1[1x32 e8m0:quest]": 70 * 50 + 70 * 4,
    "e2m1[1x32 e8m0:floor prescale:0.75]": 70 * 50 + 70 * 4 + 4,  # 4 bytes hold 4/3, the factor of dequantising
    "e2m1[1x16 e4m3]": 70 * 50 + 70 * 7 + 4,  # 4 bytes hold the tensor scale
    "e2m1[16x16 e4m3 4/6]": 70 * 50 + 5 * 7 + 4,
    "int8[row fp32 asymmetric]": 70 * 100 + 70 * (4 + 1),
    "int4[1x32 fp32]": 70 * 50 + 70 * 4 * 4,
    "int4[1x32 fp32 asymmetric]": 70 * 50 + 70 * 4 * (4 + 1),
    "e5m6[1x128 fp32]": 70 * 150 + 70 * 4,  # 2 codes in 3 bytes
    "e5m6[1x128 e8m0]": 70 * 150 + 70,
    "bf16": 70 * 200,
    "fp16": 70 * 200,
    "fp32": 70 * 400,
}


@pytest.mark.parametrize("text", NBYTES)
def test_nbytes_is_the_count_by_hand(text):
    spec = OperandSpec.parse(text)
    assert quantize(gaussian(70, 100, 0), spec).nbytes == NBYTES[text]
    assert quantize(gaussian(70, 100, 0), spec, decoded=True).stored().nbytes == NBYTES[text]
    assert {fmt.name for fmt in FORMATS.values()} == {name.split("[")[0] for name in NBYTES}


def test_bits_of_every_format():
    bits = {fmt: fmt.bits for fmt in FORMATS.values()}
    assert bits == {FP32: 32, BF16: 16, FP16: 16, E5M6: 12, E4M3: 8, E5M2: 8, E3M2: 6, E2M3: 6, E2M1: 4, INT8: 8, INT4: 4}
    assert [fmt for fmt in bits if fmt.packed] == [E5M6, E3M2, E2M3, E2M1, INT4]
