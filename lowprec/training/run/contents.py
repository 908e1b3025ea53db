"""The contents of a run's directory: what runs have written there, which of it is the result of an
end, and how it is set aside or deleted."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

from lowprec.config.yaml import load_mapping
from lowprec.errors import UserError
from lowprec.training.checkpoint.files import CHECKPOINT_NAME, checkpoints
from lowprec.training.checkpoint.history import (
    REPLACED,
    deleted_checkpoints,
    replaced_checkpoints,
)
from lowprec.training.checkpoint.saving import UNFINISHED
from lowprec.training.file_names import (
    CONFIG,
    EVENTS,
    METRICS,
    MODEL,
    PLAN,
    SUMMARY,
    UNFINISHED_SUMMARY,
)

logger = logging.getLogger("lowprec")

FILES = (
    CONFIG,
    PLAN,
    METRICS,
    EVENTS,
    REPLACED + SUMMARY,
    UNFINISHED_SUMMARY,
    SUMMARY,
)
"""Names of the single files that a run writes."""

_PAST_CONFIG = re.compile(rf"({REPLACED})?config-(\d+)\.yaml")


def is_finished(directory: Path) -> bool:
    """Return whether the run in `directory` has finished: it has its summary."""
    return (directory / SUMMARY).is_file()


def past_configs(directory: Path) -> list[tuple[int, Path]]:
    """Return the configurations that the run in `directory` had before, config-<N>.yaml, each with
    its N, in the order of these."""
    named = ((_PAST_CONFIG.fullmatch(path.name), path) for path in directory.glob("config-*.yaml"))
    return sorted((int(match.group(2)), path) for match, path in named if match is not None)


def holds_run(directory: Path) -> bool:
    """Return True if a run has written to `directory`."""
    return any((directory / name).exists() for name in FILES) or bool(checkpoints(directory))


def model_is_of_a_run(directory: Path) -> bool:
    """Return True if model/ was written by a run that finished in `directory`, or that was about to
    finish, not by the user."""
    steps = [_steps_in(directory / name) for name in (SUMMARY, UNFINISHED_SUMMARY)]
    try:
        config = load_mapping(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    except (OSError, ValueError):
        return False
    trainer = config.get("trainer")
    saves = not isinstance(trainer, dict) or trainer.get("save_strategy") != "no"
    return saves and any(number is not None for number in steps)


def written_by_runs(directory: Path) -> list[Path]:
    """Return the paths in `directory` that runs have written."""
    named = [
        path for path in directory.glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)
    ]
    paths = [path for path in named if path.is_dir() or path.is_symlink()]
    paths += [path for path in directory.glob("torn-checkpoint-*") if path.is_dir()]
    paths += replaced_checkpoints(directory)
    paths += deleted_checkpoints(directory)
    made = (directory / name for name in (REPLACED + MODEL, UNFINISHED))
    paths += [path for path in made if os.path.lexists(path)]
    if os.path.lexists(directory / MODEL) and model_is_of_a_run(directory):
        paths.append(directory / MODEL)
    paths += [path for path in directory.glob("*.yaml") if _PAST_CONFIG.fullmatch(path.name)]
    paths += [directory / name for name in FILES if os.path.lexists(directory / name)]
    return paths


def delete_run(directory: Path) -> None:
    """Delete what runs have written to `directory`. Other files stay, and so do targets of
    links."""
    for path in written_by_runs(directory):
        try:
            if path.is_symlink() or path.name in FILES or not path.is_dir():
                path.unlink()
            else:
                shutil.rmtree(path)
        except OSError as error:
            raise UserError(
                f"trainer.overwrite_output_dir: {error.filename or path} can't be deleted: "
                f"{error.strerror}"
            ) from None


def set_result_aside(directory: Path, step: int) -> None:
    """Rename the model and the summary of an end of the run, unless it is the unfinished end after
    `step` steps, which is written anew.

    The summary tells that model/ is of a run (`model_is_of_a_run`), so it has a name of its own
    until the model is renamed.
    """
    ending = directory / UNFINISHED_SUMMARY
    if (directory / SUMMARY).is_file():
        os.replace(directory / SUMMARY, ending)
    elif _steps_in(ending) == step:
        return
    if not ending.is_file():
        return
    model = directory / MODEL
    if os.path.lexists(model) and model_is_of_a_run(directory):
        replaced = directory / (REPLACED + MODEL)
        _remove(replaced)
        model.rename(replaced)
        logger.warning("the model of the run's end before is set aside as %s", replaced)
    os.replace(ending, directory / (REPLACED + SUMMARY))


def _remove(path: Path) -> None:
    """Remove a folder with its contents, a file or a link, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _steps_in(summary: Path) -> int | None:
    """Return the number of steps in a summary; None if it is none."""
    try:
        content = json.loads(summary.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("steps") if isinstance(content, dict) else None
