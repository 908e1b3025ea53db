"""Bounds on numerical quality, each with its reason.

SQNR floors. Rounding a value x = m * 2^e to p mantissa bits (without the leading one) leaves an
error that is uniform over one unit in the last place, 2^(e - p). Its variance is 4^(e - p) / 12.
Relative to the signal x^2, averaged over a distribution of x,

    noise / signal = 1 / (12 * 4^p * rho)
    rho            = E[x^2] / E[4^floor(log2 |x|)],  1.85 for a gaussian

The noise of a product is the sum of the noise of its two operands. For a gaussian, this predicts:

    operands          p        dB        operands          p        dB
    bf16 . bf16       7, 7     52.6      e4m3 . e4m3       3, 3     28.5
    fp16 . fp16       10, 10   70.7      e5m2 . e4m3       2, 3     24.5

Measurements agree with these to 0.1 dB for every power-of-two scale. An fp32 scale is no power of
two and makes rho a little larger if one scale serves few values, which gains up to 0.7 dB in heavy
tails.

The recipe fp32 has exact operands: only its sums are rounded (p = 23). The cost depends on the
order in which a CPU's kernel adds. The worst order is one product after the other. A sum of K
products then has K partial sums, and the kth one has k/K of the variance of the result, so

    noise / signal = (K / 2) / (12 * 4^p * rho)

which is 127.9, 129.1 and 130.9 dB for SQNR_SHAPE. Kernels that keep several partial sums gain a few
dB (131 to 134 dB were measured). Exact sums that are rounded to fp32 once have 151.9 dB, which no
fp32 result exceeds: this is the ceiling of fp32.

Saturation (mxfp4's floor rule), integer steps and the mask of the straight-through gradient (QAT's
wgrad) add noise. Their floors come from measurement: shape SQNR_SHAPE, 5 seeds, the smallest value.
For gaussian operands under an amax scale, `theory` predicts all of this by integration, and a test
compares the floors of the MX and NVFP4 recipes with it.

Every floor is about 0.3 dB (fp32: 0.5 dB) below the prediction or the measurement, whichever is
lower. This is more than the spread between seeds, which is below 0.2 dB (0.4 dB for QAT's wgrad in
heavy tails). It is far less than the cost of a mistake: a lost mantissa bit costs 6 dB of its
operand, and an operand kept in high precision gains 3 dB.
"""

from lowprec.formats.element import ElementFormat

SQNR_FLOORS_DB: dict[str, dict[str, tuple[float, float, float]]] = {
    # recipe                 distribution      fprop  dgrad  wgrad
    "fp32": {"gaussian": (127.4, 128.6, 130.4), "heavy_tailed": (127.4, 128.6, 130.4)},
    "bf16": {"gaussian": (52.2, 52.2, 52.2), "heavy_tailed": (52.2, 52.2, 52.2)},
    "fp16": {"gaussian": (70.3, 70.3, 70.3), "heavy_tailed": (70.3, 70.3, 70.3)},
    "fp8_tensorwise": {"gaussian": (28.2, 24.2, 24.2), "heavy_tailed": (28.2, 24.2, 24.2)},
    "fp8_delayed": {"gaussian": (28.2, 24.2, 24.2), "heavy_tailed": (28.2, 24.2, 24.2)},
    "fp8_rowwise": {"gaussian": (28.2, 28.2, 28.2), "heavy_tailed": (28.4, 28.4, 28.6)},
    "fp8_rowwise_wgrad_hp": {"gaussian": (28.2, 28.2, 52.2), "heavy_tailed": (28.4, 28.4, 52.2)},
    "fp8_blockwise": {"gaussian": (28.2, 28.2, 28.4), "heavy_tailed": (28.4, 28.4, 28.8)},
    "fp8_blockwise_ue8m0": {"gaussian": (28.2, 28.2, 28.2), "heavy_tailed": (28.2, 28.2, 28.2)},
    "fp8_blockwise_wgrad2d": {"gaussian": (28.2, 28.2, 28.2), "heavy_tailed": (28.4, 28.4, 28.4)},
    "mxfp8": {"gaussian": (28.2, 28.2, 28.2), "heavy_tailed": (28.2, 28.2, 28.2)},
    "mxfp4": {"gaussian": (15.4, 15.4, 15.4), "heavy_tailed": (14.6, 14.6, 14.6)},
    "mxfp6_e2m3": {"gaussian": (27.6, 27.6, 27.6), "heavy_tailed": (27.0, 27.0, 27.0)},
    "mxfp6_e3m2": {"gaussian": (22.0, 22.0, 22.0), "heavy_tailed": (21.9, 21.9, 21.9)},
    "mxfp4_aws": {"gaussian": (52.2, 12.1, 12.1), "heavy_tailed": (52.2, 12.3, 12.3)},
    "mxfp4_quartet": {"gaussian": (12.1, 8.0, 8.0), "heavy_tailed": (13.3, 9.1, 8.6)},
    "nvfp4": {"gaussian": (16.3, 14.7, 15.2), "heavy_tailed": (15.3, 14.0, 15.2)},
    "nvfp4_4over6": {"gaussian": (16.7, 14.7, 15.5), "heavy_tailed": (15.5, 14.0, 15.4)},
    "int8": {"gaussian": (37.1, 37.3, 52.2), "heavy_tailed": (28.4, 28.5, 52.2)},
    "qat_int8dyn_int4": {"gaussian": (20.1, 20.1, 18.6), "heavy_tailed": (18.0, 18.0, 18.5)},
}

SQNR_CEILING_ABOVE_FLOOR_DB = 2.0
"""Largest distance of a recipe's SQNR above its floor. If one of two equal operands stays in high
precision by mistake, the SQNR gains 3 dB. fp32, whose operands are exact, has
`SQNR_CEILING_FP32_DB` instead."""

SQNR_CEILING_FP32_DB = 152.2
"""Largest SQNR of the recipe fp32: 0.3 dB above that of exact sums rounded to fp32 once."""

FP32_ROUNDINGS = 3 * 2.0**-24
"""Bound on the relative error of x * (1 / s) * s in fp32, without the rounding to a code. It sums
the roundings of the reciprocal, of the product and of dequantising."""


def error_bound(fmt: ElementFormat, rule: str) -> float:
    """Return the largest |x - x_hat| in a block, in units of the block's scale.

    Under every rule that does not saturate, it is half a unit in the last place at the top of the
    range, 2^(emax - p) / 2; for e4m3, 16.

    Under floor, amax / s can reach 2^(emax + 1). Values above `max` are cut, by at most 64 for e4m3
    and 2 for e2m1. even bumps the scale if amax would round to 2^(emax + 1). So it cuts values up
    to the last midpoint, 2^(emax + 1) - 2^(emax - p) / 2: by at most 48 for e4m3 and 1 for e2m1.
    """
    half_ulp = 2.0 ** (fmt.emax - fmt.mantissa_bits) / 2
    highest = {"floor": 2.0 ** (fmt.emax + 1), "even": 2.0 ** (fmt.emax + 1) - half_ulp}.get(
        rule, fmt.max
    )
    return max(half_ulp, highest - fmt.max)


LOSS_LEFT: dict[str, float] = dict.fromkeys(SQNR_FLOORS_DB, 1e-3) | {
    "mxfp6_e3m2": 0.005,
    "mxfp4": 0.02,
    "mxfp4_quartet": 0.15,
    "nvfp4": 0.02,
    "nvfp4_4over6": 0.02,
    "qat_int8dyn_int4": 0.05,
}
"""Largest share of its first loss that a linear map may have left after learning another map.

The rest is the noise of y, 10^(-SQNR / 10) of its power, and this power was 0.4 of the first loss.
That is 6e-4 for 28.5 dB (measured: 5e-4 to 9e-4), 0.0024 for 22.3 dB (measured: 0.0031) and 0.011
for 15.7 dB (measured: 0.013 to 0.016). Weights that int4 cuts get no gradient and learn slowly
(0.017 to 0.040). For Quartet, the 12.4 dB of y alone leave 0.023; the 8 dB of its gradients, at the
large step of this test, leave the rest of the measured 0.09 to 0.11."""
