"""How far a result is from what it stands for."""

import math

import torch
from torch import Tensor


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Signal-to-quantisation-noise ratio, 20 log10(|reference| / |reference - value|) in dB;
    computed in float64.

    Infinite where they are equal, NaN where either holds NaN, so that no comparison with a floor
    passes by accident.
    """
    if reference.shape != value.shape:  # broadcasting would give a number that means nothing
        raise ValueError(f"shapes differ: {list(reference.shape)} and {list(value.shape)}")
    signal, noise = (
        reference.double().norm().item(),
        (reference.double() - value.double()).norm().item(),
    )
    if noise == 0.0:
        return math.inf
    if not math.isfinite(signal) or not math.isfinite(noise):
        return math.nan
    return 20.0 * math.log10(signal / noise) if signal else -math.inf


def fp32_accumulation_bound(
    a_MK: Tensor, b_NK: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The largest error, element by element, of a . b^T accumulated in fp32 in any order and
    rounded to `out_dtype`.

    |error| <= gamma_K * |a| . |b|^T with gamma_K = K u / (1 - K u), u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms,
    2nd edition, section 3.1), plus half a unit in the last place of the output. A bound, not an
    estimate: results lie far inside of it.
    """
    a, b = a_MK.double(), b_NK.double()
    unit, terms = 2.0**-24, a.shape[1]
    accumulated = terms * unit / (1 - terms * unit) * (a.abs() @ b.abs().t())
    rounded = (
        torch.finfo(out_dtype).eps / 2 * ((a @ b.t()).abs() + accumulated)
        + torch.finfo(out_dtype).smallest_normal
    )
    return accumulated + rounded
