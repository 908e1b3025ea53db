"""Rivals: other libraries that are measured in the same run, and their linear layers.

If a rival that the user named is not installed, the benchmark raises UserError. If a rival fails
while it runs, its row reports the failure and the benchmark continues.
"""

import copy
import gc
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowprec.errors import UserError, nearest

T = TypeVar("T")
Model = TypeVar("Model", bound=nn.Module)

Layer = tuple[Callable[[Tensor], Tensor], Tensor]
"""A linear layer: its forward, and the weight that gets the gradient."""

_PACKAGES = {
    "torchao": ("torchao", "pip install torchao"),
    "te": ("transformer_engine", "pip install 'lowprec[te]'"),
}
"""Name of a rival on the command line -> its package, and the command that installs it."""

_TORCHAO_BLOCK = "torchao.prototype.blockwise_fp8_training.linear"
_LONGEST_FAILURE = 200


def check(named: Sequence[str], known: Sequence[str]) -> None:
    """Raise UserError if a rival is not one of `known` or is not installed. "bf16" needs no
    package."""
    for rival in named:
        if rival not in known:
            raise UserError(f"--against: unknown rival '{rival}'{nearest(rival, known)}")
        if rival in _PACKAGES and importlib.util.find_spec(_PACKAGES[rival][0]) is None:
            raise UserError(f"--against: {rival} is not installed: {_PACKAGES[rival][1]}")


def attempt(function: Callable[[], T]) -> tuple[T | None, str | None]:
    """Call `function` and return (its result, None), or (None, failure) if it raises an exception.

    The failure is the first 200 characters of the exception. A UserError is raised again.
    """
    failure = None
    try:
        return function(), None
    except UserError:
        raise
    except Exception as error:
        failure = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_FAILURE]
    # The frames that kept memory alive are gone with the exception.
    release_memory()
    return None, failure


def release_memory() -> None:
    """Free the memory of the last row, so that every row starts with the same free memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compiled(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return `module` through torch.compile, after a reset of the compiler.

    Without the reset, torch's limit on the number of variants of one forward could be reached.
    """
    torch._dynamo.reset()
    return torch.compile(module, dynamic=False)


def torchao_layers() -> dict[str, Callable[[nn.Linear], Layer]]:
    """Return torchao's linear layers for training in FP8.

    Each is a name with a function that makes the layer from a bf16 nn.Linear.
    """
    return {
        "torchao block": _torchao_block,
        "torchao tensorwise, compiled": lambda linear: _torchao_float8(linear, "tensorwise"),
        "torchao rowwise, compiled": lambda linear: _torchao_float8(linear, "rowwise"),
    }


def _torchao_block(linear: nn.Linear) -> Layer:
    layer = importlib.import_module(
        "torchao.prototype.blockwise_fp8_training.linear"
    ).Float8BlockwiseLinear.from_float(copy.deepcopy(linear))
    return layer, layer.weight


def _torchao_float8(linear: nn.Linear, kind: str) -> Layer:
    model = convert_by_torchao(nn.Sequential(copy.deepcopy(linear)), kind)
    layer: Any = model[0]
    return compiled(model), layer.weight


def convert_by_torchao(
    model: Model, kind: str, wanted: Callable[[nn.Module, str], bool] = lambda module, name: True
) -> Model:
    """Replace the linear layers of `model` by torchao's, in place, and return the model.

    Args:
        kind: tensorwise, rowwise or blockwise.
        wanted: (layer, its name) -> True if the layer is to be converted.
    """
    if kind == "blockwise":
        config = importlib.import_module(_TORCHAO_BLOCK).Float8BlockwiseLinearConfig()
        quantize_ = importlib.import_module("torchao.quantization").quantize_
        quantize_(
            model,
            config,
            filter_fn=lambda module, name: isinstance(module, nn.Linear) and wanted(module, name),
        )
        return model
    float8 = importlib.import_module("torchao.float8")
    config = float8.Float8LinearConfig.from_recipe_name(kind)
    return float8.convert_to_float8_training(model, config=config, module_filter_fn=wanted)


def te_layers() -> dict[str, Callable[[nn.Linear], Layer]]:
    """Return Transformer Engine's linear layer under each of its FP8 recipes, in two variants.

    One variant quantises the weight in every step, the other ("weight cached") in the first step
    only.
    """
    recipes = {
        "block": "Float8BlockScaling",
        "current": "Float8CurrentScaling",
        "delayed": "DelayedScaling",
    }
    layers: dict[str, Callable[[nn.Linear], Layer]] = {}
    for name, recipe in recipes.items():
        layers[f"te {name}"] = lambda linear, recipe=recipe: _te(linear, recipe, keeps_weight=False)
        layers[f"te {name}, weight cached"] = lambda linear, recipe=recipe: _te(
            linear, recipe, keeps_weight=True
        )
    return layers


def _te(linear: nn.Linear, recipe_name: str, *, keeps_weight: bool) -> Layer:
    te = importlib.import_module("transformer_engine.pytorch")
    recipe = getattr(importlib.import_module("transformer_engine.common.recipe"), recipe_name)()
    weight = linear.weight
    layer = te.Linear(
        linear.in_features,
        linear.out_features,
        bias=False,
        params_dtype=weight.dtype,
        device=weight.device,
    )
    with torch.no_grad():
        layer.weight.copy_(weight)
    first = True

    def forward(x: Tensor) -> Tensor:
        nonlocal first
        with te.autocast(enabled=True, recipe=recipe):
            y = layer(x, is_first_microbatch=first) if keeps_weight else layer(x)
        first = False
        return y

    return forward, layer.weight
