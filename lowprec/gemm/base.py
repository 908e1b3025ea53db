"""What a GEMM backend is.

Every product is "NT" with the contraction axis K last on both sides: a_MK . b_NK^T -> c_MN. So no backend needs an axis argument; a
transposed product is the product of transposed operands.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowprec.quant import OperandSpec, QTensor

Operand = QTensor | Tensor
"""A quantised matrix, or a plain one that is used as it arrives (its spec is None)."""


@dataclass(frozen=True, kw_only=True)
class Support:
    """A backend's answer to whether it takes a product."""

    ok: bool
    native: bool = False
    """The hardware multiplies the operands in the formats they are in; otherwise their values are emulated in a wider one."""
    reason: str


class GemmBackend(ABC):
    """One way to multiply. Stateless."""

    name: ClassVar[str]
    decoded: ClassVar[bool] = False
    """Whether `mm` wants codes in fp32 (see `quantize`), because it would decode them at once."""

    @abstractmethod
    def supports(self, a: OperandSpec | None, b: OperandSpec | None, device_type: str) -> Support:
        """Whether a product of operands so represented runs here, on a device of this type ("cpu", "cuda"), and why not."""

    @abstractmethod
    def mm(self, a_MK: Operand, b_NK: Operand, out_dtype: torch.dtype) -> Tensor:
        """a . b^T -> [M, N] of `out_dtype`, accumulated in fp32."""
