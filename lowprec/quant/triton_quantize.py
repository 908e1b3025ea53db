"""Fused quantisers: what `quantize` and `fake_quantize` do, in one pass over memory, on a GPU.

    quantize_both(x, directions(a, b))  x along its rows as `a` says and x^T along its rows as `b`
    says, both from one read
    fake_quantize_fused(x, spec)        codes times scales, for emulation

The results have the bits of the reference, in every mode: the same fp32 operations in the same
order, each correctly rounded. Where the kernels can't, `directions` says why, or the operand's
`one_pass` is false, and the caller takes the reference.

Two kernels do the first: one in Gluon for Hopper (`tile_kernels`), one in plain Triton for the rest
(`triton_kernels`). They are torch library operators, so compiled code may call them; eager code
calls the functions beneath, which is cheaper for the host.
"""

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
_KINDS = {"e8m0": 0, "fp32": 1, "e4m3": 2}
_NUMBERS = {"": 0, "1x128": 1, "128x128": 2}
"""How the kernels know a direction's kind of scales; "": it is not wanted. They are strings
elsewhere, because torch.compile makes variables of the integers that it finds in objects."""


class Directions(NamedTuple):
    """What the kernels are told of the two operands that they make from one read. Made by
    `directions`."""

    along_rows: OperandSpec | None
    along_cols: OperandSpec | None
    rows: str
    cols: str
    scale: str
    """fp32, or e8m0: and the rule."""
    e5m2: bool

    def only(self, rows: bool, cols: bool) -> "Directions":
        """With only those operands that are wanted."""
        return self._replace(
            along_rows=self.along_rows if rows else None,
            along_cols=self.along_cols if cols else None,
            rows=self.rows if rows else "",
            cols=self.cols if cols else "",
        )


@cache
def directions(a: OperandSpec | None, b: OperandSpec | None) -> Directions | str:
    """What it takes to quantise a matrix as `a` says and its transpose as `b` says (None: not at
    all) from one read; or why it can't be."""
    specs = [spec for spec in (a, b) if spec is not None]
    if reason := next(filter(None, map(_why_not_tiles, specs)), None):
        return reason
    scalings = [spec.scaling for spec in specs if spec.scaling is not None]
    if (
        len(
            {
                (spec.element.name, scaling.scale_format, scaling.rule)
                for spec, scaling in zip(specs, scalings, strict=True)
            }
        )
        != 1
    ):
        return "the two directions differ in more than their blocks"
    rows, cols = ("" if spec is None else spec.kind for spec in (a, b))
    scaling = scalings[0]
    scale = f"e8m0:{scaling.rule}" if scaling.scale_format == "e8m0" else "fp32"
    return Directions(a, b, rows, cols, scale, specs[0].element == E5M2)


def _why_not_tiles(spec: OperandSpec) -> str | None:
    scaling = spec.scaling
    if spec.element not in (E4M3, E5M2) or spec.rounding != "nearest":
        return f"{spec} is no fp8 rounded to nearest"
    if scaling is None or spec.kind not in ("1x128", "128x128") or scaling.rule == "quest":
        return f"{spec} has neither 1x128 nor 128x128 scales"
    return None


def takes(x_RC: Tensor) -> bool:
    """Whether the kernels take such a matrix: on a GPU, floating-point, not empty."""
    return (
        x_RC.is_cuda
        and x_RC.dtype in (torch.bfloat16, torch.float32, torch.float16)
        and x_RC.numel() > 0
    )


def quantize_both(
    x_RC: Tensor, wanted: Directions, *, times_silu_of: Tensor | None = None
) -> TwoWay:
    """Return (quantize(x, along_rows), quantize(x^T, along_cols)), made from one read of x; None for
    a direction that is not wanted.

    Args:
        x_RC: fp32, bf16 or fp16 [R, C] on a GPU (`takes`).
        times_silu_of: a matrix like x: quantise silu(it) * x instead, which is never written
            (SwiGLU).
    """
    if times_silu_of is None and is_transposed(x_RC):
        a, b, rows, cols = wanted[:4]
        back, forth = quantize_both(
            x_RC.t(), wanted._replace(along_rows=b, along_cols=a, rows=cols, cols=rows)
        )
        return TwoWay(forth, back)
    inputs = (x_RC, None) if times_silu_of is None else (times_silu_of, x_RC)
    call = torch.ops.lowprec.quantize_tiles if torch.compiler.is_compiling() else _quantize_tiles
    codes_r, scales_r, codes_c, scales_c = call(*inputs, *wanted[2:])
    R, C = x_RC.shape
    a, b = wanted.along_rows, wanted.along_cols
    along_rows = None if a is None else _result(codes_r, scales_r, wanted.rows, a, R, C)
    along_cols = None if b is None else _result(codes_c, scales_c, wanted.cols, b, C, R)
    return TwoWay(along_rows, along_cols)


def _result(codes: Tensor, scales: Tensor, kind: str, spec: OperandSpec, R: int, K: int) -> QTensor:
    """Codes [R, >= K] and scales as the kernels lay them out: 1x128 ones as [K / 128, >= R], so
    that a GEMM finds those of its next 128 elements side by side; 128x128 ones as [R / 128, >= K /
    128]."""
    if kind == "1x128":
        scale = (scales if scales.shape[1] == R else scales[:, :R]).t()
    else:
        blocks = -(-K // TILE)
        scale = scales if scales.shape[1] == blocks else scales[:, :blocks]
    data = codes if codes.shape[1] == K else codes[:, :K]
    return QTensor(data=data, scale_data=scale, spec=spec, shape=torch.Size((R, K)))


def _empty_results(x: Tensor, rows: str, cols: str, e5m2: bool) -> list[Tensor]:
    """Codes and scales of both directions. Rows of codes are padded to 16 bytes and rows of scales
    too: what tensor maps ask for."""
    R, C = x.shape
    dtype = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    results = []
    for kind, r, k in ((rows, R, C), (cols, C, R)):
        blocks = -(-k // TILE)
        scales = (
            (blocks, -(-r // 4) * 4)
            if kind == "1x128"
            else (-(-r // TILE), -(-blocks // 4) * 4)
            if kind
            else (0, 0)
        )
        results.append(
            torch.empty((r, -(-k // 16) * 16) if kind else (0, 0), dtype=dtype, device=x.device)
        )
        results.append(torch.empty(scales, dtype=torch.float32, device=x.device))
    return results


def _quantize_tiles(
    x: Tensor, y: Tensor | None, rows: str, cols: str, scale: str, e5m2: bool
) -> list[Tensor]:
    """See `quantize_both`; with y: silu(x) * y."""
    x, y = _unit_stride(x), None if y is None else _unit_stride(y)
    results = _empty_results(x, rows, cols, e5m2)
    fmt, e8m0 = E5M2 if e5m2 else E4M3, scale != "fp32"
    carry = e8m0_carry(fmt, scale.removeprefix("e8m0:")) if e8m0 else 0
    fits = (
        x.element_size() * (1 if y is None else 2) <= 4
    )  # two tiles of each input in shared memory, beside two of each result
    if (
        fits
        and _gluon_works(x.device.index or 0)
        and all(t is None or _has_tensor_map(t) for t in (x, y))
    ):
        _launch_function()(
            x, y, results, _NUMBERS[rows], _NUMBERS[cols], e8m0, fmt.max, fmt.emax, carry
        )
        return results
    from lowprec.quant import triton_kernels as kernels

    if y is not None and y.stride() != x.stride():
        x, y = x.contiguous(), y.contiguous()  # the kernel knows one stride
    R, C = x.shape
    same = x if y is None else y
    codes_r, scales_r, codes_c, scales_c = results
    kernel: Any = kernels.quantize_tiles  # whose constants a type checker can't know
    kernel[(-(-R // TILE) * -(-C // TILE),)](
        x, same, x.stride(0), codes_r, codes_r.stride(0), scales_r, scales_r.stride(0), codes_c, codes_c.stride(0), scales_c,
        scales_c.stride(0), R, C, 1 if y is None else 2, _NUMBERS[rows], _NUMBERS[cols], 0 if e8m0 else 1, fmt.mantissa_bits,
        fmt.min_normal, fmt.max, fmt.emax, carry,
    )  # fmt: skip
    return results


@cache
def _launch_function() -> Any:
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
    return x if x.stride(1) == 1 else x.contiguous()


def _has_tensor_map(x: Tensor) -> bool:
    """Whether the hardware's tensor loads can address it: 16-byte alignment of its start and its
    rows."""
    return (
        x.data_ptr() % 16 == 0
        and x.stride(0) * x.element_size() % 16 == 0
        and x.dtype != torch.float16
    )


@cache
def _gluon_works(device: int) -> bool:
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        from lowprec.quant import tile_launch  # noqa: F401
    except (ImportError, AttributeError):  # a Triton without Gluon, or with another one
        return False
    return True


def fake_quantize_fused(
    x_RK: Tensor,
    spec: OperandSpec,
    *,
    key: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`fake_quantize(x, spec, key=key)` as a `dtype` tensor in x's memory order. x is such as
    `takes` allows, and `spec.one_pass`.

    `dtype`: bf16 holds the result exactly where the element has at most 8 significant bits and the
    scale is a power of two (MX).
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
    """(s_enc * RN(1 / max), s_dec) of a two-level scale."""
    assert spec.scaling is not None
    amax = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32)
    s_enc, s_dec = nvfp4.tensor_scales(amax, spec.element, spec.scaling)
    return torch.stack(
        (s_enc * torch.tensor(1.0 / spec.element.max, dtype=torch.float32, device=x.device), s_dec)
    )


_parse = cache(OperandSpec.parse)


def _fake_quantize_blocks(
    x: Tensor,
    tensor_scales: Tensor | None,
    key: Tensor | None,
    spec: str,
    along_rows: bool,
    dtype: torch.dtype,
) -> Tensor:
    from lowprec.quant import triton_kernels as kernels

    x, operand = _unit_stride(x), _parse(spec)
    scaling: BlockScaling | None = operand.scaling
    assert scaling is not None
    fmt, block = operand.element, scaling.block[1]
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
        R, C, stride = (
            x.numel() // tile_c,
            tile_c,
            tile_c,
        )  # whole blocks in a row: the matrix's shape makes no difference
    carry = e8m0_carry(fmt, scaling.rule) if scaling.scale_format == "e8m0" else 0
    any_pointer = out if tensor_scales is None else tensor_scales
    kernel: Any = kernels.fake_quantize_blocks
    kernel[(-(-R // tile_r) * -(-C // tile_c),)](
        x, out, any_pointer, any_pointer if key is None else key, R, C, stride, C, _KINDS[scaling.scale_format], fmt.mantissa_bits,
        fmt.min_normal, fmt.max, fmt.emax, carry, scaling.prescale, operand.stochastic, block, along_rows,
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
