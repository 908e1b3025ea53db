"""Precision over a run: which phase of `precision.schedule` a step belongs to."""

import logging
import math
from dataclasses import dataclass

from lowprec.config import PrecisionConfig, Until
from lowprec.errors import UserError

logger = logging.getLogger("lowprec")


@dataclass(frozen=True)
class Schedule:
    """The phases of a run of known length."""

    ends: tuple[int, ...]
    """The number of optimizer steps after which each phase is over; those of phases without steps repeat the one before."""

    def phase(self, step: int) -> int:
        """The number of the phase of the step that comes after `step` finished ones."""
        return next((number for number, end in enumerate(self.ends) if step < end), len(self.ends) - 1)


def make_schedule(
    config: PrecisionConfig, total_steps: int | None = None, tokens_per_step: int | None = None, *, warn: bool = True
) -> Schedule:
    """The schedule of a run.

    Args:
        total_steps: optimizer steps of the run, if known; shares need it.
        tokens_per_step: tokens that an optimizer step trains on, over all ranks, if known; phases in tokens need it.
        warn: of phases that never run.
    Raises:
        UserError: phases whose order shows only now are out of order or overlap, or a length is not known.
    """
    if not config.schedule:
        return Schedule(ends=(total_steps or 0,))
    ends = [_end(phase.until, number, total_steps, tokens_per_step) for number, phase in enumerate(config.schedule)]
    untils = [phase.until for phase in config.schedule]
    for number in range(1, len(ends)):
        (before, end), place = ends[number - 1 : number + 1], f"precision.schedule.{number}.until"
        if end < before and number < len(ends) - 1:
            raise UserError(f"{place}: phases out of order: {untils[number]} is {_step(end)}, the phase before ends at {_step(before)}")
        if end == before and untils[number].unit != untils[number - 1].unit and number < len(ends) - 1:
            raise UserError(f"{place}: phases overlap: {untils[number - 1]} and {untils[number]} are both {_step(end)}")
        if end <= before and warn:  # a short run rounds phases to nothing, or ends before they begin
            logger.warning("precision.schedule: phase %d never runs: it is over at %s, as the phase before", number + 1, _step(before))
    return Schedule(ends=tuple(int(min(end, total_steps or 2**62)) for end in ends))


def _end(until: Until, number: int, total_steps: int | None, tokens_per_step: int | None) -> float:
    place = f"precision.schedule.{number}.until"
    if until.unit == "steps":
        return math.ceil(until.value)
    if until.unit == "tokens":
        if not tokens_per_step:
            raise UserError(f"{place}: {until} can't be told in steps: the tokens of a forward pass are not known here, give `tokens`")
        return math.ceil(until.value / tokens_per_step)
    if until.value == 1.0 and not total_steps:
        return math.inf
    if not total_steps:
        raise UserError(f"{place}: {until} of how many steps? The length of the run is not known here, give `steps`")
    return math.ceil(until.value * total_steps - 1e-9)


def _step(end: float) -> str:
    return "the end" if math.isinf(end) else f"step {int(end)}" if end else "the start"
