"""Transformer Engine's FP8 quantisers in the layouts of `lowprec.quant`: what tests compare ours
with. No backend; nothing else uses it.

Where Transformer Engine keeps the scales of a matrix [R, K] that its products take:

    1x128      [K / 128, R], the rows of a multiple of 4 elements      ours [R, K / 128]
    128x128    [R / 128, K / 128], the rows of a multiple of 4         ours [R / 128, K / 128]
    tensor     [1]                                                     ours [1, 1]

Its scale is 1 / RN(448 / amax), and a code is x * RN(448 / amax); ours are amax / 448 and x * RN(1
/ scale). So power-of-two scales and their codes are the same bits, while fp32 scales differ in
their last bit, and codes where that decides a rounding. A block of zeros, or one that holds
infinity or NaN, has a scale of 1 there.
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
    """A matrix, or with `transposed` its transpose, quantised by Transformer Engine along its last
    axis.

    Both directions come from one read of x, as in a layer.

    Args:
        x_RK: on a CUDA device, fp32, bf16 or fp16 [R, K]; R and K are multiples of 16.
        spec: FP8 with scales of 1x128 or 128x128, fp32 or e8m0, or of the tensor, fp32.
    Returns:
        The codes [R, K] in the element's dtype, and the fp32 scales, as `QTensor.data` and
        `QTensor.scale` have them; of x^T [K, R] if `transposed`.
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
    made = _quantizer(spec, x_RK.device)(x_RK.contiguous())
    rows, cols = (x_RK.shape[1], x_RK.shape[0]) if transposed else (x_RK.shape[0], x_RK.shape[1])
    if spec.kind == "tensor":
        codes, scale = made._transpose if transposed else made._data, made._scale_inv.reshape(1, 1)
    else:
        codes = made._columnwise_data if transposed else made._rowwise_data
        scale = made._columnwise_scale_inv if transposed else made._rowwise_scale_inv
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
    quantizer.internal = True  # plain fields instead of a tensor subclass, as a te.Linear has them
    return quantizer
