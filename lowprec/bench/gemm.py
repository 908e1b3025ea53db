"""Benchmark of the three products of a linear layer under a recipe: each backend that supports
them, and torch in bf16.

The operands are quantised beforehand, as the linear layer does it, so the time excludes quantising.
Each product has two errors. Both are relative, in the Frobenius norm, to the fp64 product of the
values that the operands stand for. `error` is that of the bf16 result that is timed; most of it is
the rounding to bf16. `error_fp32` is that of an fp32 result, and shows how the backend sums.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from lowprec.bench import rivals
from lowprec.bench.ceilings import Ceilings, Shape, flops, gemm_shape, product_kind, random_operands
from lowprec.bench.inputs import describe, open_device, resolve_recipe
from lowprec.bench.timing import measure
from lowprec.errors import UserError, nearest
from lowprec.formats.element import E4M3
from lowprec.gemm import BACKENDS, GemmBackend, Operand, Support
from lowprec.quant import OperandSpec, QTensor, StoredOperand, quantize
from lowprec.recipe import GEMMS, FromFprop, Recipe

RIVALS = ("bf16", "torchao")

Product = Callable[[torch.dtype], Tensor]
"""A function that multiplies its operands into a result of the given dtype."""


def run(
    device: str = "cpu",
    shapes: Sequence[Shape] = ((512, 512, 512),),
    recipe: str = "fp8_blockwise",
    against: Sequence[str] = (),
    backends: Sequence[str] = (),
    seconds: float = 0.5,
) -> dict[str, Any]:
    """Measure the recipe's GEMMs for linear layers of the shapes (tokens M, outputs N, inputs K).

    Args:
        against: rivals from `RIVALS` to run as well; bf16 always runs.
        backends: backends to measure; empty for all native ones, or the emulation if there is none.
        seconds: the time that each measurement takes.
    Returns:
        {"device", "threads", "torch", "recipe", "rows": [{"shape", "gemm", "product", "name",
        "native", "time", "tflops", "floor", "of_floor", "error", "error_fp32", "failure"}],
        "unsupported": [{"backend", "gemms", "reason"}], "ceilings"}. "shape" is the layer's,
        "product" M, N, K of the GEMM itself; "failure" is None, or the reason why there are no
        figures.
    Raises:
        UserError: an unknown recipe, rival, backend or device, or a backend in `backends` that
            supports none of the GEMMs.
    """
    place = open_device(device)
    rivals.check(against, RIVALS)
    chosen = resolve_recipe(recipe)
    candidates = _named(backends)
    supports = {
        (gemm, name): backend.supports(*chosen.operands(gemm), place.type, chosen.gemm(gemm).sums)
        for gemm in GEMMS
        for name, backend in candidates.items()
    }
    _refuse_unsupported(backends, supports, f"{recipe} on {device}")
    ceilings = Ceilings(place, seconds)
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        for gemm in GEMMS:
            gemm_supports = {name: supports[gemm, name] for name in candidates}
            measured = _backends_to_measure(gemm_supports, named=bool(backends))
            rows += _rows(shape, gemm, chosen, measured, "torchao" in against, ceilings)
            rivals.release_memory()
    return {
        **describe(place),
        "recipe": recipe,
        "rows": rows,
        "unsupported": _unsupported(supports),
        "ceilings": ceilings.to_list(),
    }


def _named(names: Sequence[str]) -> dict[str, GemmBackend]:
    """Return the backends with these names, or all backends. Raise UserError for an unknown one."""
    for name in names:
        if name not in BACKENDS:
            raise UserError(f"--backend: unknown backend '{name}'{nearest(name, BACKENDS)}")
    return {name: BACKENDS[name] for name in names or BACKENDS}


def _refuse_unsupported(
    backends: Sequence[str], supports: dict[tuple[str, str], Support], what: str
) -> None:
    """Raise UserError if a backend that the user named supports none of the GEMMs."""
    for name in backends:
        if not any(supports[gemm, name].ok for gemm in GEMMS):
            reason = supports["fprop", name].reason
            raise UserError(f"--backend: '{name}' takes no GEMM of {what}: {reason}")


def _backends_to_measure(supports: dict[str, Support], *, named: bool) -> dict[str, Support]:
    """Return the backends that support the product.

    Emulation is included only if the user named it or there is no native backend.
    """
    supporting = {name: support for name, support in supports.items() if support.ok}
    native = {name: support for name, support in supporting.items() if support.native}
    return supporting if named or not native else native


def _unsupported(supports: dict[tuple[str, str], Support]) -> list[dict[str, Any]]:
    """Return each reason once, with the GEMMs to which it applies."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for (gemm, name), support in supports.items():
        if not support.ok:
            reasons.setdefault((name, support.reason), []).append(gemm)
    return [
        {"backend": name, "gemms": gemms, "reason": reason}
        for (name, reason), gemms in reasons.items()
    ]


def _rows(
    shape: Shape,
    gemm: str,
    recipe: Recipe,
    backends: dict[str, Support],
    with_torchao: bool,
    ceilings: Ceilings,
) -> list[dict[str, Any]]:
    """Return the rows of one product."""
    product = gemm_shape(gemm, shape)
    plain = random_operands(product, ceilings.device)
    about = {"shape": list(shape), "gemm": gemm, "product": list(product)}
    bf16 = _measured(lambda: (_bf16_product(*plain), _exact(*plain)), product, "bf16", ceilings)
    rows = [about | {"name": "torch bf16", "native": True} | bf16]
    for name, support in backends.items():

        def ours(name: str = name) -> tuple[Product, Tensor]:
            a, b = _operands(recipe, gemm, *plain)
            exact = _exact(_decoded(a), _decoded(b))
            return _backend_product(BACKENDS[name], recipe, gemm, a, b), exact

        kind = product_kind(recipe, gemm)
        rows.append(
            about
            | {"name": name, "native": support.native}
            | _measured(ours, product, kind, ceilings)
        )
    if with_torchao:
        theirs = about | {"name": "torchao triton", "native": True}
        rows.append(
            theirs
            | _measured(
                lambda: _torchao_product(recipe, gemm, *plain),
                product,
                product_kind(recipe, gemm),
                ceilings,
            )
        )
    return rows


def _measured(
    make: Callable[[], tuple[Product, Tensor]], shape: Shape, kind: str, ceilings: Ceilings
) -> dict[str, Any]:
    """Return the figures of a product, or the reason why it failed."""

    def figures() -> dict[str, Any]:
        multiply, exact = make()
        error = _relative_error(multiply(torch.bfloat16), exact)
        # None if the backend gives bf16 results only.
        error_fp32, _ = rivals.attempt(lambda: _relative_error(multiply(torch.float32), exact))
        time = measure(lambda: multiply(torch.bfloat16), ceilings.device, seconds=ceilings.seconds)
        floor = ceilings.product_floor(shape, kind).beside(time)
        rate = flops(shape) / time.median / 1e9
        return {
            "time": asdict(time),
            "tflops": rate,
            **floor,
            "error": error,
            "error_fp32": error_fp32,
            "failure": None,
        }

    result, failure = rivals.attempt(figures)
    if result is not None:
        return result
    return dict.fromkeys(("time", "tflops", "floor", "of_floor", "error", "error_fp32")) | {
        "failure": failure
    }


def _operands(recipe: Recipe, gemm: str, a: Tensor, b: Tensor) -> tuple[Operand, Operand]:
    """Return a [M, K] and b [N, K] as operands of a recipe's GEMM, in the layout that the linear
    layer gives them."""
    spec_a, spec_b = recipe.operands(gemm)
    source = recipe.gemm(gemm).b
    if isinstance(source, FromFprop) and source.requantize is None and spec_b is not None:
        # dgrad reads fprop's operand, transposed.
        fprop_b = quantize(b.t().contiguous(), spec_b, key=_key(spec_b, b))
        return _quantised(a, spec_a), fprop_b.t()
    return _quantised(a, spec_a), _quantised(b, spec_b)


def _quantised(t: Tensor, spec: OperandSpec | None) -> Operand:
    return t if spec is None else _with_scales_laid_out(quantize(t, spec, key=_key(spec, t)))


def _with_scales_laid_out(q: QTensor) -> QTensor:
    """Lay out the scales of 1x128 and 128x128 blocks as the fused quantisers write them.

    No backend then has to copy them in each call. The scales are fp32, in memory [K / 128, R] for
    1x128 blocks and [R / 128, K / 128] for 128x128 blocks, with rows padded to a multiple of 4.
    """
    scaling = q.spec.scaling
    if (
        scaling is None
        or scaling.block not in ((1, 128), (128, 128))
        or scaling.scale_format == "e4m3"
    ):
        return q
    scale = q.scale
    assert scale is not None
    scale = scale.t() if scaling.block == (1, 128) else scale
    memory = scale.new_ones(scale.shape[0], -(-scale.shape[1] // 4) * 4)
    laid_out = memory[:, : scale.shape[1]].copy_(scale)
    return replace(q, scale_data=laid_out.t() if scaling.block == (1, 128) else laid_out)


def _key(spec: OperandSpec, t: Tensor) -> Tensor | None:
    return torch.tensor([1, 2], device=t.device) if spec.stochastic else None


def _bf16_product(a_MK: Tensor, b_NK: Tensor) -> Product:
    """Return torch's product [M, K] . [N, K]^T -> [M, N] of bf16 operands."""

    def multiply(dtype: torch.dtype) -> Tensor:
        if dtype == torch.bfloat16:
            return torch.matmul(a_MK, b_NK.t())
        if a_MK.is_cuda:
            return torch.mm(a_MK, b_NK.t(), out_dtype=dtype)
        return torch.matmul(a_MK.to(dtype), b_NK.to(dtype).t())

    return multiply


def _backend_product(
    backend: GemmBackend, recipe: Recipe, gemm: str, a: Operand, b: Operand
) -> Product:
    """Return a backend's product [M, K] . [N, K]^T -> [M, N] of a recipe's operands."""
    if backend.decoded:  # This backend takes the values, not the codes.
        a, b = (t.dequantize() if isinstance(t, QTensor) else t for t in (a, b))
    return lambda dtype: backend.mm(a, b, dtype, recipe.gemm(gemm).sums)


def _torchao_product(recipe: Recipe, gemm: str, a: Tensor, b: Tensor) -> tuple[Product, Tensor]:
    """Return torchao's Triton GEMM for DeepSeek's blocks, on operands that torchao quantises, and
    the fp64 product of these operands."""
    kernels = importlib.import_module("torchao.prototype.blockwise_fp8_training.kernels")
    blocks = [_block_of(spec) for spec in recipe.operands(gemm)]
    if blocks[0] != (1, 128) or blocks[1] not in ((1, 128), (128, 128)):
        raise NotImplementedError(
            "it multiplies e4m3[1x128 fp32] by e4m3[1x128 fp32] or e4m3[128x128 fp32] only"
        )
    codes_a, scale_a = kernels.triton_fp8_blockwise_act_quant_lhs(a, 128)
    values_a = codes_a.float() * scale_a.repeat_interleave(128, 1)
    if blocks[1] == (128, 128):
        # b [N, K] -> codes of b^T [K, N]
        codes_b, scale_b = kernels.triton_fp8_blockwise_weight_quant_transposed_rhs(
            b, block_size=128
        )
        values_b = codes_b.float() * scale_b.repeat_interleave(128, 0).repeat_interleave(128, 1)
        call = kernels.triton_fp8_gemm_1x128_128x128
    else:
        codes_b, scale_b = kernels.triton_fp8_blockwise_act_quant_rhs(b.t().contiguous(), 128)
        values_b = codes_b.float() * scale_b.repeat_interleave(128, 0)
        call = kernels.triton_fp8_gemm_1x128_128x1

    def multiply(dtype: torch.dtype) -> Tensor:
        # [M, K] . [K, N] -> [M, N]
        return call(codes_a, codes_b, scale_a, scale_b, out_dtype=dtype)

    return multiply, _exact(values_a, values_b.t())


def _block_of(spec: OperandSpec | None) -> tuple[int, int] | None:
    """Return the block of an e4m3 operand with fp32 scales, or None for any other operand."""
    if spec is None or spec.scaling is None:
        return None
    if spec.element is not E4M3 or spec.scaling.scale_format != "fp32":
        return None
    return spec.scaling.block


def _exact(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    # fp64: [M, K] . [N, K]^T -> [M, N]
    return a_MK.double() @ b_NK.double().t()


def _decoded(operand: Operand) -> Tensor:
    """Return the values of an operand that a benchmark has made."""
    assert not isinstance(operand, StoredOperand)  # layers alone make those
    return operand.dequantize() if isinstance(operand, QTensor) else operand


def _relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()
