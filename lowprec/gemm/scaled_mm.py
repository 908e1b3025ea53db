"""The `scaled_mm` backend: cuBLASLt's FP8 products through torch, with scales per tensor, per row, or of blocks on Hopper.

Layouts (docs/numerics.md): operands row-major, dimensions multiples of 16. 1x128 scales lie in memory as [K / 128, M], 128x128 ones as
[N / 128, L] with L = K / 128 rounded up to 4: unpadded ones gave wrong results before PyTorch's pull request 166752.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec.formats.element import E4M3, E5M2
from lowprec.formats.scaling import ALL
from lowprec.gemm.base import FP32_SUMS, Accumulation, GemmBackend, Operand, Support
from lowprec.gemm.hopper import TILE, block_scaled, block_scales, padded_codes, tile_scales, why_not_sums
from lowprec.quant import OperandSpec, QTensor

_WHOLE = {(ALL, ALL): "tensor", (1, ALL): "row"}


class ScaledMMBackend(GemmBackend):
    name = "scaled_mm"

    def supports(self, a: OperandSpec | None, b: OperandSpec | None, device_type: str, sums: Accumulation = FP32_SUMS) -> Support:
        kinds = (_kind(a), _kind(b))
        blocks = kinds in (("1x128", "1x128"), ("1x128", "128x128"))
        if not blocks and kinds not in (("tensor", "tensor"), ("row", "row")):
            return Support(ok=False, reason="takes fp8 with scales per tensor, per row, of 1x128, or of 1x128 by 128x128")
        if a is not None and b is not None and a.element is E5M2 and b.element is E5M2:
            return Support(ok=False, reason="takes e5m2 on one side only")
        if reason := (why_not_sums(sums) if blocks else _why_not_whole_sums(sums)) or _why_not_here(device_type, blocks):
            return Support(ok=False, reason=reason)
        return Support(ok=True, native=True, reason="fp8 on the matrix units by cuBLASLt")

    def mm(self, a_MK: Operand, b_NK: Operand, out_dtype: torch.dtype, sums: Accumulation = FP32_SUMS) -> Tensor:
        assert isinstance(a_MK, QTensor)
        assert isinstance(b_NK, QTensor)
        (M, K), N = a_MK.shape, b_NK.shape[0]
        if M == 0 or N == 0 or K == 0:
            return a_MK.data.new_zeros((M, N), dtype=out_dtype)
        a, b = _full_width(_full_height(a_MK.data, 4)), _full_width(_full_height(b_NK.data, 16))
        kind = _kind(a_MK.spec)
        if kind in ("tensor", "row"):
            scale_a, scale_b = _whole_scale(a_MK), _whole_scale(b_NK).t()
            if kind == "row":
                scale_a = F.pad(scale_a, (0, 0, 0, a.shape[0] - M), value=1.0)
                scale_b = F.pad(scale_b, (0, b.shape[0] - N), value=1.0)
            # Per-row scales want bf16 results
            dtype = torch.bfloat16 if kind == "row" else out_dtype
            c = torch._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=dtype, use_fast_accum=sums.bits is not None)
        else:
            kinds = F.ScalingType
            scale_a = _spread(tile_scales(a_MK), a.shape[0])
            if _kind(b_NK.spec) == "1x128":
                recipe_b, scale_b = kinds.BlockWise1x128, _spread(tile_scales(b_NK), b.shape[0])
            else:
                recipe_b, scale_b = kinds.BlockWise128x128, _padded_blocks(block_scales(b_NK))
            dtype = out_dtype if out_dtype in (torch.bfloat16, torch.float32) else torch.float32
            c = F.scaled_mm(a, b.t(), scale_a.t(), kinds.BlockWise1x128, scale_b.t(), recipe_b, output_dtype=dtype)
        return c[:M, :N].contiguous().to(out_dtype)


def _kind(spec: OperandSpec | None) -> str | None:
    scaling = None if spec is None else spec.scaling
    if spec is None or scaling is None or spec.element not in (E4M3, E5M2) or not scaling.symmetric:
        return None
    if (block := block_scaled(spec)) is not None:
        return f"{block[0]}x{block[1]}"
    return _WHOLE.get(scaling.block) if scaling.scale_format == "fp32" else None


def _why_not_whole_sums(sums: Accumulation) -> str | None:
    if (sums.bits, sums.promote_every) in ((None, None), (None, TILE), (14, None)):
        return None
    return f"sums in 14 bits, or promoted by cuBLASLt itself, not in {sums}"


def _why_not_here(device_type: str, blocks: bool) -> str | None:
    if device_type != "cuda":
        return f"needs a GPU with FP8, not {device_type}"
    if not torch.cuda.is_available():
        return "needs a GPU with FP8, and this machine has none"
    capability = torch.cuda.get_device_capability()
    if blocks and capability[0] != 9:
        return f"cuBLASLt's block scales need a Hopper GPU, this one has compute capability {capability[0]}.{capability[1]}"
    if capability < (8, 9):
        return f"needs a GPU with FP8, this one has compute capability {capability[0]}.{capability[1]}"
    return None if not blocks or hasattr(F, "scaled_mm") else "needs torch.nn.functional.scaled_mm"


def _whole_scale(q: QTensor) -> Tensor:
    assert q.scale_data is not None
    return q.scale_data.contiguous()


def _full_width(codes: Tensor) -> Tensor:
    """Codes [R, K] with K filled up with zeros to a multiple of 16."""
    codes = padded_codes(codes)
    R, K = codes.shape
    if K % 16 == 0:
        return codes
    out = codes.new_zeros((R, -(-K // 16) * 16))
    out.view(torch.uint8)[:, :K] = codes.view(torch.uint8)
    return out


def _full_height(codes: Tensor, multiple: int) -> Tensor:
    """Codes [R, K] with R filled up with zeros."""
    R, K = codes.shape
    if R % multiple == 0:
        return codes
    out = codes.new_zeros((-(-R // multiple) * multiple, K))
    out.view(torch.uint8)[:R] = codes.contiguous().view(torch.uint8)
    return out


def _spread(scale: Tensor, R: int) -> Tensor:
    """1x128 scales [K / 128, r] in memory that is packed, for R >= r rows, R a multiple of 4."""
    R = -(-R // 4) * 4
    if scale.shape[1] == R and scale.is_contiguous():
        return scale
    out = scale.new_ones((scale.shape[0], R))
    out[:, : scale.shape[1]] = scale
    return out


def _padded_blocks(scale: Tensor) -> Tensor:
    """128x128 scales [N / 128, K / 128] in rows of a multiple of 4."""
    blocks = scale.shape[1]
    wide = -(-blocks // 4) * 4
    if scale.stride(0) != wide:
        out = scale.new_ones((scale.shape[0], wide))
        out[:, :blocks] = scale
        return out
    return scale.as_strided((scale.shape[0], wide), (wide, 1))
