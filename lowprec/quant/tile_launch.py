"""Launching the quantisers of `tile_kernels`."""

from torch import Tensor

from lowprec.quant.launch import Launcher, Map, processors
from lowprec.quant.tile_kernels import quantize_tiles

_TILE = (128, 128)
_launcher = Launcher(quantize_tiles, num_warps=4)


def launch(
    x: Tensor,
    y: Tensor | None,
    results: list[Tensor],
    rows: int,
    cols: int,
    e8m0: bool,
    largest: float,
    emax: int,
    carry: int,
) -> None:
    """Fill `results` (codes and scales along the rows, and of the transpose) from x, or from
    silu(x) * y."""
    codes_r, scales_r, codes_c, scales_c = results
    R, C = x.shape
    inputs = 1 if y is None else 2
    stages = 4 if inputs * x.element_size() == 2 else 2
    constants = (stages, inputs, rows, cols, e8m0, largest, emax, carry)
    stride_r, stride_c = scales_r.stride(0), scales_c.stride(0)

    def arguments() -> tuple[object, ...]:
        x_map = Map(x, _TILE)
        # A direction that is not asked for needs a map too; any will do.
        row_map, col_map = (
            Map(codes_r if rows else codes_c, _TILE),
            Map(codes_c if cols else codes_r, _TILE),
        )
        return (
            x_map,
            x_map if y is None else Map(y, _TILE),
            row_map,
            scales_r,
            stride_r,
            col_map,
            scales_c,
            stride_c,
            R,
            C,
            *constants,
        )

    addresses = tuple(t.data_ptr() for t in (x, x if y is None else y, *results))
    place = (*addresses, R, C, x.stride(0), 0 if y is None else y.stride(0), stride_r, stride_c)
    tiles = -(-R // 128) * -(-C // 128)
    _launcher(
        x.device.index,
        (x.dtype, codes_r.dtype, constants),
        place,
        min(tiles, processors(x.device.index)),
        arguments,
    )
