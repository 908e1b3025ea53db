"""Rounding fp32 values to an element format.

A value x with exponent E must become a multiple of its unit in the last place, u = 2^(max(E, E_min)
- m). 2^E comes from x's bits (the exponent field with a zero mantissa is exactly 2^E), never from a
logarithm. All other steps are plain arithmetic, so the result is the same on every device and in
compiled code.

    nearest       Ties go to even. Adding C = 1.5 * 2^23 * u moves x to where fp32 itself has the
                  spacing u, so the addition rounds; subtracting C again is exact. C's own
                  significand is even, so ties go to the even multiple.
    toward_zero   floor(|x| / u) * u
    stochastic    Away from zero with probability |x| / u - floor(|x| / u), else toward zero; the
                  mean is x (arXiv 1502.02551, section 2.2). Probabilities are multiples of 2^-24;
                  a value that the format holds never changes.

Carries need no special case: 31.55 in e4m3 has u = 2 and becomes 32, which the format holds.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from lowprec.formats.element import ElementFormat

Rounding = Literal["nearest", "stochastic", "toward_zero"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)

_EXPONENT_FIELD = 0x7F800000


def round_to_format(
    x: Tensor,
    fmt: ElementFormat,
    rounding: Rounding = "nearest",
    *,
    noise: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Round each element to a value of `fmt`.

    Args:
        x: fp32, any shape. NaN stays NaN. Infinity and every other value beyond the range saturates
            or overflows, depending on `fmt.saturates`.
        noise: for stochastic rounding, fp32 of x's shape, uniform in [0, 1) (see `random.uniform`).
        inplace: allow overwriting `x`, which saves a temporary of its size.
    Returns:
        fp32, the shape of `x`; every element is a value of `fmt`.
    Raises:
        ValueError: stochastic rounding without noise.
    """
    if rounding == "stochastic" and noise is None:
        raise ValueError("stochastic rounding needs random numbers: a generator or a key")
    if rounding != "stochastic":
        noise = None
    if fmt.saturates:
        x = x.clamp_(fmt.min, fmt.max) if inplace else x.clamp(fmt.min, fmt.max)
        return _to_grid(x, fmt) if rounding == "nearest" else _to_neighbour(x, fmt, noise)
    return _cast(x, fmt) if rounding == "nearest" else _cast_to_neighbour(x, fmt, noise)


def round_to_integers(
    x: Tensor, rounding: Rounding = "nearest", *, noise: Tensor | None = None
) -> Tensor:
    """Round each element to an integer of any size, fp32 in and out.

    Arguments are as in `round_to_format`.
    """
    if rounding == "nearest":
        return x.round()
    if rounding == "toward_zero":
        return x.trunc()
    assert noise is not None
    return _raise_at_random(x, noise)


def exceeds_range(x: Tensor, fmt: ElementFormat) -> Tensor:
    """Return a mask of the elements that round to a value outside [min, max] on the unbounded grid
    of `fmt`.

    The clamp cuts the straight-through gradient at these elements. fp32 in, bool out, same shape.
    `min` and `max` themselves are inside the range.
    """
    if not fmt.saturates:
        return _cast(x, fmt).isinf()
    # The clamp keeps C finite and does not change the result.
    rounded = _to_grid(x.clamp(2 * fmt.min, 2 * fmt.max), fmt)
    return (rounded < fmt.min) | (rounded > fmt.max)


def _to_grid(x: Tensor, fmt: ElementFormat) -> Tensor:
    """Round to nearest on the unbounded grid of `fmt`, by adding and subtracting C."""
    if fmt.is_integer:
        return x.round()
    magic = _power(x, fmt).mul_(1.5 * 2.0 ** (23 - fmt.mantissa_bits))
    # copysign_: a negative number that rounds to zero becomes -0.
    return torch.add(x, magic).sub_(magic).copysign_(x)


def _to_neighbour(x: Tensor, fmt: ElementFormat, noise: Tensor | None) -> Tensor:
    """Round toward zero, or with noise to one of the two neighbours at random."""
    if fmt.is_integer:
        return round_to_integers(x, "toward_zero" if noise is None else "stochastic", noise=noise)
    power = _power(x, fmt)
    steps = x.abs().mul_(_reciprocal(power)).mul_(2.0**fmt.mantissa_bits)  # exact
    steps = steps.floor_() if noise is None else _raise_at_random(steps, noise)
    return steps.mul_(power.mul_(2.0**-fmt.mantissa_bits)).copysign_(x)


def _raise_at_random(x: Tensor, noise: Tensor) -> Tensor:
    """Return floor(x), plus 1 with probability x - floor(x)."""
    low = x.floor()
    return low + (noise < x - low)


def _power(x: Tensor, fmt: ElementFormat) -> Tensor:
    """Return 2^max(E, E_min) as a new tensor."""
    return (x.view(torch.int32) & _EXPONENT_FIELD).view(torch.float32).clamp_(min=fmt.min_normal)


def _reciprocal(power: Tensor) -> Tensor:
    """Return 1 / 2^E exactly, for -126 <= E <= 126. A division could be approximated."""
    return (0x7F000000 - power.view(torch.int32)).view(torch.float32)


def _cast(x: Tensor, fmt: ElementFormat) -> Tensor:
    """Convert fp32 to bf16 or fp16 and back to fp32, overflowing to infinity."""
    if fmt.mantissa_bits == 23:
        return x
    if not torch.compiler.is_compiling():
        return x.to(fmt.storage).to(torch.float32)
    # Inductor treats a conversion down and up again as a leftover of autocast and removes it (its
    # `pointless_convert` pass), which would undo the rounding. It must keep arithmetic.
    if fmt.storage == torch.bfloat16:
        return (x.to(torch.bfloat16).view(torch.int16).to(torch.int32) << 16).view(torch.float32)
    return _overflow(_to_grid(x.clamp(2 * fmt.min, 2 * fmt.max), fmt), fmt)


def _cast_to_neighbour(x: Tensor, fmt: ElementFormat, noise: Tensor | None) -> Tensor:
    """Round fp32 to values of bf16 or fp16 toward zero, or with noise to one of the two neighbours.

    Toward zero, a finite number beyond the range becomes the largest value. At random, it becomes
    the largest value or infinity.
    """
    if fmt.mantissa_bits == 23:
        return x
    if fmt.exponent_bits == 8:
        # bf16 is the upper half of the fp32 bits. A carry out of the lower half gives the next
        # number.
        dropped = 23 - fmt.mantissa_bits
        bits = x.view(torch.int32)
        raised = bits if noise is None else bits + (noise * 2**dropped).to(torch.int32)
        return torch.where(x.isfinite(), raised & -(1 << dropped), bits).view(torch.float32)
    rounded = _to_neighbour(x.clamp(2 * fmt.min, 2 * fmt.max), fmt, noise)
    bounded = rounded.clamp(fmt.min, fmt.max) if noise is None else _overflow(rounded, fmt)
    return torch.where(x.isinf(), x, bounded)


def _overflow(rounded: Tensor, fmt: ElementFormat) -> Tensor:
    """Replace values beyond the range by infinity of the same sign."""
    return torch.where(
        rounded.abs() > fmt.max, torch.full_like(rounded, torch.inf).copysign_(rounded), rounded
    )
