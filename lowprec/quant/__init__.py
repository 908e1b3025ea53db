"""Quantisation: from tensors to quantised tensors."""

from lowprec.quant import operators  # noqa: F401  (torch.ops.lowprec, for compiled code)
from lowprec.quant.fake import fake_quantize
from lowprec.quant.qtensor import QTensor, StoredOperand, TwoWay
from lowprec.quant.quantize import quantize
from lowprec.quant.spec import OperandSpec

__all__ = ["OperandSpec", "QTensor", "StoredOperand", "TwoWay", "fake_quantize", "quantize"]
