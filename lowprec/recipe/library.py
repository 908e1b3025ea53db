"""The named recipes, one expression each.

`get(name)` returns one; `names()` lists them; `resolve` also takes the forms that a configuration may use.
"""

from collections.abc import Mapping
from typing import Any

from lowprec.errors import UserError, nearest
from lowprec.formats.element import BF16, E2M1, E4M3, E5M2, FP16, FP32, INT4, INT8, ElementFormat
from lowprec.formats.scaling import ALL, BlockScaling
from lowprec.quant import OperandSpec
from lowprec.recipe.base import FROM_FPROP, GEMMS, GemmSpec, Recipe


def _scaled(element: ElementFormat, block: tuple[int, int], **scaling: Any) -> OperandSpec:
    return OperandSpec(element=element, scaling=BlockScaling(block=block, **scaling))


def _same(spec: OperandSpec) -> GemmSpec:
    return GemmSpec(a=spec, b=spec)


def _everywhere(name: str, spec: OperandSpec, **fields: Any) -> Recipe:
    return Recipe(name=name, fprop=_same(spec), dgrad=_same(spec), wgrad=_same(spec), **fields)


def _deepseek(name: str, tile: OperandSpec, block: OperandSpec, about: str) -> Recipe:
    weight = GemmSpec(a=tile, b=block)
    return Recipe(name=name, fprop=weight, dgrad=weight, wgrad=_same(tile), about=about)


_TENSOR, _ROW, _TILE, _BLOCK, _MX = (ALL, ALL), (1, ALL), (1, 128), (128, 128), (1, 32)
_TENSOR_E4M3, _TENSOR_E5M2 = _scaled(E4M3, _TENSOR), _scaled(E5M2, _TENSOR)
_STRAIGHT_THROUGH = GemmSpec(a=None, b=FROM_FPROP)

_RECIPES = (
    _everywhere("fp32", OperandSpec(element=FP32), rest=FP32, about="fp32 everywhere; the yardstick"),
    _everywhere("bf16", OperandSpec(element=BF16), about="bf16 operands, fp32 accumulation (arXiv 1905.12322)"),
    _everywhere(
        "fp16",
        OperandSpec(element=FP16),
        rest=FP16,
        about="fp16 operands; wants dynamic loss scaling (arXiv 1710.03740, section 3)",
    ),
    Recipe(
        name="fp8_tensorwise",
        fprop=_same(_TENSOR_E4M3),
        dgrad=GemmSpec(a=_TENSOR_E5M2, b=_TENSOR_E4M3),
        wgrad=GemmSpec(a=_TENSOR_E5M2, b=_TENSOR_E4M3),
        about="one current scale per tensor, e5m2 gradients (arXiv 2209.05433, section 3)",
    ),
    _everywhere("fp8_rowwise", _scaled(E4M3, _ROW), about="one scale per row of each operand, along its contraction axis"),
    _deepseek(
        "fp8_blockwise",
        _scaled(E4M3, _TILE),
        _scaled(E4M3, _BLOCK),
        about="DeepSeek-V3: 1x128 activation tiles, 128x128 weight blocks (arXiv 2412.19437, section 3.3)",
    ),
    _deepseek(
        "fp8_blockwise_ue8m0",
        _scaled(E4M3, _TILE, scale_format="e8m0"),
        _scaled(E4M3, _BLOCK, scale_format="e8m0"),
        about="fp8_blockwise with power-of-two scales, the same bits in every implementation",
    ),
    _everywhere(
        "mxfp8",
        _scaled(E4M3, _MX, scale_format="e8m0"),
        about="OCP MXFP8, e4m3 everywhere, scales rounded up (arXiv 2506.08027)",
    ),
    _everywhere(
        "mxfp4",
        _scaled(E2M1, _MX, scale_format="e8m0", rule="floor"),
        about="OCP MXFP4 by the specification's floor rule (OCP MX 1.0, 6.3)",
    ),
    Recipe(
        name="qat_int8dyn_int4",
        fprop=GemmSpec(a=_scaled(INT8, _ROW, symmetric=False), b=_scaled(INT4, _MX)),
        dgrad=_STRAIGHT_THROUGH,
        wgrad=_STRAIGHT_THROUGH,
        about="quantisation-aware training for int8 per-token activations, int4 weights in groups of 32",
    ),
)
_BY_NAME = {recipe.name: recipe for recipe in _RECIPES}


def names() -> list[str]:
    """The named recipes, in the order of the documentation."""
    return list(_BY_NAME)


def get(name: str) -> Recipe:
    """The recipe called `name`; UserError with the nearest known name otherwise."""
    if name not in _BY_NAME:
        raise UserError(f"unknown recipe '{name}'{nearest(name, _BY_NAME)}")
    return _BY_NAME[name]


def resolve(value: Any) -> Recipe:
    """A recipe from any form a user may give: a Recipe, a name, or {base: NAME, fprop: NAME, dgrad: NAME, wgrad: NAME}."""
    if isinstance(value, Recipe):
        return value
    if isinstance(value, str):
        return get(value)
    if not isinstance(value, Mapping):
        raise UserError(f"a recipe is a name or a mapping with 'base', got {value!r}")
    if unknown := [key for key in value if key not in ("base", *GEMMS)]:
        raise UserError(f"unknown key '{unknown[0]}' in a recipe{nearest(unknown[0], ('base', *GEMMS))}")
    if "base" not in value:
        raise UserError(f"a recipe given as a mapping needs 'base', the recipe that it changes; got {dict(value)!r}")
    return resolve(value["base"]).with_gemms(**{gemm: resolve(value[gemm]) for gemm in GEMMS if gemm in value})
