"""NVFP4's two levels of scales: one e4m3 scale for a block under one fp32 scale for the matrix.

The order of operations is Transformer Engine's; each operation is in fp32 and correctly rounded
(arXiv 2509.25149, appendix B). With amax_t of the matrix, amax_b of the block and bound = 6 * 448:

    s_enc = min(bound / amax_t, FLT_MAX), or 1 if amax_t = 0
    s_dec = 1 / s_enc
    S     = e4m3(min(amax_b * (s_enc * (1 / 6)), 448))
    enc_b = min(1 / (S * s_dec), FLT_MAX)
    q     = e2m1(clamp(x * enc_b, -6, 6))
    x_hat = q * S * s_dec

Four over six (arXiv 2512.02010) takes bound = 6 * 256. This leaves room for a second scale, S4 =
e4m3(3/2 amax_b ...), under which the block's largest magnitude becomes 4 instead of 6. A block
takes S4 if its squared error is strictly smaller.

A block of zeros has S = 0 and codes of zero (enc_b is FLT_MAX). A matrix that holds NaN or infinity
gets a NaN s_dec and dequantises to NaN as a whole.
"""

import torch
from torch import Tensor

from lowprec.formats.element import E4M3, FP32, ElementFormat
from lowprec.formats.rounding import round_to_format
from lowprec.formats.scaling import BlockScaling

_FOUR_OVER_SIX_LARGEST_SCALE = 256


def tensor_scales(
    amax_t: Tensor, fmt: ElementFormat, scaling: BlockScaling
) -> tuple[Tensor, Tensor]:
    """Return (s_enc, s_dec), fp32 scalars, from the matrix's amax."""
    largest_scale = _FOUR_OVER_SIX_LARGEST_SCALE if scaling.four_over_six else E4M3.max
    s_enc = _over(torch.full_like(amax_t, fmt.max * largest_scale), amax_t).clamp(max=FP32.max)
    s_enc = torch.where(amax_t == 0, 1.0, s_enc)
    s_dec = _over(torch.ones_like(s_enc), s_enc)
    poisoned = ~amax_t.isfinite()
    return s_enc, s_dec.masked_fill(poisoned, torch.nan)


def block_scale(amax: Tensor, s_enc: Tensor, fmt: ElementFormat, stretch: float = 1.0) -> Tensor:
    """Return S of each block, fp32 with values of e4m3. `stretch` 1.5 gives S4."""
    per_unit = s_enc * torch.tensor(1.0 / fmt.max, dtype=torch.float32, device=amax.device)
    base = (amax * per_unit).clamp(max=FP32.max)
    return round_to_format(base * stretch if stretch != 1.0 else base, E4M3)


def encoding_scale(scale: Tensor, s_dec: Tensor) -> Tensor:
    """Return enc_b. Elements are multiplied by it before they are rounded."""
    return _over(torch.ones_like(scale), scale * s_dec).clamp(max=FP32.max)


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the fp32 quotient, correctly rounded on every device (see `scaling`)."""
    return (numerator.double() / denominator.double()).float()
