"""Benchmark of quantising and dequantising a matrix, for every kind of operand, against a copy of
the matrix and against other libraries in the same run.

On a GPU with fused kernels, it also measures making the codes alone. Such a kernel makes the codes
of a matrix and of its transpose from one read, as FP8 layers do.
"""

import importlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lowprec.bench import rivals
from lowprec.bench.ceilings import Ceilings, Floor
from lowprec.bench.inputs import describe, open_device
from lowprec.bench.timing import measure
from lowprec.errors import UserError, nearest
from lowprec.quant import OperandSpec, QTensor, fake_quantize
from lowprec.quant.triton_quantize import directions, quantize_both, takes

OPERANDS = {
    "mxfp4": "e2m1[1x32 e8m0:floor]",
    "mxfp6_e2m3": "e2m3[1x32 e8m0:floor]",
    "mxfp6_e3m2": "e3m2[1x32 e8m0:floor]",
    "mxfp8": "e4m3[1x32 e8m0:floor]",
    "nvfp4": "e2m1[1x16 e4m3]",
    "nvfp4, four over six": "e2m1[1x16 e4m3 4/6]",
    "nvfp4, stochastic": "e2m1[1x16 e4m3 stochastic]",
    "fp8 tiles": "e4m3[1x128 fp32]",
    "fp8 blocks": "e4m3[128x128 fp32]",
    "fp8 tensor": "e4m3[tensor fp32]",
    "int8 rows": "int8[row fp32 asymmetric]",
    "int4 groups": "int4[1x32 fp32]",
}
"""The measured operands: a name, and the operand in the notation of `quant/spec.py`."""

CODES = {
    "fp8 tiles, x and xᵀ": ("e4m3[1x128 fp32]", "e4m3[1x128 fp32]", 1),
    "fp8 blocks, w and wᵀ": ("e4m3[128x128 fp32]", "e4m3[128x128 fp32]", 1),
    "fp8 tiles x, blocks xᵀ": ("e4m3[1x128 fp32]", "e4m3[128x128 fp32]", 1),
    "fp8 tiles, x": ("e4m3[1x128 fp32]", None, 1),
    "silu(x) · y, fp8 tiles both ways": ("e4m3[1x128 fp32]", "e4m3[1x128 fp32]", 2),
}
"""The measured fused kernels: a name, the operand of the matrix, the operand of its transpose, and
the number of matrices that are read."""

RIVALS = ("torchao",)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(
    device: str = "cpu",
    against: tuple[str, ...] = (),
    shape: tuple[int, int] = (2048, 1024),
    compiled: bool = False,
    dtype: str = "fp32",
) -> dict[str, Any]:
    """Measure `OPERANDS` on a random matrix, and `CODES` too if the device has the kernels.

    Args:
        against: rivals from `RIVALS` to run as well.
        shape: rows and columns of the matrix.
        compiled: put our functions and the rivals' through torch.compile; otherwise both are eager.
        dtype: dtype of the matrix and of the dequantised matrix, fp32 or bf16.
    Returns:
        {"device", "threads", "torch", "shape", "dtype", "compiled", "copy": timing, "rows":
        [{"name", "operand", "ours": timing, "floor", "of_floor", RIVAL: timing or None, "equal"}],
        "ceilings"}. A timing is {"median", "p20", "p80"} in milliseconds. "equal" is True if the
        rival's result has the same bits. The floor is the time of the bytes read and written at the
        rate of a copy.
    Raises:
        UserError: an unknown or missing rival, an unknown dtype, or no such device.
    """
    rivals.check(against, RIVALS)
    if dtype not in DTYPES:
        raise UserError(f"--dtype: unknown dtype '{dtype}'{nearest(dtype, DTYPES)}")
    place = open_device(device)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(place, DTYPES[dtype])
    ceilings = Ceilings(place)
    floor = Floor(quantisers=ceilings.copy(x.nbytes).floor(2 * x.nbytes), ceilings=("copy",))
    rows = []
    for name, text in OPERANDS.items():
        spec = OperandSpec.parse(text)
        ours = _ours(spec, place, compiled)
        time = measure(lambda f=ours: f(x), place)
        row: dict[str, Any] = {
            "name": name,
            "operand": text,
            "ours": asdict(time),
            **floor.beside(time),
        }
        for rival in against:
            theirs = _torchao(spec, compiled, x.dtype)
            row[rival] = None if theirs is None else asdict(measure(lambda f=theirs: f(x), place))
            row["equal"] = None if theirs is None else bool(torch.equal(ours(x), theirs(x)))
        rows.append(row)
    if takes(x):
        rows += _codes(x, ceilings, dict.fromkeys((*against, "equal")))
    return {
        **describe(place),
        "shape": list(shape),
        "dtype": dtype,
        "compiled": compiled,
        "copy": asdict(measure(x.clone, place)),
        "rows": rows,
        "ceilings": ceilings.to_list(),
    }


def _ours(spec: OperandSpec, device: torch.device, compiled: bool) -> Callable[[Tensor], Tensor]:
    key = torch.tensor([1, 2], device=device) if spec.stochastic else None

    def quantize_and_dequantize(x: Tensor) -> Tensor:
        return fake_quantize(x, spec, key=key, dtype=x.dtype)

    return torch.compile(quantize_and_dequantize) if compiled else quantize_and_dequantize


def _codes(x: Tensor, ceilings: Ceilings, no_rivals: dict[str, None]) -> list[dict[str, Any]]:
    """Return the rows of `CODES`."""
    rows = []
    y = torch.randn_like(x)
    for name, (a, b, inputs) in CODES.items():
        wanted = directions(*(None if text is None else OperandSpec.parse(text) for text in (a, b)))
        assert not isinstance(wanted, str)
        gate = y if inputs == 2 else None
        time = measure(
            lambda wanted=wanted, gate=gate: quantize_both(x, wanted, times_silu_of=gate), x.device
        )
        made = [q for q in quantize_both(x, wanted) if isinstance(q, QTensor)]
        moved = inputs * x.nbytes + sum(q.nbytes for q in made)
        floor = Floor(quantisers=ceilings.copy(x.nbytes).floor(moved), ceilings=("copy",))
        operand = " ".join(dict.fromkeys(text for text in (a, b) if text))
        rows.append(
            {
                "name": name,
                "operand": operand,
                "ours": asdict(time),
                **floor.beside(time),
                **no_rivals,
            }
        )
    return rows


def _torchao(
    spec: OperandSpec, compiled: bool, dtype: torch.dtype
) -> Callable[[Tensor], Tensor] | None:
    """Return torchao's round trip through the same operand, or None if torchao does not have it."""
    formats = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")
    scaling = spec.scaling
    assert scaling is not None
    dtypes: dict[str, Any] = {
        "e2m1": torch.float4_e2m1fn_x2,
        "e4m3": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
    }
    dtypes |= {"e2m3": formats.DTYPE_FP6_E2M3, "e3m2": formats.DTYPE_FP6_E3M2}
    if scaling.block == (1, 32) and scaling.scale_format == "e8m0":

        def round_trip(x: Tensor) -> Tensor:
            return formats.MXTensor.to_mx(x, dtypes[spec.element.name], 32).dequantize(dtype)

    elif scaling.block == (1, 16) and not scaling.four_over_six and not spec.stochastic:
        nvfp4 = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor")

        def round_trip(x: Tensor) -> Tensor:
            tensor_scale = nvfp4.per_tensor_amax_to_scale(x.abs().amax())
            return nvfp4.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=tensor_scale).dequantize(dtype)

    else:
        return None
    return torch.compile(round_trip) if compiled else round_trip
