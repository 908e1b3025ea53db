"""OperandSpec: how one operand of a GEMM is represented."""

from dataclasses import dataclass

from lowprec.formats.element import ElementFormat
from lowprec.formats.scaling import BlockScaling


@dataclass(frozen=True, kw_only=True)
class OperandSpec:
    """An operand [R, K] whose contraction axis K is last."""

    element: ElementFormat
    scaling: BlockScaling | None = None
    """None: the elements are cast as they are (bf16, fp16, fp32)."""

    def __post_init__(self) -> None:
        if self.scaling is None and self.element.saturates:
            raise ValueError(f"{self.element.name} needs a scaling: it can't hold unscaled values")
        if self.scaling is not None and not self.scaling.symmetric and not self.element.is_integer:
            raise ValueError(f"{self.element.name} is symmetric about zero: a zero point goes with an integer format")

    def __str__(self) -> str:
        return self.element.name if self.scaling is None else f"{self.element.name}[{self.scaling}]"
