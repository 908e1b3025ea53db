"""Conversion between the values of an element format and their codes (bit patterns).

A code of a float format consists of the sign, exponent and mantissa fields, from the highest bit
down. A code of an integer format is the two's complement.

The conversion goes through fp16, whose fields contain those of every narrower float. A value
divided by 2^(15 - bias) has the same exponent and mantissa bits in fp16 as in the narrower format,
only further left; this holds for subnormal numbers too. Converting between fp32 and fp16 is one
fast instruction on every device, while a CPU converts eight-bit floats one by one, ten times
slower.
"""

import torch
from torch import Tensor

from lowprec.formats.element import ElementFormat

_FP16_BIAS = 15
_FP16_MANTISSA_BITS = 10


def encode(values: Tensor, fmt: ElementFormat) -> Tensor:
    """Return the codes of values of a format.

    Args:
        values: fp32, any shape. Each element is a value of `fmt`; NaN gets an arbitrary code.
        fmt: a format of at most 12 bits.
    Returns:
        int16, same shape: the code in the low bits, zeros above.
    """
    mask = (1 << fmt.bits) - 1
    if fmt.is_integer:
        return values.nan_to_num().to(torch.int16).bitwise_and_(mask)
    half = (values * 2.0 ** (fmt.bias - _FP16_BIAS)).to(torch.float16).view(torch.int16)
    magnitude = (half >> (_FP16_MANTISSA_BITS - fmt.mantissa_bits)).bitwise_and_(mask >> 1)
    return magnitude.bitwise_or_((half >> (16 - fmt.bits)).bitwise_and_(1 << (fmt.bits - 1)))


def decode(codes: Tensor, fmt: ElementFormat) -> Tensor:
    """Return the fp32 values of codes (any integer dtype): the inverse of `encode`. Bits above the
    code are ignored."""
    codes = codes.to(torch.int16)
    if fmt.is_integer:
        return ((codes << (16 - fmt.bits)) >> (16 - fmt.bits)).to(torch.float32)
    magnitude = (codes << (_FP16_MANTISSA_BITS - fmt.mantissa_bits)).bitwise_and_(0x7FFF)
    half = magnitude.bitwise_and_(
        (1 << (fmt.bits - 1 + _FP16_MANTISSA_BITS - fmt.mantissa_bits)) - 1
    )
    half.bitwise_or_((codes << (16 - fmt.bits)).bitwise_and_(-0x8000))
    return half.view(torch.float16).to(torch.float32).mul_(2.0 ** (_FP16_BIAS - fmt.bias))


def encode_scale(scale: Tensor) -> Tensor:
    """Return power-of-two scales (fp32, 2^-127 to 2^127, or NaN) as E8M0 bytes, uint8.

    A byte is the exponent + 127; 0xFF is NaN.
    """
    return ((scale.view(torch.int32) >> 23) & 0xFF).to(torch.uint8)


def decode_scale(codes: Tensor) -> Tensor:
    """Return the fp32 scales of E8M0 bytes (uint8)."""
    exponent = codes.to(torch.int32)
    bits = torch.where(exponent == 0, 1 << 22, exponent << 23)  # 2^-127 is subnormal
    return torch.where(exponent == 0xFF, 0x7FC00000, bits).view(torch.float32)
