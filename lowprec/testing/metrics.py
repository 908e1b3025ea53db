"""Measures of the distance between a result and its reference."""

import math

import torch
from torch import Tensor


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Return the signal-to-quantisation-noise ratio, 20 log10(|reference| / |reference - value|).

    It is in dB and computed in float64. It is infinite if the two are equal, and NaN if either
    holds NaN, so that no comparison with a floor passes by accident.
    """
    if reference.shape != value.shape:  # Broadcasting would give a meaningless number.
        raise ValueError(f"shapes differ: {list(reference.shape)} and {list(value.shape)}")
    signal = reference.double().norm().item()
    noise = (reference.double() - value.double()).norm().item()
    if noise == 0.0:
        return math.inf
    if not math.isfinite(signal) or not math.isfinite(noise):
        return math.nan
    return 20.0 * math.log10(signal / noise) if signal else -math.inf


def fp32_accumulation_bound(
    a_MK: Tensor, b_NK: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return a bound [M, N] on the error of each element of a . b^T, accumulated in fp32 in any
    order and rounded to `out_dtype`.

        |error| <= gamma_K * |a| . |b|^T + half a unit in the last place of the output
        gamma_K  = K u / (1 - K u),  u = 2^-24

    Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, section 3.1. It is
    a bound, not an estimate: actual errors are far smaller.
    """
    a = a_MK.double()
    b = b_NK.double()
    unit = 2.0**-24
    terms = a.shape[1]
    # [M, K] . [N, K]^T -> [M, N]
    accumulated = terms * unit / (1 - terms * unit) * (a.abs() @ b.abs().t())
    product = (a @ b.t()).abs()
    out = torch.finfo(out_dtype)
    rounded = out.eps / 2 * (product + accumulated) + out.smallest_normal
    return accumulated + rounded
