"""QTensor: a matrix as codes and block scales, in a plain dataclass. TwoWay: a matrix and its
transpose as operands."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lowprec.formats import encoding
from lowprec.formats.element import E4M3, E5M2, ElementFormat
from lowprec.formats.packing import pack, unpack
from lowprec.formats.rounding import round_to_format
from lowprec.quant.spec import OperandSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class QTensor:
    """A matrix [R, K] in blocks of r x c: x ~ (values - zero_point) * scale * tensor_scale.

    It is either stored, in the fewest bytes, or decoded, in fp32, for a consumer that would decode
    it at once.

    Invariants:
        * `data`, stored: codes in `spec.element.storage`, [R, K], or packed rows, uint8 [R, bytes],
          if codes share bytes (`formats/packing.py`). Decoded: fp32 [R, K], every element a value
          of `spec.element`.
        * `scale_data` [ceil(R / r), ceil(K / c)], stored: E8M0 bytes (uint8), e4m3 or fp32, as the
          scale format says. Decoded: fp32. A scale is positive, or zero for a block of zeros under
          an e4m3 scale; NaN marks a block that held NaN or infinity. None if the spec has no
          scaling.
        * `zero_point` has the shape of `scale_data` and integral values in the element's range,
          int8 or fp32. None if the scaling is symmetric.
        * `tensor_scale` is an fp32 scalar that multiplies every block's scale (NVFP4's, or 1 /
          prescale). None if there is none.
        * `saturated` is bool [R, K], true where rounding left the element's range. None unless it
          was asked for.
    """

    data: Tensor
    """Codes, or their values if decoded."""
    scale_data: Tensor | None
    """Block scales."""
    zero_point: Tensor | None = None
    """Zero points of the blocks."""
    tensor_scale: Tensor | None = None
    """Scale of the whole matrix."""
    saturated: Tensor | None = None
    """Mask of the elements at which rounding left the element's range."""
    spec: OperandSpec
    """Representation of the matrix."""
    shape: torch.Size
    """Shape [R, K] of the matrix."""

    @property
    def decoded(self) -> bool:
        """Flag: codes and scales are held as fp32 values."""
        return self.data.dtype == torch.float32 and self.spec.element.storage != torch.float32

    @property
    def values(self) -> Tensor:
        """Values of the elements before scaling, fp32 [R, K]."""
        if self.decoded:
            return self.data
        return from_storage(self.data, self.spec.element, self.shape[1])

    @property
    def scale(self) -> Tensor | None:
        """Block scales, fp32, without the tensor scale."""
        if self.scale_data is None or self.scale_data.dtype == torch.float32:
            return self.scale_data
        if self.scale_data.dtype == torch.uint8:
            return encoding.decode_scale(self.scale_data)
        return self.scale_data.to(torch.float32)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the codes, scales and zero points."""
        return sum(
            t.nbytes
            for t in (self.data, self.scale_data, self.zero_point, self.tensor_scale)
            if t is not None
        )

    def stored(self) -> "QTensor":
        """Return this matrix in the fewest bytes."""
        if not self.decoded:
            return self
        scale = self.scale_data
        scale_format = None if self.spec.scaling is None else self.spec.scaling.scale_format
        if scale is not None and scale_format == "e8m0":
            scale = encoding.encode_scale(scale)
        elif scale is not None and scale_format == "e4m3":
            scale = scale.to(torch.float8_e4m3fn)
        zero_point = self.zero_point
        if zero_point is not None:
            zero_point = zero_point.nan_to_num().to(torch.int8)
        return replace(
            self,
            data=to_storage(self.data, self.spec.element),
            scale_data=scale,
            zero_point=zero_point,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (values - zero_point) * scale * tensor_scale, [R, K] of `dtype`.

        It is computed in fp32, in this order.
        """
        traced = self.spec.scaling is None and self.data.device.type != "cpu"
        if torch.compiler.is_compiling() and not traced:
            return self._dequantized_by_operator().to(dtype)
        values = self.values
        scale = self.scale
        if scale is None:
            if torch.compiler.is_compiling():
                # Compiled code may skip a conversion down and up again (see `formats.rounding`), so
                # the values are rounded here. To round values of the format changes nothing.
                values = round_to_format(values, self.spec.element)
            return values.to(dtype)
        if is_transposed(values):
            # A strided pass is slow: compute in the order that lies in memory.
            zero_point = None if self.zero_point is None else self.zero_point.t()
            block = swapped(self.block)
            x_KR = _dequantize(values.t(), scale.t(), zero_point, self.tensor_scale, block)
            return x_KR.t().to(dtype)
        return _dequantize(values, scale, self.zero_point, self.tensor_scale, self.block).to(dtype)

    def t(self) -> "QTensor":
        """Return the transposed matrix: a view, or a decoded copy if the codes of a row share
        bytes."""
        if self.spec.element.packed and not self.decoded:
            zero_point = None if self.zero_point is None else self.zero_point.to(torch.float32)
            return replace(self, data=self.values, scale_data=self.scale, zero_point=zero_point).t()
        scaling = self.spec.scaling
        spec = (
            self.spec
            if scaling is None
            else replace(self.spec, scaling=replace(scaling, block=swapped(scaling.block)))
        )
        flip = lambda part: None if part is None else part.t()  # noqa: E731
        return QTensor(
            data=self.data.t(),
            scale_data=flip(self.scale_data),
            zero_point=flip(self.zero_point),
            tensor_scale=self.tensor_scale,
            saturated=flip(self.saturated),
            spec=spec,
            shape=torch.Size(swapped((self.shape[0], self.shape[1]))),
        )

    def _dequantized_by_operator(self) -> Tensor:
        """Return `dequantize()` by the operator `lowprec::dequantize`, for compiled code."""
        transposed = is_transposed(self.data)
        parts = (self.data, self.scale_data, self.zero_point)
        if transposed:
            parts = tuple(None if part is None else part.t() for part in parts)
        out = torch.ops.lowprec.dequantize(
            *parts, self.tensor_scale, self.spec.notation, *self.shape, transposed
        )
        return out.t() if transposed else out

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns under one scale."""
        assert self.spec.scaling is not None
        return block_extents(self.shape, self.spec.scaling.block)


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredOperand:
    """A quantised matrix [R, K] in one buffer, made and read by operators (`operators.py`)."""

    data: Tensor
    """The bytes of its codes, scales and zero points, one after the other; uint8 [n]."""
    spec: OperandSpec
    """Representation of the matrix."""
    shape: torch.Size
    """Shape [R, K] of the matrix."""
    transposed: bool
    """Flag: the matrix is column-major in memory."""

    @classmethod
    def of(cls, x_RK: Tensor, spec: OperandSpec, key: Tensor | None) -> "StoredOperand":
        """Return `quantize(x, spec, key=key)`."""
        transposed = is_transposed(x_RK)
        x = x_RK.t() if transposed else x_RK
        data = torch.ops.lowprec.quantize_to_bytes(x, key, spec.notation, transposed)
        return cls(data=data, spec=spec, shape=x_RK.shape, transposed=transposed)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values, [R, K] of `dtype`."""
        rows, cols = self.shape
        notation = self.spec.notation
        out = torch.ops.lowprec.dequantize_bytes(self.data, notation, rows, cols, self.transposed)
        return (out.t() if self.transposed else out).to(dtype)


class TwoWay(NamedTuple):
    """A matrix [R, C] as the operands of two GEMMs. A direction that nobody needs is None."""

    rows: QTensor | StoredOperand | Tensor | None = None
    """The matrix as it lies, [R, C]: the operand of a GEMM that contracts C."""
    cols: QTensor | StoredOperand | Tensor | None = None
    """The transpose, [C, R]: the operand of a GEMM that contracts R."""


def to_storage(values: Tensor, fmt: ElementFormat) -> Tensor:
    """Return fp32 values [R, K] of a format as its stored codes."""
    if fmt.packed:
        return pack(encoding.encode(values, fmt), fmt.bits)
    if fmt in (E4M3, E5M2) and _converts_slowly(values):
        return encoding.encode(values, fmt).to(torch.uint8).view(fmt.storage)
    return values.to(fmt.storage)


def from_storage(data: Tensor, fmt: ElementFormat, length: int) -> Tensor:
    """Return stored codes as fp32 values [R, length]; the inverse of `to_storage`."""
    if fmt.packed:
        return encoding.decode(unpack(data, fmt.bits, length), fmt)
    if fmt in (E4M3, E5M2) and _converts_slowly(data):
        # `decode` reads e4m3's NaN as 480. Dequantised, it is NaN all the same: the scale of its
        # block is NaN.
        return encoding.decode(data.view(torch.uint8), fmt)
    return data.to(torch.float32)


def _converts_slowly(t: Tensor) -> bool:
    """Return True on a CPU in eager code, which converts eight-bit floats one by one."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def block_extents(shape: torch.Size, block: tuple[int, int]) -> tuple[int, int]:
    """Return `block` with -1 replaced by the length of the whole axis.

    It is at least 1, so that empty matrices have blocks too.
    """
    rows, cols = (
        max(n, 1) if extent == -1 else extent for n, extent in zip(shape, block, strict=True)
    )
    return rows, cols


def is_transposed(x_RK: Tensor) -> bool:
    """Return True if the first axis is the one that is contiguous in memory."""
    return x_RK.stride(0) < x_RK.stride(1)


def to_blocks(x_RK: Tensor, block: tuple[int, int]) -> Tensor:
    """Return x as [R / r, r, K / c, c], a view where blocks of r x c divide the matrix.

    Otherwise it is padded with zeros on the right and below.
    """
    rows, cols = x_RK.shape
    r, c = block
    if rows % r or cols % c:
        x_RK = torch.nn.functional.pad(x_RK, (0, -cols % c, 0, -rows % r))
    rows, cols = x_RK.shape
    return x_RK.unflatten(1, (cols // c, c)).unflatten(0, (rows // r, r))


def from_blocks(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Return blocks [R / r, r, K / c, c] as [R, K], without the padding; the inverse of
    `to_blocks`."""
    return blocks.flatten(2, 3).flatten(0, 1)[: shape[0], : shape[1]]


def swapped(block: tuple[int, int]) -> tuple[int, int]:
    """Return the two extents in the other order: those of the transpose."""
    return block[1], block[0]


def _dequantize(
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    block: tuple[int, int],
) -> Tensor:
    """Return (values - zero_point) * scale * tensor_scale, fp32 [R, K]."""
    blocks = to_blocks(values, block)
    if zero_point is not None:
        blocks = blocks - zero_point[:, None, :, None]
    blocks = blocks * scale[:, None, :, None]
    return from_blocks(blocks if tensor_scale is None else blocks.mul_(tensor_scale), values.shape)
