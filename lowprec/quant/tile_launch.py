"""Launch of the quantiser of `tile_kernels`."""

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
    """Quantise x [R, C], or silu(x) * y, and its transpose into `results`.

    Args:
        x, y: bf16 or fp32, both with tensor maps; y is None or a matrix like x.
        results: codes of x, its scales, codes of x^T, its scales (see
            `triton_quantize._empty_results`).
        rows, cols: how x and x^T are quantised: 0 not at all, 1 with 1x128 scales, 2 with 128x128
            scales.
        e8m0: whether scales are powers of two; else they are fp32.
        largest, emax: the element format's largest value, and the exponent of that.
        carry: the rule of e8m0 scales, as `formats.scaling.e8m0_carry` gives it.
    """
    codes_r, scales_r, codes_c, scales_c = results
    R, C = x.shape
    inputs = 1 if y is None else 2
    # As many buffers as shared memory has room for, and an even number (see `quantize_tiles`).
    stages = 4 if inputs * x.element_size() == 2 else 2
    constants = (stages, inputs, rows, cols, e8m0, largest, emax, carry)
    stride_r = scales_r.stride(0)
    stride_c = scales_c.stride(0)

    def arguments() -> tuple[object, ...]:
        x_map = Map(x, _TILE)
        # A direction that is not wanted needs a map too, which the kernel does not use.
        row_map = Map(codes_r if rows else codes_c, _TILE)
        col_map = Map(codes_c if cols else codes_r, _TILE)
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
