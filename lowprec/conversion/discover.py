"""Find the weights that a model multiplies by, of linear layers and of experts, and the reasons
against converting them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lowprec.conversion.layer_backends import CONVERTED, LayerBackend
from lowprec.conversion.peft_names import name_without_peft
from lowprec.nn import LowPrecisionLinear, experts
from lowprec.recipe import Recipe

_HEADS = ("lm_head", "embed_out", "output_projection", "score", "classifier")
"""Last parts of the names of output layers, for models without `get_output_embeddings`."""

_GATES = {"gate", "router", "shared_expert_gate"}
"""Names of the modules that decide between the experts of a mixture."""

_HEAD_STAYS = "the output head stays in high precision unless a rule names it"
_GATE_STAYS = "a gate of experts stays in high precision unless a rule names it"


@dataclass(frozen=True)
class Weight:
    """A weight that a model multiplies by: that of a linear layer, or a stack of experts'
    matrices."""

    module: nn.Module
    stack: str = ""
    """Name of the parameter that holds several matrices; "" for a linear layer."""
    bypassed: bool = False
    """Flag: torch's own code multiplies by it without calling the module."""

    @property
    def data(self) -> Any:
        """The parameter."""
        return getattr(self.module, self.stack or "weight")

    @property
    def experts(self) -> int:
        """Number of matrices in the parameter."""
        return self.data.shape[0] if self.stack else 1

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs N and inputs K of the layer, or of one expert."""
        if self.stack:
            _, N, K = experts.stack_shape(self.module, self.stack)
            return N, K
        N, K = self.data.t().shape if _is_conv1d(self.module) else self.data.shape
        return N, K


def find_weights(model: nn.Module) -> Iterator[tuple[str, Weight]]:
    """Yield every weight matrix of a linear layer, nn.Linear or one like it, and every stack of
    matrices, once, with its full name."""
    readers = (
        module
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoderLayer) and _has_fast_path(module)
    )
    bypassed = {id(layer) for module in readers for layer in (module.linear1, module.linear2)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or _is_conv1d(module):
            yield name, Weight(module, bypassed=id(module) in bypassed)
        else:
            for stack in experts.stacks(module):
                yield f"{name}.{stack}".lstrip("."), Weight(module, stack)


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
    """Return what there is to decide about `model`."""
    weights = dict(find_weights(model))
    found = {name: name_without_peft(model, name, weight.stack) for name, weight in weights.items()}
    plain = {name: own for name, (own, _) in found.items()}
    adapters = [name for name, (_, added) in found.items() if added]
    high_precision = {
        **dict.fromkeys(adapters, "adapter: small, and trained in high precision"),
        **dict.fromkeys(expert_gates(model), _GATE_STAYS),
        **dict.fromkeys(output_heads(model, weights, plain), _HEAD_STAYS),
    }
    return Survey(weights=weights, plain=plain, high_precision=high_precision)


def why_not_convert(weight: Weight, recipe: Recipe, layers: LayerBackend) -> str | None:
    """Return why a weight can't be converted to a recipe by these layers; None if it can."""
    module = weight.module
    kind = type(module).__name__
    if kind.startswith("FSDP"):
        return f"{kind}: already sharded; convert before fully_shard"
    if "forward" in module.__dict__ and not (
        isinstance(module, CONVERTED) or experts.is_converted(module)
    ):
        return (
            f"something has replaced the forward of this {kind} (offloading hooks do): convert "
            "before that"
        )
    if weight.bypassed:
        return (
            "nn.TransformerEncoderLayer multiplies by its weight without calling it, in eval() and "
            "without gradients"
        )
    if weight.stack:
        return layers.why_not_stack(module, recipe)
    if _is_conv1d(module):
        return "transformers' Conv1D keeps its weight transposed and is no nn.Linear"
    if type(module) not in (nn.Linear, *CONVERTED):
        return f"{kind} is a subclass of nn.Linear with a forward of its own"
    assert isinstance(module, nn.Linear)
    return layers.why_not_linear(module, recipe)


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


def output_heads(model: nn.Module, weights: dict[str, Weight], plain: dict[str, str]) -> set[str]:
    """Return the names of the layers whose output is the model's: the one that transformers
    returns, those whose weight is tied to an embedding, and those with the name of a head."""
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    given: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = given()
    head = getattr(head, "base_layer", head)  # the layer that an adapter wraps
    return {
        name
        for name, weight in weights.items()
        if weight.module is head
        or id(weight.data) in embeddings
        or plain[name].rpartition(".")[2] in _HEADS
    }


def expert_gates(model: nn.Module) -> set[str]:
    """Return the names of the layers that decide which experts a token goes to, or with which
    weight: gates and routers beside experts."""
    found = set()
    for name, module in model.named_modules():
        children = dict(module.named_children())
        for gate in _GATES & children.keys() if "experts" in children else ():
            beneath = (
                inner
                for inner, layer in children[gate].named_modules()
                if isinstance(layer, nn.Linear)
            )
            found |= {".".join(filter(None, [name, gate, inner])) for inner in beneath}
    return found


def _has_fast_path(layer: nn.TransformerEncoderLayer) -> bool:
    """Return whether torch may read the weights of `layer`'s linear layers itself, in eval() and
    without gradients: torch's own conditions on the layer, without those on an input
    (torch/nn/modules/transformer.py)."""
    forward = type(layer).forward
    attention = layer.self_attn
    # A subclass's forward may call torch's by super(); its code then has a cell `__class__`.
    calls_super = "__class__" in getattr(
        getattr(forward, "__code__", None), "co_freevars", ("__class__",)
    )
    return (
        (forward is nn.TransformerEncoderLayer.forward or calls_super)
        and attention.batch_first
        and attention.in_proj_bias is not None
        and attention._qkv_same_embed_dim
        and attention.num_heads % 2 == 0
        and bool(layer.activation_relu_or_gelu)
        and layer.norm1.eps == layer.norm2.eps
    )


def _is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D, the linear layer of GPT-2. It is recognised
    by its name, so that transformers need not be imported."""
    return type(module).__name__ == "Conv1D"
