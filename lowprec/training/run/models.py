"""The models that a run can train: presets by name, or any Hugging Face configuration or
checkpoint."""

import json
import os
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from lowprec.config.schema import StrictConfig, check_path
from lowprec.errors import UserError, nearest
from lowprec.training.checkpoint.folders import check_model
from lowprec.training.checkpoint.no_code import check_index
from lowprec.training.checkpoint.stored_weights import check_stored_weights
from lowprec.training.run.model_fields import apply_overrides, validate, vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def _llama(
    *,
    width: int,
    mlp: int,
    layers: int,
    heads: int,
    positions: int,
    kv_heads: int | None = None,
    theta: float = 1e4,
    **more: Any,
) -> dict[str, Any]:
    """Return the fields of a LlamaConfig by shorter names; `more` are further fields."""
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "max_position_embeddings": positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        **more,
    }


# Widths are multiples of 128, so that every linear layer fills whole blocks. The vocabulary of a
# preset is that of the tokenizer.
PRESETS: dict[str, dict[str, Any]] = {
    "llama-tiny": _llama(width=256, mlp=512, layers=3, heads=4, positions=2048),
    "llama-60m": _llama(width=512, mlp=1408, layers=8, heads=8, positions=2048),
    "llama-125m": _llama(width=768, mlp=2048, layers=12, heads=12, positions=4096),
    "llama-350m": _llama(width=1024, mlp=2816, layers=24, heads=16, positions=4096),
    "llama-1b": _llama(
        width=2048,
        mlp=8192,
        layers=16,
        heads=32,
        kv_heads=8,
        positions=8192,
        theta=5e5,
        tie_word_embeddings=True,
    ),
    "llama-8b-4l": _llama(
        width=4096, mlp=14336, layers=4, heads=32, kv_heads=8, positions=8192, theta=5e5
    ),
}

_VOCABULARY_MULTIPLE = 64
"""The vocabulary of a preset is padded to a multiple of this number."""

_FIELDS_OF_USE = (
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "use_cache",
)
"""Fields that describe how a configuration was saved or how a model is used, not the model."""


class ModelConfig(StrictConfig):
    """The model to train: a preset or a path."""

    preset: str | None = None
    """Name of a preset, with random weights."""
    path: str | None = None
    """Folder in Hugging Face's format, or a config.json. The folder's weights are loaded if there
    are any; else the weights are random."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields of the model's configuration to change, such as {num_hidden_layers: 2}."""

    @field_validator("path")
    @classmethod
    def _is_a_path(cls, value: str | None) -> str | None:
        return None if value is None else os.path.expanduser(check_path(value))


def build_config(model: ModelConfig, vocab_size: int) -> "PretrainedConfig":
    """Return the transformers configuration of `model` for a tokenizer of `vocab_size` tokens.

    Raises:
        UserError: a preset or a field is unknown, a folder is missing or holds weights in low
            precision, a value is wrong, or the vocabulary is too small for the tokenizer.
    """
    if (model.preset is None) == (model.path is None):
        raise UserError("model: give one of 'preset' and 'path'")
    config: Any
    if model.preset is not None:
        config = _preset_config(model.preset, vocab_size)
    else:
        config = _folder_config(Path(str(model.path)))
        check_stored_weights(Path(str(model.path)), config)
    apply_overrides(config, model.overrides)
    validate(config)
    known = vocabulary(config)
    if known < vocab_size:
        raise UserError(
            f"model: its vocabulary of {known} is smaller than the tokenizer's {vocab_size}"
        )
    return config


def differences(
    config: "PretrainedConfig", folder: Path, ignore: Container[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which the model of `config` differs from the one in `folder`.

    The result is {name: (value in the folder, value in config)}. Ids of special tokens are not
    compared, because they follow the tokenizer, and neither are fields that describe how a model is
    used.
    """
    # As JSON, because some values differ in type alone before they are saved: lists and tuples.
    saved, here = (
        json.loads(each.to_json_string(use_diff=False)) for each in (_folder_config(folder), config)
    )
    changed = {}
    for name in dict.fromkeys((*saved, *here)):
        if name in _FIELDS_OF_USE or name in ignore or name.endswith("_token_id"):
            continue
        if saved.get(name) != here.get(name):
            changed[name] = (saved.get(name), here.get(name))
    return changed


def build_model(
    model: ModelConfig, config: "PretrainedConfig", *, attn_implementation: str
) -> "PreTrainedModel":
    """Return the causal language model with weights in fp32.

    It is on the CPU, or on the device of an enclosing `torch.device` context.

    Raises:
        UserError: the weights in `model.path` do not fit `config`, or some are missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if model.path is not None:
        for index in Path(model.path).glob("*.safetensors.index.json"):
            check_index(index)
        check_model(Path(model.path), "model.path")
    if model.path is not None and _has_weights(Path(model.path)):
        try:
            found: Any = AutoModelForCausalLM.from_pretrained(
                model.path,
                config=config,
                attn_implementation=attn_implementation,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except RuntimeError as error:
            raise UserError(
                f"model.path: the weights in {model.path} don't fit its configuration: "
                f"{_one_line(error)}"
            ) from None
        loaded, info = found
        if missing := sorted(info["missing_keys"]):
            raise UserError(
                f"model.path: no weights in {model.path} for {len(missing)} parameters of the "
                f"model, such as {missing[0]}"
            )
        return loaded
    return AutoModelForCausalLM.from_config(
        config,
        attn_implementation=attn_implementation,
        dtype=torch.float32,
        trust_remote_code=False,
    )


def check_length(config: "PretrainedConfig", seq_len: int) -> None:
    """Raise UserError if the model has no positions for sequences of `seq_len` tokens."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise UserError(
            f"data.seq_len: {seq_len} is longer than the model's {limit} positions "
            "(model.overrides.max_position_embeddings raises them)"
        )


def _preset_config(name: str, vocab_size: int) -> "PretrainedConfig":
    from transformers import LlamaConfig

    if name not in PRESETS:
        raise UserError(f"model.preset: unknown preset '{name}'{nearest(name, PRESETS)}")
    padded = -(-vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    return LlamaConfig(vocab_size=padded, **PRESETS[name])


def _folder_config(path: Path) -> "PretrainedConfig":
    from transformers import AutoConfig

    if not path.exists():
        raise UserError(f"model.path: no such file or folder: {path}")
    if not (path.is_dir() or path.is_file()):
        raise UserError(f"model.path: neither a file nor a folder: {path}")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        # Each kind of configuration checks its values in its own way.
        if "custom code" in str(error):
            raise UserError(
                f"model.path: {path} needs code of its own (`auto_map` in config.json), which is "
                "not executed; take a model that transformers has a class for"
            ) from None
        cause = error.__cause__ if isinstance(error.__cause__, ValueError | TypeError) else error
        reason = str(cause).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"model.path: {path} holds no model configuration: {reason}") from None


def _one_line(error: BaseException, limit: int = 300) -> str:
    """Return the message of `error` as one line of at most `limit` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + " ..."


def _has_weights(path: Path) -> bool:
    """Return True if a folder holds weights. Raise UserError if it holds them as pickles alone."""
    if not path.is_dir():
        return False
    if any(path.glob("*.safetensors")):
        return True
    if pickles := sorted(path.glob("pytorch_model*.bin")):
        raise UserError(
            f"model.path: {pickles[0]} is a pickle, which is not read; save the model as "
            "safetensors (`save_pretrained` of transformers 5 does)"
        )
    return False
