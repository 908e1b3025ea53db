"""The `torch` backend: torch.mm on unscaled operands, fp32 on any device, bf16 and fp16 on an
accelerator, with fp32 accumulation."""

from dataclasses import replace

import torch
from torch import Tensor

from lowprec.gemm.base import FP32_SUMS, Accumulation, GemmBackend, Operand, Support
from lowprec.quant import OperandSpec, QTensor, StoredOperand


class TorchBackend(GemmBackend):
    """Products of unscaled operands by torch.mm."""

    name = "torch"

    def supports(
        self,
        a: OperandSpec | None,
        b: OperandSpec | None,
        device_type: str,
        sums: Accumulation = FP32_SUMS,
    ) -> Support:
        if any(spec is not None and spec.scaling is not None for spec in (a, b)):
            return Support(ok=False, reason="takes unscaled operands only")
        if sums.bits is not None:
            return Support(ok=False, reason="sums in fp32")
        # The operands arrive rounded: how they were rounded does not matter.
        if any(spec is not None and spec.rounding != "nearest" for spec in (a, b)):
            a, b = (None if spec is None else replace(spec, rounding="nearest") for spec in (a, b))
        if a != b:
            return Support(ok=False, reason="takes two operands of one dtype")
        if a is None:
            return Support(ok=True, native=True, reason="torch.mm on the operands as they arrive")
        if device_type == "cpu" and a.element.bits < 32:
            return Support(
                ok=False,
                reason=f"{a.element.name} matrix products are slow on a CPU without hardware for "
                "them",
            )
        return Support(ok=True, native=True, reason=f"torch.mm in {a.element.name}")

    def mm(
        self, a_MK: Operand, b_NK: Operand, out_dtype: torch.dtype, sums: Accumulation = FP32_SUMS
    ) -> Tensor:
        a = _values(a_MK)
        b = _values(b_NK)
        if a.dtype != b.dtype:
            # Both operands are in high precision, in a model of mixed dtypes: the wider dtype holds
            # the values of both.
            dtype = torch.promote_types(a.dtype, b.dtype)
            a = a.to(dtype)
            b = b.to(dtype)
        if out_dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16) and a.is_cuda:
            # Weight gradients keep the accumulator's precision.
            return torch.mm(a, b.t(), out_dtype=torch.float32)
        return torch.mm(a, b.t()).to(out_dtype)


def _values(operand: Operand) -> Tensor:
    """Return the tensor of an operand whose codes are its values, or that has none."""
    assert not isinstance(operand, StoredOperand)  # only the reference gets those
    return operand.data if isinstance(operand, QTensor) else operand
