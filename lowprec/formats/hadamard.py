"""The random Hadamard transform: an orthogonal mixing of neighbouring elements along the
contraction axis.

    T = diag(s) H_n / sqrt(n)        s: n signs
    H_1 = [1],  H_2n = [[H_n, H_n], [H_n, -H_n]]        (Sylvester's construction)

T is applied to every group of n elements of a row. It spreads an outlier over its group, so that
the group's largest magnitude, which decides the scale, falls towards that of gaussian values.

T T^t = 1, so a product is unchanged if both operands are transformed along the contraction axis:
(a T)(b T)^t = a b^t. Sources: arXiv 2502.20586, section 3.2; 2509.25149, section 4.2.

The sums run as a butterfly: log2(n) levels of additions in a fixed order. A matrix product would
not give the same bits on every device; the butterfly does. Compiled code calls it as an operator:
compiling its many small operations takes seconds for each shape.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.formats.random import uniform

SIZES = (16, 32, 64, 128)

NVFP4_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""Fixed signs of NVIDIA's recipe (arXiv 2509.25149)."""


@dataclass(frozen=True, kw_only=True)
class Hadamard:
    """A Hadamard transform with its signs. Both operands of a product share one transform."""

    size: int
    """Number n of elements in a group, one of `SIZES`."""
    signs: tuple[int, ...]
    """The n signs s, each 1 or -1."""
    fresh: bool = False
    """Flag: each pass of a layer draws its signs anew, from the key of the pass. `signs` are then
    1."""

    def __post_init__(self) -> None:
        if self.fresh and set(self.signs) != {1}:
            raise ValueError("a Hadamard transform with fresh signs has no fixed ones")
        if self.size not in SIZES:
            raise ValueError(
                f"a Hadamard transform has size {', '.join(map(str, SIZES))}; got {self.size}"
            )
        if len(self.signs) != self.size or any(sign not in (1, -1) for sign in self.signs):
            raise ValueError(
                f"a Hadamard transform of size {self.size} takes {self.size} signs, each 1 or -1"
            )

    @classmethod
    def seeded(cls, size: int, seed: int = 0) -> "Hadamard":
        """Return a transform with random signs. The same seed gives the same signs everywhere."""
        generator = torch.Generator().manual_seed(seed)
        return cls(
            size=size,
            signs=tuple((2 * torch.randint(2, (size,), generator=generator) - 1).tolist()),
        )

    @classmethod
    def plain(cls, size: int) -> "Hadamard":
        """Return a transform whose signs are all 1."""
        return cls(size=size, signs=(1,) * size)

    @classmethod
    def drawn(cls, size: int) -> "Hadamard":
        """Return a transform whose signs each pass draws anew."""
        return cls(size=size, signs=(1,) * size, fresh=True)

    def __str__(self) -> str:
        return f"H{self.size}(fresh)" if self.fresh else f"H{self.size}"

    def apply(self, x_RK: Tensor, key: Tensor | None = None) -> Tensor:
        """Return x T, fp32 [R, K'], where K' is K rounded up to a multiple of the size.

        x is padded with zeros, and the transform gives the padding non-zero values. `key`, int64
        [2], is that of fresh signs.
        """
        signs = self._signs(x_RK.device, key)
        apply = torch.ops.lowprec.hadamard if torch.compiler.is_compiling() else _transform
        if x_RK.stride(0) < x_RK.stride(1):  # x is column-major in memory
            return apply(x_RK.t(), signs, 0).t()
        return apply(x_RK, signs, 1)

    def invert(self, x_RK: Tensor, length: int, key: Tensor | None = None) -> Tensor:
        """Return the first `length` columns of x T^t, fp32 [R, length]."""
        signs = self._signs(x_RK.device, key)
        undo = torch.ops.lowprec.inverse_hadamard if torch.compiler.is_compiling() else _inverse
        return undo(x_RK, signs)[:, :length]

    def _signs(self, device: torch.device, key: Tensor | None) -> Tensor:
        """Return the signs, fp32 [n]."""
        if self.fresh:
            if key is None:
                raise ValueError(f"{self}: fresh signs need a key")
            return torch.where(uniform(key, (1, self.size))[0] < 0.5, 1.0, -1.0)
        return torch.tensor(self.signs, dtype=torch.float32, device=device)


def _transform(x: Tensor, signs: Tensor, dim: int) -> Tensor:
    """Return the groups of n elements along `dim`, each times T; fp32, padded to whole groups."""
    size = signs.shape[0]
    x = x.to(torch.float32)
    if short := -x.shape[dim] % size:
        x = torch.nn.functional.pad(x, (0, 0, 0, short) if dim == 0 else (0, short))
    groups = x.unflatten(dim, (-1, size)) * (signs[:, None] if dim == 0 else signs)
    # The scale 1 / sqrt(n) is applied last. Some devices would fuse a product that comes before
    # the additions with them (one rounding instead of two).
    return _butterfly(groups, dim + 1).mul_(size**-0.5).flatten(dim, dim + 1)


def _inverse(x_RK: Tensor, signs: Tensor) -> Tensor:
    """Return x T^t, fp32 [R, K]; K is a multiple of n."""
    size = signs.shape[0]
    groups = _butterfly(x_RK.to(torch.float32).unflatten(1, (-1, size)), 2).mul_(size**-0.5)
    return (groups * signs).flatten(1, 2)


@torch.library.custom_op("lowprec::inverse_hadamard", mutates_args=())
def _inverse_op(x_RK: Tensor, signs: Tensor) -> Tensor:
    return _inverse(x_RK, signs)


@_inverse_op.register_fake
def _(x_RK: Tensor, signs: Tensor) -> Tensor:
    return x_RK.new_empty(x_RK.shape, dtype=torch.float32)


@torch.library.custom_op("lowprec::hadamard", mutates_args=())
def _transform_op(x: Tensor, signs: Tensor, dim: int) -> Tensor:
    return _transform(x, signs, dim)


@_transform_op.register_fake
def _(x: Tensor, signs: Tensor, dim: int) -> Tensor:
    size = signs.shape[0]
    shape = list(x.shape)
    shape[dim] = -(-shape[dim] // size) * size
    return x.new_empty(shape, dtype=torch.float32)


def _butterfly(x: Tensor, dim: int) -> Tensor:
    """Return x H along `dim`, whose length is a power of two."""
    size = x.shape[dim]
    half = 1
    while half < size:
        first, second = x.unflatten(dim, (-1, 2, half)).unbind(dim + 1)
        x = torch.stack((first + second, first - second), dim + 1).flatten(dim, dim + 2)
        half *= 2
    return x
