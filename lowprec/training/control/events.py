"""What happened in a run: phases of the precision, breaches and recoveries; in memory, in the log
and in the run's events.jsonl."""

import json
import logging
from pathlib import Path
from typing import Any

from lowprec.files import keep_lines_until
from lowprec.training.file_names import EVENTS

logger = logging.getLogger("lowprec")


class Events:
    """Events of a run, oldest first in `records`. Without `begin` they are only kept."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self._directory: Path | None = None
        self._logs = True
        self._stale_after: int | None = None

    def begin(self, directory: Path | None, *, logs: bool, stale_after: int | None) -> None:
        """The run begins, or goes on.

        Args:
            directory: where events.jsonl is written, if anywhere.
            logs: whether this process tells of events in the log.
            stale_after: after which step the file may have events of a course that the run has
                left; None: it has none.
        """
        self._directory, self._logs, self._stale_after = directory, logs, stale_after

    def add(self, step: int, event: str, reason: str, **more: Any) -> None:
        record = {"step": step, "event": event, "reason": reason, **more}
        self.records.append(record)
        if self._logs:
            logger.info(
                "step %d: %s: %s%s",
                step,
                event,
                reason,
                "".join(f"\n    {name}" for name in more.get("layers", ())),
            )
        if self._directory is not None:
            with open(self._directory / EVENTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def forget_stale(self) -> None:
        """Take what is stale out of the file, once."""
        if self._directory is not None and self._stale_after is not None:
            keep_lines_until(self._directory / EVENTS, self._stale_after)
        self._stale_after = None
