"""The directory of a run. No run ever overwrites another one.

runs/<config name>/<number>/
    config.yaml     the resolved configuration; `lowprec train` accepts it again
    config-N.yaml   the configuration until step N, if the run resumed from there with another one
    plan.json       the precision and backend of each layer
    metrics.jsonl   one line for each logged step
    events.jsonl    phases of the precision, breaches and recoveries, if there were any
    summary.json    the result
    checkpoint-N/   transformers' checkpoints
    unfinished/     a checkpoint or a model that is being written, or that a kill cut short
    replaced-*      checkpoints and results of steps that the run has taken again
    model/          the finished model for `from_pretrained`, without recipe state

model/ is written whole, and summary.json after it: summary.json means that the run has finished. A
process that writes a run holds the lock of its directory (`lowprec.training.checkpoint.run_lock`).
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowprec.config.yaml import load_mapping
from lowprec.errors import UserError
from lowprec.files import keep_lines_until
from lowprec.training.checkpoint import run_lock
from lowprec.training.checkpoint.files import (
    CHECKPOINT_NAME,
    checkpoints,
    damage,
    global_step,
    is_whole,
    last_checkpoint,
    run_of,
)
from lowprec.training.checkpoint.folders import check_files
from lowprec.training.checkpoint.history import (
    REPLACED,
    delete_rest,
    deleted_checkpoints,
    is_replaced,
    replaced_checkpoints,
    set_aside_later,
)
from lowprec.training.checkpoint.saving import UNFINISHED
from lowprec.training.checkpoint.torn import no_checkpoint, set_aside_torn
from lowprec.training.file_names import (
    CONFIG,
    END_OF_TRAINING,
    EVENTS,
    METRICS,
    MODEL,
    PLAN,
    SUMMARY,
    UNFINISHED_SUMMARY,
)

logger = logging.getLogger("lowprec")

_FILES = (
    CONFIG,
    PLAN,
    METRICS,
    EVENTS,
    REPLACED + SUMMARY,
    UNFINISHED_SUMMARY,
    SUMMARY,
)
_PAST_CONFIG = re.compile(rf"({REPLACED})?config-(\d+)\.yaml")


def locate(
    config_path: str | Path,
    trainer: Mapping[str, Any],
    root: Path = Path("runs"),
    reads: Sequence[Path] = (),
) -> tuple[Path | None, Path | None]:
    """Return the directory of a run and the checkpoint to resume from. Nothing is made or deleted.

    Without `trainer.output_dir` the directory is None, which stands for the next number below
    runs/<config name>. To resume then means: the run whose config.yaml this is, or else the last of
    those numbers that has a checkpoint.

    Args:
        config_path: Path of the run's configuration.
        trainer: Settings below `trainer:`.
        root: Folder of the numbered runs.
        reads: Paths that the run reads, such as its model. They must not be deleted.
    Raises:
        UserError: the directory holds another run, and neither resuming nor overwriting was asked
            for; or the run would delete or overwrite something that no run wrote; or there is no
            checkpoint to resume from; or another process is writing the run.
    """
    resume = trainer.get("resume_from_checkpoint") or False
    output = Path(trainer["output_dir"]) if trainer.get("output_dir") else None
    if output is not None:
        _check_links(output, "output_dir")
    if isinstance(resume, str):
        checkpoint = Path(resume)
        _check_links(checkpoint, "resume_from_checkpoint")
        if not is_whole(checkpoint):
            raise _not_a_checkpoint(checkpoint)
        directory = output or run_of(checkpoint)
        if is_replaced(checkpoint) and not _is_another_run(directory, checkpoint):
            raise UserError(
                f"trainer.resume_from_checkpoint: {checkpoint} is of steps that this run has taken "
                "again since; resume from it in another directory (trainer.output_dir)"
            )
        if _is_another_run(directory, checkpoint):
            _check_free(directory, trainer, (checkpoint, *reads))
    elif resume:
        directory, checkpoint = _last_run(Path(config_path), output, root)
    elif output is not None:
        directory = output
        checkpoint = None
        _check_free(directory, trainer, reads)
    else:
        _check_writable(root / Path(config_path).stem)
        return None, None
    _check_writable(directory)
    if checkpoint is not None:
        check_files([directory / name for name in _FILES], "trainer.output_dir")
        if (directory / CONFIG).is_file():
            load_mapping(directory / CONFIG)
    run_lock.check_not_held(directory)
    _check_model(directory, trainer)
    return directory, checkpoint


def _last_run(config: Path, output: Path | None, root: Path) -> tuple[Path, Path]:
    """Return the directory of the run to resume, and its last checkpoint."""
    family = root / config.stem
    if output is not None:
        candidates = [output]
    else:
        own = [config.parent] if config.name == CONFIG else []
        candidates = [*own, *sorted(_numbered(family), reverse=True)]
    for candidate in candidates:
        if (checkpoint := last_checkpoint(candidate)) is not None:
            return candidate, checkpoint
        if checkpoints(candidate):
            raise UserError(f"trainer.resume_from_checkpoint: {no_checkpoint(candidate)}")
    raise UserError(f"trainer.resume_from_checkpoint: no checkpoint in {output or family}")


def _not_a_checkpoint(path: Path) -> UserError:
    """Return the error for a path that is not a complete checkpoint."""
    problem = "not a complete checkpoint" if path.is_dir() else "no such checkpoint"
    last = last_checkpoint(path)
    if path.is_dir() and last is None and CHECKPOINT_NAME.fullmatch(path.name):
        hint = f": {damage(path)}; true takes the last whole one"
    elif last is not None:
        hint = f"; did you mean {last}?"
    elif not path.exists():
        hint = "; true takes the last one"
    else:
        hint = ""
    return UserError(f"trainer.resume_from_checkpoint: {problem}: {path}{hint}")


def _is_another_run(directory: Path, checkpoint: Path | None) -> bool:
    """Return True if `directory` is not the directory of the run that wrote `checkpoint`."""
    return checkpoint is None or directory.resolve() != run_of(checkpoint).resolve()


def _check_free(output: Path, trainer: Mapping[str, Any], reads: Sequence[Path]) -> None:
    """Raise UserError if `output` holds a run that must not be overwritten, or a path in `reads`
    that would be deleted with it."""
    if not _holds_run(output):
        return
    run_lock.check_not_held(output)
    if not trainer.get("overwrite_output_dir"):
        raise UserError(
            f"trainer.output_dir: {output} holds another run; choose another directory, or say "
            "trainer.resume_from_checkpoint=true to resume it or trainer.overwrite_output_dir=true "
            "to delete it"
        )
    for entry in _written_by_runs(output):
        if needed := next((path for path in reads if _lies_in(path, entry)), None):
            raise UserError(
                f"trainer.overwrite_output_dir: this run reads {needed}, and {entry} would be "
                "deleted; choose another directory"
            )


def _lies_in(path: Path, entry: Path) -> bool:
    """Return True if deleting `entry` would delete `path`, or break a link that leads to it.

    If `entry` is a link, deleting it keeps its target.
    """
    name = entry.parent.resolve() / entry.name
    absolute = Path(os.path.abspath(path))
    parts = (absolute, *absolute.parents)
    passes_entry = any(part.parent.resolve() / part.name == name for part in parts)
    return passes_entry or (not entry.is_symlink() and path.resolve().is_relative_to(name))


def _check_links(directory: Path, setting: str) -> None:
    """Raise UserError if a path has no end, because a link in it leads to itself."""
    try:
        directory.resolve()
    except (OSError, RuntimeError):  # Python raised RuntimeError until version 3.12.
        raise UserError(
            f"trainer.{setting}: {directory} can't be used: a link leads to itself"
        ) from None


def _check_writable(directory: Path) -> None:
    """Raise UserError if a run can't write to `directory`, which may not exist yet."""
    existing = next(path for path in (directory, *directory.resolve().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"trainer.output_dir: {directory} can't be made: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"trainer.output_dir: no permission to write to {existing}")


def _check_model(directory: Path, trainer: Mapping[str, Any]) -> None:
    """Raise UserError if a run would overwrite a model in `directory` that no run wrote."""
    if trainer.get("save_strategy") == "no":
        return
    if os.path.lexists(directory / MODEL) and not _model_is_of_a_run(directory):
        summary = directory / SUMMARY
        reason = f" ({summary.name} there is no summary)" if summary.is_file() else ""
        raise UserError(
            f"trainer.output_dir: {directory / MODEL} is not the model of a run that finished "
            f"there{reason}, and this run would write over it; move it away, or choose another "
            "directory"
        )


def prepare(
    config_path: str | Path,
    trainer: Mapping[str, Any],
    root: Path = Path("runs"),
    reads: Sequence[Path] = (),
) -> tuple[Path, Path | None]:
    """Make the directory of a run, and return it and the checkpoint to resume from.

    This process then holds the directory's lock, until it calls `release`. A run that may be
    overwritten is deleted from the directory. Arguments and errors are those of `locate`.
    """
    output, _ = locate(config_path, trainer, root, reads)
    try:
        if output is None:
            directory = _next_number(root / Path(config_path).stem)
        else:
            directory = output
            directory.mkdir(parents=True, exist_ok=True)
        run_lock.hold(directory)
    except OSError as error:
        raise UserError(
            f"trainer.output_dir: {error.filename or output} can't be made: {error.strerror}"
        ) from None
    if output is None:
        return directory, None
    try:
        # Once more: another process may have changed the directory until it was locked.
        _, checkpoint = locate(config_path, {**trainer, "output_dir": str(directory)}, root, reads)
        if _is_another_run(directory, checkpoint) and _holds_run(directory):
            _delete_run(directory)
    except UserError:
        release(directory)
        raise
    return directory, checkpoint


def release(directory: Path) -> None:
    """Release the lock of a run's directory, if this process holds it."""
    run_lock.release(directory)


def go_on_from(directory: Path, checkpoint: Path, limit: int | None) -> None:
    """Bring the directory of a run to the state after a checkpoint, from which the run goes on.

    Damaged checkpoints are set aside. What the run did after that checkpoint is set aside
    (checkpoints, the result of an end) or dropped (lines of metrics.jsonl). A kill leaves a
    directory that can be resumed.

    Args:
        directory: Directory of the run, whose lock is held.
        checkpoint: Checkpoint that the run goes on from. It may be one of another directory.
        limit: The run's `save_total_limit`.
    """
    step = global_step(checkpoint)
    delete_rest(directory)
    set_aside_torn(directory, is_held=True)
    set_aside_later(directory, step, limit)
    _set_result_aside(directory, step)
    keep_lines_until(directory / METRICS, step, end=END_OF_TRAINING)


def past_configs(directory: Path) -> list[tuple[int, Path]]:
    """Return the configurations that the run in `directory` had before, config-<N>.yaml, each with
    its N, in the order of these."""
    named = ((_PAST_CONFIG.fullmatch(path.name), path) for path in directory.glob("config-*.yaml"))
    return sorted((int(match.group(2)), path) for match, path in named if match is not None)


def is_finished(directory: Path) -> bool:
    """Return whether the run in `directory` has finished: it has its summary."""
    return (directory / SUMMARY).is_file()


def _set_result_aside(directory: Path, step: int) -> None:
    """Rename the model and the summary of an end of the run, unless it is the unfinished end after
    `step` steps, which is written anew.

    The summary tells that model/ is of a run (`_model_is_of_a_run`), so it has a name of its own
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
    if os.path.lexists(model) and _model_is_of_a_run(directory):
        replaced = directory / (REPLACED + MODEL)
        remove(replaced)
        model.rename(replaced)
        logger.warning("the model of the run's end before is set aside as %s", replaced)
    os.replace(ending, directory / (REPLACED + SUMMARY))


def _steps_in(summary: Path) -> int | None:
    """Return the number of steps in a summary; None if it is none."""
    try:
        content = json.loads(summary.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("steps") if isinstance(content, dict) else None


def remove(path: Path) -> None:
    """Remove a folder with its contents, a file or a link, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _holds_run(directory: Path) -> bool:
    """Return True if a run has written to `directory`."""
    return any((directory / name).exists() for name in _FILES) or bool(checkpoints(directory))


def _model_is_of_a_run(directory: Path) -> bool:
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


def _written_by_runs(directory: Path) -> list[Path]:
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
    if os.path.lexists(directory / MODEL) and _model_is_of_a_run(directory):
        paths.append(directory / MODEL)
    paths += [path for path in directory.glob("*.yaml") if _PAST_CONFIG.fullmatch(path.name)]
    paths += [directory / name for name in _FILES if os.path.lexists(directory / name)]
    return paths


def _delete_run(directory: Path) -> None:
    """Delete what runs have written to `directory`. Other files stay, and so do targets of
    links."""
    for path in _written_by_runs(directory):
        try:
            if path.is_symlink() or path.name in _FILES or not path.is_dir():
                path.unlink()
            else:
                shutil.rmtree(path)
        except OSError as error:
            raise UserError(
                f"trainer.overwrite_output_dir: {error.filename or path} can't be deleted: "
                f"{error.strerror}"
            ) from None


def _numbered(family: Path) -> list[Path]:
    """Return the directories of the numbered runs of a configuration."""
    return [path for path in family.glob("*") if path.is_dir() and path.name.isdigit()]


def _next_number(family: Path) -> Path:
    """Make the directory of the next number below `family`, and return it."""
    family.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in _numbered(family)), default=0)
    while True:
        number += 1
        directory = family / f"{number:03d}"
        try:
            directory.mkdir()
        except FileExistsError:  # Another process has taken the number meanwhile.
            continue
        return directory
