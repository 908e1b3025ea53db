"""The dtypes that a converted layer computes with.

It takes what its own class takes. Recipes multiply operands of fp32 or less, so weights of other
dtypes, such as float64 or float8, have no product here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lowprec.errors import UserError
from lowprec.nn.known import is_a, is_dtensor, is_plain
from lowprec.recipe import Recipe

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of the inputs and weights that recipes multiply."""


def check_dtypes(
    x: Tensor, weight: Tensor, autocast: bool, product: Callable[[Tensor], Tensor], recipe: Recipe
) -> torch.dtype:
    """Return the dtype in which the recipe takes x, which is that of the result.

    Args:
        autocast: whether autocast is on.
        product: the forward of the layer's own class. It decides about an input whose dtype is not
            the weight's: nn.Linear raises its error, and a class that casts returns a result.
    Raises:
        UserError: the recipe does not multiply by such a weight, or has no result of such a dtype.
    """
    if type(weight) is not nn.Parameter and is_traceable_wrapper_subclass(weight):
        raise UserError(f"recipe {recipe.name} can't run: {why_not_tensor(weight)}")
    if weight.dtype not in DTYPES:
        raise UserError(f"recipe {recipe.name} can't run: {why_not_dtype(weight)}")
    if autocast and x.dtype in DTYPES:
        return torch.get_autocast_dtype(x.device.type)
    if not autocast and x.dtype == weight.dtype:
        return x.dtype
    dtype = product(x.reshape(-1, x.shape[-1])[:0]).dtype
    if dtype not in DTYPES:
        raise UserError(f"recipe {recipe.name} has no result in {_name(dtype)}")
    return dtype


def why_not_tensor(weight: Tensor, under_fsdp: bool = False) -> str | None:
    """Return why a weight is not one that recipes quantise, by its kind of tensor; None if it is a
    plain one.

    Args:
        under_fsdp: whether it is looked at inside a model that FSDP2 shards, between two passes.
            FSDP2 gathers a plain weight for each pass.
    """
    if is_plain(weight):
        return None
    if is_a(weight, "torch._subclasses.fake_tensor:FakeTensor"):
        return None
    if not is_dtensor(weight):
        return f"its weight is of class {type(weight).__name__}, not a plain tensor"
    # FSDP2 alone shards over the last dimension of its mesh. Under tensor parallelism, more
    # dimensions shard the weight.
    placements: Any = weight.placements  # pyright: ignore[reportAttributeAccessIssue]
    if under_fsdp and all(placement.is_replicate() for placement in placements[:-1]):
        return None
    return (
        "its weight is a DTensor, as tensor parallelism makes: low precision does not run under "
        "tensor parallelism yet"
    )


def why_not_dtype(weight: Tensor) -> str | None:
    """Return why a weight has no product under a recipe, by its dtype; None if it has one."""
    if weight.dtype in DTYPES:
        return None
    name = _name(weight.dtype)
    if weight.dtype == torch.float64:
        return f"its weight is {name}, and a recipe's products have fp32's precision at most"
    return f"its weight is {name}: already quantised, or no number that a recipe multiplies"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
