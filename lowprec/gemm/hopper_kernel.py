"""A persistent, warp-specialised FP8 GEMM for Hopper in Gluon, with block scales and promotion to
fp32 every 128 elements.

    c_MN = sum over k of s_a[m, k] * s_b[n, k] * (sum over 128 elements of a_MK * b_NK)

One warp keeps the tensor loads in flight; two warp groups of four warps multiply. Each group owns
64 * WAVES rows of the tile and takes them 64 at a time: while one group adds its 128-element
partial sums, times their scales, to its fp32 accumulators, the other group's matrix instructions
run (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). Two facts decide the speed, as measured
(docs/experiments.md):

* Every matrix instruction reads shared memory. So a tile of 256 x 128 (WAVES = 2), which uses its b
  twice as often, is faster than 128 x 128.
* The accumulators of that tile take 128 registers, its partial sums 64, the column scales 32. They
  fit into 240 registers only if a group's second product does not start before the partial sums of
  the first one are added. `_pin` enforces that; without it the compilers interleave the two
  products and spill registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _place(tile, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Return the row and the column of a tile. Tiles are numbered in stripes of 8 rows of tiles,
    column by column, so that tiles that run at one time share operands in the L2 cache."""
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    first = tile // (8 * tiles_n) * 8
    height = gl.minimum(tiles_m - first, 8)
    inside = tile % (8 * tiles_n)
    return first + inside % height, inside // height


@gluon.jit
def _pin(x):
    """Return x, computed before all that follows."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _load(a_desc, b_desc, sa_desc, sb_desc, a_bufs, b_bufs, sa_bufs, sb_bufs, ready, empty,
          M, N, steps_k, COLUMN_SCALES: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Load the tiles of a and b and their scales, stage by stage, into shared memory."""
    BLOCK_M: gl.constexpr = a_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = b_desc.block_type.shape[0]
    BYTES: gl.constexpr = (
        128 * (BLOCK_M + BLOCK_N) + 4 * BLOCK_M + (4 * BLOCK_N if COLUMN_SCALES else 0)
    )
    step = 0
    for tile in range(
        gl.program_id(0), gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N), gl.num_programs(0)
    ):
        tile_m, tile_n = _place(tile, M, N, BLOCK_M, BLOCK_N)
        for k in range(steps_k):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, BYTES)
            tma.async_copy_global_to_shared(
                a_desc, [tile_m * BLOCK_M, k * 128], bar, a_bufs.index(stage)
            )
            tma.async_copy_global_to_shared(
                b_desc, [tile_n * BLOCK_N, k * 128], bar, b_bufs.index(stage)
            )
            tma.async_copy_global_to_shared(
                sa_desc, [k, tile_m * BLOCK_M], bar, sa_bufs.index(stage)
            )
            if COLUMN_SCALES:
                tma.async_copy_global_to_shared(
                    sb_desc, [k, tile_n * BLOCK_N], bar, sb_bufs.index(stage)
                )
            step += 1


@gluon.jit
def _multiply(a_desc, b_desc, c_desc, sb_ptr, sb_stride, bias_ptr, a_bufs, b_bufs, c_bufs,
              sa_bufs, sb_bufs, ready, empty, M, N, steps_k, COLUMN_SCALES: gl.constexpr,
              BIAS: gl.constexpr, STAGES: gl.constexpr, WAVES: gl.constexpr,
              GROUP: gl.constexpr):  # fmt: skip
    """Multiply the rows of one warp group: 64 * WAVES x K by BLOCK_N x K, and write the results."""
    BLOCK_M: gl.constexpr = a_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = b_desc.block_type.shape[0]
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 32]
    )
    FIRST: gl.constexpr = GROUP * 64 * WAVES
    part = gl.zeros((64, BLOCK_N), gl.float32, mma)
    step = 0
    for tile in range(
        gl.program_id(0), gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N), gl.num_programs(0)
    ):
        tile_m, tile_n = _place(tile, M, N, BLOCK_M, BLOCK_N)
        acc0 = gl.zeros((64, BLOCK_N), gl.float32, mma)
        acc1 = gl.zeros((64, BLOCK_N), gl.float32, mma)
        for k in range(steps_k):
            stage = step % STAGES
            if COLUMN_SCALES:
                sb = 0.0
            else:
                sb = gl.load(sb_ptr + tile_n * sb_stride + k)
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            a = a_bufs.index(stage)
            b = b_bufs.index(stage).permute((1, 0))
            sa = sa_bufs.index(stage).permute((1, 0))
            part = warpgroup_mma(a.slice(FIRST, 64, dim=0), b, part, use_acc=False, is_async=True)
            sa0 = sa.slice(FIRST, 64, dim=0).load(mma)
            if COLUMN_SCALES:
                columns = sb_bufs.index(stage).load(mma)
            part = warpgroup_mma_wait(0, deps=(part,))
            if WAVES == 1:
                mbarrier.arrive(empty.index(stage), count=1)
            if COLUMN_SCALES:
                acc0 = _pin(acc0 + (part * columns) * sa0)
            else:
                acc0 = _pin(acc0 + part * (sa0 * sb))
            if WAVES == 2:
                part = warpgroup_mma(
                    a.slice(FIRST + 64, 64, dim=0), b, part, use_acc=False, is_async=True
                )
                sa1 = sa.slice(FIRST + 64, 64, dim=0).load(mma)
                part = warpgroup_mma_wait(0, deps=(part,))
                mbarrier.arrive(empty.index(stage), count=1)
                if COLUMN_SCALES:
                    acc1 = _pin(acc1 + (part * columns) * sa1)
                else:
                    acc1 = _pin(acc1 + part * (sa1 * sb))
            step += 1
        if BIAS:
            n = tile_n * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, mma))
            bias = gl.expand_dims(gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32), 0)
            acc0 += bias
            acc1 += bias
        _write(c_desc, c_bufs.index(GROUP), acc0, tile_m * BLOCK_M + FIRST, tile_n * BLOCK_N)
        if WAVES == 2:
            _write(
                c_desc, c_bufs.index(GROUP), acc1, tile_m * BLOCK_M + FIRST + 64, tile_n * BLOCK_N
            )
    tma.store_wait(0)


@gluon.jit
def _write(c_desc, buffer, acc, m, n):
    tma.store_wait(0)
    buffer.store(acc.to(c_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(c_desc, [m, n], buffer)


@gluon.jit(do_not_specialize=["sb_stride", "M", "N", "K"])
def scaled_gemm(a_desc, b_desc, c_desc, sa_desc, sb_desc, sb_ptr, sb_stride, bias_ptr, M, N, K,
                COLUMN_SCALES: gl.constexpr, BIAS: gl.constexpr, STAGES: gl.constexpr,
                WAVES: gl.constexpr):  # fmt: skip
    """Compute c = a . b^T + bias in fp8: [M, K] . [N, K]^T -> [M, N]. Scales of a are fp32
    [K / 128, M]; scales of b are [K / 128, N] (COLUMN_SCALES) or [N / 128, K / 128]."""
    a_bufs = gl.allocate_shared_memory(
        a_desc.dtype, [STAGES] + a_desc.block_type.shape, a_desc.layout
    )
    b_bufs = gl.allocate_shared_memory(
        b_desc.dtype, [STAGES] + b_desc.block_type.shape, b_desc.layout
    )
    c_bufs = gl.allocate_shared_memory(c_desc.dtype, [2] + c_desc.block_type.shape, c_desc.layout)
    sa_bufs = gl.allocate_shared_memory(
        gl.float32, [STAGES] + sa_desc.block_type.shape, sa_desc.layout
    )
    sb_bufs = gl.allocate_shared_memory(
        gl.float32, [STAGES] + sb_desc.block_type.shape, sb_desc.layout
    )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    # Triton turns integer arguments that equal 1 into constants, which a partition can't take;
    # gl.to_tensor makes tensors of them.
    M = gl.to_tensor(M)
    N = gl.to_tensor(N)
    steps_k = gl.to_tensor(gl.cdiv(K, 128))
    sb_stride = gl.to_tensor(sb_stride)
    gl.warp_specialize(
        [
            (_multiply, (a_desc, b_desc, c_desc, sb_ptr, sb_stride, bias_ptr, a_bufs, b_bufs,
                         c_bufs, sa_bufs, sb_bufs, ready, empty, M, N, steps_k, COLUMN_SCALES,
                         BIAS, STAGES, WAVES, 0)),
            (_multiply, (a_desc, b_desc, c_desc, sb_ptr, sb_stride, bias_ptr, a_bufs, b_bufs,
                         c_bufs, sa_bufs, sb_bufs, ready, empty, M, N, steps_k, COLUMN_SCALES,
                         BIAS, STAGES, WAVES, 1)),
            (_load, (a_desc, b_desc, sa_desc, sb_desc, a_bufs, b_bufs, sa_bufs, sb_bufs, ready,
                     empty, M, N, steps_k, COLUMN_SCALES, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
