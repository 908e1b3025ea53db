"""Gluon kernel for Hopper that quantises 128 x 128 tiles along their rows and along their columns,
from one read.

    x [R, C]   ->  codes [R, C] of x, codes [C, R] of x^T, and the scales of each

One warp keeps tensor loads in flight. Two groups of four warps quantise, each every second tile,
and pass both results to tensor stores.

The layout of registers makes it fast. A thread holds 16 consecutive rows of 4 consecutive columns,
twice. For the row-major result it writes 4 codes of a row at a time, and for the transposed one 16
codes of a column, which are in its registers already. So the transposition needs no exchange
between threads; only the largest magnitudes are exchanged. A layout that the compiler chooses, in
plain Triton, reaches 83% of a copy's rate, this one 88 to 90% (docs/experiments.md has the other
attempts).
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma


@gluon.constexpr_function
def tile_layout():
    """Return the layout of a tile [rows, columns] over 4 warps.

    A thread holds 16 consecutive rows of 4 consecutive columns, and the same rows of the 4 columns
    that lie 64 further on.
    """
    return gl.BlockedLayout([16, 4], [2, 16], [4, 1], [1, 0])


@gluon.constexpr_function
def turned_layout():
    """Return the layout of the transposed tile [columns, rows].

    Each thread holds the same elements as in `tile_layout`, but its registers are in the order of
    the rows.
    """
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [1, 0], [2, 0], [64, 0]],
        lane_bases=[[4, 0], [8, 0], [16, 0], [32, 0], [0, 16]],
        warp_bases=[[0, 32], [0, 64]],
        block_bases=[],
        shape=[128, 128],
    )


@gluon.jit
def scale_of(
    amax_bits, E8M0: gl.constexpr, LARGEST: gl.constexpr, EMAX: gl.constexpr, CARRY: gl.constexpr
):
    """Return the fp32 scale for the bits of a largest magnitude; see formats/scaling.py.

    Compared as integers, the bits of NaN are larger than those of infinity.
    """
    if E8M0:
        biased = gl.minimum(gl.maximum(((amax_bits + CARRY) >> 23) - EMAX, 0), 254)
        scale = gl.maximum(biased << 23, 1 << 22).to(gl.float32, bitcast=True)
    else:
        # amax / LARGEST, correctly rounded: a product with the constant's reciprocal and one
        # correction (Markstein). A scale of at least the smallest normal number keeps the
        # reciprocal finite.
        amax = amax_bits.to(gl.float32, bitcast=True)
        quotient = amax * (1.0 / LARGEST)
        scale = gl.fma(gl.fma(quotient, -LARGEST, amax), 1.0 / LARGEST, quotient)
        scale = gl.maximum(scale, 1.1754943508222875e-38)
    return gl.where(amax_bits >= 0x7F800000, float("nan"), scale)


@gluon.jit
def _reciprocal(x):
    """Return 1 / x with an error of at most one unit in the last place."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _exp2(x):
    """Return 2^x by the hardware's approximation."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def inverse(scale, E8M0: gl.constexpr):
    """Return 1 / scale, correctly rounded."""
    if E8M0:
        # 2^-E by its bits. At either end of the range, one of the two is the subnormal 2^-127.
        bits = scale.to(gl.int32, bitcast=True)
        y = gl.maximum((254 - (bits >> 23)) << 23, 1 << 22).to(gl.float32, bitcast=True)
        return gl.where(bits >= 0x7F800000, float("nan"), y)
    # The hardware's approximation and one Newton step. The result is correctly rounded for every
    # mantissa: a GPU test tries them all.
    y = _reciprocal(scale)
    return gl.fma(y, gl.fma(-scale, y, 1.0), y)


@gluon.jit
def _larger(a, b):
    """Return the larger of two numbers, or NaN if one of them is NaN."""
    return gl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def largest_bits(x, axis: gl.constexpr):
    """Return the bits of max |x| along an axis; those of NaN if there is one.

    The maximum is taken in floating point, where the magnitude costs no instruction.
    """
    return gl.reduce(gl.abs(x), axis, _larger).to(gl.int32, bitcast=True)


@gluon.jit
def _load_tiles(
    x_desc,
    y_desc,
    x_bufs,
    y_bufs,
    ready,
    empty,
    row_tiles,
    col_tiles,
    STAGES: gl.constexpr,
    INPUTS: gl.constexpr,
):
    """Load tiles, as far ahead as there are buffers. One warp runs this."""
    step = 0
    for tile in range(gl.program_id(0), row_tiles * col_tiles, gl.num_programs(0)):
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        bar = ready.index(stage)
        mbarrier.expect(bar, INPUTS * x_desc.block_type.nbytes)
        row_tile = tile // col_tiles
        col_tile = tile % col_tiles
        at = [row_tile * 128, col_tile * 128]
        tma.async_copy_global_to_shared(x_desc, at, bar, x_bufs.index(stage))
        if INPUTS == 2:
            tma.async_copy_global_to_shared(y_desc, at, bar, y_bufs.index(stage))
        step += 1


@gluon.jit
def _quantize_tiles(
    x_bufs,
    y_bufs,
    row_bufs,
    col_bufs,
    ready,
    empty,
    row_desc,
    col_desc,
    row_scales,
    row_scale_stride,
    col_scales,
    col_scale_stride,
    R,
    C,
    row_tiles,
    col_tiles,
    STAGES: gl.constexpr,
    INPUTS: gl.constexpr,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
    E8M0: gl.constexpr,
    LARGEST: gl.constexpr,
    EMAX: gl.constexpr,
    CARRY: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Quantise every second tile, beginning with tile GROUP (0 or 1). One warp group runs this."""
    layout: gl.constexpr = tile_layout()
    # One scale per thread: each is computed once, not in every thread that needs it.
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    step = GROUP
    for tile in range(
        gl.program_id(0) + GROUP * gl.num_programs(0), row_tiles * col_tiles, 2 * gl.num_programs(0)
    ):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        tma.store_wait(0)
        x = x_bufs.index(stage).load(layout)
        if INPUTS == 2:
            up = y_bufs.index(stage).load(layout)
            gate = x.to(gl.float32)
            # Round where the separate operations would round, so that fusing changes no bit.
            x = (gate * _reciprocal(1.0 + _exp2(gate * -1.4426950408889634))).to(x.dtype) * up
        mbarrier.arrive(empty.index(stage), count=1)
        x = x.to(gl.float32)
        row_tile = tile // col_tiles
        col_tile = tile % col_tiles
        if ROWS == 2 or COLS == 2:
            block_scale = scale_of(
                gl.max(gl.expand_dims(largest_bits(x, 0), 0), 1), E8M0, LARGEST, EMAX, CARRY
            )
            by_block = x * gl.expand_dims(inverse(block_scale, E8M0), 1)
            one = gl.arange(0, 1, layout=gl.SliceLayout(1, layout))
        if ROWS != 0:
            if ROWS == 2:
                scaled = by_block
                gl.store(row_scales + row_tile * row_scale_stride + col_tile + one, block_scale)
            else:
                scale = scale_of(
                    gl.convert_layout(largest_bits(x, 1), line), E8M0, LARGEST, EMAX, CARRY
                )
                factor = gl.convert_layout(inverse(scale, E8M0), gl.SliceLayout(1, layout))
                scaled = x * gl.expand_dims(factor, 1)
                r = row_tile * 128 + gl.arange(0, 128, layout=line)
                gl.store(row_scales + col_tile * row_scale_stride + r, scale, mask=r < R)
            row_buf = row_bufs.index(GROUP)
            row_buf.store(scaled.to(row_desc.dtype))
        if COLS != 0:
            if COLS == 2:
                scaled = by_block
                gl.store(col_scales + col_tile * col_scale_stride + row_tile + one, block_scale)
            else:
                scale = scale_of(
                    gl.convert_layout(largest_bits(x, 0), line), E8M0, LARGEST, EMAX, CARRY
                )
                factor = gl.convert_layout(inverse(scale, E8M0), gl.SliceLayout(0, layout))
                scaled = x * gl.expand_dims(factor, 0)
                c = col_tile * 128 + gl.arange(0, 128, layout=line)
                gl.store(col_scales + row_tile * col_scale_stride + c, scale, mask=c < C)
            # Reorder each thread's registers to the transposed tile, so that 16 codes of a column
            # are stored at once.
            turned = gl.convert_layout(gl.permute(scaled, (1, 0)), turned_layout())
            col_buf = col_bufs.index(GROUP)
            col_buf.store(turned.to(col_desc.dtype))
        fence_async_shared()
        if ROWS != 0:
            tma.async_copy_shared_to_global(
                row_desc, [row_tile * 128, col_tile * 128], row_bufs.index(GROUP)
            )
        if COLS != 0:
            tma.async_copy_shared_to_global(
                col_desc, [col_tile * 128, row_tile * 128], col_bufs.index(GROUP)
            )
        step += 2
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["row_scale_stride", "col_scale_stride", "R", "C"])
def quantize_tiles(
    x_desc,
    y_desc,
    row_desc,
    row_scales,
    row_scale_stride,
    col_desc,
    col_scales,
    col_scale_stride,
    R,
    C,
    STAGES: gl.constexpr,
    INPUTS: gl.constexpr,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
    E8M0: gl.constexpr,
    LARGEST: gl.constexpr,
    EMAX: gl.constexpr,
    CARRY: gl.constexpr,
):
    """Quantise x [R, C], or silu(x) * y if INPUTS is 2, and its transpose.

    ROWS and COLS say how x and x^T are quantised: 0 not at all, 1 with 1x128 scales, 2 with 128x128
    scales.
    """
    # An even number of stages gives each buffer to one warp group. A barrier distinguishes only
    # even and odd rounds, so two groups that share a buffer would confuse their rounds.
    gl.static_assert(STAGES % 2 == 0)
    x_bufs = gl.allocate_shared_memory(
        x_desc.dtype, [STAGES] + x_desc.block_type.shape, x_desc.layout
    )
    y_bufs = x_bufs
    if INPUTS == 2:
        y_bufs = gl.allocate_shared_memory(
            y_desc.dtype, [STAGES] + y_desc.block_type.shape, y_desc.layout
        )
    row_bufs = gl.allocate_shared_memory(
        row_desc.dtype, [2] + row_desc.block_type.shape, row_desc.layout
    )
    col_bufs = gl.allocate_shared_memory(
        col_desc.dtype, [2] + col_desc.block_type.shape, col_desc.layout
    )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    # Triton turns integer arguments equal to 1 into constants, and a partition takes no constants,
    # hence `to_tensor`.
    R = gl.to_tensor(R)
    C = gl.to_tensor(C)
    col_tiles = gl.cdiv(C, 128)
    row_tiles = gl.cdiv(R, 128)
    row_scale_stride = gl.to_tensor(row_scale_stride)
    col_scale_stride = gl.to_tensor(col_scale_stride)
    # fmt: off
    gl.warp_specialize(
        [
            (_quantize_tiles, (x_bufs, y_bufs, row_bufs, col_bufs, ready, empty, row_desc, col_desc,
                               row_scales, row_scale_stride, col_scales, col_scale_stride, R, C,
                               row_tiles, col_tiles, STAGES, INPUTS, ROWS, COLS, E8M0, LARGEST,
                               EMAX, CARRY, 0)),
            (_quantize_tiles, (x_bufs, y_bufs, row_bufs, col_bufs, ready, empty, row_desc, col_desc,
                               row_scales, row_scale_stride, col_scales, col_scale_stride, R, C,
                               row_tiles, col_tiles, STAGES, INPUTS, ROWS, COLS, E8M0, LARGEST,
                               EMAX, CARRY, 1)),
            (_load_tiles, (x_desc, y_desc, x_bufs, y_bufs, ready, empty, row_tiles, col_tiles,
                           STAGES, INPUTS)),
        ],
        [4, 1],
        [240, 24],
    )
    # fmt: on
