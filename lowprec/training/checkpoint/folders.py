"""Damage in the folder of a model or a tokenizer, in a checkpoint of Accelerate, and among the
files of a run. A folder is compared with its manifest; without one, the form of its files is
checked."""

import os
from collections.abc import Container, Iterable
from pathlib import Path

from lowprec.errors import UserError
from lowprec.training.checkpoint import manifest, structure


def check_model(folder: Path, asked_by: str) -> None:
    """Raise UserError if a file of a model, or of a checkpoint of Accelerate, is damaged. A folder
    with a manifest is read once.

    Args:
        folder: Folder of the files, or another path, which is not looked at.
        asked_by: Name of the setting that names the folder.
    """
    _check(folder, asked_by, None)


def check_tokenizer(folder: Path, asked_by: str) -> None:
    """Raise UserError if a file of a tokenizer is damaged. Arguments are those of `check_model`."""
    _check(folder, asked_by, structure.MODEL_FILES)


def _check(folder: Path, asked_by: str, names: Container[str] | None) -> None:
    if not folder.is_dir():
        return
    if manifest.has_manifest(folder):
        problem = manifest.damage(folder, names=names)
    else:
        problem = structure.damage_of_model(folder)
    if problem is not None:
        raise UserError(f"{asked_by}: {folder} is not whole: {problem}")


def check_files(paths: Iterable[Path], asked_by: str) -> None:
    """Raise UserError if a path that a run writes to leads to something that is no file. A path
    that does not exist is right."""
    for path in paths:
        problem = manifest.not_a_file(path) if os.path.lexists(path) else None
        if problem is not None:
            raise UserError(f"{asked_by}: {path}: {problem}; move it away")
