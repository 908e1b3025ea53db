"""The three products of a linear layer under a recipe, by each backend that takes them, beside
torch's in bf16.

The operands are quantised beforehand, as the linear layer does it, and are not part of the time.
Two errors are told of each product, both relative in the Frobenius norm to the product in fp64 of
the values that its operands stand for: that of the bf16 result which is timed, most of it the
rounding to bf16, and that of an fp32 result, which shows how the backend sums.
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
from lowprec.quant import OperandSpec, QTensor, quantize
from lowprec.recipe import GEMMS, FromFprop, Recipe

RIVALS = ("bf16", "torchao")

Product = Callable[[torch.dtype], Tensor]
"""Multiplies the operands it was made with into a result of a dtype."""


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
        against: rivals to run as well, of `RIVALS`; bf16 always runs.
        backends: those to measure; empty for all native ones, or the emulation where there is none.
        seconds: the time that each measurement takes.
    Returns:
        {"device", "threads", "torch", "recipe", "rows": [{"shape", "gemm", "product", "name",
        "native", "time", "tflops", "floor", "of_floor", "error", "error_fp32", "failure"}],
        "unsupported": [{"backend", "gemms", "reason"}], "ceilings"}. "shape" is the layer's,
        "product" M, N, K of the GEMM itself; "failure" is None, or why there are no figures.
    Raises:
        UserError: an unknown recipe, rival, backend or device, or a backend named here that takes
            none of the GEMMs.
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
    for name in backends:
        if not any(supports[gemm, name].ok for gemm in GEMMS):
            raise UserError(
                f"--backend: '{name}' takes no GEMM of {recipe} on {device}: "
                f"{supports['fprop', name].reason}"
            )
    ceilings = Ceilings(place, seconds)
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        for gemm in GEMMS:
            taken = _taken(
                {name: supports[gemm, name] for name in candidates}, named=bool(backends)
            )
            rows += _rows(shape, gemm, chosen, taken, "torchao" in against, ceilings)
            rivals.release_memory()
    return {
        **describe(place),
        "recipe": recipe,
        "rows": rows,
        "unsupported": _unsupported(supports),
        "ceilings": ceilings.to_list(),
    }


def _named(names: Sequence[str]) -> dict[str, GemmBackend]:
    for name in names:
        if name not in BACKENDS:
            raise UserError(f"--backend: unknown backend '{name}'{nearest(name, BACKENDS)}")
    return {name: BACKENDS[name] for name in names or BACKENDS}


def _taken(supports: dict[str, Support], *, named: bool) -> dict[str, Support]:
    """The backends to measure: all that take the product, but emulation only if it was named or
    nothing else is there."""
    able = {name: support for name, support in supports.items() if support.ok}
    native = {name: support for name, support in able.items() if support.native}
    return able if named or not native else native


def _unsupported(supports: dict[tuple[str, str], Support]) -> list[dict[str, Any]]:
    """Each reason once, with the GEMMs that it holds for."""
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
    taken: dict[str, Support],
    with_torchao: bool,
    ceilings: Ceilings,
) -> list[dict[str, Any]]:
    """The rows of one product."""
    product = gemm_shape(gemm, shape)
    plain = random_operands(product, ceilings.device)
    about = {"shape": list(shape), "gemm": gemm, "product": list(product)}
    bf16 = _measured(lambda: (_bf16_product(*plain), _exact(*plain)), product, "bf16", ceilings)
    rows = [about | {"name": "torch bf16", "native": True} | bf16]
    for name, support in taken.items():

        def ours(name: str = name) -> tuple[Product, Tensor]:
            a, b = _operands(recipe, gemm, *plain)
            exact = _exact(*(t.dequantize() if isinstance(t, QTensor) else t for t in (a, b)))
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
    """The figures of a product, or why it failed."""

    def figures() -> dict[str, Any]:
        multiply, exact = make()
        error = _relative_error(multiply(torch.bfloat16), exact)
        error_fp32, _ = rivals.attempt(
            lambda: _relative_error(multiply(torch.float32), exact)
        )  # None where only bf16 comes out
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
    """a [M, K] and b [N, K] as the operands of a recipe's GEMM, laid out as the linear layer has
    them."""
    spec_a, spec_b = recipe.operands(gemm)
    source = recipe.gemm(gemm).b
    if isinstance(source, FromFprop) and source.requantize is None and spec_b is not None:
        return _quantised(a, spec_a), quantize(
            b.t().contiguous(), spec_b, key=_key(spec_b, b)
        ).t()  # fprop's operand, transposed
    return _quantised(a, spec_a), _quantised(b, spec_b)


def _quantised(t: Tensor, spec: OperandSpec | None) -> Operand:
    return t if spec is None else _with_scales_laid_out(quantize(t, spec, key=_key(spec, t)))


def _with_scales_laid_out(q: QTensor) -> QTensor:
    """Scales of 128 elements as the fused quantisers write them, so that no backend copies them in
    each call.

    They are fp32, in memory [K / 128, R] for 1x128 blocks and [R / 128, K / 128] for 128x128 ones,
    rows padded to a multiple of 4.
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


def _bf16_product(a: Tensor, b: Tensor) -> Product:
    def multiply(dtype: torch.dtype) -> Tensor:
        if dtype == torch.bfloat16:
            return torch.matmul(a, b.t())
        return (
            torch.mm(a, b.t(), out_dtype=dtype)
            if a.is_cuda
            else torch.matmul(a.to(dtype), b.to(dtype).t())
        )

    return multiply


def _backend_product(
    backend: GemmBackend, recipe: Recipe, gemm: str, a: Operand, b: Operand
) -> Product:
    if backend.decoded:  # such a one is handed the values, not the codes
        a, b = (t.dequantize() if isinstance(t, QTensor) else t for t in (a, b))
    return lambda dtype: backend.mm(a, b, dtype, recipe.gemm(gemm).sums)


def _torchao_product(recipe: Recipe, gemm: str, a: Tensor, b: Tensor) -> tuple[Product, Tensor]:
    """torchao's Triton GEMM for DeepSeek's blocks on operands that torchao quantised, and their
    product in fp64."""
    kernels = importlib.import_module("torchao.prototype.blockwise_fp8_training.kernels")
    blocks = [_block_of(spec) for spec in recipe.operands(gemm)]
    if blocks[0] != (1, 128) or blocks[1] not in ((1, 128), (128, 128)):
        raise NotImplementedError(
            "it multiplies e4m3[1x128 fp32] by e4m3[1x128 fp32] or e4m3[128x128 fp32] only"
        )
    codes_a, scale_a = kernels.triton_fp8_blockwise_act_quant_lhs(a, 128)
    values_a = codes_a.float() * scale_a.repeat_interleave(128, 1)
    if blocks[1] == (128, 128):
        codes_b, scale_b = kernels.triton_fp8_blockwise_weight_quant_transposed_rhs(
            b, block_size=128
        )  # b^T [K, N]
        values_b = codes_b.float() * scale_b.repeat_interleave(128, 0).repeat_interleave(128, 1)
        call = kernels.triton_fp8_gemm_1x128_128x128
    else:
        codes_b, scale_b = kernels.triton_fp8_blockwise_act_quant_rhs(b.t().contiguous(), 128)
        values_b = codes_b.float() * scale_b.repeat_interleave(128, 0)
        call = kernels.triton_fp8_gemm_1x128_128x1
    return lambda dtype: call(codes_a, codes_b, scale_a, scale_b, out_dtype=dtype), _exact(
        values_a, values_b.t()
    )


def _block_of(spec: OperandSpec | None) -> tuple[int, int] | None:
    scaling = None if spec is None else spec.scaling
    return (
        scaling.block
        if spec is not None
        and scaling is not None
        and spec.element is E4M3
        and scaling.scale_format == "fp32"
        else None
    )


def _exact(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    return a_MK.double() @ b_NK.double().t()


def _relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()
