"""The Triton kernel of the `triton` backend."""

import triton
import triton.language as tl


@triton.jit
def block_scaled_gemm(
    a_ptr, b_ptr, c_ptr, bias_ptr, sa_ptr, sb_ptr, M, N, K,
    a_stride, b_stride, c_stride, sa_m, sa_k, sb_n, sb_k,
    B_BLOCK: tl.constexpr, BIAS: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PROMOTE: tl.constexpr,
):  # fmt: skip
    """Compute c_MN = sum over blocks of s_a * s_b * (a . b^T over PROMOTE elements) + bias (+ c).
    B_BLOCK is the number of rows of b under one scale, 1 or 128."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    m = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, PROMOTE)
    rows_m, rows_n = m < M, n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, PROMOTE):
        inside = start + k < K
        a = tl.load(
            a_ptr + m[:, None].to(tl.int64) * a_stride + (start + k)[None, :],
            mask=rows_m[:, None] & inside[None, :],
            other=0.0,
        )
        b = tl.load(
            b_ptr + n[None, :].to(tl.int64) * b_stride + (start + k)[:, None],
            mask=rows_n[None, :] & inside[:, None],
            other=0.0,
        )
        block = start // 128
        sa = tl.load(sa_ptr + m.to(tl.int64) * sa_m + block * sa_k, mask=rows_m, other=0.0)
        sb = tl.load(
            sb_ptr + (n // B_BLOCK).to(tl.int64) * sb_n + block * sb_k, mask=rows_n, other=0.0
        )
        acc += tl.dot(a, b) * sa[:, None] * sb[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=rows_n, other=0.0).to(tl.float32)[None, :]
    to = c_ptr + m[:, None].to(tl.int64) * c_stride + n[None, :]
    mask = rows_m[:, None] & rows_n[None, :]
    if ACCUMULATE:
        acc += tl.load(to, mask=mask, other=0.0).to(tl.float32)
    tl.store(to, acc.to(c_ptr.dtype.element_ty), mask=mask)
