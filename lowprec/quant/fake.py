"""fake_quantize: quantise and dequantise at once, which is what emulation does to every operand.

It gives exactly `quantize(x, spec).dequantize()`, but on a GPU in one pass where there is a kernel
(`triton_quantize`), and on a CPU piece by piece: a piece's temporaries stay in the cache, and the
allocator hands out the same memory again instead of fresh pages for a chain of whole matrices.
Compiled code fuses the chain by itself.
"""

from typing import Any

import torch
from torch import Tensor

from lowprec.quant.qtensor import block_extents, is_transposed, swapped, to_blocks
from lowprec.quant.quantize import quantize
from lowprec.quant.spec import OperandSpec
from lowprec.quant.triton_quantize import fake_quantize_fused, takes

PIECE = 1 << 19
"""Elements of a piece. Smaller ones drown in the overhead of small operations, larger ones leave
the cache (docs/experiments.md)."""


def fake_quantize(
    x_RK: Tensor, spec: OperandSpec, *, dtype: torch.dtype = torch.float32, **state: Any
) -> Tensor:
    """x as the values that its quantised form stands for.

    Args:
        x_RK: fp32, bf16 or fp16 [R, K], any strides.
        dtype: of the result. bf16 holds MX and unscaled values of at most 8 significant bits
            exactly; others are rounded once more.
        state: generator, key or history, as for `quantize`.
    Returns:
        [R, K] of `dtype`, in x's memory order.
    """
    if spec.one_pass and takes(x_RK) and (not spec.stochastic or state.get("key") is not None):
        return fake_quantize_fused(x_RK, spec, key=state.get("key"), dtype=dtype)
    if (
        x_RK.device.type != "cpu"
        or torch.compiler.is_compiling()
        or not _splits(spec)
        or x_RK.numel() <= PIECE
    ):
        return _whole(x_RK, spec, **state).to(dtype)
    transposed = is_transposed(x_RK)
    x = x_RK.t() if transposed else x_RK
    assert spec.scaling is not None
    block = block_extents(x_RK.shape, spec.scaling.block)
    rows = (swapped(block) if transposed else block)[0]
    if rows * x.shape[1] > 2 * PIECE:
        return _whole(x_RK, spec, **state).to(dtype)
    step = max(1, PIECE // (rows * max(x.shape[1], 1))) * rows
    out = torch.empty(x.shape, dtype=dtype)
    for start in range(0, x.shape[0], step):
        piece = x[start : start + step]
        out[start : start + step] = (
            _whole(piece.t(), spec).t() if transposed else _whole(piece, spec)
        )
    return out.t() if transposed else out


def _splits(spec: OperandSpec) -> bool:
    """Whether pieces of a matrix can be quantised apart: no scale spans it, nothing depends on an
    element's place."""
    scaling = spec.scaling
    return (
        scaling is not None
        and scaling.block[0] != -1
        and scaling.scale_format != "e4m3"
        and not spec.stochastic
    )


def _whole(x_RK: Tensor, spec: OperandSpec, **state: Any) -> Tensor:
    q = quantize(x_RK, spec, decoded=True, **state)
    scale = q.scale
    if (
        scale is None
        or q.zero_point is not None
        or q.tensor_scale is not None
        or torch.compiler.is_compiling()
        or is_transposed(q.data)
    ):
        return q.dequantize()
    (rows, cols), (r, c) = q.shape, q.block
    if rows % r or cols % c:
        return q.dequantize()
    # The codes are nobody else's: scale them where they are.
    to_blocks(q.data, q.block).mul_(scale[:, None, :, None])
    return q.data
