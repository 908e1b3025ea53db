"""The SQNR of quantised gaussian operands, predicted by integration.

The floors of the recipes with four and six bits are derived from it. A block of n gaussian elements
has an amax a with the distribution function (2 Phi(a) - 1)^n. a determines the block's scale. One
element is a itself, and the others are gaussian on [-a, a]. The mean squared error of all n
elements, averaged over a, relative to the mean square 1, is the operand's noise. The noise of a
product is the sum of the noise of its operands. The prediction uses no random numbers and none of
the package's rounding.
"""

import math

import numpy as np

from lowprec.formats.element import ElementFormat
from lowprec.formats.scaling import BlockScaling
from lowprec.quant import OperandSpec
from lowprec.testing.oracles import e8m0_scale

_TENSOR_AMAX = 4.6
"""Largest of the 10^5 values of a test's matrix, in standard deviations. An error in it moves
NVFP4's scales by only a fraction of their own step."""


def gaussian_sqnr_db(a: OperandSpec | None, b: OperandSpec | None, length: int) -> float:
    """Return the predicted SQNR of a product of two gaussian operands, in dB.

    `length` is the assumed length of an axis that a block spans wholly.
    """
    noise = sum(operand_noise(spec, length) for spec in (a, b) if spec is not None)
    return math.inf if noise == 0 else -10 * math.log10(noise)


def operand_noise(spec: OperandSpec, length: int) -> float:
    """Return the mean squared error of a unit gaussian quantised by `spec`, which has a float
    element and an amax scale."""
    assert spec.scaling is not None
    rows, cols = (length if extent == -1 else extent for extent in spec.scaling.block)
    grid = _grid(spec.element)
    n = rows * cols
    levels = 400
    total = 0.0
    for quantile in (np.arange(levels) + 0.5) / levels:
        amax = _inverse_half_normal(quantile ** (1 / n))
        scale = _scale(amax, spec.element, spec.scaling)
        x = (np.arange(4000) + 0.5) / 4000 * amax
        density = np.exp(-x * x / 2)
        others = (_squared_error(x, scale, grid, spec.stochastic) * density).sum() / density.sum()
        largest = _squared_error(np.array([amax]), scale, grid, spec.stochastic)[0]
        total += ((n - 1) * others + largest) / n
    return total / levels


def _grid(fmt: ElementFormat) -> np.ndarray:
    """Return the non-negative values of a format, from its definition."""
    exponents = range(1, 2**fmt.exponent_bits)
    normal = [
        2.0 ** (e - fmt.bias) * (1 + m / 2**fmt.mantissa_bits)
        for e in exponents
        for m in range(2**fmt.mantissa_bits)
    ]
    subnormal = [
        2.0 ** (1 - fmt.bias) * m / 2**fmt.mantissa_bits for m in range(2**fmt.mantissa_bits)
    ]
    return np.array([value for value in subnormal + normal if value <= fmt.max])


def _scale(amax: float, fmt: ElementFormat, scaling: BlockScaling) -> float:
    """Return the scale of a block with this amax."""
    if scaling.scale_format == "e8m0":
        return e8m0_scale(amax, fmt, scaling.rule) / scaling.prescale
    if scaling.scale_format == "fp32":
        return amax / fmt.max
    unit = _TENSOR_AMAX / (fmt.max * 448)
    fraction, exponent = math.frexp(amax / fmt.max / unit)  # e4m3 keeps four significant bits
    return min(round(fraction * 16) / 16 * 2.0**exponent, 448) * unit


def _squared_error(x: np.ndarray, scale: float, grid: np.ndarray, stochastic: bool) -> np.ndarray:
    """Return the expected squared error of each x under a scale: rounding plus saturation."""
    scaled = np.minimum(x / scale, grid[-1])
    upper = np.clip(np.searchsorted(grid, scaled), 1, len(grid) - 1)
    below = scaled - grid[upper - 1]
    above = grid[upper] - scaled
    cut = x - scaled * scale
    # The variance of a random draw between two neighbours is the product of the two distances.
    # Rounding to nearest has the smaller distance as its error.
    return (below * above if stochastic else np.minimum(below, above) ** 2) * scale**2 + cut**2


def _inverse_half_normal(probability: float) -> float:
    """Return the a for which P(|x| <= a) = probability, by bisection."""
    low = 0.0
    high = 10.0
    for _ in range(60):
        middle = (low + high) / 2
        if math.erf(middle / math.sqrt(2)) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2
