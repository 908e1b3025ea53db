"""Recipes of Transformer Engine for `backend: te`: which of our recipes it can run, and why not.

The twin of a recipe is the recipe of Transformer Engine that multiplies the same operands. It is
found by the operands and how their products are summed, not by the recipe's name.

    fp8_blockwise         Float8BlockScaling with fp32 scales (Hopper)
    fp8_blockwise_ue8m0   Float8BlockScaling with power-of-two scales
    fp8_tensorwise        Float8CurrentScaling
    fp8_delayed           DelayedScaling; its scales of the first pass are 1
    mxfp8                 MXFP8BlockScaling (Blackwell)
    nvfp4                 NVFP4BlockScaling (Blackwell)

Every option that a recipe of Transformer Engine would otherwise read from the environment is set
here, so no environment variable changes numerics.
"""

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowprec.errors import UserError
from lowprec.recipe import GEMMS, Recipe, library


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A recipe of Transformer Engine, described without importing it."""

    name: str
    """Name of its class in transformer_engine.common.recipe."""
    available: str
    """Name of the function in transformer_engine.pytorch that says if this GPU runs it."""
    format: str | None = None
    """Element formats: E4M3, or HYBRID (e4m3, and e5m2 for gradients). None: it has no such
    option."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Other arguments of its class."""
    power_of_two: bool | None = None
    """Flag: its scales are powers of two. None: it leaves no choice."""
    multiple: int = 16
    """Number whose multiples it takes as features and tokens."""


def _block_twin(*, power_of_two: bool) -> Twin:
    return Twin(
        name="Float8BlockScaling",
        available="is_fp8_block_scaling_available",
        format="E4M3",
        options={"use_f32_scales": not power_of_two},
        power_of_two=power_of_two,
    )


_TWINS = {
    "fp8_blockwise": _block_twin(power_of_two=False),
    "fp8_blockwise_ue8m0": _block_twin(power_of_two=True),
    "fp8_tensorwise": Twin(
        name="Float8CurrentScaling",
        available="is_fp8_available",
        format="HYBRID",
        options={"use_power_2_scales": False},
        power_of_two=False,
    ),
    "fp8_delayed": Twin(
        name="DelayedScaling",
        available="is_fp8_available",
        format="HYBRID",
        options={
            "margin": 0,
            "amax_history_len": 1024,
            "amax_compute_algo": "max",
            "reduce_amax": False,
        },
    ),
    "mxfp8": Twin(
        name="MXFP8BlockScaling",
        available="is_mxfp8_available",
        format="E4M3",
        options={"enable_2d_quantization": False},
        multiple=32,
    ),
    "nvfp4": Twin(
        name="NVFP4BlockScaling",
        available="is_nvfp4_available",
        options={
            "nvfp4_4over6": "none",
            "row_scaled_activation": False,
            "disable_rht": False,
            "disable_stochastic_rounding": False,
            "disable_2d_quantization": False,
        },
        multiple=32,
    ),
}
"""The twin of each recipe in our library that has one."""

_NO_TWIN = f"Transformer Engine has no such recipe; it has {', '.join(_TWINS)}"
_INSTALL = "needs Transformer Engine: pip install 'lowprec[te]'"


def twin_of(recipe: Recipe) -> Twin | None:
    """Return the twin of a recipe; None if it has none."""
    for name, twin in _TWINS.items():
        named = library.get(name)
        if all(named.gemm(gemm) == recipe.gemm(gemm) for gemm in GEMMS):
            return twin
    return None


def te_recipe(recipe: Recipe) -> Any:
    """Return the twin of a recipe as an object of Transformer Engine.

    Raises:
        UserError: the recipe has no twin, or Transformer Engine is not installed.
    """
    twin = twin_of(recipe)
    if twin is None:
        raise UserError(f"recipe {recipe.name}: {_NO_TWIN}")
    try:
        import transformer_engine.common.recipe as recipes
    except ModuleNotFoundError:
        raise UserError(f"recipe {recipe.name}: backend 'te' {_INSTALL}") from None
    form = {} if twin.format is None else {"fp8_format": getattr(recipes.Format, twin.format)}
    made = getattr(recipes, twin.name)(**form, **twin.options, backward_override=None)
    if twin.power_of_two is not None:
        # The option alone is not enough: the class has read these settings from the environment.
        for operand in ("fwd_inp", "fwd_weight", "bwd_grad"):
            setattr(made, f"fp8_quant_{operand}", recipes.QParams(power_2_scale=twin.power_of_two))
    if twin.format == "HYBRID":
        # By default its fprop sums in the 14 bits of Hopper's matrix units; our recipe does not.
        made.fp8_gemm_fprop = recipes.MMParams(use_split_accumulator=True)
    return made


def why_not_te(recipe: Recipe, device_type: str) -> str | None:
    """Return why Transformer Engine can't run `recipe` on a device of this type; None if it can.

    Args:
        device_type: "cpu" or "cuda"; the latter stands for the GPU of this machine.
    """
    twin = twin_of(recipe)
    if twin is None:
        return _NO_TWIN
    if device_type != "cuda":
        return "Transformer Engine needs a CUDA device"
    if (
        "transformer_engine" not in sys.modules
        and importlib.util.find_spec("transformer_engine") is None
    ):
        return _INSTALL
    if not torch.cuda.is_available():
        return "Transformer Engine needs a CUDA device, and this machine has none"
    try:
        import transformer_engine.pytorch as te
    except (ImportError, OSError, RuntimeError) as error:
        # It was built for another version of torch or CUDA.
        return f"Transformer Engine does not load: {error}"
    available, reason = getattr(te, twin.available)(return_reason=True)
    if not available:
        return reason.rstrip(".")
    if (
        twin.name == "Float8BlockScaling"
        and not twin.power_of_two
        and torch.cuda.get_device_capability()[0] >= 10
    ):
        return (
            "Transformer Engine's block scales are powers of two on this GPU, "
            "as fp8_blockwise_ue8m0 has them"
        )
    return None


def why_not_shape(linear: nn.Linear, recipe: Recipe) -> str | None:
    """Return why Transformer Engine's GEMMs don't take the layer's shape.

    None if they take it, or if the recipe has no twin.
    """
    twin = twin_of(recipe)
    if twin is None:
        return None
    multiple = twin.multiple
    if linear.in_features % multiple == 0 and linear.out_features % multiple == 0:
        return None
    shape = f"{linear.out_features} x {linear.in_features}"
    return (
        f"Transformer Engine's {twin.name} takes features in multiples of {multiple}, not {shape}"
    )


def te_reason(recipe: Recipe) -> str:
    """Return the plan's words for what runs `recipe`: 'Transformer Engine, Float8BlockScaling'."""
    twin = twin_of(recipe)
    assert twin is not None
    return f"Transformer Engine, {twin.name}"
