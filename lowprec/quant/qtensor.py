"""QTensor: a matrix as codes and block scales. A plain dataclass: what it holds is what one sees."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowprec.formats.rounding import round_to_format
from lowprec.quant.spec import OperandSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class QTensor:
    """x ~ (values - zero_point) * scale, blockwise, over a matrix [R, K] in blocks of r x c.

    Invariants:
        * every element of `values` [R, K] is a value of `spec.element`, held in its storage dtype, or in fp32 if it was asked for decoded;
        * `scale` is fp32 [ceil(R / r), ceil(K / c)], positive, a power of two if the scale format is e8m0; NaN marks a block that held
          NaN or infinity. None if the spec has no scaling;
        * `zero_point` has the shape of `scale` and integral values in the element's range; None if the scaling is symmetric;
        * `saturated` is bool [R, K], true where rounding left the element's range; None unless it was asked for.
    """

    values: Tensor
    scale: Tensor | None
    zero_point: Tensor | None = None
    saturated: Tensor | None = None
    spec: OperandSpec

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales and zero points (four- and six-bit codes take a byte each until they are packed)."""
        return sum(t.nbytes for t in (self.values, self.scale, self.zero_point) if t is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(values - zero_point) * scale, computed in fp32, as a `dtype` tensor [R, K]."""
        if self.scale is None:
            values = self.values.to(torch.float32)
            # Compiled code may skip a conversion down and up again; rounding twice changes nothing (see `rounding`).
            return (round_to_format(values, self.spec.element) if torch.compiler.is_compiling() else values).to(dtype)
        if is_transposed(self.values):  # a strided pass is slow: compute in the order that lies in memory
            zero_point = None if self.zero_point is None else self.zero_point.t()
            return _dequantize(self.values.t(), self.scale.t(), zero_point, swapped(self.block)).t().to(dtype)
        return _dequantize(self.values, self.scale, self.zero_point, self.block).to(dtype)

    def t(self) -> "QTensor":
        """The transposed matrix: a view."""
        scaling = self.spec.scaling
        spec = self.spec if scaling is None else replace(self.spec, scaling=replace(scaling, block=swapped(scaling.block)))
        flip = lambda part: None if part is None else part.t()  # noqa: E731
        return QTensor(
            values=self.values.t(),
            scale=flip(self.scale),
            zero_point=flip(self.zero_point),
            saturated=flip(self.saturated),
            spec=spec,
        )

    @property
    def block(self) -> tuple[int, int]:
        """Rows x columns under one scale."""
        assert self.spec.scaling is not None
        return block_extents(self.shape, self.spec.scaling.block)


def block_extents(shape: torch.Size, block: tuple[int, int]) -> tuple[int, int]:
    """`block` with -1 replaced by the whole axis (at least 1, so that empty matrices have blocks too)."""
    rows, cols = (max(n, 1) if extent == -1 else extent for n, extent in zip(shape, block, strict=True))
    return rows, cols


def is_transposed(x_RK: Tensor) -> bool:
    """Whether the first axis is the one that is contiguous in memory."""
    return x_RK.stride(0) < x_RK.stride(1)


def to_blocks(x_RK: Tensor, block: tuple[int, int]) -> Tensor:
    """x as [R / r, r, K / c, c]: a view where the blocks divide the matrix, else zero-padded on the right and below."""
    (rows, cols), (r, c) = x_RK.shape, block
    if rows % r or cols % c:
        x_RK = torch.nn.functional.pad(x_RK, (0, -cols % c, 0, -rows % r))
    rows, cols = x_RK.shape
    return x_RK.unflatten(1, (cols // c, c)).unflatten(0, (rows // r, r))


def from_blocks(blocks: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `to_blocks`: [R / r, r, K / c, c] -> [R, K], the padding cut off."""
    return blocks.flatten(2, 3).flatten(0, 1)[: shape[0], : shape[1]]


def swapped(block: tuple[int, int]) -> tuple[int, int]:
    return block[1], block[0]


def _dequantize(values: Tensor, scale: Tensor, zero_point: Tensor | None, block: tuple[int, int]) -> Tensor:
    blocks = to_blocks(decode(values), block)
    if zero_point is not None:
        blocks = blocks - zero_point[:, None, :, None]
    return from_blocks(blocks * scale[:, None, :, None], values.shape)


def decode(values: Tensor) -> Tensor:
    """Codes in their storage dtype -> the same values in fp32."""
    if values.dtype != torch.float8_e4m3fn or values.device.type != "cpu" or torch.compiler.is_compiling():
        return values.to(torch.float32)
    # torch's own conversion is scalar on a CPU, ten times slower than this: an e4m3 code shifted into an fp16's exponent and
    # mantissa fields is the value over 2^8. It reads e4m3's NaN as 480, which a scaled block, whose scale is NaN then, can't show.
    shifted = values.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return shifted.view(torch.float16).to(torch.float32).mul_(256.0)
