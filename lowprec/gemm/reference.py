"""The `reference` backend: dequantise, then multiply in fp32. It runs on any device, and other
backends are tested against it.

It can also sum as a narrower accumulator does. One step of the matrix unit takes 32 products and
the accumulator, aligns them all to the largest exponent among them, keeps B significant bits of
each there, cuts the rest towards zero, and adds exactly. So small terms lose most of their bits
beside a large accumulator, and the loss grows with its value: DeepSeek-V3 adds the accumulator to
an fp32 sum every 128 elements and starts again (arXiv 2412.19437, sections 3.3.2 and 3.5). With
B = 14 the sums are those of an H100 (docs/numerics.md).
"""

import torch
from torch import Tensor

from lowprec.gemm.base import (
    FP32_SUMS,
    LAST,
    Accumulation,
    GemmBackend,
    Operand,
    Size,
    Support,
)
from lowprec.quant import OperandSpec

MMA_K = 32
"""Number of elements that one step contracts: that of Hopper's FP8 instruction (PTX ISA,
wgmma.mma_async with .e4m3 operands: k = 32)."""

_PIECE = 1 << 20
"""Number of products that are held at once."""


class ReferenceBackend(GemmBackend):
    """Products of dequantised operands in fp32; supports every product."""

    name = "reference"
    decoded = True

    def rank(self, a: OperandSpec | None, b: OperandSpec | None, size: Size) -> int:
        return LAST

    def supports(
        self,
        a: OperandSpec | None,
        b: OperandSpec | None,
        device_type: str,
        sums: Accumulation = FP32_SUMS,
    ) -> Support:
        width = "fp32" if sums.bits is None else f"fp32, summed in {sums.bits} bits"
        return Support(ok=True, native=False, reason=f"dequantised and multiplied in {width}")

    def mm(
        self, a_MK: Operand, b_NK: Operand, out_dtype: torch.dtype, sums: Accumulation = FP32_SUMS
    ) -> Tensor:
        a = _fp32(a_MK)
        b = _fp32(b_NK)
        if sums.bits is None:  # promotion changes nothing: the accumulator is the fp32 sum
            return (a @ b.t()).to(out_dtype)
        compiled = torch.compiler.is_compiling()
        call = torch.ops.lowprec.narrow_sums if compiled else _narrow_sums
        return call(a, b, sums.bits, sums.promote_every or a.shape[1]).to(out_dtype)


def _narrow_sums(a_MK: Tensor, b_NK: Tensor, bits: int, promote_every: int) -> Tensor:
    """Return a . b^T, summed in an accumulator of `bits`: [M, K] . [N, K]^T -> [M, N]."""
    c_MN = a_MK.new_zeros(a_MK.shape[0], b_NK.shape[0])
    rows = max(1, _PIECE // (MMA_K * max(len(b_NK), 1)))
    for c, a_rows in zip(c_MN.split(rows), a_MK.split(rows), strict=True):
        for a, b in zip(a_rows.split(promote_every, 1), b_NK.split(promote_every, 1), strict=True):
            sums = torch.zeros_like(c)
            for a_step, b_step in zip(a.split(MMA_K, 1), b.split(MMA_K, 1), strict=True):
                sums = _aligned_sum(
                    torch.cat((sums[:, :, None], a_step[:, None, :] * b_step), 2), bits
                )
            c += sums
    return c_MN


# An operator, because a compiler would unroll the loops, for each number of rows anew.
@torch.library.custom_op("lowprec::narrow_sums", mutates_args=())
def _narrow_sums_op(a: Tensor, b: Tensor, bits: int, promote_every: int) -> Tensor:
    return _narrow_sums(a, b, bits, promote_every)


@_narrow_sums_op.register_fake
def _(a: Tensor, b: Tensor, bits: int, promote_every: int) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]))


def _aligned_sum(terms: Tensor, bits: int) -> Tensor:
    """Return the sum over the last axis of terms that are aligned to the largest one's exponent and
    cut to `bits` significant bits there."""
    largest = terms.abs().amax(2, keepdim=True)
    power = (
        (largest.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(2.0**-100, 2.0**120)
    )  # 2^exponent
    unit = power * 2.0 ** (1 - bits)
    # The terms are whole multiples of the unit, each below 2^24, so their sum is exact.
    return (terms * (1.0 / unit)).trunc_().sum(2).mul_(unit[:, :, 0])


def _fp32(operand: Operand) -> Tensor:
    return operand.to(torch.float32) if isinstance(operand, Tensor) else operand.dequantize()
