"""Fused quantisers: `quantize` and `fake_quantize` in one pass over memory, on a GPU.

    quantize_both(x, directions(a, b))   quantises x as `a` says and x^T as `b` says, each along its
                                         rows, both from one read
    fake_quantize_fused(x, spec)         codes times scales, for emulation

The results have the bits of the reference in every mode: the same fp32 operations in the same
order, each correctly rounded. Not every spec has a kernel. `directions` then returns the reason, or
the operand's `one_pass` is false, and the caller takes the reference.

`quantize_both` has two kernels: one in Gluon for Hopper (`tile_kernels`), and one in plain Triton
for other GPUs (`triton_kernels`). Both functions are torch library operators for compiled code;
eager code calls the functions beneath them directly, which costs the host less.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowprec.formats import nvfp4
from lowprec.formats.element import E4M3, E5M2
from lowprec.formats.scaling import BlockScaling, e8m0_carry
from lowprec.quant.qtensor import QTensor, TwoWay, is_transposed
from lowprec.quant.spec import OperandSpec

TILE = 128
_FORMATS = {"e8m0": 0, "fp32": 1, "e4m3": 2}
"""The number of each scale format in the kernels."""
_BLOCKS = {"": 0, "1x128": 1, "128x128": 2}
"""The number of each kind of blocks in the kernels; "" is a direction that is not wanted.

Outside the kernels a kind is a string, because torch.compile makes variables of the integers that
it finds in objects.
"""


class Directions(NamedTuple):
    """The two operands that a kernel makes from one read of a matrix. Made by `directions`."""

    along_rows: OperandSpec | None
    """Spec of the matrix; None: not wanted."""
    along_cols: OperandSpec | None
    """Spec of the transpose; None: not wanted."""
    rows: str
    """Kind of the matrix's scales, "1x128" or "128x128"; "": not wanted."""
    cols: str
    """Kind of the transpose's scales; "": not wanted."""
    scale: str
    """Scale format: "fp32", or "e8m0:" and the rule."""
    e5m2: bool
    """Flag: elements are e5m2; else e4m3."""

    def only(self, rows: bool, cols: bool) -> "Directions":
        """Return these directions without those that are not wanted."""
        return self._replace(
            along_rows=self.along_rows if rows else None,
            along_cols=self.along_cols if cols else None,
            rows=self.rows if rows else "",
            cols=self.cols if cols else "",
        )


@cache
def directions(a: OperandSpec | None, b: OperandSpec | None) -> Directions | str:
    """Return the directions that quantise a matrix as `a` and its transpose as `b` from one read.

    `a` or `b` may be None, which makes no operand of that direction. Return the reason if there is
    no kernel for the two specs.
    """
    specs = [spec for spec in (a, b) if spec is not None]
    if reason := next(filter(None, map(_why_not_tiles, specs)), None):
        return reason
    scalings = [spec.scaling for spec in specs if spec.scaling is not None]
    formats = {
        (spec.element.name, scaling.scale_format, scaling.rule)
        for spec, scaling in zip(specs, scalings, strict=True)
    }
    if len(formats) != 1:
        return "the two directions differ in more than their blocks"
    rows, cols = ("" if spec is None else spec.kind for spec in (a, b))
    scaling = scalings[0]
    scale = f"e8m0:{scaling.rule}" if scaling.scale_format == "e8m0" else "fp32"
    return Directions(a, b, rows, cols, scale, specs[0].element == E5M2)


def _why_not_tiles(spec: OperandSpec) -> str | None:
    """Return why no kernel of `quantize_both` makes this operand; None if one does."""
    scaling = spec.scaling
    if spec.element not in (E4M3, E5M2) or spec.rounding != "nearest":
        return f"{spec} is not fp8 rounded to nearest"
    if scaling is None or spec.kind not in ("1x128", "128x128") or scaling.rule == "quest":
        return f"{spec} has neither 1x128 nor 128x128 scales"
    return None


def takes(x_RC: Tensor) -> bool:
    """Return True if the kernels take the matrix: on a GPU, bf16, fp16 or fp32, not empty."""
    return (
        x_RC.is_cuda
        and x_RC.dtype in (torch.bfloat16, torch.float32, torch.float16)
        and x_RC.numel() > 0
    )


def quantize_both(
    x_RC: Tensor, wanted: Directions, *, times_silu_of: Tensor | None = None
) -> TwoWay:
    """Return quantize(x, along_rows) and quantize(x^T, along_cols), made from one read of x.

    A direction that is not wanted is None.

    Args:
        x_RC: fp32, bf16 or fp16 [R, C] on a GPU (`takes`).
        wanted: the two operands.
        times_silu_of: a matrix like x: silu(it) * x is quantised instead, and is never written to
            memory (SwiGLU).
    """
    if times_silu_of is None and is_transposed(x_RC):
        a, b, rows, cols = wanted[:4]
        exchanged = wanted._replace(along_rows=b, along_cols=a, rows=cols, cols=rows)
        along_cols, along_rows = quantize_both(x_RC.t(), exchanged)
        return TwoWay(along_rows, along_cols)
    inputs = (x_RC, None) if times_silu_of is None else (times_silu_of, x_RC)
    call = torch.ops.lowprec.quantize_tiles if torch.compiler.is_compiling() else _quantize_tiles
    codes_r, scales_r, codes_c, scales_c = call(*inputs, *wanted[2:])
    R, C = x_RC.shape
    a = wanted.along_rows
    b = wanted.along_cols
    along_rows = None if a is None else _result(codes_r, scales_r, wanted.rows, a, R, C)
    along_cols = None if b is None else _result(codes_c, scales_c, wanted.cols, b, C, R)
    return TwoWay(along_rows, along_cols)


def _result(codes: Tensor, scales: Tensor, kind: str, spec: OperandSpec, R: int, K: int) -> QTensor:
    """Return a kernel's results as a QTensor [R, K].

    Args:
        codes: [R, >= K].
        scales: as the kernels lay them out. 1x128 scales are [K / 128, >= R], so that a GEMM finds
            the scales of its next 128 elements side by side; 128x128 scales are [R / 128, >= K /
            128].
    """
    if kind == "1x128":
        scale = (scales if scales.shape[1] == R else scales[:, :R]).t()
    else:
        blocks = -(-K // TILE)
        scale = scales if scales.shape[1] == blocks else scales[:, :blocks]
    data = codes if codes.shape[1] == K else codes[:, :K]
    return QTensor(data=data, scale_data=scale, spec=spec, shape=torch.Size((R, K)))


def _empty_results(x: Tensor, rows: str, cols: str, e5m2: bool) -> list[Tensor]:
    """Return memory for codes and scales of x, and codes and scales of x^T.

    Rows of codes and rows of scales are padded to 16 bytes, as tensor maps require. A direction
    that is not wanted gets empty tensors.
    """
    R, C = x.shape
    dtype = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    results = []
    for kind, r, k in ((rows, R, C), (cols, C, R)):
        blocks = -(-k // TILE)
        codes = (r, -(-k // 16) * 16)
        if kind == "1x128":
            scales = (blocks, -(-r // 4) * 4)
        elif kind == "128x128":
            scales = (-(-r // TILE), -(-blocks // 4) * 4)
        else:
            codes = (0, 0)
            scales = (0, 0)
        results.append(torch.empty(codes, dtype=dtype, device=x.device))
        results.append(torch.empty(scales, dtype=torch.float32, device=x.device))
    return results


def _quantize_tiles(
    x: Tensor, y: Tensor | None, rows: str, cols: str, scale: str, e5m2: bool
) -> list[Tensor]:
    """Return codes and scales of x, or of silu(x) * y, and of the transpose (`_empty_results`).

    The other arguments are the fields of `Directions`.
    """
    x = _unit_stride(x)
    y = None if y is None else _unit_stride(y)
    results = _empty_results(x, rows, cols, e5m2)
    fmt = E5M2 if e5m2 else E4M3
    e8m0 = scale != "fp32"
    carry = e8m0_carry(fmt, scale.removeprefix("e8m0:")) if e8m0 else 0
    # Shared memory must hold two tiles of each input beside two of each result.
    fits = x.element_size() * (1 if y is None else 2) <= 4
    if (
        fits
        and _gluon_works(x.device.index or 0)
        and all(t is None or _has_tensor_map(t) for t in (x, y))
    ):
        _launch_function()(
            x, y, results, _BLOCKS[rows], _BLOCKS[cols], e8m0, fmt.max, fmt.emax, carry
        )
        return results
    from lowprec.quant import triton_kernels as kernels

    if y is not None and y.stride() != x.stride():
        # The kernel takes one stride for both.
        x = x.contiguous()
        y = y.contiguous()
    R, C = x.shape
    y_or_x = x if y is None else y
    codes_r, scales_r, codes_c, scales_c = results
    # Any, since a type checker would want constants of type tl.constexpr.
    kernel: Any = kernels.quantize_tiles
    kernel[(-(-R // TILE) * -(-C // TILE),)](
        x, y_or_x, x.stride(0), codes_r, codes_r.stride(0), scales_r, scales_r.stride(0),
        codes_c, codes_c.stride(0), scales_c, scales_c.stride(0), R, C, 1 if y is None else 2,
        _BLOCKS[rows], _BLOCKS[cols], 0 if e8m0 else 1, fmt.mantissa_bits, fmt.min_normal,
        fmt.max, fmt.emax, carry,
    )  # fmt: skip
    return results


@cache
def _launch_function() -> Callable[..., None]:
    """Return `tile_launch.launch`. Its module can be imported only where Triton has Gluon."""
    from lowprec.quant import tile_launch

    return tile_launch.launch


@torch.library.custom_op("lowprec::quantize_tiles", mutates_args=())
def _quantize_tiles_op(
    x: Tensor, y: Tensor | None, rows: str, cols: str, scale: str, e5m2: bool
) -> list[Tensor]:
    return _quantize_tiles(x, y, rows, cols, scale, e5m2)


@_quantize_tiles_op.register_fake
def _(x: Tensor, y: Tensor | None, rows: str, cols: str, scale: str, e5m2: bool) -> list[Tensor]:
    return _empty_results(x, rows, cols, e5m2)


def _unit_stride(x: Tensor) -> Tensor:
    """Return x, or a copy if its rows are not contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()


def _has_tensor_map(x: Tensor) -> bool:
    """Return True if the Gluon kernel can load x through a tensor map.

    The start of x and of each row lie on 16 bytes, and the dtype is bf16 or fp32.
    """
    return (
        x.data_ptr() % 16 == 0
        and x.stride(0) * x.element_size() % 16 == 0
        and x.dtype != torch.float16
    )


@cache
def _gluon_works(device: int) -> bool:
    """Return True if the device is a Hopper GPU and Triton has a Gluon that runs our kernels."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        from lowprec.quant import tile_launch  # noqa: F401
    except (ImportError, AttributeError):
        # This Triton has no Gluon, or a different one.
        return False
    return True


def fake_quantize_fused(
    x_RK: Tensor,
    spec: OperandSpec,
    *,
    key: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return fake_quantize(x, spec, key=key) in one pass over memory, in x's memory order.

    Args:
        x_RK: a matrix that `takes` accepts.
        spec: a spec whose `one_pass` is true.
        key: key of stochastic rounding, int64 [2].
        dtype: dtype of the result. bf16 is exact if the element has at most 8 significant bits and
            the scale is a power of two (MX).
    """
    along_rows = not is_transposed(x_RK)
    x = x_RK if along_rows else x_RK.t()
    assert spec.scaling is not None
    tensor_scales = _tensor_scales(x, spec) if spec.scaling.scale_format == "e4m3" else None
    call = (
        torch.ops.lowprec.fake_quantize_blocks
        if torch.compiler.is_compiling()
        else _fake_quantize_blocks
    )
    out = call(x, tensor_scales, key if spec.stochastic else None, spec.notation, along_rows, dtype)
    return out if along_rows else out.t()


def _tensor_scales(x: Tensor, spec: OperandSpec) -> Tensor:
    """Return (s_enc * RN(1 / max), s_dec) of a two-level scale, fp32 [2] (see `nvfp4`)."""
    assert spec.scaling is not None
    amax = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32)
    s_enc, s_dec = nvfp4.tensor_scales(amax, spec.element, spec.scaling)
    return torch.stack((nvfp4.scale_per_unit(s_enc, spec.element, spec.scaling), s_dec))


_parse = cache(OperandSpec.parse)


def _fake_quantize_blocks(
    x: Tensor,
    tensor_scales: Tensor | None,
    key: Tensor | None,
    spec: str,
    along_rows: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Quantise and dequantise x in blocks along its rows, or down its columns.

    `spec` is the notation of an `OperandSpec`, because operators take no objects; the other
    arguments are as in `fake_quantize_blocks` of `triton_kernels`.
    """
    from lowprec.quant import triton_kernels as kernels

    x = _unit_stride(x)
    operand = _parse(spec)
    scaling: BlockScaling | None = operand.scaling
    assert scaling is not None
    fmt = operand.element
    block = scaling.block[1]
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    R, C = x.shape
    stride = x.stride(0)
    tile_r, tile_c = (16, 256) if along_rows else (max(32, block), 4096 // max(32, block))
    if (
        along_rows
        and C % block == 0
        and x.is_contiguous()
        and x.numel() % (tile_r * tile_c) == 0
        and not operand.stochastic
    ):
        # Every row has whole blocks, so x may be taken as a matrix whose rows are one tile wide.
        R = x.numel() // tile_c
        C = tile_c
        stride = tile_c
    carry = e8m0_carry(fmt, scaling.rule) if scaling.scale_format == "e8m0" else 0
    any_pointer = out if tensor_scales is None else tensor_scales
    kernel: Any = kernels.fake_quantize_blocks
    kernel[(-(-R // tile_r) * -(-C // tile_c),)](
        x, out, any_pointer, any_pointer if key is None else key, R, C, stride, C,
        _FORMATS[scaling.scale_format], fmt.mantissa_bits, fmt.min_normal, fmt.max, fmt.emax, carry,
        scaling.prescale, operand.stochastic, block, along_rows,
        R % tile_r == 0 and C % tile_c == 0, tile_r, tile_c,
    )  # fmt: skip
    return out


@torch.library.custom_op("lowprec::fake_quantize_blocks", mutates_args=())
def _fake_quantize_blocks_op(
    x: Tensor,
    tensor_scales: Tensor | None,
    key: Tensor | None,
    spec: str,
    along_rows: bool,
    dtype: torch.dtype,
) -> Tensor:
    return _fake_quantize_blocks(x, tensor_scales, key, spec, along_rows, dtype)


@_fake_quantize_blocks_op.register_fake
def _(
    x: Tensor,
    tensor_scales: Tensor | None,
    key: Tensor | None,
    spec: str,
    along_rows: bool,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)
