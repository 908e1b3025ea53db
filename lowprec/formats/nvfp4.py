"""NVFP4's two levels of scales: one e4m3 scale for a block under one fp32 scale for the matrix.

The order of operations is Transformer Engine's; each operation is in fp32 and correctly rounded
(arXiv 2509.25149, appendix B). With amax_t of the matrix, amax_b of the block and bound = 6 * 448:

    s_enc = min(bound / amax_t, FLT_MAX), or 1 if amax_t = 0
    s_dec = 1 / s_enc
    S     = e4m3(min(amax_b * (s_enc * (1 / 6)), 448))
    enc_b = min(1 / (S * s_dec), FLT_MAX)
    q     = e2m1(clamp(x * enc_b, -6, 6))
    x_hat = q * S * s_dec

Four over six (arXiv 2512.02010, in the order of its authors' code and of Transformer Engine) takes
bound = 6 * 256, which leaves room for a second scale, under which the block's largest magnitude
becomes 4 instead of 6:

    base  = (amax_b / 6) * s_enc
    S, S4 = e4m3(min(base, 448)), e4m3(min(base * 3/2, 448))
    error = sum (q * S * amax_t / bound - x)^2, or the sum of magnitudes

A block takes S4 if its error is strictly smaller. Errors of tensors with tiny or huge values would
leave fp32's range, so x and amax_t are multiplied by a power of two first, which changes no other
bit.

A prescale f maps amax_b to 6 f: 6 f takes the place of 6, in `bound` too. S is rounded to nearest,
down to 16/17 of the exact scale at most. So with f = 16/17, x * enc_b never leaves [-6, 6], and
stochastic rounding has no bias (arXiv 2601.22813; S must be a normal number of e4m3).

A block of zeros has S = 0 and codes of zero (enc_b is FLT_MAX). A matrix that holds NaN or infinity
gets a NaN s_dec and dequantises to NaN as a whole.
"""

import torch
from torch import Tensor

from lowprec.formats.element import E4M3, FP32, ElementFormat
from lowprec.formats.rounding import round_to_format
from lowprec.formats.scaling import BlockScaling

_FOUR_OVER_SIX_LARGEST_SCALE = 256


def largest_code(fmt: ElementFormat, scaling: BlockScaling) -> float:
    """Return the magnitude that a block's amax is mapped to: 6, or 6 times the prescale."""
    above, below = scaling.prescale_ratio
    return fmt.max * (above / below)


def bound(fmt: ElementFormat, scaling: BlockScaling) -> float:
    """Return the largest product of an element and a block scale."""
    largest_scale = _FOUR_OVER_SIX_LARGEST_SCALE if scaling.four_over_six else E4M3.max
    return largest_code(fmt, scaling) * largest_scale


def tensor_scales(
    amax_t: Tensor, fmt: ElementFormat, scaling: BlockScaling
) -> tuple[Tensor, Tensor]:
    """Return (s_enc, s_dec), fp32 scalars, from the matrix's amax."""
    s_enc = _over(torch.full_like(amax_t, bound(fmt, scaling)), amax_t).clamp(max=FP32.max)
    s_enc = torch.where(amax_t == 0, 1.0, s_enc)
    s_dec = _over(torch.ones_like(s_enc), s_enc)
    poisoned = ~amax_t.isfinite()
    return s_enc, s_dec.masked_fill(poisoned, torch.nan)


def scale_per_unit(s_enc: Tensor, fmt: ElementFormat, scaling: BlockScaling) -> Tensor:
    """Return s_enc * (1 / 6), by which a block's amax is multiplied."""
    inverse = 1.0 / largest_code(fmt, scaling)
    return s_enc * torch.tensor(inverse, dtype=torch.float32, device=s_enc.device)


def block_scale(amax: Tensor, s_enc: Tensor, fmt: ElementFormat, scaling: BlockScaling) -> Tensor:
    """Return S of each block, fp32 with values of e4m3."""
    base = (amax * scale_per_unit(s_enc, fmt, scaling)).clamp(max=FP32.max)
    return round_to_format(base, E4M3)


def two_block_scales(
    amax: Tensor, s_enc: Tensor, fmt: ElementFormat, scaling: BlockScaling
) -> tuple[Tensor, Tensor]:
    """Return S and S4 of each block under four over six, fp32 with values of e4m3."""
    base = _over(amax, torch.full_like(amax, largest_code(fmt, scaling))) * s_enc
    return round_to_format(base, E4M3), round_to_format(base * 1.5, E4M3)


def encoding_scale(scale: Tensor, s_dec: Tensor) -> Tensor:
    """Return enc_b. Elements are multiplied by it before they are rounded."""
    return _over(torch.ones_like(scale), scale * s_dec).clamp(max=FP32.max)


def dequantized_by_amax(codes: Tensor, amax_t: Tensor, bound: float) -> Tensor:
    """Return codes * amax_t / bound: the values that four over six compares with x.

    Args:
        codes: q * S of each element, fp32.
    """
    product = codes * amax_t
    return _over(product, torch.full((), bound, dtype=torch.float32, device=product.device))


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the fp32 quotient, correctly rounded on every device (see `scaling`)."""
    return (numerator.double() / denominator.double()).float()
