"""Precision over a run: which phase of `precision.schedule` a step belongs to."""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainSerializer, field_validator

from lowprec.config.schema import StrictConfig
from lowprec.conversion.config import RuleConfig, recipe_or_none
from lowprec.errors import UserError
from lowprec.recipe import Recipe

logger = logging.getLogger("lowprec")


_UNITS = {"%": 1e-2, "steps": 1.0, "step": 1.0, "tokens": 1.0}


_MAGNITUDES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


_UNTIL = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmbt]?)\s*(%|steps?|tokens)\s*", re.IGNORECASE)


class Until(StrictConfig):
    """A moment of a run: a share of its steps, a number of optimizer steps, or of tokens trained
    on."""

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
            raise ValueError(
                "expected a share, steps or tokens, such as 5%, 200 steps or 1B tokens, got "
                f"{text!r}"
            )
        unit = match[3].lower()
        value = float(match[1]) * _MAGNITUDES[match[2].lower()] * _UNITS[unit]
        if unit == "%" and value > 1:
            raise ValueError(f"{text} is after the end of the run")
        return cls(
            value=value, unit="share" if unit == "%" else "tokens" if unit == "tokens" else "steps"
        )

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
    """A part of the run with a precision of its own. What it does not say is as the configuration
    around it has it."""

    until: Annotated[Until, BeforeValidator(Until.parse), PlainSerializer(str)] = Until(
        value=1.0, unit="share"
    )
    """Where it ends: a share of the run's steps ("5%"), "200 steps" or "1B tokens" since the start.
    The last one lasts until 100%."""
    recipe: Recipe | Literal["configured"] | None = "configured"
    """The recipe of all layers that no rule names; left out: the configuration's own."""
    rules: tuple[RuleConfig, ...] | None = None
    """Left out: the configuration's own, which hold in every phase."""

    @field_validator("recipe", mode="before")
    @classmethod
    def _resolve(cls, value: Any) -> Any:
        return value if value == "configured" else recipe_or_none(value)


@dataclass(frozen=True)
class Schedule:
    """The phases of a run of known length."""

    ends: tuple[int, ...]
    """The number of optimizer steps after which each phase is over; those of phases without steps
    repeat the one before."""

    def phase(self, step: int) -> int:
        """The number of the phase of the step that comes after `step` finished ones."""
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
    """The schedule of a run.

    Args:
        total_steps: optimizer steps of the run, if known; shares need it.
        tokens_per_step: tokens that an optimizer step trains on, over all ranks, if known; phases
            in tokens need it.
        warn: of phases that never run.
    Raises:
        UserError: phases whose order shows only now are out of order or overlap, or a length is not
            known.
    """
    if not phases:
        return Schedule(ends=(total_steps or 0,))
    ends = [
        _end(phase.until, number, total_steps, tokens_per_step)
        for number, phase in enumerate(phases)
    ]
    untils = [phase.until for phase in phases]
    for number in range(1, len(ends)):
        (before, end), place = ends[number - 1 : number + 1], f"precision.schedule.{number}.until"
        if end < before and number < len(ends) - 1:
            raise UserError(
                f"{place}: phases out of order: {untils[number]} is {_step(end)}, the phase before "
                f"ends at {_step(before)}"
            )
        if (
            end == before
            and untils[number].unit != untils[number - 1].unit
            and number < len(ends) - 1
        ):
            raise UserError(
                f"{place}: phases overlap: {untils[number - 1]} and {untils[number]} are both "
                f"{_step(end)}"
            )
        if (
            end <= before and warn
        ):  # a short run rounds phases to nothing, or ends before they begin
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
                f"{place}: {until} can't be told in steps: the tokens of a forward pass are not "
                "known here, give `tokens`"
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
    return "the end" if math.isinf(end) else f"step {int(end)}" if end else "the start"
