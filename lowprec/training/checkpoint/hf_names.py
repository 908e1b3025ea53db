"""Loading what transformers saved under a model's original names.

transformers 5 keeps some models, most mixtures of experts among them, under other names than their
checkpoints have: `save_pretrained` writes `block_sparse_moe.experts.0.w1.weight` for a slice of
`mlp.experts.gate_up_proj`, and `from_pretrained` puts it back. The Trainer saves its checkpoints by
the one, but resumes, and loads the best model, by `load_state_dict`, which ignores names that it
does not know: experts and router silently stay as they were (transformers 5.17). So the model
translates what it is handed.
"""

import copy
import re
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowprec.recipe.state import is_state

_NUMBER = re.compile(r"\d+")
_OWN_PARTS = 3
"""Last parts of a buffer's name that no renaming touches: `low_precision.down_proj.rounding_state`,
`q_proj.rounding_state`'s too."""


def accept_original_names(model: nn.Module) -> Any:
    """Let `model.load_state_dict` take a state dict that `save_pretrained` wrote. Returns the
    hook's handle.

    Only a model of transformers' that is neither wrapped nor sharded is helped; a state dict that
    has all of its names is left alone.
    """
    return model.register_load_state_dict_pre_hook(_translate)


def _translate(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    if prefix or not isinstance(model, PreTrainedModel) or type(model).__name__.startswith("FSDP"):
        return
    known = _saved_names(model)
    missing = known - state_dict.keys()
    strange = {name: tensor for name, tensor in state_dict.items() if name not in known}
    # What recipes keep differs between them, and says nothing of the weights' names.
    if all(map(is_state, missing)) or all(map(is_state, strange)):
        return
    kind: Any = next(
        base
        for base in type(model).__mro__
        if base.__module__.startswith("transformers.") or base is PreTrainedModel
    )
    if (
        kind.forward is nn.Module.forward
    ):  # no model yet: what is one is the user's own, which transformers knows no other names of
        return
    # transformers translates only while it builds a model.
    weights = {name: tensor for name, tensor in state_dict.items() if not is_state(name)}
    built, told = _build(kind, model, weights)
    if not missing & built.keys() - told:
        return
    for name in missing & built.keys() - told:
        state_dict[name] = built[name]
    for name in filter(is_state, missing):
        like = [other for other in strange if is_state(other) and _place(other) == _place(name)]
        if len(like) == 1:
            state_dict[name] = strange[like[0]]
    for name in strange:
        del state_dict[name]


def _saved_names(model: nn.Module) -> set[str]:
    """The names in the model's state dict, those of tied weights and what hooks leave out too."""
    modules = dict(model.named_modules(remove_duplicate=False)).items()
    unsaved = {
        f"{name}.{buffer}".lstrip(".")
        for name, module in modules
        for buffer in module._non_persistent_buffers_set
    }
    return {
        name
        for name, _ in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
    } - unsaved


def _build(
    kind: Any, model: PreTrainedModel, weights: dict[str, Tensor]
) -> tuple[dict[str, Tensor], set[str]]:
    """What transformers' class `kind` makes of these weights, by the model's names, and the names
    for which they had nothing."""
    # The widest dtype holds all of them; what is loaded from it is rounded to the model's own.
    dtype = reduce(
        torch.promote_types,
        (tensor.dtype for tensor in weights.values() if tensor.is_floating_point()),
        torch.bfloat16,
    )
    with torch.random.fork_rng(devices=[]):
        built, info = kind.from_pretrained(
            None,
            config=copy.deepcopy(model.config),
            state_dict=weights,
            dtype=dtype,
            output_loading_info=True,
        )
    return built.state_dict(), set(info["missing_keys"])


def _place(name: str) -> tuple[Any, ...]:
    """What stays of a buffer's name if modules are renamed: the numbers in it, and its end."""
    return (*_NUMBER.findall(name), *name.split(".")[-_OWN_PARTS:])
