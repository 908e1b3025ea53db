"""The named recipes, one expression each.

`get(name)` returns one, `names()` lists them, and `resolve` takes the forms of a configuration as
well.
"""

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from lowprec.errors import UserError, nearest, shown
from lowprec.formats.element import (
    BF16,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    FP16,
    FP32,
    INT4,
    INT8,
    ElementFormat,
)
from lowprec.formats.hadamard import NVFP4_SIGNS, Hadamard
from lowprec.formats.scaling import ALL, BlockScaling
from lowprec.quant import OperandSpec
from lowprec.recipe.base import FROM_FPROP, GEMMS, FromFprop, GemmSpec, Recipe


def _scaled(element: ElementFormat, block: tuple[int, int], **scaling: Any) -> OperandSpec:
    return OperandSpec(element=element, scaling=BlockScaling(block=block, **scaling))


def _same(spec: OperandSpec) -> GemmSpec:
    return GemmSpec(a=spec, b=spec)


def _everywhere(name: str, spec: OperandSpec, **fields: Any) -> Recipe:
    return Recipe(name=name, fprop=_same(spec), dgrad=_same(spec), wgrad=_same(spec), **fields)


def _deepseek(
    name: str, tile: OperandSpec, block: OperandSpec, about: str, wgrad_x: OperandSpec | None = None
) -> Recipe:
    """fprop and dgrad multiply 1x128 tiles by 128x128 blocks of w; wgrad multiplies tiles by
    `wgrad_x`, or by tiles."""
    weight = GemmSpec(a=tile, b=block, promote_every=128)
    tokens = GemmSpec(a=tile, b=wgrad_x or tile, promote_every=128)
    return Recipe(name=name, fprop=weight, dgrad=weight, wgrad=tokens, about=about)


def _nvfp4(name: str, about: str, **scaling: Any) -> Recipe:
    """x, w and g are in NVFP4; `scaling` holds more settings of x and w."""
    x = _scaled(E2M1, (1, 16), scale_format="e4m3", **scaling)
    w = _scaled(E2M1, (16, 16), scale_format="e4m3", **scaling)
    g = replace(_scaled(E2M1, (1, 16), scale_format="e4m3"), rounding="stochastic")
    mixing = Hadamard(size=16, signs=NVFP4_SIGNS)
    return Recipe(
        name=name,
        fprop=GemmSpec(a=x, b=w),
        dgrad=GemmSpec(a=g, b=w),
        wgrad=GemmSpec(a=g, b=x, hadamard=mixing),
        about=about,
    )


_TENSOR = (ALL, ALL)
_ROW = (1, ALL)
_TILE = (1, 128)
_BLOCK = (128, 128)
_MX = (1, 32)
_TENSOR_E4M3 = _scaled(E4M3, _TENSOR)
_TENSOR_E5M2 = _scaled(E5M2, _TENSOR)
_ROW_E4M3 = _scaled(E4M3, _ROW)
_DELAYED_E4M3 = _scaled(E4M3, _TENSOR, history=1024)
_DELAYED_E5M2 = _scaled(E5M2, _TENSOR, history=1024)
_BF16 = OperandSpec(element=BF16)
_STRAIGHT_THROUGH = GemmSpec(a=None, b=FROM_FPROP)
_UNBIASED_MXFP4 = OperandSpec(
    element=E2M1,
    scaling=BlockScaling(block=_MX, scale_format="e8m0", rule="floor", prescale=0.75),
    rounding="stochastic",
)
_QUEST_MXFP4 = _scaled(E2M1, _MX, scale_format="e8m0", rule="quest")

_RECIPES = (
    _everywhere(
        "fp32", OperandSpec(element=FP32), rest=FP32, about="fp32 everywhere; the yardstick"
    ),
    _everywhere("bf16", _BF16, about="bf16 operands, fp32 accumulation (arXiv 1905.12322)"),
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
    Recipe(
        name="fp8_delayed",
        fprop=_same(_DELAYED_E4M3),
        dgrad=GemmSpec(a=_DELAYED_E5M2, b=_DELAYED_E4M3),
        wgrad=GemmSpec(a=_DELAYED_E5M2, b=_DELAYED_E4M3),
        about="fp8_tensorwise with the largest of the last 1024 amaxes for its scale "
        "(arXiv 2209.05433, section 3)",
    ),
    _everywhere(
        "fp8_rowwise",
        _ROW_E4M3,
        about="one scale per row of each operand, along its contraction axis",
    ),
    Recipe(
        name="fp8_rowwise_wgrad_hp",
        fprop=_same(_ROW_E4M3),
        dgrad=_same(_ROW_E4M3),
        wgrad=_same(_BF16),
        about="fp8_rowwise, but weight gradients from bf16 operands "
        "(as arXiv 2304.13013, section 2.2, has it for int8)",
    ),
    _deepseek(
        "fp8_blockwise",
        _scaled(E4M3, _TILE),
        _scaled(E4M3, _BLOCK),
        about="DeepSeek-V3: 1x128 activation tiles, 128x128 weight blocks "
        "(arXiv 2412.19437, section 3.3)",
    ),
    _deepseek(
        "fp8_blockwise_ue8m0",
        _scaled(E4M3, _TILE, scale_format="e8m0"),
        _scaled(E4M3, _BLOCK, scale_format="e8m0"),
        about="fp8_blockwise with power-of-two scales, the same bits in every implementation",
    ),
    _deepseek(
        "fp8_blockwise_wgrad2d",
        _scaled(E4M3, _TILE),
        _scaled(E4M3, _BLOCK),
        about="fp8_blockwise, but x of wgrad in 128x128 blocks, which Hopper multiplies faster",
        wgrad_x=_scaled(E4M3, _BLOCK),
    ),
    _everywhere(
        "mxfp8",
        _scaled(E4M3, _MX, scale_format="e8m0"),
        about="OCP MXFP8, e4m3 everywhere, scales rounded up (arXiv 2506.08027)",
    ),
    _everywhere(
        "mxfp6_e2m3",
        _scaled(E2M3, _MX, scale_format="e8m0", rule="floor"),
        about="OCP MXFP6 with three mantissa bits (OCP MX 1.0, 6.3; arXiv 2310.10537)",
    ),
    _everywhere(
        "mxfp6_e3m2",
        _scaled(E3M2, _MX, scale_format="e8m0", rule="floor"),
        about="OCP MXFP6 with three exponent bits (OCP MX 1.0, 6.3; arXiv 2310.10537)",
    ),
    _everywhere(
        "mxfp4",
        _scaled(E2M1, _MX, scale_format="e8m0", rule="floor"),
        about="OCP MXFP4 by the specification's floor rule (OCP MX 1.0, 6.3)",
    ),
    Recipe(
        name="mxfp4_aws",
        fprop=_same(_BF16),
        dgrad=GemmSpec(a=_UNBIASED_MXFP4, b=_UNBIASED_MXFP4, hadamard=Hadamard.seeded(64)),
        wgrad=GemmSpec(a=_UNBIASED_MXFP4, b=_UNBIASED_MXFP4, hadamard=Hadamard.seeded(64)),
        about="MXFP4 in the backward only, unbiased: Hadamard transform, 3/4, stochastic rounding "
        "(arXiv 2502.20586, section 3)",
    ),
    Recipe(
        name="mxfp4_quartet",
        fprop=GemmSpec(a=_QUEST_MXFP4, b=_QUEST_MXFP4, hadamard=Hadamard.plain(32)),
        dgrad=GemmSpec(
            a=_UNBIASED_MXFP4, b=FromFprop(requantize=_UNBIASED_MXFP4), hadamard=Hadamard.seeded(32)
        ),
        wgrad=GemmSpec(
            a=_UNBIASED_MXFP4, b=FromFprop(requantize=_UNBIASED_MXFP4), hadamard=Hadamard.seeded(32)
        ),
        about="Quartet: Hadamard and QuEST scales forward, unbiased MXFP4 of fprop's own operands "
        "backward (arXiv 2505.14669, section 4)",
    ),
    _nvfp4(
        "nvfp4",
        about="NVIDIA's NVFP4: 16x16 weights, stochastic gradients (biased where a block's largest "
        "value is cut), Hadamard on wgrad (arXiv 2509.25149, section 4)",
    ),
    _nvfp4(
        "nvfp4_4over6",
        about="nvfp4, each block of x and w scaled to 6 or to 4 (arXiv 2512.02010)",
        four_over_six=True,
    ),
    Recipe(
        name="int8",
        fprop=GemmSpec(a=_scaled(INT8, _ROW), b=_scaled(INT8, _TENSOR)),
        dgrad=GemmSpec(a=_scaled(INT8, _ROW), b=_scaled(INT8, _TENSOR)),
        wgrad=_same(_BF16),
        about="SwitchBack: int8 rows of x and g, one scale for w, 16-bit weight gradients "
        "(arXiv 2304.13013, section 2.2)",
    ),
    Recipe(
        name="qat_int8dyn_int4",
        fprop=GemmSpec(a=_scaled(INT8, _ROW, symmetric=False), b=_scaled(INT4, _MX)),
        dgrad=_STRAIGHT_THROUGH,
        wgrad=_STRAIGHT_THROUGH,
        about="quantisation-aware training for int8 per-token activations, int4 weights in groups "
        "of 32",
    ),
)
_BY_NAME = {recipe.name: recipe for recipe in _RECIPES}


def names() -> list[str]:
    """Return the names of the recipes, in the order of the documentation."""
    return list(_BY_NAME)


def get(name: str) -> Recipe:
    """Return the recipe called `name`; raise UserError with the nearest known name if there is
    none."""
    if name not in _BY_NAME:
        raise UserError(f"unknown recipe '{name}'{nearest(name, _BY_NAME)}")
    return _BY_NAME[name]


def resolve(value: Any) -> Recipe:
    """Return a recipe from any form that a user may give: a Recipe, a name, or a mapping of
    changes to one,

    {base: NAME, fprop: NAME, dgrad: {a: OPERAND, b: OPERAND, hadamard: SIZE, accumulator_bits: B,
    promote_every: N}, wgrad: ...}

    SIZE is a number, for fixed signs, or "16 fresh" for signs that each pass draws anew.

    The GEMM of another recipe is given by its name; a mapping changes single fields. An OPERAND is
    written as in an equation ("e4m3[1x128 fp32]", see `quant/spec.py`); "none" is high precision.

    Raises:
        UserError: the value is no recipe, or the GEMMs don't fit together.
    """
    if isinstance(value, Recipe):
        return value
    if isinstance(value, str):
        return get(value)
    if not isinstance(value, Mapping):
        raise UserError(f"a recipe is a name or a mapping with 'base', got {shown(value)}")
    if unknown := [key for key in value if key not in ("base", *GEMMS)]:
        raise UserError(
            f"unknown key '{unknown[0]}' in a recipe{nearest(unknown[0], ('base', *GEMMS))}"
        )
    if "base" not in value:
        raise UserError(
            "a recipe given as a mapping needs 'base', the recipe that it changes; got "
            f"{shown(dict(value))}"
        )
    base = resolve(value["base"])
    given = {gemm: value[gemm] for gemm in GEMMS if gemm in value}
    others = {
        gemm: resolve(other) for gemm, other in given.items() if not isinstance(other, Mapping)
    }
    fields: dict[str, dict[str, Any]] = {}
    for gemm, settings in given.items():
        if isinstance(settings, Mapping):
            try:
                fields[gemm] = {key: _gemm_field(key, setting) for key, setting in settings.items()}
            except ValueError as error:
                raise UserError(f"{gemm}: {error}") from None
    try:
        return base.changed(others, fields)
    except ValueError as error:
        raise UserError(str(error)) from None


def _gemm_field(key: str, value: Any) -> Any:
    """Return the value of a GemmSpec's field, given its form in a configuration."""
    known = [field.name for field in fields(GemmSpec)]
    if key not in known:
        raise UserError(f"unknown key '{key}'{nearest(key, known)}")
    if value is None or value == "none":
        return None
    if key in ("a", "b"):
        if value == "from_fprop":
            return FROM_FPROP
        return value if isinstance(value, OperandSpec) else OperandSpec.parse(str(value))
    if key == "hadamard" and isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,4})\s+fresh\s*", value)
        if match is None:
            raise UserError(f"hadamard is a size like 16, or '16 fresh'; got {value!r}")
        return Hadamard.drawn(int(match[1]))
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{key} is a whole number, got {value!r}")
    return Hadamard.seeded(value) if key == "hadamard" else value
