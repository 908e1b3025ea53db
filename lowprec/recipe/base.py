"""A recipe is data: three GEMMs of two operands each.

    fprop   y_MN  = x_MK   . w_NK^T            a: x      b: w        contracts K, the input features
    dgrad   dx_MK = g_MN   . (w^T)_KN^T        a: g      b: w^T      contracts N, the output features
    wgrad   dw_NK = g^T_NM . (x^T)_KM^T        a: g^T    b: x^T      contracts M, the tokens

What an operand is made from:

    None          as it arrives, in high precision
    OperandSpec   quantised from high precision along this GEMM's own contraction axis (training recipes: fprop's codes have their scales
                  along another axis and can't serve)
    FROM_FPROP    the very operand that fprop multiplied, for b of dgrad and wgrad. y is then differentiated as the function of the
                  fake-quantised x and w that it is (quantisation-aware training), and the gradient passes straight through the rounding:
                  as the identity inside the element's range, as zero where the clamp cut (arXiv 1712.05877, section 3; 1308.3432)
"""

from dataclasses import dataclass, replace
from typing import Final, Literal

from lowprec.formats.element import BF16, ElementFormat
from lowprec.quant import OperandSpec

FROM_FPROP: Final = "from_fprop"
GEMMS: Final = ("fprop", "dgrad", "wgrad")
_OPERANDS = {"fprop": ("y", "x", "w"), "dgrad": ("dx", "g", "wᵀ"), "wgrad": ("dw", "gᵀ", "xᵀ")}

OperandSource = OperandSpec | Literal["from_fprop"] | None


@dataclass(frozen=True, kw_only=True)
class GemmSpec:
    """One GEMM, a . b^T."""

    a: OperandSource = None
    b: OperandSource = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The three GEMMs of a linear layer."""

    name: str
    fprop: GemmSpec = GemmSpec()
    dgrad: GemmSpec = GemmSpec()
    wgrad: GemmSpec = GemmSpec()
    rest: ElementFormat = BF16
    """What the rest of the model computes in on an accelerator (autocast's dtype); fp32 for none."""
    about: str = ""
    """One line: what it is, and the source."""

    def __post_init__(self) -> None:
        if FROM_FPROP in (self.fprop.a, self.fprop.b, self.dgrad.a, self.wgrad.a):
            raise ValueError(f"recipe {self.name}: FROM_FPROP is a source for b of dgrad and wgrad only")

    def operands(self, gemm: str) -> tuple[OperandSpec | None, OperandSpec | None]:
        """The representations of a GEMM's two operands, FROM_FPROP replaced by what fprop has there."""
        spec: GemmSpec = getattr(self, gemm)
        from_fprop = {"dgrad": self.fprop.b, "wgrad": self.fprop.a}.get(gemm)
        a, b = (from_fprop if source == FROM_FPROP else source for source in (spec.a, spec.b))
        assert not isinstance(a, str)
        assert not isinstance(b, str)
        return a, b

    def equation(self, gemm: str) -> str:
        """'y = e4m3[1x128 fp32](x) · e4m3[128x128 fp32](w)ᵀ'."""
        spec: GemmSpec = getattr(self, gemm)
        out, a, b = _OPERANDS[gemm]
        if spec.b == FROM_FPROP:  # fprop's operand, which lies transposed already
            return f"{out} = {_applied(spec.a, a)} · {_applied(self.operands(gemm)[1], b[0])}"
        return f"{out} = {_applied(spec.a, a)} · {_applied(spec.b, b)}ᵀ"

    def with_gemms(self, **parts: "Recipe") -> "Recipe":
        """This recipe with single GEMMs taken from others: `with_gemms(fprop=bf16)`."""
        name = f"{self.name}({', '.join(f'{gemm}={recipe.name}' for gemm, recipe in parts.items())})" if parts else self.name
        return replace(self, name=name, **{gemm: getattr(recipe, gemm) for gemm, recipe in parts.items()})


def _applied(source: OperandSource, symbol: str) -> str:
    return symbol if source is None else f"{source}({symbol})"
