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
  evaluation: training                        # or the recipe that evaluation and generation run in
  schedule:                                   # precision over the run
    - {until: 5%, recipe: bf16}
    - {until: 100%, recipe: fp8_blockwise}
  loss_scaling: {init_scale: 65536}           # of fp16 autocast
  guard: true                                 # or its settings, {snapshot_every: 50}
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, PlainSerializer, field_validator, model_validator

from lowprec.errors import nearest
from lowprec.gemm import BACKENDS
from lowprec.recipe import Recipe, library
from lowprec.recipe.rules import Rule
from lowprec.recipe.state import new_state
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

    @field_validator("modules")
    @classmethod
    def _is_an_expression(cls, value: str) -> str:
        Rule(modules=value, recipe=None)  # which says if it is none
        return value

    @field_validator("recipe", mode="before")
    @classmethod
    def _resolve(cls, value: Any) -> Recipe | None:
        return _recipe_or_none(value)


_UNITS = {"%": 1e-2, "steps": 1.0, "step": 1.0, "tokens": 1.0}
_MAGNITUDES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_UNTIL = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmbt]?)\s*(%|steps?|tokens)\s*", re.IGNORECASE)


class Until(StrictConfig):
    """A moment of a run: a share of its steps, a number of optimizer steps, or of tokens trained on."""

    value: float
    """Share (1 is the end), steps or tokens."""
    unit: Literal["share", "steps", "tokens"]

    @classmethod
    def parse(cls, text: Any) -> "Until":
        """From "5%", "200 steps" or "1.5B tokens". ValueError for anything else."""
        if isinstance(text, Until):
            return text
        match = _UNTIL.fullmatch(text) if isinstance(text, str) else None
        if match is None or (match[3] == "%" and match[2]):
            raise ValueError(f"expected a share, steps or tokens, such as 5%, 200 steps or 1B tokens, got {text!r}")
        unit = match[3].lower()
        value = float(match[1]) * _MAGNITUDES[match[2].lower()] * _UNITS[unit]
        if unit == "%" and value > 1:
            raise ValueError(f"{text} is after the end of the run")
        return cls(value=value, unit="share" if unit == "%" else "tokens" if unit == "tokens" else "steps")

    def __str__(self) -> str:
        if self.unit == "share":
            return f"{100 * self.value:.12g}%"
        letter, size = next(((letter, size) for letter, size in reversed(_MAGNITUDES.items()) if self.value >= size), ("", 1.0))
        return f"{self.value / size:.15g}{letter.upper() if size > 1e3 else letter} {self.unit}"


class PhaseConfig(StrictConfig):
    """A part of the run with a precision of its own. What it does not say is as the configuration around it has it."""

    until: Annotated[Until, BeforeValidator(Until.parse), PlainSerializer(str)] = Until(value=1.0, unit="share")
    """Where it ends: a share of the run's steps ("5%"), "200 steps" or "1B tokens" since the start. The last one lasts until 100%."""
    recipe: Recipe | Literal["configured"] | None = "configured"
    """The recipe of all layers that no rule names; left out: the configuration's own."""
    rules: tuple[RuleConfig, ...] | None = None
    """Left out: the configuration's own, which hold in every phase."""

    @field_validator("recipe", mode="before")
    @classmethod
    def _resolve(cls, value: Any) -> Any:
        return value if value == "configured" else _recipe_or_none(value)


class LossScalingConfig(StrictConfig):
    """Dynamic loss scaling of fp16 training (torch.amp.GradScaler; arXiv 1710.03740, section 3.2)."""

    init_scale: float = Field(default=2.0**16, gt=0, le=2.0**126)
    growth_factor: float = Field(default=2.0, gt=1)
    backoff_factor: float = Field(default=0.5, gt=0, lt=1)
    growth_interval: int = Field(default=2000, ge=1)
    """Steps without overflow after which the scale grows."""
    min_scale: float = Field(default=1.0, gt=0)
    """Training stops with an error when the scale falls below it: gradients that overflow unscaled are not a matter of the scale."""

    @model_validator(mode="after")
    def _starts_above_the_floor(self) -> "LossScalingConfig":
        if self.init_scale < self.min_scale:
            raise ValueError(f"init_scale {self.init_scale:g} is below min_scale {self.min_scale:g}")
        return self


class GuardConfig(StrictConfig):
    """What watches a run for divergence, and what it does then. An infinite ratio, or number of deviations, switches its check off."""

    window: int = Field(default=64, ge=8)
    """Healthy steps whose median and spread a new loss and gradient norm are compared with."""
    warmup: int = Field(default=16, ge=2)
    """Healthy steps to see before anything but values that are not finite is a breach."""
    loss_deviations: float = Field(default=8.0, gt=0, allow_inf_nan=True)
    """A loss this many robust standard deviations (1.4826 times the median absolute deviation) above the median is a breach."""
    loss_ratio: float = Field(default=1.1, gt=1, allow_inf_nan=True)
    """And this many times the median: a steady loss may vary without harm."""
    gradient_ratio: float = Field(default=50.0, gt=1, allow_inf_nan=True)
    """A gradient norm this many times the median is a breach."""
    skipped_steps: int = Field(default=8, ge=1)
    """Optimizer steps in a row that loss scaling skips before that is a breach."""
    sqnr_floor: float | None = None
    """Signal-to-quantisation-noise ratio [dB] of a layer's operands below which it is a breach; none: not looked at."""
    snapshot_every: int = Field(default=50, ge=1)
    """Steps between copies of weights and optimizer state in host memory, the last good of which is restored."""
    data: Literal["skip", "replay"] = "skip"
    """After a breach go on behind the bad batches (skip), or go back to those since the last checkpoint on disk (replay)."""
    ladder: tuple[str, ...] = ("mxfp4", "fp8_blockwise", "bf16")
    """Recipes in rising precision: the worst layers take the next one above their own."""
    raise_share: float = Field(default=0.1, gt=0, le=1)
    """Share of the converted layers to raise at most, if which of them is to blame does not show; one at least."""
    max_recoveries: int = Field(default=3, ge=0)
    """Breaches to recover from; after one more the run stops."""

    @field_validator("ladder")
    @classmethod
    def _rises(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("the ladder needs at least one recipe")
        widths = [library.get(name).narrowest_bits for name in value]
        for (low, high), (name, above) in zip(pairwise(widths), pairwise(value), strict=True):
            if high <= low:
                raise ValueError(f"the ladder must rise: {above} ({high} bits) is no higher than {name} ({low} bits)")
        return value


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
    evaluation: Recipe | Literal["training"] = "training"
    """The recipe of converted layers in evaluation and generation (`model.eval()`): that of training, or another one, bf16 say."""
    schedule: tuple[PhaseConfig, ...] = ()
    """Precision over the run, phase after phase. Empty: one precision throughout."""
    loss_scaling: LossScalingConfig = LossScalingConfig()
    """Of fp16 autocast."""
    guard: GuardConfig | None = None
    """Watch the run, and go back to the last good state with more precision when it diverges. `true`: with the default settings."""
    probe_every: int = Field(default=0, ge=0)
    """Steps between measurements of each layer's quantisation error, which are logged; 0: never."""

    @field_validator("evaluation", mode="before")
    @classmethod
    def _resolve_evaluation(cls, value: Any) -> Any:
        return value if value == "training" else library.resolve(value)

    @field_validator("guard", mode="before")
    @classmethod
    def _on_or_off(cls, value: Any) -> Any:
        return {True: GuardConfig(), False: None}[value] if isinstance(value, bool) else value

    @field_validator("schedule")
    @classmethod
    def _in_order(cls, phases: tuple[PhaseConfig, ...]) -> tuple[PhaseConfig, ...]:
        for number, (first, second) in enumerate(pairwise(phases), 2):
            if first.until == second.until:
                raise ValueError(f"phases {number - 1} and {number} overlap: both end at {first.until}")
            if first.until.unit == second.until.unit and first.until.value > second.until.value:
                raise ValueError(f"phases out of order: number {number} ends at {second.until}, the one before it at {first.until}")
        if phases and phases[-1].until != Until(value=1.0, unit="share"):
            raise ValueError(f"the last phase ends at {phases[-1].until}: say what comes after it, until 100%")
        return phases

    @model_validator(mode="after")
    def _changes_only_what_can_change(self) -> "PrecisionConfig":
        if self.backend == TE and (self.schedule or self.guard or self.evaluation != "training"):
            raise ValueError("backend 'te' can't change its precision: schedule, guard and evaluation need another backend")
        if self.guard is not None and self.guard.sqnr_floor is not None and not self.probe_every:
            raise ValueError("guard.sqnr_floor looks at what probe_every measures: set that, to 50 say")
        return self

    def phases(self) -> list["PrecisionConfig"]:
        """The configuration of each phase, without a schedule; this one alone if there is none."""
        if not self.schedule:
            return [self]
        return [self._in_phase(phase) for phase in self.schedule]

    @property
    def keeps_state(self) -> bool:
        """Whether a recipe of it keeps something between steps (`recipe/state.py`), whatever layers the model has."""
        recipes = [recipe for phase in self.phases() for recipe in (phase.recipe, *(rule.recipe for rule in phase.rules))]
        recipes += [] if self.evaluation == "training" else [self.evaluation]
        recipes += [] if self.guard is None else [library.get(name) for name in self.guard.ladder]
        return any(new_state(recipe, torch.device("meta")) for recipe in recipes if recipe is not None)

    def _in_phase(self, phase: PhaseConfig) -> "PrecisionConfig":
        changes: dict[str, Any] = {"schedule": ()}
        if phase.recipe != "configured":
            changes["recipe"] = phase.recipe
        if phase.rules is not None:
            changes["rules"] = phase.rules
        return self.model_copy(update=changes)

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
