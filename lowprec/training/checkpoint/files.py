"""The folders of checkpoints in a run's directory: which are there, which are complete, and after
which step each was written."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerState

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints in `directory`, complete or not, in no order."""
    return [
        path
        for path in directory.glob("checkpoint-*")
        if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()
    ]


def last_checkpoint(directory: Path) -> Path | None:
    """Return the complete checkpoint of the highest step in `directory`, None if there is none."""
    return max(filter(is_whole, checkpoints(directory)), key=step_of, default=None)


def run_of(checkpoint: Path) -> Path:
    """Return the directory of the run that a checkpoint belongs to: the folder that it is found in.
    A link is not followed."""
    return checkpoint.parent if checkpoint.name not in ("", "..") else checkpoint.resolve().parent


def is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint is complete: its trainer_state.json, which is written last, can
    be read."""
    try:
        state_of(checkpoint)
    except (OSError, ValueError):  # the writer was killed before that file, or inside of it
        return False
    return True


def state_of(checkpoint: Path) -> dict[str, Any]:
    """Return the Trainer's state of a complete checkpoint. Raise OSError or ValueError for another
    one."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def global_step(checkpoint: Path) -> int:
    """Return the step that a complete checkpoint was written after, from its content."""
    return state_of(checkpoint)["global_step"]


def step_of(path: Path) -> int:
    """Return the step that a checkpoint was written after, from its name."""
    match = CHECKPOINT_NAME.fullmatch(path.name)
    assert match is not None
    return int(match.group(1))


def is_checkpoint_of(checkpoint: Path, state: "TrainerState") -> bool:
    """Return whether this TrainerState was read from `checkpoint`. (The Trainer tells its callbacks
    the state that it resumes with, not the folder.)"""
    if not is_whole(checkpoint):
        return False
    held = state_of(checkpoint)
    return held["global_step"] == state.global_step and held["log_history"] == state.log_history
