"""Block scaling: one scale for a block of elements, from the block's largest magnitude (amax).

    fp32 scale        s = amax / max                                      any positive fp32 number
    e8m0 scale        s = 2^E,  E = e - emax + bump,  amax = m * 2^e      a power of two, -127 <= E <= 127
    e4m3 scale        two levels, see `nvfp4`

with, per rule (m in [1, 2), t = max / 2^emax):

    floor   bump = 0                        OCP MX 1.0, section 6.3; the block's largest values may saturate
    ceil    bump = m > 1                    nothing saturates, up to one binade is wasted
    even    bump = m >= 2 - 2^-(mbits + 1)  amax is rounded to the element's precision first
    rceil   bump = m > t                    the smallest power of two under which amax / s <= max (arXiv 2506.08027)
    quest   E = floor(log2(c * std / max + 1e-8)) with c = 2.92247856, std the block's standard deviation about its mean: what minimises
            the error of a gaussian's e2m1 codes; the largest values saturate (arXiv 2505.14669,
            section 4.2, and its code)

An asymmetric integer scale covers the range [low, high] that the block spans together with zero: s
= (high - low) / (max - min) and zero_point = min - round(low / s).

What the specifications leave open, and the choice made here:
* a block of zeros (or smaller than the smallest scale) gets the smallest scale: 2^-126 in fp32, so
  that 1 / s is finite, 2^-127 in e8m0 (`quest` adds 1e-8 before it takes the logarithm, so its
  smallest is 2^-27);
* NaN or infinity in a block makes its scale NaN, so the whole block dequantises to NaN. Saturating
  an infinity instead would hide an overflow from dynamic loss scaling.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lowprec.formats.element import ElementFormat

ALL = -1
"""As a block's extent: the whole axis."""

SMALLEST_FP32_SCALE = 2.0**-126
_E8M0_BIAS = 127
_QUEST_WIDTH = 2.92247856

ScaleFormat = Literal["fp32", "e8m0", "e4m3"]
Rule = Literal["floor", "ceil", "even", "rceil", "quest"]
RULES: tuple[str, ...] = get_args(Rule)


@dataclass(frozen=True, kw_only=True)
class BlockScaling:
    """How the elements of a matrix [R, K] share scales, K being the contraction axis."""

    block: tuple[int, int]
    """Rows x columns under one scale; `ALL` (-1) is the whole axis. (1, 128) is a tile of a row,
    (-1, -1) the whole tensor."""
    scale_format: ScaleFormat = "fp32"
    """`e4m3`: under one fp32 scale for the whole matrix (NVFP4)."""
    rule: Rule = "rceil"
    """Which power of two an e8m0 scale takes; other scales have no use for it."""
    symmetric: bool = True
    """False: an integer zero point per block as well."""
    prescale: float = 1.0
    """Codes are made of prescale * x, and dequantising divides by it again: 3/4 keeps what floor
    would cut inside the range, so that stochastic rounding stays unbiased (arXiv 2502.20586,
    section 3.1)."""
    history: int = 0
    """0: current scaling. n: delayed scaling, by the largest of the last n amaxes (arXiv
    2209.05433, section 3)."""
    four_over_six: bool = False
    """Try the block's largest magnitude at 4 as well as at 6 and keep what has the smaller error
    (arXiv 2512.02010)."""

    def __post_init__(self) -> None:
        if any(extent != ALL and extent < 1 for extent in self.block):
            raise ValueError(
                f"block extents are positive, or -1 for the whole axis; got {self.block}"
            )
        if not self.symmetric and self.scale_format != "fp32":
            raise ValueError("a zero point goes with an fp32 scale")
        if self.prescale != 1.0 and not (self.scale_format == "e8m0" and 0 < self.prescale < 1):
            raise ValueError(
                f"a prescale lies between 0 and 1 and goes with an e8m0 scale; got {self.prescale}"
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

    def __str__(self) -> str:
        block = {(ALL, ALL): "tensor", (1, ALL): "row"}.get(
            self.block, "x".join("all" if n == ALL else str(n) for n in self.block)
        )
        words = [
            block,
            f"{self.scale_format}:{self.rule}"
            if self.scale_format == "e8m0"
            else self.scale_format,
        ]
        words += ["asymmetric"] * (not self.symmetric) + ["4/6"] * self.four_over_six
        words += [f"prescale:{self.prescale!r}"] * (self.prescale != 1.0) + [
            f"delayed:{self.history}"
        ] * (self.history > 0)
        return " ".join(words)


def scale_from_amax(amax: Tensor, fmt: ElementFormat, scaling: BlockScaling) -> Tensor:
    """The scale of each block, by which its codes are multiplied to dequantise.

    Args:
        amax: fp32 >= 0, any shape: the largest magnitude of each block.
    Returns:
        fp32, same shape. NaN where amax is NaN or infinite.
    """
    if scaling.scale_format == "e8m0":
        return power_of_two_scale(amax, fmt, scaling.rule)
    # An integer format's range is one step longer below zero; the scale spans the whole of it (amax
    # / 7.5 for int4).
    largest = (fmt.max - fmt.min) / 2
    return _finite_or_nan(_divide(amax, largest).clamp(min=SMALLEST_FP32_SCALE))


def asymmetric_scale(low: Tensor, high: Tensor, fmt: ElementFormat) -> tuple[Tensor, Tensor]:
    """Scale and zero point of blocks that span [low, high], fp32 in and out; the zero point is
    integral, in [fmt.min, fmt.max]."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    span = high / 2 - low / 2  # halved, which is exact, the span of finite numbers is finite
    scale = _finite_or_nan(_divide(span, (fmt.max - fmt.min) / 2).clamp(min=SMALLEST_FP32_SCALE))
    zero_point = (fmt.min - (low.double() / scale.double()).float().round()).clamp(fmt.min, fmt.max)
    return scale, zero_point


def power_of_two_scale(amax: Tensor, fmt: ElementFormat, rule: str) -> Tensor:
    """2^E as the rule says, fp32. For `quest`, `amax` is the standard deviation."""
    if rule == "quest":
        # The same floor, of another number; 1 has exponent 0 as the format's emax would be.
        amax, fmt_emax, rule = _divide(amax * _QUEST_WIDTH, fmt.max) + 1e-8, 0, "floor"
    else:
        fmt_emax = fmt.emax
    bits = amax.contiguous().view(torch.int32)
    carry = e8m0_carry(fmt, rule)
    # A subnormal amax reads as 2^-127: below every scale anyway.
    biased = ((bits + carry) >> 23).sub_(fmt_emax).clamp_(0, 2 * _E8M0_BIAS)
    # 2^E by its bits; the smallest one, 2^-127, is subnormal.
    return (
        (biased << 23)
        .clamp_(min=1 << 22)
        .view(torch.float32)
        .masked_fill_(~amax.isfinite(), torch.nan)
    )


def e8m0_carry(fmt: ElementFormat, rule: str) -> int:
    """What, added to the bits of an fp32 amax, carries into the exponent just where the mantissa
    calls for the rule's bump."""
    if rule == "floor":
        return 0
    if rule == "even":
        return 1 << (22 - fmt.mantissa_bits)
    threshold = 0.0 if rule == "ceil" else fmt.max / 2.0**fmt.emax - 1.0
    return 0x7FFFFF - int(threshold * 2**23)


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, fp32 in and out, correctly rounded on every device."""
    return (1.0 / scale.double()).float()


def _divide(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, fp32 in and out, correctly rounded on every device.

    fp32 division is not: by a plain number CUDA multiplies with its reciprocal, and compiled
    kernels approximate. A quotient of fp32 numbers that is rounded to fp64 and then to fp32 is
    correctly rounded (53 >= 2 * 24 + 2 bits), and scales are few.
    """
    return (x.double() / torch.full_like(x, divisor, dtype=torch.float64)).float()


def _finite_or_nan(scale: Tensor) -> Tensor:
    return scale.masked_fill(scale.isinf(), torch.nan)
