"""Rounding fp32 values to an element format, to nearest with ties to even.

The method is arithmetic, so that it is the same on every device and inside compiled code. A value x with exponent E must become a
multiple of its unit in the last place, u = 2^(max(E, E_min) - m). Adding C = 1.5 * 2^23 * u pushes x to where fp32 itself has
the spacing u: the addition rounds to nearest even, and subtracting C again is exact. C's own significand is even, so ties go to the
even multiple. 2^E comes from x's bits (the exponent field with a zero mantissa is exactly 2^E), never from a logarithm.

Carries need no special case: 31.55 in e4m3 has u = 2 and becomes 32, which the format holds.
"""

import torch
from torch import Tensor

from lowprec.formats.element import ElementFormat

_EXPONENT_FIELD = 0x7F800000


def round_to_format(x: Tensor, fmt: ElementFormat, *, inplace: bool = False) -> Tensor:
    """The nearest value of `fmt` to each element, ties to even.

    Args:
        x: fp32, any shape. NaN stays NaN. Infinity and whatever else lies beyond the range saturates or overflows as `fmt` says.
        inplace: overwrite `x` (which saves a temporary of its size).
    Returns:
        fp32, the shape of `x`; every element is a value of `fmt`.
    """
    if not fmt.saturates:
        return _cast(x, fmt)
    return _to_grid(x.clamp_(fmt.min, fmt.max) if inplace else x.clamp(fmt.min, fmt.max), fmt)


def exceeds_range(x: Tensor, fmt: ElementFormat) -> Tensor:
    """Where the unbounded grid of `fmt` rounds `x` to a value outside [min, max]: there the clamp cuts the straight-through gradient.

    fp32 in, bool out, same shape. Both ends of the range are inside.
    """
    if not fmt.saturates:
        return _cast(x, fmt).isinf()
    rounded = _to_grid(x.clamp(2 * fmt.min, 2 * fmt.max), fmt)  # the clamp keeps C finite and changes no answer
    return (rounded < fmt.min) | (rounded > fmt.max)


def _to_grid(x: Tensor, fmt: ElementFormat) -> Tensor:
    if fmt.is_integer:
        return x.round()
    power = (x.view(torch.int32) & _EXPONENT_FIELD).view(torch.float32)
    magic = power.clamp_(min=fmt.min_normal).mul_(1.5 * 2.0 ** (23 - fmt.mantissa_bits))
    return torch.add(x, magic).sub_(magic).copysign_(x)  # a negative number that rounds to zero is -0


def _cast(x: Tensor, fmt: ElementFormat) -> Tensor:
    """fp32 -> bf16 or fp16 -> fp32, overflowing to infinity."""
    if fmt.storage == torch.float32:
        return x
    if not torch.compiler.is_compiling():
        return x.to(fmt.storage).to(torch.float32)
    # Inductor takes a conversion down and up again for a leftover of autocast and removes it (its `pointless_convert` pass), which
    # would undo the rounding. Arithmetic it must keep.
    if fmt.storage == torch.bfloat16:
        return (x.to(torch.bfloat16).view(torch.int16).to(torch.int32) << 16).view(torch.float32)
    rounded = _to_grid(x.clamp(2 * fmt.min, 2 * fmt.max), fmt)
    return torch.where(rounded.abs() > fmt.max, torch.full_like(rounded, torch.inf).copysign_(rounded), rounded)
