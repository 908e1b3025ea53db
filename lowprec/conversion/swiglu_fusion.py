"""Which MLPs of a model make the codes of down_proj's input from gate and up directly
(`nn/swiglu.py`), in place, and back."""

from collections.abc import Iterator, Mapping

from torch import nn

from lowprec.conversion.plan import PartPlan
from lowprec.nn import swiglu
from lowprec.nn.operands import LinearGemms, able_backend
from lowprec.recipe import Recipe

WHY = "silu(gate) * up goes to down_proj in FP8, from the kernel that computes it"


def fusable(
    model: nn.Module, recipes: Mapping[str, Recipe | None], device_type: str, backend: str
) -> list[str]:
    """The names of the MLPs that a conversion fuses.

    Args:
        recipes: of each linear layer by its name, None if it is left alone.
    """
    return [
        name
        for name, module in _candidates(model)
        if _is_native(recipes.get(f"{name}.down_proj".lstrip(".")), device_type, backend)
    ]


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if swiglu.is_fused(module) or swiglu.is_swiglu(module):
            down = module.down_proj
            if isinstance(down, nn.Linear) and not swiglu.is_hooked(down):
                yield name, module


def _is_native(recipe: Recipe | None, device_type: str, backend: str) -> bool:
    return (
        recipe is not None
        and device_type != "meta"
        and _gemms(recipe, device_type, backend).pairs["x"] is not None
    )


def _gemms(recipe: Recipe, device_type: str, backend: str) -> LinearGemms:
    return LinearGemms.on(device_type, recipe, able_backend(recipe, backend, device_type))


def apply(model: nn.Module, names: list[str]) -> None:
    """Fuse these, and no others."""
    for module in model.modules():
        swiglu.unfuse(module)
    for name in names:
        swiglu.fuse(model.get_submodule(name))


def part(names: list[str]) -> PartPlan:
    """What the plan says of it."""
    return PartPlan(name="swiglu", choice=f"fused in {len(names)} MLPs", reason=WHY)
