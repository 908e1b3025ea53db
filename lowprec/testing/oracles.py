"""Oracles: independent implementations to compare the package with.

They use plain loops over blocks, float64 and exact rationals, and codes by ml_dtypes. They share no
arithmetic with the package; each is written from the definitions, not from the package's formulas.
"""

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from lowprec.formats.element import E2M1, E4M3, E5M6, ElementFormat
from lowprec.formats.scaling import ALL
from lowprec.quant import OperandSpec

SMALLEST_FP32_SCALE = np.float32(2.0**-126)


def e8m0_scale(amax: float, fmt: ElementFormat, rule: str) -> float:
    """Return the power-of-two scale of a block with a finite amax, by the definition of each rule.

    Sources: OCP MX 1.0, section 6.3; arXiv 2506.08027.
    """
    if amax == 0:
        return 2.0**-127
    a = Fraction(amax)
    largest = Fraction(fmt.max)
    # floor: amax / s has the exponent of the format's largest value.
    exponent = _floor_log2(a) - fmt.emax
    if rule == "ceil":
        # The smallest s for which amax / s does not exceed the format's largest power of two.
        while a > Fraction(2) ** (exponent + fmt.emax):
            exponent += 1
    elif rule == "rceil":
        # The smallest s for which amax / s does not exceed the format's largest value.
        while a / Fraction(2) ** exponent > largest:
            exponent += 1
    elif rule == "even":
        # floor, for amax rounded to the format's mantissa. Fractions round half to even.
        ulp = Fraction(2) ** (_floor_log2(a) - fmt.mantissa_bits)
        exponent = _floor_log2(round(a / ulp) * ulp) - fmt.emax
    return 2.0 ** min(max(exponent, -127), 127)


def non_negative_values(fmt: ElementFormat) -> np.ndarray:
    """Return the values 0 <= v <= max(max, -min) of a format in ascending order, float64.

    They follow from the definition in `formats.element`. The index of a float is its code without
    the sign, and the index of an integer is the integer itself. So a value is even if its index is
    even.
    """
    if fmt.is_integer:
        return np.arange(0.0, 1 - fmt.min)
    mantissas = np.arange(2**fmt.mantissa_bits) / 2**fmt.mantissa_bits
    exponents = 2.0 ** (np.arange(1, min(2**fmt.exponent_bits, 1024)) - fmt.bias)
    values = np.concatenate(
        [mantissas * 2.0 ** (1 - fmt.bias), (exponents[:, None] * (1 + mantissas)).ravel()]
    )
    return values[values <= fmt.max]


def neighbours(
    x: np.ndarray | np.floating, fmt: ElementFormat
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the two values of a format between which each number lies.

    The search in the list of all values involves no arithmetic that could round. The last value of
    a format that overflows is infinity.

    Args:
        x: fp32 numbers without NaN.
    Returns:
        (the neighbour toward zero, the neighbour away from zero, the index of the former in
        `non_negative_values`). The neighbours are float64, and equal if x is a value of the format.
    """
    values = non_negative_values(fmt)
    x = np.asarray(x, np.float64)
    if fmt.saturates:
        x = np.clip(x, fmt.min, fmt.max)
    else:
        values = np.append(values, np.inf)
    index = np.searchsorted(values, np.abs(x), side="right") - 1
    low = values[index]
    high = np.where(low == np.abs(x), low, values[np.minimum(index + 1, len(values) - 1)])
    return np.copysign(low, x), np.copysign(high, x), index


def round_by_search(x: np.ndarray | np.floating, fmt: ElementFormat, rounding: str) -> np.ndarray:
    """Round fp32 numbers without NaN to the nearest values of a format (ties to even), or toward
    zero. The result is fp32."""
    low, high, index = neighbours(x, fmt)
    if rounding == "toward_zero":
        return low.astype(np.float32)
    # The value of the unbounded grid in whose place the format has infinity.
    top = np.copysign(2.0 ** (fmt.emax + 1), high)
    with np.errstate(invalid="ignore"):  # inf - inf is invalid.
        below = np.abs(x - low)
        above = np.abs(np.where(np.isinf(high), top, high) - x)
    up = (
        (above < below)
        | ((above == below) & (index % 2 == 1))
        | (np.abs(x) >= np.abs(top)) & np.isinf(high)
    )
    return np.where(up, high, low).astype(np.float32)


def nvfp4_by_numpy(
    x_RK: Tensor, block: tuple[int, int], *, four_over_six: bool = False, error: str = "mse"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise a matrix to NVFP4 block by block, in fp32 scalars.

    The order of operations is Transformer Engine's (arXiv 2509.25149, appendix B), and for four
    over six that of its authors' code (arXiv 2512.02010), in numpy's fp32, where every operation is
    correctly rounded. `error` is the measure by which four over six chooses.

    Returns:
        (codes, block scales, tensor scale, dequantised matrix), all fp32. For a matrix with NaN or
        infinity, all of them are NaN.
    """
    f32 = np.float32
    flt_max = np.finfo(f32).max
    x = x_RK.float().numpy()
    rows, cols = x.shape
    r, c = block
    grid = (-(-rows // r), -(-cols // c))
    codes = np.zeros_like(x)
    scales = np.zeros(grid, f32)
    out = np.zeros_like(x)
    if not np.isfinite(x).all():
        dead = [np.full(shape, np.nan, f32) for shape in (x.shape, grid, (), x.shape)]
        return tuple(torch.from_numpy(np.asarray(part)) for part in dead)  # pyright: ignore[reportReturnType]
    amax = f32(np.abs(x).max()) if x.size else f32(0)
    bound = f32(6 * 256 if four_over_six else 6 * 448)
    stretches = (f32(1), f32(1.5)) if four_over_six else (f32(1),)
    # The published code takes the errors as they are. In these units they stay in fp32's range.
    unit = f32(1) if amax == 0 else f32(2.0 ** min(127, -np.floor(np.log2(np.float64(amax)))))
    measure = {"mse": np.square, "mae": np.abs}[error]
    with np.errstate(over="ignore", divide="ignore"):
        encode = f32(1) if amax == 0 else min(bound / amax, flt_max)
        decode = f32(1) / encode
        for i in range(grid[0]):
            for j in range(grid[1]):
                place = np.s_[i * r : (i + 1) * r, j * c : (j + 1) * c]
                best = None
                largest = np.abs(x[place]).max()
                if four_over_six:
                    base = largest / f32(6) * encode
                else:
                    base = min(largest * (encode * (f32(1) / f32(6))), flt_max)
                for stretch in stretches:
                    scale = f32(round_by_search(base * stretch, E4M3, "nearest"))
                    factor = min(f32(1) / (scale * decode), flt_max)
                    code = round_by_search(
                        np.clip(x[place] * factor, f32(-6), f32(6)), E2M1, "nearest"
                    )
                    value = code * scale * decode
                    seen = code * scale * (amax * unit) / bound - x[place] * unit
                    total = measure(seen.astype(np.float64)).sum()
                    if best is None or total < best[0]:
                        best = total, code, scale, value
                assert best is not None
                _, codes[place], scales[i, j], out[place] = best
    return (
        torch.from_numpy(codes),
        torch.from_numpy(scales),
        torch.tensor(float(decode)),
        torch.from_numpy(out),
    )


def quantize_by_numpy(x_RK: Tensor, spec: OperandSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the codes, scales and zero points (all fp32) of a matrix, made block by block.

    A block with NaN or infinity has a NaN scale and NaN codes. float64 holds the product of two
    fp32 numbers exactly, and their quotient to more than twice fp32's precision. So rounding either
    to fp32 gives the correctly rounded fp32 result.
    """
    assert spec.scaling is not None
    x = x_RK.float().numpy()
    scaling = spec.scaling
    fmt = spec.element
    r, c = (
        max(n, 1) if extent == ALL else extent
        for n, extent in zip(x.shape, scaling.block, strict=True)
    )
    grid = (-(-x.shape[0] // r), -(-x.shape[1] // c))
    codes = np.zeros_like(x)
    scales = np.zeros(grid, np.float32)
    zeros = np.zeros(grid, np.float32)
    for i in range(grid[0]):
        for j in range(grid[1]):
            place = np.s_[i * r : (i + 1) * r, j * c : (j + 1) * c]
            if not np.isfinite(x[place]).all():
                codes[place] = np.nan
                scales[i, j] = np.nan
                zeros[i, j] = np.nan
            elif scaling.symmetric:
                codes[place], scales[i, j] = _symmetric(x[place], spec)
            else:
                codes[place], scales[i, j], zeros[i, j] = _asymmetric(x[place], fmt)
    return (
        torch.from_numpy(codes),
        torch.from_numpy(scales),
        None if scaling.symmetric else torch.from_numpy(zeros),
    )


def round_by_ml_dtypes(x: np.ndarray, fmt: ElementFormat) -> np.ndarray:
    """Round fp32 numbers without NaN to the nearest values of a saturating format, fp32."""
    import ml_dtypes  # a development dependency

    clamped = np.clip(x, fmt.min, fmt.max)  # ml_dtypes' float8_e4m3fn does not saturate.
    if fmt.is_integer:
        return np.clip(np.rint(x), fmt.min, fmt.max)
    names = {
        "e4m3": "float8_e4m3fn",
        "e5m2": "float8_e5m2",
        "e3m2": "float6_e3m2fn",
        "e2m3": "float6_e2m3fn",
        "e2m1": "float4_e2m1fn",
    }
    return clamped.astype(getattr(ml_dtypes, names[fmt.name])).astype(np.float32)


def _symmetric(block: np.ndarray, spec: OperandSpec) -> tuple[np.ndarray, np.float32]:
    """Return (codes, scale) of a block."""
    amax = np.abs(block).max().astype(np.float64)
    fmt = spec.element
    scaling = spec.scaling
    assert scaling is not None
    if scaling.scale_format == "e8m0":
        scale = np.float32(e8m0_scale(float(amax), fmt, scaling.rule))
    else:
        steps = {"int8": 127.5, "int4": 7.5}.get(fmt.name, fmt.max)
        scale = max(np.float32(amax / steps), SMALLEST_FP32_SCALE)
    scaled = _times_reciprocal(block, scale)
    if fmt == E5M6:  # ml_dtypes lacks e5m6.
        return round_by_search(scaled, fmt, "nearest"), scale
    return round_by_ml_dtypes(scaled, fmt), scale


def _asymmetric(block: np.ndarray, fmt: ElementFormat) -> tuple[np.ndarray, np.float32, np.float32]:
    """Return (codes, scale, zero point) of a block."""
    low = min(block.min(), np.float32(0))
    high = max(block.max(), np.float32(0))
    # The halved span of finite numbers is finite.
    half_span = np.float32(high.astype(np.float64) / 2 - low.astype(np.float64) / 2)
    scale = max(
        np.float32(half_span.astype(np.float64) / ((fmt.max - fmt.min) / 2)), SMALLEST_FP32_SCALE
    )
    zero = np.clip(
        fmt.min - np.rint(np.float32(low.astype(np.float64) / scale.astype(np.float64))),
        fmt.min,
        fmt.max,
    )
    return np.clip(np.rint(_times_reciprocal(block, scale)) + zero, fmt.min, fmt.max), scale, zero


def _times_reciprocal(block: np.ndarray, scale: np.float32) -> np.ndarray:
    """Return block * RN(1 / scale), correctly rounded to fp32."""
    reciprocal = np.float32(1.0 / scale.astype(np.float64))
    return (block.astype(np.float64) * reciprocal.astype(np.float64)).astype(np.float32)


def _floor_log2(x: Fraction) -> int:
    """Return the e for which 2^e <= x < 2^(e + 1)."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1
