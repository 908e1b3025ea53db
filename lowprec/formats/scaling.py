"""Block scaling: one scale for a block of elements, from the block's largest magnitude (amax).

    fp32 scale    s = amax / max, any positive fp32 number
    e8m0 scale    s = 2^E, a power of two with -127 <= E <= 127
                  E = e - emax + bump, where amax = m * 2^e
    e4m3 scale    two levels, see `nvfp4`

For e8m0, each rule has its bump (m in [1, 2), t = max / 2^emax):

    floor   bump = 0                        The block's largest values may saturate (OCP MX 1.0,
                                            section 6.3).
    ceil    bump = m > 1                    Nothing saturates; up to one binade is wasted.
    even    bump = m >= 2 - 2^-(mbits + 1)  amax is rounded to the element's precision first.
    rceil   bump = m > t                    s is the smallest power of two for which amax / s <= max
                                            (arXiv 2506.08027).
    quest   E = floor(log2(c * std / max + 1e-8)), c = 2.92247856; std is the block's standard
            deviation about its mean. This minimises the error of the e2m1 codes of gaussian values;
            the largest values saturate (arXiv 2505.14669, section 4.2, and its code).

An asymmetric integer scale covers the range [low, high] that the block spans together with zero:
s = (high - low) / (max - min) and zero_point = min - round(low / s).

The specifications leave two cases open. The choices here:
* A block of zeros (or with an amax too small for any scale) gets the smallest scale: 2^-126 in
  fp32, so that 1 / s is finite, and 2^-127 in e8m0 (`quest` adds 1e-8 before it takes the
  logarithm, so its smallest scale is 2^-27).
* NaN or infinity in a block makes its scale NaN, so the whole block dequantises to NaN. Saturating
  an infinity instead would hide an overflow from dynamic loss scaling.
"""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from lowprec.formats.element import FP32, ElementFormat

ALL = -1
"""Block extent that stands for the whole axis."""

SMALLEST_FP32_SCALE = 2.0**-126  # compiled code reads FP32.min_normal, see `prescale_ratio`
_E8M0_BIAS = 127

ScaleFormat = Literal["fp32", "e8m0", "e4m3"]
Rule = Literal["floor", "ceil", "even", "rceil", "quest"]
ErrorMeasure = Literal["mse", "mae"]
RULES: tuple[str, ...] = get_args(Rule)
ERROR_MEASURES: tuple[str, ...] = get_args(ErrorMeasure)


@dataclass(frozen=True, kw_only=True)
class BlockScaling:
    """A rule by which the elements of a matrix [R, K] share scales. K is the contraction axis."""

    block: tuple[int, int]
    """Rows and columns under one scale; `ALL` (-1) is the whole axis. (1, 128) is a tile of a row,
    (-1, -1) the whole tensor."""
    scale_format: ScaleFormat = "fp32"
    """Format of the block scales. With `e4m3`, the matrix has one fp32 scale as well (NVFP4)."""
    rule: Rule = "rceil"
    """Rule that picks the power of two of an e8m0 scale; other scale formats ignore it."""
    symmetric: bool = True
    """Flag: no zero point. False adds an integer zero point to each block."""
    prescale: float = 1.0
    """Factor by which x is multiplied before it is quantised; dequantising divides by it. With 3/4,
    the floor rule of e8m0 scales cuts no value, so that stochastic rounding stays unbiased (arXiv
    2502.20586, section 3.1). With 16/17, an e4m3 scale cuts none (arXiv 2601.22813)."""
    history: int = 0
    """Length n of the amax history. 0 is current scaling; n > 0 is delayed scaling, by the largest
    of the last n amaxes (arXiv 2209.05433, section 3)."""
    four_over_six: bool = False
    """Flag: map the block's largest magnitude to 4 as well as to 6, and keep the scale with the
    smaller error (arXiv 2512.02010)."""
    four_over_six_error: ErrorMeasure = "mse"
    """Error by which four over six chooses: the sum of squares ("mse") or of magnitudes ("mae")."""
    prescale_ratio: tuple[int, int] = field(init=False, repr=False, compare=False)
    """The prescale as numerator and denominator. Compiled code must not read the float itself:
    torch.compile makes variables of the floats that it finds in objects."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prescale_ratio", float(self.prescale).as_integer_ratio())
        if any(extent != ALL and extent < 1 for extent in self.block):
            raise ValueError(
                f"block extents are positive, or -1 for the whole axis; got {self.block}"
            )
        if not self.symmetric and self.scale_format != "fp32":
            raise ValueError("a zero point goes with an fp32 scale")
        in_place = self.scale_format in ("e8m0", "e4m3") and 0 < self.prescale < 1
        if self.prescale != 1.0 and not in_place:
            raise ValueError(
                "a prescale lies between 0 and 1 and goes with an e8m0 scale or an e4m3 scale; got "
                f"{self.prescale}"
            )
        if self.history and not (
            self.history > 0
            and self.block == (ALL, ALL)
            and self.scale_format == "fp32"
            and self.symmetric
        ):
            raise ValueError(
                "delayed scaling keeps the amax of a whole tensor under a symmetric fp32 scale"
            )
        if self.four_over_six and self.scale_format != "e4m3":
            raise ValueError("four over six chooses between two e4m3 scales")
        if self.four_over_six_error not in ERROR_MEASURES:
            raise ValueError(
                f"four over six chooses by mse or by mae, not by {self.four_over_six_error!r}"
            )
        if self.four_over_six_error != "mse" and not self.four_over_six:
            raise ValueError("an error measure goes with four over six")

    def __str__(self) -> str:
        block = {(ALL, ALL): "tensor", (1, ALL): "row"}.get(
            self.block, "x".join("all" if n == ALL else str(n) for n in self.block)
        )
        e8m0 = self.scale_format == "e8m0"
        words = [block, f"e8m0:{self.rule}" if e8m0 else self.scale_format]
        if not self.symmetric:
            words.append("asymmetric")
        if self.four_over_six:
            words.append("4/6" if self.four_over_six_error == "mse" else "4/6:mae")
        if self.prescale != 1.0:
            words.append(f"prescale:{_shortest(self.prescale)}")
        if self.history > 0:
            words.append(f"delayed:{self.history}")
        return " ".join(words)


def _shortest(number: float) -> str:
    """Return the text of a number: decimal if that is short, else a fraction of small integers if
    that is exact."""
    fraction = Fraction(number).limit_denominator(64)
    decimal = repr(number)
    return decimal if len(decimal) <= 6 or float(fraction) != number else str(fraction)


def scale_from_amax(amax: Tensor, fmt: ElementFormat, scaling: BlockScaling) -> Tensor:
    """Return the scale of each block. Its codes are multiplied by the scale to dequantise.

    Args:
        amax: fp32 >= 0, any shape: the largest magnitude of each block.
    Returns:
        fp32, same shape. NaN where amax is NaN or infinite.
    """
    if scaling.scale_format == "e8m0":
        return power_of_two_scale(amax, fmt, scaling.rule)
    # An integer format's range is one step longer below zero. The scale spans the whole range:
    # amax / 7.5 for int4.
    largest = (fmt.max - fmt.min) / 2
    return _finite_or_nan(_divide(amax, largest).clamp(min=FP32.min_normal))


def asymmetric_scale(low: Tensor, high: Tensor, fmt: ElementFormat) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point of blocks that span [low, high], fp32 in and out.

    The zero point is an integer in [fmt.min, fmt.max].
    """
    low = low.clamp(max=0)
    high = high.clamp(min=0)
    # The halved span of finite numbers is finite, and halving is exact.
    half_span = high / 2 - low / 2
    scale = _finite_or_nan(_divide(half_span, (fmt.max - fmt.min) / 2).clamp(min=FP32.min_normal))
    zero_point = (fmt.min - (low.double() / scale.double()).float().round()).clamp(fmt.min, fmt.max)
    return scale, zero_point


def power_of_two_scale(amax: Tensor, fmt: ElementFormat, rule: str) -> Tensor:
    """Return the scale 2^E of each block by the rule, fp32. For `quest`, `amax` is the standard
    deviation."""
    emax = fmt.emax
    if rule == "quest":
        # quest is the floor rule for another number, from which emax is not subtracted.
        amax = _divide(amax * 2.92247856, fmt.max) + 1e-8
        emax = 0
        rule = "floor"
    bits = amax.contiguous().view(torch.int32)
    carry = e8m0_carry(fmt, rule)
    # A subnormal amax has the exponent field 0. It gets the smallest scale, as it should.
    biased = ((bits + carry) >> 23).sub_(emax).clamp_(0, 2 * _E8M0_BIAS)
    # The bits of 2^E; the smallest scale, 2^-127, is subnormal.
    return (
        (biased << 23)
        .clamp_(min=1 << 22)
        .view(torch.float32)
        .masked_fill_(~amax.isfinite(), torch.nan)
    )


def e8m0_carry(fmt: ElementFormat, rule: str) -> int:
    """Return the integer that implements the rule's bump.

    Added to the bits of an fp32 amax, it carries into the exponent field exactly where the rule has
    bump = 1.
    """
    if rule == "floor":
        return 0
    if rule == "even":
        return 1 << (22 - fmt.mantissa_bits)
    threshold = 0.0 if rule == "ceil" else fmt.max / 2.0**fmt.emax - 1.0
    return 0x7FFFFF - int(threshold * 2**23)


def reciprocal(scale: Tensor) -> Tensor:
    """Return 1 / scale, fp32 in and out, correctly rounded on every device."""
    return (1.0 / scale.double()).float()


def _divide(x: Tensor, divisor: float) -> Tensor:
    """Return x / divisor, fp32 in and out, correctly rounded on every device.

    Plain fp32 division is not: CUDA multiplies by the reciprocal of a Python number, and compiled
    kernels approximate. A quotient of fp32 numbers that is rounded to fp64 and then to fp32 is
    correctly rounded (53 >= 2 * 24 + 2 bits). fp64 is slow on some devices, but scales are few.
    """
    return (x.double() / torch.full_like(x, divisor, dtype=torch.float64)).float()


def _finite_or_nan(scale: Tensor) -> Tensor:
    return scale.masked_fill(scale.isinf(), torch.nan)
