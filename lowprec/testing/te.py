"""Transformer Engine's FP8 quantisers as a test oracle, in the layouts of `lowprec.quant`.

This is not a backend; only tests use it. The scales of a matrix [R, K] have these shapes:

    block      Transformer Engine, for its products                    lowprec
    1x128      [K / 128, R], rows padded to a multiple of 4            [R, K / 128]
    128x128    [R / 128, K / 128], rows padded to a multiple of 4      [R / 128, K / 128]
    tensor     [1]                                                     [1, 1]

Transformer Engine's scale is 1 / RN(448 / amax), and its code is x * RN(448 / amax). Ours are
amax / 448 and x * RN(1 / scale). So power-of-two scales and their codes have the same bits. fp32
scales differ in the last bit, and so do the codes for which this bit decides the rounding. In
Transformer Engine, a block of zeros, or a block that holds infinity or NaN, has a scale of 1.
"""

from typing import Any

import torch
from torch import Tensor

from lowprec.quant import OperandSpec

_KINDS = ("1x128", "128x128", "tensor")


@torch.no_grad()
def te_quantized(
    x_RK: Tensor, spec: OperandSpec, *, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantise a matrix, or its transpose, along its last axis by Transformer Engine.

    Both directions come from one read of x, as in a layer.

    Args:
        x_RK: fp32, bf16 or fp16 [R, K] on a CUDA device; R and K are multiples of 16.
        spec: an FP8 operand with 1x128 or 128x128 blocks and fp32 or e8m0 scales, or with one fp32
            scale for the tensor.
    Returns:
        The codes [R, K] in the element's dtype and the fp32 scales, in the layouts of
        `QTensor.data` and `QTensor.scale`. With `transposed`, those of x^T [K, R].
    Raises:
        ValueError: Transformer Engine has no such quantiser.
    """
    scaling = spec.scaling
    if (
        spec.kind not in _KINDS
        or scaling is None
        or spec.stochastic
        or scaling.history
        or scaling.rule != "rceil"
    ):
        raise ValueError(f"Transformer Engine has no quantiser for {spec}")
    q = _quantizer(spec, x_RK.device)(x_RK.contiguous())
    rows, cols = (x_RK.shape[1], x_RK.shape[0]) if transposed else (x_RK.shape[0], x_RK.shape[1])
    if spec.kind == "tensor":
        codes = q._transpose if transposed else q._data
        scale = q._scale_inv.reshape(1, 1)
    else:
        codes = q._columnwise_data if transposed else q._rowwise_data
        scale = q._columnwise_scale_inv if transposed else q._rowwise_scale_inv
        scale = scale[:, :rows].t() if spec.kind == "1x128" else scale[:, : -(-cols // 128)]
    return codes.view(spec.element.storage), scale.contiguous()


def _quantizer(spec: OperandSpec, device: torch.device) -> Any:
    import transformer_engine.pytorch as te

    assert spec.scaling is not None
    element = {"e4m3": te.DType.kFloat8E4M3, "e5m2": te.DType.kFloat8E5M2}[spec.element.name]
    if spec.kind == "tensor":
        quantizer = te.Float8CurrentScalingQuantizer(
            element, device, rowwise=True, columnwise=True, force_pow_2_scales=False
        )
    else:
        quantizer = te.Float8BlockQuantizer(
            element,
            rowwise=True,
            columnwise=True,
            force_pow_2_scales=spec.scaling.scale_format == "e8m0",
            block_scaling_dim=1 if spec.kind == "1x128" else 2,
        )
    quantizer.internal = True  # Plain fields instead of a tensor subclass, as in te.Linear.
    return quantizer
