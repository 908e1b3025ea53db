"""Damage in the folder of a model or a tokenizer, in a checkpoint of Accelerate, and among the
files of a run. A folder is compared with its manifest; without one, the form of its files is
checked."""

import inspect
import os
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

from lowprec.errors import UserError
from lowprec.training.checkpoint import manifest, structure

_OF_ACCELERATE = (".safetensors", ".bin", ".pkl", ".json", ".distcp", ".metadata")
"""Ends of the names of files that Accelerate writes. A program may write others beside them."""


def files_of_state(save_state: Callable[..., Any], *args: Any, **kwargs: Any) -> frozenset[Any]:
    """Return the files in the folder that a call of `accelerator.save_state` will write to."""
    folder = inspect.signature(save_state).bind_partial(*args, **kwargs).arguments.get("output_dir")
    if folder is None or not Path(folder).expanduser().is_dir():
        return frozenset()
    return manifest.state_of_files(Path(folder).expanduser())


def write_manifest_of_state(folder: Path, step: int, before: frozenset[Any]) -> None:
    """Write the manifest of a checkpoint of Accelerate, which may lie in a folder with other files.

    Args:
        folder: Folder of the checkpoint.
        step: Number of finished steps.
        before: Result of `files_of_state` before the checkpoint was written.
    """
    written = {name for name, *_ in manifest.state_of_files(folder) - before}
    names = {name for name in written if name.endswith(_OF_ACCELERATE)}
    manifest.write_manifest(folder, step, names=names | set(manifest.READ_IF_PRESENT))


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
