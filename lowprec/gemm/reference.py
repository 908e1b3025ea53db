"""The reference backend: dequantise, multiply in fp32. The oracle of every other backend, on any device."""

import torch
from torch import Tensor

from lowprec.gemm.base import GemmBackend, Operand, Support
from lowprec.quant import OperandSpec, QTensor


class ReferenceBackend(GemmBackend):
    name = "reference"
    decoded = True

    def supports(self, a: OperandSpec | None, b: OperandSpec | None, device_type: str) -> Support:
        return Support(ok=True, native=False, reason="dequantised and multiplied in fp32")

    def mm(self, a_MK: Operand, b_NK: Operand, out_dtype: torch.dtype) -> Tensor:
        return (_fp32(a_MK) @ _fp32(b_NK).t()).to(out_dtype)


def _fp32(operand: Operand) -> Tensor:
    return operand.dequantize() if isinstance(operand, QTensor) else operand.to(torch.float32)
