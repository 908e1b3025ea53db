"""The precision part of a configuration, in the forms that a user may give it.

precision:
  recipe: fp8_blockwise                       # or {base: fp8_blockwise, fprop: bf16}
  rules:
    - {modules: 'lm_head', recipe: bf16}      # the first rule that matches a module's whole name decides
    - {modules: '.*\\.down_proj', recipe: none}
  backend: auto
  skip_slow: true
  fuse: true
  strict: false
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import field_validator

from lowprec.errors import nearest
from lowprec.gemm import BACKENDS
from lowprec.recipe import Recipe, library
from lowprec.recipe.rules import Rule
from lowprec.schema import StrictConfig, parse
from lowprec.yaml12 import load_mapping

TE = "te"
"""The backend that is a module of another library, not one of `BACKENDS`."""


class RuleConfig(StrictConfig):
    """One rule."""

    modules: str
    """Regular expression that the module's whole name must match."""
    recipe: Recipe | None
    """A recipe; `none` leaves the modules as they are."""

    @field_validator("recipe", mode="before")
    @classmethod
    def _resolve(cls, value: Any) -> Recipe | None:
        return _recipe_or_none(value)


class PrecisionConfig(StrictConfig):
    """Which precision the linear layers of a model train in."""

    recipe: Recipe | None = library.get("bf16")
    """What layers take that no rule names: a recipe, a mapping {base, fprop, dgrad, wgrad} of recipe names, or `none`."""
    rules: tuple[RuleConfig, ...] = ()
    """Ordered exceptions; the first match wins, and one that matches nothing is an error. The output head stays in high precision unless
    a rule names it; embeddings and norms always do."""
    backend: str = "auto"
    """The GEMM backend of every layer: `auto` takes the fastest that supports each product; `te` makes Transformer Engine's modules of
    the layers."""
    skip_slow: bool = True
    """Leave a layer in high precision where native FP8 would be slower than bf16 (`payoff`), if `auto` chose its backend and no rule
    names it."""
    fuse: bool = True
    """Let the product of SwiGLU go to down_proj in FP8 from the kernel that computes it (`nn/swiglu.py`), where a native backend takes
    it."""
    strict: bool = False
    """Fail instead of emulating a format, or of leaving alone a layer that was meant to be converted."""

    @field_validator("recipe", mode="before")
    @classmethod
    def _resolve(cls, value: Any) -> Recipe | None:
        return _recipe_or_none(value)

    @field_validator("backend")
    @classmethod
    def _known(cls, value: str) -> str:
        known = ["auto", *BACKENDS, TE]
        if value not in known:
            raise ValueError(f"unknown backend '{value}'{nearest(value, known)}")
        return value

    def ordered_rules(self) -> list[Rule]:
        return [Rule(modules=rule.modules, recipe=rule.recipe) for rule in self.rules]


def parse_precision(precision: Any, where: str = "precision") -> PrecisionConfig:
    """A PrecisionConfig from a recipe or its name, a mapping, the path of a YAML file, or a PrecisionConfig.

    Raises:
        UserError: anything wrong in it, with its place.
    """
    if isinstance(precision, PrecisionConfig):
        return precision
    if isinstance(precision, Path) or (isinstance(precision, str) and precision.endswith((".yaml", ".yml"))):
        data = load_mapping(precision)
        return parse(PrecisionConfig, data.get("precision", data), f"{precision}: {where}")
    if isinstance(precision, Mapping):
        return parse(PrecisionConfig, precision, where)
    return parse(PrecisionConfig, {"recipe": precision}, where)


def _recipe_or_none(value: Any) -> Recipe | None:
    return None if value is None or value == "none" else library.resolve(value)
