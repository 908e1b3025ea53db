"""Damaged checkpoints, such as those that a kill cut short. They are set aside, so that no run
resumes from one."""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowprec.distributed.processes import on_main_process
from lowprec.errors import UserError
from lowprec.training.checkpoint import manifest
from lowprec.training.checkpoint.files import (
    checkpoints,
    damage,
    is_checkpoint_of,
    is_verified,
    last_checkpoint,
    step_of,
)
from lowprec.training.checkpoint.no_code import check_no_code

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

logger = logging.getLogger("lowprec")

STILL_WRITTEN = 5.0
"""Seconds after the last change of a file in an incomplete checkpoint: after them, no process is
writing it any more."""


def set_aside_torn(directory: Path, *, is_held: bool = False) -> list[tuple[Path, str]]:
    """Rename the damaged checkpoints in `directory` to torn-checkpoint-N, and log each. Return the
    new name of each, and the damage.

    A checkpoint that another process may be writing right now stays, unless this process holds the
    lock of `directory` (`is_held`).
    """
    renamed = []
    for checkpoint, problem in _damaged(directory):
        if is_held or not _may_be_written(checkpoint):
            renamed.append((_set_aside(checkpoint), problem))
    for path, problem in renamed:
        last = last_checkpoint(directory)
        logger.warning(
            "%s is not whole: %s; it is set aside as %s, and %s",
            path.name.removeprefix("torn-"),
            problem,
            path,
            f"the last whole one is {last.name}" if last else "there is no whole one",
        )
    return renamed


def wait_and_set_aside_torn(directory: Path) -> None:
    """Set damaged checkpoints aside. Wait for one that may be written right now: it is
    complete, or torn, after `STILL_WRITTEN` seconds at most."""
    deadline = time.monotonic() + STILL_WRITTEN
    waits = False
    while True:
        over = time.monotonic() > deadline
        set_aside_torn(directory)
        incomplete = _damaged(directory)
        if not incomplete or over:
            return
        if not waits:
            logger.warning(
                "%s may be written right now: waiting %g s for its end",
                incomplete[0][0],
                STILL_WRITTEN,
            )
        waits = True
        time.sleep(min(0.1, STILL_WRITTEN))


def _damaged(directory: Path) -> list[tuple[Path, str]]:
    """Return the damaged checkpoints, with their damage. The content of the files is read from the
    last checkpoint back to the first whole one; of those before, sizes and forms are checked."""
    found = []
    content = True
    for checkpoint in sorted(checkpoints(directory), key=step_of, reverse=True):
        problem = damage(checkpoint, content=content)
        if problem is None:
            content = False
        elif checkpoint.is_dir():  # another process may just have deleted it
            found.append((checkpoint, problem))
    return found


def _may_be_written(checkpoint: Path) -> bool:
    """Return whether a file in `checkpoint` has changed within `STILL_WRITTEN` seconds."""
    try:
        changed = max(path.lstat().st_mtime for path in (checkpoint, *checkpoint.rglob("*")))
    except FileNotFoundError:  # another process has just renamed or deleted a file
        return True
    # A time in the future is no sign of a writer: a clock may have been set back since.
    return abs(time.time() - changed) <= STILL_WRITTEN


def _set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint to torn-checkpoint-N, or torn-checkpoint-N.K if there is one."""
    name = f"torn-{checkpoint.name}"
    target = checkpoint.with_name(name)
    number = 1
    while target.exists():
        number += 1
        target = checkpoint.with_name(f"{name}.{number}")
    return checkpoint.rename(target)


def last_whole(directory: Path, args: "TrainingArguments") -> Path:
    """Return the whole checkpoint of the highest step in `directory`. The first process looks for
    it. Raise UserError if there is none."""

    def find() -> Path:
        found = last_checkpoint(directory)
        if found is None:
            raise UserError(
                f"No valid checkpoint found in output directory ({directory}): "
                f"{no_checkpoint(directory)}"
            )
        return found

    return on_main_process(_processes(args), find)


def no_checkpoint(directory: Path) -> str:
    """Return the line that says that `directory` has no whole checkpoint, and why."""
    damaged = _damaged(directory) if directory.is_dir() else []
    if not damaged:
        return f"no checkpoint in {directory}"
    path, problem = damaged[0]
    return f"no whole checkpoint in {directory}: {path.name}: {problem}"


def check_whole(
    checkpoint: Path, args: "TrainingArguments", asked_by: str = "resume_from_checkpoint"
) -> None:
    """Raise UserError if a checkpoint is damaged, or holds code.

    Log a line if it has no manifest, or files that the manifest does not name. The first process
    reads the files.
    """

    def check() -> None:
        problem = damage(checkpoint)
        if problem is not None:
            raise UserError(f"{asked_by}: {checkpoint} is not whole: {problem}")
        check_no_code(checkpoint)
        if checkpoint.resolve() in _told:
            return
        _told.add(checkpoint.resolve())
        if not is_verified(checkpoint):
            logger.warning(
                "%s has no %s: the form of its files was checked, their content was not",
                checkpoint,
                manifest.MANIFEST,
            )
        elif others := manifest.unlisted(checkpoint):
            logger.warning(
                "%s: %s: not in %s, so not checked",
                checkpoint,
                ", ".join(others),
                manifest.MANIFEST,
            )

    on_main_process(_processes(args), check)


_told: set[Path] = set()
"""The checkpoints whose check was logged."""


def check_resumed(state: "TrainerState", candidates: list[Path], args: "TrainingArguments") -> None:
    """Check the checkpoint that the Trainer has resumed from, before the first step. See
    `check_whole`."""

    def find() -> Path | None:
        return next((path for path in candidates if is_checkpoint_of(path, state)), None)

    checkpoint = on_main_process(_processes(args), find)
    if checkpoint is not None:
        check_whole(checkpoint, args)


def _processes(args: "TrainingArguments") -> Any:
    return args.distributed_state if args.world_size > 1 else None
