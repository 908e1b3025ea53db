"""What a GEMM backend is.

Every product is "NT" with the contraction axis K last on both sides: a_MK . b_NK^T -> c_MN. So no
backend needs an axis argument; a transposed product is the product of transposed operands.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from lowprec.gemm.cost import Cost, LayerShape
from lowprec.quant import OperandSpec, QTensor

Operand = QTensor | Tensor
"""A quantised matrix, or a plain one that is used as it arrives (its spec is None)."""


@dataclass(frozen=True, kw_only=True)
class Accumulation:
    """How the K products of an output element are summed."""

    bits: int | None = None
    """Significant bits that the accumulator keeps between steps of the matrix unit (14 on Hopper in
    FP8); None: fp32's 24."""
    promote_every: int | None = None
    """Contracted elements after which the accumulator is added to an fp32 sum and starts again;
    None: at the end."""

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


@dataclass(frozen=True, kw_only=True)
class Support:
    """A backend's answer to whether it takes a product."""

    ok: bool
    native: bool = False
    """The hardware multiplies the operands in the formats they are in; otherwise their values are
    emulated in a wider one."""
    reason: str


@dataclass(frozen=True)
class Size:
    """What is known of a product's size before its operands are there."""

    weights: int = 0
    """Of the layer; 0: unknown."""
    wide: bool = False
    """Its result has more columns than it contracts elements."""


UNSIZED: Final = Size()


class GemmBackend(ABC):
    """One way to multiply. Stateless."""

    name: ClassVar[str]
    decoded: ClassVar[bool] = False
    """Whether `mm` wants codes in fp32 (see `quantize`), because it would decode them at once."""
    plain_dtype: ClassVar[torch.dtype] = torch.float32
    """What it then takes values in."""

    def rank(self, a: OperandSpec | None, b: OperandSpec | None, size: Size) -> int:
        """Where `auto` asks this backend for such a product: lower is earlier."""
        return 0

    @abstractmethod
    def supports(
        self,
        a: OperandSpec | None,
        b: OperandSpec | None,
        device_type: str,
        sums: Accumulation = FP32_SUMS,
    ) -> Support:
        """Whether a product of operands so represented and so summed runs here, on a device of this
        type ("cpu", "cuda"), or why not."""

    def cost(self, layer: LayerShape) -> Cost | None:
        """Return the modelled cost of a layer whose products run on this backend; None: it makes no
        statement, and `auto` does not ask whether the layer pays."""
        return None

    @abstractmethod
    def mm(
        self, a_MK: Operand, b_NK: Operand, out_dtype: torch.dtype, sums: Accumulation = FP32_SUMS
    ) -> Tensor:
        """a . b^T -> [M, N] of `out_dtype`."""
