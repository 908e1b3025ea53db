"""The folders of checkpoints in a run's directory: which are there, which are whole, and after
which step each was written.

A checkpoint is whole if it agrees with its manifest. One without a manifest, of an earlier version
or of another program, is whole as far as the form of its files shows.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowprec.files import plain
from lowprec.training.checkpoint import manifest, structure

if TYPE_CHECKING:
    from transformers import TrainerState

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = "trainer_state.json"


def checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints in `directory`, complete or not, in no order."""
    return [
        path
        for path in directory.glob("checkpoint-*")
        if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()
    ]


def last_checkpoint(directory: Path) -> Path | None:
    """Return the whole checkpoint of the highest step in `directory`, None if there is none."""
    newest_first = sorted(checkpoints(directory), key=step_of, reverse=True)
    return next(filter(is_whole, newest_first), None)


def run_of(checkpoint: Path) -> Path:
    """Return the directory of the run that a checkpoint belongs to: the folder that it is found in.
    A link is not followed."""
    return checkpoint.parent if checkpoint.name not in ("", "..") else checkpoint.resolve().parent


def is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint is whole: see `damage`."""
    return damage(checkpoint) is None


def damage(checkpoint: Path, *, content: bool = True) -> str | None:
    """Return the first damage that is found in a checkpoint, as "<file>: <what is wrong>"; None if
    it is whole.

    Args:
        checkpoint: Folder of the checkpoint.
        content: Flag: checksums are compared, too, which reads each file once; the result is kept
            until a file changes. Without it, sizes and forms of the files are checked.
    """
    if not content:
        return _find_damage(checkpoint, content=False)
    try:
        state = manifest.state_of_files(checkpoint)
    except OSError:  # there is no such folder, or another process is writing here
        return _find_damage(checkpoint, content=True)
    known = _known.get(checkpoint.resolve())
    if known is not None and known[0] == state:
        return known[1]
    problem = _find_damage(checkpoint, content=True)
    _known[checkpoint.resolve()] = state, problem
    return problem


_known: dict[Path, tuple[frozenset[Any], str | None]] = {}
"""The files of the checkpoints that were read, and the damage that was found."""


def remember_whole(checkpoint: Path) -> None:
    """Note that a checkpoint is whole, because this process wrote its manifest just now."""
    _known[checkpoint.resolve()] = manifest.state_of_files(checkpoint), None


def _find_damage(checkpoint: Path, *, content: bool) -> str | None:
    if not checkpoint.is_dir():
        return f"{checkpoint.name}: is no folder"
    if not manifest.has_manifest(checkpoint):
        return _state_damage(checkpoint) or structure.damage(checkpoint, content=content)
    return (
        manifest.damage(checkpoint, content=content)
        or _state_damage(checkpoint)
        or _other_step(checkpoint)
    )


def _other_step(checkpoint: Path) -> str | None:
    step = manifest.step_in(checkpoint)
    if step == global_step(checkpoint):
        return None
    return f"{manifest.MANIFEST}: is of step {step}, {_STATE} of {global_step(checkpoint)}"


def is_verified(checkpoint: Path) -> bool:
    """Return whether a whole checkpoint has checksums that were compared."""
    return manifest.has_manifest(checkpoint)


def _state_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with the Trainer's state, the file that is written last."""
    try:
        if "global_step" not in state_of(checkpoint) and len(list(checkpoint.iterdir())) > 1:
            return f"{_STATE}: has no global_step"
    except FileNotFoundError:
        return f"{_STATE}: is missing"
    except OSError as error:
        return f"{_STATE}: can't be read: {error.strerror}"
    except ValueError as error:
        return f"{_STATE}: {error}"
    return None


def state_of(checkpoint: Path) -> dict[str, Any]:
    """Return the Trainer's state of a complete checkpoint. Raise OSError or ValueError for another
    one."""
    path = checkpoint / _STATE
    if path.exists() and not path.is_file():
        raise ValueError("is no file")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("is no JSON; it is cut short or damaged") from None
    if not isinstance(state, dict):
        raise ValueError(f"is no mapping but a {type(state).__name__}")
    step = state.get("global_step", 0)
    if type(step) is not int or step < 0:
        raise ValueError(f"its global_step is {step!r}")
    return state


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
    try:
        held = state_of(checkpoint)
    except (OSError, ValueError):
        return False
    if held["global_step"] != state.global_step:
        return False
    # In `plain` NaN equals NaN.
    return plain(held.get("log_history")) == plain(state.log_history)
