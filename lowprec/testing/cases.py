"""Named edge cases for block scaling, in one table that every implementation of `quantize` runs.

Each case is a row of 128 values: one tile of fp8_blockwise, or four blocks of an MX format. Values
that the case does not name are small and ordinary, so that the named values decide the scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LENGTH = 128

SMALLEST_SUBNORMAL = 2.0**-149
SMALLEST_NORMAL = 2.0**-126
LARGEST_FP32 = (2 - 2.0**-23) * 2.0**127
PRODUCT_ABOVE_MAX = 1 + 3 * 2.0**-15


@dataclass(frozen=True, kw_only=True)
class EdgeBlock:
    """One row of values, with the property that it tests."""

    name: str
    """Name of the case, shown in the name of a test."""
    why: str
    """Property that the case tests."""
    values: tuple[float, ...]
    """The 128 values of the row."""
    finite: bool = True
    """Flag: all values are finite. If not, the block of the first value must become NaN as a
    whole."""

    @property
    def row(self) -> Tensor:
        """The values as a matrix, fp32 [1, 128]."""
        return torch.tensor([self.values], dtype=torch.float32)

    def __str__(self) -> str:
        return self.name


def _case(name: str, why: str, *first: float, fill: float = 0.25, finite: bool = True) -> EdgeBlock:
    """Return a case of the values `first`, then values of alternating sign that start at `fill`."""
    ordinary = [fill * (-1) ** i * (1 + i / LENGTH) for i in range(LENGTH - len(first))]
    return EdgeBlock(name=name, why=why, values=(*first, *ordinary), finite=finite)


EDGE_BLOCKS = (
    _case("zeros", "amax 0 takes the smallest scale, so that 1 / scale is finite", fill=0.0),
    _case("negative_zeros", "the sign of zero is kept", *[-0.0] * 64, fill=0.0),
    _case(
        "smallest_subnormal",
        "amax / 448 underflows: the scale is the smallest one and the codes are zero",
        SMALLEST_SUBNORMAL,
        fill=0.0,
    ),
    _case(
        "subnormals",
        "every value is an fp32 subnormal, and amax / 448 is below the smallest scale",
        2.0**-127,
        fill=2.0**-130,
    ),
    _case(
        "smallest_scale",
        "amax / 448 is exactly the smallest fp32 scale",
        448 * SMALLEST_NORMAL,
        fill=2.0**-122,
    ),
    _case("tiny", "values just below the smallest normal number", 1e-38, -7e-39, fill=3e-39),
    _case(
        "huge",
        "1 / scale is small, and x * (1 / scale) must keep its exponent",
        1e38,
        -9.9e37,
        fill=3e37,
    ),
    _case(
        "largest",
        "the largest fp32 number; its scale is finite",
        LARGEST_FP32,
        -LARGEST_FP32,
        fill=1e37,
    ),
    _case("max_exactly", "amax is e4m3's largest value: scale 1", 448.0, -448.0, fill=20.0),
    _case(
        "one_ulp_above_max",
        "448 + ulp: a power-of-two scale must double under rceil",
        448.0 + 2.0**-15,
        fill=20.0,
    ),
    _case(
        "one_ulp_below_max",
        "448 - ulp: a power-of-two scale must not double under rceil",
        448.0 - 2.0**-15,
        fill=20.0,
    ),
    _case(
        "one_ulp_below_power_of_two",
        "256 - ulp: a logarithm in fp32 gives 8, but the exponent is 7",
        256.0 - 2.0**-16,
        fill=9.0,
    ),
    _case(
        "power_of_two",
        "the mantissa is zero: the rules floor, ceil and even agree",
        256.0,
        fill=9.0,
    ),
    # For this amax, 1 / fp32(amax / 448) rounds up, and fp32(amax * (1 / scale)) = 448.00003. This
    # happens for 19% of the mantissas.
    _case(
        "product_above_max",
        "amax * (1 / scale) exceeds 448 by an ulp and is clamped",
        PRODUCT_ABOVE_MAX,
    ),
    _case(
        "ties",
        "values halfway between two codes under scale 1",
        448.0,
        17.0,
        19.0,
        -17.0,
        -19.0,
        2.0**-10,
        3 * 2.0**-10,
        fill=16.5,
    ),
    _case(
        "outlier",
        "one value is 10^6 times the others, which fall below the smallest code",
        1e4,
        fill=1e-2,
    ),
    _case("nan", "one NaN makes the whole block NaN", float("nan"), finite=False),
    _case(
        "inf",
        "infinity does the same: saturating it would hide an overflow from loss scaling",
        float("inf"),
        finite=False,
    ),
    _case("minus_inf", "minus infinity does the same", -float("inf"), finite=False),
    _case(
        "inf_and_nan",
        "infinities and NaN together do the same",
        float("inf"),
        float("nan"),
        -float("inf"),
        finite=False,
    ),
)
