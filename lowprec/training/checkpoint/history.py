"""One history of checkpoints in a run's directory.

A run that goes on from an earlier checkpoint, or that goes back to one, takes the steps after it
again. The later checkpoints are then of another history. They are renamed to
`replaced-checkpoint-N`, so that nothing resumes from them by itself, and `save_total_limit` counts
them apart.
"""

import logging
import os
import re
import shutil
import time
from pathlib import Path

from lowprec.training.checkpoint.files import checkpoints, damage, step_of

logger = logging.getLogger("lowprec")

REPLACED = "replaced-"
"""Start of the name of what an earlier history of the run has left."""

_DELETED = ".deleted-"
"""Start of the name of a checkpoint that is being deleted."""

_REPLACED_NAME = re.compile(rf"{REPLACED}checkpoint-(\d+)(?:-(\d+))?")
"""A replaced checkpoint: its step, and its number if others of that step were replaced before."""


def replaced_checkpoints(directory: Path) -> list[Path]:
    """Return the replaced checkpoints in `directory`, in the order of their numbers and steps."""
    found = []
    for path in directory.glob(f"{REPLACED}checkpoint-*"):
        match = _REPLACED_NAME.fullmatch(path.name)
        if match is not None and path.is_dir():
            found.append((int(match.group(2) or 1), int(match.group(1)), path))
    return [path for _, _, path in sorted(found)]


def is_replaced(checkpoint: Path) -> bool:
    """Return whether a checkpoint has the name of a replaced one."""
    return _REPLACED_NAME.fullmatch(checkpoint.name) is not None


def set_aside_later(directory: Path, step: int, limit: int | None) -> None:
    """Rename the complete checkpoints in `directory` that are later than `step`, and log it.

    Args:
        directory: Directory of a run that goes on after `step` steps.
        step: Number of those steps.
        limit: The run's `save_total_limit`. If there are more replaced checkpoints than that, those
            of earlier calls are deleted, which is logged.
    """
    later = [
        path
        for path in checkpoints(directory)
        if step_of(path) > step and damage(path, content=False) is None
    ]
    if not later:
        return
    before = replaced_checkpoints(directory)
    # From the last one on: after a kill in between, the rest is still the start of one history.
    later.sort(key=step_of, reverse=True)
    renamed = [path.rename(_free_name(path)) for path in later]
    logger.warning(
        "the run goes on after step %d: later checkpoints are set aside as %s in %s",
        step,
        ", ".join(path.name for path in reversed(renamed)),
        directory,
    )
    excess = 0
    if limit is not None and limit > 0:
        excess = max(0, len(before) + len(renamed) - limit)
    for path in before[:excess]:
        logger.warning("%s is deleted: save_total_limit is %d", path, limit)
        delete_checkpoint(path)


def rotate(directory: Path, limit: int | None, best: str | None, *, last: Path) -> None:
    """Delete the checkpoints of the lowest steps, so that `limit` complete ones are left.

    Times of files give no order, since a clock may be set back.

    Args:
        directory: Directory of the run.
        limit: The run's `save_total_limit`.
        best: Path of the best checkpoint, which is kept. It counts.
        last: The checkpoint that was written just now, which is kept.
    """
    if limit is None or limit <= 0:
        return
    kept = {last.resolve()}
    if best is not None:
        kept.add(Path(best).resolve())
    found = sorted(checkpoints(directory), key=step_of)
    excess = len(found) - max(limit, len(kept))
    for path in [path for path in found if path.resolve() not in kept][: max(0, excess)]:
        delete_checkpoint(path)


def order_times(directory: Path) -> None:
    """Give the checkpoints in `directory` times of change in the order of their steps, in the past.

    A Trainer whose checkpoints transformers itself rotates deletes those of the earliest times.
    After a clock was set back, these are the new ones.
    """
    bound = time.time_ns()
    for path in sorted(checkpoints(directory), key=step_of, reverse=True):
        status = path.stat()
        changed = min(status.st_mtime_ns, bound)
        if changed < status.st_mtime_ns:
            os.utime(path, ns=(status.st_atime_ns, changed))
        bound = changed - 1_000_000


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint. A kill leaves all of it under its name, or none."""
    if path.is_symlink():
        path.unlink()
        return
    doomed = path.rename(_deleted_name(path))
    shutil.rmtree(doomed, ignore_errors=True)


def deleted_checkpoints(directory: Path) -> list[Path]:
    """Return what is left of checkpoints whose deletion a kill cut short."""
    return list(directory.glob(f"{_DELETED}*checkpoint-*"))


def delete_rest(directory: Path) -> None:
    """Delete what is left of checkpoints whose deletion a kill cut short."""
    for path in deleted_checkpoints(directory):
        shutil.rmtree(path, ignore_errors=True)


def _deleted_name(path: Path) -> Path:
    name = path.with_name(f"{_DELETED}{path.name}")
    shutil.rmtree(name, ignore_errors=True)
    return name


def _free_name(checkpoint: Path) -> Path:
    """Return the first free name for a checkpoint that is replaced."""
    name = checkpoint.with_name(f"{REPLACED}{checkpoint.name}")
    number = 1
    while name.exists() or name.is_symlink():
        number += 1
        name = checkpoint.with_name(f"{REPLACED}{checkpoint.name}-{number}")
    return name
