"""The `triton` backend: products of block-scaled FP8 in plain Triton, on any GPU with FP8, with
promotion every 32, 64 or 128 elements.

It is slower than the `hopper` backend and cuBLASLt, whose loads and products overlap. It covers
what they don't: Ada and later GPUs, partial sums shorter than 128 elements, and results that are
added to an existing tensor.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowprec.gemm.base import FP32_SUMS, Accumulation, GemmBackend, Operand, Support
from lowprec.gemm.hopper import TILE, kind
from lowprec.quant import OperandSpec, QTensor

_INTERVALS = (32, 64, 128)


class TritonBackend(GemmBackend):
    """Block-scaled FP8 products by a Triton kernel."""

    name = "triton"

    def supports(
        self,
        a: OperandSpec | None,
        b: OperandSpec | None,
        device_type: str,
        sums: Accumulation = FP32_SUMS,
    ) -> Support:
        if kind(a) != "1x128" or kind(b) not in ("1x128", "128x128"):
            return Support(
                ok=False,
                reason="takes fp8 with scales of 1x128 on the left, of 1x128 or 128x128 on the "
                "right",
            )
        assert a is not None
        assert b is not None
        if a.element != b.element:
            return Support(ok=False, reason="takes one fp8 format on both sides")
        if sums.promote_every not in (None, *_INTERVALS):
            return Support(
                ok=False,
                reason=f"promotes every 32, 64 or 128 elements, not every {sums.promote_every}",
            )
        if sums.bits is not None:
            return Support(
                ok=False, reason=f"sums as the matrix unit does, not in {sums.bits} bits"
            )
        if reason := _why_not(device_type):
            return Support(ok=False, reason=reason)
        return Support(ok=True, native=True, reason="fp8 on the matrix units by a Triton kernel")

    def mm(
        self, a_MK: Operand, b_NK: Operand, out_dtype: torch.dtype, sums: Accumulation = FP32_SUMS
    ) -> Tensor:
        assert isinstance(a_MK, QTensor)
        assert isinstance(b_NK, QTensor)
        scale_a = a_MK.scale
        scale_b = b_NK.scale
        assert scale_a is not None
        assert scale_b is not None
        call = (
            torch.ops.lowprec.block_scaled_mm if torch.compiler.is_compiling() else block_scaled_mm
        )
        by_rows = b_NK.spec.kind == "1x128"
        interval = sums.promote_every or TILE
        return call(
            a_MK.data, scale_a, b_NK.data, scale_b, 1 if by_rows else TILE, interval, out_dtype
        )


@cache
def _why_not(device_type: str) -> str | None:
    if device_type != "cuda":
        return f"needs a GPU with FP8, not {device_type}"
    if not torch.cuda.is_available():
        return "needs a GPU with FP8, and this machine has none"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 9):
        return f"needs a GPU with FP8, this one has compute capability {major}.{minor}"
    try:
        from lowprec.gemm import triton_kernel  # noqa: F401
    except ImportError as error:
        return f"needs Triton: {error}"
    return None


def block_scaled_mm(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    b_block: int,
    promote_every: int,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """Return (a, scale_a) . (b, scale_b)^T + bias, [M, N], as a new tensor, or added to `add_to` in
    place.

    Args:
        a, b: fp8 [M, K] and [N, K], contiguous rows.
        scale_a: fp32 [M, K / 128], any strides.
        scale_b: fp32 [N / b_block, K / 128].
        b_block: number of rows of b under one scale, 1 or 128.
        promote_every: number of contracted elements after which partial sums join the fp32 sum:
            32, 64 or 128.
        bias: [N].
        add_to: [M, N]; it is returned.
    """
    from lowprec.gemm.triton_kernel import block_scaled_gemm

    M, K = a.shape
    N = b.shape[0]
    c = torch.empty(M, N, dtype=out_dtype, device=a.device) if add_to is None else add_to
    block_m, block_n = (128, 128) if a.is_cuda else (32, 32)
    if M and N:
        kernel: Any = block_scaled_gemm  # a type checker can't know its constants
        kernel[(-(-M // block_m) * -(-N // block_n),)](
            a, b, c, c if bias is None else bias, scale_a, scale_b, M, N, K,
            a.stride(0), b.stride(0), c.stride(0), scale_a.stride(0), scale_a.stride(1),
            scale_b.stride(0), scale_b.stride(1),
            b_block, bias is not None, add_to is not None, block_m, block_n, promote_every,
            num_warps=8 if a.is_cuda else 4, num_stages=3,
        )  # fmt: skip
    return c


@torch.library.custom_op("lowprec::block_scaled_mm", mutates_args=())
def _block_scaled_mm_op(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    b_block: int,
    promote_every: int,
    out_dtype: torch.dtype,
) -> Tensor:
    return block_scaled_mm(a, scale_a, b, scale_b, b_block, promote_every, out_dtype)


@_block_scaled_mm_op.register_fake
def _(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    b_block: int,
    promote_every: int,
    out_dtype: torch.dtype,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)
