"""Triton kernels that quantise, on any GPU that Triton supports, and on a CPU in its interpreter.

    fake_quantize_blocks   x -> codes times scales, for emulation
    quantize_tiles         x -> codes of x and x^T with 1x128 or 128x128 scales
    quantize_given         x -> codes of x and x^T by given amaxes, per tensor or per row

They do the arithmetic of the reference (`formats/scaling.py`, `formats/rounding.py`) step for step,
so the results have the same bits. Three rules hold in all of them:

* The largest magnitude is found among the bits, as integers. NaN is then larger than infinity, and
  so reaches the scale.
* No product is followed directly by an addition, because the compiler would contract the two to one
  operation with one rounding. A clamp lies between.
* Rounding is done by arithmetic, not by the conversion instruction. This serves every format, and
  the interpreter's conversions are wrong where a carry reaches the exponent.
"""

import triton
import triton.language as tl

E8M0, FP32, E4M3 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Kinds of scales, as the kernels' KIND."""


@triton.jit
def _bits(x):
    """Return the bits of fp32 numbers as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    """Return the fp32 numbers that have these bits; the inverse of `_bits`."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def scale_of(
    amax_bits, KIND: tl.constexpr, LARGEST: tl.constexpr, EMAX: tl.constexpr, CARRY: tl.constexpr
):
    """Return the scale for the bits of each block's largest magnitude, fp32.

    It is `formats.scaling.scale_from_amax`, for fp32 scales and e8m0 scales with a CARRY.
    """
    if KIND == 0:
        biased = tl.minimum(tl.maximum(((amax_bits + CARRY) >> 23) - EMAX, 0), 254)
        scale = _float(tl.maximum(biased << 23, 1 << 22))
    else:
        scale = tl.div_rn(_float(amax_bits), tl.full(amax_bits.shape, LARGEST, tl.float32))
        scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    return tl.where(amax_bits >= 0x7F800000, float("nan"), scale)


@triton.jit
def reciprocal(scale):
    """Return 1 / scale, correctly rounded."""
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def _mix(x):
    """Return the hash of each uint32: `formats.random.mix`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def uniform(key_ptr, rows, cols):
    """Return the draws of the elements at `rows` and `cols`, which broadcast.

    They are those of `formats.random.uniform`.
    """
    low = tl.load(key_ptr).to(tl.uint32)
    high = tl.load(key_ptr + 1).to(tl.uint32)
    # formats.random.scramble
    high = high ^ _mix(low + 0x1E3779B9)
    low = low ^ _mix(high + 0x3C6EF372)
    high = high ^ _mix(low + 0x5AA66D2B)
    low = low ^ _mix(high + 0x78DDE6E4)
    bits = _mix(_mix(rows.to(tl.uint32) + low) ^ _mix(_mix(cols.to(tl.uint32) + high) + 0x632BE5AB))
    return (bits >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def round_to_element(
    v,
    noise,
    MANTISSA: tl.constexpr,
    MIN_NORMAL: tl.constexpr,
    LARGEST: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Round to a saturating floating-point format: `formats.rounding.round_to_format`.

    The result of NaN is undefined, which does no harm: its block's scale is NaN.
    """
    v = tl.minimum(tl.maximum(v, -LARGEST), LARGEST)
    power = tl.maximum(_float(_bits(v) & 0x7F800000), MIN_NORMAL)
    if STOCHASTIC:
        steps = tl.abs(v) * _float(0x7F000000 - _bits(power)) * (2.0**MANTISSA)
        low = tl.floor(steps)
        magnitude = (low + (noise < steps - low).to(tl.float32)) * (power * (2.0**-MANTISSA))
    else:
        magic = power * (1.5 * 2.0 ** (23 - MANTISSA))
        magnitude = tl.abs((v + magic) - magic)
    return _float(_bits(magnitude) | (_bits(v) & -0x80000000))


@triton.jit
def fake_quantize_blocks(
    x_ptr, out_ptr, tensor_scales_ptr, key_ptr, R, C, x_stride, out_stride,
    KIND: tl.constexpr, MANTISSA: tl.constexpr, MIN_NORMAL: tl.constexpr, LARGEST: tl.constexpr,
    EMAX: tl.constexpr, CARRY: tl.constexpr, PRESCALE: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr, ALONG_ROWS: tl.constexpr, EXACT: tl.constexpr, TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):  # fmt: skip
    """Quantise and dequantise a matrix [R, C], one program for each tile [TILE_R, TILE_C].

    Blocks have BLOCK elements along a row if ALONG_ROWS, else down a column. tensor_scales_ptr
    points to (s_enc * RN(1 / LARGEST), s_dec) of two-level scales (KIND 2). EXACT: no tile reaches
    beyond the matrix.
    """
    tiles_c = tl.cdiv(C, TILE_C)
    pid = tl.program_id(0)
    rows = (pid // tiles_c) * TILE_R + tl.arange(0, TILE_R)
    cols = (pid % tiles_c) * TILE_C + tl.arange(0, TILE_C)
    offsets = rows[:, None].to(tl.int64) * x_stride + cols[None, :]
    inside = (rows < R)[:, None] & (cols < C)[None, :]
    if EXACT:
        x = tl.load(x_ptr + offsets).to(tl.float32)
    else:
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    noise = x
    if STOCHASTIC:
        # Draws belong to rows and columns of the operand. Its rows are the columns of this memory
        # if blocks go down columns.
        noise = (
            uniform(key_ptr, rows[:, None], cols[None, :])
            if ALONG_ROWS
            else uniform(key_ptr, cols[None, :], rows[:, None])
        )
    AXIS: tl.constexpr = 2 if ALONG_ROWS else 1
    SHAPE: tl.constexpr = (
        (TILE_R, TILE_C // BLOCK, BLOCK) if ALONG_ROWS else (TILE_R // BLOCK, BLOCK, TILE_C)
    )
    blocks = tl.reshape(x, SHAPE)
    noise = tl.reshape(noise, SHAPE)
    amax_bits = tl.max(_bits(blocks) & 0x7FFFFFFF, AXIS)
    if KIND == 2:
        per_unit = tl.load(tensor_scales_ptr)
        s_dec = tl.load(tensor_scales_ptr + 1)
        base = tl.minimum(_float(amax_bits) * per_unit, 3.4028234663852886e38)
        scale = round_to_element(base, base, 3, 0.015625, 448.0, False)
        factor = tl.minimum(reciprocal(scale * s_dec), 3.4028234663852886e38)
    else:
        s_dec = 1.0 / PRESCALE
        scale = scale_of(amax_bits, KIND, LARGEST, EMAX, CARRY)
        factor = reciprocal(scale) * PRESCALE
    codes = round_to_element(
        blocks * tl.expand_dims(factor, AXIS), noise, MANTISSA, MIN_NORMAL, LARGEST, STOCHASTIC
    )
    plain = codes * tl.expand_dims(scale, AXIS)
    if KIND == 2 or PRESCALE != 1.0:
        plain = plain * s_dec
    out = tl.reshape(plain, (TILE_R, TILE_C)).to(out_ptr.dtype.element_ty)
    offsets = rows[:, None].to(tl.int64) * out_stride + cols[None, :]
    if EXACT:
        tl.store(out_ptr + offsets, out)
    else:
        tl.store(out_ptr + offsets, out, mask=inside)


@triton.jit
def quantize_tiles(
    x_ptr, y_ptr, x_stride, row_codes, row_stride, row_scales, row_scale_stride,
    col_codes, col_stride, col_scales, col_scale_stride, R, C,
    INPUTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, KIND: tl.constexpr,
    MANTISSA: tl.constexpr, MIN_NORMAL: tl.constexpr, LARGEST: tl.constexpr, EMAX: tl.constexpr,
    CARRY: tl.constexpr,
):  # fmt: skip
    """Quantise x [R, C], or silu(x) * y if INPUTS is 2, one program for each 128 x 128 tile.

    The codes are [R, row_stride], and [C, col_stride] of the transpose; columns beyond x are zeros.
    ROWS and COLS say how x and x^T are quantised: 0 not at all, 1 with a scale for 128 elements of
    a row of the result, 2 with a scale for the whole tile.
    """
    tiles_c = tl.cdiv(C, 128)
    row_tile = tl.program_id(0) // tiles_c
    col_tile = tl.program_id(0) % tiles_c
    r = row_tile * 128 + tl.arange(0, 128)
    c = col_tile * 128 + tl.arange(0, 128)
    offsets = r[:, None].to(tl.int64) * x_stride + c[None, :]
    inside = (r < R)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    if INPUTS == 2:
        y = tl.load(y_ptr + offsets, mask=inside, other=0.0)
        gate = x.to(tl.float32)
        x = (gate / (1.0 + tl.exp(-gate))).to(x.dtype) * y
    x = x.to(tl.float32)
    magnitudes = _bits(x) & 0x7FFFFFFF
    if ROWS != 0:
        amax = tl.max(magnitudes, 1)
        if ROWS == 2:
            amax = tl.max(amax, 0)[None] + tl.zeros((128,), tl.int32)
        scale = scale_of(amax, KIND, LARGEST, EMAX, CARRY)
        codes = round_to_element(
            x * reciprocal(scale)[:, None], x, MANTISSA, MIN_NORMAL, LARGEST, False
        )
        codes = tl.where((scale != scale)[:, None], float("nan"), codes)
        if ROWS == 2:
            tl.store(
                row_scales + row_tile * row_scale_stride + col_tile + 0 * r,
                scale,
                mask=r == row_tile * 128,
            )
        else:
            tl.store(row_scales + col_tile.to(tl.int64) * row_scale_stride + r, scale, mask=r < R)
        to = row_codes + r[:, None].to(tl.int64) * row_stride + c[None, :]
        tl.store(
            to,
            codes.to(row_codes.dtype.element_ty),
            mask=(r < R)[:, None] & (c < row_stride)[None, :],
        )
    if COLS != 0:
        amax = tl.max(magnitudes, 0)
        if COLS == 2:
            amax = tl.max(amax, 0)[None] + tl.zeros((128,), tl.int32)
        scale = scale_of(amax, KIND, LARGEST, EMAX, CARRY)
        codes = round_to_element(
            x * reciprocal(scale)[None, :], x, MANTISSA, MIN_NORMAL, LARGEST, False
        )
        codes = tl.where((scale != scale)[None, :], float("nan"), codes)
        if COLS == 2:
            tl.store(
                col_scales + col_tile * col_scale_stride + row_tile + 0 * c,
                scale,
                mask=c == col_tile * 128,
            )
        else:
            tl.store(col_scales + row_tile.to(tl.int64) * col_scale_stride + c, scale, mask=c < C)
        to = col_codes + c[:, None].to(tl.int64) * col_stride + r[None, :]
        tl.store(
            to,
            tl.trans(codes).to(col_codes.dtype.element_ty),
            mask=(c < C)[:, None] & (r < col_stride)[None, :],
        )


@triton.jit
def quantize_given(
    x_ptr, x_stride, row_amax, row_step, row_codes, row_stride,
    col_amax, col_step, col_codes, col_stride, R, C,
    ROWS: tl.constexpr, COLS: tl.constexpr, MANTISSA: tl.constexpr, MIN_NORMAL: tl.constexpr,
    LARGEST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Quantise x [R, C] to codes [R, row_stride] if ROWS, and x^T to [C, col_stride] if COLS.

    row_amax holds the amax of each row (row_step 1) or one for the whole matrix (row_step 0);
    col_amax and col_step do the same for the transpose. Scales are fp32.
    """
    tiles_c = tl.cdiv(C, TILE)
    r = (tl.program_id(0) // tiles_c) * TILE + tl.arange(0, TILE)
    c = (tl.program_id(0) % tiles_c) * TILE + tl.arange(0, TILE)
    inside = (r < R)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + r[:, None].to(tl.int64) * x_stride + c[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    if ROWS:
        scale = scale_of(
            _bits(tl.load(row_amax + r * row_step, mask=r < R, other=0.0)), 1, LARGEST, 0, 0
        )
        codes = round_to_element(
            x * reciprocal(scale)[:, None], x, MANTISSA, MIN_NORMAL, LARGEST, False
        )
        codes = tl.where((scale != scale)[:, None], float("nan"), codes)
        to = row_codes + r[:, None].to(tl.int64) * row_stride + c[None, :]
        tl.store(
            to,
            codes.to(row_codes.dtype.element_ty),
            mask=(r < R)[:, None] & (c < row_stride)[None, :],
        )
    if COLS:
        scale = scale_of(
            _bits(tl.load(col_amax + c * col_step, mask=c < C, other=0.0)), 1, LARGEST, 0, 0
        )
        codes = round_to_element(
            x * reciprocal(scale)[None, :], x, MANTISSA, MIN_NORMAL, LARGEST, False
        )
        codes = tl.where((scale != scale)[None, :], float("nan"), codes)
        to = col_codes + c[:, None].to(tl.int64) * col_stride + r[None, :]
        tl.store(
            to,
            tl.trans(codes).to(col_codes.dtype.element_ty),
            mask=(c < C)[:, None] & (r < col_stride)[None, :],
        )
