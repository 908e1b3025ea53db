"""Quantisation: from tensors to quantised tensors."""

from lowprec.quant.fake import fake_quantize
from lowprec.quant.qtensor import QTensor, TwoWay
from lowprec.quant.quantize import quantize
from lowprec.quant.spec import OperandSpec

__all__ = ["OperandSpec", "QTensor", "TwoWay", "fake_quantize", "quantize"]
