"""Launch `hopper_kernel.scaled_gemm`."""

from typing import Any

import torch
from torch import Tensor

from lowprec.gemm.hopper_kernel import scaled_gemm
from lowprec.quant.launch import Launcher, Map, processors

_launcher = Launcher(scaled_gemm, num_warps=4)


def launch(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    column_scales: bool,
    bias: Tensor | None,
    c: Tensor,
    tile: Any,
) -> None:
    """Compute c = (a, scale_a) . (b, scale_b)^T + bias: [M, K] . [N, K]^T -> [M, N].

    All rows start on 16 bytes. The kernel's docstring gives the layouts of the scales.
    """
    M, K = a.shape
    N = b.shape[0]
    stages = 3
    if tile.waves == 1:
        stages = 4 if c.dtype == torch.float32 else 5
    constants = (column_scales, bias is not None, stages, tile.waves)
    pointer = c if bias is None else bias
    stride = scale_b.stride(0)

    def arguments() -> tuple[Any, ...]:
        # Scales of 128x128 blocks are read one by one: their map is then not used.
        maps = (
            Map(scale_a, (1, tile.rows), swizzled=False),
            Map(scale_b if column_scales else scale_a, (1, 128), swizzled=False),
        )
        return (
            Map(a, (tile.rows, 128)),
            Map(b, (128, 128)),
            Map(c, (64, 128)),
            *maps,
            scale_b,
            stride,
            pointer,
            M,
            N,
            K,
            *constants,
        )

    addresses = (
        a.data_ptr(),
        scale_a.data_ptr(),
        b.data_ptr(),
        scale_b.data_ptr(),
        c.data_ptr(),
        pointer.data_ptr(),
    )
    place = (*addresses, M, N, K, a.stride(0), b.stride(0), c.stride(0), scale_a.stride(0), stride)
    key = (
        a.dtype,
        b.dtype,
        c.dtype,
        pointer.dtype,
        addresses[3] % 16 == 0,
        addresses[5] % 16 == 0,
        constants,
    )
    tiles = -(-M // tile.rows) * -(-N // 128)
    _launcher(a.device.index, key, place, min(tiles, processors(a.device.index)), arguments)
