"""A recipe is data: three GEMMs of two operands each.

    fprop   y_MN  = x_MK   . w_NK^T            a: x      b: w        contracts K, the input features
    dgrad   dx_MK = g_MN   . (w^T)_KN^T        a: g      b: w^T      contracts N, the output features
    wgrad   dw_NK = g^T_NM . (x^T)_KM^T        a: g^T    b: x^T      contracts M, the tokens

What an operand is made from:

    None          as it arrives, in high precision
    OperandSpec   quantised from high precision along this GEMM's own contraction axis (training recipes: fprop's codes have their scales
                  along another axis and can't serve)
    FROM_FPROP    the very operand that fprop multiplied, for b of dgrad and wgrad. y is then differentiated as the function of the
                  fake-quantised x and w that it is (quantisation-aware training), and the gradient
                  passes straight through the rounding: as the identity inside the element's range,
                  as zero where the clamp cut (arXiv 1712.05877, section 3; 1308.3432).
                  FromFprop(requantize=spec) quantises fprop's operand once more, along this GEMM's
                  contraction axis (arXiv 2505.14669)

A Hadamard transform belongs to the GEMM, not to an operand: both must share it to cancel. The
gradient of a transformed fprop that goes by FROM_FPROP comes out transformed and is transformed
back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from lowprec.formats.element import BF16, ElementFormat
from lowprec.formats.hadamard import Hadamard
from lowprec.gemm import Accumulation
from lowprec.quant import OperandSpec


@dataclass(frozen=True, kw_only=True)
class FromFprop:
    """The operand that fprop multiplied."""

    requantize: OperandSpec | None = None
    """None: as it is."""


FROM_FPROP: Final = FromFprop()
GEMMS: Final = ("fprop", "dgrad", "wgrad")
_OPERANDS = {"fprop": ("y", "x", "w"), "dgrad": ("dx", "g", "wᵀ"), "wgrad": ("dw", "gᵀ", "xᵀ")}

OperandSource = OperandSpec | FromFprop | None


@dataclass(frozen=True, kw_only=True)
class GemmSpec:
    """One GEMM, a . b^T."""

    a: OperandSource = None
    b: OperandSource = None
    hadamard: Hadamard | None = None
    """Applied to both operands along the contraction axis before they are quantised."""
    accumulator_bits: int | None = None
    """Significant bits of the accumulator between steps of the matrix unit; None: fp32's. Narrower
    ones are emulated."""
    promote_every: int | None = None
    """Contracted elements after which partial sums are promoted to fp32; None: never. It matters
    where the accumulator is narrower."""

    def __post_init__(self) -> None:
        _ = self.sums  # which checks its fields
        if self.hadamard is not None and self.b == FROM_FPROP:
            raise ValueError(
                "fprop's operand can't be transformed as it is: it is quantised already; "
                "FromFprop(requantize=...) can"
            )

    @property
    def sums(self) -> Accumulation:
        return Accumulation(bits=self.accumulator_bits, promote_every=self.promote_every)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The three GEMMs of a linear layer."""

    name: str
    fprop: GemmSpec = GemmSpec()
    dgrad: GemmSpec = GemmSpec()
    wgrad: GemmSpec = GemmSpec()
    rest: ElementFormat = BF16
    """What the rest of the model computes in on an accelerator (autocast's dtype); fp32 for
    none."""
    about: str = ""
    """One line: what it is, and the source."""

    def __post_init__(self) -> None:
        if any(
            isinstance(source, FromFprop)
            for source in (self.fprop.a, self.fprop.b, self.dgrad.a, self.wgrad.a)
        ):
            raise ValueError(
                f"recipe {self.name}: FROM_FPROP is a source for b of dgrad and wgrad only"
            )
        if self.fprop.hadamard is not None and isinstance(self.dgrad.b, FromFprop) != isinstance(
            self.wgrad.b, FromFprop
        ):
            raise ValueError(
                f"recipe {self.name}: fprop is transformed, so dgrad and wgrad both take its "
                "operands, or neither does"
            )
        for operand, reader in ((self.fprop.b, self.dgrad.b), (self.fprop.a, self.wgrad.b)):
            delayed = (
                isinstance(operand, OperandSpec)
                and operand.scaling is not None
                and operand.scaling.history
            )
            if delayed and isinstance(reader, FromFprop):
                raise ValueError(
                    f"recipe {self.name}: an operand with delayed scaling can't be made again for "
                    "the backward"
                )

    def gemm(self, name: str) -> GemmSpec:
        """fprop, dgrad or wgrad by its name."""
        return getattr(self, name)

    def operands(self, gemm: str) -> tuple[OperandSpec | None, OperandSpec | None]:
        """The representations of a GEMM's two operands, FROM_FPROP replaced by what fprop has
        there."""
        spec = self.gemm(gemm)
        from_fprop = {"dgrad": self.fprop.b, "wgrad": self.fprop.a}.get(gemm)
        b = (spec.b.requantize or from_fprop) if isinstance(spec.b, FromFprop) else spec.b
        assert not isinstance(spec.a, FromFprop)
        assert not isinstance(b, FromFprop)
        return spec.a, b

    @property
    def is_plain(self) -> bool:
        """Whether nothing is done to any operand: the products are then those of an nn.Linear."""
        return all(spec == GemmSpec() for spec in map(self.gemm, GEMMS))

    @property
    def narrowest_bits(self) -> int:
        """Bits of its narrowest operand's elements; 32 if no operand has a format of its own."""
        specs = [spec for gemm in GEMMS for spec in self.operands(gemm) if spec is not None]
        return min((spec.element.bits for spec in specs), default=32)

    def equation(self, gemm: str) -> str:
        """'y = e4m3[1x128 fp32](x) · e4m3[128x128 fp32](w)ᵀ  (fp32 sums)'."""
        spec = self.gemm(gemm)
        out, a, b = _OPERANDS[gemm]
        own = f"{spec.hadamard}·" if spec.hadamard else ""
        result = f"{out} = {_applied(spec.a, own + a)} · "
        if isinstance(spec.b, FromFprop):  # fprop's operand, which lies transposed already
            theirs = f"{self.fprop.hadamard}·" if self.fprop.hadamard else ""
            inner = _applied(getattr(self.fprop, "b" if gemm == "dgrad" else "a"), theirs + b[0])
            result += (
                inner
                if spec.b.requantize is None
                else f"{_applied(spec.b.requantize, f'{own}{inner}ᵀ')}ᵀ"
            )
            result += f" · {self.fprop.hadamard}ᵀ" if self.fprop.hadamard else ""
        else:
            result += f"{_applied(spec.b, own + b)}ᵀ"
        return result if spec.sums == Accumulation() else f"{result}  ({spec.sums})"

    def with_gemms(self, **parts: "Recipe") -> "Recipe":
        """This recipe with single GEMMs taken from others: `with_gemms(fprop=bf16)`."""
        return self.changed(parts, {})

    def with_fields(self, gemm: str, **fields: Any) -> "Recipe":
        """This recipe with single fields of one GEMM changed: `with_fields("fprop",
        accumulator_bits=14)`."""
        return self.changed({}, {gemm: fields})

    def changed(
        self, parts: "Mapping[str, Recipe]", fields: Mapping[str, Mapping[str, Any]]
    ) -> "Recipe":
        """This recipe with GEMMs taken from others (`parts`) and GEMMs changed in single fields,
        all at once.

        ValueError if the GEMMs don't fit together.
        """
        name = (
            f"{self.name}({', '.join(f'{gemm}={recipe.name}' for gemm, recipe in parts.items())})"
            if parts
            else self.name
        )
        for gemm, settings in fields.items():
            name += f"({gemm}: {', '.join(f'{key}={value}' for key, value in settings.items())})"
        gemms = {gemm: recipe.gemm(gemm) for gemm, recipe in parts.items()}
        return replace(
            self,
            name=name,
            **gemms,
            **{gemm: replace(self.gemm(gemm), **settings) for gemm, settings in fields.items()},
        )


def _applied(source: OperandSource, symbol: str) -> str:
    return symbol if source is None else f"{source}({symbol})"
