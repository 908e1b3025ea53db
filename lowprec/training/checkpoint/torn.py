"""Torn checkpoints: those that a kill cut short. They are set aside, so that no run resumes from
one."""

import logging
import shutil
import time
from pathlib import Path

from lowprec.training.checkpoint.files import checkpoints, is_whole

logger = logging.getLogger("lowprec")

STILL_WRITTEN = 5.0
"""Seconds after the last change of a file in an incomplete checkpoint: after them, no process is
writing it any more."""


def set_aside_torn(directory: Path) -> list[Path]:
    """Rename the torn checkpoints in `directory` to torn-checkpoint-N and return their new names.

    A checkpoint that another process may be writing right now stays.
    """
    renamed = []
    for checkpoint in checkpoints(directory):
        try:
            changed = max(path.stat().st_mtime for path in (checkpoint, *checkpoint.iterdir()))
        except FileNotFoundError:  # another process has just renamed or deleted a file
            continue
        if not is_whole(checkpoint) and time.time() - changed > STILL_WRITTEN:
            target = checkpoint.with_name(f"torn-{checkpoint.name}")
            if target.exists():
                shutil.rmtree(target)
            renamed.append(checkpoint.rename(target))
    return renamed


def wait_and_set_aside_torn(directory: Path) -> None:
    """Set torn checkpoints aside and log each. Wait for one that may be written right now: it is
    complete, or torn, after `STILL_WRITTEN` seconds at most."""
    deadline = time.monotonic() + STILL_WRITTEN
    waits = False
    while True:
        over = time.monotonic() > deadline
        for torn in set_aside_torn(directory):
            logger.warning("a checkpoint that was not written to its end is set aside as %s", torn)
        incomplete = [path for path in checkpoints(directory) if not is_whole(path)]
        if not incomplete or over:
            return
        if not waits:
            logger.warning(
                "%s may be written right now: waiting %g s for its end",
                incomplete[0],
                STILL_WRITTEN,
            )
        waits = True
        time.sleep(min(0.1, STILL_WRITTEN))
