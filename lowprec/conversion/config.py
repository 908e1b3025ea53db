"""The settings of `convert`, in the forms that a user may give them.

precision:
  recipe: fp8_blockwise                       # or {base: fp8_blockwise, fprop: bf16}
  rules:                                      # the first that matches a whole name decides
    - {modules: 'lm_head', recipe: bf16}
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
"""Settings of a training run's precision that have no effect on `convert`."""


class ShortReprConfig(StrictConfig):
    """A section of the configuration whose repr shows only what differs from the defaults, with
    recipes by their names."""

    def __repr__(self) -> str:
        return _short_repr(self)

    __str__ = __repr__


class RuleConfig(ShortReprConfig):
    """The recipe of the modules whose names match an expression."""

    modules: str
    """Regular expression that the module's whole name must match."""
    recipe: Recipe | None
    """A recipe; `none` keeps the modules in high precision."""

    @field_validator("modules")
    @classmethod
    def _is_an_expression(cls, value: str) -> str:
        Rule(modules=value, recipe=None)  # raises if `value` is no regular expression
        return value

    @field_validator("recipe", mode="before")
    @classmethod
    def _resolve(cls, value: Any) -> Recipe | None:
        return recipe_or_none(value)


class ConversionConfig(ShortReprConfig):
    """The precision of a model's linear layers."""

    recipe: Recipe | None = library.get("bf16")
    """Recipe of the layers that no rule names: a recipe, a mapping {base, fprop, dgrad, wgrad} of
    recipe names, or `none`."""
    rules: tuple[RuleConfig, ...] = ()
    """Ordered exceptions: the first match wins, and a rule that matches nothing is an error. The
    output head stays in high precision unless a rule names it; embeddings and norms always do."""
    backend: str = "auto"
    """The GEMM backend of every layer: `auto` takes the fastest that supports each product; `te`
    makes Transformer Engine's modules of the layers."""
    skip_slow: bool = True
    """Keep a layer in high precision where native FP8 would be slower than bf16 (`cost_model`), if
    `auto` chose its backend and no rule names it. False: run such layers in the recipe
    nevertheless."""
    fuse: bool = True
    """Compute SwiGLU and quantise it for down_proj in one kernel (`nn/swiglu.py`), where a native
    backend takes it."""
    strict: bool = False
    """Raise an error instead of emulating a format, or of keeping a layer in high precision that
    was meant to be converted."""
    evaluation: Recipe | Literal["training"] = "training"
    """Recipe of converted layers in evaluation and generation (`model.eval()`): that of training,
    or another one, for example bf16."""

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
        """Return the rules, in the order in which they are tried."""
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


Precision = str | Path | Mapping[str, Any] | Recipe | ConversionConfig
"""A precision in any form that a user may give: the name of a recipe, the path of a YAML file, a
mapping of settings, a Recipe or a configuration."""


def parse_conversion(precision: Precision) -> ConversionConfig:
    """Return the configuration for `convert`, from any form that a user may give.

    A mapping or a file may hold the settings of a training run as well. Those in `RUN_SETTINGS`
    have no effect on a conversion: a warning names them.

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


def precision_settings(precision: Precision, where: str) -> tuple[Mapping[str, Any], str]:
    """Return the settings as a mapping, and the dotted path that error messages begin with.

    Args:
        precision: any form but a configuration.
        where: the dotted path for a mapping.
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
    """Return the recipe that `value` means; None for "none" and None."""
    return None if value is None or value == "none" else library.resolve(value)


def _short_repr(value: Any) -> str:
    """Return the repr of a setting: a recipe by its name, and of a section only what differs from
    the defaults. A section that has a text form of its own is shown by that."""
    if isinstance(value, Recipe):
        return repr(value.name)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_short_repr, value))}]"
    if not isinstance(value, StrictConfig):
        return repr(value)
    if "__str__" in type(value).__dict__:
        return repr(str(value))
    changed = ", ".join(
        f"{name}={_short_repr(getattr(value, name))}"
        for name, field in type(value).model_fields.items()
        if getattr(value, name) != field.get_default(call_default_factory=True)
    )
    return f"{type(value).__name__}({changed})"
