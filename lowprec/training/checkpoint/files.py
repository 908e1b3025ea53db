"""The folders of checkpoints in a run's directory: which are there, which are complete, and after
which step each was written."""

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def run_of(checkpoint: Path) -> Path:
    """The directory of the run that a checkpoint is of: where it is found, wherever a link there
    leads."""
    return checkpoint.parent if checkpoint.name not in ("", "..") else checkpoint.resolve().parent


def last_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of the highest step in `directory` that was written to its end. (Its
    trainer_state.json is written last.)"""
    return max(filter(is_whole, checkpoints(directory)), key=step_of, default=None)


STILL_WRITTEN = 5.0
"""Seconds since its last file changed after which nobody writes a checkpoint any more."""


def set_aside_torn(directory: Path) -> list[Path]:
    """Rename the checkpoints in `directory` that were not written to their end, so that nothing
    resumes from them; their new names.

    One that another process may be writing right now stays.
    """
    renamed = []
    for checkpoint in checkpoints(directory):
        try:
            changed = max(path.stat().st_mtime for path in (checkpoint, *checkpoint.iterdir()))
        except FileNotFoundError:  # a file that another process has just renamed or deleted
            continue
        if not is_whole(checkpoint) and time.time() - changed > STILL_WRITTEN:
            target = checkpoint.with_name(f"torn-{checkpoint.name}")
            if target.exists():
                shutil.rmtree(target)
            renamed.append(checkpoint.rename(target))
    return renamed


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        state_of(checkpoint)
    except (OSError, ValueError):  # killed before, or in the middle of, writing it
        return False
    return True


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What a whole checkpoint holds of the Trainer's state. OSError or ValueError for one that is
    not whole."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def global_step(checkpoint: Path) -> int:
    """The step that a whole checkpoint was written after, by what is in it."""
    return state_of(checkpoint)["global_step"]


def step_of(path: Path) -> int:
    """The step that a checkpoint was written after, by its name."""
    match = CHECKPOINT_NAME.fullmatch(path.name)
    assert match is not None
    return int(match.group(1))


def checkpoints(directory: Path) -> list[Path]:
    return [
        path
        for path in directory.glob("checkpoint-*")
        if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()
    ]
