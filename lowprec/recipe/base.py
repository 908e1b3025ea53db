"""A recipe is data: three GEMMs of two operands each.

    fprop   y_MN  = x_MK   . w_NK^T          a: x      b: w       contracts K, the input features
    dgrad   dx_MK = g_MN   . (w^T)_KN^T      a: g      b: w^T     contracts N, the output features
    wgrad   dw_NK = g^T_NM . (x^T)_KM^T      a: g^T    b: x^T     contracts M, the tokens

The sources of an operand:

    None          The tensor as it arrives, in high precision.
    OperandSpec   The tensor quantised from high precision along this GEMM's own contraction axis.
                  Training recipes use it: the scales of fprop's codes lie along another axis.
    FROM_FPROP    The operand that fprop multiplied, for b of dgrad and wgrad. The backward is then
                  that of the fake-quantised x and w (quantisation-aware training), and the gradient
                  passes straight through the rounding: unchanged inside the element's range, zero
                  where the clamp cut (arXiv 1712.05877, section 3; 1308.3432).
                  FromFprop(requantize=spec) quantises fprop's operand once more, along this GEMM's
                  contraction axis (arXiv 2505.14669).

A Hadamard transform belongs to the GEMM, not to an operand: both operands must share it, so that it
cancels. If fprop is transformed and the backward uses FROM_FPROP, the gradient comes out
transformed, and is transformed back.
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
    """The representation that it is quantised to once more; None: it is used unchanged."""


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
    """Transform of both operands along the contraction axis, before they are quantised."""
    accumulator_bits: int | None = None
    """Significant bits of the accumulator between steps of the matrix unit; None: fp32's. A
    narrower accumulator is emulated."""
    promote_every: int | None = None
    """Number of contracted elements after which partial sums are promoted to fp32; None: never. It
    has an effect where the accumulator is narrower than fp32."""

    def __post_init__(self) -> None:
        _ = self.sums  # Accumulation checks its fields
        if self.hadamard is not None and self.b == FROM_FPROP:
            raise ValueError(
                "fprop's operand can't be transformed as it is: it is quantised already; "
                "FromFprop(requantize=...) can"
            )

    @property
    def sums(self) -> Accumulation:
        """The accumulator of the products."""
        return Accumulation(bits=self.accumulator_bits, promote_every=self.promote_every)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The three GEMMs of a linear layer."""

    name: str
    fprop: GemmSpec = GemmSpec()
    dgrad: GemmSpec = GemmSpec()
    wgrad: GemmSpec = GemmSpec()
    rest: ElementFormat = BF16
    """Format in which the rest of the model computes on an accelerator (autocast's dtype); fp32
    means no autocast."""
    about: str = ""
    """Description in one line, with the source."""

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
        """Return fprop, dgrad or wgrad by its name."""
        return getattr(self, name)

    def operands(self, gemm: str) -> tuple[OperandSpec | None, OperandSpec | None]:
        """Return the representations of a GEMM's two operands, with FROM_FPROP replaced by the
        representation that fprop has there."""
        spec = self.gemm(gemm)
        from_fprop = {"dgrad": self.fprop.b, "wgrad": self.fprop.a}.get(gemm)
        b = (spec.b.requantize or from_fprop) if isinstance(spec.b, FromFprop) else spec.b
        assert not isinstance(spec.a, FromFprop)
        assert not isinstance(b, FromFprop)
        return spec.a, b

    @property
    def draws(self) -> bool:
        """Flag: each pass draws random numbers, for stochastic rounding or for Hadamard signs."""
        gemms = [self.gemm(gemm) for gemm in GEMMS]
        sources = [source for gemm in gemms for source in (gemm.a, gemm.b)]
        specs = [s.requantize if isinstance(s, FromFprop) else s for s in sources]
        rounded = any(spec is not None and spec.stochastic for spec in specs)
        return rounded or any(gemm.hadamard is not None and gemm.hadamard.fresh for gemm in gemms)

    @property
    def is_plain(self) -> bool:
        """Flag: no operand is changed, so the products are those of an nn.Linear."""
        return all(spec == GemmSpec() for spec in map(self.gemm, GEMMS))

    @property
    def narrowest_bits(self) -> int:
        """Bits of the narrowest operand's elements; 32 if no operand has a format of its own."""
        specs = [spec for gemm in GEMMS for spec in self.operands(gemm) if spec is not None]
        return min((spec.element.bits for spec in specs), default=32)

    def equation(self, gemm: str) -> str:
        """Return a GEMM as text: 'y = e4m3[1x128 fp32](x) · e4m3[128x128 fp32](w)ᵀ  (fp32 sums,
        promoted every 128)'."""
        spec = self.gemm(gemm)
        out, a, b = _OPERANDS[gemm]
        own = f"{spec.hadamard}·" if spec.hadamard else ""
        result = f"{out} = {_applied(spec.a, own + a)} · "
        if isinstance(spec.b, FromFprop):  # fprop's operand is read without a transpose
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

    def changed(
        self, parts: "Mapping[str, Recipe]", fields: Mapping[str, Mapping[str, Any]]
    ) -> "Recipe":
        """Return this recipe with several changes at once.

        Args:
            parts: recipes that GEMMs are taken from, by the GEMM's name.
            fields: changed fields of GEMMs, by the GEMM's name.
        Raises:
            ValueError: the GEMMs don't fit together.
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
