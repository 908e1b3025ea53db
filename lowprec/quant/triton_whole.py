"""Fused quantiser for fp8 with one scale per tensor or per row: once the amaxes are known, both
directions come from one read.

    x [R, C]     e4m3[tensor fp32] or e4m3[row fp32], for a GEMM that contracts C
    x^T [C, R]   the same or another such operand, for a GEMM that contracts R

The amaxes of each operand take one more read; two operands with scales per tensor share it. The
results have the bits of the reference.
"""

from typing import Any

import torch
from torch import Tensor

from lowprec.formats.element import E4M3, E5M2
from lowprec.formats.scaling import scale_from_amax
from lowprec.quant.delayed import delayed_amax
from lowprec.quant.qtensor import QTensor, TwoWay, is_transposed
from lowprec.quant.spec import OperandSpec


def is_whole(spec: OperandSpec | None) -> bool:
    """Return True if an operand is fp8, rounded to nearest, with a scale per tensor or per row."""
    return spec is not None and spec.kind in ("tensor", "row") and spec.rounding == "nearest"


def quantize_whole(
    x_RC: Tensor,
    a: OperandSpec | None,
    b: OperandSpec | None,
    histories: tuple[Tensor | None, Tensor | None] = (None, None),
) -> TwoWay:
    """Return quantize(x, a) and quantize(x^T, b), each with its history.

    Args:
        x_RC: fp32, bf16 or fp16 [R, C] on a GPU, not empty.
        a, b: specs for which `is_whole` holds; None makes no operand of that direction.
        histories: amax histories of delayed scaling for `a` and `b`, updated in place.
    """
    if is_transposed(x_RC):
        along_cols, along_rows = quantize_whole(x_RC.t(), b, a, (histories[1], histories[0]))
        return TwoWay(along_rows, along_cols)
    x = x_RC if x_RC.stride(1) == 1 else x_RC.contiguous()
    amaxes = tuple(map(_scaling_amax, _amaxes(x, a, b), (a, b), histories))
    call = torch.ops.lowprec.quantize_given if torch.compiler.is_compiling() else _quantize_given
    codes = call(
        x,
        amaxes[0],
        amaxes[1],
        a is not None and a.element == E5M2,
        b is not None and b.element == E5M2,
    )
    R, C = x.shape
    codes_rows, codes_cols = codes
    amax_rows, amax_cols = amaxes
    return TwoWay(
        rows=_result(codes_rows, amax_rows, a, (R, C)),
        cols=_result(codes_cols, amax_cols, b, (C, R)),
    )


def _amaxes(x: Tensor, a: OperandSpec | None, b: OperandSpec | None) -> tuple[Tensor | None, ...]:
    """Return the fp32 amaxes of both directions: [1] for a scale per tensor, [R] or [C] for scales
    per row, None for a direction whose spec is None."""
    whole = None
    found: list[Tensor | None] = []
    for spec, axis in ((a, 1), (b, 0)):
        if spec is None or spec.scaling is None:
            found.append(None)
        elif spec.kind == "tensor":
            if whole is None:
                whole = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32).reshape(1)
            found.append(whole)
        else:
            found.append(torch.linalg.vector_norm(x, torch.inf, dim=axis, dtype=torch.float32))
    return tuple(found)


def _scaling_amax(
    amax: Tensor | None, spec: OperandSpec | None, history: Tensor | None
) -> Tensor | None:
    """Return the amax to scale by: `amax` itself, or under delayed scaling that of the history."""
    delayed = (
        spec is not None
        and spec.scaling is not None
        and spec.scaling.history
        and history is not None
        and amax is not None
    )
    return delayed_amax(history, amax) if delayed else amax


def _result(
    codes: Tensor, amax: Tensor | None, spec: OperandSpec | None, shape: tuple[int, int]
) -> QTensor | None:
    """Return the kernel's codes [R, >= K] and their scales as a QTensor of `shape` [R, K]."""
    if spec is None or amax is None:
        return None
    assert spec.scaling is not None
    scale = scale_from_amax(amax, spec.element, spec.scaling)[:, None]
    return QTensor(data=codes[:, : shape[1]], scale_data=scale, spec=spec, shape=torch.Size(shape))


def _empty(x: Tensor, amax: Tensor | None, transposed: bool, e5m2: bool) -> Tensor:
    """Return memory for the codes of x or of its transpose, with rows padded to 16 bytes.

    It is empty if there is no amax, which is so for a direction that is not wanted.
    """
    R, C = x.shape if not transposed else (x.shape[1], x.shape[0])
    dtype = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    return torch.empty(
        (0, 0) if amax is None else (R, -(-C // 16) * 16), dtype=dtype, device=x.device
    )


def _quantize_given(
    x: Tensor, amax_r: Tensor | None, amax_c: Tensor | None, e5m2_r: bool, e5m2_c: bool
) -> list[Tensor]:
    """Return the codes of x by `amax_r` and of x^T by `amax_c`; empty without an amax.

    Elements are e5m2 in a direction whose flag is set, else e4m3.
    """
    from lowprec.quant import triton_kernels as kernels

    rows = _empty(x, amax_r, False, e5m2_r)
    cols = _empty(x, amax_c, True, e5m2_c)
    R, C = x.shape
    # Any, since a type checker would want constants of type tl.constexpr.
    kernel: Any = kernels.quantize_given
    # The kernel writes one element format: if the two differ, it runs once for each direction.
    for only_rows, fmt in ((True, E5M2 if e5m2_r else E4M3), (False, E5M2 if e5m2_c else E4M3)):
        both = e5m2_r == e5m2_c and amax_r is not None and amax_c is not None
        wanted = (
            (both or only_rows) and amax_r is not None,
            (both or not only_rows) and amax_c is not None,
        )
        if any(wanted):
            step_r, step_c = (
                0 if amax is None or amax.numel() == 1 else 1 for amax in (amax_r, amax_c)
            )
            kernel[(-(-R // 64) * -(-C // 64),)](
                x, x.stride(0), x if amax_r is None else amax_r, step_r, rows, rows.stride(0),
                x if amax_c is None else amax_c, step_c, cols, cols.stride(0), R, C, *wanted,
                fmt.mantissa_bits, fmt.min_normal, fmt.max, 64,
            )  # fmt: skip
        if both:
            break
    return [rows, cols]


@torch.library.custom_op("lowprec::quantize_given", mutates_args=())
def _quantize_given_op(
    x: Tensor, amax_r: Tensor | None, amax_c: Tensor | None, e5m2_r: bool, e5m2_c: bool
) -> list[Tensor]:
    return _quantize_given(x, amax_r, amax_c, e5m2_r, e5m2_c)


@_quantize_given_op.register_fake
def _(
    x: Tensor, amax_r: Tensor | None, amax_c: Tensor | None, e5m2_r: bool, e5m2_c: bool
) -> list[Tensor]:
    return [_empty(x, amax_r, False, e5m2_r), _empty(x, amax_c, True, e5m2_c)]
