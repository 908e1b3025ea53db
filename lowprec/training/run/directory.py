"""Where a run writes, so that no run ever overwrites another.

runs/<config name>/<number>/
    config.yaml     the resolved configuration; `lowprec train` takes it again
    plan.json       what ran in which precision
    metrics.jsonl   one line per logged step
    events.jsonl    phases of the precision, breaches and recoveries, if there were any
    summary.json    the result
    checkpoint-N/   transformers' checkpoints
    model/          the finished model, for `from_pretrained`, without what only training needs
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lowprec.config.yaml import load_mapping
from lowprec.errors import UserError
from lowprec.training.checkpoint.files import (
    CHECKPOINT_NAME,
    checkpoints,
    is_whole,
    last_checkpoint,
    run_of,
)
from lowprec.training.file_names import CONFIG, EVENTS, METRICS, MODEL, PLAN, SUMMARY

_FILES = (CONFIG, PLAN, METRICS, EVENTS, SUMMARY)
_PAST_CONFIG = re.compile(r"config-\d+\.yaml")


def locate(
    config_path: str | Path,
    trainer: Mapping[str, Any],
    root: Path = Path("runs"),
    reads: Iterable[Path] = (),
) -> tuple[Path | None, Path | None]:
    """The directory of a run and the checkpoint to resume from; nothing is made or deleted.

    Without `trainer.output_dir` the directory is None, the next number under runs/<config name>;
    resuming then means the run whose config.yaml this is, or the last of those numbers that has a
    checkpoint.

    Args:
        config_path: of the run's configuration.
        trainer: its settings.
        root: where the runs of configurations are.
        reads: what the run reads besides, its model say: not to be deleted.
    Raises:
        UserError: the directory holds another run and neither resume nor overwrite was asked for,
            or something that the run would delete or write over and that is not a run's, or there
            is nothing to resume from.
    """
    resume = trainer.get("resume_from_checkpoint") or False
    output = Path(trainer["output_dir"]) if trainer.get("output_dir") else None
    if isinstance(resume, str):
        checkpoint = Path(resume)
        if not is_whole(checkpoint):
            what = (
                "no checkpoint that was written to its end"
                if checkpoint.is_dir()
                else "no such checkpoint"
            )
            last = last_checkpoint(checkpoint)
            hint = (
                f"; did you mean {last}?"
                if last
                else "; true takes the last one"
                if not checkpoint.exists()
                else ""
            )
            raise UserError(f"trainer.resume_from_checkpoint: {what}: {checkpoint}{hint}")
        directory = output or run_of(checkpoint)
        if _is_another(directory, checkpoint):
            _check_free(directory, trainer, (checkpoint, *reads))
        return _writable(directory, trainer), checkpoint
    if resume:
        config, family = Path(config_path), root / Path(config_path).stem
        own = [config.parent] if config.name == CONFIG else []
        for candidate in (
            [output] if output is not None else [*own, *sorted(_numbered(family), reverse=True)]
        ):
            if (checkpoint := last_checkpoint(candidate)) is not None:
                return _writable(candidate, trainer), checkpoint
        raise UserError(f"trainer.resume_from_checkpoint: no checkpoint in {output or family}")
    if output is None:
        _writable(root / Path(config_path).stem, {})
    else:
        _check_free(output, trainer, reads)
        _writable(output, trainer)
    return output, None


def _is_another(directory: Path, checkpoint: Path | None) -> bool:
    """Whether a directory is not that of the run that goes on."""
    return checkpoint is None or directory.resolve() != run_of(checkpoint).resolve()


def _check_free(output: Path, trainer: Mapping[str, Any], reads: Iterable[Path]) -> None:
    if not _holds_run(output):
        return
    if not trainer.get("overwrite_output_dir"):
        raise UserError(
            f"trainer.output_dir: {output} holds another run; choose another, or say "
            "trainer.resume_from_checkpoint=true to go on with "
            "it or trainer.overwrite_output_dir=true to delete it"
        )
    for entry in _entries(output):
        if needed := next((path for path in reads if _lies_in(path, entry)), None):
            raise UserError(
                f"trainer.overwrite_output_dir: this run reads {needed}, and {entry} would be "
                "deleted; choose another directory"
            )


def _lies_in(path: Path, entry: Path) -> bool:
    """Whether a path is gone with a directory's entry; of a link it is the link that goes."""
    name = entry.parent.resolve() / entry.name
    passed = Path(os.path.abspath(path))
    links = any(step.parent.resolve() / step.name == name for step in (passed, *passed.parents))
    return links or (not entry.is_symlink() and path.resolve().is_relative_to(name))


def _writable(directory: Path, trainer: Mapping[str, Any]) -> Path:
    """The directory; UserError if a run can't be written there, whether it exists or would have to
    be made."""
    existing = next(path for path in (directory, *directory.resolve().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"trainer.output_dir: {directory} can't be made: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"trainer.output_dir: no permission to write to {existing}")
    if (
        trainer.get("save_strategy") != "no"
        and os.path.lexists(directory / MODEL)
        and not _wrote_model(directory)
    ):
        raise UserError(
            f"trainer.output_dir: {directory / MODEL} is not the model of a run that finished "
            "there, and this run would write over it; "
            "move it away, or choose another directory"
        )
    return directory


def prepare(
    config_path: str | Path,
    trainer: Mapping[str, Any],
    root: Path = Path("runs"),
    reads: Iterable[Path] = (),
) -> tuple[Path, Path | None]:
    """As `locate`; the directory is made, and a run that may be overwritten is deleted from it."""
    output, checkpoint = locate(config_path, trainer, root, reads)
    if output is not None and _is_another(output, checkpoint) and _holds_run(output):
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
    return any((directory / name).exists() for name in _FILES) or bool(checkpoints(directory))


def _wrote_model(directory: Path) -> bool:
    """Whether model/ is that of a run which finished in `directory`, not one that somebody keeps
    there."""
    try:
        summary = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
        config = load_mapping(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    except (OSError, ValueError):
        return False
    trainer = config.get("trainer")
    saves = not isinstance(trainer, dict) or trainer.get("save_strategy") != "no"
    return saves and isinstance(summary, dict) and "steps" in summary


def _entries(directory: Path) -> list[Path]:
    """What runs have written to a directory."""
    links = (
        path
        for path in directory.glob("checkpoint-*")
        if CHECKPOINT_NAME.fullmatch(path.name) and path.is_symlink()
    )
    torn = (path for path in directory.glob("torn-checkpoint-*") if path.is_dir())
    model = (
        [directory / MODEL]
        if os.path.lexists(directory / MODEL) and _wrote_model(directory)
        else []
    )
    past = (path for path in directory.glob("config-*.yaml") if _PAST_CONFIG.fullmatch(path.name))
    files = (directory / name for name in _FILES if os.path.lexists(directory / name))
    return [*dict.fromkeys((*checkpoints(directory), *links)), *torn, *model, *past, *files]


def _delete_run(directory: Path) -> None:
    """Delete what a run writes; other files stay, and what links lead to."""
    for path in _entries(directory):
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
    return [path for path in family.glob("*") if path.is_dir() and path.name.isdigit()]


def _next_number(family: Path) -> Path:
    family.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in _numbered(family)), default=0)
    while True:
        number += 1
        try:
            os.mkdir(
                family / f"{number:03d}"
            )  # fails if another process took the number in between
        except FileExistsError:
            continue
        return family / f"{number:03d}"
