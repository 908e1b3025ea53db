"""The `hopper` backend: products of block-scaled FP8 by our own kernel (`hopper_kernel`), promoted
to fp32 every 128 elements."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowprec.formats import encoding
from lowprec.gemm.base import FP32_SUMS, Accumulation, GemmBackend, Operand, Size, Support
from lowprec.gemm.cost import Cost, LayerShape, fp8_cost
from lowprec.quant import OperandSpec, QTensor

TILE = 128
_ACCUMULATOR_BITS = 14
_LARGE = 1 << 25
"""Number of weights of a layer whose products run for half a millisecond."""


def kind(spec: OperandSpec | None) -> str:
    """Return the kind of an FP8 operand's scales (see OperandSpec); "" for any other operand."""
    return "" if spec is None else spec.kind


def why_not_sums(sums: Accumulation) -> str | None:
    """Return why Hopper's block-scaled products can't be summed in this way; None if they can.
    They sum 128 elements in 14 bits, and those sums in fp32."""
    if sums.promote_every not in (None, TILE):
        return f"promotes every {TILE} elements, not every {sums.promote_every}"
    if sums.bits is not None and (sums.bits, sums.promote_every) != (_ACCUMULATOR_BITS, TILE):
        return f"sums in {_ACCUMULATOR_BITS} bits, promoted every {TILE}"
    return None


class HopperBackend(GemmBackend):
    """Block-scaled FP8 products on Hopper GPUs by a Gluon kernel."""

    name = "hopper"

    def rank(self, a: OperandSpec | None, b: OperandSpec | None, size: Size) -> int:
        """Return -1 where this backend comes before cuBLASLt (0), and 1 elsewhere.

        With 1x128 scales on both sides it is 7 to 20% faster than cuBLASLt. With 128x128 blocks it
        is, on large layers, 2 to 12% faster where the result is wide and up to 16% slower where it
        is not. On smaller layers it is as fast and starts earlier, because cuBLASLt looks for an
        algorithm in every call.
        """
        if kind(b) == "1x128":
            return -1
        faster = kind(b) == "128x128" and (size.wide or size.weights < _LARGE)
        return -1 if faster else 1

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
        if reason := why_not_sums(sums) or why_not_hopper(device_type) or _why_no_gluon():
            return Support(ok=False, reason=reason)
        return Support(
            ok=True, native=True, reason=f"fp8 on the matrix units, promoted to fp32 every {TILE}"
        )

    def cost(self, layer: LayerShape) -> Cost:
        return fp8_cost(layer)

    def mm(
        self,
        a_MK: Operand,
        b_NK: Operand,
        out_dtype: torch.dtype,
        sums: Accumulation = FP32_SUMS,
        *,
        bias: Tensor | None = None,
    ) -> Tensor:
        assert isinstance(a_MK, QTensor)
        assert isinstance(b_NK, QTensor)
        scale_a = a_MK.scale_data
        scale_b = b_NK.scale_data
        assert scale_a is not None
        assert scale_b is not None
        by_rows = b_NK.spec.kind == "1x128"
        call = torch.ops.lowprec.scaled_gemm if torch.compiler.is_compiling() else _scaled_gemm
        return call(a_MK.data, scale_a, b_NK.data, scale_b, by_rows, bias, out_dtype)


def why_not_hopper(device_type: str) -> str | None:
    """Return why a device of this type is no Hopper GPU; None if it is one."""
    if device_type != "cuda":
        return f"needs a Hopper GPU, not {device_type}"
    if not torch.cuda.is_available():
        return "needs a Hopper GPU, and this machine has none"
    major, minor = torch.cuda.get_device_capability()
    return (
        None
        if major == 9
        else f"needs a Hopper GPU (compute capability 9.0), this one has {major}.{minor}"
    )


@cache
def _why_no_gluon() -> str | None:
    try:
        from lowprec.gemm import hopper_kernel  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"needs Triton's Gluon: {error}"
    return None


def tile_scales(scale_MK: Tensor) -> Tensor:
    """Return 1x128 scales [M, K / 128] as kernels read them: fp32 in memory [K / 128, M], with rows
    that start on 16 bytes."""
    scale = _fp32(scale_MK).t()
    if scale.stride(1) == 1 and scale.stride(0) % 4 == 0 and scale.data_ptr() % 16 == 0:
        return scale
    blocks, M = scale.shape
    padded = scale.new_empty(blocks, -(-M // 4) * 4)
    padded[:, :M] = scale
    return padded[:, :M]


def block_scales(scale_NK: Tensor) -> Tensor:
    """Return 128x128 scales [N / 128, K / 128] as kernels read them: fp32 with contiguous rows."""
    scale = _fp32(scale_NK)
    return scale if scale.stride(1) == 1 else scale.contiguous()


def _fp32(scale: Tensor) -> Tensor:
    return encoding.decode_scale(scale) if scale.dtype == torch.uint8 else scale


def padded_codes(codes: Tensor) -> Tensor:
    """Return the codes with rows that start on 16 bytes, as tensor maps need them."""
    if codes.stride(1) == 1 and codes.stride(0) % 16 == 0 and codes.data_ptr() % 16 == 0:
        return codes
    R, K = codes.shape
    padded = codes.new_empty(R, -(-K // 16) * 16)
    padded[:, :K] = codes
    return padded[:, :K]


def _scaled_gemm(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    column_scales: bool,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return a . b^T + bias: [M, K] . [N, K]^T -> [M, N] of `out_dtype`.

    Args:
        a, b: codes.
        scale_a, scale_b: scales as QTensors hold them.
        column_scales: whether those of b are 1x128 too, not 128x128.
        bias: [N].
    """
    M, K = a.shape
    N = b.shape[0]
    if M == 0 or N == 0 or K == 0:
        zeros = a.new_zeros((M, N), dtype=out_dtype)
        return zeros if bias is None else zeros + bias
    dtype = out_dtype if out_dtype in (torch.bfloat16, torch.float32) else torch.float32
    step = 16 // dtype.itemsize
    padded_N = -(-N // step) * step
    c = torch.empty((M, padded_N), dtype=dtype, device=a.device)
    if padded_N != N:
        c = c[:, :N]
    scale_a = tile_scales(scale_a)
    scale_b = tile_scales(scale_b) if column_scales else block_scales(scale_b)
    launch = _launch_function()
    launch(
        padded_codes(a),
        scale_a,
        padded_codes(b),
        scale_b,
        column_scales,
        bias,
        c,
        choose_tile(M, N, a.device.index or 0),
    )
    if padded_N != N:
        c = c.contiguous()
    return c if dtype == out_dtype else c.to(out_dtype)


@cache
def _launch_function() -> Any:
    from lowprec.gemm import hopper_launch

    return hopper_launch.launch


@torch.library.custom_op("lowprec::scaled_gemm", mutates_args=())
def _scaled_gemm_op(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    column_scales: bool,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return _scaled_gemm(a, scale_a, b, scale_b, column_scales, bias, out_dtype)


@_scaled_gemm_op.register_fake
def _(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    column_scales: bool,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


@dataclass(frozen=True)
class Tile:
    """`rows` x 128 results of two warp groups, each of `waves` times 64 rows."""

    rows: int
    waves: int


LARGE = Tile(256, 2)
SMALL = Tile(128, 1)
_SMALL_COSTS = 1.08
"""Time of two small tiles over the time of a large one, measured (docs/experiments.md)."""


@cache
def choose_tile(M: int, N: int, device: int) -> Tile:
    """Return the tile whose rounds over the processors take less time."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    rounds = {
        tile: -(-(-(-M // tile.rows) * -(-N // 128)) // processors) for tile in (LARGE, SMALL)
    }
    return LARGE if 2 * rounds[LARGE] <= _SMALL_COSTS * rounds[SMALL] else SMALL
