"""One matrix as the operands of the two GEMMs that read it.

    x   fprop contracts its columns, wgrad its rows     (of x^T [K, M], the tokens M)
    w   fprop contracts its columns, dgrad its rows
    g   dgrad contracts its columns, wgrad its rows

A scale lies along the axis that a GEMM contracts, so the two GEMMs need different codes.
`quantize_two_way` makes both from one read of the matrix where a fused kernel can, and hides which
kernel that is:

    tiles   fp8 with 1x128 or 128x128 scales, on a GPU (`triton_quantize`)
    whole   fp8 with a scale per tensor or per row, on a GPU (`triton_whole`)
    else    the reference, once for each direction (`quantize`)

All three give the same bits.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lowprec.quant.qtensor import TwoWay
from lowprec.quant.quantize import quantize
from lowprec.quant.spec import OperandSpec
from lowprec.quant.triton_quantize import Directions, directions, quantize_both, takes
from lowprec.quant.triton_whole import is_whole, quantize_whole


class TwoWaySpec(NamedTuple):
    """The formats of a matrix and of its transpose, and the fused kernel that can make both."""

    rows: OperandSpec
    cols: OperandSpec
    tiles: Directions | None
    """The settings of the kernel for 1x128 and 128x128 scales; None: it can't."""
    whole: bool
    """Flag: the kernel for scales per tensor or per row can."""


@cache
def two_way_spec(rows: OperandSpec, cols: OperandSpec) -> TwoWaySpec:
    """Return the spec of a matrix quantised as `rows` says and its transpose as `cols` says."""
    found = directions(rows, cols)
    return TwoWaySpec(
        rows=rows,
        cols=cols,
        tiles=None if isinstance(found, str) else found,
        whole=is_whole(rows) and is_whole(cols),
    )


def quantize_two_way(
    t_RC: Tensor,
    spec: TwoWaySpec,
    *,
    rows: bool = True,
    cols: bool = True,
    keys: tuple[Tensor | None, Tensor | None] = (None, None),
    histories: tuple[Tensor | None, Tensor | None] = (None, None),
    times_silu_of: Tensor | None = None,
) -> TwoWay:
    """Quantise a matrix and its transpose, each along its last axis.

    Args:
        t_RC: fp32, bf16 or fp16 [R, C], any strides.
        spec: the two representations.
        rows, cols: the directions that are needed.
        keys: keys of stochastic rounding for the two directions, int64 [2] (see `quantize`).
        histories: amax histories of delayed scaling for the two directions, updated in place.
        times_silu_of: a matrix like `t_RC`: silu(it) * t_RC is quantised instead (SwiGLU).
    """
    if not (rows or cols):
        return TwoWay()
    gate_fits = times_silu_of is None or times_silu_of.dtype == t_RC.dtype
    if spec.tiles is not None and takes(t_RC) and gate_fits:
        wanted = spec.tiles if rows and cols else spec.tiles.only(rows, cols)
        return quantize_both(t_RC, wanted, times_silu_of=times_silu_of)
    if times_silu_of is not None:
        t_RC = torch.nn.functional.silu(times_silu_of) * t_RC
    if spec.whole and takes(t_RC):
        along_rows = spec.rows if rows else None
        along_cols = spec.cols if cols else None
        return quantize_whole(t_RC, along_rows, along_cols, histories)
    key_rows, key_cols = keys
    history_rows, history_cols = histories
    made_rows = None
    made_cols = None
    if rows:
        made_rows = quantize(t_RC, spec.rows, key=key_rows, history=history_rows)
    if cols:
        made_cols = quantize(t_RC.t(), spec.cols, key=key_cols, history=history_cols)
    return TwoWay(made_rows, made_cols)
