"""The schedule of the precision: the phases of a run, and the phase that each step belongs to."""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainSerializer, field_validator

from lowprec.config.schema import StrictConfig
from lowprec.conversion.config import RuleConfig, recipe_or_none
from lowprec.errors import UserError, shown
from lowprec.recipe import Recipe

logger = logging.getLogger("lowprec")


_UNITS = {"%": 1e-2, "steps": 1.0, "step": 1.0, "tokens": 1.0}
_UNIT_NAMES: dict[str, Literal["share", "steps", "tokens"]] = {
    "%": "share",
    "steps": "steps",
    "step": "steps",
    "tokens": "tokens",
}
_MAGNITUDES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_UNTIL = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmbt]?)\s*(%|steps?|tokens)\s*", re.IGNORECASE)


class Until(StrictConfig):
    """The end of a phase: a share of the run's steps, a number of optimizer steps, or a number of
    tokens to train on."""

    value: float
    """Share (1 is the end), steps or tokens."""
    unit: Literal["share", "steps", "tokens"]

    @classmethod
    def parse(cls, text: Any) -> "Until":
        """Return the Until for "5%", "200 steps" or "1.5B tokens". Raise ValueError for anything
        else."""
        if isinstance(text, Until):
            return text
        match = _UNTIL.fullmatch(text) if isinstance(text, str) else None
        if match is None or (match[3] == "%" and match[2]):
            raise ValueError(
                "expected a share, steps or tokens, such as 5%, 200 steps or 1B tokens, got "
                f"{shown(text)}"
            )
        unit = match[3].lower()
        value = float(match[1]) * _MAGNITUDES[match[2].lower()] * _UNITS[unit]
        if value > 2**53:
            raise ValueError(f"{shown(text)} is more than any run has")
        if unit == "%" and value > 1:
            raise ValueError(f"{text} is after the end of the run")
        return cls(value=value, unit=_UNIT_NAMES[unit])

    def __str__(self) -> str:
        if self.unit == "share":
            return f"{100 * self.value:.12g}%"
        letter, size = next(
            (
                (letter, size)
                for letter, size in reversed(_MAGNITUDES.items())
                if self.value >= size
            ),
            ("", 1.0),
        )
        return f"{self.value / size:.15g}{letter.upper() if size > 1e3 else letter} {self.unit}"


class PhaseConfig(StrictConfig):
    """A part of the run with its own precision. Unset fields inherit the enclosing
    configuration."""

    until: Annotated[Until, BeforeValidator(Until.parse), PlainSerializer(str)] = Until(
        value=1.0, unit="share"
    )
    """End of the phase, since the start of the run: a share of its steps ("5%"), "200 steps" or "1B
    tokens". The last phase ends at 100%."""
    recipe: Recipe | Literal["configured"] | None = "configured"
    """Recipe of all layers that no rule names. Unset: that of the configuration."""
    rules: tuple[RuleConfig, ...] | None = None
    """Rules of the phase. Unset: those of the configuration."""

    @field_validator("recipe", mode="before")
    @classmethod
    def _resolve(cls, value: Any) -> Any:
        return value if value == "configured" else recipe_or_none(value)


@dataclass(frozen=True)
class Schedule:
    """The ends of a run's phases in optimizer steps."""

    ends: tuple[int, ...]
    """For each phase, the number of optimizer steps after which it is over. A phase without steps
    repeats the number of the phase before."""

    def phase(self, step: int) -> int:
        """Return the number of the phase that the next step belongs to, after `step` finished
        ones."""
        return next(
            (number for number, end in enumerate(self.ends) if step < end), len(self.ends) - 1
        )


def make_schedule(
    phases: Sequence[PhaseConfig],
    total_steps: int | None = None,
    tokens_per_step: int | None = None,
    *,
    warn: bool = True,
) -> Schedule:
    """Return the schedule of a run.

    Args:
        phases: the configured phases; none: one phase throughout.
        total_steps: number of optimizer steps of the run, if known; shares need it.
        tokens_per_step: number of tokens that an optimizer step trains on, over all ranks, if
            known; phases in tokens need it.
        warn: whether to log a warning for phases that never run.
    Raises:
        UserError: a length is not known, or phases in different units are out of order or overlap.
    """
    if not phases:
        return Schedule(ends=(total_steps or 0,))
    ends = [
        _end(phase.until, number, total_steps, tokens_per_step)
        for number, phase in enumerate(phases)
    ]
    untils = [phase.until for phase in phases]
    for number in range(1, len(ends)):
        before, end = ends[number - 1 : number + 1]
        place = f"precision.schedule.{number}.until"
        is_last = number == len(ends) - 1
        if end < before and not is_last:
            raise UserError(
                f"{place}: phases out of order: {untils[number]} is {_step(end)}, the phase before "
                f"ends at {_step(before)}"
            )
        if end == before and untils[number].unit != untils[number - 1].unit and not is_last:
            raise UserError(
                f"{place}: phases overlap: {untils[number - 1]} and {untils[number]} are both "
                f"{_step(end)}"
            )
        # In a short run a phase may be rounded to no steps, or the run ends before it begins.
        if end <= before and warn:
            logger.warning(
                "precision.schedule: phase %d never runs: it is over at %s, as the phase before",
                number + 1,
                _step(before),
            )
    return Schedule(ends=tuple(int(min(end, total_steps or 2**62)) for end in ends))


def _end(until: Until, number: int, total_steps: int | None, tokens_per_step: int | None) -> float:
    place = f"precision.schedule.{number}.until"
    if until.unit == "steps":
        return math.ceil(until.value)
    if until.unit == "tokens":
        if not tokens_per_step:
            raise UserError(
                f"{place}: {until} can't be converted to steps: the tokens of a forward pass are "
                "not known here, give `tokens`"
            )
        return math.ceil(until.value / tokens_per_step)
    if until.value == 1.0 and not total_steps:
        return math.inf
    if not total_steps:
        raise UserError(
            f"{place}: {until} of how many steps? The length of the run is not known here, give "
            "`steps`"
        )
    return math.ceil(until.value * total_steps - 1e-9)


def _step(end: float) -> str:
    if math.isinf(end):
        return "the end"
    return f"step {int(end)}" if end else "the start"
