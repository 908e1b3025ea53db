"""Checkpoints of Accelerate's `save_state`, written whole where the folder is the checkpoint's own.

A loop often saves to one folder again and again. A kill inside of a save must leave the checkpoint
before. So the files are written beside it, and the folder is moved to its place. A folder with
files of other programs is written in place, and its manifest last.
"""

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowprec.training.checkpoint import manifest
from lowprec.training.checkpoint.saving import replace

if TYPE_CHECKING:
    from accelerate import Accelerator

_OF_ACCELERATE = (".safetensors", ".bin", ".pkl", ".json", ".distcp", ".metadata")
"""Ends of the names of files that Accelerate writes. A program may write others beside them."""


def save_whole(
    accelerator: "Accelerator",
    save_state: Callable[..., Any],
    arguments: inspect.BoundArguments,
    add: Callable[[Path], None],
    step: int,
) -> str:
    """Save a checkpoint and return its folder. Every rank takes part.

    Args:
        accelerator: The Accelerator whose state is saved.
        save_state: Its own function.
        arguments: Arguments for that function.
        add: Function that adds files of lowprec to a folder, on the ranks that write.
        step: Number of finished steps.
    """
    settings = accelerator.project_configuration
    named = arguments.arguments.get("output_dir")
    target = None
    if named is not None and not settings.automatic_checkpoint_naming:
        target = Path(named).expanduser()
    moves = target is not None and _is_own(target)
    if settings.save_on_each_node:
        writes = accelerator.is_local_main_process
    else:
        writes = accelerator.is_main_process
    before: frozenset[Any] = frozenset()
    if target is not None and moves:
        unfinished = target.with_name(f".unfinished-{target.name}")
        if writes:
            shutil.rmtree(unfinished, ignore_errors=True)
        accelerator.wait_for_everyone()
        arguments.arguments["output_dir"] = str(unfinished)
    elif target is not None and target.is_dir():
        before = manifest.state_of_files(target)

    folder = Path(save_state(*arguments.args, **arguments.kwargs))
    accelerator.wait_for_everyone()
    if writes:
        add(folder)
        manifest.write_manifest(folder, step, names=None if moves else _written(folder, before))
        if target is not None and moves:
            replace(folder, target)
    accelerator.wait_for_everyone()
    return str(target if moves else folder)


def _is_own(target: Path) -> bool:
    """Return whether a folder can be replaced: it is new or empty, or holds a checkpoint alone."""
    if target.name in ("", "..") or target.is_symlink():
        return False
    if not target.exists():
        return True
    if not target.is_dir():
        return False
    try:
        return not manifest.unlisted(target) if any(target.iterdir()) else True
    except (OSError, ValueError):  # no manifest, or a damaged one
        return False


def _written(folder: Path, before: frozenset[Any]) -> set[str]:
    """Return the names of the files that Accelerate has written to a folder with other files.

    Args:
        folder: Folder of the checkpoint.
        before: Its `state_of_files` before the checkpoint was written.
    """
    changed = {name for name, *_ in manifest.state_of_files(folder) - before}
    return {name for name in changed if name.endswith(_OF_ACCELERATE)} | {*manifest.READ_IF_PRESENT}
