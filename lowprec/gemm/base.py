"""The interface of a GEMM backend.

Every product is "NT" with the contraction axis K last on both sides: a_MK . b_NK^T -> c_MN. So no
backend needs an axis argument; a transposed product is the product of transposed operands.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from lowprec.gemm.cost import Cost, LayerShape
from lowprec.quant import OperandSpec, QTensor, StoredOperand

Operand = QTensor | StoredOperand | Tensor
"""A quantised matrix, or a plain one in high precision, whose spec is None. Only backends that take
decoded codes get a StoredOperand."""


@dataclass(frozen=True, kw_only=True)
class Accumulation:
    """The accumulator that sums the K products of an output element."""

    bits: int | None = None
    """Number of significant bits that the accumulator keeps between steps of the matrix unit (14
    on Hopper in FP8); None: fp32's 24."""
    promote_every: int | None = None
    """Number of contracted elements after which the accumulator is added to an fp32 sum and starts
    again; None: at the end."""

    def __post_init__(self) -> None:
        if self.bits is not None and not 2 <= self.bits <= 24:
            raise ValueError(f"accumulator_bits lies between 2 and 24, got {self.bits}")
        if self.promote_every is not None and self.promote_every < 1:
            raise ValueError(
                f"promote_every is a positive number of elements, got {self.promote_every}"
            )

    def __str__(self) -> str:
        width = "fp32 sums" if self.bits is None else f"{self.bits}-bit sums"
        return (
            width if self.promote_every is None else f"{width}, promoted every {self.promote_every}"
        )


FP32_SUMS = Accumulation()
"""Sums in fp32."""


@dataclass(frozen=True, kw_only=True)
class Support:
    """A backend's answer to the question whether it takes a product."""

    ok: bool
    native: bool = False
    """Flag: the hardware multiplies the operands in their own formats. Otherwise their values are
    emulated in a wider format."""
    reason: str
    """The way in which it multiplies, or the reason why it does not take the product."""


@dataclass(frozen=True)
class Size:
    """The size of a product, as far as it is known before its operands exist."""

    weights: int = 0
    """Number of weights of the layer; 0: unknown."""
    wide: bool = False
    """Flag: the result has more columns than the product contracts elements."""


UNSIZED: Final = Size()
"""The size of a product of which nothing is known."""


LAST: Final = 1000
"""The rank of a backend that takes every product: after all others, whatever their ranks."""


class GemmBackend(ABC):
    """One way to multiply two operands. It has no state."""

    name: ClassVar[str]
    decoded: ClassVar[bool] = False
    """Flag: `mm` takes codes that are decoded to fp32 (see `quantize`), because it would decode
    them at once."""
    plain_dtype: ClassVar[torch.dtype] = torch.float32
    """Dtype of the values that `mm` takes in place of decoded codes."""

    def rank(self, a: OperandSpec | None, b: OperandSpec | None, size: Size) -> int:
        """Return the place in which `auto` tries this backend for such a product; lower is earlier,
        and equal ranks keep the order of `BACKENDS`."""
        return 0

    @abstractmethod
    def supports(
        self,
        a: OperandSpec | None,
        b: OperandSpec | None,
        device_type: str,
        sums: Accumulation = FP32_SUMS,
    ) -> Support:
        """Return whether this backend multiplies operands of such representations, with such sums,
        on a device of this type ("cpu", "cuda"), and the reason."""

    def cost(self, layer: LayerShape) -> Cost | None:
        """Return the modelled cost of a layer whose products run on this backend; None: it makes no
        statement, and `auto` does not ask whether the layer pays."""
        return None

    @abstractmethod
    def mm(
        self, a_MK: Operand, b_NK: Operand, out_dtype: torch.dtype, sums: Accumulation = FP32_SUMS
    ) -> Tensor:
        """Return a . b^T: [M, K] . [N, K]^T -> [M, N] of `out_dtype`."""
