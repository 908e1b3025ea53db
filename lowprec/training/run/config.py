"""The configuration of a run: a strict schema for YAML and `key=value` overrides.

model: {preset: llama-tiny}
data: {source: python-stdlib, seq_len: 512}
precision: {recipe: fp8_blockwise}
attention: {mask: causal & document}
kernels: {liger: auto}
compile: off
device: auto
trainer: {max_steps: 200, learning_rate: 1e-3}     # any field of transformers.TrainingArguments
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from lowprec.config.schema import StrictConfig, parse
from lowprec.config.yaml import MAX_BYTES, load, load_mapping
from lowprec.errors import UserError, shown
from lowprec.training.control.precision import PrecisionConfig, parse_precision
from lowprec.training.data.config import DataConfig
from lowprec.training.optim.adamw import OptimizerConfig
from lowprec.training.run.models import ModelConfig


class AttentionConfig(StrictConfig):
    """Attention: which tokens each token sees."""

    mask: str = "causal"
    """Mask: causal, document, sliding_window(N) or prefix(N), or several composed with &, | and
    ~."""

    @field_validator("mask")
    @classmethod
    def _is_a_mask(cls, value: str) -> str:
        from lowprec.attention import parse as parse_mask

        try:
            parse_mask(value)
        except UserError as error:
            raise ValueError(str(error).removeprefix("mask: ")) from None
        return value


class KernelsConfig(StrictConfig):
    """Fused kernels for the parts of a model that are not linear layers."""

    liger: Literal["auto", "on", "off"] = "auto"
    """Liger's kernels. auto: use those that apply and help. on: an error if none applies. off: use
    none."""


class RunConfig(StrictConfig):
    """The configuration of a training run."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    precision: PrecisionConfig = PrecisionConfig()
    attention: AttentionConfig = AttentionConfig()
    kernels: KernelsConfig = KernelsConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    """Formats of the weights and of AdamW's moments."""
    compile: Literal["blocks", "off"] = "off"
    """blocks: torch.compile each decoder block in place. off: compile nothing."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device. auto: CUDA if there is a CUDA device, else the CPU."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Fields of transformers.TrainingArguments, and `resume_from_checkpoint` (a path, or true for
    the last checkpoint) and `overwrite_output_dir`."""

    @field_validator("precision", mode="before")
    @classmethod
    def _any_form(cls, value: Any) -> Any:
        # The name of a recipe or of a file is allowed in place of a mapping. A mapping is parsed
        # later, so an error in it keeps its path.
        return value if isinstance(value, Mapping) else parse_precision(value)


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, dict[str, Any]]:
    """Return the run that a YAML file and `key=value` overrides describe, and the same as plain
    data.

    A key is a dotted path ("precision.recipe"). A value is read as YAML.

    Raises:
        UserError: a setting is wrong. The message begins with its dotted path.
    """
    data = read_settings(path, overrides)
    return parse(RunConfig, data), data


def read_settings(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return a YAML file, if there is one, with `key=value` overrides, as plain data.

    Raises:
        UserError: the file can't be read, or an override has no place.
    """
    data = {} if path is None else load_mapping(path)
    for override in overrides:
        key, equals, value = override.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise UserError(
                f"{shown(override)}: an override is written key=value, e.g. trainer.max_steps=100"
            )
        if len(value) > MAX_BYTES:
            raise UserError(f"{shown(key)}: a value of {len(value)} characters is too long")
        _set(data, parts, load(value, _short(override)), _short(override))
    return data


def _short(override: str) -> str:
    """Return an override as it is quoted in an error."""
    return override if len(override) <= 120 else f"{override[:120]}..."


def _set(data: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    """Set `value` at `path` in nested mappings, which are made where they are missing."""
    *sections, last = path
    for section in sections:
        inner = data.get(section, {})
        if section == "precision" and isinstance(inner, str):
            inner = {"recipe": inner}
        if not isinstance(inner, dict):
            raise UserError(f"'{override}': '{section}' is not a section, it holds {shown(inner)}")
        # A copy, because an alias of YAML can make this section a part of another one as well.
        data[section] = dict(inner)
        data = data[section]
    data[last] = value
