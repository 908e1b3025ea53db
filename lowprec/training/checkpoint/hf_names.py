"""Loading checkpoints that transformers saved under a model's original names.

Some models of transformers 5, most mixtures of experts among them, have other names than their
checkpoints: `save_pretrained` writes `block_sparse_moe.experts.0.w1.weight` for a slice of
`mlp.experts.gate_up_proj`, and `from_pretrained` puts it back. The Trainer saves checkpoints by
`save_pretrained`. But it resumes, and loads the best model, by `load_state_dict`, which ignores
unknown names: experts and router silently keep their values (transformers 5.17). So a hook of the
model translates the names of the state dict that it loads.
"""

import copy
import re
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowprec.nn.known import is_fsdp2
from lowprec.recipe.state import is_state

_NUMBER = re.compile(r"\d+")
_OWN_PARTS = 3
"""Number of last parts of a buffer's name that no renaming changes:
`low_precision.down_proj.rounding_state`, `q_proj.rounding_state`."""


def accept_original_names(model: nn.Module) -> Any:
    """Make `model.load_state_dict` accept a state dict that `save_pretrained` wrote. Return the
    hook's handle.

    This works for a model of transformers that is neither wrapped nor sharded. A state dict that
    has all names of the model is not changed.
    """
    return model.register_load_state_dict_pre_hook(_translate)


def _translate(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    if prefix or not isinstance(model, PreTrainedModel) or is_fsdp2(model):
        return
    known = _saved_names(model)
    missing = known - state_dict.keys()
    strange = {name: tensor for name, tensor in state_dict.items() if name not in known}
    # The names of recipe state differ between recipes, and do not show how weights are named.
    if all(map(is_state, missing)) or all(map(is_state, strange)):
        return
    kind: Any = next(
        base
        for base in type(model).__mro__
        if base.__module__.startswith("transformers.") or base is PreTrainedModel
    )
    # A user's own class is directly below an abstract class of transformers', which has no forward.
    # transformers knows no other names of it.
    if kind.forward is nn.Module.forward:
        return
    # transformers translates only while it builds a model.
    weights = {name: tensor for name, tensor in state_dict.items() if not is_state(name)}
    built, without_value = _build(kind, model, weights)
    if not missing & built.keys() - without_value:
        return
    for name in missing & built.keys() - without_value:
        state_dict[name] = built[name]
    for name in filter(is_state, missing):
        like = [other for other in strange if is_state(other) and _place(other) == _place(name)]
        if len(like) == 1:
            state_dict[name] = strange[like[0]]
    for name in strange:
        del state_dict[name]


def _saved_names(model: nn.Module) -> set[str]:
    """Return the names in the model's state dict, with those of tied weights and those that hooks
    leave out."""
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
    """Load the weights into a new model of transformers' class `kind`. Return its state dict, and
    the names in it that got no value."""
    # The widest dtype holds all weights; `load_state_dict` rounds to the dtypes of the model.
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
    """Return the parts of a buffer's name that stay when modules are renamed: the numbers in it,
    and its end."""
    return (*_NUMBER.findall(name), *name.split(".")[-_OWN_PARTS:])
