"""How the linear layers of a model are converted: the settings of `convert`, in the forms that a
user may give them.

precision:
  recipe: fp8_blockwise                       # or {base: fp8_blockwise, fprop: bf16}
  rules:
    - {modules: 'lm_head', recipe: bf16}      # the first rule that matches a module's whole name decides
    - {modules: '.*\\.down_proj', recipe: none}
  backend: auto
  skip_slow: true
  fuse: true
  strict: false
  evaluation: training                        # or the recipe that evaluation and generation run in

A training run has more settings: `lowprec.training.control.precision`.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator, model_validator

from lowprec.config.schema import StrictConfig, parse
from lowprec.config.yaml import load_mapping
from lowprec.conversion.layer_backends import LAYER_BACKENDS, layer_backend
from lowprec.errors import nearest
from lowprec.gemm import BACKENDS
from lowprec.recipe import Recipe, library
from lowprec.recipe.rules import Rule

logger = logging.getLogger("lowprec")

RUN_SETTINGS = ("schedule", "loss_scaling", "guard", "probe_every")
"""Settings of a training run's precision, which `convert` has no use for."""


class RuleConfig(StrictConfig):
    """One rule."""

    modules: str
    """Regular expression that the module's whole name must match."""
    recipe: Recipe | None
    """A recipe; `none` leaves the modules as they are."""

    @field_validator("modules")
    @classmethod
    def _is_an_expression(cls, value: str) -> str:
        Rule(modules=value, recipe=None)  # which says if it is none
        return value

    @field_validator("recipe", mode="before")
    @classmethod
    def _resolve(cls, value: Any) -> Recipe | None:
        return recipe_or_none(value)


class ConversionConfig(StrictConfig):
    """The precision of a model's linear layers."""

    recipe: Recipe | None = library.get("bf16")
    """What layers take that no rule names: a recipe, a mapping {base, fprop, dgrad, wgrad} of
    recipe names, or `none`."""
    rules: tuple[RuleConfig, ...] = ()
    """Ordered exceptions; the first match wins, and one that matches nothing is an error. The
    output head stays in high precision unless a rule names it; embeddings and norms always do."""
    backend: str = "auto"
    """The GEMM backend of every layer: `auto` takes the fastest that supports each product; `te`
    makes Transformer Engine's modules of the layers."""
    skip_slow: bool = True
    """Leave a layer in high precision where native FP8 would be slower than bf16 (`payoff`), if
    `auto` chose its backend and no rule names it."""
    fuse: bool = True
    """Let the product of SwiGLU go to down_proj in FP8 from the kernel that computes it
    (`nn/swiglu.py`), where a native backend takes it."""
    strict: bool = False
    """Fail instead of emulating a format, or of leaving alone a layer that was meant to be
    converted."""
    evaluation: Recipe | Literal["training"] = "training"
    """The recipe of converted layers in evaluation and generation (`model.eval()`): that of
    training, or another one, bf16 say."""

    @field_validator("evaluation", mode="before")
    @classmethod
    def _resolve_evaluation(cls, value: Any) -> Any:
        return value if value == "training" else library.resolve(value)

    @field_validator("recipe", mode="before")
    @classmethod
    def _resolve(cls, value: Any) -> Recipe | None:
        return recipe_or_none(value)

    @field_validator("backend")
    @classmethod
    def _known(cls, value: str) -> str:
        known = ["auto", *BACKENDS, *LAYER_BACKENDS]
        if value not in known:
            raise ValueError(f"unknown backend '{value}'{nearest(value, known)}")
        return value

    def ordered_rules(self) -> list[Rule]:
        return [Rule(modules=rule.modules, recipe=rule.recipe) for rule in self.rules]

    @model_validator(mode="after")
    def _trains_and_evaluates_alike(self) -> "ConversionConfig":
        if self.evaluation != "training":
            self.check_precision_may_change()
        return self

    def check_precision_may_change(self) -> None:
        """Raise ValueError if layers of the backend keep one precision throughout a run."""
        if not layer_backend(self.backend).changes_precision:
            raise ValueError(
                f"backend '{self.backend}' can't change its precision: schedule, guard and "
                "evaluation need another backend"
            )


def parse_conversion(precision: Any) -> ConversionConfig:
    """The configuration that `convert` works by, from any form that a user may give.

    A mapping or a file may be that of a whole training run. Its settings in `RUN_SETTINGS` have no
    effect on a conversion: a warning names them.

    Raises:
        UserError: a setting is wrong; the message names its place.
    """
    if isinstance(precision, ConversionConfig):
        return precision
    data, where = precision_settings(precision, "precision")
    unused = [name for name in RUN_SETTINGS if name in data]
    if unused:
        logger.warning(
            "convert: %s: settings of a training run, without effect here",
            ", ".join(f"{where}.{name}" for name in unused),
        )
    return parse(
        ConversionConfig, {name: value for name, value in data.items() if name not in unused}, where
    )


def precision_settings(precision: Any, where: str) -> tuple[Mapping[str, Any], str]:
    """The settings as a mapping, and the dotted path that error messages begin with.

    Args:
        precision: a recipe or its name, a mapping, or the path of a YAML file.
        where: the dotted path of a mapping.
    """
    if isinstance(precision, Path) or (
        isinstance(precision, str) and precision.endswith((".yaml", ".yml"))
    ):
        data = load_mapping(precision)
        return data.get("precision", data), f"{precision}: {where}"
    if isinstance(precision, Mapping):
        return precision, where
    return {"recipe": precision}, where


def recipe_or_none(value: Any) -> Recipe | None:
    return None if value is None or value == "none" else library.resolve(value)
