"""Find the weights that stay in high precision unless a rule names them: output heads, gates of
experts, and what the model itself keeps in fp32.

They are found by what they are, so that names of models need not be known:

* An output head is the model's `get_output_embeddings()`, shares its weight with an embedding, has
  as many outputs as the vocabulary, or stands behind the last of the model's blocks and feeds no
  other layer there.
* A gate of experts has as many outputs as there are experts beside it, or is called a gate or a
  router there.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lowprec.nn import experts
from lowprec.nn.known import is_fsdp2

_HEADS = ("lm_head", "embed_out", "output_projection", "score", "classifier")
"""Last parts of the names of output layers, for models whose structure does not tell."""

_GATES = {"gate", "router", "shared_expert_gate"}
"""Names of the modules that decide between the experts of a mixture."""

_HEAD_STAYS = "the output head stays in high precision unless a rule names it"
_GATE_STAYS = "a gate of experts stays in high precision unless a rule names it"
_ADAPTER_STAYS = "adapter: small, and trained in high precision"


def reasons(
    model: nn.Module, weights: Mapping[str, Any], plain: Mapping[str, str], adapters: list[str]
) -> dict[str, str]:
    """Return why weights of a model stay in high precision, by full name.

    Args:
        weights: all weights that are decided (`discover.Weight`), by full name.
        plain: the name of each weight without PEFT's parts.
        adapters: full names of the weights that PEFT added.
    """
    own = {name: weight for name, weight in weights.items() if name not in set(adapters)}
    # PEFT may hold a second, trained copy of a head under the same plain name.
    heads = {plain[name] for name in _heads(model, own, plain)}
    return {
        **dict.fromkeys(adapters, _ADAPTER_STAYS),
        **_kept_in_fp32(model, own, plain),
        **dict.fromkeys((name for name in own if plain[name] in heads), _HEAD_STAYS),
        **dict.fromkeys(_gates(model, own), _GATE_STAYS),
    }


def _is_inside(name: str, module_name: str) -> bool:
    """Return whether a name is that of a module, "" for the whole model, or of something in it."""
    return not module_name or f"{name}.".startswith(f"{module_name}.")


# Heads


def _heads(model: nn.Module, weights: Mapping[str, Any], plain: Mapping[str, str]) -> set[str]:
    """Return the names of the weights whose product is the model's output."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tied = {id(embedding.weight) for embedding in embeddings}
    named = set(map(id, _output_embeddings(model)))
    linears = {name: weight for name, weight in weights.items() if not weight.stack}
    bodies = _bodies(model)
    found = {
        name
        for name, weight in linears.items()
        if id(weight.module) in named
        or id(weight.data) in tied
        or plain[name].rpartition(".")[2] in _HEADS
    }
    vocabulary = max((embedding.num_embeddings for embedding in embeddings), default=0)
    last = next(reversed(linears), "")
    if last and not any(_is_inside(last, body) for body in bodies):
        found |= {last} if linears[last].shape[0] == vocabulary else set()
    if bodies:
        behind = list(_behind(model, "", bodies, list(linears)))
        for place, name in enumerate(behind):
            N, _ = linears[name].shape
            later = [linears[other].shape for other in behind[place + 1 :]]
            if all(N != K for _, K in later):  # else it makes the inputs of another one
                found.add(name)
    return found


def _output_embeddings(model: nn.Module) -> Iterator[Any]:
    """Yield the layers that a model, or a part of it, names as its output."""
    for module in model.modules():
        given: Any = getattr(module, "get_output_embeddings", None)
        try:
            head = None if given is None else given()
        except (AttributeError, NotImplementedError):  # the class has no such layer
            head = None
        if head is not None:
            yield getattr(head, "base_layer", head)  # the layer that an adapter wraps


def _bodies(model: nn.Module) -> set[str]:
    """Return the names of the containers of a model's blocks, the outermost ones only, without
    those of experts and small ones: a head may hold a list, too."""
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        inside = any(_is_inside(name, other) for other in sizes)
        if not inside and name.rpartition(".")[2] != "experts" and _holds_blocks(module):
            sizes[name] = sum(parameter.numel() for parameter in module.parameters())
    largest = max(sizes.values(), default=0)
    return {name for name, size in sizes.items() if 10 * size >= largest}


def _holds_blocks(module: nn.Module) -> bool:
    """Return whether a module is a list of blocks: modules that are made of others."""
    children = list(module.children())
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return bool(children) and all(any(child.children()) for child in children)
    kinds = [_kind(child) for child in children if any(child.children())]
    return isinstance(module, nn.Sequential) and len(kinds) > len(set(kinds))


def _kind(module: nn.Module) -> type:
    """Return the class that a module has without FSDP2 and without a fused SwiGLU: a model that is
    converted and sharded is read as it was before."""
    kind: Any = type(module)
    if is_fsdp2(module):
        kind = kind.__bases__[-1]
    return getattr(kind, "unfused", kind)


def _behind(module: nn.Module, name: str, bodies: set[str], linears: list[str]) -> Iterator[str]:
    """Yield the last linear layer of each child that stands behind the last block, at the topmost
    level that has one. Children stand in the order in which the module registered them."""
    if name in bodies and not isinstance(module, nn.Sequential):
        return
    children = [(f"{name}.{key}".lstrip("."), child) for key, child in module.named_children()]
    if name in bodies:
        with_blocks = [place for place, (_, child) in enumerate(children) if any(child.children())]
        # Behind the last of its own repeated blocks.
        kinds = [_kind(child) for _, child in children]
        with_blocks = [place for place in with_blocks if kinds.count(kinds[place]) > 1]
    else:
        with_blocks = [
            place
            for place, (inner, _) in enumerate(children)
            if any(_is_inside(body, inner) for body in bodies)
        ]
    if not with_blocks:
        return
    last = with_blocks[-1]
    found = [
        own[-1]
        for inner, child in children[last + 1 :]
        for part in _parts(inner, child)
        if (own := [linear for linear in linears if _is_inside(linear, part)])
    ]
    if found:
        yield from found
    elif name not in bodies:
        yield from _behind(children[last][1], children[last][0], bodies, linears)


def _parts(name: str, module: nn.Module) -> list[str]:
    """Return the names of the heads in a module behind the blocks: of each item of a list."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return [f"{name}.{key}" for key, _ in module.named_children()]
    return [name]


# Gates


def _gates(model: nn.Module, weights: Mapping[str, Any]) -> set[str]:
    """Return the names of the weights that decide which experts a token goes to, or with which
    share: those beside experts that are called so or have an output for each expert."""
    found = set()
    bodies = _bodies(model)
    owned: dict[nn.Module, list[str]] = {}
    for name, weight in weights.items():
        if weight.experts == 1:
            owned.setdefault(weight.module, []).append(name)
    for name, module in model.named_modules():
        children = {f"{name}.{key}".lstrip("."): child for key, child in module.named_children()}
        inputs = {key: _stacks(part) for key, part in {"": module, **children}.items()}
        stacked = {key: pairs for key, pairs in inputs.items() if pairs}
        choices = {pair for pairs in stacked.values() for pair in pairs}
        listed = {
            key: len(list(child.children()))
            for key, child in children.items()
            if key not in bodies and _lists_experts(key, child)
        }
        has_experts = bool(stacked) or any(key.endswith("experts") for key in listed)
        named = _GATES if has_experts else {"router"}
        for key in children.keys() - stacked.keys() - listed.keys():
            is_named = key.rpartition(".")[2] in named
            if not (is_named or stacked or listed):
                continue
            beneath = (inner for part in children[key].modules() for inner in owned.get(part, ()))
            for inner in beneath:
                N, K = weights[inner].shape
                is_share = has_experts and N == 1
                is_choice = N in listed.values() or (N, K) in choices
                if is_named or is_share or is_choice:
                    found.add(inner)
    return found


def _stacks(module: nn.Module) -> set[tuple[int, int]]:
    """Return (experts, inputs) of a gate to the stacks of a module's own, with both readings of
    each: as [experts, N, K] and as [experts, K, N]."""
    shapes = [getattr(module, name).shape for name in experts.stacks(module)]
    return {(E, size) for E, rows, columns in shapes for size in (rows, columns)}


def _lists_experts(name: str, module: nn.Module) -> bool:
    """Return whether a module is a list of experts, or a list that may be one."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False
    kinds = [_kind(child) for child in module.children()]
    return name.rpartition(".")[2] == "experts" or (len(kinds) > 1 and len(set(kinds)) == 1)


# What the model keeps in fp32


def _kept_in_fp32(
    model: nn.Module, weights: Mapping[str, Any], plain: Mapping[str, str]
) -> dict[str, str]:
    """Return the weights that the model, or a part of it, lists to be kept in fp32 by the parts of
    their names, as transformers reads these lists."""
    found = {}
    for prefix, module in model.named_modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            for pattern in getattr(module, attribute, None) or ():
                body = re.escape(pattern).replace(r"\*", ".*")
                expression = re.compile(rf"(^|\.){body}($|\.)")
                for name, weight in weights.items():
                    full = plain[name] + ("" if weight.stack else ".weight")
                    if _is_inside(name, prefix) and expression.search(full):
                        found[name] = (
                            f"the model keeps it in fp32 ('{pattern}' of {attribute}) unless a "
                            "rule names it"
                        )
    return found
