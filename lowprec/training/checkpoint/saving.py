"""Checkpoints and models that are written whole or not at all.

`whole_folder` lets its block write below `<run>/unfinished/`, adds the manifest, and moves the
folder to its place. A kill before the move leaves `unfinished/`, which nothing reads and the next
training in the run's directory deletes.

The Trainer writes its checkpoints in place, and reads them without a look at what is there.
`CheckpointWriter.take_over` makes it write them by `whole_folder`, and check them before it reads
them. Where that is not possible, `CheckpointWriter.complete` adds the manifest after the Trainer's
last file: a checkpoint that was being rewritten then differs from the manifest that it had before.
"""

import contextlib
import ctypes
import functools
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers.trainer_utils import SaveStrategy

from lowprec.errors import TrainingStopped
from lowprec.training.checkpoint.files import last_checkpoint, remember_whole
from lowprec.training.checkpoint.history import rotate
from lowprec.training.checkpoint.manifest import write_manifest
from lowprec.training.checkpoint.running_loss import RunningLoss
from lowprec.training.checkpoint.saved import put_into_trainer_state
from lowprec.training.checkpoint.torn import check_whole

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

logger = logging.getLogger("lowprec")

UNFINISHED = "unfinished"
"""Name of the folder, in the directory of a run, that holds what is not complete yet."""

BEST = "load_best_model_at_end (false keeps the last weights)"
"""The setting of the Trainer that asks for the best checkpoint, as an error names it."""

_NOT_WRITTEN = "PytorchStreamWriter failed|IoError|I/O error"
"""Words in the errors of torch and of safetensors when a file can't be written."""

_AT_FDCWD = -100  # Linux: paths are relative to the working directory
_RENAME_EXCHANGE = 2


def delete_unfinished(directory: Path) -> None:
    """Delete what a kill has left in `directory`. No other process may be training there."""
    folder = directory / UNFINISHED
    if folder.is_dir():
        names = ", ".join(sorted(path.name for path in folder.iterdir()))
        logger.info("%s, which was not written to its end, is deleted from %s", names, folder)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(
    target: Path, *, step: int | None = None, args: "TrainingArguments"
) -> Iterator[Path]:
    """Yield the folder to write to; when the block is done, add the manifest and move the folder to
    `target`. A folder that is there is replaced.

    Every rank takes part. The move waits for all of them, and all of them wait for the move.

    Args:
        target: Path that the folder has in the end, in the directory of a run.
        step: Step of the manifest.
        args: Arguments of the Trainer, which know the ranks.
    """
    unfinished = target.parent / UNFINISHED / target.name
    yield unfinished
    _wait_for_all(args)
    if args.should_save and unfinished.is_dir():
        write_manifest(unfinished, step)
        replace(unfinished, target)
    _wait_for_all(args)


def _wait_for_all(args: "TrainingArguments") -> None:
    if args.world_size > 1:
        args.distributed_state.wait_for_everyone()  # pyright: ignore[reportOptionalMemberAccess]


def replace(folder: Path, target: Path) -> None:
    """Move `folder` to `target`, and delete what was there. At each moment `target` is the old
    folder or the new one, if the file system can exchange two names."""
    if os.path.lexists(target) and not _exchange(folder, target):
        before = folder.with_name(f"replaced-{target.name}")
        target.rename(before)
        folder.rename(target)
        before.rename(folder)
    elif not os.path.lexists(target):
        folder.rename(target)
    _flush(target.parent)
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        shutil.rmtree(folder)
    with contextlib.suppress(OSError):  # another folder in it is not complete yet
        folder.parent.rmdir()


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one operation; return False if this is not possible
    here."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):  # no Linux
        return False
    result = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return result == 0


def _flush(directory: Path) -> None:
    """Make the names in `directory` survive a crash of the machine."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class CheckpointWriter:
    """Completes the checkpoints that a Trainer writes.

    Args:
        add: Function that adds files of lowprec to a checkpoint: it gets the model and the folder.
            It is called on the ranks that save.
    """

    def __init__(self, add: Callable[[Any, Path], None]) -> None:
        self._add = add
        self._whole: Path | None = None
        """The checkpoint that was written last by `whole_folder`."""

    def take_over(self, trainer: "Trainer") -> None:
        """Make `trainer` write its checkpoints by `whole_folder`, and check each before it loads
        it.

        Some Trainers go on writing checkpoints in place: one that uploads them, because the upload
        reads them while the training goes on; and one of a user's own class that saves files of its
        own, because it may look for the checkpoint's folder under its name.
        """
        args = trainer.args
        if "_load_from_checkpoint" in vars(trainer):
            return
        trainer._load_from_checkpoint = _after_check(trainer._load_from_checkpoint, args)
        trainer._load_best_model = _after_check_of_best(trainer)
        if args.push_to_hub or not _saves_as_known(trainer):
            return
        save = trainer._save_checkpoint

        @functools.wraps(save)
        def save_whole(model: Any, trial: Any) -> None:
            find_run = trainer._get_output_dir
            run = Path(find_run(trial))
            step = trainer.state.global_step
            target = run / f"checkpoint-{step}"
            put_into_trainer_state(RunningLoss(trainer), trainer.state)
            with _one_line(target), whole_folder(target, step=step, args=args) as folder:
                trainer._get_output_dir = lambda trial: str(folder.parent)
                try:
                    save(model, trial)
                finally:
                    trainer._get_output_dir = find_run
                if args.should_save:
                    self._add(model, folder)
                _find_best(trainer, folder, run)
            self._whole = target
            if target.is_dir():
                remember_whole(target)
            if args.should_save:
                best = trainer.state.best_model_checkpoint
                rotate(run, args.save_total_limit, best, last=target)

        trainer._save_checkpoint = save_whole

    def complete(self, checkpoint: Path, model: Any, args: "TrainingArguments", step: int) -> None:
        """Complete a checkpoint that the Trainer has written, unless it is complete already."""
        written = self._whole
        self._whole = None
        if written is not None and written == checkpoint:
            return
        _wait_for_all(args)
        if args.should_save and checkpoint.is_dir():  # a search of parameters has other folders
            self._add(model, checkpoint)
            write_manifest(checkpoint, step)
            remember_whole(checkpoint)


@contextlib.contextmanager
def _one_line(target: Path) -> Iterator[None]:
    """Raise TrainingStopped in place of the error of a system that can't write the files of
    `target`, such as a full disk. What was written of them is deleted."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        if not isinstance(error, OSError) and not re.search(_NOT_WRITTEN, text):
            raise
        shutil.rmtree(target.parent / UNFINISHED / target.name, ignore_errors=True)
        last = last_checkpoint(target.parent)
        rest = f"; the last whole checkpoint is {last}" if last else ""
        raise TrainingStopped(f"{target} can't be written: {text}{rest}") from error


def _saves_as_known(trainer: "Trainer") -> bool:
    """Return whether the function that saves the Trainer's checkpoints is one of transformers' or
    TRL's."""
    module = getattr(trainer._save_checkpoint, "__module__", None) or ""
    return module.split(".")[0] in ("transformers", "trl")


def _after_check(load: Callable[..., Any], args: "TrainingArguments") -> Callable[..., Any]:
    @functools.wraps(load)
    def checked(resume_from_checkpoint: str, *more: Any, **settings: Any) -> Any:
        check_whole(Path(resume_from_checkpoint), args)
        return load(resume_from_checkpoint, *more, **settings)

    return checked


def _after_check_of_best(trainer: "Trainer") -> Callable[[], Any]:
    load = trainer._load_best_model

    @functools.wraps(load)
    def checked() -> Any:
        check_whole(Path(str(trainer.state.best_model_checkpoint)), trainer.args, BEST)
        return load()

    return checked


def _find_best(trainer: "Trainer", folder: Path, run: Path) -> None:
    """Name the best checkpoint in the Trainer's state, as the Trainer does, which looked for it
    beside `folder`."""
    state = trainer.state
    if not state.best_global_step or trainer.args.save_strategy == SaveStrategy.NO:
        return
    best = run / f"checkpoint-{state.best_global_step}"
    if state.best_model_checkpoint == str(best):
        return
    if best.exists() or best.name == folder.name:
        state.best_model_checkpoint = str(best)
        if trainer.args.should_save:
            state.save_to_json(str(folder / "trainer_state.json"))
