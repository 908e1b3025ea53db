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

import logging
import os
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
    delete_rest,
    is_replaced,
    set_aside_later,
)
from lowprec.training.checkpoint.torn import no_checkpoint, set_aside_torn
from lowprec.training.file_names import CONFIG, END_OF_TRAINING, METRICS, MODEL, SUMMARY
from lowprec.training.run.contents import (
    FILES,
    delete_run,
    holds_run,
    model_is_of_a_run,
    set_result_aside,
    written_by_runs,
)

logger = logging.getLogger("lowprec")


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
        check_files([directory / name for name in FILES], "trainer.output_dir")
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
    if not holds_run(output):
        return
    run_lock.check_not_held(output)
    if not trainer.get("overwrite_output_dir"):
        raise UserError(
            f"trainer.output_dir: {output} holds another run; choose another directory, or say "
            "trainer.resume_from_checkpoint=true to resume it or trainer.overwrite_output_dir=true "
            "to delete it"
        )
    for entry in written_by_runs(output):
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
    if os.path.lexists(directory / MODEL) and not model_is_of_a_run(directory):
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
        if _is_another_run(directory, checkpoint) and holds_run(directory):
            delete_run(directory)
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
    set_result_aside(directory, step)
    keep_lines_until(directory / METRICS, step, end=END_OF_TRAINING)


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
