"""The events of a run: new phases of the precision, corrections of the plan, breaches and
recoveries. They are kept in memory, in the log and in the run's events.jsonl."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowprec.conversion.plan import Plan
from lowprec.files import keep_lines_until, to_json, write_atomically
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
        self.lines = 0
        """Number of lines of the file that are not stale. Checkpoints keep it."""
        self._loaded_lines: int | None = None
        self._added = 0
        """Number of lines since `begin`."""

    def load_lines(self, lines: int | None) -> None:
        """Take the number of lines that the file had when a checkpoint was written; None if the
        checkpoint does not say. Call it before `begin`."""
        self._loaded_lines = lines

    def begin(self, directory: Path | None, *, logs: bool, stale_after: int | None) -> None:
        """Begin a run, or resume it.

        Args:
            directory: where events.jsonl is written; None: nowhere.
            logs: whether this process logs events.
            stale_after: the step that the run resumes after. Lines of the file that were written
                after the checkpoint of that step are stale: the run takes these steps again. None:
                the file has no stale lines.
        """
        self._directory = directory
        self._logs = logs
        self._stale_after = stale_after
        self._added = 0

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
            self.lines += 1
            self._added += 1
            path = self._directory / EVENTS
            is_cut = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")  # by a kill
            with open(path, "a", encoding="utf-8") as file:
                file.write("\n" * is_cut + to_json(record) + "\n")

    def add_phase(self, step: int, number: str, plan: Plan, warnings: Sequence[str]) -> None:
        """Record a new phase, with the summary of its plan and warnings about it."""
        more: dict[str, Any] = {"layers": list(warnings)} if warnings else {}
        self.add(step, "phase", f"{number}: {plan.summary()}", warns=bool(warnings), **more)

    def forget_stale(self) -> None:
        """Remove stale events from the file. Only the first call after `begin` does something."""
        if self._directory is not None and self._stale_after is not None:
            self.lines = self._keep_lines(self._directory / EVENTS, self._stale_after)
        self._stale_after = None
        self._loaded_lines = None

    def _keep_lines(self, path: Path, step: int) -> int:
        """Remove stale lines and return the number of the others.

        A checkpoint says how many lines there were. Without that, the lines of later steps are
        stale. (After a replay, a line may be of a later step than the checkpoint after it.)
        """
        if not path.is_file():
            return self._added
        if self._loaded_lines is None:
            keep_lines_until(path, step)
            return len(path.read_text(encoding="utf-8").splitlines())
        lines = path.read_text(encoding="utf-8").splitlines()
        first_new = len(lines) - self._added
        kept = lines[: min(self._loaded_lines, first_new)] + lines[first_new:]
        if kept != lines:
            write_atomically(path, "".join(line + "\n" for line in kept))
        return len(kept)
