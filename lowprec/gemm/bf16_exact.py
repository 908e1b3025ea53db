"""The `bf16_exact` backend: exact emulation on an accelerator by its bf16 matrix units.

The values of MX formats are codes of at most four significant bits times a power of two. They are
bf16 numbers, so the product of two of them is exact in fp32, in which products are summed. The
result is that of the reference except for the order of the sums. (Values below 2^-133, where bf16
ends, are lost; they need an e8m0 scale near the smallest.)
"""

import torch
from torch import Tensor

from lowprec.gemm.base import FP32_SUMS, Accumulation, GemmBackend, Operand, Support
from lowprec.quant import OperandSpec


class ExactInBf16Backend(GemmBackend):
    """Products of bf16 numbers on bf16 matrix units."""

    name = "bf16_exact"
    decoded = True
    plain_dtype = torch.bfloat16

    def supports(
        self,
        a: OperandSpec | None,
        b: OperandSpec | None,
        device_type: str,
        sums: Accumulation = FP32_SUMS,
    ) -> Support:
        if not (_is_exact(a) and _is_exact(b)):
            return Support(ok=False, reason="takes operands whose values are bf16 numbers")
        if sums.bits is not None:
            return Support(ok=False, reason="sums in fp32")
        if device_type != "cuda":
            return Support(ok=False, reason="bf16 products are slow on a CPU")
        return Support(
            ok=True,
            native=False,
            reason="emulated exactly: the values are bf16 numbers, multiplied as such",
        )

    def mm(
        self, a_MK: Operand, b_NK: Operand, out_dtype: torch.dtype, sums: Accumulation = FP32_SUMS
    ) -> Tensor:
        a, b = (
            t.to(torch.bfloat16) if isinstance(t, Tensor) else t.dequantize(torch.bfloat16)
            for t in (a_MK, b_NK)
        )
        if out_dtype == torch.bfloat16:
            return torch.mm(a, b.t())
        if a.is_cuda:
            return torch.mm(a, b.t(), out_dtype=torch.float32).to(out_dtype)
        return (a.float() @ b.float().t()).to(out_dtype)


def _is_exact(spec: OperandSpec | None) -> bool:
    """Return whether all values of this representation are bf16 numbers."""
    scaling = None if spec is None else spec.scaling
    if spec is None or scaling is None or spec.element.is_integer:
        return False
    return (
        spec.element.mantissa_bits <= 7
        and scaling.scale_format == "e8m0"
        and scaling.prescale == 1.0
    )
