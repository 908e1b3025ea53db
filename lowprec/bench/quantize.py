"""Quantising and dequantising a matrix: every kind of operand, beside a copy of it and beside other libraries in the same run."""

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
from lowprec.quant import OperandSpec, fake_quantize

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
"""What is measured: a name, and the operand in the notation of `quant/spec.py`."""

RIVALS = ("torchao",)


def run(
    device: str = "cpu", against: tuple[str, ...] = (), shape: tuple[int, int] = (2048, 1024), compiled: bool = False
) -> dict[str, Any]:
    """Measure all of `OPERANDS` on a random fp32 matrix.

    Args:
        against: rivals to run as well, of `RIVALS`; eager if ours is.
        compiled: put both through torch.compile.
    Returns:
        {"device", "threads", "torch", "shape", "copy": timing, "rows": [{"name", "operand", "ours": timing, "floor", "of_floor",
        RIVAL: timing or None, "equal": whether a rival's result has the same bits}], "ceilings"}; a timing is {"median", "p20", "p80"} in
        milliseconds. The floor: the fp32 matrix read and written, at the rate of a copy.
    Raises:
        UserError: an unknown or missing rival, or no such device.
    """
    rivals.check(against, RIVALS)
    place = open_device(device)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(place)
    ceilings = Ceilings(place)
    floor = Floor(quantisers=ceilings.copy(x.nbytes).floor(2 * x.nbytes), ceilings=("copy",))
    rows = []
    for name, text in OPERANDS.items():
        spec = OperandSpec.parse(text)
        ours = _ours(spec, place, compiled)
        time = measure(lambda f=ours: f(x), place)
        row: dict[str, Any] = {"name": name, "operand": text, "ours": asdict(time), **floor.beside(time)}
        for rival in against:
            theirs = _torchao(spec, compiled)
            row[rival] = None if theirs is None else asdict(measure(lambda f=theirs: f(x), place))
            row["equal"] = None if theirs is None else bool(torch.equal(ours(x), theirs(x)))
        rows.append(row)
    return {
        **describe(place),
        "shape": list(shape),
        "compiled": compiled,
        "copy": asdict(measure(x.clone, place)),
        "rows": rows,
        "ceilings": ceilings.to_list(),
    }


def _ours(spec: OperandSpec, device: torch.device, compiled: bool) -> Callable[[Tensor], Tensor]:
    key = torch.tensor([1, 2], device=device) if spec.stochastic else None

    def quantize_and_dequantize(x: Tensor) -> Tensor:
        return fake_quantize(x, spec, key=key)

    return torch.compile(quantize_and_dequantize) if compiled else quantize_and_dequantize


def _torchao(spec: OperandSpec, compiled: bool) -> Callable[[Tensor], Tensor] | None:
    """torchao's way to the same operand; None if it has none."""
    formats = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")
    scaling = spec.scaling
    assert scaling is not None
    dtypes: dict[str, Any] = {"e2m1": torch.float4_e2m1fn_x2, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
    dtypes |= {"e2m3": formats.DTYPE_FP6_E2M3, "e3m2": formats.DTYPE_FP6_E3M2}
    if scaling.block == (1, 32) and scaling.scale_format == "e8m0":

        def round_trip(x: Tensor) -> Tensor:
            return formats.MXTensor.to_mx(x, dtypes[spec.element.name], 32).dequantize(torch.float32)

    elif scaling.block == (1, 16) and not scaling.four_over_six and not spec.stochastic:
        nvfp4 = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor")

        def round_trip(x: Tensor) -> Tensor:
            tensor_scale = nvfp4.per_tensor_amax_to_scale(x.abs().amax())
            return nvfp4.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=tensor_scale).dequantize(torch.float32)

    else:
        return None
    return torch.compile(round_trip) if compiled else round_trip
