"""The schedule of the precision: the phases of a run, and the phase that each step belongs to."""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
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
_BEYOND = 2**62
"""A number of steps beyond any run."""
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
    """The ends of a run's phases."""

    ends: tuple[int, ...]
    """For each phase, the number of optimizer steps after which it is over. A phase without steps
    repeats the number of the phase before. A phase in tokens has the expected number, or one
    beyond any run if none is expected."""
    token_ends: tuple[float | None, ...] = ()
    """For each phase, the number of tokens after which it is over; None if it ends by steps."""

    @property
    def counts_tokens(self) -> bool:
        """Flag: a phase ends by the number of tokens that the run has seen."""
        return any(end is not None for end in self.token_ends)

    def phase(self, step: int, tokens: int | None = None) -> int:
        """Return the number of the phase that the next step belongs to, after `step` finished
        ones.

        Args:
            step: number of finished steps.
            tokens: number of tokens in these steps, over all ranks; None: as expected.
        """
        for number, end in enumerate(self.ends):
            token_end = self.token_ends[number] if self.token_ends else None
            if token_end is not None and tokens is not None:
                is_over = tokens >= token_end
            else:
                is_over = step >= end
            if not is_over:
                return number
        return len(self.ends) - 1


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
        tokens_per_step: number of tokens that an optimizer step is expected to train on, over all
            ranks, if known. Phases in tokens are checked against the others by it.
        warn: whether to log a warning for phases that never run.
    Raises:
        UserError: a length is not known, or phases in different units are out of order or overlap.
    """
    if not phases:
        return Schedule(ends=(total_steps or 0,))
    token_ends = tuple(
        phase.until.value if phase.until.unit == "tokens" else None for phase in phases
    )
    ends = [
        _end(phase.until, number, total_steps, tokens_per_step)
        for number, phase in enumerate(phases)
    ]
    known = [number for number, end in enumerate(ends) if end is not None]
    for number, next_number in pairwise(known):
        _check_order(phases, ends, number, next_number, warn=warn)
    beyond = total_steps or _BEYOND
    return Schedule(
        ends=tuple(_BEYOND if end is None else int(min(end, beyond)) for end in ends),
        token_ends=token_ends,
    )


def _check_order(
    phases: Sequence[PhaseConfig],
    ends: Sequence[float | None],
    number: int,
    next_number: int,
    *,
    warn: bool,
) -> None:
    """Raise UserError if the second of two phases does not end after the first. Their ends are
    known in steps."""
    first = phases[number].until
    second = phases[next_number].until
    before = ends[number]
    end = ends[next_number]
    assert before is not None
    assert end is not None
    place = f"precision.schedule.{next_number}.until"
    is_last = next_number == len(ends) - 1
    if end < before and not is_last:
        raise UserError(
            f"{place}: phases out of order: {second} is {_step(end)}, the phase before ends at "
            f"{_step(before)}"
        )
    if end == before and first.unit != second.unit and not is_last:
        raise UserError(f"{place}: phases overlap: {first} and {second} are both {_step(end)}")
    # In a short run a phase may be rounded to no steps, or the run ends before it begins.
    if end <= before and warn:
        logger.warning(
            "precision.schedule: phase %d never runs: it is over at %s, as the phase before",
            next_number + 1,
            _step(before),
        )


def _end(
    until: Until, number: int, total_steps: int | None, tokens_per_step: int | None
) -> float | None:
    """Return the number of steps after which a phase is over; None if only the run shows it."""
    place = f"precision.schedule.{number}.until"
    if until.unit == "steps":
        return math.ceil(until.value)
    if until.unit == "tokens":
        return math.ceil(until.value / tokens_per_step) if tokens_per_step else None
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
