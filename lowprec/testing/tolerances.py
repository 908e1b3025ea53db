"""Bounds on numerical quality, each with its reason.

SQNR floors. Rounding a value x = m * 2^e to p mantissa bits (the leading one not counted) leaves an
error that is uniform over one unit in the last place, 2^(e - p), of variance 4^(e - p) / 12.
Against the signal x^2, averaged over a distribution of x,

    noise / signal = 1 / (12 * 4^p * rho)      rho = E[x^2] / E[4^floor(log2 |x|)], 1.85 for a gaussian

and the noise of a product's two operands adds up. That predicts, for a gaussian,

    operands          p        dB        operands          p        dB
    bf16 . bf16       7, 7     52.6      e4m3 . e4m3       3, 3     28.5
    fp16 . fp16       10, 10   70.7      e5m2 . e4m3       2, 3     24.5

and these are what is measured, to 0.1 dB, whichever power of two the scale is. A scale that is no
power of two (fp32) makes rho a little larger where one scale serves few values, which is worth up
to 0.7 dB in heavy tails. fp32 itself has exact operands; its floor is the accumulation's.
Saturation (mxfp4's floor rule), integer steps and the mask of the straight-through gradient (QAT's
wgrad) add to this, so those floors come from measurement: shape SQNR_SHAPE, 5 seeds, the smallest
value. For gaussian operands under an amax scale `theory` predicts all of this by integration, and a
test holds the floors of the MX and NVFP4 recipes to it.

Every floor is about 0.3 dB (fp32: 0.5) below prediction or measurement, whichever is lower: more
than the spread between seeds, which is below 0.2 dB, and 0.4 dB for QAT's wgrad in heavy tails; and
far less than a mistake costs: a lost mantissa bit 6 dB of its operand, an operand left in high
precision +3 dB.
"""

from lowprec.formats.element import ElementFormat

SQNR_FLOORS_DB: dict[str, dict[str, tuple[float, float, float]]] = {
    # recipe                 distribution      fprop  dgrad  wgrad
    "fp32": {"gaussian": (131.7, 131.7, 133.4), "heavy_tailed": (131.7, 131.6, 133.4)},
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
"""How far above its floor a recipe may be. Leaving one of two equal operands in high precision
gains 3 dB: that is not the recipe."""

FP32_ROUNDINGS = 3 * 2.0**-24
"""Relative error of x * (1 / s) * s in fp32 beside the rounding to a code: of the reciprocal, of
the product, of dequantising."""


def error_bound(fmt: ElementFormat, rule: str) -> float:
    """The largest |x - x_hat| in a block, in units of its scale.

    Half a unit in the last place at the top of the range, 2^(emax - p) / 2, e.g. 16 for e4m3, under
    every rule that does not saturate. floor lets amax / s reach 2^(emax + 1): what lies above `max`
    is cut, by 64 at the most for e4m3, 2 for e2m1. even bumps the scale where amax would round to
    2^(emax + 1), so it cuts up to the last midpoint, 2^(emax + 1) - 2^(emax - p) / 2: 48 for e4m3,
    1 for e2m1.
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
"""The share of its first loss that a linear map may have left after learning another one: what
stays is y's own noise, 10^(-SQNR / 10) of its power, which was 0.4 of the first loss. With 28.5 dB
that is 6e-4 (measured: 5e-4 to 9e-4), with 22.3 dB 0.0024 (0.0031), with 15.7 dB 0.011 (0.013 to
0.016). Weights that int4 cuts get no gradient and are slow to learn (0.017 to 0.040). Quartet's
12.4 dB alone leave 0.023; its gradients' 8 dB, at this test's large step, the rest of 0.09 to
0.11."""
