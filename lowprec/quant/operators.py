"""The reference as operators of its own, for compiled code.

torch.compile could trace the reference and fuse its hundreds of small operations. But tracing and
compiling them takes seconds to minutes for each layer and each new shape, and on a CPU the compiled
chain is slower than the reference (docs/experiments.md). So they are one operator each, and a
compiled layer has the codes of the eager one.

Matrices go in and come out in the order that lies in memory: the caller transposes them.

What a layer keeps for its backward is one buffer of bytes (`qtensor.StoredOperand`). Codes and
scales apart would make the compiler distinguish matrices of one block from those of more, and
compile twice.
"""

import math
from functools import cache

import torch
from torch import Tensor

from lowprec.formats.packing import packed_length
from lowprec.quant.fake import fake_quantize
from lowprec.quant.qtensor import QTensor, block_extents
from lowprec.quant.quantize import part_names, quantize
from lowprec.quant.spec import OperandSpec

_parse = cache(OperandSpec.parse)


def _quantize(
    x: Tensor,
    key: Tensor | None,
    amax: Tensor | None,
    spec: str,
    transposed: bool,
    decoded: bool,
    saturation: bool,
) -> list[Tensor]:
    """Return the parts that `part_names` lists, in the memory order of x.

    Args:
        x: the matrix [R, K], or its transpose [K, R] if `transposed`.
        amax: the amax that delayed scaling chose, in place of a history.
        spec: the notation of an `OperandSpec`, because operators take no objects.
    """
    operand = _parse(spec)
    q = quantize(
        x.t() if transposed else x,
        operand,
        key=key,
        # A history of this one amax makes the same choice again.
        history=None if amax is None else amax.reshape(1).clone(),
        decoded=decoded,
        saturation=saturation,
    )
    parts = [getattr(q, name) for name in part_names(operand, saturation)]
    return [_own(part, x, transposed) for part in parts]


def _own(part: Tensor, x: Tensor, transposed: bool) -> Tensor:
    """Return a part in memory order, contiguous and in other memory than x."""
    part = part.t() if transposed and part.ndim == 2 else part
    same = part.untyped_storage()._cdata == x.untyped_storage()._cdata
    return part.clone(memory_format=torch.contiguous_format) if same else part.contiguous()


def _empty_parts(
    x: Tensor, spec: str, transposed: bool, decoded: bool, saturation: bool
) -> list[Tensor]:
    """Return empty tensors in place of the results of `_quantize`."""
    R, K = (x.shape[1], x.shape[0]) if transposed else x.shape
    layout = _layout(spec, R, K, decoded=decoded, saturation=saturation)
    return [
        x.new_empty(shape[::-1] if transposed else shape, dtype=dtype) for shape, dtype in layout
    ]


def _layout(
    spec: str, R: int, K: int, *, decoded: bool = False, saturation: bool = False
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each part of a quantised matrix [R, K]."""
    operand = _parse(spec)
    element = operand.element
    width = K
    if element.packed and not decoded:
        width = packed_length(K, element.bits)
    shapes: dict[str, tuple[int, ...]] = {"data": (R, width), "saturated": (R, K)}
    dtypes = {
        "data": torch.float32 if decoded else element.storage,
        "saturated": torch.bool,
        "tensor_scale": torch.float32,
    }
    if operand.scaling is not None:
        r, c = block_extents(torch.Size((R, K)), operand.scaling.block)
        stored = {"e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn, "fp32": torch.float32}
        shapes["scale_data"] = (-(-R // r), -(-K // c))
        shapes["zero_point"] = shapes["scale_data"]
        shapes["tensor_scale"] = ()
        dtypes["scale_data"] = torch.float32 if decoded else stored[operand.scaling.scale_format]
        dtypes["zero_point"] = torch.float32 if decoded else torch.int8
    return [(shapes[name], dtypes[name]) for name in part_names(operand, saturation)]


@torch.library.custom_op("lowprec::quantize", mutates_args=())
def _quantize_op(
    x: Tensor,
    key: Tensor | None,
    amax: Tensor | None,
    spec: str,
    transposed: bool,
    decoded: bool,
    saturation: bool,
) -> list[Tensor]:
    return _quantize(x, key, amax, spec, transposed, decoded, saturation)


@_quantize_op.register_fake
def _(
    x: Tensor,
    key: Tensor | None,
    amax: Tensor | None,
    spec: str,
    transposed: bool,
    decoded: bool,
    saturation: bool,
) -> list[Tensor]:
    return _empty_parts(x, spec, transposed, decoded, saturation)


def _bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the number of bytes of a part."""
    return math.prod(shape) * dtype.itemsize


@torch.library.custom_op("lowprec::quantize_to_bytes", mutates_args=())
def _quantize_to_bytes_op(x: Tensor, key: Tensor | None, spec: str, transposed: bool) -> Tensor:
    parts = _quantize(x, key, None, spec, transposed, False, False)
    return torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])


@_quantize_to_bytes_op.register_fake
def _(x: Tensor, key: Tensor | None, spec: str, transposed: bool) -> Tensor:
    R, K = (x.shape[1], x.shape[0]) if transposed else x.shape
    return x.new_empty(sum(_bytes_of(*part) for part in _layout(spec, R, K)), dtype=torch.uint8)


@torch.library.custom_op("lowprec::dequantize_bytes", mutates_args=())
def _dequantize_bytes_op(data: Tensor, spec: str, rows: int, cols: int, transposed: bool) -> Tensor:
    operand = _parse(spec)
    layout = _layout(spec, rows, cols)
    parts = {}
    pieces = data.split([_bytes_of(*part) for part in layout])
    for name, (shape, dtype), piece in zip(part_names(operand, False), layout, pieces, strict=True):
        # A copy starts at a multiple of its dtype's size, as a view as this dtype must.
        part = piece.clone().view(dtype).view(shape[::-1] if transposed else shape)
        parts[name] = part.t() if transposed and part.ndim == 2 else part
    q = QTensor(
        data=parts["data"],
        scale_data=parts.get("scale_data"),
        zero_point=parts.get("zero_point"),
        tensor_scale=parts.get("tensor_scale"),
        spec=operand,
        shape=torch.Size((rows, cols)),
    )
    return _own(q.dequantize(), data, transposed)


@_dequantize_bytes_op.register_fake
def _(data: Tensor, spec: str, rows: int, cols: int, transposed: bool) -> Tensor:
    return data.new_empty((cols, rows) if transposed else (rows, cols), dtype=torch.float32)


@torch.library.custom_op("lowprec::fake_quantize", mutates_args=())
def _fake_quantize_op(
    x: Tensor, key: Tensor | None, spec: str, transposed: bool, dtype: torch.dtype
) -> Tensor:
    out = fake_quantize(x.t() if transposed else x, _parse(spec), key=key, dtype=dtype)
    return _own(out, x, transposed)


@_fake_quantize_op.register_fake
def _(x: Tensor, key: Tensor | None, spec: str, transposed: bool, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("lowprec::dequantize", mutates_args=())
def _dequantize_op(
    data: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    spec: str,
    rows: int,
    cols: int,
    transposed: bool,
) -> Tensor:
    """Return a QTensor's values; its parts are given in the memory order of `data`."""
    turned = [None if part is None else part.t() for part in (scale, zero_point)]
    scale, zero_point = turned if transposed else (scale, zero_point)
    q = QTensor(
        data=data.t() if transposed else data,
        scale_data=scale,
        zero_point=zero_point,
        tensor_scale=tensor_scale,
        spec=_parse(spec),
        shape=torch.Size((rows, cols)),
    )
    return _own(q.dequantize(), data, transposed)


@_dequantize_op.register_fake
def _(
    data: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    tensor_scale: Tensor | None,
    spec: str,
    rows: int,
    cols: int,
    transposed: bool,
) -> Tensor:
    return data.new_empty((cols, rows) if transposed else (rows, cols), dtype=torch.float32)
