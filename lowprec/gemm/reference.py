"""The reference backend: dequantise, multiply in fp32. The oracle of every other backend, on any device.

It can also sum as a narrower accumulator does. A matrix unit contracts a few elements at once; their products are summed in fp32 here, and
the sum is added to an accumulator that keeps only B significant bits and cuts the rest (arXiv 2412.19437, section 3.3.2, reports about
14 for Hopper's FP8). What such an accumulator loses grows with its value, so DeepSeek-V3 adds it to an fp32 sum every 128 elements and
starts again.
"""

import torch
from torch import Tensor

from lowprec.gemm.base import FP32_SUMS, Accumulation, GemmBackend, Operand, Support
from lowprec.quant import OperandSpec, QTensor

MMA_K = 32
"""Elements that one step contracts: those of Hopper's FP8 instruction (PTX ISA, wgmma.mma_async with .e4m3 operands: k = 32)."""


class ReferenceBackend(GemmBackend):
    name = "reference"
    decoded = True

    def supports(self, a: OperandSpec | None, b: OperandSpec | None, device_type: str, sums: Accumulation = FP32_SUMS) -> Support:
        width = "fp32" if sums.bits is None else f"fp32, summed in {sums.bits} bits"
        return Support(ok=True, native=False, reason=f"dequantised and multiplied in {width}")

    def mm(self, a_MK: Operand, b_NK: Operand, out_dtype: torch.dtype, sums: Accumulation = FP32_SUMS) -> Tensor:
        a, b = _fp32(a_MK), _fp32(b_NK)
        if sums.bits is None:  # promotion would change nothing: the accumulator is the fp32 sum
            return (a @ b.t()).to(out_dtype)
        return _narrow_sums(a, b, sums.bits, sums.promote_every or a.shape[1]).to(out_dtype)


def truncate_to_bits(x: Tensor, bits: int) -> Tensor:
    """The `bits` highest significant bits of each fp32 number, the rest cut."""
    dropped = 24 - bits
    return (x.view(torch.int32) & -(1 << dropped)).view(torch.float32)


def _narrow_sums(a_MK: Tensor, b_NK: Tensor, bits: int, promote_every: int) -> Tensor:
    c_MN = a_MK.new_zeros(a_MK.shape[0], b_NK.shape[0])
    for a, b in zip(a_MK.split(promote_every, 1), b_NK.split(promote_every, 1), strict=True):
        sums = torch.zeros_like(c_MN)
        for a_step, b_step in zip(a.split(MMA_K, 1), b.split(MMA_K, 1), strict=True):
            sums = truncate_to_bits(torch.addmm(sums, a_step, b_step.t()), bits)
        c_MN += sums
    return c_MN


def _fp32(operand: Operand) -> Tensor:
    return operand.dequantize() if isinstance(operand, QTensor) else operand.to(torch.float32)
