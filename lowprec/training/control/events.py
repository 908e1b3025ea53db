"""The events of a run: new phases of the precision, corrections of the plan, breaches and
recoveries. They are kept in memory, in the log and in the run's events.jsonl."""

import logging
from pathlib import Path
from typing import Any

from lowprec.files import keep_lines_until, to_json
from lowprec.training.file_names import EVENTS

logger = logging.getLogger("lowprec")


class Events:
    """The events of a run. Before `begin`, events are only added to `records`."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        """All events, oldest first."""
        self._directory: Path | None = None
        self._logs = True
        self._stale_after: int | None = None

    def begin(self, directory: Path | None, *, logs: bool, stale_after: int | None) -> None:
        """Begin a run, or resume it.

        Args:
            directory: where events.jsonl is written; None: nowhere.
            logs: whether this process logs events.
            stale_after: the step that the run resumes after. Later events in the file may be stale:
                they belong to steps that the run takes again. None: the file has no stale events.
        """
        self._directory = directory
        self._logs = logs
        self._stale_after = stale_after

    def add(self, step: int, event: str, reason: str, *, warns: bool = False, **more: Any) -> None:
        """Record an event, log it, and append it to the file.

        Args:
            step: number of finished steps.
            event: kind of the event, in one word.
            reason: one line.
            warns: whether the log shows it as a warning.
            more: other entries of the record; `layers` is a list of lines for the log.
        """
        record = {"step": step, "event": event, "reason": reason, **more}
        self.records.append(record)
        if self._logs:
            logger.log(
                logging.WARNING if warns else logging.INFO,
                "step %d: %s: %s%s",
                step,
                event,
                reason,
                "".join(f"\n    {name}" for name in more.get("layers", ())),
            )
        if self._directory is not None:
            with open(self._directory / EVENTS, "a", encoding="utf-8") as file:
                file.write(to_json(record) + "\n")

    def forget_stale(self) -> None:
        """Remove stale events from the file. Only the first call after `begin` does something."""
        if self._directory is not None and self._stale_after is not None:
            keep_lines_until(self._directory / EVENTS, self._stale_after)
        self._stale_after = None
