"""Find the weights that a model multiplies by, of linear layers and of experts, and the reasons
against converting them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lowprec.conversion import kept
from lowprec.conversion.layer_backends import CONVERTED, LayerBackend
from lowprec.conversion.matrices import Matrix, matrices, stacks_of
from lowprec.conversion.peft_names import name_without_peft
from lowprec.conversion.plain_forward import why_not_plain
from lowprec.conversion.weight_readers import read_layers
from lowprec.errors import UserError
from lowprec.nn import LowPrecisionLinear, experts
from lowprec.nn.dtypes import why_not_dtype, why_not_tensor
from lowprec.nn.known import is_conv1d, is_fsdp2
from lowprec.nn.linear import original_class, shape_of
from lowprec.recipe import Recipe


@dataclass(frozen=True)
class Weight:
    """A weight that a model multiplies by: that of a linear layer, or a stack of experts'
    matrices."""

    module: nn.Module
    stack: str = ""
    """Name of the parameter that holds several matrices; "" for a linear layer."""
    bypassed: str = ""
    """The reason, if other code multiplies by it without calling the module."""
    under_fsdp: bool = False
    """Flag: the module is inside a unit of FSDP2."""
    matrix: Matrix | None = None
    """The matrix of a module that is no linear layer; it can't be converted."""

    @property
    def data(self) -> Any:
        """The parameter."""
        return getattr(self.module, self.stack or "weight")

    @property
    def experts(self) -> int:
        """Number of matrices in the parameter."""
        if self.matrix is not None and self.matrix.shape is not None:
            return 1
        return math.prod(self.data.shape[:-2]) if self.stack else 1

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs N and inputs K of the layer, or of one expert."""
        if self.matrix is not None:
            N, K = self.matrix.shape or self.data.shape[-2:]
            return N, K
        if self.stack:
            _, N, K = experts.stack_shape(self.module, self.stack)
            return N, K
        return shape_of(self.module)

    @property
    def kind(self) -> str:
        """Name of the class that the module has without a recipe."""
        if isinstance(self.module, CONVERTED) and not isinstance(self.module, LowPrecisionLinear):
            return "Linear"
        return original_class(self.module).__name__


def find_weights(model: nn.Module) -> Iterator[tuple[str, Weight]]:
    """Yield every weight matrix of a linear layer, nn.Linear or one like it, every stack of
    matrices, and every other matrix that the model multiplies by, once, with its full name."""
    bypassed = _bypassed(model)
    units = (module for module in model.modules() if is_fsdp2(module))
    sharded = {module for unit in units for module in unit.modules()}
    for name, module in model.named_modules():
        if _is_linear(module):
            reason = bypassed.get(module, "")
            yield name, Weight(module, bypassed=reason, under_fsdp=module in sharded)
        else:
            for stack in stacks_of(module):
                weight = Weight(module, stack, under_fsdp=module in sharded)
                yield f"{name}.{stack}".lstrip("."), weight
            for matrix in matrices(module):
                weight = Weight(module, matrix.name, matrix=matrix)
                yield f"{name}.{matrix.name}".lstrip("."), weight


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The weights of a model and their names, as decisions need them under any precision."""

    weights: Mapping[str, Weight]
    """The weights by full name, in the model's order."""
    plain: Mapping[str, str]
    """The name of each weight without PEFT's parts, by its full name."""
    high_precision: Mapping[str, str]
    """Reasons why layers stay in high precision unless a rule names them, by full name."""


def survey(model: nn.Module) -> Survey:
    """Return what there is to decide about `model`.

    Raises:
        UserError: a weight has no shape yet.
    """
    weights = dict(find_weights(model))
    if lazy := next((name for name, weight in weights.items() if is_lazy(weight.data)), None):
        raise UserError(
            f"{lazy}.weight has no shape yet: let the model see one batch before its precision is "
            "decided"
        )
    found = {name: name_without_peft(model, name, weight.stack) for name, weight in weights.items()}
    plain = {name: own for name, (own, _) in found.items()}
    adapters = [name for name, (_, added) in found.items() if added]
    kept_ones = kept.reasons(model, weights, plain, adapters)
    return Survey(weights=weights, plain=plain, high_precision=kept_ones)


def why_not_convert(weight: Weight, recipe: Recipe, layers: LayerBackend) -> str | None:
    """Return why a weight can't be converted to a recipe by these layers; None if it can."""
    module = weight.module
    kind = weight.kind
    if weight.matrix is not None:
        return weight.matrix.reason
    is_converted = isinstance(module, CONVERTED) or experts.is_converted(module)
    if is_fsdp2(module) and not is_converted:
        return f"{kind}: already sharded; convert before fully_shard"
    if "forward" in module.__dict__ and not is_converted:
        return (
            f"something has replaced the forward of this {kind} (offloading hooks do): convert "
            "before that"
        )
    if weight.bypassed:
        return weight.bypassed
    if (reason := _why_not_data(weight)) is not None:
        return reason
    if weight.stack:
        return layers.why_not_stack(module, recipe)
    if not isinstance(module, CONVERTED) and (reason := why_not_plain(module)) is not None:
        return reason
    return layers.why_not_linear(module, recipe)


def _why_not_data(weight: Weight) -> str | None:
    """Return why a weight is nothing that a recipe quantises; None if it is a plain parameter."""
    if (weight.stack or "weight") not in weight.module._parameters:
        return "its weight is no parameter: a parametrization or a hook computes it"
    reason = why_not_tensor(weight.data, weight.under_fsdp) or why_not_dtype(weight.data)
    if reason is not None or weight.stack:
        return reason
    stored = tuple(weight.data.shape)
    expected = weight.shape[::-1] if is_conv1d(weight.module) else weight.shape
    if stored != expected:
        return f"its weight is {list(stored)}, not {list(expected)}: packed, sharded or replaced"
    return None


def recipes_of(model: nn.Module) -> dict[str, Recipe]:
    """Return the recipe of each converted layer by its name, in the plan's order. Layers of
    Transformer Engine are left out."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LowPrecisionLinear):
            found[name] = module.recipe
        elif experts.is_converted(module):
            projections = experts.projections_of(module)
            found |= {
                f"{name}.{stack}".lstrip("."): projection.recipe
                for stack, projection in projections.items()
            }
    return found


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer that has what its class promises. Some libraries
    take the weight away and keep a packed one."""
    parts = ()
    if is_conv1d(module):
        parts = ("nf", "nx", "weight")
    elif isinstance(module, nn.Linear):
        parts = ("out_features", "in_features", "weight")
    return bool(parts) and all(getattr(module, part, None) is not None for part in parts)


def _bypassed(model: nn.Module) -> dict[nn.Module, str]:
    """Return the layers by whose weights other code multiplies without calling them, and which code
    that is."""
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _has_fast_path(module):
            reason = (
                "nn.TransformerEncoderLayer multiplies by its weight without calling it, in eval() "
                "and without gradients"
            )
            found |= {module.linear1: reason, module.linear2: reason}
        elif isinstance(module, nn.MultiheadAttention) and _runs(module, nn.MultiheadAttention):
            found[module.out_proj] = (
                "nn.MultiheadAttention multiplies by its weight without calling it"
            )
        for layer in read_layers(module):
            reason = f"{type(module).__name__} multiplies by its weight without calling it"
            found.setdefault(layer, reason)
    return found


def _runs(module: nn.Module, base: Any) -> bool:
    """Return whether a module runs the forward of its base class, also by super()."""
    forward = type(module).forward
    # Code that calls super() has a cell `__class__`.
    cells = getattr(getattr(forward, "__code__", None), "co_freevars", ("__class__",))
    return forward is base.forward or "__class__" in cells


def _has_fast_path(layer: nn.TransformerEncoderLayer) -> bool:
    """Return whether torch may read the weights of `layer`'s linear layers itself, in eval() and
    without gradients: torch's own conditions on the layer, without those on an input
    (torch/nn/modules/transformer.py)."""
    attention = layer.self_attn
    return (
        _runs(layer, nn.TransformerEncoderLayer)
        and attention.batch_first
        and attention.in_proj_bias is not None
        and attention._qkv_same_embed_dim
        and attention.num_heads % 2 == 0
        and bool(layer.activation_relu_or_gelu)
        and layer.norm1.eps == layer.norm2.eps
    )
