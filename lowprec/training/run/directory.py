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
    model/          the finished model for `from_pretrained`, without recipe state
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowprec.config.yaml import load_mapping
from lowprec.errors import UserError
from lowprec.training.checkpoint.files import (
    CHECKPOINT_NAME,
    checkpoints,
    damage,
    is_whole,
    last_checkpoint,
    run_of,
)
from lowprec.training.checkpoint.saving import UNFINISHED
from lowprec.training.checkpoint.torn import no_checkpoint
from lowprec.training.file_names import CONFIG, EVENTS, METRICS, MODEL, PLAN, SUMMARY

_FILES = (CONFIG, PLAN, METRICS, EVENTS, SUMMARY)
_PAST_CONFIG = re.compile(r"config-\d+\.yaml")


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
            checkpoint to resume from.
    """
    resume = trainer.get("resume_from_checkpoint") or False
    output = Path(trainer["output_dir"]) if trainer.get("output_dir") else None
    if isinstance(resume, str):
        checkpoint = Path(resume)
        if not is_whole(checkpoint):
            raise _not_a_checkpoint(checkpoint)
        directory = output or run_of(checkpoint)
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
        raise UserError(
            f"trainer.output_dir: {directory / MODEL} is not the model of a run that finished "
            "there, and this run would write over it; move it away, or choose another directory"
        )


def prepare(
    config_path: str | Path,
    trainer: Mapping[str, Any],
    root: Path = Path("runs"),
    reads: Sequence[Path] = (),
) -> tuple[Path, Path | None]:
    """Make the directory of a run, and return it and the checkpoint to resume from.

    A run that may be overwritten is deleted from the directory. Arguments and errors are those of
    `locate`.
    """
    output, checkpoint = locate(config_path, trainer, root, reads)
    if output is not None and _is_another_run(output, checkpoint) and _holds_run(output):
        _delete_run(output)
    try:
        if output is None:
            return _next_number(root / Path(config_path).stem), None
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"trainer.output_dir: {error.filename or output} can't be made: {error.strerror}"
        ) from None
    return output, checkpoint


def _holds_run(directory: Path) -> bool:
    """Return True if a run has written to `directory`."""
    return any((directory / name).exists() for name in _FILES) or bool(checkpoints(directory))


def _model_is_of_a_run(directory: Path) -> bool:
    """Return True if model/ was written by a run that finished in `directory`, not by the user."""
    try:
        summary = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
        config = load_mapping(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    except (OSError, ValueError):
        return False
    trainer = config.get("trainer")
    saves = not isinstance(trainer, dict) or trainer.get("save_strategy") != "no"
    return saves and isinstance(summary, dict) and "steps" in summary


def _written_by_runs(directory: Path) -> list[Path]:
    """Return the paths in `directory` that runs have written."""
    named = [
        path for path in directory.glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)
    ]
    paths = [path for path in named if path.is_dir() or path.is_symlink()]
    paths += [path for path in directory.glob("torn-checkpoint-*") if path.is_dir()]
    paths += [path for path in (directory / UNFINISHED,) if path.is_dir()]
    if os.path.lexists(directory / MODEL) and _model_is_of_a_run(directory):
        paths.append(directory / MODEL)
    paths += [path for path in directory.glob("config-*.yaml") if _PAST_CONFIG.fullmatch(path.name)]
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
