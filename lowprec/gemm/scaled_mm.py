"""The `scaled_mm` backend: cuBLASLt's FP8 products through torch, with scales per tensor, per row,
or of blocks on Hopper.

Layouts (docs/numerics.md): operands are row-major, and their dimensions are multiples of 16. 1x128
scales lie in memory as [K / 128, M], 128x128 scales as [N / 128, L] with L = K / 128 rounded up to
a multiple of 4: without that padding results were wrong before PyTorch's pull request 166752.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec.formats.element import E5M2
from lowprec.gemm.base import FP32_SUMS, Accumulation, GemmBackend, Operand, Support
from lowprec.gemm.cost import Cost, LayerShape, fp8_cost
from lowprec.gemm.hopper import TILE, block_scales, kind, padded_codes, tile_scales, why_not_sums
from lowprec.quant import OperandSpec, QTensor


class ScaledMMBackend(GemmBackend):
    """FP8 products by cuBLASLt."""

    name = "scaled_mm"

    def supports(
        self,
        a: OperandSpec | None,
        b: OperandSpec | None,
        device_type: str,
        sums: Accumulation = FP32_SUMS,
    ) -> Support:
        kinds = (kind(a), kind(b))
        blocks = kinds in (("1x128", "1x128"), ("1x128", "128x128"))
        if not blocks and kinds not in (("tensor", "tensor"), ("row", "row")):
            return Support(
                ok=False,
                reason="takes fp8 with scales per tensor, per row, of 1x128, or of 1x128 by "
                "128x128",
            )
        if a is not None and b is not None and a.element == E5M2 and b.element == E5M2:
            return Support(ok=False, reason="takes e5m2 on one side only")
        reason = why_not_sums(sums) if blocks else _why_not_whole_sums(sums)
        if reason := reason or _why_not_here(device_type, blocks):
            return Support(ok=False, reason=reason)
        return Support(ok=True, native=True, reason="fp8 on the matrix units by cuBLASLt")

    def cost(self, layer: LayerShape) -> Cost:
        return fp8_cost(layer)

    def mm(
        self, a_MK: Operand, b_NK: Operand, out_dtype: torch.dtype, sums: Accumulation = FP32_SUMS
    ) -> Tensor:
        assert isinstance(a_MK, QTensor)
        assert isinstance(b_NK, QTensor)
        scale_a = a_MK.scale_data
        scale_b = b_NK.scale_data
        assert scale_a is not None
        assert scale_b is not None
        fast = sums.bits is not None and sums.promote_every is None
        # Compiled code calls an operator of ours: torch.compile traces neither torch's function for
        # blocks nor the padding.
        call = torch.ops.lowprec.cublaslt if torch.compiler.is_compiling() else _multiply
        return call(a_MK.data, scale_a, b_NK.data, scale_b, b_NK.spec.kind, fast, out_dtype)


def _multiply(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    b_kind: str,
    fast: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return a . b^T: [M, K] . [N, K]^T -> [M, N] of `out_dtype`.

    Args:
        a, b: codes.
        scale_a, scale_b: scales as QTensors hold them.
        b_kind: the kind of b's scales.
        fast: whether sums stay in the matrix unit's 14 bits.
    """
    M, K = a.shape
    N = b.shape[0]
    if M == 0 or N == 0 or K == 0:
        return a.new_zeros((M, N), dtype=out_dtype)
    a = _full_width(_full_height(a, 4))
    b = _full_width(_full_height(b, 16))
    if b_kind in ("tensor", "row"):
        scale_a = scale_a.contiguous()
        scale_b = scale_b.contiguous().t()
        if b_kind == "row":
            scale_a = F.pad(scale_a, (0, 0, 0, a.shape[0] - M), value=1.0)
            scale_b = F.pad(scale_b, (0, b.shape[0] - N), value=1.0)
        # With scales per row, cuBLASLt gives bf16 results only.
        dtype = torch.bfloat16 if b_kind == "row" else out_dtype
        c = torch._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=dtype, use_fast_accum=fast)
    else:
        kinds = F.ScalingType
        scale_a = _spread(tile_scales(scale_a), a.shape[0])
        if b_kind == "1x128":
            kind_b = kinds.BlockWise1x128
            scale_b = _spread(tile_scales(scale_b), b.shape[0])
        else:
            kind_b = kinds.BlockWise128x128
            scale_b = _padded_blocks(block_scales(scale_b))
        dtype = out_dtype if out_dtype in (torch.bfloat16, torch.float32) else torch.float32
        c = F.scaled_mm(
            a, b.t(), scale_a.t(), kinds.BlockWise1x128, scale_b.t(), kind_b, output_dtype=dtype
        )
    if c.shape != (M, N):
        c = c[:M, :N].contiguous()
    return c if c.dtype == out_dtype else c.to(out_dtype)


@torch.library.custom_op("lowprec::cublaslt", mutates_args=())
def _multiply_op(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    b_kind: str,
    fast: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    return _multiply(a, scale_a, b, scale_b, b_kind, fast, out_dtype)


@_multiply_op.register_fake
def _(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    b_kind: str,
    fast: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def _why_not_whole_sums(sums: Accumulation) -> str | None:
    if (sums.bits, sums.promote_every) in ((None, None), (None, TILE), (14, None)):
        return None
    return f"sums in 14 bits, or promoted by cuBLASLt itself, not in {sums}"


def _why_not_here(device_type: str, blocks: bool) -> str | None:
    if device_type != "cuda":
        return f"needs a GPU with FP8, not {device_type}"
    if not torch.cuda.is_available():
        return "needs a GPU with FP8, and this machine has none"
    major, minor = torch.cuda.get_device_capability()
    this_one = f"this one has compute capability {major}.{minor}"
    if blocks and major != 9:
        return f"cuBLASLt's block scales need a Hopper GPU, {this_one}"
    if (major, minor) < (8, 9):
        return f"needs a GPU with FP8, {this_one}"
    if blocks and not hasattr(F, "scaled_mm"):
        return "needs torch.nn.functional.scaled_mm"
    return None


def _full_width(codes: Tensor) -> Tensor:
    """Return codes [R, K] with K filled up with zeros to a multiple of 16."""
    codes = padded_codes(codes)
    R, K = codes.shape
    if K % 16 == 0:
        return codes
    out = codes.new_zeros((R, -(-K // 16) * 16))
    out.view(torch.uint8)[:, :K] = codes.view(torch.uint8)
    return out


def _full_height(codes: Tensor, multiple: int) -> Tensor:
    """Return codes [R, K] with R filled up with zeros to a multiple of `multiple`."""
    R, K = codes.shape
    if R % multiple == 0:
        return codes
    out = codes.new_zeros((-(-R // multiple) * multiple, K))
    out.view(torch.uint8)[:R] = codes.contiguous().view(torch.uint8)
    return out


def _spread(scale: Tensor, R: int) -> Tensor:
    """Return 1x128 scales [K / 128, r] in packed memory for R >= r rows, R rounded up to a multiple
    of 4."""
    R = -(-R // 4) * 4
    if scale.shape[1] == R and scale.is_contiguous():
        return scale
    out = scale.new_ones((scale.shape[0], R))
    out[:, : scale.shape[1]] = scale
    return out


def _padded_blocks(scale: Tensor) -> Tensor:
    """Return 128x128 scales [N / 128, K / 128] in rows whose length is a multiple of 4."""
    blocks = scale.shape[1]
    wide = -(-blocks // 4) * 4
    if scale.stride(0) != wide:
        out = scale.new_ones((scale.shape[0], wide))
        out[:, :blocks] = scale
        return out
    return scale.as_strided((scale.shape[0], wide), (wide, 1))
