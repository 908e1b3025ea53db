"""Random numbers for stochastic rounding, computed from a key and an element's row and column.

    (a, b)  = scramble(key)
    h[r, c] = mix(mix(r + a) xor mix(mix(c + b) + 0x632BE5AB))
    u[r, c] = floor(h[r, c] / 2^8) / 2^24        in [0, 1)

The draws depend on nothing else. They are the same on every device, in eager and in compiled code,
and in every memory layout, and a fused kernel can compute each one where it needs it.

`scramble` is a bijection of the 64 bits of a key, four rounds of a Feistel network with `mix` as
its round function. Keys may therefore be seeds or counts: without it, the keys [s, 0] and
[s + 1, 0] would give the same numbers, one row apart. Keys of uses, layers and steps are derived
by the same bijection (`derive_key`), so none of them is another one plus a small number.

`mix` is a bijection of 32-bit integers in which every input bit flips each output bit with a
probability close to 1/2. It takes two multiplications and three xor-shifts; the constants are from
Wellons' search, "Prospecting for Hash Functions", 2018.
"""

import torch
from torch import Tensor

ROUNDS = (0x1E3779B9, 0x3C6EF372, 0x5AA66D2B, 0x78DDE6E4)
"""Numbers that make the rounds of `scramble` differ: the first four multiples of the golden ratio's
32 bits, without the sign."""


def key_from_generator(generator: torch.Generator, device: torch.device) -> Tensor:
    """Return a key, int64 [2] on `device`, drawn from `generator`."""
    return torch.randint(-(2**31), 2**31, (2,), generator=generator, device=generator.device).to(
        device
    )


def derive_key(key: Tensor, number: int | Tensor) -> Tensor:
    """Return a new key, int64 [2], for the `number`th use of `key`."""
    low, high = scramble(key)
    number = number.to(torch.int32) if isinstance(number, Tensor) else number
    return torch.stack(_feistel(low + number, high)).to(torch.int64)


def scramble(key: Tensor) -> tuple[Tensor, Tensor]:
    """Return two int32 words in which every bit depends on every bit of both words of a key."""
    words = key.to(torch.int32)
    return _feistel(words[0], words[1])


def _feistel(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return a bijection of two int32 words."""
    high = high ^ mix(low + ROUNDS[0])
    low = low ^ mix(high + ROUNDS[1])
    high = high ^ mix(low + ROUNDS[2])
    low = low ^ mix(high + ROUNDS[3])
    return low, high


def uniform(key: Tensor, shape: tuple[int, int], *, transposed: bool = False) -> Tensor:
    """Return u, fp32 [rows, cols], whose values are multiples of 2^-24.

    Args:
        key: integers [2]; the low 32 bits of each are used.
        shape: (rows, cols).
        transposed: store the result column-major (the numbers are the same).
    """
    rows, cols = (torch.arange(n, dtype=torch.int32, device=key.device) for n in shape)
    low, high = scramble(key)
    row = mix(rows + low)[:, None]
    col = mix(mix(cols + high) + 0x632BE5AB)[None, :]
    bits = mix((row.t() ^ col.t()) if transposed else (row ^ col))
    u = (_shift(bits, 8)).to(torch.float32).mul_(2.0**-24)
    return u.t() if transposed else u


def mix(x: Tensor) -> Tensor:
    """Return a hash of each int32, as int32. Arithmetic wraps around."""
    x = (x ^ _shift(x, 16)) * 0x7FEB352D
    x = (x ^ _shift(x, 15)) * -0x7B935975  # 0x846CA68B as a signed number
    return x ^ _shift(x, 16)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Return x >> bits, a logical shift: zeros move in from the left."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)
