"""fake_quantize: quantise and dequantise at once. Emulation does this to every operand.

The result has the bits of `quantize(x, spec).dequantize()`. Three ways lead to it:

* a GPU takes one pass over memory where there is a kernel (`triton_quantize`);
* a CPU takes a large matrix piece by piece: the temporaries of a piece stay in the cache, and the
  allocator hands out the same memory again instead of fresh pages for a chain of whole matrices;
* otherwise the matrix is taken as a whole.

In compiled code, the last two are one operator (`operators`).
"""

import torch
from torch import Tensor

from lowprec.quant.qtensor import block_extents, is_transposed, swapped, to_blocks
from lowprec.quant.quantize import is_one_operator, quantize
from lowprec.quant.spec import OperandSpec
from lowprec.quant.triton_quantize import fake_quantize_fused, takes

PIECE = 1 << 19
"""Number of elements of a piece. With smaller pieces the overhead of small operations dominates;
larger ones leave the cache (docs/experiments.md)."""


def fake_quantize(
    x_RK: Tensor,
    spec: OperandSpec,
    *,
    generator: torch.Generator | None = None,
    key: Tensor | None = None,
    history: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the values that the quantised x stands for.

    Args:
        x_RK: fp32, bf16 or fp16 [R, K], any strides.
        generator, key, history: as for `quantize`.
        dtype: dtype of the result. bf16 is exact for unscaled elements and for MX elements (e8m0
            scales) of at most 8 significant bits; other values are rounded once more.
    Returns:
        [R, K] of `dtype`, in x's memory order.
    """
    if spec.one_pass and takes(x_RK) and (not spec.stochastic or key is not None):
        return fake_quantize_fused(x_RK, spec, key=key, dtype=dtype)
    if is_one_operator(x_RK, spec) and generator is None and history is None:
        transposed = is_transposed(x_RK)
        x = x_RK.t() if transposed else x_RK
        key = key if spec.stochastic else None
        out = torch.ops.lowprec.fake_quantize(x, key, spec.notation, transposed, dtype)
        return out.t() if transposed else out
    if (
        x_RK.device.type != "cpu"
        or torch.compiler.is_compiling()
        or not _splits(spec)
        or x_RK.numel() <= PIECE
    ):
        return _whole(x_RK, spec, generator=generator, key=key, history=history).to(dtype)
    # A piece is some whole rows of blocks, in the order that lies in memory. `_splits` holds, so no
    # piece needs a generator, a key or a history.
    transposed = is_transposed(x_RK)
    x = x_RK.t() if transposed else x_RK
    assert spec.scaling is not None
    block = block_extents(x_RK.shape, spec.scaling.block)
    rows = (swapped(block) if transposed else block)[0]
    if rows * x.shape[1] > 2 * PIECE:
        return _whole(x_RK, spec).to(dtype)
    step = max(1, PIECE // (rows * max(x.shape[1], 1))) * rows
    out = torch.empty(x.shape, dtype=dtype)
    for start in range(0, x.shape[0], step):
        piece = x[start : start + step]
        out[start : start + step] = (
            _whole(piece.t(), spec).t() if transposed else _whole(piece, spec)
        )
    return out.t() if transposed else out


def _splits(spec: OperandSpec) -> bool:
    """Return True if pieces of a matrix can be quantised apart: no scale spans all rows, and no
    result depends on an element's place."""
    scaling = spec.scaling
    return (
        scaling is not None
        and scaling.block[0] != -1
        and scaling.scale_format != "e4m3"
        and not spec.stochastic
    )


def _whole(
    x_RK: Tensor,
    spec: OperandSpec,
    *,
    generator: torch.Generator | None = None,
    key: Tensor | None = None,
    history: Tensor | None = None,
) -> Tensor:
    """Quantise and dequantise a whole matrix, fp32 [R, K] out."""
    q = quantize(x_RK, spec, generator=generator, key=key, history=history, decoded=True)
    scale = q.scale
    if (
        scale is None
        or q.zero_point is not None
        or q.tensor_scale is not None
        or torch.compiler.is_compiling()
        or is_transposed(q.data)
    ):
        return q.dequantize()
    rows, cols = q.shape
    r, c = q.block
    if rows % r or cols % c:
        return q.dequantize()
    # Nothing else refers to these codes: multiply them by their scales in place.
    to_blocks(q.data, q.block).mul_(scale[:, None, :, None])
    return q.data
