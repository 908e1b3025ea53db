"""Packing of codes into bytes: of 4, 6 or 12 bits, several of which share bytes, or of 8 bits.

A row of codes is one string of bits, lowest bit first: code j of b bits occupies bits
[b j, b j + b), and byte i holds bits [8 i, 8 i + 8). Two 4-bit codes therefore make one byte with
the even column in its low half, as in every FP4 hardware and checkpoint format. Four 6-bit codes
make three bytes, and so do two 12-bit codes. A row is padded with zero codes to a whole group.
"""

import math

import torch
from torch import Tensor


def pack(codes_RK: Tensor, bits: int) -> Tensor:
    """Pack integer codes [R, K] into uint8 [R, B]; B bytes hold the fewest whole groups of K codes.

    The result has the memory order of `codes_RK`. Bits above the low `bits` of a code must be zero.
    """
    group, size = _group(bits)
    codes, dim = _in_memory_order(codes_RK)
    if short := -codes.shape[dim] % group:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, short) if dim == 0 else (0, short))
    parts = codes.unflatten(dim, (-1, group)).unbind(dim + 1)
    wide = torch.uint8 if size == 1 else torch.int32
    words = parts[0].to(wide)
    for j in range(1, group):
        words = words | (parts[j].to(wide) << (bits * j))
    if size > 1:
        words = (
            torch.stack([(words >> (8 * i)) & 0xFF for i in range(size)], dim + 1)
            .to(torch.uint8)
            .flatten(dim, dim + 1)
        )
    return words.t() if dim == 0 else words


def packed_length(length: int, bits: int) -> int:
    """Return the number of bytes B of a packed row of `length` codes."""
    group, size = _group(bits)
    return -(-length // group) * size


def unpack(packed_RB: Tensor, bits: int, length: int) -> Tensor:
    """Unpack uint8 [R, B], as `pack` makes it, into int16 codes [R, length].

    The result has the memory order of `packed_RB`.
    """
    group, size = _group(bits)
    packed, dim = _in_memory_order(packed_RB)
    parts = packed.unflatten(dim, (-1, size)).unbind(dim + 1)
    words = parts[0].to(torch.int16 if size == 1 else torch.int32)
    for i in range(1, size):
        words = words | (parts[i].to(torch.int32) << (8 * i))
    mask = (1 << bits) - 1
    codes = torch.stack(
        [((words >> (bits * j)) & mask).to(torch.int16) for j in range(group)], dim + 1
    ).flatten(dim, dim + 1)
    return codes[:length].t() if dim == 0 else codes[:, :length]


def _in_memory_order(x_RK: Tensor) -> tuple[Tensor, int]:
    """Return x or its transpose, whichever is contiguous along the last axis, and the axis on which
    the codes of a row then lie."""
    return (x_RK.t(), 0) if x_RK.stride(0) < x_RK.stride(1) else (x_RK, 1)


def _group(bits: int) -> tuple[int, int]:
    """Return the numbers of codes and of bytes in the smallest group that fills whole bytes.

    Raises ValueError for widths whose group has more than 32 bits, such as 5 and 7.
    """
    width = math.lcm(bits, 8)
    if width > 32:
        raise ValueError(f"codes of {bits} bits can't be packed: a group of them has {width} bits")
    return width // bits, width // 8
