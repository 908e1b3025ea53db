"""Element formats: the numbers that one element of a quantised tensor can hold.

A floating-point format with e exponent bits, m mantissa bits and bias b holds, for a sign s,

    normal numbers      (-1)^s * 2^(E - b) * (1 + M / 2^m)    E >= 1
    subnormal numbers   (-1)^s * 2^(1 - b) * (M / 2^m)

An integer format (`exponent_bits == 0`) holds the integers from `min` to `max`.

All formats but `fp32`, `bf16` and `fp16` saturate: a value beyond `max` becomes `max`. `fp32`,
`bf16` and `fp16` overflow to infinity as IEEE 754 says, because dynamic loss scaling finds its
overflows by looking for infinities.

Sources: OCP 8-bit Floating Point Specification 1.0 (e4m3, e5m2); OCP Microscaling Formats 1.0,
section 5.3 (e3m2, e2m3, e2m1); arXiv 2412.19437, section 3.3.3 (e5m6, for cached inputs of the
linear layer after attention). The largest value of e5m6 is not published. We take the highest
exponent as reserved for infinity and NaN, as in e5m2 and fp16.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class ElementFormat:
    """One element format. Two formats with equal fields hold the same numbers."""

    name: str
    exponent_bits: int
    """Number of exponent bits; 0 for an integer format."""
    mantissa_bits: int
    """Number of mantissa bits, without the implicit leading one."""
    bias: int
    """Exponent bias b of the equations above."""
    largest: tuple[int, int]
    """Largest finite value as (n, e), n * 2^e. These are integers because torch.compile makes
    variables of the floats that it finds in objects."""
    saturates: bool = True
    """Flag: values beyond the range become `min` or `max`; otherwise they become infinity."""
    storage: torch.dtype
    """torch dtype that holds the codes: the format's own dtype if torch has one, uint8 for packed
    codes."""

    @property
    def max(self) -> float:
        """Largest finite value."""
        return self.largest[0] * 2.0 ** self.largest[1]

    @property
    def min(self) -> float:
        """Smallest (most negative) finite value."""
        return -self.max - 1.0 if self.is_integer else -self.max

    @property
    def is_integer(self) -> bool:
        """Flag: the format holds integers."""
        return self.exponent_bits == 0

    @property
    def bits(self) -> int:
        """Width of a code in bits, with the sign."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def packed(self) -> bool:
        """Flag: torch has no dtype for the format, so its codes are kept as bytes, which several
        codes share if a code is not a whole number of bytes wide (see `packing`)."""
        return self.storage == torch.uint8

    @property
    def emax(self) -> int:
        """Exponent of the largest value: max = m * 2^emax with 1 <= m < 2."""
        return math.frexp(self.max)[1] - 1

    @property
    def min_normal(self) -> float:
        """Smallest positive normal number."""
        return 2.0 ** (1 - self.bias)

    def __str__(self) -> str:
        return self.name


def _float(
    name: str, e: int, m: int, *, largest: float, storage: torch.dtype, saturates: bool = True
) -> ElementFormat:
    fraction, exponent = math.frexp(largest)
    return ElementFormat(
        name=name,
        exponent_bits=e,
        mantissa_bits=m,
        bias=2 ** (e - 1) - 1,
        largest=(int(fraction * 2 ** (m + 1)), exponent - m - 1),
        saturates=saturates,
        storage=storage,
    )


def _ieee(name: str, e: int, m: int, dtype: torch.dtype) -> ElementFormat:
    return _float(name, e, m, largest=torch.finfo(dtype).max, storage=dtype, saturates=False)


def _integer(name: str, bits: int, storage: torch.dtype) -> ElementFormat:
    return ElementFormat(
        name=name,
        exponent_bits=0,
        mantissa_bits=bits - 1,
        bias=0,
        largest=(2 ** (bits - 1) - 1, 0),
        storage=storage,
    )


FP32 = _ieee("fp32", 8, 23, torch.float32)
BF16 = _ieee("bf16", 8, 7, torch.bfloat16)
FP16 = _ieee("fp16", 5, 10, torch.float16)
E5M6 = _float("e5m6", 5, 6, largest=65024.0, storage=torch.uint8)
E4M3 = _float("e4m3", 4, 3, largest=448.0, storage=torch.float8_e4m3fn)
E5M2 = _float("e5m2", 5, 2, largest=57344.0, storage=torch.float8_e5m2)
E3M2 = _float("e3m2", 3, 2, largest=28.0, storage=torch.uint8)
E2M3 = _float("e2m3", 2, 3, largest=7.5, storage=torch.uint8)
E2M1 = _float("e2m1", 2, 1, largest=6.0, storage=torch.uint8)
INT8 = _integer("int8", 8, torch.int8)
INT4 = _integer("int4", 4, torch.uint8)

FORMATS = {
    fmt.name: fmt for fmt in (FP32, BF16, FP16, E5M6, E4M3, E5M2, E3M2, E2M3, E2M1, INT8, INT4)
}
