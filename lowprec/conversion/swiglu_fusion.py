"""Find the MLPs whose SwiGLU makes the codes of down_proj's input from gate and up directly
(`nn/swiglu.py`), and fuse them, in place."""

from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from lowprec.conversion.plan import PartPlan
from lowprec.nn import swiglu
from lowprec.nn.gemms import LinearGemms, backend_or_auto
from lowprec.recipe import Recipe

WHY = "silu(gate) * up goes to down_proj in FP8, from the kernel that computes it"


def candidates(model: nn.Module) -> Iterator[str]:
    """Yield the names of the MLPs that can be fused where down_proj `takes_gate`."""
    for name, module in model.named_modules():
        if swiglu.is_fused(module) or swiglu.is_swiglu(module):
            down = module.down_proj
            if isinstance(down, nn.Linear) and not swiglu.is_hooked(down):
                yield name


def takes_gate(recipe: Recipe | None, device_type: str, backend: str) -> bool:
    """Return whether a down_proj of this recipe quantises silu(gate) * up in one kernel; None is a
    layer in high precision."""
    if recipe is None or device_type == "meta":
        return False
    able = backend_or_auto(recipe, backend, device_type)
    return LinearGemms.on(device_type, recipe, able).fuses_gate


def apply(model: nn.Module, names: Iterable[str]) -> None:
    """Fuse the MLPs of these names, and no others."""
    for module in model.modules():
        swiglu.unfuse(module)
    for name in names:
        swiglu.fuse(model.get_submodule(name))


def part(names: Sequence[str]) -> PartPlan:
    """Return the plan's row about fused MLPs."""
    return PartPlan(name="swiglu", choice=f"fused in {len(names)} MLPs", reason=WHY)
