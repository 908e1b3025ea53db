"""Changes of single fields of a model's configuration, `model.overrides`."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lowprec.config.schema import check_plain
from lowprec.errors import UserError, nearest, shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "vocab_size",
    "max_position_embeddings",
)
"""Fields that can't be 0 in any model, by their usual names. Other fields may be 0, for a part that
the model does not have."""

_ALWAYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Sizes that are at least 1 in the configuration of any model, also in a file."""

_LARGEST = 2**31 - 1

_REFUSED = {
    "architectures": "model.path names another model",
    "auto_map": "no code is taken from files",
    "dtype": "weights are fp32, or bf16 by optimizer.weights",
    "model_type": "model.path names another model",
    "quantization_config": "precision.recipe is the precision of the layers",
    "torch_dtype": "weights are fp32, or bf16 by optimizer.weights",
    "transformers_version": "it has no effect",
}
"""Fields that have no effect on the model of a run, and what has."""


def apply_overrides(config: "PretrainedConfig", overrides: Mapping[str, Any]) -> None:
    """Set the fields of `config` that `overrides` names.

    Raises:
        UserError: a field is unknown or has no effect, or its value is wrong, as far as a single
            field shows.
    """
    known = _fields(config)
    # The same sizes by the names of this kind of model, such as n_embd.
    sizes = {*_SIZES, *(config.attribute_map.get(name) for name in _SIZES)}
    for key, value in overrides.items():
        where = f"model.overrides.{key}"
        if key in _REFUSED:
            raise UserError(f"{where}: can't be changed here: {_REFUSED[key]}")
        if key not in known:
            raise UserError(
                f"{where}: {type(config).__name__} has no such field{nearest(key, known)}"
            )
        if hasattr(getattr(config, key, None), "to_dict"):
            raise UserError(f"{where}: is a configuration of its own; change it in a file")
        _check_value(where, value, is_size=key in sizes)
        _check_activation(where, getattr(config, key, None), value)
        try:
            setattr(config, key, value)
        except Exception as error:
            # The fields are properties with checks of many kinds.
            raise UserError(f"{where}: {error.__cause__ or error}") from None


def validate(config: "PretrainedConfig") -> None:
    """Raise UserError if the fields of `config` do not fit each other."""
    try:
        config.validate()
    except Exception as error:
        # The checks of a configuration compute with values that may have any type.
        raise UserError(f"model: {error.__cause__ or error}") from None
    text = config.get_text_config()
    for name in _ALWAYS:
        size = getattr(text, name, None)
        if type(size) is int and size < 1:
            raise UserError(f"model: {name} is {size}; expected a number from 1")
    heads = getattr(text, "num_attention_heads", None)
    shared = getattr(text, "num_key_value_heads", None)
    if type(heads) is int and type(shared) is int and shared > 0 and heads % shared:
        raise UserError(
            f"model: {heads} attention heads (num_attention_heads) can't share {shared} key and "
            "value heads (num_key_value_heads): that is no divisor"
        )
    _check_rope(getattr(text, "rope_parameters", None))


def _check_rope(parameters: Any) -> None:
    """Raise UserError for a rotary embedding of an unknown type, or one without a base."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if not isinstance(parameters, Mapping):
        return
    where = "model: rope_parameters"
    kinds = ("default", *ROPE_INIT_FUNCTIONS)
    kind = parameters.get("rope_type", "default")
    if kind not in kinds:
        raise UserError(f"{where}.rope_type: unknown type {shown(kind)}{nearest(kind, kinds)}")
    for name in ("rope_theta", "factor"):
        value = parameters.get(name)
        if value is not None and not (type(value) in (int, float) and value > 0):
            raise UserError(f"{where}.{name}: expected a number above 0, got {shown(value)}")


def _check_activation(where: str, before: Any, value: Any) -> None:
    """Raise UserError if a field that names an activation function gets a name of none."""
    from transformers.activations import ACT2FN

    named = isinstance(before, str) and before in ACT2FN
    if named and isinstance(value, str) and value not in ACT2FN:
        raise UserError(f"{where}: unknown activation {shown(value)}{nearest(value, ACT2FN)}")


def vocabulary(config: "PretrainedConfig") -> int:
    """Return the number of tokens that a model knows."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise UserError(
            f"model: {type(config).__name__} has no vocab_size: it is no language model's"
        )
    return size


def _fields(config: "PretrainedConfig") -> set[str]:
    """Return the names of the fields that describe a model, under both of their names."""
    names = {*config.to_dict(), *config.attribute_map}
    if dataclasses.is_dataclass(config):
        names |= {field.name for field in dataclasses.fields(config)}
    methods = {name for name in names if callable(getattr(type(config), name, None))}
    return {name for name in names - methods if not name.startswith("_")}


def _check_value(where: str, value: Any, *, is_size: bool) -> None:
    try:
        check_plain(value, finite=True)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if is_size and isinstance(value, bool):
        raise UserError(f"{where}: expected a number from 1, got {str(value).lower()}")
    if is_size and isinstance(value, int | float) and value < 1:
        raise UserError(f"{where}: expected a number from 1, got {shown(value)}")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise UserError(f"{where}: expected a number of at most {_LARGEST}, got {shown(value)}")
