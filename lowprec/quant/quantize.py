"""quantize: the reference that every fused kernel must match.

    scale = scale_from_amax(max |block|)
    code  = round_to_format(x * (1 / scale))          symmetric
    code  = clamp(round(x * (1 / scale)) + zero)      asymmetric integers

in fp32, each operation correctly rounded. The reciprocal is taken once per block and multiplied by each element, as DeepGEMM does: it is
what a kernel can afford, and for power-of-two scales it is exact. x * (1 / s) can reach max * (1 + 2^-24); the clamp takes it back.
"""

import torch
from torch import Tensor

from lowprec.formats.rounding import exceeds_range, round_to_format
from lowprec.formats.scaling import asymmetric_scale, reciprocal, scale_from_amax
from lowprec.quant.qtensor import QTensor, block_extents, from_blocks, is_transposed, swapped, to_blocks
from lowprec.quant.spec import OperandSpec


def quantize(x_RK: Tensor, spec: OperandSpec, *, decoded: bool = False, saturation: bool = False) -> QTensor:
    """Quantise a matrix along its last axis.

    Args:
        x_RK: fp32, bf16 or fp16 [R, K], any strides; R and K need not be multiples of the block (the rest is padded with zeros, which
            changes no scale).
        spec: the representation.
        decoded: keep the codes in fp32 instead of their storage dtype, for a consumer that would decode them at once.
        saturation: also return where the element's range was left (see `QTensor.saturated`).
    Returns:
        A QTensor of shape [R, K]; its memory layout follows x's strides, so that the transpose of a matrix needs no copy.
    Raises:
        ValueError: x is not a floating-point matrix.
    """
    if x_RK.ndim != 2 or not x_RK.is_floating_point():
        raise ValueError(f"quantize takes a floating-point matrix [R, K], got {x_RK.dtype} {list(x_RK.shape)}")
    fmt, scaling = spec.element, spec.scaling
    if scaling is None:
        values = round_to_format(x_RK.to(torch.float32), fmt) if decoded else x_RK.to(fmt.storage)
        return QTensor(values=values, scale=None, spec=spec)

    # A block's arithmetic knows no axis order, and strided passes are many times slower: work in the order that lies in memory.
    x, block = x_RK.to(torch.float32), block_extents(x_RK.shape, scaling.block)
    transposed = is_transposed(x)
    blocks = to_blocks(x.t(), swapped(block)) if transposed else to_blocks(x, block)
    shape = x.t().shape if transposed else x.shape

    zero_point = None
    if scaling.symmetric:
        scale = scale_from_amax(blocks.abs().amax((1, 3)), fmt, scaling)
        scaled = blocks * reciprocal(scale)[:, None, :, None]
    else:
        scale, zero_point = asymmetric_scale(blocks.amin((1, 3)), blocks.amax((1, 3)), fmt)
        scaled = (blocks * reciprocal(scale)[:, None, :, None]).round_().add_(zero_point[:, None, :, None])
    saturated = from_blocks(exceeds_range(scaled, fmt), shape) if saturation else None
    values = from_blocks(round_to_format(scaled, fmt, inplace=True), shape)
    if not decoded:
        values = values.to(fmt.storage)
    parts = {"values": values, "scale": scale, "zero_point": zero_point, "saturated": saturated}
    if transposed:
        parts = {name: None if part is None else part.t() for name, part in parts.items()}
    return QTensor(**parts, spec=spec)
