"""The configuration of a run: YAML -> strict schema, with `key=value` overrides from the command
line.

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
from lowprec.config.yaml import load, load_mapping
from lowprec.errors import UserError
from lowprec.training.control.precision import PrecisionConfig, parse_precision
from lowprec.training.data.config import DataConfig
from lowprec.training.optim.adamw import OptimizerConfig
from lowprec.training.run.models import ModelConfig


class AttentionConfig(StrictConfig):
    """Who sees whom."""

    mask: str = "causal"
    """Masks composed with &, | and ~: causal, document, sliding_window(N), prefix(N)."""

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
    """Fused kernels for what is not a linear layer."""

    liger: Literal["auto", "on", "off"] = "auto"
    """Liger's kernels: where they apply and help (auto), or an error where they can't (on), or not
    at all (off)."""


class RunConfig(StrictConfig):
    """One training run."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    precision: PrecisionConfig = PrecisionConfig()
    attention: AttentionConfig = AttentionConfig()
    kernels: KernelsConfig = KernelsConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    """Formats of the weights and of AdamW's moments."""
    compile: Literal["blocks", "off"] = "off"
    """torch.compile each decoder block in place, or nothing."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Fields of transformers.TrainingArguments, and `resume_from_checkpoint` (true: the last one)
    and `overwrite_output_dir`."""

    @field_validator("precision", mode="before")
    @classmethod
    def _any_form(cls, value: Any) -> Any:
        # A recipe's name or a file alone is allowed; a mapping stays one, so that an error in it
        # keeps its path.
        return value if isinstance(value, Mapping) else parse_precision(value)


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, dict[str, Any]]:
    """The run that a YAML file and `key=value` overrides describe, and the same as plain data.

    A key is a dotted path ("precision.recipe"); a value is read as YAML.

    Raises:
        UserError: with the dotted path of what is wrong.
    """
    data = load_mapping(path)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(
                f"'{override}': an override is written key=value, e.g. trainer.max_steps=100"
            )
        _set(data, key.split("."), load(value, override), override)
    return parse(RunConfig, data), data


def _set(data: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    *sections, last = path
    for section in sections:
        inner = data.setdefault(section, {})
        if section == "precision" and isinstance(inner, str):
            inner = data[section] = {"recipe": inner}
        if not isinstance(inner, dict):
            raise UserError(f"'{override}': '{section}' is no section, it holds {inner!r}")
        data = inner
    data[last] = value
