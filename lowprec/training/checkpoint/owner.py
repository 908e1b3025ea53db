"""The output directory of a Trainer that saves checkpoints: locked while it trains, with one
history."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lowprec.distributed.processes import on_main_process
from lowprec.errors import UserError
from lowprec.training.checkpoint import run_lock
from lowprec.training.checkpoint.files import checkpoints
from lowprec.training.checkpoint.folders import check_files
from lowprec.training.checkpoint.history import (
    delete_rest,
    order_times,
    rotate,
    set_aside_later,
)
from lowprec.training.checkpoint.saving import delete_unfinished
from lowprec.training.checkpoint.torn import wait_and_set_aside_torn
from lowprec.training.file_names import EVENTS, PLAN

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class Owner:
    """Holds the lock of a Trainer's output directory. The main process does it for all ranks.

    A Trainer without checkpoints (`save_strategy="no"`) has no history to protect: several may
    share a directory.
    """

    def __init__(self) -> None:
        self._directory: Path | None = None
        self._release: weakref.finalize | None = None

    def take(self, args: "TrainingArguments") -> None:
        """Hold the lock of `args.output_dir` from now on. Every rank calls this.

        Raises:
            UserError: another process holds it.
        """
        directory = output_dir(args)
        if args.save_strategy == "no" or self._directory == directory:
            return
        self.release()

        def hold() -> None:
            directory.mkdir(parents=True, exist_ok=True)
            check_files([directory / name for name in (PLAN, EVENTS)], "output_dir")
            run_lock.hold(directory)

        _on_main_process(args, hold)
        self._directory = directory
        if args.process_index == 0:
            # A training that fails ends without an event: the lock ends with its owner then.
            self._release = weakref.finalize(self, run_lock.release, directory)

    def release(self) -> None:
        """Hold no lock from now on."""
        if self._release is not None:
            self._release()
        self._release = None
        self._directory = None

    def go_on(self, state: "TrainerState", args: "TrainingArguments") -> None:
        """Set the checkpoints of an earlier history aside: those that are later than the step after
        which the Trainer goes on. Every rank calls this, after `take`."""
        if args.save_strategy == "no":
            return

        def set_aside() -> None:
            directory = output_dir(args)
            delete_unfinished(directory)
            delete_rest(directory)
            set_aside_later(directory, state.global_step, args.save_total_limit)
            order_times(directory)
            last = directory / f"checkpoint-{state.global_step}"
            if last.is_dir():  # A kill may have come between a save and the rotation after it.
                best = state.best_model_checkpoint
                rotate(directory, args.save_total_limit, best, last=last)

        _name_best(state, output_dir(args))
        _on_main_process(args, set_aside)

    def before_save(
        self, args: "TrainingArguments", control: "TrainerControl | None" = None
    ) -> None:
        """Make the Trainer's own rotation, which follows a save, go by step.

        Args:
            args: Arguments of the Trainer.
            control: What the Trainer does next. None: it may save.
        """
        saves = control is None or control.should_save
        if saves and args.should_save and args.save_strategy != "no":
            order_times(output_dir(args))


def set_aside_torn_if_free(directory: Path) -> None:
    """Set torn checkpoints in `directory` aside, unless another process is writing there."""
    if not checkpoints(directory):
        return
    try:
        run_lock.check_not_held(directory)
    except UserError:
        return
    wait_and_set_aside_torn(directory)


def _name_best(state: "TrainerState", directory: Path) -> None:
    """Name the best checkpoint of a resumed Trainer as rotation names the checkpoints, which must
    not delete it: `directory` may be given in other words now, or have been moved."""
    if not state.best_global_step:
        return
    own = directory / f"checkpoint-{state.best_global_step}"
    best = state.best_model_checkpoint
    if own.is_dir() and (best is None or own.resolve() == Path(best).resolve()):
        state.best_model_checkpoint = str(own)


def _on_main_process(args: "TrainingArguments", function: Callable[[], None]) -> None:
    state = args.distributed_state if args.world_size > 1 else None
    on_main_process(state, function)


def output_dir(args: "TrainingArguments") -> Path:
    """Return the directory that a Trainer writes to."""
    assert args.output_dir is not None
    return Path(args.output_dir)
