"""The models that a run can train: presets by name, or any Hugging Face configuration or checkpoint
folder."""

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from pydantic import Field

from lowprec.config.schema import StrictConfig
from lowprec.errors import UserError, nearest


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


# Widths are multiples of 128, so that every linear layer fills whole blocks. A preset's vocabulary
# is the tokenizer's.
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
"""Fields that no model has at 0, by their usual names. Of others, 0 may say that there is nothing
of the kind."""

_NOT_THE_MODELS = (
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "use_cache",
)
"""Fields that say how a configuration was saved or a model is used."""


class ModelConfig(StrictConfig):
    """Which model to train: a preset or a path."""

    preset: str | None = None
    """One of the presets, with random weights."""
    path: str | None = None
    """A folder in Hugging Face's format (or a config.json): its weights are loaded if it holds any,
    else they are random."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields of the model's configuration to change, e.g. {num_hidden_layers: 2}."""


def build_config(model: ModelConfig, vocab_size: int) -> Any:
    """The transformers configuration of `model` for a tokenizer of `vocab_size` tokens.

    Raises:
        UserError: unknown preset or field, missing folder, or a vocabulary too small for the
            tokenizer.
    """
    from huggingface_hub.errors import StrictDataclassError

    if (model.preset is None) == (model.path is None):
        raise UserError("model: give one of 'preset' and 'path'")
    config = (
        _preset_config(model.preset, vocab_size)
        if model.preset is not None
        else _folder_config(Path(str(model.path)))
    )
    sizes = {*_SIZES, *(config.attribute_map.get(name) for name in _SIZES)}  # n_embd, say
    for key, value in model.overrides.items():
        if not hasattr(config, key):
            raise UserError(
                f"model.overrides.{key}: {type(config).__name__} has no such "
                f"field{nearest(key, config.to_dict())}"
            )
        if key in sizes and type(value) is int and value < 1:
            raise UserError(f"model.overrides.{key}: expected a number from 1, got {value}")
        try:
            setattr(config, key, value)
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise UserError(
                f"model.overrides.{key}: {_one_line(error.__cause__ or error)}"
            ) from None
    try:
        config.validate()
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"model: {_one_line(error.__cause__ or error)}") from None
    if config.vocab_size < vocab_size:
        raise UserError(
            f"model: its vocabulary of {config.vocab_size} is smaller than the tokenizer's "
            f"{vocab_size}"
        )
    return config


def differences(
    config: Any, folder: Path, ignore: Container[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """The fields in which a configuration is another model's than the one in a folder: {name: (in
    the folder, here)}.

    Ids of special tokens, which follow the tokenizer, are none of them, nor are fields that say how
    a model is used.
    """
    # Lists and tuples, say, are the same when they are saved.
    saved, here = (
        json.loads(each.to_json_string(use_diff=False)) for each in (_folder_config(folder), config)
    )
    names = [
        name
        for name in dict.fromkeys((*saved, *here))
        if name not in _NOT_THE_MODELS and name not in ignore
    ]
    pairs = {
        name: (saved.get(name), here.get(name)) for name in names if not name.endswith("_token_id")
    }
    return {name: (before, now) for name, (before, now) in pairs.items() if before != now}


def build_model(model: ModelConfig, config: Any, *, attn_implementation: str) -> Any:
    """The causal language model, on the CPU (or the device of an enclosing `torch.device` context),
    weights in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    if model.path is not None and _has_weights(Path(model.path)):
        try:
            found: Any = AutoModelForCausalLM.from_pretrained(
                model.path,
                config=config,
                attn_implementation=attn_implementation,
                dtype=torch.float32,
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
                f"model, {missing[0]} for one"
            )
        return loaded
    return AutoModelForCausalLM.from_config(
        config, attn_implementation=attn_implementation, dtype=torch.float32
    )


def check_length(config: Any, seq_len: int) -> None:
    """UserError if the model has no positions for sequences of `seq_len`."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise UserError(
            f"data.seq_len: {seq_len} is longer than the model's {limit} positions "
            "(model.overrides.max_position_embeddings raises them)"
        )


def _preset_config(name: str, vocab_size: int) -> Any:
    from transformers import LlamaConfig

    if name not in PRESETS:
        raise UserError(f"model.preset: unknown preset '{name}'{nearest(name, PRESETS)}")
    padded = -(-vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    return LlamaConfig(vocab_size=padded, **PRESETS[name])


def _folder_config(path: Path) -> Any:
    from transformers import AutoConfig

    if not path.exists():
        raise UserError(f"model.path: no such file or folder: {path}")
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path: {path} holds no model configuration: {str(error).splitlines()[0]}"
        ) from None


def _one_line(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + " ..."


def _has_weights(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*.safetensors"))
