"""The configuration of a training run's precision: the precision of the layers, and its changes
over the run.

precision:
  recipe: fp8_blockwise                       # and all settings of `lowprec.conversion.config`
  schedule:                                   # precision over the run
    - {until: 5%, recipe: bf16}
    - {until: 100%, recipe: fp8_blockwise}
  loss_scaling: {init_scale: 65536}           # for fp16 autocast
  guard: true                                 # or its settings, {snapshot_every: 50}
  probe_every: 50
"""

from itertools import pairwise
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator

from lowprec.config.schema import parse
from lowprec.conversion.config import ConversionConfig, Precision, precision_settings
from lowprec.recipe import library
from lowprec.recipe.state import new_state
from lowprec.training.control.guard import GuardConfig
from lowprec.training.control.schedule import PhaseConfig, Until
from lowprec.training.optim.loss_scaling import LossScalingConfig


class PrecisionConfig(ConversionConfig):
    """The precision of a model's linear layers in training."""

    schedule: tuple[PhaseConfig, ...] = ()
    """Phases of the run. Empty: one precision throughout."""
    loss_scaling: LossScalingConfig = LossScalingConfig()
    """Loss scaling of fp16 autocast."""
    guard: GuardConfig | None = None
    """Settings of the guard, which watches the run and goes back to the last good state, with more
    precision, when the run diverges. `true`: the default settings."""
    probe_every: int = Field(default=0, ge=0)
    """Number of steps between measurements of each layer's quantisation error, which are logged; 0:
    no measurements."""

    @field_validator("guard", mode="before")
    @classmethod
    def _on_or_off(cls, value: Any) -> Any:
        return {True: GuardConfig(), False: None}[value] if isinstance(value, bool) else value

    @field_validator("schedule")
    @classmethod
    def _in_order(cls, phases: tuple[PhaseConfig, ...]) -> tuple[PhaseConfig, ...]:
        for number, (first, second) in enumerate(pairwise(phases), 2):
            if first.until == second.until:
                raise ValueError(
                    f"phases {number - 1} and {number} overlap: both end at {first.until}"
                )
            if first.until.unit == second.until.unit and first.until.value > second.until.value:
                raise ValueError(
                    f"phases out of order: number {number} ends at {second.until}, the one before "
                    f"it at {first.until}"
                )
        if phases and phases[-1].until != Until(value=1.0, unit="share"):
            raise ValueError(
                f"the last phase ends at {phases[-1].until}: say what comes after it, until 100%"
            )
        return phases

    @model_validator(mode="after")
    def _changes_only_what_can_change(self) -> "PrecisionConfig":
        if self.schedule or self.guard:
            self.check_precision_may_change()
        if self.guard is not None and self.guard.sqnr_floor is not None and not self.probe_every:
            raise ValueError(
                "guard.sqnr_floor looks at what probe_every measures: set that, to 50 say"
            )
        return self

    def phases(self) -> list["PrecisionConfig"]:
        """Return the configuration of each phase, which has no schedule. Without a schedule, return
        this configuration alone."""
        if not self.schedule:
            return [self]
        return [self._in_phase(phase) for phase in self.schedule]

    @property
    def keeps_state(self) -> bool:
        """Flag: a recipe of the configuration keeps something between steps (`recipe/state.py`),
        whether or not a layer of the model takes it."""
        recipes = [
            recipe
            for phase in self.phases()
            for recipe in (phase.recipe, *(rule.recipe for rule in phase.rules))
        ]
        recipes += [] if self.evaluation == "training" else [self.evaluation]
        recipes += [] if self.guard is None else [library.get(name) for name in self.guard.ladder]
        return any(
            new_state(recipe, torch.device("meta")) for recipe in recipes if recipe is not None
        )

    def _in_phase(self, phase: PhaseConfig) -> "PrecisionConfig":
        changes: dict[str, Any] = {"schedule": ()}
        if phase.recipe != "configured":
            changes["recipe"] = phase.recipe
        if phase.rules is not None:
            changes["rules"] = phase.rules
        return self.model_copy(update=changes)


def parse_precision(precision: Precision, where: str = "precision") -> PrecisionConfig:
    """Return the PrecisionConfig for a recipe or its name, a mapping, the path of a YAML file, or a
    PrecisionConfig.

    Raises:
        UserError: a setting is wrong; the message names its place.
    """
    if isinstance(precision, PrecisionConfig):
        return precision
    return parse(PrecisionConfig, *precision_settings(precision, where))
